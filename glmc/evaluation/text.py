"""Metrics and results as text: aligned tables and lines of the log."""
import statistics
from collections.abc import Sequence

from glmc.data.profiles import SHOT_NAMES


def mean_std(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation (n - 1); a dash where a value is missing."""
    if None in values:
        return '–'
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(cell.ljust(width) if place < left else cell.rjust(width)
                               for place, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def shot_table(metrics: dict) -> str:
    """Two lines: accuracy of all, many-, medium- and few-shot classes with their number, and the class mean."""
    head, row = ['top-1', 'top-5'], [metrics['top1'], metrics['top5']]
    for name in SHOT_NAMES:
        head.append(f"{name} ({metrics['shot_classes'][name]})")
        row.append(metrics[name])
    head.append('class mean')
    row.append(metrics['class_mean'])
    return _two_lines(head, row)


def _two_lines(head: list[str], row: list[float | None]) -> str:
    cells = ['–' if value is None else f'{value:.2f}' for value in row]
    widths = [max(len(h), len(c)) for h, c in zip(head, cells, strict=True)]
    lines = ('  '.join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in (head, cells))
    return '\n'.join(lines)


def detail_table(metrics: dict) -> str:
    """Two lines: the metrics that look at the worst classes and at the probabilities."""
    columns = {'worst class': 'worst_class', 'worst 10 %': 'worst_tenth', 'harmonic mean': 'harmonic_mean',
               'macro F1': 'macro_f1', 'ECE': 'ece', **{f'ECE {name}': f'ece_{name}' for name in SHOT_NAMES}}
    return _two_lines([*columns, 'NLL'], [*(metrics.get(name) for name in columns.values()), metrics['loss']])


def shot_line(metrics: dict) -> str:
    """One line for the log: top-1 with many / medium / few, and the class mean."""
    shots = ' / '.join('–' if metrics[name] is None else f'{metrics[name]:.1f}' for name in SHOT_NAMES)
    return f"top-1 {metrics['top1']:.2f} ({shots}), class mean {metrics['class_mean']:.2f}"
