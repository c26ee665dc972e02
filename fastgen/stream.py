"""One safetensors file, written tensor by tensor and read by rows, so that no process ever holds all of it.

Of a tensor that is split over the processes (``fastgen.sharding``) each gives its rows, and the main one writes the
whole: the file is the same whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from . import parallel

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 2**24


@dataclass(frozen=True)
class Piece:
    """A tensor of a file: what this process has of it, and the shape of the whole; ``split``: those differ."""

    own: Tensor
    shape: Sequence[int]
    split: bool

    def whole(self) -> Tensor | None:
        """All of it, in the main process."""
        return parallel.gathered(self.own, self.shape) if self.split else self.own


def piece(tensor: Tensor, like: Tensor | None = None) -> Piece:
    """Of a tensor. like: what it is split as, where it is this process's rows without saying so."""
    of = tensor if like is None else like
    return Piece(parallel.local(tensor.detach()), of.shape, parallel.is_sharded(of))


def save_file(pieces: Mapping[str, Piece], path: Path) -> str:
    """Write them from the main process, where all are asked for their rows in one order; the SHA-256 of the file."""
    names = sorted(pieces, key=lambda name: (-pieces[name].own.element_size(), name))  # so each begins at its multiple
    digest = hashlib.sha256()
    if parallel.rank() != 0:
        for name in names:
            pieces[name].whole()
        return ""
    with path.open("wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        put(_header(pieces, names))
        for name in names:
            whole = pieces[name].whole()
            assert whole is not None
            rows: Any = whole.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
            put(memoryview(rows))
    return digest.hexdigest()


def _header(pieces: Mapping[str, Piece], names: Sequence[str]) -> bytes:
    header, end = {}, 0
    for name in names:
        start, shape = end, list(pieces[name].shape)
        end += torch.Size(shape).numel() * pieces[name].own.element_size()
        header[name] = {"dtype": _NAMES[pieces[name].own.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            found.update(data)
    return found.hexdigest()


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of a file's tensors, by name. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}


def read(opened: Any, name: str, split: bool) -> Tensor:
    """A tensor of an open file; split: this process's rows of it."""
    if not split:
        found: Tensor = opened.get_tensor(name)
        return found
    part = opened.get_slice(name)
    rows: Tensor = part[parallel.rows(part.get_shape()[0])]
    return rows
