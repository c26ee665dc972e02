"""Variational score distillation on a world with known answers, and which network learns from which of its losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import lora, losses, times
from fastgen.engine import Engine
from fastgen.optimizers import Optim
from fastgen.prediction import Kind
from fastgen.rng import Noise
from fastgen.schedule import Flow, Schedule, add_noise
from fastgen.trainers import vsd
from fastgen.trainers.vsd import Config, Method
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

MEANS, STD, SHAPE = (0.3, 1.0, -0.5), 0.5, (2, 2)
CONV = Samples((2, 8, 8), images=False)
SMALL = lora.Lora(rank=4, alpha=6)


def noise(step: int = 0, n: int = 4) -> Noise:
    return Noise(range(n), 0, step, "update")


def exact(schedule: Schedule, kind: Kind, fake_means: tuple[float, float, float], **options: Any) -> Method:
    """Gaussian scores, the fake one's with means of its own and the teacher's deviation."""
    family = gaussian_family(MEANS, (STD,) * 3, schedule, kind, SHAPE)
    method = Method(Config(fake_score="copy", **options), family, 1)
    with torch.no_grad():
        method.fake_score.network.mean.copy_(torch.tensor(fake_means))
    return method


def conv_method(num_steps: int = 1, **options: Any) -> Method:
    torch.manual_seed(0)
    return Method(Config(**{"lora": SMALL, **options}), conv_family(), num_steps)


# The gradient


@pytest.mark.parametrize(("schedule", "kind"), [(sd_schedule(), "v"), (sd_schedule(), "eps"), (Flow(), "flow")])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_the_direction_is_the_closed_form(schedule: Schedule, kind: Kind, scale: float) -> None:
    """alpha sigma g_p [(1 - w)(mu_u - m_u) + w (mu_c - m_c)] with g_p = sigma^2 / V_p, at every sample."""
    fake = (0.7, 0.2, 0.4)
    method = exact(schedule, kind, fake, guidance_scale=scale)
    n = 64
    batch = Samples(SHAPE, images=False, captions=("left",)).batch(range(n))
    x0 = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = method.grad(x0, batch, noise(n=n))
    at = schedule(times.uniform(noise(n=n), schedule, 0.02, 0.98)).like(x0)
    pull = (1 - scale) * (fake[0] - MEANS[0]) + scale * (fake[1] - MEANS[1])
    expected = at.alpha * at.sigma * at.sigma.square() / Gaussian(MEANS[1], STD).variance(at) * pull
    torch.testing.assert_close(found, expected.expand_as(found), rtol=2e-3, atol=2e-5)
    assert len(found.unique()) > 8  # a time for each sample


def test_the_student_learns_along_it() -> None:
    """d(vsd)/d(x0) = direction / n; and a student above the teacher's mean is pushed down."""
    method = exact(sd_schedule(), "v", (0.3, 1.8, -0.5))
    batch = Samples(SHAPE, images=False, captions=("left",)).batch(range(4))
    x0 = torch.full((4, *SHAPE), 1.8, requires_grad=True)
    (found,) = torch.autograd.grad(method.student_loss(x0, batch, noise()).sum(), x0)
    torch.testing.assert_close(found, method.grad(x0, batch, noise()) / 4)
    assert (found > 0).all()


def test_guidance_on_both_scores_is_still_where_the_scores_agree() -> None:
    """At any scale; guidance on the teacher alone would pull on."""
    for scale in (1.0, 4.5, 7.5):
        method = exact(sd_schedule(), "v", MEANS, guidance_scale=scale)
        assert (
            method.grad(torch.randn(4, *SHAPE), Samples(SHAPE, images=False).batch(range(4)), noise()).abs().max() == 0
        )


def test_a_random_scale_is_each_sample_s_own_and_the_same_for_both_scores() -> None:
    fake = (0.7, 0.2, 0.4)
    method = exact(sd_schedule(), "v", fake, guidance_range=(0.5, 4.0))
    n = 256
    batch = Samples(SHAPE, images=False, captions=("left",)).batch(range(n))
    found = method.grad(torch.zeros(n, *SHAPE), batch, noise(n=n))
    rng = noise(n=n)
    at = sd_schedule()(times.uniform(rng, sd_schedule(), 0.02, 0.98)).like(found)
    rng.normal(SHAPE)
    scale = (0.5 + 3.5 * rng.uniform()).float().reshape(-1, 1, 1)
    assert scale.min() < 0.6
    assert scale.max() > 3.9
    assert scale.mean() == pytest.approx(2.25, abs=0.2)  # the mean gradient is that of the mean scale: it is linear
    pull = (1 - scale) * (fake[0] - MEANS[0]) + scale * (fake[1] - MEANS[1])
    expected = at.alpha * at.sigma * at.sigma.square() / Gaussian(MEANS[1], STD).variance(at) * pull
    torch.testing.assert_close(found, expected.expand_as(found), rtol=2e-3, atol=2e-5)


# The fake score's loss


@pytest.mark.parametrize("kind", ["v", "eps", "x0"])
def test_the_fake_score_s_loss_is_the_error_of_its_noise_weighted_by_alpha_squared(kind: Kind) -> None:
    method = exact(sd_schedule(), kind, (0.7, 0.2, 0.4), caption_dropout=0.0)
    batch = Samples(SHAPE, images=False, captions=("right",)).batch(range(8))
    x0 = torch.randn(8, *SHAPE)
    found = method.fake_loss(x0, batch, noise(n=8))
    rng = noise(n=8)
    t, eps = times.uniform(rng, sd_schedule()), rng.normal(SHAPE)
    at = sd_schedule()(t).like(x0)
    guess = Gaussian(0.4, STD).eps(add_noise(sd_schedule(), x0, eps, t), at)
    expected = losses.per_sample((at.alpha * (guess - eps)).square())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_it_sees_the_empty_caption_as_often_as_said(dropout: float) -> None:
    method = exact(sd_schedule(), "v", MEANS, caption_dropout=dropout)
    seen: list[Tensor] = []
    method.fake_score.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    n = 200
    batch = Samples(SHAPE, images=False, captions=("left",)).batch(range(n))
    method.fake_loss(torch.zeros(n, *SHAPE), batch, noise(n=n))
    empty = (seen[0] == labels([""])["label"]).all(1).double().mean()
    assert empty == pytest.approx(dropout, abs=0.1 if dropout == 0.5 else 0)
    assert (seen[0].sum(1) == 1).all()


# Who learns


def test_neither_loss_reaches_the_other_network() -> None:
    method = conv_method()
    terms = method.loss(CONV.batch(range(4)), noise())
    assert set(terms) == {"vsd", "denoising"}
    for term, own, other in (("vsd", "student", "fake_score"), ("denoising", "fake_score", "student")):
        for role, gets in ((own, True), (other, False), ("teacher", False)):
            learning = [p for p in method.networks[role].parameters() if p.requires_grad]
            if learning:
                found = torch.autograd.grad(terms[term].sum(), learning, retain_graph=True, allow_unused=True)
                assert all((g is not None) == gets for g in found)


def test_an_iteration_costs_what_the_algorithm_needs() -> None:
    """One pass of the student; two guided ones and one of the fake score on the one network they share."""
    method = conv_method()
    backbone, seen = lora.plain(method.teacher.network), []  # type: ignore[var-annotated]
    assert backbone is lora.plain(method.fake_score.network)
    for name, network in (("student", method.student.network), ("scores", backbone)):
        network.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, len(args[0]))))
    method.loss(CONV.batch(range(4)), noise())
    assert seen == [("student", 4), ("scores", 8), ("scores", 8), ("scores", 4)]
    seen.clear()
    method = conv_method(guidance_scale=1.0)
    lora.plain(method.teacher.network).register_forward_pre_hook(lambda _, args: seen.append(("scores", len(args[0]))))
    method.loss(CONV.batch(range(4)), noise())
    assert seen == [("scores", 4)] * 3


def test_at_the_start_the_scores_agree_to_the_bit_and_after_a_step_they_do_not() -> None:
    """A fake score with the adapter off, or a teacher with it on, would leave the student still for ever."""
    method = conv_method()
    batch = CONV.batch(range(4))
    assert method.loss(batch, noise())["vsd"].abs().max() == 0
    before = states(method)
    train(Engine(method, CONV, optims(method, lr=1e-2), batch_size=4, steps=2), range(2))
    after = states(method)
    assert same(before["teacher"], after["teacher"])
    assert moved(before["fake_score"], after["fake_score"]) == set(before["fake_score"])
    assert moved(before["student"], after["student"])
    assert (method.loss(batch, noise())["vsd"] > 0).all()


def test_the_fake_score_is_an_adapter_on_the_teacher_s_own_tensors_and_the_family_stays_whole() -> None:
    family = conv_family()
    method = Method(Config(lora=SMALL), family, 1)
    own = {p.data_ptr() for p in family.denoiser.network.parameters()}
    assert {p.data_ptr() for p in method.networks["teacher"].parameters()} == own
    assert {name.split(".")[-2] for name in method.networks["fake_score"].state_dict()} == {"lora_A", "lora_B"}
    assert type(family.denoiser.network.enter) is nn.Conv2d
    train(Engine(method, CONV, optims(method, lr=1e-2), batch_size=4, steps=1), range(1))
    x, t, cond = torch.randn(2, 2, 8, 8), torch.tensor([10.0, 900.0]), labels(["left", "right"])
    with torch.no_grad():
        assert torch.equal(family.denoiser(x, t, cond).y, method.teacher(x, t, cond).y)
        assert not torch.equal(family.denoiser(x, t, cond).y, method.fake_score(x, t, cond).y)


def test_a_student_of_adapters_may_share_the_network_too() -> None:
    method = Method(Config(lora=SMALL), lora.adapted(conv_family(), lora.Lora(rank=2), share_backbone=True), 1)
    assert len({id(lora.plain(network)) for network in method.networks.values()}) == 1
    train(Engine(method, CONV, optims(method, lr=1e-2), batch_size=4, steps=2), range(2))
    assert (method.loss(CONV.batch(range(4)), noise())["vsd"] > 0).all()


# End to end


@pytest.mark.parametrize("options", [{"guidance_scale": 3.0}, {"guidance_range": (0.5, 4.0)}])
def test_guided_scores_bring_the_student_to_the_teacher_s_own_mean_and_deviation(options: dict[str, Any]) -> None:
    """No sharpening: with guidance on the teacher alone the means would go to m_u + w (m_c - m_u), 2.5 and -2.0.

    The teacher's empty caption is the mixture of its captions, as is the fake score's for the student.
    """
    captions, spread = (1.0, -0.5), 0.5
    mixed = ((0.75**2 + spread**2) ** 0.5,)
    family = gaussian_family((0.25, *captions), (*mixed, spread, spread), shape=(4, 4))
    torch.manual_seed(0)
    method = Method(Config(fake_score="copy", caption_dropout=0.5, **options), family, 1)
    settings = {
        "student": Optim(lr=0.01, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0),
        "fake_score": Optim(lr=0.03, schedule="linear", betas=(0.0, 0.99), weight_decay=0.0),
    }
    steps = 500
    train(Engine(method, Samples((4, 4), images=False), settings, batch_size=16, steps=steps), range(steps))
    student = method.student.network
    assert isinstance(student, Affine)
    assert student.shift[3, 1:].tolist() == pytest.approx(captions, abs=0.08)
    assert student.scale[3, 1:].abs().tolist() == pytest.approx((spread, spread), abs=0.08)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_low": 0.5, "t_high": 0.5}, "t_low 0.5 must be below t_high 0.5"),
        ({"guidance_range": (4.0, 0.5)}, "guidance_range 4, 0.5 must not fall"),
        ({"lora": lora.Lora(targets=["midd"])}, "lora.targets: no linear or convolution layer 'midd'"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(Config(**options), conv_family(), 1)


def test_a_network_that_takes_no_adapter_is_told() -> None:
    with pytest.raises(ValueError, match="Gaussians has no linear or convolution layer; train it without adapters"):
        Method(Config(), gaussian_family(), 1)


def test_the_paper_s_settings_are_the_defaults() -> None:
    assert (Config().guidance_scale, Config().lora.rank, Config().lora.alpha) == (4.5, 64, 108)
    assert vsd.ABOUT.arxiv == "2312.05239"
