"""The plot of a CSV of runs: mean over seeds, one line per method, one plot per data set."""
import sys

import pytest
from PIL import Image

from glmc.cli import run_script
from glmc.sweep import plot
from glmc.sweep.plot import budgets, plot_runs
from glmc.sweep.runs import read_runs, write_runs

RUNS = [dict(run=f'{data}-{method}-{epochs}', seed=seed, data=data, method=method, epochs=epochs,
             seconds=60 * epochs, class_mean=80 + epochs + seed)
        for data in ('photos', 'cifar') for method in ('ce', 'glmc') for epochs in (10, 1) for seed in (0, 2)]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / 'runs.csv'
    write_runs(path, RUNS)
    return path


def test_points_are_means_over_seeds_in_order_of_time(table):
    runs = [run for run in read_runs(table) if run['data'] == 'photos']
    assert budgets(runs) == {'ce': [(1, 82), (10, 91)], 'glmc': [(1, 82), (10, 91)]}


def test_a_cost_comes_before_the_time(tmp_path):
    path = tmp_path / 'runs.csv'
    write_runs(path, [{**run, 'cost': 3 * run['epochs']} for run in RUNS])
    runs = read_runs(path)
    assert budgets(runs[:8])['ce'] == [(3, 82), (30, 91)]
    assert plot_runs(runs).axes[0].get_xlabel() == 'cost in epochs of cross-entropy'


def test_each_data_set_has_a_plot_and_each_method_a_colour(table):
    figure = plot_runs(read_runs(table))
    assert [axes.get_title() for axes in figure.axes] == ['photos', 'cifar']
    for axes in figure.axes:
        ce, glmc = axes.get_lines()
        assert list(ce.get_ydata()) == [82, 91] and ce.get_color() != glmc.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['ce', 'glmc']


def test_the_command_writes_a_picture_beside_the_table(table, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['plot', str(table)])
    assert run_script(plot.main) == 0
    assert Image.open(table.with_suffix('.png')).width > 500
    lines = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == ['data method minutes class mean', 'photos ce 1 82.00', 'photos ce 10 91.00']
    table.write_text('run,seed,class_mean\na,0,1\n')
    assert run_script(plot.main) == 2
    assert 'columns method, class_mean and cost or seconds' in capsys.readouterr().err
