"""Parsers of the scripts, of glmc.predict and of glmc.data.check, without the imports of torch and timm."""
import argparse
import ast
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from glmc.cli import Options, Parser, read_yaml
from glmc.config.groups import (
    DATA,
    GROUPS,
    TARGETS,
    actions,
    add_groups,
    adjustment_options,
    count,
    fraction,
    hub_options,
    input_size_options,
    job_options,
    names,
    positive_int,
    precision_options,
)
from glmc.config.rules import as_words

OBSOLETE = {'aug_views': 'both', 'mix_lambda': 'shared'}  # removed options -> the default that older files contain
INPUT = ('img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct')  # options of create_model and the data config
# Defaults for the embedded digits, which are used if no data is given.
DEMONSTRATION = dict(model='resnet10t', epochs=30, img_size=32, imbalance_factor=20.0, augmentation='cifar', hflip=0.0)
# Defaults with pretrained weights (hparams/pretrained.yaml), compared on held-out images (results/pretrained-choices.csv).
FINE_TUNING = dict(
    method='balanced_softmax', head_init='probe', freeze_bn=True, smoothing=0.1, lr_base=0.02, clip_grad=5.0,
    sched_on_updates=True, scale=[0.4, 1.0], epochs=5)
# Defaults from scratch (hparams/scratch.yaml), compared in results/frontier.csv; those of the optimizer go with it to other
# methods.
SCRATCH = dict(
    method='glmc_one_view', opt='nmuon', lr_base=0.02, lr_base_scale='sqrt', momentum=0.95, weight_decay=0.05,
    sched_on_updates=True)
FINETUNE_HELP = {  # additions to the help of finetune_glmc.py
    'stage2': '; a linear_probe comes first if the model has no trained classifier for these classes',
    'feature_views': '; 0 by default with a linear_probe', 'stage2_holdout': '; 0.2 with a linear_probe',
    'workers': '; default: one per core, at most 16'}
VALIDATE_HELP = {  # help of options that train_glmc.py has with another meaning
    'class_counts': "training images per class, which decide the shot groups: JSON list, metrics.json of a run, or one "
    "number per line; default: the export's",
    'num_classes': 'classes of a timm architecture; default: those of its pretrained weights',
}
PARTS = ('plain', 'run', 'step', 'input', 'timm')  # of a benchmark; methods of `benchmark.measure.Benchmark`
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
    parser.resolve = _resolve_defaults
    parser.presets = lambda options: {
        **(FINE_TUNING if is_pretrained(options) else SCRATCH if options.opt == SCRATCH['opt'] else {}),
        **methods[options.method].defaults,
        **({} if has_data(options) else DEMONSTRATION), 'method': options.method}
    parser.hide({*names(*GROUPS)} - COMMON)
    return parser


def method_rows() -> dict[str, SimpleNamespace]:
    """Return names, summaries and aliases of METHODS for a help, read from its source, since its import takes seconds."""
    tree = ast.parse(find_spec('glmc.methods').loader.get_source('glmc.methods'))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == 'METHODS')
    rows = {}
    for name, row in zip(table.keys, table.values, strict=True):
        fields = {keyword.arg: keyword.value for keyword in row.keywords if keyword.arg in ('summary', 'aliases')}
        rows[name.value] = SimpleNamespace(
            **{'aliases': (), 'defaults': {}, **{key: ast.literal_eval(value) for key, value in fields.items()}})
    return rows


def has_data(options: Options) -> bool:
    """Return whether the options name any images; else the embedded digits are used."""
    return bool(options.data_dir or options.dataset or options.train_list)


def add_run_data(options: Options, explicit: set[str], model: str) -> list[str]:
    """Set the data options to those of the run that trained a model, where the user names no images.

    Args:
        options: Options of a script; changed.
        explicit: Names of the options that the user set, which stay.
        model: Run folder, or the export in it; else nothing changes.

    Returns:
        Words of the command line for the options that were set.

    Raises:
        InputError: If args.yaml of the folder cannot be read.
    """
    folder = Path(model).parent if Path(model).name == 'export' else Path(model)
    if {'data_dir', 'dataset', 'train_list', 'val_list'} & explicit or not (folder / 'args.yaml').is_file():
        return []
    parser, words = train_parser(method_rows()), []
    known = read_yaml(parser, str(folder / 'args.yaml'))
    for name in (*names(*DATA), 'seed'):
        if name in vars(options).keys() - explicit and known.get(name, getattr(options, name)) != getattr(options, name):
            setattr(options, name, known[name])
            words += as_words(name, known[name])
    return words


def is_pretrained(options: Options) -> bool:
    """Return whether the model starts from trained weights."""
    return bool(options.pretrained or options.initial_checkpoint)


def _resolve_defaults(options: Options) -> None:
    """Replace `--balanced` by the method that it is an alias of, and a missing method or optimizer by the default."""
    if options.balanced and options.method in (None, 'glmc'):
        options.method = 'glmc_balanced'
    pretrained = is_pretrained(options)
    options.method = options.method or (FINE_TUNING if pretrained else SCRATCH)['method']
    by_muon = options.method == SCRATCH['method'] and not pretrained
    options.opt = options.opt or (SCRATCH['opt'] if by_muon else 'momentum')


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


def validate_parser() -> Parser:
    """Return the parser of validate_glmc.py."""
    parser = Parser(
        prog='validate_glmc.py',
        description='Evaluate an export, checkpoint, Hub id or timm model on long-tailed classes.')
    add_config(parser)
    add_groups(parser, 'data')
    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet18', metavar='NAME',
        help='export folder, run folder, checkpoint, hf-hub:ORG/NAME, or timm architecture with its pretrained weights')
    add('--checkpoint', metavar='FILE', help='weights for an architecture (.safetensors or .pth)')
    add_groups(parser, 'model input')
    _evaluation_group(parser)
    job_options(parser.add_argument_group('running and output'), experiment='validate-MODEL')
    for action in parser._actions:
        action.help = VALIDATE_HELP.get(action.dest, action.help)
    parser.hide({*names('data', 'model input')} - COMMON - {*VALIDATE_HELP})
    return parser


def _evaluation_group(parser: Parser) -> None:
    """Add the options of an evaluation."""
    group = parser.add_argument_group('evaluation')
    add = group.add_argument
    add('--shot-thresholds', type=count, nargs=2, metavar=('FEW', 'MANY'),
        help="few-shot <= FEW < medium-shot <= MANY < many-shot training images; default: the training's, else 20 100")
    add('--test-distribution', choices=TARGETS,
        help='keep test images so that their class distribution is uniform, that of the training set (forward) or its '
        'reverse (backward), as in the test-agnostic benchmark (arXiv 2107.09249)')
    adjustment_options(group, measured='test (that of the evaluated images), ')
    add('--compare', nargs='+', metavar='FOLDER', help='compare the results in these folders in one report; no evaluation')


def predict_parser() -> Parser:
    """Return the parser of glmc.predict."""
    parser = Parser(
        prog='python -m glmc.predict', usage='%(prog)s MODEL FOLDER_OR_FILES … [options]',
        description='Predict the classes of images with a trained model, as a CSV: file, label, probability, then the next '
        'classes.',
        epilog='exit code: 0, also if some images cannot be read; 1 if none can be predicted; 2 for wrong input')
    add_config(parser)
    add = parser.add_argument
    add('model', metavar='MODEL', help='run folder, export folder, checkpoint, hf-hub:ORG/NAME, or timm architecture')
    add('files', nargs='+', metavar='FOLDER_OR_FILES', help='images, and folders that are searched with their subfolders')
    add = parser.add_argument_group('output').add_argument
    add('--output', default='predictions.csv', metavar='FILE', help='CSV to write or replace; - for standard output')
    add('--topk', type=positive_int, default=5, metavar='K', help='classes per image, at most all')
    add('--threshold', type=fraction, metavar='P',
        help='empty the label of images whose probability is below P; a column `uncertain` names the class')
    group = parser.add_argument_group('prediction')
    adjustment_options(group)
    add = group.add_argument
    add('--class-counts', metavar='FILE', help="training images per class, for --target-prior: JSON list, metrics.json of a "
        "run, or one number per line; default: the export's")
    input_size_options(group)
    group = parser.add_argument_group('running')
    add = group.add_argument
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per step')
    add('-j', '--workers', type=count, default=2, metavar='N', help='loader processes')
    precision_options(group, "the launcher's, else that of the training")
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser


def check_parser() -> Parser:
    """Return the parser of glmc.data.check."""
    parser = Parser(
        prog='python -m glmc.data.check', usage='%(prog)s [DIR] [options]',
        description='Scan an image set before training: decode every image once, list unreadable and duplicate images, and '
        'suggest options. No file is changed.',
        epilog='exit code: 0 without problems, 1 if an image cannot be decoded, is in two sets or has two labels, 2 for '
        'wrong options')
    parser.add_argument('folder', nargs='?', metavar='DIR', help='the same as --data-dir DIR')
    add_groups(parser, *DATA)
    parser.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='processes that decode')
    parser.add_argument('--measure', action='store_true',
        help='train three steps of the advised model to estimate time and memory')
    return parser


def benchmark_parser(methods: dict, description: str) -> Parser:
    """Return the parser of benchmark_glmc.py: options of train_glmc.py, which only `--help-all` lists, and its own.

    Args:
        methods: Name -> row of the table of methods.
        description: Text of the help.
    """
    parser = train_parser(methods)
    parser.set_defaults(method='glmc')  # the plain loop is one of GLMC
    parser.hidden = frozenset(action.dest for action in parser._actions if action.dest not in ('help', argparse.SUPPRESS))
    parser.prog, parser.description = 'benchmark_glmc.py', description
    parser.usage = 'benchmark_glmc.py [options of the benchmark] [options of train_glmc.py]'
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument_group('benchmark').add_argument
    add('--rounds', type=positive_int, default=5, metavar='N', help='turns of each part; default: 5')
    add('--steps', type=positive_int, default=20, metavar='N', help='timed steps in a turn; default: 20')
    add('--skip', nargs='*', default=[], choices=PARTS, metavar='PART', help=f"parts to skip: {', '.join(PARTS)}")
    add('--compare-loss', action='store_true',
        help='first compare losses and gradients of plain and run on the same images; exit code 1 if they differ')
    add('--json', metavar='FILE', help='write all measurements to this file')
    add('--csv', metavar='FILE', help='append one row for each part to this file')
    return parser
