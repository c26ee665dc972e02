"""Noise keyed by (seed, step, phase, sample, draw)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from fastgen import times
from fastgen.rng import Noise, seed_of
from fastgen.schedule import Flow
from tests.oracle import sd_schedule

SHAPE = (2, 3)


def noise(samples: Sequence[int] = range(8), seed: int = 0, step: int = 0, phase: str = "critic") -> Noise:
    return Noise(samples, seed, step, phase)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_any_split_of_the_batch_draws_the_same(size: int) -> None:
    whole = noise()
    normal, uniform, again = whole.normal(SHAPE), whole.uniform(), whole.normal(SHAPE)
    for start in range(0, 8, size):
        part = noise(range(start, min(start + size, 8)))
        assert torch.equal(part.normal(SHAPE), normal[start : start + size])
        assert torch.equal(part.uniform(), uniform[start : start + size])
        assert torch.equal(part.normal(SHAPE), again[start : start + size])


def test_a_sample_draws_the_same_wherever_it_stands_in_the_batch() -> None:
    order = [5, 0, 7, 3]
    assert torch.equal(noise(order).normal(SHAPE), noise().normal(SHAPE)[order])


def test_drawing_again_is_new_and_repeats_from_the_start() -> None:
    one, two = noise(), noise()
    first, second = one.normal(SHAPE), one.normal(SHAPE)
    assert not torch.equal(first, second)
    assert torch.equal(two.normal(SHAPE), first)
    assert torch.equal(two.normal(SHAPE), second)


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"phase": "student"}, {"samples": range(8, 16)}])
def test_another_seed_step_phase_or_sample_draws_anew(other: dict) -> None:
    a, b = noise(), noise(**other)
    assert not (a.normal(SHAPE) == b.normal(SHAPE)).any()
    assert not (a.uniform() == b.uniform()).any()


def test_the_global_generator_neither_matters_nor_moves() -> None:
    torch.manual_seed(0)
    one = noise().normal(SHAPE)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    assert torch.equal(noise().normal(SHAPE), one)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_shared_integer_is_the_same_for_every_split() -> None:
    for step in range(20):
        drawn = {noise(samples, step=step).shared_integer(4) for samples in (range(8), range(4), range(4, 8), [9])}
        assert len(drawn) == 1


def test_shared_integer_counts_as_a_draw_of_every_sample() -> None:
    a, b = noise(), noise(range(4, 8))
    a.shared_integer(4)
    b.shared_integer(4)
    assert torch.equal(a.normal(SHAPE)[4:], b.normal(SHAPE))


def test_shared_integer_takes_each_value_its_share_of_the_time() -> None:
    counts = torch.tensor([noise([0], step=step).shared_integer(4) for step in range(4000)]).bincount(minlength=4)
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_normal_and_uniform_have_their_moments_across_samples() -> None:
    rng = noise(range(4000))
    x, u, y = rng.normal((4,)), rng.uniform(), rng.normal((4,))
    n = x.numel()
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x * y).mean()) < 5 / n**0.5
    assert abs((x[1:] * x[:-1]).mean()) < 5 / n**0.5  # neighbouring samples
    assert abs(u.mean() - 0.5) < 5 / (12 * len(u)) ** 0.5
    assert abs(((u - 0.5) * x[:, 0]).mean()) < 5 / (12 * len(u)) ** 0.5
    assert u.min() >= 0
    assert u.max() < 1


def test_dtypes_and_shapes() -> None:
    rng = noise()
    assert len(rng) == 8
    assert rng.normal((2, 3)).shape == (8, 2, 3)
    assert rng.normal(()).dtype == torch.float32
    assert rng.uniform().dtype == torch.float64


def test_seeds_do_not_collide_over_keys() -> None:
    keys = itertools.product(range(3), range(20), ["critic", "student"], range(-1, 30), range(1, 4))
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


def test_words_in_a_key_do_not_run_together() -> None:
    assert seed_of("ab", "c") != seed_of("a", "bc")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.02, 0.98)])
def test_uniform_times_stay_within_their_part_of_the_clock(low: float, high: float) -> None:
    t = times.uniform(noise(range(4000)), sd_schedule(), low, high)
    assert t.min() >= 1000 * low
    assert t.max() <= 1000 * high - 1
    assert torch.equal(t, t.round())
    assert abs(t.mean() - (500 * (low + high) - 0.5)) < 5 * 289 * (high - low) / 4000**0.5
    t = times.uniform(noise(range(4000)), Flow(), low, high)
    assert t.min() >= low
    assert t.max() < high
