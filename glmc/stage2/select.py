"""Selection of classifiers by name and of their hyper-parameters by held-out training images."""
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from glmc.cli import nearest
from glmc.errors import InputError
from glmc.evaluation.metrics import LongTailEvaluator, Predictions
from glmc.stage2.classifiers import (
    CLASSIFIERS,
    PROBE,
    PROBE_CLASSIFIERS,
    Classifier,
    Linear,
    Neighbours,
    Stage1,
)
from glmc.stage2.features import Features
from glmc.stage2.probe import READ

STAGE1 = 'stage 1'


@dataclass(frozen=True)
class Result:
    """A classifier of stage 2, or that of stage 1, with its metrics.

    Args:
        name: Key in CLASSIFIERS or PROBE_CLASSIFIERS, or `stage 1`.
        linear: Weights, or nearest neighbours, which no export can contain.
        metrics: Metrics on the validation images.
        predictions: Predictions on the validation images.
        settings: Hyper-parameters.
        seconds: Duration of the training, including the search.
        heldout: Class mean on held-out training images in percent; None without held-out images.
        prior: Class prior that the classifier embodies: `train`, `uniform` or C probabilities.
    """
    name: str
    linear: Linear | Neighbours
    metrics: dict
    predictions: Predictions
    settings: dict
    seconds: float = 0.0
    heldout: float | None = None
    prior: str | list[float] = 'uniform'

    @property
    def is_exportable(self) -> bool:
        """Whether this is a new linear layer."""
        return isinstance(self.linear, Linear) and self.name != STAGE1


def parse_classifiers(
        names: str, settings: dict, two_heads: bool = True, encoder_only: bool = False) -> dict[str, Classifier]:
    """Create classifiers by name.

    Args:
        names: Names in CLASSIFIERS, separated by commas, or `all` for all possible ones.
        settings: NAME.FIELD -> value of a hyper-parameter.
        two_heads: Whether both classifiers of GLMC are available.
        encoder_only: Whether the model has no trained classifier: a linear probe comes first.

    Returns:
        Name -> classifier, in the order of the names.

    Raises:
        InputError: If a name, a field or a value is wrong, or a classifier requires both classifiers of GLMC.
    """
    known = PROBE_CLASSIFIERS if encoder_only else CLASSIFIERS
    possible = [name for name, classifier in known.items() if two_heads or not classifier.two_heads]
    first, classifiers = [PROBE] if encoder_only else [], {}
    for name in possible if names == 'all' else [*first, *names.split(',')]:
        if name not in {**CLASSIFIERS, **known}:
            hint = f'; {PROBE} is for models without a trained classifier' if name == PROBE else nearest(name, known)
            raise InputError(f"--stage2: expected all, or some of {', '.join(known)}; found {name!r}{hint}")
        if name not in possible:
            raise InputError(f'--stage2 {name}: needs both classifiers of GLMC; expected a run of --method glmc, or one of '
                             'its checkpoints as --model (an export has the rebalanced one alone)')
        classifiers[name] = known[name]()
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
        fixed: Collection[str] = (), short: bool = False) -> tuple[Classifier, float]:
    """Search the grid of a classifier for the highest class mean on held-out images.

    The given values come first; of equal scores the first wins.

    Args:
        classifier: Classifier with the default or given hyper-parameters.
        stage1: Classifier of the first stage.
        train: Features to train each candidate on.
        heldout: Features to score each candidate on.
        seed: Seed of the training of each candidate.
        fixed: Names of fields to keep.
        short: Whether to search the short grid.

    Returns:
        The classifier with the best hyper-parameters, and its class mean in percent.
    """
    grid = classifier.short_grid if short and classifier.short_grid is not None else classifier.grid
    grid = {name: values for name, values in grid.items() if name not in fixed}
    candidates = list(dict.fromkeys([classifier, *(replace(classifier, **dict(zip(grid, values, strict=True)))
                                                   for values in itertools.product(*grid.values()) if grid)]))
    scores = [measure(linear, heldout, stage1.counts)[0]['class_mean']
              for linear in classifier.path(candidates, stage1, train, seed)]
    best = int(np.argmax(scores))
    return candidates[best], scores[best]


def fit(classifier: Classifier, stage1: Stage1, features: Features, seed: int) -> Linear:
    """Fit a classifier with a generator of this seed."""
    return classifier.fit(stage1, features, torch.Generator().manual_seed(seed))


@torch.inference_mode()
def measure(
        linear: Linear | Neighbours, features: Features, counts: Sequence[int],
        thresholds: Sequence[int] = (20, 100)) -> tuple[dict, Predictions]:
    """Evaluate a classifier on the plain views.

    Args:
        linear: Classifier.
        features: Features of the images to evaluate on.
        counts: (C,) training images per class, which define the shot groups.
        thresholds: (few, many) of the shot groups.

    Returns:
        Metrics of LongTailEvaluator, and the predictions.
    """
    device = linear.device
    evaluator = LongTailEvaluator(counts, thresholds, device=device)
    for batch, labels in features.batches(READ):
        evaluator.update(linear(batch.to(device)), labels.to(device))
    return evaluator.compute(), evaluator.predictions()


def best_result(results: Sequence[Result]) -> Result:
    """The linear classifier of highest class mean on held-out images, the first one without such images."""
    return max((result for result in results if result.is_exportable), key=lambda result: result.heldout or 0.0)
