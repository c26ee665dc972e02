"""Which attention kernel the networks use, chosen through Diffusers and tried before it is trusted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("eager", "sdpa", "flex", "xformers", "flash", "sage")
"""What ``model.attention`` takes besides "auto"."""
_BACKENDS = {"eager": "_native_math", "sdpa": "native"}
"""Our name -> that of Diffusers' dispatcher, where they differ."""
_PACKAGES = {"xformers": "xformers.ops", "flash": "flash_attn", "sage": "sageattention"}
_HALF = ("flash", "sage")
"""Those that take no float32."""
TOLERANCE = {torch.float16: 2e-2, torch.float32: 2e-2, torch.bfloat16: 4e-2}
"""Of a kernel on CUDA against plain matrix products, in units of the largest output; float32 may be TF32 there."""


def set_attention(
    networks: list[nn.Module], choice: str, device: torch.device, autocast: torch.dtype | None = None
) -> str:
    """Switch every network to ``choice`` and return the name of what they use now.

    "auto" on CUDA: PyTorch's own scaled_dot_product_attention, which itself picks flash or memory-efficient kernels,
    but not cuDNN's; "flash" and "xformers" take as long (docs/gpu.md). "auto" on a CPU: "eager", two plain matrix
    products, since the backward pass of PyTorch's CPU flash kernel is slow (with 64 tokens and 32 channels a head a
    whole U-Net trained 1.5 times as fast without it). autocast: what the networks compute in; None: float32.
    Raises ValueError if a named kernel does not work here. Not yet run on a GPU: "sage".
    """
    _without_cudnn(device)
    if choice == "auto":
        order = ["sdpa"] if device.type == "cuda" else ["eager", "sdpa"]
    else:
        order = [choice]
    for name in order:
        try:
            if name not in ("eager", "sdpa"):
                _probe(name, device, autocast or (torch.float16 if name in _HALF else torch.float32))
            if name in _HALF and networks and autocast is None:
                raise ValueError("it takes no float32; set run.precision bf16")
            for network in networks:
                _switch(network, name)
        except Exception as error:  # of several libraries
            if choice != "auto":
                raise ValueError(
                    f"attention {choice!r} does not work here ({_line(error)}); use auto or sdpa"
                ) from None
            continue
        return name
    raise ValueError("no attention kernel works here; name one in model.attention")


def available(device: torch.device) -> dict[str, str]:
    """Each kernel's name and why it does not work on this device, in one line; empty if it does.

    On CUDA in half precision, which some take alone, and some have no place in the older networks, the U-Nets:
    ``set_attention`` says so.
    """
    _without_cudnn(device)
    found = {}
    for name in NAMES:
        try:
            _probe(name, device, torch.float16 if device.type == "cuda" else torch.float32)
            found[name] = ""
        except Exception as error:  # of several libraries
            found[name] = _line(error)
    return found


def _line(error: Exception) -> str:
    """The first line, and the first reason where xformers lists those of each of its kernels."""
    text = str(error).strip()
    first, why = text.split("\n")[0].rstrip(".:"), re.search(r"because:\s*\n\s*(.+)", text)
    return f"{first}: {why[1].strip()}" if why else first


def _without_cudnn(device: torch.device) -> None:
    """Keep PyTorch's scaled_dot_product_attention from cuDNN's kernel, which torch prefers on an H100.

    Its gradients are wrong in several cases, by its version: of torch 2.11 with cuDNN 9.19 where they come in another
    layout than the output's, and with 205 tokens in any (docs/gpu.md; others: pytorch issue 196678).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _probe(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Run the kernel on small inputs, forward and backward, beside matrix products. Raises on failure.

    What works in half precision may have no kernel for float32, as xformers on the newest GPUs. What has no backward
    pass, as sage, would let a network learn without what passes through its attention. A kernel may be right only
    where the tokens fill its tiles, or where the gradient lies in memory as the output does.
    """
    if name in _PACKAGES:
        if device.type != "cuda":
            raise ValueError(f"it needs a CUDA device, this is {device.type}")
        importlib.import_module(_PACKAGES[name])
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    # which knows of packages that are too old; what it has in the place of their kernels is None
    attention_dispatch._check_attention_backend_requirements(AttentionBackendName(_BACKENDS.get(name, name)))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def of(backend: str, x: Tensor, to: Tensor) -> list[Tensor]:
        given = [one.detach().requires_grad_() for one in x]
        with torch.enable_grad():
            y: Tensor = dispatch_attention_fn(*given, backend=AttentionBackendName(backend))
            if not y.requires_grad:
                raise ValueError("it has no backward pass")
            return [y, *torch.autograd.grad(y, given, to)]

    for tokens in (128, 205):
        x, to = draw(3, 2, tokens, 2, 64), draw(2, tokens, 2, 64)
        for gradient in (to, to.transpose(1, 2).contiguous().transpose(1, 2)):
            pairs = zip(of(_BACKENDS.get(name, name), x, gradient), of("_native_math", x, gradient), strict=True)
            for mine, plain in pairs:
                error = float(((mine - plain).abs().max() / plain.abs().max()).detach())
                if not error < (TOLERANCE[dtype] if device.type == "cuda" else 1e-4):
                    raise ValueError(f"it differs from plain matrix products by {error:.1e}")


def _switch(network: nn.Module, name: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model: Any = network
    if _dispatches(network):
        switch: Callable[[str], None] = model.set_attention_backend
        switch(_BACKENDS.get(name, name))
    elif not _plain(network):
        if name != "sdpa":  # which is what they all do
            raise ValueError(f"{type(network).__name__} has attention of its own, without {name!r}")
    elif name in ("eager", "sdpa"):
        for layer in _layers(network):
            layer.set_processor(AttnProcessor() if name == "eager" else AttnProcessor2_0())
    elif name == "xformers":
        model.enable_xformers_memory_efficient_attention()
    else:
        raise ValueError(f"{type(network).__name__} uses Diffusers' older attention, which has no {name!r}")


def for_derivatives(networks: list[nn.Module], used: str) -> str:
    """Let networks that are differentiated in forward mode use what can be, and say what that is.

    ``derivative.along`` takes the math kernel of PyTorch's attention for such a call alone; others have none.
    """
    if used in ("eager", "sdpa"):
        return used
    for network in networks:
        _switch(network, "sdpa")
    return "sdpa"


def _plain(network: nn.Module) -> bool:
    """Whether its attention is the U-Nets' own, in place of which Diffusers has other kernels."""
    from diffusers.models import attention_processor as known

    kinds = (known.AttnProcessor, known.AttnProcessor2_0, known.XFormersAttnProcessor)
    return all(isinstance(layer.processor, kinds) for layer in _layers(network))


def _dispatches(network: nn.Module) -> bool:
    """Whether its attention processors go through Diffusers' dispatcher, which the U-Nets' do not."""
    layers = _layers(network)
    return bool(layers) and all(hasattr(layer.processor, "_attention_backend") for layer in layers)


def _layers(network: nn.Module) -> list[Any]:
    """Its attention layers; ``attn_processors`` is not there for DiT's and unconditional ones."""
    return [layer for layer in network.modules() if hasattr(layer, "set_processor")]
