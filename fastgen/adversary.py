"""The adversarial term any method can add: a discriminator on features of a diffusion network, at noised samples.

Diffusion GAN (Wang et al. 2022, arXiv 2206.02262) as DMD2 (arXiv 2405.14867, sec. 4.3) and latent adversarial
distillation (arXiv 2403.12015) have it: real and made latents are noised apart, at times of their own, a backbone
reads them, and small heads judge its features.

A method adds the term so:

    self.adversary = adversary.make(config.adversarial, family, self.teacher)       # None at weight 0
    if self.adversary:
        self.networks["discriminator"] = self.adversary.heads
        phases = (self.adversary.phase(self.generate), *phases)                     # or in a critic of its own
    ...
    if self.adversary:                                                              # in the student's loss
        terms["gan"] = self.adversary.student(x0, batch.cond, rng)

and needs images if ``config.adversarial.weight > 0``. Its phases need ``student_passes`` and ``critic_passes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import losses, times
from .config import option
from .denoiser import Cond, Denoiser
from .discriminator import Heads, features
from .family import Family
from .method import Batch, Phase, Terms
from .passes import Mode, Pass
from .rng import Noise, seed_of
from .schedule import add_noise

Noising = Callable[[Tensor, Noise], tuple[Tensor, Tensor]]
"""(what is judged: [B, ...], rng) -> (x_t, t), as the backbone is to see it."""


@dataclass(frozen=True)
class Adversarial:
    """Options of the adversarial term; every method that can take one has them under ``adversarial``."""

    weight: float = option(0.0, "of the student's term; 0 trains without real images", low=0)
    critic_weight: float = option(1.0, "of the discriminator's loss", low=0)
    features: Literal["teacher", "fake_score"] = option(
        "teacher", "whose features the heads read; the fake score learns"
    )
    blocks: list[str] = option([], "blocks whose output the heads read; empty: the middle block; [all]: all of them")
    loss: Literal["non_saturating", "hinge"] = option("non_saturating", "how logits become losses")
    levels: Literal["uniform", "logit_normal"] = option("uniform", "law of the noise levels at which the heads judge")
    # LADD's best; SANA-Sprint (2503.09641): log tan t ~ N(-0.6 - log 0.5, 1), mean 0.093
    level_mean: float = option(1.0, "of log(sigma / alpha), where logit_normal")
    level_std: float = option(1.0, "of log(sigma / alpha), where logit_normal", above=0)
    r1: float = option(0.0, "weight of the gradient penalty on real images, within the discriminator's loss", low=0)
    # ADD (2311.17042) takes the gradient at the heads' input; APT (2501.08316) differences at the network's
    r1_kind: Literal["features", "difference"] = option(
        "features", "gradient of the heads, exact; or difference: of the whole discriminator, by one more pass"
    )
    # APT: 0.01 for images, 0.1 for video; bfloat16 rounds at 0.004
    r1_step: float = option(0.1, "deviation of the noise in the difference", above=0)


class Adversary:
    """Heads on a backbone's features, and the two sides' losses."""

    def __init__(self, options: Adversarial, family: Family, backbone: Denoiser) -> None:
        """backbone: whose features are read. Raises ValueError if the family names no such block."""
        known = {block.name: block for block in family.blocks}
        if not known:
            raise ValueError(
                "adversarial.weight needs blocks to read, and this family names none; set adversarial.weight 0"
            )
        names = list(known) if options.blocks == ["all"] else options.blocks
        for name in names:
            if name not in known:
                raise ValueError(f"adversarial.blocks: no block {name!r}; this family has {', '.join(known)}")
        chosen = [known[name] for name in names] or [family.blocks[-1]]
        self.options, self.backbone, self.shape = options, backbone, family.latent_shape
        self.blocks = [block.name for block in chosen]
        # keyed by the run's seed alone: networks made without weights, to be split up, draw no numbers before them
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("heads", str(torch.initial_seed())))
            self.heads = Heads([b.channels for b in chosen], [b.size for b in chosen])

    def student(self, x0: Tensor, cond: Cond, rng: Noise, noising: Noising | None = None) -> Tensor:
        """The student's term, weighted: x0 [B, ...] -> [B]. noising: in the place of ``noised``."""
        loss = losses.gan_generator if self.options.loss == "non_saturating" else losses.hinge_generator
        return self.options.weight * loss(self.logits(x0, cond, rng, noising))

    def discriminator(
        self, real: Tensor, fake: Tensor, cond: Cond, rng: Noise, noising: Noising | None = None
    ) -> Tensor:
        """The discriminator's loss, weighted; real, fake: x0 of data and student, [B, ...] -> [B]."""
        loss = losses.gan_discriminator if self.options.loss == "non_saturating" else losses.hinge_discriminator
        x_t, t = (noising or self.noised)(real, rng)
        maps = self.maps(x_t, t, cond)
        if self.options.r1 > 0 and self.options.r1_kind == "features":
            maps = [m if m.requires_grad else m.requires_grad_() for m in maps]
        logits = self.heads(maps)
        total = loss(logits, self.logits(fake.detach(), cond, rng, noising))
        if self.options.r1 > 0:
            total = total + self.options.r1 * self.penalty(logits, maps, x_t, t, cond, rng)
        return self.options.critic_weight * total

    def penalty(self, logits: Tensor, maps: list[Tensor], x_t: Tensor, t: Tensor, cond: Cond, rng: Noise) -> Tensor:
        """R1 at the noised images x_t: [B, ...] with these feature maps and logits -> [B].

        The difference moves x_t itself: were it taken from other noise or from the clean image, it would measure that
        distance and not the gradient. An exact gradient through the network is not offered, since fused attention has
        no second derivative.
        """
        if self.options.r1_kind == "features":
            return losses.gradient_penalty(logits, maps)
        moved = x_t + self.options.r1_step * rng.normal(self.shape)
        return losses.difference_penalty(logits, self.heads(self.maps(moved, t, cond)), self.options.r1_step)

    def logits(self, x0: Tensor, cond: Cond, rng: Noise, noising: Noising | None = None) -> Tensor:
        """Of freshly noised x0: [B, L]."""
        return self.heads(self.maps(*(noising or self.noised)(x0, rng), cond))  # type: ignore[no-any-return]

    def noised(self, x0: Tensor, rng: Noise) -> tuple[Tensor, Tensor]:
        """x_t: [B, ...] at t: [B], each sample with its own noise level and noise."""
        options, schedule = self.options, self.backbone.schedule
        if options.levels == "uniform":
            t = times.uniform(rng, schedule)
        else:
            t = times.logit_normal(rng, schedule, options.level_mean, options.level_std)
        return add_noise(schedule, x0, rng.normal(self.shape), t), t

    def maps(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """What the heads read: one [B, C, H, W] per block."""
        return features(self.backbone, self.blocks, x_t, t, cond)

    def phase(self, generate: Callable[[Batch, Noise], Tensor], calls: float = 1.0) -> Phase:
        """A turn of the discriminator's own, for a method without another critic to learn in.

        generate: (batch, rng) -> the student's x0 as in its own phase, [B, ...]; called without gradients. calls: of
        the student, that this takes.
        """

        def loss(batch: Batch, rng: Noise) -> Terms:
            real = batch.images("the adversarial term")
            with torch.no_grad():
                fake = generate(batch, rng)
            return {"gan": self.discriminator(real, fake, batch.cond, rng)}

        passes = (Pass("student", count=calls), *critic_passes(self))
        return Phase("discriminator", ["discriminator"], loss, passes=passes)


def student_passes(adversary: Adversary | None) -> tuple[Pass, ...]:
    """What ``Adversary.student`` needs; nothing without an adversary."""
    if adversary is None:
        return ()
    backbone = Pass(adversary.options.features, "inputs", blocks=tuple(adversary.blocks))
    return backbone, Pass("discriminator", "inputs")


def critic_passes(adversary: Adversary | None) -> tuple[Pass, ...]:
    """What ``Adversary.discriminator`` needs, where a fake score whose features are read learns too."""
    if adversary is None:
        return ()
    options, blocks = adversary.options, tuple(adversary.blocks)
    mode: Mode = "weights" if options.features == "fake_score" else "forward"
    if options.r1 > 0 and options.r1_kind == "features":
        heads = Pass("discriminator", "penalty"), Pass("discriminator", "weights")
        return Pass(options.features, mode, 2, blocks=blocks), *heads
    count = 3 if options.r1 > 0 else 2
    return Pass(options.features, mode, count, blocks=blocks), Pass("discriminator", "weights", count)


def make(
    options: Adversarial, family: Family, teacher: Denoiser, fake_score: Denoiser | None = None
) -> Adversary | None:
    """The adversary a method's options ask for; None at weight 0. fake_score: of a method that has one.

    Raises ValueError if the options name features or blocks that are not there.
    """
    if options.weight == 0:
        return None
    backbone = teacher if options.features == "teacher" else fake_score
    if backbone is None:
        raise ValueError("adversarial.features fake_score: this method has no fake score; set teacher")
    return Adversary(options, family, backbone)
