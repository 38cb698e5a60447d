"""The step and the epoch: compiled as eager, accumulated as whole, no wait for the device; an epoch written out."""
import copy
from functools import partial

import numpy as np
import pytest
import timm.optim
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.scheduler import create_scheduler_v2
from timm.utils import unwrap_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from glmc.data.loaders import Normalize
from glmc.evaluation.metrics import LongTailEvaluator
from glmc.evaluation.priors import AdjustedModel
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.training.engine import TrainStep, evaluate, step_generator, train_batch, train_one_epoch, update
from glmc.training.meter import BufferGuard, Meter, NotFiniteError
from glmc.training.sam import sam_batch

COUNTS = [50, 12, 3]
WITHOUT_BATCHNORM = {
    'vit_tiny_patch16_224': dict(img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2),
    'convnext_atto': dict(patch_size=2, depths=(1, 1, 1, 1), dims=(8, 8, 12, 16))}
MODELS = {'resnet18': dict(layers=(1, 1, 1, 1), channels=(8, 8, 12, 16), stem_width=8), **WITHOUT_BATCHNORM}
VARIANTS = {'ce': dict(method='ce'), 'joint': dict(joint_forward=True), 'balanced': dict(balanced=True),
            'partner': dict(partner='batch')}


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def new_step(
        model: str = 'vit_tiny_patch16_224', method: str = 'glmc', partner: str = 'sampler', **module_options) -> TrainStep:
    torch.manual_seed(0)
    row = METHODS[method]
    backbone = create_backbone(model, num_classes=3, **MODELS[model])
    module = row.module(backbone, **({'projection_dim': 5, **module_options} if method == 'glmc' else {}))
    mixer = row.mixer(COUNTS, partner=partner, resample_power=0.5) if method == 'glmc' else row.mixer(COUNTS)
    return TrainStep(row.task(module, COUNTS), mixer, Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))


def batch(number: int = 0, size: int = 8, images: int = 2, views: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (size, images, views, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(3, (size, images), generator=generator)


class Batches(list):
    """A training loader of these batches."""

    def epoch(self, epoch: int, start_step: int = 0):
        self.last_epoch = epoch
        yield from ((*batch, 1.0) for batch in self[start_step:])


def batch_for(variant: str, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, views = {'ce': (1, 1), 'partner': (1, 2)}.get(variant, (2, 2))
    return batch(number, images=images, views=views)


def draw(step: TrainStep, number: int = 0):
    return step.mixer.sample_params(8, (32, 32), step_generator(1, 0, number))


def gradients(step: TrainStep) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in step.parameters()]
    step.zero_grad()
    return found


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= tolerance * max(other.norm(), 1e-3)


@pytest.mark.parametrize('model', MODELS)
def test_compiled_step_is_the_eager_step_and_is_compiled_once(model):
    eager = new_step(model)
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend('aot_eager')
    compiled.compile(fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(step.parameters(), lr=0.1) for step in (eager, compiled)]
    for number, progress in enumerate((0.0, 0.5, 0.995)):
        results = []
        for step, optimizer in zip((eager, compiled), optimizers, strict=True):
            step.task.set_progress(progress)
            optimizer.param_groups[0]['lr'] = 0.01 * (1 - progress)
            losses = step(*batch(number), draw(step, number))
            losses['loss'].backward()
            results.append((losses, [parameter.grad.clone() for parameter in step.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
        (losses, grads), (same_losses, same_grads) = results
        assert losses.keys() == same_losses.keys()
        assert_close([same_losses[name] for name in losses], [losses[name] for name in losses], 1e-5)
        assert_close(same_grads, grads)
    assert counter.frame_count == 1  # one graph, and none again for another λ, box, α or learning rate


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_is_one_graph(variant):
    step, counter = new_step(**VARIANTS[variant]), CompileCounterWithBackend('eager')
    eager = copy.deepcopy(step)
    step.compile(fullgraph=True, backend=counter)
    for number in range(2):
        inputs = *batch_for(variant, number), draw(step, number)
        torch.testing.assert_close(step(*inputs)['loss'], eager(*inputs)['loss'])
    assert counter.frame_count == 1


@pytest.mark.parametrize('model, training', [('resnet18', False), *((model, True) for model in WITHOUT_BATCHNORM)])
def test_joint_forward_is_two_forward_passes_where_no_batchnorm_looks_across(model, training):
    apart, joint = new_step(model).train(training), new_step(model, joint_forward=True).train(training)
    results = []
    for step in (apart, joint):
        losses = step(*batch(), draw(step))
        losses['loss'].backward()
        results.append((list(losses.values()), gradients(step)))
    assert_close(results[0][0], results[1][0], 1e-5)
    assert_close(results[0][1], results[1][1])


def test_joint_forward_lets_batchnorm_see_both_views():
    losses = [step(*batch(), draw(step))['loss'] for step in (
        new_step('resnet18').train(), new_step('resnet18', joint_forward=True).train())]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize('variant', [None, *VARIANTS])
def test_nothing_in_the_step_waits_for_the_device(variant):
    """Fake tensors have no values: whatever reads one, like .item() or a branch, raises."""
    step = new_step('resnet18', **VARIANTS.get(variant, {}))
    inputs, mixture = batch_for(variant), draw(step)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    images, labels = map(mode.from_tensor, inputs)
    mixture = mixture and mixture._replace(**{
        name: mode.from_tensor(value) for name, value in mixture._asdict().items() if value is not None})
    with mode:
        losses = step(images, labels, mixture)
        losses['loss'].backward()
    assert all(losses[name].shape == () for name in ('loss', *step.task.loss_names))


@pytest.mark.parametrize('model', WITHOUT_BATCHNORM)
def test_two_half_batches_are_one_whole(accelerator, model):
    views, labels = batch()
    fixed = draw(new_step())
    updated = []
    for parts in (1, 2):
        step = new_step(model)
        step.mixer.sample_params = lambda *_: fixed
        step.task.set_progress(0.5)  # so that both classifiers learn
        optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
        for part in zip(views.chunk(parts), labels.chunk(parts), strict=True):
            train_batch(accelerator, step, *part, step_generator(0, 0, 0), divisor=parts)
        update(accelerator, step.task, optimizer)
        updated.append(list(step.parameters()))
    whole, halves = ([after - before for after, before in zip(parameters, new_step(model).parameters(), strict=True)]
                     for parameters in updated)
    assert_close(halves, whole, 1e-3)
    assert all(change.any() for change in whole[-4:])  # of the classifiers and heads, at the least


class Schedule:
    """A timm scheduler that notes each update."""

    def __init__(self, optimizer):
        self.inner, _ = create_scheduler_v2(optimizer, num_epochs=4, updates_per_epoch=3, step_on_epochs=False)
        self.updates = []

    def step_update(self, update: int) -> None:
        self.updates.append(update)
        self.inner.step_update(update)


def epoch_by_hand(
        step, optimizer, batches, epoch: int, accum_steps: int, averages: dict, schedule: Schedule,
        clip_grad: float | None) -> list[float]:
    """train_one_epoch, spelled out: the loss of each step."""
    losses, done = [], epoch * -(-len(batches) // accum_steps)
    for start in range(0, len(batches), accum_steps):
        group = batches[start:start + accum_steps]
        for number, (views, labels) in enumerate(group, start):
            mixture = step.mixer.sample_params(len(views), (32, 32), step_generator(7, epoch, number))
            loss = step(views, labels, mixture)['loss']
            losses.append(loss.item())
            (loss / len(group)).backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), clip_grad or float('inf'))
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        schedule.step_update(done)
        decay = 0.0 if done == 1 else 0.5  # timm's average begins as a copy
        for name, parameter in step.task.trainable_module.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * parameter.detach()
    return losses


@pytest.mark.parametrize('clip_grad', [None, 1.0])  # the larger gradients are above 1
def test_an_epoch_is_its_loop_written_out(accelerator, clip_grad):
    """Five batches, the last smaller, two to an update: losses, weights, moving average, schedule."""
    batches = Batches([*(batch(number) for number in range(4)), batch(4, size=5)])
    ours, plain = new_step(), new_step()
    ours.task.setup_ema(decay=0.5)
    ours_sgd, plain_sgd = (torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9) for step in (ours, plain))
    ours_schedule, plain_schedule = Schedule(ours_sgd), Schedule(plain_sgd)
    averages = {name: parameter.detach().clone() for name, parameter in plain.task.trainable_module.named_parameters()}
    for epoch in range(2):
        lr = ours_sgd.param_groups[0]['lr']
        metrics = train_one_epoch(accelerator, ours, batches, ours_sgd, ours_schedule, epoch=epoch, seed=7, accum_steps=2,
                                  clip_grad=clip_grad)
        losses = epoch_by_hand(plain, plain_sgd, batches, epoch, 2, averages, plain_schedule, clip_grad)
        sizes = [8, 8, 8, 8, 5]
        assert metrics['loss'] == pytest.approx(np.average(losses, weights=sizes), rel=1e-5)
        assert metrics['images'] == 37 and metrics['lr'] == lr and batches.last_epoch == epoch
    assert ours_schedule.updates == plain_schedule.updates == [1, 2, 3, 4, 5, 6]
    assert ours_sgd.param_groups[0]['lr'] == plain_sgd.param_groups[0]['lr'] < 0.05
    assert_close(list(ours.task.trainable_module.parameters()), list(plain.parameters()), 1e-5)
    average = dict(unwrap_model(ours.task.get_trainable_module(ema=True)).named_parameters())
    assert_close([average[name] for name in averages], list(averages.values()), 1e-4)


def test_mixtures_are_a_function_of_seed_epoch_and_step():
    drawn = {step_generator(*key).random() for key in np.ndindex(3, 3, 3)}
    assert len(drawn) == 27 and step_generator(1, 2, 0).random() in drawn


# --- steps that are not finite ---


def spoil(step: TrainStep, calls: set[int], term: str = 'loss_cb') -> None:
    """Make one term, and with it the loss, not a number in these calls, as a broken batch would."""
    forward, count = step.task.forward, iter(range(10 ** 6))

    def spoiled(views, targets):
        losses = forward(views, targets)
        if next(count) in calls:
            for module in step.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.data[0] = float('nan')
            losses = {**losses, 'loss': losses['loss'] * float('nan'), term: losses[term] * float('nan')}
        return losses
    step.task.forward = spoiled


OPTIMIZERS = {
    'fused SGD': lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    'fused AdamW': lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    'SGD': lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    'timm': lambda p: timm.optim.create_optimizer_v2(list(p), opt='lamb', lr=0.01)}


@pytest.mark.parametrize('accum_steps', [1, 2])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('calls', [{0}, {2}, {0, 3}])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(accelerator, optimizer, calls, accum_steps):
    """Weights and momentum equal those of an epoch of the other updates; the means leave the batch out."""
    batches = [batch(number) for number in range(6)]
    ours, plain = new_step(), new_step()
    spoil(ours, calls)
    metrics = train_one_epoch(accelerator, ours, Batches(batches), OPTIMIZERS[optimizer](ours.parameters()), None, epoch=0,
                              seed=7, accum_steps=accum_steps)
    other, losses, skipped = OPTIMIZERS[optimizer](plain.parameters()), [], 0
    for start in range(0, 6, accum_steps):
        group = range(start, start + accum_steps)
        for number in group:
            found = train_batch(accelerator, plain, *batches[number], step_generator(7, 0, number), divisor=accum_steps)
            losses += [] if number in calls else [found['loss'].item()]
        if calls.isdisjoint(group):
            other.step()
        skipped += not calls.isdisjoint(group)
        other.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(ours.parameters(), plain.parameters(), strict=True))
    assert metrics['skipped_steps'] == skipped
    assert metrics['loss'] == pytest.approx(np.mean(losses), rel=1e-5) and metrics['images'] == 8 * (6 - len(calls))


def test_statistics_that_a_bad_batch_spoiled_are_put_back(accelerator):
    step = new_step('resnet18')
    spoil(step, {3})
    step.task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    train_one_epoch(accelerator, step, Batches([batch(number) for number in range(5)]), optimizer, None, epoch=0, seed=7)
    average = unwrap_model(step.task.get_trainable_module(ema=True))
    assert all(buffer.isfinite().all() for module in (step, average) for buffer in module.buffers())


@pytest.mark.parametrize('allowed', [0, 2])
def test_too_many_such_steps_end_the_epoch_and_name_the_term(accelerator, allowed):
    step = new_step()
    spoil(step, {1, 3, 4}, 'loss_sim')
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    with pytest.raises(NotFiniteError, match=rf'^epoch 3, step \d: not finite: loss_sim; \d updates of this epoch were '
                       rf'skipped, --max-skipped-steps allows {allowed};') as error:
        train_one_epoch(accelerator, step, Batches([batch(number) for number in range(6)]), optimizer, None, epoch=2, seed=7,
                        max_skipped_steps=allowed, log_interval=2)
    assert error.value.step == {0: 2, 2: 6}[allowed]  # found out when logging
    assert all(parameter.isfinite().all() for parameter in step.parameters())


def test_skipped_updates_are_checked_at_every_log_interval_with_accumulation(accelerator):
    """Three steps an update and a log line every four: common multiples come every twelve steps."""
    step = new_step()
    spoil(step, set(range(3)))
    with pytest.raises(NotFiniteError) as error:
        train_one_epoch(accelerator, step, Batches([batch(number) for number in range(12)]),
                        torch.optim.SGD(step.parameters(), lr=0.01), None, epoch=0, seed=7, accum_steps=3, log_interval=4,
                        max_skipped_steps=0)
    assert error.value.step == 6  # the first update after the log line of step 4


def test_outputs_reach_after_batch_once_and_without_a_graph(accelerator):
    step, seen = new_step(), []
    step.task.after_batch = seen.append
    for run_batch in (train_batch, partial(sam_batch, rho=0.05)):
        outputs = run_batch(accelerator, step, *batch(), step_generator(1, 0, 0))
        step.zero_grad()
        assert len(seen) == 1 and seen.pop().keys() == outputs.keys() >= {'loss', 'loss_sim', 'output'}
        assert all(value.grad_fn is None and not value.requires_grad for value in outputs.values())


def test_a_guard_restores_only_buffers_that_are_not_finite():
    norm, guard = torch.nn.BatchNorm1d(3), BufferGuard()
    guard.snapshot((norm, None))
    norm.running_mean.fill_(float('nan'))
    norm.running_var.fill_(4.0)
    guard.restore()
    assert norm.running_mean.tolist() == [0, 0, 0] and norm.running_var.tolist() == [4, 4, 4]


def test_a_gradient_that_is_not_finite_is_named(accelerator):
    step = new_step()
    next(step.parameters()).register_hook(lambda gradient: gradient * float('inf'))
    with pytest.raises(NotFiniteError, match='step 1: not finite: the gradient; 1 updates'):
        train_one_epoch(accelerator, step, Batches([batch()]), torch.optim.SGD(step.parameters(), lr=0.01), None, epoch=0,
                        seed=7, max_skipped_steps=0)


# --- an epoch in two parts ---


def test_an_epoch_in_parts_is_the_whole_epoch(accelerator):
    batches = [batch(number) for number in range(5)]
    results = []
    for cut in (0, 2):
        step = new_step()
        optimizer = torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9)
        meter = Meter(('loss', *step.task.loss_names), accelerator.device)

        class Stop(Exception):
            pass

        def stop(done, cut=cut):
            if done == cut:
                raise Stop
        if cut:
            with pytest.raises(Stop):
                train_one_epoch(accelerator, step, Batches(batches), optimizer, None, epoch=1, seed=7, meter=meter,
                                after_update=stop)
        metrics = train_one_epoch(accelerator, step, Batches(batches), optimizer, None, epoch=1, seed=7, meter=meter,
                                  start_step=cut)
        results.append((metrics, list(step.parameters())))
    (whole, weights), (parts, same_weights) = results
    assert {**whole, 'images_per_second': 0} == {**parts, 'images_per_second': 0}
    assert all(torch.equal(one, two) for one, two in zip(weights, same_weights, strict=True))


@pytest.mark.parametrize('flip', [False, True])
def test_evaluation_has_logits_in_float32_of_an_encoder_in_bfloat16(flip):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision='bf16')
    model = create_backbone('resnet18', num_classes=3, **MODELS['resnet18']).eval()
    dtypes, found = [], []

    class Evaluator(LongTailEvaluator):
        def update(self, output, target):
            found.append(output)
            super().update(output, target)

    model.global_pool.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    loader = Batches([(images[:, 0, 0], labels[:, 0]) for images, labels in map(batch, range(3))])
    loader.normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    metrics = evaluate(accelerator, AdjustedModel(model, flip=True) if flip else model, loader, Evaluator(COUNTS))
    AcceleratorState._reset_state(True)
    assert set(dtypes) == {torch.bfloat16} and metrics['num_images'] == 24
    assert all(logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float()) for logits in found)
