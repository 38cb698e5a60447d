"""RIDE and BalPoE as rows: the rows that they meet, and what is evaluated beside the export."""
import json
import sys

import pytest
import timm
import torch
from conftest import run_command
from test_contrastive_tasks import COUNTS

from glmc.cli import parse_args, pick
from glmc.config import train_parser
from glmc.errors import InputError
from glmc.losses.classification import LDAMLoss, LogitAdjustedLoss
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.models.experts import Experts

LABELS = torch.tensor([0, 1, 1, 2, 3, 0])
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def new_task(name: str, **changed):
    row, (options, _) = METHODS[name], parse_args(train_parser(METHODS), ['--method', name])
    vars(options).update(changed)
    torch.manual_seed(0)
    backbone = create_backbone('resnet32_cifar', len(COUNTS), channels=(8, 12, 16), depth=1,
                               **row.backbone(**pick(options, row.backbone_options)))
    return row.task(row.module(backbone), COUNTS, **pick(options, row.task_options)).train()


@pytest.mark.parametrize('progress', [0.0, 0.9])
def test_one_expert_is_ldam_drw(progress):
    task, loss = new_task('ride', experts=1), LDAMLoss(COUNTS)
    for each in (task, loss):
        each.set_progress(progress)
    outputs = task(IMAGES, LABELS)
    torch.testing.assert_close(outputs['loss'], loss(outputs['output'], LABELS))
    assert outputs['loss_div'].abs() < 1e-6


def test_one_expert_of_balpoe_is_balanced_softmax():
    outputs = new_task('balpoe', experts=1)(IMAGES, LABELS)
    torch.testing.assert_close(outputs['loss'], LogitAdjustedLoss(COUNTS)(outputs['output'], LABELS))


def test_a_whole_label_of_cmo_is_that_of_ride():
    """λ = 1."""
    one, two = (new_task(name) for name in ('ride', 'ride_cmo'))
    soft = torch.nn.functional.one_hot(LABELS, len(COUNTS)).float()
    for task in (one, two):
        task.set_progress(0.9)
    torch.testing.assert_close(one(IMAGES, LABELS)['loss'], two(IMAGES, soft)['loss'])


def test_temperatures_come_with_the_weights():
    task = new_task('ride')
    task.set_progress(0.7)
    assert task.temperature.tolist() == [1] * 4
    task.set_progress(0.8)
    assert task.temperature[0] == 1 and (task.temperature.diff() < 0).all()
    assert torch.equal(task.criterion.class_weight, task.criterion.deferred_weight)


def test_a_net_without_experts_is_refused():
    with pytest.raises(InputError, match='expected a backbone with experts, found CifarResNet'):
        METHODS['ride'].task(create_backbone('resnet32_cifar', 4), COUNTS)


OPTIONS = ['--img-size', '32', '--batch-size', '8', '--workers', '0', '--epochs', '1', '--lr', '0.01', '--no-report',
           '--method', 'ride', '--experiment', 'run']


def metrics_of(script, folders, tmp_path, *options) -> dict:
    outcome = script(*OPTIONS, '--data-dir', folders, '--output', tmp_path, *options)
    assert outcome.code == 0, outcome.err
    return json.loads((tmp_path / 'run' / 'export' / 'metrics.json').read_text())


def test_the_unfolded_experts_are_evaluated_beside_a_wide_net(script, folders, tmp_path):
    metrics = metrics_of(script, folders, tmp_path, '--model', 'test_resnet', '--stage2', 'ncm')
    assert 0 <= metrics['experts_top1'] <= 100 and metrics['num_images'] == 13
    assert metrics['parameters'] > 1.4e6  # of the wide net
    assert (tmp_path / 'run' / 'stage2' / 'ncm' / 'export' / 'model.safetensors').exists()


def test_experts_of_a_cifar_net_are_the_export(script, folders, tmp_path):
    metrics = metrics_of(script, folders, tmp_path, '--model', 'resnet32_cifar', '--model-ema')
    assert 'experts_top1' not in metrics
    assert isinstance(timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True), Experts)
    (tmp_path / 'run' / 'export').rename(tmp_path / 'run' / 'first')

    checkpoint = tmp_path / 'run' / 'checkpoints' / 'epoch-0000.safetensors'
    assert run_command(sys.executable, '-m', 'glmc.export', checkpoint).code == 0
    weights = [(tmp_path / 'run' / name / 'model.safetensors').read_bytes() for name in ('first', 'export')]
    assert weights[0] == weights[1]


def test_stage2_refuses_experts_before_the_run(script, folders, tmp_path):
    outcome = script(*OPTIONS, '--data-dir', folders, '--output', tmp_path, '--model', 'resnet32_cifar', '--stage2', 'crt')
    assert outcome.code == 2 and outcome.err.splitlines()[-1] == (
        'error: --model resnet32_cifar: expected a classifier that is one linear layer with a bias on the pooled features, '
        'found those of 3 experts')
