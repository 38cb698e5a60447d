"""Whether the plain loop and the product compute the same losses and gradients."""
from collections.abc import Callable

import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from glmc.benchmark.measure import PRECISION, Benchmark
from glmc.benchmark.plain import plain_loss, plain_model
from glmc.errors import InputError
from glmc.losses.glmc import class_weights

# What the loss of `run` may differ by from that of `plain`, relative to the larger of that and 1, and the gradient in norm.
LOSS_TOLERANCE = {'no': 1e-5, 'fp16': 2 ** -9, 'bf16': 2 ** -7}
GRADIENT_TOLERANCE = {'no': 0.02, 'fp16': 0.25, 'bf16': 0.5}  # ReLUs near 0 change sides with the last bit


def compare_loss(bench: Benchmark) -> dict:
    """Losses of `plain` and of `run` from the same uint8 views, labels, λ, box and weights; printed, too.

    At α = 0.75, so that every term counts. Drop-out is off; BatchNorm is in training mode unless both views are one batch
    for `run` alone.
    """
    setup, args = bench.setup, bench.args
    if args.method != 'glmc' or args.partner != 'sampler' or args.reprob:
        raise InputError('--compare-loss: expected --method glmc, --partner sampler and no --reprob')
    precision = setup.accelerator.mixed_precision
    setup.task.set_progress(0.5)
    expected = _plain_losses(bench)
    found = {'eager': _run_losses(bench, setup.train_step.forward)}
    if args.torchcompile:
        found['compiled'] = _run_losses(bench, setup.train_step)
    result = dict(precision=PRECISION[precision], tolerance=LOSS_TOLERANCE[precision], plain=expected['losses'], agrees=True)
    print(f"{'':10s} {'loss':>12s} {'difference':>12s} {'gradient':>12s}   (tolerance {LOSS_TOLERANCE[precision]:.1g} and "
          f"{GRADIENT_TOLERANCE[precision]:g} in {PRECISION[precision]})")
    print(f"{'plain':10s} {expected['losses']['loss']:12.7f}")
    for name, ours in found.items():
        difference = {term: abs(ours['losses'][term] - value) / max(abs(value), 1)
                      for term, value in expected['losses'].items()}
        gradient = ((ours['gradient'] - expected['gradient']).norm() / expected['gradient'].norm()).item()
        result[name] = dict(ours['losses'], difference=difference, gradient_difference=gradient)
        result['agrees'] &= (max(difference.values()) <= LOSS_TOLERANCE[precision]
                             and gradient <= GRADIENT_TOLERANCE[precision])
        print(f"{name:10s} {ours['losses']['loss']:12.7f} {max(difference.values()):12.2g} {gradient:12.2g}")
    setup.task.set_progress(0.0)
    setup.train_step.train()
    print('they agree\n' if result['agrees'] else 'THEY DO NOT AGREE\n', flush=True)
    return result


def _plain_losses(bench: Benchmark) -> dict:
    setup, (views, labels), mixture = bench.setup, bench.batch, bench.mixture()
    mean, std = (torch.tensor(setup.data_config[name], device=bench.device).view(-1, 1, 1) for name in ('mean', 'std'))
    views = [((view.contiguous().float() / 255) - mean) / std for view in views.flatten(1, 2).unbind(1)]
    weight = class_weights(setup.data.profile.counts, bench.args.reweight_power).to(bench.device)
    mixture = mixture.lam.item(), mixture.local_lam.item(), mixture.box.tolist()
    model = plain_model(setup)
    with _reproducible(model, bench):
        return _with_gradient(
            lambda: plain_loss(model, views, labels.unbind(1), mixture, weight, setup.task.alpha.item(),
                               bench.args.consistency_weight, setup.task.mean_weight), model)


def _run_losses(bench: Benchmark, train_step: Callable) -> dict:
    model = bench.setup.task.get_trainable_module()
    with _reproducible(model, bench):
        return _with_gradient(lambda: train_step(*bench.batch, bench.mixture()), model)


def _with_gradient(losses_of: Callable[[], dict[str, Tensor]], model: nn.Module) -> dict:
    losses = losses_of()
    losses['loss'].backward()
    gradient = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    model.zero_grad()
    return dict(losses={name: losses[name].item() for name in ('loss', 'loss_c', 'loss_cb', 'loss_sim')}, gradient=gradient)


class _reproducible:
    """Nothing random in the model, and no TensorFloat-32 where the comparison is in float32."""

    def __init__(self, model: nn.Module, bench: Benchmark):
        still = (nn.modules.dropout._DropoutNd, DropPath, PatchDropout)
        still = (*still, nn.modules.batchnorm._BatchNorm) if bench.args.joint_forward else still
        self.modules = [module for module in model.modules() if isinstance(module, still)]

    def __enter__(self) -> None:
        self.tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        for module in self.modules:
            module.eval()

    def __exit__(self, *_) -> None:
        torch.backends.cudnn.allow_tf32 = self.tf32
        for module in self.modules:
            module.train()
