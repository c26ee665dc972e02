"""A training step asks its device for numbers once a turn of a phase, to log them and to stop where one is not finite.

Whatever else reads a tensor's value makes the host wait until the device has done all before it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgen.engine import Engine
from fastgen.method import Batch
from fastgen.rng import Noise
from tests.golden import record
from tests.oracle import Samples, conv_family, optims

ROOT = Path(__file__).parents[2]
READS = {
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
    *(Tensor.numpy, Tensor.cpu, Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique),
}
CASES = [(name, variant) for name in record.methods() for variant in record.variants(name)]


class Reads(TorchFunctionMode):
    """Counts what reads values, by the file of this project that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            frame = sys._getframe(1)
            while not (file := frame.f_code.co_filename).startswith(str(ROOT)) or ".venv" in file:
                assert frame.f_back is not None
                frame = frame.f_back
            self.found[str(Path(file).relative_to(ROOT))] += 1
        return func(*args, **(kwargs or {}))


class Kept:
    """Data that are there already."""

    def __init__(self) -> None:
        self.source, self.batches = Samples((2, 8, 8)), dict[int, Batch]()

    def batch(self, samples: Sequence[int]) -> Batch:
        first = samples[0]
        if first not in self.batches:
            self.batches[first] = self.source.batch(samples)
        return self.batches[first]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_step_reads_values_once_a_turn(name: str, variant: str) -> None:
    options, num_steps = record.variants(name)[variant]
    method, data = record.make(name, options, conv_family(), num_steps), Kept()
    subject = Engine(method, data, optims(method, lr=1e-3), batch_size=2, steps=10)
    for step in range(3):
        data.batch(next(subject.micro_batches(step)))
    turns = sum(step % phase.every == 0 for step in range(3) for phase in method.phases)
    with Reads() as reads:
        list(subject.run(range(3)))
    assert reads.found.pop("fastgen/engine.py") == turns
    reads.found.pop("fastgen/rng.py", None)  # of tensors on the CPU, as below
    if name == "phased_dmd":  # which expert a row goes to, and only what is asked of it then runs
        reads.found.pop("fastgen/experts.py", None)
    assert not reads.found


def test_reads_are_seen() -> None:
    x = torch.ones(3)
    with Reads() as reads:
        assert bool((x > 0).all())
        x.tolist()
        float(x[0])
        x.nonzero()
    assert reads.found == {"tests/unit/test_syncs.py": 4}


def test_an_integer_of_all_samples_never_was_on_the_device() -> None:
    """A meta tensor has no value that could be read."""
    there = Noise([4, 5], 0, 3, "critic", "meta")
    assert there.normal((2,)).device.type == there.uniform().device.type == "meta"
    here = Noise([4, 5], 0, 3, "critic")
    here.normal((2,)), here.uniform()
    assert [there.shared_integer(1000) for _ in range(5)] == [here.shared_integer(1000) for _ in range(5)]
