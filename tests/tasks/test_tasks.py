"""The task: Eq. 11 from its parts, the stop-gradient, what is saved, and what is evaluated."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glmc.losses.classification import DeferredReweighting, LDAMLoss
from glmc.models.backbone import create_backbone
from glmc.models.bilateral import BilateralModule
from glmc.models.cosine import CosineModule
from glmc.models.glmc import GLMCModule
from glmc.tasks.bilateral import BilateralTask
from glmc.tasks.glmc import GLMCTask, OneViewGLMCTask
from glmc.tasks.single_view import CosineTask, SingleViewTask, WeightBalancingTask

COUNTS = [50, 12, 3]
SMALL = dict(num_classes=3, channels=(4, 6, 8), depth=1)


def glmc_task(seed: int = 0, balanced: bool = False, **kwargs) -> GLMCTask:
    torch.manual_seed(seed)
    module = GLMCModule(create_backbone('resnet32_cifar', **SMALL), projection_dim=5, balanced=balanced)
    return GLMCTask(module, COUNTS, **kwargs).eval()


def batch() -> tuple:
    """Two views and their soft labels."""
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    return views, tuple(torch.rand(4, 3, generator=generator).softmax(-1) for _ in range(2))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weight) -> float:
    logits, targets = logits.detach().double().numpy(), targets.double().numpy()
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -(np.asarray(weight) * targets * log_softmax).sum(1).mean()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().numpy(), b.detach().double().numpy()
    return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()


def weights_by_hand(power: float) -> np.ndarray:
    inverse = np.array(COUNTS, dtype=float) ** -power
    return 3 * inverse / inverse.sum()


@pytest.mark.parametrize('power, gamma', [(1.0, 1.0), (1.2, 4.0), (0.0, 0.0)])
@pytest.mark.parametrize('progress', [None, 0.0, 0.25, 0.5, 0.995])
def test_loss_is_equation_11(power, gamma, progress):
    task, (views, targets) = glmc_task(reweight_power=power, consistency_weight=gamma), batch()
    if progress is not None:
        task.set_progress(progress)
    losses, outputs = task(views, targets), task.trainable_module(*views)
    loss_c = sum(cross_entropy(o.logits, p, 1) for o, p in zip(outputs, targets, strict=True))
    loss_cb = sum(cross_entropy(o.rebalanced_logits, p, weights_by_hand(power))
                  for o, p in zip(outputs, targets, strict=True))
    loss_sim = -cosine(outputs[0].prediction, outputs[1].projection) - cosine(outputs[1].prediction, outputs[0].projection)
    alpha = 1 - (progress or 0) ** 2
    assert losses['loss_c'].item() == pytest.approx(loss_c, rel=1e-5)
    assert losses['loss_cb'].item() == pytest.approx(loss_cb, rel=1e-5)
    assert losses['loss_sim'].item() == pytest.approx(loss_sim, abs=1e-5)
    assert losses['loss'].item() == pytest.approx(alpha * loss_c + (1 - alpha) * loss_cb + gamma * loss_sim, rel=1e-5)
    assert torch.equal(losses['output'], task.get_eval_model()(views[0]))


@pytest.mark.parametrize('scope', ['losses', 'encoder'])
def test_one_view_of_both_halves_is_half_of_glmc_without_consistency(scope):
    """GLMC sums over its views, one view takes the mean over all mixed images; gradients alike."""
    task, (views, targets) = glmc_task(consistency_weight=0.0, alpha_scope=scope), batch()
    one = OneViewGLMCTask(GLMCModule(create_backbone('resnet32_cifar', **SMALL), 0), COUNTS, alpha_scope=scope).eval()
    one.trainable_module.load_state_dict(task.trainable_module.state_dict(), strict=False)
    gradients = []
    for each, inputs in ((task, (views, targets)), (one, (torch.cat(views), torch.cat(targets)))):
        each.set_progress(0.5)
        losses = each(*inputs)
        losses['loss'].backward()
        assert losses.keys() == {'loss', 'output', *each.loss_names}
        gradients.append(each.get_eval_model().conv1.weight.grad)
    assert torch.allclose(gradients[0], 2 * gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('power, alpha', [(1.0, 0.5), (2.0, 0.75), (8.0, 1 - 0.5 ** 8)])
def test_alpha_by_its_power(power, alpha):
    task = glmc_task(alpha_power=power)
    task.set_progress(0.5)
    assert task.alpha.item() == pytest.approx(alpha)


@pytest.mark.parametrize('progress', [0.0, 0.6])
def test_alpha_on_the_encoder_alone(progress):
    """The encoder's gradient is that of Eq. 11, the classifiers' that of their losses in full, L_cb as a weighted mean."""
    gradients = {}
    for scope in ('losses', 'encoder'):
        task = glmc_task(alpha_scope=scope, consistency_weight=0.5)
        task.set_progress(progress)
        losses = task(*batch())
        losses['loss'].backward()
        gradients[scope] = {name: p.grad for name, p in task.trainable_module.named_parameters()}
    alpha, mean = 1 - progress ** 2, np.average(weights_by_hand(1.0), weights=COUNTS)
    assert losses['loss'].item() == pytest.approx(
        (losses['loss_c'] + losses['loss_cb'] / mean + 0.5 * losses['loss_sim']).item(), rel=1e-5)
    for name, gradient in gradients['encoder'].items():
        share = {'classifier': alpha, 'backbone.fc': mean * (1 - alpha)}.get(name.rpartition('.')[0], 1)
        torch.testing.assert_close(share * gradient, gradients['losses'][name], rtol=1e-4, atol=1e-6)
    assert gradients['encoder']['backbone.fc.weight'].abs().max() > 1e-4


def test_alpha_has_nothing_to_part_on_balanced_data():
    apart, plain = (glmc_task(balanced=True, alpha_scope=scope)(*batch())['loss'] for scope in ('encoder', 'losses'))
    assert torch.equal(apart, plain)


def test_losses_have_their_names():
    task = glmc_task()
    assert set(task(*batch())) == {'loss', 'output', *task.loss_names}
    assert task.loss_names == ('loss_c', 'loss_cb', 'loss_sim')


@pytest.mark.parametrize('progress, learns, rests', [
    (0.0, 'classifier.weight', 'backbone.fc.weight'), (1.0, 'backbone.fc.weight', 'classifier.weight')])
def test_alpha_decides_which_classifier_learns(progress, learns, rests):
    task = glmc_task(consistency_weight=0.0)
    task.set_progress(progress)
    task(*batch())['loss'].backward()
    gradients = {name: p.grad.abs().max().item() for name, p in task.trainable_module.named_parameters()}
    assert gradients[learns] > 1e-4
    assert gradients[rests] == 0


def consistency_gradient(task: GLMCTask, stop: bool) -> torch.Tensor:
    """Gradient of the projector's weight, with the equation written out."""
    a, b = task.trainable_module(*batch()[0])
    h_a, h_b = (o.projection.detach() if stop else o.projection for o in (a, b))
    loss = -(F.normalize(a.prediction) * F.normalize(h_b)).sum(1).mean() \
        - (F.normalize(b.prediction) * F.normalize(h_a)).sum(1).mean()
    return torch.autograd.grad(loss, task.trainable_module.projector.weight)[0]


def test_consistency_loss_stops_its_gradient_at_the_projection():
    task = glmc_task()
    loss_sim = task(*batch())['loss_sim']
    gradient = torch.autograd.grad(loss_sim, task.trainable_module.projector.weight)[0]
    torch.testing.assert_close(gradient, consistency_gradient(task, stop=True))
    assert not torch.allclose(gradient, consistency_gradient(task, stop=False), rtol=1e-2)


@pytest.mark.parametrize('progress', [0.0, 0.5])
def test_balanced_data_needs_no_rebalanced_classifier(progress):
    task, (views, targets) = glmc_task(balanced=True, consistency_weight=2.0), batch()
    task.set_progress(progress)
    losses, outputs = task(views, targets), task.trainable_module(*views)
    loss_c = sum(cross_entropy(o.rebalanced_logits, p, 1) for o, p in zip(outputs, targets, strict=True))
    assert losses['loss_c'].item() == pytest.approx(loss_c, rel=1e-5)
    assert losses['loss_cb'] == 0
    assert losses['loss'].item() == pytest.approx(loss_c + 2 * losses['loss_sim'].item(), rel=1e-5)


def test_the_eval_model_is_the_bare_backbone():
    task = glmc_task()
    assert task.get_eval_model() is task.trainable_module.backbone
    assert task.get_eval_model(ema=True) is None


@pytest.mark.parametrize('balanced', [False, True])
def test_checkpoint_is_a_plain_model_and_what_stands_beside_it(balanced):
    task = glmc_task(balanced=balanced)
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict', 'task_state'}
    create_backbone('resnet32_cifar', **SMALL).load_state_dict(state['state_dict'])
    whole = {f'backbone.{name}' for name in state['state_dict']} | set(state['task_state'])
    assert whole == set(task.trainable_module.state_dict())
    assert set(state['task_state']) == set(task.get_task_state())
    assert not any(name.startswith('backbone') for name in state['task_state'])


def test_constants_are_not_saved():
    assert all(name.startswith('trainable_module.') for name in glmc_task().state_dict())


def test_loading_a_checkpoint_makes_two_tasks_equal():
    source, target = glmc_task(seed=0), glmc_task(seed=1)
    assert not torch.equal(source(*batch())['loss'], target(*batch())['loss'])
    target.load_checkpoint_state(**copy.deepcopy(source.get_checkpoint_state()))
    assert torch.equal(source(*batch())['loss'], target(*batch())['loss'])


@pytest.mark.parametrize('change, match', [
    (lambda state: state.pop('projector.bias'), r"missing \['projector.bias'\]"),
    (lambda state: state.update(extra=torch.zeros(1)), r"unexpected \['extra'\]")])
def test_heads_that_do_not_fit_are_an_error(change, match):
    task = glmc_task()
    state = dict(task.get_task_state())
    change(state)
    with pytest.raises(RuntimeError, match=match):
        task.load_task_state(state)
    task.load_task_state(state, strict=False)


def test_moving_average_is_its_formula_and_a_bare_backbone():
    task = glmc_task()
    before = copy.deepcopy(task.trainable_module.state_dict())
    task.setup_ema(decay=0.75)
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter.add_(1)
    task.update_ema(step=2)  # the first update copies
    average = task.get_eval_model(ema=True)
    assert type(average) is type(task.get_eval_model())
    for name, value in average.named_parameters():
        torch.testing.assert_close(value, before[f'backbone.{name}'] + 0.25)
    state = task.get_checkpoint_state(ema=True)
    assert set(state) == {'state_dict_ema', 'task_state_ema'}
    torch.testing.assert_close(state['task_state_ema']['projector.bias'], before['projector.bias'] + 0.25)


def test_moving_average_can_be_loaded():
    source, target = glmc_task(seed=0), glmc_task(seed=1)
    for task in (source, target):
        task.setup_ema()
    state = source.get_checkpoint_state(ema=True)
    target.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    saved, loaded = (task.get_trainable_module(ema=True).state_dict() for task in (source, target))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert not torch.equal(target.get_eval_model().fc.weight, source.get_eval_model().fc.weight)


def test_plain_task_is_cross_entropy():
    torch.manual_seed(0)
    task = SingleViewTask(create_backbone('resnet32_cifar', **SMALL), COUNTS).eval()
    task.set_progress(0.5)
    images, labels = batch()[0][0], torch.tensor([0, 2, 1, 2])
    losses = task(images, labels)
    assert torch.equal(losses['output'], task.get_eval_model()(images))
    expected = cross_entropy(losses['output'], torch.eye(3)[labels], 1)
    assert losses['loss'].item() == pytest.approx(expected, rel=1e-5)
    assert set(task.get_checkpoint_state()) == {'state_dict'}


def test_deferred_weights_follow_the_progress():
    task = SingleViewTask(create_backbone('resnet32_cifar', **SMALL), COUNTS, DeferredReweighting, drw_start=0.5)
    for progress, deferred in ((0.0, False), (0.5, True), (0.4, False)):
        task.set_progress(progress)
        assert torch.equal(task.criterion.class_weight, task.criterion.deferred_weight) == deferred


def folded_task(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    backbone = create_backbone('resnet32_cifar', **SMALL)
    if kind == 'bbn':
        return BilateralTask(BilateralModule(backbone), COUNTS)
    return CosineTask(CosineModule(backbone), COUNTS, LDAMLoss)


def step(task, kind: str, lr: float = 0.5) -> None:
    images, labels = batch()[0], torch.tensor([0, 2, 1, 2])
    task.train()(*((images, (labels, labels.flip(0))) if kind == 'bbn' else (images[0], labels)))['loss'].backward()
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
                parameter.grad = None
    task.update_ema(step=2)


@pytest.mark.parametrize('kind', ['bbn', 'ldam'])
def test_the_evaluated_model_is_the_folded_one_after_every_step(kind):
    task = folded_task(kind)
    task.setup_ema(decay=0.5)
    for _ in range(2):
        before = task.get_eval_model().fc.weight.clone()
        step(task, kind)
        for module in (task.trainable_module, task.get_trainable_module(ema=True).module):
            weight, bias = module.folded()
            assert torch.equal(module.backbone.fc.weight, weight) and torch.equal(module.backbone.fc.bias, bias)
        assert not torch.equal(task.get_eval_model().fc.weight, before)
    assert not torch.equal(task.get_eval_model(ema=True).fc.weight, task.get_eval_model().fc.weight)


@pytest.mark.parametrize('kind', ['bbn', 'ldam'])
def test_folded_tasks_save_and_load_what_stands_beside(kind):
    source, target = folded_task(kind, seed=0), folded_task(kind, seed=1)
    step(source, kind)
    target.load_checkpoint_state(**copy.deepcopy(source.get_checkpoint_state()))
    saved, loaded = (task.trainable_module.state_dict() for task in (source, target))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize('progress', [0.0, 0.5, 0.9])
def test_bilateral_loss_is_the_papers(progress):
    task, (images, _) = folded_task('bbn').eval(), batch()
    task.set_progress(progress)
    labels = torch.tensor([0, 2, 1, 2]), torch.tensor([2, 2, 0, 1])
    losses, alpha = task(images, labels), 1 - progress ** 2
    parts = [cross_entropy(losses['output'], torch.eye(3)[label], 1) for label in labels]
    assert losses['loss'].item() == pytest.approx(alpha * parts[0] + (1 - alpha) * parts[1], rel=1e-5)


def test_weight_balancing_projects_once_the_weights_are_deferred():
    torch.manual_seed(0)
    task = WeightBalancingTask(create_backbone('resnet32_cifar', **SMALL), COUNTS, drw_start=0.5)
    fc = task.get_eval_model().fc
    with torch.no_grad():
        fc.weight.mul_(torch.tensor([[4.0], [2.0], [1.0]]))
    before, norms = fc.weight.clone(), fc.weight.norm(dim=1)
    task.set_progress(0.4)
    task.update_ema()
    assert torch.equal(fc.weight, before)
    task.set_progress(0.5)
    radius = (norms.min() + 0.1 * (norms.max() - norms.min())).item()
    for progress in (0.6, 0.7):
        task.update_ema()
        assert fc.weight.norm(dim=1).max().item() == pytest.approx(radius, rel=1e-5)
        with torch.no_grad():
            fc.weight.mul_(3)
        task.set_progress(progress)  # the radius stays that of the first time
    other = WeightBalancingTask(create_backbone('resnet32_cifar', **SMALL), COUNTS)
    other.load_checkpoint_state(**copy.deepcopy(task.get_checkpoint_state()))
    assert other.max_norm.item() == pytest.approx(radius, rel=1e-5)
