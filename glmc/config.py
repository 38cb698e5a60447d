"""Options of train_glmc.py in pipeline order. Names and meaning are timm's wherever timm has the option."""
import argparse
import re
from functools import lru_cache

from huggingface_hub.utils import HFValidationError, validate_repo_id

from glmc.cli import Options, ParseKwargs, Parser, number, pick

positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 0, open_low=True)
non_negative = number(float, 0)
fraction = number(float, 0, 1)
below_one = number(float, 0, 1 - 1e-9, open_low=True)
part = number(float, 0, 1, open_low=True)
finite = number(float, float('-inf'))

TRACKERS = ('tensorboard', 'wandb', 'trackio')


def trackers(text: str) -> str:
    """argparse type: names of TRACKERS with commas between."""
    unknown = [name for name in text.split(',') if name not in TRACKERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(TRACKERS)}; found {unknown[0]!r}")
    return text


def interval(text: str) -> str:
    """argparse type: steps as 500, or minutes as 10m."""
    if not re.fullmatch(r'0*[1-9]\d*|(?=.*[1-9])\d+(\.\d+)?m', text):
        raise argparse.ArgumentTypeError(f'expected steps as 500 or minutes as 10m, found {text}')
    return text


def repo_id(text: str) -> str:
    """argparse type: name of a Hub repository."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f'expected ORG/NAME or NAME, found {text!r}') from error
    return text


VIEWS = ('global', 'local')  # of each image, in their order in a batch

# Without any data, the embedded digits are trained on; these stand in for what the user did not say.
DEMONSTRATION = dict(epochs=30, img_size=32, imbalance_factor=20.0, augmentation='cifar', hflip=0.0)


def train_parser(methods: dict) -> Parser:
    """Parser of train_glmc.py.

    Args:
        methods: Name -> row of the table of methods.
    """
    parser = Parser(
        prog='train_glmc.py',
        description='Train a timm model on long-tailed images with GLMC. Without data: a demonstration on digits.')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line wins')
    add_groups(parser, *GROUPS)
    methods_help = '; '.join(f'{name}: {row.summary}' for name, row in methods.items())
    parser._option_string_actions['--method'].choices = list(methods)
    parser._option_string_actions['--method'].help += f' ({methods_help})'
    parser.presets = lambda options: dict(methods[options.method].defaults)
    return parser


def finetune_parser() -> Parser:
    """Parser of finetune_glmc.py."""
    parser = Parser(
        prog='finetune_glmc.py',
        description='Stage 2: train classifiers on the features of a trained model, in seconds, and compare them.')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line wins')
    parser.add_argument('--model', nargs='+', metavar='NAME',
        help='of stage 1: export folder, run folder, checkpoint, hf-hub:ORG/NAME; of several, a table of means')
    add_groups(parser, *DATA, 'augmentation', 'stage 2')
    _finetuning(parser)
    parser.set_defaults(stage2='all')
    return parser


def stage2_group(parser: Parser) -> None:
    """Options of stage 2, at the end of a run or by itself."""
    group = parser.add_argument_group('stage 2')
    add = group.add_argument
    add('--stage2', metavar='NAME[,NAME]', help='classifiers to train on the features of the trained model: all, or some of '
        'maxnorm, balanced_softmax, logit_adjust, crt, lws, tau_norm, los, ncm, average')
    add('--feature-views', type=count, default=2, metavar='V', help='augmented views of each image, beside the plain one')
    add('--stage2-holdout', type=positive, metavar='N',
        help='choose hyper-parameters on training images set aside (a number of each class, or a part); with --holdout, on '
        'those; default: no choice, published values')
    add('--stage2-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME.FIELD=V',
        help='hyper-parameters, which no choice then changes, e.g. maxnorm.project=epoch los.epochs=5')
    add('--feature-cache', metavar='DIR', help='where features are kept and found again; default: in the output')


def _finetuning(parser: Parser) -> None:
    group = parser.add_argument_group('running and output')
    add = group.add_argument
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images at a time through the encoder')
    add('-j', '--workers', type=count, default=2, metavar='N', help='loader processes')
    add('--amp', action='store_true', help='mixed precision in float16, or in --amp-dtype')
    add('--amp-dtype', choices=('float16', 'bfloat16'), help="of the encoder; default: as the launcher says, else stage 1's")
    add('--seed', type=count, default=42, help='of everything random')
    add('--output', default='output', metavar='DIR', help='parent folder of the results')
    add('--experiment', metavar='NAME', help='folder of these results; default: stage2-model, numbered')
    add('--report', action=argparse.BooleanOptionalAction, default=True, help='draw all classifiers together: report.html')
    add('--debug', action='store_true', help='show a traceback where an error is one line otherwise')
    hub_options(group)


def data_group(parser: Parser) -> None:
    """Options of every script that reads images."""
    group = parser.add_argument_group('data')
    add = group.add_argument
    add('--data-dir', metavar='DIR', help='image folders (or a tar), root of a list, or download folder')
    add('--dataset', default='', metavar='NAME', help="timm's source: empty for folders, torch/…, hfds/…, wds/…, tfds/…")
    add('--val-split', default='validation', help='name of the split to evaluate on; with --holdout it may be none')
    add('--val-list', metavar='FILE', help='`path label` lines (may be .gz) to evaluate on, paths relative to --data-dir')
    add('--num-classes', type=positive_int, help='number of classes; default: as found in the training data')
    add('--class-map', metavar='FILE', help="timm's class-to-index file")
    add('--input-key', help='column or key of the image (hfds, wds, tfds)')
    add('--target-key', help='column or key of the label')
    add('--dataset-download', action='store_true', help='let torch/ and tfds/ sources download')
    add('--class-counts', metavar='FILE', help='training images per class, for sources that cannot be indexed: '
        'JSON list, metrics.json of a run, or one number a line; default: one counting pass')


def training_data_group(parser: Parser) -> None:
    """Options of what is trained on."""
    group = parser.add_argument_group('training data')
    add = group.add_argument
    add('--train-split', default='train', help='name of the training split')
    add('--train-list', metavar='FILE', help='`path label` lines to train on')
    add('--holdout', type=positive, default=None, metavar='N',
        help='evaluate each epoch on training images set aside per class (a number, taken before the long tail is '
        'cut, or a fraction), keep the best epoch by class mean, and read the validation split once, at the end')


def long_tail_group(parser: Parser) -> None:
    """Options of the profile."""
    group = parser.add_argument_group('long tail')
    add = group.add_argument
    add('--imbalance-factor', type=number(float, 1), metavar='F',
        help='cut a long tail into a balanced set: the smallest class gets 1/F of the largest')
    add('--lt-type', choices=('exp', 'step'), default='exp', help='shape of the tail')
    add('--lt-split', choices=('cao', 'first', 'random'), default='cao', help='which images stay')
    add('--lt-seed', type=count, default=0, help='for --lt-split random')
    add('--shot-thresholds', type=count, nargs=2, default=[20, 100], metavar=('FEW', 'MANY'),
        help='few-shot <= FEW < medium-shot <= MANY < many-shot training images')


def _augmentation(parser: Parser) -> None:
    group = parser.add_argument_group('augmentation')
    add = group.add_argument
    add('--augmentation', choices=('timm', 'cifar', 'imagenet_lt'), default='timm',
        help='timm: by the flags below; cifar: crop with padding 4 and flip; imagenet_lt: random resized crop, '
        'jitter 0.4, grey 0.2, blur 0.5, flip')
    add('--no-aug', action='store_true', help='no augmentation: resize and centre crop')
    add('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'), help='random resized crop or its aspect-keeping kin')
    add('--scale', type=positive, nargs=2, default=[0.08, 1.0], metavar='PCT', help='area of the random resized crop')
    add('--ratio', type=positive, nargs=2, default=[3 / 4, 4 / 3], metavar='RATIO', help='its aspect ratio')
    add('--hflip', type=fraction, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=fraction, default=0.0, help='probability of a vertical flip')
    add('--color-jitter', type=non_negative, default=0.4, metavar='PCT', help='brightness, contrast, saturation')
    add('--color-jitter-prob', type=fraction, metavar='P', help='probability of the jitter; default: always')
    add('--grayscale-prob', type=fraction, default=0.0, metavar='P', help='probability of a grey image')
    add('--gaussian-blur-prob', type=fraction, default=0.0, metavar='P', help='probability of a blur')
    add('--aa', metavar='NAME', help='AutoAugment policy, e.g. rand-m9-mstd0.5, v0, augmix-…')
    add('--train-interpolation', default='random', choices=('random', 'bilinear', 'bicubic', 'nearest', 'lanczos'),
        help='of the training resize')


def _erasing(parser: Parser) -> None:
    group = parser.add_argument_group('random erasing')
    add = group.add_argument
    add('--reprob', type=fraction, default=0.0, metavar='P', help='probability of random erasing')
    add('--remode', choices=('const', 'rand', 'pixel'), default='pixel', help='what an erased box is filled with')
    add('--recount', type=positive_int, default=1, help='erased boxes')
    add('--rearea', type=fraction, nargs=2, default=[0.02, 1 / 3], metavar=('MIN', 'MAX'),
        help='their part of the image; 0.25 0.25 with --reaspect 1 --remode const is a Cutout of 16 in 32 pixels')
    add('--reaspect', type=part, default=0.3, metavar='MIN', help='their aspect ratio, MIN to 1 / MIN')


def _model(parser: Parser) -> None:
    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', default='resnet18', metavar='NAME', help='any timm architecture, hf-hub:… or local-dir:…')
    add('--pretrained', action='store_true', help="start from the architecture's pretrained weights")
    add('--initial-checkpoint', metavar='FILE', help='start from these weights (.safetensors or .pth)')
    add('--drop', type=fraction, metavar='PCT', help='drop-out before the classifier')
    add('--drop-path', type=fraction, metavar='PCT', help='stochastic depth')
    add('--grad-checkpointing', action='store_true', help='trade compute for memory')


def input_group(parser: Parser) -> None:
    """Options of what goes into a model, and of its shape."""
    group = parser.add_argument_group('model input')
    add = group.add_argument
    add('--img-size', type=positive_int, metavar='N', help="side of the input in pixels; default: the model's")
    add('--in-chans', type=int, choices=(1, 3), help="image channels, 1 or 3; default: the model's")
    add('--gp', metavar='POOL', help='global pooling: avg, max, avgmax, …')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='more for timm.create_model')
    add('--mean', type=finite, nargs='+', metavar='M', help="normalisation; default: the model's")
    add('--std', type=positive, nargs='+', metavar='S', help="normalisation; default: the model's")
    add('--interpolation', choices=('bilinear', 'bicubic', 'nearest', 'lanczos'), help='of the evaluation resize')
    add('--crop-pct', type=positive, metavar='PCT', help='of the evaluation centre crop')
    add('--channels-last', action=argparse.BooleanOptionalAction, default=True,
        help='memory layout that convolutions like')


def _views(parser: Parser) -> None:
    group = parser.add_argument_group('views')
    group.add_argument('--aug-views', choices=('both', *VIEWS), default='both',
        help='which view of each image gets --aa and --reprob, of methods with a global and a local one')


def _method(parser: Parser) -> None:
    group = parser.add_argument_group('method')
    add = group.add_argument
    add('--method', default='glmc', help='row of the table of methods')
    add('--resample-power', type=finite, default=0.0, metavar='Q',
        help='q: the second image of a pair is drawn with P ∝ n^-q; 0 uniform over images, 1 over classes; '
        'default of ce_resample and cmo: 1, of bbn: 2')
    add('--partner', choices=('sampler', 'batch'), default='sampler',
        help='draw the second image from all (as the paper) or inside the batch (half the decoding)')
    add('--mix-beta', type=positive, default=1.0, metavar='BETA', help='β of λ ~ Beta(β, β); default of the glmc rows: 0.2')
    add('--mixup-prob', type=fraction, default=1.0, metavar='P',
        help='probability that a batch is mixed; default of cmo: 0.5')
    add('--mix-lambda', choices=('shared', 'per_view'), default='shared',
        help='one λ for the global and the local view (as the paper), or one drawn for each')
    add('--cutmix-lambda', choices=('nominal', 'area'), default='nominal',
        help='label weight of a patch: λ, as the released code, or its pixels, clipped at the border; default of cutmix, '
        'cmo and the glmc rows: area')
    add('--reweight-power', type=finite, default=1.0, metavar='K', help='k: class weights ∝ n^-k')
    add('--consistency-weight', type=non_negative, default=1.0, metavar='GAMMA', help='γ of the consistency loss')
    add('--alpha-power', type=positive, default=2.0, metavar='P',
        help='α = 1 - (T/T_max)^P; 2 in the paper, the larger, the longer the conventional classifier leads')
    add('--alpha-scope', choices=('losses', 'encoder'), default='losses',
        help='what α moves from the conventional to the rebalanced classifier: the weight of their losses, as the paper, or '
        'only of what reaches the encoder, so that both learn in full all along, L_cb as a weighted mean; default of glmc: '
        'encoder')
    add('--projection-dim', type=positive_int, default=256, metavar='D', help='width d of projection and prediction')
    add('--joint-forward', action='store_true', help='encode both views as one batch; BatchNorm sees them together')
    add('--balanced', action='store_true', help='balanced data: no rebalanced classifier, L = L_c + γ·L_sim')
    add('--focal-gamma', type=non_negative, default=2.0, metavar='GAMMA', help='γ of the focal loss')
    add('--effective-beta', type=below_one, default=0.9999, metavar='BETA',
        help='β of the effective number of images, (1 - β^n) / (1 - β)')
    add('--drw-start', type=fraction, default=0.8, metavar='PART', help='part of the epochs before deferred re-weighting')
    add('--adjustment-tau', type=finite, default=1.0, metavar='TAU', help='τ of logit adjustment')
    add('--ldam-margin', type=positive, default=0.5, metavar='M', help='margin of the smallest class')
    add('--cosine-scale', type=positive, default=30.0, metavar='S', help='scale of the cosine classifier')


def _optimizer(parser: Parser) -> None:
    group = parser.add_argument_group('optimizer')
    add = group.add_argument
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per process and step')
    add('--grad-accum-steps', type=positive_int, default=1, metavar='N', help='steps per update')
    add('--opt', default='momentum', metavar='NAME', help="any timm optimizer; momentum is SGD as published, sgd Nesterov's")
    add('--lr', type=positive, help='learning rate; default: --lr-base scaled by the global batch')
    add('--lr-base', type=positive, default=0.2, help='learning rate for --lr-base-size images an update')
    add('--lr-base-size', type=positive_int, default=256, help='see --lr-base')
    add('--lr-base-scale', choices=('linear', 'sqrt'), help='default: sqrt for adaptive optimizers, else linear')
    add('--weight-decay', type=non_negative, default=5e-4, help='on every parameter, as the published recipes')
    add('--filter-bias-and-bn', action='store_true', help="no weight decay on biases and norms, timm's own habit")
    add('--momentum', type=fraction, default=0.9, metavar='M', help='of SGD')
    add('--opt-eps', type=positive, metavar='EPS', help='optimizer epsilon')
    add('--opt-betas', type=fraction, nargs='+', metavar='BETA', help='optimizer betas')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='more for the optimizer')
    add('--layer-decay', type=fraction, help='learning rate decay from the head down to the stem')
    add('--sam-rho', type=non_negative, default=0.0, metavar='RHO',
        help='ρ of sharpness-aware minimisation, usually 0.05; 0 is without; a step takes two passes')
    add('--clip-grad', type=positive, metavar='NORM', help='clip gradients')
    add('--clip-mode', choices=('norm', 'value', 'agc'), default='norm', help='how')


def _schedule(parser: Parser) -> None:
    group = parser.add_argument_group('schedule')
    add = group.add_argument
    add('--epochs', type=positive_int, default=60, metavar='N', help='T_max')
    add('--sched', default='cosine', metavar='NAME',
        choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none'),
        help='learning rate schedule')
    add('--sched-on-updates', action='store_true', help='step it per update instead of per epoch')
    add('--warmup-epochs', type=count, default=0, metavar='N', help='linear warm-up')
    add('--warmup-lr', type=non_negative, default=1e-5, help='where the warm-up starts')
    add('--warmup-prefix', action='store_true', help='the warm-up comes before the schedule instead of inside it')
    add('--min-lr', type=non_negative, default=0.0, help='where the schedule ends')
    add('--decay-epochs', type=positive, help='of step')
    add('--decay-milestones', type=positive_int, nargs='+', default=[90, 180, 270], help='of multistep')
    add('--decay-rate', type=positive, default=0.1, help='of step and multistep; power of poly')


def _running(parser: Parser) -> None:
    group = parser.add_argument_group('running')
    add = group.add_argument
    add('--amp', action='store_true', help='mixed precision in float16, or in --amp-dtype')
    add('--amp-dtype', choices=('float16', 'bfloat16'), help='mixed precision; default: as the launcher says')
    add('--model-ema', action='store_true', help='keep, evaluate and export a moving average of the weights')
    add('--model-ema-decay', type=fraction, default=0.9998, help='its decay')
    add('--model-ema-warmup', action=argparse.BooleanOptionalAction, default=True,
        help='let the decay grow to that with the updates n, as 1 - (1 + n)^(-2/3), so that short runs are averaged, too')
    add('--swa-start', type=fraction, metavar='PART',
        help='keep, evaluate and export the plain mean of the weights after each update from this part of the epochs on '
        '(SWA), e.g. 0.6')
    add('--sync-bn', action='store_true', help='BatchNorm over all processes (GPU)')
    add('--dist-bn', choices=('reduce', 'broadcast'), default='reduce',
        help='make BatchNorm statistics of all processes equal before evaluation: mean, or those of the first')
    add('--on-bad-image', choices=('stop', 'skip'), default='stop',
        help='an image that cannot be decoded: stop and name it, or train on the next of its class instead and leave it out '
        'of the evaluation; python -m glmc.data.check finds them beforehand')
    add('-j', '--workers', type=count, default=2, metavar='N', help='loader processes per process')
    add('--resident', choices=('auto', 'on', 'off'), default='auto',
        help='keep the images on the device and crop and flip there; auto: cifar augmentation, up to 1 GiB')
    add('--torchcompile', nargs='?', const='default', choices=('default', 'reduce-overhead', 'max-autotune'),
        metavar='MODE', help='compile the step: mixing, forward passes and losses in one graph')
    add('--max-skipped-steps', type=count, default=10, metavar='N',
        help='updates of an epoch that may be skipped for a loss or gradient that is not finite, before the run stops')
    add('--seed', type=count, default=42, help='of everything random')


def _output(parser: Parser) -> None:
    group = parser.add_argument_group('output')
    add = group.add_argument
    add('--output', default='output', metavar='DIR', help='parent folder of all runs')
    add('--experiment', metavar='NAME', help='folder of this run; default: data-model-method, numbered')
    add('--resume', metavar='PATH', help='`auto` for the newest checkpoint of the experiment, or a checkpoint')
    add('--val-interval', type=positive_int, default=1, metavar='N', help='epochs between evaluations; the last is one')
    add('--checkpoint-interval', type=interval, default='30m', metavar='N|Nm',
        help='steps (500) or minutes (10m) between checkpoints inside an epoch; there is one after each epoch in any case')
    add('--checkpoint-hist', type=positive_int, default=3, metavar='N', help='checkpoints to keep, the best aside')
    add('--log-interval', type=positive_int, default=50, metavar='N', help='steps between log lines')
    add('--debug', action='store_true', help='show a traceback where an error is one line otherwise')


def share_group(parser: Parser) -> None:
    """Options of what is shown and shared at the end of a run."""
    group = parser.add_argument_group('report and sharing')
    add = group.add_argument
    add('--report', action=argparse.BooleanOptionalAction, default=True, help='write report.html and plots at the end')
    add('--report-to', type=trackers, metavar='NAMES', help=f"log to these as well, commas between: {', '.join(TRACKERS)}")
    hub_options(group)


def hub_options(group) -> None:
    """Options of uploading an export."""
    add = group.add_argument
    add('--push-to-hub', type=repo_id, metavar='ORG/NAME', help='upload the export at the end; token from HF_TOKEN or login')
    add('--hub-private', action='store_true', help='where the repository is new, make it private')
    add('--hub-revision', metavar='NAME', help='branch to upload to')
    add('--hub-license', default='unknown', metavar='ID', help="licence on the model card, e.g. apache-2.0: yours to choose")


GROUPS = {  # options of train_glmc.py in pipeline order: title of the argument group -> what adds it
    'data': data_group, 'training data': training_data_group, 'long tail': long_tail_group, 'augmentation': _augmentation,
    'random erasing': _erasing, 'views': _views, 'model': _model, 'model input': input_group, 'method': _method,
    'optimizer': _optimizer, 'schedule': _schedule, 'running': _running, 'output': _output,
    'report and sharing': share_group, 'stage 2': stage2_group}
DATA = ('data', 'training data', 'long tail')


def add_groups(parser: Parser, *titles: str) -> None:
    """Add argument groups of GROUPS to a parser."""
    for title in titles:
        GROUPS[title](parser)


@lru_cache
def names(*titles: str) -> tuple[str, ...]:
    """Names of the options in these argument groups."""
    parser = Parser(add_help=False)
    add_groups(parser, *titles)
    return tuple(action.dest for action in parser._actions)


def augmentation_options(args: Options) -> dict:
    """Options of `transforms.view_transform`, which has two of them under the names of `timm.data.create_transform`."""
    options = pick(args, names('augmentation'))
    return {'auto_augment': options.pop('aa'), 'interpolation': options.pop('train_interpolation'), **options}
