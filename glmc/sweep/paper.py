"""What stands beside our results on CIFAR-100-LT: rows of the paper's tables, what is run for each, published numbers.

Top-1 in percent on the 10,000 balanced test images, trained from scratch. Paper: arXiv 2305.08661, ResNet-32 at 64/128/256
channels (7.4 M parameters). Update: the authors' README of 23 May 2023, best epoch on the test set.
"""
from dataclasses import dataclass, field

IF100 = 'cifar100_lt_if100'
BASE = dict(consistency_weight=4, reweight_power=1.2, resample_power=0)  # of that recipe: no option where a value is its own


@dataclass(frozen=True)
class Setting:
    """What is run for a row: a recipe of hparams/, and the options that differ from it."""
    label: str
    recipe: str = IF100
    options: dict = field(default_factory=dict)
    published: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableSpec:
    """A table with a row for each setting.

    Args:
        what: Head of the first column.
        settings: Its rows.
        published: Heads of the columns of published numbers.
        base: What the others are compared with, each seed with the same.
        best: Whether to show what the best epoch on the test images would be.
    """
    what: str
    settings: tuple[Setting, ...]
    published: tuple[str, ...] = ()
    base: Setting | None = None
    best: bool = False

    @property
    def rows(self) -> tuple[Setting, ...]:
        """The base first, if there is one."""
        return (*([self.base] if self.base else []), *self.settings)


def changed(label: str, **options) -> Setting:
    """The recipe for IF = 100 with these options."""
    return Setting(label, options={name: value for name, value in options.items() if BASE.get(name) != value})


GAMMAS = (0, 1, 2, 4, 6, 10, 15)
REWEIGHT_POWERS = (0, 0.4, 0.8, 1.2, 1.6)
RESAMPLE_POWERS = (0, 0.2, 0.4, 0.6, 1)
CONSISTENCY = {gamma: changed(f'γ = {gamma}', consistency_weight=gamma) for gamma in GAMMAS}
POWERS = {(k, q): changed(f'k = {k}, q = {q}', reweight_power=k, resample_power=q)
          for k in REWEIGHT_POWERS for q in RESAMPLE_POWERS}
HELD_OUT = dict(holdout=50)  # images of each class, set aside before the tail is cut: levers are chosen on them
LEVERS = tuple(changed(f"`--{name.replace('_', '-')} {value}`", **HELD_OUT, **{name: value}) for name, value in (
    ('sam_rho', 0.05), ('swa_start', 0.6), ('aa', 'rand-m9-mstd0.5'), ('mix_lambda', 'per_view'), ('cutmix_lambda', 'area'),
    ('resample_power', 1), ('method', 'glmc_cosine'), ('alpha_scope', 'encoder'), ('mix_beta', 0.2), ('lr', 0.02),
    ('weight_decay', 0.002)))
TABLES = {
    'main': TableSpec(
        'imbalance', published=('paper', 'update, best epoch on test'), best=True, settings=(
            Setting('IF = 100', IF100, published=('55.88', '57.97')),
            Setting('IF = 50', 'cifar100_lt_if50', published=('61.08', '63.78')),
            Setting('IF = 10', 'cifar100_lt_if10', published=('70.74', '73.40')))),
    'ablation': TableSpec(
        'IF = 100', published=('paper',), settings=(
            Setting('cross-entropy', options=dict(method='ce'), published=('38.3',)),
            Setting('+ cumulative class-balanced', options=dict(method='glmc_no_consistency'), published=('44.63',)),
            Setting('+ mixture consistency', options=dict(method='glmc_no_rebalance'), published=('50.11',)),
            Setting('both: GLMC', published=('55.88',)))),
    'consistency': TableSpec('consistency weight', tuple(CONSISTENCY.values())),
    'levers': TableSpec('IF = 100, held-out images', LEVERS, base=Setting('the recipe', options=HELD_OUT)),
    'narrow': TableSpec(
        'ResNet-32, 0.47 M parameters', published=('best in the literature: ProCo',), best=True, settings=(
            Setting('IF = 100', 'cifar100_lt_if100_resnet32', published=('54.2 (400 epochs)',)),
            Setting('… cross-entropy, lr 0.05', 'cifar100_lt_if100_resnet32', dict(method='ce', lr=0.05), ('–',)),
            Setting('IF = 50', 'cifar100_lt_if50_resnet32', published=('57.1',)),
            Setting('IF = 10', 'cifar100_lt_if10_resnet32', published=('65.5',)))),
}
