"""One step, one epoch of training, and evaluation."""
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from glmc.evaluation.metrics import LongTailEvaluator
from glmc.models.classifier import float32_classifier
from glmc.training.meter import Meter, _Clock
from glmc.training.optim import clip_parameters

_logger = logging.getLogger(__name__)


class TrainStep(nn.Module):
    """All that runs on the device in a step, as one graph: mixing, normalisation, the forward passes, the losses.

    Args:
        task: Model and loss.
        mixer: Of the method.
        normalize: Of the loader.
    """

    def __init__(self, task: TrainingTask, mixer, normalize: nn.Module):
        super().__init__()
        self.task, self.mixer, self.normalize = task, mixer, normalize

    def forward(self, views: Tensor, labels: Tensor, mixture) -> dict[str, Tensor]:
        """Losses of a batch: (B, V, c, H, W) views, (B, images) labels, and the random numbers of `mixer.sample_params`."""
        inputs, targets = self.mixer(views, labels, mixture)
        inputs = self.normalize(inputs) if isinstance(inputs, Tensor) else tuple(map(self.normalize, inputs))
        return self.task(inputs, targets)


def train_one_epoch(
        accelerator: Accelerator, train_step: nn.Module, loader, optimizer, scheduler, *, epoch: int, seed: int,
        accum_steps: int = 1, clip_grad: float | None = None, clip_mode: str = 'norm', log_interval: int = 50,
        max_skipped_steps: int = 10, start_step: int = 0, meter: 'Meter | None' = None,
        after_update: Callable[[int], None] = lambda step: None,
        run_batch: Callable[..., dict[str, Tensor]] | None = None) -> dict[str, float]:
    """Train on every image once, or on those that an interrupted epoch has left.

    An update with a loss or gradient that is not finite changes no weight. (In float16 a gradient that overflows is the
    loss scaler's business, which does the same.)

    Args:
        accelerator: Of the run.
        train_step: A TrainStep, prepared by the accelerator.
        loader: Training batches.
        optimizer: Prepared by the accelerator.
        scheduler: timm's, stepped per update if it is made for that; or None.
        epoch: 0-based; with `seed` and the step it decides all random numbers of the mixture.
        seed: Of the run.
        accum_steps: Steps per update.
        clip_grad, clip_mode: As timm's.
        log_interval: Steps between log lines.
        max_skipped_steps: Updates of the epoch that may be skipped.
        start_step: Steps of this epoch that are done, a multiple of `accum_steps`.
        meter: What was counted in them; it counts on.
        after_update: Called with the steps done; what it raises ends the epoch there.
        run_batch: In place of `train_batch`, such as `sam.sam_batch`.

    Returns:
        Mean of each loss over the epoch, `lr`, `images`, `skipped_steps`, and `images_per_second`, over all processes.

    Raises:
        NotFiniteError: If more updates than `max_skipped_steps` were skipped.
    """
    run_batch = run_batch or train_batch
    alone = accelerator.unwrap_model(train_step)
    meter = meter or Meter(('loss', *alone.task.loss_names), accelerator.device)
    meter.watch(alone.task)
    train_step.train()
    loader.set_epoch(epoch, start_step)
    num_steps, clock = len(loader), _Clock(meter)
    if start_step == 0:
        meter.lr.fill_(optimizer.param_groups[-1]['lr'])
    bar = tqdm(loader, desc=f'epoch {epoch + 1}', initial=start_step, total=num_steps, leave=False,
               disable=not sys.stderr.isatty())
    for step, (views, labels) in enumerate(bar, start_step):
        group = min(accum_steps, num_steps - step // accum_steps * accum_steps)  # the last group may be shorter
        updates = (step + 1) % accum_steps == 0 or step + 1 == num_steps
        losses = run_batch(accelerator, train_step, views, labels, step_generator(seed, epoch, step), sync=updates,
                           divisor=group / loader.share(step))
        meter.update(losses, len(views))
        if updates:
            skipped = update(accelerator, alone.task, optimizer, clip_grad, clip_mode)
            meter.count_skipped(skipped, step)
            done = epoch * -(-num_steps // accum_steps) + step // accum_steps + 1
            alone.task.update_ema(step=done)
            if scheduler is not None:
                scheduler.step_update(done)
            if step + 1 == num_steps or (step + 1) % log_interval == 0:
                meter.repair()
                meter.check(accelerator, epoch, step + 1, max_skipped_steps)
        if (step + 1) % log_interval == 0 and bar.disable and accelerator.is_main_process:
            _log_step(epoch, step + 1, num_steps, meter, optimizer, clock, accelerator.num_processes)
        if updates:
            after_update(step + 1)
    metrics = meter.compute(accelerator)
    return {**metrics, 'lr': meter.lr.item(), 'images_per_second': clock.rate(meter, accelerator.num_processes)}


def train_batch(
        accelerator: Accelerator, train_step: nn.Module, views: Tensor, labels: Tensor, rng: np.random.Generator,
        sync: bool = True, divisor: float = 1) -> dict[str, Tensor]:
    """Forward and backward pass of one batch.

    Args:
        accelerator: Of the run.
        train_step: A TrainStep, prepared by the accelerator.
        views, labels: Of the loader.
        rng: Owner of the mixture's random numbers.
        sync: Whether processes exchange gradients: at an update.
        divisor: Batches that share an update, over this process's share of the batch.

    Returns:
        The task's losses, on the device.
    """
    mixture = step_mixture(train_step, views, rng)
    with nullcontext() if sync else accelerator.no_sync(train_step):
        losses = train_step(views, labels, mixture)
        backward(accelerator, losses['loss'] / divisor)
    return losses


def step_mixture(train_step: nn.Module, views: Tensor, rng: np.random.Generator):
    """The random numbers of a step's mixture, on the device of the views; None where nothing is mixed."""
    mixer = getattr(train_step, 'module', train_step).mixer
    mixture = mixer.sample_params(len(views), views.shape[-2:], rng)
    return mixture if mixture is None else mixture.to(views.device)


def backward(accelerator: Accelerator, loss: Tensor, *others: Tensor) -> None:
    """Backward pass. A loss that is not finite, or another scalar that is not, spoils every gradient, so that after the
    exchange all processes see it in theirs."""
    finite = loss.isfinite()
    for other in others:
        finite = finite & other.isfinite()
    accelerator.backward(loss * torch.where(finite, 1.0, torch.nan))


def step_generator(seed: int, epoch: int, step: int) -> np.random.Generator:
    """The generator of one step's mixture: the same on all processes, and after any resume."""
    return np.random.default_rng((seed, epoch, step))


def update(
        accelerator: Accelerator, task: TrainingTask, optimizer, clip_grad: float | None = None,
        clip_mode: str = 'norm') -> Tensor:
    """Clip the gradients and step the optimizer, unless a gradient is not finite.

    Returns:
        Scalar on the device: 1 if the step was skipped, else 0; always 0 in float16, where the loss scaler decides.
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
    """Whether torch's fused optimizer heeds `found_inf`, so that nothing has to wait for the gradient.

    Not in its first step: skipped there, fused SGD leaves its momentum buffers unset (torch 2.14).
    """
    return getattr(optimizer, '_step_supports_amp_scaling', False) and len(optimizer.state) > 0


def _log_step(
        epoch: int, step: int, num_steps: int, meter: Meter, optimizer, clock: _Clock, processes: int) -> None:
    rate, means = clock.rate(meter, processes), meter.means()
    losses = '  '.join(f"{name.removeprefix('loss_')}: {value:.3f}" for name, value in means.items() if name != 'images')
    _logger.info(f"Train: {epoch} [{step:>4d}/{num_steps} ({100 * step / num_steps:>3.0f}%)]  {losses}  "
                 f"LR: {optimizer.param_groups[-1]['lr']:.3e}  {rate:.0f} images/s")


def evaluate(
        accelerator: Accelerator, model: nn.Module, loader, evaluator: LongTailEvaluator,
        between: Callable[[], None] = lambda: None) -> dict:
    """Metrics of a bare model, each image counted once over all processes.

    The encoder computes in the run's precision, the classifier in float32. `between` is called before each batch; what it
    raises ends the evaluation.
    """
    model.eval()
    evaluator.reset()
    with torch.inference_mode(), accelerator.autocast(), float32_classifier(model):
        for images, labels in loader:
            between()
            evaluator.update(model(loader.normalize(images)), labels)
    return evaluator.compute(distributed=accelerator.num_processes > 1)
