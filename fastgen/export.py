"""Students out, and back in: the gate every exported pipeline passes, and ``load``.

Nothing is written at its final place before the folder has been reloaded by plain Diffusers and has given, on the
same latents and noise, what the trainer's own sampler gives.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import os
import re
import reprlib
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import calls, interrupt
from .checkpoint import atomic_folder
from .family import Family
from .guidance import with_guidance
from .lora import fused
from .plain import from_json
from .rng import seed_of
from .sampling import Sampler, sample_student

if TYPE_CHECKING:
    from torch import nn

CARD = "fastgen.json"
"""Beside model_index.json: what the student is and how it is called."""
DEFAULTS = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")
"""What a card says of a student's own call."""
USE = "DiffusionPipeline.from_pretrained(folder, trust_remote_code=True), or fastgen.load(folder)"
"""What the card says of a pipeline that brings code, a component that Diffusers does not have."""
LORA = "pytorch_lora_weights.safetensors"
"""The name under which Diffusers looks for a LoRA file."""
SETTINGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
"""What the files are called that say how a component of a pipeline is made."""
TOLERANCE = 1e-4
"""Largest difference between pipeline and sampler, as a share of the latents' largest value, in float32."""
HALF_TOLERANCE = 0.1
"""The same where the weights on disk were rounded to half precision."""
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Names of files in half precision beside those in float32, as Diffusers' ``variant`` takes them."""

Opened = Callable[..., Any]
"""(dtype=, variant=) -> the pipeline of a folder, from the disk."""
Finish = Callable[[Path, Any, Opened], None]
"""(folder, its pipeline in memory, its pipeline from the disk): writes what else belongs into it, past the gate."""


def nothing_more(folder: Path, made: Any, opened: Opened) -> None:
    """Write nothing more into an exported folder."""


class ExportError(RuntimeError):
    """The exported pipeline does not do what the trainer's sampler does; nothing was written."""


def export(
    family: Family,
    network: nn.Module,
    num_steps: int | None,
    folder: Path,
    *,
    prompts: list[str],
    card: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    sampler: Sampler = "renoise",
    guidance_scale: float | None = None,
    variant: str = "",
    finish: Finish = nothing_more,
) -> float:
    """Write ``folder`` if it passes the gate and return the largest relative difference found.

    num_steps: of a student; None exports a teacher, whose pipeline keeps its scheduler. dtype: of the weights on
    disk; in half precision the gate runs again on the rounded weights. sampler: of a student. guidance_scale: of the
    gate's call, where the network takes it as an input. variant: one of ``VARIANTS``, whose files are written besides
    those in float32 and pass the gate, too; empty: none. Raises ExportError.
    """
    with atomic_folder(folder) as partial:
        made = family.pipeline(fused(network), num_steps, sampler)
        made.save_pretrained(partial)
        opened = functools.partial(from_pretrained, partial)
        gate = functools.partial(_gate, opened, family, network, num_steps, sampler, guidance_scale, prompts)
        difference = _through(gate, partial, dtype, variant)
        if _code(partial):
            card = card | {"use": USE}
        if not calls.takes(made, "guidance_scale"):
            card = {name: value for name, value in card.items() if name != "guidance_scale"}
        (partial / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        finish(partial, made, opened)
    return difference


def export_component(
    family: Family,
    network: nn.Module,
    num_steps: int | None,
    folder: Path,
    base: str,
    *,
    prompts: list[str],
    card: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    sampler: Sampler = "renoise",
    guidance_scale: float | None = None,
    variant: str = "",
    finish: Finish = nothing_more,
) -> float:
    """Write the network alone, as its pipeline names it, beside its scheduler, if the pipeline ``base`` takes both.

    Plain Diffusers puts what was written in the place of ``base``'s own, and then the gate is that of ``export``, as
    are the other arguments. Raises ExportError, or ValueError if Diffusers has no class for the network.
    """
    whole = fused(network)
    made = family.pipeline(whole, num_steps, sampler)
    parts: dict[str, Any] = components_of(made, whole)
    for name, part in parts.items():
        if not type(part).__module__.startswith("diffusers."):
            raise ValueError(
                f"the student's {name} is a {type(part).__name__}, whose code only a pipeline's folder brings along; "
                "export it as a pipeline"
            )
    with atomic_folder(folder) as partial:
        for name, part in parts.items():
            part.save_pretrained(partial / name)
        made.scheduler.save_pretrained(partial / "scheduler")
        opened = functools.partial(with_parts, base, partial, {n: type(p) for n, p in parts.items()}, made)
        gate = functools.partial(_gate, opened, family, network, num_steps, sampler, guidance_scale, prompts)
        difference = _through(gate, partial, dtype, variant)
        (partial / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        finish(partial, made, opened)
    return difference


def components_of(pipeline: Any, network: nn.Module) -> dict[str, nn.Module]:
    """Those parts of a pipeline that hold the network's weights, by name."""
    own = {id(p) for p in network.parameters()}
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: part for name, part in parts.items() if any(id(p) in own for p in part.parameters())}


def with_parts(
    base: str,
    folder: Path,
    kinds: Mapping[str, Any],
    made: Any,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Any:
    """The pipeline ``base`` with the parts of these classes, and the scheduler, that lie in a component's folder.

    made: the student's whole pipeline, of which class and settings are.
    """
    parts = {
        name: kind.from_pretrained(folder, subfolder=name, dtype=dtype, variant=variant)
        for name, kind in kinds.items()
    }
    parts["scheduler"] = type(made.scheduler).from_pretrained(folder, subfolder="scheduler")
    return type(made).from_pretrained(base, dtype=dtype, **parts, **settings_beside(made, base))


def settings_beside(made: Any, base: str) -> dict[str, Any]:
    """The settings of a student's pipeline that are not those of ``base``, as that it is a distilled one."""
    from diffusers import DiffusionPipeline

    theirs = DiffusionPipeline.load_config(base)
    left_out = {*made.components, "requires_safety_checker"}  # whether images are checked is the base's to say
    return {
        name: value
        for name, value in made.config.items()
        if not name.startswith("_") and name not in left_out and value != theirs.get(name)
    }


def _through(gate: Callable[..., float], folder: Path, dtype: torch.dtype, variant: str) -> float:
    """The difference in float32; then the same folder in ``dtype``, and with files of a variant, if they pass, too."""
    difference = gate(TOLERANCE)
    if dtype != torch.float32:
        _halve(folder, dtype)
        gate(HALF_TOLERANCE)
    if variant:
        _add_variant(folder, variant)
        gate(HALF_TOLERANCE, variant)
    return difference


def _gate(
    opened: Opened,
    family: Family,
    network: nn.Module,
    num_steps: int | None,
    sampler: Sampler,
    guidance_scale: float | None,
    prompts: list[str],
    tolerance: float,
    variant: str = "",
) -> float:
    try:
        difference = _difference(opened, family, network, num_steps, sampler, guidance_scale, prompts, variant)
    except Exception as error:
        raise ExportError(
            f"not exported: the saved pipeline does not run in plain Diffusers ({_short(error)})"
        ) from error
    if not difference <= tolerance:
        raise ExportError(
            f"not exported: the reloaded pipeline differs from the trainer's sampler by {difference:.2g} "
            f"(allowed {tolerance:g}); the scheduler or the weights do not survive saving"
        )
    return difference


def _difference(
    opened: Opened,
    family: Family,
    network: nn.Module,
    num_steps: int | None,
    sampler: Sampler,
    guidance_scale: float | None,
    prompts: list[str],
    variant: str,
) -> float:
    device = next(network.parameters()).device
    as_asked = {"dtype": VARIANTS[variant], "variant": variant} if variant else {"dtype": torch.float32}
    pipeline = opened(**as_asked).to(device)
    for part in pipeline.components.values() if variant else ():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float32)  # what was rounded stays so; Diffusers' own would warn of it
    pipeline.set_progress_bar_config(disable=True)
    scale = family.unguided if guidance_scale is None and num_steps is not None else guidance_scale
    with _same_noise(prompts) as generator:
        found = family.run(pipeline, prompts, num_steps or 4, generator, scale)
    with _same_noise(prompts) as generator:
        if num_steps is None:  # what the teacher's pipeline in memory gives, by the same stock call
            wanted = family.run(family.pipeline(fused(network), None), prompts, 4, generator, scale)
        else:
            wanted = drawn(family, network, prompts, num_steps, sampler, guidance_scale, generator)
    return float((found.float() - wanted.float()).abs().max() / wanted.abs().max().clamp(min=1e-3))


@contextmanager
def _same_noise(prompts: Sequence[str]) -> Iterator[torch.Generator]:
    """Within it all noise is the same each time, a call's own generator and torch's, whose state is kept.

    And float32 is float32: on a GPU convolutions would round to TF32, so that adapters apart and fused differ by more
    than the gate allows.
    """
    seed, rounds = seed_of("gate", *prompts), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed)
    finally:
        torch.backends.cudnn.allow_tf32 = rounds


@torch.no_grad()
def drawn(
    family: Family,
    network: nn.Module,
    prompts: Sequence[str],
    num_steps: int,
    sampler: Sampler,
    guidance_scale: float | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """What a student gives by the trainer's own sampler, on the noise that its stock call draws: [B, ...]."""
    denoiser, device = family.denoiser.with_network(network), next(network.parameters()).device
    denoiser = replace(denoiser, autocast=None)
    x_t = torch.randn(len(prompts), *family.latent_shape, generator=generator).to(device)

    def fresh() -> torch.Tensor:
        if family.step_noise == "global":
            return family.global_noise(x_t)
        return torch.randn(x_t.shape, generator=generator).to(device)

    cond = family.encode_prompts(prompts)
    return sample_student(
        denoiser,
        denoiser.schedule,
        x_t,
        family.student_times(num_steps),
        cond if guidance_scale is None else with_guidance(cond, guidance_scale),
        sampler,
        fresh,
    )


def _halve(folder: Path, dtype: torch.dtype) -> None:
    """Rewrite every safetensors file below ``folder`` in ``dtype``, integer tensors as they are."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(tensors, file, metadata)


def _add_variant(folder: Path, variant: str) -> None:
    """Copy every safetensors file below ``folder`` in half precision, under the name that the libraries look for."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in list(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        rounded = {k: v.to(VARIANTS[variant]) if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(rounded, file.with_name(_variant_name(file.name, variant)), metadata)
    for index in list(folder.rglob("*.safetensors.index.json")):  # of a network in several files
        tree = from_json(index.read_text(encoding="utf-8"))
        tree["weight_map"] = {name: _variant_name(file, variant) for name, file in tree["weight_map"].items()}
        name = f"{index.name.removesuffix('.json')}.{variant}.json"
        index.with_name(name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _variant_name(name: str, variant: str) -> str:
    """As model.fp16.safetensors, or of one of several files model.fp16-00001-of-00002.safetensors."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", rf".{variant}\g<0>", name)


def export_adapter(
    family: Family,
    opened: Opened,
    weights: Sequence[dict[str, torch.Tensor]],
    base: str | None,
    folder: Path,
    *,
    num_steps: int | None,
    prompts: list[str],
    card: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    starts: Sequence[float] = (),
    finish: Finish = nothing_more,
) -> float:
    """Write a student's adapter alone as a LoRA file, with its scheduler, if the stock pipeline takes all of it.

    The pipeline ``base`` with the file and the scheduler, called at guidance scale 1, must give what the exported
    pipeline gives, which is ``opened``; returns the largest relative difference. weights: as ``lora.weights`` makes
    them; of experts, each one's, which become files of their own. They go to the base's own experts, or all to its one
    network, and are switched on from their ``starts``, timesteps, on. base None: no stock pipeline takes them, and
    none is tried. Raises ExportError, with the keys that were dropped or added if there are any.
    """
    from safetensors.torch import save_file

    made = opened(dtype=torch.float32)
    with atomic_folder(folder) as partial:
        files = {partial / name: told for name, told in adapter_files(family, len(weights)).items()}
        for file, tensors in zip(files, weights, strict=True):
            save_file({k: v.to(dtype) for k, v in tensors.items()}, file, {"format": "pt"})
        made.scheduler.save_pretrained(partial / "scheduler")
        difference = 0.0
        if base is not None:
            allowed = TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
            difference = _on_base(family, made, base, files, starts, num_steps, prompts, allowed)
        (partial / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        finish(partial, made, opened)
    return difference


def adapter_files(family: Family, count: int) -> dict[str, Mapping[str, Any]]:
    """The names of a student's LoRA files, the one or each expert's, and what ``load_lora_weights`` is told of it."""
    names = [LORA] if count == 1 else [f"expert_{k}.safetensors" for k in range(1, count + 1)]
    return dict(zip(names, [*family.experts.values()] or [{}] * count, strict=True))


def _on_base(
    family: Family,
    made: Any,
    base: str,
    files: Mapping[Path, Mapping[str, Any]],
    starts: Sequence[float],
    num_steps: int | None,
    prompts: list[str],
    allowed: float,
) -> float:
    """The largest relative difference between a pipeline and ``base`` with LoRA files, loaded as each is told."""
    from diffusers import DiffusionPipeline
    from safetensors import safe_open

    names = [file.stem for file in files]
    try:
        stock = DiffusionPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True).to(made.device)
        stock.scheduler = made.scheduler
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # of each further file
            for file, told in files.items():
                stock.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem, **told)
    except Exception as error:
        raise ExportError(
            f"{', '.join(file.name for file in files)} not written: {base} does not load it ({_short(error)})"
        ) from error
    for file, place in zip(files, [*family.experts] or [family.component] * len(files), strict=True):
        with safe_open(file, framework="pt") as opened:
            wanted = set(opened.keys())
        found = {f"{family.component}.{key}" for key in _adapter_keys(getattr(stock, place), file.stem)}
        if found != wanted:
            dropped, added = sorted(wanted - found), sorted(found - wanted)
            raise ExportError(
                f"{file.name} not written: loading it in {base} drops {dropped[:3]} and adds {added[:3]}"
            )

    times = family.student_times(num_steps) if num_steps is not None else []

    def switch(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        coming = times[step + 1 :]
        if coming:
            pipeline.set_adapters(names[sum(coming[0] <= start for start in starts[1:])])
        return tensors

    more: dict[str, Any] = {}
    if starts and not family.experts:
        stock.set_adapters(names[0])
        more = {"callback_on_step_end": switch}
    unguided = 1.0 if family.unguided is None else family.unguided
    latents: list[torch.Tensor] = []
    for called, told in ((made, {}), (stock, more)):
        called.set_progress_bar_config(disable=True)
        with _same_noise(prompts) as generator:
            latents.append(family.run(called, prompts, num_steps or 4, generator, unguided, **told).float())
    difference = float((latents[0] - latents[1]).abs().max() / latents[0].abs().max().clamp(min=1e-3))
    if not difference <= allowed:
        raise ExportError(
            f"{', '.join(file.name for file in files)} not written: with it {base} differs from the exported pipeline "
            f"by {difference:.2g} (allowed {allowed:g})"
        )
    return difference


def _adapter_keys(network: nn.Module, adapter: str) -> set[str]:
    """The names of an adapter's tensors, without the adapter's own."""
    return {
        name.replace(f".{adapter}.", ".")
        for name, _ in network.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }


def check_pipeline(path: str | Path, *wanted: str) -> None:
    """Raise ValueError, saying what is missing or damaged, unless ``path`` is a whole Diffusers pipeline.

    wanted: classes, of one of which it must be; none: any. What can only be a Hub id is left to Diffusers. No weight
    is loaded.
    """
    folder = Path(path)
    may_be_hub_id = str(path).count("/") < 2 and not folder.is_absolute() and not str(path).startswith(".")
    if may_be_hub_id and not folder.exists():
        return
    index = folder / "model_index.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such pipeline folder; name one that save_pretrained wrote")
    try:
        parts = from_json(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: not a Diffusers pipeline (no model_index.json); name a folder that save_pretrained wrote"
        ) from None
    except (OSError, ValueError):
        raise ValueError(f"{index}: not valid JSON; save the pipeline again") from None
    if not isinstance(parts, dict):
        raise ValueError(f"{index}: not the index of a pipeline; save the pipeline again")
    found = parts.get("_class_name")
    if wanted and found not in wanted:
        classes = " or a ".join(wanted)
        raise ValueError(f"{folder}: is a {found}, this family takes a {classes}; change model.family or model.path")
    for name, value in parts.items():
        is_component = isinstance(value, list) and len(value) == 2 and value[0] is not None and name[:1] != "_"
        if is_component and not (folder / name).is_dir():
            raise ValueError(f"{folder}: the pipeline lacks its component {name!r}; save or download it again")
        if is_component and wanted and (folder / name / f"{value[0]}.py").is_file():
            raise ValueError(
                f"{folder}: its {name} is a {value[1]}, which brings its own code; this family takes Diffusers' own: "
                "name another pipeline"
            )
    for file in sorted(found for name in SETTINGS for found in folder.glob(f"*/{name}")):
        _check_settings(file)
    for file in sorted(folder.glob("*/*.safetensors")):
        _check_weights(file)


def class_of(path: str | Path) -> str:
    """The name of a pipeline's class, of a folder or a Hub id."""
    from diffusers import DiffusionPipeline

    found: str = DiffusionPipeline.load_config(path)["_class_name"]
    return found


def _check_settings(file: Path) -> None:
    try:
        if isinstance(from_json(file.read_text(encoding="utf-8")), dict):
            return
        reason = "it is no object"  # of a text the libraries think that it is the name of a model on the Hub
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"{file}: not the settings of a component ({reason}); save or download the pipeline again")


def _check_weights(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # reads the header, which says how long the file must be
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: damaged weights ({error}); save or download the pipeline again") from None


@contextmanager
def opening(path: str | Path) -> Iterator[None]:
    """Within it, whatever a library raises on a pipeline that it cannot open is a ValueError that names ``path``.

    And the component that it could not open, where that shows. Memory that ran out is not the pipeline's fault.
    """
    try:
        yield
    except BaseException as error:
        if not _of_files(error):
            raise
        where = "" if Path(path).exists() else "no such folder, and not on the Hub or not reachable: "
        again = "; save or download it again" if not where and not _raised_here(error) else ""
        raise ValueError(
            f"{path}: cannot be opened as a pipeline ({where}{_component(error, path)}{_short(error)}){again}"
        ) from error


@contextmanager
def using(path: str | Path) -> Iterator[None]:
    """Within it, whatever a library raises in the first use of a pipeline is a ValueError that names ``path``.

    What the files of a component say wrongly, such as a tokenizer's length, may show only there. What fastgen itself
    raises stays as it is.
    """
    try:
        yield
    except BaseException as error:
        if not _of_files(error) or _raised_here(error):
            raise
        told = f"{_component(error, path)}{_short(error)}"
        if isinstance(error, ValueError):  # as of a size that its call does not take
            raise ValueError(f"{path}: {told}") from error
        raise ValueError(
            f"{path}: does not work as a pipeline ({told}); if others do here, save or download it again"
        ) from error


def tried(use: Callable[..., Any], path: str | Path) -> Callable[..., Any]:
    """A function of a pipeline that works within ``using`` until it has worked once."""
    works = False

    def call(*args: Any, **named: Any) -> Any:
        nonlocal works
        if works:
            return use(*args, **named)
        with using(path):
            result = use(*args, **named)
        works = True
        return result

    return call


def called(pipeline: Any) -> Callable[..., Any]:
    """The call of a stock pipeline, ``tried`` if its files are known."""
    place = _home(pipeline)
    return tried(pipeline, place) if place else pipeline


def _of_files(error: BaseException) -> bool:
    """Whether files can be what an error comes of, and not that memory ran out or another process is gone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or interrupt.of_another(error):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"  # of Rust, as in tokenizers


def _raised_here(error: BaseException) -> bool:
    """Whether a line of fastgen raised it, and none of a library below."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "fastgen"


def _component(error: BaseException, path: str | Path) -> str:
    """With whose files or in whose code a library met an error, as "its NAME: "; empty: in no component's.

    That is the deepest call with a variable that is a place in the component's folder, or was loaded from there.
    """
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            place = _home(value)
            if place.startswith(f"{path}{os.sep}"):
                name = Path(place).relative_to(path).parts[0]
                found = f"its {name}: " if (Path(path) / name).is_dir() else found
    return found


def _home(value: Any) -> str:
    """A place on disk: of a text itself, of a component what Diffusers or Transformers noted; empty: none."""
    if isinstance(value, str | Path):
        return str(value)
    facts = getattr(value, "__dict__", {})
    settings = facts.get("_internal_dict") or getattr(facts.get("config"), "__dict__", {})
    return str(facts.get("name_or_path") or settings.get("_name_or_path") or "")


def _short(error: BaseException) -> str:
    """A library's message on one line, with the error's kind where it would say too little."""
    kind = "" if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}" if str(error) else type(error).__name__, 300, placeholder=" ...")


def _code(folder: Path) -> list[Path]:
    """What Diffusers may run of a pipeline's folder."""
    return [*folder.glob("*.py"), *folder.glob("*/*.py")]


def brings_code(folder: Path) -> bool:
    """Whether a pipeline's folder has code in it, which its user must trust."""
    return bool(_code(folder))


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Diffusers' own, with ``trust_remote_code`` where a folder brings code that is this fastgen's to the byte.

    Raises ValueError if it brings other code, unless ``kwargs`` say whether to trust it.
    """
    from diffusers import DiffusionPipeline

    brought = _code(Path(path))
    if brought and "trust_remote_code" not in kwargs:
        home = Path(importlib.import_module("fastgen.pipelines").__path__[0])
        ours = {file.read_bytes() for file in home.glob("*.py")}
        for file in brought:
            if file.read_bytes() not in ours:
                raise ValueError(
                    f"{file}: is not this fastgen's code; read it, and if you trust it pass trust_remote_code=True"
                )
        kwargs = {"trust_remote_code": True} | kwargs
    return whole(DiffusionPipeline.from_pretrained(path, **{"use_safetensors": True} | kwargs), path)


def whole(pipeline: Any, path: str | Path) -> Any:
    """The pipeline itself. Raises ValueError if its files lacked some of its weights, or a tokenizer takes no token.

    Of Diffusers' models what lacked is then nowhere, and of Transformers' made up at random.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    for name, part in pipeline.components.items():
        limit = part.model_max_length if isinstance(part, PreTrainedTokenizerBase) else None
        if isinstance(limit, bool) or (isinstance(limit, int | float) and not limit >= 1):
            raise ValueError(f"{path}: its {name} has the model_max_length {limit}, not 1 or more; download it again")
        if not isinstance(part, torch.nn.Module):
            continue
        lacking = [key for key, p in part.named_parameters() if p.is_meta]
        if lacking:
            raise ValueError(
                f"{path}: the files of its {name} lack {len(lacking)} weights, as {lacking[0]}; download it again"
            )
        made_up = _made_up(part, Path(path) / name) if isinstance(part, PreTrainedModel) else 0
        if made_up:
            raise ValueError(
                f"{path}: the files of its {name} lack {made_up} of the numbers that its config.json asks for; "
                "download it again"
            )
    return pipeline


def _made_up(model: Any, folder: Path) -> int:
    """How many numbers of a model cannot be from the files of a folder; 0 too if there are none, or quantized ones."""
    from safetensors import safe_open

    held = 0
    files = [] if vars(model.config).get("quantization_config") else list(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held += sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())
    return max(0, sum(p.numel() for p in model.parameters()) - held) if files else 0


def load(path: str | Path, **kwargs: Any) -> Any:
    """The stock Diffusers pipeline of a folder or Hub id, calling itself as its student was trained.

    Steps, guidance scale and image size default to the student's own (``DEFAULTS``); all else, and every keyword of
    ``from_pretrained``, is Diffusers'. Raises ValueError if the folder is not a whole pipeline.
    """
    if (Path(path) / "pipeline" / "model_index.json").is_file():
        raise ValueError(f"{path}: is a run folder; its pipeline is {Path(path) / 'pipeline'}")
    check_pipeline(path)
    with opening(path):
        pipeline = from_pretrained(path, **kwargs)
    card = read_card(Path(path))
    defaults = calls.settled(pipeline, {k: card.get(k) for k in DEFAULTS}) | card.get("call", {})
    if defaults:
        stock = type(pipeline)

        signature = inspect.signature(stock.__call__)

        @functools.wraps(stock.__call__)
        def call(self: Any, *args: Any, **named: Any) -> Any:
            by_position = signature.bind_partial(self, *args).arguments
            missing = {name: value for name, value in defaults.items() if name not in by_position}
            return stock.__call__(self, *args, **(missing | named))

        # a subclass of the same name, so that saving writes the stock class into model_index.json
        pipeline.__class__ = type(stock.__name__, (stock,), {"__call__": call, "__module__": stock.__module__})
    return pipeline


def read_card(folder: Path) -> dict[str, Any]:
    """What ``fastgen.json`` says; empty if there is none."""
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        card = from_json(path.read_text(encoding="utf-8"))
        if not isinstance(card, dict):
            raise ValueError("it is no object")
        for name in ("num_inference_steps", "height", "width"):
            if card.get(name) is not None and (type(card[name]) is not int or card[name] < 1):
                raise ValueError(f"{name} is {reprlib.repr(card[name])}")
        for name, kind in (("method", str), ("call", dict)):
            if not isinstance(card.get(name, kind()), kind):
                raise ValueError(f"{name} is {reprlib.repr(card[name])}")
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); export the pipeline again") from None
    return dict(card)
