"""Runs that differ in nothing but their seed, found in a table of runs, and their figures."""
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from glmc.evaluation.text import mean_std
from glmc.sweep.paper import Setting
from glmc.sweep.runs import as_text

CONDITIONS = ('epochs', 'precision', 'fingerprint')  # of a run beside its setting: what may not be averaged over
IN_CONDITIONS = ('epochs', 'amp', 'amp_dtype')  # options that one of them tells
PRECISION = {'no': 'float32', 'fp16': 'float16', 'bf16': 'bfloat16'}


@dataclass(frozen=True)
class Group:
    """Runs of a setting under the same conditions, seed -> line of the table; of two with a seed, the first."""
    condition: tuple[str, ...]
    runs: dict[str, dict]

    def values(self, column: str, seeds: Iterable[str] | None = None) -> list[float | None]:
        cells = [self.runs[seed].get(column) for seed in (self.runs if seeds is None else seeds)]
        return [float(cell) if cell else None for cell in cells]

    def text(self, column: str) -> str:
        return mean_std(self.values(column))

    def gain(self, base: 'Group') -> str:
        """Mean ± deviation of what each seed gains in top-1 over the same seed of the base."""
        seeds = [seed for seed in self.runs if seed in base.runs]
        pairs = list(zip(self.values('top1', seeds), base.values('top1', seeds), strict=True))
        if not pairs or None in sum(pairs, ()):
            return '–'
        gains = [here - there for here, there in pairs]
        return f"{'+' if statistics.mean(gains) > 0 else ''}{mean_std(gains)}"

    def how(self) -> str:
        """The conditions in words."""
        epochs, precision, fingerprint = self.condition
        return f"{epochs} epochs, {PRECISION.get(precision, precision) or 'precision unknown'}, images {fingerprint[:8]}"


def options_of(run: dict) -> dict[str, str]:
    """What the run has other than its recipe, without what the conditions tell."""
    pairs = (word.partition('=') for word in (run.get('options') or '').split())
    return {name: value for name, _, value in pairs if name not in IN_CONDITIONS}


def matches(run: dict, setting: Setting) -> bool:
    wanted = {name: as_text(value) for name, value in setting.options.items()}
    return PurePosixPath(run.get('recipe') or '').stem == setting.recipe and options_of(run) == wanted


def find_groups(runs: Sequence[dict], setting: Setting) -> list[Group]:
    """All groups of a setting, that with most epochs first."""
    found = {}
    for run in runs:
        if matches(run, setting):
            condition = tuple(run.get(name) or '' for name in CONDITIONS)
            found.setdefault(condition, {}).setdefault(run['seed'], run)
    groups = [Group(condition, members) for condition, members in found.items()]
    return sorted(groups, key=lambda group: -int(group.condition[0] or 0))


def most_complete(runs: Sequence[dict], settings: dict) -> dict:
    """Key -> group of the conditions under which most of the settings were run; the first of several."""
    by_condition = {}
    for key, setting in settings.items():
        for group in find_groups(runs, setting):
            by_condition.setdefault(group.condition, {})[key] = group
    return max(by_condition.values(), key=len, default={})
