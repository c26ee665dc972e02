"""The passes of networks that a phase needs, as its algorithm has them: the floor under the time of its turn.

A method declares them beside its phases, from its options alone and not from what its code does; a test counts what
the code does. A pass that is made and not declared is waste, and one that is declared and not made would hide some.
``fastgen bench cost`` times each and so knows what the turn as a whole cannot go below.

Only networks that are roles of the method have passes. Others that a loss calls, LPIPS's and the decoder before it,
are told as part of what a turn takes beyond its floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .rollout import Rollout

Mode = Literal["forward", "inputs", "weights", "penalty", "jvp", "finite_differences"]
"""What is made of a pass.

``forward`` keeps no graph. A backward pass follows in ``inputs``, to the inputs of a network that stays as it is,
in ``weights``, to those of a network that learns, and in ``penalty``, where the gradient with respect to the inputs is
itself part of a loss that the network learns from. ``jvp`` and ``finite_differences`` are those of
``derivative.along``, in the weights' own precision; the second is two passes.
"""


@dataclass(frozen=True)
class Pass:
    """Calls of one network in one turn of a phase.

    Attributes:
        role: the network's.
        mode: what is made of them.
        count: how many, on average where chance decides; 0 is none.
        rows: batches in one call; guidance asks for each sample twice.
        blocks: each ends at the last of these blocks, whose outputs are read; empty: it is whole.
    """

    role: str
    mode: Mode = "forward"
    count: float = 1.0
    rows: int = 1
    blocks: tuple[str, ...] = ()


def rows(low: float, high: float | None = None) -> int:
    """Batches in a call under guidance by the scales from low to high, or by low alone: 1 where guidance is off."""
    return 1 if low == (low if high is None else high) == 1.0 else 2


def chain(rollout: Rollout, num_steps: int) -> float:
    """Calls of the student before the one that is trained, on average over which of its calls that is."""
    return (num_steps - 1) / 2 if rollout == "simulate" else 0.0
