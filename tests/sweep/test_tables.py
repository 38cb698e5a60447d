"""Tables and plots out of a table of runs: what is averaged, what is not yet run, and the commands that fill them."""
import re
import shlex
import shutil
import statistics
import sys

import pytest
from conftest import ROOT
from PIL import Image

from glmc.cli import parse_args, run_script
from glmc.config import train_parser
from glmc.errors import InputError
from glmc.methods import METHODS
from glmc.sweep import paper, tables
from glmc.sweep.__main__ import check, parse_sweep, plan
from glmc.sweep.groups import find_groups, matches
from glmc.sweep.paper import CONSISTENCY, POWERS, TABLES, Setting
from glmc.sweep.runs import BEST, read_runs, what_is_run, write_runs
from glmc.sweep.tables import NOTHING, make_tables, write_tables

COMMAND = re.compile(r'^\| ([^|]+) \| `(python -m glmc\.sweep [^`]+)` \| (\d+) \|$', re.M)


def run(recipe='cifar100_lt_if100', options='', seed=0, top1=50.0, **facts) -> dict:
    """A line as the sweep writes it."""
    return dict(run=f'{recipe}-{options}', seed=seed, recipe=f'hparams/{recipe}.yaml', options=options, top1=top1, many=70.0,
                medium=50.0, few=None, epochs=200, precision='no', fingerprint='abcdefgh12', **facts)


@pytest.fixture
def tables_of(tmp_path):
    """Lines of runs -> name of a table -> its rows as lists of cells, by way of a file."""
    def make(*lines) -> dict:
        write_runs(tmp_path / 'x.csv', lines)
        made = make_tables(read_runs(tmp_path / 'x.csv'), 'x')
        return {name: [line.strip('| ').split(' | ') for line in text.splitlines()] for name, text in made.items()}
    return make


def test_mean_over_seeds_best_epoch_apart_and_what_is_missing(tables_of):
    values = [50.0, 52.0, 51.5]
    head, _, if100, if50, _ = tables_of(*(run(seed=k, top1=v, **{BEST: v + 1}) for k, v in enumerate(values)))['main']
    row = dict(zip(head, if100, strict=True))
    assert row['top-1, last epoch'] == f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}'
    assert row[tables.PEEK] == f'{statistics.mean(values) + 1:.2f} ± {statistics.stdev(values):.2f}'
    assert 'no result' in tables.PEEK
    assert (row['paper'], row['few'], row['seeds']) == ('55.88', '–', '3')
    assert row['how'] == '200 epochs, float32, images abcdefgh'
    assert if50[:4] == ['IF = 50', '61.08', '63.78', 'not yet run'] and not ''.join(if50[4:]).strip(' |')


def test_nothing_run_is_one_line(tables_of):
    assert all(rows == [[NOTHING]] for rows in tables_of().values())


def test_other_conditions_have_rows_of_their_own_and_other_options_none(tables_of):
    short, half = {**run(top1=9.0), 'epochs': 1, 'options': 'epochs=1'}, {**run(top1=60.0), 'precision': 'bf16'}
    half['options'] = 'amp_dtype=bfloat16'
    lines = [short, run(top1=50.0), {**half, 'run': 'half'}, {**run(options='lr=0.1', top1=1.0)}]
    lines[0]['run'] = 'short'
    rows = tables_of(*lines)['main'][2:]
    assert [(row[3], row[-1]) for row in rows[:3]] == [
        ('50.00', '200 epochs, float32, images abcdefgh'), ('60.00', '200 epochs, bfloat16, images abcdefgh'),
        ('9.00', '1 epochs, float32, images abcdefgh')]


def test_a_seed_counts_once():
    lines = [run(top1=50.0), {**run(top1=70.0), 'run': 'again'}]
    group, = find_groups([{name: str(value) for name, value in line.items()} for line in lines], Setting('x'))
    assert group.values('top1') == [50.0]


def test_gain_is_seed_by_seed_against_the_same_conditions(tables_of):
    runs = (('', 0, 50.0, 200), ('', 1, 54.0, 200), ('', 2, 90.0, 200), (' sam_rho=0.05', 0, 51.0, 200),
            (' sam_rho=0.05', 1, 53.0, 200), (' swa_start=0.6', 0, 51.0, 100), (' lr=0.1', 1, 52.5, 200))
    held = [{**run(options=f'holdout=50{options}', seed=seed, top1=top1), 'epochs': epochs}
            for options, seed, top1, epochs in runs]
    rows = {row[0]: row for row in tables_of(*held)['levers']}
    assert rows['`--sam-rho 0.05`'][5] == f'0.00 ± {statistics.stdev([1.0, -1.0]):.2f}'
    assert rows['`--swa-start 0.6`'][5] == '–' and rows['the recipe'][5] == '–'
    assert rows['`holdout=50 lr=0.1`'][5] == '-1.50' and rows['`--lr 0.02`'][1] == 'not yet run'


def test_the_base_stands_in_every_table_it_belongs_to(tables_of):
    found = tables_of(run(top1=50.0), run(options='consistency_weight=2', top1=40.0),
                      run(options='reweight_power=0', top1=30.0))
    assert {row[0]: row[1] for row in found['consistency'] if row[0].startswith('γ')} == {
        f'γ = {gamma}': {4: '50.00', 2: '40.00'}.get(gamma, 'not yet run') for gamma in CONSISTENCY}
    powers = {row[0]: row[1:] for row in found['powers']}
    assert powers['k = 1.2'][0] == '50.00' and powers['k = 0'] == ['30.00', *['not yet run'] * 4]
    assert found['ablation'][5][:3] == ['both: GLMC', '55.88', '50.00']
    assert found['levers'] == [[NOTHING]], 'settings of other tables are no levers'


def test_the_base_is_the_recipe():
    args, _ = parse_args(train_parser(METHODS), ['-c', str(ROOT / 'hparams' / f'{paper.IF100}.yaml')])
    assert {name: getattr(args, name) for name in paper.BASE} == paper.BASE


def test_published_numbers_are_those_of_the_recipes():
    for setting in (*TABLES['main'].settings, *TABLES['narrow'].settings):
        text = (ROOT / 'hparams' / f'{setting.recipe}.yaml').read_text(encoding='utf-8')
        assert all(number == '–' or number.split()[0] in text for number in setting.published)
    assert [setting.published for setting in TABLES['ablation'].settings] == [('38.3',), ('44.63',), ('50.11',), ('55.88',)]


@pytest.mark.parametrize('text', ['no marker', '<!-- table: main -->\n', '<!-- table: man -->\n<!-- end -->',
                                  '<!-- table: main -->\n<!-- table: levers -->\n<!-- end -->'])
def test_a_page_without_its_markers_is_left_alone(tmp_path, text):
    (tmp_path / 'README.md').write_text(text)
    with pytest.raises(InputError, match='expected `<!-- table: NAME -->` and `<!-- end -->` around each of main'):
        write_tables(tmp_path / 'README.md', make_tables([], 'x'))
    assert (tmp_path / 'README.md').read_text() == text


def test_the_page_and_the_plots(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / 'results' / 'README.md', tmp_path)
    lines = [run(options='' if gamma == 4 else f'consistency_weight={gamma}', seed=seed, top1=40 + gamma + seed)
             for gamma in (0, 4, 15) for seed in (0, 1)]
    lines += [run(options=f'reweight_power={k} resample_power={q}', top1=45 + 3 * k - q) for k in (0, 0.8) for q in (0.2, 1)]
    write_runs(tmp_path / 'lt.csv', [*lines, run('my_recipe')])
    monkeypatch.setattr(sys, 'argv', ['tables', str(tmp_path / 'lt.csv')])
    texts = []
    for _ in range(2):
        assert run_script(tables.main) == 0
        texts.append((tmp_path / 'README.md').read_text())
    assert texts[0] == texts[1] and '![Top-1 over the consistency weight](lt-consistency.png)' in texts[0]
    before = (ROOT / 'results' / 'README.md').read_text()
    for mark, part in (('<!-- table', 0), ('<!-- end', -1)):
        assert before.split(mark)[part] == texts[0].split(mark)[part]
    assert '1 of them are in no table: my_recipe-, seed 0' in capsys.readouterr().err
    assert all(min(Image.open(tmp_path / f'lt-{name}.png').size) > 300 for name in ('consistency', 'powers'))


def test_the_page_under_results_is_what_its_table_gives(tmp_path):
    shutil.copy(ROOT / 'results' / 'README.md', tmp_path)
    write_tables(tmp_path / 'README.md', make_tables(read_runs(ROOT / 'results' / 'cifar100-lt.csv'), 'cifar100-lt'))
    assert (tmp_path / 'README.md').read_text() == (ROOT / 'results' / 'README.md').read_text()


# --- the commands that fill the tables ---


@pytest.fixture(scope='module')
def planned():
    """Name in the documentation -> (runs it says, what its command plans)."""
    found = {}
    for name, command, number in COMMAND.findall((ROOT / 'docs' / 'recipes-and-results.md').read_text(encoding='utf-8')):
        args, passed_on = parse_sweep(shlex.split(command)[3:])
        found[name] = int(number), plan(args, passed_on), args
    return found


@pytest.fixture
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_each_command_plans_the_runs_it_says(planned, root):
    assert len(planned) == len(TABLES) + 2  # and the powers, and cross-entropy beside the narrow net
    for number, experiments, args in planned.values():
        assert len(experiments) == number and args.csv == 'results/cifar100-lt.csv' and args.logs == 'results/logs'
        check(experiments[0])
        check(experiments[-1])
    folders = [experiment.folder for _, experiments, _ in planned.values() for experiment in experiments]
    assert len(set(folders)) == len(folders), 'no run by two commands'


def test_every_row_of_every_table_is_run_by_a_command(planned, root):
    lines = {}
    for _, experiments, _ in planned.values():
        for experiment in experiments:
            lines.setdefault(experiment.name, what_is_run(experiment))
    settings = [s for listing in TABLES.values() for s in listing.rows] + list(POWERS.values())
    missing = [setting for setting in settings if not any(matches(line, setting) for line in lines.values())]
    assert not missing
    idle = [name for name, line in lines.items() if not any(matches(line, setting) for setting in settings)]
    assert not idle, 'runs that no table shows'
