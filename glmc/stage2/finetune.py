"""Stage 2 as a whole: features, classifiers, one table, and an export of each."""
import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from glmc.data.datasets import ImageSet
from glmc.data.sources import TrainingData
from glmc.errors import InputError
from glmc.export.export import export_model
from glmc.models.classifier import linear_classifier, set_classifier
from glmc.run_folder import provenance, write_tables
from glmc.stage2.classifiers import Linear, LogitAdjust, Stage1
from glmc.stage2.features import Extractor, Features
from glmc.stage2.select import fit, measure, parse_classifiers, search, stratified_split
from glmc.stage2.tables import FIGURES, TABLE, Trained, table, write_table

_logger = logging.getLogger(__name__)
CHOICE = ('stage2_holdout', 'stage2_kwargs', 'seed')
OPTIONS = (*CHOICE, 'feature_views', 'feature_cache', 'batch_size', 'workers')


def run_stage2(
        folder: str | Path, names: str, *, model: nn.Module, data: TrainingData, export: dict, metrics: dict,
        accelerator: Accelerator, augmentation: dict, counts: Sequence[int] | None = None,
        conventional: nn.Linear | None = None, stage2_holdout: float | None = None, stage2_kwargs: dict | None = None,
        feature_views: int = 2, feature_cache: str | Path | None = None, batch_size: int = 64, workers: int = 2,
        seed: int = 42) -> list[Trained]:
    """Train classifiers on the features of a model, print one table, and export each as stage 1 is exported.

    Hyper-parameters are their defaults, or chosen on held-out training images; never on the validation images.

    Args:
        folder: Where to: NAME/export/, NAME/per_class.csv and stage2.csv.
        names: Of classifiers, commas between, or `all`.
        model: Bare timm model of stage 1; it stays as it is.
        data: Training and validation images; those held out, which stage 1 has not seen, choose where there are both.
        export: `data_config`, `class_names` and `source` of `export_model`, of stage 1.
        metrics: Of metrics.json of stage 1, as far as known.
        accelerator: Device and precision; the main process does everything.
        augmentation: Of the augmented views, as that of stage 1.
        counts: (C,) images per class that stage 1 was trained on, if not those of `data`.
        conventional: The classifier beside the model's own, of GLMC, if it is at hand.
        stage2_holdout: Training images of each class, or a part of them, to choose on where none are held out.
        stage2_kwargs: NAME.FIELD -> value of hyper-parameters, which no choice changes.
        feature_views: V augmented views of each image.
        feature_cache: Folder of the features; `folder`/features by default.
        batch_size, workers, seed: As their names say.

    Returns:
        The classifier of stage 1, then those asked for; nothing in processes other than the main one.

    Raises:
        InputError: For a name or setting that is wrong, a model whose classifier is not one linear layer, or a held-out
            part that leaves a class empty.
    """
    classifiers, own, parts = check_stage2(
        names, model=model, data=data, conventional=conventional, stage2_holdout=stage2_holdout,
        stage2_kwargs=stage2_kwargs, seed=seed)
    if not accelerator.is_main_process:
        return []
    folder, counts = Path(folder), list(counts or data.profile.counts)
    extract = Extractor(
        model, data_config=export['data_config'], augmentation=augmentation, accelerator=accelerator,
        cache=feature_cache or folder / 'features', batch_size=batch_size, workers=workers, seed=seed)
    start = time.perf_counter()
    features, unseen, heldout = extract(data.train, feature_views), extract(_validation(data)), _heldout(data)
    choice = _choice(features, heldout and extract(heldout), parts)
    extraction = round(time.perf_counter() - start, 1)
    stage1 = Stage1(_detached(own), counts, export['source'].get('prior') == 'uniform',
                    conventional and _detached(conventional))
    thresholds = data.profile.thresholds
    results = [Trained('stage 1', stage1.linear, *measure(stage1.linear, unseen, counts, thresholds), {})]
    for name, classifier in classifiers.items():
        fixed = [key.partition('.')[2] for key in stage2_kwargs or () if key.startswith(f'{name}.')]
        results.append(_train(name, classifier, stage1, features, choice, unseen, thresholds, seed, fixed))
    print(f'\nStage 2 on {len(unseen):,} images, features in {extraction} s:\n{table([results])}', flush=True)
    facts = dict(feature_views=feature_views, feature_seconds=extraction)
    for result in results[1:]:
        _leave(folder / result.name, result, results[0], model, export, metrics, facts)
    write_table(folder / TABLE, {metrics.get('weights', metrics['method']): results})
    return results


def check_stage2(
        names: str, *, model: nn.Module, data: TrainingData, conventional: nn.Linear | None = None,
        stage2_holdout: float | None = None, stage2_kwargs: dict | None = None, seed: int = 42) -> tuple:
    """Refuse what `run_stage2` would, before stage 1 has cost anything.

    Returns:
        The classifiers by name, the linear classifier of stage 1, and places of `stratified_split` or None.

    Raises:
        InputError: As `run_stage2`.
    """
    classifiers, parts = parse_classifiers(names, stage2_kwargs or {}, two_heads=conventional is not None), None
    if not isinstance(data.train, ImageSet):
        raise InputError(f'--stage2 {names}: needs a training set with an index')
    if stage2_holdout is not None and _heldout(data):
        _logger.warning('--stage2-holdout has no effect with --holdout, whose images choose')
    elif stage2_holdout is not None:
        parts = stratified_split(data.train.labels, stage2_holdout, data.train.class_names, seed)
    return classifiers, linear_classifier(model), parts


def _detached(linear: nn.Linear) -> Linear:
    return Linear(linear.weight.detach(), linear.bias.detach())


def _validation(data: TrainingData) -> ImageSet:
    return data.validation if data.validation is not None else data.holdout


def _heldout(data: TrainingData) -> ImageSet | None:
    """Images held out that are not those to evaluate on."""
    return None if data.validation is None else data.holdout


def _choice(features: Features, heldout: Features | None, parts: tuple | None) -> tuple[Features, Features] | None:
    """Features to train candidates on and to choose them on; None without a search."""
    if heldout is not None:
        return features, heldout
    return parts and tuple(features.subset(torch.from_numpy(part)) for part in parts)


def _train(
        name: str, classifier, stage1: Stage1, features: Features, choice: tuple[Features, Features] | None,
        unseen: Features, thresholds: Sequence[int], seed: int, fixed: Sequence[str]) -> Trained:
    """Choose what is not fixed where there is something to choose on, train it on all features, measure it."""
    start, score = time.perf_counter(), None
    classifier = classifier.resolved(stage1) if isinstance(classifier, LogitAdjust) else classifier
    if choice is not None:
        classifier, score = search(classifier, stage1, *choice, seed, fixed)
    linear = fit(classifier, stage1, features, seed)
    seconds = time.perf_counter() - start
    settings = asdict(classifier)
    _logger.info(f'{name}: {seconds:.1f} s, ' + ', '.join(f'{key} {value}' for key, value in settings.items())
                 + ('' if score is None else f', class mean {score:.2f} on held-out images'))
    return Trained(name, linear, *measure(linear, unseen, stage1.counts, thresholds), settings, seconds, score)


def _leave(
        folder: Path, result: Trained, first: Trained, model: nn.Module, export: dict, metrics: dict, facts: dict) -> None:
    """Export one classifier with the encoder of stage 1."""
    source, stage2 = export['source'], dict(name=result.name, **result.settings, **facts, seconds=round(result.seconds, 2))
    before = {key: metrics[key] for key in ('command', 'commit', 'seconds', 'epoch') if key in metrics}
    method = f"{metrics['method']}+{result.name}"
    found = {
        **metrics, 'method': method, **result.metrics, 'stage1': {
            'method': metrics['method'], **{key: first.metrics[key] for key in FIGURES}, **before},
        'stage2': {**stage2, 'heldout_class_mean': result.heldout}, **provenance(),
        'seconds': round(metrics.get('seconds', 0) + facts['feature_seconds'] + result.seconds, 1)}
    source = {**source, 'method': method, 'prior': 'uniform', 'stage2': stage2,
              'recipe': {**source.get('recipe', {}), **{f'stage2_{key}': value for key, value in stage2.items()}}}
    copied = copy.deepcopy(model).eval()
    set_classifier(copied, *result.linear)
    folder.mkdir(parents=True, exist_ok=True)
    export_model(folder / 'export', copied, **{**export, 'source': source}, metrics=found)
    write_tables(folder, found, export['class_names'], result.predictions)
