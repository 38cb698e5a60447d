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

from glmc.card import write_card
from glmc.data.datasets import ImageSet
from glmc.evaluation import Predictions, confused_pairs
from glmc.page import bars, columns, figure, page, picture_section, section, table, tiles
from glmc.parsing import InputError
from glmc.pictures import Picture, worst_mistakes

_logger = logging.getLogger(__name__)
NUMBERS = {'top1': 'top-1', 'many': 'many', 'medium': 'medium', 'few': 'few', 'class_mean': 'class mean', 'ece': 'ECE'}
DETAILS = {
    'top1': 'top-1', 'top5': 'top-5', 'many': 'many-shot', 'medium': 'medium-shot', 'few': 'few-shot',
    'class_mean': 'class mean', 'harmonic_mean': 'harmonic mean', 'macro_f1': 'macro F1', 'worst_class': 'worst class',
    'worst_tenth': 'worst 10 % of the classes', 'ece': 'ECE', 'ece_many': 'ECE, many-shot', 'ece_medium': 'ECE, medium-shot',
    'ece_few': 'ECE, few-shot', 'loss': 'NLL'}
FACTS = ('model', 'parameters', 'method', 'evaluated_on', 'num_images', 'train_images', 'epochs', 'precision', 'seconds',
         'device', 'seed', 'fingerprint', 'command', 'commit')


@dataclass(frozen=True)
class Evidence:
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


def write_report(folder: Path, metrics: dict, evidence: Evidence, export: Path | None = None) -> Path:
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
    cards = figure_cards(folder / 'plots', draw_figures(metrics, evidence))
    write_page(folder, metrics, evidence, names, cards, mistakes, evidence.views)
    if export is not None:
        shutil.copytree(folder / 'plots', export / 'plots', dirs_exist_ok=True)
        write_page(export, metrics, evidence, names, cards, [], [])
    if cards:
        _picture_files(folder / 'plots', mistakes, evidence.views)
    return folder / 'report.html'


def report_or_tell(
        folder: Path, metrics: dict, evidence: Callable[[], Evidence], export: Path | None = None) -> Path | None:
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


def draw_figures(metrics: dict, evidence: Evidence) -> dict:
    """File name -> (title, figure); none where matplotlib is missing, which is said."""
    try:
        from glmc import plots
    except ImportError:
        _logger.warning('The report has no plots: pip install matplotlib')
        return {}
    label = metrics.get('method') or metrics['model']
    found = {
        'accuracy': ('Accuracy over training images', plots.draw(plots.accuracy_over_count, {label: metrics})),
        'reliability': ('Calibration', plots.draw(plots.reliability, {label: metrics})),
    }
    if evidence.predictions is not None:
        found['confusion'] = ('Confusion', plots.draw(plots.confusion, evidence.predictions, metrics['train_counts']))
    if evidence.norms:
        found['norms'] = ('Weights of the classifiers',
                          plots.draw(plots.classifier_norms, evidence.norms, metrics['train_counts']))
    if evidence.history:
        found.update(_learning_curves(plots, evidence.history))
    return found


def _learning_curves(plots, history: Sequence[dict]) -> dict:
    charts = {
        'shots': ('Accuracy while training', 'accuracy, %', {
            'eval_top1': 'top-1', 'eval_many': 'many', 'eval_medium': 'medium', 'eval_few': 'few'}),
        'losses': ('Losses', 'training loss', {
            'train_loss': 'loss', 'loss_c': 'L_c', 'loss_cb': 'L_cb', 'loss_sim': 'L_sim'}),
        'schedule': ('Learning rate and α', 'fraction of its maximum', {'lr': 'learning rate', 'alpha': 'α'}),
    }
    peak = max((row['lr'] or 0 for row in history), default=0) or 1
    rows = [{**row, 'lr': row['lr'] / peak} for row in history]
    return {name: (title, plots.draw(plots.curves, rows, columns, label))
            for name, (title, label, columns) in charts.items()}


def write_page(
        folder: Path, metrics: dict, evidence: Evidence, names: Sequence[str], cards: str,
        mistakes: Sequence[Picture], views: Sequence[Picture]) -> None:
    """report.html."""
    parts = [tiles({label: _number(metrics.get(name)) for name, label in NUMBERS.items()})]
    parts += [cards]
    parts += [picture_section('Surest mistakes', 'Wrong images by confidence, with their file names.', mistakes)]
    parts += [picture_section('What the net sees', 'Training inputs by the actual loader and mixer: the global view (MixUp) '
                              'above the local one (CutMix), with their labels.', views)]
    parts += [_class_tables(metrics, evidence, names)]
    numbers = [(label, _number(metrics.get(name), name == 'loss')) for name, label in DETAILS.items()]
    parts += [columns(section('All numbers', table(('metric', '%'), numbers)),
                      section('Where this comes from', table(('', ''), _facts(metrics))))]
    title = ' · '.join(filter(None, (metrics['model'], metrics.get('method'))))
    text = page(title, f"{metrics['num_images']:,} images of {metrics['evaluated_on']}, {len(names):,} classes", parts)
    (folder / 'report.html').write_text(text, encoding='utf-8')


def figure_cards(folder: Path, figures: dict) -> str:
    """The figures as HTML, and as PNG in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not figures:
        return ''
    from glmc.plots import as_svg, save_png
    cards = []
    for name, (title, drawn) in figures.items():
        cards.append(figure(title, as_svg(drawn)))
        save_png(drawn, folder / f'{name}.png')
    return f'<div class="figures">{"".join(cards)}</div>'


def _picture_files(folder: Path, mistakes: Sequence[Picture], views: Sequence[Picture]) -> None:
    from glmc.plots import picture_grid, save_png
    for name, pictures in (('mistakes', mistakes), ('mixed-views', views)):
        if pictures:
            entries = [(p.images, _wrapped(p)) for p in pictures]
            save_png(picture_grid(entries), folder / f'{name}.png')


def _wrapped(picture: Picture) -> str:
    """Lines of a caption that fit above a picture; matplotlib would read what stands between dollar signs as a formula."""
    lines = [*textwrap.wrap(picture.caption, 34)[:3], picture.detail[-36:]]
    return '\n'.join(filter(None, lines)).replace('$', r'\$')


def _class_tables(metrics: dict, evidence: Evidence, names: Sequence[str]) -> str:
    accuracy = np.array(metrics['per_class_accuracy'], dtype=float)
    order = [c for c in np.argsort(accuracy, kind='stable').tolist() if not np.isnan(accuracy[c])]
    rows = [(names[c], metrics['train_counts'][c], metrics['per_class_images'][c], bars(accuracy[c])) for c in order[:12]]
    lost = int((accuracy == 0).sum())
    title = f'Worst classes ({lost:,} of {len(names):,} at 0 %)' if lost else 'Worst classes'
    parts = [section(title, table(('class', 'training', 'test', 'accuracy, %'), rows))]
    if evidence.predictions is not None:
        pairs = [(names[a], names[b], n) for a, b, n in confused_pairs(evidence.predictions, 12)]
        parts.append(section('Most confused', table(('label', 'taken for', 'images'), pairs)))
    return columns(*parts)


def _facts(metrics: dict) -> list[tuple[str, str]]:
    rows = [(name.replace('_', ' '), metrics[name]) for name in FACTS if metrics.get(name) is not None]
    versions = ', '.join(f'{name} {version}' for name, version in metrics.get('versions', {}).items())
    return [(name, f'{value:,}' if isinstance(value, int) and name != 'seed' else str(value)) for name, value in rows] + [
        ('versions', versions)]


def _number(value: float | None, precise: bool = False) -> str:
    return '–' if value is None else f'{value:.{3 if precise else 1}f}'


def classifier_norms(**classifiers: nn.Module | None) -> dict[str, list[float]]:
    """Norm of each class's weights, for classifiers that have one row of weights per class."""
    found = {}
    for name, classifier in classifiers.items():
        weight = getattr(classifier, 'weight', None)
        if isinstance(weight, torch.Tensor) and weight.ndim >= 2:
            found[name] = weight.detach().float().flatten(1).norm(dim=1).tolist()
    return found


def write_comparison(folder: Path, results: Sequence[Path]) -> Path:
    """Several results in one report.

    Args:
        folder: Where to.
        results: Folders with a metrics.json, or runs whose export has one.

    Raises:
        InputError: If there is none, or they are not about the same classes.
    """
    labelled = {_label(path, results): read_metrics(path) for path in results}
    first, *others = labelled.values()
    for path, metrics in zip(results[1:], others, strict=True):
        if metrics['train_counts'] != first['train_counts']:
            raise InputError(f'--compare {path}: has other training counts than {results[0]}, expected the same classes')
    rows = [(title, *(_number(metrics.get(name), name == 'loss') for metrics in labelled.values()))
            for name, title in DETAILS.items()]
    parts = [section('All numbers', table(('metric', *labelled), rows)),
             figure_cards(folder / 'plots', _compared_figures(labelled))]
    text = page(' · '.join(labelled), f"{len(labelled)} results, {len(first['train_counts']):,} classes", parts)
    (folder / 'report.html').write_text(text, encoding='utf-8')
    return folder / 'report.html'


def _compared_figures(labelled: dict[str, dict]) -> dict:
    try:
        from glmc import plots
    except ImportError:
        _logger.warning('The report has no plots: pip install matplotlib')
        return {}
    return {'accuracy': ('Accuracy over training images', plots.draw(plots.accuracy_over_count, labelled)),
            'reliability': ('Calibration', plots.draw(plots.reliability, labelled))}


def _label(path: Path, results: Sequence[Path]) -> str:
    names = [other.resolve().name for other in results]
    return path.resolve().name if len(set(names)) == len(names) else str(path)


def read_metrics(folder: Path) -> dict:
    """metrics.json of a folder of results, an export or a run.

    Raises:
        InputError: If it is missing, cannot be read or holds no evaluation.
    """
    path = folder / 'metrics.json'
    path = path if path.is_file() else folder / 'export' / 'metrics.json'
    try:
        metrics = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise InputError(f'{folder}: expected a folder with a metrics.json: {error}') from error
    if 'per_class_accuracy' not in metrics:
        raise InputError(f'{path}: holds no evaluation')
    return metrics
