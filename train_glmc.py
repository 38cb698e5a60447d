#!/usr/bin/env python3
"""Train a timm model on long-tailed images with GLMC or a baseline, and export it as a plain timm model.

    accelerate launch train_glmc.py                                       a demonstration on embedded digits
    accelerate launch train_glmc.py --model resnext50_32x4d --data-dir my_images
    accelerate launch train_glmc.py -c hparams/cifar100_lt_if100.yaml --dataset torch/cifar100 --data-dir data

SIGTERM, SIGUSR1 or Ctrl-C: the step is finished, a checkpoint saved, and the exit code is 75; the same command with
--resume auto goes on there.
"""
import logging
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from timm.utils import distribute_bn

from glmc.cli import Options, parse_args, pick, run_script
from glmc.config import train_parser
from glmc.errors import InputError, RunError
from glmc.evaluation.text import shot_line, shot_table
from glmc.export.export import export_model
from glmc.export.hub import try_push, warn_without_token
from glmc.methods import METHODS
from glmc.report.pictures import mixed_views
from glmc.report.report import ReportInputs, classifier_norms, try_report
from glmc.report.trackers import finish_trackers, log_pictures, log_row, require_trackers, start_trackers
from glmc.run_folder import (
    create_run_folder,
    lock_run_folder,
    open_run_folder,
    provenance,
    read_summary,
    summary_row,
    write_summary,
    write_tables,
)
from glmc.setup import Setup
from glmc.stage2.finetune import CHOICE, OPTIONS, check_stage2, run_stage2
from glmc.training.checkpoint import CheckpointWriter, disk_is_full, load_checkpoint
from glmc.training.checkpoints import BEST, checkpoint_path, keep_best, load_newest, prune, remove_half_written
from glmc.training.engine import evaluate
from glmc.training.launch import create_accelerator, device_name, is_main_process
from glmc.training.meter import Meter, NotFiniteError
from glmc.training.preemption import CheckpointClock, Preempted, Preemption, Request
from glmc.training.state import Position, TrainingState, trained_weights

_logger = logging.getLogger('glmc.train')


def main() -> None:
    args, explicit = parse_args(train_parser(METHODS))
    trackers = require_trackers(args.report_to)
    if args.push_to_hub:
        warn_without_token()
    accelerator = create_accelerator(args.amp, args.amp_dtype)
    folder = broadcast_object_list([choose_folder(args) if accelerator.is_main_process else None])[0]
    run = Run(Setup(args, explicit, accelerator), folder)
    if args.stage2:
        check_stage2(args.stage2, model=run.eval_model, data=run.setup.data, conventional=run.conventional,
                     **pick(args, CHOICE))
    run.resume()
    run.create_folder(trackers)
    with run.preemption:
        for epoch in range(run.position.epoch, run.setup.num_epochs):
            train_metrics = run.train(epoch)
            metrics = run.evaluate(run.setup.epoch_loader) if run.evaluates(epoch) else None
            run.record(epoch, train_metrics, metrics)
            run.finish_epoch(epoch, metrics)
    run.finish()


def choose_folder(args: Options) -> Path:
    """Of the run: of the checkpoint it resumes, or `--output`/`--experiment`, or one with a name of its own."""
    if args.resume and args.resume != 'auto' and not args.experiment:
        path = Path(args.resume)
        folder = path.parent if path.is_file() else path
        return (folder.parent if folder.name == 'checkpoints' else folder).resolve()
    data = Path(args.train_list or args.data_dir or args.dataset or 'digits').name.split('.')[0]
    name = f"{data}-{args.model.split('/')[-1].replace(':', '-')}-{args.method}"
    return open_run_folder(args.output, args.experiment, name, resume=args.resume == 'auto')


class Run:
    """A training run: where it stands, and what it leaves.

    Args:
        setup: All that trains.
        folder: Of the run.
    """

    def __init__(self, setup: Setup, folder: Path):
        self.setup, self.args = setup, setup.args
        self.accelerator, self.task = setup.accelerator, setup.task
        self.state = TrainingState(setup.accelerator, setup.task, setup.optimizer, setup.task.has_ema())
        self.folder = folder
        self.position = Position(global_batch=setup.global_batch, accum_steps=self.args.grad_accum_steps)
        self.meter, self.restored_meter = None, None
        self.best, self.metrics, self.predictions, self.bad_images_told = None, None, None, 0
        self.preemption, self.clock = Preemption(), CheckpointClock(self.args.checkpoint_interval)
        self.writer, self.started, self.seconds_before = CheckpointWriter(), time.time(), 0.0

    # --- beginning ---

    def resume(self) -> None:
        """Go on from a checkpoint: the newest of the run that can be read for `auto`, if there is one yet."""
        if not self.args.resume:
            return
        found, setup = self._find_checkpoint(), self.setup
        if found is None:
            return
        path, state = found
        self._check_origin(path, state)
        self.restored_meter = self.state.restore(state)
        self.best, self.metrics, self.seconds_before = state['best'], state['metrics'], state['seconds']
        self.position = self._position(Position(**state['position']))
        if setup.scheduler is not None:
            if self.position.epoch:
                setup.scheduler.step(self.position.epoch)
            setup.scheduler.step_update(
                self.position.epoch * setup.updates_per_epoch + -(-self.position.step // self.args.grad_accum_steps))
        step = f', step {self.position.step + 1}' if self.position.step else ''
        _logger.info(f'Resumed from {path}, epoch {self.position.epoch + 1} of {setup.num_epochs}{step} comes next')

    def _find_checkpoint(self) -> tuple[Path, dict] | None:
        if self.args.resume == 'auto':
            return load_newest(self.folder / 'checkpoints')
        path = Path(self.args.resume)
        if not path.is_dir():
            return path, load_checkpoint(path)
        found = load_newest(path)
        if found is None:
            raise InputError(f'--resume {path}: no checkpoint in this folder')
        return found

    def _check_origin(self, path: Path, state: dict) -> None:
        """Only the same model, method and optimizer can go on."""
        wanted, found = ({**description['model'], **description['training']}
                         for description in (self.setup.description(), state['description']))
        if wanted['name'] != found['name'] or self.args.method != state['metrics']['method']:
            raise InputError(f"--resume {path}: holds {found['name']} with {found['num_classes']} classes by "
                             f"{state['metrics']['method']}, this run trains {wanted['name']} with "
                             f"{wanted['num_classes']} classes by {self.args.method}")
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise InputError(f'--resume {path}: was trained with {name} {found.get(name)}, this run has '
                                 f'{wanted.get(name)}')
        if state['metrics']['fingerprint'] != self.setup.data.profile.fingerprint:
            _logger.warning('The training set differs from the one of the checkpoint (fingerprints).')

    def _position(self, saved: Position) -> Position:
        """Where the checkpoint stands, in steps of this run."""
        position = saved.for_batch(self.setup.global_batch, self.args.grad_accum_steps)
        if (saved.global_batch, saved.accum_steps) != (position.global_batch, position.accum_steps):
            _logger.warning(
                f'The global batch was {saved.global_batch} x {saved.accum_steps} steps an update, now it is '
                f'{position.global_batch} x {position.accum_steps}: from here on this is another training.')
        if len(self.setup.train_loader) < position.step:
            self.restored_meter = None
            return position.at(position.epoch + 1)
        return position

    def create_folder(self, trackers: list[str]) -> None:
        options = {name: value for name, value in vars(self.args).items() if name not in ('config', 'resume', 'debug')}
        if self.accelerator.is_main_process:
            create_run_folder(self.folder, options, before_writing=self._lock)
        self.accelerator.wait_for_everyone()
        start_trackers(self.accelerator, trackers, self.folder, options)

    def _lock(self) -> None:
        self.lock = lock_run_folder(self.folder)
        remove_half_written(self.folder / 'checkpoints')

    # --- an epoch ---

    def train(self, epoch: int) -> dict:
        start = self.position.step
        self.meter = Meter(('loss', *self.task.loss_names), self.accelerator.device)
        if self.restored_meter is not None:
            self.meter.load(self.restored_meter)
            self.restored_meter = None
        self.clock.reset(start)
        try:
            return self.setup.train_epoch(epoch, start_step=start, meter=self.meter, after_update=self._after_update)
        except NotFiniteError as error:
            self.position = self.position.at(epoch, error.step)
            raise RunError(f'{error} ({self._save_here()})') from error

    def _after_update(self, step: int) -> None:
        """Save or stop, if it is time to."""
        self.position, last = self.position.at(self.position.epoch, step), step == len(self.setup.train_loader)
        request = self.preemption.request(self.clock.due(step), at_once=last)
        if request is Request.STOP:
            if last:
                self._share_statistics()
            self._stop()
        elif request is Request.SAVE and not last:  # the end of the epoch saves, too
            self._save({})

    def _stop(self) -> None:
        """Save where the run stands, and end it."""
        name = self.preemption.signal.name if self.preemption.signal else 'another process'
        message = self._save_here()
        self.accelerator.wait_for_everyone()  # the launcher ends all processes with the first
        finish_trackers(self.accelerator)
        epoch = self.position.epoch + 1
        where = f'in epoch {epoch}' if epoch <= self.setup.num_epochs else 'after the last epoch'
        _logger.info(f'Stopped by {name} {where}, {message}')
        raise Preempted

    @property
    def eval_model(self) -> torch.nn.Module:
        return self.task.get_eval_model(ema=self.task.has_ema())

    @property
    def conventional(self) -> torch.nn.Linear | None:
        return self.task.conventional_classifier(ema=self.task.has_ema())

    def evaluates(self, epoch: int) -> bool:
        return (epoch + 1) % self.args.val_interval == 0 or epoch + 1 == self.setup.num_epochs

    def evaluate(self, loader) -> dict:
        self._share_statistics()
        several = self.accelerator.num_processes > 1
        metrics = evaluate(self.accelerator, self.eval_model, loader, self.setup.evaluator,
                           between=lambda: self._stop() if self.preemption.signal and not several else None)
        self.predictions = self.setup.evaluator.predictions(several)
        return metrics

    def _share_statistics(self) -> None:
        """Make BatchNorm statistics equal in all processes; doing so twice changes nothing."""
        if self.accelerator.num_processes > 1:
            distribute_bn(self.eval_model, self.accelerator.num_processes, self.args.dist_bn == 'reduce')

    def record(self, epoch: int, train_metrics: dict, metrics: dict | None) -> None:
        alpha = getattr(self.task, 'alpha', None)
        bad = self._bad_images()
        row = summary_row(epoch, train_metrics, metrics, None if alpha is None else alpha.item(), len(bad))
        if self.accelerator.is_main_process:
            self._write_row(row)
        evaluation = f'{shot_line(metrics)}, ' if metrics else ''
        skipped = f"{train_metrics['skipped_steps']} steps skipped, " if train_metrics['skipped_steps'] else ''
        _logger.info(f"Epoch {epoch + 1}/{self.setup.num_epochs}: loss {train_metrics['loss']:.3f}, {evaluation}{skipped}"
                     f"{train_metrics['images']:,} images at {train_metrics['images_per_second']:.0f}/s")

    def _bad_images(self) -> list[str]:
        """Training images that others stood in for, of all processes; new ones are named."""
        if self.setup.bad_images is None:
            return []
        names = sorted({name for share in gather_object([self.setup.bad_images.names()]) for name in share})
        if len(names) > self.bad_images_told:
            _logger.warning(f"{len(names)} training images cannot be decoded, others of their class stood in: "
                            f"{', '.join(names[:10])}{' …' if len(names) > 10 else ''}")
        self.bad_images_told = len(names)
        return names

    def _write_row(self, row: dict) -> None:
        try:
            write_summary(self.folder, row)
            log_row(self.accelerator, row)
        except OSError as error:
            if not disk_is_full(error):
                raise
            _logger.warning(f'summary.csv: epoch {row["epoch"]} not written: {error}')

    def finish_epoch(self, epoch: int, metrics: dict | None) -> None:
        """Save, and stop if asked to."""
        if self.setup.scheduler is not None:
            self.setup.scheduler.step(epoch + 1)
        self.position, self.meter = self.position.at(epoch + 1), None
        self._save(metrics or {})
        if epoch + 1 == self.setup.num_epochs:
            self.writer.wait()  # before signals are no longer heard
        if self.preemption.request(False, at_once=True) is Request.STOP:
            self._stop()

    # --- what stays ---

    def _save(self, metrics: dict) -> Path:
        """Write a checkpoint beside the training."""
        if self.meter is not None:
            self.meter.restore_buffers()
        self.metrics = self._facts(self.position.last_epoch, metrics)
        state, path = self.state.capture(self.position, self.meter), self._path()
        self.clock.reset(self.position.step)
        if not self.accelerator.is_main_process:
            return path
        is_best = self.setup.data.holdout and metrics and (self.best is None or metrics['class_mean'] > self.best)
        self.best = metrics['class_mean'] if is_best else self.best
        state.update(best=self.best, metrics=self.metrics, seconds=self._seconds(), description=self.setup.description())

        def keep() -> None:
            if is_best:
                keep_best(path)
            prune(path.parent, self.args.checkpoint_hist)

        self.writer.save(path, state, then=keep)
        return path

    def _path(self) -> Path:
        return checkpoint_path(self.folder / 'checkpoints', self.position.last_epoch, self.position.step)

    def _save_here(self) -> str:
        """Save now, unless that has been done, and say so."""
        path = self._path() if self.meter is None else self._save({})
        return f'saved as {path}' if self.writer.wait() else 'NOT saved: the disk is full'

    def finish(self) -> None:
        """Export the last model, or the best on the held-out images, with its metrics."""
        data = self.setup.data
        self.writer.wait()
        self.accelerator.wait_for_everyone()
        if data.holdout:
            self._load_best()
        if data.holdout and self.setup.val_loader:
            metrics = self.evaluate(self.setup.val_loader)
            self.metrics = self._facts(self.metrics['epoch'], metrics, self.args.val_split)
        elif self.predictions is None:  # those of the model that is exported, for the report
            self.evaluate(self.setup.epoch_loader)
        if not self.accelerator.is_main_process:
            return
        export = self.setup.description()['export']
        try:
            folder = export_model(self.folder / 'export', self.eval_model, metrics=self.metrics, **export)
        except OSError as error:
            if not disk_is_full(error):
                raise
            raise RunError(f'{self.folder}/export: no space left; with space, the same command with --resume auto '
                           'exports') from error
        print(f"\n{self.args.method} on {self.metrics['evaluated_on']}, {self.metrics['num_images']:,} images:\n"
              f'{shot_table(self.metrics)}\nExported to {folder}', flush=True)
        if self.args.stage2:
            run_stage2(self.folder / 'stage2', self.args.stage2, model=self.eval_model, data=self.setup.readable_data(),
                       conventional=self.conventional, export=export, metrics=self.metrics, accelerator=self.accelerator,
                       augmentation=self.setup.augmentation, **pick(self.args, OPTIONS))
        self.share(folder)

    def share(self, export: Path) -> None:
        """Tables, report, trackers, Hub: none of them can fail the run."""
        args = self.args
        write_tables(self.folder, self.metrics, self.setup.data.class_names, self.predictions)
        if args.report:
            try_report(self.folder, self.metrics, self._evidence, export)
        finish_trackers(self.accelerator)
        if args.push_to_hub:
            try_push(export, args.push_to_hub, args.hub_private, args.hub_revision)

    def _evidence(self) -> ReportInputs:
        """What the report shows beside the metrics."""
        data, last = self.setup.data, self.setup.num_epochs - 1
        names = list(map(str, data.class_names))
        views = mixed_views(self.setup.train_loader, self.setup.mixer, names, self.args.seed, last)
        log_pictures(self.accelerator, 'mixed_views', views, last)
        norms = classifier_norms(c=self.conventional, cb=self.eval_model.get_classifier())
        images = data.validation or data.holdout
        return ReportInputs(names, self.predictions, images, norms, read_summary(self.folder), views)

    def _load_best(self) -> None:
        state = load_checkpoint(self.folder / 'checkpoints' / BEST)
        self.predictions = None  # those at hand are of the last epoch
        self.task.load_checkpoint_state(*trained_weights(state, self.task.has_ema()), ema=self.task.has_ema())
        self.metrics = state['metrics']
        _logger.info(f"Best on held-out images: epoch {self.metrics['epoch'] + 1}, class mean {state['best']:.2f}")

    def _facts(self, epoch: int, metrics: dict, evaluated_on: str | None = None) -> dict:
        """What metrics.json and a checkpoint say about the model."""
        setup, profile = self.setup, self.setup.data.profile
        own = 'holdout' if setup.data.holdout else self.args.val_list or self.args.val_split
        return {
            'model': self.args.model, 'method': self.args.method, 'data': setup.data_name(),
            'num_classes': len(setup.data.class_names), 'parameters': setup.num_parameters, 'epoch': epoch,
            'epochs': setup.num_epochs, 'evaluated_on': evaluated_on or own, **metrics,
            'fingerprint': profile.fingerprint, 'train_images': profile.num_images, 'seed': self.args.seed,
            'seconds': round(self._seconds(), 1), 'processes': self.accelerator.num_processes,
            'precision': self.accelerator.mixed_precision, 'device': device_name(self.accelerator.device),
            'threads': torch.get_num_threads(), **provenance(),
        }

    def _seconds(self) -> float:
        return self.seconds_before + time.time() - self.started


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv))
