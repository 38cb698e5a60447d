"""Frozen parameters and BatchNorm statistics of a backbone."""
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from glmc.cli import nearest
from glmc.errors import InputError

BatchNorm = nn.modules.batchnorm._BatchNorm  # the base class of all of torch's and timm's


def freeze(backbone: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of the patterns, such as `blocks.0.*`, in place.

    Raises:
        InputError: If a pattern matches no parameter, or none remains to be trained.
    """
    names = [name for name, _ in backbone.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f'--freeze {pattern}: matches no parameter of the model, expected a pattern of names such as '
                             f'{names[0]}{nearest(pattern, names)}')
    for name, parameter in backbone.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise InputError(f"--freeze {' '.join(patterns)}: matches every parameter, expected some to be trained")


def frozen_norms(backbone: nn.Module, all_norms: bool) -> list[nn.Module]:
    """BatchNorm layers that keep their running statistics: those without a trained parameter, or all of them.

    Args:
        backbone: Backbone with frozen parameters.
        all_norms: Whether every layer keeps its statistics.
    """
    norms = [module for module in backbone.modules() if isinstance(module, BatchNorm)]
    return [norm for norm in norms
            if all_norms or (norm.affine and not any(parameter.requires_grad for parameter in norm.parameters()))]
