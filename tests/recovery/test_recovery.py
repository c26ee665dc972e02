"""With learnt scores, every method brings a small student to a mixture of Gaussians that its teacher has learnt."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fastgen.rng import Noise
from fastgen.schedule import Flow, Schedule, add_noise
from tests.oracle import CAPTIONS, labels, sd_schedule
from tests.recovery import recover
from tests.recovery.recover import (
    ASKED,
    METHODS,
    POOL,
    SCALES,
    SETTINGS,
    TEACHER_STEPS,
    Measure,
    distil,
    draw_guided,
    draw_student,
    exact,
    measure,
    off,
    pool,
    shortcomings,
    sliced,
    undistilled,
)
from tests.recovery.world import CLEAN, MODES, OF_CAPTION, SHAPE, Drawn, Exact, Points, family, mixture_of, weights_of

GUIDANCE = [name for name, module in METHODS.items() if not module.ABOUT.steps]
FEW_STEPS = [name for name in METHODS if name not in GUIDANCE]


@functools.cache
def at_steps(num_steps: int) -> Measure:
    """The undistilled teacher's."""
    return measure(undistilled(recover.teacher(), num_steps))


@functools.cache
def floor() -> float:
    """The distance of two exact sets."""
    return measure({caption: exact(caption, seed=1) for caption in ASKED}).distance


# The world


@pytest.mark.parametrize("schedule", [sd_schedule(), Flow()])
def test_the_exact_network_gives_the_posterior_mean(schedule: Schedule) -> None:
    names = ["", "left", "right"] * 40
    generator = torch.Generator().manual_seed(0)
    t = schedule.draw(0.02 + 0.96 * torch.rand(len(names), generator=generator, dtype=torch.float64))
    x_t = (2 * torch.randn(len(names), 2, generator=generator)).double().requires_grad_()
    at = schedule(t).like(x_t)
    density = torch.zeros(len(names), dtype=torch.float64)  # from the definition: sums of full Gaussians
    for k in range(len(MODES.weights)):
        axes = MODES.axes[k].double()
        within = axes @ MODES.stds[k].double().square().diag() @ axes.T
        noised = at.alpha[:, :, None].square() * within + at.sigma[:, :, None].square() * torch.eye(2).double()
        normal = torch.distributions.MultivariateNormal(at.alpha * MODES.means[k], noised)
        density = density + torch.stack([weights_of(name)[k] for name in names]) * normal.log_prob(x_t).exp()
    (score,) = torch.autograd.grad(density.log().sum(), x_t)
    x_t, at, score = x_t.detach().float(), schedule(t).like(x_t.float()), score.float()
    denoiser = family(Exact(schedule, "v"), schedule, "v").denoiser
    pred = denoiser(x_t.reshape(-1, *SHAPE), t, labels(names))
    x0 = (x_t + at.sigma.square() * score) / at.alpha  # Tweedie
    torch.testing.assert_close(pred.x0.flatten(1), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pred.eps.flatten(1), -at.sigma * score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_samples_are_of_the_mixture(caption: str) -> None:
    mixture, n = mixture_of(caption), 200_000
    x = mixture.sample(n, torch.Generator().manual_seed(0))
    share = mixture.log_densities(x, CLEAN).softmax(1).mean(0)
    torch.testing.assert_close(share, mixture.weights, rtol=0, atol=2 / math.sqrt(n))
    within = torch.einsum("k,kij,kj,klj->il", mixture.weights, mixture.axes, mixture.stds.square(), mixture.axes)
    mean = mixture.weights @ mixture.means
    between = torch.einsum("k,ki,kj->ij", mixture.weights, mixture.means - mean, mixture.means - mean)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(x.T), within + between, rtol=0, atol=0.015)


def test_the_empty_caption_is_half_of_each() -> None:
    torch.testing.assert_close(weights_of(""), (weights_of("left") + weights_of("right")) / 2)
    assert [*OF_CAPTION["left"], *OF_CAPTION["right"]] == list(OF_CAPTION[""])


def test_the_world_is_not_symmetric() -> None:
    for caption in ASKED:
        mixture = mixture_of(caption)
        assert len(mixture.weights.unique()) == len(mixture.stds.prod(1).unique()) == len(mixture.weights)
    x = MODES.sample(100_000, torch.Generator().manual_seed(0))
    assert (x.mean(0).abs() > 0.1).all()
    assert ((x.std(0) - 1).abs() > 0.03).all()


def test_data_are_addressed_by_number() -> None:
    points = Points(size=64)
    batch = points.batch([5, 6, 69])
    assert torch.equal(batch.cond["label"].argmax(1), torch.tensor([2, 1, 2]))
    assert torch.equal(batch.images("this")[0], batch.images("this")[2])
    for k, caption in enumerate(ASKED):
        densities = mixture_of(caption).log_densities(points.x0[k::2].flatten(1), CLEAN)
        assert (densities.max(1).values > -10).all()


def test_noise_drawn_together_is_keyed_as_the_engines_is() -> None:
    first, again, other = (Drawn(range(9), 0, step, "a") for step in (3, 3, 4))
    x = first.normal(SHAPE)
    assert torch.equal(x, again.normal(SHAPE))
    assert not torch.equal(x, other.normal(SHAPE))
    assert not torch.equal(x, first.normal(SHAPE))
    assert first.uniform().dtype == Noise(range(9), 0, 3, "a").uniform().dtype


def test_the_teacher_has_learnt_the_mixture() -> None:
    teacher = recover.teacher().denoiser
    known = family(Exact(teacher.schedule, "flow"), teacher.schedule).denoiser
    batch, noise = Points(4096, seed=1).batch(range(4096)), Drawn(range(4096), 0, 0, "test")
    x0 = batch.images("this")
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        t = torch.full((4096,), share, dtype=torch.float64)
        x_t = add_noise(teacher.schedule, x0, noise.normal(SHAPE), t)
        with torch.no_grad():
            learnt, true = teacher(x_t, t, batch.cond).x0, known(x_t, t, batch.cond).x0
        # beside the variance of x0 given x_t, which nobody could foretell
        assert (learnt - true).square().mean() < 0.02 * (x0 - true).square().mean(), share
    assert at_steps(TEACHER_STEPS).distance < 3 * floor()


# What counts as recovered


def test_exact_samples_fall_short_of_nothing() -> None:
    assert not shortcomings(measure({c: exact(c, seed=1) for c in ASKED}), at_steps(4), at_steps(8))
    assert 5 * floor() < at_steps(8).distance


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_undistilled_teacher_falls_short(num_steps: int) -> None:
    found = shortcomings(at_steps(num_steps), at_steps(num_steps), at_steps(8))
    assert {said.split(" ")[0] for said in found} >= {"distance", "mass", "outside"}
    assert at_steps(num_steps).distance > 1.8 * at_steps(8).distance


def test_what_is_collapsed_blurred_swapped_or_lost_falls_short() -> None:
    x, modes = {c: exact(c, seed=1) for c in ASKED}, {c: mixture_of(c) for c in ASKED}
    nearest = {c: modes[c].log_densities(x[c], CLEAN).argmax(1) for c in ASKED}
    means = {c: modes[c].means[nearest[c]] for c in ASKED}
    noise = torch.Generator().manual_seed(0)

    def short(draws: recover.Draws) -> set[str]:
        return {said.split(" ")[0] for said in shortcomings(measure(draws), at_steps(1), at_steps(8))}

    assert short({c: means[c] + 0.5 * (x[c] - means[c]) for c in ASKED}) == {"distance", "spread"}
    assert short({c: x[c] + 0.5 * torch.randn(x[c].shape, generator=noise) for c in ASKED}) >= {"spread", "outside"}
    assert short(dict(zip(ASKED, reversed(list(x.values())), strict=True))) >= {"distance", "mass", "outside"}
    kept = {c: x[c][nearest[c] != len(modes[c].weights) - 1] for c in ASKED}
    assert short(kept) >= {"distance", "mass"}


# The methods


def test_every_method_has_settings() -> None:
    assert METHODS.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", FEW_STEPS)
def test_few_steps_draw_from_the_mixture(name: str) -> None:
    made, setting = recover.teacher(), SETTINGS[name]
    found = measure(draw_student(distil(name, setting, made), made))
    assert not shortcomings(found, at_steps(setting.num_steps), at_steps(8))


@pytest.mark.parametrize("name", GUIDANCE)
def test_one_pass_does_what_guidance_needs_two_for(name: str) -> None:
    made = recover.teacher()
    student, plain = distil(name, SETTINGS[name], made), draw_guided(made, 1.0)
    for scale in SCALES:
        target, found = draw_guided(made, scale), draw_student(student, made, scale=scale)
        assert off(found, target) < off(plain, target) / 5, scale
        for caption in ASKED:
            assert sliced(found[caption], target[caption]) < sliced(plain[caption], target[caption]) / 5, scale


def test_one_fake_score_for_several_calls_matches_their_pool() -> None:
    made = recover.teacher()
    found = measure(pool(distil("dmd2", POOL, made), made))
    assert not shortcomings(found, at_steps(POOL.num_steps), at_steps(8))
