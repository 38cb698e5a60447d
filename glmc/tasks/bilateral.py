"""The task of BBN."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor

from glmc.losses.glmc import cumulative_alpha
from glmc.models.bilateral import BilateralModule
from glmc.models.classifier import set_linear
from glmc.tasks.base import FoldedTask, HeadFits


class BilateralTask(FoldedTask):
    """L = α·CE(z, y_i) + (1-α)·CE(z, y_j), α = 1 - (T/T_max)² (BBN; arXiv 1912.02413, Eq. 2).

    Args:
        model: Backbone with two branches.
        counts: (C,) training images per class.
    """

    def __init__(self, model: BilateralModule, counts: Sequence[int]):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.register_buffer('alpha', torch.tensor(1.0), persistent=False)

    def set_progress(self, progress: float) -> None:
        self.alpha.fill_(cumulative_alpha(progress))

    def init_heads(self, fits: HeadFits, prior: str | Sequence[float]) -> None:
        """Start W_c from half of the cross-entropy fit and W_r from half of the Balanced Softmax fit: z is their mean."""
        module = unwrap_model(self.get_trainable_module())
        (weight, bias), (balanced_weight, balanced_bias) = map(fits.linear, ('train', 'uniform'))
        set_linear(module.classifier, weight / 2, (bias + balanced_bias) / 2)
        with torch.no_grad():
            module.rebalancer.weight.copy_(balanced_weight / 2)
        module.fold()

    def forward(self, images: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """`loss` of images i and j, each (B, c, H, W), with (B,) labels, and `output`, the (B, C) logits z."""
        logits = self.trainable_module(images, self.alpha)
        losses = [F.cross_entropy(logits.float(), label) for label in labels]
        return dict(loss=self.alpha * losses[0] + (1 - self.alpha) * losses[1], output=logits)
