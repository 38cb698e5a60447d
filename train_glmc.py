#!/usr/bin/env python3
"""Train a timm model on long-tailed images with GLMC or a baseline, and export it as a plain timm model.

    accelerate launch train_glmc.py                                       a demonstration on embedded digits
    accelerate launch train_glmc.py --model resnext50_32x4d --data-dir my_images
    accelerate launch train_glmc.py -c hparams/cifar100_lt_if100.yaml --dataset torch/cifar100 --data-dir data
"""
import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from timm.data import resolve_input_data_config
from timm.data.random_erasing import RandomErasing
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import distribute_bn

from glmc.checkpoint import (
    BEST,
    CheckpointWriter,
    checkpoint_path,
    epoch_checkpoints,
    find_checkpoint,
    keep_best,
    load_checkpoint,
    prune,
    rng_state,
    set_rng_state,
)
from glmc.config import DEMONSTRATION, train_parser
from glmc.data.datasets import ImageSet
from glmc.data.loaders import ErasingLoader, create_eval_loader, create_train_loader
from glmc.data.resident import create_resident_eval_loader, create_resident_train_loader, is_resident
from glmc.data.sources import open_training_data
from glmc.engine import TrainStep, evaluate, train_one_epoch
from glmc.evaluation import LongTailEvaluator, shot_line, shot_table
from glmc.export import export_model
from glmc.hub import push_or_tell, warn_without_token
from glmc.launch import create_accelerator, is_main_process
from glmc.methods import METHODS, ignored_options
from glmc.models import create_backbone
from glmc.optim import create_optimizer, scaled_learning_rate
from glmc.parsing import InputError, parse_args, pick, run_script
from glmc.pictures import mixed_views
from glmc.report import Evidence, classifier_norms, report_or_tell
from glmc.results import (
    create_run_folder,
    open_run_folder,
    provenance,
    read_summary,
    summary_row,
    write_summary,
    write_tables,
)
from glmc.trackers import finish_trackers, log_pictures, log_row, require_trackers, start_trackers

_logger = logging.getLogger('glmc.train')
RECIPE = ('img_size', 'augmentation', 'epochs', 'batch_size', 'opt', 'lr', 'momentum', 'weight_decay', 'sched',
          'warmup_epochs', 'imbalance_factor')  # on the model card, with the method's own


def main() -> None:
    args, given = parse_args(train_parser(METHODS))
    run = Run(args, given)
    run.resume()
    run.create_folder()
    for epoch in range(run.start_epoch, run.num_epochs):
        train_metrics = run.train(epoch)
        metrics = run.evaluate(run.epoch_loader) if run.evaluates(epoch) else None
        run.record(epoch, train_metrics, metrics)
        run.save(epoch, metrics)
    run.finish()


class Run:
    """A training run: what the options ask for, built in pipeline order, and its state between epochs."""

    def __init__(self, args: argparse.Namespace, given: set[str]):
        self.args, self.method = args, METHODS[args.method]
        self.accelerator = create_accelerator(args.amp, args.amp_dtype)
        self.started, self.seconds_before, self.start_epoch = time.time(), 0.0, 0
        self.best, self.metrics, self.predictions, self.writer = None, None, None, CheckpointWriter()
        self.folder = self._choose_folder()
        self._announce(given)
        set_seed(args.seed)
        self._build_data()
        self._build_task()
        self._build_loaders()
        self._build_optimizer()
        set_seed(args.seed, device_specific=True)  # drop-out differs from process to process

    # --- building, in the order in which data flows ---

    def _choose_folder(self) -> Path:
        args = self.args
        data = Path(args.train_list or args.data_dir or args.dataset or 'digits').name.split('.')[0]
        if args.resume and args.resume != 'auto' and not args.experiment:
            return find_checkpoint(Path(args.resume)).resolve().parent.parent
        name = f"{data}-{args.model.split('/')[-1].replace(':', '-')}-{args.method}"
        return open_run_folder(args.output, args.experiment, name, resume=args.resume == 'auto')

    def _announce(self, given: set[str]) -> None:
        args = self.args
        self.trackers = require_trackers(args.report_to)
        if args.push_to_hub:
            warn_without_token()
        for name in sorted(ignored_options(args.method, given)):
            _logger.warning(f"--{name.replace('_', '-')} has no effect with --method {args.method}")
        if not (args.data_dir or args.dataset or args.train_list):
            for name, value in DEMONSTRATION.items():
                if name not in given:
                    setattr(args, name, value)
            _logger.info("No data given: this is a demonstration on scikit-learn's handwritten digits, made long-tailed. "
                         'Train on your own with --data-dir, --dataset or --train-list.')

    def _build_data(self) -> None:
        args = self.args
        self.data = open_training_data(
            download=args.dataset_download or None, **pick(args, (
                'data_dir', 'dataset', 'train_split', 'val_split', 'train_list', 'val_list', 'num_classes',
                'class_counts', 'holdout', 'imbalance_factor', 'lt_type', 'lt_split', 'lt_seed', 'shot_thresholds',
                'seed', 'batch_size', 'class_map', 'input_key', 'target_key')))
        facts = self.data.profile
        counts = facts['class_counts']
        groups = ', '.join(f'{n} {name}' for name, n in facts['shot_classes'].items())
        _logger.info(f"Training set: {facts['num_images']:,} images of {len(counts)} classes, {max(counts):,} … "
                     f"{min(counts):,} per class ({groups}), fingerprint {str(facts['fingerprint'])[:16]}")

    def _build_task(self) -> None:
        args, counts = self.args, self.data.profile['class_counts']
        self.model_options = dict(
            name=args.model, num_classes=len(counts), img_size=args.img_size, in_chans=args.in_chans, drop_rate=args.drop,
            drop_path_rate=args.drop_path, global_pool=args.gp, **args.model_kwargs)
        backbone = create_backbone(
            **self.model_options, pretrained=args.pretrained, checkpoint_path=args.initial_checkpoint)
        self.base_model = backbone.pretrained_cfg.get('hf_hub_id') if args.pretrained else None
        if args.grad_checkpointing:
            backbone.set_grad_checkpointing(True)
        try:
            self.data_config = resolve_input_data_config(
                backbone, pick(args, ('img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct')))
        except ValueError as error:
            raise InputError(f'--mean, --std: {error}') from error
        model = self.method.module(backbone, **pick(args, self.method.module_options))
        self.num_parameters = sum(p.numel() for p in backbone.parameters())
        if args.sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.task = self.method.task(model, counts, **pick(args, self.method.task_options))
        self.mixer = self.method.mixer(counts, **pick(args, self.method.mixer_options))
        _logger.info(f'Model: {args.model}, {self.num_parameters / 1e6:.2f} M parameters, '
                     f"input {'x'.join(map(str, self.data_config['input_size']))}, method {args.method}")

    def _build_loaders(self) -> None:
        args, accelerator = self.args, self.accelerator
        common = dict(
            data_config=self.data_config, batch_size=args.batch_size, device=accelerator.device, workers=args.workers,
            rank=accelerator.process_index, world_size=accelerator.num_processes)
        augmentation = dict(auto_augment=args.aa, interpolation=args.train_interpolation, **pick(args, (
            'augmentation', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter',
            'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')))
        resident = is_resident(args.resident, self.data.train, augmentation, self.data_config['input_size'])
        create_train = create_resident_train_loader if resident else create_train_loader
        create_eval = create_resident_eval_loader if resident else create_eval_loader
        pairs = self.method.paired and args.partner == 'sampler'
        if pairs and not isinstance(self.data.train, ImageSet):
            raise InputError(f'--dataset {args.dataset}: has no index to draw partners by, expected --partner batch')
        try:
            self.train_loader = create_train(
                self.data.train, augmentation, num_views=self.method.num_views, seed=args.seed,
                resample_power=args.resample_power if pairs else None, **common)
        except InputError:
            raise
        except AssertionError as error:
            raise InputError(f'--aa {args.aa}: {error}') from error
        except ValueError as error:
            raise InputError(f'--batch-size {args.batch_size}, {accelerator.num_processes} processes: {error}') from error
        if args.reprob:
            erasing = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=accelerator.device)
            self.train_loader = ErasingLoader(self.train_loader, erasing)
        self.val_loader = self.data.validation and create_eval(self.data.validation, **common)
        self.epoch_loader = create_eval(self.data.holdout, **common) if self.data.holdout else self.val_loader
        self.evaluator = LongTailEvaluator(
            self.data.profile['class_counts'], args.shot_thresholds, device=accelerator.device)

    def _build_optimizer(self) -> None:
        args, processes = self.args, self.accelerator.num_processes
        batch = args.batch_size * processes * args.grad_accum_steps
        lr = args.lr or scaled_learning_rate(args.opt, batch, args.lr_base, args.lr_base_size, args.lr_base_scale)
        _logger.info(f'Global batch: {batch} images ({args.batch_size} x {processes} processes x {args.grad_accum_steps} '
                     f"steps); learning rate {lr:g}{'' if args.lr else ' by the rule of --lr-base'}")
        optimizer = create_optimizer(self.task.get_trainable_module(), lr=lr, **pick(args, (
            'opt', 'weight_decay', 'momentum', 'filter_bias_and_bn', 'layer_decay', 'opt_eps', 'opt_betas', 'opt_kwargs')))
        self.updates_per_epoch = -(-len(self.train_loader) // args.grad_accum_steps)
        self.scheduler, self.num_epochs = create_scheduler_v2(
            optimizer, updates_per_epoch=self.updates_per_epoch, **scheduler_kwargs(args))
        train_step = TrainStep(self.task, self.mixer, self.train_loader.normalize)
        if args.torchcompile:
            train_step.compile(fullgraph=True, mode=None if args.torchcompile == 'default' else args.torchcompile)
        self.train_step, self.optimizer = self.accelerator.prepare(train_step, optimizer)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    def create_folder(self) -> None:
        options = {name: value for name, value in vars(self.args).items() if name not in ('config', 'resume', 'debug')}
        if self.accelerator.is_main_process:
            create_run_folder(self.folder, options)
        self.accelerator.wait_for_everyone()
        start_trackers(self.accelerator, self.trackers, self.folder, options)

    # --- an epoch ---

    def train(self, epoch: int) -> dict:
        args = self.args
        self.task.set_progress(epoch / self.num_epochs)
        metrics = train_one_epoch(
            self.accelerator, self.train_step, self.train_loader, self.optimizer, self.scheduler, epoch=epoch,
            accum_steps=args.grad_accum_steps, **pick(args, ('seed', 'clip_grad', 'clip_mode', 'log_interval')))
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1)
        return metrics

    @property
    def eval_model(self) -> torch.nn.Module:
        return self.task.get_eval_model(ema=self.args.model_ema)

    def evaluates(self, epoch: int) -> bool:
        return (epoch + 1) % self.args.val_interval == 0 or epoch + 1 == self.num_epochs

    def evaluate(self, loader) -> dict:
        if self.accelerator.num_processes > 1:
            distribute_bn(self.eval_model, self.accelerator.num_processes, self.args.dist_bn == 'reduce')
        metrics = evaluate(self.accelerator, self.eval_model, loader, self.evaluator)
        self.predictions = self.evaluator.predictions(self.accelerator.num_processes > 1)
        return metrics

    def record(self, epoch: int, train_metrics: dict, metrics: dict | None) -> None:
        alpha = getattr(self.task, 'alpha', None)
        row = summary_row(epoch, train_metrics, metrics, None if alpha is None else alpha.item())
        if self.accelerator.is_main_process:
            write_summary(self.folder, row)
            log_row(self.accelerator, row)
        evaluation = f'{shot_line(metrics)}, ' if metrics else ''
        _logger.info(f"Epoch {epoch + 1}/{self.num_epochs}: loss {train_metrics['loss']:.3f}, {evaluation}"
                     f"{train_metrics['images']:,} images at {train_metrics['images_per_second']:.0f}/s")

    # --- what stays ---

    def save(self, epoch: int, metrics: dict | None) -> None:
        self.metrics = self._facts(epoch, metrics or {})
        rng = gather_object([rng_state()])
        if not self.accelerator.is_main_process:
            return
        is_best = self.data.holdout and metrics and (self.best is None or metrics['class_mean'] > self.best)
        self.best = metrics['class_mean'] if is_best else self.best
        folder = self.folder / 'checkpoints'
        path = checkpoint_path(folder, epoch)

        def keep() -> None:
            if is_best:
                keep_best(path)
            prune(folder, self.args.checkpoint_hist)

        self.writer.save(path, self._state(epoch, rng), then=keep)

    def _state(self, epoch: int, rng: list) -> dict:
        """All that a checkpoint holds."""
        scaler = self.accelerator.scaler
        return dict(
            epoch=epoch, best=self.best, metrics=self.metrics, seconds=self._seconds(), rng=rng,
            model=self.task.get_checkpoint_state(),
            ema=self.task.get_checkpoint_state(ema=True) if self.args.model_ema else None,
            optimizer=self.optimizer.state_dict(), scaler=scaler and scaler.state_dict(),
            description=self._description())

    def resume(self) -> None:
        """Go on from a checkpoint: the newest of the run for `auto`, if there is one yet."""
        path = self._find_checkpoint()
        if path is None:
            return
        state = load_checkpoint(path)
        wanted, found = ({**description['model'], **description['training']}
                         for description in (self._description(), state['description']))
        if wanted['name'] != found['name'] or self.args.method != state['metrics']['method']:
            raise InputError(f"--resume {path}: holds {found['name']} with {found['num_classes']} classes by "
                             f"{state['metrics']['method']}, this run trains {wanted['name']} with "
                             f"{wanted['num_classes']} classes by {self.args.method}")
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise InputError(f'--resume {path}: was trained with {name} {found.get(name)}, this run has '
                                 f'{wanted.get(name)}')
        if state['metrics']['fingerprint'] != self.data.profile['fingerprint']:
            _logger.warning('The training set differs from the one of the checkpoint (fingerprints).')
        self.task.load_checkpoint_state(state['model']['state_dict'], state['model'].get('task_state'))
        if self.args.model_ema and state['ema']:
            self.task.load_checkpoint_state(
                state['ema']['state_dict_ema'], state['ema'].get('task_state_ema'), ema=True)
        self.optimizer.load_state_dict(state['optimizer'])
        if state['scaler'] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        self.start_epoch, self.best, self.metrics = state['epoch'] + 1, state['best'], state['metrics']
        self.seconds_before = state['seconds']
        if self.scheduler is not None:
            self.scheduler.step(self.start_epoch)
            self.scheduler.step_update(self.start_epoch * self.updates_per_epoch)
        if len(state['rng']) == self.accelerator.num_processes:
            set_rng_state(state['rng'][self.accelerator.process_index])
        _logger.info(f'Resumed from {path}, epoch {self.start_epoch + 1} of {self.num_epochs} comes next')

    def _find_checkpoint(self) -> Path | None:
        if self.args.resume == 'auto':
            found = epoch_checkpoints(self.folder / 'checkpoints')
            return found[-1] if found else None
        return find_checkpoint(Path(self.args.resume)) if self.args.resume else None

    def finish(self) -> None:
        """Export the last model, or the best on the held-out images, with its metrics."""
        self.writer.wait()
        self.accelerator.wait_for_everyone()
        if self.data.holdout:
            self._load_best()
        if self.data.holdout and self.val_loader:
            self.metrics = self._facts(self.metrics['epoch'], self.evaluate(self.val_loader), self.args.val_split)
        if not self.accelerator.is_main_process:
            return
        description = self._description()['export']
        folder = export_model(self.folder / 'export', self.eval_model, metrics=self.metrics, **description)
        print(f"\n{self.args.method} on {self.metrics['evaluated_on']}, {self.metrics['num_images']:,} images:\n"
              f'{shot_table(self.metrics)}\nExported to {folder}', flush=True)
        self.share(folder)

    def share(self, export: Path) -> None:
        """Tables, report, trackers, Hub: none of them can fail the run."""
        args = self.args
        write_tables(self.folder, self.metrics, self.data.class_names, self.predictions)
        if args.report:
            report_or_tell(self.folder, self.metrics, self._evidence, export)
        finish_trackers(self.accelerator)
        if args.push_to_hub:
            push_or_tell(export, args.push_to_hub, args.hub_private, args.hub_revision)

    def _evidence(self) -> Evidence:
        """What the report shows beside the metrics."""
        names, last = list(map(str, self.data.class_names)), self.num_epochs - 1
        views = mixed_views(self.train_loader, self.mixer, names, self.args.seed, last)
        log_pictures(self.accelerator, 'mixed_views', views, last)
        norms = classifier_norms(
            c=getattr(self.task.trainable_module, 'classifier', None), cb=self.eval_model.get_classifier())
        read_for = self.data.validation if self.data.validation else self.data.holdout
        return Evidence(names, self.predictions, read_for, norms, read_summary(self.folder), views)

    def _load_best(self) -> None:
        state = load_checkpoint(self.folder / 'checkpoints' / BEST)
        self.predictions = None  # those at hand are of the last epoch
        weights = state['ema']['state_dict_ema'] if self.args.model_ema else state['model']['state_dict']
        self.eval_model.load_state_dict(weights)
        self.metrics = state['metrics']
        _logger.info(f"Best on held-out images: epoch {state['epoch'] + 1}, class mean {state['best']:.2f}")

    def _facts(self, epoch: int, metrics: dict, evaluated_on: str | None = None) -> dict:
        """What metrics.json and a checkpoint say about the model."""
        evaluated_on = evaluated_on or ('holdout' if self.data.holdout else self.args.val_list or self.args.val_split)
        return {
            'model': self.args.model, 'method': self.args.method, 'data': self._data_name(),
            'num_classes': len(self.data.class_names),
            'parameters': self.num_parameters, 'epoch': epoch, 'epochs': self.num_epochs, 'evaluated_on': evaluated_on,
            **metrics, 'fingerprint': self.data.profile['fingerprint'], 'train_images': self.data.profile['num_images'],
            'seed': self.args.seed, 'seconds': round(self._seconds(), 1), 'processes': self.accelerator.num_processes,
            'precision': self.accelerator.mixed_precision, 'device': self._device_name(), **provenance(),
        }

    def _data_name(self) -> str:
        return self.args.train_list or self.args.dataset or self.args.data_dir or 'digits'

    def _device_name(self) -> str:
        device = self.accelerator.device
        return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type

    def _seconds(self) -> float:
        return self.seconds_before + time.time() - self.started

    def _description(self) -> dict:
        """What it takes to build and export the model again."""
        model = {name: list(value) if isinstance(value, tuple) else value for name, value in self.model_options.items()}
        training = pick(self.args, ('opt', 'filter_bias_and_bn', 'layer_decay', *self.method.module_options))
        return {'model': model, 'training': training, 'export': dict(
            data_config=self.data_config, class_names=list(self.data.class_names),
            source=self._source())}

    def _source(self) -> dict:
        """What an export says about its training."""
        args = self.args
        options = {**pick(args, RECIPE), **pick(args, sorted(self.method.options))}
        return dict(
            method=args.method, profile=self.data.profile, precision=self.accelerator.mixed_precision,
            prior='uniform' if self.method.rebalanced else 'train', recipe=options,
            license=None if args.hub_license == 'unknown' else args.hub_license,
            base_model=self.base_model, other_weights=bool(args.initial_checkpoint) or ':' in args.model)


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv))
