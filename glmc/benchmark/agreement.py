"""Comparison of losses and gradients between the plain loop and the training step."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from glmc.benchmark.measure import Benchmark
from glmc.benchmark.plain import plain_loss, plain_model
from glmc.config import PRECISIONS
from glmc.errors import InputError
from glmc.evaluation.text import aligned
from glmc.losses.glmc import class_weights

TERMS = ('loss', 'loss_c', 'loss_cb', 'loss_sim')
LOSS_TOLERANCE = {'no': 1e-5, 'fp16': 2 ** -9, 'bf16': 2 ** -7}  # relative to max(|loss of plain|, 1)
GRADIENT_TOLERANCE = {'no': 0.02, 'fp16': 0.25, 'bf16': 0.5}  # relative norm; ReLUs near 0 change sides with the last bit


def compare_loss(bench: Benchmark) -> dict:
    """Compare losses and gradients of `plain` and `run` on the same images and mixture, and print them.

    α is 0.75, so that every term counts. Dropout is off. With --joint-forward BatchNorm is in evaluation mode, because
    the two sides have other batches.

    Returns:
        agrees, precision, tolerance, losses of `plain`, and of `eager` and `compiled` with the differences from plain.

    Raises:
        InputError: If the plain loop does not support the options.
    """
    setup, args = bench.setup, bench.args
    if args.method != 'glmc' or args.partner != 'sampler' or args.reprob:
        raise InputError('--compare-loss: expected --method glmc, --partner sampler and no --reprob')
    precision = setup.accelerator.mixed_precision
    loss_tolerance, gradient_tolerance = LOSS_TOLERANCE[precision], GRADIENT_TOLERANCE[precision]
    setup.task.set_progress(0.5)
    plain, plain_gradient = _plain_losses(bench)
    steps = {'eager': setup.train_step.forward, **({'compiled': setup.train_step} if args.torchcompile else {})}
    result = dict(precision=PRECISIONS[precision], tolerance=loss_tolerance, plain=plain, agrees=True)
    rows = [['', 'loss', 'difference', 'of gradient'], ['plain', f"{plain['loss']:.7f}", '', ''],
            ['tolerance', '', f'{loss_tolerance:.2g}', f'{gradient_tolerance:g}']]
    for name, train_step in steps.items():
        losses, gradient = _run_losses(bench, train_step)
        difference = {term: abs(losses[term] - plain[term]) / max(abs(plain[term]), 1) for term in TERMS}
        of_gradient = ((gradient - plain_gradient).norm() / plain_gradient.norm()).item()
        result[name] = dict(losses, difference=difference, gradient_difference=of_gradient)
        result['agrees'] &= max(difference.values()) <= loss_tolerance and of_gradient <= gradient_tolerance
        rows.append([name, f"{losses['loss']:.7f}", f'{max(difference.values()):.2g}', f'{of_gradient:.2g}'])
    setup.task.set_progress(0.0)
    setup.train_step.train()
    verdict = 'plain and run agree' if result['agrees'] else 'plain and run DO NOT AGREE'
    print(f'{aligned(rows)}\nIn {PRECISIONS[precision]}, {verdict}.\n', flush=True)
    return result


def _plain_losses(bench: Benchmark) -> tuple[dict[str, float], Tensor]:
    setup, (views, labels), mixture = bench.setup, bench.batch, bench.mixture()
    mean, std = (torch.tensor(setup.data_config[name], device=bench.device).view(-1, 1, 1) for name in ('mean', 'std'))
    views = [((view.contiguous().float() / 255) - mean) / std for view in views.flatten(1, 2).unbind(1)]
    weight = class_weights(setup.data.profile.counts, bench.args.reweight_power).to(bench.device)
    mixture = mixture.lam.item(), mixture.local_lam.item(), mixture.box.tolist()
    model = plain_model(setup)
    with _deterministic(model, bench):
        return _with_gradient(
            lambda: plain_loss(model, views, labels.unbind(1), mixture, weight, setup.task.alpha.item(),
                               bench.args.consistency_weight, setup.task.mean_weight), model)


def _run_losses(bench: Benchmark, train_step: Callable) -> tuple[dict[str, float], Tensor]:
    model = bench.setup.task.get_trainable_module()
    with _deterministic(model, bench):
        return _with_gradient(lambda: train_step(*bench.batch, bench.mixture()), model)


def _with_gradient(compute_losses: Callable[[], dict[str, Tensor]], model: nn.Module) -> tuple[dict[str, float], Tensor]:
    """Losses of TERMS and the gradient of the total loss as one float64 vector."""
    losses = compute_losses()
    losses['loss'].backward()
    gradient = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    model.zero_grad()
    return {term: losses[term].item() for term in TERMS}, gradient


@contextmanager
def _deterministic(model: nn.Module, bench: Benchmark) -> Iterator[None]:
    """Turn off Dropout and TensorFloat-32, and BatchNorm's batch statistics with --joint-forward."""
    kinds = (nn.modules.dropout._DropoutNd, DropPath, PatchDropout)
    kinds = (*kinds, nn.modules.batchnorm._BatchNorm) if bench.args.joint_forward else kinds
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(precision)
        for module in modules:
            module.train()
