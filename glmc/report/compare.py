"""The comparison of several results in one report."""
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from glmc.data.profiles import pluralize
from glmc.errors import InputError, printable
from glmc.evaluation.text import aligned
from glmc.files import ESCAPED
from glmc.report.figures import create_figures, render_figures
from glmc.report.html import change, details, html_document, paragraph, section, table
from glmc.report.pictures import display_name
from glmc.report.report import MAX_OPEN, METRICS, metadata_rows, metric_rows

COMPARED = ('model', 'parameters', 'method', 'epochs', 'fingerprint', 'evaluated_on', 'num_images', 'shot_thresholds',
            'flip_tta', 'crop_tta', 'test_distribution', 'target_prior', 'precision', 'seed')
PRINTED = ('top1', 'many', 'medium', 'few', 'class_mean', 'worst_tenth', 'ece')  # columns of `comparison_table`


def read_results(folders: Sequence[Path]) -> dict[str, dict]:
    """Read several results of the same classes.

    Args:
        folders: Folders with a metrics.json, or runs with an export that has one.

    Returns:
        Label of `create_labels` -> content of metrics.json, and `class_names`: C names, or None if no file has them.

    Raises:
        InputError: If a metrics.json is missing or invalid, or the classes or training counts differ.
    """
    results = [read_metrics(path) for path in folders]
    for path, metrics in zip(folders, results, strict=True):
        names = read_class_names(path)
        metrics['class_names'] = names if names and len(names) == len(metrics['train_counts']) else None
    for path, other in zip(folders, results, strict=True):
        if other['train_counts'] != results[0]['train_counts']:
            raise InputError(f'--compare {path}: has other training counts than {folders[0]}, expected the same classes')
        if other['class_names'] and results[0]['class_names'] and other['class_names'] != results[0]['class_names']:
            raise InputError(f'--compare {path}: has other class names than {folders[0]}, expected the same classes')
    return dict(zip(create_labels(folders), results, strict=True))


def write_comparison(folder: Path, results: dict[str, dict]) -> Path:
    """Write one report about several results.

    Args:
        folder: Target folder.
        results: Result of `read_results`.

    Returns:
        Path of report.html.

    Raises:
        InputError: If the folder cannot be written.
    """
    labels, metrics = list(results), list(results.values())
    counts = metrics[0]['train_counts']
    names = next(filter(None, (other.get('class_names') for other in metrics)), None) or list(map(str, range(len(counts))))
    try:
        figures = render_figures(folder / 'plots', create_figures(results, names=names))
        parts = [section('All metrics, %', table(('metric', *labels), metric_rows(metrics))), _changes(results, names),
                 figures,
                 section('Models and runs', table(('', *labels), metadata_rows(COMPARED, metrics, max_length=24)))]
        text = html_document(' · '.join(labels), f'{len(results)} results, {len(counts):,} classes', parts)
        (folder / 'report.html').write_text(text, **ESCAPED)
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error
    return folder / 'report.html'


def comparison_table(results: dict[str, dict]) -> str:
    """Text table of the results, one row each; arguments as those of `write_comparison`."""
    rows = [['result', *(METRICS[name] for name in PRINTED)]]
    for label, metrics in results.items():
        values = (metrics.get(name) for name in PRINTED)
        rows.append([printable(label), *(f'{v:.2f}' if isinstance(v, (int, float)) else '–' for v in values)])
    return aligned(rows)


def _changes(results: dict[str, dict], names: Sequence[str]) -> str:
    """Accuracy of each class in each result, and gains and losses of each later result over the first."""
    (first, *others), accuracies = results, [metrics['per_class_accuracy'] for metrics in results.values()]
    changes = [[None if None in (old, new) else new - old for old, new in zip(accuracies[0], accuracy, strict=True)]
               for accuracy in accuracies[1:]]
    order = range(len(names))
    if changes:  # the largest gain first, classes without a change last
        order = sorted(order, key=lambda c: (changes[0][c] is None, -(changes[0][c] or 0)))
    counts = next(iter(results.values()))['train_counts']
    rows = [(display_name(names[c]), counts[c], *('–' if column[c] is None else f'{column[c]:.1f}' for column in accuracies),
             *(change(column[c]) for column in changes)) for c in order]
    head = ('class', 'training images', *(f'{label}, %' for label in results), *(f'{label} − {first}' for label in others))
    notes = []
    for label, column in zip(others, changes, strict=True):
        signs = [(value > 0) - (value < 0) for value in column if value is not None]
        notes.append(f"Classes better in {label}: {pluralize(signs.count(1), 'class')}, worse: "
                     f"{pluralize(signs.count(-1), 'class')}, equal: {pluralize(signs.count(0), 'class')}, against {first}.")
    return ''.join(map(paragraph, notes)) + details(
        f"All {pluralize(len(names), 'class')}{', largest gain first' if others else ''}", table(head, rows, 'sortable'),
        is_open=len(rows) <= MAX_OPEN)


def create_labels(results: Sequence[Path]) -> list[str]:
    """Return a different label for each result.

    The label is the name of the folder, or of the run for its export. The parent folder is added where names repeat, and a
    number where that repeats too.
    """
    paths = [path.resolve().parent if path.resolve().name == 'export' else path.resolve() for path in results]
    names = [display_name(path.name) for path in paths]
    if len(set(names)) < len(names):
        names = [display_name(f'{path.parent.name}/{path.name}', keep_end=True) for path in paths]
    return [name if names.count(name) == 1 else f'{name} ({k})' for k, name in enumerate(names, 1)]


def read_metrics(folder: Path) -> dict:
    """Read metrics.json of a results folder, an export or a run.

    Raises:
        InputError: If it is missing, cannot be read or contains no evaluation.
    """
    path = folder / 'metrics.json'
    path = path if path.is_file() else folder / 'export' / 'metrics.json'
    try:
        metrics = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise InputError(f'{folder}: expected a folder with a metrics.json, found none in it and in its export/') from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{path}: expected a metrics.json: {error}') from error
    if not is_evaluation(metrics):
        raise InputError(f'{path}: contains no evaluation')
    return metrics


def read_class_names(folder: Path) -> list[str] | None:
    """Read the C class names of the tables, or of an export; None without a readable file."""
    try:
        with open(folder / 'per_class.csv', newline='', encoding='utf-8', errors='surrogateescape') as file:
            return [row['name'] for row in csv.DictReader(file)]
    except (OSError, KeyError, csv.Error):
        pass
    for path in (folder / 'config.json', folder / 'export' / 'config.json'):
        try:
            names = json.loads(path.read_text(encoding='utf-8'))['label_names']
            return list(map(str, names))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def is_evaluation(metrics) -> bool:
    """Whether the content of a file has the lists that the plots need; single numbers may be missing."""
    if not isinstance(metrics, dict):
        return False
    per_class = [metrics.get(name) for name in ('train_counts', 'per_class_accuracy')]
    bins = [metrics.get(f'bin_{name}') for name in ('images', 'confidence', 'hits')]
    thresholds = metrics.get('shot_thresholds')
    return (_same_length(per_class) and _same_length(bins) and _same_length([thresholds]) and len(thresholds) == 2
            and all(type(n) is int for n in (*per_class[0], *thresholds)) and None not in sum(bins, []))


def _same_length(columns: list) -> bool:
    """Whether all columns are lists of numbers or None, of equal length and not empty."""
    return all(isinstance(column, list) and column and len(column) == len(columns[0])
               and all(value is None or type(value) in (int, float) for value in column) for column in columns)
