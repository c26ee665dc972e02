"""``fastgen estimate``: what a recipe would hold and compute, found without its weights, by form and precision.

The networks are built in full size from their configuration files, but their large tensors are fake: shapes and
dtypes without data (torch's FakeTensor, on the meta device underneath). The method's own constructor makes its
networks, and each of its phases takes its turns, forward and backward and the optimizer's step, while a ledger adds
up what each operation makes and lets go, and its FLOPs. So weights, gradients, optimizer and averages are exact, and
activations are those of the real passes. With ``run.offload`` things come and go as they do in a training, and what
waits is added up apart.

The configuration files are those of a local pipeline folder, weights or not, or of a model that ships with fastgen
(``fastgen.configs``, <family>/<model>/about.json says of which Hub id).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from . import config, lora, memory, offload
from . import recipe as recipes
from .cost import Even
from .denoiser import Cond
from .ema import EMA
from .engine import Engine
from .experts import members
from .export import opening
from .family import Family
from .guidance import student_guidance, with_guidance
from .method import Batch, Method, NeedsPairs, Phase
from .optimizers import KINDS, Optim
from .plain import from_json
from .recipe import Model, Recipe
from .train import Session, check_offload, family_of, fix_scale, method_of

log = logging.getLogger("fastgen")

Device = Literal["cuda", "cpu"]
CARDS = (12, 16, 24, 40, 80, 141)
"""Memory of graphics cards, in GiB as their names have it."""
ALLOWANCE, CONTEXT = 1.1, 1 << 30
"""On the peak, for what an allocator cannot use between blocks; and for the driver's and the libraries' own."""
BLOCK = 512
"""Bytes that CUDA's allocator rounds up to."""
SMALL = 1 << 16
"""Elements of a new tensor up to which it is real, so that tables of times have their values."""
OWN = "own"
"""The form that a config itself has."""
PRECISIONS = ("fp32", "bf16")
"""Those that differ: fp16 takes as much as bf16."""

aten: Any = torch.ops.aten
_FLOPS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop(
        g.shape, q.shape, k.shape, v.shape
    ),
}


class Ledger(TorchDispatchMode):
    """Within it large new tensors are fake, and what all tensors hold and what operations compute is added up.

    What depends on the values of a fake tensor gets an answer that holds of a trained network and its copies: numbers
    are 1, so there is something, and equal shapes hold equal values, unless no two tensors are the ``same``.

    Attributes:
        held, peak: bytes on the device, now and the most so far.
        waits, most: the same of the host's memory.
        flops: of all operations so far.
    """

    def __init__(self, block: int = 1, same: bool = True) -> None:
        """block: bytes that each storage is rounded up to."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.block, self.same = FakeTensorMode(allow_non_fake_inputs=True), block, same
        self.held = self.peak = self.waits = self.most = self.flops = 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.on_host: set[int] = set()
        self.moving = False  # what is made now is made in the host's memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        found = self._run(func, args, named)
        count = _FLOPS.get(func.overloadpacket)
        if count:
            self.flops += count(*args, **named, out_val=found)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return found

    def _run(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if func is aten.equal.default and not self.same:
            return False
        given = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        if not given:  # it makes a tensor of nothing
            with self.fake:
                made = func(*args, **named)
            large = isinstance(made, Tensor) and made.numel() > SMALL
            return made if large else func(*args, **named)
        try:
            return func(*args, **named)
        except DataDependentOutputException:
            if func is aten.equal.default:
                return args[0].shape == args[1].shape
            if func is aten._local_scalar_dense.default:
                return args[0].dtype == torch.bool or (1.0 if args[0].dtype.is_floating_point else 1)
            raise

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        if self.moving:
            size = storage.nbytes()
            self.on_host.add(key)
            self.waits += size
            self.most = max(self.most, self.waits)
        else:
            size = -(-storage.nbytes() // self.block) * self.block
            self.held += size
            self.peak = max(self.peak, self.held)

        def leave(_: object) -> None:
            if self.storages.pop(key, None) is None:
                return
            if key in self.on_host:
                self.on_host.remove(key)
                self.waits -= size
            else:
                self.held -= size

        self.storages[key] = weakref.ref(storage, leave)


@dataclass(frozen=True)
class Host:
    """The way between a ledger's device and its host's memory, of tensors that are all fake."""

    ledger: Ledger

    def is_here(self, tensor: Tensor) -> bool:
        """Whether it is on the device."""
        return tensor.untyped_storage()._cdata not in self.ledger.on_host

    def away(self, tensor: Tensor) -> Tensor:
        """A copy in the host's memory."""
        self.ledger.moving = True
        try:
            return tensor.clone()
        finally:
            self.ledger.moving = False

    def here(self, tensor: Tensor) -> Tensor:
        """A copy on the device."""
        return tensor.clone()


_HALVES = (torch.bfloat16, torch.float16)
_IN_FLOAT = {
    getattr(place, name)
    for place in (torch, torch.nn.functional, Tensor)
    for name in (
        *(
            "group_norm",
            "layer_norm",
            "softmax",
            "log_softmax",
            "softplus",
            "normalize",
            "mse_loss",
            "cosine_similarity",
        ),
        *("exp", "log", "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "sum", "prod", "cumsum", "norm"),
    )
    if hasattr(place, name)
}


class AsOnCuda(TorchFunctionMode):
    """Within it, CPU autocast computes in float32 what autocast on CUDA does, norms above all."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _IN_FLOAT and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype in _HALVES else x for x in args)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Condition:
    """A tensor of one sample: its shape and the name of its dtype."""

    shape: list[int]
    dtype: str = "float32"


@dataclass(frozen=True)
class Shipped:
    """What ``about.json`` beside a shipped model's configuration files says.

    Attributes:
        hub: the Hub id whose files these are.
        conditions: of one sample, what the family's ``encode_prompts`` gives, by name.
        parameters: published counts by component.
        sources: where each was found; of those without one, why and what it is compared with.
    """

    hub: str
    conditions: dict[str, Condition]
    parameters: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def shipped() -> dict[Path, Shipped]:
    """Folder -> what is said of it, of every model whose configuration files ship with fastgen."""
    root = Path(str(importlib.import_module("fastgen.configs").__path__[0]))
    files = sorted(root.glob("*/*/about.json"))
    return {p.parent: config.decode(Shipped, from_json(p.read_text(encoding="utf-8")), str(p)) for p in files}


def folder_of(model: Model) -> tuple[Path, Shipped | None]:
    """The folder with a model's configuration files. Raises ValueError if there is none."""
    place = Path(recipes.locate(model.path))
    if place.is_dir():
        return place, None
    known = shipped()
    for folder, about in known.items():
        if about.hub == model.path:
            return folder, about
    raise ValueError(
        f"{model.path}: no such folder, and not among the models whose configuration files ship with fastgen "
        f"({', '.join(about.hub for about in known.values())}); give a local snapshot"
    )


def opened(folder: Path) -> Any:
    """The pipeline of a folder, put together from its configuration files; without those tokenizers that lack theirs.

    Within a ``Ledger`` it takes no memory to speak of. Raises ValueError if a file is missing or of an unknown class.
    """
    index = folder / "model_index.json"
    try:
        parts: dict[str, Any] = from_json(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{index}: cannot be read ({error})") from None
    import diffusers

    made = {}
    with opening(folder):
        for name, value in parts.items():
            if not isinstance(value, list) or len(value) != 2:
                if not name.startswith("_"):
                    made[name] = value
                continue
            made[name] = None if value[0] is None else component(folder / name, *value)
        return getattr(diffusers, parts["_class_name"])(**made)


def component(folder: Path, library: str, name: str) -> Any:
    """A part of a pipeline, from its configuration; None: it is not there and has no parameters. Raises ValueError."""
    found = getattr(importlib.import_module(library), name, None) if library in ("diffusers", "transformers") else None
    if found is None:
        raise ValueError(f"{folder}: {library} has no {name}; this model cannot be estimated")
    if library == "diffusers":
        return found.from_config(found.load_config(str(folder)))
    if not issubclass(found, nn.Module):
        return found.from_pretrained(str(folder)) if folder.is_dir() else None
    from transformers import AutoConfig

    tree = from_json((folder / "config.json").read_text(encoding="utf-8"))
    return found(found.config_class.from_dict(tree) if found.config_class else AutoConfig.for_model(**tree))


@dataclass(frozen=True)
class Given:
    """A data source of one batch, of whatever the method asks for."""

    family: Family
    method: Method
    cond: Cond
    device: torch.device

    def batch(self, samples: Sequence[int]) -> Batch:
        """Images go through the autoencoder, pairs do not."""
        family, count = self.family, len(samples)
        x0 = eps = path = None
        if isinstance(self.method, NeedsPairs):
            x0, eps = (torch.zeros(count, *family.latent_shape, device=self.device) for _ in range(2))
            path = {t: torch.zeros(count, *family.latent_shape, device=self.device) for t in self.method.path_times}
        elif self.method.needs_images:
            x0 = family.encode(torch.zeros(count, 3, *family.image_size, device=self.device))
        uncond = {name: value[:1] for name, value in self.cond.items()}
        return Batch(list(samples), self.cond, uncond, x0, eps, path)


def conditions(family: Family, about: Shipped | None, count: int, device: torch.device) -> Cond:
    """The cond of a batch, as a shipped model says, or as the family's own text encoder makes it."""
    if about is None:
        return family.encode_prompts(["a picture"] * count)
    return {
        name: torch.zeros(count, *each.shape, dtype=getattr(torch, each.dtype), device=device)
        for name, each in about.conditions.items()
    }


def build(recipe: Recipe, device: Device, here: torch.device) -> Session:
    """The recipe, built as ``train.build`` does but from configuration files and without its data.

    device: whose attention it gets; here: where its tensors are.
    """
    folder, about = folder_of(recipe.model)
    family_name = recipe.model.family or (folder.parent.name if about else "")
    attention = "sdpa" if (device, recipe.model.attention) == ("cuda", "auto") else recipe.model.attention
    check_offload(recipe)
    model = replace(recipe.model, family=family_name, attention=attention, compile=False)
    run = recipe.run
    autocast = None if run.precision == "fp32" else recipes.DTYPES[run.precision]
    module = family_of(str(folder), model.family)
    family: Family = module.load(
        opened(folder), here, autocast, recipe.student.start, model.image_size, model.num_frames
    )
    fix_scale(family, model)
    cond = conditions(family, about, run.batch_size, here)
    family, method, used = method_of(replace(recipe, model=model), family, here)
    data: Any = Given(family, method, cond, here)
    ema = {method.exported: EMA(method.networks[method.exported], run.ema)} if run.ema else {}
    optim = {role: o if KINDS[o.name].is_torch else Optim(o.lr) for role, o in recipe.optim.items()}
    engine = Engine(method, data, optim, batch_size=run.batch_size, steps=run.steps, device=here)
    return Session(recipe, here, family, method, data, data, engine, ema, used)


def turn(session: Session, phase: Phase, step: int) -> list[nn.Module]:
    """What ``Engine.turn`` does, of which a value of fake tensors would be asked, and one micro-batch of it.

    Returns the networks that it brought to the device, of those that wait in the host's memory.
    """
    engine, samples = session.engine, range(session.engine.batch_size)
    engine.train_only(phase.trains)
    batch = engine.data.batch(samples)
    terms = phase.loss(batch, Even(samples, engine.seed, step, phase.name, engine.device))
    loss = torch.stack([term.sum() for term in terms.values()]).sum() / len(samples)
    # what loss.backward() does; within that, modes are off when it recomputes what was checkpointed
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    brought = list(engine.offload.called)
    engine.reshard()
    engine.gradient_norms(phase)
    for role in phase.trains:
        engine.optimizers[role].step()
        engine.optimizers[role].zero_grad(set_to_none=True)
    phase.after()
    return brought


def resident(session: Session, phase: Phase, brought: Sequence[nn.Module]) -> dict[str, Any]:
    """Of what ``memory.held`` counts, what is on the device when a phase's backward pass is done; bytes.

    brought: what ``turn`` returns of that phase.
    """
    engine, networks, parts = session.engine, session.method.networks, memory.held(session)
    trained = [p for role in phase.trains for p in engine.parameters[role].values()]
    parts["gradients"] = sum(p.numel() * p.element_size() for p in trained)
    for role in engine.offload.optimizers.keys() - set(phase.trains):
        states = [t for state in engine.optimizers[role].state.values() for t in state.values()]
        parts["optimizer"] -= memory.size(states, set())
    for network, kept in engine.offload.waiting.items():
        if network not in brought:
            own = [r for r, n in networks.items() if any(lora.plain(one) is network for one in members(n))]
            place, name = (parts["weights"], own[0]) if own else (parts, "pipeline")
            place[name] -= memory.size([p for p, _ in kept], set())
    return parts


def warm(engine: Engine) -> None:
    """Let each optimizer have its moments, which it makes at its first step, before anything is measured."""
    for role, parameters in engine.parameters.items():
        engine.offload.turn([role])
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        engine.optimizers[role].step()
        engine.optimizers[role].zero_grad(set_to_none=True)


def fewer_bits(parameters: Iterable[Tensor], moments: tuple[int, float]) -> int:
    """Bytes that an optimizer of bitsandbytes or torchao holds, by their documentation: they are not asked.

    moments: how many it keeps, and bytes of a number in each, of which 256, in half a byte 128, share a scale of 4
    bytes, unless they are of 4 bytes themselves, as those of tensors below 4096 numbers always are.
    """
    count, width = moments
    block = 256 if width >= 1 else 128
    sizes = [p.numel() for p in parameters]
    held = (4 * n if width == 4 or n < 4096 else width * n + 4 * math.ceil(n / block) for n in sizes)
    return round(count * sum(held))


def states_size(session: Session, role: str) -> int:
    """Bytes of the states of a role's optimizer, once it has made them."""
    engine, kind = session.engine, KINDS[session.recipe.optim[role].name]
    if not kind.is_torch:
        return fewer_bits(engine.parameters[role].values(), kind.moments)
    return memory.size([t for state in engine.optimizers[role].state.values() for t in state.values()], set())


@contextlib.contextmanager
def without_weights(ledger: Ledger, device: Device) -> Iterator[None]:
    """Within it, networks are built and run for a device without taking memory.

    All is said to be on the CPU in float32, so ``Module.to`` has nothing to do; it would fail on fake parameters.
    """
    to = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            with ledger, AsOnCuda() if device == "cuda" else contextlib.nullcontext():
                yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


def estimate(recipe: Recipe, device: Device = "cuda") -> dict[str, Any]:
    """The row of a recipe. device: whose kernels and autocast it is for; no such device is needed.

    Returns:
        parameters, and those trained, by role; parts, as ``memory.held`` has them, held, peak and rest, which is what
        the peak has beyond what is held, in bytes; turns, by phase its own parts, held and peak; host, the most that
        waits in the host's memory, in bytes; flops of an iteration and of an image's network calls; fits, the cards
        that have room.

    Raises ValueError as ``train.build`` does, but for data, which are not opened.
    """
    ledger = Ledger(BLOCK if device == "cuda" else 1, same=not recipe.student.init)
    with without_weights(ledger, device):
        session = build(recipe, device, torch.device("cpu"))
        engine, method, phases = session.engine, session.method, session.method.phases
        built = ledger.held
        if recipe.run.offload and device == "cuda":
            teacher = session.family.denoiser.network
            engine.offload = offload.of(method, teacher, engine.optimizers, Host(ledger))
        warm(engine)
        flops = 0.0
        peaks: dict[str, int] = {}
        brought: dict[str, list[nn.Module]] = {phase.name: [] for phase in phases}
        # what a phase computes rises evenly with the depth of the student's chain: the mean of first and last
        depths = sorted({0, (method.num_steps or 1) - 1})
        for depth in depths:
            for phase in phases:
                before, ledger.peak = ledger.flops, ledger.held
                brought[phase.name] += turn(session, phase, depth)
                flops += (ledger.flops - before) * recipe.run.accumulate / phase.every / len(depths)
                for average in session.ema.values() if phase is phases[-1] else ():
                    average.update()
                peaks[phase.name] = max(peaks.get(phase.name, 0), ledger.peak)
        parts = {phase.name: resident(session, phase, brought[phase.name]) for phase in phases}
        for role in [role for role, optim in recipe.optim.items() if not KINDS[optim.name].is_torch]:
            states = [t for state in engine.optimizers[role].state.values() for t in state.values()]
            saved = memory.size(states, set()) - states_size(session, role)
            for name in parts:
                parts[name]["optimizer"] -= saved
                peaks[name] -= saved
        image = call_flops(session, ledger)
        pipeline: Any = session.family.pipeline(lora.plain(members(session.family.denoiser.network)[0]), None)
        others = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    held = {name: memory.total(part) for name, part in parts.items()}
    fullest = max(held, key=lambda name: held[name])
    peak = max(built, *peaks.values())  # all is on the device once, before what waits is taken away
    calls = method.num_steps
    return {
        "method": recipe.method.name,
        "parameters": {role: counted([network]) for role, network in method.networks.items()},
        "trained": {role: sum(p.numel() for p in found.values()) for role, found in engine.parameters.items()},
        "pipeline": {name: counted([part]) for name, part in others.items()},
        "parts": parts[fullest],
        "held": held[fullest],
        "peak": peak,
        "rest": peak - held[fullest],
        "turns": {name: {"parts": part, "held": held[name], "peak": peaks[name]} for name, part in parts.items()},
        "host": ledger.most,
        "flops": flops,
        "flops_call": image,
        "flops_image": None if calls is None else calls * image,
        "batch_size": recipe.run.batch_size,
        "image_size": list(session.family.image_size),
        "precision": recipe.run.precision,
        "dtype": recipe.model.dtype,
        "offload": recipe.run.offload and device == "cuda",
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
        "attention": session.attention,
        "device": device,
        "fits": fits(peak),
    }


def written(recipe: Recipe) -> tuple[int, int]:
    """Bytes of a checkpoint, and of the pipeline that a run ends with. Raises ValueError as ``estimate`` does."""
    with without_weights(Ledger(same=not recipe.student.init), "cuda"):
        session = build(recipe, "cuda", torch.device("cpu"))
        engine, networks = session.engine, session.method.networks
        warm(engine)
        teacher = lora.plain(members(session.family.denoiser.network)[0])
        pipeline: Any = session.family.pipeline(teacher, None)
        others = [p for p in pipeline.components.values() if isinstance(p, nn.Module) and p is not teacher]
    exported = [lora.plain(one) for one in members(networks[session.method.exported])]
    own = {id(p): p for n in exported for name, p in n.named_parameters() if ".lora_" not in name}  # fused, or apart
    kept = [t for role in engine.parameters for t in (*engine.parameters[role].values(), *networks[role].buffers())]
    kept += [t for role in engine.moving for t in (*networks[role].parameters(), *networks[role].buffers())]
    kept += [t for average in session.ema.values() for t in average.average.values()]
    states = sum(states_size(session, role) for role in engine.parameters)
    width = recipes.DTYPES[recipe.run.save_dtype].itemsize
    return sum(t.numel() * t.element_size() for t in kept) + states, width * (
        counted(others) + sum(p.numel() for p in own.values())
    )


@torch.no_grad()
def call_flops(session: Session, ledger: Ledger) -> int:
    """Of one call of the exported network for one image."""
    family, method = session.family, session.method
    denoiser = family.denoiser.with_network(members(method.networks[method.exported])[0])
    cond: Any = {name: value[:1] for name, value in session.engine.data.batch([0]).cond.items()}
    scale = student_guidance(method)
    before = ledger.flops
    t = torch.tensor([family.student_times(method.num_steps or 1)[0]], dtype=torch.float64)
    denoiser(torch.zeros(1, *family.latent_shape), t, cond if scale is None else with_guidance(cond, scale))
    return ledger.flops - before


def counted(networks: Iterable[nn.Module]) -> int:
    """Parameters, each once; of adapters those of the adapters alone."""
    return sum(p.numel() for p in {id(p): p for n in networks for p in n.parameters()}.values())


def fits(peak: int) -> list[int]:
    """The cards with room for a peak and the allowance."""
    return [card for card in CARDS if peak * ALLOWANCE + CONTEXT <= card * 2**30]


def rows(
    tree: Mapping[str, Any], name: str, where: str, forms: Sequence[str], precisions: Sequence[str], device: Device
) -> list[dict[str, Any]]:
    """A row for each of these forms and precisions that the tree's recipe can have. Raises ValueError if none."""
    found, refused = [], ""
    for form in forms:
        changed = tree if form == OWN else memory.formed(tree, form)
        for precision in precisions:
            log.info("%s: %s, %s", name, form, precision)
            given = {**changed, "run": {**tree.get("run", {}), "precision": precision}}
            if "model" in given and given["model"].get("dtype", "fp32") != "fp32":  # what is computed in
                given["model"] = {**given["model"], "dtype": precision}
            try:
                found.append({"config": name, "form": form, **estimate(recipes.decode(given, where), device)})
            except ValueError as error:
                refused = " ".join(str(error).split())
                log.warning("%s: left out %s: %s", name, form, refused)
                break
    if not found:
        raise ValueError(refused)
    return found


WORDS = 3
"""Columns of ``table`` that are no numbers."""


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line a form and precision; GiB, and the smallest card that has room."""
    lines = []
    for row in rows:
        parts = {name: memory.total({name: part}) for name, part in row["parts"].items()}
        sizes = {**parts, "held": row["held"], "activations": row["rest"], "peak": row["peak"], "host": row["host"]}
        image = row["flops_image"]
        lines.append(
            [
                row["config"],
                row["form"],
                row["precision"] if row["precision"] == "fp32" else "bf16, fp16",
                *(f"{size / 2**30:,.2f}" for size in sizes.values()),
                f"{row['flops'] / 1e12:,.3g}",
                "" if image is None else f"{image / 1e12:,.3g}",
                f"{row['fits'][0]} GB" if row["fits"] else "none",
            ]
        )
    columns = ["weights", "gradients", "optimizer", "ema", "pipeline", "held", "activations", "peak", "host"]
    return ["config", "student", "precision", *columns, "TFLOP/step", "TFLOP/image", "card"], lines


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for above the table: parameters by role of each form, and what was supposed."""
    first = rows[0]
    size = " x ".join(map(str, first["image_size"]))
    lines = [
        f"{first['config']}: {first['method']}, {first['batch_size']} images of {size} a micro-batch, attention "
        f"{first['attention']}, gradient checkpointing {'on' if first['gradient_checkpointing'] else 'off'}"
        + (", frozen weights in what is computed in" if any(row["dtype"] != "fp32" for row in rows) else "")
    ]
    for row in {row["form"]: row for row in rows}.values():
        roles = [f"{role} {count:,}" for role, count in {**row["parameters"], **row["pipeline"]}.items()]
        lines.append(f"{row['form']}: parameters of {', '.join(roles)}")
    for row in [row for row in rows if row["offload"]]:
        turns = [f"{name} {t['held'] / 2**30:,.2f}, peak {t['peak'] / 2**30:,.2f}" for name, t in row["turns"].items()]
        lines.append(
            f"{row['form']}, {row['precision']}: held in the turn of {'; of '.join(turns)}; run.offload lets up to "
            f"{row['host'] / 2**30:,.2f} wait in the host's memory"
        )
    cards = ", ".join(map(str, CARDS))
    return [
        *lines,
        f"GiB; a card, of {cards} GB, has room for the peak and {ALLOWANCE - 1:.0%} and {CONTEXT >> 20} MiB more",
    ]
