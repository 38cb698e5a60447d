"""All tables and plots of CIFAR-100-LT out of the table of runs that the sweeps have written.

    python -m glmc.sweep.tables results/cifar100-lt.csv

Tables go between `<!-- table: NAME -->` and `<!-- end -->` in the README.md beside the file, plots beside the file. What has
not been run says so.
"""
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from glmc.cli import Parser, run_script
from glmc.errors import InputError
from glmc.sweep.groups import Group, find_groups, matches, most_complete, options_of
from glmc.sweep.paper import CONSISTENCY, POWERS, RESAMPLE_POWERS, REWEIGHT_POWERS, TABLES, Setting, TableSpec
from glmc.sweep.runs import BEST, read_runs

FIGURES = {'top1': 'top-1, last epoch', 'many': 'many', 'medium': 'medium', 'few': 'few'}
BLOCK = re.compile(r'(<!-- table: ([\w-]+) -->\n)((?:(?!<!-- table: ).)*?)(<!-- end -->)', re.S)
GAIN, PEEK = 'gain in top-1, same seeds', 'no result: top-1 of the best epoch, chosen on the test images'
NOT_YET = 'not yet run'
NOTHING = 'Not yet run; the command is in [recipes and results](../docs/recipes-and-results.md).'


def main() -> None:
    parser = Parser(
        prog='python -m glmc.sweep.tables', verbatim=True, description=__doc__)
    parser.add_argument('csv', type=Path, help='table of runs, as --csv of glmc.sweep')
    path = parser.parse_args().csv
    runs = read_runs(path)
    write_tables(path.with_name('README.md'), make_tables(runs, path.stem))
    plots = write_plots(path, runs)
    left = [f"{run['run']}, seed {run['seed']}" for run in runs if not is_shown(run, runs)]
    print(f"{len(runs)} runs in {path.with_name('README.md')}{', '.join(['', *map(str, plots)])}")
    if left:
        print(f"{len(left)} of them are in no table: {'; '.join(left)}", file=sys.stderr)


def make_tables(runs: Sequence[dict], stem: str) -> dict[str, str]:
    """Name of a table -> Markdown; `stem` names the plots."""
    tables = {name: listing_table(listing, runs) for name, listing in listings(runs).items()}
    tables['consistency'] = with_plot(tables['consistency'], f'{stem}-consistency.png', 'Top-1 over the consistency weight')
    tables['powers'] = with_plot(powers_table(runs), f'{stem}-powers.png', 'Top-1 over the powers k and q')
    return tables


def listings(runs: Sequence[dict]) -> dict[str, TableSpec]:
    """The tables; what else was run of the recipe for IF = 100 is a lever."""
    known = [setting for listing in TABLES.values() for setting in listing.rows] + list(POWERS.values())
    more = {}
    for run in runs:
        options = options_of(run)
        setting = Setting(f"`{' '.join(f'{name}={value}' for name, value in options.items())}`", options=options)
        if matches(run, setting) and not any(matches(run, other) for other in known):
            more[setting.label] = setting
    levers = TABLES['levers']
    return {**TABLES, 'levers': replace(levers, settings=(*levers.settings, *more.values()))}


def is_shown(run: dict, runs: Sequence[dict]) -> bool:
    settings = [setting for listing in listings(runs).values() for setting in listing.rows]
    in_powers = [member for group in most_complete(runs, POWERS).values() for member in group.runs.values()]
    return run in in_powers or any(matches(run, setting) for setting in settings)


def listing_table(listing: TableSpec, runs: Sequence[dict]) -> str:
    """A row for each setting, or for each of its conditions if there are several."""
    if not any(find_groups(runs, setting) for setting in listing.settings):
        return NOTHING
    more = [*([GAIN] if listing.base else []), *([PEEK] if listing.best else [])]
    head = [listing.what, *listing.published, *FIGURES.values(), *more, 'seeds', 'how']
    rows = []
    for setting in listing.rows:
        left = [setting.label, *setting.published]
        groups = find_groups(runs, setting)
        rows += [[*left, *group_cells(group, listing, runs)] for group in groups]
        if not groups:
            rows.append([*left, NOT_YET, *[''] * (len(head) - len(left) - 1)])
    return markdown(head, rows)


def group_cells(group: Group, listing: TableSpec, runs: Sequence[dict]) -> list[str]:
    cells = [group.text(name) for name in FIGURES]
    if listing.base:
        bases = [base for base in find_groups(runs, listing.base) if base.condition == group.condition]
        cells.append(group.gain(bases[0]) if bases and bases[0].runs != group.runs else '–')
    if listing.best:
        cells.append(group.text(BEST))
    return [*cells, str(len(group.runs)), group.how()]


def powers_table(runs: Sequence[dict]) -> str:
    """k down, q across: mean top-1."""
    found = most_complete(runs, POWERS)
    if not found:
        return NOTHING
    rows = [[f'k = {k}', *(found[k, q].text('top1') if (k, q) in found else NOT_YET for q in RESAMPLE_POWERS)]
            for k in REWEIGHT_POWERS]
    seeds = sorted({len(group.runs) for group in found.values()})
    caption = (f"Top-1, last epoch; {next(iter(found.values())).how()}; "
               f"seeds in a cell: {' or '.join(map(str, seeds))}.")
    return f"{markdown(['', *(f'q = {q}' for q in RESAMPLE_POWERS)], rows)}\n\n{caption}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)


def with_plot(table: str, file: str, title: str) -> str:
    return table if table == NOTHING else f'{table}\n\n![{title}]({file})'


def write_tables(readme: Path, tables: dict[str, str]) -> None:
    """Put each table between its markers.

    Raises:
        InputError: If there are none, or a name that is no table.
    """
    try:
        text = readme.read_text(encoding='utf-8')
    except OSError as error:
        raise InputError(f'{readme}: expected the page for the tables: {error.strerror}') from error
    names = re.findall(r'<!-- table: (.*?) -->', text)
    unknown = [name for name in names if name not in tables]
    if unknown or [match[2] for match in BLOCK.finditer(text)] != names or not names:
        raise InputError(f"{readme}: expected `<!-- table: NAME -->` and `<!-- end -->` around each of {', '.join(tables)}; "
                         f"found {', '.join(names) or 'none'}")
    text = BLOCK.sub(lambda match: f'{match[1]}\n{tables[match[2]]}\n\n{match[4]}', text)
    beside = readme.with_name(f'{readme.name}.tmp')
    beside.write_text(text, encoding='utf-8')
    os.replace(beside, readme)


def write_plots(path: Path, runs: Sequence[dict]) -> list[Path]:
    """Figures 4 and 3 of the paper over our runs, as far as there are any."""
    from glmc.report import plots
    from glmc.sweep.plots import heat_map, means_over
    written = []
    consistency = {gamma: group.values('top1') for gamma, group in most_complete(runs, CONSISTENCY).items()}
    powers = {key: group.values('top1') for key, group in most_complete(runs, POWERS).items()}
    for name, plot, values, args in (
            ('consistency', means_over, consistency, ('consistency weight γ', 'top-1, %')),
            ('powers', heat_map, powers, ('resampling power q', 'reweighting power k', 'top-1, %'))):
        if values:
            written.append(path.with_name(f'{path.stem}-{name}.png'))
            plots.save_png(plots.make_figure(plot, values, *args), written[-1])
    return written


if __name__ == '__main__':
    sys.exit(run_script(main))
