"""Attention kernels: every choice computes the same, and what does not work here is said in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints
from unittest import mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from fastgen import attention
from fastgen.attention import set_attention
from fastgen.recipe import Model
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def unet() -> nn.Module:
    torch.manual_seed(0)
    return tiny.unet().eval()


def output(network: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x_t, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 16, 16, generator=g)
    with torch.no_grad():
        return network(x_t, torch.tensor([5.0, 900.0]), encoder_hidden_states=text, return_dict=False)[0]


def kinds(network: nn.Module) -> set[type]:
    return {type(p) for p in network.attn_processors.values()}  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("choice", ["auto", "eager", "sdpa"])
def test_every_choice_computes_the_same(choice: str) -> None:
    """Outputs and gradients."""
    reference, network = unet(), unet()
    used = set_attention([network], choice, CPU)
    assert used == {"auto": "eager"}.get(choice, choice)
    assert (output(network) - output(reference)).abs().max() < 1e-5
    grads = []
    for one in (reference, network):
        text = torch.ones(1, 16, 16, requires_grad=True)
        out = one(torch.ones(1, 4, 8, 8), torch.tensor([500.0]), encoder_hidden_states=text, return_dict=False)[0]
        grads.append(torch.autograd.grad(out.square().sum(), text)[0])
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[0].abs().max().clamp(min=1)


@pytest.mark.parametrize(("choice", "kind"), [("eager", AttnProcessor), ("sdpa", AttnProcessor2_0)])
def test_a_choice_holds_whatever_was_chosen_before(choice: str, kind: type) -> None:
    networks = [unet(), unet()]
    for before in ("eager", "sdpa", "auto"):
        set_attention(networks, before, CPU)
        assert set_attention(networks, choice, CPU) == choice
        assert [kinds(network) for network in networks] == [{kind}, {kind}]


def flux() -> nn.Module:
    """A network whose attention goes through Diffusers' dispatcher."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def called(network: nn.Module) -> Tensor:
    """The output, with its graph."""
    g = torch.Generator().manual_seed(1)
    if not isinstance(network, FluxTransformer2DModel):
        x_t, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 16, 16, generator=g)
        return network(x_t, torch.tensor([5.0, 900.0]), encoder_hidden_states=text, return_dict=False)[0]
    return network(
        hidden_states=torch.randn(1, 4, 4, generator=g),
        encoder_hidden_states=torch.randn(1, 3, 8, generator=g),
        pooled_projections=torch.randn(1, 8, generator=g),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]


def test_a_network_that_goes_through_the_dispatcher_is_switched_there() -> None:
    def result(network: nn.Module) -> Tensor:
        return called(network).detach()

    expected = result(flux())
    for choice, backend in (("auto", "_native_math"), ("eager", "_native_math"), ("sdpa", "native")):
        network = flux()
        assert set_attention([network], choice, CPU) == {"auto": "eager"}.get(choice, choice)
        backends = {p._attention_backend.value for p in network.attn_processors.values()}  # type: ignore[operator, union-attr]
        assert backends == {backend}
        assert (result(network) - expected).abs().max() < 1e-5


WORKS = [name for name, reason in attention.available(CPU).items() if not reason]


@pytest.mark.parametrize("choice", WORKS)
@pytest.mark.parametrize("make", [unet, flux])
def test_what_works_here_computes_what_matrix_products_do(choice: str, make: Callable[[], nn.Module]) -> None:
    """Outputs and gradients to 1e-5 of the largest."""
    found = []
    for name in ("eager", choice):
        network = make()
        try:
            set_attention([network], name, CPU)
        except ValueError as error:
            pytest.skip(str(error))
        y = called(network)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for plain, mine in zip(*found, strict=True):
        assert (plain - mine).abs().max() <= 1e-5 * plain.abs().max().clamp(min=1)


def test_available_says_of_each_kernel_why_it_does_not_work() -> None:
    found = attention.available(CPU)
    assert list(found) == list(attention.NAMES)
    assert {"eager", "sdpa"} <= set(WORKS)
    assert {name: found[name] for name in ("xformers", "flash", "sage")} == dict.fromkeys(
        ("xformers", "flash", "sage"), "it needs a CUDA device, this is cpu"
    )
    assert not any("\n" in reason for reason in found.values())


def test_a_config_takes_each_kernel() -> None:
    assert get_args(get_type_hints(Model)["attention"]) == ("auto", *attention.NAMES)


def test_a_kernel_without_a_backward_pass_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sage's, whose output would carry no gradient."""

    def forward_only(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).detach()

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", forward_only)
    with pytest.raises(
        ValueError, match=r"^attention 'flex' does not work here \(it has no backward pass\); use auto"
    ):
        set_attention([], "flex", CPU)


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return q + k + v if backend == "flex" else q + k + 2 * v

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", other)
    with pytest.raises(ValueError, match=r"\(it differs from plain matrix products by .*e-01\)"):
        set_attention([], "flex", CPU)


@pytest.mark.parametrize("choice", ["flash", "sage"])
def test_kernels_of_half_precision_are_refused_in_float32(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_probe", lambda *of: None)
    with pytest.raises(
        ValueError, match=rf"'{choice}' does not work here \(it takes no float32; set run.precision bf16"
    ):
        set_attention([flux()], choice, CUDA)


def test_networks_that_are_differentiated_leave_a_kernel_that_cannot() -> None:
    network = flux()
    assert attention.for_derivatives([network], "eager") == "eager"
    for layer in attention._layers(network):
        layer.processor._attention_backend = attention_dispatch.AttentionBackendName("flex")
    assert attention.for_derivatives([network], "flex") == "sdpa"
    assert {p._attention_backend.value for p in network.attn_processors.values()} == {"native"}  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("choice", ["xformers", "flash", "sage"])
def test_a_kernel_that_does_not_work_here_is_one_line(choice: str) -> None:
    network = unet()
    before = kinds(network)
    with pytest.raises(
        ValueError, match=rf"^attention '{choice}' does not work here \(.+\); use auto or sdpa$"
    ) as error:
        set_attention([network], choice, CPU)
    assert "\n" not in str(error.value)
    assert "it needs a CUDA device, this is cpu" in str(error.value)
    assert kinds(network) == before


def test_flash_is_told_to_be_missing_from_the_older_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_probe", lambda *of: None)
    with pytest.raises(
        ValueError, match=r"'flash' does not work here \(UNet2DConditionModel uses Diffusers' older atten"
    ):
        set_attention([unet()], "flash", CUDA, torch.bfloat16)


@pytest.mark.parametrize("error", [ImportError("no xformers"), RuntimeError("no kernel image\nat line 3")])
def test_a_named_kernel_that_fails_is_not_replaced(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_probe", mock.Mock(side_effect=error))
    with pytest.raises(ValueError, match=r"'xformers' does not work here \(no"):
        set_attention([unet()], "xformers", CUDA)


def test_auto_on_a_gpu_takes_pytorch_s_kernels_and_tries_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_probe", mock.Mock(side_effect=AssertionError("tried")))
    network = unet()
    assert set_attention([network], "auto", CUDA) == "sdpa"
    assert kinds(network) == {AttnProcessor2_0}


def test_xformers_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_probe", lambda *of: None)
    network = unet()
    switched = []
    network.enable_xformers_memory_efficient_attention = lambda: switched.append(True)  # type: ignore[assignment]
    assert set_attention([network], "xformers", CUDA) == "xformers"
    assert switched == [True]


XFORMERS = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(2, 128, 2, 64) (torch.float32)
     attn_bias   : <class 'NoneType'>
`fa2F@2.8.3` is not supported because:
    dtype=torch.float32 (supported: {torch.float16})
`cutlassF-pt` is not supported because:
    requires a GPU
"""


def test_of_xformers_reasons_the_first_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_probe", mock.Mock(side_effect=NotImplementedError(XFORMERS)))
    with pytest.raises(ValueError, match=r"forward` with inputs: dtype=torch.float32 \(supported: .*\); use auto"):
        set_attention([unet()], "xformers", CUDA)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_kernel_is_tried_in_the_numbers_that_it_is_to_compute_in(
    autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_only(name: str, device: torch.device, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            raise NotImplementedError("No operator found")

    monkeypatch.setattr(attention, "_probe", half_only)
    network = unet()
    network.enable_xformers_memory_efficient_attention = lambda: None  # type: ignore[assignment]
    if autocast:
        assert set_attention([network], "xformers", CUDA, autocast) == "xformers"
    else:
        with pytest.raises(ValueError, match="No operator found"):
            set_attention([network], "xformers", CUDA, autocast)


@pytest.mark.parametrize(("device", "left_out"), [(CUDA, [False]), (CPU, [])])
def test_cudnn_s_kernel_is_left_out(
    device: torch.device, left_out: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", said.append)
    set_attention([unet()], "sdpa", device)
    assert said == left_out


def test_a_kernel_whose_gradient_goes_by_the_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's: it reads the output's gradient as if it lay in memory as the output does."""
    real = attention_dispatch.dispatch_attention_fn

    class Misread(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, to: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.as_strided(to, to.shape, torch.empty(to.shape).stride(), to.storage_offset())

    def wrong(*args: Any, backend: Any) -> Any:
        y = real(*args, backend=backend)
        return y if backend.value == "_native_math" else Misread.apply(y)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", wrong)
    with pytest.raises(ValueError, match="it differs from plain matrix products by"):
        attention._probe("sdpa", CPU, torch.float32)
    monkeypatch.undo()
    attention._probe("sdpa", CPU, torch.float32)


def test_a_kernel_whose_package_is_too_old_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers has None in the place of its functions."""
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLEX_ATTN", False)
    with pytest.raises(ValueError, match=r"'flex' does not work here .*install `torch>="):
        set_attention([], "flex", CPU)


def test_no_network_needs_no_kernel() -> None:
    """A method of this project whose networks are not Diffusers'."""
    assert set_attention([], "auto", CPU) == "eager"
    assert set_attention([], "sdpa", CPU) == "sdpa"
