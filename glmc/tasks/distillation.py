"""Self-supervision to distillation (SSD; arXiv 2109.04075): features with a self-supervised term, then a student."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.errors import InputError
from glmc.losses.contrastive import other_classes_contrastive
from glmc.losses.distillation import distillation
from glmc.models.projected import ProjectedModule
from glmc.models.teacher import load_teacher
from glmc.models.two_heads import TwoHeadsModule
from glmc.tasks.base import AuxiliaryHeadsTask
from glmc.tasks.contrastive import KeyEncoderMixin, QueueTask


class SelfSupervisedTask(KeyEncoderMixin, QueueTask):
    """Cross-entropy on the query view and InfoNCE among other classes: stage I of SSD (arXiv 2109.04075).

    Args:
        model, counts, key_momentum: As those of `KeyEncoderMixin`.
        contrast_temperature: T.
        queue_size: K.
    """

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float = 0.2,
                 queue_size: int = 4096, key_momentum: float = 0.999):
        super().__init__(model, counts, key_momentum, contrast_temperature=contrast_temperature, queue_size=queue_size)

    def forward(self, views: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            views: Query and key view, each (B, c, H, W).
            labels: (B,) labels.

        Returns:
            Scalars `loss`, `loss_c` and `loss_con`, (B, C) `output`; `keys` and `labels` for the queue.
        """
        module, queue = self.trainable_module, self.memory.queue
        features, keys = module.encode(views[0]), self.memory.key(views[1])
        logits, queries = module.classify(features), module.project(features)
        loss_c = F.cross_entropy(logits.float(), labels)
        loss_con = other_classes_contrastive(queries, keys, labels, queue.keys, queue.labels, self.temperature)
        return dict(loss=loss_c + loss_con, loss_c=loss_c, loss_con=loss_con, output=logits, keys=keys, labels=labels)


class SoftLabelTask(AuxiliaryHeadsTask):
    """Cross-entropy of one classifier and distillation of another: stage III of SSD (arXiv 2109.04075).

    The backbone's own classifier learns the soft labels of the teacher, and is evaluated and exported as in the paper.

    Args:
        model: Backbone with a second classifier.
        counts: (C,) training images per class.
        teacher: As `name` of `models.teacher.load_teacher`.
        distill_temperature: τ.
    """

    loss_names = ('loss_c', 'loss_kd')

    def __init__(self, model: TwoHeadsModule, counts: Sequence[int], teacher: str | nn.Module | None = None,
                 distill_temperature: float = 2.0):
        super().__init__(verbose=False)
        self.trainable_module = model
        self.teacher = load_teacher(teacher, model.backbone)
        self.temperature = distill_temperature
        self.register_buffer('teacher_digest', self.teacher.digest(), persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`, `loss_c` and `loss_kd` of (B, c, H, W) images and (B,) labels; `output`, the (B, C) soft logits."""
        soft, hard = self.trainable_module(images)
        loss_c = F.cross_entropy(hard.float(), labels)
        loss_kd = distillation(soft, self.teacher(images), self.temperature)
        return dict(loss=loss_c + loss_kd, loss_c=loss_c, loss_kd=loss_kd, output=soft)

    def conventional_classifier(self, ema: bool = False) -> nn.Linear:
        return unwrap_model(self.get_trainable_module(ema)).classifier

    def reference_models(self, ema: bool = False) -> dict[str, nn.Module]:
        """`teacher`: the teacher on the images of the student."""
        return dict(teacher=self.teacher)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """The classifier of the hard labels, and a hash of the teacher, which is not stored."""
        return {**super().get_task_state(module, ema), 'teacher_digest': self.teacher_digest}

    def load_task_state(
            self, state: dict[str, Tensor], strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        """Load the state.

        Raises:
            InputError: If it comes from a run with another teacher.
        """
        others = {name: value for name, value in state.items() if name != 'teacher_digest'}
        if not torch.equal(state['teacher_digest'].cpu(), self.teacher_digest.cpu()):
            raise InputError('--teacher: found other weights than those of the interrupted run, expected the same model')
        super().load_task_state(others, strict, module, ema)
