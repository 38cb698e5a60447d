"""Start of the classifiers of a training run, fitted to the features of the pretrained encoder."""
import logging
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor

from glmc.evaluation.priors import prior_shift, resolve_prior
from glmc.models.cosine import fold_cosine
from glmc.stage2.features import Features
from glmc.stage2.probe import class_means, linear_probe
from glmc.tasks.base import HeadFits

_logger = logging.getLogger(__name__)
SCALE = 30.0  # of the cosine to a class mean


def head_fits(features: Features, counts: Sequence[int], kind: str, seed: int) -> HeadFits:
    """Fits of classifiers to features, computed when they are called.

    Args:
        features: Features of the training images.
        counts: (C,) training images per class.
        kind: `probe` for linear probes, or `class_mean` for the cosine to class means, whatever the prior.
        seed: Seed of the probes.
    """
    def probe(prior: str | Sequence[float]) -> tuple[Tensor, Tensor]:
        adjustment = prior_shift(resolve_prior(prior, counts), resolve_prior('train', counts))
        return linear_probe(features, len(counts), adjustment, generator=torch.Generator().manual_seed(seed))

    def means() -> Tensor:
        return class_means(features, len(counts))[0]

    def nearest_mean(prior: str | Sequence[float]) -> tuple[Tensor, Tensor]:
        directions, norm = class_means(features, len(counts))
        return fold_cosine(directions, SCALE, norm)

    return HeadFits(probe if kind == 'probe' else nearest_mean, means)


def init_heads(
        task: TrainingTask, features: Features, counts: Sequence[int], prior: str | Sequence[float], *, kind: str,
        seed: int, accelerator: Accelerator) -> None:
    """Start the classifiers of a task, and of the average of its weights; all processes must call this together.

    Args:
        task: Task of the run.
        features: Features of the training images; the main process fits.
        counts: (C,) training images per class.
        prior: Class prior that the exported classifier embodies.
        kind: See `head_fits`.
        seed: Seed of the probes.
        accelerator: Accelerator of the run.
    """
    start = time.perf_counter()
    if accelerator.is_main_process:
        task.init_heads(head_fits(features, counts, kind, seed), prior)
    module = unwrap_model(task.get_trainable_module())
    if accelerator.num_processes > 1:
        for parameter in module.parameters():
            parameter.data.copy_(broadcast(parameter.data))
    if task.has_ema():
        task.get_trainable_module(ema=True).set(module)
    _logger.info(f'Classifiers start from {kind}: fitted in {time.perf_counter() - start:.1f} s')
