"""Parsers of train_glmc.py and finetune_glmc.py."""
from glmc.cli import Options, Parser
from glmc.config.groups import DATA, GROUPS, actions, add_groups, count, hub_options, job_options, names

OBSOLETE = {'aug_views': 'both', 'mix_lambda': 'shared'}  # removed options -> the default that older files contain
INPUT = ('img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct')  # options of create_model and the data config
# Defaults for the embedded digits, which are used if no data is given.
DEMONSTRATION = dict(model='resnet10t', epochs=30, img_size=32, imbalance_factor=20.0, augmentation='cifar', hflip=0.0)
# Defaults with pretrained weights (hparams/pretrained.yaml), compared on held-out images (results/pretrained-choices.csv).
FINE_TUNING = dict(head_init='probe', freeze_bn=True, smoothing=0.1, lr_base=0.02, scale=[0.4, 1.0], epochs=5)
FINETUNE_HELP = {  # additions to the help of finetune_glmc.py
    'stage2': '; a linear_probe comes first if the model has no trained classifier for these classes',
    'feature_views': '; 0 by default with a linear_probe', 'stage2_holdout': '; 0.2 with a linear_probe',
    'workers': '; default: one per core, at most 16'}
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
    parser.presets = lambda options: {
        **(FINE_TUNING if is_pretrained(options) else {}), **methods[options.method].defaults,
        **({} if has_data(options) else DEMONSTRATION)}
    parser.hide({*names(*GROUPS)} - COMMON)
    return parser


def has_data(options: Options) -> bool:
    """Return whether the options name any images; else the embedded digits are used."""
    return bool(options.data_dir or options.dataset or options.train_list)


def is_pretrained(options: Options) -> bool:
    """Return whether the model starts from trained weights."""
    return bool(options.pretrained or options.initial_checkpoint)


def _resolve_balanced(options: Options) -> None:
    """Replace `--balanced` by the method that it is an alias of."""
    if options.balanced and options.method == 'glmc':
        options.method = 'glmc_balanced'


def finetune_parser() -> Parser:
    """Return the parser of finetune_glmc.py."""
    parser = Parser(
        prog='finetune_glmc.py',
        description='Train classifiers on the features of a trained or pretrained model, in seconds, and compare them.')
    add_config(parser)
    parser.add_argument('--model', nargs='+', metavar='NAME',
        help='timm architecture with its pretrained weights, hf-hub:ORG/NAME or local-dir:FOLDER; or a trained model: '
        'export folder, run folder or checkpoint; several give a table of means')
    _input_options(parser.add_argument_group('model input'))
    add_groups(parser, *DATA, 'augmentation', 'stage 2')
    group = parser.add_argument_group('running and output')
    job_options(group, experiment='stage2-MODEL')
    group.add_argument('--seed', type=count, default=42, help='seed of all random numbers')
    hub_options(group)
    parser.set_defaults(stage2='all', workers=None)
    for name, text in FINETUNE_HELP.items():
        next(action for action in parser._actions if action.dest == name).help += text
    parser.hide({*names(*DATA, 'augmentation'), *INPUT} - COMMON)
    return parser


def _input_options(group) -> None:
    """Add the options of `model input` that set the size and the preprocessing of the images."""
    for action in actions('model input'):
        if action.dest in (*INPUT, 'input_size'):
            group._add_action(action)


def add_config(parser: Parser) -> None:
    """Add `--config`."""
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line takes precedence')
