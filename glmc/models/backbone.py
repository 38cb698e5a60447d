"""Creation of timm backbones."""
import difflib
import logging

import timm
from timm.models import load_state_dict, resolve_model_input_args
from torch import nn

from glmc.errors import InputError, first_line

_logger = logging.getLogger(__name__)


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
    """Load weights; a classifier of another shape keeps its initialisation."""
    try:
        state, own = load_state_dict(path, weights_only=True), model.state_dict()
        heads = model.pretrained_cfg.get('classifier') or ()
        prefixes = tuple(f'{head}.' for head in ([heads] if isinstance(heads, str) else heads))
        unused = [name for name, value in state.items()
                  if name.startswith(prefixes) and name in own and value.shape != own[name].shape]
        missing, unexpected = model.load_state_dict({n: v for n, v in state.items() if n not in unused}, strict=False)
        wrong = [name for name in (*missing, *unexpected) if name not in unused]
        if wrong:
            raise RuntimeError(f"{'no' if wrong[0] in missing else 'an unknown'} tensor {wrong[0]}, {len(wrong)} in all")
    except Exception as error:  # a foreign file makes torch and safetensors raise anything
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'--initial-checkpoint {path}: expected weights of this model, found: {reason[:300]}') from error
    if unused:
        _logger.info(f"--initial-checkpoint: {', '.join(unused)} of another shape not used, the classifier starts anew")
