"""What every family must show, on small pipelines of its real classes: teacher, training, round trip, shapes.

A family is tested by having ``tests/families/<family>.py`` with a ``CASE``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgen import export, lora, recipe, registry, train
from fastgen.denoiser import Denoise, guided
from fastgen.discriminator import Heads, features
from fastgen.experts import members
from fastgen.export import drawn
from fastgen.family import About, Family
from fastgen.lora import Lora
from fastgen.sampling import Sampler, ddim, sample
from tests import tiny

from .parts import Case

TOLERANCE = 1e-4
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"adversarial": {"weight": 0.1}},
    "lcm": {"guidance": {"embed": False}},
    "scm": {"derivative": "finite_differences", "adversarial": {"weight": 0.1}},
    "sid": {},
    "adversarial": {},
    "guidance": {"guidance": {"embed": False}},
}


UNGUIDED: dict[str, dict[str, Any]] = {
    "dmd2": {"guidance_scale": 1.0},
    "sid": {"guidance_scale": 1.0},
    **{name: {"guidance": {"low": 1.0, "high": 1.0, "embed": False}} for name in ("lcm", "scm", "guidance")},
}


def cases_of(family: str) -> dict[str, Case]:
    """By name: the family's own, or "<family>-<further one>"."""
    module = importlib.import_module(f"tests.families.{family}")
    more = vars(module).get("MORE", {})
    return {family: module.CASE, **{f"{family}-{name}": found for name, found in more.items()}}


CASES = {name: found for family in registry.names("family") for name, found in cases_of(family).items()}
FAMILIES = list(CASES)


def case(name: str) -> Case:
    return CASES[name]


def opened(name: str, image_size: tuple[int, int] | None = None, seed: int = 0) -> tuple[Any, Family]:
    """A fresh pipeline and the family of it, at the case's own size if none is given."""
    pipeline = case(name).pipeline(seed)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    size, frames = image_size or case(name).image_size, case(name).num_frames
    more = {"num_frames": frames} if frames else {}
    return pipeline, registry.find("family", name.partition("-")[0]).wrap(pipeline, image_size=size, **more)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.abs().max().item())


def called_at(scheduler: Any) -> list[float]:
    """The times on our clock at which a pipeline has just called its network."""
    flow = hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod")
    return [float(t) for t in (scheduler.sigmas[:-1] if flow else scheduler.timesteps)]


def test_every_family_has_its_case() -> None:
    found = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_")}
    assert found - {"parts"} == set(registry.names("family"))


def test_a_case_makes_the_same_pipeline_whatever_was_made_before_it() -> None:
    """Else what is saved of it is not the base of the students that are made later."""
    before = {name: weights_of(name) for name in FAMILIES}
    for name in FAMILIES:
        now = weights_of(name)
        assert now.keys() == before[name].keys()
        assert all(torch.equal(now[key], value) for key, value in before[name].items()), name


def weights_of(name: str) -> dict[str, Tensor]:
    parts = {part: made for part, made in opened(name)[0].components.items() if isinstance(made, nn.Module)}
    return {f"{part}.{key}": value for part, made in parts.items() for key, value in made.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_of_itself_holds(name: str) -> None:
    """The schedulers are compared where the students have been exported."""
    pipeline, family = opened(name)
    about = about_of(name)
    assert type(pipeline).__name__ in about.pipelines
    assert family.denoiser.kind in about.kinds
    assert about.lora == bool(family.component) or (about.lora and "-" in name)  # a variant may take none
    assert set(case(name).samplers) == set(about.schedulers)


def about_of(name: str) -> About:
    found: About = registry.find("family", name.partition("-")[0]).ABOUT
    return found


# The teacher


@pytest.mark.parametrize("guide", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_s_sampler_equals_the_stock_call(name: str, guide: bool) -> None:
    """Conditions, packing, timesteps, guidance: all of it must be right for this."""
    same_call(name, None, guide)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in FAMILIES for size in case(name).image_sizes])
def test_the_teacher_is_the_same_at_other_sizes(name: str, size: tuple[int, int]) -> None:
    same_call(name, size, True)


def same_call(name: str, size: tuple[int, int] | None, guide: bool) -> None:
    pipeline, family = opened(name, size)
    if size:
        assert family.image_size == size
    prompts, scale = list(case(name).prompts), case(name).guidance_scale if guide else 1.0
    if scale is None:
        pytest.skip("this model cannot be guided")
    off = {"guidance_scale": 1.0 if family.unguided is None else family.unguided}
    theirs = family.run(
        pipeline, prompts, 4, torch.Generator().manual_seed(5), **case(name).guiding(scale) if guide else off
    )
    times = called_at(pipeline.scheduler) if case(name).step is ddim else family.student_times(4)
    ours = sampled(name, family, guided(family.denoiser, family.uncond(), scale), times)
    close(ours, theirs)
    assert guide == bool((ours - sampled(name, family, family.denoiser, times)).abs().max() > 1e-3)


@torch.no_grad()
def sampled(name: str, family: Family, denoise: Denoise, times: list[float]) -> Tensor:
    """By our sampler, on what the stock call draws."""
    prompts, generator = list(case(name).prompts), torch.Generator().manual_seed(5)
    x_t = torch.randn(len(prompts), *family.latent_shape, generator=generator)
    cond, schedule = family.encode_prompts(prompts), family.denoiser.schedule
    return sample(
        denoise, schedule, x_t, times, cond, case(name).step, lambda: torch.randn(x_t.shape, generator=generator)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_decode_to_what_the_stock_call_shows(name: str) -> None:
    pipeline, family = opened(name)
    prompts = list(case(name).prompts)
    latents = family.run(pipeline, prompts, 2, torch.Generator().manual_seed(5))
    shown = family.run(pipeline, prompts, 2, torch.Generator().manual_seed(5), output_type="pt")
    with torch.no_grad():
        ours = (family.decode(latents) / 2 + 0.5).clamp(0, 1)
    ours = ours.movedim(1, -3)  # of a video [B, F, 3, H, W]
    close(ours, shown.reshape(ours.shape))
    assert ours.shape[-2:] == family.image_size


@pytest.mark.parametrize("name", FAMILIES)
def test_images_encode_to_latents_that_decode_alike(name: str) -> None:
    """The two scalings are each other's inverse: encoding what was decoded changes no statistic by their factor."""
    _, family = opened(name)
    pixels = torch.rand(2, 3, *family.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode(pixels)
    assert latents.shape == (2, *family.latent_shape)
    assert not latents.requires_grad
    shifted = latents.clone().requires_grad_(True)
    family.decode(shifted).sum().backward()
    assert shifted.grad is not None
    assert shifted.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_do_not_depend_on_the_batch(name: str) -> None:
    """A batch of one, several prompts at once, and one of another length give each prompt the same output."""
    _, family = opened(name)
    prompts = [*case(name).prompts, case(name).prompts[0]]
    x_t = torch.randn(3, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    t = family.denoiser.schedule.draw(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    with torch.no_grad():
        together = family.denoiser(x_t, t, family.encode_prompts(prompts)).y
        alone = [
            family.denoiser(x_t[i : i + 1], t[i : i + 1], family.encode_prompts(prompts[i : i + 1])).y
            for i in range(3)
        ]
    close(torch.cat(alone), together)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_longer_than_the_tokenizer_takes_is_cut_and_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """By a warning, or in Diffusers' log as in the stock call; a shorter prompt beside it stays what it was."""
    pipeline, family = opened(name)
    if "prompt" not in inspect.signature(type(pipeline).__call__).parameters:
        pytest.skip("its calls take no prompts")
    short = case(name).prompts[0]
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            both = family.encode_prompts([short, "a dog left of a cat and " * 150])
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    said = [str(warning.message) for warning in told] + [record.getMessage() for record in caplog.records]
    assert any("cut to" in line or "truncated" in line or "cut by" in line for line in said)
    x_t = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    t = family.denoiser.schedule.draw(torch.tensor([0.5], dtype=torch.float64))
    with torch.no_grad():
        alone = family.denoiser(x_t, t, family.encode_prompts([short])).y
        beside = family.denoiser(x_t, t, {key: value[:1] for key, value in both.items()}).y
    close(beside, alone)


# The discriminator's features


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_give_maps_that_heads_can_read(name: str) -> None:
    for size in [None, *case(name).image_sizes[:1]]:
        _, family = opened(name, size)
        x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
        t = family.denoiser.schedule.draw(torch.tensor([0.2, 0.8], dtype=torch.float64))
        cond = family.encode_prompts(list(case(name).prompts))
        maps = features(family.denoiser, [block.name for block in family.blocks], x_t, t, cond)
        for block, read in zip(family.blocks, maps, strict=True):
            assert read.shape[:2] == (2, block.channels)
            assert min(read.shape[2:]) == block.size
        heads = Heads([b.channels for b in family.blocks], [b.size for b in family.blocks])
        assert heads(maps).shape[0] == 2
        assert maps[0][0].std() > 0


# Training


Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """By a case's name, a folder of its own: its saved pipeline, and images to train on."""
    return functools.cache(lambda name: saved(name, tmp_path_factory.mktemp(name)))


def saved(name: str, folder: Path) -> Path:
    from PIL import Image

    pipeline, family = opened(name)
    pipeline.save_pretrained(folder / "base")
    (folder / "images").mkdir()
    generator, lines = np.random.default_rng(0), []
    for i, prompt in enumerate(case(name).prompts):
        pixels = generator.integers(0, 255, (*family.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "caption": prompt}))
    (folder / "images" / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("form", ["whole", "lora"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_of_training_move_the_student_alone(name: str, method: str, form: str, folders: Folders) -> None:
    session = train.build(made_for(name, method, form, folders(name)))
    before = {role: copied(network) for role, network in session.method.networks.items()}
    logs = [logs for _, logs in session.engine.run(range(2))]
    assert all(np.isfinite(value) for row in logs for value in row.values())
    trained = {role for phase in session.method.phases for role in (*phase.trains, *phase.moves)}
    for role, network in session.method.networks.items():
        learns = session.engine.parameters.get(role, {})
        now = copied(network)
        for key, value in now.items():
            moved = not torch.equal(value, before[role][key])
            assert not moved or role in trained, f"{role}.{key} moved"
            assert not moved or key in learns or role not in session.engine.parameters, f"{role}.{key} moved"
        if role in learns or role in session.engine.parameters:
            assert any(not torch.equal(now[key], before[role][key]) for key in learns), f"{role} stood still"


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in network.named_parameters()}


def made_for(name: str, method: str, form: str, folder: Path) -> recipe.Recipe:
    step = {"lr": 1e-3, "warmup": 0}
    roles = {"dmd2": ["fake_score", "discriminator"], "sid": ["fake_score"]}.get(method, [])
    roles = {"scm": ["discriminator"], "adversarial": ["discriminator"]}.get(method, roles)
    unguided = UNGUIDED if case(name).guidance_scale is None else {}
    return recipe.decode(
        {
            # the family is known by its class
            "model": {
                "path": str(folder / "base"),
                "image_size": case(name).image_size,
                "num_frames": case(name).num_frames,
            },
            "method": {"name": method, **METHODS[method], **unguided.get(method, {})},
            "student": {"steps": 1, **({"lora": {"rank": 2}} if form == "lora" else {})},
            "data": {"source": "images", "path": str(folder / "images")},
            "optim": {role: step for role in ["student", *roles]},
            "run": {"out": str(folder / "run"), "steps": 2, "batch_size": 2},
        },
        name,
    )


# Round trip

STUDENTS: list[tuple[int, Sampler]] = [(1, "renoise"), (2, "renoise"), (4, "renoise"), (2, "ddim"), (4, "ddim")]
CALL = """
import json, sys, traceback
import diffusers, numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_grad_enabled(False)
answers, sys.stdout = sys.stdout, sys.stderr


def called(job):
    pipeline = DiffusionPipeline.from_pretrained(job["folder"], torch_dtype=torch.float32)
    if job["lora"]:
        for name, told in job["files"].items():
            pipeline.load_lora_weights(job["lora"], weight_name=name, **told)
        name = json.load(open(job["lora"] + "/scheduler/scheduler_config.json"))["_class_name"]
        pipeline.scheduler = getattr(diffusers, name).from_pretrained(job["lora"] + "/scheduler")
        if job["fused"] is not None:
            pipeline.fuse_lora(**job["fused"])
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    made = pipeline(**job["call"], generator=torch.Generator().manual_seed(7))[0]
    np.save(job["out"], np.asarray(made))
    assert "fastgen" not in sys.modules


for line in sys.stdin:
    try:
        answer = called(json.loads(line))
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), file=answers, flush=True)
"""
"""A process that makes what it is asked for, a line each, and answers with what went wrong or null."""


class Recorder:
    """In a pipeline's place, it keeps the arguments of its call."""

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}

    def __call__(self, **call: Any) -> tuple[None]:
        self.call = {name: value for name, value in call.items() if name != "generator"}
        return (None,)


def images(family: Family, network: nn.Module, num_steps: int, sampler: Sampler, prompts: list[str]) -> Tensor:
    """By our sampler, on the noise of the fresh process: [B, ..., 3] in [0, 1]."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        x0 = drawn(family, network, prompts, num_steps, sampler, None, torch.Generator().manual_seed(7))
        return (family.decode(x0) / 2 + 0.5).clamp(0, 1).movedim(1, -1)


Ask = Callable[[dict[str, Any]], None]
Student = tuple[int, Sampler, str]
"""Steps, sampler, form."""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """To be asked for a pipeline's call: a process that has never heard of fastgen."""
    folder = tmp_path_factory.mktemp("process")
    (folder / "call.py").write_text(CALL)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        (folder / "told.txt").open("w") as told,
        subprocess.Popen(
            [sys.executable, "call.py"], **pipes, stderr=told, text=True, cwd=folder, env=environment
        ) as process,
    ):

        def asked(job: dict[str, Any]) -> None:
            assert process.stdin
            assert process.stdout
            print(json.dumps(job), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer == "null\n", json.loads(answer) if answer else (folder / "told.txt").read_text()[-3000:]

        yield asked


@dataclass(frozen=True)
class Trips:
    """Of each student of a family: our images, and those of the other process; the exported folder."""

    name: str
    base: Path
    made: dict[Student, tuple[Tensor, Tensor, Path]]


@pytest.fixture(scope="module", params=FAMILIES)
def trips(request: pytest.FixtureRequest, folders: Folders, ask: Ask) -> Trips:
    """A family at a time, so that one's failure is its own."""
    name, made = request.param, {}
    folder = folders(name)
    for num_steps, sampler in [student for student in STUDENTS if student[1] in case(name).samplers]:
        for form in ["whole", "lora", "fused"] if (num_steps, sampler) == (2, "renoise") else ["whole"]:
            if form == "whole" or opened(name)[1].component:
                made[num_steps, sampler, form] = trip(name, folder, num_steps, sampler, form, ask)
    return Trips(name, folder / "base", made)


def trip(
    name: str, folder: Path, num_steps: int, sampler: Sampler, form: str, ask: Ask
) -> tuple[Tensor, Tensor, Path]:
    """One student's images by our sampler, and by its pipeline; where that was exported to."""
    prompts, (_, family) = list(case(name).prompts), opened(name)
    if form != "whole":
        family = lora.adapted(family, Lora(rank=2))
    network = tiny.perturbed(family.student())
    exported = folder / f"{num_steps}-{sampler}-{form}"
    kind: dict[str, Any] = {"prompts": prompts, "card": {}}
    export.export(family, network, num_steps, exported, sampler=sampler, **kind)
    base, adapter = str(folder / "base"), ""
    files: dict[str, Any] = {}
    if form != "whole":
        adapter = f"{exported}-adapter"
        weights = [lora.weights(view, family.component) for view in members(network) if isinstance(view, lora.View)]
        kind["num_steps"] = num_steps
        opener = functools.partial(export.from_pretrained, exported)
        export.export_adapter(family, opener, weights, base, Path(adapter), **kind)
        files = export.adapter_files(family, len(weights))
    recorder = Recorder()
    unguided = 1.0 if adapter and family.unguided is None else family.unguided
    family.run(recorder, prompts, num_steps, torch.Generator(), unguided, output_type="np")
    components = {"components": [*family.experts]} if family.experts else {}
    out = f"{exported}.npy"
    ask(
        {
            "folder": base if adapter else str(exported),
            "out": out,
            "call": recorder.call,
            "lora": adapter,
            "files": files,
            "fused": components if form == "fused" else None,
        }
    )
    return images(family, network, num_steps, sampler, prompts), torch.from_numpy(np.load(out)), exported


@pytest.mark.parametrize("form", ["whole", "lora", "fused"])
@pytest.mark.parametrize(("num_steps", "sampler"), STUDENTS)
def test_a_student_is_itself_in_plain_diffusers(num_steps: int, sampler: Sampler, form: str, trips: Trips) -> None:
    """Reloaded in a process without fastgen, called with its steps on the same noise."""
    if (num_steps, sampler, form) not in trips.made:
        pytest.skip("one number of steps is enough for adapters, and some pipelines take none, or one sampler alone")
    ours, theirs, _ = trips.made[num_steps, sampler, form]
    close(ours.reshape(theirs.shape), theirs)
    assert theirs.std() > 1e-3


def test_the_exported_pipeline_has_the_teacher_s_class_and_parts(trips: Trips) -> None:
    folder = trips.made[2, "renoise", "whole"][2]
    theirs, ours = (json.loads((place / "model_index.json").read_text()) for place in (trips.base, folder))
    own = theirs.pop("_class_name")
    assert ours.pop("_class_name") == (case(trips.name).renoising_class or own)
    assert {**ours, "scheduler": None} == {**theirs, "scheduler": None, **case(trips.name).exported}
    assert (folder / "fastgen.json").is_file()
    for (_, sampler, form), (_, _, place) in trips.made.items():
        if form == "whole":
            shipped = json.loads((place / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
            assert shipped == about_of(trips.name).schedulers[sampler]
