"""The gate of exported pipelines, and how they come back by ``fastgen.load``."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

import fastgen
from fastgen import export
from fastgen.export import ExportError, check_pipeline
from fastgen.family import Family
from fastgen.pipelines import sd
from fastgen.sampling import Sampler
from tests import command, tiny

PROMPTS = ["a red apple", "a dog left of a cat"]
STEPS = 2
CARD = {"method": "dmd2", "num_inference_steps": STEPS, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def family() -> Family:
    return sd.wrap(tiny.pipeline("v_prediction"))


@pytest.fixture(scope="module")
def student(family: Family) -> nn.Module:
    """No longer its teacher."""
    return tiny.perturbed(family.student())


def write(family: Family, network: nn.Module, folder: Path, **changes: Any) -> float:
    return export.export(family, network, STEPS, folder, prompts=PROMPTS, card=CARD, **changes)


@pytest.fixture(scope="module")
def exported(family: Family, student: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    write(family, student, folder)
    return folder


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def teacher(untouched: Path, tmp_path: Path) -> Path:
    """A whole pipeline, to be broken."""
    return Path(shutil.copytree(untouched, tmp_path / "teacher"))


def latents(pipeline: Any, **call: Any) -> Tensor:
    """What a stock call gives from noise of one generator: [B, 4, 8, 8]."""
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    return pipeline(PROMPTS, generator=g, output_type="latent", **call).images


# The gate


def with_ddim(family: Family) -> Family:
    """As if the student left with its teacher's kind of scheduler."""

    def pipeline(network: nn.Module, num_steps: int | None, sampler: Sampler) -> StableDiffusionPipeline:
        made = family.pipeline(network, num_steps, sampler)
        made.scheduler = DDIMScheduler.from_config(family.pipeline(network, None).scheduler.config)
        return made

    return replace(family, pipeline=pipeline)


def with_other_weights(family: Family) -> Family:
    """As if saving lost what was learnt."""
    return replace(family, pipeline=lambda network, n, _: family.pipeline(tiny.perturbed(family.student(), 10), n))


def with_nan(family: Family) -> Family:
    def pipeline(network: nn.Module, num_steps: int | None, sampler: Sampler) -> StableDiffusionPipeline:
        spoilt = family.student()
        nn.init.constant_(spoilt.conv_out.bias, float("nan"))  # type: ignore[arg-type]
        return family.pipeline(spoilt, num_steps)

    return replace(family, pipeline=pipeline)


@pytest.mark.parametrize("wrong", [with_ddim, with_other_weights, with_nan])
@pytest.mark.parametrize("there_already", [False, True])
def test_what_differs_from_the_sampler_is_refused_and_leaves_nothing(
    family: Family, student: nn.Module, tmp_path: Path, wrong: Any, there_already: bool
) -> None:
    if there_already:
        (tmp_path / "pipeline").mkdir()
        (tmp_path / "pipeline" / "kept").write_text("an earlier export")
    with pytest.raises(
        ExportError, match=r"not exported: the reloaded pipeline differs from the trainer's .* by \S+ \("
    ):
        write(wrong(family), student, tmp_path / "pipeline")
    assert [p.name for p in tmp_path.rglob("*")] == (["pipeline", "kept"] if there_already else [])


def test_what_plain_diffusers_cannot_run_is_refused(family: Family, student: nn.Module, tmp_path: Path) -> None:
    """As a scheduler made for fewer steps than the student's."""
    wrong = replace(family, pipeline=lambda network, n, _: family.pipeline(network, 1))
    with pytest.raises(ExportError, match="not exported: the saved pipeline does not run in plain Diffusers"):
        write(wrong, student, tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_an_earlier_one(family: Family, student: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "old").write_text("")
    assert write(family, student, tmp_path / "pipeline") <= export.TOLERANCE
    assert not (tmp_path / "pipeline" / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_on_disk_alone(
    family: Family, student: nn.Module, exported: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Plain Diffusers loads float32 unless asked, so the stock call works on a CPU too; the gate runs on both."""
    from safetensors.torch import load_file

    folder = tmp_path / "pipeline"
    assert write(family, student, folder, dtype=dtype) <= export.TOLERANCE
    for file in folder.rglob("*.safetensors"):
        whole = load_file(exported / file.relative_to(folder))
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {dtype}
        assert {n: t.dtype for n, t in whole.items() if not t.is_floating_point()} == {
            n: t.dtype for n, t in load_file(file).items() if not t.is_floating_point()
        }
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    ours = latents(pipeline, num_inference_steps=STEPS)
    theirs = latents(DiffusionPipeline.from_pretrained(exported), num_inference_steps=STEPS)
    assert 0 < (ours - theirs).abs().max() <= export.HALF_TOLERANCE * theirs.abs().max()


def test_rounding_that_ruins_the_student_is_refused(family: Family, tmp_path: Path) -> None:
    """Weights beyond the range of float16 become infinite."""
    huge = family.student().eval()
    with torch.no_grad():
        huge.conv_in.weight.mul_(1e6)  # type: ignore[operator, union-attr]
    with pytest.raises(ExportError, match="differs from the trainer's sampler by nan"):
        write(family, huge, tmp_path / "pipeline", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


# load


def test_load_calls_the_student_as_it_was_trained(exported: Path) -> None:
    expected = latents(DiffusionPipeline.from_pretrained(exported), num_inference_steps=STEPS, guidance_scale=1.0)
    assert torch.equal(latents(fastgen.load(exported)), expected)
    assert torch.equal(latents(fastgen.load(str(exported))), expected)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the stock pipeline's call is given."""
    stock = inspect.signature(StableDiffusionPipeline.__call__)
    given: list[dict[str, Any]] = []

    def record(self: Any, *args: Any, **named: Any) -> None:
        given.append(stock.bind(self, *args, **named).arguments)

    record.__signature__ = stock  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", record)
    return given


@pytest.mark.parametrize(
    ("args", "named", "steps", "scale"),
    [
        ((), {}, STEPS, 1.0),
        ((), {"num_inference_steps": 1}, 1, 1.0),
        ((), {"guidance_scale": 7.5}, STEPS, 7.5),
        ((), {"num_inference_steps": 4, "guidance_scale": 3.0}, 4, 3.0),
        ((16, 16, 1), {}, 1, 1.0),  # height, width, num_inference_steps by position
    ],
)
def test_the_student_s_steps_and_guidance_are_only_defaults(
    exported: Path, calls: list[dict[str, Any]], args: Any, named: Any, steps: int, scale: float
) -> None:
    fastgen.load(exported)("a dog", *args, **named)
    assert calls[0]["prompt"] == "a dog"
    assert (calls[0]["num_inference_steps"], calls[0]["guidance_scale"]) == (steps, scale)


def test_keywords_of_from_pretrained_are_diffusers_own(exported: Path) -> None:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = fastgen.load(exported, dtype=torch.bfloat16, scheduler=scheduler)
    assert pipeline.scheduler is scheduler
    assert pipeline.unet.dtype == torch.bfloat16


def test_a_loaded_student_is_the_stock_class_and_saves_as_it(exported: Path, tmp_path: Path) -> None:
    pipeline = fastgen.load(exported)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert type(pipeline).__call__.__doc__ == StableDiffusionPipeline.__call__.__doc__
    assert StableDiffusionPipeline.__call__ is not type(pipeline).__call__
    pipeline.save_pretrained(tmp_path)
    saved = [json.loads((folder / "model_index.json").read_text()) for folder in (exported, tmp_path)]
    assert saved[0] == {name: value for name, value in saved[1].items() if name != "_name_or_path"}
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_a_pipeline_without_a_card_is_left_alone(teacher: Path) -> None:
    assert type(fastgen.load(teacher)) is StableDiffusionPipeline
    assert export.read_card(teacher) == {}


def test_a_run_folder_is_told_where_its_pipeline_is(teacher: Path) -> None:
    (teacher.parent / "run").mkdir()
    teacher.rename(teacher.parent / "run" / "pipeline")
    with pytest.raises(ValueError, match=r"run: is a run folder; its pipeline is \S+pipeline$"):
        fastgen.load(teacher.parent / "run")


# What is no pipeline


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def corrupt_index(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "Stable')


def list_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1, 2]")


def no_component(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def cut_weights(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_weights(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"not a safetensors file at all")


def another_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


BROKEN = [
    (missing, "teacher: no such pipeline folder"),
    (a_file, "teacher: no such pipeline folder"),
    (no_index, r"teacher: not a Diffusers pipeline \(no model_index.json\)"),
    (corrupt_index, r"teacher/model_index.json: not valid JSON; save the pipeline again"),
    (list_index, r"teacher/model_index.json: not the index of a pipeline"),
    (no_component, "teacher: the pipeline lacks its component 'unet'; save or download it again"),
    (cut_weights, r"teacher/unet/diffusion_pytorch_model.safetensors: damaged weights \(.+\); save or download"),
    (corrupt_weights, r"teacher/text_encoder/model.safetensors: damaged weights \(.+\); save or download"),
    (another_class, "teacher: is a FluxPipeline, this family takes a StableDiffusionPipeline; change model.family"),
]


@pytest.mark.parametrize(("harm", "message"), BROKEN)
def test_what_is_wrong_with_a_pipeline_is_said(teacher: Path, harm: Any, message: str) -> None:
    check_pipeline(teacher, *sd.ABOUT.pipelines)
    harm(teacher)
    with pytest.raises(ValueError, match=message) as error:
        check_pipeline(teacher, *sd.ABOUT.pipelines)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("harm", [missing, no_index, corrupt_index, no_component, cut_weights])
def test_load_says_so_too(teacher: Path, harm: Any) -> None:
    harm(teacher)
    with pytest.raises(ValueError, match="teacher"):
        fastgen.load(teacher)


def test_a_component_without_its_files_is_said_with_the_library_s_reason(teacher: Path) -> None:
    (teacher / "vae" / "config.json").unlink()
    check_pipeline(teacher)  # which weights and configs a component needs is its library's to know
    with pytest.raises(ValueError, match=r"teacher: cannot be opened as a pipeline \(.+\)") as error:
        fastgen.load(teacher)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["runs/emoji/nothing", "./nothing", "../nothing/x", "/nothing"])
def test_what_can_only_be_a_folder_must_be_one(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path.removeprefix('./')}: no such pipeline folder"):
        check_pipeline(path)


def test_what_may_be_on_the_hub_is_left_to_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    check_pipeline("owner/name")
    check_pipeline("name")

    def unreachable(path: Path, **_: Any) -> None:
        raise OSError("no connection to the Hub.\nSee the documentation")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"^owner/name: cannot be opened as a pipeline \(no such folder, .*no connect"
    ):
        fastgen.load("owner/name")


def test_a_component_that_the_pipeline_does_without_is_not_missed(teacher: Path) -> None:
    """Such as the safety checker, [null, null] in the index."""
    index = json.loads((teacher / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    check_pipeline(teacher)


def test_the_gate_compares_in_float32_and_leaves_settings_and_noise_as_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert torch.backends.cudnn.allow_tf32
    with export._same_noise(PROMPTS) as one:
        assert not torch.backends.cudnn.allow_tf32
        first = torch.rand(2), torch.rand(2, generator=one)
    with export._same_noise(PROMPTS) as two:
        second = torch.rand(2), torch.rand(2, generator=two)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.backends.cudnn.allow_tf32
    assert torch.equal(torch.rand(1), expected)
