"""timm's optimizers for a task: parameter groups, clipping, the learning rate rule, and the mean of the weights (SWA)."""
from inspect import signature

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from glmc.errors import InputError
from glmc.models.classifier import classifier_heads


def scaled_learning_rate(opt: str, global_batch: int, lr_base: float, lr_base_size: int, scale: str | None) -> float:
    """timm's rule: lr_base · global_batch / lr_base_size, or its square root for adaptive optimizers.

    Args:
        opt: Name of the optimizer.
        global_batch: Images per update over all processes.
        lr_base, lr_base_size: Learning rate for that many images an update.
        scale: `linear`, `sqrt`, or None to choose by the optimizer.
    """
    ratio = global_batch / lr_base_size
    scale = scale or ('sqrt' if any(name in opt.lower() for name in ('ada', 'lamb')) else 'linear')
    return lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def create_optimizer(
        model: nn.Module, *, opt: str, lr: float, weight_decay: float, momentum: float, filter_bias_and_bn: bool = False,
        layer_decay: float | None = None, opt_eps: float | None = None, opt_betas: list[float] | None = None,
        opt_kwargs: dict | None = None, fused: bool = False) -> torch.optim.Optimizer:
    """timm's `create_optimizer_v2`; with layer decay, the training heads learn at the full rate.

    `fused` selects torch's fused implementation where the optimizer has one.

    Raises:
        InputError: If timm does not know the optimizer or an argument of it.
    """
    backbone = getattr(model, 'backbone', model)
    heads = [p for name, p in model.named_parameters() if not name.startswith('backbone.')] if backbone is not model else []
    protected = backbone.no_weight_decay() if hasattr(backbone, 'no_weight_decay') else ()
    common = dict(weight_decay=weight_decay, no_weight_decay_list=protected if filter_bias_and_bn else ())
    if layer_decay is not None:
        groups = param_groups_layer_decay(
            backbone, layer_decay=layer_decay, weight_decay_exclude_1d=filter_bias_and_bn, **common)
    elif filter_bias_and_bn:
        groups = param_groups_weight_decay(backbone, **common)
    else:
        groups = [dict(params=list(backbone.parameters()))]
    if heads and filter_bias_and_bn:
        groups.append(dict(params=[p for p in heads if p.ndim > 1]))
        groups.append(dict(params=[p for p in heads if p.ndim <= 1], weight_decay=0.0))
    elif heads:
        groups.append(dict(params=heads))
    extra = {name: value for name, value in (('eps', opt_eps), ('betas', opt_betas)) if value is not None}
    try:
        if fused and 'fused' in signature(get_optimizer_class(opt.split('_')[-1], bind_defaults=False)).parameters:
            extra['fused'] = True
        return create_optimizer_v2(
            groups, opt=opt, lr=lr, weight_decay=weight_decay, momentum=momentum, **{**extra, **(opt_kwargs or {})})
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f'--opt {opt}: {str(error).splitlines()[0]}') from error


def clip_parameters(task: TrainingTask, mode: str) -> list[nn.Parameter]:
    """Parameters whose gradients are clipped: all, or for `agc` all but the classifiers' (arXiv 2102.06171, section 4.1).

    Args:
        task: Task of a backbone with or without training heads.
        mode: `norm`, `value` or `agc`.
    """
    module = unwrap_model(task.get_trainable_module())
    if mode != 'agc':
        return list(module.parameters())
    heads = [*classifier_heads(getattr(module, 'backbone', module)),
             getattr(module, 'classifier', None), getattr(module, 'rebalancer', None)]
    classifiers = {parameter for head in heads if isinstance(head, nn.Module) for parameter in head.parameters()}
    return [parameter for parameter in module.parameters() if parameter not in classifiers]


def averaging_epoch(swa_start: float | None, num_epochs: int) -> int | None:
    """First epoch in the mean of SWA, the first e with e / num_epochs >= swa_start; None without SWA.

    Raises:
        InputError: If no epoch is in the mean.
    """
    if swa_start is None:
        return None
    epoch = next((epoch for epoch in range(num_epochs) if epoch / num_epochs >= swa_start), None)
    if epoch is None:
        raise InputError(f'--swa-start {swa_start:g}: leaves none of {num_epochs} epochs, expected '
                         f'{(num_epochs - 1) / num_epochs:.3g} or less')
    return epoch


def equal_weights(first_update: int) -> dict:
    """Options of timm's moving average that make it the mean of the weights (SWA; Izmailov et al., arXiv 1803.05407).

    The mean is over the weights after this update (0-based) and after each later one: a warm-up with γ = power = 1 has
    decay (n - 1) / n at the nth. Before that, the average is a copy of the weights. BatchNorm statistics are averaged alike.
    """
    return dict(decay=1.0, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0, update_after_step=first_update)
