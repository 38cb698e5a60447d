"""Cosine classifiers, which fold into the backbone's own linear one."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmc.models.classifier import FoldedModule, Folding, linear_classifier
from glmc.models.glmc import GLMCModule, scale_gradient


class CosineClassifier(nn.Module):
    """s·cos(r, w_c) for features r (B, D) and weights w (C, D); s as in LDAM (arXiv 1906.07413)."""

    def __init__(self, width: int, num_classes: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(num_classes, width).uniform_(-1, 1)))

    @torch.no_grad()
    def init_from(self, class_means: Tensor) -> None:
        """Start from (C, D) class means."""
        self.weight.copy_(F.normalize(class_means))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class CosineModule(FoldedModule):
    """A backbone with a cosine classifier.

    s·cos(r, w) = (s / |r|)·ŵ·r is linear in r but for the norm |r|, which is the same for all classes. The folded classifier
    uses the mean norm of the training features for |r|: it ranks the classes of every image alike, with other confidence.

    Args:
        backbone: As that of `FoldedModule`.
        cosine_scale: s.
    """

    def __init__(self, backbone: nn.Module, cosine_scale: float = 30.0):
        super().__init__(backbone)
        self.classifier = CosineClassifier(self.width, self.num_classes, cosine_scale)
        self.register_buffer('feature_norm', torch.ones(()))
        self.fold()

    def forward(self, images: Tensor) -> Tensor:
        features = self.encode(images)
        if self.training:
            follow_norm(self.feature_norm, features)
        return self.classifier(features)

    def folded(self) -> tuple[Tensor, Tensor]:
        return fold_cosine(self.classifier.weight, self.classifier.scale, self.feature_norm)


class CosineGLMCModule(Folding, GLMCModule):
    """GLMC with cosine classifiers; the rebalanced one folds into the backbone's own, as in `CosineModule`.

    Args:
        backbone: As that of `FoldedModule`.
        cosine_scale: s of both classifiers.
        projection_dim, joint_forward: As those of `GLMCModule`.
    """

    def __init__(self, backbone: nn.Module, cosine_scale: float = 30.0, projection_dim: int = 256,
                 joint_forward: bool = False):
        super().__init__(backbone, projection_dim, joint_forward=joint_forward)
        linear_classifier(backbone).requires_grad_(False)
        width, num_classes = backbone.head_hidden_size, backbone.num_classes
        self.classifier = CosineClassifier(width, num_classes, cosine_scale)
        self.rebalancer = CosineClassifier(width, num_classes, cosine_scale)
        self.register_buffer('feature_norm', torch.ones(()))
        self.fold()

    def rebalanced_logits(self, features: Tensor, pre_logits: Tensor, factor: Tensor | None) -> Tensor:
        if self.training:
            follow_norm(self.feature_norm, pre_logits)
        return self.rebalancer(scale_gradient(pre_logits, factor))

    def folded(self) -> tuple[Tensor, Tensor]:
        return fold_cosine(self.rebalancer.weight, self.rebalancer.scale, self.feature_norm)


@torch.no_grad()
def follow_norm(norm: Tensor, features: Tensor) -> None:
    """Move norms a tenth of the way to the mean norms of features, in place, unless these are not finite.

    Args:
        norm: Scalar for features (B, D), (K,) for features (B, K, D).
        features: Features of a batch.
    """
    mean = features.float().norm(dim=-1).mean(0)
    norm.lerp_(torch.where(mean.isfinite(), mean, norm), 0.1)  # else the folded classifier would not be finite, either


def fold_cosine(weight: Tensor, scale: float, feature_norm: float | Tensor) -> tuple[Tensor, Tensor]:
    """Linear (C, D) weight and (C,) bias that rank as s·cos(r, w_c) does, equal to it where |r| is `feature_norm`."""
    return F.normalize(weight) * (scale / feature_norm), torch.zeros(len(weight), device=weight.device)
