"""Tasks with a contrastive loss: SupCon, BCL, PaCo, GPaCo, KCL and TSC."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from glmc.losses.classification import LogitAdjustedLoss
from glmc.losses.contrastive import (
    balanced_contrastive,
    supervised_contrastive,
)
from glmc.models.projected import ProjectedModule
from glmc.tasks.base import AuxiliaryHeadsTask
from glmc.tasks.gather import gather, missing_rows, positions


class ContrastiveTask(AuxiliaryHeadsTask):
    """Base task for a backbone with a projector, whose features are contrasted over the batches of all processes.

    Args:
        model: Backbone with its projector.
        counts: (C,) training images per class.
        contrast_temperature: T.

    Attributes:
        memory: State beside the trained module, by name; part of the task state.
    """

    loss_names = ('loss_c', 'loss_con')

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float = 0.1):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.temperature = contrast_temperature
        self.balanced_softmax = LogitAdjustedLoss(counts)
        self.memory = nn.ModuleDict()
        self.padding = 0

    def before_batch(self, images: int, batch_fraction: float) -> None:
        self.padding = missing_rows(images, batch_fraction)

    def contrast(self, loss: Callable[..., Tensor], z: Tensor, labels: Tensor, *args) -> Tensor:
        """A loss of this process's features among those of all processes.

        Args:
            loss: As `losses.contrastive.supervised_contrastive`.
            z: (B, V, d) unit features of V views.
            labels: (B,) labels.
            *args: Its arguments after `own`.
        """
        views = z.shape[1]
        candidates = gather(z, self.padding).flatten(0, 1)
        candidate_labels = gather(labels, self.padding, fill=-1).repeat_interleave(views)
        own = positions(len(z), z.device)[:, None] * views + torch.arange(views, device=z.device)
        return loss(z.flatten(0, 1), labels.repeat_interleave(views), candidates, candidate_labels, own.flatten(), *args)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """Weights of the projector, and the memory, which the average of the weights shares."""
        state = super().get_task_state(module, ema)
        return state if ema else {**state, **self.memory.state_dict(prefix='memory.')}

    def load_task_state(
            self, state: dict[str, Tensor], strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        prefix = 'memory.'
        heads = {name: value for name, value in state.items() if not name.startswith(prefix)}
        super().load_task_state(heads, strict, module, ema)
        if not ema:
            memory = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            self.memory.load_state_dict(memory, strict=strict)


class SupConTask(ContrastiveTask):
    """Supervised contrastive loss of two views (SupCon; arXiv 2004.11362), with an online probe.

    The backbone's classifier learns by Balanced Softmax from features that send no gradient to the encoder (ours): it makes
    the epochs comparable. The paper's classifier is trained afterwards, as stage 2.

    Args:
        model, counts, contrast_temperature: As those of `ContrastiveTask`.
    """

    def forward(self, views: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """`loss`, `loss_c` of the probe and `loss_con` of two views, each (B, c, H, W), and (B, C) `output` of the first."""
        module, size = self.trainable_module, len(labels)
        features = module.encode(torch.cat(views))  # (2B, D)
        logits = module.classify(features.detach())
        loss_c = self.balanced_softmax(logits, labels.repeat(2))
        z = module.project(features).unflatten(0, (2, size)).transpose(0, 1)  # (B, 2, d)
        loss_con = self.contrast(supervised_contrastive, z, labels, self.temperature)
        return dict(loss=loss_c + loss_con, loss_c=loss_c, loss_con=loss_con, output=logits[:size])


class BalancedContrastTask(ContrastiveTask):
    """Balanced Softmax on one view and the balanced contrastive loss of two others (BCL; arXiv 2207.09052).

    Args:
        model: Backbone with projector and prototypes.
        counts, contrast_temperature: As those of `ContrastiveTask`.
        contrast_weight: Weight of the contrastive loss.
    """

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float = 0.1,
                 contrast_weight: float = 0.3):
        super().__init__(model, counts, contrast_temperature)
        self.contrast_weight = contrast_weight

    def forward(self, views: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """`loss`, its parts `loss_c` and `loss_con`, and (B, C) `output` of three views, each (B, c, H, W)."""
        module, size = self.trainable_module, len(labels)
        features = module.encode(torch.cat(views))  # (3B, D)
        logits = module.classify(features[:size])
        loss_c = self.balanced_softmax(logits, labels)
        z = module.project(features[size:]).unflatten(0, (2, size)).transpose(0, 1)  # (B, 2, d)
        loss_con = self.contrast(balanced_contrastive, z, labels, module.prototypes(), self.temperature)
        return dict(loss=loss_c + self.contrast_weight * loss_con, loss_c=loss_c, loss_con=loss_con, output=logits)
