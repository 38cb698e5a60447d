"""Sharpness-aware minimisation (SAM; Foret et al., arXiv 2010.01412), which neither torch nor timm has."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glmc.training.engine import backward, step_mixture


def sam_batch(
        accelerator: Accelerator, train_step: nn.Module, views: Tensor, labels: Tensor, rng: np.random.Generator,
        sync: bool = True, divisor: float = 1, *, rho: float) -> dict[str, Tensor]:
    """The gradient of L at w + ε, ε = ρ·g/‖g‖ and g the gradient of the ascent loss at w (arXiv 2010.01412, Eq. 2-3).

    Both passes see the same images in the same mixture; drop-out draws anew. Each process climbs along its own gradient
    (m-sharpness, section 4.1), and the gradients of the descent are exchanged. Weights and statistics are left as one
    plain pass at w leaves them.

    Args:
        accelerator, train_step, views, labels, rng, divisor: As of `engine.train_batch`.
        sync: True: an update is one batch.
        rho: ρ, length of the ascent.

    Returns:
        The task's losses at w, on the device.

    Raises:
        ValueError: If an update is more than one batch.
    """
    if not sync:
        raise ValueError('sam_batch: an update is one batch, expected accum_steps 1')
    task = accelerator.unwrap_model(train_step).task
    module = task.get_trainable_module()
    inputs = views, labels, step_mixture(train_step, views, rng)
    with accelerator.no_sync(train_step):
        losses = train_step(*inputs)
        accelerator.backward(task.classification_loss(losses))
    losses = {name: value.detach().clone() for name, value in losses.items()}  # a compiled second pass may reuse the memory
    # BatchNorm's running statistics are those of the first pass, at w, which is what is evaluated; not of w + ε. Put back
    # instead of switched off, so that both passes are one compiled graph.
    with restored(list(module.buffers())), perturbed(module, rho) as norm:
        # Where g is not finite, neither is the gradient: all processes see it after the exchange, and skip the update.
        backward(accelerator, train_step(*inputs)['loss'] / divisor, losses['loss'], norm)
    return losses


@contextmanager
def perturbed(module: nn.Module, rho: float) -> Iterator[Tensor]:
    """Weights at w + ρ·g/‖g‖ inside, for their gradients g, which are used up; bit for bit w again outside.

    Weights without a gradient stay. Yields ‖g‖, a scalar.
    """
    weights = [parameter for parameter in module.parameters() if parameter.grad is not None]
    with restored(weights):  # w + ε - ε would be w but for rounding
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
    """Tensors outside bit for bit as they were, whatever is done to them inside."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        if before:
            with torch.no_grad():
                torch._foreach_copy_(tensors, before)
