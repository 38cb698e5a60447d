"""A backbone with a projector to unit features, and the memory of contrastive methods: a slow copy and a queue of keys."""
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmc.models.classifier import linear_classifier, no_autocast


class ProjectedModule(nn.Module):
    """A timm backbone with its own classifier and, for training only, a projector to unit features z.

    Args:
        backbone: Any timm model whose classifier is one linear layer on the pooled features.
        projection_dim: d of the projector.
        projection_hidden: Width of its hidden layers; None for that of the features.
        layers: Number of its hidden layers.
        norm: Whether BatchNorm follows its hidden layers.
        prototypes: Whether an MLP of the same shape turns the classifier's rows into prototypes of the classes (BCL).

    Raises:
        InputError: If the classifier is something else.
    """

    def __init__(self, backbone: nn.Module, projection_dim: int = 128, projection_hidden: int | None = None,
                 layers: int = 1, norm: bool = False, prototypes: bool = False):
        super().__init__()
        linear_classifier(backbone)
        self.backbone = backbone
        width = backbone.head_hidden_size
        hidden = [projection_hidden or width] * layers
        self.projector = mlp(width, hidden, projection_dim, norm)
        self.prototyper = mlp(width, hidden, projection_dim, norm) if prototypes else None

    def encode(self, images: Tensor) -> Tensor:
        """(B, D) pooled features r."""
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)

    def classify(self, features: Tensor) -> Tensor:
        """(B, C) logits of the backbone's own classifier."""
        return self.backbone.get_classifier()(features)

    def project(self, features: Tensor) -> Tensor:
        """(B, d) unit features z of (B, D) features, in float32 whatever autocast says."""
        return unit(self.projector, features)

    def prototypes(self) -> Tensor:
        """(C, d) unit prototypes of the classes."""
        return unit(self.prototyper, self.backbone.get_classifier().weight)

    def forward(self, images: Tensor) -> Tensor:
        """(B, d) unit features z of (B, c, H, W) images."""
        return self.project(self.encode(images))


def mlp(width: int, hidden: list[int], out: int, norm: bool) -> nn.Sequential:
    """Linear layers with ReLU, and BatchNorm before it with `norm`, between them."""
    layers, widths = [], [width, *hidden]
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out))


def unit(layers: nn.Module, features: Tensor) -> Tensor:
    """Outputs of layers scaled to norm 1; both in the precision of the layers' weights."""
    with no_autocast(features):
        return F.normalize(layers(features.to(next(layers.parameters()).dtype)), dim=1)


class KeyEncoder(nn.Module):
    """A copy of a module that follows it slowly, θ' ← m·θ' + (1-m)·θ (MoCo; arXiv 1911.05722, Eq. 2).

    No optimizer, average or gradient includes it. Its BatchNorm statistics are its own.

    Args:
        module: Module to copy.
        momentum: m.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.999):
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Move the copy a step towards the module, in place."""
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - self.momentum)

    def forward(self, images: Tensor) -> Tensor:
        """Output of the copy, without a gradient."""
        with torch.no_grad():
            return self.module(images)


class Queue(nn.Module):
    """The last K features and their labels, first in, first out; an empty slot has label -1.

    Args:
        size: K.
        width: d.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer('keys', torch.zeros(size, width))
        self.register_buffer('labels', torch.full((size,), -1))
        self.register_buffer('pointer', torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor, accept: Tensor) -> None:
        """Write features over the oldest ones, in place; nothing waits for the device.

        Args:
            keys: (n, d) features, any n.
            labels: (n,) labels; rows of label -1 come last and are not written.
            accept: Scalar bool; false leaves the queue as it is.
        """
        size, number = len(self.labels), len(labels)
        place = ((self.pointer + torch.arange(number, device=labels.device)) % size)[-size:]
        keys, labels, valid = keys[-size:].to(self.keys.dtype), labels[-size:], labels >= 0
        write = valid[-size:] & accept
        self.keys.index_copy_(0, place, torch.where(write[:, None], keys, self.keys[place]))
        self.labels.index_copy_(0, place, torch.where(write, labels, self.labels[place]))
        self.pointer.copy_((self.pointer + torch.where(accept, valid.sum(), 0)) % size)
