"""Timing of the training and of its input pipeline, part by part in turns, in one process."""
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date

import torch
from torch.utils.flop_counter import FlopCounterMode

from glmc.benchmark.plain import PILImages, PlainLoop, pil_transform, timm_loader
from glmc.cli import Progress
from glmc.config import PARTS, PRECISIONS
from glmc.data.datasets import ImageSet
from glmc.data.loaders import image_mode
from glmc.data.resident import ResidentTrainLoader
from glmc.errors import InputError
from glmc.run_folder import provenance
from glmc.setup import Setup
from glmc.training.engine import step_generator
from glmc.training.launch import device_name

SPEED_COLUMNS = (
    'images_per_second', 'views_per_second', 'views_per_second_per_core', 'ms_per_step', 'ms_min', 'ms_max',
    'ratio_to_plain', 'tflops', 'matmul_share', 'peak_memory')


class Benchmark:
    """Measure the parts of a training run with its data, model and precision.

    The method of a part prepares one turn and returns a function that runs n steps.

    Args:
        setup: The run; one process only.
    """

    def __init__(self, setup: Setup):
        self.setup, self.args, self.device = setup, setup.args, setup.accelerator.device
        if setup.accelerator.num_processes > 1:
            raise InputError(f'benchmark_glmc.py: expected one process, found {setup.accelerator.num_processes}')
        self.loader = setup.train_loader
        self.resident = isinstance(self.loader, ResidentTrainLoader)
        images = 2 if setup.method.paired and self.args.partner == 'sampler' else 1
        self.num_views = len(setup.method.views) * images  # per sample
        self.size = tuple(setup.data_config['input_size'][-2:])
        self.batch = next(endless(self.loader.epoch, self.args.batch_size))[:2]
        self.images = None  # set by pil_images

    # --- parts ---

    def plain(self) -> Callable[[int], None]:
        steps = PlainLoop(self.setup, self.pil_images(), pil_transform(self.setup)).steps()
        return lambda n: consume(steps, n)

    def run(self) -> Callable[[int], None]:
        batches = endless(self.loader.epoch, self.args.batch_size)
        return lambda n: self._train(batches, n)

    def step(self) -> Callable[[int], None]:
        return lambda n: self._train(itertools.repeat((*self.batch, 1.0)), n)

    def input(self) -> Callable[[int], None]:
        batches = endless(self.loader.epoch, self.args.batch_size)
        return lambda n: consume(batches, n)

    def timm(self) -> Callable[[int], None]:
        loader = timm_loader(self.setup, self.pil_images())
        batches = endless(lambda epoch: loader, self.args.batch_size)
        return lambda n: consume(batches, n * self.num_views)

    def _train(self, batches: Iterator, num_steps: int) -> None:
        """Train on the next batches with the training loop of train_glmc.py."""
        self.setup.train_loader = ShortLoader(batches, num_steps)
        self.setup.train_epoch(epoch=0)

    def pil_images(self) -> PILImages:
        """Training images as PIL images, decoded in advance if the run keeps them on the device."""
        if self.images is None:
            self.images = PILImages(self.setup.data.train, image_mode(self.setup.data_config), predecode=self.resident)
        return self.images

    def skipped(self) -> dict[str, str]:
        """Skipped parts -> reason."""
        reasons = dict.fromkeys(self.args.skip, '--skip')
        if not isinstance(self.setup.data.train, ImageSet):
            reasons.update(plain='the source cannot be indexed', timm='the source cannot be indexed')
        if self.args.method != 'glmc':
            reasons['plain'] = 'it supports only --method glmc'
        return reasons

    # --- measurement ---

    def measure(self, rounds: int, steps: int) -> dict:
        """Time every part once a round.

        Returns:
            rows: part -> SPEED_COLUMNS that apply, and `turns` in ms; ratios and shares are medians over the rounds.
            step_gflop: Operations of a training step. matmul_tflops: Rate of a matrix product.
            bottleneck: `step` or `input`, or None. skipped: part -> reason.
        """
        skipped, flops = self.skipped(), self.step_flops()
        seconds = {name: [] for name in PARTS if name not in skipped}
        peaks, rates = dict.fromkeys(seconds, 0), []
        with Progress(rounds * len(seconds), 'turns', 'benchmark') as progress:
            for _ in range(rounds):
                for name, turns in seconds.items():
                    turn, peak = self._turn(name, steps)
                    turns.append(turn)
                    peaks[name] = max(peaks[name], peak)
                    progress.update()
                rates.append(self.matmul_rate())
        rate = statistics.median(rates)
        rows = {name: self._row(name, seconds, flops, rate) | {'peak_memory': peaks[name] or None} for name in seconds}
        return {'rows': rows, 'step_gflop': flops / 1e9, 'matmul_tflops': rate / 1e12, 'bottleneck': bottleneck(rows),
                'skipped': skipped}

    def _turn(self, name: str, steps: int) -> tuple[float, int]:
        """Seconds per step and peak bytes on the GPU of one turn. Memory of the run does not count for plain and timm."""
        before = 0
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
            before = 0 if name in ('run', 'step', 'input') else torch.cuda.memory_allocated(self.device)
        work = getattr(self, name)()
        work(3 if name == 'step' else 2 * self.args.workers + 2)
        duration = self.seconds(work, steps) / steps
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == 'cuda' else 0
        return duration, peak - before

    def seconds(self, work: Callable[[int], None], n: int) -> float:
        """Duration of n steps of a part."""
        self._synchronize()
        start = time.perf_counter()
        work(n)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def mixture(self):
        """Mixture parameters of the first step, on the device; None if the method does not mix."""
        mixture = self.setup.mixer.sample_params(self.args.batch_size, self.size, step_generator(self.args.seed, 0, 0))
        return mixture if mixture is None else mixture.to(self.device)

    def step_flops(self) -> float:
        """Operations of a training step: three times its forward pass.

        torch's counter overestimates the weight gradient of grouped convolutions by the number of groups (2.15), so the
        backward pass is not counted but taken as twice the forward pass, which it is but for the first layer.
        """
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.setup.train_step.forward(*self.batch, self.mixture())  # not compiled
        return 3.0 * counter.get_total_flops()

    def matmul_rate(self) -> float:
        """Operations per second of a square matrix product in the precision of the run."""
        size, repeats = (8192, 10) if self.device.type == 'cuda' else (2048, 2)
        dtype = getattr(torch, PRECISIONS[self.setup.accelerator.mixed_precision])
        a, b = torch.randn(2, size, size, device=self.device).to(dtype)
        a @ b
        return 2 * size ** 3 * repeats / self.seconds(lambda n: [a @ b for _ in range(n)], repeats)

    # --- results ---

    def _row(self, name: str, seconds: dict[str, list[float]], flops: float, matmul_rate: float) -> dict:
        """Speed of a part from the seconds per step of each turn."""
        turns, median = seconds[name], statistics.median(seconds[name])
        images = self.args.batch_size / median
        row = dict(ms_per_step=1e3 * median, ms_min=1e3 * min(turns), ms_max=1e3 * max(turns), images_per_second=images,
                   views_per_second=images * self.num_views, turns=[1e3 * turn for turn in turns])
        if name in ('input', 'timm'):
            main_process_only = name == 'input' and self.resident
            cores = 1 if main_process_only else max(min(self.args.workers, num_cores()), 1)
            row['views_per_second_per_core'] = row['views_per_second'] / cores
        else:
            row.update(tflops=flops / median / 1e12, matmul_share=flops / median / matmul_rate)
        if 'plain' in seconds and name != 'timm':
            row['ratio_to_plain'] = statistics.median(p / t for p, t in zip(seconds['plain'], turns, strict=True))
        return row

    def metadata(self) -> dict:
        """Machine, model, options and versions of the measurement."""
        args, setup = self.args, self.setup
        return {
            'date': date.today().isoformat(), 'device': device_name(self.device), 'cores': num_cores(),
            'threads': torch.get_num_threads(), 'model': args.model, 'parameters': setup.num_parameters,
            'method': args.method,
            'input_size': list(setup.data_config['input_size']), 'batch_size': args.batch_size, 'views': self.num_views,
            'precision': PRECISIONS[setup.accelerator.mixed_precision], 'channels_last': args.channels_last,
            'torchcompile': args.torchcompile, 'joint_forward': args.joint_forward, 'partner': args.partner,
            'loader': 'resident' if self.resident else f'{args.workers} workers',
            'train_images': setup.data.profile.num_images,
            'tf32_convolutions': torch.backends.cudnn.allow_tf32, 'tf32_matmul': torch.backends.cuda.matmul.allow_tf32,
            'rounds': args.rounds, 'steps': args.steps, **provenance()}


def endless(epoch: Callable[[int], Iterable[Sequence]], batch_size: int) -> Iterator[Sequence]:
    """Full batches, epoch after epoch."""
    for number in itertools.count():
        yield from (batch for batch in epoch(number) if len(batch[0]) == batch_size)


def consume(iterator: Iterator, n: int) -> None:
    for _ in itertools.islice(iterator, n):
        pass


class ShortLoader:
    """Loader whose only epoch is the next `num_steps` batches of an iterator."""

    def __init__(self, batches: Iterator, num_steps: int):
        self.batches, self.num_steps = batches, num_steps

    def __len__(self) -> int:
        return self.num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator:
        return itertools.islice(self.batches, self.num_steps)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def bottleneck(rows: dict) -> str | None:
    """The slower of `step` and `input`, which limits `run`; None unless both were measured."""
    if not {'step', 'input'} <= rows.keys():
        return None
    return max(('step', 'input'), key=lambda name: rows[name]['ms_per_step'])
