"""A safetensors file that is written tensor by tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastgen import stream


def tensors() -> dict[str, Tensor]:
    kinds = (*(t for t in stream._NAMES if t.is_floating_point), torch.int64, torch.uint8, torch.bool)
    found = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    return found | {"number": torch.tensor(3.5), "nothing": torch.zeros(0, 4), "turned": torch.rand(3, 5).T}


def test_it_reads_as_it_was_written_and_the_digest_is_the_file_s(tmp_path: Path) -> None:
    path, given = tmp_path / "file.safetensors", tensors()
    digest = stream.save_file({name: stream.piece(t) for name, t in given.items()}, path)
    found = load_file(path)
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name].double(), value.double())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == stream.digest_of(path)
    assert stream.shapes(path) == {name: tuple(t.shape) for name, t in given.items()}


def test_the_order_of_the_tensors_does_not_matter(tmp_path: Path) -> None:
    pieces = {name: stream.piece(t) for name, t in tensors().items() if name != "turned"}
    one = stream.save_file(pieces, tmp_path / "one")
    assert one == stream.save_file(dict(reversed(pieces.items())), tmp_path / "other")


def test_rows_are_read_as_processes_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.rand(5, 3)
    stream.save_file({"a": stream.piece(whole)}, tmp_path / "file")
    monkeypatch.setattr("fastgen.parallel.size", lambda: 4)
    parts = []
    with safe_open(tmp_path / "file", framework="pt") as opened:
        for rank in range(4):
            monkeypatch.setattr("fastgen.parallel.rank", lambda rank=rank: rank)
            parts.append(stream.read(opened, "a", split=True))
    assert [len(part) for part in parts] == [2, 2, 1, 0]
    assert torch.equal(torch.cat(parts), whole)
