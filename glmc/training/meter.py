"""Sums over an epoch on the device."""
import time

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from torch import Tensor

from glmc.errors import RunError


class NotFiniteError(RunError):
    """Too many steps had a loss or a gradient that was infinite or not a number; `step` of the epoch are done."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Meter:
    """Sums over an epoch, on the device, read when asked; and what a batch that is not finite must not spoil.

    Args:
        names: Of the losses.
        device: Of the training.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self.sums = torch.zeros(len(names) + 1, device=device)  # of each loss over images, and the images
        self.not_finite = torch.zeros(len(names), device=device)  # batches in which a loss was not
        self.skipped = torch.zeros(2, device=device)  # updates, and the step of the last one
        self.lr = torch.zeros((), dtype=torch.float64)  # when the epoch began; on the CPU
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def state(self) -> dict[str, Tensor]:
        return dict(sums=self.sums, not_finite=self.not_finite, skipped=self.skipped, lr=self.lr)

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def update(self, losses: dict[str, Tensor], images: int) -> None:
        """Count a batch; one with a loss that is not finite stays out of the means."""
        values = torch.stack([losses[name].detach().float() for name in self.names])
        finite = values.isfinite()
        self.not_finite += ~finite
        self.sums += torch.where(finite.all(), torch.cat([values, torch.ones_like(values[:1])]) * images, 0.0)

    def count_skipped(self, skipped: Tensor, step: int) -> None:
        self.skipped[0] += skipped
        self.skipped[1] = torch.where(skipped > 0, float(step), self.skipped[1])

    def check(self, accelerator: Accelerator, epoch: int, steps_done: int, max_skipped_steps: int) -> None:
        """Raise if too many updates were skipped, or in float16 batches lost; it waits for the device."""
        not_finite = accelerator.reduce(self.not_finite, 'sum')
        skipped = max(int(self.skipped[0]), int(not_finite.max()) if accelerator.scaler is not None else 0)
        if skipped > max_skipped_steps:
            terms = [name for name, count in zip(self.names, not_finite.tolist(), strict=True) if count]
            what = ', '.join(terms[1:] or terms) if terms else 'the gradient'  # the sum comes first, then its terms
            raise NotFiniteError(
                f'epoch {epoch + 1}, step {int(self.skipped[1]) + 1}: not finite: {what}; {skipped} updates of this epoch '
                f'were skipped, --max-skipped-steps allows {max_skipped_steps}; try a lower --lr, --clip-grad, or float32',
                steps_done)

    def watch(self, task: TrainingTask) -> None:
        """Remember running statistics as they are now: a forward pass with a bad batch may spoil them for good."""
        modules = [task.get_trainable_module(), task.get_trainable_module(ema=True)]
        self.buffers = [(buffer, buffer.clone()) for module in modules if module is not None
                        for buffer in module.buffers() if buffer.is_floating_point()]

    def repair(self) -> None:
        """Put those back that are not finite, if a batch was not; it waits for the device."""
        if self.skipped[0] or self.not_finite.any():
            for buffer, before in self.buffers:
                if not buffer.isfinite().all():
                    buffer.copy_(before)

    def means(self) -> dict[str, float]:
        *sums, images = self.sums.tolist()
        means = {name: value / images if images else float('nan') for name, value in zip(self.names, sums, strict=True)}
        return {**means, 'images': int(images)}

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes."""
        total = Meter(self.names, self.sums.device)
        total.sums = accelerator.reduce(self.sums, 'sum')
        return {**total.means(), 'skipped_steps': int(self.skipped[0])}


class _Clock:
    """Time of this part of an epoch, for the images that the meter counts from now on."""

    def __init__(self, meter: Meter):
        self.start, self.before = time.perf_counter(), meter.means()['images']

    def rate(self, meter: Meter, processes: int) -> float:
        """Images per second of all processes."""
        return (meter.means()['images'] - self.before) * processes / (time.perf_counter() - self.start)
