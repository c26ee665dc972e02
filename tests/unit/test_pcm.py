"""Phased consistency on a world with known answers: its phases, its jumps, its adversary, and who learns from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastgen import losses, times
from fastgen.adversary import Adversarial
from fastgen.discriminator import features
from fastgen.engine import Engine
from fastgen.guidance import Scales
from fastgen.optimizers import Optim
from fastgen.prediction import Kind, combine
from fastgen.rng import Noise
from fastgen.sampling import ddim, ddim_times, sample, sample_student
from fastgen.schedule import Flow, Schedule, add_more_noise, add_noise
from fastgen.trainers import lcm
from fastgen.trainers.pcm import Config, Method
from tests.oracle import (
    Gaussian,
    Map,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    labels,
    optims,
    same,
    schedules,
    sd_schedule,
    states,
    train,
)

MEANS, STD, SHAPE = (0.3, 1.0, -0.5), 0.5, (4, 4)
CONV = Samples((2, 8, 8))
OFF = Scales(1.0, 1.0, embed=False)
TIMES = [999.0, 749.0, 499.0, 249.0]


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


class Phased(nn.Module):
    """The flow map from t to the end of t's phase, of a Gaussian a caption, as a prediction whose DDIM step it is."""

    def __init__(
        self, means: tuple[float, ...], std: float, schedule: Schedule, kind: Kind, edges: list[float]
    ) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(means)), nn.Parameter(torch.tensor(std).log())
        self.schedule, self.kind, self.edges = schedule, kind, torch.tensor(edges)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        end = torch.stack([self.edges[self.edges < v].max() if v > 0 else v for v in t.double()])
        at, to = self.schedule(t).like(x_t), self.schedule(end).like(x_t)
        mean, std = (label @ self.mean).reshape(-1, *(1,) * (x_t.ndim - 1)), self.log_std.exp()
        spread = [((level.alpha * std).square() + level.sigma.square()).sqrt() for level in (at, to)]
        x_r = to.alpha * mean + spread[1] / spread[0] * (x_t - at.alpha * mean)
        determinant = at.alpha * to.sigma - at.sigma * to.alpha
        x0, eps = to.sigma * x_t - at.sigma * x_r, at.alpha * x_r - to.alpha * x_t
        return combine(self.kind, x0 / determinant, eps / determinant, at)


def world(
    means: tuple[float, ...] = MEANS, std: float = STD, schedule: Schedule | None = None, **options: object
) -> Method:
    """An exact teacher and a student that is the phased map of N(means, std^2), of four phases."""
    schedule = schedule or sd_schedule()
    kind: Kind = "flow" if isinstance(schedule, Flow) else "v"
    edges = [*ddim_times(schedule, 4), schedule.t_min]
    family = gaussian_family(
        MEANS, (STD,) * 3, schedule, kind, SHAPE, lambda: Phased(means, std, schedule, kind, edges)
    )
    return Method(Config(**{"guidance": OFF, **options}), family, 4)  # type: ignore[arg-type]


def conv_method(num_steps: int = 2, **options: object) -> Method:
    torch.manual_seed(0)
    return Method(Config(**options), conv_family(), num_steps)  # type: ignore[arg-type]


# Phases


@pytest.mark.parametrize(
    ("num_steps", "edges"), [(1, [999, 0]), (2, [999, 499, 0]), (4, [*TIMES, 0]), (5, [999, 799, 599, 399, 199, 0])]
)
def test_phases_are_the_intervals_between_the_student_s_times(num_steps: int, edges: list[float]) -> None:
    method = conv_method(num_steps)
    assert method.edges == edges
    inside = torch.tensor([[high, (high + low) / 2, low + 1] for high, low in pairwise(edges)])
    found = [method.phase_of(row.double()).tolist() for row in inside]
    assert found == [[i] * 3 for i in range(num_steps)]


@pytest.mark.parametrize("num_steps", [2, 4, 8])
def test_with_40_solver_steps_the_grid_is_the_paper_s_for_sdxl(num_steps: int) -> None:
    """Every 25th time, the trailing grid of DDIM and 0; a phase ends where the next one starts."""
    method = conv_method(num_steps)
    assert method.grid == [*range(999, 0, -25), 0]
    assert set(method.edges) <= set(method.grid)


# The map


@pytest.mark.parametrize("schedule", schedules())
def test_with_the_true_maps_four_ddim_steps_land_exactly_where_the_flow_does(schedule: Schedule) -> None:
    """And nothing else does: not the teacher's four steps, and not the same student noised afresh."""
    method = world(schedule=schedule)
    n, g = 400, torch.Generator().manual_seed(0)
    x_t, cond = torch.randn(n, *SHAPE, generator=g), labels(["left"] * n)
    ends = [schedule(torch.full((n,), t)).like(x_t) for t in (schedule.t_max, schedule.t_min)]
    expected = Gaussian(1.0, STD).flow_map(x_t, *ends)

    def run(sampler: str) -> Tensor:
        own, fresh = method.edges[:-1], lambda: torch.randn(n, *SHAPE, generator=g)
        with torch.no_grad():
            return sample_student(method.student, schedule, x_t, own, cond, sampler, fresh)  # type: ignore[arg-type]

    torch.testing.assert_close(run("ddim"), expected, rtol=1e-3, atol=1e-3)
    assert method.sampler == "ddim"
    assert (run("renoise").std() / expected.std() - 1).abs() > 0.1
    teacher = sample(method.teacher, schedule, x_t, ddim_times(schedule, 4), cond, ddim)
    assert (teacher.std() / expected.std() - 1).abs() > 0.1


@pytest.mark.parametrize("schedule", schedules())
def test_the_true_maps_loss_falls_as_the_square_of_the_solver_s_step(schedule: Schedule) -> None:
    batch = Samples(SHAPE, captions=("left",)).batch(range(256))

    def rms(steps: int, mean: float = 1.0) -> float:
        method = world((0.3, mean, -0.5), schedule=schedule, solver_steps=steps, metric="l2")
        return method.student_loss(batch, noise(n=256))["consistency"].mean().sqrt().item()

    assert rms(20) / rms(40) == pytest.approx(4, rel=0.35)
    assert rms(40) / rms(80) == pytest.approx(4, rel=0.35)
    assert rms(80, 1.5) > 3 * rms(80)


def test_loss_and_gradient_are_those_of_the_closed_forms() -> None:
    """Both jumps go to the same phase's end; from there itself the target is the teacher's step."""
    method, n, scale = world((0.0, 0.6, 0.0), 0.8, guidance=Scales(3.0, 3.0, embed=False)), 200, 3.0
    schedule, rng = method.schedule, noise(n=n)
    batch = Samples(SHAPE, captions=("left",)).batch(range(n))
    assert batch.x0 is not None
    t, r = times.on_grid(rng, method.grid)
    rng.uniform()  # the scale's
    end = torch.tensor([max(e for e in (*TIMES, 0.0) if e < v) for v in t.tolist()])
    x_t = add_noise(schedule, batch.x0, rng.normal(SHAPE), t)
    at, to, last = (schedule(v).like(x_t) for v in (t, r, end))
    teacher, own = Gaussian(0.3 + scale * 0.7, STD), Gaussian(0.6, 0.8)
    x_r = to.alpha * teacher.x0(x_t, at) + to.sigma * teacher.eps(x_t, at)
    x, y = own.flow_map(x_t, at, last), own.flow_map(x_r, to, last)  # which from the end to the end is nothing
    assert 10 < (r == end).sum() < 40
    torch.testing.assert_close(y[r == end], x_r[r == end])
    found = method.student_loss(batch, noise(n=n))["consistency"]
    torch.testing.assert_close(found, losses.huber(x, y, 1e-3), rtol=1e-2, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.mean(), [method.student.network.mean])
    slope = last.alpha - (own.variance(last) / own.variance(at)).sqrt() * at.alpha
    wanted = (slope * (x - y) / ((x - y).square() + 1e-6).sqrt()).mean()
    assert gradient[1].item() == pytest.approx(wanted.item(), rel=1e-2, abs=1e-4)


def test_one_phase_on_clean_data_is_latent_consistency_to_the_bit() -> None:
    """With the student as its own target: the jump to alpha 1, sigma 0 is x0 itself."""
    scales = Scales(1.0, 4.0, embed=False)
    family = gaussian_family(
        MEANS, (STD,) * 3, Flow(), "flow", SHAPE, lambda: Map((0.1,) * 3, (0.9,) * 3, Flow(), "flow")
    )
    one = Method(Config(guidance=scales, solver_steps=50), family, 1)
    plain = lcm.Method(lcm.Config(guidance=scales, target_decay=0.0), family, 1)
    batch = Samples(SHAPE).batch(range(64))
    found, expected = one.student_loss(batch, noise(n=64)), plain.loss(batch, noise(n=64))
    assert torch.equal(found["consistency"], expected["consistency"])
    more = Method(Config(guidance=scales, solver_steps=50), family, 2).student_loss(batch, noise(n=64))
    assert not torch.equal(more["consistency"], expected["consistency"])


def test_passes_are_one_of_the_student_with_gradient_one_without_and_two_of_the_teacher() -> None:
    seen: dict[str, list[tuple[int, bool]]] = {"teacher": [], "student": []}
    method = conv_method()
    for role, calls in seen.items():
        method.networks[role].register_forward_pre_hook(
            lambda _, args, to=calls: to.append((len(args[0]), torch.is_grad_enabled()))
        )
    method.student_loss(CONV.batch(range(4)), noise())
    assert seen == {"teacher": [(8, False)], "student": [(4, False), (4, True)]}


# The forward process, from a time on


@pytest.mark.parametrize("schedule", schedules())
def test_more_noise_gives_the_law_of_noise_from_the_start(schedule: Schedule) -> None:
    """Mean alpha_t x0 and deviation sigma_t; from a time to itself it does nothing."""
    r = torch.tensor([0.2, 0.5, 0.5]) * schedule.t_max
    t = torch.tensor([0.6, 0.9, 0.5]) * schedule.t_max
    one, none = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    before, after = schedule(r).like(one), schedule(t).like(one)
    torch.testing.assert_close(add_more_noise(schedule, before.alpha * one, none, r, t), after.alpha)
    kept, added = add_more_noise(schedule, before.sigma * one, none, r, t), add_more_noise(schedule, none, one, r, t)
    torch.testing.assert_close(kept.square() + added.square(), after.sigma.square())
    assert added[2].item() == pytest.approx(0, abs=1e-6)
    assert added[0] > 0.1


# The GAN


def gan(**options: object) -> Adversarial:
    return Adversarial(**{"weight": 0.1, "loss": "hinge", "blocks": ["mid"], **options})  # type: ignore[arg-type]


def test_the_heads_learn_the_target_from_the_student_and_the_student_from_them() -> None:
    method = conv_method(adversarial=gan())
    found, before = gradients_by_phase(method), states(method)  # type: ignore[arg-type]
    (logs,) = train(Engine(method, CONV, optims(method, lr=1e-3), batch_size=4, steps=1), range(1))
    after = states(method)
    assert {phase: {key.partition(".")[0] for key in keys} for phase, keys in found.items()} == {
        "discriminator": {"discriminator"},
        "student": {"student"},
    }
    assert set(logs) == {
        "discriminator/gan",
        "discriminator/discriminator.grad_norm",
        "student/consistency",
        "student/gan",
        "student/student.grad_norm",
    }
    assert same(before["teacher"], after["teacher"])
    assert all(not same(before[role], after[role]) for role in ("student", "discriminator"))


def test_adversarial_terms_are_their_losses_at_a_time_within_the_phase_that_both_sides_share() -> None:
    method, n = conv_method(4, adversarial=gan(critic_weight=0.5)), 64
    batch, adversary = CONV.batch(range(n)), method.adversary
    assert adversary is not None
    with torch.no_grad():
        adversary.heads.heads[0][-1].weight.mul_(30)  # out of the margin, where real and fake differ

    rng = noise(n=n, phase="discriminator")
    x, y, phase = method.jumps(batch, rng)
    edges = torch.tensor(method.edges, dtype=torch.float64)
    low, high = edges[phase + 1], edges[phase]
    _, t = method.noising(phase, rng)(x, noise(n=n))
    assert (t > low).all()
    assert (t <= high).all()
    assert ((t - low) / (high - low)).std() > 0.2

    def logits(x: Tensor) -> Tensor:
        x_t = add_more_noise(method.schedule, x, rng.normal((2, 8, 8)), low, t)
        return adversary.heads(features(method.teacher, ["mid"], x_t, t, batch.cond))

    real, fake = logits(y), logits(x)
    found = method.discriminator_loss(batch, noise(n=n, phase="discriminator"))["gan"]
    torch.testing.assert_close(found, 0.5 * losses.hinge_discriminator(real, fake))
    assert (found - 0.5 * losses.hinge_discriminator(fake, real)).abs().max() > 1e-3

    rng = noise(n=n)
    x, _, phase = method.jumps(batch, rng)
    _, t = method.noising(phase, rng)(x, noise(n=n))
    low = edges[phase + 1]
    found = method.student_loss(batch, noise(n=n))["gan"]
    torch.testing.assert_close(found, 0.1 * losses.hinge_generator(logits(x)))
    own = list(method.student.network.parameters())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(found.sum(), own))


def test_features_of_a_fake_score_are_refused() -> None:
    with pytest.raises(ValueError, match="this method has no fake score; set teacher"):
        conv_method(adversarial=gan(features="fake_score"))


def test_images_are_needed() -> None:
    method = conv_method()
    assert method.needs_images
    with pytest.raises(ValueError, match="pcm needs images; this data source has prompts only"):
        method.student_loss(replace(CONV.batch(range(2)), x0=None), noise(n=2))


# End to end


def test_the_student_learns_the_maps_of_the_guided_teacher() -> None:
    """From N(0, 1)'s; 16 DDIM steps within each of four phases hardly narrow it."""
    method = world((0.0,) * 3, 1.0, guidance=Scales(2.0, 2.0, embed=False), solver_steps=64)
    settings = Optim(lr=0.1, schedule="linear", betas=(0.5, 0.99), weight_decay=0.0)
    train(Engine(method, Samples(SHAPE), {"student": settings}, batch_size=16, steps=300), range(300))
    n, g = 500, torch.Generator().manual_seed(1)
    for caption, mean in (("left", 1.0), ("right", -0.5)):
        x_t = torch.randn(n, *SHAPE, generator=g)
        with torch.no_grad():
            x0 = sample_student(method.student, method.schedule, x_t, TIMES, labels([caption] * n), "ddim")
        assert x0.mean().item() == pytest.approx(0.3 + 2 * (mean - 0.3), abs=0.06)
        assert x0.std().item() == pytest.approx(0.5, abs=0.06)
