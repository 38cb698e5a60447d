"""Tables of stage 2: all classifiers of a run, and their means over several."""
import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmc.evaluation.metrics import Predictions
from glmc.evaluation.text import aligned, mean_std
from glmc.run_folder import provenance
from glmc.stage2.classifiers import Linear

TABLE = 'stage2.csv'
FIGURES = ('top1', 'many', 'medium', 'few', 'class_mean', 'ece')


@dataclass(frozen=True)
class Trained:
    """A classifier of stage 2, or that of stage 1, and what it can do.

    Args:
        name: Of CLASSIFIERS; `stage 1`.
        linear: Itself.
        metrics: On the validation images.
        predictions: There.
        settings: Hyper-parameters.
        seconds: To train it, with the search if there was one.
        heldout: Class mean on held-out training images, None without.
    """
    name: str
    linear: Linear
    metrics: dict
    predictions: Predictions
    settings: dict
    seconds: float = 0.0
    heldout: float | None = None


def chosen(results: Sequence[Trained]) -> Trained:
    """The classifier of stage 2 with the highest class mean on held-out images; the first without such."""
    return max(results[1:], key=lambda result: result.heldout or 0.0)


def table(runs: Sequence[Sequence[Trained]]) -> str:
    """The classifiers of a run, that of stage 1 first, in percent; of several runs mean ± standard deviation (n - 1)."""
    groups = runs[0][0].metrics['shot_classes']
    head = ['classifier', 'top-1', *(f'{name} ({size})' for name, size in groups.items()), 'class mean', 'ECE', 'seconds']
    rows = [head]
    for results in zip(*runs, strict=True):
        figures = [mean_std([result.metrics[key] for result in results]) for key in FIGURES]
        rows.append([results[0].name, *figures, f'{statistics.mean(result.seconds for result in results):.1f}'])
    return aligned(rows)


def write_table(path: Path, runs: dict[str, Sequence[Trained]]) -> None:
    """One line for each classifier of each run, with what it takes to get it again.

    Args:
        path: Of the CSV file.
        runs: What the user called the model of stage 1 -> results.
    """
    facts = provenance()
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(('model', 'classifier', *FIGURES, 'heldout_class_mean', 'seconds', 'settings', 'commit', 'command'))
        for name, results in runs.items():
            for result in results:
                settings = ' '.join(f'{key}={value}' for key, value in result.settings.items())
                writer.writerow((name, result.name, *(result.metrics[key] for key in FIGURES), result.heldout,
                                 round(result.seconds, 2), settings, facts['commit'], facts['command']))
