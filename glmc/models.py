"""Backbone, training-only heads, and the record of what they give for one view."""
import difflib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import timm
import torch
from timm.models import get_model_input_config, load_checkpoint, resolve_model_input_args
from torch import Tensor, nn

from glmc.parsing import InputError


class ViewOutput(NamedTuple):
    """What GLMCModule gives for one view."""
    logits: Tensor | None  # (B, C) conventional classifier; None on balanced data, where there is only one
    rebalanced_logits: Tensor  # (B, C) the backbone's own classifier
    projection: Tensor  # (B, d) h
    prediction: Tensor  # (B, d) u


class GLMCModule(nn.Module):
    """A timm backbone whose own classifier is the rebalanced one, with the heads that only training needs.

    r = E(x); conventional classifier c(r), projection h = proj(r), prediction u = pred(h), all single linear layers
    (GLMC section 3.1). Export keeps the backbone and drops what is beside it.

    Args:
        backbone: Any timm model with a classifier.
        projection_dim: d.
        balanced: Leave out the conventional classifier; the backbone's own takes its place.
        joint_forward: Encode both views as one batch of 2B, BatchNorm statistics over both.

    Raises:
        InputError: If the backbone is an encoder without a classifier.
    """

    def __init__(self, backbone: nn.Module, projection_dim: int = 256, balanced: bool = False,
                 joint_forward: bool = False):
        super().__init__()
        self.single_pass = classifies_pre_logits(backbone)
        self.joint_forward = joint_forward
        self.backbone = backbone
        width = backbone.head_hidden_size
        self.classifier = None if balanced else nn.Linear(width, backbone.num_classes)
        self.projector = nn.Linear(width, projection_dim)
        self.predictor = nn.Linear(projection_dim, projection_dim)

    def forward(
            self, global_view: Tensor, local_view: Tensor,
            shares: tuple[Tensor, Tensor] | None = None) -> tuple[ViewOutput, ViewOutput]:
        """Both views, each (B, c, H, W); each in a forward pass of its own, as in the paper, unless `joint_forward`.

        Two scalars multiply what reaches the encoder of the gradients of the conventional and of the rebalanced classifier;
        the outputs are the same.
        """
        if self.joint_forward:
            both = self.forward_view(torch.cat([global_view, local_view]), shares)
            halves = [(None, None) if output is None else output.chunk(2) for output in both]
            return tuple(ViewOutput(*half) for half in zip(*halves, strict=True))
        return self.forward_view(global_view, shares), self.forward_view(local_view, shares)

    def forward_view(self, images: Tensor, shares: tuple[Tensor, Tensor] | None = None) -> ViewOutput:
        """One view; where the backbone's classifier takes more than the pooled features, its head runs twice, and head
        drop-out draws two masks."""
        features = self.backbone.forward_features(images)
        pre_logits = self.backbone.forward_head(features, pre_logits=True)  # (B, D)
        projection = self.projector(pre_logits)  # (B, d)
        conventional, rebalanced = shares or (None, None)
        logits = None if self.classifier is None else self.classifier(scale_gradient(pre_logits, conventional))
        rebalanced_logits = self.rebalanced_logits(features, pre_logits, rebalanced)
        return ViewOutput(logits, rebalanced_logits, projection, self.predictor(projection))

    def rebalanced_logits(self, features: Tensor | Sequence[Tensor], pre_logits: Tensor, factor: Tensor | None) -> Tensor:
        """(B, C) of the backbone's own classifier, whose gradient to the features is multiplied by `factor`."""
        if self.single_pass:
            return self.backbone.get_classifier()(scale_gradient(pre_logits, factor))
        return self.backbone.forward_head(scale_gradient(features, factor))


def scale_gradient(features: Tensor | Sequence[Tensor], factor: Tensor | None) -> Tensor | Sequence[Tensor]:
    """The same features, to the bit, whose gradient is multiplied by a scalar; None leaves all as it is."""
    if factor is None:
        return features
    if not isinstance(features, Tensor):
        return type(features)(scale_gradient(feature, factor) for feature in features)
    constant = features.detach()
    return constant + factor.to(features.dtype) * (features - constant)


def create_backbone(
        name: str, num_classes: int, img_size: int | None = None, in_chans: int | None = None,
        checkpoint_path: str | None = None, **kwargs) -> nn.Module:
    """`timm.create_model` with the image size passed on to the models that need it, and errors a user can act on.

    Args:
        name: timm architecture, `hf-hub:…` or `local-dir:…`.
        num_classes: C.
        img_size: Side in pixels; None for the model's own.
        in_chans: Image channels; None for the model's own.
        checkpoint_path: Weights to start from (`--initial-checkpoint`).
        **kwargs: For `timm.create_model`; None is left out.

    Raises:
        InputError: If timm does not know the model or cannot create it with these options.
    """
    if ':' not in name and not timm.is_model(name.split('.')[0]):
        nearest = ', '.join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3)) or 'none'
        raise InputError(f'--model {name}: not a model of timm {timm.__version__}; nearest: {nearest}')
    try:
        kwargs = resolve_model_input_args(name, dict(img_size=img_size, in_chans=in_chans), **kwargs)
        model = timm.create_model(num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise InputError(f'--model {name}: timm cannot create it with these options: {_first_line(error)}') from error
    if checkpoint_path:
        _load_initial_checkpoint(model, checkpoint_path)
    return model


def _load_initial_checkpoint(model: nn.Module, path: str) -> None:
    try:
        load_checkpoint(model, path, weights_only=True)
    except Exception as error:  # whatever a foreign file makes torch or safetensors raise
        raise InputError(
            f'--initial-checkpoint {path}: expected weights of this model, found: {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def classifies_pre_logits(backbone: nn.Module) -> bool:
    """Whether classifier(pre_logits) gives the model's own logits, found out once with two random images.

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
                             f"{'x'.join(map(str, images.shape[1:]))}: {_first_line(error)}") from error
        try:
            return torch.equal(classifier(pre_logits), logits)
        except (NotImplementedError, TypeError, IndexError, RuntimeError):  # several heads, a convolution, a pooling head
            return False


def linear_classifier(backbone: nn.Module) -> nn.Linear:
    """The backbone's classifier, one linear layer with a bias on the pooled features.

    Raises:
        InputError: If it is several heads, a convolution, without a bias, or takes more than the pooled features.
    """
    fits = classifies_pre_logits(backbone)
    classifier = backbone.get_classifier()
    if not isinstance(classifier, nn.Linear):
        found = f'{len(classifier)} heads' if isinstance(classifier, tuple) else type(classifier).__name__
    elif not fits:
        found = 'more between the two'
    elif classifier.bias is None:
        found = 'one without a bias'
    else:
        return classifier
    raise InputError(f'--model {_name(backbone)}: expected a classifier that is one linear layer with a bias on the pooled '
                     f'features, found {found}')


@contextmanager
def _random_classifier(backbone: nn.Module, generator: torch.Generator):
    """The backbone in eval mode with a random classifier: with weights of 0, which some start from, wrong looks right."""
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
    """The model with a classifier that computes in float32 whatever autocast says, as long as the block lasts.

    Logits in bfloat16 have 8 bits, and in many an image two classes share the highest one.

    Args:
        model: timm's, or one that passes `get_classifier` on.
    """
    classifier = model.get_classifier()
    parts = classifier if isinstance(classifier, (tuple, nn.ModuleList)) else [classifier]  # some have several heads
    try:
        for part in parts:
            part.forward = _without_autocast(part.forward)
        yield
    finally:
        for part in parts:
            vars(part).pop('forward', None)


def _without_autocast(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def in_float32(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return forward(features.float())
    return in_float32


def _encoder_error(backbone: nn.Module) -> InputError:
    return InputError(f'--model {_name(backbone)}: expected a model with a classifier, found an encoder without one')


def _name(backbone: nn.Module) -> str:
    return backbone.pretrained_cfg.get('architecture', type(backbone).__name__)
