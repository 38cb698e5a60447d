"""Stage 2 from model to exports: extract features, train classifiers, compare them in one table, export each."""
import copy
import csv
import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from glmc.data.datasets import ImageSet
from glmc.data.profiles import classes_without_images
from glmc.data.sources import TrainingData
from glmc.errors import InputError, printable
from glmc.evaluation.priors import resolve_prior
from glmc.evaluation.text import aligned, mean_std
from glmc.export.export import export_model
from glmc.files import ESCAPED, NAMES
from glmc.models.classifier import linear_classifier, set_classifier
from glmc.run_folder import provenance, spreadsheet_safe, write_tables
from glmc.stage2.classifiers import PROBE, Classifier, Linear, Stage1
from glmc.stage2.features import Extractor, Features
from glmc.stage2.select import (
    STAGE1,
    Result,
    best_result,
    fit,
    measure,
    parse_classifiers,
    search,
    stratified_split,
)

_logger = logging.getLogger(__name__)
CHOICE = ('stage2_holdout', 'stage2_kwargs', 'seed')
HOLDOUT = 0.2  # fraction of the training images that chooses, if there is no trained classifier
OPTIONS = (*CHOICE, 'feature_views', 'feature_cache', 'batch_size', 'workers')
TABLE = 'stage2.csv'
METRICS = ('top1', 'many', 'medium', 'few', 'class_mean', 'ece')


def run_stage2(
        folder: str | Path, names: str, *, model: nn.Module, data: TrainingData, export: dict, metrics: dict,
        accelerator: Accelerator, augmentation: dict, counts: Sequence[int] | None = None,
        conventional: nn.Linear | None = None, stage2_holdout: float | None = None, stage2_kwargs: dict | None = None,
        feature_views: int = 2, feature_cache: str | Path | None = None, batch_size: int = 64, workers: int | None = None,
        seed: int = 42, encoder_only: bool = False) -> list[Result]:
    """Train classifiers on the features of a model, print one table, and export them with its encoder.

    Hyper-parameters are their defaults, or chosen on held-out training images; never on the validation images. Writes
    stage2.csv, and for each classifier NAME/metrics.json and the tables of `run_folder.write_tables`. The linear
    classifier that held-out images choose is exported to `folder`/export, with its tables in `folder`; without such
    images, each to NAME/export.

    Args:
        folder: Output folder.
        names: Names of classifiers, separated by commas, or `all`.
        model: Bare timm model of stage 1; it is not changed.
        data: Training and validation images. With both validation and holdout images, the holdout ones, unseen by
            stage 1, choose the hyper-parameters.
        export: `data_config`, `class_names` and `source` of `export_model`, as of stage 1.
        metrics: Known entries of metrics.json of stage 1.
        accelerator: Device and precision; all processes extract features, the main process does the rest.
        augmentation: Options of `transforms.view_transform` for the augmented views.
        counts: (C,) images per class that stage 1 was trained on; default: those of `data`.
        conventional: GLMC's conventional classifier, if available.
        stage2_holdout: Training images per class, or their fraction, to choose hyper-parameters on if `data` has no
            holdout images.
        stage2_kwargs: NAME.FIELD -> value of hyper-parameters, which no search changes.
        feature_views: Augmented views V per training image.
        feature_cache: Folder of the features; default: `folder`/features.
        batch_size: Images per pass through the encoder.
        workers: Processes of the loader; None for one per core, at most 16.
        seed: Seed of views, splits and training.
        encoder_only: Whether the model's classifier is untrained. A linear probe then is stage 1 of the other rules, and
            `stage2_holdout` is 0.2 by default.

    Returns:
        The classifier of stage 1 or the linear probe, then the requested ones; an empty list in all processes but the
        main one.

    Raises:
        InputError: If a name or setting is wrong, the model's classifier is not one linear layer, or the held-out images
            would leave a class without training images.
    """
    classifiers, layer, split = check_stage2(
        names, model=model, data=data, conventional=conventional, stage2_holdout=stage2_holdout,
        stage2_kwargs=stage2_kwargs, seed=seed, encoder_only=encoder_only)
    if split:
        _logger.info(f'{len(split[1]):,} training images (--stage2-holdout) choose hyper-parameters and the best rule; '
                     f'then all {len(data.train):,} train')
    folder, counts, thresholds = Path(folder), list(counts or data.profile.counts), data.profile.thresholds
    extract = Extractor(
        model, data_config=export['data_config'], augmentation=augmentation, accelerator=accelerator,
        cache=feature_cache or folder / 'features', batch_size=batch_size, workers=workers, seed=seed)
    start = time.perf_counter()
    features = extract(data.train, feature_views)
    evaluated = data.holdout if data.validation is None else data.validation
    validation = extract(evaluated)
    search_sets = None  # features to train candidates on, features to score them on
    if _has_unseen_holdout(data):
        search_sets = features, extract(data.holdout)
    elif split:
        search_sets = tuple(features.subset(torch.from_numpy(indices)) for indices in split)
    extraction = round(time.perf_counter() - start, 1)
    if not accelerator.is_main_process:
        return []
    stage1 = Stage1(
        Linear(layer.weight, layer.bias).detached(), counts, resolve_prior(export['source'].get('prior', 'train'), counts),
        conventional and Linear(conventional.weight, conventional.bias).detached())
    results = _fit_classifiers(classifiers, stage1, features, validation, search_sets, thresholds, stage2_kwargs or {}, seed,
                               encoder_only)
    chosen = best_result(results) if search_sets and any(result.is_exportable for result in results) else None
    print(f'\nStage 2 on {len(validation):,} images, features in {extraction} s:\n{results_table([results])}', flush=True)
    missing = classes_without_images(results[0].metrics['per_class_images'], export['class_names'])
    if missing:
        print(printable(missing), flush=True)
    metadata = dict(feature_views=feature_views, feature_seconds=extraction, feature_precision=extract.chosen)
    for result in results:
        if result.name != STAGE1:
            _write_classifier(folder, result, results[0], chosen, model, export, metrics, metadata, evaluated)
    write_results(folder / TABLE, {metrics.get('weights', metrics['method']): results})
    return results


def _fit_classifiers(
        classifiers: dict[str, Classifier], stage1: Stage1, features: Features, validation: Features,
        search_sets: tuple[Features, Features] | None, thresholds: Sequence[int], settings: dict, seed: int,
        encoder_only: bool) -> list[Result]:
    """Choose the hyper-parameters of each classifier, fit it and measure it; a linear probe is stage 1 of the next ones.

    Args:
        classifiers: Name -> classifier, a linear probe first.
        stage1: Classifier of the first stage.
        features: Features of the training images.
        validation: Features of the images to evaluate on.
        search_sets: Features to train candidates on and features to score them on; None for no search.
        thresholds: (few, many) of the shot groups.
        settings: NAME.FIELD -> value of hyper-parameters that no search changes.
        seed: Seed of the training.
        encoder_only: Whether `stage1` is untrained and the short grids are searched.
    """
    search_stage1, results = stage1, []
    if not encoder_only:
        results.append(Result(STAGE1, stage1.linear, *measure(stage1.linear, validation, stage1.counts, thresholds), {}))
    for name, classifier in classifiers.items():
        start, score = time.perf_counter(), None
        if search_sets:
            fixed = [key.partition('.')[2] for key in settings if key.startswith(f'{name}.')]
            classifier, score = search(classifier, search_stage1, *search_sets, seed, fixed, short=encoder_only)
        linear = fit(classifier, stage1, features, seed)
        prior = classifier.class_prior(stage1)
        if name == PROBE:
            stage1 = search_stage1 = replace(stage1, linear=linear)
            if search_sets:  # a probe that has not seen the held-out images
                search_stage1 = replace(stage1, linear=fit(classifier, stage1, search_sets[0], seed))
        seconds = time.perf_counter() - start
        fields = ', '.join(f'{key} {value}' for key, value in asdict(classifier).items())
        _logger.info(f'{name}: {seconds:.1f} s{fields and ", " + fields}'
                     + ('' if score is None else f', class mean {score:.2f} on held-out images'))
        measured = measure(linear, validation, stage1.counts, thresholds)
        results.append(Result(name, linear, *measured, asdict(classifier), seconds, score, prior))
    return results


def check_stage2(
        names: str, *, model: nn.Module, data: TrainingData, conventional: nn.Linear | None = None,
        stage2_holdout: float | None = None, stage2_kwargs: dict | None = None,
        seed: int = 42, encoder_only: bool = False) -> tuple[dict[str, Classifier], nn.Linear, tuple | None]:
    """Raise the errors of `run_stage2` without any work, so that a run can fail before stage 1.

    Returns:
        The classifiers by name, the linear classifier of stage 1, and the indices of `stratified_split` or None.

    Raises:
        InputError: See `run_stage2`.
    """
    classifiers, split = parse_classifiers(
        names, stage2_kwargs or {}, two_heads=conventional is not None, encoder_only=encoder_only), None
    if not isinstance(data.train, ImageSet):
        raise InputError(f'--stage2 {names}: needs a training set with an index')
    if stage2_holdout is not None and _has_unseen_holdout(data):
        _logger.warning('--stage2-holdout has no effect with --holdout or --select-split, whose images choose')
    elif stage2_holdout is None and encoder_only and not _has_unseen_holdout(data) and max(data.profile.counts) > 1:
        split = stratified_split(data.train.labels, HOLDOUT, data.train.class_names, seed)
    elif stage2_holdout is not None:
        split = stratified_split(data.train.labels, stage2_holdout, data.train.class_names, seed)
    return classifiers, linear_classifier(model), split


def _has_unseen_holdout(data: TrainingData) -> bool:
    """Whether there are held-out images beside the validation images; without the latter, they are the validation."""
    return data.validation is not None and data.holdout is not None


def _write_classifier(
        folder: Path, result: Result, first: Result, chosen: Result | None, model: nn.Module, export: dict, metrics: dict,
        metadata: dict, images: ImageSet) -> None:
    """Write metrics and tables of one classifier to `folder`/NAME, and the export if it is chosen or none is."""
    source = export['source']
    stage2 = dict(name=result.name, **result.settings, **metadata, seconds=round(result.seconds, 2))
    method = f"{metrics['method']}+{result.name}"
    seconds = result.seconds if result is first else first.seconds + result.seconds  # a linear probe is stage 1
    stage1 = {'method': metrics['method'] if first.name == STAGE1 else f"{metrics['method']}+{first.name}",
              **{key: first.metrics[key] for key in METRICS},
              **{key: metrics[key] for key in ('command', 'commit', 'seconds', 'epoch') if key in metrics}}
    metrics = {
        **metrics, 'method': method, **result.metrics, **({} if result is first else {'stage1': stage1}),
        'stage2': {**stage2, 'heldout_class_mean': result.heldout}, **provenance(),
        'seconds': round(metrics.get('seconds', 0) + metadata['feature_seconds'] + seconds, 1)}
    own = folder / result.name
    own.mkdir(parents=True, exist_ok=True)
    (own / 'metrics.json').write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + '\n', **ESCAPED)
    for place in (own, *([folder] if result is chosen else [])):
        write_tables(place, metrics, export['class_names'], result.predictions, images)
    if not result.is_exportable or chosen not in (None, result):
        return
    source = {**source, 'method': method, 'prior': result.prior, 'stage2': stage2,
              'recipe': {**source.get('recipe', {}), **{f'stage2_{key}': value for key, value in stage2.items()}}}
    copied = copy.deepcopy(model).eval()
    set_classifier(copied, *result.linear)
    export_model((own if chosen is None else folder) / 'export', copied, **{**export, 'source': source}, metrics=metrics)


def results_table(runs: Sequence[Sequence[Result]]) -> str:
    """Format the classifiers of one or several runs as a table in percent.

    Args:
        runs: Results of each run, stage 1 first. Several runs give mean ± standard deviation (n - 1).
    """
    groups = runs[0][0].metrics['shot_classes']
    rows = [['classifier', 'top-1', *(f'{name} ({size})' for name, size in groups.items()), 'class mean', 'ECE', 'seconds']]
    chosen = any(result.heldout is not None for result in runs[0])
    if chosen:
        rows[0].append('held-out')
        best = max((result for result in runs[0] if result.heldout is not None), key=lambda result: result.heldout)
    for results in zip(*runs, strict=True):
        cells = [mean_std([result.metrics[key] for result in results]) for key in METRICS]
        rows.append([results[0].name, *cells, f'{statistics.mean(result.seconds for result in results):.1f}'])
        if chosen:
            score = '' if results[0].heldout is None else mean_std([result.heldout for result in results])
            rows[-1].append(score if len(runs) > 1 else f"{score} {'*' if results[0] is best else ' '}")
    return aligned(rows) + ('\n* highest class mean on held-out images' if chosen and len(runs) == 1 else '')


def write_results(path: Path, runs: dict[str, Sequence[Result]]) -> None:
    """Write a CSV file with one line per run and classifier: metrics, hyper-parameters, commit and command.

    Args:
        path: Path of the file.
        runs: User's name of the stage-1 model -> results.
    """
    run = provenance()
    with open(path, 'w', newline='', **NAMES) as file:
        writer = csv.writer(file)
        writer.writerow(('model', 'classifier', *METRICS, 'heldout_class_mean', 'seconds', 'settings', 'commit', 'command'))
        for name, results in runs.items():
            for result in results:
                settings = ' '.join(f'{key}={value}' for key, value in result.settings.items())
                writer.writerow((spreadsheet_safe(name), result.name, *(result.metrics[key] for key in METRICS),
                                 result.heldout, round(result.seconds, 2), settings, run['commit'], run['command']))
