"""Denoisers and guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser, guided
from fastgen.prediction import KINDS, Kind
from fastgen.schedule import Schedule
from tests.oracle import CAPTIONS, Gaussians, call, labels, schedules, sd_schedule

MIXED = ["left", "", "right", "left"]


def exact(kind: Kind = "v", schedule: Schedule | None = None) -> Denoiser:
    schedule = schedule or sd_schedule()
    return Denoiser(Gaussians((0.3, 1.0, -0.5), (0.5, 0.4, 0.6), schedule, kind).double(), schedule, kind, call)


def inputs(schedule: Schedule) -> tuple[Tensor, Tensor]:
    x_t = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    return x_t, torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64) * schedule.t_max


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_network_reads_the_same_in_every_kind(schedule: Schedule, kind: Kind) -> None:
    x_t, t = inputs(schedule)
    cond = labels(MIXED, torch.float64)
    pred, other = exact(kind, schedule)(x_t, t, cond), exact("x0", schedule)(x_t, t, cond)
    torch.testing.assert_close(pred.x0, other.x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pred.flow, other.flow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", KINDS)
@pytest.mark.parametrize("scale", [0.0, 4.5])
def test_guidance_commutes_with_the_kind(schedule: Schedule, kind: Kind, read: Kind, scale: float) -> None:
    x_t, t = inputs(schedule)
    denoiser, cond, uncond = exact(kind, schedule), labels(MIXED, torch.float64), labels([""], torch.float64)
    both = guided(denoiser, uncond, scale)(x_t, t, cond)
    pos = denoiser(x_t, t, cond).as_kind(read)
    neg = denoiser(x_t, t, labels([""] * 4, torch.float64)).as_kind(read)
    torch.testing.assert_close(both.as_kind(read), neg + scale * (pos - neg), rtol=1e-8, atol=1e-8)


def test_guidance_of_scale_one_is_the_denoiser_itself() -> None:
    denoiser = exact()
    assert guided(denoiser, labels([""]), 1.0) is denoiser


def test_one_uncond_row_serves_a_mixed_batch_as_each_sample_alone() -> None:
    """The empty caption among others gets its own guidance and does not touch its neighbours'."""
    denoiser = exact()
    x_t, t = inputs(denoiser.schedule)
    wrapped = guided(denoiser, labels([""], torch.float64), 3.0)
    mixed = wrapped(x_t, t, labels(MIXED, torch.float64))
    for i, caption in enumerate(MIXED):
        alone = wrapped(x_t[i : i + 1], t[i : i + 1], labels([caption], torch.float64))
        torch.testing.assert_close(mixed.x0[i : i + 1], alone.x0)
    torch.testing.assert_close(mixed.y[1], denoiser(x_t, t, labels(MIXED, torch.float64)).y[1])


def test_a_row_of_uncond_for_each_sample_is_used_row_by_row() -> None:
    denoiser = exact()
    x_t, t = inputs(denoiser.schedule)
    cond, negative = labels(MIXED, torch.float64), labels(["right", "left", "", ""], torch.float64)
    pos, neg = denoiser(x_t, t, cond).y, denoiser(x_t, t, negative).y
    torch.testing.assert_close(guided(denoiser, negative, 2.0)(x_t, t, cond).y, neg + 2 * (pos - neg))


def test_guidance_keeps_the_batch_and_its_level() -> None:
    denoiser = exact()
    x_t, t = inputs(denoiser.schedule)
    pred = guided(denoiser, labels([""], torch.float64), 2.0)(x_t, t, labels(MIXED, torch.float64))
    assert torch.equal(pred.x_t, x_t)
    # a processor may round in vectors otherwise than what is left over, and twice the rows leave none
    torch.testing.assert_close(pred.at.alpha.flatten(), denoiser.schedule(t).alpha, rtol=1e-14, atol=0)
    assert pred.kind == "v"


def test_guided_gaussian_is_the_gaussian_of_the_guided_mean() -> None:
    """With equal deviations, guidance w moves the mean to m_u + w (m_c - m_u) and leaves the rest."""
    schedule = sd_schedule()
    network = Gaussians((0.3, 1.0, 3.45), (0.5, 0.5, 0.5), schedule, "eps").double()
    denoiser = Denoiser(network, schedule, "eps", call)
    x_t, t = inputs(schedule)
    pred = guided(denoiser, labels([""], torch.float64), 4.5)(x_t, t, labels(["left"] * 4, torch.float64))
    torch.testing.assert_close(
        pred.x0, denoiser(x_t, t, labels(["right"] * 4, torch.float64)).x0, atol=1e-5, rtol=1e-5
    )


def test_another_network_takes_over_schedule_kind_and_autocast() -> None:
    denoiser = Denoiser(nn.Identity(), sd_schedule(), "v", call, torch.bfloat16)
    network = nn.Identity()
    other = denoiser.with_network(network)
    assert other.network is network
    assert (other.schedule, other.kind, other.call, other.autocast) == (
        denoiser.schedule,
        "v",
        call,
        torch.bfloat16,
    )


# Precision


class Dense(nn.Module):
    """One matrix product, which says what it ran in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        y = self.linear(x_t)
        self.seen.append(y.dtype)
        return y


def dense(autocast: torch.dtype | None) -> tuple[Denoiser, Dense, tuple]:
    network = Dense()
    denoiser = Denoiser(network, sd_schedule(), "v", call, autocast)
    return denoiser, network, (torch.ones(2, 3), torch.tensor([10.0, 500.0]), labels(["left"] * 2))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_products_run_in_the_autocast_dtype_and_predictions_are_float32(autocast: torch.dtype | None) -> None:
    denoiser, network, args = dense(autocast)
    pred = denoiser(*args)
    assert network.seen == [autocast or torch.float32]
    assert {pred.y.dtype, pred.x_t.dtype, pred.at.alpha.dtype, pred.x0.dtype} == {torch.float32}


def test_low_precision_inputs_leave_as_float32() -> None:
    denoiser, _, (x_t, t, cond) = dense(torch.bfloat16)
    pred = denoiser(x_t.bfloat16(), t, cond)
    assert pred.x_t.dtype == pred.y.dtype == torch.float32


def test_a_call_without_gradients_does_not_take_them_from_the_next() -> None:
    """Autocast caches cast weights; one made under no_grad has no graph and must not be used again."""
    denoiser, network, args = dense(torch.bfloat16)
    with torch.no_grad():
        denoiser(*args)
    denoiser(*args).y.sum().backward()
    assert network.linear.weight.grad is not None
    assert network.linear.weight.grad.abs().sum() > 0


def test_captions_of_the_toy_are_what_the_tests_take_them_for() -> None:
    assert CAPTIONS == ("", "left", "right")
