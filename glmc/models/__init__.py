"""Backbones, the modules that training puts around them, and their classifiers."""
from glmc.models import cifar_resnet as _register_models  # noqa: F401  registers resnet32_cifar and resnet32x4_cifar in timm
from glmc.models.backbone import create_backbone
from glmc.models.bilateral import BilateralModule
from glmc.models.classifier import linear_classifier
from glmc.models.cosine import CosineClassifier, CosineGLMCModule, CosineModule
from glmc.models.experts import Experts
from glmc.models.glmc import GLMCModule, ViewOutput
from glmc.models.projected import KeyEncoder, ProjectedModule, Queue
from glmc.models.statistics import ClassDirections, ClassStatistics
from glmc.models.teacher import Teacher
from glmc.models.two_heads import TwoHeadsModule

__all__ = [
    'BilateralModule',
    'ClassDirections',
    'ClassStatistics',
    'CosineClassifier',
    'CosineGLMCModule',
    'CosineModule',
    'Experts',
    'GLMCModule',
    'KeyEncoder',
    'ProjectedModule',
    'Queue',
    'Teacher',
    'TwoHeadsModule',
    'ViewOutput',
    'create_backbone',
    'linear_classifier',
]
