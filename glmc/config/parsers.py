"""Parsers of train_glmc.py and finetune_glmc.py."""
from glmc.cli import Options, Parser
from glmc.config.groups import DATA, GROUPS, add_groups, count, hub_options, job_options, names

OBSOLETE = {'aug_views': 'both', 'mix_lambda': 'shared'}  # removed options -> the default that older files contain
# Defaults for the embedded digits, which are used if no data is given.
DEMONSTRATION = dict(model='resnet10t', epochs=30, img_size=32, imbalance_factor=20.0, augmentation='cifar', hflip=0.0)
COMMON = frozenset((  # options that `--help` shows; `--help-all` shows all
    'config', 'data_dir', 'dataset', 'train_list', 'val_list', 'val_split', 'holdout', 'imbalance_factor', 'augmentation',
    'model', 'pretrained', 'img_size', 'method', 'stage2', 'batch_size', 'opt', 'lr', 'weight_decay', 'epochs',
    'warmup_epochs', 'amp_dtype', 'workers', 'seed', 'output', 'experiment', 'resume', 'push_to_hub'))


def train_parser(methods: dict) -> Parser:
    """Return the parser of train_glmc.py.

    Args:
        methods: Name -> row of the table of methods.
    """
    parser = Parser(
        prog='train_glmc.py',
        description='Train a timm model on long-tailed images with GLMC. Without data: a demonstration on digits.')
    add_config(parser)
    add_groups(parser, *GROUPS)
    aliases = {alias: name for name, row in methods.items() for alias in row.aliases}

    def method_name(text: str) -> str:
        return aliases.get(text, text)

    method = parser._option_string_actions['--method']
    method.type, method.choices = method_name, list(methods)
    method.full_help = f"{method.help}. " + '; '.join(f'{name}: {row.summary}' for name, row in methods.items())
    method.help += f": {', '.join(methods)}; see docs/methods.md"
    parser.obsolete = OBSOLETE
    parser.resolve = _resolve_balanced
    parser.presets = lambda options: {**methods[options.method].defaults, **({} if has_data(options) else DEMONSTRATION)}
    parser.hide({*names(*GROUPS)} - COMMON)
    return parser


def has_data(options: Options) -> bool:
    """Return whether the options name any images; else the embedded digits are used."""
    return bool(options.data_dir or options.dataset or options.train_list)


def _resolve_balanced(options: Options) -> None:
    """Replace `--balanced` by the method that it is an alias of."""
    if options.balanced and options.method == 'glmc':
        options.method = 'glmc_balanced'


def finetune_parser() -> Parser:
    """Return the parser of finetune_glmc.py."""
    parser = Parser(
        prog='finetune_glmc.py',
        description='Stage 2: train classifiers on the features of a trained model, in seconds, and compare them.')
    add_config(parser)
    parser.add_argument('--model', nargs='+', metavar='NAME',
        help='trained model: export folder, run folder, checkpoint or hf-hub:ORG/NAME; several give a table of means')
    add_groups(parser, *DATA, 'augmentation', 'stage 2')
    group = parser.add_argument_group('running and output')
    job_options(group, experiment='stage2-MODEL')
    group.add_argument('--seed', type=count, default=42, help='seed of all random numbers')
    hub_options(group)
    parser.set_defaults(stage2='all', workers=None)
    parser._option_string_actions['--workers'].help += '; default: one per core, at most 16'
    parser.hide({*names(*DATA, 'augmentation')} - COMMON)
    return parser


def add_config(parser: Parser) -> None:
    """Add `--config`."""
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line takes precedence')
