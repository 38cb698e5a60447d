"""Which classifiers, with which hyper-parameters; what is chosen is chosen on held-out training images only."""
import itertools
import logging
from collections.abc import Collection, Sequence
from dataclasses import fields, replace

import numpy as np
import torch

from glmc.cli import nearest
from glmc.errors import InputError
from glmc.evaluation.metrics import LongTailEvaluator
from glmc.stage2.classifiers import CLASSIFIERS, Linear, Stage1
from glmc.stage2.features import Features

_logger = logging.getLogger(__name__)
EVALUATION_BATCH = 4096


def parse_classifiers(names: str, settings: dict, two_heads: bool = True) -> dict:
    """Name -> classifier.

    Args:
        names: Of CLASSIFIERS, commas between, or `all` that are possible.
        settings: NAME.FIELD -> value, of those classifiers.
        two_heads: Whether both classifiers of GLMC are at hand.

    Raises:
        InputError: If a name, a field or the type of a value is wrong, or a classifier needs what is not at hand.
    """
    possible = [name for name, classifier in CLASSIFIERS.items() if two_heads or not classifier.two_heads]
    chosen = possible if names == 'all' else list(dict.fromkeys(names.split(',')))
    for name in chosen:
        if name not in CLASSIFIERS:
            raise InputError(f"--stage2: expected all, or some of {', '.join(CLASSIFIERS)}; found {name!r}"
                             f'{nearest(name, CLASSIFIERS)}')
        if name not in possible:
            raise InputError(f'--stage2 {name}: needs both classifiers of GLMC; expected a run of --method glmc, or one of '
                             'its checkpoints as --model (an export has the rebalanced one alone)')
    found = {name: CLASSIFIERS[name]() for name in chosen}
    for key, value in settings.items():
        name, _, field = key.partition('.')
        if name not in found:
            raise InputError(f"--stage2-kwargs {key}: expected NAME.FIELD, NAME of {', '.join(found)}")
        found[name] = _with(found[name], name, field, value)
    return found


def _with(classifier, name: str, field: str, value):
    """Copy of a classifier with another value of one hyper-parameter."""
    known = {each.name: each for each in fields(classifier)}
    if field not in known:
        raise InputError(f"--stage2-kwargs {name}.{field}: expected one of {', '.join(known) or 'none'}"
                         f'{nearest(field, known)}')
    default, choices = known[field].default, known[field].metadata.get('choices')
    kind = float if default is None else type(default)
    value = float(value) if kind is float and isinstance(value, int) else value
    if not isinstance(value, kind) or (choices and value not in choices):
        expected = ' or '.join(choices) if choices else kind.__name__
        raise InputError(f'--stage2-kwargs {name}.{field}: expected {expected}, found {value!r}')
    return replace(classifier, **{field: value})


def stratified_split(
        labels: np.ndarray, holdout: float, class_names: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the images that train and of those set aside to choose on, so many of every class.

    A class of a single image keeps it for training and has no say in the choice.

    Args:
        labels: (N,) labels.
        holdout: Images of each class if at least 1, else that part of them, at least one.
        class_names: C names, for messages.
        seed: Of the draw.

    Raises:
        InputError: If a class would be left without an image to train on, or nothing is set aside.
    """
    rng, held = np.random.default_rng((seed, 3)), []
    for label, count in enumerate(np.bincount(labels).tolist()):
        take = min(int(holdout) if holdout >= 1 else max(int(count * holdout), 1), count) if count > 1 else 0
        if take and take == count:
            raise InputError(f'--stage2-holdout {holdout:g}: class {class_names[label]!r} has {count} training images, '
                             f'setting {int(holdout)} aside leaves none')
        held.append(rng.permutation(np.flatnonzero(labels == label))[:take])
    held = np.sort(np.concatenate(held))
    if not len(held):
        raise InputError(f'--stage2-holdout {holdout:g}: every class has a single image, none can be set aside')
    return np.setdiff1d(np.arange(len(labels)), held), held


def search(classifier, stage1: Stage1, train: Features, heldout: Features, seed: int, fixed: Collection[str] = ()):
    """The classifier with the values of its grid that have the highest class mean on the held-out images.

    Of equal ones the first wins, the given values before all others. Fields that are `fixed` keep theirs.

    Returns:
        The classifier, and that class mean in percent.
    """
    grid = {name: values for name, values in classifier.grid.items() if name not in fixed}
    candidates = [classifier, *(replace(classifier, **dict(zip(grid, values, strict=True)))
                                for values in itertools.product(*grid.values()) if grid)]
    scores = [class_mean(fit(each, stage1, train, seed), heldout, stage1.counts) for each in candidates]
    best = int(np.argmax(scores))
    return candidates[best], scores[best]


def fit(classifier, stage1: Stage1, features: Features, seed: int) -> Linear:
    """The classifier trained on these features; the same for the same seed."""
    return classifier.fit(stage1, features, torch.Generator().manual_seed(seed))


def class_mean(linear: Linear, features: Features, counts: Sequence[int]) -> float:
    return measure(linear, features, counts)[0]['class_mean']


@torch.inference_mode()
def measure(linear: Linear, features: Features, counts: Sequence[int], thresholds: Sequence[int] = (20, 100)) -> tuple:
    """Metrics and predictions on the plain views.

    Args:
        linear: Classifier.
        features: Of the images to evaluate on.
        counts: (C,) training images per class, which decide the shot groups.
        thresholds: (few, many) of the groups.
    """
    device = linear.bias.device
    evaluator = LongTailEvaluator(counts, thresholds, device=device)
    for batch, labels in zip(features.plain.split(EVALUATION_BATCH), features.labels.split(EVALUATION_BATCH), strict=True):
        evaluator.update(linear(batch.to(device)), labels.to(device))
    return evaluator.compute(), evaluator.predictions()
