"""A GPU without room for a batch: one line that says what would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastgen.engine import Engine
from tests import command

TOLD = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.18 GiB. "
    "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid\n"
    "fragmentation."
)


@pytest.mark.parametrize(
    ("text", "part"), [(TOLD, " (tried to allocate 20.00 GiB);"), ("HIP out of memory.", " left; a smaller batch")]
)
def test_a_gpu_without_room_is_one_line_that_says_what_would_do(
    text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn(*given: object) -> None:
        raise torch.OutOfMemoryError(text)

    monkeypatch.setattr(Engine, "turn", turn)
    world = command.world(tmp_path)
    result = command.fastgen("train", world / "run.yaml")
    assert result.code == 1
    lines = result.err.strip().splitlines()
    assert re.fullmatch(r"fastgen: the GPU has no room left.*", lines[-1])
    assert part in lines[-1]
    assert "run.batch_size" in lines[-1]
    assert "PYTORCH_ALLOC_CONF" not in result.err
    assert "Traceback" not in result.err
    with pytest.raises(torch.OutOfMemoryError):
        command.fastgen("--debug", "train", world / "run.yaml")
