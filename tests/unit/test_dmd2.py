"""DMD2 on a world with known answers, and which network learns from which of its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastgen import losses, times
from fastgen.adversary import Adversarial, Adversary
from fastgen.denoiser import Denoiser
from fastgen.discriminator import features
from fastgen.engine import Engine
from fastgen.family import Family
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.prediction import Kind
from fastgen.rng import Noise
from fastgen.sampling import renoise, sample
from fastgen.schedule import Flow, Schedule, add_noise
from fastgen.trainers.dmd2 import Config, Method
from tests.oracle import (
    Affine,
    Map,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    labels,
    moved,
    optims,
    same,
    sd_schedule,
    states,
    train,
)

MEANS, SHAPE = (0.3, 1.0, -0.5), (4, 4)
CONV = Samples((2, 8, 8))


def noise(step: int = 0, phase: str = "student", n: int = 4) -> Noise:
    return Noise(range(n), 0, step, phase)


def conv_method(num_steps: int = 1, **options: object) -> Method:
    torch.manual_seed(0)
    return Method(Config(**options), conv_family(), num_steps)  # type: ignore[arg-type]


# End to end


def distil(
    student: type[Affine] | type[Map],
    num_steps: int,
    guidance_scale: float = 1.0,
    stds: tuple[float, float, float] = (0.5, 0.5, 0.3),
    schedule: Schedule | None = None,
    kind: Kind = "v",
    updates: int = 240,
    start: float = 1.0,
) -> list[tuple[float, float]]:
    """Train through the engine; the mean and deviation of samples for "left" and for "right"."""
    schedule = schedule or sd_schedule()
    made = (
        (lambda: Affine(schedule, kind))
        if student is Affine
        else (lambda: Map((0.0,) * 3, (1.0,) * 3, schedule, kind))
    )
    family = gaussian_family(MEANS, stds, schedule, kind, SHAPE, made, start)
    method = Method(Config(guidance_scale=guidance_scale), family, num_steps)
    steps = updates * method.config.student_every
    settings = Optim(lr=0.03, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0)
    data = Samples(SHAPE, images=False)
    train(
        Engine(method, data, {"student": settings, "fake_score": settings}, batch_size=16, steps=steps), range(steps)
    )

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


def test_a_one_step_student_takes_on_the_teacher_s_mean_and_deviation() -> None:
    (m1, s1), (m2, s2) = distil(Affine, 1)
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.03)


def test_a_two_step_student_trained_on_its_own_chain_does_too() -> None:
    (m1, s1), (m2, s2) = distil(Map, 2)
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.03)


def test_on_rectified_flow_it_does_too() -> None:
    (m1, s1), (m2, s2) = distil(Map, 2, schedule=Flow(), kind="flow")
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.03)


def test_a_student_called_at_an_earlier_time_is_trained_there_on_pure_noise() -> None:
    """As DMD2's one-step student of SDXL, at t = 399; the affine student is free at each quarter of the times."""
    (m1, s1), (m2, s2) = distil(Affine, 1, start=0.4)
    assert (m1, m2) == pytest.approx((1.0, -0.5), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.3), abs=0.03)


def test_guidance_moves_the_fixed_point_to_the_guided_mean() -> None:
    """With guidance on the teacher only: m_u + w (m_c - m_u), and the deviation unchanged."""
    (m1, s1), (m2, s2) = distil(Affine, 1, guidance_scale=2.0, stds=(0.5, 0.5, 0.5), updates=300)
    assert (m1, m2) == pytest.approx((0.3 + 2 * 0.7, 0.3 - 2 * 0.8), abs=0.03)
    assert (s1, s2) == pytest.approx((0.5, 0.5), abs=0.03)


# The gradient


def gradients(method: Method, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in method.student.network.parameters()], allow_unused=True))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_zero_gradient_when_fake_equals_teacher(num_steps: int) -> None:
    """At the start, without guidance: exactly, to the last bit."""
    method = conv_method(num_steps, guidance_scale=1.0)
    for step in range(4):
        terms = method.student_loss(CONV.batch(range(4)), noise(step))
        assert terms["dmd"].abs().max() == 0
        assert all(g.abs().max() == 0 for g in gradients(method, terms["dmd"].sum()) if g is not None)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("scale", [2.0, 7.5])
def test_at_the_start_only_guidance_pulls(num_steps: int, scale: float) -> None:
    """(w - 1) (uncond x0 - cond x0) / mean |x0 - guided x0|, over n."""
    method = conv_method(num_steps, guidance_scale=scale)
    batch = CONV.batch(range(4))
    found = gradients(method, method.student_loss(batch, noise(3))["dmd"].sum())

    rng = noise(3)
    x0 = method.generate(batch, rng)
    t = times.uniform(rng, method.teacher.schedule, 0.02, 0.98)
    with torch.no_grad():
        x_t = add_noise(method.teacher.schedule, x0, rng.normal((2, 8, 8)), t)
        pos = method.teacher(x_t, t, batch.cond).x0
        neg = method.teacher(x_t, t, labels([""] * 4)).x0
        size = losses.per_sample((x0 - (neg + scale * (pos - neg))).abs()).reshape(-1, 1, 1, 1)
        direction = (scale - 1) * (neg - pos) / size
    for g, expected in zip(found, gradients(method, (x0 * direction).sum() / 128), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in found) > 1e-4


def test_the_student_moves_towards_the_teacher() -> None:
    """T3: the sign. A student below the teacher's mean, known to the fake score, is pushed up."""
    family = gaussian_family(MEANS, (0.5,) * 3, shape=SHAPE)
    method = Method(Config(guidance_scale=1.0), family, 1)
    network = method.fake_score.network
    with torch.no_grad():
        network.mean.zero_()
        network.log_std.zero_()
    batch = Samples(SHAPE, images=False, captions=("left",)).batch(range(32))
    shift, _ = gradients(method, method.student_loss(batch, noise(n=32))["dmd"].sum())
    assert shift[3, 1] < 0
    assert shift[:3].abs().sum() == shift[3, 0] == shift[3, 2] == 0


def test_times_of_the_student_s_loss_stay_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"teacher": [], "fake": []}
    family = gaussian_family(shape=SHAPE)
    method = Method(Config(guidance_scale=1.0, t_low=0.4, t_high=0.6), family, 1)
    for name, denoiser in (("teacher", method.teacher), ("fake", method.fake_score)):
        denoiser.network.register_forward_pre_hook(lambda _, args, to=seen[name]: to.append(args[1]))
    n = 200
    batch = Samples(SHAPE, images=False).batch(range(n))
    method.student_loss(batch, noise(n=n))
    assert torch.equal(seen["teacher"][0], seen["fake"][0])
    assert seen["fake"][0].min() >= 400
    assert seen["fake"][0].max() < 600
    assert len(seen["fake"][0].unique()) > 50  # a time for each sample
    method.critic_loss(batch, noise(phase="critic", n=n))
    assert seen["fake"][1].min() < 100
    assert seen["fake"][1].max() > 900


def test_teacher_and_fake_score_see_the_same_noised_student() -> None:
    seen: list[Tensor] = []
    method = conv_method(guidance_scale=1.0)
    for denoiser in (method.teacher, method.fake_score):
        denoiser.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    method.student_loss(CONV.batch(range(4)), noise())
    assert torch.equal(seen[0], seen[1])


# Two time scales


def test_the_student_learns_every_few_steps_and_the_fake_score_at_each() -> None:
    method = conv_method(student_every=3, guidance_scale=2.0)
    before = states(method)
    engine = Engine(method, CONV, optims(method, lr=1e-3), batch_size=2, steps=7)
    for step, logs in engine.run(range(7)):
        after = states(method)
        assert moved(before["fake_score"], after["fake_score"])
        assert bool(moved(before["student"], after["student"])) == (step % 3 == 0)
        assert ("student/dmd" in logs) == (step % 3 == 0)
        assert same(before["teacher"], after["teacher"])
        before = after


def calls_by_turn(method: Method, steps: int) -> list[tuple[str, int]]:
    """Of each turn its phase and the student's calls, of two micro-batches."""
    found, calls = [], 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    engine = Engine(method, CONV, optims(method, lr=1e-3), batch_size=2, accumulate=2, steps=8)
    method.networks["student"].register_forward_pre_hook(count)
    for step in range(steps):
        for phase in (p for p in method.phases if step % p.every == 0):
            calls = 0
            engine.turn(phase, step)
            found.append((phase.name, calls))
    return found


def test_samples_are_reused_where_both_learn_in_one_step() -> None:
    """The student goes first there; elsewhere the critic draws its own."""
    apart = calls_by_turn(conv_method(student_every=2, guidance_scale=1.0), 3)
    assert apart == [("critic", 2), ("student", 2), ("critic", 2), ("critic", 2), ("student", 2)]
    method = conv_method(student_every=2, guidance_scale=1.0, reuse=True)
    assert calls_by_turn(method, 3) == [("student", 2), ("critic", 0), ("critic", 2), ("student", 2), ("critic", 0)]
    assert not method.made


def test_what_is_reused_is_the_student_s_before_its_update_at_the_same_samples() -> None:
    method = conv_method(num_steps=2, student_every=1, guidance_scale=1.0, reuse=True)
    batches = [CONV.batch(samples) for samples in ([0, 1], [2, 3])]
    for batch in batches:
        method.student_loss(batch, Noise(batch.samples, 0, 0, "student"))
    expected = [method.generate(b, Noise(b.samples, 0, 0, "student")).detach() for b in batches]
    with torch.no_grad():
        for p in method.networks["student"].parameters():
            p += 1
    seen = []
    method.fake_score.network.register_forward_pre_hook(lambda network, args: seen.append(args[0]))
    for batch, x0 in zip(batches, expected, strict=True):
        rng = Noise(batch.samples, 0, 0, "critic")
        method.critic_loss(batch, rng)
        again = Noise(batch.samples, 0, 0, "critic")
        t = times.uniform(again, method.teacher.schedule)
        x_t = add_noise(method.teacher.schedule, x0, again.normal(x0.shape[1:]), t)
        assert torch.equal(seen[-1], x_t)
        assert not seen[-1].requires_grad


def test_the_fake_score_learns_the_student_s_distribution() -> None:
    """DSM on the student's samples: with the student still, its mean and deviation are found."""
    method = Method(Config(guidance_scale=1.0), gaussian_family(shape=SHAPE, student=lambda: still(1.5, 0.8)), 1)
    method.phases = (method.phases[0],)
    engine = Engine(
        method,
        Samples(SHAPE, images=False),
        {"fake_score": Optim(lr=0.05, schedule="linear", weight_decay=0.0)},
        batch_size=16,
        steps=300,
    )
    train(engine, range(300))
    assert method.fake_score.network.mean[1:].tolist() == pytest.approx([1.5] * 2, abs=0.06)
    assert method.fake_score.network.log_std[1:].exp().tolist() == pytest.approx([0.8] * 2, abs=0.06)


def still(shift: float, scale: float) -> nn.Module:
    return Affine(sd_schedule(), "v", shift, scale)


# The GAN


def gan(weight: float, critic_weight: float = 1e-2, blocks: Sequence[str] = ()) -> Adversarial:
    return Adversarial(weight, critic_weight, "fake_score", list(blocks))


def adversary(method: Method) -> Adversary:
    assert method.adversary is not None
    return method.adversary


def test_without_the_gan_no_image_is_needed_and_no_head_is_made() -> None:
    method = conv_method(4)
    assert not method.needs_images
    assert set(method.networks) == {"teacher", "student", "fake_score"}
    assert [(p.name, p.trains) for p in method.phases] == [("critic", ["fake_score"]), ("student", ["student"])]
    batch = replace(CONV.batch(range(4)), x0=None)
    assert set(method.critic_loss(batch, noise(phase="critic"))) == {"denoising"}
    assert set(method.student_loss(batch, noise())) == {"dmd"}


def test_the_gan_trains_heads_and_fake_score_in_the_critic_and_the_student_in_its_own_phase() -> None:
    method = conv_method(adversarial=gan(0.5, 0.5), student_every=2)
    assert method.needs_images
    assert method.phases[0].trains == ["fake_score", "discriminator"]
    found = gradients_by_phase(method)  # type: ignore[arg-type]
    engine = Engine(method, CONV, optims(method, lr=1e-3, weight_decay=0.0), batch_size=2, steps=2)
    before = states(method)
    (first, second) = train(engine, range(2))
    roles = {phase: {key.partition(".")[0] for key in keys} for phase, keys in found.items()}
    assert roles == {"critic": {"fake_score", "discriminator"}, "student": {"student"}}
    assert set(first) == {
        "critic/denoising",
        "critic/gan",
        "critic/fake_score.grad_norm",
        "critic/discriminator.grad_norm",
        "student/dmd",
        "student/gan",
        "student/student.grad_norm",
    }
    assert not any(key.startswith("student") for key in second)
    after = states(method)
    assert moved(before["discriminator"], after["discriminator"]) == set(before["discriminator"])
    assert moved(before["student"], after["student"]) == set(before["student"])
    assert same(before["teacher"], after["teacher"])


def test_adversarial_terms_are_their_losses_times_their_weights() -> None:
    """Noised anew for each, at a time of its own; real and fake logits from the fake score's features."""
    method = conv_method(adversarial=gan(0.25, 0.5))
    batch = CONV.batch(range(4))
    assert batch.x0 is not None

    def logits(x0: Tensor, rng: Noise) -> Tensor:
        t = times.uniform(rng, method.teacher.schedule)
        x_t = add_noise(method.teacher.schedule, x0, rng.normal((2, 8, 8)), t)
        return adversary(method).heads(features(method.fake_score, ["mid"], x_t, t, batch.cond))

    def skip(rng: Noise) -> None:
        rng.uniform()
        rng.normal((2, 8, 8))

    rng = noise(phase="critic")
    x0 = method.generate(batch, rng)
    skip(rng)  # the denoising loss's
    expected = 0.5 * losses.gan_discriminator(logits(batch.x0, rng), logits(x0, rng))
    torch.testing.assert_close(method.critic_loss(batch, noise(phase="critic"))["gan"], expected)

    rng = noise()
    x0 = method.generate(batch, rng)
    skip(rng)  # the distribution-matching loss's
    expected = 0.25 * losses.gan_generator(logits(x0, rng))
    torch.testing.assert_close(method.student_loss(batch, noise())["gan"], expected)


def test_the_student_s_adversarial_gradient_comes_through_the_fake_score_s_features() -> None:
    method = conv_method(
        adversarial=gan(1.0), guidance_scale=1.0
    )  # the distribution-matching gradient is 0 at the start
    found = gradients(method, method.student_loss(CONV.batch(range(4)), noise())["gan"].sum())
    assert all(g is not None and g.abs().max() > 0 for g in found)


@pytest.mark.parametrize("source", ["teacher", "fake_score"])
def test_the_critic_s_adversarial_loss_teaches_the_heads_and_the_fake_score_only_where_it_is_read(source: str) -> None:
    """With the teacher's features the term has no gradient in the fake score; else in what lies below the block."""
    options = Adversarial(0.5, 0.5, source, ["down"])  # type: ignore[arg-type]
    method = conv_method(adversarial=options, guidance_scale=1.0)
    terms = method.critic_loss(CONV.batch(range(4)), noise(phase="critic"))
    heads = list(adversary(method).heads.parameters())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(terms["gan"].sum(), heads, retain_graph=True))
    fake = dict(method.fake_score.network.named_parameters())
    found = torch.autograd.grad(terms["gan"].sum(), list(fake.values()), allow_unused=True)
    reached = {name.split(".")[0] for name, g in zip(fake, found, strict=True) if g is not None}
    assert reached == ({"enter", "label", "time", "down"} if source == "fake_score" else set())
    assert not any(p.requires_grad for p in method.teacher.network.parameters())


@pytest.mark.parametrize("source", ["teacher", "fake_score"])
def test_the_student_s_adversarial_gradient_is_that_through_the_backbone_it_names(source: str) -> None:
    """d logits / d x0 by the chain through the noised sample, the frozen features and the heads; teacher and fake
    score differ, so that the one cannot pass for the other."""
    options = Adversarial(0.5, 0.5, source, ["mid"])  # type: ignore[arg-type]
    method = conv_method(adversarial=options, guidance_scale=1.0)
    with torch.no_grad():
        for p in method.fake_score.network.parameters():
            p += 0.1
    batch, rng = CONV.batch(range(4)), noise()
    found = gradients(method, method.student_loss(batch, noise())["gan"].sum())
    x0 = method.generate(batch, rng)
    rng.uniform()
    rng.normal((2, 8, 8))  # the distribution-matching loss's
    backbone = method.teacher if source == "teacher" else method.fake_score
    t = times.uniform(rng, backbone.schedule)
    leaf = x0.detach().requires_grad_()
    x_t = add_noise(backbone.schedule, leaf, rng.normal((2, 8, 8)), t)
    logits = adversary(method).heads(features(backbone, ["mid"], x_t, t, batch.cond))
    (slope,) = torch.autograd.grad(0.5 * losses.gan_generator(logits).sum(), leaf)
    assert slope.abs().max() > 0
    for g, expected in zip(found, gradients(method, (x0 * slope).sum()), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in method.teacher.network.parameters())


def test_the_heads_learn_to_tell_real_from_fake() -> None:
    family = conv_family()
    method = Method(Config(adversarial=gan(1e-3, 1.0), guidance_scale=1.0, student_every=1000), family, 1)
    data = Samples((2, 8, 8), means=(0.0, 2.0, 2.0))
    engine = Engine(method, data, optims(method, lr=3e-3), batch_size=8, steps=60)
    logs = train(engine, range(1, 61))
    assert logs[0]["critic/gan"] == pytest.approx(2 * 0.6931, abs=0.5)
    assert sum(log["critic/gan"] for log in logs[-10:]) / 10 < 0.9


def test_blocks_are_the_ones_named_or_the_deepest() -> None:
    assert adversary(conv_method(adversarial=gan(1e-3))).blocks == ["mid"]
    made = adversary(conv_method(adversarial=gan(1e-3, blocks=["mid", "down"])))
    assert made.blocks == ["mid", "down"]
    assert len(made.heads.heads) == 2


# What the student is called on


def test_with_data_a_few_step_student_needs_images_and_a_one_step_student_does_not() -> None:
    assert conv_method(2, rollout="data").needs_images
    assert not conv_method(1, rollout="data").needs_images


def inputs_of_student(method: Method, batch: Batch, steps: range) -> dict[float, Tensor]:
    """What the student's last call of each critic loss was given, by its time."""
    seen: list[tuple[Tensor, Tensor]] = []
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    found = {}
    for step in steps:
        method.critic_loss(batch, noise(step, "critic", len(batch)))
        x_t, t = seen[-1]
        found[t[0].item()] = x_t
    return found


@pytest.mark.parametrize("rollout", ["simulate", "data", "noise"])
@pytest.mark.parametrize("start", [1.0, 0.4])
def test_a_one_step_student_is_called_on_pure_noise_at_its_first_time(rollout: str, start: float) -> None:
    family = gaussian_family(shape=SHAPE, start=start)
    method = Method(Config(rollout=rollout), family, 1)  # type: ignore[arg-type]
    ((t, x_t),) = inputs_of_student(method, Samples(SHAPE).batch(range(100)), range(1)).items()
    assert t == 1000 * start - 1
    assert x_t.mean().item() == pytest.approx(0, abs=0.1)
    assert x_t.std().item() == pytest.approx(1, abs=0.1)


def test_pure_noise_alone_cannot_train_the_later_calls() -> None:
    with pytest.raises(ValueError, match=r"rollout noise trains only the first of 2 calls; choose simulate or data"):
        conv_method(2, rollout="noise")


def test_data_gives_noised_images_and_simulation_does_not() -> None:
    batch = CONV.batch(range(4))
    assert batch.x0 is not None
    batch = replace(batch, x0=torch.full_like(batch.x0, 50.0))
    data = inputs_of_student(conv_method(2, rollout="data"), batch, range(8))
    chain = inputs_of_student(conv_method(2), batch, range(8))
    assert set(data) == set(chain) == {999.0, 499.0}
    assert data[499.0].mean() > 20
    assert chain[499.0].mean().abs() < 5
    assert data[999.0].mean().abs() < 1  # pure noise at the first time, as when sampling


# What is refused


def test_an_empty_range_of_times_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t_low 0.6 must be below t_high 0.5"):
        conv_method(t_low=0.6, t_high=0.5)


def test_an_unknown_block_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(ValueError, match=r"adversarial\.blocks: no block 'middle'; this family has down, mid"):
        conv_method(adversarial=gan(1e-3, blocks=["middle"]))


def test_a_family_without_blocks_cannot_have_the_gan() -> None:
    with pytest.raises(ValueError, match=r"adversarial\.weight needs"):
        Method(Config(adversarial=gan(1e-3)), gaussian_family(), 1)


def test_a_fake_score_that_blows_up_stops_the_student() -> None:
    method = conv_method(guidance_scale=1.0)
    with torch.no_grad():
        next(method.fake_score.network.parameters()).fill_(float("nan"))
    assert method.student_loss(CONV.batch(range(4)), noise())["dmd"].isnan().all()  # on which the engine stops


def test_the_roles_share_schedule_kind_and_call_but_no_weight() -> None:
    family: Family = conv_family()
    method = Method(Config(), family, 1)
    roles: list[Denoiser] = [method.teacher, method.student, method.fake_score]
    assert {(id(d.schedule), d.kind, d.call) for d in roles} == {
        (id(family.denoiser.schedule), "v", family.denoiser.call)
    }
    pointers = [{p.data_ptr() for p in d.network.parameters()} for d in roles]
    assert pointers[0].isdisjoint(pointers[1] | pointers[2])
    assert pointers[1].isdisjoint(pointers[2])
    assert same(dict(method.teacher.network.state_dict()), dict(method.fake_score.network.state_dict()))
