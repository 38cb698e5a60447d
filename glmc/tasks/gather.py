"""Rows of all processes, in the order in which one process of the whole batch would have them."""
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives  # unlike torch.distributed.nn, part of a compiled graph
import torch.nn.functional as F
from torch import Tensor

_all_gather = getattr(collectives, 'all_gather_single_autograd', None) or collectives.all_gather_tensor_autograd  # torch 2.6


def rank_and_world() -> tuple[int, int]:
    """Index of this process, and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def missing_rows(number: int, batch_fraction: float) -> int:
    """Rows that this process lacks to the largest of a step.

    Args:
        number: Rows of this process.
        batch_fraction: These over the mean of all processes, as the training loaders yield it.
    """
    world = rank_and_world()[1]
    return -(-round(number * world / batch_fraction) // world) - number


def gather(rows: Tensor, padding: int = 0, fill: float = 0.0) -> Tensor:
    """Rows of all processes, interleaved as `PairSampler` deals them; the gradient of each is the sum over processes.

    Args:
        rows: (n, …) rows of this process, the same n + padding in all of them.
        padding: Rows to add for a process with fewer; they come last.
        fill: Value of these rows.

    Returns:
        (world·(n + padding), …); with one process the rows themselves.
    """
    world = rank_and_world()[1]
    if world == 1:
        return rows
    if padding:
        rows = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, padding), value=fill)
    gathered = _all_gather(rows.contiguous(), 0, dist.group.WORLD)
    return gathered.unflatten(0, (world, len(rows))).transpose(0, 1).flatten(0, 1)


def positions(number: int, device: torch.device) -> Tensor:
    """(n,) place of each row of this process among the gathered ones."""
    rank, world = rank_and_world()
    return torch.arange(number, device=device) * world + rank
