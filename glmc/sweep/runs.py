"""The runs of a sweep, and the CSV with one row for each: its options, metrics, and the command that repeats it."""
import csv
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmc.cli import Options, parse_args, read_yaml
from glmc.config import NOT_TRAINING, has_data, train_parser
from glmc.errors import InputError
from glmc.files import NAMES, atomic_write
from glmc.methods import METHODS
from glmc.report.compare import read_metrics
from glmc.run_folder import read_summary

METRICS = ('top1', 'many', 'medium', 'few', 'class_mean')  # of the exported model: last epoch
BEST_ON_TEST = 'top1_best_epoch_chosen_on_test'  # for comparison with papers that report it; no choice depends on it
COLUMNS = ('run', 'seed', 'recipe', 'options', 'method', 'model', 'parameters', 'imbalance_factor', 'lt_split',
           'fingerprint', 'epochs', *METRICS, 'ece', 'evaluated_on', BEST_ON_TEST, 'seconds', 'device', 'precision',
           'commit', 'command', 'log')
ABSOLUTE_PATH = re.compile(r'''(?<![\w.])(?<!:/)/(?!/)(?:[^\s/:'"]+/)*([^\s/:'",]+)/?''')


@dataclass(frozen=True)
class Experiment:
    """One run of a sweep.

    Args:
        name: Recipe and varied options, without the seed; results are averaged over runs of the same name.
        seed: --seed of the run.
        recipe: YAML file of options, or None.
        options: Command line of train_glmc.py with the recipe, without the seed and the folder.
        folder: Run folder.
    """
    name: str
    seed: int
    recipe: str | None
    options: tuple[str, ...]
    folder: Path

    @property
    def argv(self) -> list[str]:
        """Complete command line of train_glmc.py."""
        return [*self.options, '--seed', str(self.seed), '--output', str(self.folder.parent), '--experiment',
                self.folder.name, '--resume', 'auto']

    @property
    def log(self) -> Path:
        """Log file of the run."""
        return self.folder / 'train.log'

    def metrics(self) -> dict | None:
        """Read metrics.json of the export; None if the run has not finished."""
        return read_metrics(self.folder) if (self.folder / 'export' / 'metrics.json').exists() else None


def table_row(experiment: Experiment, metrics: dict, log: Path | None = None) -> dict:
    """Row of the CSV for a finished run: COLUMNS -> value, None where there is none.

    Args:
        experiment: The finished run.
        metrics: Content of its metrics.json.
        log: Copy of its log to name in the row; default: the log in the run folder.
    """
    args = read_yaml(train_parser(METHODS), str(experiment.folder / 'args.yaml'))
    factor = args.get('imbalance_factor')
    row = {name: metrics.get(name) for name in COLUMNS}
    row.update(
        planned_cells(experiment), imbalance_factor=factor, lt_split=args.get('lt_split') if factor else None,
        command=rerun_command(experiment, metrics.get('threads')), log=(log or experiment.log).as_posix())
    evaluated = [epoch['eval_top1'] for epoch in read_summary(experiment.folder) if epoch['eval_top1'] is not None]
    row[BEST_ON_TEST] = None if args.get('holdout') else max(evaluated, default=None)
    return {name: portable(value) if isinstance(value, str) else value for name, value in row.items()}


def planned_cells(experiment: Experiment) -> dict:
    """Cells of a row that are known before the run starts."""
    return dict(run=experiment.name, seed=experiment.seed, recipe=portable(experiment.recipe or ''),
                options=portable(changed_options(experiment)))


def changed_options(experiment: Experiment) -> str:
    """`name=value` of each training option that differs from the recipe, or from the defaults without one.

    Defaults that follow from `method`, or from the demonstration without data, are not listed.
    """
    options = _parse(experiment.options)
    recipe = ['--config', experiment.recipe] if experiment.recipe else []
    recipe += ['--data-dir', '.'] if has_data(options) else []
    same_method = {**vars(_parse([*recipe, '--method', options.method])), 'method': _parse(recipe).method}
    changed = {name: value for name, value in vars(options).items()
               if name not in NOT_TRAINING and value != same_method[name]}
    return ' '.join(f'{name}={as_text(value)}' for name, value in sorted(changed.items()))


def _parse(words: Sequence[str]) -> Options:
    return parse_args(train_parser(METHODS), list(words))[0]


def as_text(value) -> str:
    """Format an option value without blanks, numbers as short as possible."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f'{value:.12g}'
    if isinstance(value, dict):
        return ','.join(f'{key}:{as_text(entry)}' for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ','.join(map(as_text, value))
    return re.sub(r'\s+', '_', str(value))


def rerun_command(experiment: Experiment, threads: int | None) -> str:
    """Shell command that repeats the run; on a CPU it sets the number of threads, which changes the last digits."""
    words = shlex.join(['python', 'train_glmc.py', *map(portable, experiment.options), '--seed', str(experiment.seed)])
    return f'OMP_NUM_THREADS={threads} {words}' if threads else words


def portable(text: str) -> str:
    """Replace absolute paths by PATH/TO/NAME, so that a table names no folders of one machine."""
    return ABSOLUTE_PATH.sub(r'PATH/TO/\1', text)


def read_runs(path: Path) -> list[dict[str, str]]:
    """Read the CSV of a sweep, or any CSV with columns `run` and `seed`: column -> cell for each row.

    Raises:
        InputError: If the file cannot be read, a column is missing, or a row has too many cells.
    """
    try:
        with open(path, newline='', **NAMES) as file:
            reader = csv.DictReader(file, restval='')
            head, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'{path}: cannot be read as a CSV of runs: {error}') from error
    if not {'run', 'seed'} <= set(head) or any(None in row for row in rows):
        raise InputError(f'{path}: expected a CSV of runs, with columns run and seed and no row longer than the head')
    return rows


def check_table(path: Path, experiments: Iterable[Experiment]) -> None:
    """Check that an existing CSV holds none of these runs with other options.

    Raises:
        InputError: If it does, or if the file is not a CSV of runs.
    """
    earlier = {(row['run'], row['seed']): row for row in read_runs(path)} if path.exists() else {}
    for experiment in experiments:
        row = earlier.get((experiment.name, str(experiment.seed)), {})
        planned = planned_cells(experiment) if 'options' in row else {}  # older tables have no such column
        for name in ('recipe', 'options') if planned else ():
            if Path(row[name]).name != Path(planned[name]).name:
                raise InputError(f'--csv {path}: has a run {experiment.name}, seed {experiment.seed}, with {name} '
                                 f'{row[name]!r}, this sweep has {planned[name]!r}; expected the same, or another file')


def write_runs(path: Path, rows: Iterable[dict]) -> None:
    """Add rows to a CSV of runs, replacing rows of the same run and seed; other rows and columns are kept."""
    earlier = read_runs(path) if path.exists() else []
    new = {(row['run'], str(row['seed'])): row for row in rows}
    merged = [new.pop((row['run'], row['seed']), row) for row in earlier] + list(new.values())
    columns = dict.fromkeys((*COLUMNS, *(name for row in merged for name in row)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, 'w', newline='', **NAMES) as file:
        writer = csv.DictWriter(file, list(columns), restval='')
        writer.writeheader()
        writer.writerows(merged)


def copy_log(experiment: Experiment, folder: Path) -> Path:
    """Copy the log of a run to `folder`, without absolute paths, and return the path of the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f'{experiment.folder.name}.log'
    copy.write_text(portable(experiment.log.read_text(encoding='utf-8', errors='replace')), encoding='utf-8')
    return copy
