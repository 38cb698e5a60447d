"""The task of RISDA."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glmc.losses.augmentation import implicit_augmentation
from glmc.losses.classification import DeferredReweighting
from glmc.models.classifier import linear_classifier
from glmc.models.statistics import ClassStatistics
from glmc.tasks.memory import MemoryMixin
from glmc.tasks.single_view import SingleViewTask


class SemanticAugmentationTask(MemoryMixin, SingleViewTask):
    """Cross-entropy, then class weights and implicitly augmented features of rare classes (RISDA; arXiv 2112.07928).

    The last epoch before the second phase sums up means and confusion of the classes. In the second phase, the amounts a and
    b grow with the epochs, and covariances are derived anew before each epoch.

    Args:
        model: A backbone whose classifier is one linear layer.
        counts: (C,) training images per class.
        isda_variance: b at the end of the training.
        isda_shift: a at the end of the training.
        effective_beta, drw_start: As those of `losses.DeferredReweighting`; the second phase starts with the class weights.
    """

    def __init__(self, model: nn.Module, counts: Sequence[int], isda_variance: float = 0.75, isda_shift: float = 0.5,
                 effective_beta: float = 0.9999, drw_start: float = 0.8):
        linear_classifier(model)
        super().__init__(model, counts, DeferredReweighting, effective_beta=effective_beta, drw_start=drw_start)
        self.memory['classes'] = ClassStatistics(counts, model.head_hidden_size)
        self.final = isda_variance, isda_shift
        self.register_buffer('amounts', torch.zeros(2), persistent=False)  # b and a

    def set_progress(self, progress: float) -> None:
        """Set class weights, and amounts and statistics of the augmentation."""
        super().set_progress(progress)
        started = progress >= self.criterion.drw_start
        self.amounts.copy_(torch.tensor(self.final) * (progress if started else 0.0))
        self.memory.classes.begin_epoch(progress, started)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss` of (B, c, H, W) images and (B,) labels, and (B, C) `output`; features and labels for the statistics."""
        model, classes = self.trainable_module, self.memory.classes
        classifier = model.get_classifier()
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = classifier(features)
        augmented = implicit_augmentation(
            logits, classifier.weight, labels, classes.covariance, classes.shift, *self.amounts)
        return dict(loss=self.criterion(augmented, labels), output=logits, features=features.float(), labels=labels,
                    predictions=logits.argmax(1, keepdim=True).float())

    def after_batch(self, outputs: dict[str, Tensor]) -> None:
        """Merge the features of all processes into the statistics."""
        (features, predictions), labels, accept = self.gathered(outputs, 'features', 'predictions')
        self.memory.classes.follow(features, labels, predictions[:, 0].long(), accept)
