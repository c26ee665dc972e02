"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

``checkpoint-N/`` holds, for N steps done, ``<role>.safetensors`` (trained weights, and those that a phase moves),
``<role>.optim.safetensors``, ``<role>.ema.safetensors`` and ``state.json``. It is written under another name, flushed
to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import parallel
from .ema import EMA
from .engine import Engine

_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run; the message says which and what would do."""


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on leaving it is flushed and becomes ``path``, replacing what was there.

    An exception leaves ``path`` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        _flush(partial)
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on leaving it is flushed and becomes ``path``.

    An exception leaves ``path`` as it was.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def all_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints in a run folder, oldest first."""
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def save(
    run: Path, steps_done: int, engine: Engine, ema: Mapping[str, EMA], keep: int, spared: Path | None = None
) -> Path:
    """Write ``run/checkpoint-<steps_done>`` from the main process and delete older ones, as ``prune`` does."""
    path = run / f"checkpoint-{steps_done}"
    if parallel.rank() == 0:
        with atomic_folder(path) as folder:
            for role, parameters in engine.parameters.items():
                weights = {name: p.detach().contiguous() for name, p in parameters.items()}
                weights |= {f"buffer:{n}": b.contiguous() for n, b in engine.method.networks[role].named_buffers()}
                save_file(weights, folder / f"{role}.safetensors")
                names = {id(p): name for name, p in parameters.items()}
                states = engine.optimizers[role].state
                moments = {
                    f"{names[id(p)]}:{key}": value.contiguous()
                    for p, state in states.items()
                    for key, value in state.items()
                    if isinstance(value, Tensor)
                }
                save_file(moments, folder / f"{role}.optim.safetensors")
            for role in engine.moving:
                save_file(
                    {k: v.contiguous() for k, v in _moving(engine, role).items()}, folder / f"{role}.safetensors"
                )
            for role, average in ema.items():
                save_file(average.average, folder / f"{role}.ema.safetensors")
            state = {
                "steps_done": steps_done,
                "seed": engine.seed,
                "samples_per_step": engine.batch_size * engine.accumulate * parallel.size(),
                "ema_updates": {role: average.updates for role, average in ema.items()},
                "scalers": {name: scaler.state_dict() for name, scaler in engine.scalers.items()},
                "files": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
            }
            (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        prune(run, path, keep, spared)
    parallel.barrier()
    return path


def prune(run: Path, path: Path, keep: int, spared: Path | None = None) -> None:
    """Delete all but ``path``, which was just written, the newest ``keep - 1`` of the others, and ``spared``."""
    # after resuming from an older checkpoint, the others may be later ones than the one just written
    others = [p for p in all_checkpoints(run) if p != path]
    for old in others[: max(0, len(others) + 1 - keep)]:
        if old != spared:
            shutil.rmtree(old)


def load(path: Path, engine: Engine, ema: Mapping[str, EMA], goes_on: bool = True) -> int:
    """Restore what ``save`` wrote and return the steps done. Raises CheckpointError before anything is changed.

    goes_on: the run is to go on from here, so that its batches must be those that it had; else its weights are all
    that is wanted, as where one process exports what several have trained.
    """
    state = read_state(path)
    samples = engine.batch_size * engine.accumulate * parallel.size()
    for what, now in (("seed", engine.seed), ("samples_per_step", samples)):
        if goes_on and state[what] != now:
            raise CheckpointError(f"{path}: was made with {what} {state[what]}, this run has {now}; set it back")
    loaded: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = []
    for role, parameters in engine.parameters.items():
        buffers = {f"buffer:{n}": b for n, b in engine.method.networks[role].named_buffers()}
        weights = _tensors(path / f"{role}.safetensors", {**parameters, **buffers})
        loaded.append((role, weights, _tensors(path / f"{role}.optim.safetensors")))
    moving = {role: _tensors(path / f"{role}.safetensors", _moving(engine, role)) for role in engine.moving}
    averages = {role: _tensors(path / f"{role}.ema.safetensors", a.average) for role, a in ema.items()}
    with torch.no_grad():
        for role, weights in moving.items():
            for name, tensor in _moving(engine, role).items():
                tensor.copy_(weights[name])
        for role, weights, moments in loaded:
            buffers = {f"buffer:{n}": b for n, b in engine.method.networks[role].named_buffers()}
            for name, tensor in {**engine.parameters[role], **buffers}.items():
                tensor.copy_(weights[name])
            optimizer = engine.optimizers[role]
            for key, value in moments.items():
                name, _, kind = key.rpartition(":")
                p = engine.parameters[role][name]
                optimizer.state[p][kind] = value.to(p.device)
        for role, average in ema.items():
            average.updates = state["ema_updates"][role]
            for name, value in averages[role].items():
                average.average[name].copy_(value)
    for name, scaler in engine.scalers.items():
        if state["scalers"].get(name):
            scaler.load_state_dict(state["scalers"][name])
    return int(state["steps_done"])


def _moving(engine: Engine, role: str) -> dict[str, Tensor]:
    """All tensors of a network that no optimizer but a phase's ``after`` changes."""
    network = engine.method.networks[role]
    return {**{n: p.detach() for n, p in network.named_parameters()}, **dict(network.named_buffers())}


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint, its files checked for size. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; leave out --resume to start anew, or name another")
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = state["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error}); delete it to resume from an older one") from None
    for name, size in files:
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise CheckpointError(f"{path}: damaged checkpoint, {name} is incomplete; delete it to use an older one")
    return state


def load_weights(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, checked against ``like``. Raises CheckpointError."""
    return _tensors(path, like)


def _tensors(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete the checkpoint to use an older one") from None
    if like is not None:
        for name, value in like.items():
            if name not in tensors:
                raise CheckpointError(f"{path}: lacks {name!r}; it belongs to another network or method")
            if tensors[name].shape != value.shape:
                raise CheckpointError(
                    f"{path}: {name!r} is {tuple(tensors[name].shape)}, the network has {tuple(value.shape)}"
                )
        extra = set(tensors) - set(like)
        if extra:
            raise CheckpointError(f"{path}: holds {min(extra)!r}, which the network lacks")
    return tensors
