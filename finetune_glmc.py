#!/usr/bin/env python3
"""Train classifiers on the features of a trained or pretrained model, in seconds, and compare them.

    python finetune_glmc.py --model convnext_tiny --data-dir my_images
    python finetune_glmc.py --model output/RUN --data-dir my_images
    python finetune_glmc.py --model output/RUN --data-dir my_images --stage2 maxnorm,los --stage2-holdout 0.2
    python finetune_glmc.py --model output/seed0 output/seed1 output/seed2 --data-dir my_images
    python finetune_glmc.py --model hf-hub:ORG/NAME --data-dir my_images --stage2 maxnorm --push-to-hub ORG/OTHER
"""
import glmc  # noqa: F401, first: Ctrl-C during the imports is one line

# isort: split
import logging
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from glmc.cli import Options, parse_args, pick, run_script, show_help
from glmc.config import (
    DATA,
    DEMONSTRATION,
    FINETUNE_NEEDS,
    INPUT,
    add_run_data,
    augmentation_options,
    finetune_parser,
    flag,
    names,
    unused_options,
)

if __name__ == '__main__':
    show_help(finetune_parser)  # before the imports that take seconds
# isort: split
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from glmc.data.sources import TrainingData, load_training_data
from glmc.errors import InputError
from glmc.export.hub import try_push, warn_without_token
from glmc.export.load import TrainedModel, check_model, load_trained, trained_precision, training_counts
from glmc.report.compare import read_results, write_comparison
from glmc.report.report import report_errors_as_warnings
from glmc.run_folder import claim_folder, open_run_folder
from glmc.stage2.finetune import CHOICE, OPTIONS, TABLE, check_stage2, results_table, run_stage2, write_results
from glmc.stage2.select import STAGE1, Result, best_result
from glmc.training.launch import create_accelerator, device_name, is_main_process

_logger = logging.getLogger('glmc.finetune')


def main() -> None:
    args, explicit = parse_args(finetune_parser())
    if not args.model:
        raise InputError('--model: expected an architecture of timm, or the export folder, run folder, checkpoint or Hub id '
                         'of a trained model')
    models = {name: load_trained(name, data_options=pick(args, INPUT), num_classes=None, img_size=args.img_size,
                                 in_chans=args.in_chans) for name in args.model}
    first = next(iter(models.values()))
    accelerator = create_accelerator(args.amp, args.amp_dtype or trained_precision(first, args.amp))
    jobs = {name: prepare(args, explicit, trained, accelerator) for name, trained in models.items()}
    check_kinds(jobs)
    check_push(args, encoder_only=jobs[args.model[0]]['encoder_only'])
    folder = create_folder(args, f'stage2-{first.architecture}', accelerator)
    folders = {name: folder / f'{number}-{Path(name).name}' if len(jobs) > 1 else folder
               for number, name in enumerate(jobs, 1)}
    runs = {name: run_stage2(folders[name], args.stage2, accelerator=accelerator, **job) for name, job in jobs.items()}
    if accelerator.is_main_process:
        finish(args, folder, folders, runs)


def create_folder(args: Options, name: str, accelerator: Accelerator) -> Path:
    """Create the folder of the results, with the next number if another run has taken it; all processes call this."""
    folder = open_run_folder(args.output, args.experiment, name, resume=False) if accelerator.is_main_process else None
    if accelerator.is_main_process and not args.experiment:
        folder = claim_folder(folder.parent, name)
    return broadcast_object_list([folder])[0]


def prepare(args: Options, explicit: set[str], trained: TrainedModel, accelerator: Accelerator) -> dict:
    """Return the arguments of `run_stage2` for one model.

    Raises:
        InputError: For wrong input, before any training.
    """
    args = Options(**vars(args))
    words = add_run_data(args, explicit, trained.name)
    if words:
        _logger.info(f'Data of the run: {shlex.join(words)}')
    args = follow_stage1(args, explicit, trained)
    knows_counts = bool(args.class_counts or trained.metadata.get('profile', {}).get('class_counts'))
    counts = training_counts(trained, args.class_counts) if knows_counts else None
    data = load_training_data(**pick(args, (*names(*DATA), 'seed', 'batch_size')))
    encoder_only = not knows_counts or not has_classes_of(args, trained, data)
    if encoder_only:
        trained, counts = with_new_classifier(trained, len(data.class_names), knows_counts), None
        args.feature_views = args.feature_views if 'feature_views' in explicit else 0
    else:
        warn_other_images(trained, data)
    for warning in unused_options(args, explicit, FINETUNE_NEEDS):
        _logger.warning(warning)
    choice = dict(conventional=trained.conventional, encoder_only=encoder_only)
    check_stage2(args.stage2, model=trained.model, data=data, **choice, **pick(args, CHOICE))
    check_model(trained)
    args.feature_cache = args.feature_cache or Path(args.output) / 'features'
    choice['conventional'] = trained.conventional and trained.conventional.to(accelerator.device)
    return dict(
        model=trained.model.to(accelerator.device), data=data, counts=counts, augmentation=augmentation_options(args),
        metrics=describe(args, trained, data, accelerator), export=export_options(args, trained, data), **choice,
        **pick(args, OPTIONS))


def follow_stage1(args: Options, explicit: set[str], trained: TrainedModel) -> Options:
    """Return the options for one model, with those of its training where the user set none.

    Without data, the options of the demonstration come first.
    """
    recipe, profile = trained.metadata.get('recipe', {}), trained.metadata.get('profile', {})
    known = {name: source[name] for source, options in ((recipe, ('augmentation', 'imbalance_factor')),
                                                        (profile, ('shot_thresholds',)))
             for name in options if source.get(name) is not None}
    if not (args.data_dir or args.dataset or args.train_list):
        known = {**DEMONSTRATION, **known}
    known = {name: value for name, value in known.items() if name not in {*explicit, *INPUT} and name in vars(args)}
    for name, value in known.items():
        _logger.info(f'{flag(name)} {value}, as in stage 1')
    return Options(**{**vars(args), **known, 'model': trained.name})


def has_classes_of(args: Options, trained: TrainedModel, data: TrainingData) -> bool:
    """Return whether the model has the classes of the training data.

    Raises:
        InputError: If it has the same classes in another order.
    """
    if len(data.class_names) != trained.num_classes:
        return False
    found, known = list(map(str, data.class_names)), list(map(str, trained.class_names or ()))
    if not known or args.train_list or found == known:
        return True
    if sorted(found) == sorted(known):
        other = next(name for name, own in zip(found, known, strict=True) if name != own)
        raise InputError(f'--model {args.model}: was trained on the classes in another order: the training data has '
                         f'{other!r} where the model has {known[found.index(other)]!r}')
    return False


def with_new_classifier(trained: TrainedModel, num_classes: int, knows_counts: bool) -> TrainedModel:
    """Return the model with an untrained classifier, and without the metadata of its own."""
    if trained.num_classes != num_classes:
        reason = f'it has {trained.num_classes:,} classes, the training data has {num_classes:,}'
    else:
        reason = 'its classes are others' if knows_counts else (
            'it records no training images per class; --class-counts FILE keeps its classifier')
    _logger.log(logging.WARNING if knows_counts else logging.INFO,
                f'--model {trained.name}: only its encoder is used: {reason}')
    with suppress(AttributeError, NotImplementedError, TypeError):  # linear_classifier raises the error
        trained.model.reset_classifier(num_classes)
    trained.model.eval()
    base_model = trained.model.pretrained_cfg.get('hf_hub_id')
    if trained.name.startswith('hf-hub:'):
        base_model = trained.name.removeprefix('hf-hub:').partition('@')[0]
    metadata = dict(method='frozen', prior='train', other_weights=True, base_model=base_model)
    metadata['license'] = trained.metadata.get('license') or trained.model.pretrained_cfg.get('license')
    return replace(trained, class_names=None, conventional=None,
                   metadata={name: value for name, value in metadata.items() if value is not None})


def warn_other_images(trained: TrainedModel, data: TrainingData) -> None:
    stage1 = trained.metadata.get('profile', {}).get('fingerprint')
    if stage1 and data.profile.fingerprint != stage1:
        _logger.warning('The training set differs from that of stage 1 (fingerprints).')


def check_kinds(jobs: dict[str, dict]) -> None:
    """Refuse models with and without a trained classifier in one table."""
    kinds = {job['encoder_only']: name for name, job in jobs.items()}
    if len(kinds) > 1:
        raise InputError(f'--model {kinds[True]}: has no trained classifier for these classes, unlike {kinds[False]}; '
                         'expected one kind of models')


def check_push(args: Options, encoder_only: bool) -> None:
    """Refuse `--push-to-hub` unless one classifier is trained, or one is chosen on held-out images."""
    if not args.push_to_hub:
        return
    warn_without_token()
    several = args.stage2 == 'all' or ',' in args.stage2
    chooses = encoder_only or args.holdout is not None or args.select_split or args.stage2_holdout is not None
    if len(args.model) > 1 or (several and not chooses):
        raise InputError(f'--push-to-hub {args.push_to_hub}: expected one --model, and one classifier in --stage2 or '
                         '--stage2-holdout to choose one')


def describe(args: Options, trained: TrainedModel, data: TrainingData, accelerator: Accelerator) -> dict:
    """Return the entries of metrics.json besides the metrics."""
    return {
        'model': trained.architecture, 'weights': args.model, 'method': trained.metadata.get('method') or 'unknown',
        'data': args.train_list or args.dataset or args.data_dir or 'digits', 'num_classes': trained.num_classes,
        'parameters': sum(p.numel() for p in trained.model.parameters()),
        'epochs': trained.metadata.get('recipe', {}).get('epochs'),
        'evaluated_on': args.select_split or 'holdout' if data.validation is None else args.val_list or args.val_split,
        'fingerprint': data.profile.fingerprint, 'train_images': data.profile.num_images, 'seed': args.seed,
        'processes': 1, 'precision': accelerator.mixed_precision, 'device': device_name(accelerator.device),
    }


def export_options(args: Options, trained: TrainedModel, data: TrainingData) -> dict:
    """Return the arguments of `export_model` besides the weights."""
    source = {'profile': data.profile.as_dict(), **trained.metadata}
    if args.hub_license != 'unknown':
        source['license'] = args.hub_license
    if args.dataset_name:
        source['dataset_name'] = args.dataset_name
    return dict(data_config=trained.data_config, class_names=list(map(str, data.class_names)), source=source)


def finish(args: Options, folder: Path, folders: dict[str, Path], runs: dict[str, list[Result]]) -> None:
    """Print where the results are, with the means of several models; write reports; push the chosen classifier."""
    if len(runs) > 1:
        write_results(folder / TABLE, runs)
        print(f'\nMean of {len(runs)} models:\n{results_table(list(runs.values()))}')
    if args.report:
        for name, results in runs.items():
            try_compare(folders[name], Path(name), results)
    print(f'Written to {folder}: {TABLE}, and per_class.csv of each classifier in NAME/')
    for name, results in runs.items():
        print_exports(folders[name], results)
    if args.push_to_hub:
        (result_folder,), (results,) = folders.values(), runs.values()
        export = result_folder / 'export'
        export = export if export.exists() else result_folder / best_result(results).name / 'export'
        try_push(export, args.push_to_hub, args.hub_private, args.hub_revision)


def print_exports(folder: Path, results: list[Result]) -> None:
    """Print where the exports are, and the command that classifies images."""
    exportable = [result for result in results if result.is_exportable]
    if not exportable:
        print('No export: none of the classifiers is linear')
    elif (folder / 'export').exists():
        best, chosen = max(results, key=lambda result: result.heldout or 0), best_result(results)
        if best is not chosen:
            print(f'{best.name} is the best on held-out images, but not linear: {chosen.name} is exported')
        print(f'Exported {chosen.name} to {folder}/export')
        print(f'Next: python -m glmc.predict {shlex.quote(str(folder))} IMAGES', flush=True)
    else:
        print(f"Exported to {folder}/NAME/export: {', '.join(result.name for result in exportable)}\n"
              f"Next: python -m glmc.predict {shlex.quote(f'{folder}/{exportable[0].name}')} IMAGES", flush=True)


def try_compare(folder: Path, stage1: Path, results: list[Result]) -> None:
    """Write one report of both stages; a failure is only a warning."""
    before = [stage1] if any((stage1 / name / 'metrics.json').is_file() for name in ('.', 'export')) else []
    with report_errors_as_warnings():
        after = (folder / result.name for result in results if result.name != STAGE1)
        write_comparison(folder, read_results([*before, *after]))


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv, exits=True))
