"""Consistency models on a world with known answers: residuals, fixed points, curricula and who learns from what."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import losses, times
from fastgen.adversary import Adversarial
from fastgen.config import ConfigError, decode
from fastgen.denoiser import Denoiser
from fastgen.discriminator import features
from fastgen.engine import Engine
from fastgen.method import Batch, Phase
from fastgen.optimizers import Optim
from fastgen.prediction import Kind
from fastgen.rng import Noise
from fastgen.rollout import along_ode
from fastgen.sampling import renoise, sample
from fastgen.schedule import Flow, Level, Schedule, add_noise
from fastgen.trainers import consistency
from fastgen.trainers.consistency import Config, Method
from tests.oracle import (
    Gaussian,
    Gaussians,
    Map,
    Samples,
    Toy,
    call,
    conv_family,
    gaussian_family,
    hermite,
    labels,
    linear_method,
    optims,
    same,
    schedules,
    sd_schedule,
    states,
    train,
)

MEANS, STDS, SHAPE = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3), (4, 4)
LEFT = Gaussian(1.0, 0.5)
CONV = Samples((2, 8, 8))
RATIO = {"variant": "ect", "curriculum": "fixed", "intervals": 16}


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


def gaussian_method(
    schedule: Schedule | None = None,
    kind: Kind = "v",
    student: tuple[tuple[float, ...], tuple[float, ...]] = (MEANS, STDS),
    **options: Any,
) -> Method:
    """An exact teacher and a student that is the consistency map of the Gaussians given."""
    schedule = schedule or sd_schedule()
    made = lambda: Map(*student, schedule, kind)  # noqa: E731
    return Method(Config(**options), gaussian_family(MEANS, STDS, schedule, kind, SHAPE, made), 1)


def conv_method(num_steps: int = 1, **options: Any) -> Method:
    torch.manual_seed(0)
    return Method(Config(**options), conv_family(), num_steps)


def gradients(method: Method, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(method.student.network.parameters())))


class Given(Noise):
    """Numbers that the test chooses."""

    def __init__(self, normal: Tensor | None = None, uniform: Tensor | None = None, step: int = 0) -> None:
        super().__init__(range(len(normal if normal is not None else uniform)), 0, step, "given")  # type: ignore[arg-type]
        self._normal, self._uniform = normal, uniform

    def normal(self, shape: object) -> Tensor:
        assert self._normal is not None
        return self._normal

    def uniform(self) -> Tensor:
        assert self._uniform is not None
        return self._uniform


def kappa(schedule: Schedule, t: Tensor) -> Tensor:
    at = schedule(t)
    return at.sigma / at.alpha


# The exact function


def exact_step() -> Callable[..., tuple[Tensor, Tensor]]:
    """In ``along_ode``'s place: the true flow map, and the noise whose removal gives the true clean end."""

    def step(teacher: Any, schedule: Schedule, x_t: Tensor, t: Tensor, r: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        at, to = schedule(t).like(x_t), schedule(r).like(x_t)
        x_r = LEFT.flow_map(x_t, at, to)
        return x_r, (x_r - to.alpha * LEFT.consistency(x_t, at)) / to.sigma.clamp(min=1e-12)

    return step


@pytest.mark.parametrize("options", [{}, {"intervals": 7}, {**RATIO, "solver": "euler", "weight": "uniform"}])
@pytest.mark.parametrize(("schedule", "kind"), [(sd_schedule(), "v"), (sd_schedule(), "eps"), (Flow(), "flow")])
def test_nothing_is_lost_at_the_exact_function_and_the_exact_step(
    schedule: Schedule, kind: Kind, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1 of the test kit: what is wrong in direction, index or boundary shows here."""
    method = gaussian_method(schedule, kind, distance="l2", **options)
    monkeypatch.setattr(consistency.rollout, "along_ode", exact_step())
    batch, rng = Samples(SHAPE, captions=("left",)).batch(range(64)), noise(n=64)
    terms = method.student_loss(batch, rng)
    assert set(terms) == {"consistency"}
    assert terms["consistency"].max() < 1e-8  # squared: 1e-4 of x0, which float32 keeps at alpha 0.07
    wrong = gaussian_method(schedule, kind, ((0.3, 1.3, -0.5), STDS), distance="l2", **options)
    assert wrong.student_loss(batch, noise(n=64))["consistency"].mean() > 100 * terms["consistency"].max()


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("variant", ["cd", "ect"])
@pytest.mark.parametrize(("mean", "std"), [(1.4, 0.5), (0.6, 0.5), (1.0, 0.7), (1.0, 0.35)])
def test_a_perturbed_student_is_pulled_back(schedule: Schedule, variant: str, mean: float, std: float) -> None:
    kind: Kind = "flow" if isinstance(schedule, Flow) else "v"
    start = ((0.3, mean, -0.5), (0.5, std, 0.3))
    options = {"variant": variant, "curriculum": "fixed", "intervals": 40}
    method = gaussian_method(schedule, kind, start, distance="l2", target="student", **options)
    found = gradients(
        method,
        method.student_loss(Samples(SHAPE, captions=("left",)).batch(range(64)), noise(n=64))["consistency"].sum(),
    )
    for gradient, error in zip(found, (mean - 1.0, std - 0.5), strict=True):
        if error:
            assert gradient[1] * error > 0
        assert gradient[0] == gradient[2] == 0


def test_only_the_noisier_side_gets_gradients() -> None:
    """The target is a constant: its own parameters, were they the student's, add nothing."""
    batch = CONV.batch(range(4))
    own = conv_method(target="student", distance="l2", solver="euler")
    averaged = conv_method(distance="l2", solver="euler")
    found = [gradients(m, m.student_loss(batch, noise())["consistency"].sum()) for m in (own, averaged)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert max(g.abs().max() for g in found[0]) > 0


# The teacher's step


class EDM:
    """alpha 1, sigma t."""

    t_min, t_max = 0.002, 80.0

    def __call__(self, t: Tensor) -> Level:
        t = t.double()
        return Level(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))

    def draw(self, u: Tensor) -> Tensor:
        return self.t_min + u * (self.t_max - self.t_min)


def residual(schedule: Schedule, ends: Tensor, solver: Any) -> float:
    """How far a step moves the true clean end of a 1-sigma point, at most, over the steps of a grid."""
    truth, (t, r) = Gaussian(0.3, 0.5), (ends[:-1], ends[1:])
    network = Gaussians((0.3,) * 3, (0.5,) * 3, schedule, "v").double()
    at, to = schedule(t), schedule(r)
    x_t = (at.alpha * 0.3 + truth.variance(at).sqrt())[:, None]
    cond = labels(["left"] * len(t), torch.float64)
    x_r, _ = along_ode(Denoiser(network, schedule, "v", call), schedule, x_t, t, r, cond, solver)
    return (truth.consistency(x_r[:, 0], to) - truth.consistency(x_t[:, 0], at)).abs().max().item()


def karras(num: int) -> Tensor:
    i = torch.arange(num, dtype=torch.float64) / (num - 1)
    return (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


def test_residuals_on_edm_s_grid() -> None:
    """Euler's as in the test kit; Heun's, which there turns in sigma, are about half of EDM's here."""
    grids = [karras(n) for n in (18, 40, 80)]
    assert [residual(EDM(), g, "euler") for g in grids] == pytest.approx([2.68e-2, 5.26e-3, 1.29e-3], rel=5e-3)
    edm = [9.97e-3, 8.14e-4, 9.82e-5]
    for found, theirs in zip([residual(EDM(), g, "heun") for g in grids], edm, strict=True):
        assert 0.4 * theirs < found < 0.65 * theirs


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("schedule", "start"), [(sd_schedule(), 700.0), (Flow(), 1.0)])
def test_a_step_of_half_the_length_errs_a_quarter_by_euler_and_an_eighth_by_heun(
    schedule: Schedule, start: float, solver: str
) -> None:
    errors = [residual(schedule, torch.tensor([start, start * (1 - h)]).double(), solver) for h in (0.04, 0.02, 0.01)]
    order = 4 if solver == "euler" else 8
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([order] * 2, rel=0.13)


def test_the_noise_a_step_leaves_is_the_one_predicted_last() -> None:
    schedule = sd_schedule()
    teacher = Denoiser(Gaussians((0.3,) * 3, (0.5,) * 3, schedule, "v").double(), schedule, "v", call)
    x_t, t, r = torch.randn(3, 2).double(), torch.tensor([999.0, 500, 20]), torch.tensor([900.0, 480, 0])
    cond = labels(["left"] * 3, torch.float64)
    x_r, left = along_ode(teacher, schedule, x_t, t, r, cond, "euler")
    at = schedule(r).like(x_r)
    torch.testing.assert_close((x_r - at.sigma * left) / at.alpha, teacher(x_t, t, cond).x0)
    predicted = x_r
    _, left = along_ode(teacher, schedule, x_t, t, r, cond, "heun")
    torch.testing.assert_close(left, teacher(predicted, r, cond).eps)


@pytest.mark.parametrize(
    ("options", "teacher", "rows"),
    [
        ({"solver": "heun", "guidance_scale": 2.0}, 2, 8),
        ({"solver": "heun"}, 2, 4),
        ({"solver": "euler", "guidance_scale": 2.0}, 1, 8),
        ({"solver": "data"}, 0, 0),
        ({**RATIO}, 0, 0),
    ],
)
def test_it_calls_each_network_as_often_as_the_algorithm_needs(
    options: dict[str, Any], teacher: int, rows: int
) -> None:
    method = conv_method(**options)
    calls: dict[str, list[tuple[int, bool]]] = {role: [] for role in method.networks}
    for role, network in method.networks.items():
        network.register_forward_pre_hook(
            lambda _, args, to=calls[role]: to.append((len(args[0]), torch.is_grad_enabled()))
        )
    method.student_loss(CONV.batch(range(4)), noise())
    assert calls["teacher"] == [(rows, False)] * teacher
    if method.config.target == "ema":
        assert calls["student"] == [(4, True)]
        assert calls["target"] == [(4, False)]
    else:
        assert calls["student"] == [(4, True), (4, False)]


def test_the_teacher_s_step_is_guided() -> None:
    """At the clean end of one interval, Euler: the target is the guided x0 itself."""
    method = conv_method(solver="euler", guidance_scale=3.0, intervals=1, distance="l2")
    batch, rng = CONV.batch(range(4)), noise()
    assert batch.x0 is not None
    rng.uniform()
    t = torch.full((4,), 999.0)
    x_t = add_noise(method.schedule, batch.x0, rng.normal((2, 8, 8)), t)
    pos = method.teacher(x_t, t, batch.cond).x0
    neg = method.teacher(x_t, t, labels([""] * 4)).x0
    expected = losses.mse(method.student(x_t, t, batch.cond).x0, neg + 3 * (pos - neg))
    torch.testing.assert_close(method.student_loss(batch, noise())["consistency"], expected)


# Training from data


def test_the_two_sides_of_a_pair_share_their_noise() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    method = conv_method(variant="ct", curriculum="fixed", intervals=20, target="student")
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    batch = CONV.batch(range(8))
    assert batch.x0 is not None
    method.student_loss(batch, noise(n=8))
    found = []
    for x, t in seen:
        at = method.schedule(t).like(x)
        found.append((x - at.alpha * batch.x0) / at.sigma)
    assert (seen[0][1] > seen[1][1]).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def expected_gradient(
    solver: str, t: float, r: float, student: tuple[float, float], clean: bool = False
) -> tuple[Tensor, Tensor]:
    """The L2 loss at one pair of times and its gradient in mean and deviation, in expectation, by quadrature."""
    mean, std = student
    start = ((0.0, mean, 0.0), (1.0, std, 1.0))
    method = gaussian_method(
        student=start, variant="ict", curriculum="fixed", weight="uniform", solver=solver, distance="l2"
    )
    z, weights = hermite(8)
    x0, eps = (g.reshape(-1, 1, 1) for g in torch.meshgrid(1.0 + 0.5 * z, z, indexing="ij"))
    n = len(x0)
    method.shape = (1, 1)
    method.pair = lambda _: (  # type: ignore[method-assign]
        torch.full((n,), t),
        torch.full((n,), r),
        torch.full((n,), clean),
    )
    method.teacher.network.double()
    method.student.network.double()
    batch = Batch(range(n), labels(["left"] * n, torch.float64), labels([""], torch.float64), x0)
    value = (method.student_loss(batch, Given(eps))["consistency"] * torch.outer(weights, weights).flatten()).sum()
    return value.detach(), torch.stack([g[1] for g in gradients(method, value)])


@pytest.mark.parametrize(("t", "r", "clean"), [(999.0, 974.0, False), (499.0, 399.0, False), (24.0, 0.0, True)])
def test_training_equals_euler_distillation_in_expectation(t: float, r: float, clean: bool) -> None:
    """E[x_r | x_t] is the exact teacher's Euler step, and with L2 the gradient is linear in an affine target."""
    (ct, ct_gradient), (cd, cd_gradient) = (expected_gradient(s, t, r, (0.6, 0.8), clean) for s in ("data", "euler"))
    torch.testing.assert_close(ct_gradient, cd_gradient, rtol=1e-5, atol=1e-9)
    assert ct_gradient.abs().min() > 1e-7
    assert ct > cd  # the variance of x_r given x_t
    _, heun = expected_gradient("heun", t, r, (0.6, 0.8), clean)
    if not clean:
        assert not torch.allclose(heun, cd_gradient, rtol=1e-4)


def test_at_the_exact_function_training_has_a_variance_and_its_gradient_vanishes_with_the_step() -> None:
    found = [expected_gradient("data", 500.0, 500.0 - h, (1.0, 0.5)) for h in (40, 20, 10)]
    assert all(value > 1e-5 for value, _ in found)
    sizes = [gradient.norm() for _, gradient in found]
    for long, short in pairwise(sizes):
        assert long / short == pytest.approx(4, rel=0.15)


def test_one_interval_is_regression_on_the_image() -> None:
    method = conv_method(variant="ct", curriculum="fixed", intervals=1, distance="l2")
    batch, rng = CONV.batch(range(4)), noise()
    assert batch.x0 is not None
    rng.uniform()
    t = torch.full((4,), 999.0)
    y = method.student(add_noise(method.schedule, batch.x0, rng.normal((2, 8, 8)), t), t, batch.cond).x0
    found = method.student_loss(batch, noise())["consistency"]
    torch.testing.assert_close(found, losses.mse(y, batch.x0), rtol=1e-4, atol=1e-6)


# Distances and weights


def test_pseudo_huber_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])
    found = losses.pseudo_huber(x, torch.zeros(3, 2), 2.0)
    c = 2 * math.sqrt(2)
    assert found.tolist() == pytest.approx([math.sqrt(25 + c * c) - c, 0, math.sqrt(0.25 + c * c) - c], abs=1e-6)
    assert losses.pseudo_huber(x, torch.zeros(3, 2), 0.0).tolist() == pytest.approx([5, 0, 0.5])
    # iCT's c: 0.030 for 3 x 32 x 32, 0.060 for 3 x 64 x 64
    for n, floor in ((3 * 32**2, 0.030), (3 * 64**2, 0.060)):
        far = losses.pseudo_huber(torch.full((1, n), 1e3).double(), torch.zeros(1, n).double(), 0.00054)
        assert 1e3 * math.sqrt(n) - far.item() == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize("c", [0.0, 0.00054])
def test_pseudo_huber_has_no_gradient_at_equality(c: float) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    losses.pseudo_huber(x, x.detach().clone(), c).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_ict_weighs_a_pair_by_its_distance_in_sigma_over_alpha() -> None:
    method = conv_method(variant="ict", curriculum="fixed", intervals=20)
    t, r = torch.tensor([999.0, 500.0, 49.0]).double(), torch.tensor([949.0, 450.0, 0.0]).double()
    a, b = kappa(method.schedule, t).tolist(), kappa(method.schedule, r).tolist()
    expected = [1 / (a[0] - b[0]), 1 / (a[1] - b[1]), 1 / a[2]]
    assert method.weight(t, r, torch.tensor([False, False, True])).tolist() == pytest.approx(expected)
    assert 14 < a[0] < 15
    batch, rng = CONV.batch(range(4)), noise()
    drawn = method.pair(rng)
    method.pair = lambda _: drawn  # type: ignore[method-assign]
    weighted = method.student_loss(batch, noise())["consistency"]
    method.config = replace(method.config, weight="uniform")
    plain = method.student_loss(batch, noise())["consistency"]
    gap = kappa(method.schedule, drawn[0]) - torch.where(drawn[2], 0, kappa(method.schedule, drawn[1]))
    torch.testing.assert_close(weighted, (plain / gap).float())


# Pairs


def test_the_grid_is_lcm_s_and_holds_the_student_s_own_times() -> None:
    assert times.grid(sd_schedule(), 50)[:3] == [999, 979, 959]
    assert times.grid(sd_schedule(), 50)[-1] == 19
    assert {999, 749, 499, 249} <= set(times.grid(sd_schedule(), 40))
    assert times.grid(Flow(), 4) == [1, 0.75, 0.5, 0.25]
    assert times.grid(sd_schedule(), 1280) == times.grid(sd_schedule(), 1000) == [999.0 - i for i in range(1000)]


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("intervals", [1, 10, 1280])
def test_uniform_pairs_take_every_interval_alike(schedule: Schedule, intervals: int) -> None:
    n = min(intervals, 1000) if schedule.t_max > 1 else intervals
    t, r, clean = times.grid_pair(Given(uniform=(torch.arange(2 * n) + 0.5) / (2 * n)), schedule, intervals, None)
    grid = torch.tensor(times.grid(schedule, intervals)).double()
    torch.testing.assert_close(t, grid.repeat_interleave(2))
    torch.testing.assert_close(r, torch.cat([grid[1:], grid.new_tensor([schedule.t_min])]).repeat_interleave(2))
    assert clean.nonzero().flatten().tolist() == [2 * n - 2, 2 * n - 1]


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("intervals", [10, 40])
def test_lognormal_pairs_are_ict_s_discretised_law(schedule: Schedule, intervals: int) -> None:
    """erf((ln b + 1.1) / (2 sqrt 2)) - erf((ln a + 1.1) / (2 sqrt 2)) for an interval [a, b] of sigma / alpha."""
    many = 20000
    t, _, _ = times.grid_pair(Given(uniform=(torch.arange(many) + 0.5) / many), schedule, intervals, (-1.1, 2.0))
    ends = times.grid(schedule, intervals)

    def erf(time: float | None) -> float:
        if time is None:
            return -1.0  # clean data
        at = schedule(torch.tensor([time]))
        if not at.alpha.item():
            return 1.0
        return math.erf((math.log(at.sigma.item() / at.alpha.item()) + 1.1) / (2 * math.sqrt(2)))

    mass = [erf(a) - erf(b) for a, b in zip(ends, [*ends[1:], None], strict=True)]
    for start, expected in zip(ends, mass, strict=True):
        assert (t == start).double().mean().item() == pytest.approx(expected / sum(mass), abs=2 / many)


@pytest.mark.parametrize("schedule", schedules())
def test_ratio_pairs_are_ect_s(schedule: Schedule) -> None:
    """r = t (1 - q^-(stage + 1) (1 + 8 sigmoid(-t))) in sigma / alpha, or clean data where that is none."""
    n = 400
    for inverse in (2, 16, 256):
        t, r, clean = times.ratio_pair(noise(n=n), schedule, inverse, (-1.1, 2.0))
        at, to = kappa(schedule, t), kappa(schedule, r)
        expected = at * (1 - (1 + 8 * torch.sigmoid(-at)) / inverse)
        least = kappa(schedule, torch.tensor([schedule.t_min])).item()
        assert torch.equal(clean, expected <= least)
        assert (r[clean] == schedule.t_min).all()
        assert 10 < clean.sum() < n - 10 or (isinstance(schedule, Flow) and inverse > 9 and not clean.any())
        assert (r[~clean] < t[~clean]).all()
        if isinstance(schedule, Flow):
            torch.testing.assert_close(to[~clean], expected[~clean], rtol=1e-6, atol=1e-9)
        else:  # the table's next cleaner time
            assert (to[~clean] <= expected[~clean] + 1e-12).all()
            assert (kappa(schedule, r[~clean] + 1) > expected[~clean]).all()
        assert at.log().median().item() == pytest.approx(-1.1, abs=0.35)


def test_an_ect_pair_that_ends_clean_is_the_unsquared_denoising_loss_over_t() -> None:
    method = conv_method(variant="ect", curriculum_steps=80)
    batch = CONV.batch(range(16))
    assert batch.x0 is not None
    rng = noise(n=16)
    t, _, clean = method.pair(rng)
    y = method.student(add_noise(method.schedule, batch.x0, rng.normal((2, 8, 8)), t), t, batch.cond).x0
    expected = (y - batch.x0).flatten(1).norm(dim=1) / kappa(method.schedule, t)
    found = method.student_loss(batch, noise(n=16))["consistency"]
    assert 4 < clean.sum() < 16
    torch.testing.assert_close(found[clean].double(), expected[clean].double(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[~clean].double(), expected[~clean].double(), rtol=1e-2)


# Curricula


def test_ct_s_curriculum_grows_as_a_square_root() -> None:
    """s0 = 2, s1 = 200, K = 800k: N(k) = 2 levels at first and 201 at last."""
    found = [times.root_intervals(k, 800_000, 2, 200) for k in (0, 1, 200_000, 400_000, 799_999, 800_000, 10**7)]
    assert found == [1, 2, 100, 142, 200, 200, 200]


def test_ict_s_curriculum_doubles_in_stages_of_equal_length() -> None:
    """s0 = 10, s1 = 1280, K = 400k: 8 stages of 50k."""
    found = [
        times.doubling_intervals(k, 400_000, 10, 1280) for k in (0, 49_999, 50_000, 100_000, 349_999, 350_000, 10**9)
    ]
    assert found == [10, 10, 20, 40, 640, 1280, 1280]
    assert times.doubling_intervals(0, 3, 10, 1280) == 10
    assert times.doubling_intervals(100, 400, 10, 15) == 10
    assert times.doubling_intervals(400, 400, 10, 15) == 15


def test_ect_s_stages_are_the_powers_of_two_from_2_to_256() -> None:
    assert [times.doubling_intervals(10 * s, 80, 2, 256) for s in range(9)] == [2, 4, 8, 16, 32, 64, 128, 256, 256]


def test_the_step_in_the_noise_moves_the_curriculum() -> None:
    method = conv_method(variant="ct", curriculum_steps=100)
    seen: list[Tensor] = []
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    for step in (0, 50, 100):
        method.student_loss(CONV.batch(range(32)), noise(step, n=32))
    assert [method.count(s) for s in (0, 50, 100)] == [1, 142, 200]
    assert (seen[0] == 999).all()
    assert len(seen[2].unique()) > 25
    assert {t % 5 for t in seen[2].tolist()} == {4.0}  # 1000 / 200 apart


# The target


def test_the_target_follows_the_student_after_each_update() -> None:
    method = conv_method(solver="euler", ema=0.8)
    engine = Engine(method, CONV, optims(method, lr=1e-2), batch_size=2, steps=3)
    before = states(method)
    assert same(before["target"], before["student"])
    for _ in engine.run(range(3)):
        after = states(method)
        for name, value in after["target"].items():
            expected = torch.lerp(before["target"][name], after["student"][name], 1 - 0.8)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
            assert not torch.equal(value, after["student"][name])
        assert same(before["teacher"], after["teacher"])
        before = after


def test_ct_s_decay_rises_with_the_number_of_levels() -> None:
    """mu(k) = exp(s0 log mu0 / N(k))."""
    method = conv_method(variant="ct", curriculum_steps=100, ema=0.9)
    for step, levels in ((0, 2), (50, 143), (100, 201)):
        method.student_loss(CONV.batch(range(2)), noise(step, n=2))
        assert method.target.decay == pytest.approx(math.exp(2 * math.log(0.9) / levels))
    fixed = conv_method(ema=0.9)
    fixed.student_loss(CONV.batch(range(2)), noise(70, n=2))
    assert fixed.target.decay == 0.9


def test_without_an_average_the_target_is_the_student_as_it_is_now() -> None:
    method = conv_method(variant="ict", curriculum_steps=100)
    assert method.target.denoiser is method.student
    assert set(method.networks) == {"teacher", "student"}
    assert not method.phases[0].moves


def test_a_role_that_moves_must_be_one_that_nothing_trains() -> None:
    for moves in (["b"], ["c"]):
        toy = linear_method()
        phases = (Phase("first", ["a"], toy.phases[0].loss, moves=moves), toy.phases[1])
        with pytest.raises(ValueError, match=f"a phase moves '{moves[0]}', which must be a network that no phase"):
            Engine(Toy(toy.networks, phases), CONV, {"a": Optim(), "b": Optim()}, batch_size=2, steps=1)


# End to end


Rows = list[list[float]]


def sampled(denoiser: Denoiser, schedule: Schedule) -> Rows:
    """Mean and deviation of "left" and of "right" by 1, 2 and 4 steps from pure noise."""
    rows, n = [], 2000
    for num_steps in (1, 2, 4):
        g, row = torch.Generator().manual_seed(1), []
        fresh = lambda g=g: torch.randn(n, *SHAPE, generator=g)  # noqa: E731
        for caption in ("left", "right"):
            x_t, cond, grid = (
                fresh(),
                labels([caption] * n),
                gaussian_family(schedule=schedule).student_times(num_steps),
            )
            with torch.no_grad():
                x0 = sample(denoiser, schedule, x_t, grid, cond, renoise, fresh)
            row += [x0.mean().item(), x0.std().item()]
        rows.append(row)
    return rows


def distil(
    updates: int = 300, schedule: Schedule | None = None, kind: Kind = "v", **options: Any
) -> tuple[Rows, Rows]:
    """Train a far-off student through the engine; its samples, and those of the teacher's exact function.

    Also the exact one gives a mean a little short by one step, since a table's last time is not quite pure noise.
    """
    stds, schedule = (0.5, 0.5, 0.5), schedule or sd_schedule()
    family = gaussian_family(MEANS, stds, schedule, kind, SHAPE, lambda: Map((0.0,) * 3, (1.0,) * 3, schedule, kind))
    method = Method(Config(**options), family, 1)
    settings = Optim(lr=0.05, schedule="cosine", betas=(0.0, 0.9), weight_decay=0.0)
    data = Samples(SHAPE, MEANS, stds)
    train(Engine(method, data, {"student": settings}, batch_size=16, steps=updates), range(updates))
    scale = method.config.guidance_scale
    exact = Map(tuple(0.3 + scale * (m - 0.3) for m in MEANS), stds, schedule, kind)
    return sampled(method.student, schedule), sampled(method.student.with_network(exact), schedule)


def agree(found: Rows, expected: Rows, abs: float) -> None:
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, abs=abs)


def test_the_exact_function_samples_the_data_at_any_number_of_steps() -> None:
    for schedule, kind in ((sd_schedule(), "v"), (Flow(), "flow")):
        for row in sampled(Denoiser(Map(MEANS, STDS, schedule, kind), schedule, kind, call), schedule):
            assert row == pytest.approx([1.0, 0.5, -0.5, 0.3], abs=0.04)


def test_heun_distillation_finds_the_teacher_at_1_2_and_4_steps() -> None:
    agree(*distil(intervals=16, ema=0.5), abs=0.02)


def test_on_rectified_flow_it_does_too() -> None:
    agree(*distil(schedule=Flow(), kind="flow", intervals=16, ema=0.5), abs=0.02)


def test_guided_steps_lead_to_the_guided_teacher() -> None:
    """m_u + w (m_c - m_u), which data alone could not teach."""
    found, expected = distil(guidance_scale=2.0, intervals=16, target="student")
    assert expected[2] == pytest.approx([1.7, 0.5, -1.3, 0.5], abs=0.03)
    agree(found, expected, abs=0.02)


def test_training_and_euler_distillation_share_a_fixed_point_and_its_bias() -> None:
    """With L2: means are right, deviations a quarter short on 8 steps, as the teacher's own DDIM is."""
    options = {"intervals": 8, "ema": 0.5, "curriculum": "fixed", "distance": "l2"}
    euler, _ = distil(200, variant="cd", solver="euler", **options)
    training, _ = distil(200, variant="ct", **options)
    agree(training, euler, abs=0.04)
    assert euler[2] == pytest.approx([1.0, 0.37, -0.5, 0.37], abs=0.03)


@pytest.mark.parametrize(("variant", "updates"), [("ict", 300), ("ect", 150)])
def test_training_finds_the_data_without_a_teacher(variant: str, updates: int) -> None:
    agree(*distil(updates, variant=variant, curriculum_steps=updates), abs=0.05)


# The adversarial term


def test_the_adversarial_term_judges_the_student_s_own_x0() -> None:
    gan = Adversarial(weight=0.25, critic_weight=0.5, blocks=["mid"])
    method = conv_method(solver="euler", adversarial=gan)
    assert [(p.name, list(p.trains)) for p in method.phases] == [
        ("discriminator", ["discriminator"]),
        ("student", ["student"]),
    ]
    assert method.adversary is not None
    batch, rng = CONV.batch(range(4)), noise()
    assert batch.x0 is not None
    y = method.generate(batch, rng)
    t = times.uniform(rng, method.schedule)
    x_t = add_noise(method.schedule, y, rng.normal((2, 8, 8)), t)
    expected = 0.25 * losses.gan_generator(
        method.adversary.heads(features(method.teacher, ["mid"], x_t, t, batch.cond))
    )
    terms = method.student_loss(batch, noise())
    assert set(terms) == {"consistency", "gan"}
    torch.testing.assert_close(terms["gan"], expected)
    assert all(g.abs().max() > 0 for g in gradients(method, terms["gan"].sum()))


# What is refused


def test_variants_give_what_is_left_out_and_nothing_else() -> None:
    assert Config() == Config("cd", "heun", 1.0, "ema", 0.95, "grid", "uniform", -1.1, 2.0, "fixed", 40, 40)
    ict = Config("ict", curriculum_steps=100)
    assert (ict.solver, ict.target, ict.times, ict.weight) == ("data", "student", "lognormal", "inverse")
    assert (ict.start, ict.intervals, ict.huber) == (10, 1280, 0.00054)
    assert Config("ict", solver="euler", intervals=64, curriculum_steps=9).solver == "euler"
    ect = Config("ect", curriculum_steps=100)
    assert (ect.pairs, ect.start, ect.intervals, ect.huber) == ("ratio", 2, 256, 0.0)
    ct = Config("ct", curriculum_steps=100)
    assert (ct.solver, ct.target, ct.times, ct.weight, ct.start, ct.intervals) == (
        "data",
        "ema",
        "uniform",
        "uniform",
        2,
        200,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ct", "curriculum_steps": 9, "guidance_scale": 2.0}, "guidance_scale 2 guides a teacher's step"),
        ({"variant": "ict"}, "curriculum doubling needs curriculum_steps; set it to run.steps"),
        ({"variant": "ct", "curriculum_steps": 9, "intervals": 1}, "start 2 must not be above intervals 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Config, options, "config.yaml")


def test_inverse_weights_are_refused_on_a_grid_that_starts_at_pure_noise() -> None:
    with pytest.raises(ValueError, match=r"weight inverse is 0 at this schedule's pure noise; set weight uniform"):
        gaussian_method(Flow(), "flow", variant="ict", curriculum_steps=9)
    gaussian_method(Flow(), "flow", variant="ict", curriculum_steps=9, weight="uniform")
    gaussian_method(Flow(), "flow", variant="ect", curriculum_steps=9)


def test_a_student_that_starts_before_the_last_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meets pure noise at time 999, not 399; set student.start 1"):
        Method(Config(), gaussian_family(start=0.4), 1)


def test_it_needs_images() -> None:
    batch = replace(CONV.batch(range(2)), x0=None)
    with pytest.raises(ValueError, match="consistency needs images; this data source has prompts only"):
        conv_method().student_loss(batch, noise(n=2))


def test_there_is_no_fake_score_to_read() -> None:
    with pytest.raises(ValueError, match=r"adversarial\.features fake_score"):
        conv_method(adversarial=Adversarial(0.1, features="fake_score"))
