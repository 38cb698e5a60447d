"""Plot class mean over the budget for a CSV of runs, and print it: a line per method, a point per budget, mean over seeds.

    python -m glmc.sweep.plot results/frontier.csv

The PNG has the name of the CSV. The rows need the columns `run`, `seed`, `method`, `class_mean`, and `cost`, in epochs of
cross-entropy, or `seconds`. Column `data` gives each data set its own plot, `epochs` each budget its own point.
"""
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from glmc.cli import Parser, run_script
from glmc.errors import InputError
from glmc.evaluation.text import aligned
from glmc.report.plots import SERIES, STYLE, save_png
from glmc.sweep.runs import read_runs


def main() -> None:
    parser = Parser(prog='python -m glmc.sweep.plot', verbatim=True, description=__doc__)
    parser.add_argument('csv', type=Path, help='table of runs')
    path = parser.parse_args().csv
    runs = read_runs(path)
    try:
        figure, table = plot_runs(runs), budget_table(runs)
    except (KeyError, ValueError) as error:
        raise InputError(f'{path}: expected columns method, class_mean and cost or seconds with numbers, found '
                         f'{error}') from error
    target = path.with_suffix('.png')
    save_png(figure, target)
    print(f'{table}\n{target}: plot of {path}')


def plot_runs(runs: Sequence[dict[str, str]]) -> Figure:
    """Create a figure with one plot per data set, side by side.

    Args:
        runs: Rows of the CSV.

    Raises:
        KeyError: If a column is missing.
        ValueError: If a cell is not a number, or there is no run.
    """
    sets = list(dict.fromkeys(run.get('data', '') for run in runs))
    styles = ({'color': colour, 'marker': marker} for marker in 'os^D' for colour in SERIES)
    styles = dict(zip(dict.fromkeys(run['method'] for run in runs), cycle(styles), strict=False))
    with matplotlib.rc_context(STYLE):
        columns = 1 if len(sets) == 1 else 3  # of the legend
        height = 3.3 + 0.22 * -(-len(styles) // columns)
        figure = Figure(figsize=(5 * len(sets), height), layout='constrained', facecolor='white')
        for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
            plot_lines(axes, budgets([run for run in runs if run.get('data', '') == name]), styles)
            axes.set(title=name, xscale='log', xlabel=unit(runs), ylabel='class mean, %')
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axes.xaxis.set_minor_formatter(NullFormatter())
        handles = {label: handle for axes in figure.axes
                   for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=columns)
    return figure


def budgets(runs: Sequence[dict[str, str]]) -> dict[str, list[tuple[float, float]]]:
    """Method -> (cost or minutes, class mean) of each budget, in order of cost; both are means over seeds."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        cost = float(run['cost']) if 'cost' in run else float(run['seconds']) / 60
        point = cost, float(run['class_mean'])
        groups.setdefault(run['method'], {}).setdefault(run.get('epochs', ''), []).append(point)
    return {method: sorted(tuple(map(mean, zip(*points, strict=True))) for points in by_budget.values())
            for method, by_budget in groups.items()}


def unit(runs: Sequence[dict[str, str]]) -> str:
    """Unit of the budgets."""
    return 'cost in epochs of cross-entropy' if 'cost' in runs[0] else 'minutes'


def budget_table(runs: Sequence[dict[str, str]]) -> str:
    """Return a line per data set, method and budget: unit and class mean over the seeds."""
    sets = dict.fromkeys(run.get('data', '') for run in runs)
    rows = [('data', 'method', unit(runs), 'class mean')]
    for name in sets:
        for method, points in budgets([run for run in runs if run.get('data', '') == name]).items():
            rows += [(name, method, f'{cost:.3g}', f'{value:.2f}') for cost, value in points]
    return aligned(rows, left=2)


def plot_lines(axes: Axes, lines: dict[str, list[tuple[float, float]]], styles: dict[str, dict[str, str]]) -> None:
    """Plot the points of each method in its style, joined by a line."""
    for method, points in lines.items():
        axes.plot(*zip(*points, strict=True), **styles[method], markersize=5, label=method)


if __name__ == '__main__':
    sys.exit(run_script(main))
