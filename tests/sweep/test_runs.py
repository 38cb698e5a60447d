"""The table of runs: what a line says, which lines stay, and that its command gives the run again."""
import csv
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_command

from glmc.config import train_parser
from glmc.errors import InputError
from glmc.methods import METHODS
from glmc.sweep.runs import (
    BEST,
    COLUMNS,
    Experiment,
    changed_options,
    check_table,
    command,
    keep_log,
    line_of,
    portable,
    read_runs,
    write_runs,
)

OLD = 'run,seed,top1,top5\nfirst,0,1.5,9\nsecond,0,2.5,8\n'
RECIPE = 'imbalance_factor: 20.0\nconsistency_weight: 4.0\nlr: 0.01\n'


@pytest.fixture
def finished(tmp_path):
    """A finished run as train_glmc.py leaves it: an Experiment and its metrics."""
    def make(name='one', seed=0, options=(), holdout=None, **metrics):
        recipe = tmp_path / 'one.yaml'
        recipe.write_text(RECIPE)
        run = Experiment(name, seed, str(recipe), ('--config', str(recipe), *options), tmp_path / f'{name}-seed{seed}')
        (run.folder / 'export').mkdir(parents=True)
        facts = dict(method='glmc', model='resnet18', parameters=7, top1=50.0, seed=seed, device='a card', threads=2,
                     command='/usr/bin/train_glmc.py --output /here', evaluated_on='/lists/test.txt', **metrics)
        (run.folder / 'export' / 'metrics.json').write_text(json.dumps(facts))
        (run.folder / 'args.yaml').write_text(yaml.safe_dump(dict(imbalance_factor=20.0, lt_split='cao', holdout=holdout)))
        (run.folder / 'summary.csv').write_text('epoch,eval_top1\n0,\n1,52.5\n2,\n3,50.0\n')
        run.log.write_text('Exported to /home/me/output/one-seed0/export, 49/s (0.0 / 25.0)\n')
        return run, run.metrics()
    return make


def test_a_line_says_what_was_run_and_where_and_no_path_of_this_machine(finished):
    run, metrics = finished(options=('--dataset', 'hfds//home/me/cifar100', '--consistency-weight', '2'))
    line = line_of(run, metrics)
    assert set(line) == set(COLUMNS) and line['device'] == 'a card' and line['imbalance_factor'] == 20.0
    assert (line['run'], line['seed'], line['top1'], line[BEST], line['lt_split']) == ('one', 0, 50.0, 52.5, 'cao')
    assert (line['recipe'], line['options']) == ('PATH/TO/one.yaml', 'consistency_weight=2')
    assert line['command'] == ('OMP_NUM_THREADS=2 python train_glmc.py --config PATH/TO/one.yaml '
                               '--dataset hfds/PATH/TO/cifar100 --consistency-weight 2 --seed 0')
    assert line['evaluated_on'] == 'PATH/TO/test.txt' and line['log'] == 'PATH/TO/train.log'


def test_no_best_epoch_of_images_that_were_held_out(finished):
    assert line_of(*finished(holdout=0.1))[BEST] is None


def test_a_line_without_a_long_tail_names_no_split(finished):
    run, metrics = finished()
    (run.folder / 'args.yaml').write_text('imbalance_factor: null\nlt_split: cao\nholdout: null\n')
    line = line_of(run, metrics)
    assert line['imbalance_factor'] is None and line['lt_split'] is None


@pytest.mark.parametrize('options, expected', [
    ((), ''), (('--consistency-weight', '4', '--workers', '9', '--data-dir', 'x', '--torchcompile'), ''),
    (('--method', 'ce', '--lr', '.1'), 'lr=0.1 method=ce'),
    (('--joint-forward', '--mean', '.5', '1'), 'joint_forward=true mean=0.5,1'),
    (('--method', 'cmo', '--model-kwargs', 'a=1', 'b=x'),
     'method=cmo model_kwargs=a:1,b:x')])
def test_options_are_those_that_train_something_else(finished, options, expected):
    assert changed_options(finished(options=options)[0]) == expected


def test_places_are_options():
    from glmc.sweep.runs import PLACES
    assert {action.dest for action in train_parser(METHODS)._actions} >= PLACES


@pytest.mark.parametrize('text, expected', [
    ('hfds//work/data/cifar100', 'hfds/PATH/TO/cifar100'), ('/data', 'PATH/TO/data'),
    ('--data-dir=/a/b/', '--data-dir=PATH/TO/b'),
    ('../shared/data', '../shared/data'), ('hfds/../shared', 'hfds/../shared'), ('a/b', 'a/b'), ('49/s', '49/s'),
    ('https://host/a/b', 'https://host/a/b'), ('(0.0 / 25.0)', '(0.0 / 25.0)'), ('local-dir:/a/b', 'local-dir:PATH/TO/b'),
    ('torch/cifar100', 'torch/cifar100'), ('saved as /a/b/c.x, then', 'saved as PATH/TO/c.x, then')])
def test_absolute_paths_only(text, expected):
    assert portable(text) == expected


def test_other_lines_and_columns_stay(tmp_path):
    path = tmp_path / 'sub' / 'runs.csv'
    path.parent.mkdir()
    path.write_text(OLD)
    write_runs(path, [{'run': 'second', 'seed': 0, 'top1': 3.5, 'options': 'lr=1'},
                      {'run': 'second', 'seed': 1, 'top1': None}])
    rows = read_runs(path)
    assert list(rows[0]) == [*COLUMNS, 'top5']
    assert [[row[name] for name in ('run', 'seed', 'top1', 'top5', 'options')] for row in rows] == [
        ['first', '0', '1.5', '9', ''], ['second', '0', '3.5', '', 'lr=1'], ['second', '1', '', '', '']]
    write_runs(path, [])
    assert read_runs(path) == rows and [file.name for file in path.parent.iterdir()] == ['runs.csv']


@pytest.mark.parametrize('content', ['', 'name,kills\na,1\n', 'run,seed\na,0,7\n', b'run,seed\n\xff\xfe,0\n'])
def test_what_is_no_table_of_runs_is_left_alone(tmp_path, content):
    path = tmp_path / 'x.csv'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    for touch in (lambda: check_table(path, []), lambda: write_runs(path, [{'run': 'a', 'seed': 0}])):
        with pytest.raises(InputError, match='x.csv: expected a table of runs'):
            touch()
    assert path.read_bytes() == before


def test_tables_under_results_can_be_read():
    for name in ('digits', 'digits-variants', 'caltech99'):
        assert all(float(row['top1']) for row in read_runs(ROOT / 'results' / f'{name}.csv'))


def test_a_run_by_other_options_takes_no_line_away(finished, tmp_path):
    run, metrics = finished(options=('--lr', '1'))
    write_runs(tmp_path / 'runs.csv', [line_of(run, metrics)])
    check_table(tmp_path / 'runs.csv', [run])
    other = Experiment(run.name, run.seed, run.recipe, ('--config', run.recipe, '--lr', '2'), run.folder)
    with pytest.raises(InputError, match="has a run one, seed 0, with options 'lr=1', this sweep has 'lr=2'"):
        check_table(tmp_path / 'runs.csv', [other])
    (tmp_path / 'old.csv').write_text('run,seed\none,0\n')
    check_table(tmp_path / 'old.csv', [other])  # that file does not say


def test_the_log_is_kept_under_the_name_in_the_table(finished, tmp_path):
    run, metrics = finished()
    kept = keep_log(run, tmp_path / 'logs')
    assert kept.read_text() == 'Exported to PATH/TO/export, 49/s (0.0 / 25.0)\n' and kept.name == 'one-seed0.log'
    assert line_of(run, metrics, Path('logs') / kept.name)['log'] == 'logs/one-seed0.log'


def test_the_command_is_quoted():
    run = Experiment('a', 1, None, ('--train-split', 'train & more'), None)
    assert command(run, None) == "python train_glmc.py --train-split 'train & more' --seed 1"


def test_a_pasted_command_gives_the_run_again(tmp_path):
    """By the real scripts: a sweep, its table, and what stands there in a shell."""
    options = ['--model', 'test_resnet', '--batch-size', '64', '--workers', '0', '--epochs', '1', '--no-report']
    table, logs = tmp_path / 'runs.csv', tmp_path / 'logs'
    done = run_command(
        sys.executable, '-m', 'glmc.sweep', '--output', tmp_path / 'out', '--csv', table, '--logs', logs, '--seeds', 3,
        '--vary', 'consistency_weight=2', '--', *options)
    assert done.code == 0, done.err
    with open(table, newline='', encoding='utf-8') as file:
        line, = csv.DictReader(file)
    assert line['options'] == 'consistency_weight=2 epochs=1 model=test_resnet'
    assert str(tmp_path) not in table.read_text() and line['device'] not in ('', 'cpu')
    assert 'Exported to' in (logs / 'consistency-weight=2-seed3.log').read_text()
    elsewhere = shlex.join(['--output', str(tmp_path), '--experiment', 'again'])
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    again = run_command('bash', '-c', f"{line['command']} {elsewhere}", PATH=path)
    assert again.code == 0, again.err
    metrics = json.loads((tmp_path / 'again' / 'export' / 'metrics.json').read_text())
    assert metrics['top1'] == float(line['top1']) and metrics['loss'] == json.loads(
        (tmp_path / 'out' / 'consistency-weight=2-seed3' / 'export' / 'metrics.json').read_text())['loss']
