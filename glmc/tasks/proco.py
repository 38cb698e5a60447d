"""The task of ProCo."""
from collections.abc import Sequence

import torch
from torch import Tensor

from glmc.losses.proco import proco_logits
from glmc.models.projected import ProjectedModule
from glmc.models.statistics import ClassDirections, merge_means
from glmc.tasks.contrastive import ContrastiveTask
from glmc.tasks.gather import gather


class ProbabilisticContrastTask(ContrastiveTask):
    """Balanced Softmax on one view, and on two others with logits of class distributions (ProCo; arXiv 2403.06726).

    The features of a view enter the distributions before its loss, as in the authors' code.

    Args:
        model: Backbone with a projector.
        counts, contrast_temperature: As those of `ContrastiveTask`.
        contrast_weight: Weight of the contrastive loss.
    """

    def __init__(self, model: ProjectedModule, counts: Sequence[int], contrast_temperature: float = 0.1,
                 contrast_weight: float = 1.0):
        super().__init__(model, counts, contrast_temperature)
        self.contrast_weight = contrast_weight
        self.memory['classes'] = ClassDirections(len(counts), model.projector[-1].out_features)

    def set_progress(self, progress: float) -> None:
        self.memory.classes.begin_epoch(progress)

    def forward(self, views: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Losses of three views, each (B, c, H, W).

        Returns:
            Scalars `loss`, `loss_c` and `loss_con`, (B, C) `output` of the first view; (B, 2·d) `features` of the others
            and labels for the class distributions.
        """
        module, size = self.trainable_module, len(labels)
        features = module.encode(torch.cat(views))  # (3B, D)
        logits, z = module.classify(features[:size]), module.project(features[size:]).chunk(2)  # two of (B, d)
        loss_c = self.balanced_softmax(logits, labels)
        means, numbers = self.memory.classes.means, self.memory.classes.numbers
        all_labels, losses = gather(labels, self.padding, fill=-1), []
        for view in z:
            means, numbers = merge_means(means, numbers, gather(view.detach(), self.padding), all_labels)
            losses.append(self.balanced_softmax(proco_logits(view, means, self.temperature), labels))
        loss_con = sum(losses) / 2
        return dict(loss=loss_c + self.contrast_weight * loss_con, loss_c=loss_c, loss_con=loss_con, output=logits,
                    features=torch.cat(z, 1), labels=labels)

    def after_batch(self, outputs: dict[str, Tensor]) -> None:
        """Merge the features of all processes into the class distributions."""
        (features,), labels, accept = self.gathered(outputs, 'features')
        for view in features.chunk(2, 1):
            self.memory.classes.follow(view, labels, accept)
