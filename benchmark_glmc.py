#!/usr/bin/env python3
"""Throughput and memory of the training step and of the input pipeline, beside a plain loop of the published structure.

    python benchmark_glmc.py --model resnet32_cifar --dataset hfds/PATH/TO/cifar100 --val-split test \
        --imbalance-factor 100 --augmentation cifar --amp-dtype bfloat16 --compare-loss

Takes all options of train_glmc.py. Everything is measured in one process, in turns, so that a ratio holds where the
machine's speed drifts. A turn warms up, which fills the loaders' queues, and then times --steps steps as a whole; start-up
of worker processes is not timed.

    plain      the published structure: two worker loaders, four PIL views per pair, float32, contiguous, two forward
               passes, the loss read every step
    run        this project, as the same options train it: input pipeline and step
    step       its step alone, on a batch that is on the device
    input      its input pipeline alone
    timm       timm's own loader with the same augmentation, one decoding per view, as many views
"""
import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader, create_transform
from timm.data.transforms import MaybePILToTensor
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from glmc.config import positive_int, train_parser
from glmc.data.datasets import ImageSet
from glmc.data.loaders import image_mode
from glmc.data.resident import ResidentTrainLoader
from glmc.data.transforms import CIFAR_PADDING, IMAGENET_LT
from glmc.engine import step_generator
from glmc.launch import is_main_process
from glmc.losses import class_weights
from glmc.methods import METHODS
from glmc.mixing import random_box
from glmc.models import GLMCModule
from glmc.parsing import InputError, parse_args, pick, run_script
from glmc.results import provenance
from train_glmc import Run

PARTS = ('plain', 'run', 'step', 'input', 'timm')
AUGMENTATION = ('no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
                'grayscale_prob', 'gaussian_blur_prob')
# What the loss of `run` may differ by from that of `plain`, relative to the larger of that and 1, and the gradient in norm.
LOSS_TOLERANCE = {'no': 1e-5, 'fp16': 2 ** -9, 'bf16': 2 ** -7}
GRADIENT_TOLERANCE = {'no': 0.02, 'fp16': 0.25, 'bf16': 0.5}  # ReLUs near 0 change sides with the last bit
PRECISION = {'no': 'float32', 'fp16': 'float16', 'bf16': 'bfloat16'}


def main() -> None:
    parser = train_parser(METHODS)
    add_benchmark_options(parser)
    args, given = parse_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        args.output, args.experiment, args.resume = folder, None, None
        bench = Benchmark(Run(args, given))
        agreement = compare_loss(bench) if args.compare_loss else None
        measured = bench.measure(args.rounds, args.steps)
    result = {'facts': bench.facts(), 'parts': bench.figures(*measured), 'agreement': agreement}
    print(report(result), flush=True)
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump(result, file, indent=1, ensure_ascii=False)
    if agreement and not agreement['agrees']:
        sys.exit(1)


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('benchmark').add_argument
    add('--rounds', type=positive_int, default=5, metavar='N', help='turns that each part gets')
    add('--steps', type=positive_int, default=20, metavar='N', help='timed steps a turn')
    add('--skip', nargs='*', default=[], choices=PARTS, metavar='PART', help=f"parts to leave out: {', '.join(PARTS)}")
    add('--compare-loss', action='store_true',
        help='first show that plain and run agree on the same images; exit code 1 if they do not')
    add('--json', metavar='FILE', help='write all figures there')


class Benchmark:
    """The parts to measure, on the data, model and precision of a run.

    A part is prepared for its turn and gives a function that does n steps.
    """

    def __init__(self, run: Run):
        self.run, self.args, self.device = run, run.args, run.accelerator.device
        if run.accelerator.num_processes > 1:
            raise InputError(f'benchmark_glmc.py: expected one process, found {run.accelerator.num_processes}')
        self.loader = run.train_loader  # `run` and `step` put short ones in its place
        inner = getattr(self.loader, 'loader', self.loader)
        self.resident = isinstance(inner, ResidentTrainLoader)
        members = 2 if run.method.paired and self.args.partner == 'sampler' else 1
        self.num_views = run.method.num_views * members  # of a row of a batch
        self.size = tuple(run.data_config['input_size'][-2:])
        self.batch = next(batch for batch in endless(self.loader, self.args.batch_size))
        self.images = None  # for PIL, once asked for

    # --- the parts ---

    def plain(self) -> Callable[[int], None]:
        steps = PlainLoop(self.run, self.pil_images(), pil_transform(self.run)).steps()
        return lambda n: consume(steps, n)

    def run_part(self) -> Callable[[int], None]:
        batches = endless(self.loader, self.args.batch_size)
        return lambda n: self._train(batches, n)

    def step(self) -> Callable[[int], None]:
        return lambda n: self._train(itertools.repeat(self.batch), n)

    def input(self) -> Callable[[int], None]:
        batches = endless(self.loader, self.args.batch_size)
        return lambda n: consume(batches, n)

    def timm(self) -> Callable[[int], None]:
        batches = endless(timm_loader(self.run, self.pil_images()), self.args.batch_size)
        return lambda n: consume(batches, n * self.num_views)

    def _train(self, batches: Iterator, num_steps: int) -> None:
        """So many steps of the epoch that users get."""
        self.run.train_loader = ShortLoader(batches, num_steps)
        self.run.train(epoch=0)

    def pil_images(self) -> 'PILImages':
        """The training images; decoded ahead where `run` keeps them on the device, as CIFAR's own readers do."""
        if self.images is None:
            self.images = PILImages(self.run.data.train, image_mode(self.run.data_config), ahead=self.resident)
        return self.images

    def skipped(self) -> dict[str, str]:
        """Parts that are left out, and why."""
        reasons = dict.fromkeys(self.args.skip, '--skip')
        if not isinstance(self.run.data.train, ImageSet):
            reasons.update(plain='the source cannot be indexed', timm='the source cannot be indexed')
        if self.args.method != 'glmc' or self.args.balanced:
            reasons['plain'] = 'it is a loop for --method glmc without --balanced'
        return reasons

    # --- measuring ---

    def measure(self, rounds: int, steps: int) -> tuple[dict[str, list[float]], dict[str, int], float, float]:
        """Seconds per step of each turn of each part, peak bytes, operations of a step, and of a second of matmul."""
        prepare = {'plain': self.plain, 'run': self.run_part, 'step': self.step, 'input': self.input, 'timm': self.timm}
        seconds = {name: [] for name in PARTS if name not in self.skipped()}
        peaks, rates, flops = dict.fromkeys(seconds, 0), [], self.step_flops()
        for _ in range(rounds):
            for name, turns in seconds.items():
                before = self._reset_memory()
                work = prepare[name]()
                work(3 if name == 'step' else 2 * self.args.workers + 2)
                turns.append(self._timed(work, steps) / steps)
                del work  # its workers and its model go
                own = 0 if name in ('run', 'step', 'input') else before  # what `run` keeps is not theirs
                peaks[name] = max(peaks[name], self._peak_memory() - own)
            rates.append(self.matmul_rate())
        return seconds, peaks, flops, statistics.median(rates)

    def _timed(self, work: Callable[[int], None], n: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        work(n)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def _reset_memory(self) -> int:
        if self.device.type != 'cuda':
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == 'cuda' else 0

    def mixture(self):
        mixture = self.run.mixer.draw(self.args.batch_size, self.size, step_generator(self.args.seed, 0, 0))
        return mixture if mixture is None else mixture.to(self.device)

    def step_flops(self) -> float:
        """Operations of our step: three times its forward pass.

        torch's counter overestimates the weight gradient of grouped convolutions by the number of groups (2.15), so the
        backward pass is not counted but taken as twice the forward pass, which it is.
        """
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.run.train_step.forward(*self.batch, self.mixture())  # not compiled
        return 3.0 * counter.get_total_flops()

    def matmul_rate(self) -> float:
        """Operations per second of a square matrix product in the precision of the run."""
        size, repeats = (8192, 10) if self.device.type == 'cuda' else (2048, 2)
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.run.accelerator.mixed_precision, torch.float32)
        a, b = torch.randn(2, size, size, device=self.device).to(dtype)
        a @ b
        return 2 * size ** 3 * repeats / self._timed(lambda n: [a @ b for _ in range(n)], repeats)

    # --- what comes out ---

    def figures(
            self, seconds: dict[str, list[float]], peaks: dict[str, int], flops: float, matmul_rate: float) -> dict:
        """Figures of each part; ratios and shares are medians over the rounds."""
        rows, batch = {}, self.args.batch_size
        for name, turns in seconds.items():
            median = statistics.median(turns)
            views = batch * self.num_views / median
            row = dict(ms_per_step=1e3 * median, ms_min=1e3 * min(turns), ms_max=1e3 * max(turns),
                       images_per_second=batch / median, views_per_second=views, turns=[1e3 * turn for turn in turns])
            if name in ('input', 'timm'):
                row['views_per_second_per_core'] = views / self._cores(name)
            if name in ('plain', 'run', 'step'):
                row.update(tflops=flops / median / 1e12, matmul_share=flops / median / matmul_rate)
            if 'plain' in seconds and name != 'timm':
                row['ratio_to_plain'] = statistics.median(p / t for p, t in zip(seconds['plain'], turns, strict=True))
            row['peak_memory'] = peaks[name] or None
            rows[name] = row
        return {'rows': rows, 'step_gflop': flops / 1e9, 'matmul_tflops': matmul_rate / 1e12, 'bound': bound(rows),
                'skipped': self.skipped()}

    def _cores(self, name: str) -> int:
        """Worker processes that have a core, or the main process."""
        if name == 'input' and self.resident:
            return 1
        return max(min(self.args.workers, num_cores()), 1)

    def facts(self) -> dict:
        """What the figures hold for."""
        args, run = self.args, self.run
        return {
            'date': date.today().isoformat(), 'device': device_name(self.device), 'cores': num_cores(),
            'threads': torch.get_num_threads(), 'model': args.model, 'parameters': run.num_parameters, 'method': args.method,
            'input_size': list(run.data_config['input_size']), 'batch_size': args.batch_size, 'views': self.num_views,
            'precision': PRECISION[run.accelerator.mixed_precision], 'channels_last': args.channels_last,
            'torchcompile': args.torchcompile, 'joint_forward': args.joint_forward, 'partner': args.partner,
            'loader': 'resident' if self.resident else f'{args.workers} workers',
            'train_images': run.data.profile['num_images'],
            'tf32_convolutions': torch.backends.cudnn.allow_tf32, 'tf32_matmul': torch.backends.cuda.matmul.allow_tf32,
            'rounds': args.rounds, 'steps': args.steps, **provenance()}


# --- the plain loop ---


class PlainLoop:
    """A GLMC loop written down as the published one is built, without a thought for speed.

    Args:
        run: Whose model, options and labels it takes.
        images: Decoded images by index.
        transform: PIL image -> normalised float tensor.
    """

    def __init__(self, run: Run, images: 'PILImages', transform: Callable):
        self.args, self.device, self.size = run.args, run.accelerator.device, run.data_config['input_size'][-2:]
        self.model = plain_model(run)
        counts = run.data.profile['class_counts']
        self.weight = class_weights(counts, self.args.reweight_power).to(self.device)
        self.dataset = TwoViews(images, transform)
        self.image_weights = (np.asarray(counts, dtype=float) ** -self.args.resample_power)[images.labels]

    def steps(self) -> Iterator[float]:
        """The loss of each step."""
        args = self.args
        lr = args.lr or 0.01
        optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay)
        for (i_views, i_labels), (j_views, j_labels) in self.batches():
            views = [view.to(self.device) for view in (*i_views, *j_views)]
            labels = i_labels.to(self.device), j_labels.to(self.device)
            lam = np.random.beta(args.mix_beta, args.mix_beta)
            box = random_box(*self.size, lam, np.random.default_rng())
            loss = plain_loss(self.model, views, labels, (lam, lam, box), self.weight, 1.0, args.consistency_weight)['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    def batches(self) -> Iterator[tuple]:
        """Pairs of batches, from a uniform and from a weighted loader, each with worker processes of its own."""
        options = dict(batch_size=self.args.batch_size, num_workers=self.args.workers, drop_last=True,
                       pin_memory=self.device.type == 'cuda', persistent_workers=self.args.workers > 0)
        weighted = WeightedRandomSampler(self.image_weights, len(self.dataset))
        loaders = DataLoader(self.dataset, shuffle=True, **options), DataLoader(self.dataset, sampler=weighted, **options)
        while True:
            yield from zip(*loaders, strict=True)


def plain_model(run: Run) -> GLMCModule:
    """A copy of the run's model with the same weights: float32, contiguous, not compiled."""
    return copy.deepcopy(run.task.get_trainable_module()).float().to(memory_format=torch.contiguous_format).train()


def plain_loss(
        model: GLMCModule, views: list[Tensor], labels: tuple[Tensor, Tensor], mixture: tuple, weight: Tensor,
        alpha: float, gamma: float) -> dict[str, Tensor]:
    """The loss of a batch (GLMC Eq. 1-11), step by step, with a weighted copy of the labels.

    Args:
        model: Encodes one view at a time.
        views: i1, i2, j1, j2, each (B, c, H, W) and normalised.
        labels: Of i and j, each (B,).
        mixture: λ of the global view, λ of the local view's labels, box (y0, y1, x0, x1).
        weight: (C,) class weights.
        alpha: α.
        gamma: γ.
    """
    (i1, i2, j1, j2), (lam, local_lam, (y0, y1, x0, x1)) = views, mixture
    i, j = (F.one_hot(label, len(weight)).float() for label in labels)
    i_weighted, j_weighted = (one_hot * weight[label][:, None] for one_hot, label in zip((i, j), labels, strict=True))
    global_view = lam * i1 + (1 - lam) * j1
    local_view = i2.clone()
    local_view[:, :, y0:y1, x0:x1] = j2[:, :, y0:y1, x0:x1]
    loss_c = loss_cb = 0
    outputs = []
    for view, part in ((global_view, lam), (local_view, local_lam)):
        output = model.forward_view(view)
        outputs.append(output)
        target, weighted = part * i + (1 - part) * j, part * i_weighted + (1 - part) * j_weighted
        loss_c = loss_c - (F.log_softmax(output.logits, 1) * target).sum(1).mean()
        loss_cb = loss_cb - (F.log_softmax(output.rebalanced_logits, 1) * weighted).sum(1).mean()
    (_, _, h1, u1), (_, _, h2, u2) = outputs
    u1, h1, u2, h2 = (F.normalize(vector, dim=1) for vector in (u1, h1.detach(), u2, h2.detach()))
    loss_sim = -(u1 * h2).sum(1).mean() - (u2 * h1).sum(1).mean()
    loss = alpha * loss_c + (1 - alpha) * loss_cb + gamma * loss_sim
    return dict(loss=loss, loss_c=loss_c, loss_cb=loss_cb, loss_sim=loss_sim)


class TwoViews(Dataset):
    """Two augmented views of an image and its label."""

    def __init__(self, images: 'PILImages', transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        image, label = self.images[index]
        return [self.transform(image), self.transform(image)], label


class PILImages(Dataset):
    """PIL images and labels, in the form that timm's loader takes.

    Args:
        images: The set.
        mode: RGB or L.
        ahead: Decode all now instead of at each access.
    """

    transform = None

    def __init__(self, images: ImageSet, mode: str, ahead: bool):
        self.images, self.mode, self.labels = images, mode, images.labels
        self.decoded = [images.image(index, mode) for index in range(len(images))] if ahead else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        image = self.decoded[index] if self.decoded else self.images.image(index, self.mode)
        return self.transform(image) if self.transform else image, int(self.labels[index])


def augmentation_options(args: argparse.Namespace) -> dict:
    """For timm's create_transform and create_loader."""
    options = dict(auto_augment=args.aa, interpolation=args.train_interpolation, **pick(args, AUGMENTATION))
    return {**options, **IMAGENET_LT} if args.augmentation == 'imagenet_lt' else options


def cifar_crop(run: Run) -> list[Callable] | None:
    """PIL transforms of `cifar` augmentation, which timm has no option for; None for another."""
    size, args = tuple(run.data_config['input_size'][-2:]), run.args
    if args.augmentation != 'cifar' or args.no_aug:
        return None
    return [transforms.Resize(size), transforms.RandomCrop(size, padding=CIFAR_PADDING),
            transforms.RandomHorizontalFlip(args.hflip)]


def pil_transform(run: Run) -> Callable:
    """PIL image -> normalised float tensor."""
    config, crop = run.data_config, cifar_crop(run)
    if crop:
        return transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(config['mean'], config['std'])])
    return create_transform(config['input_size'], is_training=True, mean=config['mean'], std=config['std'],
                            **augmentation_options(run.args))


def timm_loader(run: Run, images: PILImages):
    """timm's loader, as its training script makes it."""
    args, config, device = run.args, run.data_config, run.accelerator.device
    loader = create_loader(
        copy.copy(images), config['input_size'], args.batch_size, is_training=True, num_workers=args.workers,
        mean=config['mean'], std=config['std'], re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
        pin_memory=device.type == 'cuda', device=device, persistent_workers=args.workers > 0,
        **augmentation_options(args))
    crop = cifar_crop(run)
    if crop:
        loader.dataset.transform = transforms.Compose([*crop, MaybePILToTensor()])
    return loader


# --- do plain and run agree? ---


def compare_loss(bench: Benchmark) -> dict:
    """Losses of `plain` and of `run` from the same uint8 views, labels, λ, box and weights; printed, too.

    At α = 0.75, so that every term counts. Drop-out is off; BatchNorm is in training mode unless both views are one batch
    for `run` alone.
    """
    run, args = bench.run, bench.args
    if args.method != 'glmc' or args.balanced or args.partner != 'sampler' or args.reprob:
        raise InputError('--compare-loss: expected --method glmc, --partner sampler, no --balanced and no --reprob')
    precision = run.accelerator.mixed_precision
    run.task.set_progress(0.5)
    expected = _plain_losses(bench)
    found = {'eager': _run_losses(bench, run.train_step.forward)}
    if args.torchcompile:
        found['compiled'] = _run_losses(bench, run.train_step)
    result = dict(precision=PRECISION[precision], tolerance=LOSS_TOLERANCE[precision], plain=expected['losses'], agrees=True)
    print(f"{'':10s} {'loss':>12s} {'difference':>12s} {'gradient':>12s}   (tolerance {LOSS_TOLERANCE[precision]:.1g} and "
          f"{GRADIENT_TOLERANCE[precision]:g} in {PRECISION[precision]})")
    print(f"{'plain':10s} {expected['losses']['loss']:12.7f}")
    for name, ours in found.items():
        difference = {term: abs(ours['losses'][term] - value) / max(abs(value), 1)
                      for term, value in expected['losses'].items()}
        gradient = ((ours['gradient'] - expected['gradient']).norm() / expected['gradient'].norm()).item()
        result[name] = dict(ours['losses'], difference=difference, gradient_difference=gradient)
        result['agrees'] &= (max(difference.values()) <= LOSS_TOLERANCE[precision]
                             and gradient <= GRADIENT_TOLERANCE[precision])
        print(f"{name:10s} {ours['losses']['loss']:12.7f} {max(difference.values()):12.2g} {gradient:12.2g}")
    run.task.set_progress(0.0)
    run.train_step.train()
    print('they agree\n' if result['agrees'] else 'THEY DO NOT AGREE\n', flush=True)
    return result


def _plain_losses(bench: Benchmark) -> dict:
    run, (views, labels), mixture = bench.run, bench.batch, bench.mixture()
    mean, std = (torch.tensor(run.data_config[name], device=bench.device).view(-1, 1, 1) for name in ('mean', 'std'))
    views = [((view.contiguous().float() / 255) - mean) / std for view in views.unbind(1)]
    weight = class_weights(run.data.profile['class_counts'], bench.args.reweight_power).to(bench.device)
    mixture = mixture.lam.item(), mixture.local_lam.item(), mixture.box.tolist()
    model = plain_model(run)
    with _reproducible(model, bench):
        return _with_gradient(
            lambda: plain_loss(model, views, labels.unbind(1), mixture, weight, run.task.alpha.item(),
                               bench.args.consistency_weight), model)


def _run_losses(bench: Benchmark, train_step: Callable) -> dict:
    model = bench.run.task.get_trainable_module()
    with _reproducible(model, bench):
        return _with_gradient(lambda: train_step(*bench.batch, bench.mixture()), model)


def _with_gradient(losses_of: Callable[[], dict[str, Tensor]], model: nn.Module) -> dict:
    losses = losses_of()
    losses['loss'].backward()
    gradient = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    model.zero_grad()
    return dict(losses={name: losses[name].item() for name in ('loss', 'loss_c', 'loss_cb', 'loss_sim')}, gradient=gradient)


class _reproducible:
    """Nothing random in the model, and no TensorFloat-32 where the comparison is in float32."""

    def __init__(self, model: nn.Module, bench: Benchmark):
        still = (nn.modules.dropout._DropoutNd, DropPath, PatchDropout)
        still = (*still, nn.modules.batchnorm._BatchNorm) if bench.args.joint_forward else still
        self.modules = [module for module in model.modules() if isinstance(module, still)]

    def __enter__(self) -> None:
        self.tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        for module in self.modules:
            module.eval()

    def __exit__(self, *_) -> None:
        torch.backends.cudnn.allow_tf32 = self.tf32
        for module in self.modules:
            module.train()


# --- helpers ---


def endless(loader, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches, epoch after epoch."""
    for epoch in itertools.count():
        if hasattr(loader, 'set_epoch'):
            loader.set_epoch(epoch)
        yield from (batch for batch in loader if len(batch[0]) == batch_size)


def consume(iterator: Iterator, n: int) -> None:
    for _ in itertools.islice(iterator, n):
        pass


class ShortLoader:
    """The next `num_steps` batches of an iterator as an epoch."""

    def __init__(self, batches: Iterator, num_steps: int):
        self.batches, self.num_steps = batches, num_steps

    def set_epoch(self, epoch: int) -> None:
        """The iterator has epochs of its own."""

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator:
        return itertools.islice(self.batches, self.num_steps)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def bound(rows: dict) -> str | None:
    """Which of step and input takes longer; that bounds `run`."""
    if not {'step', 'input'} <= rows.keys():
        return None
    return max(('step', 'input'), key=lambda name: rows[name]['ms_per_step'])


def report(result: dict) -> str:
    """The table that is printed."""
    facts, parts = result['facts'], result['parts']
    how = [name for name, on in (
        ('channels_last', facts['channels_last']), ('joint forward', facts['joint_forward']),
        (f"compiled ({facts['torchcompile']})", facts['torchcompile'])) if on]
    lines = [
        f"{facts['model']}, {facts['parameters'] / 1e6:.2f} M parameters, {'x'.join(map(str, facts['input_size']))}, "
        f"batch {facts['batch_size']}, {facts['method']}, {', '.join([facts['precision'], *how])}, {facts['loader']}",
        f"{facts['device']}, {facts['threads']} of {facts['cores']} cores' threads, {facts['date']}", '',
        f"{'':6s}{'ms/step':>10s}{'min … max':>19s}{'images/s':>11s}{'views/s':>10s}{'per core':>10s}{'x plain':>9s}"
        f"{'TFLOP/s':>9s}{'of matmul':>11s}{'memory':>9s}"]
    lines += [_report_line(name, row) for name, row in parts['rows'].items()]
    lines += ['', f"A step: {parts['step_gflop']:.4g} GFLOP; matmul: {parts['matmul_tflops']:.4g} TFLOP/s; "
              f"median of {facts['rounds']} turns of {facts['steps']} steps."]
    if parts['bound']:
        slow, rows = parts['bound'], parts['rows']
        of_run = f" of {rows['run']['ms_per_step']:.4g}" if 'run' in rows else ''
        lines.append(f"The {slow} bounds run: {rows[slow]['ms_per_step']:.4g}{of_run} ms.")
    lines += [f'{name} is left out: {reason}' for name, reason in parts['skipped'].items() if reason != '--skip']
    return '\n'.join(lines)


def _report_line(name: str, row: dict) -> str:
    def cell(key: str, form: str, width: int, scale: float = 1) -> str:
        return (form.format(row[key] * scale) if row.get(key) is not None else '–').rjust(width)
    spread = f"{row['ms_min']:.4g} … {row['ms_max']:.4g}"
    return (f"{name:6s}{cell('ms_per_step', '{:.4g}', 10)}{spread:>19s}{cell('images_per_second', '{:.0f}', 11)}"
            f"{cell('views_per_second', '{:.0f}', 10)}{cell('views_per_second_per_core', '{:.0f}', 10)}"
            f"{cell('ratio_to_plain', '{:.2f}', 9)}{cell('tflops', '{:.4g}', 9)}{cell('matmul_share', '{:.0%}', 11)}"
            f"{cell('peak_memory', '{:.2f} GB', 9, 1e-9)}")


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv))
