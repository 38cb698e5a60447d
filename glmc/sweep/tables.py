"""Write a Markdown table of the runs in a CSV of `glmc.sweep`: mean ± standard deviation over seeds.

    python -m glmc.sweep.tables results/cifar100-lt.csv

The table goes into the README.md beside the CSV, between `<!-- table: cifar100-lt -->` and `<!-- end -->`; the name is
that of the CSV. Only runs with the same recipe, options, epochs, precision and training images are averaged.
"""
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from glmc.cli import Parser, run_script
from glmc.config import PRECISIONS
from glmc.errors import InputError
from glmc.evaluation.text import mean_std
from glmc.files import atomic_write
from glmc.sweep.runs import BEST_ON_TEST, read_runs

COLUMNS = {'top1': 'top-1, last epoch', 'many': 'many', 'medium': 'medium', 'few': 'few',
           BEST_ON_TEST: 'best epoch on test, for comparison only'}
CONDITIONS = ('epochs', 'precision', 'fingerprint')
CONDITION_OPTIONS = ('epochs', 'amp', 'amp_dtype')  # options that CONDITIONS already show
PUBLISHED = {  # (recipe, options) -> top-1 in percent on CIFAR-100-LT
    # GLMC: arXiv 2305.08661 and, after the slash, the authors' README of 23 May 2023; both the best epoch on the test set
    ('cifar100_lt_if100', ''): '55.88 / 57.97',
    ('cifar100_lt_if50', ''): '61.08 / 63.78',
    ('cifar100_lt_if10', ''): '70.74 / 73.40',
    ('cifar100_lt_if100', 'method=ce'): '38.3',
    ('cifar100_lt_if100', 'method=glmc_no_consistency'): '44.63',
    ('cifar100_lt_if100', 'method=glmc_balanced'): '50.11',
    # The best in the literature for this width, from the headers of the recipes
    ('cifar100_lt_if100_resnet32', ''): '54.2 (ProCo, 400 epochs)',
    ('cifar100_lt_if50_resnet32', ''): '57.1 (ProCo)',
    ('cifar100_lt_if10_resnet32', ''): '65.5 (ProCo)',
}


def main() -> None:
    parser = Parser(prog='python -m glmc.sweep.tables', verbatim=True, description=__doc__)
    parser.add_argument('csv', type=Path, help='table of runs, written by --csv of python -m glmc.sweep')
    path = parser.parse_args().csv
    runs = read_runs(path)
    readme = path.with_name('README.md')
    write_table(readme, path.stem, markdown_table(runs))
    print(f'{readme}: table of {path}, runs: {len(runs)}')


def group_runs(runs: Iterable[dict[str, str]]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Group runs that differ in their seed only; the first of two runs with the same seed is kept.

    Returns:
        (recipe, options, *CONDITIONS) -> rows of the CSV.
    """
    groups = {}
    for run in runs:
        options = [option for option in run.get('options', '').split() if option.split('=')[0] not in CONDITION_OPTIONS]
        conditions = (run.get(name, '') for name in CONDITIONS)
        key = (Path(run.get('recipe', '')).stem, ' '.join(options), *conditions)
        groups.setdefault(key, {}).setdefault(run['seed'], run)
    return {key: list(by_seed.values()) for key, by_seed in groups.items()}


def markdown_table(runs: Iterable[dict[str, str]]) -> str:
    """One row for each group of runs, in the order of the CSV."""
    head = ['recipe', 'options', 'published', *COLUMNS.values(), 'seeds', 'conditions']
    rows = [head, ['---'] * len(head)]
    for (recipe, options, epochs, precision, fingerprint), group in group_runs(runs).items():
        values = [[float(run[name]) if run.get(name) else None for run in group] for name in COLUMNS]
        conditions = f'{epochs} epochs, {PRECISIONS.get(precision, precision)}, images {fingerprint[:8]}'
        rows.append([recipe or '–', options and f'`{options}`', PUBLISHED.get((recipe, options), '–'),
                     *map(mean_std, values), str(len(group)), conditions])
    return '\n'.join(f"| {' | '.join(row)} |" for row in rows)


def write_table(readme: Path, name: str, table: str) -> None:
    """Replace the text between the markers of a table.

    Raises:
        InputError: If the page cannot be read or does not have these markers exactly once.
    """
    try:
        text = readme.read_text(encoding='utf-8')
    except OSError as error:
        raise InputError(f'{readme}: cannot be read: {error.strerror}; expected a page for the table') from error
    marker = f'<!-- table: {name} -->'
    text, count = re.subn(f'({re.escape(marker)}\n)(?:(?!<!-- table: ).)*?(<!-- end -->)',
                          lambda match: f'{match[1]}\n{table}\n\n{match[2]}', text, flags=re.S)
    if count != 1:
        raise InputError(f'{readme}: found {count} tables between `{marker}` and `<!-- end -->`; expected one')
    with atomic_write(readme) as temporary:
        temporary.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    sys.exit(run_script(main))
