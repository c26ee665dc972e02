"""The adversarial term against closed forms: losses, penalties, noise levels, and who learns from which side."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastgen import adversary, losses, times
from fastgen.adversary import Adversarial, Adversary
from fastgen.denoiser import Denoiser
from fastgen.family import Block
from fastgen.method import Batch
from fastgen.rng import Noise
from fastgen.schedule import Flow, Level, Schedule, add_noise
from tests.oracle import Gaussian, Samples, call, conv_family, gaussian_family, hermite, labels, schedules, sd_schedule


class Seeing(nn.Module):
    """A backbone whose one block gives back the input, so that a head on it is a function of x_t."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Identity()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.see(x_t)


class Linear(nn.Module):
    """D(x) = weight . x + bias."""

    def __init__(self, weight: Tensor | float, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.as_tensor(v, dtype=torch.float32)) for v in (weight, bias))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return ((maps[0].flatten(1) * self.weight).sum(1) + self.bias)[:, None]


def judge(head: nn.Module, side: int = 1, schedule: Schedule | None = None, **options: object) -> Adversary:
    """An adversary that judges x_t itself, [1, side, side], by ``head``."""
    schedule = schedule or sd_schedule()
    family = replace(gaussian_family(shape=(1, side, side), schedule=schedule), blocks=[Block("see", 1, side)])
    backbone = Denoiser(Seeing(), schedule, "x0", call)
    made = Adversary(Adversarial(weight=1.0, **options), family, backbone)  # type: ignore[arg-type]
    made.heads = head  # type: ignore[assignment]
    return made


class Nodes(Noise):
    """Noise at the nodes of a quadrature and at one time: a mean over them, weighted, is exact."""

    def __init__(self, eps: Tensor, share: float) -> None:
        """eps: [N, ...], what each draw gives; share: of the schedule's times."""
        super().__init__(range(len(eps)), 0, 0, "nodes")
        self.eps, self.share = eps.float(), share

    def normal(self, shape: object) -> Tensor:
        return self.eps

    def uniform(self) -> Tensor:
        return torch.full((len(self.eps),), self.share, dtype=torch.float64)


def grid(schedule: Schedule, share: float) -> tuple[Tensor, Tensor, Tensor, Level]:
    """z, eps: [N, 1, 1, 1] of every pair of nodes; weight: [N]; the level at ``share`` of the times: [1]."""
    nodes, weights = hermite(24)
    z, eps = (m.reshape(-1, 1, 1, 1) for m in torch.meshgrid(nodes, nodes, indexing="ij"))
    at = schedule(schedule.draw(torch.tensor([share], dtype=torch.float64)))
    return z.float(), eps.float(), torch.outer(weights, weights).flatten(), at


def nobody(n: int) -> dict[str, Tensor]:
    return dict(labels([""] * n))


def noise(n: int = 4, step: int = 0) -> Noise:
    return Noise(range(n), 0, step, "discriminator")


# The best discriminator of two Gaussians


def best(teacher: Gaussian, student: Gaussian, at: Level) -> tuple[float, float]:
    """Slope and offset of log p_t / q_t at equal deviations: alpha (m - mu) / V (x_t - alpha (m + mu) / 2)."""
    slope = (at.alpha * (teacher.mean - student.mean) / teacher.variance(at)).item()
    return slope, -slope * at.alpha.item() * (teacher.mean + student.mean) / 2


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_discriminator_s_loss_is_least_at_the_log_ratio_of_the_densities(schedule: Schedule, share: float) -> None:
    teacher, student = Gaussian(0.3, 0.5), Gaussian(-0.4, 0.5)
    z, eps, weight, at = grid(schedule, share)
    slope, offset = best(teacher, student, at)

    def gradient(slope: float, offset: float) -> Tensor:
        made = judge(Linear(slope, offset), schedule=schedule)
        real, fake = (g.mean + g.std * z for g in (teacher, student))
        loss = (weight * made.discriminator(real, fake, nobody(len(z)), Nodes(eps, share))).sum()
        return torch.stack(torch.autograd.grad(loss, list(made.heads.parameters())))

    assert gradient(slope, offset).abs().max() < 1e-5
    assert gradient(1.2 * slope, offset).abs().max() > 1e-3
    assert gradient(slope, offset + 0.1).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("offset", [0.5, 0.1, 0.02])
def test_the_student_s_gradient_is_that_of_half_the_kl_divergence_near_the_teacher(
    schedule: Schedule, offset: float
) -> None:
    """T1, GAN row: alpha^2 (mu - m) / V times E sigmoid(d^2 / 2 + d z), d = alpha (mu - m) / sqrt V: 1/2 at d = 0."""
    share = 0.4
    teacher, student = Gaussian(0.3, 0.5), Gaussian(0.3 + offset, 0.5)
    z, eps, weight, at = grid(schedule, share)
    made = judge(Linear(*best(teacher, student, at)), schedule=schedule)
    mu = torch.tensor(student.mean, requires_grad=True)
    loss = made.student(mu + student.std * z, nobody(len(z)), Nodes(eps, share))
    (found,) = torch.autograd.grad((weight * loss).sum(), mu)
    kl = (at.alpha.square() * offset / teacher.variance(at)).item()
    d = (at.alpha * offset / teacher.variance(at).sqrt()).item()
    nodes, weights = hermite(24)
    ratio = (weights * torch.sigmoid(d**2 / 2 + d * nodes)).sum().item()
    assert found.item() / kl == pytest.approx(ratio, rel=1e-4)
    assert ratio == pytest.approx(0.5, abs=d**2 / 7)
    assert ratio > 0.5


@pytest.mark.parametrize(("loss", "value"), [("non_saturating", 2 * math.log(2)), ("hinge", 2.0)])
def test_where_student_and_data_agree_the_undecided_discriminator_rests(loss: str, value: float) -> None:
    """At q = p: D = 0 is the least, its losses are 2 log 2 and 2, and the student's gradient is 0."""
    z, eps, weight, _ = grid(sd_schedule(), 0.4)
    made = judge(Linear(0.0), loss=loss)
    x0 = (0.3 + 0.5 * z).requires_grad_()
    both = made.discriminator(x0, x0, nobody(len(z)), Nodes(eps, 0.4))
    assert both.tolist() == pytest.approx([value] * len(z))
    own = torch.autograd.grad((weight * both).sum(), list(made.heads.parameters()))
    assert all(g.abs() < 1e-6 for g in own)
    (found,) = torch.autograd.grad(made.student(x0, nobody(len(z)), Nodes(eps, 0.4)).sum(), x0)
    assert found.abs().max() == 0


def test_the_hinge_is_flat_beyond_its_margins_and_one_within() -> None:
    real, fake = (torch.tensor([[-3.0], [-0.5], [0.5], [3.0]], requires_grad=True) for _ in range(2))
    value = losses.hinge_discriminator(real, fake)
    assert value.tolist() == [4.0 + 0.0, 1.5 + 0.5, 0.5 + 1.5, 0.0 + 4.0]
    value.sum().backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert real.grad.flatten().tolist() == [-1, -1, -1, 0]
    assert fake.grad.flatten().tolist() == [0, 1, 1, 1]
    (own,) = torch.autograd.grad(losses.hinge_generator(fake).sum(), fake)
    assert own.flatten().tolist() == [-1, -1, -1, -1]  # the student's side has no margin


# R1


def test_the_exact_penalty_is_the_squared_norm_of_each_head_s_gradient_averaged_over_heads() -> None:
    a, b = (torch.randn(5, 3, requires_grad=True, generator=torch.manual_seed(s)) for s in (0, 1))
    w = torch.tensor([1.0, -2.0, 2.0])
    logits = torch.stack([a @ w, 0.5 * b.square().sum(1)], 1)
    expected = (9 + b.square().sum(1)) / 2
    torch.testing.assert_close(losses.gradient_penalty(logits, [a, b]), expected)


def test_the_exact_penalty_can_be_learnt_from() -> None:
    w = torch.tensor([1.0, -2.0, 2.0], requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    (found,) = torch.autograd.grad(losses.gradient_penalty((x @ w)[:, None], [x]).sum(), w)
    torch.testing.assert_close(found, 4 * 2 * w.detach())


@pytest.mark.parametrize("step", [0.01, 0.1, 0.5])
def test_the_difference_s_mean_is_the_squared_gradient_and_a_known_error(step: float) -> None:
    """In one dimension E((D(x + s eta) - D(x)) / s)^2 is w^2 for D = w x, and x^2 + 3/4 s^2 for D = x^2 / 2."""
    eta, weight = hermite()
    for x in (0.0, -1.5):
        linear = losses.difference_penalty(torch.full((12, 1), 3 * x), (3 * (x + step * eta))[:, None], step)
        assert (weight * linear).sum().item() == pytest.approx(9, rel=1e-5)
        square = losses.difference_penalty(
            torch.full((12, 1), x**2 / 2, dtype=torch.float64), ((x + step * eta).square() / 2)[:, None], step
        )
        assert (weight * square).sum().item() == pytest.approx(x**2 + 0.75 * step**2, rel=1e-8)


@pytest.mark.parametrize("kind", ["features", "difference"])
@pytest.mark.parametrize("loss", ["non_saturating", "hinge"])
def test_r1_of_a_linear_discriminator_is_its_squared_weight(kind: str, loss: str) -> None:
    """In 64 dimensions |w|^2 = 63. A difference from other noise, or from the clean image, is wrong by its distance.

    That would give ((1 - alpha) w . x0)^2 / s^2 + (1 + sigma^2 / s^2) |w|^2 with the step s, a hundred times as much.
    """
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, generator=g)
    w *= (63 / w.square().sum()).sqrt()
    z, weight = hermite()
    eps = (z[:, None] * w / 63**0.5).reshape(-1, 1, 8, 8)  # what w sees of standard noise is |w| z
    real, fake = (torch.randn(len(z), 1, 8, 8, generator=g) for _ in range(2))
    plain = judge(Linear(w), 8, loss=loss, critic_weight=0.5)
    with_r1 = judge(Linear(w), 8, loss=loss, critic_weight=0.5, r1=0.2, r1_kind=kind)
    cond = nobody(len(z))
    added = with_r1.discriminator(real, fake, cond, Nodes(eps, 0.5)) - plain.discriminator(
        real, fake, cond, Nodes(eps, 0.5)
    )
    assert (weight * added).sum().item() == pytest.approx(0.5 * 0.2 * 63, rel=1e-3)
    if kind == "features":
        torch.testing.assert_close(added, torch.full_like(added, 0.5 * 0.2 * 63), rtol=1e-4, atol=1e-4)


def test_the_difference_moves_the_noised_image_that_was_judged_and_keeps_its_time() -> None:
    family = conv_family()
    made = Adversary(Adversarial(weight=1.0, r1=1.0, r1_kind="difference", r1_step=0.05), family, family.denoiser)
    seen: list[tuple[Tensor, Tensor]] = []
    family.denoiser.network.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    batch = Samples((2, 8, 8)).batch(range(4))
    assert batch.x0 is not None
    made.discriminator(batch.x0, batch.x0 + 1, batch.cond, noise())
    (real, t), (fake, s), (moved, r) = seen
    assert torch.equal(t, r)
    assert not torch.equal(t, s)
    rng = noise()
    for _ in range(2):  # the real image's and the student's
        rng.uniform(), rng.normal((2, 8, 8))
    torch.testing.assert_close(moved - real, 0.05 * rng.normal((2, 8, 8)), rtol=1e-4, atol=1e-6)
    assert (fake - real).abs().max() > 0.5


@pytest.mark.parametrize("features", ["teacher", "fake_score"])
def test_r1_on_features_costs_no_pass_and_reaches_whoever_learns(features: str) -> None:
    family = conv_family()
    network = family.denoiser.network.requires_grad_(features == "fake_score")
    options = Adversarial(weight=1.0, r1=0.1, blocks=["down", "mid"])
    made = Adversary(options, family, family.denoiser)
    passes: list[int] = []
    network.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = Samples((2, 8, 8)).batch(range(4))
    assert batch.x0 is not None
    loss = made.discriminator(batch.x0, batch.x0 + 1, batch.cond, noise())
    loss.sum().backward()
    assert loss.shape == (4,)
    assert len(passes) == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.heads.parameters())
    assert all((p.grad is not None) == (features == "fake_score") for p in network.get_submodule("down").parameters())


# What is drawn


@pytest.mark.parametrize(
    ("options", "draws"),
    [({}, 4), ({"levels": "logit_normal"}, 4), ({"r1": 0.1}, 4), ({"r1": 0.1, "r1_kind": "difference"}, 5)],
)
def test_an_option_that_is_off_draws_nothing(options: dict[str, object], draws: int) -> None:
    """A time and noise for each side, and the step's for the difference."""
    family, rng = conv_family(), noise()
    made = Adversary(Adversarial(weight=1.0, **options), family, family.denoiser)  # type: ignore[arg-type]
    x0 = torch.zeros(4, 2, 8, 8)
    made.discriminator(x0, x0, labels(["left"] * 4), rng)
    assert rng._draws == draws


def test_real_and_fake_are_noised_apart_and_each_sample_at_a_time_of_its_own() -> None:
    made = judge(Linear(1.0))
    rng = noise(50)
    x0 = torch.zeros(50, 1, 1, 1)
    (real, t), (fake, s) = made.noised(x0, rng), made.noised(x0, rng)
    assert len(t.unique()) > 40
    assert not torch.equal(t, s)
    assert not torch.equal(real, fake)
    at = made.backbone.schedule(t)
    rng = noise(50)
    rng.uniform()
    torch.testing.assert_close(real.flatten(), (at.sigma.float() * rng.normal(()))[:])


def test_levels_are_drawn_by_the_law_that_is_named() -> None:
    x0, n = torch.zeros(300, 1, 1, 1), 300
    _, t = judge(Linear(1.0), levels="logit_normal", level_mean=-1.0, level_std=0.5).noised(x0, noise(n))
    assert torch.equal(t, times.logit_normal(noise(n), sd_schedule(), -1.0, 0.5))
    _, t = judge(Linear(1.0)).noised(x0, noise(n))
    assert torch.equal(t, times.uniform(noise(n), sd_schedule()))


# Noise levels


@pytest.mark.parametrize(("mean", "std"), [(-1.0, 0.5), (0.0, 0.5), (-0.5, 0.8)])
@pytest.mark.parametrize("schedule", schedules())
def test_logit_normal_levels_have_their_mean_and_deviation_on_every_clock(
    schedule: Schedule, mean: float, std: float
) -> None:
    n = 4000
    t = times.logit_normal(noise(n), schedule, mean, std)
    at = schedule(t)
    found = (at.sigma / at.alpha).log()
    slack = 0.01 if isinstance(schedule, type(sd_schedule())) else 0.0  # a table has entries, and the cleaner is taken
    assert abs(found.mean() - mean) < 5 * std / n**0.5 + slack
    assert abs(found.std() - std) < 5 * std / (2 * n) ** 0.5 + slack


def test_on_rectified_flow_logit_normal_is_the_logistic_of_a_normal() -> None:
    z = noise(100).normal(()).double()
    t = times.logit_normal(noise(100), Flow(), 1.0, 0.7)
    torch.testing.assert_close(t, torch.sigmoid(1 + 0.7 * z), rtol=1e-8, atol=1e-10)


def test_sana_sprint_s_law_is_one_of_them() -> None:
    """TrigFlow's t = atan(exp(n) / 0.5), n ~ N(-0.6, 1), has sigma / alpha = tan t (arXiv 2503.09641)."""
    ratio = (-0.6 + noise(100).normal(()).double()).exp() / 0.5
    t = times.logit_normal(noise(100), Flow(), -0.6 - math.log(0.5), 1.0)
    torch.testing.assert_close(t / (1 - t), ratio, rtol=1e-7, atol=0)


def test_on_a_table_the_time_is_the_entry_next_to_the_level_on_its_cleaner_side() -> None:
    schedule, wanted = sd_schedule(), Flow()(times.logit_normal(noise(500), Flow())).log_snr
    t = times.logit_normal(noise(500), schedule)
    assert torch.equal(t, t.round())
    inside = (t > 0) & (t < 999)
    assert inside.sum() > 450
    assert (schedule(t).log_snr >= wanted)[inside].all()
    assert (schedule((t + 1).clamp(max=999)).log_snr < wanted)[inside].all()


@pytest.mark.parametrize("schedule", schedules())
def test_levels_beyond_a_schedule_are_its_ends(schedule: Schedule) -> None:
    assert times.logit_normal(noise(), schedule, 60.0, 0.1).tolist() == pytest.approx([schedule.t_max] * 4)
    assert times.logit_normal(noise(), schedule, -60.0, 0.1).tolist() == pytest.approx([schedule.t_min] * 4, abs=1e-9)


# Who learns


def test_the_discriminator_s_loss_reaches_heads_only_and_the_student_s_its_images() -> None:
    family = conv_family()
    made = Adversary(Adversarial(weight=1.0, blocks=["all"]), family, family.denoiser)
    real, fake = (torch.randn(4, 2, 8, 8, requires_grad=True, generator=torch.manual_seed(s)) for s in (0, 1))
    made.discriminator(real.detach(), fake, labels(["left"] * 4), noise()).sum().backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in made.heads.parameters())
    made.heads.requires_grad_(False).zero_grad()
    made.student(fake, labels(["left"] * 4), noise()).sum().backward()
    assert fake.grad is not None
    assert fake.grad.flatten(1).norm(dim=1).min() > 0
    assert all(p.grad is None for p in made.heads.parameters())
    assert all(p.grad is None for p in family.denoiser.network.parameters())


# How a method takes it


def test_heads_start_as_the_run_s_seed_says_whatever_was_drawn_before() -> None:
    family = conv_family()

    def drawn(seed: int, before: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        torch.randn(before)
        heads = Adversary(Adversarial(weight=1.0), family, family.denoiser).heads
        return nn.utils.parameters_to_vector(heads.parameters()), torch.randn(4)

    (one, after), (other, later) = drawn(0, 0), drawn(0, 5)
    assert torch.equal(one, other)
    assert not torch.equal(after, later)
    assert not torch.equal(one, drawn(1, 0)[0])
    torch.manual_seed(0)
    assert torch.equal(after, torch.randn(4))  # what is drawn after them goes on as if they had drawn nothing


def test_at_weight_zero_there_is_no_adversary() -> None:
    assert adversary.make(Adversarial(), gaussian_family(), gaussian_family().denoiser) is None


def test_the_backbone_is_the_one_named() -> None:
    family = conv_family()
    fake_score = family.denoiser.with_network(conv_family(1).denoiser.network)
    for name, expected in (("teacher", family.denoiser), ("fake_score", fake_score)):
        options = Adversarial(weight=1.0, features=name)  # type: ignore[arg-type]
        made = adversary.make(options, family, family.denoiser, fake_score)
        assert made is not None
        assert made.backbone is expected


def test_a_method_without_a_fake_score_cannot_give_its_features() -> None:
    family = conv_family()
    with pytest.raises(
        ValueError, match=r"adversarial\.features fake_score: this method has no fake score; set teacher"
    ):
        adversary.make(Adversarial(weight=1.0, features="fake_score"), family, family.denoiser)


def test_all_blocks_are_those_of_the_family() -> None:
    family = conv_family()
    assert Adversary(Adversarial(weight=1.0, blocks=["all"]), family, family.denoiser).blocks == ["down", "mid"]
    assert Adversary(Adversarial(weight=1.0), family, family.denoiser).blocks == ["mid"]


def test_the_phase_of_its_own_is_the_discriminator_s_loss_on_what_the_student_makes() -> None:
    family, batch = conv_family(), Samples((2, 8, 8)).batch(range(4))
    made = Adversary(Adversarial(weight=1.0), family, family.denoiser)
    graphs: list[bool] = []

    def generate(batch: Batch, rng: Noise) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        return 2 * rng.normal((2, 8, 8))

    phase = made.phase(generate)
    assert (phase.name, phase.trains, phase.every) == ("discriminator", ["discriminator"], 1)
    rng = noise()
    fake = 2 * rng.normal((2, 8, 8))
    assert batch.x0 is not None
    expected = made.discriminator(batch.x0, fake, batch.cond, rng)
    found = phase.loss(batch, noise())
    assert found.keys() == {"gan"}
    assert torch.equal(found["gan"], expected)
    assert graphs == [False]


def test_the_phase_asks_for_images() -> None:
    family = conv_family()
    phase = Adversary(Adversarial(weight=1.0), family, family.denoiser).phase(lambda batch, rng: rng.normal((2, 8, 8)))
    with pytest.raises(ValueError, match="the adversarial term needs images; this data source has prompts only"):
        phase.loss(replace(Samples((2, 8, 8)).batch(range(4)), x0=None), noise())


def test_another_way_of_noising_serves_both_sides() -> None:
    """As phased consistency needs: what is judged is noised from where it stands."""
    made = judge(Linear(2.0, 0.5))

    def noising(x: Tensor, rng: Noise) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x),), 100.0, dtype=torch.float64)
        return add_noise(sd_schedule(), x, torch.ones_like(x), t), t

    at = sd_schedule()(torch.tensor([100.0], dtype=torch.float64))
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    logit = 2 * (at.alpha.float() * x.flatten() + at.sigma.float()) + 0.5
    torch.testing.assert_close(made.student(x, nobody(2), noise(2), noising), losses.gan_generator(logit[:, None]))
    torch.testing.assert_close(
        made.discriminator(x, -x, nobody(2), noise(2), noising),
        losses.gan_discriminator(
            logit[:, None], (2 * (-at.alpha.float() * x.flatten() + at.sigma.float()) + 0.5)[:, None]
        ),
    )
