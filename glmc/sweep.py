"""Recipes x options x seeds as parallel runs of train_glmc.py on one machine, and one table of their results.

    python -m glmc.sweep --recipes hparams/a.yaml hparams/b.yaml --seeds 0 1 2 --jobs 6 -- --data-dir data
    python -m glmc.sweep --vary method=ce,glmc --vary lr=0.01,0.1 -- --epochs 30

What follows `--` goes to every run. The same command, given again, skips finished runs and goes on with the others.
"""
import argparse
import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import yaml

from glmc.config import DEMONSTRATION, count, positive_int, train_parser
from glmc.methods import METHODS
from glmc.parsing import InputError, Parser, parse_args, run_script
from glmc.report import write_comparison
from glmc.results import aligned, mean_std

SCRIPT = Path(__file__).resolve().parent.parent / 'train_glmc.py'
OWN = ('-c', '--config', '--seed', '--output', '--experiment', '--resume')  # the sweep gives these to each run
FIGURES = ('top1', 'many', 'medium', 'few', 'class_mean')
COLUMNS = ('model', 'method', 'parameters', 'epochs', *FIGURES, 'evaluated_on', 'fingerprint', 'seconds', 'commit')
INTERRUPTED = 130


@dataclass(frozen=True)
class Experiment:
    """One run: what it is called with, and where it leaves its result."""
    name: str  # without the seed: what is averaged over
    seed: int
    options: tuple[str, ...]
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / 'train.log'

    def metrics(self) -> dict | None:
        """The result, or None of an unfinished run."""
        path = self.folder / 'export' / 'metrics.json'
        return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def main() -> None:
    args, passed_on = parse_sweep(sys.argv[1:])
    experiments = plan(args, passed_on)
    for experiment in experiments:
        check(experiment)
    interrupted = run_all([e for e in experiments if e.metrics() is None], args.jobs)
    finished = [(experiment, metrics) for experiment in experiments if (metrics := experiment.metrics())]
    write_csv(Path(args.csv or Path(args.output) / 'sweep.csv'), finished)
    print(f'\n{table(finished)}', flush=True)
    compare(Path(args.output) / 'comparison', finished)
    if len(finished) < len(experiments):
        print(f'{len(experiments) - len(finished)} of {len(experiments)} runs have no result', file=sys.stderr)
        sys.exit(INTERRUPTED if interrupted else 1)


def compare(folder: Path, finished: list[tuple[Experiment, dict]]) -> None:
    """Draw the runs of the first seed together: accuracy of each class over its training images."""
    runs = [experiment.folder for experiment, _ in finished if experiment.seed == finished[0][0].seed]
    if len(runs) > 1:
        try:
            print(f'drawn together in {write_comparison(folder, runs)}', flush=True)
        except InputError as error:
            print(f'not drawn together: {error}', file=sys.stderr)


def parse_sweep(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the sweep, and what follows `--`."""
    split = argv.index('--') if '--' in argv else len(argv)
    parser = Parser(prog='python -m glmc.sweep', formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    add = parser.add_argument
    add('--recipes', nargs='+', default=[], metavar='FILE', help='YAML files of options, as --config of train_glmc.py')
    add('--seeds', nargs='+', type=count, default=[0], metavar='N', help='seeds of each recipe; default: 0')
    add('--vary', action='append', default=[], metavar='OPTION=VALUE,…', help='cross with these values; true and false '
        'for a switch, blanks inside a value for an option that takes several')
    add('--jobs', type=positive_int, default=1, metavar='N', help='runs at a time; they share the device and the cores')
    add('--output', default='output', metavar='DIR', help='parent folder of all runs')
    add('--csv', metavar='FILE', help='the summary, one line a run; default: sweep.csv in --output')
    return parser.parse_args(argv[:split]), argv[split + 1:]


def plan(args: argparse.Namespace, passed_on: list[str]) -> list[Experiment]:
    """All runs of the sweep, recipe by recipe."""
    for flag in {word.split('=')[0] for word in passed_on} & set(OWN):
        raise InputError(f'{flag}: is set by --recipes, --seeds or --output of the sweep; expected other options after --')
    varied = [[(option, value) for value in values] for option, values in map(_split_vary, args.vary)]
    experiments = {}
    for recipe, *settings in itertools.product(args.recipes or [None], *varied):
        words = [Path(recipe).stem] if recipe else []
        name = '-'.join([*words, *(f'{option}={value}' for option, value in settings)]) or 'default'
        name = re.sub(r'[^\w.=+-]+', '_', name)
        options = [*(['--config', recipe] if recipe else []), *passed_on]
        options += [word for setting in settings for word in as_flags(*setting)]
        for seed in args.seeds:
            folder = Path(args.output) / f'{name}-seed{seed}'
            own = ('--seed', str(seed), '--output', args.output, '--experiment', folder.name, '--resume', 'auto')
            if folder in experiments:
                raise InputError(f'{folder}: two runs would share this folder; expected recipes, values and seeds to differ')
            experiments[folder] = Experiment(name, seed, (*options, *own), folder)
    return list(experiments.values())


def _split_vary(text: str) -> tuple[str, list[str]]:
    option, _, values = text.partition('=')
    if not option or not all(values.split(',')):
        raise InputError(f'--vary {text}: expected OPTION=VALUE,VALUE')
    return option.removeprefix('--').replace('_', '-'), values.split(',')


def as_flags(option: str, value: str) -> list[str]:
    """One varied option on the command line of train_glmc.py."""
    action = train_parser(METHODS)._option_string_actions.get(f'--{option}')
    if action is None or action.nargs != 0:
        return [f'--{option}', *(value.split() if action and action.nargs else [value])]
    if value not in ('true', 'false'):
        raise InputError(f'--vary {option}={value}: a switch, expected true or false')
    if value == 'true':
        return [f'--{option}']
    return [f'--no-{option}'] if isinstance(action, argparse.BooleanOptionalAction) else []


def check(experiment: Experiment) -> None:
    """Refuse wrong options before anything starts, and a folder that holds a run with others.

    Raises:
        InputError: If so.
    """
    options, given = parse_args(train_parser(METHODS), list(experiment.options))
    path = experiment.folder / 'args.yaml'
    if not path.exists():
        return
    demonstration = set() if options.data_dir or options.dataset or options.train_list else set(DEMONSTRATION) - given
    ignored = {'config', 'resume', 'debug', 'output', 'experiment', 'workers', 'log_interval', *demonstration}
    earlier = yaml.safe_load(path.read_text(encoding='utf-8'))
    for name, value in vars(options).items():
        if name not in ignored and name in earlier and earlier[name] != value:
            raise InputError(f"{experiment.folder}: holds a run with --{name.replace('_', '-')} {earlier[name]}, this sweep "
                             f'has {value}; expected the same options, or another --output')


def run_all(experiments: list[Experiment], jobs: int) -> bool:
    """Run them, so many at a time. A failure stops no other run; Ctrl-C stops all, and True is returned."""
    waiting, running = deque(experiments), {}
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                experiment = waiting.popleft()
                running[experiment] = start(experiment, jobs)
            time.sleep(0.2)
            for experiment in [e for e, process in running.items() if process.poll() is not None]:
                if running.pop(experiment).returncode or experiment.metrics() is None:
                    print(f'failed    {experiment.folder}: {last_line(experiment.log)}', file=sys.stderr, flush=True)
                else:
                    print(f'finished  {experiment.folder}', flush=True)
    except KeyboardInterrupt:
        print('interrupted; the same command goes on from the last checkpoints', file=sys.stderr)
        return True
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)  # with its loader workers
        for process in running.values():
            process.wait()
    return False


def start(experiment: Experiment, jobs: int) -> subprocess.Popen:
    """A run in a process group of its own, with its share of the cores and everything it says in its log."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    threads = os.environ.get('OMP_NUM_THREADS', str(max(cores // jobs, 1)))
    experiment.folder.mkdir(parents=True, exist_ok=True)
    print(f'started   {experiment.folder}', flush=True)
    with open(experiment.log, 'a', encoding='utf-8') as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *experiment.options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': threads})


def last_line(log: Path) -> str:
    lines = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()
    return f'{lines[-1]} (see {log})' if lines else 'it said nothing'


def write_csv(path: Path, finished: list[tuple[Experiment, dict]]) -> None:
    """One line a finished run; lines of other runs, from an earlier sweep, stay."""
    rows = {}
    if path.exists():
        with open(path, newline='', encoding='utf-8') as file:
            rows = {(row['run'], row['seed']): row for row in csv.DictReader(file)}
    for experiment, metrics in finished:
        facts = {name: metrics.get(name) for name in COLUMNS}
        rows[experiment.name, str(experiment.seed)] = dict(run=experiment.name, seed=experiment.seed, **facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, ['run', 'seed', *COLUMNS], extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows.values())


def table(finished: list[tuple[Experiment, dict]]) -> str:
    """Mean ± standard deviation (n - 1) over the seeds of each recipe and setting."""
    rows = [['run', 'method', 'seeds', 'top-1', 'many', 'medium', 'few', 'class mean']]
    for name, group in itertools.groupby(finished, key=lambda pair: pair[0].name):
        results = [metrics for _, metrics in group]
        figures = [mean_std([metrics.get(figure) for metrics in results]) for figure in FIGURES]
        rows.append([name, results[0]['method'], str(len(results)), *figures])
    return aligned(rows, left=2)


if __name__ == '__main__':
    sys.exit(run_script(main, debug='--debug' in sys.argv))
