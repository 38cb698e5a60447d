"""Training tasks in timm's sense: a model and its loss, batch in, dict of losses out."""
from glmc.tasks.bilateral import BilateralTask
from glmc.tasks.contrastive import (
    BalancedContrastTask,
    KPositiveTask,
    ParametricContrastTask,
    SharedEncoderTask,
    SupConTask,
    TargetedTask,
)
from glmc.tasks.glmc import CosineGLMCTask, GLMCTask
from glmc.tasks.single_view import CosineTask, SingleViewTask, WeightBalancingTask

__all__ = [
    'BalancedContrastTask',
    'BilateralTask',
    'CosineGLMCTask',
    'CosineTask',
    'GLMCTask',
    'KPositiveTask',
    'ParametricContrastTask',
    'SharedEncoderTask',
    'SingleViewTask',
    'SupConTask',
    'TargetedTask',
    'WeightBalancingTask',
]
