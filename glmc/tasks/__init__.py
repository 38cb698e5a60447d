"""Training tasks in timm's sense: a model and its loss, batch in, dict of losses out."""
from glmc.tasks.augmentation import SemanticAugmentationTask
from glmc.tasks.bilateral import BilateralTask
from glmc.tasks.contrastive import (
    BalancedContrastTask,
    KPositiveTask,
    ParametricContrastTask,
    SharedEncoderTask,
    SupConTask,
    TargetedTask,
)
from glmc.tasks.distillation import SelfSupervisedTask, SoftLabelTask
from glmc.tasks.experts import BalancedExpertsTask, DiverseExpertsTask
from glmc.tasks.glmc import CosineGLMCTask, GLMCTask
from glmc.tasks.proco import ProbabilisticContrastTask
from glmc.tasks.single_view import CosineTask, SingleViewTask, WeightBalancingTask

__all__ = [
    'BalancedContrastTask',
    'BalancedExpertsTask',
    'BilateralTask',
    'CosineGLMCTask',
    'CosineTask',
    'DiverseExpertsTask',
    'GLMCTask',
    'KPositiveTask',
    'ParametricContrastTask',
    'ProbabilisticContrastTask',
    'SelfSupervisedTask',
    'SemanticAugmentationTask',
    'SharedEncoderTask',
    'SingleViewTask',
    'SoftLabelTask',
    'SupConTask',
    'TargetedTask',
    'WeightBalancingTask',
]
