"""The CSV of runs: its rows, the rows that are kept, and the command that repeats a run."""
import csv
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_command

from glmc.config import NOT_TRAINING, train_parser
from glmc.errors import InputError
from glmc.methods import METHODS
from glmc.sweep.runs import (
    BEST_ON_TEST,
    COLUMNS,
    Experiment,
    changed_options,
    check_table,
    copy_log,
    portable,
    read_runs,
    rerun_command,
    table_row,
    write_runs,
)

OLD = 'run,seed,top1,top5\nfirst,0,1.5,9\nsecond,0,2.5,8\n'
RECIPE = 'imbalance_factor: 20.0\nconsistency_weight: 4.0\nlr: 0.01\n'


@pytest.fixture
def finished(tmp_path):
    """Make the folder of a finished run: an Experiment and its metrics."""
    def make(name='one', seed=0, options=(), holdout=None, **metrics):
        recipe = tmp_path / 'one.yaml'
        recipe.write_text(RECIPE)
        run = Experiment(name, seed, str(recipe), ('--config', str(recipe), *options), tmp_path / f'{name}-seed{seed}')
        (run.folder / 'export').mkdir(parents=True)
        facts = dict(method='glmc', model='resnet18', parameters=7, top1=50.0, seed=seed, device='a card', threads=2,
                     command='/usr/bin/train_glmc.py --output /here', evaluated_on='/lists/test.txt', train_counts=[9, 4],
                     per_class_accuracy=[60.0, 40.0], bin_images=[2], bin_confidence=[0.5], bin_hits=[1],
                     shot_thresholds=[20, 100], **metrics)
        (run.folder / 'export' / 'metrics.json').write_text(json.dumps(facts))
        (run.folder / 'args.yaml').write_text(yaml.safe_dump(dict(imbalance_factor=20.0, lt_split='cao', holdout=holdout)))
        (run.folder / 'summary.csv').write_text('epoch,eval_top1\n0,\n1,52.5\n2,\n3,50.0\n')
        run.log.write_text('Exported to /home/me/output/one-seed0/export, 49/s (0.0 / 25.0)\n')
        return run, run.metrics()
    return make


def test_a_row_has_options_command_and_device_but_no_local_path(finished):
    run, metrics = finished(options=('--dataset', 'hfds//home/me/cifar100', '--consistency-weight', '2'))
    row = table_row(run, metrics)
    assert set(row) == set(COLUMNS) and row['device'] == 'a card' and row['imbalance_factor'] == 20.0
    assert (row['run'], row['seed'], row['top1'], row[BEST_ON_TEST], row['lt_split']) == ('one', 0, 50.0, 52.5, 'cao')
    assert (row['recipe'], row['options']) == ('PATH/TO/one.yaml', 'consistency_weight=2')
    assert row['command'] == ('OMP_NUM_THREADS=2 python train_glmc.py --config PATH/TO/one.yaml '
                               '--dataset hfds/PATH/TO/cifar100 --consistency-weight 2 --seed 0')
    assert row['evaluated_on'] == 'PATH/TO/test.txt' and row['log'] == 'PATH/TO/train.log'


@pytest.mark.parametrize('file, content', [
    ('export/metrics.json', '{"top1": 50'), ('export/metrics.json', '[]'), ('args.yaml', 'epochs: ['), ('args.yaml', '- 1'),
    ('args.yaml', 'epochs: many')])
def test_a_damaged_file_of_a_run_is_one_line(finished, file, content):
    run, metrics = finished()
    (run.folder / file).write_text(content)
    with pytest.raises(InputError, match=f'{run.folder / file}: ') as error:
        table_row(run, run.metrics())
    assert '\n' not in str(error.value)


def test_no_best_epoch_on_held_out_images(finished):
    assert table_row(*finished(holdout=0.1))[BEST_ON_TEST] is None


def test_a_row_without_imbalance_factor_has_no_lt_split(finished):
    run, metrics = finished()
    (run.folder / 'args.yaml').write_text('imbalance_factor: null\nlt_split: cao\nholdout: null\n')
    row = table_row(run, metrics)
    assert row['imbalance_factor'] is None and row['lt_split'] is None


@pytest.mark.parametrize('options, expected', [
    ((), ''), (('--consistency-weight', '4', '--workers', '9', '--data-dir', 'x', '--torchcompile'), ''),
    (('--method', 'ce', '--lr', '.1'), 'lr=0.1 method=ce'),
    (('--joint-forward', '--mean', '.5', '1'), 'joint_forward=true mean=0.5,1'),
    (('--method', 'cmo', '--model-kwargs', 'a=1', 'b=x'),
     'method=cmo model_kwargs=a:1,b:x')])
def test_only_changed_training_options_are_listed(finished, options, expected):
    assert changed_options(finished(options=options)[0]) == expected


def test_not_training_options_are_options():
    assert {action.dest for action in train_parser(METHODS)._actions} >= NOT_TRAINING


@pytest.mark.parametrize('text, expected', [
    ('hfds//work/data/cifar100', 'hfds/PATH/TO/cifar100'), ('/data', 'PATH/TO/data'),
    ('--data-dir=/a/b/', '--data-dir=PATH/TO/b'),
    ('../shared/data', '../shared/data'), ('hfds/../shared', 'hfds/../shared'), ('a/b', 'a/b'), ('49/s', '49/s'),
    ('https://host/a/b', 'https://host/a/b'), ('(0.0 / 25.0)', '(0.0 / 25.0)'), ('local-dir:/a/b', 'local-dir:PATH/TO/b'),
    ('torch/cifar100', 'torch/cifar100'), ('saved as /a/b/c.x, then', 'saved as PATH/TO/c.x, then')])
def test_only_absolute_paths_are_replaced(text, expected):
    assert portable(text) == expected


def test_other_rows_and_columns_are_kept(tmp_path):
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


@pytest.mark.parametrize('content', ['', 'name,kills\na,1\n', 'run,seed\na,0,7\n', 'run,seed\na,0\n'.encode('utf-16')])
def test_another_file_is_refused_and_unchanged(tmp_path, content):
    path = tmp_path / 'x.csv'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    for call in (lambda: check_table(path, []), lambda: write_runs(path, [{'run': 'a', 'seed': 0}])):
        with pytest.raises(InputError, match=r'x.csv: (expected|cannot be read as) a CSV of runs'):
            call()
    assert path.read_bytes() == before


def test_csv_files_under_results_are_readable():
    for name in ('digits', 'digits-variants', 'caltech99'):
        assert all(float(row['top1']) for row in read_runs(ROOT / 'results' / f'{name}.csv'))


def test_a_run_with_other_options_replaces_no_row(finished, tmp_path):
    run, metrics = finished(options=('--lr', '1'))
    write_runs(tmp_path / 'runs.csv', [table_row(run, metrics)])
    check_table(tmp_path / 'runs.csv', [run])
    other = Experiment(run.name, run.seed, run.recipe, ('--config', run.recipe, '--lr', '2'), run.folder)
    with pytest.raises(InputError, match="has a run one, seed 0, with options 'lr=1', this sweep has 'lr=2'"):
        check_table(tmp_path / 'runs.csv', [other])
    (tmp_path / 'old.csv').write_text('run,seed\none,0\n')
    check_table(tmp_path / 'old.csv', [other])  # that file has no column for them


def test_the_log_is_copied_to_the_path_in_the_row(finished, tmp_path):
    run, metrics = finished()
    copy = copy_log(run, tmp_path / 'logs')
    assert copy.read_text() == 'Exported to PATH/TO/export, 49/s (0.0 / 25.0)\n' and copy.name == 'one-seed0.log'
    assert table_row(run, metrics, Path('logs') / copy.name)['log'] == 'logs/one-seed0.log'


def test_the_command_is_quoted():
    run = Experiment('a', 1, None, ('--train-split', 'train & more'), None)
    assert rerun_command(run, None) == "python train_glmc.py --train-split 'train & more' --seed 1"


def test_the_command_of_a_row_repeats_the_run(tmp_path):
    """With the real scripts: run a sweep, then the command from its CSV in a shell."""
    options = ['--model', 'test_resnet', '--batch-size', '64', '--workers', '0', '--epochs', '1', '--no-report']
    table, logs = tmp_path / 'runs.csv', tmp_path / 'logs'
    done = run_command(
        sys.executable, '-m', 'glmc.sweep', '--output', tmp_path / 'out', '--csv', table, '--logs', logs, '--seeds', 3,
        '--vary', 'consistency_weight=2', '--', *options)
    assert done.code == 0, done.err
    with open(table, newline='', encoding='utf-8') as file:
        row, = csv.DictReader(file)
    assert row['options'] == 'consistency_weight=2 epochs=1 model=test_resnet'
    assert str(tmp_path) not in table.read_text() and row['device'] not in ('', 'cpu')
    assert 'Exported to' in (logs / 'consistency-weight=2-seed3.log').read_text()
    elsewhere = shlex.join(['--output', str(tmp_path), '--experiment', 'again'])
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    again = run_command('bash', '-c', f"{row['command']} {elsewhere}", PATH=path)
    assert again.code == 0, again.err
    metrics = json.loads((tmp_path / 'again' / 'export' / 'metrics.json').read_text())
    assert metrics['top1'] == float(row['top1']) and metrics['loss'] == json.loads(
        (tmp_path / 'out' / 'consistency-weight=2-seed3' / 'export' / 'metrics.json').read_text())['loss']
