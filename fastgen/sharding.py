"""Networks split over the processes, by torch's own ``fully_shard`` (FSDP2).

A method has several networks, each called several times in one loss, and an optimizer for each role; the wrappers of
Accelerate and DeepSpeed take one of each. So the launcher says which sharding is wanted, and it is done here, network
by network, frozen ones included: each block of a network by itself, then what is left of it.

    full     each process holds its rows of all weights, gradients, averages and states of optimizers. The weights of
             a block are put together for the time of its forward pass, and again for its backward pass.
    zero2    the same, but what was put together stays so until the phase has had its turn. It takes the memory of
             whole networks meanwhile, and spares the second message.

A network larger than the memory of one process is made without weights for its blocks (``outlined``): each process
then reads its own rows from the files of the pipeline, also those of its copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import parallel
from .discriminator import Heads

Kind = Literal["full", "zero2"]
Wanted = Literal["auto", "none", "full", "zero2"]
"""As a recipe says it; auto: what ``accelerate launch`` was told."""

FILES = "configs/accelerate"


def chosen(wanted: Wanted = "auto") -> Kind | None:
    """How networks are to be split; None: each process holds whole ones, or there is but one.

    Raises ValueError if the launcher was told what a method of several networks cannot do.
    """
    if _told("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "accelerate launch: DeepSpeed takes one network and one optimizer, and a method has several; "
            f"{FILES}/zero2.yaml splits gradients and optimizer states by torch's own FSDP2"
        )
    if _told("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(f"accelerate launch: Megatron-LM trains language models; use {FILES}/fsdp2.yaml")
    launched: Kind | None = None
    if _told("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"accelerate launch: FSDP version {version} takes one network; use {FILES}/fsdp2.yaml")
        if _told("FSDP_OFFLOAD_PARAMS"):
            raise ValueError("accelerate launch: fsdp_offload_params is not known here; set it false")
        launched = "full" if _told("FSDP_RESHARD_AFTER_FORWARD", "true") else "zero2"
    kind = launched if wanted == "auto" else None if wanted == "none" else wanted
    return kind if parallel.together() else None


def _told(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("1", "true", "yes", "y", "on", "t")


def shard(networks: Iterable[nn.Module], kind: Kind, device: torch.device) -> None:
    """Split each network, in place; those of one role or of several. Afterwards all start from the main one's weights.

    Weights that an ``outlined`` network lacks are read now, each process its own rows. Discriminator heads stay whole,
    since their gradient penalty differentiates twice, and are small.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (parallel.size(),))
    for network in {id(n): n for n in networks}.values():
        parallel.broadcast(network)
        if isinstance(network, Heads):
            continue
        for part in [*reversed(blocks(network).values()), network]:  # inner before outer ones
            # what is left of a network stays together until its backward pass: features end at a block within it
            fully_shard(part, mesh=mesh, reshard_after_forward=None if kind == "full" else False)
        for unit in parallel.units(network):
            unit.set_gradient_divide_factor(1.0)  # a loss is divided by the samples of all processes already
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        fill(network, device)


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The parts that are split by themselves, outer before inner ones: those that Diffusers names as such.

    Where it names none, the members of the outermost lists of modules.
    """
    lists = {name: part for name, part in network.named_modules() if isinstance(part, nn.ModuleList)}
    known: Any = network
    named = {*(getattr(known, "_no_split_modules", None) or ()), *(getattr(known, "_repeated_blocks", None) or ())}
    found: dict[str, nn.Module] = {}
    for name, part in network.named_modules():
        parent = name.rpartition(".")[0]
        if parent not in lists or isinstance(part, nn.ModuleList) or next(part.parameters(), None) is None:
            continue
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if type(part).__name__ in named or (not named and not inner):
            found[name] = part
    return found


# Weights that are read when they have been split


@dataclass(frozen=True)
class Stored:
    """The files in which the weights of a network are, by their names."""

    files: Mapping[str, Path]

    def rows(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of a weight."""
        with safe_open(self.files[name], framework="pt") as opened:
            found: Tensor = opened.get_slice(name)[rows]
        return found.to(dtype)


def stored(folder: Path) -> Stored:
    """What the safetensors files of a pipeline's component hold, without those of a variant."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.count(".") == 1:
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    return Stored(found)


def outlined(made: nn.Module, folder: Path, device: torch.device) -> bool:
    """Give a network without weights all but those of its blocks, from the files in ``folder``; whether it could.

    made: with its weights on the meta device and its buffers as they are. It, and copies of it, remember the folder.
    """
    files, inside = stored(folder), [f"{name}." for name in blocks(made)]
    names = [name for name, _ in made.named_parameters()]
    if not inside or set(names) - files.files.keys():
        return False
    for name in names:
        if not name.startswith(tuple(inside)):
            owner, _, last = name.rpartition(".")
            value = files.rows(name, slice(None), torch.float32).to(device)
            setattr(made.get_submodule(owner), last, nn.Parameter(value))
    remember(made, files)
    return True


def remember(network: nn.Module, files: Stored) -> None:
    """Let a network's blocks be read from these files when it has been split."""
    vars(network)["stored"] = files


def is_outlined(network: nn.Module) -> bool:
    """Whether it lacks weights that are to be read."""
    return any(p.is_meta for p in network.parameters())


def copy_outline(made: nn.Module, network: nn.Module) -> list[str]:
    """Let ``made``, without weights, take those of an outlined network; the names of those that this one lacks."""
    own = {name: value.clone() for name, value in network.state_dict().items()}
    missing: list[str] = made.load_state_dict(own, strict=False, assign=True).missing_keys
    remember(made, vars(network)["stored"])
    return missing


def move(network: nn.Module, device: torch.device) -> nn.Module:
    """Bring what a network has to a device, in place."""
    if not is_outlined(network):
        return network.to(device)
    moved: nn.Module = network._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    return moved


@torch.no_grad()
def fill(network: nn.Module, device: torch.device) -> None:
    """Read this process's rows of the weights that a split network lacks. Raises ValueError if it has no files."""
    lacking = {name: p for name, p in network.named_parameters() if p.is_meta}
    if not lacking:
        return
    files: Stored | None = vars(network).get("stored")
    if files is None:
        raise ValueError(f"{type(network).__name__}: has weights without values, and no files to read them from")
    for name, p in lacking.items():
        owner, _, last = name.rpartition(".")
        value = files.rows(name, parallel.rows(p.shape[0]), p.dtype).to(device)
        setattr(network.get_submodule(owner), last, nn.Parameter(parallel.like(value, p), p.requires_grad))
