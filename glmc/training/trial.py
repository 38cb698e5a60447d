"""One training step on zeros before the data is read, so that options that cannot train are refused at once."""
import copy
import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glmc.data.loaders import seeded
from glmc.errors import InputError, first_line
from glmc.training.engine import TrainStep, mixture_params, step_generator

_logger = logging.getLogger(__name__)
SMALL = 2  # images of the step with values


def failed_step(
        train_step: TrainStep, accelerator: Accelerator, batch_size: int, images: int, views: int,
        input_size: tuple[int, int, int]) -> str | None:
    """Try a forward and backward pass of a copy of the step on zeros.

    The first try is on the meta device, which computes shapes only. A failure there counts only if a step with values, of at
    most two images on the run's device, fails too. Weights, statistics and random numbers of the run do not change.

    Args:
        train_step: The step, not compiled and not distributed.
        accelerator: Device and precision.
        batch_size: Images per process and step.
        images, views: Images per sample, and views of each.
        input_size: (c, H, W).

    Returns:
        First line of the error; None if the step works, or cannot be copied.
    """
    def run(device: torch.device, count: int) -> None:
        step = copy_to(train_step, device)
        for norm in step.modules():
            if isinstance(norm, nn.SyncBatchNorm):
                norm.eval()  # it would wait for the other processes
        pixels = torch.zeros(count, images, views, *input_size, dtype=torch.uint8, device=device)
        labels = torch.zeros(count, images, dtype=torch.int64, device=device)
        step(pixels, labels, mixture_params(step, pixels, step_generator(0, 0, 0)))['loss'].backward()
    with seeded(0):
        if _error(lambda: run(torch.device('meta'), batch_size)) is None:
            return None
        try:
            copy_to(train_step, accelerator.device)
        except Exception:  # some parametrisations cannot be copied
            return None
        with accelerator.autocast():
            return _error(lambda: run(accelerator.device, min(batch_size, SMALL)))


def copy_to(module: nn.Module, device: torch.device) -> nn.Module:
    """Copy a module to a device, in training mode with the same frozen layers; on the meta device without its values."""
    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if device.type == 'meta' else tensor.detach().to(device, copy=True)
    memo: dict = {id(p): nn.Parameter(moved(p), requires_grad=p.requires_grad) for p in module.parameters()}
    memo.update({id(buffer): moved(buffer) for buffer in module.buffers()})
    return copy.deepcopy(module, memo).train()


def require_updates(
        create_optimizer: Callable[[nn.Module], torch.optim.Optimizer], opt: str, device: torch.device) -> None:
    """Raise an InputError if the optimizer cannot update a small model by plain backward passes.

    Args:
        create_optimizer: Creates the optimizer of the run for a model.
        opt: Its name.
        device: Device of the training.
    """
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)).to(device)
        optimizer, images = create_optimizer(model), torch.randn(4, 3, 3, 3).to(device)

        def update() -> None:
            for _ in range(2):  # state is created in the first
                model(images).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        error = _error(update)
    if error:
        reason = 'needs a closure that repeats the step' if 'closure' in error else f'cannot update a model: {error}'
        raise InputError(f'--opt {opt}: {reason}; expected an optimizer of first-order gradients, such as momentum or adamw')


def _error(action: Callable[[], None]) -> str | None:
    """First line of what an action raises; running out of memory is passed on."""
    try:
        action()
    except (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # models, losses and optimizers raise anything
        return first_line(error)
    return None
