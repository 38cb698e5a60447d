"""BBN: two branches on one backbone."""
from torch import Tensor, nn

from glmc.models.classifier import FoldedModule


class BilateralModule(FoldedModule):
    """Two branches on one backbone: z = 2·(α·W_c·r_i + (1-α)·W_r·r_j) + b (BBN; arXiv 1912.02413, Eq. 1).

    In the paper the branches share all but the last residual block, which a plain timm model cannot hold. Here they share
    the whole backbone and are two classifiers. The paper infers with α = 1/2, which equals the linear layer W_c + W_r.

    Args:
        backbone: As that of `FoldedModule`.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__(backbone)
        self.classifier = nn.Linear(self.width, self.num_classes)
        self.rebalancer = nn.Linear(self.width, self.num_classes, bias=False)
        self.fold()

    def forward(self, images: tuple[Tensor, Tensor], alpha: Tensor) -> Tensor:
        """(B, C) logits of pairs: (B, c, H, W) images i of the training distribution, and j of the reversed sampler."""
        conventional, reversed_ = (self.encode(view) for view in images)
        return self.classifier(2 * alpha * conventional) + self.rebalancer(2 * (1 - alpha) * reversed_)

    def folded(self) -> tuple[Tensor, Tensor]:
        return self.classifier.weight + self.rebalancer.weight, self.classifier.bias
