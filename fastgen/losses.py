"""Pure losses, one value per sample: [B, ...] -> [B], in float32 (or float64 if given)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .prediction import Prediction, combine


def per_sample(x: Tensor) -> Tensor:
    """Mean over all but the first dimension: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def mse(x: Tensor, target: Tensor) -> Tensor:
    """x, target: [B, ...] -> mean squared error of each sample: [B]."""
    return per_sample((x - target).square())


def denoising(pred: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Denoising score matching in the network's own parameterisation: [B].

    ``|y - (p x0 + q eps)|^2`` (Ho et al. 2020, arXiv 2006.11239, eq. 14, for every kind). x0, eps: [B, ...].
    """
    return mse(pred.y, combine(pred.kind, x0, eps, pred.at))


@torch.no_grad()
def dmd_grad(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The distribution-matching direction in x0 space, (fake - real) / N: [B, ...].

    N is the mean of |x0 - real| within the sample (Yin et al. 2024, arXiv 2405.14867; 2311.18828, eq. 8), clamped at
    1e-5. What is not finite stays so, and the engine stops on it.
    """
    weight = per_sample((x0 - real).abs()).clamp(min=1e-5).reshape(-1, *(1,) * (x0.ndim - 1))
    return (fake - real) / weight


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
