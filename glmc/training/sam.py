"""Sharpness-aware minimisation (SAM; Foret et al., arXiv 2010.01412), which neither torch nor timm has."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glmc.training.engine import backward, mixture_params


def sam_batch(
        accelerator: Accelerator, train_step: nn.Module, views: Tensor, labels: Tensor, rng: np.random.Generator,
        sync: bool = True, divisor: float = 1, *, rho: float) -> dict[str, Tensor]:
    """Gradient of L at w + ε, ε = ρ·g/‖g‖, with g the gradient of the task's `classification_loss` at w (Eq. 2-3).

    Both passes see the same images in the same mixture; drop-out draws anew. Each process perturbs along its own gradient
    (m-sharpness, section 4.1); the gradients at w + ε are exchanged. Weights and running statistics end as after one plain
    pass at w.

    Args:
        accelerator, train_step, views, labels, rng, divisor: As those of `engine.train_batch`.
        sync: True: an update is one batch.
        rho: ρ, length of the perturbation.

    Returns:
        The dict of the task at w, detached, on the device.

    Raises:
        ValueError: If an update is more than one batch.
    """
    if not sync:
        raise ValueError('sam_batch: an update is one batch, expected accum_steps 1')
    task = accelerator.unwrap_model(train_step).task
    module = task.get_trainable_module()
    inputs = views, labels, mixture_params(train_step, views, rng)
    with accelerator.no_sync(train_step):
        outputs = train_step(*inputs)
        accelerator.backward(task.classification_loss(outputs))
    # Cloned, because a compiled second pass may reuse the memory.
    outputs = {name: value.detach().clone() for name, value in outputs.items()}
    # BatchNorm's running statistics are those of the pass at w, which is evaluated. Restoring them instead of switching them
    # off keeps both passes one compiled graph.
    with restored(list(module.buffers())), perturbed(module, rho) as norm:
        # If g is not finite, neither is the gradient: all processes see it after the exchange, and skip the update.
        backward(accelerator, train_step(*inputs)['loss'] / divisor, outputs['loss'], norm)
    task.after_batch(outputs)
    return outputs


@contextmanager
def perturbed(module: nn.Module, rho: float) -> Iterator[Tensor]:
    """Weights moved to w + ρ·g/‖g‖ within the block, and bit for bit w after it; their gradients g are dropped.

    Weights without a gradient do not move. Yields ‖g‖, a scalar.
    """
    weights = [parameter for parameter in module.parameters() if parameter.grad is not None]
    with restored(weights):  # w + ε - ε would differ from w by rounding
        yield perturb_(weights, rho)


@torch.no_grad()
def perturb_(weights: Sequence[Tensor], rho: float) -> Tensor:
    """Move weights by ρ·g/‖g‖, drop their gradients g, and return ‖g‖, a scalar."""
    gradients = [weight.grad for weight in weights]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_add_(weights, torch._foreach_mul(gradients, rho / (norm + 1e-12)))
    for weight in weights:
        weight.grad = None
    return norm


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the tensors, bit for bit, after the block."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        if before:
            with torch.no_grad():
                torch._foreach_copy_(tensors, before)
