"""Phased DMD on a world with known answers: what each phase ends in, and what its expert and its fake score learn."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fastgen import losses, times
from fastgen.engine import Engine
from fastgen.experts import Experts
from fastgen.family import Family
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.prediction import Kind, Prediction, combine
from fastgen.rng import Noise
from fastgen.sampling import ddim, sample, sample_student
from fastgen.schedule import Flow, Schedule, add_noise
from fastgen.trainers import dmd2
from fastgen.trainers.phased_dmd import Config, Method
from tests.oracle import (
    Affine,
    Gaussian,
    Samples,
    conv_family,
    gaussian_family,
    labels,
    moved,
    optims,
    same,
    sd_schedule,
    states,
    train,
)

MEANS, STDS, SHAPE = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3), (4, 4)
CONV = Samples((2, 8, 8))


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


def conv_method(num_steps: int = 4, **options: object) -> Method:
    torch.manual_seed(0)
    return Method(Config(**options), conv_family(), num_steps)  # type: ignore[arg-type]


def affine_method(num_steps: int = 4, schedule: Schedule | None = None, kind: Kind = "v", **options: object) -> Method:
    family = gaussian_family(MEANS, STDS, schedule, kind, SHAPE)
    return Method(Config(**options), family, num_steps)  # type: ignore[arg-type]


def experts(method: Method) -> list[nn.Module]:
    assert isinstance(method.student.network, Experts)
    return list(method.student.network)


# End to end


@pytest.mark.parametrize(
    ("num_steps", "schedule", "kind", "weighting"), [(2, sd_schedule(), "v", "dmd2"), (4, Flow(), "flow", "kl")]
)
def test_every_phase_ends_at_the_teacher_s_mean_and_deviation_there(
    num_steps: int, schedule: Schedule, kind: Kind, weighting: Literal["dmd2", "kl"]
) -> None:
    """The hand-over is the teacher's noised distribution, and the last sample its clean one; two experts."""
    shape = (12, 12)  # near its end a phase's target is mostly noise, so many coordinates
    family = gaussian_family(MEANS, STDS, schedule, kind, shape)
    method = Method(Config(weighting=weighting, guidance_scale=1.0, student_every=4), family, num_steps)
    steps = 150 * method.config.student_every
    settings = Optim(lr=0.04, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0)
    both, data = {"student": settings, "fake_score": settings}, Samples(shape, images=False)
    train(Engine(method, data, both, batch_size=16, steps=steps), range(steps))
    n = 1000
    for caption, mean, std in (("left", 1.0, 0.5), ("right", -0.5, 0.3)):
        batch = Batch(range(n), labels([caption] * n), labels([""]))
        with torch.no_grad():
            handed, last = method.samples(batch, noise(n=n))
        at = schedule(torch.tensor([method.intervals[0].end]))
        deviation = Gaussian(mean, std).variance(at).sqrt().item()
        assert handed.mean().item() == pytest.approx(at.alpha.item() * mean, abs=0.03)
        assert handed.std().item() == pytest.approx(deviation, abs=0.03)
        assert last.mean().item() == pytest.approx(mean, abs=0.03)
        assert last.std().item() == pytest.approx(std, abs=0.03)


# The chain


@pytest.mark.parametrize(("num_steps", "phases"), [(1, 1), (2, 2), (4, 2), (4, 4), (6, 3), (4, 1)])
def test_the_phases_are_equal_runs_of_the_student_s_times(num_steps: int, phases: int) -> None:
    family = conv_family()
    method = Method(Config(phases=phases), family, num_steps)
    found = method.intervals
    assert [t for part in found for t in part.times] == family.student_times(num_steps)
    assert {len(part.times) for part in found} == {num_steps // phases}
    assert [part.end for part in found] == [part.times[0] for part in found[1:]] + [0.0]
    assert [part.clean for part in found] == [False] * (phases - 1) + [True]
    assert isinstance(method.student.network, Experts)
    assert method.student.network.starts == [part.times[0] for part in found]
    for part in found[:-1]:  # of times that are noisier than the end, and of no other
        least = method.schedule.draw(torch.tensor([part.low, part.low - 1e-9], dtype=torch.float64))
        assert least[1] <= part.end < least[0]


@pytest.mark.parametrize(("num_steps", "phases"), [(2, 2), (4, 2), (3, 3)])
def test_the_samples_are_the_states_of_the_exported_sampler(num_steps: int, phases: int) -> None:
    """To the bit, from the same noise; also where a phase hands on."""
    method = conv_method(num_steps, phases=phases)
    for k, network in enumerate(experts(method)):
        with torch.no_grad():
            network.leave.bias += 0.1 * k  # type: ignore[operator]
    batch = CONV.batch(range(4))
    x_t, own = noise().normal((2, 8, 8)), conv_family().student_times(num_steps)
    with torch.no_grad():
        found = method.samples(batch, noise())
        assert torch.equal(found[-1], sample_student(method.student, method.schedule, x_t, own, batch.cond, "ddim"))
        for k, x_s in enumerate(found[:-1], 1):
            count = k * num_steps // phases
            expected = sample(method.student, method.schedule, x_t, own[:count], batch.cond, ddim, end=own[count])
            assert torch.equal(x_s, expected)


def test_each_expert_is_called_at_its_own_times() -> None:
    method, seen = conv_method(4), []
    for k, network in enumerate(experts(method)):
        network.register_forward_pre_hook(lambda _, args, k=k: seen.append((k, args[1].unique().tolist())))
    method.samples(CONV.batch(range(2)), noise(n=2))
    assert seen == [(0, [999.0]), (0, [749.0]), (1, [499.0]), (1, [249.0])]


def test_the_gradient_of_a_phase_reaches_each_step_of_its_expert_and_nothing_else() -> None:
    """The affine student is free at each quarter of the clock, and so at each of four steps."""
    method = affine_method(4)
    terms = method.student_loss(Samples(SHAPE, images=False).batch(range(4)), noise())
    assert list(terms) == ["dmd_1", "dmd_2"]
    quarters = ([2, 3], [0, 1])
    for k, term in enumerate(terms.values()):
        scales = [network.scale for network in experts(method)]
        grads = torch.autograd.grad(term.sum(), scales, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        assert grads[1 - k] is None
        assert grads[k].abs().sum(1).nonzero()[:, 0].tolist() == quarters[k]
    for role in ("teacher", "fake_score"):
        learning = [p for p in method.networks[role].parameters() if p.requires_grad]
        total = torch.stack(list(terms.values())).sum()
        found = torch.autograd.grad(total, learning, retain_graph=True, allow_unused=True) if learning else []
        assert all(g is None for g in found)


# The scores


def test_what_is_noised_has_the_law_of_the_forward_process() -> None:
    """From a phase's end on, and from clean data on in the last phase."""
    method = affine_method(4, Flow(), "flow")
    x_s, t = torch.randn(3, *SHAPE), torch.tensor([0.55, 0.75, 0.95], dtype=torch.float64)
    x_t, eps, ratio, added = method.noised(x_s, 0, t, noise(n=3))
    torch.testing.assert_close(ratio.flatten().double(), (1 - t) / 0.5, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        (added.square() + (ratio * 0.5).square()).flatten().double(), t**2, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(x_t, ratio * x_s + added * eps)
    x_t, eps, _, added = method.noised(x_s, 1, t, noise(n=3))
    torch.testing.assert_close(x_t, add_noise(Flow(), x_s, eps, t))
    torch.testing.assert_close(added.flatten().double(), t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("phase", ["critic", "student"])
def test_times_of_the_scores_lie_above_each_phase_s_end(phase: str) -> None:
    method = affine_method(4, guidance_scale=1.0, t_low=0.1, t_high=0.9)
    seen: list[list[Tensor]] = [[], []]
    for k, fake in enumerate(method.fake_scores):
        fake.network.register_forward_pre_hook(lambda _, args, k=k: seen[k].append(args[1]))
    n = 300
    loss = {"critic": method.critic_loss, "student": method.student_loss}[phase]
    loss(Samples(SHAPE, images=False).batch(range(n)), noise(phase=phase, n=n))
    limits = {"critic": [(500, 1000), (0, 1000)], "student": [(600, 900), (100, 900)]}[phase]
    for (t,), (low, high) in zip(seen, limits, strict=True):
        assert low <= t.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < t.max() < high
        assert len(t.unique()) > 50  # a time for each sample


def test_teacher_and_fake_score_of_a_phase_see_the_same() -> None:
    method, seen = conv_method(4, guidance_scale=1.0), []
    for denoiser in (method.teacher, *method.fake_scores):
        denoiser.network.register_forward_pre_hook(lambda net, args: seen.append((net, *args)))
    method.student_loss(CONV.batch(range(4)), noise())
    assert [entry[0] for entry in seen] == [
        method.teacher.network,
        method.fake_scores[0].network,
        method.teacher.network,
        method.fake_scores[1].network,
    ]
    for real, fake in (seen[:2], seen[2:]):
        assert all(torch.equal(a, b) for a, b in zip(real[1:], fake[1:], strict=True))


# What the fake score learns


def handing_on(data: Gaussian) -> Method:
    """Two steps on rectified flow, of which the first hands on the data's noised distribution at 0.5, exactly."""
    flow = Flow()

    def student() -> nn.Module:
        # at t = 1 the noise that is predicted is x_t itself: x_s = (shift + (scale + 1) z) / 2
        return Affine(flow, "flow", data.mean, (1 + data.std**2) ** 0.5 - 1)

    return Method(Config(), gaussian_family(MEANS, schedule=flow, kind="flow", shape=SHAPE, student=student), 2)


def slope(x: Tensor, y: Tensor) -> float:
    x = x.flatten().double() - x.double().mean()
    return ((x * y.flatten().double()).sum() / x.square().sum()).item()


@pytest.mark.parametrize(("t", "right", "wrong"), [(0.75, 0.893, 0.784), (0.52, 0.287, -0.513)])
def test_the_corrected_target_is_the_posterior_mean_and_the_naive_one_not_even_of_its_sign(
    t: float, right: float, wrong: float
) -> None:
    """Slopes of the flow on x_t for data N(0.5, 0.9^2) at 0.5: between 0.5 and 0.75 it is off, near 0.5 reversed."""
    n, method = 20000, handing_on(Gaussian(0.5, 0.9))
    with torch.no_grad():
        x_s, _ = method.samples(Batch(range(n), labels(["left"] * n), labels([""])), noise(n=n))
    time = torch.full((n,), t, dtype=torch.float64)
    x_t, eps, _, added = method.noised(x_s, 0, time, noise(1, n=n))
    at = Flow()(time).like(x_t)
    corrected, naive = losses.interval_target("flow", x_t, eps, added, at), combine("flow", x_s, eps, at)
    assert slope(x_t, corrected) == pytest.approx(right, abs=0.015)
    assert slope(x_t, naive) == pytest.approx(wrong, abs=0.015)


@pytest.mark.parametrize("t", [0.75, 0.52])
def test_the_critic_s_loss_is_the_corrected_one_and_still_at_the_exact_score(
    t: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mean gradient there is 0 within its own spread, and with the naive target's many spreads away."""
    n, data = 4000, Gaussian(0.5, 0.9)
    method = handing_on(data)
    monkeypatch.setattr(times, "uniform", lambda *_: torch.full((n,), t, dtype=torch.float64))
    network = method.fake_scores[0].network
    with torch.no_grad():
        network.mean.fill_(data.mean)  # type: ignore[operator, union-attr]
        network.log_std.fill_(data.std).log_()  # type: ignore[operator, union-attr]
    batch = Batch(range(n), labels(["left"] * n), labels([""]))

    def spreads() -> Tensor:
        """Mean gradients with respect to mean and deviation, in units of their standard errors."""
        term = method.critic_loss(batch, noise(phase="critic", n=n))["denoising_1"]
        parameters = [network.mean, network.log_std]
        parts = [
            torch.stack([g[1] for g in torch.autograd.grad(part.mean(), parameters, retain_graph=True)])  # type: ignore[arg-type]
            for part in term.chunk(40)
        ]
        found = torch.stack(parts)
        return found.mean(0) / (found.std(0) / 40**0.5)

    assert spreads().abs().max() < 3.5

    def naive(pred: Prediction, eps: Tensor, added: Tensor) -> Tensor:
        ratio = pred.at.alpha / 0.5
        return losses.mse(pred.y, combine("flow", (pred.x_t - added * eps) / ratio, eps, pred.at))

    monkeypatch.setattr(losses, "interval_denoising", naive)
    assert spreads().abs().max() > 20


def test_each_fake_score_learns_its_own_phase_s_samples() -> None:
    """By the loss of ``losses.interval_denoising``; the last phase's are clean, so its target is the ordinary one."""
    method = affine_method(4)
    batch = Samples(SHAPE, images=False).batch(range(6))
    found = method.critic_loss(batch, noise(phase="critic", n=6))
    rng = noise(phase="critic", n=6)
    with torch.no_grad():
        handed, last = method.samples(batch, rng)
    t = times.uniform(rng, method.schedule, 0.5)
    x_t, eps, _, added = method.noised(handed, 0, t, rng)
    pred = method.fake_scores[0](x_t, t, batch.cond)
    target = losses.interval_target("v", x_t, eps, added, pred.at)
    weight = (10 * added.square()).clamp(max=1.0)
    torch.testing.assert_close(found["denoising_1"], losses.per_sample(weight * (pred.y - target).square()))
    t, eps = times.uniform(rng, method.schedule), rng.normal(SHAPE)
    x_t = add_noise(method.schedule, last, eps, t)
    pred = method.fake_scores[1](x_t, t, batch.cond)
    weight = (10 * pred.at.sigma.square()).clamp(max=1.0)
    expected = losses.per_sample(weight * (pred.y - combine("v", last, eps, pred.at)).square())
    torch.testing.assert_close(found["denoising_2"], expected, rtol=1e-4, atol=1e-5)
    for k, term in enumerate(found.values()):
        for j, fake in enumerate(method.fake_scores):
            grads = torch.autograd.grad(
                term.sum(), list(fake.network.parameters()), retain_graph=True, allow_unused=True
            )
            assert all((g is not None) == (j == k) for g in grads)


# The gradient


def params(network: nn.Module) -> list[nn.Parameter]:
    return list(network.parameters())


def flow_family(seed: int = 0) -> Family:
    """Where the last DDIM step ends on x0 itself."""
    return gaussian_family(MEANS, STDS, Flow(), "flow", SHAPE)


def different(method: Method | dmd2.Method, fake: nn.Module) -> None:
    """A student and a fake score that are not the teacher."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*params(method.student.network), *params(fake)]:
            p += 0.3 * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["dmd2", "kl"])
def test_one_phase_of_one_step_is_dmd2(weighting: Literal["dmd2", "kl"], scale: float) -> None:
    """Its gradient to rounding, or with the weight alpha^2 / sigma^2 in the place of DMD2's 1 / N."""
    plain = dmd2.Method(dmd2.Config(guidance_scale=scale), flow_family(), 1)
    method = Method(Config(phases=1, guidance_scale=scale, weighting=weighting), flow_family(), 1)
    different(plain, plain.fake_score.network)
    different(method, method.fake_scores[0].network)
    batch = Samples(SHAPE, images=False).batch(range(8))

    rng = noise(n=8)
    rng.shared_integer(1)  # which of its calls DMD2 trains
    (found,) = method.student_loss(batch, rng).values()
    if weighting == "dmd2":
        expected = plain.student_loss(batch, noise(n=8))["dmd"]
        torch.testing.assert_close(found, expected)
    else:
        rng = noise(n=8)
        x0 = plain.generate(batch, rng)
        t = times.uniform(rng, Flow(), 0.02, 0.98)
        x_t = add_noise(Flow(), x0.detach(), rng.normal(SHAPE), t)
        neg, pos = (plain.teacher(x_t, t, cond).x0 for cond in (labels([""] * 8), batch.cond))
        at = Flow()(t).like(x_t)
        gap = plain.fake_score(x_t, t, batch.cond).x0 - (neg + scale * (pos - neg))
        expected = losses.surrogate(x0, (at.alpha / at.sigma).square() * gap)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(found.sum(), params(method.student.network))
    theirs = torch.autograd.grad(expected.sum(), params(plain.student.network))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in ours) > 0.01


@pytest.mark.parametrize("weighting", ["dmd2", "kl"])
@pytest.mark.parametrize(("num_steps", "phases"), [(1, 1), (4, 2), (3, 3)])
def test_zero_gradient_when_fake_equals_teacher(num_steps: int, phases: int, weighting: str) -> None:
    """At the start, without guidance: exactly, to the last bit, in every phase."""
    method = conv_method(num_steps, phases=phases, weighting=weighting, guidance_scale=1.0)
    terms = method.student_loss(CONV.batch(range(4)), noise())
    for term in terms.values():
        assert term.abs().max() == 0
        grads = torch.autograd.grad(term.sum(), params(method.student.network), retain_graph=True, allow_unused=True)
        assert all(g.abs().max() == 0 for g in grads if g is not None)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("weighting", ["dmd2", "kl"])
def test_with_guidance_the_fixed_point_of_each_phase_is_the_guided_mean(weighting: str, k: int) -> None:
    """m_u + w (m_c - m_u) at the teacher's deviation, where captions differ in their means alone."""
    family = gaussian_family(MEANS, (0.5,) * 3, shape=SHAPE)
    method = Method(Config(guidance_scale=3.0, weighting=weighting), family, 2)  # type: ignore[arg-type]
    batch, x_s = Samples(SHAPE, images=False, captions=("left",)).batch(range(8)), torch.randn(8, *SHAPE)
    start = method.grad(x_s, k, batch, noise(n=8)).abs().max()
    with torch.no_grad():
        method.fake_scores[k].network.mean[1] = 0.3 + 3.0 * (1.0 - 0.3)  # type: ignore[index, operator]
    assert method.grad(x_s, k, batch, noise(n=8)).abs().max() < 1e-4 * start


@pytest.mark.parametrize("weighting", ["dmd2", "kl"])
def test_the_gradient_in_a_phase_that_does_not_end_clean(weighting: Literal["dmd2", "kl"]) -> None:
    """By the closed forms of both scores: descent of KL between what x_s and the data become at t."""
    method = affine_method(2, guidance_scale=1.0, weighting=weighting)
    network = method.fake_scores[0].network
    with torch.no_grad():
        network.mean.fill_(0.2)  # type: ignore[operator, union-attr]
        network.log_std.fill_(0.7).log_()  # type: ignore[operator, union-attr]
    n = 5
    batch = Batch(range(n), labels(["right"] * n), labels([""]))
    x_s = torch.randn(n, *SHAPE)
    found = method.grad(x_s, 0, batch, noise(n=n))
    rng = noise(n=n)
    t = times.uniform(rng, method.schedule, 0.52, 0.98)
    x_t, _, ratio, added = method.noised(x_s, 0, t, rng)
    at = method.schedule(t).like(x_t)
    real, fake = (Gaussian(m, s).score(x_t, at) for m, s in ((-0.5, 0.3), (0.2, 0.7)))
    expected = ratio * (fake - real)
    if weighting == "dmd2":
        mean = (x_t + added.square() * real) / ratio  # Tweedie
        size = (x_s - mean).abs().flatten(1).mean(1).reshape(-1, 1, 1)
        expected = (added / ratio).square() * expected / size
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("k", [0, 1])
def test_the_student_moves_towards_the_teacher(k: int) -> None:
    """The sign. Experts whose samples lie below the teacher's, known to the fake scores, are pushed up."""
    method = affine_method(2, guidance_scale=1.0)
    for fake in method.fake_scores:
        with torch.no_grad():
            fake.network.mean.zero_()  # type: ignore[operator, union-attr]
            fake.network.log_std.zero_()  # type: ignore[operator, union-attr]
    batch = Samples(SHAPE, images=False, captions=("left",)).batch(range(64))
    terms = list(method.student_loss(batch, noise(n=64)).values())
    (grad,) = torch.autograd.grad(terms[k].sum(), [experts(method)[k].shift])  # type: ignore[list-item]
    assert grad[:, 1].sum() < 0
    assert grad[:, [0, 2]].abs().sum() == 0


# Roles and options


def test_experts_start_as_the_teacher_and_fake_scores_as_copies_of_it() -> None:
    method = conv_method(4)
    own = method.networks["teacher"].state_dict()
    assert list(method.networks) == ["teacher", "student", "fake_score"]
    assert [(p.name, p.trains, p.every) for p in method.phases] == [
        ("critic", ["fake_score"], 1),
        ("student", ["student"], 5),
    ]
    copies = [*experts(method), *(fake.network for fake in method.fake_scores)]
    assert all(same(own, network.state_dict()) for network in copies)
    pointers = [p.data_ptr() for network in [method.networks["teacher"], *copies] for p in network.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert not method.needs_images


def test_the_experts_learn_every_few_steps_and_the_fake_scores_at_each() -> None:
    method = conv_method(4, student_every=3, guidance_scale=2.0)
    before = states(method)
    engine = Engine(method, CONV, optims(method, lr=1e-3), batch_size=2, steps=4)
    for step, logs in engine.run(range(4)):
        after = states(method)
        for role, learns in (("fake_score", True), ("student", step % 3 == 0)):
            parts = {name.partition(".")[0] for name in moved(before[role], after[role])}
            assert parts == ({"0", "1"} if learns else set())
        assert ("student/dmd_1" in logs) == ("student/dmd_2" in logs) == (step % 3 == 0)
        assert same(before["teacher"], after["teacher"])
        before = after


@pytest.mark.parametrize(("phases", "num_steps"), [(2, 1), (2, 3), (3, 4), (4, 2)])
def test_phases_that_do_not_divide_the_steps_are_refused(phases: int, num_steps: int) -> None:
    message = f"method.phases {phases} does not divide student.steps {num_steps}; set student.steps to a multiple"
    with pytest.raises(ValueError, match=message):
        conv_method(num_steps, phases=phases)


def test_a_range_without_times_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"t_low 0\.5 above the first phase's end is 1 of the times, which must be be"
    ):
        conv_method(2, t_low=0.5)
    with pytest.raises(ValueError, match=r"is 0\.4 of the times, which must be below t_high 0\.3; lower t_low"):
        conv_method(1, phases=1, t_low=0.4, t_high=0.3)
