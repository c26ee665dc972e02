"""DMD on a world with known answers: its gradient, the regression beside it, and who learns from what."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastgen import times
from fastgen.denoiser import guided
from fastgen.engine import Engine
from fastgen.optimizers import Optim
from fastgen.rng import Noise
from fastgen.schedule import Flow, Schedule, add_noise
from fastgen.trainers.dmd import Config, Method
from tests.oracle import (
    Affine,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    labels,
    moved,
    optims,
    same,
    sd_schedule,
    states,
    train,
)

MEANS, STDS, SHAPE = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3), (4, 4)
CONV = Samples((2, 8, 8))


def noise(step: int = 0, n: int = 4) -> Noise:
    return Noise(range(n), 0, step, "both")


def conv_method(**options: float) -> Method:
    return Method(Config(**options), conv_family(), 1)


def gradients(loss: Tensor, method: Method, role: str = "student") -> list[Tensor | None]:
    network = method.networks[role]
    return list(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, retain_graph=True))


# The gradient


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("schedule", [sd_schedule(), Flow()], ids=["sd", "flow"])
def test_rows_of_the_table(share: float, schedule: Schedule) -> None:
    """With an exact fake score, at one t: (mu - m) g_p / N by the mean, tau (g_p - g_q) / N by the deviation.

    g = sigma^2 / (alpha^2 s^2 + sigma^2) of either Gaussian, N = E|x0 - real|.
    """
    kind = "flow" if isinstance(schedule, Flow) else "v"
    m, s, mu, tau, shape = 0.3, 0.5, 0.8, 0.9, (256, 256)
    student = lambda: Affine(schedule, kind, mu, tau)  # noqa: E731
    family = gaussian_family((m,) * 3, (s,) * 3, schedule, kind, shape, student)
    method = Method(Config(guidance_scale=1.0, t_low=share, t_high=share + 1e-6), family, 1)
    with torch.no_grad():
        method.fake_score.network.mean.fill_(mu)
        method.fake_score.network.log_std.fill_(math.log(tau))
    batch = Samples(shape, captions=("left",)).batch(range(4))
    term = method.loss(batch, noise())["dmd"].mean()
    network = method.student.network
    by_mean, by_std = (g[3, 1].item() for g in torch.autograd.grad(term, [network.shift, network.scale]))

    at = schedule(schedule.draw(torch.tensor([share], dtype=torch.float64)))
    alpha, sigma = at.alpha.item(), at.sigma.item()
    g_p, g_q = (sigma**2 / (alpha**2 * d**2 + sigma**2) for d in (s, tau))
    centre, spread = (mu - m) * g_p, math.hypot(g_p * tau, (1 - g_p) / alpha * sigma)
    size = spread * math.sqrt(2 / math.pi) * math.exp(-((centre / spread) ** 2) / 2)
    size += centre * math.erf(centre / spread / math.sqrt(2))
    assert by_mean == pytest.approx((mu - m) * g_p / size, rel=0.02)
    assert by_std == pytest.approx(tau * (g_p - g_q) / size, rel=0.02, abs=0.004)


def test_the_gradient_is_the_difference_of_scores_at_the_same_noised_sample() -> None:
    method, batch = conv_method(guidance_scale=3.0), CONV.batch(range(4))
    with torch.no_grad():
        for p in method.fake_score.network.parameters():
            p.mul_(1.1)
    found = gradients(method.loss(batch, noise(5))["dmd"].sum(), method)

    rng = noise(5)
    x0 = method.generate(rng.normal((2, 8, 8)), batch.cond)
    t = times.uniform(rng, method.teacher.schedule, 0.02, 0.98)
    with torch.no_grad():
        x_t = add_noise(method.teacher.schedule, x0, rng.normal((2, 8, 8)), t)
        real = guided(method.teacher, labels([""]), 3.0)(x_t, t, batch.cond).x0
        fake = method.fake_score(x_t, t, batch.cond).x0
        size = (x0 - real).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1)
    expected = gradients((x0 * (fake - real) / size).sum() / 128, method)
    for one, two in zip(found, expected, strict=True):
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max().item() for g in found if g is not None) > 1e-4


def test_zero_gradient_when_fake_equals_teacher_and_the_pairs_still_pull() -> None:
    terms = conv_method(guidance_scale=1.0).loss(CONV.batch(range(4)), noise())
    assert terms["dmd"].abs().max() == 0
    assert terms["regression"].min() > 0


@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_the_regression_is_its_weight_times_the_mean_square_to_the_pair(weight: float) -> None:
    """And its gradient 2 weight mean(a + b eps - x0), exactly."""
    family = gaussian_family(MEANS, STDS, shape=SHAPE, student=lambda: Affine(sd_schedule(), "v", 0.4, 0.7))
    method = Method(Config(regression_weight=weight), family, 1)
    batch = Samples(SHAPE, MEANS, STDS, captions=("right",)).batch(range(4))
    x0, eps, _ = batch.pairs()
    loss = method.loss(batch, noise())["regression"]
    error = 0.4 + 0.7 * eps - x0
    torch.testing.assert_close(loss, weight * error.square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    shift, scale = torch.autograd.grad(loss.sum(), [method.student.network.shift, method.student.network.scale])
    assert shift[3, 2].item() == pytest.approx(2 * weight * error.flatten(1).mean(1).sum().item(), rel=1e-4)
    assert scale[3, 2].item() == pytest.approx(2 * weight * (error * eps).flatten(1).mean(1).sum().item(), rel=1e-4)


def test_the_paper_s_weight_is_the_default() -> None:
    assert Config().regression_weight == 0.25
    assert (Config().t_low, Config().t_high) == (0.02, 0.98)


# Passes


def test_noise_is_fresh_for_the_gradient_and_the_pair_s_for_the_regression_with_the_same_captions() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    method, batch = conv_method(), CONV.batch(range(4))
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append(args))
    method.loss(batch, noise())
    (fresh, t, label), (paired, t2, label2) = seen
    assert batch.eps is not None
    assert torch.equal(paired, batch.eps)
    assert torch.equal(fresh, noise().normal((2, 8, 8)))
    assert not torch.equal(fresh, paired)
    assert t.tolist() == t2.tolist() == [999.0] * 4
    assert torch.equal(label, batch.cond["label"])
    assert torch.equal(label2, label)
    method.loss(batch, noise(1))
    assert not torch.equal(seen[2][0], fresh)


def test_a_step_takes_the_passes_it_needs() -> None:
    """Student twice, the teacher once on both conditions, the fake score as judge and as learner."""
    method = conv_method()
    rows: dict[str, list[int]] = {role: [] for role in method.networks}
    for role, network in method.networks.items():
        network.register_forward_pre_hook(lambda _, args, to=rows[role]: to.append(len(args[0])))
    method.loss(CONV.batch(range(4)), noise())
    assert rows == {"student": [4, 4], "teacher": [8], "fake_score": [4, 4]}


# Who learns


def test_each_term_reaches_its_own_network_and_no_other() -> None:
    method = conv_method(guidance_scale=2.0)
    terms = method.loss(CONV.batch(range(4)), noise())
    assert set(terms) == {"dmd", "regression", "denoising"}
    for name, role in (("dmd", "student"), ("regression", "student"), ("denoising", "fake_score")):
        for other in ("student", "fake_score"):
            found = gradients(terms[name].sum(), method, other)
            assert all((g is not None and g.abs().max() > 0) == (other == role) for g in found)


def test_both_learn_at_every_step_and_the_teacher_never() -> None:
    method = conv_method(guidance_scale=2.0)
    gained = gradients_by_phase(method)  # type: ignore[arg-type]
    before = states(method)
    engine = Engine(method, CONV, optims(method, lr=1e-3), batch_size=2, steps=3)
    for _, logs in engine.run(range(3)):
        after = states(method)
        for role in ("student", "fake_score"):
            assert moved(before[role], after[role]) == set(before[role])
        assert same(before["teacher"], after["teacher"])
        assert set(logs) == {
            "both/dmd",
            "both/regression",
            "both/denoising",
            "both/student.grad_norm",
            "both/fake_score.grad_norm",
        }
        before = after
    assert {key.partition(".")[0] for key in gained["both"]} == {"student", "fake_score"}


def test_one_phase_gives_what_two_in_turn_give() -> None:
    """The fake score's gradient does not change when the student's terms are left out, and the other way round."""
    method, batch = conv_method(guidance_scale=2.0), CONV.batch(range(4))
    whole = method.loss(batch, noise())
    total = torch.stack(list(whole.values())).sum()
    again = method.loss(batch, noise())
    for role, names in (("student", ("dmd", "regression")), ("fake_score", ("denoising",))):
        apart = torch.stack([again[name] for name in names]).sum()
        for one, two in zip(gradients(total, method, role), gradients(apart, method, role), strict=True):
            assert one is not None
            assert two is not None
            torch.testing.assert_close(one, two)


# End to end


def distil(schedule: Schedule, updates: int = 250) -> list[tuple[float, float]]:
    """Train through the engine on exact pairs; the mean and deviation of samples for "left" and for "right"."""
    kind = "flow" if isinstance(schedule, Flow) else "v"
    family = gaussian_family(MEANS, STDS, schedule, kind, SHAPE)
    method = Method(Config(guidance_scale=1.0), family, 1)
    settings = Optim(lr=0.03, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0)
    data = Samples(SHAPE, MEANS, STDS)
    optim = {"student": settings, "fake_score": settings}
    train(Engine(method, data, optim, batch_size=16, steps=updates), range(updates))
    found, g = [], torch.Generator().manual_seed(1)
    for caption in ("left", "right"):
        with torch.no_grad():
            x0 = method.generate(torch.randn(2000, *SHAPE, generator=g), labels([caption] * 2000))
        found.append((x0.mean().item(), x0.std().item()))
    return found


@pytest.mark.parametrize("schedule", [sd_schedule(), Flow()], ids=["sd", "flow"])
def test_the_student_takes_on_the_teacher_s_mean_and_deviation(schedule: Schedule) -> None:
    (m1, s1), (m2, s2) = distil(schedule)
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.03)


@pytest.mark.parametrize(("weight", "mean"), [(0.01, 1.0), (100.0, 2.0)])
def test_the_gradient_goes_to_the_teacher_and_the_regression_to_the_pairs(weight: float, mean: float) -> None:
    """Pairs that lie, of mean 2 where the teacher's is 1: a light regression does not hold the student there."""
    family = gaussian_family(MEANS, STDS, sd_schedule(), "v", SHAPE)
    method = Method(Config(guidance_scale=1.0, regression_weight=weight), family, 1)
    slow, fast = (Optim(lr=lr, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0) for lr in (0.02, 0.06))
    data = Samples(SHAPE, (0.3, 2.0, -0.5), STDS, captions=("left",))
    engine = Engine(method, data, {"student": slow, "fake_score": fast}, batch_size=16, steps=250)
    train(engine, range(250))
    shift, scale = (p[3, 1].item() for p in (method.student.network.shift, method.student.network.scale))
    assert shift == pytest.approx(mean, abs=0.06)
    assert scale == pytest.approx(0.5, abs=0.06)


# What is refused


def test_several_steps_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dmd makes one-step students, not 4: set student\.steps 1, or use method dmd2"
    ):
        Method(Config(), conv_family(), 4)


def test_an_empty_range_of_times_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t_low 0.6 must be below t_high 0.5"):
        conv_method(t_low=0.6, t_high=0.5)


def test_data_without_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="this batch holds no teacher pairs"):
        conv_method().loss(Samples((2, 8, 8), images=False).batch(range(2)), noise(n=2))


def test_a_fake_score_that_blows_up_stops_the_student() -> None:
    method = conv_method(guidance_scale=1.0)
    with torch.no_grad():
        next(method.fake_score.network.parameters()).fill_(float("nan"))
    assert method.loss(CONV.batch(range(4)), noise())["dmd"].isnan().all()  # on which the engine stops
