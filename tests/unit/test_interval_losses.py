"""Score matching and distribution matching between two noise levels, where no clean sample is at hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgen import losses
from fastgen.prediction import KINDS, Kind, Prediction, combine
from fastgen.schedule import Flow, Level, Schedule, add_noise, onward
from tests.oracle import Gaussian, hermite, schedules, sd_schedule

DATA = Gaussian(0.5, 0.9)


def level(schedule: Schedule, t: float) -> Level:
    return schedule(torch.tensor([t], dtype=torch.float64))


class Pairs:
    """x_r and x_t on all triples of quadrature nodes: data, their noise at r, the noise added up to t."""

    def __init__(self, schedule: Schedule, r: float, t: float, data: Gaussian = DATA, nodes: int = 4) -> None:
        z, w = hermite(nodes)
        e0, e1, self.eps = (g.flatten() for g in torch.meshgrid(z, z, z, indexing="ij"))
        self.weights = torch.stack([g.flatten() for g in torch.meshgrid(w, w, w, indexing="ij")]).prod(0)
        self.before, self.at = level(schedule, r), level(schedule, t)
        self.ratio, self.added = onward(self.before, self.at)
        self.x0 = data.mean + data.std * e0
        self.x_r = self.before.alpha * self.x0 + self.before.sigma * e1
        self.x_t = self.ratio * self.x_r + self.added * self.eps

    def mean(self, x: Tensor) -> Tensor:
        return (self.weights * x).sum()

    def fit(self, target: Tensor) -> tuple[float, float]:
        """Slope and intercept of the regression on x_t: exact, since everything is Gaussian."""
        centred = self.x_t - self.mean(self.x_t)
        slope = self.mean(centred * target) / self.mean(centred.square())
        return slope.item(), (self.mean(target) - slope * self.mean(self.x_t)).item()

    def target(self, kind: Kind) -> Tensor:
        return losses.interval_target(kind, self.x_t, self.eps, self.added, self.at)

    def naive(self, kind: Kind) -> Tensor:
        return combine(kind, self.x_r, self.eps, self.at)


def truth(kind: Kind, at: Level) -> tuple[float, float]:
    """Slope and intercept of the exact posterior mean."""

    def mean(x: float) -> float:
        x_t = torch.tensor([x], dtype=torch.float64)
        return combine(kind, DATA.x0(x_t, at), DATA.eps(x_t, at), at).item()

    return mean(1.0) - mean(0.0), mean(0.0)


INTERVALS = [(Flow(), 0.5, 0.75), (Flow(), 0.5, 0.52), (Flow(), 0.2, 0.9), (sd_schedule(), 400.0, 700.0)]


@pytest.mark.parametrize(("schedule", "r", "t"), INTERVALS)
def test_noise_goes_on_as_the_forward_process_does(schedule: Schedule, r: float, t: float) -> None:
    before, at = level(schedule, r), level(schedule, t)
    ratio, added = onward(before, at)
    torch.testing.assert_close(ratio * before.alpha, at.alpha)
    torch.testing.assert_close((ratio * before.sigma).square() + added.square(), at.sigma.square())


@pytest.mark.parametrize(("schedule", "r", "t"), INTERVALS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_corrected_target_s_regression_is_the_posterior_mean(
    schedule: Schedule, r: float, t: float, kind: Kind
) -> None:
    pairs = Pairs(schedule, r, t)
    assert pairs.fit(pairs.target(kind)) == pytest.approx(truth(kind, pairs.at), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("schedule", "r", "t"), [INTERVALS[i] for i in (0, 1, 3)])  # over long ways it nearly is
@pytest.mark.parametrize("kind", KINDS)
def test_the_naive_target_s_is_not(schedule: Schedule, r: float, t: float, kind: Kind) -> None:
    pairs = Pairs(schedule, r, t)
    (slope, _), (right, _) = pairs.fit(pairs.naive(kind)), truth(kind, pairs.at)
    assert abs(slope - right) > 0.04 * abs(right)


def test_the_numbers_of_the_bias() -> None:
    """Data N(0.5, 0.9^2) on rectified flow, x_r at 0.5; near it even the sign of the naive slope is wrong."""
    pairs = Pairs(Flow(), 0.5, 0.75)
    assert pairs.fit(pairs.target("flow")) == pytest.approx((0.893, -0.612), abs=5e-4)
    assert pairs.fit(pairs.naive("flow")) == pytest.approx((0.784, -0.348), abs=5e-4)
    close = Pairs(Flow(), 0.5, 0.52)
    assert close.fit(close.target("flow"))[0] == pytest.approx(0.287, abs=5e-4)
    assert close.fit(close.naive("flow"))[0] == pytest.approx(-0.513, abs=5e-4)


def test_on_rectified_flow_it_is_the_paper_s_formula() -> None:
    """[(alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_t|s)] eps - x_s / alpha_s."""
    pairs = Pairs(Flow(), 0.5, 0.75)
    r, t = pairs.before, pairs.at
    scale = (r.alpha**2 * t.sigma + t.alpha * r.sigma**2) / (r.alpha**2 * pairs.added)
    torch.testing.assert_close(pairs.target("flow"), scale * pairs.eps - pairs.x_r / r.alpha)


@pytest.mark.parametrize("kind", KINDS)
def test_from_clean_samples_it_is_the_ordinary_target(kind: Kind) -> None:
    pairs = Pairs(Flow(), 0.0, 0.6)
    torch.testing.assert_close(pairs.target(kind), combine(kind, pairs.x0, pairs.eps, pairs.at))


@pytest.mark.parametrize(("t", "variance"), [(0.75, 0.21), (0.52, 6.2)])
def test_the_target_s_own_variance_grows_towards_the_interval_s_end(t: float, variance: float) -> None:
    """(sigma_t / added)^2 ratio^2 Var(x_r) / Var(x_t) for noise: what the weight is there to tame."""
    pairs = Pairs(Flow(), 0.5, t)
    rest = pairs.target("eps") - DATA.eps(pairs.x_t, pairs.at)
    assert pairs.mean(rest.square()).item() == pytest.approx(variance, rel=0.02)
    of_x_r = DATA.variance(pairs.before) * (pairs.at.sigma * pairs.ratio / pairs.added) ** 2
    assert pairs.mean(rest.square()).item() == pytest.approx((of_x_r / DATA.variance(pairs.at)).item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", schedules())
def test_the_loss_is_the_weighted_error_and_least_at_the_exact_score(schedule: Schedule, kind: Kind) -> None:
    r, t = (schedule.t_max * share for share in (0.4, 0.6))
    pairs = Pairs(schedule, r, t)
    x_t, eps = pairs.x_t[:, None], pairs.eps[:, None]
    at, added = pairs.at.like(x_t), pairs.added[:, None]
    exact = combine(kind, DATA.x0(x_t, at), DATA.eps(x_t, at), at).requires_grad_()
    found = losses.interval_denoising(Prediction(exact, kind, x_t, at), eps, added)
    weight = min(1.0, 10 * pairs.added.item() ** 2)
    torch.testing.assert_close(found, weight * (exact[:, 0] - pairs.target(kind)).square())
    (slope,) = torch.autograd.grad((found * pairs.weights).sum(), exact)
    for direction in (torch.ones_like(x_t), x_t):  # orthogonal to every affine change of the prediction
        assert (slope * direction).sum().abs() < 1e-10
    off = losses.interval_denoising(Prediction(exact + 0.1, kind, x_t, at), eps, added)
    assert pairs.mean(off - found) > 1e-4


def test_the_weight_is_one_far_from_the_end_and_falls_towards_it() -> None:
    eps = torch.ones(2, 1, dtype=torch.float64)
    at = Flow()(torch.tensor([0.9, 0.9])).like(eps)
    added = torch.tensor([[0.8], [0.1]], dtype=torch.float64)
    target = losses.interval_target("eps", torch.zeros_like(eps), eps, added, at)
    pred = Prediction(target + 1, "eps", torch.zeros_like(eps), at)
    torch.testing.assert_close(losses.interval_denoising(pred, eps, added), torch.tensor([1.0, 0.1]).double())


@pytest.mark.parametrize(("schedule", "r", "t"), INTERVALS)
def test_the_gradient_is_that_of_the_divergence(schedule: Schedule, r: float, t: float) -> None:
    """E d KL / d E[x_r] = ratio^2 alpha_r (mu - m) / V_t, where both have the same deviation."""
    student, m = Gaussian(1.2, 0.9), DATA.mean
    pairs = Pairs(schedule, r, t, student)
    at = pairs.at
    real = Prediction(DATA.eps(pairs.x_t, at), "eps", pairs.x_t, at)
    fake = Prediction(student.eps(pairs.x_t, at), "eps", pairs.x_t, at)
    found = pairs.mean(losses.interval_grad(real, fake, pairs.ratio))
    expected = pairs.ratio**2 * pairs.before.alpha * (student.mean - m) / DATA.variance(at)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert found > 0  # descent moves the student's mean down to the teacher's


def test_on_rectified_flow_the_gradient_is_a_weighted_difference_of_velocities() -> None:
    """ratio (1 - t) / t (T - F), and alpha_t ratio / (alpha_t sigma_t + sigma_t^2) the same weight."""
    torch.manual_seed(0)
    x_t, real, fake = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    t = torch.tensor([0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    at = Flow()(t).like(x_t)
    ratio, _ = onward(Flow()(torch.full((4,), 0.5)).like(x_t), at)
    found = losses.interval_grad(Prediction(real, "flow", x_t, at), Prediction(fake, "flow", x_t, at), ratio)
    torch.testing.assert_close(found, ratio * ((1 - t) / t)[:, None] * (real - fake))
    torch.testing.assert_close(found, at.alpha * ratio / (at.alpha * at.sigma + at.sigma**2) * (real - fake))


@pytest.mark.parametrize(("schedule", "r", "t"), INTERVALS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_x_r_is_its_regression_on_x_t(schedule: Schedule, r: float, t: float, kind: Kind) -> None:
    pairs = Pairs(schedule, r, t)
    x_t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    exact = combine(kind, DATA.x0(x_t, pairs.at), DATA.eps(x_t, pairs.at), pairs.at)
    found = losses.interval_mean(Prediction(exact, kind, x_t, pairs.at), pairs.ratio, pairs.added)
    slope, intercept = pairs.fit(pairs.x_r)
    assert found.tolist() == pytest.approx([intercept, intercept + slope], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_from_clean_samples_it_is_x0(kind: Kind) -> None:
    torch.manual_seed(0)
    x_t, y = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    clean, at = level(Flow(), 0.0), Flow()(torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)).like(x_t)
    pred = Prediction(y, kind, x_t, at)
    torch.testing.assert_close(losses.interval_mean(pred, *onward(clean.like(x_t), at)), pred.x0)


@pytest.mark.parametrize(("schedule", "r", "t"), INTERVALS)
def test_dmd_s_direction_in_an_interval_is_the_divergence_s_gradient_times_a_weight(
    schedule: Schedule, r: float, t: float
) -> None:
    """(added / ratio)^2 / mean |x_r - real|."""
    torch.manual_seed(0)
    x_r, x_t, real, fake = torch.randn(4, 1, 6, dtype=torch.float64).unbind()
    at = level(schedule, t).like(x_t)
    ratio, added = onward(level(schedule, r).like(x_t), at)
    scores = [Prediction(y, "v", x_t, at) for y in (real, fake)]
    means = [losses.interval_mean(score, ratio, added) for score in scores]
    weight = (added / ratio).square() / (x_r - means[0]).abs().mean()
    expected = weight * losses.interval_grad(*scores, ratio)
    torch.testing.assert_close(losses.dmd_grad(x_r, *means), expected)


def test_two_hops_are_one() -> None:
    """Means and variances of x_t by way of x_r are those of add_noise."""
    pairs = Pairs(Flow(), 0.3, 0.8)
    direct = add_noise(Flow(), pairs.x0, torch.zeros_like(pairs.x0), torch.full_like(pairs.x0, 0.8))
    torch.testing.assert_close(pairs.mean(pairs.x_t), pairs.mean(direct))
    spread = pairs.mean((pairs.x_t - pairs.mean(pairs.x_t)).square())
    torch.testing.assert_close(spread, DATA.variance(pairs.at)[0])
