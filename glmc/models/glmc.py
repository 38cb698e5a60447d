"""GLMC: a timm backbone with the heads that only training needs."""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glmc.models.classifier import classifies_pre_logits


class ViewOutput(NamedTuple):
    """What GLMCModule gives for one view."""
    logits: Tensor | None  # (B, C) conventional classifier; None on balanced data, where there is only one
    rebalanced_logits: Tensor  # (B, C) the backbone's own classifier
    projection: Tensor  # (B, d) h
    prediction: Tensor  # (B, d) u


class GLMCModule(nn.Module):
    """A timm backbone whose own classifier is the rebalanced one, with the heads that only training needs.

    r = E(x); conventional classifier c(r), projection h = proj(r), prediction u = pred(h), all single linear layers
    (GLMC section 3.1). Export keeps the backbone and drops what is beside it.

    Args:
        backbone: Any timm model with a classifier.
        projection_dim: d.
        balanced: Leave out the conventional classifier; the backbone's own takes its place.
        joint_forward: Encode both views as one batch of 2B, BatchNorm statistics over both.

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
        self.projector = nn.Linear(width, projection_dim)
        self.predictor = nn.Linear(projection_dim, projection_dim)

    def forward(
            self, global_view: Tensor, local_view: Tensor,
            shares: tuple[Tensor, Tensor] | None = None) -> tuple[ViewOutput, ViewOutput]:
        """Both views, each (B, c, H, W); each in a forward pass of its own, as in the paper, unless `joint_forward`.

        Two scalars multiply what reaches the encoder of the gradients of the conventional and of the rebalanced classifier;
        the outputs are the same.
        """
        if self.joint_forward:
            both = self.forward_view(torch.cat([global_view, local_view]), shares)
            halves = [(None, None) if output is None else output.chunk(2) for output in both]
            return tuple(ViewOutput(*half) for half in zip(*halves, strict=True))
        return self.forward_view(global_view, shares), self.forward_view(local_view, shares)

    def forward_view(self, images: Tensor, shares: tuple[Tensor, Tensor] | None = None) -> ViewOutput:
        """One view; where the backbone's classifier takes more than the pooled features, its head runs twice, and head
        drop-out draws two masks."""
        features = self.backbone.forward_features(images)
        pre_logits = self.backbone.forward_head(features, pre_logits=True)  # (B, D)
        projection = self.projector(pre_logits)  # (B, d)
        conventional, rebalanced = shares or (None, None)
        logits = None if self.classifier is None else self.classifier(scale_gradient(pre_logits, conventional))
        rebalanced_logits = self.rebalanced_logits(features, pre_logits, rebalanced)
        return ViewOutput(logits, rebalanced_logits, projection, self.predictor(projection))

    def rebalanced_logits(self, features: Tensor | Sequence[Tensor], pre_logits: Tensor, factor: Tensor | None) -> Tensor:
        """(B, C) of the backbone's own classifier, whose gradient to the features is multiplied by `factor`."""
        if self.single_pass:
            return self.backbone.get_classifier()(scale_gradient(pre_logits, factor))
        return self.backbone.forward_head(scale_gradient(features, factor))


def scale_gradient(features: Tensor | Sequence[Tensor], factor: Tensor | None) -> Tensor | Sequence[Tensor]:
    """The same features, to the bit, whose gradient is multiplied by a scalar; None leaves all as it is."""
    if factor is None:
        return features
    if not isinstance(features, Tensor):
        return type(features)(scale_gradient(feature, factor) for feature in features)
    constant = features.detach()
    return constant + factor.to(features.dtype) * (features - constant)
