"""Tasks with a contrastive loss: SupCon, BCL, PaCo, GPaCo, KCL and TSC."""
from collections.abc import Callable, Sequence

import torch
from timm.utils import unwrap_model
from torch import Tensor

from glmc.losses.classification import LogitAdjustedLoss
from glmc.losses.contrastive import (
    balanced_contrastive,
    k_positive_contrastive,
    parametric_contrastive,
    pick_positives,
    supervised_contrastive,
    targeted_contrastive,
)
from glmc.models.projected import KeyEncoder, ProjectedModule, Queue
from glmc.models.targets import Targets
from glmc.tasks.base import AuxiliaryHeadsTask
from glmc.tasks.gather import gather, positions
from glmc.tasks.memory import MemoryMixin


class ContrastiveTask(MemoryMixin, AuxiliaryHeadsTask):
    """Base task for a backbone with a projector, whose features are contrasted over the batches of all processes.

    Args:
        model: Backbone with its projector.
        counts: (C,) training images per class.
        contrast_temperature: T.
    """

    loss_names = ('loss_c', 'loss_con')

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float = 0.1):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.temperature = contrast_temperature
        self.balanced_softmax = LogitAdjustedLoss(counts)

    def contrast(self, loss: Callable[..., Tensor], z: Tensor, labels: Tensor, *args,
                 more: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """A loss of this process's features among those of all processes.

        Args:
            loss: As `losses.contrastive.supervised_contrastive`.
            z: (B, V, d) unit features of V views.
            labels: (B,) labels.
            *args: Arguments of the loss after `own`.
            more: (M, d) further candidates, and their labels.
        """
        views = z.shape[1]
        candidates = gather(z, self.padding).flatten(0, 1)
        candidate_labels = gather(labels, self.padding, fill=-1).repeat_interleave(views)
        if more is not None:
            candidates, candidate_labels = torch.cat([candidates, more[0]]), torch.cat([candidate_labels, more[1]])
        own = positions(len(z), z.device)[:, None] * views + torch.arange(views, device=z.device)
        return loss(z.flatten(0, 1), labels.repeat_interleave(views), candidates, candidate_labels, own.flatten(), *args)


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


class QueueTask(ContrastiveTask):
    """Base task with a queue of the features of earlier batches (MoCo; arXiv 1911.05722).

    Args:
        model, counts, contrast_temperature: As those of `ContrastiveTask`.
        queue_size: K.
    """

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float, queue_size: int):
        super().__init__(model, counts, contrast_temperature)
        self.width = model.projector[-1].out_features
        self.memory['queue'] = Queue(queue_size, self.width)

    def after_batch(self, outputs: dict[str, Tensor]) -> None:
        """Enqueue the keys of all processes."""
        (keys,), labels, accept = self.gathered(outputs, 'keys')
        self.memory.queue.enqueue(keys, labels, accept)


class SharedEncoderTask(QueueTask):
    """Class logits and similarities to features in one softmax, by one encoder (GPaCo; arXiv 2209.12400).

    Both views are anchors; the second one's features are enqueued.

    Args:
        model, counts, contrast_temperature, queue_size: As those of `QueueTask`.
        contrast_weight: α, weight of a feature of the same class; the class itself weighs 1.
        gamma: Weight of the features in the denominator.
    """

    loss_names = ()

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float = 0.05,
                 contrast_weight: float = 0.01, queue_size: int = 1024, gamma: float = 1.0):
        super().__init__(model, counts, contrast_temperature, queue_size)
        self.contrast_weight, self.gamma = contrast_weight, gamma

    def forward(self, views: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """`loss` and (B, C) `output` of two views, each (B, c, H, W); `keys` and `labels` for the queue."""
        module = self.trainable_module
        features = module.encode(torch.cat(views)).unflatten(0, (2, len(labels))).transpose(0, 1)  # (B, 2, D)
        z = module.project(features.flatten(0, 1)).view(len(labels), 2, -1)
        return self.parametric(module.classify(features), z, labels, z[:, 1])

    def parametric(self, logits: Tensor, z: Tensor, labels: Tensor, keys: Tensor,
                   more: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """Outputs for (B, V, C) logits and (B, V, d) features of the anchors, (B, d) keys, and `more` candidates."""
        queue = self.memory.queue.keys, self.memory.queue.labels
        more = queue if more is None else tuple(map(torch.cat, zip(more, queue, strict=True)))
        adjusted = (logits.float() + self.balanced_softmax.adjustment).flatten(0, 1)
        loss = self.contrast(parametric_contrastive, z, labels, adjusted, self.temperature, self.contrast_weight, self.gamma,
                             more=more)
        return dict(loss=loss, output=logits[:, 0], keys=keys, labels=labels)


class KeyEncoderMixin:
    """Mixin for a `QueueTask` whose keys come from a slowly moving copy of the module.

    Args:
        model, counts: As those of `ContrastiveTask`.
        key_momentum: m.
        **kwargs: Other arguments of the task.
    """

    def __init__(self, model: ProjectedModule, counts: Sequence[int], key_momentum: float = 0.999, **kwargs):
        super().__init__(model, counts, **kwargs)
        self.memory['key'] = KeyEncoder(model, key_momentum)

    def after_step(self) -> None:
        """Move the encoder of the keys."""
        self.memory.key.follow(unwrap_model(self.get_trainable_module()))


class ParametricContrastTask(KeyEncoderMixin, SharedEncoderTask):
    """Class logits and similarities to features in one softmax (PaCo; arXiv 2107.12028).

    The first view is the anchor, the second one's features are keys of a slow encoder.

    Args:
        model, counts, key_momentum, **kwargs: As those of `KeyEncoderMixin` and `SharedEncoderTask`.
    """

    def forward(self, views: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """`loss` and (B, C) `output` of two views, each (B, c, H, W); `keys` and `labels` for the queue."""
        module = self.trainable_module
        features, keys = module.encode(views[0]), self.memory.key(views[1])
        more = gather(keys, self.padding), gather(labels, self.padding, fill=-1)
        return self.parametric(module.classify(features)[:, None], module.project(features)[:, None], labels, keys, more)


class KPositiveTask(KeyEncoderMixin, QueueTask):
    """InfoNCE with up to k positives of the anchor's class from the queue (KCL; OpenReview OqtLIabPTit), and a probe.

    The backbone's classifier learns as that of `SupConTask`.

    Args:
        model, counts, key_momentum: As those of `KeyEncoderMixin`.
        contrast_temperature: T.
        queue_size: K.
        positives: k.
    """

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float = 0.07,
                 queue_size: int = 4096, key_momentum: float = 0.999, positives: int = 6):
        super().__init__(model, counts, key_momentum, contrast_temperature=contrast_temperature, queue_size=queue_size)
        self.positives = positives

    def forward(self, views: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            views: Query and key view, each (B, c, H, W).
            targets: (B,) labels, and (K,) random numbers that pick the positives.

        Returns:
            Scalars `loss`, `loss_c` of the probe and `loss_con`, (B, C) `output`; `queries`, `keys`, `labels` for the queue.
        """
        module, (labels, uniform), queue = self.trainable_module, targets, self.memory.queue
        features, keys = module.encode(views[0]), self.memory.key(views[1])
        logits, queries = module.classify(features.detach()), module.project(features)
        loss_c = self.balanced_softmax(logits, labels)
        picked = pick_positives(labels, queue.labels, self.positives, uniform, positions(len(labels), labels.device))
        loss_con = self.key_loss(queries, keys, queue.keys, queue.labels, picked, self.temperature, labels)
        return dict(loss=loss_c + loss_con, loss_c=loss_c, loss_con=loss_con, output=logits, queries=queries, keys=keys,
                    labels=labels)

    def key_loss(self, *args) -> Tensor:
        """`losses.contrastive.k_positive_contrastive` without the labels, which come last."""
        return k_positive_contrastive(*args[:-1])


class TargetedTask(KPositiveTask):
    """KCL, whose classes are drawn to fixed targets in the second half of the epochs (TSC; arXiv 2111.13998).

    Args:
        target_weight: λ.
        model, counts, **kwargs: As those of `KPositiveTask`.
    """

    start = 0.5  # fraction of the epochs

    def __init__(self, model: ProjectedModule, counts: Sequence[int], target_weight: float = 0.2, **kwargs):
        super().__init__(model, counts, **kwargs)
        self.target_weight = target_weight
        self.memory['targets'] = Targets(len(counts), self.width)
        self.register_buffer('active', torch.zeros(()), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Switch the targets on when it is time to, and assign them to the classes anew in each epoch."""
        self.active.fill_(progress >= self.start)
        if progress >= self.start:
            self.memory.targets.assign(progress)

    def after_batch(self, outputs: dict[str, Tensor]) -> None:
        """Enqueue the keys of all processes, and move the centroids towards their queries."""
        (queries, keys), labels, accept = self.gathered(outputs, 'queries', 'keys')
        self.memory.queue.enqueue(keys, labels, accept)
        self.memory.targets.follow(queries, labels, accept)

    def key_loss(self, *args) -> Tensor:
        return targeted_contrastive(*args, self.memory.targets.of_classes(), self.target_weight, self.active)
