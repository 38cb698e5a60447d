"""Figures of a report: which plots a result gets, their titles, and their files."""
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path

from glmc.evaluation.metrics import Predictions
from glmc.report.html import figure
from glmc.report.pictures import Picture, display_name

_logger = logging.getLogger(__name__)
CLASSIFIERS = {'c': 'conventional (c)', 'cb': 'rebalanced (cb)'}  # keys of the norms -> labels, GLMC's two classifiers
CURVES = {  # file name -> title, vertical axis, column of summary.csv -> label
    'shots': ('Accuracy during training', 'accuracy, %', {
        'eval_top1': 'top-1', 'eval_many': 'many', 'eval_medium': 'medium', 'eval_few': 'few'}),
    'losses': ('Training losses', 'loss', {
        'train_loss': 'total', 'loss_c': 'conventional (L_c)', 'loss_cb': 'rebalanced (L_cb)',
        'loss_sim': 'consistency (L_sim)', 'loss_con': 'contrast (L_con)'}),
}


def create_figures(
        results: dict[str, dict], predictions: Predictions | None = None, norms: dict[str, Sequence[float]] | None = None,
        history: Sequence[dict] = (), names: Sequence[str] | None = None) -> dict:
    """Draw the figures of one or several results.

    Args:
        results: Label -> metrics.
        predictions: Predictions of every evaluated image of a single result.
        norms: Classifier -> (C,) norms of its weights, of a single result.
        history: Rows of summary.csv of a single result.
        names: C names of the classes.

    Returns:
        File name -> (title, figure); empty, with a warning, without matplotlib.
    """
    try:
        from glmc.report import plots
    except ImportError:
        _logger.warning('The report has no plots: pip install matplotlib')
        return {}
    train_counts = next(iter(results.values()))['train_counts']
    figures = {
        'accuracy': ('Accuracy by training images per class', plots.make_figure(plots.accuracy_over_count, results, names)),
        'reliability': ('Calibration', plots.make_figure(plots.reliability, results))}
    if predictions is not None:
        figures['confusion'] = ('Confusion matrix', plots.make_figure(plots.confusion, predictions, train_counts, names))
    if norms:
        norms = {CLASSIFIERS.get(name, name): values for name, values in norms.items()}
        figures['norms'] = ('Weight norms of the classifier', plots.make_figure(plots.classifier_norms, norms, train_counts))
    if history:
        for name, (title, label, columns) in CURVES.items():
            figures[name] = (title, plots.make_figure(plots.curves, history, columns, label))
        figures['schedule'] = _schedule_figure(plots, history)
    return figures


def _schedule_figure(plots, history: Sequence[dict]) -> tuple:
    """Draw learning rate and α, the learning rate as a fraction of its maximum."""
    peak = max((row['lr'] or 0 for row in history), default=0) or 1
    rows = [{**row, 'lr': None if row['lr'] is None else row['lr'] / peak} for row in history]
    title = 'Learning rate and α' if any(row.get('alpha') is not None for row in history) else 'Learning rate'
    columns = {'lr': f'learning rate (maximum {peak:.3g})', 'alpha': 'α'}
    return title, plots.make_figure(plots.curves, rows, columns, 'fraction of the maximum')


def render_figures(folder: Path, figures: dict) -> str:
    """Write figures as PNG into a folder and return them as HTML; the result of `create_figures` may be empty."""
    folder.mkdir(parents=True, exist_ok=True)
    if not figures:
        return ''
    from glmc.report.plots import as_svg, save_png
    parts = []
    for name, (title, drawn) in figures.items():
        parts.append(figure(title, as_svg(drawn)))  # before PNG: it computes the layout of both
        save_png(drawn, folder / f'{name}.png')
    return f'<div class="figures">{"".join(parts)}</div>'


def save_pictures(path: Path, pictures: Sequence[Picture]) -> None:
    """Write a grid of captioned pictures as PNG; nothing without pictures."""
    if not pictures:
        return
    from glmc.report.plots import picture_grid, save_png
    captions = []
    for picture in pictures:
        lines = textwrap.wrap(picture.caption, 32, max_lines=3, placeholder=' …')
        lines += [display_name(picture.detail, 34, keep_end=True)] if picture.detail else []
        captions.append('\n'.join(lines).replace('$', r'\$'))  # matplotlib reads text between dollar signs as a formula
    save_png(picture_grid([(p.images, caption) for p, caption in zip(pictures, captions, strict=True)]), path)
