"""Policy of a run's checkpoints: when one is saved, which are kept, and how a signal stops the run."""
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glmc.errors import RunError
from glmc.files import atomic_write
from glmc.training.checkpoint import SUFFIX, CheckpointWriter, load_checkpoint
from glmc.training.meter import Meter, NotFiniteError
from glmc.training.preemption import CheckpointClock, Preempted, Preemption, Request
from glmc.training.resume import check_origin, epoch_checkpoints, find_checkpoint, translate
from glmc.training.state import Position, trained_weights

_logger = logging.getLogger(__name__)
BEST = f'best{SUFFIX}'


class Checkpoints:
    """Checkpoints of a run: resumes from them, saves them on time and at a signal, keeps the newest and the best.

    Args:
        folder: Folder of the checkpoints.
        setup: Setup of the run (`glmc.setup.Setup`).

    Attributes:
        position: Position of the run.
        metrics: Content of metrics.json for the newest checkpoint, or for the best once that is loaded.
    """

    def __init__(self, folder: Path, setup):
        self.folder, self.setup, self.accelerator = folder, setup, setup.accelerator
        self.steps, self.hist = len(setup.train_loader), setup.args.checkpoint_hist
        self.position = Position(global_batch=setup.global_batch, accum_steps=setup.args.grad_accum_steps)
        self.preemption, self.clock = Preemption(setup.accelerator.device), CheckpointClock(setup.args.checkpoint_interval)
        self.writer, self.started = CheckpointWriter(), time.time()
        self.meter, self.best, self.metrics = None, None, None  # the meter only inside an epoch
        self.since_best = 0  # evaluations on the held-out images

    def resume(self, resume: str | None) -> Position:
        """Restore the checkpoint that `--resume` names, if there is one; returns the position of the next step."""
        found, setup = find_checkpoint(resume, self.folder), self.setup
        if found is None:
            return self.position
        path, saved = found
        check_origin(path, saved, setup.description(), setup.args.method, setup.data.profile.fingerprint)
        meter = setup.state.restore(saved)
        self.best, self.metrics, self.since_best = saved['best'], saved['metrics'], saved.get('since_best', 0)
        self.started -= saved['seconds']
        self.position = translate(Position(**saved['position']), self.position, self.steps)
        if meter is not None and self.position.step:
            self.meter = self._new_meter()
            self.meter.load(meter)
        setup.set_schedule(self.position)
        step = f', step {self.position.step + 1}' if self.position.step else ''
        _logger.info(f'Resumed from {path}, epoch {self.position.epoch + 1} of {setup.num_epochs}{step} comes next')
        return self.position

    def _new_meter(self) -> Meter:
        return Meter(('loss', *self.setup.task.loss_names), self.accelerator.device)

    @contextmanager
    def stoppable(self, before_exit: Callable[[], None]) -> Iterator[None]:
        """Catch signals: after the step, the run saves, calls `before_exit` and exits with code 75.

        Raises:
            Preempted: At a signal.
            RunError: For a loss that is not finite; the run is saved, too.
        """
        with self.preemption:
            try:
                yield
            except Preempted:
                before_exit()
                raise
            except NotFiniteError as error:
                self.position = self.position.at(self.position.epoch, error.step)
                raise RunError(f'{error} ({self._save_now()})') from error

    def begin_epoch(self) -> dict:
        """Arguments of `engine.train_one_epoch` that start, or continue, the epoch of the position."""
        self.meter = self.meter or self._new_meter()
        self.clock.reset(self.position.step)
        return dict(start_step=self.position.step, meter=self.meter, after_update=self._after_update)

    def _after_update(self, step: int) -> None:
        """Save or stop if it is time to; all processes decide alike."""
        self.position, last = self.position.at(self.position.epoch, step), step == self.steps
        request = self.preemption.request(self.clock.due(step), at_once=last)
        if request is Request.STOP:
            self._stop()
        elif request is Request.SAVE and not last:  # the end of the epoch saves, too
            self._save({})

    def stop_if_signalled(self) -> None:
        """Stop between two batches of an evaluation; several processes stop after it, together."""
        if self.preemption.signal and self.accelerator.num_processes == 1:
            self._stop()

    def end_epoch(self, metrics: dict | None) -> None:
        """Save the epoch with its metrics, and stop if a signal came."""
        self.position, self.meter = self.position.at(self.position.epoch + 1), None
        self.setup.set_schedule(self.position)
        self._save(metrics or {})
        if self.position.epoch == self.setup.num_epochs:
            self.writer.wait()  # while signals are still caught
        if self.preemption.request(False, at_once=True) is Request.STOP:
            self._stop()

    def out_of_patience(self) -> bool:
        """Whether as many evaluations as `--patience` says were no better than the best; logs it."""
        patience, epoch = self.setup.args.patience, self.position.epoch
        over = patience is not None and self.since_best >= patience and epoch < self.setup.num_epochs
        if over:
            _logger.info(f'Stopped after epoch {epoch} of {self.setup.num_epochs}: no better class mean in '
                         f'{self.since_best} evaluations (--patience)')
        return over

    def load_best(self) -> None:
        """Load the weights and the metrics of the best epoch on the held-out images."""
        state, ema = load_checkpoint(self.folder / BEST), self.setup.task.has_ema()
        self.setup.task.load_checkpoint_state(*trained_weights(state, ema), ema=ema)
        self.metrics = state['metrics']
        images = self.setup.args.select_split or 'held-out images'
        _logger.info(f"Best on {images}: epoch {self.metrics['epoch'] + 1}, class mean {state['best']:.2f}")

    def seconds(self) -> float:
        """Seconds of the run so far, in all its processes one after the other."""
        return time.time() - self.started

    def _stop(self) -> None:
        """Save and end the run."""
        name = self.preemption.signal.name if self.preemption.signal else 'another process'
        message = self._save_now()
        self.accelerator.wait_for_everyone()  # the launcher ends all processes with the first
        epoch = self.position.epoch + 1
        where = f'in epoch {epoch}' if epoch <= self.setup.num_epochs else 'after the last epoch'
        _logger.info(f'Stopped by {name} {where}, {message}')
        _logger.info('Next: the same command with --resume auto continues')
        raise Preempted

    def _save_now(self) -> str:
        """Save, unless the position is saved already, wait for the disk, and return a phrase for the log."""
        path = self._path() if self.meter is None else self._save({})
        return f'saved as {path}' if self.writer.wait() else 'NOT saved: the disk is full'

    def _save(self, metrics: dict) -> Path:
        """Write a checkpoint while training continues; keep it as the best if its metrics are."""
        if self.meter is not None:
            self.meter.restore_buffers()
        setup, path = self.setup, self._path()
        self.metrics = setup.metadata(self.position.last_epoch, metrics, self.seconds())
        state = setup.state.capture(self.position, self.meter)
        self.clock.reset(self.position.step)
        is_best = setup.data.holdout and metrics and (self.best is None or metrics['class_mean'] > self.best)
        self.best = metrics['class_mean'] if is_best else self.best
        self.since_best = 0 if is_best else self.since_best + bool(metrics)
        if not self.accelerator.is_main_process:
            return path
        state.update(best=self.best, since_best=self.since_best)
        state.update(metrics=self.metrics, seconds=self.seconds(), description=setup.description())

        def keep() -> None:
            if is_best:
                keep_best(path)
            prune(self.folder, self.hist)

        self.writer.save(path, state, then=keep)
        return path

    def _path(self) -> Path:
        return checkpoint_path(self.folder, self.position.last_epoch, self.position.step)


def checkpoint_path(folder: Path, epoch: int, step: int = 0) -> Path:
    """Path of a checkpoint after 0-based `epoch`, or after `step` steps of it; newer names sort later."""
    return folder / f"epoch-{epoch:04d}{f'-step-{step:08d}' if step else ''}{SUFFIX}"


def keep_best(path: Path) -> None:
    """Copy this checkpoint to `best.safetensors`, which `prune` ignores."""
    with atomic_write(path.with_name(BEST)) as beside:
        shutil.copyfile(path, beside)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in epoch_checkpoints(folder)[:-keep]:
        path.unlink()
