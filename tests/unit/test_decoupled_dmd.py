"""Decoupled DMD: two directions, each at noise of its own, which are DMD2's where they share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import config, losses, times
from fastgen.engine import Engine
from fastgen.family import Family
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.rng import Noise
from fastgen.sampling import sample
from fastgen.schedule import Flow, Schedule
from fastgen.trainers import decoupled_dmd, dmd2
from fastgen.trainers.decoupled_dmd import Method
from tests.oracle import (
    Gaussian,
    Samples,
    conv_family,
    gaussian_family,
    labels,
    optims,
    schedules,
    sd_schedule,
    states,
    train,
)

SHAPE = (4, 4)
CONV = Samples((2, 8, 8))
GAN = {"weight": 0.1, "critic_weight": 0.01, "features": "teacher", "blocks": ["down", "mid"]}
RANGE = {"t_low": 0.02, "t_high": 0.98}


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


def make(module: Any, family: Family, num_steps: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    return module.Method(config.decode(module.Config, options, "test"), family, num_steps)


def method(num_steps: int = 1, family: Family | None = None, **options: Any) -> Method:
    made: Method = make(decoupled_dmd, family or conv_family(), num_steps, **options)
    return made


def unlike_teacher(made: Any) -> Any:
    """The same method where student and fake score have moved."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in ("student", "fake_score"):
            for p in made.networks[role].parameters():
                p += 0.05 * torch.randn(p.shape, generator=g)
    return made


def gradients(made: Any, loss: Tensor) -> list[Tensor]:
    return [g for g in torch.autograd.grad(loss, list(made.student.network.parameters())) if g is not None]


def total(terms: Any) -> Tensor:
    return torch.stack([term.sum() for term in terms.values()]).sum()


def largest(xs: list[Tensor]) -> float:
    return max(x.abs().max().item() for x in xs)


# It is DMD2 where both terms share a draw


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize(("scale", "adversarial"), [(1.0, {}), (7.5, {}), (7.5, GAN)])
def test_with_one_draw_equal_ranges_and_weights_it_is_dmd2_to_rounding(
    num_steps: int, scale: float, adversarial: dict[str, Any]
) -> None:
    """Each loss of both phases: the critic's bit for bit, the student's gradient but for the last digits."""
    common = {"guidance_scale": scale, "adversarial": adversarial}
    theirs = unlike_teacher(make(dmd2, conv_family(), num_steps, **common))
    ours = unlike_teacher(method(num_steps, schedules="shared", dm=RANGE, ca=RANGE, **common))
    other = unlike_teacher(method(num_steps, schedules="full", dm=RANGE, ca=RANGE, **common))
    for step in range(4):
        batch, rng = CONV.batch(range(4)), lambda phase, step=step: noise(step, phase)
        one, two = theirs.critic_loss(batch, rng("critic")), ours.critic_loss(batch, rng("critic"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        expected = gradients(theirs, total(theirs.student_loss(batch, rng("student"))))
        for made, allowed in ((ours, 2e-5), (other, None)):
            found = gradients(made, total(made.student_loss(batch, rng("student"))))
            error = largest([a - b for a, b in zip(found, expected, strict=True)]) / largest(expected)
            if allowed:
                assert error < allowed
            else:
                assert error > 0.01 or scale == 1.0


def test_a_run_of_it_with_one_draw_is_a_run_of_dmd2() -> None:
    results = []
    for module, options in ((dmd2, {}), (decoupled_dmd, {"schedules": "shared", "dm": RANGE, "ca": RANGE})):
        made = make(module, conv_family(), 2, guidance_scale=3.0, student_every=2, **options)
        start = states(made)["student"]
        optim = optims(made, lr=1e-3, eps=1e-3)  # gradients of rounding size must not become whole steps
        train(Engine(made, CONV, optim, batch_size=4, steps=4), range(4))
        results.append(states(made)["student"])
    moved = largest([results[0][name] - start[name] for name in start])
    assert largest([results[0][name] - results[1][name] for name in start]) < 1e-3 * moved


# The two directions


def gaussians(schedule: Schedule, mean: float, std: float = 0.8, **options: Any) -> Method:
    """A 4-step method: captions N(1, 0.64), no caption N(0.2, 0.64), and a fake score that says (mean, std)."""
    kind = "flow" if isinstance(schedule, Flow) else "v"
    made = method(
        4, gaussian_family((0.2, 1.0, 1.0), (0.8,) * 3, schedule, kind, SHAPE), guidance_scale=3.0, **options
    )
    network: Any = made.fake_score.network
    with torch.no_grad():
        network.mean.fill_(mean)
        network.log_std.fill_(std).log_()
    return made


class Strata(Noise):
    """Uniform numbers that are evenly spaced, so that means over the batch are integrals over time."""

    def uniform(self) -> Tensor:
        n = len(self)
        return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def directions(made: Method, t_in: float, n: int = 500) -> tuple[float, float]:
    """The mean of DM's direction and of CA's, for a student that was called at t_in."""
    batch = Batch(range(n), labels(["left"] * n), labels([""]))
    x0 = torch.zeros(n, *SHAPE)
    real, fake, _, gap = made.scores(
        x0, torch.full((n,), t_in, dtype=torch.float64), batch, Strata(range(n), 0, 0, "")
    )
    return (fake - real).mean().item(), -gap.mean().item()


def fixed_point(schedule: Schedule, t_in: float, **options: Any) -> float:
    """The student's mean at which the directions cancel on average; DM's is affine in it, CA's constant."""
    (dm_0, ca), (dm_1, same) = (directions(gaussians(schedule, mean, **options), t_in) for mean in (0.0, 1.0))
    assert ca == pytest.approx(same, abs=1e-6)  # alone it has no fixed point
    assert dm_1 == pytest.approx(0, abs=1e-6)
    return -(dm_0 + ca) / (dm_1 - dm_0)


def test_fixed_points_are_the_known_ones_and_time_runs_the_right_way() -> None:
    """m_c + (w - 1) (m_c - m_u) E[g(t_ca)] / E[g(t_dm)], g = sigma^2 / V; a reversed clock turns 2.179 into 3.864."""
    assert fixed_point(Flow(), 1.0) == pytest.approx(2.600, abs=1e-3)
    assert fixed_point(Flow(), 0.75) == pytest.approx(2.179, abs=1e-3)
    assert fixed_point(Flow(), 0.25) == pytest.approx(1.133, abs=1e-3)
    reversed_clock = {"schedules": "full", "ca": {"t_low": 0.75}}
    assert fixed_point(Flow(), 0.75, **reversed_clock) == pytest.approx(3.864, abs=1e-3)


@pytest.mark.parametrize("schedule", schedules(), ids=["vp", "flow"])
@pytest.mark.parametrize("name", ["hybrid", "full", "constrained", "shared"])
@pytest.mark.parametrize("call", range(4))
def test_fixed_points_follow_from_the_times_of_each_schedule(schedule: Schedule, name: str, call: int) -> None:
    made = gaussians(schedule, 0.0)
    t_in, part = made.times[call], 1 - call / 4
    u = (torch.arange(500, dtype=torch.float64) + 0.5) / 500

    def g(share: float) -> float:
        at = schedule(schedule.draw(share * u))
        return (at.sigma.square() / ((0.8 * at.alpha).square() + at.sigma.square())).mean().item()

    below_dm, below_ca = name == "constrained", name in ("hybrid", "constrained")
    expected = 1 + 2 * 0.8 * g(part if below_ca else 1.0) / g(part if below_dm else 1.0)
    assert fixed_point(schedule, t_in, schedules=name) == pytest.approx(expected, abs=1e-4)


def test_directions_are_those_of_the_exact_scores() -> None:
    """Also where mean and deviation are the student's own; each at the x_t that its networks saw."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"teacher": [], "fake": []}
    made = gaussians(sd_schedule(), 0.4, 0.6)
    for name, denoiser in (("teacher", made.teacher), ("fake", made.fake_score)):
        denoiser.network.register_forward_pre_hook(lambda _, args, to=seen[name]: to.append(args[:2]))
    n = 64
    batch = Batch(range(n), labels(["left"] * n), labels([""]))
    x0 = 0.4 + 0.6 * noise(3, n=n).normal(SHAPE)
    real, fake, pos, gap = made.scores(x0, torch.full((n,), 499.0, dtype=torch.float64), batch, noise(n=n))
    (x_t, t), (x_s, s), (x_neg, t_neg) = seen["teacher"]
    assert torch.equal(x_t, seen["fake"][0][0])
    assert torch.equal(x_s, x_neg)
    assert torch.equal(s, t_neg)
    assert not torch.equal(t, s)
    at, at_s = made.teacher.schedule(t).like(x_t), made.teacher.schedule(s).like(x_s)
    caption, empty, student = Gaussian(1.0, 0.8), Gaussian(0.2, 0.8), Gaussian(0.4, 0.6)
    torch.testing.assert_close(real, caption.x0(x_t, at), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fake, student.x0(x_t, at), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pos, caption.x0(x_s, at_s), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gap, 2 * (caption.x0(x_s, at_s) - empty.x0(x_s, at_s)), rtol=1e-4, atol=1e-4)
    apart = ((x_t - at.alpha * x0) / at.sigma - (x_s - at_s.alpha * x0) / at_s.sigma)[(t > 20) & (s > 20)]
    assert apart.std() == pytest.approx(2**0.5, rel=0.1)  # the noises are independent


def seen_times(made: Method, t_in: float, n: int = 300) -> tuple[Tensor, Tensor]:
    """The times at which DM and CA judge a student that was called at t_in."""
    seen: list[Tensor] = []
    handle = made.teacher.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    batch = Batch(range(n), labels(["left"] * n), labels([""]))
    made.scores(torch.zeros(n, *SHAPE), torch.full((n,), t_in, dtype=torch.float64), batch, noise(n=n))
    handle.remove()
    return seen[0], seen[-1]


def test_times_stay_in_the_ranges_and_no_noisier_than_the_input_where_they_should() -> None:
    dm, ca = seen_times(gaussians(sd_schedule(), 0.0), 249.0)
    assert dm.max() > 900
    assert 200 < ca.max() <= 249
    dm, ca = seen_times(gaussians(sd_schedule(), 0.0, schedules="constrained"), 249.0)
    assert 200 < dm.max() <= 249
    assert 200 < ca.max() <= 249
    ranges = {"dm": {"t_low": 0.4, "t_high": 0.6}, "ca": {"t_low": 0.7, "t_high": 0.9}}
    for t_in, low, high in ((999.0, 700, 900), (499.0, 350, 450)):  # of the times it may take
        dm, ca = seen_times(gaussians(sd_schedule(), 0.0, **ranges), t_in)
        assert 400 <= dm.min() < dm.max() < 600
        assert low <= ca.min() < ca.max() < high
    assert len(ca.unique()) > 50  # a time for each sample


def test_pure_noise_at_an_earlier_start_is_still_as_noisy_as_any_time() -> None:
    """A first call at t = 399 sees no signal at all, so that all levels of guidance are cleaner."""
    made = method(2, gaussian_family(shape=SHAPE, start=0.4), guidance_scale=3.0)
    assert made.times == [399, 199]
    assert seen_times(made, 399.0)[1].max() > 900
    assert 150 < seen_times(made, 199.0)[1].max() <= 199


@pytest.mark.parametrize("schedule", schedules(), ids=["vp", "flow"])
def test_a_share_of_the_times_is_the_inverse_of_the_draw(schedule: Schedule) -> None:
    for part in (0.25, 0.4, 0.75, 1.0):
        t = schedule.t_min + (1000 * part - 1 if schedule.t_max > 1 else part)
        assert times.share(schedule, t) == pytest.approx(part, abs=1e-9)
        drawn = schedule.draw(times.share(schedule, t) * torch.linspace(0, 1 - 1e-9, 5001, dtype=torch.float64))
        assert drawn.max().item() == pytest.approx(t, abs=1e-3)


# The loss


@pytest.mark.parametrize("normaliser", ["joint", "apart"])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_gradient_is_the_weighted_sum_of_the_normalised_directions(normaliser: str, num_steps: int) -> None:
    options = {"dm": {"weight": 0.5}, "ca": {"weight": 2.0}, "normaliser": normaliser, "guidance_scale": 4.0}
    made = unlike_teacher(method(num_steps, **options))
    batch = CONV.batch(range(4))
    found = gradients(made, total(made.student_loss(batch, noise(1))))

    rng = noise(1)
    x_in, t_in = made.inputs(batch, rng)
    x0 = made.student(x_in, t_in, batch.cond).x0
    real, fake, pos, gap = made.scores(x0, t_in, batch, rng)

    def size(other: Tensor) -> Tensor:
        return losses.per_sample((x0 - other).abs()).detach().reshape(-1, 1, 1, 1)

    dm, ca = (size(real + gap),) * 2 if normaliser == "joint" else (size(real), size(pos))
    direction = 0.5 * (fake - real) / dm - 2.0 * gap / ca
    expected = gradients(made, (x0 * direction).sum() / 128)
    assert largest([a - b for a, b in zip(found, expected, strict=True)]) < 1e-4 * largest(expected)
    assert largest(expected) > 1e-4


def passes(made: Method) -> dict[str, int]:
    """Rows that each network is given in the student's loss, over the batch."""
    rows = {"teacher": 0, "fake_score": 0, "student": 0}

    def count(role: str, args: tuple[Tensor, ...]) -> None:
        rows[role] += len(args[0])

    handles = [
        made.networks[role].register_forward_pre_hook(lambda _, args, role=role: count(role, args)) for role in rows
    ]
    made.student_loss(CONV.batch(range(4)), noise())
    for handle in handles:
        handle.remove()
    return {role: n // 4 for role, n in rows.items()}


def test_it_costs_one_teacher_pass_more_than_dmd2_and_none_that_is_not_needed() -> None:
    assert passes(method(schedules="hybrid")) == {"teacher": 3, "fake_score": 1, "student": 1}
    assert passes(method(schedules="shared")) == {"teacher": 2, "fake_score": 1, "student": 1}
    for options in ({"guidance_scale": 1.0}, {"ca": {"weight": 0.0}}):
        assert passes(method(**options)) == {"teacher": 1, "fake_score": 1, "student": 1}


def test_without_guidance_there_is_no_ca() -> None:
    made = unlike_teacher(method(2, guidance_scale=1.0))
    terms = made.student_loss(CONV.batch(range(4)), noise())
    assert terms["ca"].abs().max() == 0
    assert terms["dm"].min() > 0
    assert largest(gradients(made, terms["ca"].sum())) == 0


def test_at_the_start_dm_is_zero_and_only_guidance_pulls() -> None:
    made = method(2, guidance_scale=4.0)
    terms = made.student_loss(CONV.batch(range(4)), noise())
    assert terms["dm"].abs().max() == 0
    assert largest(gradients(made, terms["dm"].sum())) == 0
    terms = made.student_loss(CONV.batch(range(4)), noise())
    assert largest(gradients(made, terms["ca"].sum())) > 1e-4


# End to end


def distil(updates: int = 200, **options: Any) -> tuple[float, float]:
    """A one-step student of N(1, 0.25), N(0.3, 0.25) without the caption: mean and deviation of its samples."""
    made = method(1, gaussian_family((0.3, 1.0, 1.0), (0.5,) * 3, shape=SHAPE), **options)
    settings = Optim(lr=0.03, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0)
    steps = updates * made.config.student_every
    engine = Engine(
        made,
        Samples(SHAPE, images=False, captions=("left",)),
        {"student": settings, "fake_score": settings},
        batch_size=8,
        steps=steps,
    )
    train(engine, range(steps))
    n = 4000
    x_t = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x0 = sample(made.student, made.teacher.schedule, x_t, made.times, labels(["left"] * n))
    return x0.mean().item(), x0.std().item()


def test_a_student_takes_on_the_teacher_s_mean_and_deviation() -> None:
    mean, std = distil(guidance_scale=1.0)
    assert mean == pytest.approx(1.0, abs=0.03)
    assert std == pytest.approx(0.5, abs=0.03)


def test_guidance_moves_the_student_to_where_the_normalised_directions_cancel() -> None:
    """CA on the cleaner half only: less than DMD2's 1.7, and what the same law gives by integration."""
    at_low, n = 0.5, 20000
    schedule, g = sd_schedule(), torch.Generator().manual_seed(2)
    u, v = (torch.rand(n, generator=g, dtype=torch.float64) for _ in range(2))
    eps, eta, z = (torch.randn(n, *SHAPE, generator=g, dtype=torch.float64) for _ in range(3))
    at, at_s = schedule(schedule.draw(u)).like(eps), schedule(schedule.draw(at_low * v)).like(eps)
    caption, empty = Gaussian(1.0, 0.5), Gaussian(0.3, 0.5)

    def drift(mean: float) -> float:
        """The mean direction of a student N(mean, 0.25) whose fake score is exact."""
        x0 = mean + 0.5 * z
        x_t, x_s = at.alpha * x0 + at.sigma * eps, at_s.alpha * x0 + at_s.sigma * eta
        real, fake = caption.x0(x_t, at), Gaussian(mean, 0.5).x0(x_t, at)
        gap = caption.x0(x_s, at_s) - empty.x0(x_s, at_s)
        return ((fake - real - gap) / (x0 - real - gap).abs().mean((1, 2), keepdim=True)).mean().item()

    low, high = 1.0, 2.0
    assert drift(low) < 0 < drift(high)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if drift(middle) < 0 else (low, middle)
    assert low < 1.6
    mean, std = distil(guidance_scale=2.0, schedules="full", ca={"t_high": at_low})
    assert mean == pytest.approx(low, abs=0.03)
    assert std == pytest.approx(0.5, abs=0.03)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dm": {"t_low": 0.6, "t_high": 0.5}}, r"dm\.t_low 0\.6 must be below dm\.t_high 0\.5"),
        ({"ca": {"t_low": 0.5, "t_high": 0.5}}, r"ca\.t_low 0\.5 must be below ca\.t_high 0\.5"),
        ({"dm": {"weight": 0.0}}, r"dm\.weight 0 leaves guidance alone, which has no fixed point; set it above 0"),
        (
            {"schedules": "shared", "ca": {"t_high": 0.5}},
            r"schedules shared needs equal ranges, got dm 0 to 1 and ca 0 to 0\.5; set them equal or schedules full",
        ),
        ({"rollout": "noise"}, r"rollout noise trains only the first of 2 calls"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(2, **options)


def test_images_are_needed_where_they_are_used() -> None:
    assert not method(4).needs_images
    assert method(4, rollout="data").needs_images
    assert not method(1, rollout="data").needs_images
    assert method(1, adversarial={"weight": 0.1}).needs_images


def test_the_roles_share_no_weight() -> None:
    made = method()
    networks: list[nn.Module] = [made.networks[role] for role in ("teacher", "student", "fake_score")]
    pointers = [{p.data_ptr() for p in network.parameters()} for network in networks]
    assert pointers[0].isdisjoint(pointers[1] | pointers[2])
    assert pointers[1].isdisjoint(pointers[2])
