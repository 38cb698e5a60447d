"""Text tables of metrics, and lines of the log."""
import statistics
from collections.abc import Sequence

from glmc.data.profiles import SHOT_NAMES, classes_without_images


def mean_std(values: Sequence[float | None]) -> str:
    """Format mean ± standard deviation (n - 1); a dash if a value is missing."""
    if None in values:
        return '–'
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align rows of cells in columns, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(cell.ljust(width) if column < left else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def shot_table(metrics: dict, class_names: Sequence[str] | None = None) -> str:
    """Format two lines: accuracy on all images and on many-, medium- and few-shot classes, and the class mean.

    The number behind a group is that of its classes with evaluated images. A third line names the classes without any.

    Args:
        metrics: Result of an evaluation.
        class_names: C names; None for 0…C-1.
    """
    groups = {f"{name} ({metrics['shot_classes'][name]})": metrics[name] for name in SHOT_NAMES}
    table = _two_lines({'top-1': metrics['top1'], 'top-5': metrics['top5'], **groups, 'class mean': metrics['class_mean']})
    return '\n'.join(filter(None, (table, classes_without_images(metrics['per_class_images'], class_names))))


def detail_table(metrics: dict) -> str:
    """Format two lines: metrics of the worst classes and of the probabilities."""
    columns = {'worst class': 'worst_class', 'worst 10 %': 'worst_tenth', 'harmonic mean': 'harmonic_mean',
               'macro F1': 'macro_f1', 'ECE': 'ece', **{f'ECE {name}': f'ece_{name}' for name in SHOT_NAMES}}
    return _two_lines({**{head: metrics.get(name) for head, name in columns.items()}, 'NLL': metrics['loss']})


def shot_legend(thresholds: Sequence[int]) -> str:
    """Format one line that explains the shot groups.

    Args:
        thresholds: (few, many) of `profiles.shot_groups`.
    """
    ranges = ', '.join(f'{name}-shot: {text}' for name, text in shot_ranges(thresholds).items())
    return f'Training images per class: {ranges}'


def shot_ranges(thresholds: Sequence[int]) -> dict[str, str]:
    """Shot group -> its training images per class in words."""
    few, many = thresholds
    middle = f'{few + 1} to {many}' if few < many else 'none'
    return {'many': f'more than {many}', 'medium': middle, 'few': f'at most {few}'}


def _two_lines(values: dict[str, float | None]) -> str:
    return aligned([list(values), ['–' if value is None else f'{value:.2f}' for value in values.values()]], left=0)


def shot_line(metrics: dict) -> str:
    """Format one line for the log: top-1 with many / medium / few, and the class mean."""
    shots = ' / '.join('–' if metrics[name] is None else f'{metrics[name]:.1f}' for name in SHOT_NAMES)
    return f"top-1 {metrics['top1']:.2f} ({shots}), class mean {metrics['class_mean']:.2f}"
