"""The classifier of a backbone: checks, changes, and modules with another classifier that folds into it."""
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from glmc.errors import InputError, first_line


@torch.no_grad()
def classifies_pre_logits(backbone: nn.Module) -> bool:
    """Whether classifier(pre_logits) equals the model's own logits, by a test with two random images.

    Raises:
        InputError: If the backbone has no classifier.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *get_model_input_config(backbone)['input_size'], generator=generator)
    with _random_classifier(backbone, generator) as classifier:
        try:
            features = backbone.forward_features(images.to(next(backbone.parameters()).device))
            pre_logits = backbone.forward_head(features, pre_logits=True)
            logits = backbone.forward_head(features)
        except (NotImplementedError, TypeError, AttributeError) as error:
            raise _encoder_error(backbone) from error
        except (RuntimeError, AssertionError) as error:
            raise InputError(f'--model {_name(backbone)}, --img-size: cannot take an image of '
                             f"{'x'.join(map(str, images.shape[1:]))}: {first_line(error)}") from error
        try:
            return torch.equal(classifier(pre_logits), logits)
        except (NotImplementedError, TypeError, IndexError, RuntimeError):  # several heads, a convolution, a pooling head
            return False


def linear_classifier(backbone: nn.Module) -> nn.Linear:
    """Classifier of a backbone that is one linear layer with a bias on the pooled features.

    Raises:
        InputError: If it has several heads, is a convolution, has no bias, or needs more than the pooled features.
    """
    fits = classifies_pre_logits(backbone)
    classifier = backbone.get_classifier()
    if isinstance(classifier, nn.ModuleList):
        found = f'those of {len(classifier)} experts'
    elif not isinstance(classifier, nn.Linear):
        found = f'{len(classifier)} heads' if isinstance(classifier, tuple) else type(classifier).__name__
    elif not fits:
        found = 'other layers between the two'
    elif classifier.bias is None:
        found = 'one without a bias'
    else:
        return classifier
    raise InputError(f'--model {_name(backbone)}: expected a classifier that is one linear layer with a bias on the pooled '
                     f'features, found {found}')


@contextmanager
def _random_classifier(backbone: nn.Module, generator: torch.Generator):
    """Backbone in eval mode with a random classifier; some start with weights of 0, which would pass any test."""
    classifier = backbone.get_classifier() if hasattr(backbone, 'get_classifier') else None
    if classifier is None:
        raise _encoder_error(backbone)
    parameters = list(classifier.parameters()) if isinstance(classifier, nn.Module) else []
    saved = [parameter.clone() for parameter in parameters]
    was_training = backbone.training
    backbone.eval()
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    try:
        yield classifier
    finally:
        backbone.train(was_training)
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)


@contextmanager
def float32_classifier(model: nn.Module):
    """Let the classifier of a model compute in float32 within the block, whatever autocast says.

    Logits in bfloat16 have 8 bits, so that two classes often share the highest one.

    Args:
        model: A timm model, or a wrapper with `get_classifier`.
    """
    heads = classifier_heads(model)
    try:
        for head in heads:
            head.forward = _without_autocast(head.forward)
        yield
    finally:
        for head in heads:
            vars(head).pop('forward', None)


def classifier_heads(model: nn.Module) -> list[nn.Module]:
    """The classifier of a model as a list; some have several heads.

    Raises:
        InputError: If the model has no classifier.
    """
    classifier = model.get_classifier() if hasattr(model, 'get_classifier') else None
    if classifier is None:
        raise _encoder_error(model)
    return list(classifier) if isinstance(classifier, (tuple, nn.ModuleList)) else [classifier]


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Compute in the precision of the tensors within the block; the meta device knows no other."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _without_autocast(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def in_float32(features: Tensor) -> Tensor:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision('highest')  # not TensorFloat-32
        try:
            with no_autocast(features):
                return forward(features.float())
        finally:
            torch.set_float32_matmul_precision(precision)
    return in_float32


def _encoder_error(backbone: nn.Module) -> InputError:
    return InputError(f'--model {_name(backbone)}: expected a model with a classifier, found an encoder without one')


def _name(backbone: nn.Module) -> str:
    base = getattr(backbone, 'base', None)  # of experts
    return base if isinstance(base, str) else backbone.pretrained_cfg.get('architecture', type(backbone).__name__)


class Folding:
    """Mixin for a module whose classifier folds into that of its `backbone`."""

    def folded(self) -> tuple[Tensor, Tensor]:
        """(C, D) weight and (C,) bias of the folded classifier."""
        raise NotImplementedError

    @torch.no_grad()
    def fold(self) -> None:
        """Write the folded classifier into the backbone's own."""
        set_classifier(self.backbone, *self.folded())


class FoldedModule(Folding, nn.Module):
    """A backbone trained with a classifier of another form, which folds into the backbone's own linear one.

    `fold` sets the backbone's own classifier, which is not trained; the backbone alone is evaluated and exported.

    Args:
        backbone: Any timm model whose classifier is one linear layer on the pooled features.

    Raises:
        InputError: If the classifier is something else.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.width, self.num_classes = backbone.head_hidden_size, backbone.num_classes
        linear_classifier(backbone).requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """(B, D) pooled features r."""
        return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)


@torch.no_grad()
def set_classifier(backbone: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Set the (C, D) weight and the (C,) bias of the backbone's linear classifier."""
    set_linear(backbone.get_classifier(), weight, bias)


@torch.no_grad()
def set_linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Set the (C, D) weight and the (C,) bias of a linear layer."""
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


@torch.no_grad()
def cap_norms(weight: Tensor, max_norm: float | Tensor) -> Tensor:
    """(C, D) weights with rows scaled down to norm δ if they are longer (MaxNorm; arXiv 2203.14197, Eq. 5; GLMC Eq. 13)."""
    return weight * (max_norm / weight.norm(dim=1, keepdim=True)).clamp(max=1)


def norm_radius(weight: Tensor, fraction: float = 0.1) -> Tensor:
    """δ = min + fraction·(max - min) of the row norms."""
    low, high = weight.detach().norm(dim=1).aminmax()
    return low + fraction * (high - low)
