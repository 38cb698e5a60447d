"""Advice on the training of an image set: tail, rebalancing, weights, method, learning rate, epochs and options."""
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from glmc.cli import duration
from glmc.config import FINE_TUNING, SCRATCH
from glmc.data.profiles import SHOT_NAMES, Profile, pluralize

PHOTO_SIDE = 64  # median shorter side, in pixels, from which images profit from weights pretrained on photos
BALANCED, MILD = 1.5, 5  # imbalance below which the classes are alike, and below which rebalancing has a small effect
BATCH, EPOCHS = 64, 60  # defaults of train_glmc.py
LR_BASE = 0.2  # of SGD from scratch
MEASURED_BATCH = 8  # images of a measured step


@dataclass(frozen=True)
class Advice:
    """Advice on one image set.

    Args:
        lines: Lines of text.
        model: Words that choose model, weights and method.
        data: Words that both stages share, such as shot thresholds.
        batch_size: Images per step.
        epochs: Epochs.
        photos: Whether pretrained weights help.
    """
    lines: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    batch_size: int = BATCH
    epochs: int = EPOCHS
    photos: bool = False

    @property
    def training(self) -> list[str]:
        """Words of a training, without those of the data."""
        return [*self.model, *(['--batch-size', str(self.batch_size)] if self.batch_size != BATCH else [])]


def advise(profile: Profile, sides: Sequence[int], default_data: bool = False) -> Advice:
    """Advise on a training set.

    Args:
        profile: Profile of the training images.
        sides: Shorter side of each image in pixels.
        default_data: Whether the images are the demonstration, whose options are defaults.
    """
    imbalance, side = max(profile.counts) / min(profile.counts), int(np.median(sides)) if len(sides) else 0
    photos = side >= PHOTO_SIDE and not default_data
    batch = BATCH
    while batch > 2 and batch > profile.num_images // 4:
        batch //= 2
    method = choose_method(imbalance, photos)
    if photos:
        model, epochs = ['--model', 'resnet50', '--pretrained'], FINE_TUNING['epochs']
        weights = f'pretrained, since the images are photos (median side {side} px)'
    else:
        model = [] if default_data else ['--model', 'resnet32_cifar', '--img-size', '32', '--augmentation', 'cifar']
        epochs, weights = 30 if default_data else EPOCHS, f'none, since the images are small ({side} px)'
    rate = f'{learning_rate(method, photos, batch):.2g} for batches of {batch}'
    steps = epochs * -(-profile.num_images // batch)
    data, thresholds = [], suggest_thresholds(profile)
    lines = [
        f'tail: {describe_tail(profile)}', f'rebalancing: {judge_rebalancing(imbalance)}', f'pretrained weights: {weights}',
        f'method: {method}' + (', or ce with --stage2 balanced_softmax' if method == SCRATCH['method'] else ''),
        f'learning rate: {rate}, the default',
        f"epochs: {epochs}, the default: {pluralize(steps, 'step')}"]
    if thresholds:
        empty = [name for name in SHOT_NAMES if not len(profile.groups()[name])]
        lines.append(f"shot thresholds: {thresholds[0]} {thresholds[1]}, thirds of the classes, since no class is "
                     f"{' or '.join(f'{name}-shot' for name in empty)}")
        data = ['--shot-thresholds', *map(str, thresholds)]
    model += [] if method == SCRATCH['method'] else ['--method', method]
    return Advice(lines, model, data, batch, epochs, photos)


def describe_tail(profile: Profile) -> str:
    """Length of the tail in numbers."""
    counts = np.sort(profile.counts)[::-1]
    half = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 1
    few = len(profile.groups()['few'])
    return (f'imbalance {counts[0] / counts[-1]:.3g} ({counts[0]:,} … {counts[-1]:,} images per class); half of the images '
            f"are in {half:,} of {pluralize(len(counts), 'class')}; {few:,} few-shot")


def judge_rebalancing(imbalance: float) -> str:
    """Whether rebalancing is worth it."""
    if imbalance < BALANCED:
        return 'not needed, the classes have about the same number of images'
    if imbalance < MILD:
        return 'small effect, compare with --method ce'
    return 'worth it if rare classes count as much as frequent ones; else --method ce'


def choose_method(imbalance: float, photos: bool) -> str:
    """Name of a method: those that were measured best from pretrained weights, and from scratch."""
    if photos:
        return 'ce' if imbalance < BALANCED else 'balanced_softmax'
    return 'glmc_balanced' if imbalance < BALANCED else SCRATCH['method']


def learning_rate(method: str, photos: bool, batch: int) -> float:
    """The default rate of a method: that of Muon from scratch for SCRATCH's method, else of SGD."""
    if not photos and method == SCRATCH['method']:
        return SCRATCH['lr_base'] * (batch / 256) ** 0.5
    return (FINE_TUNING['lr_base'] if photos else LR_BASE) * batch / 256


def suggest_thresholds(profile: Profile) -> tuple[int, int] | None:
    """(few, many) at thirds of the classes if a shot group is empty; None if none is, or the classes are alike."""
    counts = np.array(profile.counts)
    if len(counts) < 3 or counts.max() / counts.min() < BALANCED or all(map(len, profile.groups().values())):
        return None
    few, many = (int(t) for t in np.quantile(counts, (1 / 3, 2 / 3)))
    return few, many


def measure(advice: Advice, data: Sequence[str], num_images: int) -> str:
    """Train three steps in another process, and estimate time and memory of the whole training in one line.

    Args:
        advice: Result of `advise`.
        data: Words of the data options.
        num_images: Training images.
    """
    batch = min(MEASURED_BATCH, advice.batch_size)
    words = [word for word in advice.model if word != '--pretrained']  # the same cost without a download
    command = [sys.executable, '-m', 'glmc.benchmark.steps', *words, *data, '--batch-size', str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
        return f'time and memory: not measured: {reason}'
    epoch = num_images * max(found['step'], found['input']) / batch
    memory = found['before'] + (found['peak'] - found['before']) * advice.batch_size / batch
    slower = 'reading images' if found['input'] > found['step'] else 'the model'
    return (f'time and memory: about {duration(epoch)} per epoch (most for {slower}), {duration(advice.epochs * epoch)} in '
            f"all, {memory / 1e9:.1f} GB for batches of {advice.batch_size} on {found['device']}; from three steps of "
            f'{batch} images')
