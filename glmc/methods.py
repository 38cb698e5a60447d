"""The table of methods: a method is a row, not a branch."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from timm.task import TrainingTask
from torch import Tensor, nn

from glmc.mixing import GLMCMixer
from glmc.models import GLMCModule
from glmc.tasks import GLMCTask, PlainTask


class NoMixer:
    """The one view of each image, and its label, as they are."""

    def __init__(self, counts: Sequence[int]):
        pass

    def draw(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> None:
        return None

    def __call__(self, views: Tensor, labels: Tensor, mixture: None) -> tuple[Tensor, Tensor]:
        return views[:, 0], labels[:, 0]


def bare(backbone: nn.Module) -> nn.Module:
    """The backbone as it is."""
    return backbone


@dataclass(frozen=True)
class Method:
    """What a method is made of.

    Args:
        summary: For `--help`.
        task: Model and loss.
        module: Backbone -> what is trained.
        mixer: Views and labels -> input and target of the task.
        task_options, module_options, mixer_options: Names of the options each takes.
        paired: Whether an image comes with a partner.
        num_views: Views of each image.
        rebalanced: Whether the classifier is fitted to a uniform class prior instead of the training set's.
    """
    summary: str
    task: type[TrainingTask]
    module: Callable[..., nn.Module] = bare
    mixer: Callable = NoMixer
    task_options: tuple[str, ...] = ()
    module_options: tuple[str, ...] = ()
    mixer_options: tuple[str, ...] = ()
    paired: bool = False
    num_views: int = 1
    rebalanced: bool = False

    @property
    def options(self) -> set[str]:
        """Names of all options that this method heeds and another may not."""
        return {*self.task_options, *self.module_options, *self.mixer_options}


METHODS = {
    'ce': Method(
        summary='plain cross-entropy',
        task=PlainTask),
    'glmc': Method(
        summary='global and local mixture consistency cumulative learning (arXiv 2305.08661)',
        task=GLMCTask, module=GLMCModule, mixer=GLMCMixer, paired=True, num_views=2, rebalanced=True,
        task_options=('reweight_power', 'consistency_weight'),
        module_options=('projection_dim', 'balanced', 'joint_forward'),
        mixer_options=('mix_beta', 'cutmix_lambda', 'partner', 'resample_power')),
}


def ignored_options(method: str, given: set[str]) -> set[str]:
    """Options that the user set and that other methods heed, but this one does not."""
    return given & set().union(*(row.options for row in METHODS.values())) - METHODS[method].options
