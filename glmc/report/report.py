"""The report of a result: report.html, one file that needs nothing else, and its plots as PNG."""
import json
import logging
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from glmc.data.datasets import ImageSet
from glmc.errors import InputError
from glmc.evaluation.metrics import Predictions, confused_pairs
from glmc.export.card import write_card
from glmc.report.html import bars, columns, figure, page, picture_section, section, table, tiles
from glmc.report.pictures import Picture, shown, worst_mistakes

_logger = logging.getLogger(__name__)
NUMBERS = {'top1': 'top-1', 'many': 'many', 'medium': 'medium', 'few': 'few', 'class_mean': 'class mean', 'ece': 'ECE'}
DETAILS = {
    'top1': 'top-1', 'top5': 'top-5', 'many': 'many-shot', 'medium': 'medium-shot', 'few': 'few-shot',
    'class_mean': 'class mean', 'harmonic_mean': 'harmonic mean', 'macro_f1': 'macro F1', 'worst_class': 'worst class',
    'worst_tenth': 'worst 10 % of the classes', 'ece': 'ECE', 'ece_many': 'ECE, many-shot', 'ece_medium': 'ECE, medium-shot',
    'ece_few': 'ECE, few-shot', 'loss': 'NLL'}
FACTS = ('model', 'parameters', 'method', 'evaluated_on', 'num_images', 'train_images', 'epochs', 'precision', 'seconds',
         'device', 'seed', 'fingerprint', 'command', 'commit')

PICTURES = ('mistakes', 'mixed-views')  # files with images of the data set, which stay out of an export
COMPARED = ('model', 'parameters', 'method', 'epochs', 'fingerprint', 'evaluated_on', 'num_images', 'shot_thresholds',
            'flip_tta', 'test_distribution', 'target_prior', 'precision', 'seed')


@dataclass(frozen=True)
class ReportInputs:
    """What a report can show beside the metrics, as far as it is at hand.

    Args:
        class_names: C names.
        predictions: Of every evaluated image.
        images: The evaluated set.
        norms: Name of a classifier -> (C,) norms of its weights.
        history: Rows of summary.csv.
        views: Pictures of training inputs.
    """
    class_names: Sequence[str] | None = None
    predictions: Predictions | None = None
    images: object = None
    norms: dict[str, list[float]] = field(default_factory=dict)
    history: Sequence[dict] = ()
    views: Sequence[Picture] = ()


def write_report(folder: Path, metrics: dict, evidence: ReportInputs, export: Path | None = None) -> Path:
    """Write report.html and plots/ into a folder, and without any picture of the data into an export.

    Args:
        folder: Of the results.
        metrics: Of metrics.json, with the metrics of an evaluation among them.
        evidence: What else there is to show.
        export: Export folder that is to have a report of its own.

    Returns:
        Path of report.html.
    """
    names = evidence.class_names or list(map(str, range(len(metrics['train_counts']))))
    mistakes = []
    if evidence.predictions is not None and isinstance(evidence.images, ImageSet):
        mistakes = worst_mistakes(evidence.images, evidence.predictions, names)
    cards = figure_cards(folder / 'plots', make_figures(metrics, evidence))
    write_page(folder, metrics, evidence, names, cards, mistakes, evidence.views)
    if export is not None:
        of_the_data = shutil.ignore_patterns(*(f'{name}.png' for name in PICTURES))  # of an earlier end of this run
        shutil.copytree(folder / 'plots', export / 'plots', ignore=of_the_data, dirs_exist_ok=True)
        write_page(export, metrics, evidence, names, cards, [], [])
    if cards:
        _picture_files(folder / 'plots', mistakes, evidence.views)
    return folder / 'report.html'


def try_report(
        folder: Path, metrics: dict, evidence: Callable[[], ReportInputs], export: Path | None = None) -> Path | None:
    """The report at the end of a run, and the export's model card with its plots; if it fails, the run has not."""
    try:
        if 'per_class_accuracy' not in metrics:
            return None
        path = write_report(folder, metrics, evidence(), export)
        if export is not None:
            write_card(export)
        return path
    except Exception as error:  # an odd picture, a full disk: the model is exported already
        _logger.warning(f'No report: {type(error).__name__}: {error}')
        return None


def make_figures(metrics: dict, evidence: ReportInputs) -> dict:
    """File name -> (title, figure); none where matplotlib is missing, which is said."""
    try:
        from glmc.report import plots
    except ImportError:
        _logger.warning('The report has no plots: pip install matplotlib')
        return {}
    label = metrics.get('method') or metrics['model']
    found = {
        'accuracy': ('Accuracy over training images', plots.make_figure(plots.accuracy_over_count, {label: metrics})),
        'reliability': ('Calibration', plots.make_figure(plots.reliability, {label: metrics})),
    }
    if evidence.predictions is not None:
        found['confusion'] = ('Confusion', plots.make_figure(plots.confusion, evidence.predictions, metrics['train_counts']))
    if evidence.norms:
        found['norms'] = ('Weights of the classifiers',
                          plots.make_figure(plots.classifier_norms, evidence.norms, metrics['train_counts']))
    if evidence.history:
        found.update(_learning_curves(plots, evidence.history))
    return found


def _learning_curves(plots, history: Sequence[dict]) -> dict:
    peak = max((row['lr'] or 0 for row in history), default=0) or 1
    charts = {
        'shots': ('Accuracy while training', 'accuracy, %', {
            'eval_top1': 'top-1', 'eval_many': 'many', 'eval_medium': 'medium', 'eval_few': 'few'}),
        'losses': ('Losses', 'training loss', {
            'train_loss': 'loss', 'loss_c': 'L_c', 'loss_cb': 'L_cb', 'loss_sim': 'L_sim'}),
        'schedule': ('Learning rate and α' if any(row.get('alpha') is not None for row in history) else 'Learning rate',
                     'fraction of its maximum', {'lr': f'learning rate / {peak:.3g}', 'alpha': 'α'}),
    }
    rows = [{**row, 'lr': None if row['lr'] is None else row['lr'] / peak} for row in history]
    return {name: (title, plots.make_figure(plots.curves, rows, columns, label))
            for name, (title, label, columns) in charts.items()}


def write_page(
        folder: Path, metrics: dict, evidence: ReportInputs, names: Sequence[str], cards: str,
        mistakes: Sequence[Picture], views: Sequence[Picture]) -> None:
    """report.html."""
    parts = [tiles({label: _number(metrics.get(name)) for name, label in NUMBERS.items()})]
    parts += [cards]
    parts += [picture_section('Surest mistakes', 'Wrong images by confidence, with their file names.', mistakes)]
    parts += [picture_section('What the net sees', _about_views(views), views)]
    parts += [_class_tables(metrics, evidence, names)]
    numbers = [(label, _number(metrics.get(name), name == 'loss')) for name, label in DETAILS.items()]
    parts += [columns(section('All numbers', table(('metric', '%'), numbers)),
                      section('Where this comes from', table(('', ''), _facts(metrics))))]
    title = ' · '.join(filter(None, (metrics['model'], metrics.get('method'))))
    text = page(title, f"{metrics['num_images']:,} images of {metrics['evaluated_on']}, {len(names):,} classes", parts)
    (folder / 'report.html').write_text(text, encoding='utf-8')


def _about_views(views: Sequence[Picture]) -> str:
    paired = any(len(view.images) > 1 for view in views)
    return 'Training inputs by the actual loader and mixer' + (
        ': the global view (MixUp) above the local one (CutMix), with their labels.' if paired else ', with their labels.')


def figure_cards(folder: Path, figures: dict) -> str:
    """The figures as HTML, and as PNG in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not figures:
        return ''
    from glmc.report.plots import as_svg, save_png
    cards = []
    for name, (title, drawn) in figures.items():
        cards.append(figure(title, as_svg(drawn)))
        save_png(drawn, folder / f'{name}.png')
    return f'<div class="figures">{"".join(cards)}</div>'


def _picture_files(folder: Path, mistakes: Sequence[Picture], views: Sequence[Picture]) -> None:
    from glmc.report.plots import picture_grid, save_png
    for name, pictures in zip(PICTURES, (mistakes, views), strict=True):
        if pictures:
            entries = [(p.images, _wrapped(p)) for p in pictures]
            save_png(picture_grid(entries), folder / f'{name}.png')


def _wrapped(picture: Picture) -> str:
    """Lines of a caption that fit above a picture; matplotlib would read what stands between dollar signs as a formula."""
    detail = shown(picture.detail, 34, keep_end=True) if picture.detail else ''
    lines = [*textwrap.wrap(picture.caption, 32, max_lines=3, placeholder=' …'), detail]
    return '\n'.join(filter(None, lines)).replace('$', r'\$')


def _class_tables(metrics: dict, evidence: ReportInputs, names: Sequence[str]) -> str:
    accuracy = np.array(metrics['per_class_accuracy'], dtype=float)
    order = [c for c in np.argsort(accuracy, kind='stable').tolist() if not np.isnan(accuracy[c])]
    training, test = metrics['train_counts'], metrics['per_class_images']
    rows = [(shown(names[c]), training[c], test[c], bars(accuracy[c])) for c in order[:12]]
    lost = int((accuracy == 0).sum())
    title = f'Worst classes ({lost:,} of {len(names):,} at 0 %)' if lost else 'Worst classes'
    parts = [section(title, table(('class', 'training', 'test', 'accuracy, %'), rows))]
    if evidence.predictions is not None:
        pairs = [(shown(names[a]), shown(names[b]), n) for a, b, n in confused_pairs(evidence.predictions, 12)]
        parts.append(section('Most confused', table(('label', 'taken for', 'images'), pairs)))
    return columns(*parts)


def _facts(metrics: dict) -> list[tuple[str, str]]:
    rows = [(name.replace('_', ' '), metrics[name]) for name in FACTS if metrics.get(name) is not None]
    versions = ', '.join(f'{name} {version}' for name, version in metrics.get('versions', {}).items())
    return [(name, f'{value:,}' if type(value) is int and name != 'seed' else str(value)) for name, value in rows] + [
        ('versions', versions)]


def _number(value: float | None, precise: bool = False) -> str:
    return f'{value:.{3 if precise else 1}f}' if isinstance(value, (int, float)) else '–'


def _fact(value) -> str:
    if isinstance(value, list):
        return ', '.join(map(str, value))
    return '–' if value in (None, '') else f'{value:,}' if type(value) is int else shown(value)


def classifier_norms(**classifiers: nn.Module | None) -> dict[str, list[float]]:
    """Norm of each class's weights, for classifiers that have one row of weights per class; one alone needs no name."""
    found = {}
    for name, classifier in classifiers.items():
        weight = getattr(classifier, 'weight', None)
        if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
            found[name] = weight.detach().float().flatten(1).norm(dim=1).tolist()
    return {'classifier': found.popitem()[1]} if len(found) == 1 else found


def write_comparison(folder: Path, results: Sequence[Path]) -> Path:
    """Several results in one report.

    Args:
        folder: Where to.
        results: Folders with a metrics.json, or runs whose export has one.

    Raises:
        InputError: If there is none, they are not about the same classes, or the folder cannot be written.
    """
    labelled = dict(zip(_labels(results), map(read_metrics, results), strict=True))
    first = labelled[next(iter(labelled))]
    for path, metrics in zip(results, labelled.values(), strict=True):
        if metrics['train_counts'] != first['train_counts']:
            raise InputError(f'--compare {path}: has other training counts than {results[0]}, expected the same classes')
    numbers = [(title, *(_number(metrics.get(name), name == 'loss') for metrics in labelled.values()))
               for name, title in DETAILS.items()]
    facts = [(name.replace('_', ' '), *(_fact(metrics.get(name))[:24] for metrics in labelled.values()))
             for name in COMPARED if any(metrics.get(name) for metrics in labelled.values())]
    try:
        parts = [section('All numbers', table(('metric', *labelled), numbers)),
                 figure_cards(folder / 'plots', _compared_figures(labelled)),
                 section('What was compared', table(('', *labelled), facts))]
        text = page(' · '.join(labelled), f"{len(labelled)} results, {len(first['train_counts']):,} classes", parts)
        (folder / 'report.html').write_text(text, encoding='utf-8')
    except OSError as error:
        raise InputError(f'--output: cannot write to {folder}: {error.strerror or error}') from error
    return folder / 'report.html'


def _compared_figures(labelled: dict[str, dict]) -> dict:
    try:
        from glmc.report import plots
    except ImportError:
        _logger.warning('The report has no plots: pip install matplotlib')
        return {}
    return {'accuracy': ('Accuracy over training images', plots.make_figure(plots.accuracy_over_count, labelled)),
            'reliability': ('Calibration', plots.make_figure(plots.reliability, labelled))}


def _labels(results: Sequence[Path]) -> list[str]:
    """A name for each: its folder's, the run's for an export, with the folder above where several have the same."""
    paths = [path.resolve().parent if path.resolve().name == 'export' else path.resolve() for path in results]
    names = [shown(path.name) for path in paths]
    if len(set(names)) < len(names):
        names = [shown(f'{path.parent.name}/{path.name}', keep_end=True) for path in paths]
    return [name if names.count(name) == 1 else f'{name} ({k})' for k, name in enumerate(names, 1)]


def read_metrics(folder: Path) -> dict:
    """metrics.json of a folder of results, an export or a run.

    Raises:
        InputError: If it is missing, cannot be read or holds no evaluation.
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
        raise InputError(f'{path}: holds no evaluation')
    return metrics


def is_evaluation(metrics) -> bool:
    """Whether what was read from a file has the lists that the plots need; any number of it may be missing."""
    if not isinstance(metrics, dict):
        return False
    per_class = [metrics.get(name) for name in ('train_counts', 'per_class_accuracy')]
    bins = [metrics.get(f'bin_{name}') for name in ('images', 'confidence', 'hits')]
    thresholds = metrics.get('shot_thresholds')
    return (_same_length(per_class) and _same_length(bins) and _same_length([thresholds]) and len(thresholds) == 2
            and all(type(n) is int for n in (*per_class[0], *thresholds)) and None not in sum(bins, []))


def _same_length(columns: list) -> bool:
    """Whether they are lists of numbers, with gaps, all equally long and not empty."""
    return all(isinstance(column, list) and column and len(column) == len(columns[0])
               and all(value is None or type(value) in (int, float) for value in column) for column in columns)
