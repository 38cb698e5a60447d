"""Plots over what a sweep has varied: one option as a curve, two as a heat map."""
import statistics

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from glmc.report.plots import INK, SERIES


def means_over(axes: Axes, values: dict[float, list[float]], label: str, figure: str) -> None:
    """Mean of each value of an option, with the standard deviation over the seeds; the option's values as ticks."""
    places = sorted(values)
    means = [statistics.mean(values[place]) for place in places]
    spread = [statistics.stdev(values[place]) if len(values[place]) > 1 else 0 for place in places]
    axes.errorbar(places, means, spread, color=SERIES[0], marker='o', markersize=5, capsize=3)
    axes.set(xlabel=label, ylabel=figure, xticks=places)


def heat_map(axes: Axes, values: dict[tuple[float, float], list[float]], across: str, down: str, figure: str) -> None:
    """Mean of each (row, column), written in its cell; a cell that was not run stays white."""
    rows, columns = (sorted({key[place] for key in values}) for place in (0, 1))
    cells = np.array([[statistics.mean(values.get((row, column), [np.nan])) for column in columns] for row in rows])
    colours = LinearSegmentedColormap.from_list('figure', ['#eef4fa', SERIES[0]])
    image = axes.imshow(cells, cmap=colours, origin='lower', aspect='auto')
    for (row, column), cell in np.ndenumerate(cells):
        if not np.isnan(cell):
            axes.text(column, row, f'{cell:.1f}', ha='center', va='center', color=INK)
    axes.grid(False)
    axes.set(xlabel=across, ylabel=down, xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)),
             yticklabels=rows)
    axes.figure.colorbar(image, ax=axes, label=figure).outline.set_visible(False)
