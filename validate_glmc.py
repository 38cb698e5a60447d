#!/usr/bin/env python3
"""Evaluate a trained model on long-tailed classes: shot groups, worst classes, calibration, and a report with plots.

    python validate_glmc.py --model output/RUN/export --data-dir my_images
    python validate_glmc.py --model hf-hub:ORG/NAME --data-dir my_images --flip-tta
    python validate_glmc.py --model resnet50 --class-counts counts.json --dataset torch/imagenet --data-dir data
    python validate_glmc.py --compare output/RUN-A output/RUN-B
"""
import glmc  # noqa: F401, first: Ctrl-C during the imports is one line

# isort: split
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from glmc.cli import Options, parse_args, pick, run_script, show_help
from glmc.config import NEEDS, Need, add_run_data, names, unused_options, validate_parser

if __name__ == '__main__':
    show_help(validate_parser)  # before the imports that take seconds
# isort: split
import torch
from timm.data import IterableImageDataset
from torch import Tensor, nn

from glmc.data.loaders import create_eval_loader, larger_input
from glmc.data.profiles import long_tail_indices
from glmc.data.sources import load_evaluation_data
from glmc.errors import InputError, printable, printable_lines
from glmc.evaluation.metrics import LongTailEvaluator
from glmc.evaluation.priors import AdjustedModel, ranked_counts, resolve_shift
from glmc.evaluation.text import detail_table, shot_legend, shot_table
from glmc.export.load import TrainedModel, check_model, load_trained, trained_precision, training_counts
from glmc.files import ESCAPED
from glmc.report.compare import comparison_table, read_results, write_comparison
from glmc.report.report import ReportInputs, classifier_norms, try_report
from glmc.run_folder import claim_folder, open_run_folder, provenance, write_tables
from glmc.training.engine import evaluate
from glmc.training.launch import create_accelerator, is_main_process, setup_logging

_logger = logging.getLogger('glmc.validate')
DATA_CONFIG = ('img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct')
VALIDATE_NEEDS = (
    Need(('source_prior',), 'without --target-prior', lambda o: o.target_prior),
    Need(('target_imbalance',), 'without forward or backward in --target-prior or --test-distribution',
         lambda o: {o.target_prior, o.test_distribution} & {'forward', 'backward'}),
    *NEEDS)


def main() -> None:
    args, explicit = parse_args(validate_parser())
    if not args.compare:
        validate(args, explicit)
    elif is_main_process():
        compare(args, explicit)


def validate(args: Options, explicit: set[str]) -> None:
    """Evaluate one model and write its results."""
    trained = load_trained(
        args.model, checkpoint=args.checkpoint, data_options=pick(args, DATA_CONFIG), num_classes=args.num_classes,
        img_size=args.img_size, in_chans=args.in_chans, global_pool=args.gp, **args.model_kwargs)
    check_model(trained)
    folder = results_folder(args, default_folder(trained))
    counts = training_counts(trained, args.class_counts)
    accelerator = create_accelerator(args.amp, args.amp_dtype or trained_precision(trained, args.amp))
    words = add_run_data(args, explicit, args.model)
    if words:
        _logger.info(f'Data of the run: {shlex.join(words)}')
    warn_unused(args, explicit, VALIDATE_NEEDS)
    images = choose_images(args, trained, counts)
    model = prepare_model(args, trained, logit_shift(args, trained, counts, images), accelerator.device)
    loader = create_eval_loader(
        images, batch_size=args.batch_size, device=accelerator.device,
        data_config=larger_input(trained.data_config) if args.crop_tta else trained.data_config,
        workers=args.workers, rank=accelerator.process_index, world_size=accelerator.num_processes)
    thresholds = args.shot_thresholds or trained.metadata.get('profile', {}).get('shot_thresholds', [20, 100])
    evaluator = LongTailEvaluator(counts, thresholds, device=accelerator.device)
    metrics = evaluate(accelerator, model, loader, evaluator)
    predictions = evaluator.predictions(accelerator.num_processes > 1)
    if accelerator.is_main_process:
        metrics = {**describe(args, trained, accelerator), **metrics, **provenance()}
        write_results(args, folder, trained, metrics, predictions, images)


def warn_unused(args: Options, explicit: set[str], needs: Sequence[Need]) -> None:
    for warning in unused_options(args, explicit, needs):
        _logger.warning(warning)


def choose_images(args: Options, trained: TrainedModel, counts: Sequence[int]):
    """Return the set of the data options, cut to the test distribution."""
    images = load_evaluation_data(
        class_names=trained.class_names, num_classes=trained.num_classes,
        **pick(args, {*names('data'), 'batch_size'} - {'num_classes', 'class_counts'}))
    if not args.test_distribution:
        return images
    require_index(images, '--test-distribution', args.test_distribution)
    smallest = int(images.counts().min())
    try:
        kept = ranked_counts(counts, smallest, args.test_distribution, args.target_imbalance)
    except ValueError as error:
        raise InputError(f'--test-distribution {args.test_distribution}, --target-imbalance '
                         f'{args.target_imbalance:g}: {error}') from error
    return images.subset(long_tail_indices(images.labels, kept))


def require_index(images, flag: str, value: str) -> None:
    if isinstance(images, IterableImageDataset):
        raise InputError(f'{flag} {value}: needs a source with an index')


def logit_shift(args: Options, trained: TrainedModel, counts: Sequence[int], images) -> Tensor | None:
    """Return the (C,) shift of the logits for `--target-prior`, or None without it."""
    test_counts = None
    if args.target_prior == 'test':
        require_index(images, '--target-prior', 'test')
        test_counts = images.counts()
    return resolve_shift(args.target_prior, source_prior(args, trained), counts, args.target_imbalance, test_counts)


def source_prior(args: Options, trained: TrainedModel) -> str | list[float]:
    """Return the class prior that the classifier has learnt: `train`, `uniform`, or C probabilities."""
    return args.source_prior or trained.metadata.get('prior', 'train')


def prepare_model(args: Options, trained: TrainedModel, shift: Tensor | None, device: torch.device) -> nn.Module:
    """Return the model on the device, with the changes to its logits."""
    model = trained.model.to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if shift is None and not args.flip_tta and not args.crop_tta:
        return model
    crop = trained.data_config['input_size'][-2:] if args.crop_tta else None
    return AdjustedModel(model, shift, args.flip_tta, crop).to(device)


def describe(args: Options, trained: TrainedModel, accelerator) -> dict:
    """Return the entries of metrics.json besides the metrics."""
    options = pick(args, ('flip_tta', 'crop_tta', 'test_distribution', 'target_prior', 'target_imbalance'))
    return {
        'model': trained.architecture, 'weights': args.model, 'method': trained.metadata.get('method'),
        'num_classes': trained.num_classes, 'parameters': sum(p.numel() for p in trained.model.parameters()),
        'data': args.dataset or args.data_dir or 'digits', 'evaluated_on': args.val_list or args.val_split, **options,
        'source_prior': source_prior(args, trained), 'precision': accelerator.mixed_precision,
        'processes': accelerator.num_processes, 'fingerprint': trained.metadata.get('profile', {}).get('fingerprint'),
    }


def default_folder(trained: TrainedModel) -> str:
    """Return the name of the folder without --experiment."""
    return re.sub(r'[^\w.-]', '-', f'validate-{trained.architecture}')


def results_folder(args: Options, name: str) -> Path:
    """Return the folder of the results.

    Raises:
        InputError: Before the evaluation, if the folder exists or cannot be written.
    """
    folder = open_run_folder(args.output, args.experiment, name, resume=False)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f'--output: cannot write to {folder}: {nearest} is not a writable folder')
    return folder


def write_results(
        args: Options, folder: Path, trained: TrainedModel, metrics: dict, predictions, images) -> None:
    """Write metrics, tables and report, and print the tables."""
    class_names = trained.class_names or getattr(images, 'class_names', None)
    try:
        if args.experiment:
            folder.mkdir(parents=True)
        else:  # the next number, if another evaluation has taken this one
            folder = claim_folder(folder.parent, default_folder(trained))
        (folder / 'metrics.json').write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + '\n', **ESCAPED)
        write_tables(folder, metrics, class_names, predictions, images)
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error
    print(printable_lines(f"{args.model} on {metrics['evaluated_on']}, {metrics['num_images']:,} images:\n"
          f'{shot_table(metrics, class_names)}\n{detail_table(metrics)}\n{shot_legend(metrics["shot_thresholds"])}\n'
          f'Written to {folder}'), flush=True)
    if args.report:
        norms = classifier_norms(classifier=trained.model.get_classifier())
        shown = class_names and [printable(str(name)) for name in class_names]
        report = try_report(folder, metrics, lambda: ReportInputs(shown, predictions, images, norms))
        if report is not None:
            print(f'Report: {report}', flush=True)


def compare(args: Options, explicit: set[str]) -> None:
    """Write one report of several folders of results."""
    setup_logging(main_process=True)
    folder = results_folder(args, 'compare')
    results = read_results([Path(name) for name in args.compare])
    path = write_comparison(folder, results)
    print(f'{comparison_table(results)}\nWritten to {path}')
    others = explicit - {'compare', 'output', 'experiment', 'debug'}
    warn_unused(args, explicit, [Need(tuple(others), 'with --compare', lambda options: False)])


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv, exits=True))
