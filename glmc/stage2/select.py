"""Selection of classifiers by name and of their hyper-parameters by held-out training images."""
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from glmc.cli import nearest
from glmc.errors import InputError
from glmc.evaluation.metrics import LongTailEvaluator, Predictions
from glmc.stage2.classifiers import CLASSIFIERS, EVALUATION_BATCH, Classifier, Linear, Stage1
from glmc.stage2.features import Features


@dataclass(frozen=True)
class Result:
    """A classifier of stage 2, or that of stage 1, with its metrics.

    Args:
        name: Key in CLASSIFIERS, or `stage 1`.
        linear: Weights.
        metrics: Metrics on the validation images.
        predictions: Predictions on the validation images.
        settings: Hyper-parameters.
        seconds: Duration of the training, including the search.
        heldout: Class mean on held-out training images in percent; None without held-out images.
    """
    name: str
    linear: Linear
    metrics: dict
    predictions: Predictions
    settings: dict
    seconds: float = 0.0
    heldout: float | None = None


def parse_classifiers(names: str, settings: dict, two_heads: bool = True) -> dict[str, Classifier]:
    """Create classifiers by name.

    Args:
        names: Names in CLASSIFIERS, separated by commas, or `all` for all possible ones.
        settings: NAME.FIELD -> value of a hyper-parameter.
        two_heads: Whether both classifiers of GLMC are available.

    Returns:
        Name -> classifier, in the order of the names.

    Raises:
        InputError: If a name, a field or a value is wrong, or a classifier requires both classifiers of GLMC.
    """
    possible = [name for name, classifier in CLASSIFIERS.items() if two_heads or not classifier.two_heads]
    classifiers = {}
    for name in possible if names == 'all' else names.split(','):
        if name not in CLASSIFIERS:
            raise InputError(f"--stage2: expected all, or some of {', '.join(CLASSIFIERS)}; found {name!r}"
                             f'{nearest(name, CLASSIFIERS)}')
        if name not in possible:
            raise InputError(f'--stage2 {name}: needs both classifiers of GLMC; expected a run of --method glmc, or one of '
                             'its checkpoints as --model (an export has the rebalanced one alone)')
        classifiers[name] = CLASSIFIERS[name]()
    for key, value in settings.items():
        name, _, field = key.partition('.')
        if name not in classifiers:
            raise InputError(f"--stage2-kwargs {key}: expected NAME.FIELD, NAME of {', '.join(classifiers)}")
        classifiers[name] = _replace_field(classifiers[name], name, field, value)
    return classifiers


def _replace_field(classifier: Classifier, name: str, field: str, value) -> Classifier:
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
    """Split the training images of every class into images to train on and images to choose hyper-parameters on.

    A class of a single image keeps it for training and does not affect the choice.

    Args:
        labels: (N,) labels.
        holdout: Held-out images per class if at least 1, else their fraction, rounded down to at least one image.
        class_names: (C,) names for messages.
        seed: Seed of the random selection.

    Returns:
        Indices of the training images and of the held-out ones, both sorted.

    Raises:
        InputError: If a class would have no image to train on, or no image is held out.
    """
    rng, heldout = np.random.default_rng((seed, 3)), []
    for label, count in enumerate(np.bincount(labels).tolist()):
        size = min(int(holdout) if holdout >= 1 else max(int(count * holdout), 1), count) if count > 1 else 0
        if size and size == count:
            raise InputError(f'--stage2-holdout {holdout:g}: class {class_names[label]!r} has {count} training images, '
                             f'setting {int(holdout)} aside leaves none')
        heldout.append(rng.permutation(np.flatnonzero(labels == label))[:size])
    heldout = np.sort(np.concatenate(heldout))
    if not len(heldout):
        raise InputError(f'--stage2-holdout {holdout:g}: every class has a single image, none can be set aside')
    return np.setdiff1d(np.arange(len(labels)), heldout), heldout


def search(
        classifier: Classifier, stage1: Stage1, train: Features, heldout: Features, seed: int,
        fixed: Collection[str] = ()) -> tuple[Classifier, float]:
    """Search the grid of a classifier for the highest class mean on held-out images.

    The given values come first; of equal scores the first wins.

    Args:
        classifier: Classifier with the default or given hyper-parameters.
        stage1: Classifier of the first stage.
        train: Features to train each candidate on.
        heldout: Features to score each candidate on.
        seed: Seed of the training of each candidate.
        fixed: Names of fields to keep.

    Returns:
        The classifier with the best hyper-parameters, and its class mean in percent.
    """
    grid = {name: values for name, values in classifier.grid.items() if name not in fixed}
    candidates = [classifier, *(replace(classifier, **dict(zip(grid, values, strict=True)))
                                for values in itertools.product(*grid.values()) if grid)]
    scores = [measure(fit(each, stage1, train, seed), heldout, stage1.counts)[0]['class_mean'] for each in candidates]
    best = int(np.argmax(scores))
    return candidates[best], scores[best]


def fit(classifier: Classifier, stage1: Stage1, features: Features, seed: int) -> Linear:
    """Fit a classifier with a generator of this seed."""
    return classifier.fit(stage1, features, torch.Generator().manual_seed(seed))


@torch.inference_mode()
def measure(
        linear: Linear, features: Features, counts: Sequence[int],
        thresholds: Sequence[int] = (20, 100)) -> tuple[dict, Predictions]:
    """Evaluate a linear classifier on the plain views.

    Args:
        linear: Classifier.
        features: Features of the images to evaluate on.
        counts: (C,) training images per class, which define the shot groups.
        thresholds: (few, many) of the shot groups.

    Returns:
        Metrics of LongTailEvaluator, and the predictions.
    """
    device = linear.bias.device
    evaluator = LongTailEvaluator(counts, thresholds, device=device)
    for batch, labels in features.batches(EVALUATION_BATCH):
        evaluator.update(linear(batch.to(device)), labels.to(device))
    return evaluator.compute(), evaluator.predictions()


def best_result(results: Sequence[Result]) -> Result:
    """The classifier of stage 2 with the highest class mean on held-out images, the first one without such images."""
    return max(results[1:], key=lambda result: result.heldout or 0.0)
