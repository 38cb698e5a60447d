"""The step on zeros before the data is read: options that cannot train are refused, all others train as before."""
import random
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from torch import nn

import glmc.training.trial
from glmc.cli import parse_args, pick
from glmc.config import train_parser
from glmc.data.loaders import Normalize
from glmc.errors import InputError
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.training.engine import TrainStep
from glmc.training.optim import create_optimizer
from glmc.training.trial import failed_step, require_updates

SIZE = (3, 32, 32)
COUNTS = [9, 5, 2]


def step_of(method: str = 'ce', model: str = 'test_resnet', size: int = 32) -> TrainStep:
    row, (args, _) = METHODS[method], parse_args(train_parser(METHODS), ['--method', method])
    args.teacher = create_backbone(model, 3, img_size=size)
    backbone = create_backbone(model, 3, img_size=size, **row.backbone(**pick(args, row.backbone_options)))
    module = row.module(backbone, **pick(args, row.module_options))
    return TrainStep(row.task(module, COUNTS, **pick(args, row.task_options)),
                     row.mixer(COUNTS, **pick(args, row.mixer_options)), Normalize([0.5] * 3, [0.5] * 3))


def generators() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize('method', METHODS)
def test_the_step_of_every_method_works_by_shapes_alone_and_changes_nothing(method, monkeypatch):
    step, row, devices, copy_to = step_of(method), METHODS[method], [], glmc.training.trial.copy_to
    monkeypatch.setattr(glmc.training.trial, 'copy_to', lambda module, to: devices.append(to.type) or copy_to(module, to))
    before = {name: value.clone() for name, value in step.task.state_dict().items()}
    states = generators()
    images = 2 if row.paired and not step.mixer.within_batch else 1
    assert failed_step(step, Accelerator(), 8, images, len(row.views), SIZE) is None
    assert devices == ['meta'] and generators() == states
    assert all(torch.equal(value, before[name]) for name, value in step.task.state_dict().items())
    assert all(p.grad is None for p in step.task.parameters())


def test_a_model_that_only_fails_without_values_is_accepted():
    step = step_of()
    step.task.get_trainable_module().register_forward_pre_hook(lambda module, inputs: float(inputs[0].sum()) and None)
    assert failed_step(step, Accelerator(), 8, 1, 1, SIZE) is None


@pytest.mark.parametrize('batch, fails', [(1, True), (2, False)])
def test_batchnorm_of_one_value(batch, fails):
    error = failed_step(step_of(), Accelerator(), batch, 1, 1, SIZE)
    assert ('more than 1 value per channel' in error) if fails else error is None


@pytest.mark.parametrize('opt', ['momentum', 'adamw', 'lookahead_sgd', 'lamb', 'muon', 'adafactor', 'adan'])
def test_optimizers_that_update(opt):
    def create(model):
        return create_optimizer(model, opt=opt, lr=0.01, weight_decay=0.1, momentum=0.9, fused=True)
    states = generators()
    require_updates(create, opt, torch.device('cpu'))
    assert generators() == states


@pytest.mark.parametrize('create, expected', [
    (torch.optim.LBFGS, '--opt x: needs a closure'),
    (lambda parameters: create_optimizer(nn.ModuleList(), opt='x', lr=1, weight_decay=0, momentum=0), '--opt x: ')])
def test_optimizers_that_cannot_update(create, expected):
    with pytest.raises(InputError, match=f'^{expected}'):
        require_updates(lambda model: create(model.parameters()), 'x', torch.device('cpu'))


REFUSED = {  # options -> start of the error
    '-b 1': '--batch-size 1: BatchNorm has no variance of one value, expected 2 or more images per process',
    '-b 1 --method ce --on-bad-image skip': '--batch-size 1: BatchNorm',
    '--opt adahessian': '--opt adahessian: cannot update a model: ',
    '--opt lookahead_adahessian': '--opt lookahead_adahessian: cannot update a model: ',
    '--model test_convnext --img-size 7': '--model test_convnext: cannot train by glmc on images of 7x7: .*Kernel size',
    '--model test_maxvit --img-size 40 --method ce': '--model test_maxvit: cannot train by ce on images of 40x40: ',
}


@pytest.mark.parametrize('options', REFUSED)
def test_what_cannot_train_is_refused_before_an_image_is_read(options, script, folders, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr('glmc.data.datasets.ImageSet.opened', lambda *_: opened.append(_))
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path / 'output', *options.split())
    line = outcome.err.splitlines()[-1]
    assert outcome.code == 2 and not opened and not (tmp_path / 'output').exists()
    assert re.match(f'error: {REFUSED[options]}', line), outcome.err


@pytest.mark.parametrize('options', ['--batch-size 1 --freeze-bn', '--batch-size 1 --img-size 64 --method ce'])
def test_batches_of_one_that_can_train(options, script, folders, tmp_path):
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, *options.split())
    assert outcome.code == 0, outcome.err
