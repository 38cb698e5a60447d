"""Tables of options that need others to have an effect, and of options that exclude or defeat each other."""
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from glmc.cli import Options
from glmc.config.groups import GROUPS, actions, names
from glmc.errors import InputError


class Need(NamedTuple):
    """Condition under which options have an effect.

    Attributes:
        options: Names of the options.
        otherwise: Text after 'has no effect', for options whose condition is not met.
        is_met: Options and facts of the run -> whether the options have an effect.
    """
    options: tuple[str, ...]
    otherwise: str
    is_met: Callable[[Options], object]


class Conflict(NamedTuple):
    """Options that exclude or defeat each other.

    Attributes:
        option: Name of the option that the line names.
        text: Text after the option and its value; may contain {NAME} of other options.
        applies: Options and facts of the run -> whether the combination is present.
        refused: Whether it is an error; else a warning.
    """
    option: str
    text: str
    applies: Callable[[Options], object]
    refused: bool = True


def _source(options: Options, *prefixes: str) -> bool:
    """Whether a data set with one of these prefixes is read; without prefixes, whether any source besides lists is."""
    reads = bool(options.dataset or options.data_dir) and not (options.val_list and getattr(options, 'train_list', True))
    return reads and (not prefixes or options.dataset.lower().startswith(tuple(f'{prefix}/' for prefix in prefixes)))


def _iterable(options: Options) -> bool:
    """Whether the training set has no index."""
    return not options.train_list and _source(options, 'wds', 'tfds', 'hfids')


def _optimizer_has(options: Options, argument: str) -> bool:
    """Whether timm's optimizer has `momentum`, `eps` or `betas`; an unknown optimizer is an error elsewhere."""
    from timm.optim import get_optimizer_info  # late: a help does without
    try:
        return getattr(get_optimizer_info(options.opt.lower().split('_')[-1]), f'has_{argument}')
    except ValueError:
        return True
_WITH_MIN_LR = ('cosine', 'tanh', 'poly', 'wsd', 'rsqrt')
NEEDS = (
    Need(('val_split',), 'with --val-list', lambda o: not o.val_list),
    Need(('train_split',), 'with --train-list', lambda o: not o.train_list),
    Need(('dataset', 'class_from', 'class_map', 'dataset_download'),
         'if all images are those of lists or of the embedded digits', _source),
    Need(('input_key', 'target_key'), 'with the embedded digits', lambda o: _source(o) or o.val_list),
    Need(('class_from',), 'without image folders',
         lambda o: o.dataset.lower() in ('', 'torch/image_folder', 'torch/folder')),
    Need(('class_map',), 'with a torch/ data set', lambda o: not _source(o, 'torch')),
    Need(('dataset_download',), 'without a torch/, tfds/ or hfids/ data set',
         lambda o: _source(o, 'torch', 'tfds', 'hfids')),
    Need(('lt_type', 'lt_split', 'lt_seed'), 'without --imbalance-factor', lambda o: o.imbalance_factor is not None),
    Need(('lt_seed',), 'without --lt-split random', lambda o: o.lt_split == 'random'),
    Need(('augmentation', *(name for name in names('augmentation') if name not in ('no_aug', 'train_interpolation'))),
         'with --no-aug', lambda o: not o.no_aug),
    Need(('vflip', 'train_crop_mode'), 'with --augmentation cifar', lambda o: o.augmentation != 'cifar'),
    Need(('scale', 'ratio', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob'),
         'without --augmentation timm', lambda o: o.augmentation == 'timm'),
    Need(('color_jitter', 'color_jitter_prob'), 'with --aa, unless the policy has 3a in its name',
         lambda o: not o.aa or '3a' in o.aa),
    Need(('color_jitter_prob',), 'with --color-jitter 0', lambda o: o.color_jitter),
    Need(('train_interpolation',), 'with --augmentation imagenet_lt', lambda o: o.augmentation != 'imagenet_lt'),
    Need(('train_interpolation',), 'with --augmentation cifar without --aa',
         lambda o: o.augmentation != 'cifar' or o.no_aug or o.aa),
    Need(('remode', 'recount', 'rearea', 'reaspect'), 'without --reprob', lambda o: o.reprob),
    Need(('balanced',), 'without --method glmc', lambda o: o.method == 'glmc_balanced'),
    Need(('lr_base', 'lr_base_size', 'lr_base_scale'), 'with --lr', lambda o: o.lr is None),
    Need(('filter_bias_and_bn',), 'with --weight-decay 0', lambda o: o.weight_decay),
    Need(('momentum',), 'with an optimizer without momentum', lambda o: _optimizer_has(o, 'momentum')),
    Need(('opt_eps',), 'with an optimizer without epsilon', lambda o: _optimizer_has(o, 'eps')),
    Need(('opt_betas',), 'with an optimizer without betas', lambda o: _optimizer_has(o, 'betas')),
    Need(('clip_mode',), 'without --clip-grad', lambda o: o.clip_grad),
    Need(('warmup_lr', 'warmup_prefix'), 'without --warmup-epochs', lambda o: o.warmup_epochs),
    Need(('warmup_epochs',), 'with --sched none', lambda o: o.sched != 'none' or o.warmup_prefix),
    Need(('warmup_lr', 'sched_on_updates'), 'with --sched none', lambda o: o.sched != 'none'),
    Need(('min_lr',), 'without --sched cosine, tanh, poly, wsd or rsqrt',
         lambda o: o.sched in _WITH_MIN_LR),
    Need(('lr_cycle_decay',), 'without --lr-cycle-limit', lambda o: o.lr_cycle_limit > 1),
    Need(('lr_cycle_limit',), 'without --sched cosine, tanh or poly', lambda o: o.sched in ('cosine', 'tanh', 'poly')),
    Need(('decay_epochs',), 'without --sched step, wsd or rsqrt', lambda o: o.sched in ('step', 'wsd', 'rsqrt')),
    Need(('decay_milestones',), 'without --sched multistep', lambda o: o.sched == 'multistep'),
    Need(('decay_rate',), 'without --sched step, multistep or poly', lambda o: o.sched in ('step', 'multistep', 'poly')),
    Need(('amp',), 'with --amp-dtype', lambda o: not o.amp_dtype),
    Need(('model_ema_decay', 'model_ema_warmup'), 'without --model-ema', lambda o: o.model_ema),
    Need(('sync_bn', 'dist_bn'), 'with one process', lambda o: o.processes > 1),
    Need(('lora_targets',), 'without --lora-rank', lambda o: o.lora_rank),
    Need(('freeze_bn',), 'with --lora-rank, which freezes BatchNorm', lambda o: o.freeze_bn or not o.lora_rank),
    Need(('hub_private', 'hub_revision'), 'without --push-to-hub', lambda o: o.push_to_hub),
    Need(('feature_views', 'stage2_holdout', 'stage2_kwargs'), 'without --stage2', lambda o: o.stage2),
    Need(('feature_cache',), 'without --stage2 and with --head-init random',
         lambda o: o.stage2 or getattr(o, 'head_init', 'random') != 'random'),
)
TRAIN_NEEDS = (
    *NEEDS,
    Need(('pretrained',), 'with --initial-checkpoint', lambda o: not o.initial_checkpoint),
    Need(('patience',), 'in a run of no more evaluations', lambda o: o.patience * o.val_interval < o.epochs),
    Need(('class_counts',), 'with a data set that has an index', _iterable),
    Need(('on_bad_image',), 'with a data set without an index', lambda o: not _iterable(o)),
)
FINETUNE_NEEDS = (
    *NEEDS,
    Need(names('augmentation'), 'with --feature-views 0', lambda o: o.feature_views),
)
CONFLICTS = (
    Conflict('sam_rho', 'an update is one batch, expected --grad-accum-steps 1, found {grad_accum_steps}',
             lambda o: o.sam_rho and o.grad_accum_steps > 1),
    Conflict('sam_rho', 'not with the loss scaling of float16, expected --amp-dtype bfloat16 or no mixed precision',
             lambda o: o.sam_rho and o.precision == 'fp16'),
    Conflict('swa_start', 'one average of the weights at a time, expected no --model-ema',
             lambda o: o.swa_start is not None and o.model_ema),
    Conflict('torchcompile', 'its CUDA graphs overwrite the losses of an earlier step, expected --grad-accum-steps 1 or '
             '--torchcompile default, found {grad_accum_steps} steps',
             lambda o: o.torchcompile in ('reduce-overhead', 'max-autotune') and o.grad_accum_steps > 1),
    Conflict('lora_rank', 'adapts pretrained weights, expected --pretrained or --initial-checkpoint',
             lambda o: o.lora_rank and not (o.pretrained or o.initial_checkpoint)),
    Conflict('lora_rank', 'freezes all but the adapters and the classifier, expected no --freeze',
             lambda o: o.freeze and o.lora_rank),
    Conflict('expert_width', 'pretrained weights have the full width, expected --expert-width 1',
             lambda o: o.expert_width != 1 and (o.pretrained or o.initial_checkpoint)),
    Conflict('sync_bn', 'not with --lora-rank, which freezes BatchNorm', lambda o: o.sync_bn and o.lora_rank),
    Conflict('patience', 'no images choose the epoch, expected --holdout or --select-split',
             lambda o: o.patience is not None and o.holdout is None and o.select_split is None),
    Conflict('sync_bn', 'the statistics of BatchNorm are frozen, expected --no-freeze-bn',
             lambda o: o.sync_bn and o.freeze_bn),
    Conflict('sync_bn', 'needs GPUs, found {processes} processes on the CPU',
             lambda o: o.sync_bn and o.processes > 1 and o.device == 'cpu'),
    Conflict('warmup_epochs', 'as long as the run of {epochs} epochs, expected fewer, or --warmup-prefix',
             lambda o: o.warmup_epochs >= o.epochs and o.sched != 'none' and not o.warmup_prefix),
    Conflict('warmup_lr', 'above the learning rate {peak_lr:g} that the warm-up leads to, expected a lower one',
             lambda o: o.warmup_epochs and o.sched != 'none' and o.warmup_lr > o.peak_lr),
    Conflict('min_lr', 'above the learning rate {peak_lr:g} of the start, expected a lower one',
             lambda o: o.min_lr > o.peak_lr and o.sched in _WITH_MIN_LR),
    Conflict('decay_epochs', 'longer than the {epochs} epochs less a warm-up of {warmup_epochs}, expected fewer',
             lambda o: o.sched in ('wsd', 'rsqrt') and (o.decay_epochs or 0) > o.epochs - (
                 0 if o.warmup_prefix else o.warmup_epochs)),
    *(Conflict(name, 'the smallest value is above the largest, expected MIN MAX',
               lambda o, name=name: getattr(o, name)[0] > getattr(o, name)[1]) for name in ('scale', 'ratio', 'rearea')),
    *(Conflict(name, 'leaves nothing to learn from, expected less than 1',
               lambda o, name=name: getattr(o, name) == 1) for name in ('drop', 'drop_path', 'smoothing')),
    Conflict('model_ema_decay', 'the average would remain the first weights, expected less than 1, or --model-ema-warmup',
             lambda o: o.model_ema and o.model_ema_decay == 1 and not o.model_ema_warmup),
    Conflict('val_interval', 'longer than the run of {epochs} epochs: only its last epoch is evaluated',
             lambda o: o.val_interval > o.epochs, refused=False),
    Conflict('val_interval', 'one evaluation in {epochs} epochs leaves nothing to choose on the held-out images',
             lambda o: 1 < o.epochs == o.val_interval and (o.holdout is not None or o.select_split), refused=False),
    Conflict('sched', 'the learning rate never drops in {epochs} epochs, expected a smaller --decay-epochs',
             lambda o: o.sched == 'step' and (o.decay_epochs or 90) >= o.epochs, refused=False),
    Conflict('sched', 'the learning rate never drops in {epochs} epochs, expected a smaller --decay-milestones',
             lambda o: o.sched == 'multistep' and min(o.decay_milestones) >= o.epochs, refused=False),
    Conflict('swa_start', 'the mean includes weights of the warm-up of {warmup_epochs} epochs',
             lambda o: o.swa_start is not None and o.swa_start * o.epochs < o.warmup_epochs, refused=False),
    Conflict('drw_start', 'the re-weighting never starts in {epochs} epochs',
             lambda o: 'drw_start' in o.method_options and o.drw_start > (o.epochs - 1) / o.epochs, refused=False),
    Conflict('mixup_prob', 'no batch is mixed',
             lambda o: 'mixup_prob' in o.method_options and o.mixup_prob == 0, refused=False),
    Conflict('val_split', 'is the training set: its accuracy says nothing about other images',
             lambda o: o.val_split == o.train_split and not o.val_list and not o.train_list, refused=False),
)


def unused_options(options: Options, explicit: Iterable[str], needs: Iterable[Need], **facts) -> list[str]:
    """Return one warning for each option that the user set and that has no effect.

    With a YAML file, options at their default are skipped: args.yaml of a run contains every option.

    Args:
        options: Parsed options.
        explicit: Names of the options that the user set.
        needs: Rows of a table; the first unmet row of an option gives its warning.
        **facts: Facts of the run that conditions refer to: `processes`.
    """
    defaults = {action.dest: action.default for action in actions(*GROUPS)} if options.config else {}
    changed = {name for name in explicit if name not in defaults or getattr(options, name) != defaults[name]}
    reasons, known = {}, Options(**vars(options), **facts)
    for need in needs:
        for name in changed & set(need.options) - reasons.keys():
            if not need.is_met(known):
                reasons[name] = need.otherwise
    return [f'{flag(name)} has no effect {reason}' for name, reason in sorted(reasons.items())]


def refuse_conflicts(options: Options, **facts) -> list[str]:
    """Refuse the combinations of CONFLICTS that are errors.

    Args:
        options: Parsed options.
        **facts: Facts of the run that conditions refer to: `processes`, `device`, `precision` (Accelerate's name),
            `peak_lr` (learning rate before the schedule), `method_options` (names of the options of the method).

    Returns:
        One line for each other combination, to be warned about.

    Raises:
        InputError: For the first combination that is an error.
    """
    known = Options(**{'peak_lr': math.inf, 'method_options': ()} | vars(options) | facts)
    warnings = []
    for option, text, applies, refused in CONFLICTS:
        if applies(known):
            value = getattr(options, option)
            shown = [] if value is True else value if isinstance(value, list) else [value]
            words = (f'{each:g}' if isinstance(each, float) else str(each) for each in shown)
            line = f"{' '.join((flag(option), *words))}: {text.format(**vars(known))}"
            if refused:
                raise InputError(line)
            warnings.append(line)
    return warnings


def flag(name: str) -> str:
    """Return the flag of an option."""
    return f"--{name.replace('_', '-')}"


def as_words(name: str, value) -> list[str]:
    """Return the words of a command line that give an option its value."""
    if isinstance(value, bool):
        return [flag(name if value else f'no_{name}')]
    values = value if isinstance(value, list) else [value]
    return [flag(name), *(f'{each:g}' if isinstance(each, float) else str(each) for each in values)]
