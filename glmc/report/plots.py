"""Plots of a report for one or several results, readable with 10 or 8,142 classes."""
import io
import warnings
from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from glmc.evaluation.metrics import Predictions, confused_pairs
from glmc.report.pictures import display_name

INK, GRID = '#1a1c20', '#c9ccd1'  # in SVG both are replaced by colours of the HTML
SERIES = ('#2f7fc1', '#d1495b', '#3a9e6c', '#b07d1e', '#8a63c9', '#3aa0a8', '#c9639a', '#7d8590')
SHOT_COLOURS = {'many': '#2f7fc1', 'medium': '#b07d1e', 'few': '#d1495b'}
STYLE = {
    'text.color': INK, 'axes.labelcolor': INK, 'xtick.color': INK, 'ytick.color': INK, 'axes.edgecolor': GRID,
    'grid.color': GRID, 'grid.linewidth': 0.6, 'axes.grid': True, 'axes.axisbelow': True, 'axes.spines.top': False,
    'axes.spines.right': False, 'font.size': 11, 'legend.frameon': False, 'svg.fonttype': 'none', 'lines.linewidth': 1.8,
}
THOUSANDS = FuncFormatter(lambda value, _: f'{value:,.0f}')
MAX_CELLS = 100  # rows and columns of the confusion matrix; with more classes several share a cell
MAX_MARKS = 1000  # named dots or cells of a plot, which a reader sees under the pointer
CROWDED = 300  # more points than this are small and faint, one bitmap inside the SVG


def make_figure(plot: Callable[..., None], *args, size: tuple[float, float] = (4.8, 3.4)) -> Figure:
    """Create a figure in the report's style and draw one plot on it.

    Args:
        plot: Function of the axes and `args`.
        *args: Further arguments of the function.
        size: Width and height in inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout='constrained', facecolor='white')
        plot(figure.add_subplot(), *args)
    return figure


def as_svg(figure: Figure) -> str:
    """Return a figure as inline SVG, transparent, with text and grid in the colours of the HTML, and named marks."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format='svg', transparent=True, dpi=144, metadata={'Date': None})
        figure.set_layout_engine('none')  # keeps the layout for the next format
    text = file.getvalue()
    text = text[text.index('<svg'):].replace(INK, 'currentColor').replace(GRID, 'var(--grid)')
    return text.replace('</svg>', f'{_named_marks(figure)}</svg>')


def add_marks(axes: Axes, marks: Sequence[tuple[float, float, str]], size: tuple[float, float] | None = None) -> None:
    """Name points or cells of a plot; `as_svg` shows the text of the one under the pointer.

    Args:
        axes: Axes of the plot.
        marks: (x, y, text) in data coordinates, the centre of a cell; those after MAX_MARKS are ignored.
        size: Width and height of the cells in data coordinates; None for points.
    """
    axes.figure.marks = [*getattr(axes.figure, 'marks', []), (axes, list(marks)[:MAX_MARKS], size)]


def _named_marks(figure: Figure) -> str:
    """Transparent SVG shapes with titles over the marks of a figure, in the coordinates of its SVG file."""
    width, height = 72 * figure.get_size_inches()
    parts = []
    for axes, marks, size in getattr(figure, 'marks', []):
        points = np.array([mark[:2] for mark in marks], dtype=float).reshape(-1, 2)
        half = np.array([0, 0] if size is None else size) / 2
        corners = [(axes.transData - figure.transFigure).transform(points + sign * half) * (width, -height) + (0, height)
                   for sign in (-1, 1)]
        for (x0, y0), (x1, y1), (_, _, text) in zip(*corners, marks, strict=True):
            shape = f'circle cx="{x0:.1f}" cy="{y0:.1f}" r="4"' if size is None else (
                f'rect x="{min(x0, x1):.1f}" y="{min(y0, y1):.1f}" width="{abs(x1 - x0):.1f}" height="{abs(y1 - y0):.1f}"')
            parts.append(f'<{shape}><title>{escape(text)}</title></{shape.split()[0]}>')
    return f'<g class="hover" fill="transparent">{"".join(parts)}</g>' if parts else ''


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # a script that matplotlib's font lacks
        figure.savefig(path, dpi=144)


def accuracy_over_count(axes: Axes, results: dict[str, dict], names: Sequence[str] | None = None) -> None:
    """Plot the accuracy of each class over its training images, with shot groups and a running mean.

    Args:
        axes: Target.
        results: Label -> metrics; the shot groups are those of the first result.
        names: C names of the classes, shown under the pointer; None for 0…C-1.
    """
    first = next(iter(results.values()))
    counts = np.maximum(first['train_counts'], 1)
    _shot_bands(axes, counts, first['shot_thresholds'])
    for colour, (name, metrics) in zip(cycle(SERIES), results.items(), strict=False):
        accuracy = np.array(metrics['per_class_accuracy'], dtype=float)
        seen = ~np.isnan(accuracy)
        crowded = seen.sum() > CROWDED
        axes.scatter(counts[seen], accuracy[seen], s=4 if crowded else 22, alpha=0.25 if crowded else 0.6,
                     color=colour, linewidths=0, rasterized=crowded)
        axes.plot(*_running_mean(counts[seen], accuracy[seen]), color=colour, label=name)
        start = f'{name}: ' if len(results) > 1 else ''
        add_marks(axes, [(counts[c], accuracy[c], f'{start}{display_name(names[c] if names else c)}: {accuracy[c]:.1f} %, '
                          f"{first['train_counts'][c]:,} training images") for c in np.argsort(accuracy)[:seen.sum()]])
    axes.set(xscale='log', xlabel='training images per class', ylabel='accuracy, %', ylim=(-3, 103))
    _format_counts(axes)
    if len(results) > 1:
        _legend_below(axes)


def _format_counts(axes: Axes) -> None:
    """Label a logarithmic axis with whole numbers, linearly spaced if it spans less than two powers of ten."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter(THOUSANDS)
    if np.floor(np.log10(high)) - np.ceil(np.log10(low)) < 1:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shot_bands(axes: Axes, counts: np.ndarray, thresholds: Sequence[int]) -> None:
    few, many = thresholds
    low, high = 0.9 * counts.min(), 1.1 * counts.max()
    edges = {'few': (low, few + 0.5), 'medium': (few + 0.5, many + 0.5), 'many': (many + 0.5, high)}
    axes.set_xlim(low, high)
    for name, (left, right) in edges.items():
        left, right = max(left, low), min(right, high)
        if left < right:
            axes.axvspan(left, right, color=SHOT_COLOURS[name], alpha=0.10, linewidth=0)
            if np.log(right / left) > 0.12 * np.log(high / low):
                axes.text(np.sqrt(left * right), 1.0, name, transform=axes.get_xaxis_transform(), ha='center', va='bottom')


def _running_mean(counts: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return geometric mean counts and mean accuracies of 3 to 16 equal groups of neighbouring counts."""
    order = np.argsort(counts, kind='stable')
    groups = np.array_split(order, min(16, max(len(order) // 12, 3)))
    return (np.array([np.exp(np.log(counts[group]).mean()) for group in groups if len(group)]),
            np.array([accuracy[group].mean() for group in groups if len(group)]))


def reliability(axes: Axes, results: dict[str, dict]) -> None:
    """Plot accuracy over confidence in the bins of the calibration error; a calibrated model follows the diagonal.

    Args:
        axes: Target.
        results: Label -> metrics.
    """
    axes.plot([0, 100], [0, 100], color=GRID, linestyle='--', linewidth=1.2)
    for colour, (name, metrics) in zip(cycle(SERIES), results.items(), strict=False):
        images, confidence, hits = (np.array(metrics[f'bin_{column}']) for column in ('images', 'confidence', 'hits'))
        used = images > 0
        share = images / max(images.sum(), 1)
        centers = (np.arange(len(images)) + 0.5) * 100 / len(images)
        axes.bar(centers, 100 * share, width=100 / len(images), color=colour, alpha=0.2, linewidth=0)
        error = metrics.get('ece')
        label = f'{name}, ECE {error:.1f} %' if isinstance(error, (int, float)) else name
        axes.plot(100 * confidence[used] / images[used], 100 * hits[used] / images[used], marker='o', markersize=4,
                  color=colour, label=label)
    axes.set(xlabel='confidence, % (bars: % of images)', ylabel='accuracy, %', xlim=(0, 100), ylim=(0, 103))
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    """Place the legend outside the axes, where it covers no point."""
    axes.figure.legend(loc='outside lower center', ncols=2)


def classifier_norms(axes: Axes, norms: dict[str, Sequence[float]], train_counts: Sequence[int]) -> None:
    """Plot the norm of each class's weights, most frequent class first.

    Args:
        axes: Target.
        norms: Classifier -> (C,) norms.
        train_counts: (C,) training images per class.
    """
    order = np.argsort(-np.asarray(train_counts), kind='stable')
    rank, crowded = np.arange(1, len(order) + 1), len(order) > CROWDED
    for colour, (name, values) in zip(SERIES, norms.items(), strict=False):
        line = rank, np.asarray(values)[order]
        if crowded:
            axes.scatter(*line, s=3, alpha=0.15, color=colour, linewidths=0, rasterized=True)
            line = [[block.mean() for block in np.array_split(column, 60)] for column in line]
        axes.plot(*line, color=colour, label=name)
    axes.set(xlabel='class, most frequent first', ylabel='norm of the class weights')
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.legend(loc='lower left')


def curves(axes: Axes, rows: Sequence[dict], columns: dict[str, str], label: str) -> None:
    """Plot columns of summary.csv over the epochs.

    Args:
        axes: Target.
        rows: Rows of summary.csv.
        columns: Name of a column -> label of its curve.
        label: Label of the vertical axis.
    """
    for series, (column, name) in zip(SERIES, columns.items(), strict=False):
        colour = SHOT_COLOURS.get(name, INK if name == 'top-1' else series)
        points = [(row['epoch'] + 1, row[column]) for row in rows if row.get(column) is not None]
        if points:
            size = 6 if len(points) == 1 else 3 if len(points) < 40 else 0
            axes.plot(*zip(*points, strict=True), color=colour, label=name, marker='o', markersize=size)
    axes.set(xlabel='epoch', ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(rows) == 1:
        axes.set_xlim(rows[0]['epoch'] + 0.5, rows[0]['epoch'] + 1.5)
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        ncols = 4 if len(''.join(labels)) < 35 else 2
        axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=ncols, handlelength=1.2, columnspacing=1.2)


def confusion(
        axes: Axes, predictions: Predictions, train_counts: Sequence[int], names: Sequence[str] | None = None) -> None:
    """Plot the confusion matrix in % of each true class, most frequent class first.

    Args:
        axes: Target.
        predictions: Predictions of every evaluated image.
        train_counts: (C,) training images per class.
        names: C names of the classes, shown under the pointer; None for 0…C-1.
    """
    matrix, per_cell = confusion_matrix(predictions, train_counts)
    colours = LinearSegmentedColormap.from_list('share', [(0.82, 0.29, 0.36, 0.0), (0.82, 0.29, 0.36, 1.0)])
    image = axes.imshow(matrix, cmap=colours, norm=PowerNorm(0.5, 0, 100), interpolation='nearest', aspect='auto',
                        extent=(0.5, len(train_counts) + 0.5, len(train_counts) + 0.5, 0.5))
    add_marks(axes, _cell_marks(predictions, train_counts, per_cell, names), (per_cell, per_cell))
    axes.grid(False)
    shared = f', {per_cell:.0f} per cell' if per_cell > 1 else ''
    axes.set(xlabel=f'predicted class, most frequent first{shared}', ylabel='true class')
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.set_major_formatter(THOUSANDS)
    bar = axes.figure.colorbar(image, ax=axes, label='% of the true class')
    bar.outline.set_visible(False)
    bar.solids.set(rasterized=True)


def _cell_marks(
        predictions: Predictions, train_counts: Sequence[int], per_cell: float,
        names: Sequence[str] | None) -> list[tuple[float, float, str]]:
    """Marks of the cells with mistakes, most images first; a cell of several classes has its most frequent mistake."""
    cell, names = _cells(train_counts), names or range(len(train_counts))
    images, marks = np.bincount(predictions.labels, minlength=len(train_counts)), {}
    for label, predicted, number in confused_pairs(predictions, len(predictions.labels)):
        marks.setdefault((cell[predicted], cell[label]), (
            *((np.array([cell[predicted], cell[label]]) + 0.5) * per_cell + 0.5).tolist(),
            f'{display_name(names[label])} predicted as {display_name(names[predicted])}: {number} of {images[label]} '
            'images'))
    return list(marks.values())


def _cells(train_counts: Sequence[int]) -> np.ndarray:
    """(C,) row of each class in the confusion matrix, most frequent class first; several share one of MAX_CELLS rows."""
    num_classes = len(train_counts)
    rank = np.empty(num_classes, dtype=np.int64)
    rank[np.argsort(-np.asarray(train_counts), kind='stable')] = np.arange(num_classes)
    return rank * min(num_classes, MAX_CELLS) // num_classes


def confusion_matrix(predictions: Predictions, train_counts: Sequence[int]) -> tuple[np.ndarray, float]:
    """Return the confusion matrix and the number of classes that share a cell.

    Args:
        predictions: Predictions of every evaluated image.
        train_counts: (C,) training images per class.

    Returns:
        (K, K) percentages of each true class by row, K = min(C, MAX_CELLS), most frequent class first, 0 in a row without
        images; C / K.
    """
    num_classes = len(train_counts)
    size = min(num_classes, MAX_CELLS)
    cell = _cells(train_counts)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (cell[predictions.labels], cell[predictions.predicted]), 1)
    return 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1), num_classes / size


def picture_grid(pictures: Sequence[tuple[Sequence, str]], columns: int = 4) -> Figure:
    """Create a figure with a grid of captioned pictures.

    Args:
        pictures: (images, caption) pairs, equally many images each, shown one above the other.
        columns: Number of columns.
    """
    with matplotlib.rc_context({**STYLE, 'font.size': 7}):
        rows, height = -(-len(pictures) // columns), len(pictures[0][0])
        figure = Figure(figsize=(1.9 * columns, (1.7 * height + 0.5) * rows), layout='constrained', facecolor='white')
        grid = figure.subplots(rows * height, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis('off')
        for index, (images, caption) in enumerate(pictures):
            row, column = divmod(index, columns)
            for k, image in enumerate(images):
                grid[row * height + k][column].imshow(image.convert('RGB'))
            grid[row * height][column].set_title(caption, fontsize=7, wrap=True)
    return figure
