#!/usr/bin/env python3
"""Evaluate a trained model on long-tailed classes: shot groups, worst classes, calibration, and a report with plots.

    python validate_glmc.py --model output/RUN/export --data-dir my_images
    python validate_glmc.py --model hf-hub:ORG/NAME --data-dir my_images --flip-tta
    python validate_glmc.py --model resnet50 --class-counts counts.json --dataset torch/imagenet --data-dir data
    python validate_glmc.py --compare output/RUN-A output/RUN-B
"""
import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from timm.data import IterableImageDataset
from torch import Tensor, nn

from glmc.cli import Options, Parser, number, parse_args, pick, run_script
from glmc.config import add_groups, count, names, positive_int
from glmc.data.lists import read_class_counts
from glmc.data.loaders import create_eval_loader
from glmc.data.profiles import long_tail_indices
from glmc.data.sources import load_evaluation_data
from glmc.errors import InputError
from glmc.evaluation.metrics import LongTailEvaluator
from glmc.evaluation.priors import (
    TARGETS,
    AdjustedModel,
    normalized,
    prior_shift,
    ranked_counts,
    read_prior,
    target_prior,
)
from glmc.evaluation.text import detail_table, shot_table
from glmc.export.load import TrainedModel, load_trained
from glmc.report.compare import write_comparison
from glmc.report.report import ReportInputs, classifier_norms, try_report
from glmc.run_folder import open_run_folder, provenance, write_tables
from glmc.training.engine import evaluate
from glmc.training.launch import create_accelerator, is_main_process, setup_logging

_logger = logging.getLogger('glmc.validate')
PRECISIONS = {'bf16': 'bfloat16', 'fp16': 'float16'}
HELP = {  # of options that train_glmc.py has, too, where they say something else here
    'class_counts': "training images per class, which decide the shot groups: JSON list, metrics.json of a run, or one "
    "number a line; default: the export's",
    'num_classes': "classes of an architecture of timm; default: of its pretrained weights",
}
DATA_CONFIG = ('img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct')


def main() -> None:
    args, explicit = parse_args(validate_parser())
    if not args.compare:
        validate(args, explicit)
    elif is_main_process():
        compare(args, explicit)


def validate(args: Options, explicit: set[str]) -> None:
    trained = load_trained(
        args.model, checkpoint=args.checkpoint, data_options=pick(args, DATA_CONFIG), num_classes=args.num_classes,
        img_size=args.img_size, in_chans=args.in_chans, global_pool=args.gp, **args.model_kwargs)
    folder = results_folder(args, f'validate-{trained.architecture}')
    counts = training_counts(args, trained)
    accelerator = create_accelerator(args.amp, args.amp_dtype or trained_precision(trained, args.amp))
    warn_of_unused(explicit, unused_options(args))
    images = choose_images(args, trained, counts)
    prior = choose_prior(args, trained, counts, images)
    loader = create_eval_loader(
        images, batch_size=args.batch_size, data_config=trained.data_config, device=accelerator.device,
        workers=args.workers, rank=accelerator.process_index, world_size=accelerator.num_processes)
    thresholds = args.shot_thresholds or trained.metadata.get('profile', {}).get('shot_thresholds', [20, 100])
    evaluator = LongTailEvaluator(counts, thresholds, device=accelerator.device)
    metrics = evaluate(accelerator, prepare_model(args, trained, prior, accelerator.device), loader, evaluator)
    predictions = evaluator.predictions(accelerator.num_processes > 1)
    if accelerator.is_main_process:
        facts = describe(args, trained, accelerator)
        write_results(args, folder, trained, {**facts, **metrics, **provenance()}, predictions, images)


def validate_parser() -> Parser:
    parser = Parser(
        prog='validate_glmc.py',
        description='Evaluate any export, checkpoint, Hub id or timm model on long-tailed classes.')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line wins')
    add_groups(parser, 'data')
    _model_group(parser)
    add_groups(parser, 'model input')
    _evaluation_group(parser)
    _running_group(parser)
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    return parser


def _model_group(parser: Parser) -> None:
    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet18', metavar='NAME',
        help='export folder, run folder, checkpoint, hf-hub:ORG/NAME, or a timm architecture with its pretrained weights')
    add('--checkpoint', metavar='FILE', help='weights for an architecture (.safetensors or .pth)')


def _evaluation_group(parser: Parser) -> None:
    add = parser.add_argument_group('evaluation').add_argument
    add('--shot-thresholds', type=count, nargs=2, metavar=('FEW', 'MANY'),
        help="few-shot <= FEW < medium-shot <= MANY < many-shot training images; default: the training's, else 20 100")
    add('--flip-tta', action='store_true', help='average the logits of image and mirror image')
    add('--test-distribution', choices=TARGETS,
        help='keep test images so that they are distributed like the training set (forward) or the other way round '
        '(backward), as in the test-agnostic benchmark (arXiv 2107.09249)')
    add('--target-prior', metavar='PRIOR',
        help='move the logits to this class prior: uniform, forward or backward as above, test (that of the images '
        'evaluated on), or a file with a weight per class (JSON list, or one number a line)')
    add('--source-prior', choices=('train', 'uniform'),
        help="prior that the classifier has learnt; default: the export's, train for a plain timm model")
    add('--target-imbalance', type=number(float, 1), default=50.0, metavar='F', help='of forward and backward')
    add('--compare', nargs='+', metavar='FOLDER', help='evaluate nothing: draw the results in these folders together')


def _running_group(parser: Parser) -> None:
    add = parser.add_argument_group('running').add_argument
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per process and step')
    add('-j', '--workers', type=count, default=2, metavar='N', help='loader processes per process')
    add('--amp', action='store_true', help='mixed precision in float16, or in --amp-dtype')
    add('--amp-dtype', choices=('float16', 'bfloat16'), help="default: as the launcher says, else training's")
    add('--output', default='output', metavar='DIR', help='parent folder of the results')
    add('--experiment', metavar='NAME', help='folder of these results; default: validate-model, numbered')
    add('--report', action=argparse.BooleanOptionalAction, default=True, help='write report.html and plots')
    add('--debug', action='store_true', help='show a traceback where an error is one line otherwise')


def training_counts(args: Options, trained: TrainedModel) -> list[int]:
    """Training images per class, which decide the shot groups."""
    counts = trained.metadata.get('profile', {}).get('class_counts')
    if args.class_counts:
        counts = read_class_counts(args.class_counts)
    if counts is None:
        raise InputError(f'--model {args.model}: nothing says how many training images each class had; expected '
                         '--class-counts FILE (JSON list, metrics.json of a run, or one number a line)')
    if len(counts) != trained.num_classes:
        raise InputError(f'--class-counts {args.class_counts or "of the export"}: found {len(counts)} classes, '
                         f'--model {args.model} has {trained.num_classes}')
    return counts


def trained_precision(trained: TrainedModel, amp: bool) -> str | None:
    """The training's mixed precision, unless a flag or the launcher names one or this device cannot do it."""
    precision = trained.metadata.get('precision')
    if amp or os.environ.get('ACCELERATE_MIXED_PRECISION', 'no') != 'no':
        return None
    return None if precision == 'fp16' and not torch.cuda.is_available() else PRECISIONS.get(precision)


def choose_images(args: Options, trained: TrainedModel, counts: list[int]):
    """The set that the data options name, cut to the test distribution."""
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


def choose_prior(args: Options, trained: TrainedModel, counts: list[int], images) -> Tensor | None:
    """What to add to the logits for the class prior that the user expects."""
    if not args.target_prior:
        return None
    if args.target_prior == 'test':
        require_index(images, '--target-prior', 'test')
        target = normalized(images.counts())
    elif args.target_prior in TARGETS:
        target = target_prior(counts, args.target_prior, args.target_imbalance)
    else:
        target = read_prior(args.target_prior, len(counts))
    source = normalized(counts if source_prior(args, trained) == 'train' else np.ones(len(counts)))
    return prior_shift(source, target)


def source_prior(args: Options, trained: TrainedModel) -> str:
    return args.source_prior or trained.metadata.get('prior', 'train')


def prepare_model(
        args: Options, trained: TrainedModel, shift: Tensor | None, device: torch.device) -> nn.Module:
    """The model where it will run, with whatever is done to its logits."""
    model = trained.model.to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model if shift is None and not args.flip_tta else AdjustedModel(model, shift, args.flip_tta).to(device)


def unused_options(args: Options) -> set[str]:
    """Options that say more about something that was not asked for."""
    unused = set()
    if not args.target_prior:
        unused.add('source_prior')
    if not {args.target_prior, args.test_distribution} & {'forward', 'backward'}:
        unused.add('target_imbalance')
    if args.val_list:
        unused.add('val_split')
    return unused


def warn_of_unused(explicit: set[str], unused: set[str]) -> None:
    for name in sorted(explicit & unused):
        _logger.warning(f"--{name.replace('_', '-')} has no effect here")


def describe(args: Options, trained: TrainedModel, accelerator) -> dict:
    """What metrics.json says beside the metrics."""
    options = pick(args, ('flip_tta', 'test_distribution', 'target_prior', 'target_imbalance'))
    return {
        'model': trained.architecture, 'weights': args.model, 'method': trained.metadata.get('method'),
        'num_classes': trained.num_classes, 'parameters': sum(p.numel() for p in trained.model.parameters()),
        'data': args.dataset or args.data_dir or 'digits', 'evaluated_on': args.val_list or args.val_split, **options,
        'source_prior': source_prior(args, trained), 'precision': accelerator.mixed_precision,
        'processes': accelerator.num_processes, 'fingerprint': trained.metadata.get('profile', {}).get('fingerprint'),
    }


def results_folder(args: Options, name: str) -> Path:
    """Where the results will go; that they cannot is told before the evaluation, not after it."""
    folder = open_run_folder(args.output, args.experiment, re.sub(r'[^\w.-]', '-', name), resume=False)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f'--output: cannot write to {folder}: {nearest} is no folder that can be written')
    return folder


def write_results(
        args: Options, folder: Path, trained: TrainedModel, metrics: dict, predictions, images) -> None:
    class_names = trained.class_names or getattr(images, 'class_names', None)
    try:
        folder.mkdir(parents=True)
        (folder / 'metrics.json').write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        write_tables(folder, metrics, class_names, predictions)
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error
    print(f"{args.model} on {metrics['evaluated_on']}, {metrics['num_images']:,} images:\n{shot_table(metrics)}\n"
          f'{detail_table(metrics)}\nWritten to {folder}', flush=True)
    if args.report:
        norms = classifier_norms(classifier=trained.model.get_classifier())
        try_report(folder, metrics, lambda: ReportInputs(class_names, predictions, images, norms))


def compare(args: Options, explicit: set[str]) -> None:
    setup_logging(main_process=True)
    folder = results_folder(args, 'compare')
    print(write_comparison(folder, [Path(name) for name in args.compare]))
    warn_of_unused(explicit, explicit - {'compare', 'output', 'experiment', 'debug'})


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv))
