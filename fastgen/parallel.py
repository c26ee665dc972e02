"""What several processes share. One process: every function is the identity.

A network whose weights are split over them (``fastgen.sharding``) holds a ``DTensor`` for each, of which a process has
some rows: those that ``torch.chunk`` along the first dimension gives it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 64 * 2**20  # elements: one message per 256 MiB of float32
_PATIENCE = timedelta(days=7)
_apart = False


def device() -> torch.device:
    """This process's device, after a launcher's processes have found each other: ``accelerate launch``, ``torchrun``.

    On a machine without an accelerator, or with ACCELERATE_USE_CPU set, that is the CPU, and they talk over gloo.
    """
    from accelerate import PartialState

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return PartialState(cpu=on_cpu or not torch.accelerator.is_available()).device  # type: ignore[no-any-return]


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def together() -> bool:
    """Whether there are other processes, and this one works with them."""
    return size() > 1 and not _apart


@contextmanager
def alone() -> Iterator[None]:
    """Within it nothing is shared with the other processes, which meanwhile go on or wait in ``waiting``."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


@contextmanager
def waiting() -> Iterator[None]:
    """On leaving it without an error, wait for the slowest process, be it for hours."""
    if not together():
        yield
        return
    group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)  # made before the wait: this itself has no patience
    yield
    dist.barrier(group)
    dist.destroy_process_group(group)


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
    if not together():
        return
    parameters = [p for p in parameters if not is_sharded(p)]  # theirs are summed when they are split up
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
    if together():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them together, those of split weights included: one number, the same in each process."""
    norm = torch.nn.utils.get_total_norm([local(t) for t in tensors])
    if not any(is_sharded(t) for t in tensors):
        return norm
    return sum_over_processes(norm.square()).sqrt()


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers, so that random initial weights agree.

    Weights without values and those that are split up are left as they are.
    """
    if together():
        for tensor in [*module.parameters(), *module.buffers()]:
            if not (tensor.is_meta or is_sharded(tensor)):
                dist.broadcast(tensor.data, 0)


def barrier() -> None:
    """Wait for all processes."""
    if together():
        dist.barrier()


def first_of(found: str) -> str:
    """The first text that is not empty, by the processes' numbers, in all of them."""
    if not together():
        return found
    each: list[Any] = [None] * size()
    dist.all_gather_object(each, found)
    return next((text for text in each if text), "")


# Weights that are split up


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds some rows of it."""
    if type(tensor) in (Tensor, nn.Parameter) or not dist.is_available():  # the import takes seconds
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a split tensor, in the same memory; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    split: Any = tensor
    found: Tensor = split.to_local()
    return found


def rows(count: int) -> slice:
    """Those of ``count`` rows that this process has of a split tensor."""
    each = -(-count // size())
    return slice(min(rank() * each, count), min((rank() + 1) * each, count))


def like(own: Tensor, whole: Tensor) -> Tensor:
    """This process's rows as a tensor that is split as ``whole`` is."""
    from torch.distributed.tensor import DTensor

    split: Any = whole
    return DTensor.from_local(
        own, split.device_mesh, split.placements, run_check=False, shape=split.shape, stride=split.stride()
    )


@torch.no_grad()
def gathered(own: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A split tensor of this shape, of which ``own`` are this process's rows, put together in the main process."""
    each = -(-shape[0] // size())
    padded = own.new_zeros((each, *shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(size())] if rank() == 0 else None
    dist.gather(padded, parts, 0)
    return torch.cat(parts)[: shape[0]] if parts else None


def units(network: nn.Module) -> list[Any]:
    """The parts of a network that are split up each by themselves, itself included; none if it is not split up."""
    if size() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def reshard(network: nn.Module) -> None:
    """Drop what is put together of a network's weights: it is in the way where they or what learns change."""
    for unit in units(network):
        unit.reshard()
