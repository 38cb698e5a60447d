"""Tasks with several experts on a shared stem: RIDE and BalPoE."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.errors import InputError
from glmc.losses.classification import LDAMLoss, ldam_loss, prior_adjustment
from glmc.losses.experts import balanced_experts, diversity_temperatures, expert_diversity, expert_taus
from glmc.models.experts import Experts
from glmc.models.exported import exported_form
from glmc.tasks.base import TaskHooks


class ExpertsTask(TaskHooks, TrainingTask):
    """Base task for a backbone of several experts.

    Args:
        model: Backbone of `create_backbone(…, experts=…)`.

    Raises:
        InputError: If it is another one.
    """

    def __init__(self, model: Experts):
        super().__init__(verbose=False)
        if not isinstance(model, Experts):
            raise InputError(f'--method: expected a backbone with experts, found {type(model).__name__}')
        self.trainable_module = model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare backbone; timm wraps the one of the average in a module."""
        module = super().get_eval_model(module, ema)
        return None if module is None else unwrap_model(module)

    def reference_models(self, ema: bool = False) -> dict[str, nn.Module]:
        """`experts`: the experts with their cosine classifiers, if the exported net has folded ones."""
        model = self.get_eval_model(ema=ema)
        return {} if exported_form(model) is model else dict(experts=model)


class DiverseExpertsTask(ExpertsTask):
    """A margin loss for each expert, and a divergence that pushes the experts apart (RIDE; arXiv 2010.01809).

    L = Σ_k LDAM(s_k, y) + λ·T̄²·KL(softmax(s̄/T) ‖ softmax(s_k/T)), λ < 0. Class weights, and temperatures T_c below 1 for
    rare classes, come with deferred re-weighting.

    Args:
        model: As that of `ExpertsTask`.
        counts: (C,) training images per class.
        effective_beta, drw_start, ldam_margin, cosine_scale: As those of `losses.LDAMLoss`.
        diversity_weight: λ.
        diversity_eta: η of the temperatures.
    """

    loss_names = ('loss_c', 'loss_div')

    def __init__(self, model: Experts, counts: Sequence[int], diversity_weight: float = -0.45, diversity_eta: float = 0.05,
                 **ldam):
        super().__init__(model)
        self.criterion, self.diversity_weight = LDAMLoss(counts, **ldam), diversity_weight
        self.register_buffer('deferred_temperature', diversity_temperatures(counts, diversity_eta), persistent=False)
        self.register_buffer('temperature', torch.ones(len(counts)), persistent=False)  # filled: nothing is compiled anew

    def set_progress(self, progress: float) -> None:
        """Set class weights and temperatures for T/T_max = progress in [0, 1)."""
        self.criterion.set_progress(progress)
        started = progress >= self.criterion.drw_start
        self.temperature.copy_(self.deferred_temperature if started else torch.ones_like(self.temperature))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            images: (B, c, H, W).
            labels: (B,) labels, or (B, C) soft labels of at most two classes each.

        Returns:
            Scalars `loss`, `loss_c` and `loss_div`; `output`, the (B, C) mean logits.
        """
        logits = self.trainable_module.expert_logits(images)
        targets = F.one_hot(labels, logits.shape[2]).float() if labels.ndim == 1 else labels
        loss_c = sum(ldam_loss(each, targets, self.criterion.margins, self.criterion.class_weight)
                     for each in logits.unbind(1))
        loss_div = expert_diversity(logits, self.temperature)
        loss = loss_c + self.diversity_weight * loss_div
        return dict(loss=loss, loss_c=loss_c, loss_div=loss_div, output=logits.mean(1))


class BalancedExpertsTask(ExpertsTask):
    """A logit-adjusted loss for each expert, from the training prior to the reverse (BalPoE; arXiv 2206.05260).

    Args:
        model: As that of `ExpertsTask`.
        counts: (C,) training images per class.
        adjustment_tau: Mean of the experts' τ_k, which go from 0 to twice this value.
    """

    def __init__(self, model: Experts, counts: Sequence[int], adjustment_tau: float = 1.0):
        super().__init__(model)
        taus = expert_taus(len(model.experts), adjustment_tau)
        self.register_buffer('adjustments', taus[:, None] * prior_adjustment(counts), persistent=False)  # (K, C)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss` of (B, c, H, W) images and (B,) labels or (B, C) soft ones; `output`, the (B, C) mean logits."""
        logits = self.trainable_module.expert_logits(images)
        return dict(loss=balanced_experts(logits, labels, self.adjustments), output=logits.mean(1))
