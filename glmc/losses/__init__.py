"""Losses: one free function per equation, and modules that hold class weights, margins and priors."""
from glmc.losses.classification import (
    ClassBalancedFocalLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    effective_number_weights,
    focal_loss,
    ldam_margins,
    prior_adjustment,
)
from glmc.losses.contrastive import (
    balanced_contrastive,
    k_positive_contrastive,
    parametric_contrastive,
    supervised_contrastive,
    targeted_contrastive,
)
from glmc.losses.glmc import class_weights, cumulative_alpha, negative_cosine, soft_cross_entropy

__all__ = [
    'ClassBalancedFocalLoss',
    'DeferredReweighting',
    'FocalLoss',
    'LDAMLoss',
    'LogitAdjustedLoss',
    'balanced_contrastive',
    'class_weights',
    'cumulative_alpha',
    'effective_number_weights',
    'focal_loss',
    'k_positive_contrastive',
    'ldam_margins',
    'negative_cosine',
    'parametric_contrastive',
    'prior_adjustment',
    'soft_cross_entropy',
    'supervised_contrastive',
    'targeted_contrastive',
]
