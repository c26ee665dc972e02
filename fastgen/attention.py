"""Which attention kernel the networks use, chosen through Diffusers and tried before it is trusted."""

from __future__ import annotations

import importlib
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
TOLERANCE = 2e-2
"""Of a kernel in half precision against plain matrix products, in units of the largest output."""


def set_attention(
    networks: list[nn.Module], choice: str, device: torch.device, autocast: torch.dtype | None = None
) -> str:
    """Switch every network to ``choice`` and return the name of what they use now.

    "auto" takes the best that works on this machine. On CUDA: xformers if it is installed, else PyTorch's own
    scaled_dot_product_attention, which itself picks flash or memory-efficient kernels. On a CPU: "eager", two plain
    matrix products, since the backward pass of PyTorch's CPU flash kernel is slow (with 64 tokens and 32 channels a
    head a whole U-Net trained 1.5 times as fast without it). autocast: what the networks compute in; None: float32.
    Raises ValueError if a named kernel does not work here. Not yet run on a GPU: "xformers", "flash", "flex", "sage".
    """
    if choice == "auto":
        order = ["xformers", "sdpa"] if device.type == "cuda" else ["eager", "sdpa"]
    else:
        order = [choice]
    for name in order:
        try:
            if name not in ("eager", "sdpa"):
                _probe(name, device)
            if name in _HALF and networks and autocast is None:
                raise ValueError("it takes no float32; set run.precision bf16")
            for network in networks:
                _switch(network, name)
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            if choice != "auto":
                raise ValueError(
                    f"attention {choice!r} does not work here ({_line(error)}); use auto or sdpa"
                ) from None
            continue
        return name
    raise ValueError("no attention kernel works here; name one in model.attention")


def available(device: torch.device) -> dict[str, str]:
    """Each kernel's name and why it does not work on this device, in one line; empty if it does.

    Some have no place in the older networks, the U-Nets, or take half precision only: ``set_attention`` says so.
    """
    found = {}
    for name in NAMES:
        try:
            _probe(name, device)
            found[name] = ""
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            found[name] = _line(error)
    return found


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _probe(name: str, device: torch.device) -> None:
    """Run the kernel on a small input of this device, forward and backward, beside matrix products. Raises on failure.

    What has no backward pass, as sage, would let a network learn without what passes through its attention.
    """
    if name in _PACKAGES:
        if device.type != "cuda":
            raise ValueError(f"it needs a CUDA device, this is {device.type}")
        importlib.import_module(_PACKAGES[name])
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    half = device.type == "cuda"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 128, 2, 64, generator=generator).to(device, torch.float16 if half else torch.float32)

    def of(backend: str) -> list[Tensor]:
        given = [one.detach().requires_grad_() for one in x]
        with torch.enable_grad():
            y: Tensor = dispatch_attention_fn(*given, backend=AttentionBackendName(backend))
            if not y.requires_grad:
                raise ValueError("it has no backward pass")
            return [y, *torch.autograd.grad(y, given, torch.ones_like(y))]

    for mine, plain in zip(of(_BACKENDS.get(name, name)), of("_native_math"), strict=True):
        error = float(((mine - plain).abs().max() / plain.abs().max()).detach())
        if not error < (TOLERANCE if half else 1e-4):
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
