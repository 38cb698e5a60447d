#!/usr/bin/env python3
"""Train a timm model on long-tailed images with GLMC or a baseline, and export it as a plain timm model.

    accelerate launch train_glmc.py                                       a demonstration on embedded digits
    accelerate launch train_glmc.py --model resnext50_32x4d --data-dir my_images
    accelerate launch train_glmc.py -c hparams/cifar100_lt_if100.yaml --dataset torch/cifar100 --data-dir data

At SIGTERM, SIGUSR1 or Ctrl-C the run finishes the step, saves a checkpoint and exits with code 75; the same command with
--resume auto continues it.
"""
import glmc  # noqa: F401, first: Ctrl-C during the imports is one line

# isort: split
import logging
import shlex
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from glmc.cli import Options, parse_args, pick, run_script, show_help
from glmc.config import method_rows, train_parser

if __name__ == '__main__':
    show_help(lambda: train_parser(method_rows()))  # before the imports that take seconds
# isort: split
from glmc.data.check import readable_subset
from glmc.errors import RunError, printable, printable_lines
from glmc.evaluation.metrics import Predictions
from glmc.evaluation.text import shot_table
from glmc.export.export import export_model
from glmc.export.hub import try_push, warn_without_token
from glmc.files import disk_is_full
from glmc.methods import METHODS
from glmc.models.exported import exported_form
from glmc.report.pictures import mixed_views
from glmc.report.report import ReportInputs, classifier_norms, try_report
from glmc.report.trackers import finish_trackers, log_pictures, log_row, require_trackers, start_trackers
from glmc.run_folder import RunFolder, read_summary, summary_row, write_tables
from glmc.setup import Setup
from glmc.stage2.features import Extractor
from glmc.stage2.finetune import CHOICE, OPTIONS, check_stage2, run_stage2
from glmc.stage2.head_init import init_heads
from glmc.training.checkpoints import Checkpoints
from glmc.training.launch import create_accelerator, end_processes, is_main_process, memory_errors

_logger = logging.getLogger('glmc.train')


@memory_errors()
def main() -> None:
    args, explicit = parse_args(train_parser(METHODS))
    trackers = require_trackers(args.report_to)
    if args.push_to_hub:
        warn_without_token()
    accelerator = create_accelerator(args.amp, args.amp_dtype)
    folder = RunFolder.choose(accelerator, default_name(args), **pick(args, ('output', 'experiment', 'resume')))
    setup = Setup(args, explicit, accelerator)
    if args.stage2:
        check_stage2(args.stage2, model=setup.eval_model, data=setup.data, conventional=setup.conventional,
                     **pick(args, CHOICE))
    checkpoints = Checkpoints(folder.checkpoints, setup)
    position = checkpoints.resume(args.resume)
    options = {name: value for name, value in vars(args).items() if name not in ('config', 'resume', 'debug')}
    folder.create(options)
    checkpoints.folder = folder.checkpoints  # of the next number, if another run has taken this one
    start_trackers(accelerator, trackers, folder.path, options)
    if checkpoints.metrics is None and setup.head_init != 'random':  # else they come from the checkpoint
        start_heads(setup, folder)
    with checkpoints.stoppable(before_exit=partial(finish_trackers, accelerator)):
        for epoch in range(position.epoch, setup.num_epochs):
            if checkpoints.out_of_patience():
                break
            start = time.perf_counter()
            train_metrics = setup.train_epoch(epoch, **checkpoints.begin_epoch())
            metrics = evaluate(setup, checkpoints, epoch)
            log_epoch(setup, folder, epoch, train_metrics, metrics, time.perf_counter() - start)
            checkpoints.end_epoch(metrics)
    finish(setup, checkpoints, folder)


def default_name(args: Options) -> str:
    """Name of the run's folder without --experiment: data, model and method, in UTF-8."""
    data = Path(args.train_list or args.data_dir or args.dataset or 'digits').name.split('.')[0]
    data = data.encode('utf-8', 'replace').decode().replace('?', '_')
    return f"{data}-{args.model.split('/')[-1].replace(':', '-')}-{args.method}"


def start_heads(setup: Setup, folder: RunFolder) -> None:
    """Fit the classifiers to the features of the encoder before its training (`--head-init`)."""
    args, images, cache = setup.args, setup.data.train, Path(setup.args.feature_cache or folder.path / 'features')
    if setup.bad_images is not None:
        images, _ = readable_subset(images, args.workers)
    encoder = exported_form(setup.task.get_eval_model())  # which gives the features of the pretrained weights
    features = Extractor(
        encoder, data_config=setup.data_config, augmentation=setup.augmentation, cache=cache,
        accelerator=setup.accelerator, **pick(args, ('batch_size', 'workers', 'seed')))(images)
    init_heads(setup.task, features, setup.data.profile.counts, setup.description()['export']['source']['prior'],
               kind=setup.head_init, seed=args.seed, accelerator=setup.accelerator)
    if not args.feature_cache and setup.accelerator.is_local_main_process:
        shutil.rmtree(cache, ignore_errors=True)


def evaluate(setup: Setup, checkpoints: Checkpoints, epoch: int) -> dict | None:
    """Metrics of an epoch, None if no evaluation is due; after the last epoch, log the weights beside their average."""
    last = epoch + 1 == setup.num_epochs
    if not last and (epoch + 1) % setup.args.val_interval:
        return None
    loader, between = setup.epoch_loader, checkpoints.stop_if_signalled
    plain = setup.evaluate(loader, between, average=False) if last and setup.task.has_ema() else None
    metrics = setup.evaluate(loader, between)
    if plain is not None:
        _logger.info(f"{'EMA' if setup.args.model_ema else 'SWA'} {metrics['top1']:.1f}, weights themselves "
                     f"{plain['top1']:.1f} top-1")
    return metrics


def log_epoch(
        setup: Setup, folder: RunFolder, epoch: int, train_metrics: dict, metrics: dict | None, seconds: float) -> None:
    """Log an epoch to summary.csv, the trackers and standard error."""
    alpha = getattr(setup.task, 'alpha', None)
    row = summary_row(epoch, train_metrics, metrics, None if alpha is None else alpha.item(),
                      folder.count_bad(setup.bad_images))
    folder.log_epoch(row, train_metrics, metrics, setup.num_epochs, trackers=partial(log_row, setup.accelerator),
                     seconds=seconds)


def finish(setup: Setup, checkpoints: Checkpoints, folder: RunFolder) -> None:
    """Export the last model, or the best on the held-out images; train the classifiers of stage 2, and share all."""
    args, data, accelerator = setup.args, setup.data, setup.accelerator
    checkpoints.writer.wait()
    accelerator.wait_for_everyone()
    if data.holdout:
        checkpoints.load_best()
    if data.holdout or not setup.evaluator.records:  # else the evaluator has just seen the exported model
        metrics = setup.evaluate(setup.val_loader or setup.epoch_loader)
        if data.holdout and setup.val_loader:
            checkpoints.metrics = setup.metadata(
                checkpoints.metrics['epoch'], metrics, checkpoints.seconds(), args.val_split)
    predictions = setup.evaluator.predictions(accelerator.num_processes > 1)
    references = setup.evaluate_references()
    end_processes()
    if not accelerator.is_main_process:
        return
    metrics, export = {**checkpoints.metrics, **references}, setup.description()['export']
    try:
        exported = export_model(folder.path / 'export', setup.eval_model, metrics=metrics, **export)
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise RunError(f'{folder.path}/export: no space left; with space, the same command with --resume auto '
                       'exports') from error
    print(printable_lines(f"\n{args.method} on {metrics['evaluated_on']}, {metrics['num_images']:,} images:\n"
          f'{shot_table(metrics, data.class_names)}\nExported to {exported}'), flush=True)
    if args.stage2:
        run_stage2(folder.path / 'stage2', args.stage2, model=setup.eval_model, data=setup.readable_data(),
                   conventional=setup.conventional, export=export, metrics=metrics, accelerator=accelerator,
                   augmentation=setup.augmentation, **pick(args, OPTIONS))
    share(setup, folder, exported, metrics, predictions)


def share(setup: Setup, folder: RunFolder, exported: Path, metrics: dict, predictions: Predictions) -> None:
    """Write tables and report, close the trackers, push to the Hub; none of them can fail the run."""
    args = setup.args
    write_tables(folder.path, metrics, setup.data.class_names, predictions, setup.data.validation or setup.data.holdout)
    if args.report:
        report = try_report(folder.path, metrics, lambda: report_inputs(setup, folder, predictions), exported)
        if report is not None:
            print(f'Report: {report}')
    print(f'Next: python -m glmc.predict {shlex.quote(str(folder.path))} IMAGES', flush=True)
    finish_trackers(setup.accelerator)
    if args.push_to_hub:
        try_push(exported, args.push_to_hub, args.hub_private, args.hub_revision)


def report_inputs(setup: Setup, folder: RunFolder, predictions: Predictions) -> ReportInputs:
    """Predictions, pictures, norms and history for the report; the pictures go to the trackers, too."""
    data, last = setup.data, setup.num_epochs - 1
    names = [printable(str(name)) for name in data.class_names]
    views = mixed_views(setup.train_loader, setup.mixer, names, setup.args.seed, last)
    log_pictures(setup.accelerator, 'mixed_views', views, last)
    norms = classifier_norms(c=setup.conventional, cb=setup.eval_model.get_classifier())
    return ReportInputs(
        names, predictions, data.validation or data.holdout, norms, read_summary(folder.path), views)


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv, exits=True))
