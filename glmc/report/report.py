"""The report of a result: report.html, one self-contained file, and its plots as PNG."""
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from glmc.data.datasets import ImageSet
from glmc.data.profiles import classes_without_images, pluralize
from glmc.evaluation.metrics import Predictions, confused_pairs
from glmc.evaluation.text import shot_legend
from glmc.export.card import dataset_name, public_command, write_card
from glmc.files import ESCAPED
from glmc.report.diagnosis import ClassResult, class_results, diagnosis, failing, next_steps
from glmc.report.figures import create_figures, render_figures, save_pictures
from glmc.report.html import (
    bar,
    columns,
    details,
    html_document,
    items,
    paragraph,
    picture_section,
    section,
    table,
    tiles,
)
from glmc.report.pictures import Picture, display_name, worst_mistakes

_logger = logging.getLogger(__name__)
HEADLINE = {'top1': 'top-1, %', 'many': 'many-shot, %', 'medium': 'medium-shot, %', 'few': 'few-shot, %',
            'class_mean': 'class mean, %', 'ece': 'ECE, %'}
METRICS = {
    'top1': 'top-1', 'top5': 'top-5', 'many': 'many-shot', 'medium': 'medium-shot', 'few': 'few-shot',
    'class_mean': 'class mean', 'harmonic_mean': 'harmonic mean', 'macro_f1': 'macro F1', 'worst_class': 'worst class',
    'worst_tenth': 'worst 10 % of the classes', 'ece': 'calibration error (ECE)', 'ece_many': 'ECE, many-shot',
    'ece_medium': 'ECE, medium-shot', 'ece_few': 'ECE, few-shot', 'loss': 'cross-entropy loss, in nats'}
METADATA = ('model', 'parameters', 'method', 'evaluated_on', 'num_images', 'train_images', 'epochs', 'precision', 'seconds',
            'device', 'seed', 'fingerprint', 'command', 'commit', 'versions')
LABELS = {'num_images': 'evaluated images', 'train_images': 'training images', 'precision': 'mixed precision',
          'seconds': 'run time, s', 'fingerprint': 'data fingerprint', 'flip_tta': 'flip TTA', 'crop_tta': 'crop TTA',
          'shot_thresholds': 'shot thresholds, images'}
MAX_OPEN = 30  # rows of a table that is open at first
PRIVATE_PICTURES = ('mistakes', 'mixed-views')  # PNG files with images of the data set, which an export must not contain


@dataclass(frozen=True)
class ReportInputs:
    """Optional inputs of a report besides the metrics.

    Args:
        class_names: C names.
        predictions: Predictions of every evaluated image.
        images: Evaluated set.
        norms: Classifier -> (C,) norms of its weights.
        history: Rows of summary.csv.
        views: Pictures of training inputs.
    """
    class_names: Sequence[str] | None = None
    predictions: Predictions | None = None
    images: object = None
    norms: dict[str, list[float]] = field(default_factory=dict)
    history: Sequence[dict] = ()
    views: Sequence[Picture] = ()


def write_report(folder: Path, metrics: dict, inputs: ReportInputs, export: Path | None = None) -> Path:
    """Write report.html and plots/ into a folder, and into an export without any image of the data set or local path.

    Args:
        folder: Folder of the results.
        metrics: Content of metrics.json, including the metrics of an evaluation.
        inputs: Optional inputs.
        export: Export folder that gets a report too.

    Returns:
        Path of report.html.
    """
    names = inputs.class_names or list(map(str, range(len(metrics['train_counts']))))
    mistakes = []
    if inputs.predictions is not None and isinstance(inputs.images, ImageSet):
        mistakes = worst_mistakes(inputs.images, inputs.predictions, names)
    label = metrics.get('method') or metrics['model']
    figures = render_figures(folder / 'plots', create_figures(
        {label: metrics}, inputs.predictions, inputs.norms, inputs.history, names))
    _write_html(folder, metrics, inputs, names, figures, mistakes, None if export is None else folder)
    if export is not None:
        private = shutil.ignore_patterns(*(f'{name}.png' for name in PRIVATE_PICTURES))  # of an earlier report
        shutil.copytree(folder / 'plots', export / 'plots', ignore=private, dirs_exist_ok=True)
        public = {**metrics, 'command': public_command(metrics.get('command', '')),
                  'evaluated_on': dataset_name(metrics['evaluated_on'])}
        _write_html(export, public, replace(inputs, views=()), names, figures)
    if figures:
        for name, pictures in zip(PRIVATE_PICTURES, (mistakes, inputs.views), strict=True):
            save_pictures(folder / 'plots' / f'{name}.png', pictures)
    return folder / 'report.html'


@contextmanager
def report_errors_as_warnings() -> Iterator[None]:
    """Turn any error in the body into a warning, because the results of the run are already written."""
    try:
        yield
    except Exception as error:  # an odd picture, a full disk
        _logger.warning(f'No report: {type(error).__name__}: {error}')


def try_report(
        folder: Path, metrics: dict, create_inputs: Callable[[], ReportInputs], export: Path | None = None) -> Path | None:
    """Write the report at the end of a run and update the export's model card; warn if it fails.

    Args:
        folder: Folder of the results.
        metrics: Content of metrics.json; without an evaluation there is no report.
        create_inputs: Function that creates the optional inputs.
        export: Export folder that gets a report too.

    Returns:
        Path of report.html, or None without a report.
    """
    if 'per_class_accuracy' not in metrics:
        return None
    with report_errors_as_warnings():
        path = write_report(folder, metrics, create_inputs(), export)
        if export is not None:
            write_card(export)
        return path
    return None


def _write_html(
        folder: Path, metrics: dict, inputs: ReportInputs, names: Sequence[str], figures: str,
        mistakes: Sequence[Picture] = (), run: Path | None = None) -> None:
    """Write report.html in the order of a reader's questions: which classes fail, why, what next; then the details.

    Args:
        folder: Folder of report.html.
        metrics: Content of metrics.json.
        inputs: Optional inputs; their `views` are shown.
        names: C names.
        figures: HTML of the figures.
        mistakes: Pictures of mistakes.
        run: Folder of the run for commands; None where no folder of this machine may be shown.
    """
    results = class_results(metrics, names, inputs.predictions)
    about_views = 'Inputs of the model from the training loader and mixer, with their labels.'
    if any(len(view.images) > 1 for view in inputs.views):
        about_views += (' The global view (MixUp) is above the local view (CutMix); where their labels differ, a bar '
                        'separates the two.')
    parts = [
        *_summary(metrics, names), _worst_classes(metrics, results, names),
        columns(_confusions(inputs.predictions, names),
                section('Next steps', items(next_steps(metrics, names, results, inputs.predictions, run)))),
        picture_section('Most confident mistakes', 'Misclassified images with the highest confidence, at most two of each '
                        'pair of classes.', mistakes),
        figures,
        picture_section('Training inputs', about_views, inputs.views),
        _all_classes(results, names),
        columns(section('All metrics', table(('metric', '%'), metric_rows([metrics]))),
                section('Model and run', table(('', ''), metadata_rows(METADATA, [metrics]))))]
    title = ' · '.join(filter(None, (metrics['model'], metrics.get('method'))))
    subtitle = f"Evaluated on {metrics['num_images']:,} images of {metrics['evaluated_on']}, {len(names):,} classes"
    (folder / 'report.html').write_text(html_document(title, subtitle, parts), **ESCAPED)


def _summary(metrics: dict, names: Sequence[str]) -> list[str]:
    """Tiles of the metrics that exist, and lines on the shot groups and on classes without images."""
    groups = {name: number for name, number in (metrics.get('shot_classes') or {}).items() if number}
    labels = {**HEADLINE, **{name: f"{name}-shot ({pluralize(number, 'class')}), %" for name, number in groups.items()}}
    shown = {labels[name]: f'{metrics[name]:.1f}' for name in HEADLINE if isinstance(metrics.get(name), (int, float))}
    notes = (shot_legend(metrics['shot_thresholds']), classes_without_images(metrics.get('per_class_images') or [], names))
    return [tiles(shown), *(paragraph(note) for note in notes if note)]


def _worst_classes(metrics: dict, results: Sequence[ClassResult], names: Sequence[str]) -> str:
    """The worst classes with the likely cause of each."""
    worst = failing(results, metrics.get('class_mean'))
    if not worst:
        return section('Which classes fail', paragraph('None: every evaluated image is classified correctly.'))
    num_zero = sum(result.accuracy == 0 for result in results)
    title = 'Which classes fail, and why' + (f' ({num_zero:,} of {len(names):,} have accuracy 0)' if num_zero else '')
    rows = [(result.name, result.train_images, result.images, bar(result.accuracy), diagnosis(result, metrics, names))
            for result in worst]
    return section(title, table(('class', 'training images', 'test images', 'accuracy, %', 'likely cause'), rows, 'causes'))


def _confusions(predictions: Predictions | None, names: Sequence[str]) -> str:
    """The most frequent mistakes; empty without any."""
    pairs = [] if predictions is None else confused_pairs(predictions, 12)
    rows = [(display_name(names[a]), display_name(names[b]), number) for a, b, number in pairs]
    return section('Most frequent confusions', table(('true class', 'predicted class', 'images'), rows)) if rows else ''


def _all_classes(results: Sequence[ClassResult], names: Sequence[str]) -> str:
    """A sortable table of all classes, open if it is short."""
    rows = [(result.name, result.group, result.train_images, result.images,
             '–' if result.accuracy is None else f'{result.accuracy:.1f}',
             '' if result.mistaken_for is None else f'{display_name(names[result.mistaken_for])} ({result.mistakes})')
            for result in results]
    head = ('class', 'shot group', 'training images', 'test images', 'accuracy, %', 'most frequent mistake')
    return details(f"All {pluralize(len(rows), 'class')}", table(head, rows, 'sortable'), is_open=len(rows) <= MAX_OPEN)


def metric_rows(results: Sequence[dict]) -> list[tuple[str, ...]]:
    """Return (label, value of each result) of every metric; a dash where a result has none."""
    return [(label, *(_format_metric(metrics.get(name), 3 if name == 'loss' else 1) for metrics in results))
            for name, label in METRICS.items()]


def _format_metric(value: float | None, digits: int = 1) -> str:
    return f'{value:.{digits}f}' if isinstance(value, (int, float)) else '–'


def metadata_rows(names: Sequence[str], results: Sequence[dict], max_length: int = 10_000) -> list[tuple[str, ...]]:
    """Return (label, value of each result) of the named metadata that at least one result has.

    Args:
        names: Keys of metrics.json.
        results: Content of metrics.json of each result.
        max_length: Maximal number of characters of a value.
    """
    rows = []
    for name in names:
        values = [metrics.get(name) for metrics in results]
        if any(value is not None for value in values):
            label = LABELS.get(name, name.replace('_', ' '))
            rows.append((label, *(_format_metadata(value, name == 'seed', max_length) for value in values)))
    return rows


def _format_metadata(value, is_seed: bool, max_length: int) -> str:
    if value in (None, ''):
        return '–'
    if type(value) is int and not is_seed:
        return f'{value:,}'
    if isinstance(value, dict):
        value = ', '.join(f'{key} {item}' for key, item in value.items())
    elif isinstance(value, list):
        value = ', '.join(map(str, value))
    return display_name(value, max_length)


def classifier_norms(**classifiers: nn.Module | None) -> dict[str, list[float]]:
    """Compute the norm of each class's weights.

    Args:
        **classifiers: Classifiers by name; those without one row of weights per class are ignored.

    Returns:
        Name -> (C,) norms; the name of a single classifier is `classifier`.
    """
    norms = {}
    for name, classifier in classifiers.items():
        weight = getattr(classifier, 'weight', None)
        if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
            norms[name] = weight.detach().float().flatten(1).norm(dim=1).tolist()
    return {'classifier': norms.popitem()[1]} if len(norms) == 1 else norms
