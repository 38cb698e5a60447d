"""Text tables of metrics, and lines of the log."""
import statistics
from collections.abc import Sequence

from glmc.data.profiles import SHOT_NAMES


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


def shot_table(metrics: dict) -> str:
    """Format two lines: accuracy on all images and on many-, medium- and few-shot classes, and the class mean."""
    groups = {f"{name} ({metrics['shot_classes'][name]})": metrics[name] for name in SHOT_NAMES}
    return _two_lines({'top-1': metrics['top1'], 'top-5': metrics['top5'], **groups, 'class mean': metrics['class_mean']})


def detail_table(metrics: dict) -> str:
    """Format two lines: metrics of the worst classes and of the probabilities."""
    columns = {'worst class': 'worst_class', 'worst 10 %': 'worst_tenth', 'harmonic mean': 'harmonic_mean',
               'macro F1': 'macro_f1', 'ECE': 'ece', **{f'ECE {name}': f'ece_{name}' for name in SHOT_NAMES}}
    return _two_lines({**{head: metrics.get(name) for head, name in columns.items()}, 'NLL': metrics['loss']})


def _two_lines(values: dict[str, float | None]) -> str:
    return aligned([list(values), ['–' if value is None else f'{value:.2f}' for value in values.values()]], left=0)


def shot_line(metrics: dict) -> str:
    """Format one line for the log: top-1 with many / medium / few, and the class mean."""
    shots = ' / '.join('–' if metrics[name] is None else f'{metrics[name]:.1f}' for name in SHOT_NAMES)
    return f"top-1 {metrics['top1']:.2f} ({shots}), class mean {metrics['class_mean']:.2f}"
