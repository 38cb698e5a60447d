"""Losses: one free function per equation, and modules that hold class weights, margins and priors."""
from glmc.losses.augmentation import implicit_augmentation
from glmc.losses.classification import (
    ClassBalancedFocalLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    effective_number_weights,
    focal_loss,
    ldam_loss,
    ldam_margins,
    prior_adjustment,
)
from glmc.losses.contrastive import (
    balanced_contrastive,
    k_positive_contrastive,
    other_classes_contrastive,
    parametric_contrastive,
    supervised_contrastive,
    targeted_contrastive,
)
from glmc.losses.distillation import distillation
from glmc.losses.experts import balanced_experts, diversity_temperatures, expert_diversity
from glmc.losses.glmc import class_weights, cumulative_alpha, negative_cosine, soft_cross_entropy
from glmc.losses.proco import proco_logits

__all__ = [
    'ClassBalancedFocalLoss',
    'DeferredReweighting',
    'FocalLoss',
    'LDAMLoss',
    'LogitAdjustedLoss',
    'balanced_contrastive',
    'balanced_experts',
    'class_weights',
    'cumulative_alpha',
    'distillation',
    'diversity_temperatures',
    'effective_number_weights',
    'expert_diversity',
    'focal_loss',
    'implicit_augmentation',
    'k_positive_contrastive',
    'ldam_loss',
    'ldam_margins',
    'negative_cosine',
    'other_classes_contrastive',
    'parametric_contrastive',
    'prior_adjustment',
    'proco_logits',
    'soft_cross_entropy',
    'supervised_contrastive',
    'targeted_contrastive',
]
