"""Pure losses, one value per sample: [B, ...] -> [B], in float32 (or float64 if given)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .prediction import Kind, Prediction, combine
from .schedule import Level


def per_sample(x: Tensor) -> Tensor:
    """Mean over all but the first dimension: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def mse(x: Tensor, target: Tensor) -> Tensor:
    """x, target: [B, ...] -> mean squared error of each sample: [B]."""
    return per_sample((x - target).square())


def pseudo_huber(x: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(|x - target|^2 + c^2 n) - c sqrt(n), the norm over the n elements of a sample: [B, ...] -> [B].

    c is per element: iCT's 0.00054 sqrt(n) is c = 0.00054 (Song & Dhariwal 2023, arXiv 2310.14189, sec. 3.3); at 0 it
    is the norm itself, whose gradient at equality is 0.
    """
    size: Tensor = torch.linalg.vector_norm((x - target).flatten(1), dim=1)
    floor = c * x[0].numel() ** 0.5
    return torch.hypot(size, torch.full_like(size, floor)) - floor if c else size


def huber(x: Tensor, target: Tensor, c: float) -> Tensor:
    """Mean over a sample's elements of sqrt((x - target)^2 + c^2) - c: [B, ...] -> [B].

    Latent consistency's pseudo-Huber, element by element, where ``pseudo_huber`` takes the norm of all.
    """
    return per_sample(torch.hypot(x - target, torch.full_like(x, c)) - c)


def denoising(pred: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching in the network's own parameterisation: [B].

    ``|y - (p x0 + q eps)|^2`` (Ho et al. 2020, arXiv 2006.11239, eq. 14, for every kind). x0, eps: [B, ...].
    """
    return mse(pred.y, combine(pred.kind, x0, eps, pred.at))


@torch.no_grad()
def dmd_size(x0: Tensor, real: Tensor) -> Tensor:
    """The normaliser N of ``dmd_grad``, which broadcasts against x0: [B, ...] -> [B, 1, ...]."""
    return per_sample((x0 - real).abs()).clamp(min=1e-5).reshape(-1, *(1,) * (x0.ndim - 1))


@torch.no_grad()
def dmd_grad(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The distribution-matching direction in x0 space, (fake - real) / N: [B, ...].

    N is the mean of |x0 - real| within the sample (Yin et al. 2024, arXiv 2405.14867; 2311.18828, eq. 8), clamped at
    1e-5. What is not finite stays so, and the engine stops on it.
    """
    return (fake - real) / dmd_size(x0, real)


def sid(x0: Tensor, real: Tensor, fake: Tensor, correction: float) -> Tensor:
    """Score identity: <real - fake, (real - x0) - correction (real - fake)> / n / N for samples of n elements: [B].

    real, fake: at x_t = alpha x0 + sigma eps, with their graphs to x0 (Zhou et al. 2024, arXiv 2404.04057, alg. 1,
    whose alpha is ``correction``). N is DMD's, without gradient. The value says nothing of progress: with an exact
    fake score and without N its mean is (1 - correction) |real - fake|^2 / n.
    """
    gap = real - fake
    return per_sample(gap * (real - x0 - correction * gap) / dmd_size(x0, real))


def interval_target(kind: Kind, x_t: Tensor, eps: Tensor, added: Tensor, at: Level) -> Tensor:
    """What a fake score of x_t = ratio x_r + added eps regresses on where x_r is not clean: [B, ...].

    Its score is the mean of -eps / added, so that sigma / added eps stands for the noise, and what then is left of x_t
    for the clean sample (Fan et al. 2025, arXiv 2510.27684, for every kind). To take eps itself for the noise and x_r
    for the clean sample is biased. At r = 0 both are the same. eps: [B, ...]; added, at: of x_t, broadcasting.
    """
    noise = at.sigma / added * eps
    return combine(kind, (x_t - at.sigma * noise) / at.alpha, noise, at)


def interval_denoising(pred: Prediction, eps: Tensor, added: Tensor) -> Tensor:
    """Denoising score matching on ``interval_target``, weighted by min(1, 10 added^2): [B].

    The weight is arXiv 2510.27684's, clamp(1 / added^2, 0, 10) on errors scaled by ``added``: towards x_r the target's
    variance grows without bound.
    """
    error = (pred.y - interval_target(pred.kind, pred.x_t, eps, added, pred.at)).square()
    return per_sample((10 * added.square()).clamp(max=1.0) * error)


@torch.no_grad()
def interval_grad(real: Prediction, fake: Prediction, ratio: Tensor) -> Tensor:
    """The gradient of KL(fake || real) in x_r, seen through x_t = ratio x_r + added eps: [B, ...].

    ratio (s_fake - s_real) with s = -eps / sigma; on rectified flow ratio (1 - t) / t (real flow - fake flow).
    """
    return ratio * (real.eps - fake.eps) / real.at.sigma


def interval_mean(pred: Prediction, ratio: Tensor, added: Tensor) -> Tensor:
    """E[x_r | x_t] of a score, where x_t = ratio x_r + added eps; at r = 0 its x0: [B, ...].

    Tweedie's formula, (x_t + added^2 s) / ratio with s = -eps / sigma. Two scores' means differ by (added / ratio)^2
    times ``interval_grad``, so that ``dmd_grad`` of x_r and them is DMD's direction where x_r is not clean.
    """
    return (pred.x_t - added.square() * pred.eps / pred.at.sigma) / ratio


def surrogate(x0: Tensor, grad: Tensor) -> Tensor:
    """A loss whose gradient with respect to x0: [B, ...] is ``grad / n`` for each sample of n elements: [B].

    Its value, half the mean square of ``grad``, is a diagnostic and not an objective: it need not fall.
    """
    return 0.5 * mse(x0, (x0 - grad).detach())


def gan_generator(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss softplus(-D(fake)): logits [B, ...] -> [B]."""
    return per_sample(F.softplus(-fake_logits))


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)); 2 log 2 at logits 0: [B, ...] -> [B]."""
    return per_sample(F.softplus(fake_logits)) + per_sample(F.softplus(-real_logits))


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """-D(fake) (Lim & Ye 2017, arXiv 1705.02894): logits [B, ...] -> [B]."""
    return -per_sample(fake_logits)


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)); 2 at logits 0: [B, ...] -> [B]."""
    return per_sample(F.relu(1 - real_logits)) + per_sample(F.relu(1 + fake_logits))


def gradient_penalty(logits: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """R1, the squared norm of each logit's gradient with respect to the map it read, averaged over the maps: [B].

    logits: [B, L], one for each of ``maps`` [B, ...] and reading no other (Mescheder et al. 2018, arXiv 1801.04406,
    eq. 9, without its factor 1/2). Can be differentiated again.
    """
    gradients = torch.autograd.grad(logits.sum(), list(maps), create_graph=True)
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients]).mean(0)


def difference_penalty(logits: Tensor, moved: Tensor, step: float) -> Tensor:
    """R1 by a finite difference, ((D(x + step eta) - D(x)) / step)^2: logits [B, ...] -> [B].

    Its mean over eta ~ N(0, I) tends to |dD/dx|^2 as ``step`` falls; for a linear D it is that (APT, Lin et al. 2025,
    arXiv 2501.08316, which does not divide by the step).
    """
    return per_sample(((moved - logits) / step).square())


def consistency_tangent(
    x: Tensor, velocity: Tensor, real: Tensor, change: Tensor, cos: Tensor, sin: Tensor, share: float = 1.0
) -> Tensor:
    """The direction in which sCM moves the velocity at x, on TrigFlow's clock tau: [B, ...].

    At share 1, cos d/dtau of the consistency function cos x - sin velocity, rearranged as in Lu & Song 2024 (arXiv
    2410.11081, sec. 4.2); it vanishes where that function is constant along the flow. ``real`` is the flow's velocity,
    ``change`` = cos sin d velocity / dtau along it; share: how much of the second part counts, 0 being distillation of
    the velocity alone.
    """
    return -cos.square() * (velocity - real) - share * (cos * sin * x + change)


def normalised(grad: Tensor, floor: float) -> Tensor:
    """grad / (|grad| + floor), the norm taken over each sample: [B, ...] -> [B, ...]."""
    norm: Tensor = torch.linalg.vector_norm(grad.flatten(1), dim=1)
    return grad / (norm.reshape(-1, *(1,) * (grad.ndim - 1)) + floor)


def adaptive(x: Tensor, target: Tensor, power: float, floor: float) -> Tensor:
    """|x - target|^2 / sg(|x - target|^2 + floor)^power, a sum over each sample: [B] (MeanFlow, arXiv 2505.13447)."""
    square = (x - target).square().flatten(1).sum(1)
    return square / (square.detach() + floor) ** power
