"""Adversarial distillation: the student takes on the data's distribution; ADD's term against its closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fastgen.adversary import Adversarial
from fastgen.denoiser import Denoiser
from fastgen.engine import Engine
from fastgen.family import Block, Family
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.prediction import Kind
from fastgen.rng import Noise
from fastgen.sampling import renoise, sample
from fastgen.schedule import Flow, Schedule
from fastgen.trainers.adversarial import Config, Method
from tests.oracle import (
    Affine,
    Gaussian,
    Gaussians,
    Map,
    Samples,
    call,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    hermite,
    labels,
    moved,
    optims,
    same,
    schedules,
    sd_schedule,
    states,
    train,
)

MEANS, STDS, SHAPE = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3), (1, 4, 4)
CONV = Samples((2, 8, 8))


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


def conv_method(num_steps: int = 1, **options: object) -> Method:
    torch.manual_seed(0)
    return Method(Config(**options), conv_family(), num_steps)  # type: ignore[arg-type]


# End to end


class Seeing(Gaussians):
    """The exact denoiser, with a block to read: x_t and its square, for each caption, and the caption itself."""

    def __init__(self, schedule: Schedule, kind: Kind, stds: tuple[float, ...] = STDS) -> None:
        super().__init__(MEANS, stds, schedule, kind)
        self.see = nn.Identity()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        caption = label[:, :, None, None]
        self.see(torch.cat([caption * x_t, caption * x_t.square(), caption.expand(-1, -1, *x_t.shape[2:])], 1))
        return super().forward(x_t, t, label)


class Moments(nn.Module):
    """A logit linear in the sums of the maps: a Gaussian for each caption is all that it can tell from another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(9))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return (maps[0].sum((2, 3)) @ self.weight)[:, None]


def seeing_family(
    schedule: Schedule, kind: Kind, student: Callable[[], nn.Module], stds: tuple[float, ...] = STDS
) -> Family:
    teacher = Denoiser(Seeing(schedule, kind, stds).requires_grad_(False), schedule, kind, call)
    family = gaussian_family(MEANS, stds, schedule, kind, SHAPE, student)
    return replace(family, denoiser=teacher, blocks=[Block("see", 9, SHAPE[-1])])


def judging(loss: Literal["non_saturating", "hinge"]) -> Adversarial:
    """Noise levels about the toy's own scale, and a little R1."""
    return Adversarial(weight=1.0, loss=loss, levels="logit_normal", level_mean=-0.5, r1=0.01)


def distil(
    student: type[Affine] | type[Map],
    num_steps: int,
    adversarial: Adversarial,
    critic_lr: float,
    schedule: Schedule | None = None,
    kind: Kind = "v",
) -> list[tuple[float, float]]:
    """Train through the engine; the mean and deviation of samples for "left" and for "right"."""
    schedule = schedule or sd_schedule()
    family = seeing_family(
        schedule,
        kind,
        (lambda: Affine(schedule, kind))
        if student is Affine
        else (lambda: Map((0.0,) * 3, (1.0,) * 3, schedule, kind)),
    )
    method = Method(Config(adversarial=adversarial), family, num_steps)
    method.adversary.heads = method.networks["discriminator"] = Moments()  # type: ignore[assignment]
    settings = Optim(lr=0.02, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0)
    optim = {"student": settings, "discriminator": replace(settings, lr=critic_lr)}
    train(Engine(method, Samples(SHAPE, MEANS, STDS), optim, batch_size=16, steps=250), range(250))

    found, n, g = [], 2000, torch.Generator().manual_seed(1)
    for caption in ("left", "right"):
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


@pytest.mark.parametrize("loss", ["non_saturating", "hinge"])
def test_a_student_takes_on_the_data_s_mean_and_deviation(loss: Literal["non_saturating", "hinge"]) -> None:
    """One step on a table with one loss, two on rectified flow with the other; both start at mean 0, deviation 1."""
    if loss == "non_saturating":
        (m1, s1), (m2, s2) = distil(Affine, 1, judging(loss), 0.1)
    else:
        (m1, s1), (m2, s2) = distil(Map, 2, judging(loss), 0.05, Flow(), "flow")
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.06)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.06)


# ADD's term


class Nodes(Noise):
    """Noise at the nodes of a quadrature and at one time: a mean over them, weighted, is exact."""

    def __init__(self, eps: Tensor, share: float) -> None:
        super().__init__(range(len(eps)), 0, 0, "nodes")
        self.eps, self.share = eps.float(), share

    def normal(self, shape: object) -> Tensor:
        return self.eps

    def uniform(self) -> Tensor:
        return torch.full((len(self.eps),), self.share, dtype=torch.float64)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("schedule", schedules())
def test_add_s_gradient_is_the_closed_form_and_shrinks_any_deviation(
    schedule: Schedule, share: float, guidance_scale: float
) -> None:
    """Student mu + tau z, exact teacher N(m, s^2): 2 lambda alpha g_p (mu - m) and 2 lambda alpha g_p tau.

    g_p = sigma^2 / (alpha^2 s^2 + sigma^2); with guidance m is m_u + w (m_c - m_u). The second never vanishes: the
    term needs the other one beside it. With the teacher's side attached, both would have g_p^2.
    """
    weight_of, stds = 2.5, (0.5, 0.5, 0.5)
    family = seeing_family(schedule, "v", lambda: Affine(schedule, "v"), stds)
    method = Method(Config(distillation=weight_of, guidance_scale=guidance_scale), family, 1)
    nodes, weights = hermite()
    z, eps = (m.reshape(-1, 1, 1, 1).float() for m in torch.meshgrid(nodes, nodes, indexing="ij"))
    n = len(z)
    mu, tau = torch.tensor(-0.2, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    batch = Batch(range(n), labels(["left"] * n), labels([""]))
    loss = method.distillation_loss(mu + tau * z, batch, Nodes(eps, share))
    found = torch.autograd.grad((torch.outer(weights, weights).flatten() * loss).sum(), (mu, tau))
    mean = MEANS[0] + guidance_scale * (MEANS[1] - MEANS[0])
    at = schedule(schedule.draw(torch.tensor([share], dtype=torch.float64)))
    factor = (2 * weight_of * at.alpha * at.sigma.square() / Gaussian(mean, 0.5).variance(at)).item()
    assert found[0].item() == pytest.approx(factor * (-0.2 - mean), rel=1e-4)
    assert found[1].item() == pytest.approx(factor * 0.8, rel=1e-4)


def test_add_s_term_leaves_the_other_as_it_is() -> None:
    both = conv_method(4, distillation=2.5, guidance_scale=2.0).student_loss(CONV.batch(range(4)), noise())
    alone = conv_method(4).student_loss(CONV.batch(range(4)), noise())
    assert set(both) == {"gan", "distillation"}
    assert set(alone) == {"gan"}
    assert torch.equal(both["gan"], alone["gan"])


# Who learns from what


def test_the_student_s_term_is_the_weighted_logit_of_what_it_makes() -> None:
    method = conv_method(2, adversarial=Adversarial(weight=0.25, blocks=["all"], loss="hinge"))
    batch, rng = CONV.batch(range(4)), noise(1)
    x0 = method.generate(batch, rng)
    expected = -0.25 * method.adversary.logits(x0, batch.cond, rng).mean(1)
    torch.testing.assert_close(method.student_loss(batch, noise(1))["gan"], expected)


def test_each_phase_teaches_one_network_and_the_teacher_is_never_touched() -> None:
    method = conv_method(2, student_every=2, distillation=1.0)
    assert [(p.name, p.trains, p.every) for p in method.phases] == [
        ("discriminator", ["discriminator"], 1),
        ("student", ["student"], 2),
    ]
    found = gradients_by_phase(method)  # type: ignore[arg-type]
    before = states(method)
    first, second = train(Engine(method, CONV, optims(method, lr=1e-3), batch_size=2, steps=2), range(2))
    after = states(method)
    assert {phase: {key.partition(".")[0] for key in keys} for phase, keys in found.items()} == {
        "discriminator": {"discriminator"},
        "student": {"student"},
    }
    assert set(first) == {
        "discriminator/gan",
        "discriminator/discriminator.grad_norm",
        "student/gan",
        "student/distillation",
        "student/student.grad_norm",
    }
    assert not any(key.startswith("student") for key in second)
    assert moved(before["student"], after["student"]) == set(before["student"])
    assert moved(before["discriminator"], after["discriminator"])
    assert same(before["teacher"], after["teacher"])


@pytest.mark.parametrize(
    ("options", "discriminator", "student"),
    [
        ({}, 2, 1),
        ({"distillation": 1.0}, 2, 2),
        ({"distillation": 1.0, "guidance_scale": 2.0}, 2, 2),  # both captions in one pass
        ({"adversarial": Adversarial(weight=1.0, r1=0.1)}, 2, 1),
        ({"adversarial": Adversarial(weight=1.0, r1=0.1, r1_kind="difference")}, 3, 1),
    ],
)
def test_no_pass_is_made_that_the_algorithm_does_not_need(
    options: dict[str, object], discriminator: int, student: int
) -> None:
    """The teacher's passes of each phase, ended at the last block but for ADD's; the student's is one each."""
    method = conv_method(**options)
    passes = {"teacher": 0, "student": 0, "leave": 0}

    def count(name: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            passes[name] += 1

        return add

    method.teacher.network.register_forward_pre_hook(count("teacher"))
    method.teacher.network.get_submodule("leave").register_forward_pre_hook(count("leave"))
    method.student.network.register_forward_pre_hook(count("student"))
    batch = CONV.batch(range(2))
    method.phases[0].loss(batch, noise(0, "discriminator", 2))
    assert passes == {"teacher": discriminator, "student": 1, "leave": 0}
    method.student_loss(batch, noise(n=2))
    assert passes == {"teacher": discriminator + student, "student": 2, "leave": student - 1}


def test_a_few_step_student_is_trained_on_noised_images_unless_told_otherwise() -> None:
    batch = CONV.batch(range(4))
    assert batch.x0 is not None
    batch = replace(batch, x0=torch.full_like(batch.x0, 50.0))

    def inputs(method: Method) -> dict[float, float]:
        seen: dict[float, float] = {}
        method.student.network.register_forward_pre_hook(
            lambda _, args: seen.update({args[1][0].item(): args[0].mean().item()})
        )
        for step in range(8):
            method.student_loss(batch, noise(step))
        return seen

    data, chain = inputs(conv_method(2)), inputs(conv_method(2, rollout="simulate"))
    assert set(data) == set(chain) == {999.0, 499.0}
    assert data[499.0] > 20
    assert abs(chain[499.0]) < 5
    assert abs(data[999.0]) < 1  # pure noise at the first time, as when sampling


# What is refused


def test_without_the_adversarial_term_there_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match=r"adversarial\.weight is 0, and this method has no other term to learn from"):
        conv_method(adversarial=Adversarial())


def test_there_is_no_fake_score_to_take_features_from() -> None:
    with pytest.raises(ValueError, match=r"adversarial\.features fake_score: this method has no fake score"):
        conv_method(adversarial=Adversarial(weight=1.0, features="fake_score"))


def test_a_few_step_student_cannot_be_trained_on_pure_noise() -> None:
    with pytest.raises(ValueError, match="rollout noise trains only the first of 2 calls"):
        conv_method(2, rollout="noise")
    assert conv_method(1, rollout="noise").student_loss(CONV.batch(range(4)), noise())["gan"].shape == (4,)
