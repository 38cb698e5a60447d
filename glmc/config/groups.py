"""Argument groups of the scripts, in pipeline order. Names and meaning are timm's wherever timm has the option."""
import argparse
import re
from functools import lru_cache

from huggingface_hub.utils import HFValidationError, validate_repo_id

from glmc.cli import ImageSize, InputSize, Options, ParseKwargs, Parser, number, pick

positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 0, open_low=True)
non_negative = number(float, 0)
fraction = number(float, 0, 1)
below_one = number(float, 0, 1 - 1e-9, open_low=True)
below_one_or_zero = number(float, 0, 1 - 1e-9)
positive_fraction = number(float, 0, 1, open_low=True)
finite = number(float, float('-inf'))
TARGETS = ('uniform', 'forward', 'backward')  # class distributions of a test set
TRACKERS = ('tensorboard', 'wandb', 'trackio')
PRECISIONS = {'no': 'float32', 'fp16': 'float16', 'bf16': 'bfloat16'}  # Accelerate's names -> torch's


def trackers(text: str) -> str:
    """argparse type: names of TRACKERS, separated by commas."""
    unknown = [name for name in text.split(',') if name not in TRACKERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(TRACKERS)}; found {unknown[0]!r}")
    return text


def interval(text: str) -> str:
    """argparse type: a number of steps (500) or of minutes (10m)."""
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


def job_options(group, experiment: str) -> None:
    """Options of finetune_glmc.py and validate_glmc.py: loading, precision and results.

    Args:
        group: Argument group.
        experiment: Default name of the folder of results.
    """
    add = group.add_argument
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per process and step')
    add('-j', '--workers', type=count, default=2, metavar='N', help='loader processes per process')
    precision_options(group, "the launcher's, else that of the training")
    add('--output', default='output', metavar='DIR', help='parent folder of the results')
    add('--experiment', metavar='NAME', help=f'folder of these results; default: {experiment}, numbered')
    add('--report', action=argparse.BooleanOptionalAction, default=True, help='write report.html and plots')
    add('--debug', action='store_true', help='show the traceback of an error')


def precision_options(group, default: str) -> None:
    """Options of mixed precision."""
    add = group.add_argument
    add('--amp', action='store_true', help='mixed precision in float16')
    add('--amp-dtype', choices=('float16', 'bfloat16'), help=f'mixed precision; default: {default}')


def adjustment_options(group, measured: str = '') -> None:
    """Options that change the logits of a trained model.

    Args:
        group: Argument group.
        measured: Further value of `--target-prior` with its meaning.
    """
    add = group.add_argument
    add('--flip-tta', action='store_true', help='average the logits of image and mirror image')
    add('--crop-tta', action='store_true', help='average the logits of five crops: centre and corners')
    add('--target-prior', metavar='PRIOR',
        help='adjust the logits to this class prior: uniform, forward (long-tailed as the training set), backward (the '
        f'reverse), {measured}or a file with a weight per class (JSON list, or one number per line)')
    add('--source-prior', choices=('train', 'uniform'),
        help="class prior that the classifier has learnt; default: the export's, train for a plain timm model")
    add('--target-imbalance', type=number(float, 1), default=50.0, metavar='F',
        help='ratio of the largest to the smallest class of forward and backward')


def stage2_group(parser: Parser) -> None:
    """Options of stage 2, as a script or at the end of a run."""
    group = parser.add_argument_group('stage 2')
    add = group.add_argument
    add('--stage2', metavar='NAME[,NAME]', help='classifiers to train on the features of the trained model: all, or some of '
        'maxnorm, balanced_softmax, logit_adjust, crt, lws, tau_norm, los, ncm, lda, knn, average')
    add('--feature-views', type=count, default=2, metavar='V', help='augmented views of each image, besides the plain image')
    add('--stage2-holdout', type=positive, metavar='N',
        help='set training images aside (a number per class, or a fraction) to choose hyper-parameters on; with --holdout, '
        'those images are used; default: published values, no choice')
    add('--stage2-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME.FIELD=V',
        help='fixed hyper-parameters, e.g. maxnorm.project=epoch los.epochs=5')
    add('--feature-cache', metavar='DIR', help='folder that keeps extracted features for later runs; default: in the output')


def data_group(parser: Parser) -> None:
    """Options of all scripts that read images."""
    group = parser.add_argument_group('data')
    add = group.add_argument
    add('--data-dir', metavar='DIR',
        help='folder of image folders (or a tar), root of the paths in a list, or download folder')
    add('--dataset', default='', metavar='NAME',
        help='data set of timm: torch/…, hfds/…, wds/…, tfds/…; empty for image folders')
    add('--val-split', default='validation', metavar='NAME',
        help='name of the split to evaluate on; none is allowed with --holdout')
    add('--val-list', metavar='FILE',
        help='list to evaluate on: `path label` lines, or a CSV (may be .gz); paths are relative to --data-dir')
    add('--class-from', choices=('leaf', 'top', 'path'), help='part of the path of a folder of images that names the class: '
        'the innermost folder (default), the outermost, or all')
    add('--num-classes', type=positive_int, help='number of classes; default: that of the training data')
    add('--class-map', metavar='FILE', help='file that maps class names to indices, as in timm')
    add('--input-key', help='column or key of the image (CSV, hfds, wds, tfds), or image extensions of folders')
    add('--target-key', help='column or key of the label (CSV, hfds, wds, tfds)')
    add('--dataset-download', action='store_true', help='download the data set (torch, tfds)')
    add('--class-counts', metavar='FILE', help='training images per class, for sources without an index (wds, tfds): JSON '
        'list, metrics.json of a run, or one number per line; default: count them in one pass')


def training_data_group(parser: Parser) -> None:
    """Options of the training set."""
    group = parser.add_argument_group('training data')
    add = group.add_argument
    add('--train-split', default='train', help='name of the training split')
    add('--train-list', metavar='FILE', help='list to train on: `path label` lines, or a CSV (may be .gz)')
    add('--holdout', type=positive, default=None, metavar='N',
        help='set training images of each class aside (a number, taken before --imbalance-factor, or a fraction); evaluate '
        'each epoch on them, keep the best epoch by class mean, and use the validation split once, at the end')
    add('--select-split', metavar='NAME',
        help='of three splits, the one that takes the place of --holdout, e.g. --select-split val --val-split test')


def long_tail_group(parser: Parser) -> None:
    """Options of the class counts."""
    group = parser.add_argument_group('long tail')
    add = group.add_argument
    add('--imbalance-factor', type=number(float, 1), metavar='F',
        help='make a balanced set long-tailed: the smallest class keeps 1/F of the images of the largest')
    add('--lt-type', choices=('exp', 'step'), default='exp', help='class counts fall exponentially, or in one step')
    add('--lt-split', choices=('cao', 'first', 'random'), default='cao', help='which images are kept')
    add('--lt-seed', type=count, default=0, help='seed of --lt-split random')
    add('--shot-thresholds', type=count, nargs=2, default=[20, 100], metavar=('FEW', 'MANY'),
        help='few-shot <= FEW < medium-shot <= MANY < many-shot training images')


def _augmentation(parser: Parser) -> None:
    group = parser.add_argument_group('augmentation')
    add = group.add_argument
    add('--augmentation', choices=('timm', 'cifar', 'imagenet_lt'), default='timm',
        help='timm: by the options of this group; cifar: crop with padding 4 and flip; imagenet_lt: random resized crop, '
        'jitter 0.4, grey 0.2, blur 0.5, flip')
    add('--no-aug', action='store_true', help='no augmentation, only resize and centre crop')
    add('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'),
        help='random resized crop (rrc), or random resize that keeps the aspect ratio, then a centre (rkrc) or random '
        '(rkrr) crop; default: rrc')
    add('--scale', type=positive, nargs=2, default=[0.08, 1.0], metavar='PCT', help='area of the random crop')
    add('--ratio', type=positive, nargs=2, default=[3 / 4, 4 / 3], metavar='RATIO', help='aspect ratio of the random crop')
    add('--hflip', type=fraction, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=fraction, default=0.0, help='probability of a vertical flip')
    add('--color-jitter', type=non_negative, default=0.4, metavar='PCT',
        help='strength of colour jitter (brightness, contrast, saturation)')
    add('--color-jitter-prob', type=fraction, metavar='P', help='probability of colour jitter; default: 1')
    add('--grayscale-prob', type=fraction, default=0.0, metavar='P', help='probability of a grey image')
    add('--gaussian-blur-prob', type=fraction, default=0.0, metavar='P', help='probability of a blur')
    add('--aa', metavar='NAME', help='AutoAugment policy, e.g. rand-m9-mstd0.5, v0, augmix-m3-w3')
    add('--train-interpolation', default='random', choices=('random', 'bilinear', 'bicubic', 'nearest', 'lanczos'),
        help='interpolation of the training resize')


def _erasing(parser: Parser) -> None:
    group = parser.add_argument_group('random erasing')
    add = group.add_argument
    add('--reprob', type=fraction, default=0.0, metavar='P', help='probability of random erasing')
    add('--remode', choices=('const', 'rand', 'pixel'), default='pixel', help='values of an erased box')
    add('--recount', type=positive_int, default=1, help='maximum number of erased boxes')
    add('--rearea', type=fraction, nargs=2, default=[0.02, 1 / 3], metavar=('MIN', 'MAX'),
        help='area of a box as a fraction of the image; 0.25 0.25 with --reaspect 1 --remode const is Cutout (16 of 32 '
        'pixels)')
    add('--reaspect', type=positive_fraction, default=0.3, metavar='MIN', help='aspect ratio of a box, from MIN to 1 / MIN')


def _model(parser: Parser) -> None:
    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', default='resnet18', metavar='NAME', help='timm architecture, hf-hub:ORG/NAME or local-dir:FOLDER')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--initial-checkpoint', metavar='FILE', help='start from these weights (.safetensors or .pth)')
    add('--head-init', choices=('random', 'probe', 'class_mean'), default='random',
        help='start of the classifiers: random, linear probes on the features of the starting weights, or class means; '
        'default: probe with pretrained weights, else random')
    add('--freeze', nargs='+', metavar='PATTERN',
        help='do not train parameters with these names, e.g. conv_stem.* blocks.0.*')
    add('--freeze-bn', action=argparse.BooleanOptionalAction, default=False,
        help='keep the running statistics of BatchNorm, which small batches of new images spoil; default: with pretrained '
        'weights')
    add('--lora-rank', type=count, default=0, metavar='R',
        help='rank of trained adapters beside the frozen pretrained weights (LoRA, by the library peft), merged in the '
        'export, e.g. 8; 0: off')
    add('--lora-targets', nargs='+', metavar='NAME',
        help='layers with an adapter, e.g. qkv proj or blocks.1?.*; default: all linear layers, and all convolutions of one '
        'group but the first')
    add('--drop', type=fraction, metavar='PCT', help='dropout rate before the classifier')
    add('--drop-path', type=fraction, metavar='PCT', help='stochastic depth rate')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory')


def input_size_options(group) -> None:
    """Options of the size of the model input."""
    add = group.add_argument
    add('--img-size', action=ImageSize, type=positive_int, nargs='+', metavar=('N', 'W'),
        help="side of the input in pixels, or height and width; default: the model's")
    add('--input-size', action=InputSize, type=positive_int, nargs=3, metavar=('C', 'H', 'W'), default=argparse.SUPPRESS,
        help='channels, height and width of the input; same as --in-chans C --img-size H W')


def input_group(parser: Parser) -> None:
    """Options of the model input and of the model's shape."""
    group = parser.add_argument_group('model input')
    add = group.add_argument
    input_size_options(group)
    add('--in-chans', type=int, choices=(1, 3), help="image channels, 1 or 3; default: the model's")
    add('--gp', metavar='POOL', help='global pooling: avg, max, avgmax, …')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V',
        help='more arguments of timm.create_model')
    add('--mean', type=finite, nargs='+', metavar='M', help="mean of the pixels; default: the model's")
    add('--std', type=positive, nargs='+', metavar='S', help="standard deviation of the pixels; default: the model's")
    add('--interpolation', choices=('bilinear', 'bicubic', 'nearest', 'lanczos'),
        help="interpolation of the evaluation resize; default: the model's")
    add('--crop-pct', type=positive, metavar='PCT',
        help="fraction of the image in the evaluation centre crop; default: the model's")
    add('--channels-last', action=argparse.BooleanOptionalAction, default=True,
        help='channels-last memory layout, faster for most convolutions')


def _method(parser: Parser) -> None:
    group = parser.add_argument_group('method')
    add = group.add_argument
    add('--method', metavar='NAME', help='training method; default: glmc_one_view, balanced_softmax with pretrained '
        'weights')
    add('--resample-power', type=finite, default=0.0, metavar='Q',
        help='q: the second image of a pair is sampled with P ∝ n^-q; 0: uniform over images, 1: uniform over classes; '
        'default: 0, 1 for ce_resample, cmo and ride_cmo, 2 for bbn')
    add('--partner', choices=('sampler', 'batch'), default='sampler',
        help='sample the second image of a pair from the whole set (paper) or from the batch (half the decoding); default: '
        'sampler, batch for glmc_one_view')
    add('--mix-beta', type=positive, default=1.0, metavar='BETA',
        help='β of λ ~ Beta(β, β); default: 1, 0.2 for the glmc methods, 0.4 for balpoe')
    add('--mixup-prob', type=fraction, default=1.0, metavar='P',
        help='probability that a batch is mixed; default: 1, 0.5 for cmo and ride_cmo')
    add('--cutmix-lambda', choices=('nominal', 'area'), default='nominal',
        help='label weight of a patch: λ (released code), or its area after clipping at the border; default: nominal, area '
        'for cutmix, cmo and the glmc methods')
    add('--reweight-power', type=finite, default=1.0, metavar='K', help='k: class weights ∝ n^-k')
    add('--consistency-weight', type=non_negative, default=1.0, metavar='GAMMA', help='γ of the consistency loss')
    add('--alpha-power', type=positive, default=2.0, metavar='P',
        help='P of α = 1 - (T/T_max)^P; a larger P favours the conventional classifier for longer (paper: 2)')
    add('--alpha-scope', choices=('losses', 'encoder'), default='losses',
        help='whether α weights the losses (paper) or only the gradients into the encoder, so that both classifiers learn '
        'at full weight throughout; default: losses, encoder for the glmc methods')
    add('--projection-dim', type=positive_int, default=256, metavar='D',
        help='dimension d of projection and prediction; default: 256; 128 for supcon, bcl, kcl, tsc, '
        'ssd_features, proco; 32 for paco, gpaco')
    add('--projection-hidden', type=positive_int, metavar='N',
        help='width of the hidden layers of the projector; default: that of the features, 512 for bcl and proco')
    add('--view-augmentation', choices=('published', 'plain'), default='published',
        help="augmentation of the views of contrastive methods: the papers', or that of the run for every view")
    add('--contrast-temperature', type=positive, default=0.1, metavar='T',
        help='temperature of a contrastive loss; default: 0.1, 0.05 for paco and gpaco, 0.07 for kcl and tsc, '
        '0.2 for ssd_features')
    add('--contrast-weight', type=non_negative, default=0.3, metavar='W',
        help='weight of the contrastive loss of bcl (default 0.3) and proco (1), or of a feature of the same class in paco '
        'and gpaco, where the class itself has 1 (default 0.01)')
    add('--queue-size', type=positive_int, default=4096, metavar='K',
        help='features of earlier batches that paco, gpaco, kcl, tsc and ssd_features keep; default: 4096, 1024 for paco '
        'and gpaco')
    add('--key-momentum', type=fraction, default=0.999, metavar='M',
        help='m of the encoder of these features, θ\' ← m·θ\' + (1-m)·θ')
    add('--positives', type=count, default=6, metavar='K', help='largest number of kept features that attract an image')
    add('--target-weight', type=non_negative, default=0.2, metavar='LAMBDA', help='λ of the targets of tsc')
    add('--experts', type=positive_int, default=3, metavar='K', help='number of experts of ride, ride_cmo and balpoe')
    add('--expert-width', type=positive_fraction, default=1.0, metavar='F',
        help="width of the experts' stages as a fraction of the net's; default: 1, 0.75 for ride and ride_cmo")
    add('--diversity-weight', type=finite, default=-0.45, metavar='LAMBDA',
        help='λ of the divergence between the experts of ride; negative: pushes them apart')
    add('--diversity-eta', type=below_one_or_zero, default=0.05, metavar='ETA',
        help='η of the temperatures of that divergence, below 1 for rare classes; 0: 1 for all')
    add('--teacher', metavar='NAME',
        help='model whose soft labels ssd learns: export or run folder, hf-hub:ORG/NAME or local-dir:FOLDER')
    add('--distill-temperature', type=positive, default=2.0, metavar='TAU', help='τ of these soft labels')
    add('--isda-variance', type=non_negative, default=0.75, metavar='B',
        help='covariances of the augmented features of risda at the end of the training, times their own')
    add('--isda-shift', type=non_negative, default=0.5, metavar='A',
        help='shift of these features towards confused classes at the end of the training')
    add('--joint-forward', action='store_true', help='encode both views as one batch, with common BatchNorm statistics')
    add('--balanced', action='store_true', help='same as --method glmc_balanced')
    add('--focal-gamma', type=non_negative, default=2.0, metavar='GAMMA', help='γ of the focal loss')
    add('--effective-beta', type=below_one, default=0.9999, metavar='BETA',
        help='β of the effective number of images, (1 - β^n) / (1 - β)')
    add('--drw-start', type=fraction, default=0.8, metavar='FRACTION',
        help='fraction of the epochs before deferred re-weighting starts')
    add('--smoothing', type=fraction, default=0.0, help='label smoothing of ce, balanced_softmax and logit_adjustment')
    add('--adjustment-tau', type=finite, default=1.0, metavar='TAU',
        help='τ of logit adjustment; for balpoe the mean of its experts')
    add('--ldam-margin', type=positive, default=0.5, metavar='M', help='margin of the smallest class')
    add('--cosine-scale', type=positive, default=30.0, metavar='S', help='scale of the cosine classifier')


def _optimizer(parser: Parser) -> None:
    group = parser.add_argument_group('optimizer')
    add = group.add_argument
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per process and step')
    add('--grad-accum-steps', type=positive_int, default=1, metavar='N', help='steps per optimizer update')
    add('--opt', metavar='NAME',
        help='timm optimizer; momentum: SGD as published, sgd: with Nesterov momentum, nmuon: Muon; default: momentum, '
        'nmuon for glmc_one_view from scratch')
    add('--lr', type=positive, help='learning rate; default: --lr-base scaled by the global batch')
    add('--lr-base', type=positive, default=0.2,
        help='learning rate for --lr-base-size images per update; default: 0.2, 0.02 with nmuon')
    add('--lr-base-size', type=positive_int, default=256, help='images per update that --lr-base is for')
    add('--lr-base-scale', choices=('linear', 'sqrt'),
        help='scaling of --lr-base with the batch; default: sqrt for adaptive optimizers and nmuon, else linear')
    add('--weight-decay', type=non_negative, default=5e-4, metavar='W',
        help='weight decay of every parameter; default: 5e-4, 0.05 with nmuon')
    add('--filter-bias-and-bn', action='store_true', help='no weight decay of biases and norms, as in timm')
    add('--momentum', type=fraction, default=0.9, metavar='M', help='momentum; default: 0.9, 0.95 with nmuon')
    add('--opt-eps', type=positive, metavar='EPS', help="epsilon of the optimizer; default: the optimizer's")
    add('--opt-betas', type=fraction, nargs='+', metavar='BETA', help="betas of the optimizer; default: the optimizer's")
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='more arguments of the optimizer')
    add('--layer-decay', type=fraction, help='learning rate decay per layer, from the classifier to the stem')
    add('--sam-rho', type=non_negative, default=0.0, metavar='RHO',
        help='ρ of sharpness-aware minimisation, usually 0.05; 0: off; a step takes two passes')
    add('--clip-grad', type=positive, metavar='NORM', help='limit of gradient clipping')
    add('--clip-mode', choices=('norm', 'value', 'agc'), default='norm', help='kind of gradient clipping')


def _schedule(parser: Parser) -> None:
    group = parser.add_argument_group('schedule')
    add = group.add_argument
    add('--epochs', type=positive_int, default=60, metavar='N', help='number of epochs, T_max')
    add('--sched', default='cosine', metavar='NAME',
        choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none'),
        help='learning rate schedule: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, none')
    add('--sched-on-updates', action=argparse.BooleanOptionalAction, default=False,
        help='change the learning rate after each update instead of each epoch; default: with pretrained weights and nmuon')
    add('--warmup-epochs', type=count, default=0, metavar='N', help='epochs of linear warm-up')
    add('--warmup-lr', type=non_negative, default=1e-5, help='learning rate at the start of the warm-up')
    add('--warmup-prefix', action='store_true', help='add the warm-up before the schedule instead of inside it')
    add('--min-lr', type=non_negative, default=0.0, help='learning rate at the end of the schedule')
    add('--lr-cycle-limit', type=positive_int, default=1, metavar='N',
        help='cycles of cosine, tanh and poly, each of --epochs epochs; published for tsc: 2')
    add('--lr-cycle-decay', type=positive_fraction, default=0.5, metavar='F',
        help='factor of the learning rate from one cycle to the next')
    add('--decay-epochs', type=positive, metavar='N',
        help='epochs between the drops of step (default: 90), or of the decay phase of wsd and rsqrt')
    add('--decay-milestones', type=positive_int, nargs='+', default=[90, 180, 270], metavar='N',
        help='epochs at which multistep drops the learning rate')
    add('--patience', type=positive_int, metavar='N',
        help='stop after N evaluations without a better class mean on the images of --holdout or --select-split')
    add('--decay-rate', type=positive, default=0.1, help='factor of step and multistep; power of poly')


def _running(parser: Parser) -> None:
    group = parser.add_argument_group('running')
    add = group.add_argument
    precision_options(group, "the launcher's")
    add('--model-ema', action='store_true', help='evaluate and export a moving average of the weights')
    add('--model-ema-decay', type=fraction, default=0.9998, help='decay of the moving average')
    add('--model-ema-warmup', action=argparse.BooleanOptionalAction, default=True,
        help='let the decay grow to its value with the updates n, as 1 - (1 + n)^(-2/3), for short runs')
    add('--swa-start', type=fraction, metavar='FRACTION',
        help='evaluate and export the mean of the weights after each update from this fraction of the epochs on (SWA), '
        'e.g. 0.6')
    add('--sync-bn', action='store_true', help='BatchNorm statistics over all processes (GPU only)')
    add('--dist-bn', choices=('reduce', 'broadcast'), default='reduce',
        help='make BatchNorm statistics equal in all processes before evaluation: their mean, or those of the first')
    add('--on-bad-image', choices=('stop', 'skip'), default='stop',
        help='an image that cannot be decoded: stop and name it, or replace it by another of its class in training and '
        'exclude it from evaluation; python -m glmc.data.check finds such images')
    add('-j', '--workers', type=count, default=2, metavar='N', help='loader processes per process')
    add('--resident', choices=('auto', 'on', 'off'), default='auto',
        help='keep the images on the device, crop and flip there; auto: with cifar augmentation, up to 1 GiB')
    add('--torchcompile', nargs='?', const='default', choices=('default', 'reduce-overhead', 'max-autotune'),
        metavar='MODE',
        help='compile mixing, forward passes and losses as one graph; MODE is default, reduce-overhead or max-autotune')
    add('--max-skipped-steps', type=count, default=10, metavar='N',
        help='updates per epoch that may be skipped because of a non-finite loss or gradient before the run stops')
    add('--seed', type=count, default=42, help='seed of all random numbers')


def _output(parser: Parser) -> None:
    group = parser.add_argument_group('output')
    add = group.add_argument
    add('--output', default='output', metavar='DIR', help='parent folder of all runs')
    add('--experiment', metavar='NAME', help='folder of this run; default: DATA-MODEL-METHOD, numbered')
    add('--resume', metavar='PATH', help='checkpoint to continue from, or auto: the newest of --experiment')
    add('--val-interval', type=positive_int, default=1, metavar='N',
        help='epochs between evaluations; the last epoch is always evaluated')
    add('--checkpoint-interval', type=interval, default='30m', metavar='N|Nm',
        help='steps (500) or minutes (10m) between checkpoints inside an epoch; each epoch ends with one')
    add('--checkpoint-hist', type=positive_int, default=3, metavar='N',
        help='number of checkpoints to keep, besides the best')
    add('--log-interval', type=positive_int, default=50, metavar='N', help='steps between log lines')
    add('--debug', action='store_true', help='show the traceback of an error')


def share_group(parser: Parser) -> None:
    """Options of the report, the trackers and the Hub."""
    group = parser.add_argument_group('report and sharing')
    add = group.add_argument
    add('--report', action=argparse.BooleanOptionalAction, default=True,
        help='write report.html and plots at the end of the run')
    add('--report-to', type=trackers, metavar='NAMES',
        help=f"also log to these trackers, separated by commas: {', '.join(TRACKERS)}")
    hub_options(group)


def hub_options(group) -> None:
    """Options of uploading an export."""
    add = group.add_argument
    add('--push-to-hub', type=repo_id, metavar='ORG/NAME',
        help='upload the export at the end; the token is that of HF_TOKEN or of a login')
    add('--hub-private', action='store_true', help='create a new repository as private')
    add('--hub-revision', metavar='NAME', help='branch to upload to')
    add('--hub-license', default='unknown', metavar='ID',
        help='licence on the model card, e.g. apache-2.0; unknown: none is named')
    add('--dataset-name', metavar='NAME',
        help='name of the data set on the model card; ORG/NAME links it on the Hub; default: the last part of its path')
GROUPS = {  # title of an argument group -> function that adds it, in pipeline order
    'data': data_group, 'training data': training_data_group, 'long tail': long_tail_group, 'augmentation': _augmentation,
    'random erasing': _erasing, 'model': _model, 'model input': input_group, 'method': _method,
    'optimizer': _optimizer, 'schedule': _schedule, 'running': _running, 'output': _output,
    'report and sharing': share_group, 'stage 2': stage2_group}
DATA = ('data', 'training data', 'long tail')
SAME_TRAINING = ('data', 'output', 'report and sharing', 'stage 2')  # groups that do not change what is trained


def add_groups(parser: Parser, *titles: str) -> None:
    """Add argument groups of GROUPS to a parser."""
    for title in titles:
        GROUPS[title](parser)


@lru_cache
def actions(*titles: str) -> tuple[argparse.Action, ...]:
    """Return the options in these argument groups."""
    parser = Parser(add_help=False)
    add_groups(parser, *titles)
    return tuple(parser._actions)


def names(*titles: str) -> tuple[str, ...]:
    """Return the names of the options in these argument groups."""
    return tuple(action.dest for action in actions(*titles))
NOT_TRAINING = frozenset((  # options that say where the data is and how it is computed, but not what is trained
    *names(*SAME_TRAINING), 'config', 'train_list', 'workers', 'resident', 'channels_last', 'torchcompile',
    'grad_checkpointing', 'seed'))


def augmentation_options(args: Options) -> dict:
    """Return the arguments of `transforms.view_transform`; two have the names of `timm.data.create_transform`."""
    options = pick(args, names('augmentation'))
    return {'auto_augment': options.pop('aa'), 'interpolation': options.pop('train_interpolation'), **options}
