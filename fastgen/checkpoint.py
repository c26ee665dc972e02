"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

``checkpoint-N/`` holds, for N steps done, ``<role>.safetensors`` (trained weights, and those that a phase moves),
``<role>.optim.safetensors``, ``<role>.ema.safetensors`` and ``state.json``, which says the size and the digest of
each, and its own. It is written under another name, flushed to the disk and renamed. It is the same whatever the
number of processes, whether they hold whole networks or split them (``fastgen.sharding``).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from . import optimizers, parallel, stream
from .ema import EMA
from .engine import Engine
from .plain import from_json
from .stream import Piece, save_file

_NAME = re.compile(r"checkpoint-(\d+)")
STATE = "state.json"
KEYS = {"steps_done", "seed", "samples_per_step", "ema_updates", "scalers", "files", "sha256", "own"}
"""Of a state; those of older versions have no digests."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run; the message says which and what would do."""


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on leaving it is flushed and becomes ``path``, replacing what was there.

    An exception leaves ``path`` as it was. What a process that was killed in it has left beside ``path`` goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.partial-"
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(mark) and not _runs(leftover.name.removeprefix(mark)):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = path.with_name(f"{mark}{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            _flush(file)
        _flush(partial)
        if not path.exists():
            partial.rename(path)
        elif not _swap(partial, path):
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            try:
                partial.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _runs(process: str) -> bool:
    """Whether another process of this number is there."""
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


def _swap(one: Path, other: Path) -> bool:
    """Let two paths change names in one step, so that neither is ever missing; False: not done, this system cannot."""
    exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD of Linux
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # no such function, or no such way to ask for it
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


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
    """Write ``run/checkpoint-<steps_done>`` from the main process and delete older ones, as ``prune`` does.

    Where networks are split over the processes, all must call it, and each tensor is put together by itself.
    """
    path, main = run / f"checkpoint-{steps_done}", parallel.rank() == 0
    engine.reshard()
    with atomic_folder(path) if main else nullcontext(path) as folder:
        digests = {}
        for name, pieces in _files(engine, ema).items():
            if main or any(piece.split for piece in pieces.values()):
                digests[name] = save_file(pieces, folder / name)
        if main:
            state = {
                "steps_done": steps_done,
                "seed": engine.seed,
                "samples_per_step": engine.batch_size * engine.accumulate * parallel.size(),
                "ema_updates": {role: average.updates for role, average in ema.items()},
                "scalers": {name: scaler.state_dict() for name, scaler in engine.scalers.items()},
                "files": {f.name: f.stat().st_size for f in sorted(folder.iterdir())},
                "sha256": dict(sorted(digests.items())),
            }
            state["own"] = _own(state)
            (folder / STATE).write_text(_text(state), encoding="utf-8")
    if main:
        prune(run, path, keep, spared)
    parallel.barrier()
    return path


def _files(engine: Engine, ema: Mapping[str, EMA]) -> dict[str, dict[str, Piece]]:
    """What the files of a checkpoint hold, by their names."""
    found: dict[str, dict[str, Piece]] = {}
    for role, parameters in engine.parameters.items():
        found[f"{role}.safetensors"] = {n: stream.piece(t) for n, t in _weights(engine, role).items()}
        moments = optimizers.tensors(engine.optimizers[role], parameters)
        found[f"{role}.optim.safetensors"] = {n: stream.piece(t) for n, t in moments.items()}
    for role in engine.moving:
        found[f"{role}.safetensors"] = {n: stream.piece(t) for n, t in _moving(engine, role).items()}
    for role, average in ema.items():
        like = average.parameters
        found[f"{role}.ema.safetensors"] = {n: stream.piece(t, like[n]) for n, t in average.average.items()}
    return found


def prune(run: Path, path: Path, keep: int, spared: Path | None = None) -> None:
    """Delete all but ``path``, which was just written, the newest ``keep - 1`` of the others, and ``spared``."""
    # after resuming from an older checkpoint, the others may be later ones than the one just written
    others = [p for p in all_checkpoints(run) if p != path]
    for old in others[: max(0, len(others) + 1 - keep)]:
        if old != spared:
            shutil.rmtree(old)


def load(path: Path, engine: Engine, ema: Mapping[str, EMA], goes_on: bool = True) -> int:
    """Restore what ``save`` wrote and return the steps done. Raises CheckpointError before anything is changed.

    All bytes are read once to compare their digests; then each process reads what it needs. goes_on: the run is to go
    on from here, so that its batches must be those that it had; else its weights are all that is wanted, as where one
    process exports what several have trained.
    """
    state = read_state(path, thorough=True)
    samples = engine.batch_size * engine.accumulate * parallel.size()
    for what, now in (("seed", engine.seed), ("samples_per_step", samples)):
        if goes_on and state[what] != now:
            raise CheckpointError(f"{path}: was made with {what} {state[what]}, this run has {now}; set it back")
    engine.reshard()
    wanted = {f"{role}.safetensors": _weights(engine, role) for role in engine.parameters}
    wanted |= {f"{role}.safetensors": _moving(engine, role) for role in engine.moving}
    wanted |= {f"{role}.ema.safetensors": dict(average.parameters) for role, average in ema.items()}
    for name, tensors in wanted.items():
        _check(path / name, tensors)
    if goes_on:
        engine.offload.turn(engine.parameters)  # states are filled where the optimizer works
        for role, parameters in engine.parameters.items():
            _check_moments(path / f"{role}.optim.safetensors", parameters)
        for role in engine.parameters:
            _load_moments(path / f"{role}.optim.safetensors", engine, role)
    with torch.no_grad():
        for name, tensors in wanted.items():
            role, _, average = name.removesuffix(".safetensors").partition(".")
            with safe_open(path / name, framework="pt") as opened:
                for key, tensor in tensors.items():
                    value = stream.read(opened, key, parallel.is_sharded(tensor))
                    (ema[role].average[key] if average else parallel.local(tensor)).copy_(value)
    for role, one in ema.items():
        one.updates = state["ema_updates"][role]
    for name, scaler in engine.scalers.items():
        if state["scalers"].get(name):
            scaler.load_state_dict(state["scalers"][name])
    return int(state["steps_done"])


def _load_moments(path: Path, engine: Engine, role: str) -> None:
    parameters, found = engine.parameters[role], dict[str, Tensor]()
    with safe_open(path, framework="pt") as opened:
        for key, shape in stream.shapes(path).items():
            p = parameters[key.rpartition(":")[0]]
            split = parallel.is_sharded(p) and shape == tuple(p.shape)
            value = stream.read(opened, key, split)
            found[key] = parallel.like(value.to(p.device), p) if split else value
    try:
        optimizers.restore(engine.optimizers[role], parameters, found)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; set optim.{role}.name back") from None


def _weights(engine: Engine, role: str) -> dict[str, Tensor]:
    """The tensors of a trained network that change: what learns, and its buffers."""
    buffers = {f"buffer:{n}": b for n, b in engine.method.networks[role].named_buffers()}
    return {**engine.parameters[role], **buffers}


def _moving(engine: Engine, role: str) -> dict[str, Tensor]:
    """All tensors of a network that no optimizer but a phase's ``after`` changes."""
    network = engine.method.networks[role]
    return {**{n: p.detach() for n, p in network.named_parameters()}, **dict(network.named_buffers())}


def read_state(path: Path, thorough: bool = False) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint, its files checked for size. Raises CheckpointError.

    thorough: and for their digests, of which each process takes some; all must call it.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; leave out --resume to start anew, or name another")
    try:
        text = (path / STATE).read_text(encoding="utf-8")
        state: dict[str, Any] = from_json(text)
        reason = _wrong(path, state, text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        state, reason = {}, f" ({error})"
    if thorough and not reason and "sha256" in state:  # those of older versions have none
        share = list(state["sha256"].items())
        share = share[parallel.rank() :: parallel.size()] if parallel.together() else share
        reason = next((f", {n} is not as it was written" for n, d in share if not _is_as(path / n, d)), "")
    if thorough:
        reason = parallel.first_of(reason)
    if reason:
        raise CheckpointError(f"{path}: damaged checkpoint{reason}; {_offer(path)}")
    return state


def _wrong(path: Path, state: dict[str, Any], text: str) -> str:
    """What is wrong with it but for digests of files; empty: nothing."""
    if "own" in state and (state.keys() != KEYS or state["own"] != _own(state) or text != _text(state)):
        return f", {STATE} is not as it was written"
    if "own" not in state and not state.keys() <= KEYS - {"sha256"}:
        return f", {STATE} is not as it was written"
    for name, size in state["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            return f", {name} is incomplete"
    return ""


def _is_as(file: Path, digest: str) -> bool:
    try:
        return stream.digest_of(file) == digest
    except OSError:
        return False


def _own(state: Mapping[str, Any]) -> str:
    """The digest of all that a state says but this."""
    return hashlib.sha256(_text({k: v for k, v in state.items() if k != "own"}).encode()).hexdigest()


def _text(state: Mapping[str, Any]) -> str:
    return json.dumps(state, indent=1)


def _offer(path: Path) -> str:
    """What to do about a checkpoint that is of no use: the newest whole one before it."""
    for older in reversed(older_than(path)):
        with parallel.alone():
            try:
                read_state(older, thorough=True)
            except CheckpointError:
                continue
        return (
            f"{older.name} before it is whole: `mv {path} {path}.damaged`, then the same command goes on from there "
            f"(--resume {older})"
        )
    return f"none before it is whole: `mv {path} {path}.damaged`, then the same command begins anew"


def older_than(path: Path) -> list[Path]:
    """The checkpoints beside this one that were made before it, oldest first."""
    found = all_checkpoints(path.parent)
    return found[: found.index(path)] if path in found else []


def load_weights(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, checked against ``like``. Raises CheckpointError."""
    _check(path, like)
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        return stream.shapes(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_offer(path.parent)}") from None


def _check(path: Path, like: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the file holds tensors of these names and shapes, and no others."""
    found = _shapes(path)
    for name, value in like.items():
        if name not in found:
            raise CheckpointError(
                f"{path}: lacks {name!r}; it belongs to another network or method; {_offer(path.parent)}"
            )
        if found[name] != tuple(value.shape):
            raise CheckpointError(
                f"{path}: {name!r} is {found[name]}, the network has {tuple(value.shape)}; {_offer(path.parent)}"
            )
    extra = found.keys() - like.keys()
    if extra:
        raise CheckpointError(f"{path}: holds {min(extra)!r}, which the network lacks; {_offer(path.parent)}")


def _check_moments(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the file holds states of these parameters."""
    extra = {name for name in _shapes(path) if name.rpartition(":")[0] not in parameters}
    if extra:
        raise CheckpointError(f"{path}: holds {min(extra)!r}, which the network lacks; {_offer(path.parent)}")
