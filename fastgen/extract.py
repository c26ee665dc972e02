"""``fastgen extract-lora``: the difference of two checkpoints as a LoRA file, by the best approximation of its rank.

By Eckart and Young (Psychometrika 1936), the first r terms of a matrix's singular value decomposition are nearest to
it, in the Frobenius norm, of all matrices of rank r; what they keep of its square is the share of their squared
singular values. A convolution's kernel is the matrix of all inputs it reads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config, export, lora, parallel, publish, registry
from . import recipe as recipes
from .card import Facts, model_card
from .family import Family
from .plain import from_json
from .recipe import DTYPES
from .train import USE, family_of

log = logging.getLogger("fastgen")

PROMPTS = ["a red apple", "a dog left of a cat"]
"""On which the LoRA file is tried."""


@dataclass(frozen=True)
class Options:
    """What is wanted of a LoRA file.

    Attributes:
        rank: of each layer's part.
        leave_out: whether to go on without the differences that no LoRA file holds.
        dtype: of the file, as ``recipe.DTYPES`` names it.
        licence: of the base, where its own card says none; empty: unknown.
        repo: the Hub id that the card's call names; empty: the folder.
    """

    rank: int = 64
    leave_out: bool = False
    dtype: str = "fp32"
    licence: str = ""
    repo: str = ""


@dataclass(frozen=True)
class Kept:
    """The squared Frobenius norm of differences, and how much of it a LoRA file keeps."""

    layers: Mapping[str, tuple[float, float]]
    """Layer -> what is kept of it, and all of it."""
    left_out: Mapping[str, tuple[int, float]]
    """Tensor that no LoRA file holds -> its number of values, and the square of its difference."""

    @property
    def share(self) -> float:
        """Of what layers could hold."""
        return _share(self.layers.values())


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raise ValueError if the folder holds no such files, or damaged ones."""
        from safetensors import SafetensorError, safe_open

        files = sorted(folder.glob("*.safetensors"))
        own = [f for f in files if not any(f".{variant}" in f.name for variant in export.VARIANTS)] or files
        if not own:
            raise ValueError(f"{folder}: holds no weights in safetensors; save it again by save_pretrained")
        self.folder, self._files = folder, dict[str, Path]()
        for file in own:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file}: damaged weights ({error}); save or download them again") from None

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """(A, B, kept, whole): B A is the nearest to a layer's difference [out, in, ...] of this rank.

    A: [rank, in, ...], B: [out, rank, 1...], as PEFT's layers have them, the singular values shared evenly; beyond the
    smaller side of the matrix they are zero. kept, whole: squared norms of B A and of the difference.
    """
    u, s, v = torch.linalg.svd(difference.float().flatten(1), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    a, b = v.new_zeros(rank, v.shape[1]), u.new_zeros(len(u), rank)
    a[:r], b[:, :r] = root[:, None] * v[:r], u[:, :r] * root
    squares = s.double().square()
    ones = (1,) * (difference.ndim - 2)
    return (
        a.reshape(rank, *difference.shape[1:]),
        b.reshape(len(u), rank, *ones),
        float(squares[:r].sum()),
        float(squares.sum()),
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A in the shape of its layer's weight: [out, in, ...]."""
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def compare(
    base: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    layers: Sequence[str],
    rank: int,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], Kept]:
    """The LoRA tensors of two checkpoints' difference, by "<layer>.lora_A.weight" and so on, and what they keep.

    layers: those that can have an adapter; of one that does not differ there are none. One matrix is held at a time.
    Raises ValueError if the checkpoints are not of one network, or do not differ, or are not finite.
    """
    lacking = sorted(base.keys() - student.keys())
    if lacking:
        raise ValueError(f"the student lacks {lacking[0]!r}; it is of another network than the base")
    found: dict[str, Tensor] = {}
    held: dict[str, tuple[float, float]] = {}
    left_out: dict[str, tuple[int, float]] = {}
    for name in [*base, *sorted(student.keys() - base.keys())]:
        ours = student[name]
        theirs = base[name] if name in base else torch.zeros_like(ours)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name!r} is {tuple(theirs.shape)} in the base and {tuple(ours.shape)} in the student; they are of "
                "different networks"
            )
        difference = ours.to(device).float() - theirs.to(device).float()
        if not difference.isfinite().all():
            raise ValueError(f"{name!r} is not finite in the base or the student; train it again")
        layer = name.removesuffix(".weight")
        if not difference.any():
            continue
        if name.endswith(".weight") and layer in layers:
            a, b, kept, whole = factors(difference, rank)
            found |= {f"{layer}.lora_A.weight": a.cpu(), f"{layer}.lora_B.weight": b.cpu()}
            held[layer] = (kept, whole)
        else:
            left_out[name] = (difference.numel(), float(difference.double().square().sum()))
    if not held:
        raise ValueError("the layers of base and student do not differ; there is nothing to make a LoRA file of")
    return found, Kept(held, left_out)


def extract(base: str, student: str, folder: Path, options: Options) -> Kept:
    """Write the LoRA file that makes ``student`` of ``base``, with scheduler and card, and say what it keeps.

    base: a pipeline folder, with which the file is tried: stock ``load_lora_weights`` must take it whole and then give
    what the same sums in the weights give. student: a pipeline folder of its family, or one of its component alone.
    Raises ValueError, or ExportError if the gate does not pass.
    """
    device, place = parallel.device(), recipes.locate(base)
    publish.base_of(base, options.licence)  # a licence that does not fit is told before the work
    module = family_of(place)
    export.check_pipeline(place, *module.ABOUT.pipelines)
    with export.opening(place):
        family: Family = module.load(place, device)
    if not family.component:
        raise ValueError(f"{base}: its pipeline takes no LoRA files")
    if family.experts:
        raise ValueError(f"{base}: is of several experts, of which no difference is taken; name a base of one network")
    theirs = network_folder(Path(place), family.component)
    ours = network_folder(Path(recipes.locate(student)), family.component)
    kinds = [from_json((part / "config.json").read_text(encoding="utf-8"))["_class_name"] for part in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{student}: its network is a {kinds[1]}, that of {base} a {kinds[0]}; name two of one family"
        )
    weights = Weights(theirs)
    tensors, kept = compare(weights, Weights(ours), lora.layers_of(family.denoiser.network), options.rank, device)
    if kept.left_out and not options.leave_out:
        raise ValueError(
            f"{student}: no LoRA file holds all of its difference from {base}: {unheld(kept)}; add --leave-out to go "
            "on without"
        )
    if kept.left_out:
        log.info("left out: %s", unheld(kept))
    made = together(place, Path(recipes.locate(student)), ours, family.component)
    summed(getattr(made, family.component), weights, tensors)
    settings = settings_of(base, Path(recipes.locate(student)), family, options, kept)

    def finish(partial: Path, made: Any, opened: export.Opened) -> None:
        facts = facts_of(base, student, settings, made, family, folder, options)
        (partial / publish.README).write_text(model_card(facts), encoding="utf-8")

    named = {f"{family.component}.{name}": value for name, value in tensors.items()}
    made = made.to(device)
    difference = export.export_adapter(
        family,
        lambda **_: made,
        [named],
        place,
        folder,
        num_steps=settings.get("num_inference_steps"),
        prompts=PROMPTS,
        card=settings,
        dtype=DTYPES[options.dtype],
        finish=finish,
    )
    log.info("extracted %s; on its base it differs from the same sums in the weights by %.1e", folder, difference)
    return kept


def network_folder(folder: Path, component: str) -> Path:
    """Where a pipeline's network lies, or a component's. Raises ValueError if there is none."""
    for found in (folder / component, folder):
        if (found / "config.json").is_file():
            return found
    raise ValueError(f"{folder}: has no {component}; name the folder of a pipeline, or of its {component} alone")


def together(base: str, student: Path, network: Path, component: str) -> Any:
    """The student's pipeline: its folder's own, or its component and scheduler in the base's."""
    if (student / "model_index.json").is_file():
        with export.opening(student):
            return export.from_pretrained(student, dtype=torch.float32)
    import diffusers

    with export.opening(student):
        kind = from_json((network / "config.json").read_text(encoding="utf-8"))["_class_name"]
        parts = {component: getattr(diffusers, kind).from_pretrained(network, dtype=torch.float32)}
        if (student / "scheduler").is_dir():
            tree = from_json((student / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
            parts["scheduler"] = getattr(diffusers, tree["_class_name"]).from_pretrained(student / "scheduler")
        return export.from_pretrained(base, dtype=torch.float32, **parts)


@torch.no_grad()
def summed(network: torch.nn.Module, base: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Give the network the base's weights with the LoRA file's sums in them; what the base has not is zero."""
    for name, value in network.state_dict().items():
        layer = name.removesuffix(".weight")
        value.copy_(base[name]) if name in base else value.zero_()
        if f"{layer}.lora_A.weight" in tensors and name != layer:
            value += product(tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]).to(value.device)


def settings_of(base: str, student: Path, family: Family, options: Options, kept: Kept) -> dict[str, Any]:
    """What ``fastgen.json`` says: the student's own, and how much of it is there."""
    own = export.read_card(student)
    taken: dict[str, Any] = {name: own[name] for name in ("method", "times", *export.DEFAULTS) if name in own}
    return {
        **taken,
        "base_model": base,
        "guidance_scale": 1.0 if family.unguided is None else family.unguided,
        "lora": {
            "rank": options.rank,
            "scale": 1.0,
            "energy": kept.share,
            "layers": {name: _share([pair]) for name, pair in kept.layers.items()},
            "left_out": sorted(kept.left_out),
        },
        "use": USE.format(1.0 if family.unguided is None else family.unguided),
    }


def facts_of(
    base: str, student: str, settings: Mapping[str, Any], made: Any, family: Family, folder: Path, options: Options
) -> Facts:
    """What the model card is written from."""
    wanted = publish.Wanted("lora", licence=options.licence, repo=options.repo)
    bases = [publish.base_of(base, options.licence)]
    own = publish.base_of(student)
    bases += [own] if own.licence.id != "unknown" else []
    name = settings.get("method", "")
    about = vars(registry.find("method", name)).get("ABOUT") if name in registry.names("method") else None
    call = publish.call_of(
        made,
        settings,
        PROMPTS[0],
        options.repo or f"path/to/{folder.name}",
        base=publish.place_of(bases[0]),
        weights=export.adapter_files(family, 1),
        global_noise=family.step_noise == "global",
        dtype=str(DTYPES[options.dtype]).removeprefix("torch."),
    )
    return Facts(
        name=publish.name_of(folder, replace(wanted, form="lora")),
        form="lora",
        settings=settings,
        call=call,
        bases=bases,
        method=(name, about.paper, about.arxiv) if about else (name, "", ""),
        config=config.encode({"base": base, "student": student, "rank": options.rank, "leave_out": options.leave_out}),
        versions=publish.versions(),
    )


def unheld(kept: Kept) -> str:
    """What no LoRA file holds, by kind, with its size and its share of the whole squared difference."""
    whole = sum(whole for _, whole in kept.layers.values()) + sum(square for _, square in kept.left_out.values())
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, size in kept.left_out.items():
        owner, _, last = name.rpartition(".")
        kind = "biases" if last == "bias" else "weights of norms" if "norm" in owner.rpartition(".")[2] else name
        kinds.setdefault(kind, []).append(size)
    told = [
        f"{kind} ({_tensors(sizes) * (kind not in kept.left_out)}{sum(n for n, _ in sizes)} values, "
        f"{sum(square for _, square in sizes) / whole:.2%} of the squared difference)"
        for kind, sizes in kinds.items()
    ]
    return ", ".join(told)


def _tensors(found: Sequence[Any]) -> str:
    return f"{len(found)} tensor{'s' * (len(found) > 1)}, "


def table(kept: Kept) -> list[tuple[str, str, str]]:
    """Rows of module, its number of layers, and the share of its squared norm that is kept; the last is of all."""
    blocks: dict[str, list[tuple[float, float]]] = {}
    for name, pair in kept.layers.items():
        parts = name.split(".")
        blocks.setdefault(".".join(parts[: 2 if parts[1:] and parts[1].isdecimal() else 1]), []).append(pair)
    rows = [*blocks.items(), ("all", list(kept.layers.values()))]
    return [(name, str(len(pairs)), f"{_share(pairs):.2%}") for name, pairs in rows]


def _share(pairs: Any) -> float:
    pairs = list(pairs)
    return math.fsum(kept for kept, _ in pairs) / math.fsum(whole for _, whole in pairs)
