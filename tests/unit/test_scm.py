"""sCM on a world with known answers: tangents, gradients, times and turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.adversary import Adversarial
from fastgen.coordinates import trigflow
from fastgen.engine import Engine
from fastgen.guidance import Scales
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.pipelines import sd
from fastgen.prediction import Kind
from fastgen.rng import Noise
from fastgen.schedule import Flow, Schedule
from fastgen.trainers.scm import Config, Method
from tests import tiny
from tests.oracle import (
    Gaussian,
    Map,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    labels,
    moved,
    optims,
    same,
    schedules,
    sd_schedule,
    states,
    train,
)

MEANS, STDS, SHAPE = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3), (4, 4)
CONV = Samples((2, 8, 8))
OFF = Scales(1.0, 1.0, False)
WORLDS: list[tuple[Schedule, Kind]] = [
    (sd_schedule(), "v"),
    (sd_schedule(), "eps"),
    (sd_schedule(), "x0"),
    (Flow(), "flow"),
]


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


def to_double(network: nn.Module, means: tuple[float, ...], stds: tuple[float, ...]) -> None:
    """The Gaussian's parameters to the last bit of float64."""
    network.double()
    with torch.no_grad():
        network.mean.copy_(torch.tensor(means, dtype=torch.float64))
        network.log_std.copy_(torch.tensor(stds, dtype=torch.float64).log())


def gaussian_method(
    schedule: Schedule,
    kind: Kind,
    means: tuple[float, ...] = MEANS,
    stds: tuple[float, ...] = STDS,
    **options: object,
) -> Method:
    """An exact teacher and a student that is the consistency map of Gaussians with these parameters; float64."""
    family = gaussian_family(MEANS, STDS, schedule, kind, (3,), lambda: Map(means, stds, schedule, kind))
    method = Method(Config(**{"guidance": OFF, **options}), family, 1)  # type: ignore[arg-type]
    to_double(method.teacher.network, MEANS, STDS)
    to_double(method.student.network, means, stds)
    return method


def world(schedule: Schedule, n: int = 64) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor]:
    """A batch of "left" in float64 with x0, eps: [n, 3], t: [n] between the table's entries and scales: [n] of 1."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 3, generator=g, dtype=torch.float64)
    share = 0.01 + 0.98 * torch.rand(n, generator=g, dtype=torch.float64)
    batch = Batch(list(range(n)), labels(["left"] * n, torch.float64), labels([""], torch.float64), 1.0 + 0.5 * x0)
    t = schedule.t_min + share * (schedule.t_max - schedule.t_min)
    return batch, 1.0 + 0.5 * x0, eps, t, torch.ones_like(t)


# The tangent


@pytest.mark.parametrize("sigma_data", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_the_tangent_vanishes_at_the_exact_consistency_map(schedule: Schedule, kind: Kind, sigma_data: float) -> None:
    method = gaussian_method(schedule, kind, sigma_data=sigma_data)
    *_, g = method.tangent(*world(schedule), share=1.0)
    assert g.abs().max() < 1e-10
    *_, off = gaussian_method(schedule, kind, (0.3, 1.1, -0.5), sigma_data=sigma_data).tangent(*world(schedule), 1.0)
    assert off.square().mean().sqrt() > 0.01


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_elsewhere_it_is_the_closed_form(schedule: Schedule, kind: Kind, sigma_data: float) -> None:
    """cos df/dtau of f = m + s (x - cos m) / S, S^2 = cos^2 s^2 + sin^2 sigma_data^2, along the teacher's flow."""
    m, s = 0.2, 0.9
    method = gaussian_method(schedule, kind, (m,) * 3, (s,) * 3, sigma_data=sigma_data)
    batch, x0, eps, t, w = world(schedule)
    *_, g = method.tangent(batch, x0, eps, t, w, 1.0)

    at = schedule(t).like(x0)
    here, x_t = trigflow(at, sigma_data), at.alpha * x0 + at.sigma * eps
    cos, sin, x = here.clock.cos(), here.clock.sin(), here.scale * x_t
    teacher = Gaussian(1.0, 0.5)
    dx = -sin * teacher.x0(x_t, at) + sigma_data * cos * teacher.eps(x_t, at)
    size = (cos.square() * s**2 + sin.square() * sigma_data**2).sqrt()
    d_size = cos * sin * (sigma_data**2 - s**2) / size
    df = s * ((dx + sin * m) / size - (x - cos * m) * d_size / size.square())
    torch.testing.assert_close(g, cos * df, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("schedule", "kind"), [WORLDS[0], WORLDS[3]])
def test_every_part_of_it_is_needed(schedule: Schedule, kind: Kind) -> None:
    """At the exact map: the change of the wrong sign or none, the velocity of the wrong sign, no sample."""
    seen: list[tuple[Tensor, ...]] = []
    right = losses.consistency_tangent

    def spy(*parts: Tensor, **_: float) -> Tensor:
        seen.append(parts)
        return right(*parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "consistency_tangent", spy)
        gaussian_method(schedule, kind).tangent(*world(schedule), share=1.0)
    x, v, real, change, cos, sin, _ = seen[0]
    assert right(x, v, real, change, cos, sin).abs().max() < 1e-10
    wrong = {
        "sign of the change": (x, v, real, -change),
        "no change": (x, v, real, 0 * change),
        "sign of the velocity": (x, real, v, change),
        "no sample": (0 * x, v, real, change),
    }
    for name, parts in wrong.items():
        assert right(*parts, cos, sin).square().mean().sqrt() > 0.05, name


@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_finite_differences_give_the_same_tangent(schedule: Schedule, kind: Kind) -> None:
    """Half way between the table's entries, at whose corners they average two slopes."""
    batch, x0, eps, t, w = world(schedule)
    t = t.floor() + 0.5 if schedule.t_max > 1 else t
    other = ((0.2,) * 3, (0.9,) * 3)
    *_, exact = gaussian_method(schedule, kind, *other).tangent(batch, x0, eps, t, w, 1.0)
    differences = gaussian_method(schedule, kind, *other, derivative="finite_differences", span=1e-7)
    *_, near = differences.tangent(batch, x0, eps, t, w, 1.0)
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-6)


def test_without_its_second_part_it_is_distillation_of_the_velocity() -> None:
    """g = -cos^2 (v - real): what warm-up starts from. It vanishes at the teacher, which is no consistency map."""
    schedule = sd_schedule()
    batch, x0, eps, t, w = world(schedule)
    method = gaussian_method(schedule, "v", (0.2,) * 3, (0.9,) * 3)
    v, _, g = method.tangent(batch, x0, eps, t, w, 0.0)
    at = schedule(t).like(x0)
    x_t, here = at.alpha * x0 + at.sigma * eps, trigflow(at)
    real = here.velocity(Gaussian(1.0, 0.5).x0(x_t, at), Gaussian(1.0, 0.5).eps(x_t, at))
    torch.testing.assert_close(g, -here.clock.cos().square() * (v - real))

    method.target.denoiser = method.student = method.teacher
    assert method.tangent(batch, x0, eps, t, w, 0.0)[2].abs().max() == 0
    assert method.tangent(batch, x0, eps, t, w, 1.0)[2].square().mean().sqrt() > 0.05


def test_data_s_own_velocity_is_unbiased_and_noisy() -> None:
    """sCT: at the exact map the tangent has no regression on the sample, yet is not 0."""
    schedule, n = sd_schedule(), 60_000
    method = gaussian_method(schedule, "v", velocity="data")
    batch, x0, eps, _, w = world(schedule, n)
    for at_time in (150.5, 450.5, 750.5):
        t = torch.full((n,), at_time, dtype=torch.float64)
        *_, g = method.tangent(batch, x0, eps, t, w, 1.0)
        at = schedule(t).like(x0)
        x_t = at.alpha * x0 + at.sigma * eps
        z = (x_t - x_t.mean()) / x_t.std()
        error = (g.square().mean() / g.numel()).sqrt()
        assert error > 1e-4
        assert g.mean().abs() < 4 * error
        assert (g * z).mean().abs() < 6 * error
        assert (g * (z.square() - 1)).mean().abs() < 8 * error


def test_guidance_is_the_teacher_s() -> None:
    """With equal deviations the guided flow is that of a Gaussian at m_u + w (m_c - m_u)."""
    schedule = sd_schedule()
    guided = (0.3, 0.3 + 2.0 * (1.0 - 0.3), 0.3)
    family = gaussian_family(MEANS, (0.5,) * 3, schedule, "v", (3,), lambda: Map(guided, (0.5,) * 3, schedule, "v"))
    method = Method(Config(guidance=Scales(2.0, 2.0, False)), family, 1)
    to_double(method.teacher.network, MEANS, (0.5,) * 3)
    to_double(method.student.network, guided, (0.5,) * 3)
    assert method.tangent(*world(schedule), share=1.0)[2].abs().max() < 1e-10


def test_a_scale_that_is_an_input_guides_each_sample_s_teacher_by_its_own() -> None:
    """SANA-Sprint's: the student is told the scale that its teacher is guided by, also for the heads."""
    torch.manual_seed(0)
    adversarial = Adversarial(weight=0.5)
    method = Method(Config(guidance=Scales(4.0, 9.0, True, 7.5), adversarial=adversarial), conv_family(), 1)
    assert method.student_guidance == 7.5
    told: list[Tensor] = []
    hook = method.student.network.label.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    batch = CONV.batch(range(4))
    terms = method.student_loss(batch, noise())
    assert [tuple(label.shape) for label in told] == [(4, 6)] * 3  # captions, and captions times scale - 1
    scales = [label[:, 3:].sum(1) + 1 for label in told[1:]]  # of the plain pass, and of the heads' sample
    assert all(((4 <= scale) & (scale <= 9)).all() and len(scale.unique()) == 4 for scale in scales)
    hook.remove()

    rng = noise()
    eps, t = rng.normal((2, 8, 8)), method.draw(rng)
    scale = method.config.guidance.draw(rng)
    torch.testing.assert_close(scale.float(), scales[0])
    assert batch.x0 is not None
    *_, g = method.tangent(batch, batch.x0, eps, t, scale, 0.0)
    for i in range(4):
        one = Batch([i], {"label": batch.cond["label"][i : i + 1]}, batch.uncond)
        rows = (batch.x0[i : i + 1], eps[i : i + 1], t[i : i + 1])
        fixed = Method(Config(guidance=Scales(scale[i].item(), scale[i].item(), False)), conv_family(), 1)
        fixed.student = fixed.teacher
        *_, alone = fixed.tangent(one, *rows, scale[i : i + 1], 0.0)  # at the start the student ignores the scale
        torch.testing.assert_close(g[i : i + 1], alone, rtol=1e-3, atol=1e-4)
    assert terms["scm"].isfinite().all()


# The loss


def test_the_gradient_is_minus_twice_the_normalised_tangent() -> None:
    method = gaussian_method(sd_schedule(), "v", (0.2,) * 3, (0.9,) * 3, warmup=10, floor=0.1)
    batch, *_ = world(sd_schedule(), 16)
    parameters = list(method.student.network.parameters())
    rng = noise(4, n=16)
    loss = method.student_loss(batch, rng)["scm"]
    found = torch.autograd.grad(loss.sum(), parameters)

    rng = noise(4, n=16)
    assert batch.x0 is not None
    v, _, g = method.tangent(batch, batch.x0, rng.normal((3,)), method.draw(rng), torch.ones(16), 0.4)
    step = g / (g.square().sum(1, keepdim=True).sqrt() + 0.1)
    torch.testing.assert_close(loss, step.square().sum(1))
    expected = torch.autograd.grad((-2 * step * v).sum(), parameters)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
    assert max(one.abs().max() for one in found) > 0.1


@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_with_an_average_its_v_and_tangent_are_the_target(schedule: Schedule, kind: Kind) -> None:
    batch, x0, eps, t, w = world(schedule)
    method = gaussian_method(schedule, kind, (0.2,) * 3, (0.9,) * 3, target_decay=0.75)
    to_double(method.target.denoiser.network, (0.1,) * 3, (0.8,) * 3)
    alone = gaussian_method(schedule, kind, (0.1,) * 3, (0.8,) * 3)
    v, target, g = method.tangent(batch, x0, eps, t, w, 1.0)
    _, expected, tangent = alone.tangent(batch, x0, eps, t, w, 1.0)
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(g, tangent)
    torch.testing.assert_close(
        v, gaussian_method(schedule, kind, (0.2,) * 3, (0.9,) * 3).tangent(*world(schedule), 1)[0]
    )
    method.target.follow()
    mean = method.target.denoiser.network.mean
    torch.testing.assert_close(mean, torch.full_like(mean, 0.75 * 0.1 + 0.25 * 0.2))


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)])
def test_warm_up_goes_by_the_step(step: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    method = gaussian_method(sd_schedule(), "v", warmup=10)
    tangent = method.tangent

    def spy(batch: Batch, x0: Tensor, eps: Tensor, t: Tensor, scale: Tensor, share: float) -> tuple[Tensor, Tensor]:
        seen.append(share)
        return tangent(batch, x0, eps, t, scale, share)

    monkeypatch.setattr(method, "tangent", spy)
    batch, *_ = world(sd_schedule(), 4)
    method.student_loss(batch, noise(step))
    method.config = replace(method.config, warmup=0)
    method.student_loss(batch, noise(step))
    assert seen == [pytest.approx(share), 1.0]


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
@pytest.mark.parametrize("schedule", schedules())
def test_times_are_continuous_and_of_the_law_asked_for(schedule: Schedule, sigma_data: float) -> None:
    kind: Kind = "flow" if schedule.t_max == 1 else "v"
    method = gaussian_method(schedule, kind, noise_mean=-0.3, noise_std=0.8, sigma_data=sigma_data)
    t = method.draw(noise(n=40_000))  # the standard error of the deviation is 0.003
    log_tan = trigflow(schedule(t), sigma_data).clock.tan().log()
    assert log_tan.mean().item() == pytest.approx(-0.3, abs=0.05)
    assert log_tan.std().item() == pytest.approx(0.8, abs=0.01)
    assert (t != t.round()).float().mean() > 0.99


def test_noise_beyond_the_schedule_s_is_its_last_time() -> None:
    t = gaussian_method(sd_schedule(), "v", noise_mean=20.0).draw(noise(n=8))
    torch.testing.assert_close(t, torch.full_like(t, 999.0))


# Passes and gradients


def calls(network: nn.Module) -> list[int]:
    """The batch sizes of the network's passes, filled as they happen."""
    seen: list[int] = []
    network.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("how", "extra"), [("jvp", 1), ("finite_differences", 2)])
def test_passes_are_one_guided_of_the_teacher_one_of_the_student_and_its_derivative(how: str, extra: int) -> None:
    torch.manual_seed(0)
    method = Method(Config(guidance=Scales(2.0, 2.0, False), derivative=how), conv_family(), 1)  # type: ignore[arg-type]
    teacher, student = calls(method.teacher.network), calls(method.student.network)
    method.student_loss(CONV.batch(range(4)), noise())
    assert teacher == [8]
    assert student == [4] * (1 + extra)


def test_with_data_s_velocity_the_teacher_is_not_called() -> None:
    method = Method(Config(velocity="data", guidance=OFF), conv_family(), 1)
    teacher, student = calls(method.teacher.network), calls(method.student.network)
    method.student_loss(CONV.batch(range(4)), noise())
    assert (teacher, student) == ([], [4, 4])


def hybrid(**options: object) -> Method:
    torch.manual_seed(0)
    adversarial = Adversarial(weight=0.5, loss="hinge", levels="logit_normal", level_mean=0.1)
    return Method(Config(guidance=OFF, adversarial=adversarial, **options), conv_family(), 1)  # type: ignore[arg-type]


def test_the_hybrid_trains_heads_and_student_each_in_its_turn() -> None:
    method = hybrid()
    found = gradients_by_phase(method)  # type: ignore[arg-type]
    engine = Engine(method, CONV, optims(method, lr=1e-3, weight_decay=0.0), batch_size=2, steps=2)
    before = states(method)
    logs = train(engine, range(2))
    roles = {phase: {key.partition(".")[0] for key in keys} for phase, keys in found.items()}
    assert roles == {"discriminator": {"discriminator"}, "student": {"student"}}
    assert {"student/scm", "student/gan", "discriminator/gan"} < set(logs[0])
    after = states(method)
    assert moved(before["student"], after["student"]) == set(before["student"])
    assert same(before["teacher"], after["teacher"])


def test_the_hybrid_costs_one_pass_of_each_more() -> None:
    method = hybrid()
    teacher, student = calls(method.teacher.network), calls(method.student.network)
    method.student_loss(CONV.batch(range(4)), noise())
    assert student == [4] * 3
    assert teacher == [4]  # the features' pass ends at the last block they need, so its end is never seen


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_share_of_what_the_heads_judge_is_made_from_pure_noise(share: float, expected: float) -> None:
    seen: list[Tensor] = []
    method = hybrid(max_time=share, noise_std=0.1)
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        method.generate(CONV.batch(range(200)), noise(n=200))
    assert (seen[0] == 999).double().mean().item() == pytest.approx(expected, abs=0.1)


# End to end


def distil(num_steps: int, schedule: Schedule, kind: Kind, updates: int = 100, **options: object) -> list[float]:
    """Train a consistency map through the engine; the mean and deviation it learnt for "left" and for "right"."""
    made: Callable[[], nn.Module] = lambda: Map((0.0,) * 3, (1.0,) * 3, schedule, kind)  # noqa: E731
    family = gaussian_family(MEANS, STDS, schedule, kind, SHAPE, made)
    method = Method(Config(**{"guidance": OFF, "warmup": 20, **options}), family, num_steps)  # type: ignore[arg-type]
    settings = Optim(lr=0.1, schedule="linear", betas=(0.9, 0.99), weight_decay=0.0)
    data = Samples(SHAPE, MEANS, STDS)
    train(Engine(method, data, {"student": settings}, batch_size=16, steps=updates), range(updates))
    network = method.student.network
    return [value for c in (1, 2) for value in (network.mean[c].item(), network.log_std[c].exp().item())]


@pytest.mark.parametrize(("num_steps", "world"), [(1, WORLDS[0]), (2, WORLDS[0]), (2, WORLDS[3])])
def test_a_student_takes_on_the_teacher_s_mean_and_deviation(num_steps: int, world: tuple[Schedule, Kind]) -> None:
    assert distil(num_steps, *world) == pytest.approx([1.0, 0.5, -0.5, 0.3], abs=0.01)


def test_an_average_comes_after_it() -> None:
    found = distil(1, sd_schedule(), "v", 200, target_decay=0.9)
    assert found == pytest.approx([1.0, 0.5, -0.5, 0.3], abs=0.02)


def test_by_finite_differences_it_does_too() -> None:
    found = distil(1, sd_schedule(), "eps", derivative="finite_differences")
    assert found == pytest.approx([1.0, 0.5, -0.5, 0.3], abs=0.01)


def test_under_autocast_a_student_that_is_its_teacher_starts_at_zero() -> None:
    """Both passes in bfloat16, the change in float32: with no share of it the tangent is 0 to the bit."""
    family = sd.wrap(tiny.pipeline("v_prediction"), torch.bfloat16)
    cond = family.encode_prompts(tiny.PROMPTS[:2])
    batch = Batch([0, 1], cond, family.uncond(), Samples(family.latent_shape).batch(range(2)).x0)
    method = Method(Config(guidance=OFF, warmup=10), family, 1)
    assert method.student_loss(batch, noise(0, n=2))["scm"].abs().max() == 0
    later = method.student_loss(batch, noise(10, n=2))["scm"]
    assert ((later > 0) & (later < 1)).all()
    later.sum().backward()
    named = method.student.network.named_parameters()
    assert all(math.isfinite(p.grad.abs().sum()) for _, p in named if p.requires_grad)


# What is refused


def test_data_s_velocity_cannot_be_guided() -> None:
    with pytest.raises(ValueError, match=r"velocity data leaves guidance up to 4\.5 no teacher; set low and high 1"):
        Config(velocity="data")


def test_prompts_alone_are_refused() -> None:
    method = Method(Config(), conv_family(), 1)
    with pytest.raises(ValueError, match="scm needs images"):
        method.student_loss(replace(CONV.batch(range(2)), x0=None), noise(n=2))


def test_a_student_that_starts_below_the_last_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meets pure noise at time 999, not 399; set student\.start 1"):
        Method(Config(), gaussian_family(start=0.4), 1)
