"""Training tasks in timm's sense: a model and its loss, batch in, dict of losses out."""
from collections.abc import Sequence

import torch
from timm.task import ClassificationTask, TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.losses import class_weights, cumulative_alpha, negative_cosine, soft_cross_entropy
from glmc.models import GLMCModule


class PlainTask(ClassificationTask):
    """One view, one classifier: timm's task plus the calls that every task of the table answers."""

    loss_names = ()

    def __init__(self, model: nn.Module, counts: Sequence[int], **kwargs):
        super().__init__(model, verbose=False, **kwargs)

    def set_progress(self, progress: float) -> None:
        """Nothing of this task changes as training goes on."""


class GLMCTask(TrainingTask):
    """L = α·L_c + (1-α)·L_cb + γ·L_sim (GLMC Eq. 11; arXiv 2305.08661).

    L_c and L_cb are sums of the two views' cross-entropies with the conventional and with the rebalanced classifier,
    the latter with class weights; L_sim is the sum of the two negative cosines. With a balanced model,
    L = L_c + γ·L_sim on the backbone's classifier.

    Args:
        model: The backbone with its training heads.
        counts: (C,) training images per class.
        reweight_power: k of the class weights (Eq. 7).
        consistency_weight: γ.
    """

    loss_names = ('loss_c', 'loss_cb', 'loss_sim')

    def __init__(
            self, model: GLMCModule, counts: Sequence[int], reweight_power: float = 1.0,
            consistency_weight: float = 1.0, **kwargs):
        super().__init__(verbose=False, **kwargs)
        self.trainable_module = model
        self.consistency_weight = consistency_weight
        self.balanced = model.classifier is None
        self.register_buffer('class_weight', class_weights(counts, reweight_power), persistent=False)
        self.register_buffer('alpha', torch.tensor(1.0), persistent=False)  # a tensor: its schedule recompiles nothing

    def set_progress(self, progress: float) -> None:
        """Set α for T/T_max = progress in [0, 1)."""
        self.alpha.fill_(1.0 if self.balanced else cumulative_alpha(progress))

    def forward(self, views: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            views: Global and local view, each (B, c, H, W).
            targets: Their soft labels, each (B, C).

        Returns:
            Scalars `loss`, `loss_c`, `loss_cb`, `loss_sim`, and `output`: (B, C) rebalanced logits of the global view.
        """
        global_out, local_out = self.trainable_module(*views)
        outputs = (global_out, local_out)
        loss_sim = (negative_cosine(global_out.prediction, local_out.projection)
                    + negative_cosine(local_out.prediction, global_out.projection))
        if self.balanced:
            loss_c = sum(soft_cross_entropy(o.rebalanced_logits, p) for o, p in zip(outputs, targets, strict=True))
            loss_cb = torch.zeros_like(loss_c)
        else:
            loss_c = sum(soft_cross_entropy(o.logits, p) for o, p in zip(outputs, targets, strict=True))
            loss_cb = sum(soft_cross_entropy(o.rebalanced_logits, p, self.class_weight)
                          for o, p in zip(outputs, targets, strict=True))
        loss = self.alpha * loss_c + (1 - self.alpha) * loss_cb + self.consistency_weight * loss_sim
        return dict(loss=loss, loss_c=loss_c, loss_cb=loss_cb, loss_sim=loss_sim, output=global_out.rebalanced_logits)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare backbone: what is evaluated, exported and kept."""
        module = super().get_eval_model(module, ema)
        return None if module is None else unwrap_model(module).backbone

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """Weights of the heads beside the backbone."""
        module = unwrap_model(module if module is not None else self.get_trainable_module(ema))
        return {name: value for name, value in module.state_dict().items() if not name.startswith('backbone.')}

    def load_task_state(
            self, state: dict[str, Tensor], strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        module = unwrap_model(module if module is not None else self.get_trainable_module(ema))
        _, unexpected = module.load_state_dict(state, strict=False)
        missing = self.get_task_state(module).keys() - state.keys()
        if strict and (missing or unexpected):
            raise RuntimeError(f'training heads: missing {sorted(missing)}, unexpected {unexpected}')
