"""Classifiers of another form that fold into the backbone's own linear one, and what is done to the rows of that."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmc.models import GLMCModule, linear_classifier, scale_gradient


class Folding:
    """A module whose classifier folds into that of its `backbone`."""

    def folded(self) -> tuple[Tensor, Tensor]:
        """(C, D) weight and (C,) bias of the linear classifier."""
        raise NotImplementedError

    @torch.no_grad()
    def fold(self) -> None:
        """Set the backbone's own classifier."""
        set_classifier(self.backbone, *self.folded())


class FoldedModule(Folding, nn.Module):
    """A backbone trained with a classifier of another form, which folds into the backbone's own linear one.

    The backbone's classifier is not trained, only set by `fold`; so the backbone alone is what is evaluated and exported.

    Args:
        backbone: Any timm model whose classifier is one linear layer on the pooled features.

    Raises:
        InputError: If it is not.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.width, self.num_classes = backbone.head_hidden_size, backbone.num_classes
        linear_classifier(backbone).requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Pooled features r (B, D)."""
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)


class CosineClassifier(nn.Module):
    """s·cos(r, w_c) for features r (B, D) and weights w (C, D); s as in LDAM (arXiv 1906.07413)."""

    def __init__(self, width: int, num_classes: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(num_classes, width).uniform_(-1, 1)))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class CosineModule(FoldedModule):
    """A backbone with a cosine classifier.

    s·cos(r, w) = (s / |r|)·ŵ·r: a linear classifier up to the norm of r, which no class depends on. Folded, with the mean
    norm of the training features in place of |r|, it ranks the classes of every image alike; how sure it is differs.

    Args:
        backbone: As of `FoldedModule`.
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
    """GLMC with cosine classifiers, of which the rebalanced one folds into the backbone's as that of `CosineModule` does.

    Args:
        backbone: As of `FoldedModule`.
        cosine_scale: s of both.
        projection_dim, joint_forward: As of `GLMCModule`.
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


class BilateralModule(FoldedModule):
    """Two branches on one backbone: z = 2·(α·W_c·r_i + (1-α)·W_r·r_j) + b (BBN; arXiv 1912.02413, Eq. 1).

    In the paper the branches share all but the last residual block, which no plain timm model can hold; here they share
    the whole backbone and are two classifiers. The paper infers with α = 1/2, which is the linear W_c + W_r exactly.

    Args:
        backbone: As of `FoldedModule`.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__(backbone)
        self.classifier = nn.Linear(self.width, self.num_classes)
        self.rebalancer = nn.Linear(self.width, self.num_classes, bias=False)
        self.fold()

    def forward(self, images: tuple[Tensor, Tensor], alpha: Tensor) -> Tensor:
        """Logits of a pair: (B, c, H, W) images i as the training set has them, and j of the reversed sampler."""
        conventional, reversed_ = (self.encode(view) for view in images)
        return self.classifier(2 * alpha * conventional) + self.rebalancer(2 * (1 - alpha) * reversed_)

    def folded(self) -> tuple[Tensor, Tensor]:
        return self.classifier.weight + self.rebalancer.weight, self.classifier.bias


@torch.no_grad()
def follow_norm(norm: Tensor, features: Tensor) -> None:
    """Move a scalar a tenth of the way to the mean norm of (B, D) features, in place."""
    norm.lerp_(features.float().norm(dim=1).mean(), 0.1)


def fold_cosine(weight: Tensor, scale: float, feature_norm: float | Tensor) -> tuple[Tensor, Tensor]:
    """Linear (C, D) weight and (C,) bias that rank as s·cos(r, w_c) does, equal to it where |r| is `feature_norm`."""
    return F.normalize(weight) * (scale / feature_norm), torch.zeros(len(weight), device=weight.device)


@torch.no_grad()
def set_classifier(backbone: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Put these (C, D) weights and (C,) biases into the backbone's linear classifier."""
    classifier = backbone.get_classifier()
    classifier.weight.copy_(weight)
    classifier.bias.copy_(bias)


@torch.no_grad()
def cap_norms(weight: Tensor, max_norm: float | Tensor) -> Tensor:
    """Rows of (C, D) weights scaled down to norm δ where they are longer (MaxNorm; arXiv 2203.14197, Eq. 5; GLMC Eq. 13)."""
    return weight * (max_norm / weight.norm(dim=1, keepdim=True)).clamp(max=1)


def norm_radius(weight: Tensor, fraction: float = 0.1) -> Tensor:
    """δ = min + fraction·(max - min) of the row norms."""
    low, high = weight.detach().norm(dim=1).aminmax()
    return low + fraction * (high - low)
