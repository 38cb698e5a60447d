"""Training tasks in timm's sense: a model and its loss, batch in, dict of losses out."""
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.folded import BilateralModule, FoldedModule, cap_norms, norm_radius, set_classifier
from glmc.losses import DeferredReweighting, class_weights, cumulative_alpha, negative_cosine, soft_cross_entropy
from glmc.models import GLMCModule, linear_classifier


class Scheduled:
    """What every task of the table answers beside timm's calls."""

    loss_names = ()

    def set_progress(self, progress: float) -> None:
        """Called before each epoch with T/T_max in [0, 1)."""

    def conventional_classifier(self, ema: bool = False) -> nn.Linear | None:
        """The classifier beside the rebalanced one that is exported, if there is one."""

    def after_step(self) -> None:
        """Called after each update of the weights."""

    def ascent_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """What SAM climbs, of the losses of a batch: all of it."""
        return losses['loss']

    def update_ema(self, step: int | None = None) -> None:
        """timm's call after each update."""
        self.after_step()
        super().update_ema(step=step)


class PlainTask(Scheduled, ClassificationTask):
    """One view, one classifier: timm's task, with a loss that may know the class counts.

    Args:
        model: The backbone.
        counts: (C,) training images per class.
        loss: Counts and options -> criterion; None for timm's cross-entropy.
        criterion_kwargs: For timm's, where `loss` is None.
        **options: For `loss`.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int], loss: Callable[..., nn.Module] | None = None,
                 criterion_kwargs: dict | None = None, **options):
        super().__init__(model, loss and loss(counts, **options), criterion_kwargs=criterion_kwargs, verbose=False)

    def set_progress(self, progress: float) -> None:
        if isinstance(self.criterion, DeferredReweighting):
            self.criterion.set_progress(progress)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The backbone, of the average too: timm's holds it in a module of its own."""
        module = super().get_eval_model(module, ema)
        return None if module is None else unwrap_model(module)


class WeightBalancingTask(PlainTask):
    """Cross-entropy under a tuned weight decay, then class weights and MaxNorm on the classifier (arXiv 2203.14197).

    The paper trains the classifier alone in its second stage; here the whole model goes on for the last epochs, at the
    learning rate they have. The two stages apart are `--method ce --weight-decay 5e-3 --stage2 maxnorm`.

    Args:
        model: A backbone whose classifier is one linear layer.
        counts: (C,) training images per class.
        effective_beta, drw_start: Of `losses.DeferredReweighting`; MaxNorm starts with the class weights.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int], effective_beta: float = 0.9999, drw_start: float = 0.8):
        linear_classifier(model)
        super().__init__(model, counts, DeferredReweighting, effective_beta=effective_beta, drw_start=drw_start)
        self.register_buffer('max_norm', torch.tensor(torch.inf), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set class weights, and once they differ the radius δ, by the norms of that moment."""
        super().set_progress(progress)
        if progress >= self.criterion.drw_start and self.max_norm.isinf():
            self.max_norm.copy_(norm_radius(self.get_eval_model().get_classifier().weight))

    def after_step(self) -> None:
        """Project the classifier onto norms of at most δ."""
        classifier = self.get_eval_model().get_classifier()
        set_classifier(self.get_eval_model(), cap_norms(classifier.weight, self.max_norm), classifier.bias)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        return dict(max_norm=self.max_norm)

    def load_task_state(self, state: dict[str, Tensor] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        self.max_norm.copy_(state['max_norm'])


class HeadsTask(Scheduled, TrainingTask):
    """A module of a backbone, which is evaluated, exported and kept, and of what stands beside it, the task's state."""

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


class GLMCTask(HeadsTask):
    """L = α·L_c + (1-α)·L_cb + γ·L_sim (GLMC Eq. 11; arXiv 2305.08661).

    L_c and L_cb are sums of the two views' cross-entropies with the conventional and with the rebalanced classifier,
    the latter with class weights; L_sim is the sum of the two negative cosines. With a balanced model,
    L = L_c + γ·L_sim on the backbone's classifier.

    α may part the encoder's gradient alone, which is then that of Eq. 11, while L = L_c + L_cb / m + γ·L_sim and each
    classifier learns from all of its own loss (ours). m = Σ n_c·w_c / Σ n_c is the mean weight of a training image, far
    below 1 on a long tail; divided by it, L_cb is a weighted mean as torch's cross-entropy with class weights is.

    Args:
        model: The backbone with its training heads.
        counts: (C,) training images per class.
        reweight_power: k of the class weights (Eq. 7).
        consistency_weight: γ.
        alpha_power: P of α = 1 - (T/T_max)^P.
        alpha_scope: What α parts: `losses` as in Eq. 11, or what the `encoder` hears of them.
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
        self.mean_weight = None  # m, where α is the encoder's
        if alpha_scope == 'encoder' and not self.balanced:
            self.mean_weight = float(np.average(self.class_weight, weights=counts))
        self.register_buffer('alpha', torch.tensor(1.0), persistent=False)  # a tensor: its schedule recompiles nothing

    def conventional_classifier(self, ema: bool = False) -> nn.Linear | None:
        return unwrap_model(self.get_trainable_module(ema)).classifier

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
        global_out, local_out = self.trainable_module(*views, *self.encoder_shares())
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
        losses = dict(loss_c=loss_c, loss_cb=loss_cb, loss_sim=loss_sim)
        loss = self.ascent_loss(losses) + self.consistency_weight * loss_sim
        return dict(loss=loss, **losses, output=global_out.rebalanced_logits)

    def encoder_shares(self) -> list[tuple[Tensor, Tensor]]:
        """What `GLMCModule` takes beside the views: factors that make the encoder's gradient that of Eq. 11."""
        return [(self.alpha, self.mean_weight * (1 - self.alpha))] if self.mean_weight else []

    def ascent_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """What SAM climbs: α·L_c + (1-α)·L_cb, the classification alone; L_c + L_cb / m where α is the encoder's."""
        if self.mean_weight:
            return losses['loss_c'] + losses['loss_cb'] / self.mean_weight
        return self.alpha * losses['loss_c'] + (1 - self.alpha) * losses['loss_cb']


class FoldedTask(HeadsTask):
    """A classifier of another form, folded into the backbone's own after every update."""

    def after_step(self) -> None:
        unwrap_model(self.get_trainable_module()).fold()

    def update_ema(self, step: int | None = None) -> None:
        """The average of the folded is not the folded average."""
        super().update_ema(step=step)
        if self.has_ema():
            unwrap_model(self.get_trainable_module(ema=True)).fold()


class CosineGLMCTask(FoldedTask, GLMCTask):
    """GLMC on a `CosineGLMCModule`; arguments as of `GLMCTask`."""

    def conventional_classifier(self, ema: bool = False) -> None:
        """None: it is not linear."""


class CosineTask(FoldedTask):
    """One view, a cosine classifier, and a loss on its logits.

    Args:
        model: Of `models.CosineModule`, with scale s.
        counts: (C,) training images per class.
        loss: Counts and options -> criterion that changes with progress.
        **options: For `loss`.
    """

    def __init__(self, model: FoldedModule, counts: Sequence[int], loss: Callable[..., DeferredReweighting], **options):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.criterion = loss(counts, **options)

    def set_progress(self, progress: float) -> None:
        self.criterion.set_progress(progress)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss` of (B, c, H, W) images and (B,) labels, and the (B, C) scaled cosines as `output`."""
        logits = self.trainable_module(images)
        return dict(loss=self.criterion(logits, labels), output=logits)


class BilateralTask(FoldedTask):
    """L = α·CE(z, y_i) + (1-α)·CE(z, y_j), α = 1 - (T/T_max)² (BBN; arXiv 1912.02413, Eq. 2).

    Args:
        model: Of two branches.
        counts: (C,) training images per class.
    """

    def __init__(self, model: BilateralModule, counts: Sequence[int]):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.register_buffer('alpha', torch.tensor(1.0), persistent=False)

    def set_progress(self, progress: float) -> None:
        self.alpha.fill_(cumulative_alpha(progress))

    def forward(self, images: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """`loss` of images i and j, each (B, c, H, W), and their (B,) labels, and the logits z as `output`."""
        logits = self.trainable_module(images, self.alpha)
        losses = [F.cross_entropy(logits.float(), label) for label in labels]
        return dict(loss=self.alpha * losses[0] + (1 - self.alpha) * losses[1], output=logits)
