"""What the processes of test_processes.py and test_interrupted.py do: ``python -m tests.gpu.child WHAT ...``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastgen import cli, parallel, train
from tests.gpu import world


def ordered() -> None:
    """Sums in a fixed order wherever torch can, in float32."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False


def trained(*words: str) -> None:
    """``fastgen WORDS`` with sums in a fixed order."""
    ordered()
    sys.argv = ["fastgen", *words]
    cli.main()


def gloo(*words: str) -> None:
    """The same, of processes that share one GPU: these cannot talk over NCCL, so their messages go over gloo."""
    dist.init_process_group("gloo")
    trained(*words)


def small(share: str, *words: str) -> None:
    """``fastgen WORDS`` on a GPU of which it may take a share of the memory."""
    torch.cuda.set_per_process_memory_fraction(float(share))
    sys.argv = ["fastgen", *words]
    cli.main()


def reduced(out: str) -> None:
    """A sum over two processes that share one GPU, over NCCL."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    value = torch.full((4,), float(dist.get_rank() + 1), device="cuda")
    dist.all_reduce(value)
    torch.cuda.synchronize()
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(value.tolist()))
    os._exit(0)


def split(out: str, kind: str) -> None:
    """A training of networks that are split over one process by NCCL, or whole; its logs, and what the weights are.

    ``fastgen train`` does not split where there is one process: what keeps it from that is taken out here.
    """
    from torch.distributed.fsdp import FSDPModule

    ordered()
    torch.cuda.set_device(world.CUDA)
    if kind != "whole":
        dist.init_process_group("nccl")
        wanted: Any = kind
        parallel.units = lambda network: [m for m in network.modules() if isinstance(m, FSDPModule)]
        train.sharding_of = lambda recipe: wanted
    given = ("run.batch_size=8", "method.student_every=2", "run.precision=fp32", "model.attention=eager")
    rates = [f"optim.{role}.{what}" for role in ("student", "fake_score") for what in ("eps=1.0e-4", "warmup=0")]
    session = world.built("dmd2_prompts", Path(out), *given, *rates)
    logs = world.turns(session, range(4))
    squares, places = {}, [*session.method.networks.items()]
    for role, network in places:
        for name, p in network.named_parameters():
            squares[f"{role}.{name}"] = float(parallel.local(p.detach()).double().square().sum())
    for role, average in session.ema.items():
        squares |= {f"ema.{role}.{name}": float(t.double().square().sum()) for name, t in average.average.items()}
    found = {
        "logs": logs,
        "squares": squares,
        "split": sum(parallel.is_sharded(p) for _, network in places for p in network.parameters()),
        "peak": torch.cuda.max_memory_allocated(),
    }
    Path(out, f"{kind}.json").write_text(json.dumps(found))
    os._exit(0)  # torch may wait for NCCL's threads


KNOWN = {f.__name__: f for f in (trained, gloo, small, reduced, split)}

if __name__ == "__main__":
    KNOWN[sys.argv[1]](*sys.argv[2:])
