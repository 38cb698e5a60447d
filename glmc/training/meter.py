"""Sums over an epoch on the device, and running statistics that a bad batch must not spoil."""
import time
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glmc.errors import RunError


class NotFiniteError(RunError):
    """Too many updates of an epoch were skipped for a loss or gradient that is not finite.

    Args:
        message: One line for the user.
        step: Steps of the epoch that are done.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class BufferGuard:
    """Copies of floating-point buffers, such as BatchNorm's running statistics, to restore those that a bad batch spoilt."""

    def __init__(self):
        self.copies: list[tuple[Tensor, Tensor]] = []

    def snapshot(self, modules: Iterable[nn.Module | None]) -> None:
        """Copy the buffers of the modules as they are now."""
        self.copies = [(buffer, buffer.clone()) for module in modules if module is not None
                       for buffer in module.buffers() if buffer.is_floating_point()]

    def restore(self) -> None:
        """Restore buffers that are not finite; it waits for the device."""
        for buffer, before in self.copies:
            if not buffer.isfinite().all():
                buffer.copy_(before)


class Meter:
    """Sums over an epoch, kept on the device and read only for a log line or a checkpoint.

    Args:
        names: Names of the losses.
        device: Device of the training.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names, self.guard = names, BufferGuard()
        self.sums = torch.zeros(len(names) + 1, device=device)  # each loss times images, and the images
        self.not_finite = torch.zeros(len(names), device=device)  # batches in which a loss was not finite
        self.skipped = torch.zeros(2, device=device)  # updates skipped, and the step of the last one
        self.lr = torch.zeros((), dtype=torch.float64)  # learning rate at the start of the epoch; on the CPU

    def state(self) -> dict[str, Tensor]:
        return dict(sums=self.sums, not_finite=self.not_finite, skipped=self.skipped, lr=self.lr)

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def update(self, losses: dict[str, Tensor], images: int) -> None:
        """Count a batch; one with a loss that is not finite does not enter the means."""
        values = torch.stack([losses[name].float() for name in self.names])
        finite = values.isfinite()
        self.not_finite += ~finite
        self.sums += torch.where(finite.all(), torch.cat([values, torch.ones_like(values[:1])]) * images, 0.0)

    def count_skipped(self, skipped: Tensor, step: int) -> None:
        self.skipped[0] += skipped
        self.skipped[1] = torch.where(skipped > 0, float(step), self.skipped[1])

    def check(self, accelerator: Accelerator, epoch: int, steps_done: int, max_skipped_steps: int) -> None:
        """Restore spoilt buffers, and raise if too many updates were skipped; it waits for the device.

        In float16, where the loss scaler skips updates, batches with a loss that is not finite count instead.

        Raises:
            NotFiniteError: If more than `max_skipped_steps` were skipped.
        """
        self.restore_buffers()
        not_finite = accelerator.reduce(self.not_finite, 'sum')
        skipped = max(int(self.skipped[0]), int(not_finite.max()) if accelerator.scaler is not None else 0)
        if skipped > max_skipped_steps:
            terms = [name for name, count in zip(self.names, not_finite.tolist(), strict=True) if count]
            what = ', '.join(terms[1:] or terms) if terms else 'the gradient'  # the sum comes first, then its terms
            raise NotFiniteError(
                f'epoch {epoch + 1}, step {int(self.skipped[1]) + 1}: not finite: {what}; {skipped} updates of this epoch '
                f'were skipped, --max-skipped-steps allows {max_skipped_steps}; try a lower --lr, --clip-grad, or float32',
                steps_done)

    def restore_buffers(self) -> None:
        """Restore buffers that a bad batch of this epoch spoilt; it waits for the device."""
        if self.skipped[0] or self.not_finite.any():
            self.guard.restore()

    def means(self) -> dict[str, float]:
        """Mean of each loss in this process, and `images`."""
        *sums, images = self.sums.tolist()
        means = {name: value / images if images else float('nan') for name, value in zip(self.names, sums, strict=True)}
        return {**means, 'images': int(images)}

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean of each loss over all processes, `images` and `skipped_steps`."""
        total = Meter(self.names, self.sums.device)
        total.sums = accelerator.reduce(self.sums, 'sum')
        return {**total.means(), 'skipped_steps': int(self.skipped[0])}


class RateClock:
    """Images per second of the part of an epoch that starts now.

    Args:
        meter: Meter of the epoch, which may have counted images before.
        processes: Number of processes.
    """

    def __init__(self, meter: Meter, processes: int):
        self.meter, self.processes = meter, processes
        self.start, self.before = time.perf_counter(), meter.means()['images']

    def rate(self) -> float:
        """Images per second over all processes; it waits for the device."""
        images = self.meter.means()['images'] - self.before
        return images * self.processes / (time.perf_counter() - self.start)
