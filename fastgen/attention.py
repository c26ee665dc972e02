"""Which attention kernel the networks use, chosen through Diffusers and tried before it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_BACKENDS = {"eager": "_native_math", "sdpa": "native"}
"""Our name -> that of Diffusers' dispatcher, where they differ."""


def set_attention(networks: list[nn.Module], choice: str, device: torch.device) -> str:
    """Switch every network to ``choice`` and return the name of what they use now.

    "auto" takes the best that works on this machine. On CUDA: xformers if it is installed, else PyTorch's own
    scaled_dot_product_attention, which itself picks flash or memory-efficient kernels. On a CPU: "eager", two plain
    matrix products, since the backward pass of PyTorch's CPU flash kernel is slow (with 64 tokens and 32 channels a
    head a whole U-Net trained 1.5 times as fast without it). Raises ValueError if a named kernel does not work here.
    Not yet run on a GPU: "xformers" and "flash".
    """
    if choice == "auto":
        order = ["xformers", "sdpa"] if device.type == "cuda" else ["eager", "sdpa"]
    else:
        order = [choice]
    for name in order:
        try:
            if name not in ("eager", "sdpa"):
                _probe(name, device)
            for network in networks:
                _switch(network, name)
        except (ImportError, ModuleNotFoundError, RuntimeError, ValueError, NotImplementedError) as error:
            if choice != "auto":
                reason = str(error).strip().split("\n")[0]
                raise ValueError(f"attention {choice!r} does not work here ({reason}); use auto or sdpa") from None
            continue
        return name
    raise ValueError("no attention kernel works here; name one in model.attention")


def _probe(name: str, device: torch.device) -> None:
    """Run the kernel once on a small input of this device. Raises if it cannot."""
    if device.type != "cuda":
        raise ValueError(f"it needs a CUDA device, this is {device.type}")
    x = torch.zeros(1, 8, 2, 32, device=device, dtype=torch.float16)
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        memory_efficient_attention(x, x, x)
    else:
        from flash_attn import flash_attn_func

        flash_attn_func(x, x, x)


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
