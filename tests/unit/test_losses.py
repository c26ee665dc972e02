"""Losses against closed forms, most of all the distribution-matching gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import losses
from fastgen.prediction import KINDS, Kind, Prediction, combine
from fastgen.schedule import Level, Schedule
from tests.oracle import Gaussian, hermite, schedules


def three(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x0, real, fake: [5, 2, 4, 4] float64."""
    g = torch.Generator().manual_seed(seed)
    x0, real, fake = (torch.randn(5, 2, 4, 4, generator=g).double() for _ in range(3))
    return x0, real, fake


def test_per_sample_averages_all_but_the_batch() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert losses.per_sample(x).tolist() == [2.5, 8.5]
    assert losses.mse(x, x + 2).tolist() == [4, 4]


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("kind", KINDS)
def test_denoising_is_zero_at_the_target_and_the_square_of_the_error_beside_it(schedule: Schedule, kind: Kind) -> None:
    x0, eps, _ = three()
    at = schedule(torch.full((5,), 0.4 * schedule.t_max)).like(x0)
    target = combine(kind, x0, eps, at)
    x_t = at.alpha * x0 + at.sigma * eps
    assert losses.denoising(Prediction(target, kind, x_t, at), x0, eps).abs().max() == 0
    off = losses.denoising(Prediction(target + 0.5, kind, x_t, at), x0, eps)
    torch.testing.assert_close(off, torch.full((5,), 0.25, dtype=torch.float64))


# The surrogate


def test_surrogate_gradient_is_the_given_one_over_n_exactly() -> None:
    x0, grad, _ = three()
    x0 = (x0 * 64).round() / 64  # dyadic, so that subtracting and adding is exact
    grad = (grad * 64).round() / 64
    x0.requires_grad_(True)
    losses.surrogate(x0, grad).sum().backward()
    assert x0.grad is not None
    assert torch.equal(x0.grad, grad / 32)


def test_surrogate_gradient_is_right_to_rounding_for_any_numbers() -> None:
    x0, grad, _ = (x.float() for x in three())
    x0.requires_grad_(True)
    losses.surrogate(x0, grad).mean().backward()
    torch.testing.assert_close(x0.grad, grad / (5 * 32), rtol=1e-5, atol=1e-8)


def test_surrogate_value_is_half_the_mean_square() -> None:
    x0, grad, _ = three()
    torch.testing.assert_close(losses.surrogate(x0, grad), 0.5 * grad.square().mean((1, 2, 3)))


# The direction


def test_dmd_grad_is_the_difference_over_the_mean_distance_of_each_sample() -> None:
    x0, real, fake = three()
    grad = losses.dmd_grad(x0, real, fake)
    for i in range(5):
        torch.testing.assert_close(grad[i], (fake[i] - real[i]) / (x0[i] - real[i]).abs().mean())


def test_scaling_one_sample_leaves_the_others_bit_for_bit() -> None:
    x0, real, fake = three()
    before = losses.dmd_grad(x0, real, fake)
    real[2] *= 1000
    after = losses.dmd_grad(x0, real, fake)
    others = [0, 1, 3, 4]
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[2], before[2])


def test_permuting_the_batch_permutes_the_gradient() -> None:
    x0, real, fake = three()
    order = [3, 1, 4, 0, 2]
    assert torch.equal(losses.dmd_grad(x0[order], real[order], fake[order]), losses.dmd_grad(x0, real, fake)[order])


def test_dmd_grad_does_not_depend_on_the_scale_of_the_latents() -> None:
    x0, real, fake = three()
    torch.testing.assert_close(
        losses.dmd_grad(100 * x0, 100 * real, 100 * fake), losses.dmd_grad(x0, real, fake), rtol=1e-12, atol=1e-12
    )


def test_dmd_grad_is_exactly_zero_when_fake_equals_teacher() -> None:
    x0, real, _ = three()
    assert losses.dmd_grad(x0, real, real.clone()).abs().max() == 0


def test_dmd_grad_is_finite_where_the_teacher_returns_its_input() -> None:
    x0, _, fake = three()
    torch.testing.assert_close(losses.dmd_grad(x0, x0, fake), (fake - x0) / 1e-5)
    assert losses.dmd_grad(x0, x0, x0).abs().max() == 0


def test_dmd_grad_has_no_graph() -> None:
    x0, real, fake = (x.requires_grad_(True) for x in three())
    assert not losses.dmd_grad(x0, real, fake).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["real", "fake"])
def test_what_is_not_finite_stays_so_in_its_sample_and_reaches_the_loss(which: str, bad: float) -> None:
    x0, real, fake = three()
    {"real": real, "fake": fake}[which][1, 0, 0, 0] = bad
    loss = losses.surrogate(x0, losses.dmd_grad(x0, real, fake))
    assert torch.isfinite(loss).tolist() == [i != 1 for i in range(len(x0))]


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_expected_gradient_equals_the_closed_form_in_mean_and_scale(schedule: Schedule, share: float) -> None:
    """T1: student mu + tau z, teacher N(m, s^2), exact fake score.

    dL/dmu = (mu - m) g_p and dL/dtau = tau (g_p - g_q), where g = sigma^2 / (alpha^2 std^2 + sigma^2). The averages
    over z and eps are taken by Gauss-Hermite quadrature, which is exact here.
    """
    teacher, student = Gaussian(0.3, 0.5), Gaussian(-0.4, 0.8)
    z, eps, weight, at = grid(schedule, share)
    mu, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (student.mean, student.std))
    x0 = mu + tau * z
    with torch.no_grad():
        x_t = at.alpha * x0 + at.sigma * eps
        real, fake = teacher.x0(x_t, at), student.x0(x_t, at)
        size = (x0 - real).abs().clamp(min=1e-5)
        grad = losses.dmd_grad(x0, real, fake) * size  # the normaliser undone
    (weight * losses.surrogate(x0, grad)).sum().backward()
    g_p, g_q = (at.sigma[0].square() / world.variance(at)[0] for world in (teacher, student))
    assert mu.grad is not None
    assert tau.grad is not None
    torch.testing.assert_close(mu.grad, ((student.mean - teacher.mean) * g_p).squeeze(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(tau.grad, (student.std * (g_p - g_q)).squeeze(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_direction_is_the_score_difference(schedule: Schedule, share: float) -> None:
    """Fake x0 - real x0 = (sigma^2 / alpha) (s_q - s_p), the gradient of KL(q_t || p_t)."""
    teacher, student = Gaussian(0.3, 0.5), Gaussian(-0.4, 0.8)
    z, eps, _, at = grid(schedule, share)
    x_t = at.alpha * (student.mean + student.std * z) + at.sigma * eps
    difference = at.sigma**2 / at.alpha * (student.score(x_t, at) - teacher.score(x_t, at))
    torch.testing.assert_close(student.x0(x_t, at) - teacher.x0(x_t, at), difference, rtol=1e-9, atol=1e-12)


def test_the_normaliser_fades_as_noise_does() -> None:
    """At q = p, E|x0 - real| = sqrt(2 / pi) s sigma / sqrt(V): checked by Monte Carlo within five deviations."""
    schedule, world, n = schedules()[0], Gaussian(0.3, 0.5), 200_000
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    x0 = world.mean + world.std * x0
    for t in (50.0, 300.0, 700.0):
        at = schedule(torch.tensor([t], dtype=torch.float64))
        distance = (x0 - world.x0(at.alpha * x0 + at.sigma * eps, at)).abs()
        expected = math.sqrt(2 / math.pi) * world.std * at.sigma / world.variance(at).sqrt()
        assert abs(distance.mean() - expected) < 5 * distance.std() / n**0.5


def grid(schedule: Schedule, share: float) -> tuple[Tensor, Tensor, Tensor, Level]:
    """z, eps: [N, 1] of every pair of quadrature nodes; weight: [N]; level: at [N, 1]."""
    nodes, weights = hermite()
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    weight = torch.outer(weights, weights).flatten()
    z, eps = z.reshape(-1, 1), eps.reshape(-1, 1)
    at = schedule(torch.full((len(z),), share * schedule.t_max, dtype=torch.float64)).like(z)
    return z, eps, weight, at


# The GAN


def test_gan_losses_at_logit_zero_are_log_two_a_side() -> None:
    zero = torch.zeros(3, 4, dtype=torch.float64)
    assert losses.gan_discriminator(zero, zero).tolist() == pytest.approx([2 * math.log(2)] * 3)
    assert losses.gan_generator(zero).tolist() == pytest.approx([math.log(2)] * 3)


def test_gan_losses_are_binary_cross_entropies() -> None:
    real, fake = (torch.randn(3, 4, dtype=torch.float64, generator=torch.manual_seed(s)) for s in (0, 1))
    one, none = torch.ones_like(real), torch.zeros_like(real)
    expected = F.binary_cross_entropy_with_logits(real, one, reduction="none").mean(1)
    expected += F.binary_cross_entropy_with_logits(fake, none, reduction="none").mean(1)
    torch.testing.assert_close(losses.gan_discriminator(real, fake), expected)
    expected = F.binary_cross_entropy_with_logits(fake, one, reduction="none").mean(1)
    torch.testing.assert_close(losses.gan_generator(fake), expected)


def test_gan_sides_pull_the_logits_apart_and_the_generator_pushes_up() -> None:
    real, fake = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    losses.gan_discriminator(real, fake).sum().backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad == -0.5).all()
    assert (fake.grad == 0.5).all()
    fake.grad = None
    losses.gan_generator(fake).sum().backward()
    assert (fake.grad == -0.5).all()


def test_the_best_discriminator_of_two_gaussians_gives_the_known_generator_gradient() -> None:
    """Non-saturating, optimal logit, q near p: dL/dmu = 1/2 alpha^2 (mu - m) / V_p at equal deviations."""
    schedule, teacher, offset = schedules()[0], Gaussian(0.3, 0.5), 1e-3
    z, eps, weight, at = grid(schedule, 0.4)
    mu = torch.tensor(teacher.mean + offset, dtype=torch.float64, requires_grad=True)
    student = Gaussian(teacher.mean + offset, teacher.std)
    x_t = at.alpha * (mu + student.std * z) + at.sigma * eps
    variance = teacher.variance(at)
    logit = ((x_t - at.alpha * student.mean) ** 2 - (x_t - at.alpha * teacher.mean) ** 2) / (2 * variance)
    (weight * losses.gan_generator(logit)).sum().backward()
    expected = 0.5 * at.alpha[0].square() * offset / variance[0]
    assert mu.grad is not None
    torch.testing.assert_close(mu.grad, expected.squeeze(), rtol=1e-2, atol=0)
