"""Low-rank adapters beside frozen weights (LoRA; Hu et al., arXiv 2106.09685), by the optional library peft."""
import copy
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from timm.models import get_model_input_config
from torch import nn

from glmc.cli import nearest
from glmc.errors import InputError, first_line
from glmc.models.classifier import classifier_heads

LAYERS = (nn.Linear, nn.Conv2d)


def add_adapters(backbone: nn.Module, rank: int, targets: Sequence[str] | None = None) -> nn.Module:
    """Freeze a backbone but for its classifier, and add a trained adapter beside each target layer, in place.

    A layer W·x becomes W·x + √r·B·A·x with A ~ N(0, 1/r²) and B = 0. Since E[r·AᵀA] = 1, the first update of plain SGD
    changes W + √r·B·A on average as it would change a trained W. So the learning rate of fine-tuning fits every rank.

    Args:
        backbone: Any timm model with a classifier.
        rank: r.
        targets: Names of linear layers and convolutions, their last words, or patterns such as `blocks.1?.*`. None for
            every such layer that can have an adapter, except the classifier and the convolution that reads the image.

    Returns:
        The backbone.

    Raises:
        InputError: If peft is missing, a target is unknown or cannot have an adapter, or no layer fits.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(f'--lora-rank {rank}: needs pip install peft: {first_line(error)}') from error
    classifier = [parameter for head in classifier_heads(backbone) for parameter in head.parameters()]
    names = choose_layers(backbone, rank, targets)
    config = LoraConfig(r=rank, lora_alpha=rank, use_rslora=True, init_lora_weights='gaussian',
                        target_modules='|'.join(map(re.escape, names)))  # a regular expression: no other layer matches
    backbone.requires_grad_(False)
    inject_adapter_in_model(config, backbone)
    for layer in adapters(backbone).values():
        layer.cast_input_dtype_enabled = False  # autocast casts, without a detour over float32
    for parameter in classifier:
        parameter.requires_grad_(True)
    return backbone


def choose_layers(backbone: nn.Module, rank: int, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that `targets` selects; arguments and errors as those of `add_adapters`."""
    obstacles = find_obstacles(backbone, rank)
    fitting = [name for name, obstacle in obstacles.items() if obstacle is None]
    if targets is None:
        first = backbone.pretrained_cfg.get('first_conv')
        first = first if isinstance(first, (list, tuple)) else (first,)
        chosen = [name for name in fitting if name not in first]
        if not chosen:
            raise InputError(f'--lora-rank {rank}: the model has no layer of a higher rank, expected a lower one, or a '
                             'model with linear layers or convolutions of one group')
        return chosen
    chosen = set()
    for target in targets:
        matched = [name for name in obstacles if is_target(name, target)]
        if not matched:
            words = list(dict.fromkeys(name.rpartition('.')[2] for name in fitting))
            raise InputError(f'--lora-targets {target}: matches no linear layer or convolution of the model, expected names '
                             f"such as {', '.join(words[:6])}{nearest(target, [*words, *obstacles])}")
        suited = [name for name in matched if obstacles[name] is None]
        if not suited:
            raise InputError(f'--lora-targets {target}: {matched[0]} {obstacles[matched[0]]}')
        chosen.update(suited)
    return [name for name in fitting if name in chosen]


def is_target(name: str, target: str) -> bool:
    """Whether a target is a layer's name, its last words, or a pattern of it."""
    return f'.{name}'.endswith(f'.{target}') or fnmatchcase(name, target)


def find_obstacles(backbone: nn.Module, rank: int) -> dict[str, str | None]:
    """Name of each linear layer and convolution -> words that say why it cannot have an adapter of rank r, or None."""
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, LAYERS)}
    classifier = {module for head in classifier_heads(backbone) for module in head.modules()}
    called = called_modules(backbone, layers.values())

    def obstacle(layer: nn.Module) -> str | None:
        full_rank = min(len(layer.weight), layer.weight[0].numel())
        if layer in classifier:
            return 'is the classifier, which is trained without an adapter, expected another layer'
        if type(layer) not in LAYERS:
            return f'is a {type(layer).__name__}, expected a plain linear layer or convolution'
        if isinstance(layer, nn.Conv2d) and (layer.groups, layer.dilation, layer.padding_mode) != (1, (1, 1), 'zeros'):
            return 'is a convolution with groups, dilation or a padding mode, expected one without'
        if layer not in called:
            return 'is never called, since the model reads its weights directly, expected a layer that it calls'
        return None if rank < full_rank else f'has rank {full_rank}, expected a lower --lora-rank than that, found {rank}'
    return {name: obstacle(layer) for name, layer in layers.items()}


@torch.no_grad()
def called_modules(backbone: nn.Module, modules) -> set[nn.Module]:
    """Modules that a forward pass calls; a model may read the weights of the others directly."""
    called, was_training = set(), backbone.training
    hooks = [module.register_forward_hook(lambda module, args, output: called.add(module)) for module in modules]
    size = get_model_input_config(backbone)['input_size']
    try:
        backbone.eval()(torch.zeros(1, *size, device=next(backbone.parameters()).device))
    except Exception as error:  # the models of timm raise anything
        raise InputError(f"--lora-rank: the model cannot take an image of {'x'.join(map(str, size))}: "
                         f'{first_line(error)}') from error
    finally:
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
    return called


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, 'lora_A')}


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Copy a model and merge its adapters into the weights, which gives a plain timm model.

    Returns:
        The copy; the model itself if it has no adapters.
    """
    if not adapters(model):
        return model
    model = copy.deepcopy(model)
    for name, layer in adapters(model).items():
        layer.merge()
        parent, _, own = name.rpartition('.')
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)
