"""Creation of timm backbones."""
import difflib

import timm
from timm.models import load_checkpoint, resolve_model_input_args
from torch import nn

from glmc.errors import InputError, first_line


def create_backbone(
        name: str, num_classes: int, img_size: int | None = None, in_chans: int | None = None,
        checkpoint_path: str | None = None, **kwargs) -> nn.Module:
    """Create a timm model, with the image size for models that need it, and errors a user can act on.

    Args:
        name: timm architecture, `hf-hub:…` or `local-dir:…`.
        num_classes: C classes.
        img_size: Side in pixels; None for the model's own.
        in_chans: Image channels; None for the model's own.
        checkpoint_path: Weights to start from (`--initial-checkpoint`).
        **kwargs: More arguments of `timm.create_model`; None is omitted.

    Raises:
        InputError: If timm does not know the model or cannot create it with these options.
    """
    if ':' not in name and not timm.is_model(name.split('.')[0]):
        nearest = ', '.join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3)) or 'none'
        raise InputError(f'--model {name}: not a model of timm {timm.__version__}; nearest: {nearest}')
    try:
        kwargs = resolve_model_input_args(name, dict(img_size=img_size, in_chans=in_chans), **kwargs)
        model = timm.create_model(**{**kwargs, 'num_classes': num_classes})  # config.json of a folder has its own
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise InputError(f'--model {name}: timm cannot create it with these options: {first_line(error)}') from error
    if checkpoint_path:
        _load_initial_checkpoint(model, checkpoint_path)
    return model


def _load_initial_checkpoint(model: nn.Module, path: str) -> None:
    try:
        load_checkpoint(model, path, weights_only=True)
    except Exception as error:  # a foreign file makes torch and safetensors raise anything
        raise InputError(
            f'--initial-checkpoint {path}: expected weights of this model, found: {first_line(error)}') from error

