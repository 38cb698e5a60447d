"""Being stopped: signals heard between steps, agreed on by all processes, and when a checkpoint is due."""
import signal
import time
from enum import IntEnum

import torch
import torch.distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, given again, goes on
SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGINT') if hasattr(signal, name)]  # Windows has two
ONE_SIGNAL = 1.0  # seconds in which a terminal and a launcher may both pass on what was pressed once


class Request(IntEnum):
    """What is to be done after this step; of two, the higher."""
    CONTINUE = 0
    SAVE = 1
    STOP = 2


class Preempted(SystemExit):
    """The run was asked to stop, and has saved where it stands."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class Preemption:
    """Hears SIGTERM, SIGUSR1 and SIGINT while it is entered; a second SIGINT interrupts at once.

    What is heard after the last request is passed on when it is left, as if it had come then.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self.interrupted_at: float | None = None
        self.group, self.vote, self.pending = None, torch.zeros(1, dtype=torch.int32), None

    def __enter__(self) -> 'Preemption':
        self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend='gloo')  # between the CPUs: no vote waits for the device
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
        """What all processes do after this step; all must ask together.

        Several processes vote: the highest request of any counts for all, one step after it was made, so that no
        process waits for the others' votes; or now.

        Args:
            save: Whether this process finds a checkpoint due.
            at_once: Wait for the votes.
        """
        own = Request.STOP if self.signal else Request.SAVE if save else Request.CONTINUE
        if self.group is None:
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


class CheckpointClock:
    """When a checkpoint inside an epoch is due.

    Args:
        interval: `500` for steps, `10m` for minutes.
    """

    def __init__(self, interval: str):
        self.every, self.in_minutes = float(interval.rstrip('m')), interval.endswith('m')
        self.reset(0)

    def reset(self, step: int) -> None:
        """A checkpoint was saved, or an epoch begins, at this step."""
        self.step, self.time = step, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time, after this step of the epoch."""
        passed = (time.monotonic() - self.time) / 60 if self.in_minutes else step - self.step
        return passed >= self.every
