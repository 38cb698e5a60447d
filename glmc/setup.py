"""Options to training: data, model and method, loaders, optimizer."""
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import resolve_input_data_config
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from glmc.cli import Options, pick
from glmc.config import (
    DATA,
    FINE_TUNING,
    SCRATCH,
    TRAIN_NEEDS,
    Need,
    as_words,
    augmentation_options,
    has_data,
    is_pretrained,
    names,
    refuse_conflicts,
    unused_options,
)
from glmc.data.check import readable_subset
from glmc.data.datasets import BadImages, ImageSet
from glmc.data.loaders import create_eval_loader, create_normalize, create_train_loader
from glmc.data.profiles import classes_without_images
from glmc.data.resident import create_resident_eval_loader, create_resident_train_loader, is_resident
from glmc.data.sources import TrainingData, load_training_data
from glmc.errors import InputError, first_line
from glmc.evaluation.metrics import LongTailEvaluator
from glmc.methods import METHODS, unused_method_options
from glmc.models.backbone import create_backbone
from glmc.models.classifier import linear_classifier
from glmc.models.exported import exported_form
from glmc.models.freeze import freeze, frozen_norms
from glmc.models.lora import adapters
from glmc.run_folder import provenance
from glmc.training.engine import TrainStep, evaluate, train_one_epoch
from glmc.training.launch import device_name, launcher_accumulation
from glmc.training.optim import averaging_epoch, create_optimizer, equal_weights, scaled_learning_rate
from glmc.training.sam import sam_batch
from glmc.training.state import Position, TrainingState
from glmc.training.trial import failed_step, require_updates

_logger = logging.getLogger(__name__)
RECIPE = ('img_size', 'augmentation', 'epochs', 'batch_size', 'opt', 'lr', 'momentum', 'weight_decay', 'sched',
          'warmup_epochs', 'imbalance_factor', 'head_init')  # on the model card, with the options of the method
LEVERS = dict(lora_rank=0, sam_rho=0.0, swa_start=None, aa=None, reprob=0.0)  # on the card, too, unless off
SGD = ('sgd', 'momentum', 'nesterov')  # in the names of timm's optimizers that --lr-base fits


class Setup:
    """Data, model, task, loaders and optimizer for the options of train_glmc.py, built in the order in which data flows.

    Only the scripts, the folder config and this class know `args`.

    Args:
        args: Options of `config.train_parser`.
        explicit: Names of the options that the user set.
        accelerator: Result of `launch.create_accelerator`.
    """

    def __init__(self, args: Options, explicit: set[str], accelerator: Accelerator):
        self.args, self.explicit, self.method, self.accelerator = args, explicit, METHODS[args.method], accelerator
        self._follow_launcher()
        self.global_batch = args.batch_size * accelerator.num_processes
        self.lr = args.lr or scaled_learning_rate(
            args.opt, self.global_batch * args.grad_accum_steps, args.lr_base, args.lr_base_size, args.lr_base_scale)
        self._announce()
        self._refuse()
        set_seed(args.seed)
        self._build_data()
        self._announce_defaults()
        self._build_task()
        self._try_step()
        self._omit_unreadable()
        self._build_loaders()
        self._build_optimizer()
        set_seed(args.seed, device_specific=True)  # drop-out differs from process to process

    def _follow_launcher(self) -> None:
        """Take the steps per update from the launcher, if it sets them."""
        args, steps = self.args, launcher_accumulation()
        if steps is None or steps == args.grad_accum_steps:
            return
        if 'grad_accum_steps' in self.explicit:
            raise InputError(f'--grad-accum-steps {args.grad_accum_steps}: the launcher asks for {steps} gradient '
                             'accumulation steps, expected one of both, or the same number')
        _logger.info(f'--grad-accum-steps {steps}, as the launcher asks')
        args.grad_accum_steps = steps

    def _announce(self) -> None:
        """Announce the demonstration, and warn about options without effect."""
        args, explicit = self.args, self.explicit
        if not has_data(args):
            _logger.info("No data given: this is a demonstration on scikit-learn's handwritten digits, made long-tailed. "
                         'Train on your own with --data-dir, --dataset or --train-list.')
        unused = unused_method_options(args.method, explicit)
        needs = (Need(tuple(unused), f'with --method {args.method}', lambda options: False), *TRAIN_NEEDS)
        for warning in unused_options(args, explicit, needs, processes=self.accelerator.num_processes):
            _logger.warning(warning)
        fits = any(name in args.opt.lower() for name in SGD) or args.opt == SCRATCH['opt'] and not is_pretrained(args)
        if not explicit & {'lr', 'lr_base'} and not fits:
            _logger.warning(f'--opt {args.opt}: the default --lr-base is for SGD; set --lr for this optimizer')

    def _announce_defaults(self) -> None:
        """Announce the defaults that come with pretrained weights, or with Muon from scratch."""
        args, explicit, pretrained = self.args, self.explicit, is_pretrained(self.args)
        if not pretrained and args.opt != SCRATCH['opt']:
            return
        others = set().union(*(row.options for row in METHODS.values())) - self.method.options
        defaults = FINE_TUNING if pretrained else SCRATCH
        words = (as_words(name, getattr(args, name)) for name in defaults if name not in explicit | others)
        start, file = ('Pretrained weights', 'pretrained') if pretrained else ('From scratch by Muon', 'scratch')
        _logger.info(f'{start}, so the defaults are those of hparams/{file}.yaml: '
                     f"{' '.join(chain.from_iterable(words))}")

    def _refuse(self) -> None:
        """Refuse options that exclude each other, and warn about those that defeat each other."""
        accelerator = self.accelerator
        for warning in refuse_conflicts(
                self.args, processes=accelerator.num_processes, device=accelerator.device.type, peak_lr=self.lr,
                precision=accelerator.mixed_precision, method_options=self.method.options):
            _logger.warning(warning)

    def _build_data(self) -> None:
        args = self.args
        with self.accelerator.local_main_process_first() if args.dataset_download else nullcontext():
            self.data = load_training_data(**pick(args, (*names(*DATA), 'seed', 'batch_size')))
        profile = self.data.profile
        _logger.info(f'Training set: {profile.summary()}, fingerprint {str(profile.fingerprint)[:16]}')
        for name in ('validation', 'holdout'):
            images = getattr(self.data, name)
            missing = isinstance(images, ImageSet) and classes_without_images(images.counts(), self.data.class_names)
            if missing:
                _logger.warning(f'{name}: {missing}')

    def _try_step(self) -> None:
        """Refuse options that cannot train, by a step on zeros before any image is read."""
        args, accelerator, size = self.args, self.accelerator, self.data_config['input_size']
        require_updates(self._create_optimizer, args.opt, accelerator.device)
        step = TrainStep(self.task, self.mixer, create_normalize(self.data_config, 'cpu'), self.frozen_norms)
        images = 2 if self.method.paired and args.partner == 'sampler' else 1
        error = failed_step(step, accelerator, args.batch_size, images, len(self.method.views), size)
        if error is None:
            return
        if args.batch_size == 1 and 'more than 1 value per channel' in error:
            raise InputError('--batch-size 1: BatchNorm has no variance of one value, expected 2 or more images per '
                             'process, --freeze-bn, or a larger --img-size')
        raise InputError(f'--model {args.model}: cannot train by {args.method} on images of {size[1]}x{size[2]}: {error}')

    def _omit_unreadable(self) -> None:
        """With `--on-bad-image skip`, omit evaluation images that cannot be decoded."""
        self.bad_images = None
        if self.args.on_bad_image == 'skip' and isinstance(self.data.train, ImageSet):
            self.bad_images = BadImages(self.data.train)
            self.data = replace(self.data, validation=self._readable('validation'), holdout=self._readable('holdout'))

    def _readable(self, name: str):
        """Images of an evaluation set that can be decoded, found by one pass over the set."""
        images = getattr(self.data, name)
        if not isinstance(images, ImageSet):
            return images
        images, errors = readable_subset(images, self.args.workers)
        if errors:
            _logger.warning(f'{name}: {len(errors)} images cannot be decoded and are ignored, the first: {errors[0]}')
        return images

    def _build_task(self) -> None:
        args, counts = self.args, self.data.profile.counts
        self.model_options = dict(
            name=args.model, num_classes=len(counts), img_size=args.img_size, in_chans=args.in_chans, drop_rate=args.drop,
            drop_path_rate=args.drop_path, global_pool=args.gp, **args.model_kwargs)
        self.model_options.update(self.method.backbone(**pick(args, self.method.backbone_options)))
        if args.lora_rank:
            self.model_options['lora'] = dict(rank=args.lora_rank, targets=args.lora_targets)
        backbone = create_backbone(
            **self.model_options, pretrained=args.pretrained, checkpoint_path=args.initial_checkpoint)
        pretrained = args.pretrained and not args.initial_checkpoint  # which counts
        self.base_model = backbone.pretrained_cfg.get('hf_hub_id') if pretrained else None
        self.head_init = self._possible_head_init(backbone)
        if args.freeze:
            freeze(backbone, args.freeze)
        if args.grad_checkpointing:
            backbone.set_grad_checkpointing(True)
        try:
            self.data_config = resolve_input_data_config(
                backbone, pick(args, ('img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct')))
        except ValueError as error:
            raise InputError(f'--mean, --std: {error}') from error
        mean_and_std = {name: self.data_config[name] for name in ('mean', 'std')}
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, **mean_and_std}  # a teacher has its own
        model = self.method.module(backbone, **pick(args, self.method.module_options))
        adapted = adapters(backbone)
        in_adapters = sum(p.numel() for layer in adapted.values() for p in layer.parameters() if p.requires_grad)
        self.num_parameters = sum(p.numel() for p in exported_form(backbone).parameters())
        if args.sync_bn:
            model = convert_sync_batchnorm(model)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.task = self.method.task(model, counts, **pick(args, self.method.task_options))
        frozen = frozen_norms(backbone, args.freeze_bn or bool(adapted))
        names = [name for name, module in backbone.named_modules() if module in frozen]
        copies = [module for module in self.task.modules() if type(module) is type(backbone)]  # a key encoder has one
        self.frozen_norms = [each.get_submodule(name) for each in copies for name in names]
        self.mixer = self.method.mixer(counts, **pick(args, self.method.mixer_options))
        frozen = sum(p.numel() for p in backbone.parameters() if not p.requires_grad) if args.freeze or adapted else 0
        if adapted:
            _logger.info(f'LoRA: adapters of rank {args.lora_rank} beside {len(adapted)} layers, {in_adapters:,} parameters')
        _logger.info(f'Model: {args.model}, {self.num_parameters / 1e6:.2f} M parameters'
                     f"{f' ({frozen / 1e6:.2f} M frozen)' if frozen else ''}, "
                     f"input {'x'.join(map(str, self.data_config['input_size']))}, method {args.method}")

    def _possible_head_init(self, backbone: torch.nn.Module) -> str:
        """The value of --head-init; `random` if another one is the default but impossible."""
        wanted = self.args.head_init
        if wanted == 'random':
            return wanted
        try:
            if not isinstance(self.data.train, ImageSet):
                raise InputError(f'--head-init {wanted}: needs a training set with an index')
            linear_classifier(backbone)
        except InputError as error:
            if 'head_init' in self.explicit:
                raise
            _logger.info(f'The classifiers start at random: {error}')
            return 'random'
        return wanted

    def _build_loaders(self) -> None:
        args, accelerator = self.args, self.accelerator
        common = dict(
            data_config=self.data_config, batch_size=args.batch_size, device=accelerator.device, workers=args.workers,
            rank=accelerator.process_index, world_size=accelerator.num_processes)
        self.augmentation = augmentation = augmentation_options(args)
        views = self.method.views if args.view_augmentation == 'published' else ('plain',) * len(self.method.views)
        resident = is_resident(args.resident, self.data.train, augmentation, self.data_config['input_size'], views)
        create_train = create_resident_train_loader if resident else create_train_loader
        create_eval = create_resident_eval_loader if resident else create_eval_loader
        pairs = self.method.paired and args.partner == 'sampler'
        if pairs and not isinstance(self.data.train, ImageSet):
            raise InputError(f'--dataset {args.dataset}: has no index to draw partners by, expected --partner batch')
        try:
            self.train_loader = create_train(
                self.data.train, augmentation, views=views, seed=args.seed, bad=self.bad_images,
                erasing=self._erasing(), resample_power=args.resample_power if pairs else None, **common)
        except InputError:
            raise
        except AssertionError as error:
            raise InputError(f'--aa {args.aa}: {error}') from error
        except ValueError as error:
            raise InputError(f'--batch-size {args.batch_size}, {accelerator.num_processes} processes: {error}') from error
        self.val_loader = self.data.validation and create_eval(self.data.validation, **common)
        self.epoch_loader = create_eval(self.data.holdout, **common) if self.data.holdout else self.val_loader
        self.evaluator = LongTailEvaluator(
            self.data.profile.counts, args.shot_thresholds, device=accelerator.device)

    def _erasing(self) -> RandomErasing | None:
        args = self.args
        if not args.reprob:
            return None
        return RandomErasing(args.reprob, *args.rearea, args.reaspect, mode=args.remode, max_count=args.recount,
                             device=self.accelerator.device)

    def _build_optimizer(self) -> None:
        args, processes, batch = self.args, self.accelerator.num_processes, self.global_batch * self.args.grad_accum_steps
        _logger.info(f'Global batch: {batch} images ({args.batch_size} x {processes} processes x {args.grad_accum_steps} '
                     f"steps); learning rate {self.lr:g}{'' if args.lr else ' by the rule of --lr-base'}")
        optimizer = self._create_optimizer(self.task.get_trainable_module(), layer_decay=args.layer_decay)
        self.updates_per_epoch = -(-len(self.train_loader) // args.grad_accum_steps)
        try:
            self.scheduler, self.num_epochs = create_scheduler_v2(
                optimizer, updates_per_epoch=self.updates_per_epoch, **scheduler_kwargs(args))
        except ValueError as error:
            raise InputError(f'--sched {args.sched}: {first_line(error)}') from error
        self.swa_epoch = averaging_epoch(args.swa_start, self.num_epochs)
        train_step = TrainStep(self.task, self.mixer, self.train_loader.normalize, self.frozen_norms)
        if args.torchcompile:
            train_step.compile(fullgraph=True, mode=None if args.torchcompile == 'default' else args.torchcompile)
        self.train_step, self.optimizer = self.accelerator.prepare(train_step, optimizer)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if self.swa_epoch is not None:
            self.task.setup_ema(**equal_weights(self.swa_epoch * self.updates_per_epoch))
        self.state = TrainingState(self.accelerator, self.task, self.optimizer)

    def _create_optimizer(self, model: torch.nn.Module, layer_decay: float | None = None) -> torch.optim.Optimizer:
        fused = self.accelerator.scaler is None  # see engine.skips_on_device for why not with a loss scaler
        return create_optimizer(model, lr=self.lr, fused=fused, layer_decay=layer_decay, **pick(self.args, (
            'opt', 'weight_decay', 'momentum', 'filter_bias_and_bn', 'opt_eps', 'opt_betas', 'opt_kwargs')))

    def set_schedule(self, position: Position) -> None:
        """Set the learning rate of the next step."""
        if self.scheduler is None:
            return
        if position.epoch:
            self.scheduler.step(position.epoch)
        updates = -(-position.step // self.args.grad_accum_steps)
        self.scheduler.step_update(position.epoch * self.updates_per_epoch + updates)

    def train_epoch(self, epoch: int, **where) -> dict:
        """Train one epoch with the options; `where` has the other arguments of `engine.train_one_epoch`."""
        args = self.args
        self.task.set_progress(epoch / self.num_epochs)
        return train_one_epoch(
            self.accelerator, self.train_step, self.train_loader, self.optimizer, self.scheduler, epoch=epoch,
            accum_steps=args.grad_accum_steps, run_batch=partial(sam_batch, rho=args.sam_rho) if args.sam_rho else None,
            **where,
            **pick(args, ('seed', 'clip_grad', 'clip_mode', 'log_interval', 'max_skipped_steps')))

    @property
    def eval_model(self) -> torch.nn.Module:
        """The backbone that is evaluated and exported: of the average of the weights, if there is one, without adapters."""
        return exported_form(self.task.get_eval_model(ema=self.task.has_ema()))

    @property
    def conventional(self) -> torch.nn.Linear | None:
        """GLMC's conventional classifier for the features of `eval_model`."""
        return self.task.conventional_classifier(ema=self.task.has_ema())

    def evaluate(self, loader, between: Callable[[], None] = lambda: None, average: bool = True) -> dict:
        """Metrics of `eval_model` by `engine.evaluate`, or without `average` those of the weights themselves.

        Running statistics of all processes become equal.
        """
        self.state.equalize_statistics(self.args.dist_bn == 'reduce')
        model = self.eval_model if average else exported_form(self.task.get_eval_model())
        return evaluate(self.accelerator, model, loader, self.evaluator, between=between)

    def evaluate_references(self) -> dict[str, float]:
        """Top-1 accuracy in % of the models that the task compares with, as `NAME_top1`."""
        loader = self.val_loader or self.epoch_loader
        models = self.task.reference_models(ema=self.task.has_ema())
        return {f'{name}_top1': evaluate(self.accelerator, model, loader, self.evaluator)['top1']
                for name, model in models.items()}

    def readable_data(self) -> TrainingData:
        """The data without training images that could not be decoded."""
        if self.bad_images is None or not self.bad_images.flags.any():
            return self.data
        return replace(self.data, train=self.data.train.subset((~self.bad_images.flags).nonzero().flatten().numpy()))

    def metadata(self, epoch: int, metrics: dict, seconds: float, evaluated_on: str | None = None) -> dict:
        """Content of metrics.json, which checkpoints hold, too.

        Args:
            epoch: 0-based epoch of the weights.
            metrics: Metrics of the evaluation.
            seconds: Duration of the run.
            evaluated_on: Name of the evaluated set, if not that of `epoch_loader`.
        """
        args, profile = self.args, self.data.profile
        own = args.select_split or 'holdout' if self.data.holdout else args.val_list or args.val_split
        return {
            'model': args.model, 'method': args.method, 'data': self.data_name(), 'num_classes': len(self.data.class_names),
            'parameters': self.num_parameters, 'epoch': epoch, 'epochs': self.num_epochs,
            'evaluated_on': evaluated_on or own, **metrics, 'fingerprint': profile.fingerprint,
            'train_images': profile.num_images, 'seed': args.seed, 'seconds': round(seconds, 1),
            'processes': self.accelerator.num_processes, 'precision': self.accelerator.mixed_precision,
            'device': device_name(self.accelerator.device), 'threads': torch.get_num_threads(), **provenance(),
        }

    def data_name(self) -> str:
        return self.args.train_list or self.args.dataset or self.args.data_dir or 'digits'

    def description(self) -> dict:
        """Options to create and export the model again, and those that a resumed run must share."""
        args = self.args
        model = {name: list(value) if isinstance(value, tuple) else value for name, value in self.model_options.items()}
        shapes = (*self.method.module_options, *self.method.state_options)
        training = pick(args, ('opt', 'filter_bias_and_bn', 'layer_decay', *shapes))
        training['swa_first_epoch'] = self.swa_epoch  # the first epoch in the mean
        training.update({name: value for name, value in pick(args, ('freeze', 'freeze_bn')).items() if value})
        levers = {name: value for name, value in pick(args, LEVERS).items() if value != LEVERS[name]}
        source = dict(
            method=args.method, profile=self.data.profile.as_dict(), precision=self.accelerator.mixed_precision,
            prior=self.method.class_prior(self.data.profile.counts, pick(args, self.method.options)),
            recipe={**pick(args, RECIPE), **pick(args, sorted(self.method.options)), **levers},
            license=None if args.hub_license == 'unknown' else args.hub_license,
            dataset_name=args.dataset_name,
            base_model=self.base_model, other_weights=bool(args.initial_checkpoint) or ':' in args.model)
        export = dict(data_config=self.data_config, class_names=list(self.data.class_names), source=source)
        return dict(model=model, training=training, export=export)
