"""What is declared of a method's passes, held to the table of costs that the papers' algorithms add up to."""

from __future__ import annotations

from typing import Any

import pytest

from fastgen.method import Phase
from fastgen.passes import Pass, chain, rows
from tests.golden import record
from tests.oracle import conv_family

UNITS = {"forward": 1, "inputs": 2, "weights": 3, "jvp": 3, "finite_differences": 2}
"""In forward passes of one batch: back to inputs costs one more, to weights two, a tangent two."""


def units(phases: list[Phase]) -> float:
    """Of a step, the heads' passes left out and a pass that ends at a block taken for whole."""
    needed = ((phase, p) for phase in phases for p in phase.passes if p.role != "discriminator")
    return sum(p.count * p.rows * UNITS[p.mode] / phase.every for phase, p in needed)


def test_guidance_asks_for_each_sample_twice_unless_it_is_off() -> None:
    assert (rows(1.0), rows(1.0, 1.0)) == (1, 1)
    assert (rows(7.5), rows(0.5), rows(1.0, 8.0), rows(2.5, 2.5)) == (2, 2, 2, 2)


def test_a_simulated_chain_is_as_long_as_the_trained_call_is_far_on_average() -> None:
    """Call k of n has k calls before it."""
    for n in (1, 2, 4, 5):
        assert chain("simulate", n) == sum(range(n)) / n
        assert chain("data", n) == chain("noise", n) == 0


def test_a_pass_is_one_whole_forward_pass_of_one_batch_unless_said() -> None:
    assert Pass("teacher") == Pass("teacher", "forward", 1, 1, ())
    assert Phase("only", ["student"], lambda batch, rng: {}).passes == ()


TABLE: list[tuple[str, dict[str, Any], int, float]] = [
    # DMD2's own, (R (4 + (K - 1) / 2) + 5) / R, and the student's samples of its own turn, which are no critic's here
    ("dmd2", {"student_every": 5}, 1, (25 + 1) / 5),
    ("dmd2", {"student_every": 5}, 4, (32.5 + 2.5) / 5),
    # GAN with trained features: 6 passes a critic update, 2 a student update
    ("dmd2", {"adversarial": {"weight": 1.0, "features": "fake_score"}}, 1, (25 + 1 + 5 * 6 + 2) / 5),
    ("decoupled_dmd", {"student_every": 5}, 1, (26 + 1) / 5),
    ("sid", {"guidance_scale": 1.0}, 1, 11),
    ("sid", {"guidance_scale": 4.5}, 1, 18),
    ("sid", {"guidance_scale": 4.5}, 4, 18 + 3),
    # SwiftBrush: 9 where the backward pass of an adapter counts one
    ("vsd", {}, 1, 9 + 1),
    ("adversarial", {}, 1, 8),
    ("adversarial", {"distillation": 2.5}, 1, 8 + 1),
    ("consistency", {}, 1, 3 + 1 + 2),
    ("consistency", {"guidance_scale": 2.0}, 1, 3 + 1 + 4),
    ("consistency", {"variant": "ect", "curriculum_steps": 8}, 1, 3 + 1),
    ("lcm", {}, 1, 3 + 1 + 2),
    ("pcm", {}, 1, 3 + 1 + 2),
    ("scm", {}, 1, 3 + 3 + 2),
    ("scm", {"velocity": "data", "guidance": {"low": 1, "high": 1}}, 1, 3 + 3),
    ("meanflow", {"guidance_scale": 1.0}, 1, 3 + 3 + 1),
    ("meanflow", {"derivative": "finite_differences"}, 1, 3 + 2 + 2),
    ("guidance", {}, 1, 3 + 2),
    ("agd", {"states": 8}, 1, 8 * (3 + 2)),
    ("kd", {}, 4, 3),
    # DMD: student twice, guided teacher, fake score read and trained
    ("dmd", {}, 1, 3 + 3 + 2 + 1 + 3),
    ("pretrain", {}, 1, 3),
]


@pytest.mark.parametrize(("name", "options", "num_steps", "expected"), TABLE)
def test_declared_passes_are_the_papers(name: str, options: dict[str, Any], num_steps: int, expected: float) -> None:
    assert units(record.make(name, options, conv_family(), num_steps).phases) == pytest.approx(expected)
