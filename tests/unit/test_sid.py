"""SiD on a world with known answers: its gradient in closed form, what guidance makes of it, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import losses, times
from fastgen.adversary import Adversarial, Adversary
from fastgen.discriminator import features
from fastgen.engine import Engine
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.prediction import Kind
from fastgen.rng import Noise
from fastgen.sampling import renoise, sample
from fastgen.schedule import Flow, Level, Schedule, add_noise
from fastgen.trainers.sid import Config, Method
from tests.oracle import (
    Affine,
    Gaussian,
    Map,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    hermite,
    labels,
    moved,
    optims,
    same,
    sd_schedule,
    states,
    train,
)

MEANS, SHAPE = (0.3, 1.0, -0.5), (4, 4)
CONV = Samples((2, 8, 8))
VP: tuple[Schedule, Kind] = (sd_schedule(), "v")
RF: tuple[Schedule, Kind] = (Flow(), "flow")


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


def conv_method(num_steps: int = 1, **options: object) -> Method:
    torch.manual_seed(0)
    return Method(Config(**options), conv_family(), num_steps)  # type: ignore[arg-type]


# The gradient in closed form


class Grid(Noise):
    """Noise that is a quadrature: z of the student and eps of x_t on all pairs of nodes, t the same everywhere."""

    def __init__(self, u: float, nodes: int = 6) -> None:
        z, w = hermite(nodes)
        super().__init__(range(nodes * nodes), 0, 0, "")
        self.u, self.normals = u, [z.repeat_interleave(nodes), z.repeat(nodes)]
        self.weights = w.repeat_interleave(nodes) * w.repeat(nodes)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self.normals.pop(0).reshape(-1, *shape)

    def uniform(self) -> Tensor:
        return torch.full((len(self),), self.u, dtype=torch.float64)


class Toy:
    """A student N(mu, tau^2) with an exact or stale fake score, in float64: expectations by quadrature."""

    def __init__(
        self,
        world: tuple[Schedule, Kind] = VP,
        teacher: tuple[Sequence[float], float] = (MEANS, 0.5),
        student: tuple[float, float] = (0.4, 0.8),
        fake: tuple[Sequence[float], float] | None = None,
        **options: Any,
    ) -> None:
        (self.schedule, kind), (self.mu, self.tau) = world, student
        means, std = teacher
        made = Affine(self.schedule, kind, self.mu, self.tau).double()
        family = gaussian_family(means, (std,) * 3, self.schedule, kind, (1, 1, 1), lambda: made)
        family.denoiser.network.double()
        self.method = Method(Config(**{"guidance_scale": 1.0, **options}), family, 1)
        fake_means, fake_std = fake or ((self.mu,) * 3, self.tau)
        score: Any = self.method.fake_score.network
        with torch.no_grad():
            score.mean.copy_(torch.tensor(fake_means))
            score.log_std.fill_(fake_std).log_()
            family.denoiser.network.log_std.fill_(std).log_()  # not by way of float32
            family.denoiser.network.mean.copy_(torch.tensor(means, dtype=torch.float64))
            score.mean.copy_(torch.tensor(fake_means, dtype=torch.float64))
            made.shift.fill_(self.mu)
            made.scale.fill_(self.tau)
        family.denoiser.network.requires_grad_(False)

    def batch(self, n: int) -> Batch:
        return Batch(range(n), labels(["left"] * n, torch.float64), labels([""], torch.float64))

    def at(self, u: float) -> Level:
        return self.schedule(self.time(u))

    def time(self, u: float) -> Tensor:
        return times.uniform(Grid(u, 1), self.schedule, 0.02, 0.98)

    def loss(self, u: float, real: Gaussian) -> Tensor:
        """The expected loss without its normaliser, which ``real``, the guided teacher, gives."""
        rng = Grid(u)
        z, eps = rng.normals
        x0 = self.mu + self.tau * z
        at = self.at(u)
        size = (x0 - real.x0(at.alpha * x0 + at.sigma * eps, at)).abs()
        return (self.method.student_loss(self.batch(len(rng)), rng)["sid"] * size * rng.weights).sum()

    def gradient(self, u: float, real: Gaussian) -> tuple[float, float]:
        """By mu and by tau."""
        student: Any = self.method.student.network
        shift, scale = torch.autograd.grad(self.loss(u, real), [student.shift, student.scale])
        assert shift.count_nonzero() <= 1  # noise at the last time, "left"
        return shift[3, 1].item(), scale[3, 1].item()

    def table(self, u: float, real: Gaussian, a: float) -> tuple[float, float]:
        """The expected gradient in closed form (T1 of the tests' reference), for an exact fake score."""
        at = self.at(u)
        g_p = (at.sigma**2 / real.variance(at)).item()
        g_q = (at.sigma**2 / Gaussian(self.mu, self.tau).variance(at)).item()
        by_mu = (self.mu - real.mean) * g_p * (g_p + (2 * a - 1) * (g_q - g_p))
        return by_mu, 2 * self.tau * (g_p - g_q) * (g_p + a * (g_q - g_p))

    def dmd(self, u: float, real: Gaussian) -> tuple[float, float]:
        at = self.at(u)
        g_p = (at.sigma**2 / real.variance(at)).item()
        g_q = (at.sigma**2 / Gaussian(self.mu, self.tau).variance(at)).item()
        return (self.mu - real.mean) * g_p, self.tau * (g_p - g_q)


TEACHER = Gaussian(1.0, 0.5)


@pytest.mark.parametrize("world", [VP, RF], ids=["vp", "flow"])
@pytest.mark.parametrize("a", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("u", [0.2, 0.5, 0.8])
def test_the_gradient_is_the_table_s(world: tuple[Schedule, Kind], a: float, u: float) -> None:
    """By the student's mean and deviation, with an exact fake score, at each time alone."""
    toy = Toy(world, correction=a)
    assert toy.gradient(u, TEACHER) == pytest.approx(toy.table(u, TEACHER, a), rel=1e-8)


@pytest.mark.parametrize("a", [0.0, 1.0, 1.2])
def test_with_its_networks_detached_it_is_not_sid(a: float) -> None:
    """The value is the same, and the gradient is DMD's for every a."""
    toy = Toy(correction=a)
    rng = Grid(0.5)
    mu = torch.tensor(toy.mu, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(toy.tau, dtype=torch.float64, requires_grad=True)
    x0 = (mu + tau * rng.normals[0])[:, None]
    at = toy.at(0.5)
    x_t = at.alpha * x0 + at.sigma * rng.normals[1][:, None]
    real, fake = TEACHER.x0(x_t, at).detach(), Gaussian(toy.mu, toy.tau).x0(x_t, at).detach()
    wrong = (losses.sid(x0, real, fake, a) * (x0 - real).abs().detach()[:, 0] * rng.weights).sum()
    assert wrong.item() == pytest.approx(toy.loss(0.5, TEACHER).item(), rel=1e-9)
    found = [g.item() for g in torch.autograd.grad(wrong, [mu, tau])]
    assert found == pytest.approx(toy.dmd(0.5, TEACHER), rel=1e-9)
    right = toy.gradient(0.5, TEACHER)
    assert abs(found[0] - right[0]) > 0.02 * abs(right[0])
    assert abs(found[1] - right[1]) > 0.02 * abs(right[1])


def test_a_stays_visible_in_the_gradient() -> None:
    one, other = Toy(correction=1.0).gradient(0.2, TEACHER), Toy(correction=1.2).gradient(0.2, TEACHER)
    assert abs(one[1] - other[1]) > 0.05 * abs(one[1])


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0, 1.2])
def test_the_mean_loss_is_one_minus_a_of_the_squared_gap(a: float) -> None:
    """With an exact fake score: 0 at a = 1, negative at a = 1.2. It says nothing of progress."""
    toy = Toy(correction=a)
    rng, at = Grid(0.5), toy.at(0.5)
    x_t = at.alpha * (toy.mu + toy.tau * rng.normals[0]) + at.sigma * rng.normals[1]
    gap = TEACHER.x0(x_t, at) - Gaussian(toy.mu, toy.tau).x0(x_t, at)
    expected = (1 - a) * (gap.square() * rng.weights).sum()
    assert toy.loss(0.5, TEACHER).item() == pytest.approx(expected.item(), rel=1e-8, abs=1e-12)
    assert (gap.square() * rng.weights).sum() > 0.01


def test_a_student_that_is_far_too_wide_is_repelled_above_a_of_one() -> None:
    """The gradient by tau changes sign where V_q / V_p > a / (a - 1), 6 at a = 1.2; at a = 1 it never does."""
    for a, sign in ((1.0, 1), (1.2, -1)):
        toy = Toy(student=(1.0, 3.0), correction=a)
        at = toy.at(0.1)
        assert Gaussian(1.0, 3.0).variance(at) / TEACHER.variance(at) > 6
        assert toy.gradient(0.1, TEACHER)[1] * sign > 0


def test_at_a_of_one_it_is_the_short_form() -> None:
    """<real - fake, fake - x0> / N, to rounding; and N belongs to its sample."""
    torch.manual_seed(0)
    x0, real, fake = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64).unbind()
    size = (x0 - real).abs().flatten(1).mean(1)
    short = ((real - fake) * (fake - x0)).flatten(1).mean(1) / size
    torch.testing.assert_close(losses.sid(x0, real, fake, 1.0), short, rtol=1e-12, atol=1e-14)
    spoilt = torch.cat([100 * x0[:1], x0[1:]])
    assert torch.equal(losses.sid(spoilt, real, fake, 1.2)[1:], losses.sid(x0, real, fake, 1.2)[1:])


def test_the_normaliser_is_held_and_bounded_below() -> None:
    x0 = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    real, fake = torch.tensor([[3.0, 3.0]]).double(), torch.tensor([[2.5, 3.5]]).double()
    (found,) = torch.autograd.grad(losses.sid(x0, real, fake, 1.0).sum(), x0)
    torch.testing.assert_close(found, -(real - fake) / 2 / 1.5)  # of <gap, real - x0> / n / N, with N = 1.5
    assert losses.sid(real, real, real - 1e-3, 0.0).item() == 0
    assert losses.sid(real, real, real - 1e-3, 1.0).item() == pytest.approx(-1e-6 / 1e-5)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("a", [0.0, 1.0, 1.2])
def test_there_is_no_gradient_where_fake_equals_teacher(num_steps: int, a: float) -> None:
    """At the start, under the same guidance of both: the value is 0, and what comes through the two cancels."""

    def largest(method: Method, step: int) -> tuple[float, float]:
        term = method.student_loss(CONV.batch(range(4)), noise(step))["sid"]
        found = torch.autograd.grad(term.sum(), list(method.student.network.parameters()))
        return term.abs().max().item(), max(g.abs().max().item() for g in found)

    for scale in (1.0, 3.0):
        method = conv_method(num_steps, correction=a, guidance_scale=scale)
        for step in range(3):
            value, gradient = largest(method, step)
            assert value == 0
            assert gradient < 1e-5
        with torch.no_grad():
            method.fake_score.network.leave.bias.add_(0.05)  # type: ignore[union-attr,operator]
        assert largest(method, 0)[1] > 1e-2


def test_the_gradient_passes_through_both_scores_and_stops_at_neither_s_weights() -> None:
    method = conv_method()
    Engine(method, CONV, optims(method), batch_size=2, steps=1).train_only(["student"])
    with torch.no_grad():
        for p in method.fake_score.network.parameters():
            p.add_(0.01 * torch.randn_like(p))
    arrived: dict[str, Tensor] = {}
    for name, denoiser in (("teacher", method.teacher), ("fake", method.fake_score)):

        def enter(module: nn.Module, args: tuple[Tensor, ...], to: str = name) -> None:
            args[0].register_hook(lambda g: arrived.update({to: g}))

        denoiser.network.register_forward_pre_hook(enter)
    method.student_loss(CONV.batch(range(4)), noise())["sid"].sum().backward()
    assert all(g.abs().max() > 0 for g in arrived.values())
    assert set(arrived) == {"teacher", "fake"}
    for denoiser in (method.teacher, method.fake_score):
        assert all(p.grad is None for p in denoiser.network.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.student.network.parameters())


# Guidance


def at_scale(means: Sequence[float], scale: float) -> float:
    """The mean of the guided Gaussian for "left", where all deviations are the same."""
    return means[0] + scale * (means[1] - means[0])


def fitted(student: float, scale: float) -> tuple[float, float, float]:
    """Means of a fake score whose guided prediction for "left" is the student's own."""
    return (0.0, student / scale, 0.0)


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_long_and_short_guidance_is_sid_towards_the_guided_mean(scale: float) -> None:
    """A fake score fitted under guidance is the student's under that guidance, and under no other."""
    real = Gaussian(at_scale(MEANS, scale), 0.5)
    toy = Toy(guidance_scale=scale, fake=(fitted(0.4, scale), 0.8))
    assert toy.gradient(0.5, real) == pytest.approx(toy.table(0.5, real, 1.0), rel=1e-8)
    other = Toy(guidance_scale=scale, fake_guidance_scale=1.0, fake=(fitted(0.4, scale), 0.8))
    assert abs(other.gradient(0.5, real)[0] - toy.table(0.5, real, 1.0)[0]) > 0.01


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_under_guidance_the_fake_score_is_fitted_as_it_is_evaluated(scale: float) -> None:
    """The critic's expected gradient vanishes at the guided fit, and not at the plain one."""

    def gradient(fake: Sequence[float]) -> Tensor:
        toy = Toy(guidance_scale=scale, fake=(fake, 0.8))
        rng = Grid(0.5)
        term = toy.method.critic_loss(toy.batch(len(rng)), rng)["denoising"]
        score: Any = toy.method.fake_score.network
        (found,) = torch.autograd.grad((term * rng.weights).sum(), score.mean)
        return found.abs().max()

    assert gradient(fitted(0.4, scale)) < 1e-12
    assert gradient((0.0, 0.4, 0.0)) > 1e-2


def predictions(method: Method, batch: Batch, rng: Noise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, the teacher's x0, and the fake score's with and without captions, as the student's loss has them."""
    x0 = method.generate(batch, rng)
    t = method.draw_times(rng)
    x_t = add_noise(method.teacher.schedule, x0, rng.normal((2, 8, 8)), t)
    empty = labels([""] * len(batch))
    fake = method.fake_score
    return x0, method.teacher(x_t, t, batch.cond).x0, fake(x_t, t, batch.cond).x0, fake(x_t, t, empty).x0


@pytest.mark.parametrize("scale", [0.0, -1.0, -0.5], ids=["zero", "anti", "half anti"])
def test_zero_and_anti_cfg_add_the_student_s_own_guidance(scale: float) -> None:
    """real - guided fake = (real - fake) + (1 - scale) (fake - fake without captions)."""
    critic = 0.0 if scale == 0 else 1.0
    method = conv_method(guidance_scale=1.0, fake_guidance_scale=scale, critic_guidance_scale=critic)
    with torch.no_grad():
        for p in method.fake_score.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = CONV.batch(range(4))
    x0, real, fake, empty = predictions(method, batch, noise())
    gap = (real - fake) + (1 - scale) * (fake - empty)
    found = method.student_loss(batch, noise())["sid"]
    torch.testing.assert_close(found, losses.sid(x0, real, real - gap, 1.0), rtol=1e-4, atol=1e-6)
    assert (found - losses.sid(x0, real, fake, 1.0)).abs().max() > 1e-3  # and not none


def captions_seen(method: Method, phase: int, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    """Which caption, by its number, each row of each network's last call had."""
    seen: dict[str, Tensor] = {}
    handles = [
        network.register_forward_pre_hook(lambda _, args, to=role: seen.update({to: args[2].argmax(1)}))
        for role, network in method.networks.items()
        if role != "discriminator"
    ]
    method.phases[phase].loss(batch, noise(step, method.phases[phase].name, len(batch)))
    for handle in handles:
        handle.remove()
    return seen


def test_with_zero_cfg_the_fake_score_never_sees_a_caption() -> None:
    method = conv_method(guidance_scale=1.0, fake_guidance_scale=0.0, adversarial=gan(0.1))
    batch = CONV.batch(range(8))
    critic, student = captions_seen(method, 0, batch), captions_seen(method, 1, batch)
    assert (critic["student"] > 0).all()
    assert (student["teacher"] > 0).all()
    assert (critic["fake_score"] == 0).all()
    assert (student["fake_score"] == 0).all()


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"guidance_scale": 1.0}, 0.0),
        ({"guidance_scale": 1.0, "fake_guidance_scale": -1.0, "critic_guidance_scale": 1.0}, 0.25),
        ({"guidance_scale": 4.0, "fake_guidance_scale": 1.0}, 0.0),
        ({"guidance_scale": 2.0}, 0.25),
    ],
    ids=["none", "anti", "long", "long and short"],
)
def test_captions_are_hidden_only_from_a_fake_score_that_needs_to_know_the_empty_one(
    options: dict[str, float], share: float
) -> None:
    method, n = conv_method(caption_dropout=0.25, **options), 400
    seen = captions_seen(method, 0, CONV.batch(range(n)))
    assert (seen["student"] > 0).all()
    assert (seen["fake_score"][:n] == 0).double().mean().item() == pytest.approx(share, abs=0.07 if share else 0)


def test_captions_of_the_student_s_loss_are_whole() -> None:
    seen = captions_seen(conv_method(guidance_scale=1.0, caption_dropout=0.9), 1, CONV.batch(range(40)))
    assert all((rows > 0).all() for rows in seen.values())


# The mixture over steps


STEPS = ((0.2, 1.1), (-0.6, 0.7), (0.9, 0.4))
"""Mean and deviation of the outputs of three steps."""


def of_mixture(x_t: Tensor, at: Level, what: str) -> Tensor:
    """The mixture's log-density, score or posterior mean at x_t."""
    parts = [Gaussian(m, s) for m, s in STEPS]
    logs = torch.stack(
        [
            -0.5 * (x_t - at.alpha * q.mean).square() / q.variance(at) - 0.5 * (2 * torch.pi * q.variance(at)).log()
            for q in parts
        ]
    )
    if what == "log":
        return logs.logsumexp(0) - torch.tensor(3.0).log()
    each = torch.stack([q.x0(x_t, at) if what == "x0" else q.score(x_t, at) for q in parts])
    return (logs.softmax(0) * each).sum(0)


def test_one_fake_score_of_the_uniform_mixture_gives_the_mixture_s_gradient() -> None:
    """d KL(mixture | p) by the mean of a step = (1/K) E_step[(s_mixture - s_p) alpha]; with step-wise scores not."""
    at = sd_schedule()(torch.tensor([400.0]))
    line = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    width = line[1] - line[0]

    def density(mean: Tensor, std: float) -> Tensor:
        variance = (at.alpha * std) ** 2 + at.sigma**2
        return (-0.5 * (line - at.alpha * mean).square() / variance).exp() / (2 * torch.pi * variance).sqrt()

    means = torch.tensor([m for m, _ in STEPS], dtype=torch.float64, requires_grad=True)
    mixture = torch.stack([density(means[k], s) for k, (_, s) in enumerate(STEPS)]).mean(0)
    p = density(torch.tensor(1.0, dtype=torch.float64), 0.5)
    kl = (mixture * (mixture.log() - p.log())).sum() * width
    (expected,) = torch.autograd.grad(kl, means)

    score = of_mixture(line, at, "score") - TEACHER.score(line, at)
    for k, (m, s) in enumerate(STEPS):
        weight = density(torch.tensor(m, dtype=torch.float64), s) * width
        assert ((weight * score).sum() * at.alpha / 3).item() == pytest.approx(expected[k].item(), rel=1e-6)
        own = Gaussian(m, s).score(line, at) - TEACHER.score(line, at)
        assert abs(((weight * own).sum() * at.alpha / 3).item() - expected[k].item()) > 1e-3


def test_the_identity_of_the_loss_holds_over_all_steps_and_not_over_one() -> None:
    """E L = (1 - a) E gap^2 where the fake score is the mixture's and x0 comes from every step alike."""
    at, a = sd_schedule()(torch.tensor([400.0])), 0.5
    nodes = 48
    z, w = hermite(nodes)
    weights = w.repeat_interleave(nodes) * w.repeat(nodes)
    excess = []
    for m, s in STEPS:
        x0 = m + s * z.repeat_interleave(nodes)
        x_t = at.alpha * x0 + at.sigma * z.repeat(nodes)
        real, fake = TEACHER.x0(x_t, at), of_mixture(x_t, at, "x0")
        value = losses.sid(x0[:, None], real[:, None], fake[:, None], a) * (x0 - real).abs()
        excess.append((weights * (value - (1 - a) * (real - fake).square())).sum().item())
    assert sum(excess) == pytest.approx(0, abs=1e-6)
    assert min(abs(e) for e in excess) > 1e-2


def test_each_step_of_the_student_has_its_turn() -> None:
    """In both phases alike, each with its own draw."""
    method = conv_method(4, guidance_scale=1.0)
    seen: list[float] = []
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append(args[1][0].item()))
    batch = CONV.batch(range(1))
    for phase in method.phases:
        last = []
        for step in range(80):
            with torch.no_grad():
                phase.loss(batch, noise(step, phase.name, 1))
            last.append(seen[-1])
        counts = [last.count(t) for t in method.times]
        assert sum(counts) == 80
        assert min(counts) > 8


# What it costs


@pytest.mark.parametrize(
    ("options", "critic", "student"),
    [
        ({"guidance_scale": 1.0}, (0, 1, 1), (1, 1, 1)),
        ({"guidance_scale": 2.0}, (0, 1, 2), (2, 1, 2)),
        ({"guidance_scale": 2.0, "fake_guidance_scale": 1.0}, (0, 1, 1), (2, 1, 1)),
        ({"guidance_scale": 1.0, "critic_guidance_scale": 0.5}, (0, 1, 2), (1, 1, 1)),
        ({"guidance_scale": 1.0, "fake_guidance_scale": 0.0}, (0, 1, 1), (1, 1, 1)),
        (
            {"guidance_scale": 1.0, "fake_guidance_scale": -1.0, "critic_guidance_scale": 1.0},
            (0, 1, 1),
            (1, 1, 2),
        ),
        (
            {"guidance_scale": 1.0, "adversarial": Adversarial(0.1, 0.5, "fake_score")},
            (0, 1, 3),
            (1, 1, 2),
        ),
        ({"guidance_scale": 1.0, "adversarial": Adversarial(0.1, 0.5, "teacher")}, (2, 1, 1), (2, 1, 1)),
    ],
    ids=["none", "long and short", "long", "short", "zero", "anti", "gan", "gan on the teacher"],
)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_network_passes_are_the_algorithm_s(
    options: dict[str, Any], critic: tuple[int, ...], student: tuple[int, ...], num_steps: int
) -> None:
    """Of teacher, student and fake score, in batches; the student's chain before its last call comes on top."""
    method, batch, n = conv_method(num_steps, **options), CONV.batch(range(4)), 4
    counts = {"teacher": 0, "student": 0, "fake_score": 0}
    graphs = {"teacher": 0, "student": 0, "fake_score": 0}

    def counter(role: str) -> Any:
        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[role] += len(args[0])
            graphs[role] += len(args[0]) * torch.is_grad_enabled()

        return count

    for role in counts:
        method.networks[role].register_forward_pre_hook(counter(role))
    for phase, expected in zip(method.phases, (critic, student), strict=True):
        for step in range(6):
            for role in counts:
                counts[role] = graphs[role] = 0
            phase.loss(batch, noise(step, phase.name))
            k = Noise(range(4), 0, step, phase.name).shared_integer(num_steps)
            assert tuple(count / n for count in counts.values()) == (expected[0], expected[1] + k, expected[2])
            assert graphs["student"] == (0 if phase.name == "critic" else n)
            assert graphs["teacher"] == counts["teacher"]  # the gradient comes through each of its passes
            assert graphs["fake_score"] == counts["fake_score"]


# The GAN


def gan(weight: float, critic_weight: float = 0.5, blocks: Sequence[str] = ()) -> Adversarial:
    return Adversarial(weight, critic_weight, "fake_score", list(blocks))


def adversary(method: Method) -> Adversary:
    assert method.adversary is not None
    return method.adversary


def test_without_the_gan_no_image_is_needed_and_no_head_is_made() -> None:
    method = conv_method(4)
    assert not method.needs_images
    assert set(method.networks) == {"teacher", "student", "fake_score"}
    batch = replace(CONV.batch(range(4)), x0=None)
    assert set(method.critic_loss(batch, noise(phase="critic"))) == {"denoising"}
    assert set(method.student_loss(batch, noise())) == {"sid"}


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["none", "zero-cfg"])
def test_adversarial_terms_are_their_losses_times_their_weights(scale: float) -> None:
    """On features of the fake score, which with Zero-CFG is told no caption."""
    method = conv_method(adversarial=gan(0.25, 0.5), guidance_scale=1.0, fake_guidance_scale=scale)
    assert method.needs_images
    batch = CONV.batch(range(4))
    assert batch.x0 is not None
    told = batch.cond if scale else labels([""] * 4)

    def logits(x0: Tensor, rng: Noise) -> Tensor:
        t = times.uniform(rng, method.teacher.schedule)
        x_t = add_noise(method.teacher.schedule, x0, rng.normal((2, 8, 8)), t)
        return adversary(method).heads(features(method.fake_score, ["mid"], x_t, t, told))

    rng = noise(phase="critic")
    x0 = method.generate(batch, rng)
    rng.uniform()
    rng.normal((2, 8, 8))
    expected = 0.5 * losses.gan_discriminator(logits(batch.x0, rng), logits(x0, rng))
    torch.testing.assert_close(method.critic_loss(batch, noise(phase="critic"))["gan"], expected)

    rng = noise()
    x0 = method.generate(batch, rng)
    rng.uniform()
    rng.normal((2, 8, 8))
    expected = 0.25 * losses.gan_generator(logits(x0, rng))
    torch.testing.assert_close(method.student_loss(batch, noise())["gan"], expected)


@pytest.mark.parametrize("source", ["fake_score", "teacher"])
def test_the_gan_trains_heads_and_fake_score_in_the_critic_and_the_student_in_its_own_phase(source: str) -> None:
    options = Adversarial(0.5, 0.5, source, [])  # type: ignore[arg-type]
    method = conv_method(adversarial=options, student_every=2)
    found = gradients_by_phase(method)  # type: ignore[arg-type]
    engine = Engine(method, CONV, optims(method, lr=1e-3, weight_decay=0.0), batch_size=2, steps=2)
    before = states(method)
    first, second = train(engine, range(2))
    roles = {phase: {key.partition(".")[0] for key in keys} for phase, keys in found.items()}
    assert roles == {"critic": {"fake_score", "discriminator"}, "student": {"student"}}
    assert {"critic/gan", "student/gan", "student/sid", "critic/denoising"} <= set(first)
    assert not any(key.startswith("student") for key in second)
    after = states(method)
    assert moved(before["discriminator"], after["discriminator"]) == set(before["discriminator"])
    assert same(before["teacher"], after["teacher"])


# End to end


def distil(
    student: type[Affine] | type[Map],
    num_steps: int = 1,
    world: tuple[Schedule, Kind] = VP,
    updates: int = 400,
    captions: tuple[str, ...] = ("left", "right"),
    stds: tuple[float, float, float] = (0.5, 0.5, 0.3),
    **options: Any,
) -> list[tuple[float, float]]:
    """Train through the engine; the mean and deviation of samples for each caption."""
    schedule, kind = world
    made = (
        (lambda: Affine(schedule, kind))
        if student is Affine
        else (lambda: Map((0.0,) * 3, (1.0,) * 3, schedule, kind))
    )
    family = gaussian_family(MEANS, stds, schedule, kind, SHAPE, made)
    method = Method(Config(**{"guidance_scale": 1.0, **options}), family, num_steps)
    data = Samples(SHAPE, images=False, captions=captions)
    optim = {
        "student": Optim(lr=0.02, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0),
        "fake_score": Optim(lr=0.06, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0),
    }
    train(Engine(method, data, optim, batch_size=16, steps=updates), range(updates))

    found, n, g = [], 2000, torch.Generator().manual_seed(1)
    for caption in captions:
        x_t = torch.randn(n, *SHAPE, generator=g)
        with torch.no_grad():
            x0 = sample(
                method.student,
                schedule,
                x_t,
                family.student_times(num_steps),
                labels([caption] * n),
                renoise,
                lambda: torch.randn(n, *SHAPE, generator=g),
            )
        found.append((x0.mean().item(), x0.std().item()))
    return found


@pytest.mark.parametrize("a", [1.0, 1.2])
def test_a_one_step_student_takes_on_the_teacher_s_mean_and_deviation(a: float) -> None:
    (m1, s1), (m2, s2) = distil(Affine, correction=a)
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.03)


@pytest.mark.parametrize("world", [VP, RF], ids=["vp", "flow"])
def test_a_two_step_student_does_too(world: tuple[Schedule, Kind]) -> None:
    (m1, s1), (m2, s2) = distil(Map, 2, world)
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.03)


def test_long_and_short_guidance_ends_at_the_guided_mean() -> None:
    ((mean, std),) = distil(Affine, captions=("left",), guidance_scale=2.0, stds=(0.5,) * 3)
    assert mean == pytest.approx(0.3 + 2 * 0.7, abs=0.04)
    assert std == pytest.approx(0.5, abs=0.03)


def test_with_the_wrong_sign_it_runs_away() -> None:
    """The shape of the failure: with teacher and fake score exchanged the mean leaves the teacher's."""
    toy = Toy()
    by_mu, _ = toy.gradient(0.5, TEACHER)
    assert (toy.mu - TEACHER.mean) * by_mu > 0  # descent goes to the teacher
    exchanged = Toy(teacher=((0.4,) * 3, 0.8), fake=((1.0,) * 3, 0.5), student=(0.4, 0.8))
    by_mu, _ = exchanged.gradient(0.5, Gaussian(0.4, 0.8))
    assert (0.4 - 1.0) * by_mu < 0


# What is refused


def test_an_empty_range_of_times_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t_low 0.6 must be below t_high 0.5"):
        conv_method(t_low=0.6, t_high=0.5)


def test_captions_never_learnt_are_not_asked_for() -> None:
    with pytest.raises(ValueError, match=r"fake_guidance_scale 2 reads it with them; set both to 0"):
        conv_method(guidance_scale=2.0, critic_guidance_scale=0.0)


def test_a_family_without_blocks_cannot_have_the_gan() -> None:
    with pytest.raises(ValueError, match=r"adversarial\.weight needs"):
        Method(Config(adversarial=gan(1e-3)), gaussian_family(), 1)


def test_a_fake_score_that_blows_up_stops_the_student() -> None:
    method = conv_method(guidance_scale=1.0)
    with torch.no_grad():
        next(method.fake_score.network.parameters()).fill_(float("nan"))
    assert method.student_loss(CONV.batch(range(4)), noise())["sid"].isnan().all()  # on which the engine stops
