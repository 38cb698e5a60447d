"""GLMC: a timm backbone with the heads that only training needs."""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glmc.models.classifier import classifies_pre_logits


class ViewOutput(NamedTuple):
    """Outputs of GLMCModule for one view."""
    logits: Tensor | None  # (B, C) conventional classifier; None on balanced data, where there is only one
    rebalanced_logits: Tensor  # (B, C) the backbone's own classifier
    projection: Tensor | None  # (B, d) h; None without a projector
    prediction: Tensor | None  # (B, d) u


class GLMCModule(nn.Module):
    """A timm backbone, whose own classifier is the rebalanced one, with heads that only training needs.

    r = E(x); conventional classifier c(r), projection h = proj(r), prediction u = pred(h), all single linear layers
    (GLMC section 3.1). Export keeps the backbone and drops the heads.

    Args:
        backbone: Any timm model with a classifier.
        projection_dim: d; 0: without projection and prediction.
        balanced: Omit the conventional classifier, for balanced data; the backbone's own one takes its role.
        joint_forward: Encode both views as one batch of 2B, with BatchNorm statistics over both.

    Raises:
        InputError: If the backbone is an encoder without a classifier.
    """

    def __init__(self, backbone: nn.Module, projection_dim: int = 256, balanced: bool = False,
                 joint_forward: bool = False):
        super().__init__()
        self.single_pass = classifies_pre_logits(backbone)
        self.joint_forward = joint_forward
        self.backbone = backbone
        width = backbone.head_hidden_size
        self.classifier = None if balanced else nn.Linear(width, backbone.num_classes)
        self.projector = nn.Linear(width, projection_dim) if projection_dim else None
        self.predictor = nn.Linear(projection_dim, projection_dim) if projection_dim else None

    def forward(
            self, global_view: Tensor, local_view: Tensor | None = None,
            gradient_scales: tuple[Tensor, Tensor] | None = None) -> tuple[ViewOutput, ViewOutput] | ViewOutput:
        """Outputs for both views, in one forward pass per view as in the paper, or in one for both with `joint_forward`.

        Args:
            global_view, local_view: (B, c, H, W). Without a local view, the output is that of the first alone.
            gradient_scales: Factors of the gradients that the conventional and the rebalanced classifier send to the
                encoder, two scalars; the outputs do not depend on them. None for 1.
        """
        if local_view is None:
            return self.forward_view(global_view, gradient_scales)
        if self.joint_forward:
            both = self.forward_view(torch.cat([global_view, local_view]), gradient_scales)
            halves = [(None, None) if output is None else output.chunk(2) for output in both]
            return tuple(ViewOutput(*half) for half in zip(*halves, strict=True))
        return self.forward_view(global_view, gradient_scales), self.forward_view(local_view, gradient_scales)

    def forward_view(self, images: Tensor, gradient_scales: tuple[Tensor, Tensor] | None = None) -> ViewOutput:
        """Outputs for one view of (B, c, H, W) images.

        If the backbone's classifier needs more than the pooled features, its head runs twice, with two drop-out masks.
        """
        features = self.backbone.forward_features(images)
        pre_logits = self.backbone.forward_head(features, pre_logits=True)  # (B, D)
        projection = prediction = None
        if self.projector is not None:
            projection = self.projector(pre_logits)  # (B, d)
            prediction = self.predictor(projection)
        conventional, rebalanced = gradient_scales or (None, None)
        logits = None if self.classifier is None else self.classifier(scale_gradient(pre_logits, conventional))
        rebalanced_logits = self.rebalanced_logits(features, pre_logits, rebalanced)
        return ViewOutput(logits, rebalanced_logits, projection, prediction)

    def rebalanced_logits(self, features: Tensor | Sequence[Tensor], pre_logits: Tensor, factor: Tensor | None) -> Tensor:
        """(B, C) logits of the backbone's own classifier, whose gradient to the features is multiplied by `factor`."""
        if self.single_pass:
            return self.backbone.get_classifier()(scale_gradient(pre_logits, factor))
        return self.backbone.forward_head(scale_gradient(features, factor))


def scale_gradient(features: Tensor | Sequence[Tensor], factor: Tensor | None) -> Tensor | Sequence[Tensor]:
    """Features, bit for bit the same, whose gradient is multiplied by a scalar; None for 1."""
    if factor is None:
        return features
    if not isinstance(features, Tensor):
        return type(features)(scale_gradient(feature, factor) for feature in features)
    constant = features.detach()
    return constant + factor.to(features.dtype) * (features - constant)
