"""The moving average of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen.ema import EMA


def network(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def shift(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p += by


def test_average_follows_its_recurrence_with_a_decay_that_warms_up() -> None:
    net = network()
    ema = EMA(net, 0.5)
    expected = net.weight.detach().clone()
    for n in range(1, 20):
        shift(net, 1.0)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * net.weight.detach()
        torch.testing.assert_close(ema.average["weight"], expected)
    assert ema.updates == 19


def test_decay_zero_is_a_copy() -> None:
    net = network()
    ema = EMA(net, 0.0)
    shift(net, 1.0)
    ema.update()
    assert torch.equal(ema.average["weight"], net.weight)


def test_steady_weights_are_their_own_average() -> None:
    net = network()
    ema = EMA(net, 0.99)
    for _ in range(50):
        ema.update()
    assert torch.equal(ema.average["weight"], net.weight)


def test_low_precision_weights_are_averaged_in_float32() -> None:
    """In bfloat16 a step of 1e-3 of the difference would be lost."""
    net = network(torch.bfloat16)
    ema = EMA(net, 0.999)
    ema.updates = 100_000
    start = ema.average["weight"].clone()
    shift(net, 1.0)
    ema.update()
    assert ema.average["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.average["weight"], start + 1e-3 * (net.weight.float() - start))


def test_within_applied_the_network_holds_the_average_and_then_its_own_again() -> None:
    net = network()
    ema = EMA(net, 0.9)
    shift(net, 1.0)
    ema.update()
    own = net.weight.detach().clone()
    with ema.applied():
        assert torch.equal(net.weight, ema.average["weight"])
        assert not torch.equal(net.weight, own)
    assert torch.equal(net.weight, own)


def test_an_exception_within_applied_puts_the_weights_back() -> None:
    net = network()
    ema = EMA(net, 0.9)
    shift(net, 1.0)
    own = net.weight.detach().clone()
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert torch.equal(net.weight, own)


def test_only_what_learns_is_followed() -> None:
    net = network()
    net.bias.requires_grad_(False)
    ema = EMA(net, 0.9)
    assert set(ema.average) == {"weight"}
    shift(net, 1.0)
    bias = net.bias.clone()
    with ema.applied():
        assert torch.equal(net.bias, bias)


def test_a_network_that_does_not_learn_has_no_average() -> None:
    """Made after the engine froze everything, it would average nothing without a word."""
    with pytest.raises(ValueError, match="no parameter"):
        EMA(network().requires_grad_(False), 0.9)


def test_the_average_is_no_part_of_the_graph() -> None:
    net = network()
    ema = EMA(net, 0.9)
    ema.update()
    with ema.applied():
        pass
    assert not any(v.requires_grad for v in ema.average.values())
    assert net.weight.requires_grad
    assert net.weight.is_leaf
