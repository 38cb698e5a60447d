"""A backbone with a second linear classifier on its features."""
from torch import Tensor, nn

from glmc.models.classifier import linear_classifier


class TwoHeadsModule(nn.Module):
    """A timm backbone with its own classifier, for soft labels, and another for hard labels (SSD; arXiv 2109.04075).

    Args:
        backbone: Any timm model whose classifier is one linear layer on the pooled features.

    Raises:
        InputError: If the classifier is something else.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        linear_classifier(backbone)
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.head_hidden_size, backbone.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C) logits of the backbone's own classifier and of the other one, for (B, c, H, W) images."""
        features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        return self.backbone.get_classifier()(features), self.classifier(features)
