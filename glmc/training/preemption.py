"""Signals that stop a run between two steps of all its processes, and when a checkpoint is due."""
import logging
import signal
import time
from enum import IntEnum

import torch
import torch.distributed as dist

from glmc.errors import first_line

_logger = logging.getLogger(__name__)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run
SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGINT') if hasattr(signal, name)]  # Windows has two
ONE_SIGNAL = 1.0  # seconds in which a terminal and a launcher may both pass on one Ctrl-C


class Request(IntEnum):
    """Action after a step; of two requests, the higher wins."""
    CONTINUE = 0
    SAVE = 1
    STOP = 2


class Preempted(SystemExit):
    """A signal asked the run to stop, and the run is saved."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class Preemption:
    """Catch SIGTERM, SIGUSR1 and SIGINT inside the `with` block; a second SIGINT interrupts at once.

    A signal after the last request is raised again at the end of the block.

    Args:
        device: Device of the training, for votes where the processes have no group on their CPUs.
    """

    def __init__(self, device: torch.device | str = 'cpu'):
        self.signal: signal.Signals | None = None
        self.interrupted_at: float | None = None
        self.device, self.votes, self.pending = device, False, None

    def __enter__(self) -> 'Preemption':
        self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self.votes = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.votes:
            self.group, device = voting_group(self.device)
            self.vote = torch.zeros(1, dtype=torch.int32, device=device)
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.signal and kind is None:
            signal.raise_signal(self.signal)

    def _on_signal(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.interrupted_at is not None and now - self.interrupted_at > ONE_SIGNAL:
                raise KeyboardInterrupt
            self.interrupted_at = self.interrupted_at or now
        self.signal = self.signal or signal.Signals(number)

    def request(self, save: bool, at_once: bool = False) -> Request:
        """Action of all processes after this step; all must call this together.

        Several processes vote, and the highest request counts for all: one step later, so that no process waits for the
        votes, or now.

        Args:
            save: Whether a checkpoint is due in this process.
            at_once: Wait for the votes of this step.
        """
        own = Request.STOP if self.signal else Request.SAVE if save else Request.CONTINUE
        if not self.votes:
            return own
        decided = self._count()
        self.vote.fill_(max(own, decided if at_once else Request.CONTINUE))
        self.pending = dist.all_reduce(self.vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return self._count() if at_once else decided

    def _count(self) -> Request:
        if self.pending is None:
            return Request.CONTINUE
        self.pending.wait()
        self.pending = None
        return Request(int(self.vote))


def voting_group(device: torch.device | str) -> 'tuple[dist.ProcessGroup | None, torch.device | str]':
    """Group of processes for votes between their CPUs, which never wait for the device, and the device of a vote.

    Without such a group, as where the name of the host does not resolve, the votes are taken on the training's device.
    """
    if dist.get_backend() == 'gloo':
        return None, 'cpu'
    group, works = None, torch.ones(1, dtype=torch.int32, device=device)
    try:
        group = dist.new_group(backend='gloo')
    except RuntimeError as error:
        _logger.warning(f'No group for signals between the CPUs, signals wait for the device: {first_line(error)}')
        works.zero_()
    dist.all_reduce(works, op=dist.ReduceOp.MIN)  # all processes must use the same group
    return (group, 'cpu') if works.item() else (None, device)


class CheckpointClock:
    """Clock of the checkpoints inside an epoch.

    Args:
        interval: `500` for steps, `10m` for minutes.
    """

    def __init__(self, interval: str):
        self.every, self.in_minutes = float(interval.rstrip('m')), interval.endswith('m')
        self.reset(0)

    def reset(self, step: int) -> None:
        """Start anew at this step, where a checkpoint was saved or an epoch begins."""
        self.step, self.time = step, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step of the epoch."""
        passed = (time.monotonic() - self.time) / 60 if self.in_minutes else step - self.step
        return passed >= self.every
