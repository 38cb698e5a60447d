"""Recipes x options x seeds as parallel runs of train_glmc.py on one machine, and one table of their results.

    python -m glmc.sweep --recipes hparams/a.yaml hparams/b.yaml --seeds 0 1 2 --jobs 6 -- --data-dir data
    python -m glmc.sweep --vary method=ce,glmc --vary lr=0.01,0.1 -- --epochs 30
    timeout 580 python -m glmc.sweep --each joint_forward=true mix_beta=0.2,0.5 --csv results/runs.csv --logs results/logs

What follows `--` goes to every run. When the sweep is stopped, the runs save where they are; the same command, given
again, skips finished runs and goes on with the others.
"""
import itertools
import re
import sys
from pathlib import Path

import yaml

from glmc.cli import Options, Parser, parse_args, run_script
from glmc.config import DEMONSTRATION, count, positive_int, train_parser
from glmc.errors import InputError
from glmc.evaluation.text import aligned, mean_std
from glmc.methods import METHODS
from glmc.report.compare import write_comparison
from glmc.sweep.parallel import run_all
from glmc.sweep.runs import FIGURES, Experiment, check_table, keep_log, line_of, write_runs

OWN = ('-c', '--config', '--seed', '--output', '--experiment', '--resume')  # the sweep gives these to each run
INTERRUPTED = 130


def main() -> None:
    args, passed_on = parse_sweep(sys.argv[1:])
    experiments, csv = plan(args, passed_on), Path(args.csv or Path(args.output) / 'sweep.csv')
    for experiment in experiments:
        check(experiment)
    check_table(csv, experiments)
    interrupted = run_all([e for e in experiments if e.metrics() is None], args.jobs)
    finished = [(experiment, metrics) for experiment in experiments if (metrics := experiment.metrics())]
    logs = {e: keep_log(e, Path(args.logs)) for e, _ in finished if e.log.exists()} if args.logs else {}
    write_runs(csv, [line_of(experiment, metrics, logs.get(experiment)) for experiment, metrics in finished])
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


def parse_sweep(argv: list[str]) -> tuple[Options, list[str]]:
    """Options of the sweep, and what follows `--`."""
    split = argv.index('--') if '--' in argv else len(argv)
    parser = Parser(prog='python -m glmc.sweep', verbatim=True, description=__doc__)
    add = parser.add_argument
    add('--recipes', nargs='+', default=[], metavar='FILE', help='YAML files of options, as --config of train_glmc.py')
    add('--seeds', nargs='+', type=count, default=[0], metavar='N', help='seeds of each recipe; default: 0')
    add('--vary', action='append', default=[], metavar='OPTION=VALUE,…', help='cross with these values; true and false '
        'for a switch, blanks inside a value for an option that takes several')
    add('--each', nargs='+', default=[], metavar='OPTION=VALUE,…', help='one of these values at a time')
    add('--jobs', type=positive_int, default=1, metavar='N', help='runs at a time; they share the device and the cores')
    add('--output', default='output', metavar='DIR', help='parent folder of all runs')
    add('--csv', metavar='FILE', help='the table of runs, a line each, beside those it has; default: sweep.csv in --output')
    add('--logs', metavar='DIR', help='copy the log of each finished run here, for the table to point at')
    return parser.parse_args(argv[:split]), argv[split + 1:]


def plan(args: Options, passed_on: list[str]) -> list[Experiment]:
    """All runs of the sweep, recipe by recipe."""
    for flag in {word.split('=')[0] for word in passed_on} & set(OWN):
        raise InputError(f'{flag}: is set by --recipes, --seeds or --output of the sweep; expected other options after --')
    experiments = {}
    for recipe, settings in itertools.product(args.recipes or [None], settings_of(args.vary, args.each)):
        words = [Path(recipe).stem] if recipe else []
        name = '-'.join([*words, *(f'{option}={value}' for option, value in settings)]) or 'default'
        name = re.sub(r'[^\w.=+-]+', '_', name)
        options = [*(['--config', recipe] if recipe else []), *passed_on]
        options += [word for setting in settings for word in as_flags(*setting)]
        for seed in args.seeds:
            folder = Path(args.output) / f'{name}-seed{seed}'
            if folder in experiments:
                raise InputError(f'{folder}: two runs would share this folder; expected recipes, values and seeds to differ')
            experiments[folder] = Experiment(name, seed, recipe, tuple(options), folder)
    return list(experiments.values())


def settings_of(vary: list[str], each: list[str]) -> list[tuple[tuple[str, str], ...]]:
    """(option, value) of each setting: what is varied, crossed, and with it one of `each`, if there are any."""
    crossed = itertools.product(*(_split('--vary', text) for text in vary))
    alone = [(setting,) for text in each for setting in _split('--each', text)] or [()]
    return [(*settings, *setting) for settings, setting in itertools.product(crossed, alone)]


def _split(flag: str, text: str) -> list[tuple[str, str]]:
    option, _, values = text.partition('=')
    if not option or not all(values.split(',')):
        raise InputError(f'{flag} {text}: expected OPTION=VALUE,VALUE')
    return [(option.removeprefix('--').replace('_', '-'), value) for value in values.split(',')]


def as_flags(option: str, value: str) -> list[str]:
    """One varied option on the command line of train_glmc.py."""
    action = train_parser(METHODS)._option_string_actions.get(f'--{option}')
    if action is None or action.nargs != 0:
        return [f'--{option}', *(value.split() if action and action.nargs else [value])]
    if value not in ('true', 'false'):
        raise InputError(f'--vary {option}={value}: a switch, expected true or false')
    if value == 'true':
        return [f'--{option}']
    return [f'--no-{option}'] if f'--no-{option}' in action.option_strings else []


def check(experiment: Experiment) -> None:
    """Refuse wrong options before anything starts, and a folder that holds a run with others.

    Raises:
        InputError: If so.
    """
    options, explicit = parse_args(train_parser(METHODS), experiment.argv)
    path = experiment.folder / 'args.yaml'
    if not path.exists():
        return
    demonstration = set() if options.data_dir or options.dataset or options.train_list else set(DEMONSTRATION) - explicit
    ignored = {'config', 'resume', 'debug', 'output', 'experiment', 'workers', 'log_interval', *demonstration}
    earlier = yaml.safe_load(path.read_text(encoding='utf-8'))
    for name, value in vars(options).items():
        if name not in ignored and name in earlier and earlier[name] != value:
            raise InputError(f"{experiment.folder}: holds a run with --{name.replace('_', '-')} {earlier[name]}, this sweep "
                             f'has {value}; expected the same options, or another --output')


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
