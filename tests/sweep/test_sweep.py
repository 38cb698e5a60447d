"""Sweeps: planned, parallel and repeated runs, reported failures, the table and the CSV."""
import csv
import json
import re
import shlex
import statistics
import sys

import pytest
from conftest import ROOT, TINY, Outcome

from glmc.cli import run_script
from glmc.errors import InputError
from glmc.sweep.__main__ import as_flags, check, main, mean_std, parse_sweep, plan, results_table
from glmc.sweep.runs import Experiment


@pytest.fixture
def sweep(monkeypatch, capfd):
    """Run a sweep in this process: options of the sweep and of the runs -> exit code and output."""
    def run(output, *options, run_options=tuple(TINY)) -> Outcome:
        monkeypatch.setattr(sys, 'argv', ['sweep', '--output', *map(str, (output, *options)), '--', *run_options])
        monkeypatch.setenv('OMP_NUM_THREADS', '1')
        try:
            code = run_script(main)
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capfd.readouterr())
    return run


def planned(output, *options) -> list[Experiment]:
    return plan(*parse_sweep(['--output', str(output), *options]))


def metrics_of(folder) -> dict:
    return json.loads((folder / 'export' / 'metrics.json').read_text())


def test_parallel_runs_and_the_same_sweep_again(tmp_path, sweep):
    first = sweep(tmp_path, '--seeds', '0', '1', '--jobs', '3', '--vary', 'model=test_resnet')
    assert first.code == 0, first.err
    name = 'model=test_resnet'
    folders = [tmp_path / f'{name}-seed{seed}' for seed in (0, 1)]
    assert first.out.index(f'started   {folders[1]}') < first.out.index('finished  ')
    top1 = [metrics_of(folder)['top1'] for folder in folders]
    expected = f'{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}'
    assert expected in first.out and f'finished  {folders[0]}: top-1 {top1[0]:.2f}' in first.out
    assert [metrics_of(folder)['seed'] for folder in folders] == [0, 1]
    assert all('Exported to' in (folder / 'train.log').read_text() for folder in folders)

    written = [(folder / 'export' / 'metrics.json').stat().st_mtime_ns for folder in folders]
    (tmp_path / 'model=no_such_net-seed0').mkdir()  # an empty folder is accepted
    again = sweep(tmp_path, '--seeds', '0', '--vary', 'model=no_such_net,test_resnet')
    assert again.code == 1 and '1 of 2 runs have no result' in again.err
    assert f"failed    {tmp_path / 'model=no_such_net-seed0'}: error: --model no_such_net: not a model of timm" in again.err
    assert '\nmodel=test_resnet ' in again.out and f'started   {folders[0]}' not in again.out

    skipped = sweep(tmp_path, '--seeds', '0', '1', '--vary', 'model=test_resnet')
    assert skipped.code == 0 and 'Runs: 2, already finished: 2' in skipped.out and expected in skipped.out
    assert 'started' not in skipped.out
    assert written == [(folder / 'export' / 'metrics.json').stat().st_mtime_ns for folder in folders]
    with open(tmp_path / 'sweep.csv', newline='', encoding='utf-8') as file:
        rows = [(row['run'], row['seed'], float(row['top1'])) for row in csv.DictReader(file)]
    assert rows == [(name, '0', top1[0]), (name, '1', top1[1])]


def test_a_folder_of_a_run_with_other_options_is_refused(tmp_path):
    experiment, = planned(tmp_path, '--', '--epochs', '2')
    experiment.folder.mkdir()
    (experiment.folder / 'args.yaml').write_text('epochs: 1\nseed: 0\n')
    with pytest.raises(InputError, match='holds a run with --epochs 1, this sweep has 2'):
        check(experiment)
    (experiment.folder / 'args.yaml').write_text('epochs: 2\nseed: 0\nimg_size: 32\nworkers: 7\n')
    check(experiment)  # the demonstration sets its own size; workers change no result


def test_recipes_cross_options_cross_seeds(tmp_path):
    experiments = planned(tmp_path, '--recipes', 'a/one.yaml', 'two.yaml', '--vary', 'method=ce,glmc', '--vary',
                          'shot_thresholds=5 50', '--seeds', '3', '4', '--', '--lr', '0.1')
    assert [e.folder.name for e in experiments[:3]] == [
        'one-method=ce-shot-thresholds=5_50-seed3', 'one-method=ce-shot-thresholds=5_50-seed4',
        'one-method=glmc-shot-thresholds=5_50-seed3']
    assert len({e.folder for e in experiments}) == 8
    assert experiments[-1].argv == [
        '--config', 'two.yaml', '--lr', '0.1', '--method', 'glmc', '--shot-thresholds', '5', '50', '--seed', '4',
        '--output', str(tmp_path), '--experiment', experiments[-1].folder.name, '--resume', 'auto']


def test_each_is_varied_alone(tmp_path):
    experiments = planned(tmp_path, '--vary', 'method=ce,glmc', '--each', 'joint_forward=true', 'lr=0.1,0.2')
    assert [e.name.removeprefix('method=') for e in experiments] == [
        'ce-joint-forward=true', 'ce-lr=0.1', 'ce-lr=0.2', 'glmc-joint-forward=true', 'glmc-lr=0.1', 'glmc-lr=0.2']
    assert experiments[0].options == ('--method', 'ce', '--joint-forward')


@pytest.mark.parametrize('option, value, flags', [
    ('lr', '0.1', ['--lr', '0.1']), ('joint-forward', 'true', ['--joint-forward']), ('joint-forward', 'false', []),
    ('channels-last', 'false', ['--no-channels-last']), ('channels-last', 'true', ['--channels-last'])])
def test_switches_are_varied_by_true_and_false(option, value, flags):
    assert as_flags(option, value) == flags


@pytest.mark.parametrize('options, match', [
    (['--vary', 'lr'], '--vary lr: expected OPTION=VALUE,VALUE'),
    (['--each', 'lr'], '--each lr: expected OPTION=VALUE,VALUE'),
    (['--vary', 'lr=1,,2'], 'expected OPTION=VALUE,VALUE'),
    (['--vary', 'joint-forward=yes'], 'a switch, expected true or false'),
    (['--recipes', 'a/x.yaml', 'b/x.yaml'], 'two runs would share this folder'),
    (['--seeds', '1', '1'], 'two runs would share this folder'),
    (['--sees', '1'], 'unrecognized arguments: --sees'),
    (['--', '--seed', '1'], '--seed: the sweep sets it by --recipes, --seeds or --output'),
    (['--', '-c', 'x.yaml'], '-c: the sweep sets it by')])
def test_wrong_sweeps(tmp_path, options, match):
    with pytest.raises(InputError, match=match):
        planned(tmp_path, *options)


def test_wrong_options_of_the_runs_are_reported_before_any_starts(tmp_path, sweep):
    outcome = sweep(tmp_path / 'runs', '--vary', 'methd=ce,glmc', run_options=())
    assert outcome.code == 2 and outcome.err == 'error: --methd: unknown option; did you mean --method?\n'
    assert not (tmp_path / 'runs').exists()


def test_mean_and_standard_deviation():
    assert mean_std([1.0, 2.0, 4.0]) == '2.33 ± 1.53' and mean_std([5.0]) == '5.00' and mean_std([None, 1.0]) == '–'


def test_table_of_made_up_results(tmp_path):
    def result(name, seed, top1):
        metrics = dict(method='ce', top1=top1, many=1.0, medium=None, few=0.5, class_mean=2.0)
        return Experiment(name, seed, None, (), tmp_path), metrics
    head, a, b = results_table([result('a', 0, 10.0), result('a', 1, 20.0), result('b', 0, 7.0)]).splitlines()
    assert head.split() == ['run', 'method', 'seeds', 'top-1', 'many', 'medium', 'few', 'class', 'mean']
    assert a.split('  ')[0] == 'a' and '15.00 ± 7.07' in a and '–' in a and b.split()[2:4] == ['1', '7.00']


def test_an_unusable_csv_is_reported_before_any_run(tmp_path, sweep):
    (tmp_path / 'kills.csv').write_text('configuration,kills\na,1\n')
    outcome = sweep(tmp_path / 'runs', '--csv', tmp_path / 'kills.csv')
    assert outcome.code == 2 and 'kills.csv: expected a CSV of runs, with columns run and seed' in outcome.err
    assert not (tmp_path / 'runs').exists() and (tmp_path / 'kills.csv').read_text() == 'configuration,kills\na,1\n'


def test_documented_sweeps_plan_the_runs_they_say(monkeypatch):
    """Rows of `| name | python -m glmc.sweep … | runs |` in the documentation."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / 'docs' / 'recipes-and-results.md').read_text(encoding='utf-8')
    commands = re.findall(r'^\| [^|]+ \| `python -m glmc\.sweep ([^`]+)` \| (\d+) \|$', page, re.M)
    folders = []
    for command, runs in commands:
        args, run_options = parse_sweep(shlex.split(command))
        experiments = plan(args, run_options)
        assert len(experiments) == int(runs) and args.csv == 'results/cifar100-lt.csv' and args.logs == 'results/logs'
        check(experiments[0])
        check(experiments[-1])
        folders += [experiment.folder for experiment in experiments]
    assert commands and len(set(folders)) == len(folders), 'two commands would write to the same folder'
