"""Tasks with one view of each image."""
from collections.abc import Callable, Sequence

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.losses.classification import DeferredReweighting
from glmc.models.classifier import FoldedModule, cap_norms, linear_classifier, norm_radius, set_classifier
from glmc.tasks.base import FoldedTask, HeadFits, TaskHooks


class SingleViewTask(TaskHooks, ClassificationTask):
    """timm's task for one view and one classifier, with a loss that may depend on the class counts.

    Args:
        model: The backbone.
        counts: (C,) training images per class.
        loss: Counts and options -> criterion; None for timm's cross-entropy.
        criterion_kwargs: Arguments of timm's cross-entropy.
        **options: Options of `loss`.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int], loss: Callable[..., nn.Module] | None = None,
                 criterion_kwargs: dict | None = None, **options):
        super().__init__(model, loss and loss(counts, **options), criterion_kwargs=criterion_kwargs, verbose=False)

    def set_progress(self, progress: float) -> None:
        if isinstance(self.criterion, DeferredReweighting):
            self.criterion.set_progress(progress)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare backbone; timm wraps the one of the average in a module."""
        module = super().get_eval_model(module, ema)
        return None if module is None else unwrap_model(module)


class WeightBalancingTask(SingleViewTask):
    """Cross-entropy under a tuned weight decay, then class weights and MaxNorm on the classifier (arXiv 2203.14197).

    The paper trains the classifier alone in its second stage. Here the whole model trains on for the last epochs, at their
    learning rate. `--method ce --weight-decay 5e-3 --stage2 maxnorm` separates the stages.

    Args:
        model: A backbone whose classifier is one linear layer.
        counts: (C,) training images per class.
        effective_beta, drw_start: As those of `losses.DeferredReweighting`; MaxNorm starts with the class weights.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int], effective_beta: float = 0.9999, drw_start: float = 0.8):
        linear_classifier(model)
        super().__init__(model, counts, DeferredReweighting, effective_beta=effective_beta, drw_start=drw_start)
        self.register_buffer('max_norm', torch.tensor(torch.inf), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set the class weights, and the radius δ from the norms at the moment when the weights start to differ."""
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


class CosineTask(FoldedTask):
    """Task for one view, a cosine classifier, and a loss on its logits.

    Args:
        model: A `models.CosineModule`.
        counts: (C,) training images per class.
        loss: Counts and options -> criterion that changes with progress.
        **options: Options of `loss`.
    """

    def __init__(self, model: FoldedModule, counts: Sequence[int], loss: Callable[..., DeferredReweighting], **options):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.criterion = loss(counts, **options)

    def set_progress(self, progress: float) -> None:
        self.criterion.set_progress(progress)

    def init_heads(self, fits: HeadFits, prior: str | Sequence[float]) -> None:
        """Start the cosine classifier from the class means (LIFT; arXiv 2309.10019)."""
        module = unwrap_model(self.get_trainable_module())
        module.classifier.init_from(fits.class_means())
        module.fold()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss` of (B, c, H, W) images and (B,) labels, and `output`, the (B, C) scaled cosines."""
        logits = self.trainable_module(images)
        return dict(loss=self.criterion(logits, labels), output=logits)
