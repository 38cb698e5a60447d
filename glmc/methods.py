"""The table of methods: a method is a row, not a branch."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from timm.task import TrainingTask
from torch import Tensor, nn

from glmc.losses.classification import (
    ClassBalancedFocalLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
)
from glmc.mixing import BatchCutmix, BatchMixup, CMOMixer, GLMCMixer, PairMixer, ResampledOnly
from glmc.models.bilateral import BilateralModule
from glmc.models.cosine import CosineGLMCModule, CosineModule
from glmc.models.glmc import GLMCModule
from glmc.tasks.bilateral import BilateralTask
from glmc.tasks.glmc import CosineGLMCTask, GLMCTask
from glmc.tasks.single_view import CosineTask, SingleViewTask, WeightBalancingTask


class NoMixer:
    """The one view of each image, and its label, as they are."""

    def __init__(self, counts: Sequence[int]):
        pass

    def sample_params(self, batch_size: int, image_size: tuple[int, int], rng: np.random.Generator) -> None:
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
        defaults: Values of options that are not those of other methods; published, but for GLMC's own.
        paired: Whether an image comes with a partner.
        num_views: Views of each image.
        rebalanced: Whether the classifier is fitted to a uniform class prior instead of the training set's.
    """
    summary: str
    task: Callable[..., TrainingTask]
    module: Callable[..., nn.Module] = bare
    mixer: Callable = NoMixer
    task_options: tuple[str, ...] = ()
    module_options: tuple[str, ...] = ()
    mixer_options: tuple[str, ...] = ()
    defaults: Mapping = field(default_factory=dict)
    paired: bool = False
    num_views: int = 1
    rebalanced: bool = False

    @property
    def options(self) -> set[str]:
        """Names of all options that this method heeds and another may not."""
        return {*self.task_options, *self.module_options, *self.mixer_options}


SoftLabels = partial(SingleViewTask, criterion_kwargs=dict(soft_targets=True))
DEFERRED = ('effective_beta', 'drw_start')
PARTNER = ('partner', 'resample_power')
MIXTURE = ('mix_beta', 'cutmix_lambda', *PARTNER)
TWO_VIEWS = (*MIXTURE, 'mix_lambda')
CUMULATIVE = ('reweight_power', 'alpha_power', 'alpha_scope')
# Ours, for short runs, chosen at 15 epochs (results/README.md); the recipes of hparams/ have the published values.
SHORT_VIEWS = dict(mix_beta=0.2, cutmix_lambda='area')
SHORT_RUN = dict(SHORT_VIEWS, alpha_scope='encoder')

METHODS = {
    'ce': Method(
        summary='plain cross-entropy',
        task=SingleViewTask),
    'mixup': Method(
        summary='MixUp within the batch (arXiv 1710.09412)',
        task=SoftLabels, mixer=BatchMixup, mixer_options=('mix_beta', 'mixup_prob')),
    'cutmix': Method(
        summary='CutMix within the batch (arXiv 1905.04899)',
        task=SoftLabels, mixer=BatchCutmix, mixer_options=('mix_beta', 'mixup_prob', 'cutmix_lambda'),
        defaults=dict(cutmix_lambda='area')),
    'focal': Method(
        summary='focal loss (arXiv 1708.02002)',
        task=partial(SingleViewTask, loss=FocalLoss), task_options=('focal_gamma',)),
    'cb_focal': Method(
        summary='focal loss weighted by the effective number of images (arXiv 1901.05555)',
        task=partial(SingleViewTask, loss=ClassBalancedFocalLoss), task_options=('focal_gamma', 'effective_beta'),
        rebalanced=True),
    'ldam_drw': Method(
        summary='margins by class size on a cosine classifier, deferred re-weighting (arXiv 1906.07413)',
        task=partial(CosineTask, loss=LDAMLoss), task_options=(*DEFERRED, 'ldam_margin', 'cosine_scale'),
        module=CosineModule, module_options=('cosine_scale',), rebalanced=True),
    'balanced_softmax': Method(
        summary='softmax weighted by the class counts (arXiv 2007.10740)',
        task=partial(SingleViewTask, loss=LogitAdjustedLoss), rebalanced=True),
    'logit_adjustment': Method(
        summary='cross-entropy of logits + τ·log prior (arXiv 2007.07314)',
        task=partial(SingleViewTask, loss=LogitAdjustedLoss), task_options=('adjustment_tau',), rebalanced=True),
    'ce_drw': Method(
        summary='cross-entropy with deferred re-weighting (arXiv 1906.07413)',
        task=partial(SingleViewTask, loss=DeferredReweighting), task_options=DEFERRED, rebalanced=True),
    'ce_resample': Method(
        summary='cross-entropy on class-balanced sampling (arXiv 1910.09217)',
        task=SingleViewTask, mixer=ResampledOnly, mixer_options=PARTNER, defaults=dict(resample_power=1.0), paired=True,
        rebalanced=True),
    'weight_balancing': Method(
        summary='tuned weight decay, then class weights and MaxNorm on the classifier (arXiv 2203.14197)',
        task=WeightBalancingTask, task_options=DEFERRED, defaults=dict(weight_decay=5e-3), rebalanced=True),
    'bbn': Method(
        summary='bilateral branches with cumulative learning, on one backbone (arXiv 1912.02413)',
        task=BilateralTask, module=BilateralModule, mixer=PairMixer, mixer_options=PARTNER,
        defaults=dict(resample_power=2.0), paired=True, rebalanced=True),
    'cmo': Method(
        summary='tail images pasted on images as they come, context-rich oversampling (arXiv 2112.00412)',
        task=SoftLabels, mixer=CMOMixer, mixer_options=(*MIXTURE, 'mixup_prob'), paired=True,
        defaults=dict(resample_power=1.0, mixup_prob=0.5, cutmix_lambda='area')),
    'glmc': Method(
        summary='global and local mixture consistency cumulative learning (arXiv 2305.08661)',
        task=GLMCTask, module=GLMCModule, mixer=GLMCMixer, paired=True, num_views=2, rebalanced=True,
        task_options=('consistency_weight', *CUMULATIVE), module_options=('projection_dim', 'balanced', 'joint_forward'),
        mixer_options=TWO_VIEWS, defaults=SHORT_RUN),
    'glmc_cosine': Method(
        summary='GLMC with cosine classifiers',
        task=CosineGLMCTask, module=CosineGLMCModule, mixer=GLMCMixer, paired=True, num_views=2, rebalanced=True,
        task_options=('consistency_weight', *CUMULATIVE), module_options=('cosine_scale', 'projection_dim', 'joint_forward'),
        mixer_options=TWO_VIEWS, defaults=SHORT_RUN),
    'glmc_no_consistency': Method(
        summary='GLMC without the consistency loss',
        task=partial(GLMCTask, consistency_weight=0.0), module=partial(GLMCModule, projection_dim=1), mixer=GLMCMixer,
        paired=True, num_views=2, rebalanced=True, task_options=CUMULATIVE,
        module_options=('joint_forward',), mixer_options=TWO_VIEWS, defaults=SHORT_RUN),
    'glmc_no_rebalance': Method(
        summary='GLMC without the rebalanced classifier: mixture consistency alone',
        task=GLMCTask, module=partial(GLMCModule, balanced=True), mixer=GLMCMixer, paired=True, num_views=2,
        task_options=('consistency_weight',), module_options=('projection_dim', 'joint_forward'), mixer_options=TWO_VIEWS,
        defaults=SHORT_VIEWS),
    'glmc_balanced': Method(
        summary='GLMC for balanced data, the same as glmc_no_rebalance and as glmc --balanced',
        task=GLMCTask, module=partial(GLMCModule, balanced=True), mixer=GLMCMixer, paired=True, num_views=2,
        task_options=('consistency_weight',), module_options=('projection_dim', 'joint_forward'), mixer_options=TWO_VIEWS,
        defaults=SHORT_VIEWS),
}


def unused_method_options(method: str, explicit: set[str]) -> set[str]:
    """Options that the user set and that other methods heed, but this one does not."""
    return explicit & set().union(*(row.options for row in METHODS.values())) - METHODS[method].options
