"""Pretraining: denoising score matching with caption dropout (Ho et al. 2020, arXiv 2006.11239).

    t ~ U{times};  x_t = alpha x0 + sigma eps;  with probability p the caption is replaced by the empty one
    loss = w(t) |network(x_t, t, cond) - (p x0 + q eps)|^2

The dropout (Ho & Salimans 2022, arXiv 2207.12598) is what makes classifier-free guidance work later. The weight is
min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556), in the form it takes for the network's own output: for v,
min(snr, gamma) / (snr + 1). ``min_snr: 0`` turns it off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen import losses, times
from fastgen.config import option
from fastgen.family import Family
from fastgen.method import About, Batch, Phase, Terms, drop_captions
from fastgen.passes import Pass
from fastgen.prediction import Kind
from fastgen.rng import Noise
from fastgen.sampling import Sampler
from fastgen.schedule import Level, add_noise

ABOUT = About(
    paper="Denoising Diffusion Probabilistic Models", arxiv="2006.11239", needs=("prompts", "images"), steps=()
)


@dataclass(frozen=True)
class Config:
    """Options of ``pretrain``."""

    caption_dropout: float = option(0.1, "share of samples trained on the empty caption", low=0, high=1)
    min_snr: float = option(5.0, "gamma of the min-SNR weight; 0 is off", low=0)


class Method:
    """Trains the pipeline's own network on real data."""

    needs_images = True
    exported = "teacher"
    num_steps: int | None = None
    sampler: Sampler = "ddim"

    def __init__(self, config: Config, family: Family, num_steps: int) -> None:
        """num_steps is a student's and has no meaning here."""
        self.config, self.denoiser = config, family.denoiser
        network = family.denoiser.network.requires_grad_(True)
        self.networks: dict[str, nn.Module] = {"teacher": network}
        self.phases = (Phase("pretrain", ["teacher"], self.loss, passes=[Pass("teacher", "weights")]),)

    def loss(self, batch: Batch, rng: Noise) -> Terms:
        """-> {"denoising": [B]}."""
        schedule, x0 = self.denoiser.schedule, batch.images("pretrain")
        t = times.uniform(rng, schedule)
        eps = rng.normal(x0.shape[1:])
        drop = rng.uniform() < self.config.caption_dropout
        pred = self.denoiser(add_noise(schedule, x0, eps, t), t, drop_captions(batch, drop))
        return {"denoising": self.weight(pred.kind, schedule(t)).to(x0) * losses.denoising(pred, x0, eps)}

    def weight(self, kind: Kind, at: Level) -> Tensor:
        """The min-SNR weight of a squared error on the network's output: [B]."""
        gamma = self.config.min_snr
        snr = (at.alpha / at.sigma).square()
        if not gamma or kind == "flow":
            return torch.ones_like(snr)
        return snr.clamp(max=gamma) / {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[kind]
