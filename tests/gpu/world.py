"""Sessions on the shipped emoji teacher, and child processes with a limit of time."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import cli, config, train
from fastgen import recipe as recipes
from fastgen.method import Phase
from fastgen.train import Session
from tests.gpu.report import ROOT

CONFIGS = ROOT / "configs" / "emoji"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
QUICK = ("eval.every=0", "model.path=assets:emoji/teacher", "run.trackers=[]")
"""Changes to every config: no judging on the way, and the shipped teacher."""


def methods() -> list[str]:
    """The configs of configs/emoji that train by a method, each different training once."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        tree = config.read(path)
        if "method" in tree:
            found[path.stem] = {key: tree.get(key) for key in ("method", "student", "data")}
    return [
        name for name, what in found.items() if name != "demo" or what not in (found[n] for n in found if n != name)
    ]


def tree(name: str, folder: Path, *changes: str) -> dict[str, Any]:
    """The config ``emoji/NAME``; a few pairs are made in ``folder`` if it trains on them."""
    changed = config.override(config.read(CONFIGS / f"{name}.yaml"), [*QUICK, f"run.out={folder / name}"])
    return cli.by_itself(config.override(changed, changes), folder)


def built(name: str, folder: Path, *changes: str, device: torch.device | None = None) -> Session:
    """A session of the config, on the GPU if no other device is named."""
    made = recipes.decode(tree(name, folder, *changes), name)
    return train.build(made, device or CUDA)


def turns(session: Session, steps: Sequence[int]) -> list[dict[str, float]]:
    """Train, with the averages of weights, and return each step's logs."""
    logs = []
    for _, log in session.engine.run(steps):
        for average in session.ema.values():
            average.update()
        logs.append(log)
    return logs


def weights(session: Session) -> dict[str, Tensor]:
    """A copy on the CPU of all that learns or moves, and of averages."""
    engine, found = session.engine, dict[str, Tensor]()
    for role in (*engine.parameters, *engine.moving):
        found |= {f"{role}.{n}": p.detach().cpu().clone() for n, p in engine.method.networks[role].named_parameters()}
    for role, average in session.ema.items():
        found |= {f"ema.{role}.{n}": t.cpu().clone() for n, t in average.average.items()}
    return found


def largest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of tensors with the same names."""
    assert one.keys() == other.keys()
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """|one - other| / |other| of all together."""
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one, other, strict=True))
    size = sum(float(b.double().square().sum()) for b in other)
    return float((off / size) ** 0.5)


def apart(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Of two steps' logs, how far each value is off, in units of the second."""
    assert one.keys() == other.keys()
    return {name: abs(one[name] - value) / max(abs(value), 1e-8) for name, value in other.items()}


def storage(tensors: Sequence[Tensor]) -> int:
    """Bytes of the memory that they are in, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def size(network: nn.Module) -> int:
    """Bytes of its parameters."""
    return storage([*network.parameters()])


def free() -> None:
    """Let go of what nothing holds any more, and forget how much it was."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak(work: Callable[[], object]) -> int:
    """The most bytes of tensors on the device while ``work`` ran."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The median time of ``work`` until the device is done."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return sorted(found)[rounds // 2]


def due(phase: Phase, since: int) -> int:
    """The first step from ``since`` on at which a phase has its turn."""
    return -(-since // phase.every) * phase.every


# Child processes


def environment(**more: str) -> dict[str, str]:
    """That of this process, in which a child finds the same packages."""
    path = os.pathsep.join(dict.fromkeys([*(p for p in sys.path if p and Path(p).is_dir()), str(ROOT)]))
    fixed = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    dropped = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, **fixed, **more}


def started(words: Sequence[object], **more: str) -> subprocess.Popen[str]:
    """A process of its own group, so that what it starts ends with it."""
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(child: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for it; one that takes too long is killed with all that it has started. Raises AssertionError then."""
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stop(child)
        out, err = child.communicate()
        raise AssertionError(f"did not end within {timeout:g} s: {err[-2000:]}") from None
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def stop(child: subprocess.Popen[str]) -> None:
    """End it and all of its group."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def child(*words: object, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a process to its end."""
    return ended(started(words, **more), timeout)


def fastgen(*words: object, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """``fastgen WORDS`` in a process of its own."""
    return child(sys.executable, "-m", "fastgen", *words, timeout=timeout, **more)
