"""The adversarial term any method can add: a discriminator on features of a diffusion network, at noised samples.

Diffusion GAN (Wang et al. 2022, arXiv 2206.02262) as DMD2 (arXiv 2405.14867, sec. 4.3) and latent adversarial
distillation (arXiv 2403.12015) have it: real and made latents are noised apart, at times of their own, a backbone
reads them, and small heads judge its features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from . import losses, times
from .config import option
from .denoiser import Cond, Denoiser
from .discriminator import Heads, features
from .family import Family
from .rng import Noise
from .schedule import add_noise


@dataclass(frozen=True)
class Adversarial:
    """Options of the adversarial term; every method that can take one has them under ``adversarial``."""

    weight: float = option(0.0, "of the student's term; 0 trains without real images", low=0)
    critic_weight: float = option(1.0, "of the discriminator's loss", low=0)
    features: Literal["teacher", "fake_score"] = option(
        "teacher", "whose features the heads read; the fake score learns"
    )
    blocks: list[str] = option([], "blocks whose output the heads read; empty: the middle block")
    loss: Literal["non_saturating", "hinge"] = option("non_saturating", "how logits become losses")


class Adversary:
    """Heads on a backbone's features, and the two sides' losses."""

    def __init__(self, options: Adversarial, family: Family, backbone: Denoiser) -> None:
        """backbone: whose features are read. Raises ValueError if the family names no such block."""
        known = {block.name: block for block in family.blocks}
        if not known:
            raise ValueError(
                "adversarial.weight needs blocks to read, and this family names none; set adversarial.weight 0"
            )
        for name in options.blocks:
            if name not in known:
                raise ValueError(f"adversarial.blocks: no block {name!r}; this family has {', '.join(known)}")
        chosen = [known[name] for name in options.blocks] or [family.blocks[-1]]
        self.options, self.backbone, self.shape = options, backbone, family.latent_shape
        self.blocks = [block.name for block in chosen]
        self.heads = Heads([b.channels for b in chosen], [b.size for b in chosen])

    def student(self, x0: Tensor, cond: Cond, rng: Noise) -> Tensor:
        """The student's term, weighted: x0 [B, ...] -> [B]."""
        loss = losses.gan_generator if self.options.loss == "non_saturating" else losses.hinge_generator
        return self.options.weight * loss(self.logits(x0, cond, rng))

    def discriminator(self, real: Tensor, fake: Tensor, cond: Cond, rng: Noise) -> Tensor:
        """The discriminator's loss, weighted; real, fake: x0 of data and student, [B, ...] -> [B]."""
        loss = losses.gan_discriminator if self.options.loss == "non_saturating" else losses.hinge_discriminator
        logits = self.logits(real, cond, rng), self.logits(fake.detach(), cond, rng)
        return self.options.critic_weight * loss(*logits)

    def logits(self, x0: Tensor, cond: Cond, rng: Noise) -> Tensor:
        """Of freshly noised x0, t ~ U(all times): [B, L]."""
        schedule = self.backbone.schedule
        t = times.uniform(rng, schedule)
        x_t = add_noise(schedule, x0, rng.normal(self.shape), t)
        return self.heads(features(self.backbone, self.blocks, x_t, t, cond))  # type: ignore[no-any-return]
