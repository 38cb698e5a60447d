"""The runs of a sweep, and their table: a CSV with a line for each, which says what was run and how to run it again."""
import csv
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from glmc.cli import Options, parse_args
from glmc.config import train_parser
from glmc.errors import InputError
from glmc.methods import METHODS
from glmc.run_folder import read_summary

FIGURES = ('top1', 'many', 'medium', 'few', 'class_mean')  # of the model that is exported: of the last epoch
BEST = 'top1_best_epoch_chosen_on_test'  # what a peek at the evaluated images would give; nothing is chosen by it
COLUMNS = ('run', 'seed', 'recipe', 'options', 'method', 'model', 'parameters', 'imbalance_factor', 'lt_split',
           'fingerprint', 'epochs', *FIGURES, 'ece', 'evaluated_on', BEST, 'seconds', 'device', 'precision', 'commit',
           'command', 'log')
PLACES = frozenset((  # options that say where the data is and how it is computed, not what is trained
    'config', 'data_dir', 'dataset', 'dataset_download', 'val_split', 'val_list', 'train_list', 'class_map', 'class_counts',
    'input_key', 'target_key', 'num_classes', 'workers', 'resident', 'channels_last', 'torchcompile', 'grad_checkpointing',
    'seed', 'output', 'experiment', 'resume', 'debug', 'val_interval', 'log_interval', 'checkpoint_interval',
    'checkpoint_hist', 'report', 'report_to', 'push_to_hub', 'hub_private', 'hub_revision', 'hub_license', 'stage2',
    'feature_views', 'stage2_holdout', 'stage2_kwargs', 'feature_cache'))
ABSOLUTE = re.compile(r'''(?<![\w.])(?<!:/)/(?!/)(?:[^\s/:'"]+/)*([^\s/:'",]+)/?''')


@dataclass(frozen=True)
class Experiment:
    """One run: what it is called with, and where it leaves its result."""
    name: str  # without the seed: what is averaged over
    seed: int
    recipe: str | None
    options: tuple[str, ...]  # with the recipe, without the seed
    folder: Path

    @property
    def argv(self) -> list[str]:
        """The command line of train_glmc.py."""
        return [*self.options, '--seed', str(self.seed), '--output', str(self.folder.parent), '--experiment',
                self.folder.name, '--resume', 'auto']

    @property
    def log(self) -> Path:
        return self.folder / 'train.log'

    def metrics(self) -> dict | None:
        """The result, or None of an unfinished run."""
        path = self.folder / 'export' / 'metrics.json'
        return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def line_of(experiment: Experiment, metrics: dict, log: Path | None = None) -> dict:
    """The run as a line of the table.

    Args:
        experiment: The run.
        metrics: Of its metrics.json.
        log: Where its log is kept, if not in its folder.
    """
    args = yaml.safe_load((experiment.folder / 'args.yaml').read_text(encoding='utf-8'))
    factor = args.get('imbalance_factor')
    line = {name: metrics.get(name) for name in COLUMNS}
    line.update(
        what_is_run(experiment), imbalance_factor=factor, lt_split=args.get('lt_split') if factor else None,
        command=command(experiment, metrics.get('threads')), log=(log or experiment.log).as_posix())
    line[BEST] = None if args.get('holdout') else best_top1(experiment.folder)
    return {name: portable(value) if isinstance(value, str) else value for name, value in line.items()}


def what_is_run(experiment: Experiment) -> dict:
    """The cells of a line that are known before it has run."""
    return dict(run=experiment.name, seed=experiment.seed, recipe=portable(experiment.recipe or ''),
                options=portable(changed_options(experiment)))


def changed_options(experiment: Experiment) -> str:
    """`name=value` of each option that trains something other than the recipe, or the defaults, would.

    What a method has by default is said by its name.
    """
    recipe, options = ['--config', experiment.recipe] if experiment.recipe else [], vars(_options(experiment.options))
    same_method = {**vars(_options([*recipe, '--method', options['method']])), 'method': _options(recipe).method}
    changed = {name: value for name, value in options.items() if name not in PLACES and value != same_method[name]}
    return ' '.join(f'{name}={as_text(value)}' for name, value in sorted(changed.items()))


def _options(words: Sequence[str]) -> Options:
    return parse_args(train_parser(METHODS), list(words))[0]


def as_text(value) -> str:
    """Without blanks; numbers as short as they can be."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f'{value:.12g}'
    if isinstance(value, dict):
        return ','.join(f'{key}:{as_text(entry)}' for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ','.join(map(as_text, value))
    return re.sub(r'\s+', '_', str(value))


def command(experiment: Experiment, threads: int | None) -> str:
    """What gives the run again when it is pasted; on the CPU the number of threads decides about the last digit."""
    words = shlex.join(['python', 'train_glmc.py', *map(portable, experiment.options), '--seed', str(experiment.seed)])
    return f'OMP_NUM_THREADS={threads} {words}' if threads else words


def portable(text: str) -> str:
    """Absolute paths as PATH/TO/NAME: where things lie on one machine is of no use on another."""
    return ABSOLUTE.sub(r'PATH/TO/\1', text)


def best_top1(folder: Path) -> float | None:
    """The highest top-1 of the epochs that were evaluated."""
    return max((row['eval_top1'] for row in read_summary(folder) if row['eval_top1'] is not None), default=None)


def read_runs(path: Path) -> list[dict[str, str]]:
    """Lines of a table of runs, in any columns that have `run` and `seed` among them.

    Raises:
        InputError: If it is none.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file, restval='')
            head, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'{path}: expected a table of runs: {error}') from error
    if not {'run', 'seed'} <= set(head) or any(None in row for row in rows):
        raise InputError(f'{path}: expected a table of runs, with columns run and seed and no line longer than the head')
    return rows


def check_table(path: Path, experiments: Iterable[Experiment]) -> None:
    """Refuse a file that is no table of runs, or in which one of these stands with other options.

    Raises:
        InputError: If so.
    """
    earlier = {(row['run'], row['seed']): row for row in read_runs(path)} if path.exists() else {}
    for experiment in experiments:
        row = earlier.get((experiment.name, str(experiment.seed)), {})
        planned = what_is_run(experiment) if 'options' in row else {}  # older tables do not say
        for name in {'recipe', 'options'} & planned.keys():
            if Path(row[name]).name != Path(planned[name]).name:
                raise InputError(f'--csv {path}: has a run {experiment.name}, seed {experiment.seed}, with {name} '
                                 f'{row[name]!r}, this sweep has {planned[name]!r}; expected the same, or another file')


def write_runs(path: Path, lines: Iterable[dict]) -> None:
    """Put the lines into a table; those of other runs, and columns that only they have, stay."""
    earlier = read_runs(path) if path.exists() else []
    new = {(line['run'], str(line['seed'])): line for line in lines}
    rows = [new.pop((row['run'], row['seed']), row) for row in earlier] + list(new.values())
    columns = dict.fromkeys((*COLUMNS, *(name for row in rows for name in row)))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'{path.name}.tmp')
    with open(beside, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(columns), restval='')
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def keep_log(experiment: Experiment, folder: Path) -> Path:
    """Copy the run's log to where its line in the table says it is."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f'{experiment.folder.name}.log'
    kept.write_text(portable(experiment.log.read_text(encoding='utf-8', errors='replace')), encoding='utf-8')
    return kept
