"""Randomness keyed by (seed, step, phase, sample, draw), never by the state of a generator.

What a sample draws depends on nothing but those five, so results do not change with the micro-batch size, the number
of accumulation steps or processes, and a resumed run needs no generator state. The order of draws within one phase
is part of the key: a loss draws in the same order each time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from .transfer import to_device

_SHARED = -1


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from integers (64-bit) and words."""
    digest = blake2b(digest_size=8)
    for part in key:
        digest.update(part.encode() + b"\0" if isinstance(part, str) else struct.pack("<q", part))
    return int.from_bytes(digest.digest(), "little") >> 1


class Noise:
    """The random numbers of one phase at one step, for the samples of one micro-batch.

    Numbers are drawn on the CPU, so that every device sees the same ones, and moved to ``device``.
    """

    def __init__(
        self, samples: Sequence[int], seed: int, step: int, phase: str, device: torch.device | str = "cpu"
    ) -> None:
        """samples: the global indices of the batch's samples, [B]."""
        self.samples, self.key, self.device = list(samples), (seed, step, phase), device
        self._draws = 0
        self._generator = torch.Generator()

    def __len__(self) -> int:
        """The number of samples, B."""
        return len(self.samples)

    @property
    def step(self) -> int:
        """The training step these numbers are for, from 0: what a curriculum goes by."""
        return self.key[1]

    def _each(self, draw: Callable[[torch.Generator], Tensor], samples: Sequence[int]) -> Tensor:
        self._draws += 1
        return torch.stack([draw(self._generator.manual_seed(seed_of(*self.key, s, self._draws))) for s in samples])

    def normal(self, shape: Sequence[int]) -> Tensor:
        """shape: of one sample -> standard Gaussian float32 [B, *shape]."""
        return to_device(self._each(lambda g: torch.randn(tuple(shape), generator=g), self.samples), self.device)

    def uniform(self) -> Tensor:
        """Uniform float64 in [0, 1): [B]."""
        found = self._each(lambda g: torch.rand((), generator=g, dtype=torch.float64), self.samples)
        return to_device(found, self.device)

    def shared_integer(self, high: int) -> int:
        """One integer in {0, ..., high - 1}, the same for every sample, micro-batch and process of this step."""
        # read where it was drawn: asking a GPU for it would wait for all that the GPU has to do
        return int(self._each(lambda g: torch.randint(high, (), generator=g), [_SHARED])[0])
