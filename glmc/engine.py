"""One step, one epoch of training, and evaluation."""
import logging
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from glmc.evaluation import LongTailEvaluator

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
        """Losses of a batch: (B, V, c, H, W) views, (B, images) labels, and the random numbers of `mixer.draw`."""
        inputs, targets = self.mixer(views, labels, mixture)
        inputs = self.normalize(inputs) if isinstance(inputs, Tensor) else tuple(map(self.normalize, inputs))
        return self.task(inputs, targets)


def train_one_epoch(
        accelerator: Accelerator, train_step: nn.Module, loader, optimizer, scheduler, *, epoch: int, seed: int,
        accum_steps: int = 1, clip_grad: float | None = None, clip_mode: str = 'norm',
        log_interval: int = 50) -> dict[str, float]:
    """Train on every image once.

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

    Returns:
        Mean of each loss over the epoch, `lr`, `images`, and `images_per_second`, over all processes.
    """
    alone = accelerator.unwrap_model(train_step)
    train_step.train()
    loader.set_epoch(epoch)
    meter = _Meter(('loss', *alone.task.loss_names), accelerator.device)
    lr, num_steps, start = optimizer.param_groups[-1]['lr'], len(loader), time.perf_counter()
    bar = tqdm(loader, desc=f'epoch {epoch + 1}', leave=False, disable=not sys.stderr.isatty())
    for step, (views, labels) in enumerate(bar):
        group = min(accum_steps, num_steps - step // accum_steps * accum_steps)  # the last group may be shorter
        updates = (step + 1) % accum_steps == 0 or step + 1 == num_steps
        losses = train_batch(
            accelerator, train_step, views, labels, step_generator(seed, epoch, step), sync=updates, divisor=group)
        meter.update(losses, len(views))
        if updates:
            update(accelerator, alone.task, optimizer, clip_grad, clip_mode)
            done = epoch * -(-num_steps // accum_steps) + step // accum_steps + 1
            alone.task.update_ema(step=done)
            if scheduler is not None:
                scheduler.step_update(done)
        if (step + 1) % log_interval == 0 and bar.disable and accelerator.is_main_process:
            _log_step(epoch, step + 1, num_steps, meter, optimizer, start, accelerator.num_processes)
    metrics = meter.compute(accelerator)
    return {**metrics, 'lr': lr, 'images_per_second': metrics['images'] / (time.perf_counter() - start)}


def train_batch(
        accelerator: Accelerator, train_step: nn.Module, views: Tensor, labels: Tensor, rng: np.random.Generator,
        sync: bool = True, divisor: int = 1) -> dict[str, Tensor]:
    """Forward and backward pass of one batch.

    Args:
        accelerator: Of the run.
        train_step: A TrainStep, prepared by the accelerator.
        views, labels: Of the loader.
        rng: Owner of the mixture's random numbers.
        sync: Whether processes exchange gradients: at an update.
        divisor: Batches that share an update.

    Returns:
        The task's losses, on the device.
    """
    mixer = getattr(train_step, 'module', train_step).mixer
    mixture = mixer.draw(len(views), views.shape[-2:], rng)
    with nullcontext() if sync else accelerator.no_sync(train_step):
        losses = train_step(views, labels, mixture if mixture is None else mixture.to(views.device))
        accelerator.backward(losses['loss'] / divisor)
    return losses


def step_generator(seed: int, epoch: int, step: int) -> np.random.Generator:
    """The generator of one step's mixture: the same on all processes, and after any resume."""
    return np.random.default_rng((seed, epoch, step))


def update(
        accelerator: Accelerator, task: TrainingTask, optimizer, clip_grad: float | None = None,
        clip_mode: str = 'norm') -> None:
    """Clip the gradients and step the optimizer."""
    if clip_grad is not None:
        accelerator.unscale_gradients(optimizer)
        dispatch_clip_grad(task.get_clip_parameters(exclude_head='agc' in clip_mode), clip_grad, mode=clip_mode)
    optimizer.step()
    optimizer.zero_grad()


class _Meter:
    """Sums on the device, read when asked."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self.sums = torch.zeros(len(names) + 1, device=device, dtype=torch.float32)

    def update(self, losses: dict[str, Tensor], images: int) -> None:
        values = [losses[name].detach().float() for name in self.names]
        self.sums += torch.stack([*values, torch.ones_like(values[0])]) * images

    def means(self) -> dict[str, float]:
        *sums, images = self.sums.tolist()
        return {**{name: value / images for name, value in zip(self.names, sums, strict=True)}, 'images': int(images)}

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes."""
        self.sums = accelerator.reduce(self.sums, 'sum')
        return self.means()


def _log_step(epoch: int, step: int, num_steps: int, meter: _Meter, optimizer, start: float, processes: int) -> None:
    means = meter.means()
    rate = processes * means.pop('images') / (time.perf_counter() - start)
    losses = '  '.join(f"{name.removeprefix('loss_')}: {value:.3f}" for name, value in means.items())
    _logger.info(f"Train: {epoch} [{step:>4d}/{num_steps} ({100 * step / num_steps:>3.0f}%)]  {losses}  "
                 f"LR: {optimizer.param_groups[-1]['lr']:.3e}  {rate:.0f} images/s")


def evaluate(
        accelerator: Accelerator, model: nn.Module, loader, evaluator: LongTailEvaluator) -> dict:
    """Metrics of a bare model, each image counted once over all processes, in the run's precision."""
    model.eval()
    evaluator.reset()
    with torch.inference_mode(), accelerator.autocast():
        for images, labels in loader:
            evaluator.update(model(loader.normalize(images)), labels)
    return evaluator.compute(distributed=accelerator.num_processes > 1)
