"""The comparison of several results in one report."""
import json
from collections.abc import Sequence
from pathlib import Path

from glmc.errors import InputError
from glmc.files import ESCAPED
from glmc.report.figures import create_figures, render_figures
from glmc.report.html import html_document, section, table
from glmc.report.pictures import display_name
from glmc.report.report import metadata_rows, metric_rows

COMPARED = ('model', 'parameters', 'method', 'epochs', 'fingerprint', 'evaluated_on', 'num_images', 'shot_thresholds',
            'flip_tta', 'test_distribution', 'target_prior', 'precision', 'seed')


def write_comparison(folder: Path, results: Sequence[Path]) -> Path:
    """Write one report about several results.

    Args:
        folder: Target folder.
        results: Folders with a metrics.json, or runs with an export that has one.

    Returns:
        Path of report.html.

    Raises:
        InputError: If a metrics.json is missing or invalid, the training counts differ, or the folder cannot be written.
    """
    labels, metrics = create_labels(results), [read_metrics(path) for path in results]
    counts = metrics[0]['train_counts']
    for path, other in zip(results, metrics, strict=True):
        if other['train_counts'] != counts:
            raise InputError(f'--compare {path}: has other training counts than {results[0]}, expected the same classes')
    try:
        figures = render_figures(folder / 'plots', create_figures(dict(zip(labels, metrics, strict=True))))
        parts = [section('All metrics, %', table(('metric', *labels), metric_rows(metrics))), figures,
                 section('Models and runs', table(('', *labels), metadata_rows(COMPARED, metrics, max_length=24)))]
        text = html_document(' · '.join(labels), f'{len(results)} results, {len(counts):,} classes', parts)
        (folder / 'report.html').write_text(text, **ESCAPED)
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error
    return folder / 'report.html'


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
