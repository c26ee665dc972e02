"""Pretraining: what it learns, its weights and its caption dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastgen import losses
from fastgen.engine import Engine
from fastgen.optimizers import Optim
from fastgen.prediction import KINDS, Kind
from fastgen.rng import Noise
from fastgen.schedule import Flow
from fastgen.trainers.pretrain import Config, Method, drop_captions
from tests.oracle import Samples, conv_family, gaussian_family, labels, sd_schedule, train

SHAPE = (4, 4)
DATA = Samples(SHAPE, means=(9.0, 1.0, -0.5), stds=(9.0, 0.5, 0.3))


def noise(n: int, step: int = 0) -> Noise:
    return Noise(range(n), 0, step, "pretrain")


@pytest.mark.parametrize("kind", ["v", "eps", "x0"])
@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_it_recovers_a_gaussian_for_each_caption(kind: Kind, min_snr: float) -> None:
    family = gaussian_family((0.0,) * 3, (1.0,) * 3, kind=kind, shape=SHAPE)
    method = Method(Config(caption_dropout=0.0, min_snr=min_snr), family, 1)
    settings = Optim(lr=0.05, schedule="linear", weight_decay=0.0, clip=0.0)
    train(Engine(method, DATA, {"teacher": settings}, batch_size=32, steps=250), range(250))
    network = family.denoiser.network
    assert network.mean[1:].tolist() == pytest.approx([1.0, -0.5], abs=0.05)
    assert network.log_std[1:].exp().tolist() == pytest.approx([0.5, 0.3], abs=0.05)
    assert network.mean[0] == 0  # the empty caption was never seen


def test_dropped_captions_teach_the_empty_caption_the_mixture() -> None:
    family = gaussian_family((0.0,) * 3, (1.0,) * 3, shape=SHAPE)
    method = Method(Config(caption_dropout=0.5, min_snr=0.0), family, 1)
    settings = Optim(lr=0.05, schedule="linear", weight_decay=0.0)
    data = Samples(SHAPE, means=(9.0, 1.0, 0.0), stds=(9.0, 0.5, 0.5))
    train(Engine(method, data, {"teacher": settings}, batch_size=32, steps=250), range(250))
    assert family.denoiser.network.mean.tolist() == pytest.approx([0.5, 1.0, 0.0], abs=0.12)


# Weights


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("x0", lambda snr, gamma: snr.clamp(max=gamma)),
        ("eps", lambda snr, gamma: snr.clamp(max=gamma) / snr),
        ("v", lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1)),
        ("flow", lambda snr, gamma: torch.ones_like(snr)),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_weights_are_those_of_min_snr(kind: Kind, formula: object, gamma: float) -> None:
    method = Method(Config(min_snr=gamma), gaussian_family(kind=kind), 1)
    at = sd_schedule()(torch.arange(1000))
    snr = (at.alpha / at.sigma).square()
    assert snr.min() < gamma < snr.max()
    torch.testing.assert_close(method.weight(kind, at), formula(snr, gamma))  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_zero_is_no_weight(kind: Kind) -> None:
    method = Method(Config(min_snr=0.0), gaussian_family(kind=kind), 1)
    assert method.weight(kind, sd_schedule()(torch.arange(1000))).unique().tolist() == [1]


def test_weighted_losses_of_the_same_error_agree_across_kinds() -> None:
    """min-SNR is one weight on the error of x0; each kind's form gives that same number."""
    found = []
    for kind in ("x0", "eps", "v"):
        method = Method(Config(min_snr=5.0), gaussian_family((0.7,) * 3, (1.3,) * 3, kind=kind, shape=SHAPE), 1)
        found.append(method.loss(DATA.batch(range(64)), noise(64))["denoising"].detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-5)


def test_on_flow_the_loss_is_plain_flow_matching() -> None:
    family = gaussian_family((0.7,) * 3, (1.3,) * 3, schedule=Flow(), kind="flow", shape=SHAPE)
    method, batch, rng = Method(Config(caption_dropout=0.0), family, 1), DATA.batch(range(8)), noise(8)
    assert batch.x0 is not None
    t, eps = rng.uniform(), rng.normal(SHAPE)
    shaped = t.float().reshape(-1, 1, 1)
    y = family.denoiser((1 - shaped) * batch.x0 + shaped * eps, t, batch.cond).y
    torch.testing.assert_close(method.loss(batch, noise(8))["denoising"], losses.mse(y, eps - batch.x0))


# Caption dropout


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_captions_are_dropped_in_their_share(share: float) -> None:
    family = gaussian_family(shape=SHAPE)
    seen = []
    family.denoiser.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    method, n = Method(Config(caption_dropout=share), family, 1), 2000
    method.loss(DATA.batch(range(n)), noise(n))
    dropped = (seen[0][:, 0] == 1).float().mean().item()
    assert dropped == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)


def test_dropping_replaces_the_rows_asked_for_and_no_other() -> None:
    batch = replace(DATA.batch(range(4)), cond={"label": labels(["left", "right", "left", "right"])["label"]})
    cond = drop_captions(batch, torch.tensor([True, False, False, True]))
    assert torch.equal(cond["label"], labels(["", "right", "left", ""])["label"])
    wide = {"label": torch.randn(4, 5, 3)}
    batch = replace(batch, cond=wide, uncond={"label": torch.zeros(1, 5, 3)})
    cond = drop_captions(batch, torch.tensor([False, True, False, False]))
    assert torch.equal(cond["label"][[0, 2, 3]], wide["label"][[0, 2, 3]])
    assert cond["label"][1].abs().max() == 0


# The rest


def test_it_trains_the_pipeline_s_own_network() -> None:
    family = conv_family()
    method = Method(Config(), family, 4)
    assert method.networks["teacher"] is family.denoiser.network
    assert (method.exported, method.num_steps, method.needs_images) == ("teacher", None, True)
    assert [(p.name, p.trains, p.every) for p in method.phases] == [("pretrain", ["teacher"], 1)]


def test_prompts_alone_are_refused() -> None:
    method = Method(Config(), gaussian_family(shape=SHAPE), 1)
    with pytest.raises(ValueError, match="pretrain needs images; this data source has prompts only"):
        method.loss(replace(DATA.batch(range(4)), x0=None), noise(4))
