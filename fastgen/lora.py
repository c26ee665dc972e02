"""Low-rank adapters on a frozen network, over PEFT; and one network in several roles, told apart by their adapters.

A ``View`` is a role of such a network: its parameters are those of the role's own adapter, and a call switches that
adapter on and every other off. So a method, the engine, averages and checkpoints treat it as the network of its role,
and a deep copy of a view is a further role on the same weights, with an adapter of its own.

Adapters start as no change: B = 0 (Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import option, suggest
from .experts import each, members
from .family import Family


@dataclass(frozen=True)
class Lora:
    """Adapters of one role."""

    rank: int = option(64, "columns of A and B", low=1)  # as LCM-LoRA (2311.05556) and DMD2's SDXL LoRA
    alpha: float | None = option(None, "B A is scaled by alpha / rank; null: by 1", above=0)
    targets: list[str] = option(
        [], "layers that get an adapter, by name or end of name (to_q); empty: all linear and convolution layers"
    )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def layers_of(network: nn.Module) -> list[str]:
    """The layers an adapter may go to: linear and convolution layers that learn now, or all of them if none does."""
    frozen = not any(p.requires_grad for p in network.parameters())
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)
        and getattr(layer, "groups", 1) == 1
        and (frozen or layer.weight.requires_grad)
    ]


class Backbone:
    """A frozen network and the adapters on it, of which one at most is on."""

    def __init__(self, network: nn.Module, candidates: Sequence[str]) -> None:
        """Freeze the network. candidates: the layers an adapter may go to."""
        self.network, self.candidates = network.requires_grad_(False).eval(), list(candidates)
        self.layers: list[Any] = []
        self.count = 0
        self.active: str | None = None

    def chosen(self, targets: Sequence[str]) -> list[str]:
        """The layers that ``targets`` mean. Raises ValueError if one of them means none."""
        if not self.candidates:
            kind = type(self.network).__name__
            raise ValueError(f"lora: {kind} has no linear or convolution layer; train it without adapters")
        for target in targets:
            if not any(_ends(name, target) for name in self.candidates):
                ends = {end for name in self.candidates if not (end := name.rpartition(".")[2]).isdigit()}
                raise ValueError(f"lora.targets: no linear or convolution layer {target!r}{suggest(target, [*ends])}")
        return [name for name in self.candidates if not targets or any(_ends(name, t) for t in targets)]

    def add(self, lora: Lora, layers: Sequence[str]) -> str:
        """A new adapter in these layers, which learns; its name."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        name = f"adapter{self.count}"
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # any number will do
            target_modules="|".join(re.escape(layer) for layer in layers),
        )
        learning = {id(p) for p in self.network.parameters() if p.requires_grad}
        inject_adapter_in_model(config, self.network, name)
        del self.network.peft_config  # else the next adapter comes with a warning that there is one already
        for full, p in self.network.named_parameters():
            p.requires_grad_(id(p) in learning or f".{name}." in full)
        self.layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        for tuner in self.layers:
            tuner.cast_input_dtype_enabled = False  # autocast casts; PEFT's detour by float32 is one copy more a layer
        self.count += 1
        self._set(None)
        return name

    def activate(self, adapter: str | None) -> None:
        """Switch this adapter on and all others off."""
        if adapter != self.active:
            self._set(adapter)

    def _set(self, adapter: str | None) -> None:
        # not PEFT's set_adapter, which also decides what learns: that is the engine's, and fails inside torch.func
        for layer in self.layers:
            layer._active_adapter = [] if adapter is None else [adapter]
        self.active = adapter

    def checkpointed(self, module: nn.Module, *args: Any) -> Any:
        """Gradient checkpointing, recomputed with the adapter of the first pass: by then another may be on."""
        adapter = self.active

        def run(*args: Any) -> Any:
            self.activate(adapter)
            return module(*args)

        return checkpoint(run, *args, use_reentrant=False)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


class View(nn.Module):
    """A network in one role: with one adapter, whose parameters are the view's, or with none and its own weights."""

    def __init__(self, backbone: Backbone, lora: Lora, layers: Sequence[str], adapter: str | None = None) -> None:
        """lora, layers: what its adapter is, or that of its copies, and where."""
        super().__init__()
        # placed: networks have a child called layers
        self.backbone, self.lora, self.placed, self.adapter = backbone, lora, list(layers), adapter
        for name, p in backbone.network.named_parameters():
            layer, _, rest = name.partition(".lora_")  # rest: "A.<adapter>.weight"; empty for the network's own
            if not rest and adapter is None:
                _place(self, layer.replace(".base_layer.", "."), p)
            elif rest and adapter == rest.split(".")[1]:
                _place(self, f"{layer}.lora_{rest[0]}.weight", p)

    @property
    def config(self) -> Any:
        """The network's own."""
        network: Any = self.backbone.network
        return network.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own call, with this role's adapter."""
        self.backbone.activate(self.adapter)
        return self.backbone.network(*args, **kwargs)

    def with_adapter(self) -> View:
        """A further role on the same weights, with a new adapter."""
        return View(self.backbone, self.lora, self.placed, self.backbone.add(self.lora, self.placed))

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        made = self.with_adapter()
        if self.adapter is not None:
            made.load_state_dict(self.state_dict())
        memo[id(self)] = made
        return made

    def enable_gradient_checkpointing(self) -> None:
        """Of the one network, so for all of its roles."""
        network: Any = self.backbone.network
        network.enable_gradient_checkpointing(self.backbone.checkpointed)


def _place(root: nn.Module, path: str, p: nn.Parameter) -> None:
    """Register ``p`` under a dotted name, in empty modules made on the way."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, p)


def plain(network: nn.Module) -> nn.Module:
    """The module that does the work: a view's network, adapters included; any other network itself."""
    return network.backbone.network if isinstance(network, View) else network


def view(network: nn.Module, lora: Lora) -> nn.Module:
    """The network without adapters, as one that others can share; its weights are not copied. Of experts, each.

    ``network`` itself is left as it is: adapters go to modules of their own on the same tensors. Raises ValueError if
    it has no layer that ``lora`` names.
    """
    return each(lambda one: _view(one, lora), network)


def _view(network: nn.Module, lora: Lora) -> View:
    if isinstance(network, View):
        return View(network.backbone, lora, network.backbone.chosen(lora.targets), network.adapter)
    tensors: dict[int, Any] = {id(t): t for t in chain(network.parameters(), network.buffers())}
    backbone = Backbone(copy.deepcopy(network, tensors), layers_of(network))
    return View(backbone, lora, backbone.chosen(lora.targets))


@dataclass(frozen=True)
class Students:
    """Makes a family's students as adapters on frozen networks, one for those that take the guidance scale.

    Where the teacher is of several experts, each has its own.
    """

    family: Family
    lora: Lora
    bases: dict[bool, nn.Module] = field(default_factory=dict)

    def base(self, embed_guidance: bool) -> nn.Module:
        """The frozen network, a view. Its weights are the teacher's own tensors where a student starts from them."""
        if embed_guidance not in self.bases:
            network = self.family.student(embed_guidance=True) if embed_guidance else self.family.student()
            teachers = iter(members(self.family.denoiser.network))
            views = iter(members(self.base(False)) if embed_guidance else ())
            self.bases[embed_guidance] = each(lambda one: self._base(one, next(teachers), next(views, None)), network)
        return self.bases[embed_guidance]

    def _base(self, network: nn.Module, teacher: nn.Module, without: Any) -> View:
        """without: the view of the same that does not take the guidance scale; None: of this one."""
        backbone = Backbone(network, layers_of(network))
        network.load_state_dict(tied(network, teacher), strict=False, assign=True)
        layers = backbone.chosen(self.lora.targets)
        if without is not None:  # where the scale comes in, an adapter is needed whatever the targets are
            new = [name for name in backbone.candidates if not _same_layer(without.backbone, backbone, name)]
            layers += [name for name in new if name not in layers]
        return View(backbone, self.lora, layers)

    def __call__(self, embed_guidance: bool = False) -> nn.Module:
        """A new student."""
        return each(View.with_adapter, self.base(embed_guidance))  # type: ignore[arg-type]  # all of it is views


def tied(network: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """The teacher's tensors that the network has, too."""
    own, theirs = network.state_dict(), teacher.state_dict()
    return {name: value for name, value in theirs.items() if name in own and torch.equal(own[name], value)}


def _same_layer(one: Backbone, two: Backbone, name: str) -> bool:
    """Whether both networks have this layer, in the same shape."""
    if name not in one.candidates:
        return False
    found: list[Any] = [backbone.network.get_submodule(name) for backbone in (one, two)]
    return bool(found[0].weight.shape == found[1].weight.shape)


def adapted(family: Family, lora: Lora, share_backbone: bool = False) -> Family:
    """The family whose students are adapters; itself if they are already.

    share_backbone: the teacher too is a view of the students' network, so that each copy of it (a fake score, a
    target) is an adapter. Raises ValueError if the student does not start as the teacher then, or has no layer that
    ``lora`` names.
    """
    if isinstance(family.student, Students):
        return family
    students = Students(family, lora)
    base = students.base(False)
    if not share_backbone:
        return replace(family, student=students)
    for one, teacher in zip(members(base), members(family.denoiser.network), strict=True):
        if not _starts_as(one, teacher):
            raise ValueError(
                "student.share_backbone needs a student that starts as the teacher; "
                "leave out student.init or student.share_backbone"
            )
    return replace(family, student=students, denoiser=family.denoiser.with_network(base))


def _starts_as(student: Any, teacher: nn.Module) -> bool:
    """Whether a view without an adapter has all that the teacher has, and its layers are the teacher's."""
    layers = {f"{name}.weight" for name in student.backbone.candidates}
    return (
        teacher.state_dict().keys() <= student.state_dict().keys()
        and layers <= tied(student.backbone.network, teacher).keys()
    )


def fused(network: nn.Module) -> nn.Module:
    """A plain copy of a view's network with the adapter in its weights; any other network itself. Of experts, each."""
    return each(_fused, network)


def _fused(network: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(network, View):
        return network
    made: Any = copy.deepcopy(network.backbone.network)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if network.adapter is not None:
                layer.merge(adapter_names=[network.adapter])
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, layer.get_base_layer())
    return made.requires_grad_(False).eval()  # type: ignore[no-any-return]


def weights(network: View, component: str) -> dict[str, Tensor]:
    """The adapter as Diffusers' ``load_lora_weights`` reads it: "<component>.<layer>.lora_A.weight" and so on.

    component: what the pipeline calls the network, such as "unet". The scale is multiplied into B, so that the file
    needs no alpha.
    """
    found: Mapping[str, Tensor] = network.state_dict()
    return {
        f"{component}.{name}": (value * network.lora.scale if ".lora_B." in name else value).detach().contiguous()
        for name, value in found.items()
    }


def loaded(family: Family, *files: Path, embed_guidance: bool = False) -> nn.Module:
    """A student of this family with the adapter of a LoRA file, which may come from another checkpoint of its base.

    files: one, or of a teacher of several experts one for each. embed_guidance: it takes the guidance scale as an
    input. Raises ValueError if they are not as many, or, listing the keys, if an adapter has keys for which the
    network has no place, or a shape that does not fit.
    """
    if isinstance(family.student, Students):
        family = family.student.family
    network = family.student(embed_guidance=True) if embed_guidance else family.student()
    count = len(members(network))
    if len(files) != count:
        raise ValueError(f"{len(files)} LoRA files for {count} network{'s' * (count > 1)}; name one for each")
    rest = iter(files)
    return each(lambda one: _loaded(one, next(rest), family.component), network)


def _loaded(network: nn.Module, file: Path, component: str) -> View:
    tensors = {name.removeprefix(f"{component}."): value for name, value in load_file(file).items()}
    layers = {name.partition(".lora_")[0] for name in tensors}
    backbone = Backbone(network, layers_of(network))
    lost = sorted(name for name in tensors if name.partition(".lora_")[0] not in backbone.candidates)
    if lost:
        raise ValueError(f"{file}: this network has no place for {lost[:3]}; it is an adapter of another base")
    ranks = {value.shape[0] for name, value in tensors.items() if ".lora_A." in name}
    lora = Lora(rank=max(ranks), targets=sorted(layers))  # the scale is in the file's B
    view = View(backbone, lora, sorted(layers), backbone.add(lora, sorted(layers)))
    own = view.state_dict()
    wrong = sorted(name for name in own.keys() | tensors.keys() if _shape(own, name) != _shape(tensors, name))
    if wrong:
        raise ValueError(f"{file}: {wrong[:3]} do not fit this network; it is an adapter of another base")
    view.load_state_dict(tensors)
    return view


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
