"""The Markdown table of a CSV of runs: groups, means, and the block of the page that it replaces."""
import shutil
import statistics
import sys

import pytest
from conftest import ROOT

from glmc.cli import run_script
from glmc.errors import InputError
from glmc.sweep import tables
from glmc.sweep.runs import BEST_ON_TEST, read_runs, write_runs
from glmc.sweep.tables import PUBLISHED, markdown_table, write_table

MARKER = '<!-- table: x -->'


@pytest.fixture
def rows_of(tmp_path):
    """Runs -> rows of their table as column -> cell, by way of a CSV file."""
    def make(*runs: dict) -> list[dict]:
        path = tmp_path / 'x.csv'
        write_runs(path, [dict(run=f"{run['recipe']}-{number}", epochs=200, precision='no', fingerprint='abcdefgh12', **run)
                          for number, run in enumerate(runs)])
        table = markdown_table(read_runs(path))
        lines = [line.removeprefix('| ').removesuffix(' |').split(' | ') for line in table.splitlines()]
        assert lines[1] == ['---'] * len(lines[0])
        return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    return make


def test_mean_and_deviation_over_seeds(rows_of):
    values = [50.0, 52.0, 51.5]
    runs = [{'recipe': 'hparams/cifar100_lt_if100.yaml', 'seed': seed, 'top1': top1, BEST_ON_TEST: top1 + 1, 'many': 70.0}
            for seed, top1 in enumerate(values)]
    row, = rows_of(*runs, {**runs[0], 'top1': 99.0})  # a seed counts once
    assert row == {
        'recipe': 'cifar100_lt_if100', 'options': '', 'published': '55.88 / 57.97',
        'top-1, last epoch': f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}', 'many': '70.00 ± 0.00',
        'medium': '–', 'few': '–',
        tables.COLUMNS[BEST_ON_TEST]: f'{statistics.mean(values) + 1:.2f} ± {statistics.stdev(values):.2f}', 'seeds': '3',
        'conditions': '200 epochs, float32, images abcdefgh'}


@pytest.mark.parametrize('change', [
    {'recipe': 'other.yaml'}, {'options': 'method=ce'}, {'epochs': 100}, {'precision': 'bf16'}, {'fingerprint': 'other'}])
def test_runs_that_differ_in_more_than_their_seed_have_their_own_rows(change):
    base = dict(run='a', recipe='one.yaml', options='', epochs='200', precision='no', fingerprint='abc', top1='50')
    runs = [{**base, 'seed': '0'}, {**base, 'seed': '1', **{name: str(value) for name, value in change.items()}}]
    assert len(markdown_table(runs).splitlines()) == 4


def test_options_are_shown_without_those_of_the_conditions(rows_of):
    row, = rows_of({'recipe': 'hparams/cifar100_lt_if100.yaml', 'seed': 0, 'top1': 40.0,
                    'options': 'amp_dtype=bfloat16 epochs=200 method=ce'})
    assert (row['options'], row['published']) == ('`method=ce`', '38.3')


def test_published_numbers_are_those_of_the_recipes():
    for (recipe, options), numbers in PUBLISHED.items():
        header = (ROOT / 'hparams' / f'{recipe}.yaml').read_text(encoding='utf-8')
        assert options or all(number in header for number in numbers.split(' (')[0].split(' / '))


@pytest.mark.parametrize('text', [
    'no marker', f'{MARKER}\n', '<!-- table: y -->\n<!-- end -->', f'{MARKER}\n<!-- table: y -->\n<!-- end -->',
    f'{MARKER}\n<!-- end -->\n{MARKER}\n<!-- end -->\n'])
def test_a_page_without_exactly_one_block_is_refused_and_unchanged(tmp_path, text):
    (tmp_path / 'README.md').write_text(text)
    with pytest.raises(InputError, match='README.md: found . tables between `<!-- table: x -->` and `<!-- end -->`'):
        write_table(tmp_path / 'README.md', 'x', 'table')
    assert (tmp_path / 'README.md').read_text() == text


def test_only_the_block_is_replaced(tmp_path, monkeypatch, capsys):
    blocks = '<!-- table: y -->\nkept\n<!-- end -->\nbefore\n{}\n<!-- end -->\nafter\n'
    (tmp_path / 'README.md').write_text(blocks.format(f'{MARKER}\nold'))
    write_runs(tmp_path / 'x.csv', [dict(run='a', seed=0, top1=50.0)])
    monkeypatch.setattr(sys, 'argv', ['tables', str(tmp_path / 'x.csv')])
    table = markdown_table(read_runs(tmp_path / 'x.csv'))
    for _ in range(2):
        assert run_script(tables.main) == 0
        assert (tmp_path / 'README.md').read_text() == blocks.format(f'{MARKER}\n\n{table}\n')
    assert 'README.md: table of' in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {'README.md', 'x.csv'}


def test_a_missing_page_is_one_line(tmp_path, monkeypatch, capsys):
    write_runs(tmp_path / 'x.csv', [])
    monkeypatch.setattr(sys, 'argv', ['tables', str(tmp_path / 'x.csv')])
    assert run_script(tables.main) == 2 and 'README.md: cannot be read: No such file' in capsys.readouterr().err


def test_the_page_under_results_has_the_table_of_its_csv(tmp_path):
    shutil.copy(ROOT / 'results' / 'README.md', tmp_path)
    write_table(tmp_path / 'README.md', 'cifar100-lt', markdown_table(read_runs(ROOT / 'results' / 'cifar100-lt.csv')))
    assert (tmp_path / 'README.md').read_text() == (ROOT / 'results' / 'README.md').read_text()
