"""Frozen networks in half precision: what they compute in already, held in it.

Under autocast a linear or convolution layer computes with its weights cast to half precision, at each call anew. Of a
network that nobody changes they can be held so: half the memory, no casts, and the same numbers bit for bit. Only
these weights are; biases, norms, embeddings and everything that learns stay in float32, so that autocast sees
everywhere else what it saw before.

This is of networks alone. Autoencoders and text encoders do not run under autocast, and some autoencoders, as
SDXL's, overflow in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .lora import plain

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Those that autocast casts the weights of."""


def lower(networks: Iterable[nn.Module], kept: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """Hold the weights of layers in ``dtype``, but those that ``kept`` have as parameters; the bytes that this saves.

    networks: of several views of one network each may be given, or any. Tensors that were shared still are.
    """
    networks = list(networks)
    learning = {_place(p) for network in kept for p in network.parameters()}
    made: dict[tuple[int, ...], Tensor] = {}
    placed: dict[int, nn.Parameter] = {}
    for network in networks:
        for name, layer in plain(network).named_modules():
            if isinstance(layer, LAYERS) and ".lora_" not in name and layer.weight.dtype == torch.float32:
                place = _place(layer.weight)
                if place not in learning:
                    if place not in made:
                        made[place] = layer.weight.detach().to(dtype)
                    placed[id(layer.weight)] = nn.Parameter(made[place], requires_grad=False)
    for network in networks:
        for module in (*network.modules(), *plain(network).modules()):
            for name, p in module._parameters.items():
                if p is not None and id(p) in placed:
                    module._parameters[name] = placed[id(p)]
    return sum(t.numel() * (4 - t.element_size()) for t in made.values())


def lowered(network: nn.Module) -> bool:
    """Whether some of its weights are held in half precision."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in plain(network).parameters())


def restore(networks: Sequence[nn.Module], source: Callable[[], Sequence[Mapping[str, Tensor]]]) -> int:
    """Give networks the weights in float32 again that ``lower`` took from them; how many only in the digits they had.

    source: the weights by name that each was made of, asked only if needed. What is not among them, or does not round
    to what the network has, was made anew, as a guidance embedding of zeros.
    """
    if not any(map(lowered, networks)):
        return 0
    rounded = 0
    for network, found in zip(networks, source(), strict=True):
        for name, layer in plain(network).named_modules():
            if isinstance(layer, LAYERS) and layer.weight.dtype != torch.float32:
                held = layer.weight
                exact = found.get(f"{name}.weight".replace(".base_layer.", "."))
                fits = exact is not None and torch.equal(exact.to(held), held)
                value = exact.to(held.device) if exact is not None and fits else held.float()
                rounded += not fits and bool(held.any())
                layer.weight = nn.Parameter(value, requires_grad=False)
    return rounded


def _place(p: Tensor) -> tuple[int, ...]:
    """What two tensors have in common that are the same numbers of the same memory."""
    return (memory_of(p), p.storage_offset(), *p.shape)


def memory_of(p: Tensor) -> int:
    """What all tensors have in common that lie in the same memory, however they see it."""
    address: int = p.untyped_storage()._cdata  # not data_ptr, which is 0 for all tensors without data
    return address
