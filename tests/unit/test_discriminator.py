"""Features by hooks, and heads on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.discriminator import Heads, features
from tests.oracle import Conv, call, labels, sd_schedule


def denoiser(network: nn.Module | None = None) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(network or Conv(), sd_schedule(), "v", call)


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x_t = torch.randn(3, 2, 8, 8, generator=torch.manual_seed(1))
    return x_t, torch.tensor([10.0, 500.0, 900.0]), dict(labels(["left", "right", ""]))


def hooked(network: nn.Module, name: str) -> list[Tensor]:
    seen: list[Tensor] = []
    network.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    return seen


def test_features_equal_the_outputs_of_a_whole_forward_pass() -> None:
    teacher = denoiser()
    maps = features(teacher, ["down", "mid"], *inputs())
    down, mid = hooked(teacher.network, "down"), hooked(teacher.network, "mid")
    teacher(*inputs())
    assert torch.equal(maps[0], down[0])
    assert torch.equal(maps[1], mid[0])


def test_features_come_in_the_order_asked_for() -> None:
    teacher = denoiser()
    down, mid = features(teacher, ["down", "mid"], *inputs())
    swapped = features(teacher, ["mid", "down", "mid"], *inputs())
    assert torch.equal(swapped[0], mid)
    assert torch.equal(swapped[1], down)
    assert torch.equal(swapped[2], mid)


def test_the_pass_ends_at_the_last_block_asked_for() -> None:
    teacher = denoiser()
    mid, leave = hooked(teacher.network, "mid"), hooked(teacher.network, "leave")
    features(teacher, ["down"], *inputs())
    assert not mid
    assert not leave
    features(teacher, ["mid"], *inputs())
    assert mid
    assert not leave


def test_no_hook_stays_behind_even_after_an_error() -> None:
    teacher = denoiser()
    features(teacher, ["down"], *inputs())
    with pytest.raises(ValueError, match="no block"):
        features(teacher, ["down", "nope"], *inputs())
    with pytest.raises(RuntimeError):
        features(teacher, ["mid"], inputs()[0][:, :1], *inputs()[1:])
    assert not any(module._forward_hooks for module in teacher.network.modules())


def test_gradients_reach_the_input_and_the_blocks_weights() -> None:
    teacher = denoiser()
    x_t, t, cond = inputs()
    x_t.requires_grad_(True)
    features(teacher, ["down"], x_t, t, cond)[0].sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().sum() > 0
    assert teacher.network.get_parameter("down.0.weight").grad is not None
    assert teacher.network.get_parameter("leave.weight").grad is None


def test_an_unknown_block_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no block 'middle' in Conv; its children are: enter, label, time, down, mid"):
        features(denoiser(), ["middle"], *inputs())


class Odd(nn.Module):
    """Blocks that give a tuple and a dictionary."""

    class Tuple(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            return x + 1, [x]

    class Dict(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    def __init__(self) -> None:
        super().__init__()
        self.tuple, self.dict = Odd.Tuple(), Odd.Dict()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.dict(self.tuple(x_t)[0])["x"]


def test_the_first_of_a_tuple_is_taken_and_anything_else_refused() -> None:
    x_t, t, cond = inputs()
    assert torch.equal(features(denoiser(Odd()), ["tuple"], x_t, t, cond)[0], x_t + 1)
    with pytest.raises(ValueError, match="block 'dict' gives dict, not a tensor; choose another block"):
        features(denoiser(Odd()), ["dict"], x_t, t, cond)


def test_features_under_autocast_are_float32() -> None:
    teacher = Denoiser(Conv(), sd_schedule(), "v", call, torch.bfloat16)
    assert features(teacher, ["down"], *inputs())[0].dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 16, 17])
@pytest.mark.parametrize("channels", [3, 16, 96])
def test_a_head_gives_one_logit_a_sample_whatever_the_map(channels: int, size: int) -> None:
    heads = Heads([channels], [size])
    assert heads([torch.randn(2, channels, size, size)]).shape == (2, 1)


def test_several_maps_give_as_many_logits() -> None:
    heads = Heads([16, 32], [8, 4])
    assert heads([torch.randn(5, 16, 8, 8), torch.randn(5, 32, 4, 4)]).shape == (5, 2)


@pytest.mark.parametrize("channels", [8, 16, 32, 96, 192, 320])
@pytest.mark.parametrize("size", [4, 8])
def test_a_head_sees_its_input(channels: int, size: int) -> None:
    """A norm over a single number is constant: the logit would not depend on the map at all."""
    torch.manual_seed(0)
    heads = Heads([channels], [size])
    x = torch.randn(4, channels, size, size, requires_grad=True)
    logits = heads([x])
    assert logits.std() > 1e-3
    logits.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten(1).norm(dim=1).min() > 1e-4
    torch.testing.assert_close(heads([x[:1]]), logits[:1], rtol=1e-4, atol=1e-5)  # a batch of one works, and the same


def test_maps_and_heads_must_match_in_number() -> None:
    with pytest.raises(ValueError, match="zip\\(\\) argument"):
        Heads([16], [8])([torch.randn(1, 16, 8, 8)] * 2)
