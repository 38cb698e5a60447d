"""SSD: distillation, its teacher, and a run that learns from another."""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from test_methods import COUNTS, small_teacher

from glmc.errors import InputError
from glmc.export.load import load_trained
from glmc.losses.distillation import distillation
from glmc.models.backbone import create_backbone
from glmc.models.teacher import load_teacher
from glmc.models.two_heads import TwoHeadsModule
from glmc.tasks.distillation import SoftLabelTask

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 1, 2, 3, 0])


def new_task(**options) -> SoftLabelTask:
    torch.manual_seed(0)
    net = create_backbone('resnet32_cifar', len(COUNTS), channels=(4, 8, 8), depth=1)
    return SoftLabelTask(TwoHeadsModule(net), COUNTS, **{'teacher': small_teacher(), **options}).train()


def test_distillation_is_the_formula_in_numpy():
    rng, tau = np.random.default_rng(0), 1.7
    student, teacher = rng.normal(size=(2, 5, 4))
    q, p = (np.exp(each / tau) / np.exp(each / tau).sum(1, keepdims=True) for each in (student, teacher))
    leaf = torch.from_numpy(student).requires_grad_()
    loss = distillation(leaf, torch.from_numpy(teacher), tau)
    loss.backward()
    assert loss.item() == pytest.approx(tau ** 2 * (p * (np.log(p) - np.log(q))).sum(1).mean(), rel=1e-12)
    np.testing.assert_allclose(leaf.grad, tau * (q - p) / 5, rtol=1e-9, atol=1e-12)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = logits.detach().clone().requires_grad_()
    loss = distillation(logits, teacher, 2.0)
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() < 1e-15 and teacher.grad is None


def test_the_loss_is_that_of_both_classifiers():
    task = new_task()
    outputs = task(IMAGES, LABELS)
    backbone = task.get_eval_model()
    features = backbone.forward_head(backbone.forward_features(IMAGES), pre_logits=True)
    with torch.no_grad():
        teacher = small_teacher().eval()(IMAGES)
    expected = torch.nn.functional.cross_entropy(task.conventional_classifier()(features), LABELS)
    torch.testing.assert_close(outputs['loss'], expected + distillation(backbone.fc(features), teacher, 2.0))


def test_a_teacher_stays_as_it_is():
    task = new_task()
    before = task.teacher.digest()
    task(IMAGES, LABELS)['loss'].backward()
    assert torch.equal(task.teacher.digest(), before) and not task.teacher.model.training
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert not {id(p) for p in task.get_trainable_module().parameters()} & {id(p) for p in task.teacher.parameters()}


def test_a_teacher_has_its_own_normalisation():
    student, net = create_backbone('resnet32_cifar', 4), create_backbone('resnet18', 4).eval()
    student.pretrained_cfg = {**student.pretrained_cfg, 'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.5, 0.25)}
    pixels = torch.rand(2, 3, 32, 32)
    cfg = [torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for model in (student, net) for name in ('mean', 'std')]
    found = load_teacher(net, student)((pixels - cfg[0]) / cfg[1])
    torch.testing.assert_close(found, net((pixels - cfg[2]) / cfg[3]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('teacher, message', [
    (None, '--teacher: missing, expected'), ('nowhere/run', '--teacher nowhere/run: '),
    (lambda: create_backbone('resnet32_cifar', 7), '--teacher model: found 7 classes, expected 4'),
    (lambda: create_backbone('resnet32_cifar', 4, in_chans=1), '--teacher model: found 1 channels, expected 3')])
def test_a_teacher_that_does_not_fit_is_refused(teacher, message):
    with pytest.raises(InputError, match=message):
        load_teacher(teacher() if callable(teacher) else teacher, create_backbone('resnet32_cifar', 4))


def test_a_run_with_another_teacher_is_not_resumed():
    task, other = new_task(), new_task(teacher=create_backbone('resnet32_cifar', len(COUNTS)))
    state = task.get_task_state()
    assert {name.split('.')[0] for name in state} == {'classifier', 'teacher_digest'}  # the teacher is not stored
    new_task().load_task_state(state)
    with pytest.raises(InputError, match='--teacher: found other weights than those of the interrupted run'):
        other.load_task_state(state)


def test_a_student_of_a_run(script, folders, finished_run, tmp_path):
    options = ['--model', 'test_resnet', '--img-size', '32', '--batch-size', '8', '--workers', '0', '--epochs', '1', '--lr',
               '0.01', '--no-report', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', '--method', 'ssd']
    assert '--teacher: missing' in script(*options).err
    outcome = script(*options, '--teacher', finished_run, '--stage2', 'lws,average')
    assert outcome.code == 0, outcome.err
    metrics, taught = (json.loads((run / 'export' / 'metrics.json').read_text()) for run in (tmp_path / 'run', finished_run))
    assert metrics['teacher_top1'] == taught['top1'] and 'top1' in metrics
    assert timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).num_classes == 3
    checkpoint = next((tmp_path / 'run' / 'checkpoints').glob('epoch-*.safetensors'))
    assert load_trained(str(checkpoint)).conventional is not None
    shutil.rmtree(tmp_path / 'run' / 'export')
    assert script(*options, '--teacher', finished_run, '--resume', 'auto').code == 0
