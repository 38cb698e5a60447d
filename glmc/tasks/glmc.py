"""The task of GLMC."""
from collections.abc import Sequence

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.losses.glmc import class_weights, cumulative_alpha, negative_cosine, soft_cross_entropy
from glmc.models.classifier import set_classifier, set_linear
from glmc.models.glmc import GLMCModule, ViewOutput
from glmc.tasks.base import AuxiliaryHeadsTask, FoldedTask, HeadFits


class GLMCTask(AuxiliaryHeadsTask):
    """L = α·L_c + (1-α)·L_cb + γ·L_sim (GLMC Eq. 11; arXiv 2305.08661).

    L_c and L_cb are sums over both views of the cross-entropy of the conventional and of the rebalanced classifier, the
    latter with class weights. L_sim is the sum of the two negative cosines. With a balanced model, L = L_c + γ·L_sim on the
    backbone's classifier.

    With `alpha_scope='encoder'` (ours), α weights only the gradients into the encoder, which are then those of Eq. 11. Each
    classifier learns from its full loss: L = L_c + L_cb / m + γ·L_sim. m = Σ n_c·w_c / Σ n_c is the mean weight of a
    training image, far below 1 on a long tail; dividing by it makes L_cb a weighted mean, as torch's cross-entropy is.

    Args:
        model: The backbone with its training heads.
        counts: (C,) training images per class.
        reweight_power: k of the class weights (Eq. 7).
        consistency_weight: γ.
        alpha_power: P of α = 1 - (T/T_max)^P.
        alpha_scope: `losses`: α weights the losses (Eq. 11); `encoder`: only the gradients into the encoder.
    """

    loss_names = ('loss_c', 'loss_cb', 'loss_sim')

    def __init__(
            self, model: GLMCModule, counts: Sequence[int], reweight_power: float = 1.0,
            consistency_weight: float = 1.0, alpha_power: float = 2.0, alpha_scope: str = 'losses', **kwargs):
        super().__init__(verbose=False, **kwargs)
        self.trainable_module = model
        self.consistency_weight = consistency_weight
        self.alpha_power = alpha_power
        self.balanced = model.classifier is None
        self.register_buffer('class_weight', class_weights(counts, reweight_power), persistent=False)
        self.mean_weight = None  # m, with the encoder scope
        if alpha_scope == 'encoder' and not self.balanced:
            self.mean_weight = float(np.average(self.class_weight, weights=counts))
        self.register_buffer('alpha', torch.tensor(1.0), persistent=False)  # a tensor: its schedule recompiles nothing

    def conventional_classifier(self, ema: bool = False) -> nn.Linear | None:
        return unwrap_model(self.get_trainable_module(ema)).classifier

    def init_heads(self, fits: HeadFits, prior: str | Sequence[float]) -> None:
        """Start c from the cross-entropy fit and cb from the Balanced Softmax fit; a single classifier from the former."""
        module = unwrap_model(self.get_trainable_module())
        set_classifier(module.backbone, *fits.linear('train' if self.balanced else 'uniform'))
        if not self.balanced:
            set_linear(module.classifier, *fits.linear('train'))

    def set_progress(self, progress: float) -> None:
        """Set α for T/T_max = progress in [0, 1)."""
        self.alpha.fill_(1.0 if self.balanced else cumulative_alpha(progress, self.alpha_power))

    def forward(self, views: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            views: Global and local view, each (B, c, H, W).
            targets: Their soft labels, each (B, C).

        Returns:
            Scalars `loss`, `loss_c`, `loss_cb`, `loss_sim`, and `output`: (B, C) rebalanced logits of the global view.
        """
        global_out, local_out = self.trainable_module(*views, gradient_scales=self.gradient_scales())
        outputs = (global_out, local_out)
        loss_sim = (negative_cosine(global_out.prediction, local_out.projection)
                    + negative_cosine(local_out.prediction, global_out.projection))
        losses = dict(**self.view_losses(outputs, targets), loss_sim=loss_sim)
        loss = self.classification_loss(losses) + self.consistency_weight * loss_sim
        return dict(loss=loss, **losses, output=global_out.rebalanced_logits)

    def view_losses(self, outputs: Sequence[ViewOutput], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Scalars `loss_c` and `loss_cb`, sums over the views, from their outputs and (B, C) soft labels."""
        if self.balanced:
            loss_c = sum(soft_cross_entropy(o.rebalanced_logits, p) for o, p in zip(outputs, targets, strict=True))
            return dict(loss_c=loss_c, loss_cb=torch.zeros_like(loss_c))
        loss_c = sum(soft_cross_entropy(o.logits, p) for o, p in zip(outputs, targets, strict=True))
        loss_cb = sum(soft_cross_entropy(o.rebalanced_logits, p, self.class_weight)
                      for o, p in zip(outputs, targets, strict=True))
        return dict(loss_c=loss_c, loss_cb=loss_cb)

    def gradient_scales(self) -> tuple[Tensor, Tensor] | None:
        """Factors of the classifiers' gradients into the encoder that make it that of Eq. 11; None with the losses scope."""
        return (self.alpha, self.mean_weight * (1 - self.alpha)) if self.mean_weight else None

    def classification_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Classification without consistency: α·L_c + (1-α)·L_cb; with the encoder scope L_c + L_cb / m."""
        if self.mean_weight:
            return losses['loss_c'] + losses['loss_cb'] / self.mean_weight
        return self.alpha * losses['loss_c'] + (1 - self.alpha) * losses['loss_cb']


class OneViewGLMCTask(GLMCTask):
    """GLMC on one view of each image (ours): L_c and L_cb of a batch that is half global, half local mixtures.

    A step costs one forward pass of B images instead of two. The consistency loss needs both views and is left out.

    Args:
        model: The backbone with its training heads; without a projector.
        counts, reweight_power, alpha_power, alpha_scope: As those of `GLMCTask`.
    """

    loss_names = ('loss_c', 'loss_cb')

    def __init__(self, model: GLMCModule, counts: Sequence[int], **kwargs):
        super().__init__(model, counts, consistency_weight=0.0, **kwargs)

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of (B, c, H, W) mixed images with (B, C) soft labels: `loss`, `loss_c`, `loss_cb` and `output`."""
        output = self.trainable_module(images, gradient_scales=self.gradient_scales())
        losses = self.view_losses([output], [target])
        return dict(loss=self.classification_loss(losses), **losses, output=output.rebalanced_logits)


class CosineGLMCTask(FoldedTask, GLMCTask):
    """GLMC on a `CosineGLMCModule`; arguments as those of `GLMCTask`."""

    def conventional_classifier(self, ema: bool = False) -> None:
        """None: the conventional classifier is not linear."""

    def init_heads(self, fits: HeadFits, prior: str | Sequence[float]) -> None:
        """Start both cosine classifiers from the class means (LIFT; arXiv 2309.10019)."""
        module, means = unwrap_model(self.get_trainable_module()), fits.class_means()
        for head in (module.classifier, module.rebalancer):
            head.init_from(means)
        module.fold()
