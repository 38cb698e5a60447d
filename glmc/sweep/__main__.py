"""Recipes x options x seeds as parallel runs of train_glmc.py on one machine, with one table of their results.

    python -m glmc.sweep --vary method=ce,glmc --vary lr=0.01,0.1 -- --epochs 30
    python -m glmc.sweep --recipes hparams/a.yaml hparams/b.yaml --seeds 0 1 2 --jobs 6 -- --data-dir data
    timeout 580 python -m glmc.sweep --each joint_forward=true mix_beta=0.2,0.5 --csv results/runs.csv --logs results/logs

Options after `--` are passed to every run. A stopped sweep saves a checkpoint of each run; the same command resumes
them and skips finished runs.
"""
import itertools
import re
import sys
from pathlib import Path

from glmc.cli import Options, Parser, parse_args, read_yaml, run_script
from glmc.config import count, positive_int, train_parser
from glmc.errors import InputError
from glmc.evaluation.text import aligned, mean_std
from glmc.methods import METHODS
from glmc.report.compare import write_comparison
from glmc.sweep.parallel import run_all
from glmc.sweep.runs import METRICS, Experiment, check_table, copy_log, table_row, write_runs

SET_BY_SWEEP = ('-c', '--config', '--seed', '--output', '--experiment', '--resume')
INTERRUPTED = 130


def main() -> None:
    args, run_options = parse_sweep(sys.argv[1:])
    experiments, csv = plan(args, run_options), Path(args.csv or Path(args.output) / 'sweep.csv')
    for experiment in experiments:
        check(experiment)
    check_table(csv, experiments)
    missing = [experiment for experiment in experiments if experiment.metrics() is None]
    print(f'Runs: {len(experiments)}, already finished: {len(experiments) - len(missing)}', flush=True)
    interrupted = run_all(missing, args.jobs)
    finished = [(experiment, metrics) for experiment in experiments if (metrics := experiment.metrics())]
    logs = {e: copy_log(e, Path(args.logs)) for e, _ in finished if e.log.exists()} if args.logs else {}
    write_runs(csv, [table_row(experiment, metrics, logs.get(experiment)) for experiment, metrics in finished])
    print(f'\n{results_table(finished)}\n\nAll runs: {csv}', flush=True)
    compare(Path(args.output) / 'comparison', finished)
    if len(finished) < len(experiments):
        print(f'{len(experiments) - len(finished)} of {len(experiments)} runs have no result', file=sys.stderr)
        sys.exit(INTERRUPTED if interrupted else 1)


def compare(folder: Path, finished: list[tuple[Experiment, dict]]) -> None:
    """Write a report that compares the runs of the first seed, with the accuracy of each class."""
    runs = [experiment.folder for experiment, _ in finished if experiment.seed == finished[0][0].seed]
    if len(runs) > 1:
        try:
            print(f'Comparison, seed {finished[0][0].seed}: {write_comparison(folder, runs)}', flush=True)
        except InputError as error:
            print(f'no comparison: {error}', file=sys.stderr)


def parse_sweep(argv: list[str]) -> tuple[Options, list[str]]:
    """Options of the sweep, and the options after `--` for every run."""
    split = argv.index('--') if '--' in argv else len(argv)
    parser = Parser(prog='python -m glmc.sweep', verbatim=True, description=__doc__,
                    usage='python -m glmc.sweep [options of the sweep] -- [options of train_glmc.py for every run]')
    add = parser.add_argument
    add('--recipes', nargs='+', default=[], metavar='FILE', help='YAML files of options, each as --config of some runs')
    add('--seeds', nargs='+', type=count, default=[0], metavar='N', help='seeds of every setting; default: 0')
    add('--vary', action='append', default=[], metavar='OPTION=VALUE,…', help='run with each of these values; several '
        '--vary are combined. A switch takes true or false; quote a value with blanks for an option with several values')
    add('--each', nargs='+', default=[], metavar='OPTION=VALUE,…',
        help='run with each of these values alone, not combined with each other')
    add('--jobs', type=positive_int, default=1, metavar='N', help='parallel runs, which share device and cores; default: 1')
    add('--output', default='output', metavar='DIR', help='parent folder of all runs; default: output')
    add('--csv', metavar='FILE', help='table with one row for each run; rows of other runs are kept; default: sweep.csv '
        'in --output')
    add('--logs', metavar='DIR', help='copy the log of each finished run to this folder')
    return parser.parse_args(argv[:split]), argv[split + 1:]


def plan(args: Options, run_options: list[str]) -> list[Experiment]:
    """All runs of the sweep, recipe by recipe.

    Raises:
        InputError: If an option belongs to the sweep, or if two runs have the same folder.
    """
    for flag in {word.split('=')[0] for word in run_options} & set(SET_BY_SWEEP):
        raise InputError(f'{flag}: the sweep sets it by --recipes, --seeds or --output; expected other options after --')
    experiments = {}
    for recipe, setting in itertools.product(args.recipes or [None], settings(args.vary, args.each)):
        words = [Path(recipe).stem] if recipe else []
        name = '-'.join([*words, *(f'{option}={value}' for option, value in setting)]) or 'default'
        name = re.sub(r'[^\w.=+-]+', '_', name)
        options = [*(['--config', recipe] if recipe else []), *run_options]
        options += [word for option in setting for word in as_flags(*option)]
        for seed in args.seeds:
            folder = Path(args.output) / f'{name}-seed{seed}'
            if folder in experiments:
                raise InputError(f'{folder}: two runs would share this folder; expected recipes, values and seeds to differ')
            experiments[folder] = Experiment(name, seed, recipe, tuple(options), folder)
    return list(experiments.values())


def settings(vary: list[str], each: list[str]) -> list[tuple[tuple[str, str], ...]]:
    """Combinations of (option, value): the product of all `vary`, times one of `each` at a time."""
    combined = itertools.product(*(_split('--vary', text) for text in vary))
    alone = [(option,) for text in each for option in _split('--each', text)] or [()]
    return [(*options, *option) for options, option in itertools.product(combined, alone)]


def _split(flag: str, text: str) -> list[tuple[str, str]]:
    option, _, values = text.partition('=')
    if not option or not all(values.split(',')):
        raise InputError(f'{flag} {text}: expected OPTION=VALUE,VALUE')
    return [(option.removeprefix('--').replace('_', '-'), value) for value in values.split(',')]


def as_flags(option: str, value: str) -> list[str]:
    """Words of the command line of train_glmc.py that set a varied option."""
    action = train_parser(METHODS)._option_string_actions.get(f'--{option}')
    if action is None or action.nargs != 0:
        return [f'--{option}', *(value.split() if action and action.nargs else [value])]
    if value not in ('true', 'false'):
        raise InputError(f'--vary {option}={value}: a switch, expected true or false')
    if value == 'true':
        return [f'--{option}']
    return [f'--no-{option}'] if f'--no-{option}' in action.option_strings else []


def check(experiment: Experiment) -> None:
    """Check the options of a run before any run starts.

    Raises:
        InputError: If an option is wrong, or if the run folder holds a run with other options.
    """
    parser = train_parser(METHODS)
    options, _ = parse_args(parser, experiment.argv)
    path = experiment.folder / 'args.yaml'
    if not path.exists():
        return
    ignored = {'config', 'resume', 'debug', 'output', 'experiment', 'workers', 'log_interval'}
    earlier = read_yaml(parser, str(path))
    for name, value in vars(options).items():
        if name not in ignored and name in earlier and earlier[name] != value:
            raise InputError(f"{experiment.folder}: holds a run with --{name.replace('_', '-')} {earlier[name]}, this sweep "
                             f'has {value}; expected the same options, or another --output')


def results_table(finished: list[tuple[Experiment, dict]]) -> str:
    """Aligned table: mean ± standard deviation (n - 1) of each metric over the seeds of a setting, in percent."""
    rows = [['run', 'method', 'seeds', 'top-1', 'many', 'medium', 'few', 'class mean']]
    for name, group in itertools.groupby(finished, key=lambda pair: pair[0].name):
        results = [metrics for _, metrics in group]
        columns = [mean_std([metrics.get(metric) for metrics in results]) for metric in METRICS]
        rows.append([name, results[0]['method'], str(len(results)), *columns])
    return aligned(rows, left=2)


if __name__ == '__main__':
    sys.exit(run_script(main, debug='--debug' in sys.argv))
