"""``fastgen train``: build what a recipe names, run the loop, export the student."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from . import (
    attention,
    best,
    checkpoint,
    config,
    export,
    health,
    interrupt,
    lora,
    offload,
    optimizers,
    parallel,
    precision,
    process,
    publish,
    registry,
    route,
    runs,
    sharding,
    tracking,
)
from . import recipe as recipes
from .card import Facts, model_card
from .checkpoint import CheckpointError
from .data import PairSource, Skips, Source
from .data.batches import Batches, still, to_uint8
from .data.cached import Cached, described
from .data.cached import Config as CachedData
from .data.pairs import Pairs
from .data.skipped import SKIPPED
from .denoiser import guided
from .ema import EMA
from .engine import Engine, Logs
from .experts import Experts, members
from .family import Family
from .guidance import student_guidance, with_guidance
from .interrupt import Interrupted, ProcessGone, Watch
from .method import Method, NeedsPairs
from .plain import from_json
from .progress import progress
from .publish import Wanted
from .recipe import DTYPES, Model, Recipe
from .rng import Noise
from .sampling import ddim, ddim_times, sample, sample_student
from .students import Students

log = logging.getLogger("fastgen")

GRID = 16
"""Pictures in a sample grid."""
UNLOGGED = "unlogged.json"
"""In a run folder: values of the steps that no row of metrics.jsonl holds yet, where a run was asked to stop."""
TEACHER_STEPS = 30
"""DDIM steps of a sample grid where a teacher is trained."""
USE = (
    "load_lora_weights on base_model, take the scheduler of this folder, and call with guidance_scale {:g}: "
    "unlike the exported pipeline, a plain teacher does not skip guidance by itself"
)
"""What the card of a LoRA file says."""
USE_EXPERTS = (
    "each file is an expert, by its name as adapter_name: set_adapters to the last whose start is not below the "
    "timestep that comes, before the call and in callback_on_step_end"
)
"""What the card of several says besides."""
USE_OF_EACH = "each file has its own network: {}; fuse_lora takes components={}"
"""And that of files for a base of as many experts, which switches between them by itself."""


@dataclass(frozen=True)
class Session:
    """Everything a recipe names, built."""

    recipe: Recipe
    device: torch.device
    family: Family
    method: Method
    source: Source
    batches: Batches
    engine: Engine
    ema: dict[str, EMA]
    attention: str
    share: route.Share | None = None
    shard: sharding.Kind | None = None

    @property
    def takes_part(self) -> bool:
        """Whether this process is needed where its networks are called: the main one, or all if they are split."""
        return parallel.rank() == 0 or self.shard is not None

    @property
    def shows(self) -> bool:
        """Whether it can make pictures: a VAE is in memory."""
        return "vae" not in encoders_left_out(self.recipe)

    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it the exported network holds the weights that will be exported."""
        average = self.ema.get(self.method.exported)
        return average.applied() if average else contextlib.nullcontext()

    @torch.no_grad()
    def images(self, prompts: Sequence[str], samples: Sequence[int]) -> Tensor:
        """What the exported network makes of the prompts by the trainer's own sampler: uint8 [B, 3, H, W].

        Of a video it is the middle frame. samples: numbers that key each picture's noise. Call it within
        ``weights()``.
        """
        family, network = self.family, self.method.networks[self.method.exported]
        denoiser = family.denoiser.with_network(network)
        training = network.training
        network.eval()
        cond = family.encode_prompts(prompts)
        rng = Noise(samples, self.recipe.run.seed, 0, "images", self.device)
        x_t = rng.normal(family.latent_shape)
        scale = student_guidance(self.method)
        if scale is not None:
            cond = with_guidance(cond, scale)
        if self.method.num_steps is None:
            # what takes the scale as an input is not guided by it a second time
            denoise = guided(denoiser, family.uncond(), self.recipe.run.sample_guidance if scale is None else 1.0)
            x0 = sample(denoise, denoiser.schedule, x_t, ddim_times(denoiser.schedule, TEACHER_STEPS), cond, ddim)
        else:
            times = family.student_times(self.method.num_steps)
            fresh = lambda: rng.normal(family.latent_shape)  # noqa: E731
            x0 = sample_student(denoiser, denoiser.schedule, x_t, times, cond, self.method.sampler, fresh)
        network.train(training)
        return to_uint8(still(family.decode(x0))).cpu()

    @torch.no_grad()
    def teacher_images(self, prompts: Sequence[str], samples: Sequence[int], num_steps: int, scale: float) -> Tensor:
        """What the teacher makes of them by DDIM from the same noise, guided at ``scale``: uint8 [B, 3, H, W]."""
        family, denoiser = self.family, self.family.denoiser
        x_t = Noise(samples, self.recipe.run.seed, 0, "images", self.device).normal(family.latent_shape)
        times = ddim_times(denoiser.schedule, num_steps)
        denoise = guided(denoiser, family.uncond(), scale)
        x0 = sample(denoise, denoiser.schedule, x_t, times, family.encode_prompts(prompts), ddim)
        return to_uint8(still(family.decode(x0))).cpu()


def load_teacher(
    model: Model, precision: str, device: torch.device, start: float = 1.0, without: Sequence[str] = ()
) -> tuple[Family, ModuleType]:
    """The family of ``model.path`` and its module. start: of its students; without: parts to leave out of memory.

    Raises ValueError on anything unusable.
    """
    process.import_apart("diffusers.models.attention_processor")  # which imports xformers
    autocast = None if precision == "fp32" else DTYPES[precision]
    path = recipes.locate(model.path)
    module = family_of(path, model.family)
    export.check_pipeline(path, *module.ABOUT.pipelines)
    with export.opening(path):
        rest = (without,) if without else ()
        family: Family = module.load(path, device, autocast, start, model.image_size, model.num_frames, *rest)
    fix_scale(family, model)
    return family, module


def fix_scale(family: Family, model: Model) -> None:
    """Let a teacher that takes the guidance scale as an input teach at ``model.guidance_scale``. Raises ValueError."""
    path = recipes.locate(model.path)
    if family.fix_guidance is not None:
        if model.guidance_scale is not None:
            family.fix_guidance(model.guidance_scale)
        elif family.unguided is None:
            raise ValueError(
                f"{path}: its network takes the guidance scale as an input, which methods do not give a teacher; set "
                "model.guidance_scale to the one at which it shall teach, and the method's own to 1"
            )
    elif model.guidance_scale is not None:
        raise ValueError(
            f"{path}: its network takes no guidance scale as an input, so leave out model.guidance_scale; the "
            "method's own guides it"
        )


def family_of(path: str, name: str = "") -> ModuleType:
    """The module of a family by its name; without one, of the family that a pipeline's class belongs to.

    Raises ValueError if no family has that class.
    """
    if name:
        return registry.find("family", name)
    export.check_pipeline(path)
    with export.opening(path):
        found = export.class_of(path)
    modules = [registry.find("family", known) for known in registry.names("family")]
    for module in modules:
        if found in module.ABOUT.pipelines:
            return module
    known = ", ".join(sorted(known for module in modules for known in module.ABOUT.pipelines))
    raise ValueError(f"{path}: is a {found}, which no family takes; known are {known}")


def at_own_scale(model: Model, family: Family) -> Model:
    """The model with the guidance scale that its network is given as an input, fixed or the stock call's own."""
    given = family.unguided if family.fix_guidance is not None else None
    return replace(model, guidance_scale=given if model.guidance_scale is None else model.guidance_scale)


def check_guided_once(model: Model, options: Mapping[str, Any], section: str) -> None:
    """Raise ValueError if options would guide a teacher again whose scale is fixed: the two would multiply."""
    scales = options.get("guidance", {})
    given = {
        f"{section}.guidance_scale": options.get("guidance_scale"),
        f"{section}.guidance.low": scales.get("low"),
        f"{section}.guidance.high": scales.get("high"),
    }
    for key, scale in given.items():
        if model.guidance_scale is not None and scale not in (None, 1.0):
            raise ValueError(
                f"{key} {scale:g} would guide a teacher again that is guided by model.guidance_scale "
                f"{model.guidance_scale:g} already; set {key}=1"
            )


def build(recipe: Recipe, device: torch.device | None = None) -> Session:
    """Load the teacher, make the method's networks, open the data. Raises ValueError on anything unusable."""
    device = device or parallel.device()
    if device.type == "cpu":
        process.keep_freed_memory()
    run, model = recipe.run, recipe.model
    if run.keep_best:
        best.direction(run.keep_best, recipe.eval)
        if "vae" in encoders_left_out(recipe):
            raise ValueError("run.keep_best needs pictures, and data.decoder false leaves out the VAE; set it true")
    check_guided_once(model, recipes.encode(recipe)["method"], "method")
    if recipe.student.lora and model.guidance_scale is not None:
        raise ValueError(
            "student.lora: an adapter would fit no pipeline but this teacher's at its fixed model.guidance_scale; "
            "leave out student.lora"
        )
    shard = sharding_of(recipe)
    check_offload(recipe)
    without = encoders_left_out(recipe)
    own = (*without, "blocks") if shard and outlines(recipe) else without
    family, module = load_teacher(model, run.precision, device, recipe.student.start, own)
    check_guided_once(at_own_scale(model, family), recipes.encode(recipe)["method"], "method")
    source: Source = registry.find("source", recipe.data.name).open(recipe.data.options, family.image_size)
    if isinstance(source, PairSource):
        source.check(registry.name_of(module), family)  # while the teacher's network is as it was loaded
    if isinstance(source, Cached):
        named = source.settings.of
        of = recipes.choose("source", "source", named, recipe.where, "data.of") if named else None
        made_of = described(of.name, of.options) if of else None
        source.check(registry.name_of(module), family, recipes.locate(model.path), made_of)
        family = source.applied(family)
    share = route.shared(source, family, recipe.student.route) if recipe.student.route else None
    if recipe.student.init:
        family = started_from(family, module, recipe.student.init, device, without)
    family, method, used = method_of(recipe, family, device)
    path_times = method.path_times if isinstance(method, NeedsPairs) else None
    if isinstance(method, NeedsPairs) and isinstance(source, PairSource):
        source.check_guidance(method.pairs_guidance_scale)
    place = share.place if share else int
    batches = Batches(source, family, method.needs_images, run.cache_latents, path_times, place)
    if shard:
        split(method, family, shard, device)
    ema_of = {method.exported: EMA(method.networks[method.exported], run.ema)} if run.ema else {}
    try:
        engine = Engine(
            method,
            batches,
            recipe.optim,
            batch_size=run.batch_size,
            steps=run.steps,
            seed=run.seed,
            accumulate=run.accumulate,
            fp16=run.precision == "fp16",
            device=device,
        )
    except ValueError as error:  # its optim: does not fit the method; the engine knows no config
        raise ValueError(f"{recipe.where}: {error}" if recipe.where else str(error)) from error
    if run.offload and (move := offload.way(device)):
        engine.offload = offload.of(method, family.denoiser.network, engine.optimizers, move)
    return Session(recipe, device, family, method, source, batches, engine, ema_of, used, share, shard)


def sharding_of(recipe: Recipe) -> sharding.Kind | None:
    """How the networks are to be split over the processes. Raises ValueError if the recipe has what cannot be."""
    kind = sharding.chosen(recipe.run.shard)
    names = [optim.name for optim in recipe.optim.values()]
    unfit = next((n for n in names if not optimizers.KINDS[n].is_torch or n in optimizers.OF_MATRICES), "")
    refused = {
        "student.lora": recipe.student.lora is not None,
        "model.compile": recipe.model.compile,
        "run.offload": recipe.run.offload,
        "run.precision: fp16": recipe.run.precision == "fp16",
        f"model.dtype: {recipe.model.dtype}": recipe.model.dtype != "fp32",
        f"the optimizer {unfit}": bool(unfit),
    }
    for what, is_so in refused.items():
        if kind and is_so:
            raise ValueError(
                f"{recipe.where}: networks that are split over processes ({kind}) do not go with {what}; leave it "
                "out, or set run.shard=none"
            )
    return kind


def check_offload(recipe: Recipe) -> None:
    """Raise ValueError if the recipe asks for run.offload and has what does not go with it."""
    if not recipe.run.offload:
        return
    if recipe.model.compile:
        raise ValueError("run.offload moves weights by hooks, which model.compile does not see; leave out one of them")
    for role, optim in recipe.optim.items():
        if not optimizers.KINDS[optim.name].is_torch:
            raise ValueError(
                f"run.offload moves the states of torch's own optimizers, and optim.{role}.name is {optim.name!r}; "
                "choose adamw, or set run.offload=false"
            )


def outlines(recipe: Recipe) -> bool:
    """Whether its networks may be without weights until they are split: nothing reads these before."""
    return not recipe.student.init and recipe.data.name != "pairs"


def split(method: Method, family: Family, kind: sharding.Kind, device: torch.device) -> None:
    """Split all networks over the processes, also the teacher's where no role has it.

    Raises ValueError for networks of several experts.
    """
    networks = {**method.networks, "teacher": family.denoiser.network}
    for role, network in networks.items():
        if isinstance(network, nn.ModuleList):
            raise ValueError(
                f"{role}: of several experts each process would call its own, and wait for the others for ever; set "
                "run.shard=none"
            )
    sharding.shard([*method.networks.values(), family.denoiser.network], kind, device)


def method_of(recipe: Recipe, family: Family, device: torch.device) -> tuple[Family, Method, str]:
    """The method on a family, whose students may become adapters, and its attention. Raises ValueError."""
    model = recipe.model
    if recipe.student.lora:
        family = lora.adapted(family, recipe.student.lora, recipe.student.share_backbone)
    torch.manual_seed(recipe.run.seed)  # what a method initialises at random, before rank 0's weights go to all
    method: Method = registry.find("method", recipe.method.name).Method(
        recipe.method.options, family, recipe.student.steps
    )
    if method.num_steps is not None:  # a student that no pipeline can be made of is better known before the training
        family.pipeline(lora.plain(members(family.denoiser.network)[0]), method.num_steps, method.sampler)
    for network in method.networks.values():
        sharding.move(network, device)
    if recipe.student.lora and not adapters_of(method):
        raise ValueError(
            f"student.lora: method {recipe.method.name!r} trains {method.exported!r} without adapters; leave it out"
        )
    # what a method adds, a discriminator, is of another class
    kind: Any = type(lora.plain(members(family.denoiser.network)[0]))
    if recipe.student.route and (method.num_steps is None or len(members(method.networks[method.exported])) > 1):
        raise ValueError(
            f"student.route: method {recipe.method.name!r} makes no few-step student of one network; leave it out"
        )
    networks = [network for role in method.networks.values() for network in members(role)]
    denoisers: list[Any] = [n for n in networks if isinstance(lora.plain(n), kind)]
    autocast = family.denoiser.autocast
    used = attention.set_attention([lora.plain(n) for n in denoisers], model.attention, device, autocast)
    if used == "flex" and not model.compile:
        log.warning(
            "model.attention flex is one kernel only where it is compiled, and 20 times as slow elsewhere; set "
            "model.compile true, or take sdpa"
        )
    exact = sorted({p.role for phase in method.phases for p in phase.passes if p.mode == "jvp"})
    if exact and used != "eager":
        mine = [lora.plain(n) for role in exact for n in members(method.networks[role])]
        other = attention.for_derivatives(mine, used)
        log.info("attention %s: exact derivatives of %s take math, its other calls %s", used, ", ".join(exact), other)
    if model.dtype != "fp32":
        family = held_lower(recipe, family, method, denoisers)
    if model.gradient_checkpointing and not getattr(kind, "_supports_gradient_checkpointing", False):
        raise ValueError(f"model.gradient_checkpointing: Diffusers' {kind.__name__} has no such switch; leave it out")
    for network in denoisers if model.gradient_checkpointing else ():
        network.enable_gradient_checkpointing()
    if model.compile and recipe.student.share_backbone:
        raise ValueError(
            "model.compile would compile anew at each switch of adapters; leave out student.share_backbone"
        )
    if model.compile:
        for network in denoisers:
            lora.plain(network).compile()
    return family, method, used


def held_lower(recipe: Recipe, family: Family, method: Method, networks: Sequence[nn.Module]) -> Family:
    """Hold what no phase changes in ``model.dtype``, adapters' base too; the family, whose ``whole`` takes that back.

    Raises ValueError where that would change what is computed.
    """
    model, run = recipe.model, recipe.run
    if model.dtype != run.precision:
        raise ValueError(
            f"model.dtype {model.dtype} needs run.precision {model.dtype}: networks are held in what they compute in"
        )
    changed = {role for phase in method.phases for role in (*phase.trains, *phase.moves)}
    kept = [n for role in changed for n in members(method.networks[role])]
    frozen = [*networks, *members(family.denoiser.network)]
    saved = precision.lower(frozen, kept, DTYPES[model.dtype])
    for p in [p for phase in method.phases for p in phase.passes if p.mode in ("jvp", "finite_differences")]:
        if any(precision.lowered(n) for n in members(method.networks[p.role])):
            raise ValueError(
                f"model.dtype {model.dtype}: derivatives of {p.role} are computed in float32; set model.dtype fp32"
            )
    log.info("frozen weights in %s take %.1f MB less", model.dtype, saved / 1e6)
    whole, exported = family.whole, members(method.networks[method.exported])

    def source() -> list[Mapping[str, Tensor]]:
        path = recipes.locate(recipe.student.init or model.path)
        with export.opening(path):
            loaded = family_of(path, model.family).load(path, torch.device("cpu"), without=("text", "vae"))
        return [n.state_dict() for n in members(loaded.denoiser.network)]

    def restored(family: Family) -> Family:
        if count := precision.restore(exported, source):
            log.warning("%d frozen weights are exported as rounded to %s", count, model.dtype)
        return whole(family)

    return replace(family, whole=restored)


def encoders_left_out(recipe: Recipe) -> tuple[str, ...]:
    """The parts of the pipeline that training does without, since its data are encoded."""
    options = recipe.data.options
    if not isinstance(options, CachedData):
        return ()
    return ("text",) if options.decoder else ("text", "vae")


def started_from(
    family: Family, module: ModuleType, path: str, device: torch.device, without: Sequence[str] = ()
) -> Family:
    """The family whose students start from the network of another pipeline. Raises ValueError if it does not fit."""
    place = recipes.locate(path)
    export.check_pipeline(place, *module.ABOUT.pipelines)
    with export.opening(place):
        left_out = {"without": without} if without else {}
        weights = module.load(place, device, **left_out).denoiser.network.state_dict()

    def student(embed_guidance: bool = False) -> nn.Module:
        network = family.student(embed_guidance)
        own = network.state_dict()
        differing = sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape)
        missing = sorted(own.keys() - weights.keys() - {k for k in own if not own[k].any()})
        if differing or missing or weights.keys() - own.keys():
            wrong = (differing or missing or sorted(weights.keys() - own.keys()))[0]
            raise ValueError(f"student.init {path}: its network is not the teacher's shape at {wrong!r}")
        zero = {k for k, p in network.named_parameters() if not p.requires_grad and not p.any()}
        for name in sorted(k for k in zero & weights.keys() if weights[k].any()):
            raise ValueError(
                f"student.init {path}: its network takes the guidance scale as an input ({name}), which this student "
                "does not; choose another, or a method with guidance.embed"
            )
        network.load_state_dict(weights, strict=False)
        return network

    return replace(family, student=student)


Quick = Callable[[Session], dict[str, float]]
"""Judges the exported network on a few of its images, for curves over training."""


def train(recipe: Recipe, resume: str = "auto", quick: Quick | None = None) -> Path:
    """Run a recipe and return its run folder, which then holds ``pipeline/``.

    quick: called every ``eval.every`` steps, within ``session.weights()``.

    resume: "auto" goes on from the newest checkpoint of the run folder if there is one, "never" refuses to touch a
    folder with checkpoints, a path names the checkpoint. Raises ValueError, CheckpointError, NonFiniteLoss or
    Unhealthy; ProcessGone if another process of it has ended; Interrupted if SIGTERM, SIGINT or ``run.max_hours`` ask
    it to stop.
    """
    run = Path(recipe.run.out)
    with interrupt.watched(recipe.run.max_hours) as watch, going_on(run, watch):
        return _train(recipe, resume, quick, watch)


@contextlib.contextmanager
def going_on(run: Path, watch: Watch) -> Iterator[None]:
    """Within it a request to stop, and the end of another process, become a line that says how to go on."""
    try:
        yield
    except Interrupted:
        raise Interrupted(f"{run}: ended by {watch.reason}; {newest_of(run)}") from None
    except Exception as error:
        if not interrupt.of_another(error):
            raise
        raise ProcessGone(
            f"{run}: another process of this training has gone, see what it said; {newest_of(run)}"
        ) from error


def newest_of(run: Path) -> str:
    """What a run that ends before its time leaves, and what the same command does with it."""
    found = checkpoint.all_checkpoints(run)
    if not found:
        return "there is no checkpoint yet, and the same command begins anew"
    return f"{found[-1].name} is whole, and the same command goes on from it"


def _train(recipe: Recipe, resume: str, quick: Quick | None, watch: Watch) -> Path:
    run = Path(recipe.run.out)
    if recipe.run.keep_best:
        best.direction(recipe.run.keep_best, recipe.eval if quick else {})
    found = checkpoint.all_checkpoints(run)
    if resume == "never" and found:
        raise CheckpointError(f"{run}: holds {found[-1].name} of an earlier run; use another run.out or --resume auto")
    newest = Path(resume) if resume not in ("auto", "never") else (found[-1] if found else None)
    if newest is not None:
        checkpoint.read_state(newest)
        here = [p.resolve() for p in found]
        later = found[here.index(newest.resolve()) + 1 :] if newest.resolve() in here else []
        if later:  # "auto" would go on from it next time, and so leave this branch
            raise CheckpointError(
                f"{run}: holds {later[-1].name}, which is newer than {newest.name}; move it away, or set another "
                "run.out"
            )
    session = build(recipe)
    if newest and session.share:
        route.check(run, session.share)
    run.mkdir(parents=True, exist_ok=True)
    tree = recipes.encode(recipe)
    with logging_to(run / "train.log"):
        steps_done = checkpoint.load(newest, session.engine, session.ema) if newest else 0
        if parallel.rank() == 0:
            clear(run)
            with writing(run):
                checkpoint.write_text(run / "config.yaml", yaml.safe_dump(tree, sort_keys=False))
                if session.share:
                    route.record(run, session.share)
        parallel.barrier()
        if isinstance(session.source, Skips):
            session.source.skipped.keep(run / SKIPPED)
        log.info("%s: %s on %s, attention %s", run, recipe.method.name, session.device, session.attention)
        if session.shard:
            log.info("networks are split over %d processes (%s)", parallel.size(), session.shard)
        if newest:
            log.info("resuming from %s", newest)
        kept = _loop(session, run, steps_done, tree, quick, watch)
        with parallel.waiting():
            if parallel.rank() == 0:
                with writing(run / "pipeline"), parallel.alone():
                    finish(whole(session, run), run, kept)
    return run


def whole(session: Session, run: Path) -> Session:
    """The session, of networks that are split over processes anew on the CPU, with the newest checkpoint's weights.

    To be called in ``parallel.alone()``.
    """
    if not session.shard:
        return session
    made = build(session.recipe, torch.device("cpu"))
    checkpoint.load(checkpoint.all_checkpoints(run)[-1], made.engine, made.ema, goes_on=False)
    return made


def finish(session: Session, run: Path, kept: best.Best | None) -> None:
    """Export the student of the last step, or of the best if the recipe says so, and say which step that is."""
    folder, settings, step = run / "pipeline", session.recipe.run, session.recipe.run.steps
    if kept is None:
        export_run(session, folder)
        if settings.export == "best":
            log.warning("no quick evaluation gave a finite %s; %s holds the last step", settings.keep_best, folder)
        return
    if settings.export == "best":
        step = checkpoint.load(best.find(run)[1], session.engine, session.ema, goes_on=False)
        export_run(session, folder, replace(publish.PIPELINE, steps_done=step))
    else:
        export_run(session, folder)
    rest = "" if step == kept.step else f", the last; `fastgen export {run} --checkpoint best` writes the best"
    log.info("best %s %.4g at step %d; %s holds step %d%s", kept.metric, kept.value, kept.step, folder, step, rest)


def clear(run: Path) -> None:
    """Remove what a killed run left half-written; a folder that was just being replaced gets its name back."""
    for leftover in [*run.glob(".*.partial-*"), *(run / "samples").glob(".*.png")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    for old in run.glob(".*.old-*"):
        name = old.name[1:].rpartition(".old-")[0]
        if (run / name).exists():
            shutil.rmtree(old)
        else:
            old.rename(run / name)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it a failure to write, whichever library met it, is an OSError that says where and what would do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(
            f"{path}: cannot be written ({reason}); what was written before is whole: make room, then give the "
            "same command to go on from the newest checkpoint"
        ) from error


def _loop(
    session: Session, run: Path, steps_done: int, tree: dict[str, Any], quick: Quick | None, watch: Watch
) -> best.Best | None:
    """Train from ``steps_done`` to the end; the best checkpoint, if one is kept and this is the main process."""
    recipe, engine, main = session.recipe, session.engine, parallel.rank() == 0
    settings = recipe.run
    trackers = tracking.trackers(settings.trackers, run, steps_done, tree)
    earlier = tracking.read(run / "metrics.jsonl")
    prompts = sample_prompts(session)
    if not session.shows:
        log.info("no sample grids and no quick evaluations: data.decoder is false, so that there is no VAE")
    every = int(recipe.eval.get("every", 0)) if quick and session.shows else 0
    checks = (every or health.ALONE) if recipe.health.every is None else recipe.health.every
    monitor = health.Monitor(recipe.health, settings.steps, earlier)
    keeps = settings.keep_best if main and every else ""
    keeper = best.Keeper(run, keeps, best.direction(keeps, recipe.eval) if keeps else "low", earlier, steps_done)
    spent, peak = (max((row.get(name, 0.0) for row in earlier), default=0.0) for name in tracking.MEASURED[1:])
    samples_per_step = engine.batch_size * engine.accumulate * parallel.size()
    rest = unlogged(run, steps_done)
    since, first, recent = spent, steps_done - rest.steps, rest.logs
    spent += rest.seconds
    with tracking.closing(trackers), progress(settings.steps, steps_done) as advance, watch.stepping():
        for step, logs, seconds in timed(engine.run(range(steps_done, settings.steps))):
            done, spent = step + 1, spent + seconds
            for average in session.ema.values():
                average.update()
            for name, value in logs.items():
                recent.setdefault(name, []).append(value)
            values: dict[str, float] = {}
            judged = bool(every) and (done % every == 0 or done == settings.steps)
            checked = bool(checks) and done % checks == 0
            is_best, warnings, saves, ends = None, list[str](), False, False
            if quick and judged and session.takes_part:
                with session.weights():
                    values |= quick(session)
                is_best = keeper.better_one(done, values)
            if checked and session.takes_part:
                values |= check(session, run, step)
                warnings = told(session, monitor.observe(done, values), done)
            if judged or checked:
                saves, ends = agreed(session.device, is_best is not None, bool(warnings) and recipe.health.stop)
            asked = watch.asked()
            checkpoint_due = done % settings.checkpoint_every == 0 or done == settings.steps or saves or ends
            # also before a checkpoint, so that a resumed run averages over the same steps as an unbroken one
            if done % settings.log_every == 0 or checkpoint_due:
                values |= {name: sum(v) / len(v) for name, v in recent.items()}
                values |= {
                    "seconds_per_step": (spent - since) / (done - first),
                    "train_seconds": spent,
                    "images_seen": done * samples_per_step,
                    "peak_memory_mb": max(peak, process.peak_memory(session.device) / 1e6),
                }
                recent.clear()
                since, first = spent, done
            if values:
                with writing(run / "metrics.jsonl"):
                    for tracker in trackers:
                        tracker.log(done, values)
                log.debug("step %d %s", done, " ".join(f"{k} {v:.4g}" for k, v in values.items()))
            due = settings.sample_every and done % settings.sample_every == 0
            if (due or done == settings.steps) and session.shows and session.takes_part:
                grid = run / "samples" / f"step_{done:06d}.png"
                with session.weights(), writing(grid):
                    images = session.images(prompts, range(len(prompts)))
                    if main:
                        write_grid(images, grid)
                for tracker in trackers:
                    tracker.picture(done, grid)
            if checkpoint_due or asked:
                with writing(run / f"checkpoint-{done}"):
                    if recent and main:  # a checkpoint of its own time: the row to come is still an unbroken run's
                        keep_unlogged(run, Unlogged(done, recent, spent - since, done - first))
                    checkpoint.save(run, done, engine, session.ema, settings.keep, keeper.spared)
                    if not recent and main:
                        (run / UNLOGGED).unlink(missing_ok=True)
                    if is_best:
                        keeper.mark(is_best, settings.keep)
            advance(logs)
            if ends:
                raise health.Unhealthy(
                    f"{run}: ended at step {done}, since {' and '.join(warnings) or 'the main process says so'}; "
                    f"checkpoint-{done} is whole, and the same command goes on from it"
                )
            if asked:
                raise Interrupted(watch.reason)
    return keeper.best


@dataclass(frozen=True)
class Unlogged:
    """Of a run that was asked to stop between two rows of metrics.jsonl: what the next one is made of.

    Attributes:
        step: steps done.
        logs: the values of each step since the last row, by name.
        seconds: those that the steps took.
        steps: their number.
    """

    step: int
    logs: dict[str, list[float]]
    seconds: float = 0.0
    steps: int = 0


def keep_unlogged(run: Path, rest: Unlogged) -> None:
    """Keep it beside the checkpoint of its step; digits as many as the numbers have."""
    checkpoint.write_text(run / UNLOGGED, json.dumps(asdict(rest)) + "\n")


def unlogged(run: Path, step: int) -> Unlogged:
    """What was kept at this step; nothing if that was at another one."""
    try:
        found: Any = from_json((run / UNLOGGED).read_text(encoding="utf-8"))
        logs = {str(name): [float(value) for value in values] for name, values in found["logs"].items()}
        rest = Unlogged(int(found["step"]), logs, float(found["seconds"]), int(found["steps"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Unlogged(step, {})
    return rest if rest.step == step else Unlogged(step, {})


def check(session: Session, run: Path, step: int) -> dict[str, float]:
    """What the health check after a step measures; the numbers of the teacher's images are kept in the run folder."""
    recipe, settings, found = session.recipe, session.recipe.health, dict[str, float]()
    if session.shows and session.method.num_steps is not None:  # else it samples as its teacher does, and as slowly
        prompts = list(dict.fromkeys(sample_prompts(session)))[: settings.prompts]
        scale = teacher_scale(session)
        made_of = {
            "teacher": config.encode(recipe.model),
            "prompts": prompts,
            "seeds": settings.seeds,
            "seed": recipe.run.seed,
            "num_steps": settings.teacher_steps,
            "guidance_scale": scale,
        }
        seeds = [range(i * settings.seeds, (i + 1) * settings.seeds) for i in range(len(prompts))]
        each = [([prompt] * settings.seeds, samples) for prompt, samples in zip(prompts, seeds, strict=True)]
        teacher = health.known_look(run / health.FILE, made_of)
        if not agreed(session.device, teacher is not None)[0] if session.shard else teacher is None:
            teacher = health.look(session.teacher_images(*rows, settings.teacher_steps, scale) for rows in each)
            if parallel.rank() == 0:
                with writing(run / health.FILE):
                    health.keep_look(run / health.FILE, made_of, teacher)
        with health.untouched(session.engine), session.weights():
            student = health.look(session.images(*rows) for rows in each)
        if teacher is not None:  # else this process only lent its part of the networks
            found |= health.against(student, teacher)
    # a compiled network keeps no graph for a second gradient and skips new hooks; a split one frees its weights
    if not (recipe.model.compile or session.shard):
        found |= health.of_losses(session.engine, step)
    # with the digits that metrics.jsonl keeps, so that a resumed run judges the same numbers
    return {f"{health.PREFIX}{name}": float(f"{value:.7g}") for name, value in found.items()}


def teacher_scale(session: Session) -> float:
    """The guidance scale of the teacher that the student learns to be: its pairs', the method's, or what it embeds."""
    options = recipes.encode(session.recipe)["method"]
    if isinstance(session.source, Pairs):
        return session.source.card.guidance_scale
    if scales := options.get("guidance"):
        return float(scales["default"] if scales["embed"] else (scales["low"] + scales["high"]) / 2)
    return float(options.get("guidance_scale", 1.0))


def told(session: Session, onsets: Sequence[health.Onset], step: int) -> list[str]:
    """Log a warning for each onset, in words that fit the method's options; the words."""
    tree, rates = recipes.encode(session.recipe), {role: optim.lr for role, optim in session.recipe.optim.items()}
    texts = [health.words(onset, tree["method"], rates) for onset in onsets]
    for text in texts:
        log.warning("step %d: %s", step, text)
    return texts


def agreed(device: torch.device, *answers: bool) -> list[bool]:
    """The main process's answers, in every process."""
    mine = torch.tensor([float(answer and parallel.rank() == 0) for answer in answers], device=device)
    return [bool(answer) for answer in parallel.sum_over_processes(mine).tolist()]


def timed(steps: Iterator[tuple[int, Logs]]) -> Iterator[tuple[int, Logs, float]]:
    """Each step with the seconds that it took, without what the caller does between two of them."""
    while True:
        began = time.monotonic()
        try:
            step, logs = next(steps)
        except StopIteration:
            return
        yield step, logs, time.monotonic() - began


def sample_prompts(session: Session) -> list[str]:
    """The prompts of the sample grid: the recipe's, or the data's first distinct ones."""
    chosen = session.recipe.run.sample_prompts
    if not chosen:
        place = session.share.place if session.share else int
        items = (session.source.item(place(i)).prompt for i in range(4 * GRID))
        chosen = list(dict.fromkeys(items))[:GRID]
    return [chosen[i % len(chosen)] for i in range(GRID)]


def export_run(session: Session, folder: Path, wanted: Wanted = publish.PIPELINE) -> None:
    """Write the exported network in the form that is wanted, through the gate, with its model card.

    Beside a pipeline goes an adapter alone, if the network is one. Raises ValueError if it has not that form.
    """
    if session.shard:
        raise ValueError(f"{folder}: no process has the whole network; export with one: `fastgen export`")
    session = replace(session, family=session.family.whole(session.family))
    recipe, method = session.recipe, session.method
    card, network = settings_of(session), method.networks[method.exported]
    network.eval()
    adapted = bool(adapters_of(method) and session.family.component)
    if wanted.form == "lora" and not adapted:
        raise ValueError(f"{recipe.model.path}: its pipeline takes no LoRA files; export the student as a pipeline")
    with session.weights():
        if wanted.form == "lora":
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.partial-") as partial:
                alone = replace(wanted, form="pipeline")
                export_network(session, Path(partial) / "pipeline", card, alone, export.nothing_more)
                export_adapter(session, Path(partial) / "pipeline", folder, card, wanted)
            return
        finish = functools.partial(describe, session, folder, card, wanted)
        export_network(session, folder, card, wanted, finish)
        if wanted.form == "pipeline" and adapted:
            beside = folder.with_name("lora" if folder.name == "pipeline" else f"{folder.name}-lora")
            export_adapter(session, folder, beside, card, wanted)


def settings_of(session: Session) -> dict[str, Any]:
    """What ``fastgen.json`` says of the student: whose it is and how it is called."""
    recipe, method = session.recipe, session.method
    card: dict[str, Any] = {"method": recipe.method.name, "base_model": recipe.model.path}
    if method.num_steps is not None:
        card |= {
            "num_inference_steps": method.num_steps,
            "guidance_scale": 1.0 if session.family.unguided is None else session.family.unguided,
            "times": session.family.student_times(method.num_steps),
        }
        if told := session.family.told(method.num_steps):
            card["call"] = dict(told)
    network = method.networks[method.exported]
    if isinstance(network, Students):
        card["students"] = len(network)
    elif recipe.student.route:
        card["route"] = config.encode(recipe.student.route)
    scale = student_guidance(method)
    if scale is not None:
        card["guidance_scale"] = scale
    if recipe.model.image_size is not None:
        card |= dict(zip(("height", "width"), recipe.model.image_size, strict=True))
    if recipe.model.num_frames:
        card["num_frames"] = recipe.model.num_frames
    return card


def export_network(
    session: Session, folder: Path, card: dict[str, Any], wanted: Wanted, finish: export.Finish
) -> None:
    """Write the exported network as a pipeline, or alone; card: its settings."""
    recipe, method = session.recipe, session.method
    given: dict[str, Any] = {
        "prompts": sample_prompts(session)[: max(2, len(members(method.networks[method.exported])))],
        "card": card,
        "dtype": DTYPES[recipe.run.save_dtype],
        "sampler": method.sampler,
        "guidance_scale": student_guidance(method),
        "variant": wanted.variant,
        "finish": finish,
    }
    what = session.family, method.networks[method.exported], method.num_steps, folder
    if wanted.form == "component":
        difference = export.export_component(*what, recipes.locate(recipe.model.path), **given)
    else:
        difference = export.export(*what, **given)
    log.info("exported %s; reloaded by Diffusers it differs from the trainer's sampler by %.1e", folder, difference)


def export_adapter(session: Session, pipeline: Path, folder: Path, card: dict[str, Any], wanted: Wanted) -> None:
    """Write the adapter alone, or each expert's, of an exported ``pipeline``; card: that one's settings."""
    recipe, method, family = session.recipe, session.method, session.family
    base = recipe.student.init or recipe.model.path
    stock = student_guidance(method) is None
    adapters, network = adapters_of(method), method.networks[method.exported]
    starts = network.starts if isinstance(network, Experts) and not family.experts else []
    card = card | {"base_model": base, "lora": {"rank": adapters[0].lora.rank, "scale": 1.0}}
    if len(starts) > 1:
        card["lora"] |= {"starts": starts}
    if stock:
        unguided = 1.0 if family.unguided is None else family.unguided
        card |= {"guidance_scale": unguided, "use": USE.format(unguided)}
        if family.experts:
            files = export.adapter_files(family, len(adapters)).items()
            told = [" with ".join([name, *(f"{key}={value}" for key, value in more.items())]) for name, more in files]
            card["use"] = f"{USE_OF_EACH.format(', '.join(told), [*family.experts])}; {card['use']}"
        elif len(adapters) > 1:
            card["use"] = f"{USE_EXPERTS}; {card['use']}"
    else:
        card |= {"use": "fastgen.lora.loaded: stock pipelines of base_model have no place for its guidance scale"}
    difference = export.export_adapter(
        family,
        functools.partial(export.from_pretrained, pipeline),
        [lora.weights(adapter, family.component) for adapter in adapters],
        recipes.locate(base) if stock else None,
        folder,
        num_steps=method.num_steps,
        prompts=sample_prompts(session)[:2],
        card=card,
        dtype=DTYPES[recipe.run.save_dtype],
        starts=starts,
        finish=functools.partial(describe, session, folder, card, replace(wanted, form="lora")),
    )
    log.info("exported %s; on its base it differs from the pipeline by %.1e", folder, difference)


def describe(
    session: Session,
    target: Path,
    card: Mapping[str, Any],
    wanted: Wanted,
    folder: Path,
    made: Any,
    opened: export.Opened,
) -> None:
    """Write the model card into ``folder``, which is to become ``target``, and the sample grid beside it."""
    recipe, method, family = session.recipe, session.method, session.family
    steps = recipe.run.steps if wanted.steps_done is None else wanted.steps_done
    students = card.get("students", 1)
    prompts = sample_prompts(session)
    grid = Path(recipe.run.out) / "samples" / f"step_{steps:06d}.png"
    if grid.is_file():
        shutil.copyfile(grid, folder / publish.GRID)
    else:
        write_grid(session.images(prompts, range(len(prompts))), folder / publish.GRID)
    bases = publish.bases_of(recipe, wanted.licence)
    call = publish.call_of(
        made,
        card,
        next((prompt for prompt in prompts if prompt), ""),
        wanted.repo or f"path/to/{target.name}",
        global_noise=family.step_noise == "global" and method.sampler == "renoise" and method.num_steps is not None,
        code=export.brings_code(folder),
        dtype=str(export.VARIANTS.get(wanted.variant, DTYPES[recipe.run.save_dtype])).removeprefix("torch."),
        variant=wanted.variant,
    )
    if wanted.form == "component":
        names = sorted(part.name for part in folder.iterdir() if part.is_dir() and part.name != "scheduler")
        networks = {name: type(made.components[name]).__name__ for name in names}
        settings = export.settings_beside(made, recipes.locate(recipe.model.path))
        call = replace(call, base=publish.place_of(bases[0]), networks=networks, settings=settings)
    if wanted.form == "lora":
        files = export.adapter_files(family, len(adapters_of(method)))
        call = replace(call, base=publish.place_of(bases[-1]), weights=files)
        if (len(files) > 1 and not family.experts) or student_guidance(method) is not None:
            call = replace(call, arguments={})  # no stock call does it
    about = vars(registry.find("method", recipe.method.name)).get("ABOUT")  # none in a module from elsewhere
    facts = Facts(
        name=publish.name_of(target, wanted),
        form=wanted.form,
        settings=card,
        call=call,
        bases=bases,
        method=(recipe.method.name, about.paper, about.arxiv) if about else (recipe.method.name, "", ""),
        config=recipes.encode(recipe),
        steps=steps,
        images_seen=steps * session.engine.batch_size * session.engine.accumulate * parallel.size() * students,
        trained={role: config.encode(optim) for role, optim in recipe.optim.items()},
        results=wanted.results(opened),
        grid=publish.GRID,
        prompts=prompts,
        versions=publish.versions(),
    )
    (folder / publish.README).write_text(model_card(facts), encoding="utf-8")


def adapters_of(method: Method) -> list[lora.View]:
    """The exported network as a view of its adapter, or each of its experts so; none where it is trained whole."""
    networks = members(method.networks[method.exported])
    views = [n for n in networks if isinstance(n, lora.View) and n.adapter is not None]
    return views if len(views) == len(networks) else []


def write_grid(images: Tensor, path: Path, scale: int = 4) -> None:
    """images: uint8 [N, 3, H, W] -> a near-square PNG; small images are enlarged ``scale`` times."""
    from PIL import Image

    n, _, height, width = images.shape
    columns = next(c for c in range(1, n + 1) if c * c >= n)
    rows = -(-n // columns)
    canvas = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        canvas[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    if height < 128:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    picture.save(partial, "PNG")
    partial.replace(path)


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Within it, fastgen's log also goes to ``path``, by whose lock and last line ``fastgen runs`` knows the state.

    The main process speaks for all.
    """
    if parallel.rank() != 0:
        log.disabled = True
        try:
            yield
        finally:
            log.disabled = False
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        with runs.held(path):
            yield
    except BaseException as error:
        # past the logger, whose level may be another where no command line has set it
        handler.handle(logging.LogRecord(log.name, logging.INFO, __file__, 0, runs.ending(error), None, None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
