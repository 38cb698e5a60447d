"""Parameter groups, clipping and the learning rate rule."""
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.scheduler import create_scheduler_v2

from glmc.errors import InputError
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.models.glmc import GLMCModule
from glmc.training.engine import update
from glmc.training.optim import clip_parameters, create_optimizer, scaled_learning_rate

HEADS = {'classifier.weight', 'classifier.bias', 'projector.weight', 'projector.bias', 'predictor.weight', 'predictor.bias'}
COMMON = dict(opt='sgd', lr=0.1, weight_decay=0.05, momentum=0.8)


def module(name: str = 'resnet32_cifar') -> GLMCModule:
    return GLMCModule(create_backbone(name, 4), projection_dim=6)


def settings(model, optimizer) -> dict[str, dict]:
    """Parameter name -> its group's settings; every parameter must be in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group['params']]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


@pytest.mark.parametrize('make', [module, lambda: module().backbone, lambda: module('test_vit')])
def test_weight_decay_is_on_every_parameter(make):
    model = make()
    for name, group in settings(model, create_optimizer(model, **COMMON)).items():
        assert (group['weight_decay'], group['lr'], group['momentum']) == (0.05, 0.1, 0.8), name


@pytest.mark.parametrize('make', [module, lambda: module().backbone, lambda: module('test_vit')])
def test_filter_exempts_biases_norms_and_what_the_model_names(make):
    model = make()
    backbone = getattr(model, 'backbone', model)
    named = backbone.no_weight_decay() if hasattr(backbone, 'no_weight_decay') else set()
    optimizer = create_optimizer(model, filter_bias_and_bn=True, **COMMON)
    for name, group in settings(model, optimizer).items():
        exempt = model.get_parameter(name).ndim <= 1 or name.removeprefix('backbone.') in named
        assert group['weight_decay'] == (0 if exempt else 0.05), name


@pytest.mark.parametrize('name', ['resnet32_cifar', 'test_vit'])
def test_layer_decay_falls_from_the_heads_to_the_stem(name):
    model = module(name)
    scales = {key: group.get('lr_scale', 1) for key, group in settings(
        model, create_optimizer(model, layer_decay=0.5, **COMMON)).items()}
    head = {key for key in scales if key.startswith(('backbone.fc.', 'backbone.head.'))}
    stem = min(scales[key] for key in scales)
    assert head
    assert all(scales[key] == 1 for key in HEADS | head)
    assert scales['backbone.conv1.weight' if name == 'resnet32_cifar' else 'backbone.patch_embed.proj.weight'] == stem
    levels = sorted(set(scales.values()), reverse=True)
    assert levels == [0.5 ** level for level in range(len(levels))]
    assert len(levels) > 3


@pytest.mark.parametrize('name', ['resnet32_cifar', 'test_vit'])
def test_layer_decay_leaves_weight_decay_on_every_parameter(name):
    model = module(name)
    groups = settings(model, create_optimizer(model, layer_decay=0.5, **COMMON))
    assert {group['weight_decay'] for group in groups.values()} == {0.05}


def test_layer_decay_and_filter_together():
    model = module()
    filtered = settings(model, create_optimizer(model, layer_decay=0.5, filter_bias_and_bn=True, **COMMON))
    assert filtered['backbone.bn1.weight']['weight_decay'] == 0
    assert filtered['backbone.conv1.weight']['weight_decay'] == 0.05


def test_a_schedule_applies_layer_decay():
    model = module()
    optimizer = create_optimizer(model, layer_decay=0.5, **COMMON)
    create_scheduler_v2(optimizer, sched='cosine', num_epochs=10)[0].step(0)
    rates = {name: group['lr'] for name, group in settings(model, optimizer).items()}
    assert rates['classifier.weight'] == rates['backbone.fc.weight'] == pytest.approx(0.1)
    assert rates['backbone.conv1.weight'] < 0.01


def test_two_steps_of_momentum_with_decay_by_hand():
    model = torch.nn.Linear(3, 2)
    expected = [p.detach().clone() for p in (model.weight, model.bias)]
    velocity = [torch.zeros_like(p) for p in expected]
    optimizer = create_optimizer(model, **{**COMMON, 'opt': 'momentum'})
    for _ in range(2):
        optimizer.zero_grad()
        (2 * model.weight.sum() + 3 * model.bias.sum()).backward()
        optimizer.step()
        velocity = [0.8 * v + g + 0.05 * p for v, g, p in zip(velocity, (2, 3), expected, strict=True)]
        expected = [p - 0.1 * v for p, v in zip(expected, velocity, strict=True)]
    torch.testing.assert_close([model.weight.detach(), model.bias.detach()], expected)


def test_optimizer_options_arrive():
    optimizer = create_optimizer(
        module(), **{**COMMON, 'opt': 'adamw'}, opt_eps=1e-5, opt_betas=[0.8, 0.95], opt_kwargs=dict(amsgrad=True))
    for group in optimizer.param_groups:
        assert (group['eps'], list(group['betas']), group['amsgrad']) == (1e-5, [0.8, 0.95], True)


@pytest.mark.parametrize('change', [
    dict(opt='adamwww'), dict(opt_kwargs=dict(no_such=1)), dict(opt='adamw', opt_betas=[2, 2])])
def test_a_wrong_optimizer_is_one_line(change):
    with pytest.raises(InputError, match='^--opt ') as error:
        create_optimizer(module(), **{**COMMON, **change})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('opt, scale, expected', [
    ('sgd', None, 0.4), ('adamw', None, 0.2), ('lamb', None, 0.2), ('nadam', None, 0.2), ('adamw', 'linear', 0.4),
    ('sgd', 'sqrt', 0.2), ('rmsprop', None, 0.4)])
def test_learning_rate_follows_the_global_batch(opt, scale, expected):
    assert scaled_learning_rate(opt, 1024, 0.1, 256, scale) == pytest.approx(expected)


CLASSIFIERS = {  # method -> names of its classifiers beside the backbone's
    'ce': set(), 'ldam_drw': {'classifier.weight'}, 'bbn': {'classifier.weight', 'classifier.bias', 'rebalancer.weight'},
    'glmc': {'classifier.weight', 'classifier.bias'}, 'glmc_balanced': set(),
    'glmc_cosine': {'classifier.weight', 'rebalancer.weight'}}


def task_of(method: str, model: str = 'resnet32_cifar'):
    row = METHODS[method]
    return row.task(row.module(create_backbone(model, 4)), [9, 5, 3, 2])


@pytest.mark.parametrize('method', CLASSIFIERS)
@pytest.mark.parametrize('model, own', [('resnet32_cifar', 'fc'), ('test_efficientnet', 'classifier')])
def test_adaptive_clipping_excludes_the_classifiers_and_nothing_else(method, model, own):
    task = task_of(method, model)
    module = task.get_trainable_module()
    prefix = 'backbone.' if hasattr(module, 'backbone') else ''
    excluded = CLASSIFIERS[method] | {f'{prefix}{own}.weight', f'{prefix}{own}.bias'}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert set(names.values()) - {names[id(p)] for p in clip_parameters(task, 'agc')} == excluded
    for mode in ('norm', 'value'):
        assert {names[id(p)] for p in clip_parameters(task, mode)} == set(names.values())


def test_an_update_clips_the_predictor_and_not_the_classifiers():
    AcceleratorState._reset_state(True)
    accelerator, task = Accelerator(cpu=True), task_of('glmc')
    module = task.get_trainable_module()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1000.0)
    update(accelerator, task, torch.optim.SGD(module.parameters(), lr=1.0), clip_grad=0.01, clip_mode='agc')
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in module.named_parameters()}
    free = {name for name, change in moved.items() if change == pytest.approx(1000, abs=1)}
    assert free == {'classifier.weight', 'classifier.bias', 'backbone.fc.weight', 'backbone.fc.bias'}
    assert max(moved[name] for name in moved.keys() - free) < 1
    AcceleratorState._reset_state(True)
