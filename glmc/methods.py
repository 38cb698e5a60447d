"""The table of methods: each is a row, not a branch."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from timm.task import TrainingTask
from torch import nn

from glmc.data.transforms import VIEWS
from glmc.losses.classification import (
    ClassBalancedFocalLoss,
    DeferredReweighting,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    effective_number_weights,
)
from glmc.mixing import (
    BatchCutmix,
    BatchMixup,
    CMOMixer,
    GLMCMixer,
    HalvesMixer,
    PairMixer,
    PickingMixer,
    ResampledOnly,
    ViewMixer,
)
from glmc.models.bilateral import BilateralModule
from glmc.models.cosine import CosineGLMCModule, CosineModule
from glmc.models.glmc import GLMCModule
from glmc.models.projected import ProjectedModule
from glmc.models.two_heads import TwoHeadsModule
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
from glmc.tasks.glmc import CosineGLMCTask, GLMCTask, OneViewGLMCTask
from glmc.tasks.proco import ProbabilisticContrastTask
from glmc.tasks.single_view import CosineTask, SingleViewTask, WeightBalancingTask


def bare(backbone: nn.Module) -> nn.Module:
    """The backbone itself."""
    return backbone


def plain_net() -> dict:
    """Arguments of `create_backbone` for the named net itself."""
    return {}


def several_experts(experts: int, expert_width: float, cosine_scale: float) -> dict:
    """Arguments of `create_backbone` for experts with cosine classifiers."""
    return dict(experts=dict(num_experts=experts, width=expert_width, cosine_scale=cosine_scale))


def cross_entropy(counts: Sequence[int], smoothing: float = 0.0) -> nn.Module:
    """Cross-entropy with label smoothing, which no class count changes."""
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def train_prior(counts: np.ndarray, options: Mapping) -> np.ndarray:
    """(C,) prior of a classifier trained with plain cross-entropy: that of the training set."""
    return counts


def uniform_prior(counts: np.ndarray, options: Mapping) -> np.ndarray:
    """(C,) prior of a classifier that treats all classes alike."""
    return np.ones_like(counts)


def adjusted_prior(counts: np.ndarray, options: Mapping) -> np.ndarray:
    """(C,) prior that logit adjustment leaves in the logits: π^(1-τ)."""
    return counts ** (1 - options['adjustment_tau'])


def resampled_prior(counts: np.ndarray, options: Mapping) -> np.ndarray:
    """(C,) prior of the resampled images: n·n^-q."""
    return counts ** (1 - options['resample_power'])


def effective_prior(counts: np.ndarray, options: Mapping) -> np.ndarray:
    """(C,) training prior times the weights of the effective number of images, once they are in effect."""
    deferred = options.get('drw_start', 0) >= 1
    return counts if deferred else counts * effective_number_weights(counts, options['effective_beta']).double().numpy()


def mixed_prior(counts: np.ndarray, options: Mapping) -> np.ndarray:
    """(C,) prior of pairs whose labels weigh alike on average: the mean of the training prior and that of the partners."""
    return (counts / counts.sum() + resampled_prior(counts, options) / resampled_prior(counts, options).sum()) / 2


def reweighted_prior(counts: np.ndarray, options: Mapping) -> np.ndarray:
    """(C,) prior of pairs times the class weights n^-k of GLMC's rebalanced classifier."""
    return mixed_prior(counts, options) * counts ** -options['reweight_power']


PUBLISHED_VIEWS = {name for name, changes in VIEWS.items() if changes}


@dataclass(frozen=True)
class Method:
    """A row of the table: what a method is made of.

    Args:
        summary: One line for `--help-all`.
        task: (module, counts, **options) -> task: model and loss.
        module: (backbone, **options) -> the module that is trained.
        mixer: (counts, **options) -> mixer: views and labels to input and target of the task.
        backbone: (**options) -> further arguments of `create_backbone`.
        task_options, module_options, mixer_options, backbone_options: Names of the options that each takes.
        state_options: Those of them that shape the state of the task, which a resumed run must share.
        defaults: Option values that differ from those of other methods; published, except for GLMC's.
        paired: Whether each image comes with a partner.
        views: Names of the views of each image (`data.transforms.VIEWS`).
        prior: (C,) float64 counts and the method's options -> (C,) class prior of its classifier, not normalised.
        aliases: Other names of the row.
    """
    summary: str
    task: Callable[..., TrainingTask]
    module: Callable[..., nn.Module] = bare
    mixer: Callable[..., ViewMixer] = ViewMixer
    backbone: Callable[..., dict] = plain_net
    task_options: tuple[str, ...] = ()
    module_options: tuple[str, ...] = ()
    mixer_options: tuple[str, ...] = ()
    backbone_options: tuple[str, ...] = ()
    state_options: tuple[str, ...] = ()
    defaults: Mapping = field(default_factory=dict)
    paired: bool = False
    views: tuple[str, ...] = ('plain',)
    prior: Callable[[np.ndarray, Mapping], np.ndarray] = train_prior
    aliases: tuple[str, ...] = ()

    @property
    def options(self) -> set[str]:
        """Names of all options that this method uses and another may not."""
        views = {'view_augmentation'} if set(self.views) & PUBLISHED_VIEWS else set()
        return {*self.task_options, *self.module_options, *self.mixer_options, *self.backbone_options} | views

    def class_prior(self, counts: Sequence[int], options: Mapping) -> str | list[float]:
        """Class prior that the exported classifier embodies: `train`, `uniform`, or C probabilities.

        Args:
            counts: (C,) training images per class.
            options: Values of the method's options.
        """
        counts = np.asarray(counts, dtype=np.float64)
        prior = self.prior(counts, options)
        prior = prior / prior.sum()
        if np.allclose(prior, counts / counts.sum(), rtol=1e-6, atol=0):
            return 'train'
        return 'uniform' if np.allclose(prior, 1 / len(counts), rtol=1e-6, atol=0) else prior.tolist()


SoftLabels = partial(SingleViewTask, criterion_kwargs=dict(soft_targets=True))
DEFERRED = ('effective_beta', 'drw_start')
PARTNER = ('partner', 'resample_power')
MIXTURE = ('mix_beta', 'cutmix_lambda', *PARTNER)
TWO_VIEWS = dict(paired=True, views=('global', 'local'), mixer=GLMCMixer, mixer_options=MIXTURE)
CUMULATIVE = ('reweight_power', 'alpha_power', 'alpha_scope')
PROJECTOR = ('projection_dim', 'projection_hidden')
CONTRAST = ('contrast_temperature', 'contrast_weight')
KEYED = ('queue_size', 'key_momentum')
POSITIVES = ('contrast_temperature', 'positives', *KEYED)
PACO = dict(projection_dim=32, contrast_temperature=0.05, contrast_weight=0.01, queue_size=1024)
QUERY_AND_KEY = dict(
    module=ProjectedModule, module_options=PROJECTOR, mixer=PickingMixer, mixer_options=('queue_size',),
    state_options=('queue_size',), views=('plain', 'plain'),
    defaults=dict(projection_dim=128, contrast_temperature=0.07, stage2='crt'))
EXPERTS = dict(backbone=several_experts, backbone_options=('experts', 'expert_width', 'cosine_scale'))
RIDE = dict(
    task=DiverseExpertsTask, task_options=(*DEFERRED, 'ldam_margin', 'cosine_scale', 'diversity_weight', 'diversity_eta'),
    prior=effective_prior, **EXPERTS)
# Ours, for short runs, chosen at 15 epochs (results/README.md); the recipes in hparams/ have the published values.
SHORT_VIEWS = dict(mix_beta=0.2, cutmix_lambda='area')
SHORT_RUN = dict(SHORT_VIEWS, alpha_scope='encoder')

METHODS = {
    'ce': Method(
        summary='plain cross-entropy',
        task=partial(SingleViewTask, loss=cross_entropy), task_options=('smoothing',)),
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
        prior=effective_prior),
    'ldam_drw': Method(
        summary='margins by class size on a cosine classifier, deferred re-weighting (arXiv 1906.07413)',
        task=partial(CosineTask, loss=LDAMLoss), task_options=(*DEFERRED, 'ldam_margin', 'cosine_scale'),
        module=CosineModule, module_options=('cosine_scale',), prior=effective_prior),
    'balanced_softmax': Method(
        summary='softmax weighted by the class counts (arXiv 2007.10740)',
        task=partial(SingleViewTask, loss=LogitAdjustedLoss), task_options=('smoothing',), prior=uniform_prior),
    'logit_adjustment': Method(
        summary='cross-entropy of logits + τ·log prior (arXiv 2007.07314)',
        task=partial(SingleViewTask, loss=LogitAdjustedLoss), task_options=('adjustment_tau', 'smoothing'),
        prior=adjusted_prior),
    'ce_drw': Method(
        summary='cross-entropy with deferred re-weighting (arXiv 1906.07413)',
        task=partial(SingleViewTask, loss=DeferredReweighting), task_options=DEFERRED, prior=effective_prior),
    'ce_resample': Method(
        summary='cross-entropy on class-balanced sampling (arXiv 1910.09217)',
        task=SingleViewTask, mixer=ResampledOnly, mixer_options=PARTNER, defaults=dict(resample_power=1.0), paired=True,
        prior=resampled_prior),
    'weight_balancing': Method(
        summary='tuned weight decay, then class weights and MaxNorm on the classifier (arXiv 2203.14197)',
        task=WeightBalancingTask, task_options=DEFERRED, defaults=dict(weight_decay=5e-3), prior=effective_prior),
    'bbn': Method(
        summary='bilateral branches with cumulative learning, on one backbone (arXiv 1912.02413)',
        task=BilateralTask, module=BilateralModule, mixer=PairMixer, mixer_options=PARTNER,
        defaults=dict(resample_power=2.0), paired=True, prior=uniform_prior),
    'cmo': Method(
        summary='tail images pasted on images as they come, context-rich oversampling (arXiv 2112.00412)',
        task=SoftLabels, mixer=CMOMixer, mixer_options=(*MIXTURE, 'mixup_prob'), paired=True,
        defaults=dict(resample_power=1.0, mixup_prob=0.5, cutmix_lambda='area')),
    'glmc': Method(
        summary='global and local mixture consistency cumulative learning (arXiv 2305.08661)',
        task=GLMCTask, task_options=('consistency_weight', *CUMULATIVE), module=GLMCModule,
        module_options=('projection_dim', 'joint_forward'), defaults=SHORT_RUN, prior=reweighted_prior, **TWO_VIEWS),
    'glmc_cosine': Method(
        summary='GLMC with cosine classifiers',
        task=CosineGLMCTask, task_options=('consistency_weight', *CUMULATIVE), module=CosineGLMCModule,
        module_options=('cosine_scale', 'projection_dim', 'joint_forward'), defaults=SHORT_RUN, prior=reweighted_prior,
        **TWO_VIEWS),
    'glmc_one_view': Method(
        summary='GLMC on one view an image, half of each batch mixed globally, half locally, at the cost of ce',
        task=OneViewGLMCTask, task_options=CUMULATIVE, module=partial(GLMCModule, projection_dim=0), mixer=HalvesMixer,
        mixer_options=MIXTURE, defaults=dict(SHORT_RUN, partner='batch'), paired=True, prior=reweighted_prior),
    'glmc_no_consistency': Method(
        summary='GLMC without the consistency loss',
        task=partial(GLMCTask, consistency_weight=0.0), task_options=CUMULATIVE,
        module=partial(GLMCModule, projection_dim=1), module_options=('joint_forward',), defaults=SHORT_RUN,
        prior=reweighted_prior, **TWO_VIEWS),
    'glmc_balanced': Method(
        summary='GLMC without the rebalanced classifier: mixture consistency alone, for balanced data',
        task=GLMCTask, task_options=('consistency_weight',), module=partial(GLMCModule, balanced=True),
        module_options=('projection_dim', 'joint_forward'), defaults=SHORT_VIEWS, prior=mixed_prior,
        aliases=('glmc_no_rebalance',), **TWO_VIEWS),
    'supcon': Method(
        summary='supervised contrastive loss, then a classifier in stage 2 (arXiv 2004.11362)',
        task=SupConTask, task_options=('contrast_temperature',), module=ProjectedModule, module_options=PROJECTOR,
        views=('sim', 'sim'), defaults=dict(projection_dim=128, stage2='crt'), prior=uniform_prior),
    'bcl': Method(
        summary='balanced contrastive loss beside Balanced Softmax (arXiv 2207.09052)',
        task=BalancedContrastTask, task_options=CONTRAST, module=partial(ProjectedModule, norm=True, prototypes=True),
        module_options=PROJECTOR, views=('strong', 'sim', 'sim'),
        defaults=dict(projection_dim=128, projection_hidden=512), prior=uniform_prior),
    'paco': Method(
        summary='parametric contrastive loss: class logits and similarities in one softmax (arXiv 2107.12028)',
        task=ParametricContrastTask, task_options=(*CONTRAST, *KEYED), state_options=('queue_size',),
        module=partial(ProjectedModule, norm=True), module_options=PROJECTOR, views=('strong', 'sim_blur'), defaults=PACO,
        prior=uniform_prior),
    'gpaco': Method(
        summary='PaCo without a momentum encoder, both views as anchors (arXiv 2209.12400)',
        task=SharedEncoderTask, task_options=(*CONTRAST, 'queue_size'), state_options=('queue_size',),
        module=partial(ProjectedModule, layers=2), module_options=PROJECTOR, views=('strong', 'stack'), defaults=PACO,
        prior=uniform_prior),
    'kcl': Method(
        summary='k positives for each image, then a classifier in stage 2 (OpenReview OqtLIabPTit)',
        task=KPositiveTask, task_options=POSITIVES, prior=uniform_prior, **QUERY_AND_KEY),
    'tsc': Method(
        summary='KCL, then classes drawn to evenly spread targets (arXiv 2111.13998)',
        task=TargetedTask, task_options=(*POSITIVES, 'target_weight'), prior=uniform_prior, **QUERY_AND_KEY),
    'ride': Method(
        summary='experts on a shared stem, with margins and pushed apart (arXiv 2010.01809)',
        defaults=dict(expert_width=0.75), **RIDE),
    'ride_cmo': Method(
        summary='RIDE on the pasted images of CMO (arXiv 2112.00412)',
        mixer=CMOMixer, mixer_options=(*MIXTURE, 'mixup_prob'), paired=True,
        defaults=dict(expert_width=0.75, resample_power=1.0, mixup_prob=0.5, cutmix_lambda='area'), **RIDE),
    'balpoe': Method(
        summary='experts for the training prior, a uniform one and the reverse, with MixUp (arXiv 2206.05260)',
        task=BalancedExpertsTask, task_options=('adjustment_tau',), mixer=BatchMixup,
        mixer_options=('mix_beta', 'mixup_prob'), defaults=dict(mix_beta=0.4), prior=adjusted_prior, **EXPERTS),
    'ssd_features': Method(
        summary='cross-entropy and a self-supervised term, then a scaled classifier in stage 2 (SSD; arXiv 2109.04075)',
        task=SelfSupervisedTask, task_options=('contrast_temperature', *KEYED), state_options=('queue_size',),
        module=ProjectedModule, module_options=PROJECTOR, views=('plain', 'sim_blur'),
        defaults=dict(projection_dim=128, contrast_temperature=0.2, stage2='lws')),
    'ssd': Method(
        summary='student of hard labels and of the soft ones of --teacher (SSD; arXiv 2109.04075)',
        task=SoftLabelTask, task_options=('teacher', 'distill_temperature'), module=TwoHeadsModule, prior=uniform_prior),
    'risda': Method(
        summary='class weights, and features augmented by covariances of confused classes (arXiv 2112.07928)',
        task=SemanticAugmentationTask, task_options=(*DEFERRED, 'isda_variance', 'isda_shift'), prior=effective_prior),
    'proco': Method(
        summary='Balanced Softmax, and contrast with a distribution of each class (arXiv 2403.06726)',
        task=ProbabilisticContrastTask, task_options=CONTRAST, module=partial(ProjectedModule, norm=True),
        module_options=PROJECTOR, views=('strong', 'sim', 'sim'),
        defaults=dict(projection_dim=128, projection_hidden=512, contrast_weight=1.0), prior=uniform_prior),
}


def canonical_name(name: str, balanced: bool = False) -> str:
    """Name of the row with this name or alias; `balanced` is the option of that name, an alias of a row, too."""
    name = next((row for row, method in METHODS.items() if name in method.aliases), name)
    return 'glmc_balanced' if balanced and name == 'glmc' else name


def unused_method_options(method: str, explicit: set[str]) -> set[str]:
    """Options that the user set and that other methods use, but this one does not."""
    return explicit & set().union(*(row.options for row in METHODS.values())) - METHODS[method].options
