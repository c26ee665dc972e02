"""What several processes share. One process: every function is the identity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 64 * 2**20  # elements: one message per 256 MiB of float32


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 for the main one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if bucket and (count + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, count = [], 0
        bucket.append(tensor)
        count += tensor.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up each parameter's gradient over all processes, in place.

    Done once per update and by hand rather than by DistributedDataParallel: a method calls several networks several
    times in one loss, some of them frozen in this phase and trained in the next, which its reducer does not follow.
    """
    if size() == 1:
        return
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets(p.grad for p in parameters if p.grad is not None):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        for g, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(piece.view_as(g))


@torch.no_grad()
def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, in place, and returned."""
    if size() > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers, so that random initial weights agree."""
    if size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)


def barrier() -> None:
    """Wait for all processes."""
    if size() > 1:
        dist.barrier()
