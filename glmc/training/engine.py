"""One step, one epoch of training, and evaluation."""
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from glmc.cli import Progress, duration
from glmc.data.sampling import stream
from glmc.evaluation.metrics import LongTailEvaluator
from glmc.models.classifier import float32_classifier
from glmc.training.meter import Meter, RateClock
from glmc.training.optim import clip_parameters

_logger = logging.getLogger(__name__)


class TrainStep(nn.Module):
    """The device side of a step as one graph: mixing, normalisation, forward passes, losses.

    Args:
        task: Model and loss.
        mixer: Views and labels -> input and target of the task.
        normalize: Pixel values -> input of the model.
        frozen_norms: BatchNorm layers of the model that keep their running statistics.
    """

    def __init__(self, task: TrainingTask, mixer: nn.Module, normalize: nn.Module,
                 frozen_norms: Sequence[nn.Module] = ()):
        super().__init__()
        self.task, self.mixer, self.normalize = task, mixer, normalize
        self.frozen_norms = tuple(frozen_norms)  # a tuple: they are registered in the task already

    def train(self, mode: bool = True) -> 'TrainStep':
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def forward(self, views: Tensor, labels: Tensor, params) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            views: (B, images, views, c, H, W) pixel values.
            labels: (B, images).
            params: Random numbers of `mixer.sample_params`, on the device of the views.
        """
        inputs, targets = self.mixer(views, labels, params)
        inputs = self.normalize(inputs) if isinstance(inputs, Tensor) else tuple(map(self.normalize, inputs))
        return self.task(inputs, targets)


def train_one_epoch(
        accelerator: Accelerator, train_step: nn.Module, loader, optimizer, scheduler, *, epoch: int, seed: int,
        accum_steps: int = 1, clip_grad: float | None = None, clip_mode: str = 'norm', log_interval: int = 50,
        max_skipped_steps: int = 10, start_step: int = 0, meter: Meter | None = None,
        after_update: Callable[[int], None] = lambda step: None,
        run_batch: Callable[..., dict[str, Tensor]] | None = None) -> dict[str, float]:
    """Train on every image once, or on the rest of an interrupted epoch.

    An update with a loss or gradient that is not finite changes no weight. In float16 the loss scaler does the same with
    gradients that overflow.

    Args:
        accelerator: Processes, device and precision.
        train_step: A TrainStep, prepared by the accelerator.
        loader: A `data.loaders.TrainLoader`.
        optimizer: Prepared by the accelerator.
        scheduler: timm's, stepped per update if it was created for that; or None.
        epoch: 0-based; with seed and step it determines the random numbers of the mixture.
        seed: Seed of the run.
        accum_steps: Steps per update.
        clip_grad, clip_mode: As timm's.
        log_interval: Steps between log lines.
        max_skipped_steps: Updates of the epoch that may be skipped.
        start_step: Steps of this epoch that are done, a multiple of `accum_steps`.
        meter: Sums over these steps.
        after_update: Called with the steps done after each update; what it raises ends the epoch.
        run_batch: Replaces `train_batch`, such as `sam.sam_batch`.

    Returns:
        Mean of each loss over the epoch, `lr`, `images`, `skipped_steps`, and `images_per_second`, over all processes.

    Raises:
        NotFiniteError: If more updates than `max_skipped_steps` were skipped.
    """
    run_batch = run_batch or train_batch
    task = accelerator.unwrap_model(train_step).task
    meter = meter or Meter(('loss', *task.loss_names), accelerator.device)
    meter.guard.snapshot((task,))
    train_step.train()
    num_steps, clock = len(loader), RateClock(meter, accelerator.num_processes)
    checked = start_step
    if start_step == 0:
        meter.lr.fill_(optimizer.param_groups[-1]['lr'])
    bar = tqdm(loader.epoch(epoch, start_step), desc=f'epoch {epoch + 1}', initial=start_step, total=num_steps, leave=False,
               disable=not sys.stderr.isatty())
    for step, (views, labels, batch_fraction) in enumerate(bar, start_step):
        done = step + 1
        group = min(accum_steps, num_steps - step // accum_steps * accum_steps)  # the last group may be shorter
        updates = done % accum_steps == 0 or done == num_steps
        task.before_batch(len(views), batch_fraction)
        outputs = run_batch(accelerator, train_step, views, labels, step_generator(seed, epoch, step), sync=updates,
                            divisor=group / batch_fraction)
        meter.update(outputs, len(views))
        if updates:
            meter.count_skipped(update(accelerator, task, optimizer, clip_grad, clip_mode), step)
            updates_done = epoch * -(-num_steps // accum_steps) + step // accum_steps + 1
            task.update_ema(step=updates_done)
            if scheduler is not None:
                scheduler.step_update(updates_done)
            if done == num_steps or done // log_interval > checked // log_interval:
                meter.check(accelerator, epoch, done, max_skipped_steps)
                checked = done
        if done % log_interval == 0 and bar.disable and accelerator.is_main_process:
            left = (time.perf_counter() - clock.start) / (done - start_step) * (num_steps - done)
            _log_step(epoch, done, num_steps, meter, optimizer, clock, left)
        if updates:
            after_update(done)
    return {**meter.compute(accelerator), 'lr': meter.lr.item(), 'images_per_second': clock.rate()}


def train_batch(
        accelerator: Accelerator, train_step: nn.Module, views: Tensor, labels: Tensor, rng: np.random.Generator,
        sync: bool = True, divisor: float = 1) -> dict[str, Tensor]:
    """Forward and backward pass of one batch.

    Args:
        accelerator: Processes, device and precision.
        train_step: A TrainStep, prepared by the accelerator.
        views: (B, images, views, c, H, W) pixel values.
        labels: (B, images).
        rng: Generator of the step's mixture.
        sync: Whether the processes exchange gradients, which they do at an update.
        divisor: Batches of the update, over the batch fraction of this process.

    Returns:
        The dict of the task, detached, on the device.
    """
    params = mixture_params(train_step, views, rng)
    with nullcontext() if sync else accelerator.no_sync(train_step):
        outputs = train_step(views, labels, params)
        backward(accelerator, outputs['loss'] / divisor)
    outputs = {name: value.detach() for name, value in outputs.items()}  # frees the graph
    accelerator.unwrap_model(train_step).task.after_batch(outputs)
    return outputs


def mixture_params(train_step: nn.Module, views: Tensor, rng: np.random.Generator):
    """Random numbers of a step's mixture, on the device of the views; None for a mixer that needs none."""
    mixer = getattr(train_step, 'module', train_step).mixer
    params = mixer.sample_params(len(views), views.shape[-2:], rng)
    return params if params is None else params.to(views.device)


def backward(accelerator: Accelerator, loss: Tensor, *others: Tensor) -> None:
    """Backward pass. Turn a non-finite loss, or another non-finite scalar, into NaN gradients, so that every rank sees it
    after the all-reduce and skips the update."""
    finite = loss.isfinite()
    for other in others:
        finite = finite & other.isfinite()
    accelerator.backward(loss * torch.where(finite, 1.0, torch.nan))


def step_generator(seed: int, epoch: int, step: int) -> np.random.Generator:
    """Generator of one step's mixture: the same on all processes, and after any resume."""
    return stream('mixture', seed, epoch, step)


def update(
        accelerator: Accelerator, task: TrainingTask, optimizer, clip_grad: float | None = None,
        clip_mode: str = 'norm') -> Tensor:
    """Clip the gradients and step the optimizer, unless a gradient is not finite.

    Returns:
        Scalar on the device: 1 if the update was skipped, else 0; always 0 in float16, where the loss scaler decides.
    """
    skipped = torch.zeros((), device=accelerator.device)
    if accelerator.scaler is None:
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        skipped = 1.0 - torch.nn.utils.get_total_norm(gradients).isfinite().float()
    if clip_grad is not None:
        accelerator.unscale_gradients(optimizer)
        dispatch_clip_grad(clip_parameters(task, clip_mode), clip_grad, mode=clip_mode)
    inner = getattr(optimizer, 'optimizer', optimizer)  # of Accelerate's wrapper
    if accelerator.scaler is not None:
        optimizer.step()
    elif skips_on_device(inner):
        inner.found_inf = skipped
        optimizer.step()
    elif not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return skipped


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's fused optimizer skips an update by `found_inf`, so that nothing waits for the gradient.

    Its first step is excluded: fused SGD that skips it never creates its momentum buffers (torch 2.14).
    """
    return getattr(optimizer, '_step_supports_amp_scaling', False) and len(optimizer.state) > 0


def _log_step(epoch: int, step: int, num_steps: int, meter: Meter, optimizer, clock: RateClock, left: float) -> None:
    means = meter.means()
    losses = '  '.join(f"{name.removeprefix('loss_')}: {means[name]:.3f}" for name in meter.names)
    _logger.info(f"Train: {epoch} [{step:>4d}/{num_steps} ({100 * step / num_steps:>3.0f}%)]  {losses}  "
                 f"LR: {optimizer.param_groups[-1]['lr']:.3e}  {clock.rate():.0f} images/s  {duration(left)} left")


def evaluate(
        accelerator: Accelerator, model: nn.Module, loader, evaluator: LongTailEvaluator,
        between: Callable[[], None] = lambda: None) -> dict:
    """Metrics of a bare model, each image counted once over all processes.

    The encoder computes in the run's precision, the classifier in float32.

    Args:
        accelerator: Processes, device and precision.
        model: Bare timm model.
        loader: A `data.loaders.EvalLoader`.
        evaluator: Counts the batches.
        between: Called before each batch; what it raises ends the evaluation.
    """
    model.eval()
    evaluator.reset()
    with (torch.inference_mode(), accelerator.autocast(), float32_classifier(model),
          Progress(len(loader), 'batches', 'evaluation') as progress):
        for images, labels in loader:
            between()
            evaluator.update(model(loader.normalize(images)), labels)
            progress.update()
    return evaluator.compute(distributed=accelerator.num_processes > 1)
