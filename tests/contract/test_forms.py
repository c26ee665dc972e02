"""``fastgen export`` in every form, as a user calls it: files, gates, model card, and the call that the card shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen import export, lora, publish, recipe
from fastgen import train as training
from fastgen.card import Results, Value
from fastgen.config import read
from fastgen.publish import Wanted
from tests import command, tiny
from tests.command import done, fastgen
from tests.oracle import same

UNET = "unet/diffusion_pytorch_model"
HEAD = "---\nlicense: cc-by-nc-4.0\nbase_model: owner/origin\n---\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = command.world(tmp_path_factory.mktemp("world"))
    (folder / "teacher" / "README.md").write_text(HEAD)
    return folder


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A student of two steps, trained whole, with an evaluation beside it."""
    section = {
        "metrics": ["fid", "clip_score", "latency"],
        "features": "clip",
        "weights": {"clip": str(command.clip(world / "clip"))},
        "reference": {"source": "images", "path": str(world / "images")},
        "num_images": 6,
        "repeats": 1,
        "comparison": 0,
        "teacher_steps": [1],
        "student_steps": [1],
    }
    (world / "eval.yaml").write_text(yaml.safe_dump({"eval": section}))
    (world / "two.yaml").write_text(f"base: [{world / 'run.yaml'}, eval.yaml]\n")
    done("train", world / "two.yaml", f"run.out={world / 'two'}", "student.steps=2")
    done("evaluate", world / "two")
    return world / "two"


@pytest.fixture(scope="module")
def adapters(world: Path) -> Path:
    out = world / "adapters"
    done("train", world / "run.yaml", f"run.out={out}", "student.steps=2", "student.lora={rank: 2}", "run.steps=2")
    return out


def latents(pipeline: Any, **call: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"} | call
    return pipeline(tiny.PROMPTS[:2], generator=torch.Generator().manual_seed(3), **given).images  # type: ignore[no-any-return]


def close(one: Tensor, two: Tensor, tolerance: float = export.TOLERANCE) -> None:
    assert (one.float() - two.float()).abs().max() <= tolerance * two.float().abs().max()


def shown(folder: Path, world: Path, half: bool = False) -> Any:
    """The image that the card's own call makes. half: its float16 is put back to what this machine computes in."""
    card = ModelCard((folder / "README.md").read_text())
    code = card.text.partition("```python\n")[2].partition("\n```")[0]
    code = code.replace(f"path/to/{folder.name}", str(folder)).replace("path/to/teacher", str(world / "teacher"))
    assert half == ("torch.float16" in code)
    found: dict[str, Any] = {}
    exec(code.replace("torch.float16", "torch.float32"), found)
    return found["image"]


# A pipeline


def test_a_trained_run_has_its_card(run: Path, world: Path) -> None:
    folder = run / "pipeline"
    card = ModelCard((folder / "README.md").read_text())
    assert (card.data.license, card.data.base_model) == ("cc-by-nc-4.0", "owner/origin")
    assert "**Warning:** the licence of teacher, cc-by-nc-4.0, forbids commercial use" in card.text
    assert "makes an image in **2 steps**" in card.text
    assert "| Steps | 4 |" in card.text
    assert "| Images seen | 8 |" in card.text
    assert card.data.eval_results is None, "it was written before there was an evaluation"
    assert (folder / publish.GRID).read_bytes() == (run / "samples" / "step_000004.png").read_bytes()
    assert str(world) not in card.content, "folders of this machine are not for others"
    assert shown(folder, world).size == (16, 16)


def test_an_export_after_an_evaluation_has_its_results(run: Path, tmp_path: Path) -> None:
    done("export", run, "--out", tmp_path / "pipeline")
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())}
    card = ModelCard((tmp_path / "pipeline" / "README.md").read_text())
    found = card.data.eval_results
    two = {r.metric_type: r for r in found if r.metric_args["steps"] == 2}
    one = {r.metric_type: r for r in found if r.metric_args["steps"] == 1}
    for values, name in ((two, "dmd2, 2 steps"), (one, "dmd2, 1 step")):
        assert {"fid", "clip_score", "retrieval", "seconds_per_image"} <= set(values)
        assert all(rows[name][kind] == r.metric_value for kind, r in values.items())
    fid = two["fid"]
    protocol = rows["dmd2, 2 steps"]["protocol"]
    assert (fid.dataset_type, fid.dataset_name) == ("images", "images")
    assert fid.metric_name == f"FID ({protocol['metrics']['fid']['extractor']})", "a CLIP's is not InceptionV3's"
    args = fid.metric_args
    assert (args["num_images"], args["seed"], args["dtype"], args["guidance_scale"]) == (6, 0, "fp32", 1.0)
    assert args["seeds"] == protocol["seeds"]
    assert args["extractor_sha256"] == protocol["metrics"]["fid"]["sha256"]
    assert args["reference_sha256"] == protocol["metrics"]["fid"]["reference"]["sha256"]
    assert args.get("commit") == protocol["commit"]
    assert two["retrieval"].metric_args["extractor"] == protocol["metrics"]["clip_score"]["extractor"]
    assert "| teacher, 1 step |" in card.text
    assert "6 images a row, one seed each" in card.text


def test_results_of_other_weights_stay_out(run: Path, tmp_path: Path) -> None:
    """An earlier checkpoint's student is another."""
    result = done("export", run, "--checkpoint", "2", "--out", tmp_path / "pipeline")
    assert result.out == f"{tmp_path / 'pipeline'} written from checkpoint-2\n"
    assert f"{run / 'results.json'}: is of other weights than these, and stays out of the model card" in result.err
    card = ModelCard((tmp_path / "pipeline" / "README.md").read_text())
    assert card.data.eval_results is None
    assert "| Steps | 2 |" in card.text
    grid = (tmp_path / "pipeline" / publish.GRID).read_bytes()
    assert grid == (run / "samples" / "step_000002.png").read_bytes()


def test_results_on_other_prompts_do_not_take_the_reference_s_name(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    rows = json.loads((copy / "results.json").read_text())
    for row in rows:
        row["protocol"]["prompts"] = "0" * 64
    (copy / "results.json").write_text(json.dumps(rows))
    done("export", copy)
    found = ModelCard((copy / "pipeline" / "README.md").read_text()).data.eval_results[0]
    assert (found.dataset_type, found.dataset_name) == ("unknown", f"prompts of SHA-256 {'0' * 64}")
    (copy / "results.json").write_text("[1]")
    result = fastgen("export", copy)
    assert result.code == 2
    assert "results.json: not a list of results" in result.err


def test_a_checkpoint_is_named_by_its_steps_or_its_folder(run: Path, tmp_path: Path) -> None:
    done("export", run, "--checkpoint", "2", "--out", tmp_path / "steps")
    done("export", run, "--checkpoint", run / "checkpoint-2", "--out", tmp_path / "folder")
    ours, theirs = (load_file(tmp_path / name / f"{UNET}.safetensors") for name in ("steps", "folder"))
    assert same(ours, theirs)
    result = fastgen("export", run, "--checkpoint", "3", "--out", tmp_path / "none")
    assert result.code == 2
    assert "checkpoint-3: no such checkpoint" in result.err


def test_a_grid_that_is_not_there_is_drawn(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "samples")
    done("export", copy)
    grid = (copy / "pipeline" / publish.GRID).read_bytes()
    assert grid == (run / "samples" / "step_000004.png").read_bytes()


# A variant


@pytest.fixture(scope="module")
def both(run: Path, world: Path) -> Path:
    done("export", run, "--variant", "fp16", "--out", world / "both")
    return world / "both"


def test_a_variant_stands_beside_the_float32_files_and_loads(
    both: Path, run: Path, tmp_path: Path, world: Path
) -> None:
    for file in (run / "pipeline").rglob("*.safetensors"):
        name = file.relative_to(run / "pipeline")
        whole = load_file(file)
        assert same(load_file(both / name), whole)
        half = load_file(both / name.with_name(f"{name.stem}.fp16.safetensors"))
        assert half.keys() == whole.keys()
        assert all(torch.equal(half[k], v.half() if v.is_floating_point() else v) for k, v in whole.items())
    alone = Path(shutil.copytree(both, tmp_path / "alone"))
    for file in list(alone.rglob("*.safetensors")):
        if ".fp16." not in file.name:
            file.unlink()
    pipeline = DiffusionPipeline.from_pretrained(alone, variant="fp16", dtype=torch.float16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float16
    whole_pipeline = DiffusionPipeline.from_pretrained(both)
    assert whole_pipeline.unet.dtype == torch.float32
    rounded = DiffusionPipeline.from_pretrained(alone, variant="fp16", dtype=torch.float32)
    difference = (latents(rounded) - latents(whole_pipeline)).abs().max()
    assert 0 < difference <= export.HALF_TOLERANCE * latents(whole_pipeline).abs().max()
    assert 'variant="fp16", dtype=torch.float16' in (both / "README.md").read_text()
    assert shown(both, world, half=True).size == (16, 16)


def test_a_variant_of_a_network_in_several_files_loads(run: Path, tmp_path: Path) -> None:
    whole = UNet2DConditionModel.from_pretrained(run / "pipeline", subfolder="unet")
    whole.save_pretrained(tmp_path / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    export._add_variant(tmp_path, "bf16")
    for file in [*(tmp_path / "unet").glob("*.safetensors"), tmp_path / "unet" / f"{UNET[5:]}.safetensors.index.json"]:
        if ".bf16" not in file.name:
            file.unlink()
    found = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", variant="bf16", dtype=torch.bfloat16)
    wanted = whole.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


def test_a_variant_that_rounding_ruins_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(folder: Path, variant: str) -> None:
        file = folder / f"{UNET}.safetensors"
        tensors = load_file(file)
        tensors["conv_in.weight"] *= 1e6
        save_file({k: v.half() for k, v in tensors.items()}, file.with_name(f"{file.stem}.{variant}.safetensors"))

    monkeypatch.setattr(export, "_add_variant", overflowing)
    for words in ([], ["--as", "component"]):
        result = fastgen("export", run, "--variant", "fp16", "--out", tmp_path / "out", *words)
        assert result.code == 1
        assert "not exported: the reloaded pipeline differs from the trainer's sampler by nan" in result.err
        assert list(tmp_path.iterdir()) == []


# A component


def test_a_component_goes_into_its_base(run: Path, world: Path) -> None:
    said = done("export", run, "--as", "component", "--variant", "fp16").out
    folder = run / "component"
    assert said == f"{folder} written from checkpoint-4\n"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "fastgen.json",
        "samples.png",
        "scheduler",
        "unet",
    ]
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = StableDiffusionPipeline.from_pretrained(world / "teacher", unet=unet, scheduler=scheduler)
    theirs = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert torch.equal(latents(pipeline, guidance_scale=7.5), latents(theirs, guidance_scale=7.5))
    card = export.read_card(folder)
    assert (card["num_inference_steps"], card["guidance_scale"], card["method"]) == (2, 1.0, "dmd2")
    model_card = ModelCard((folder / "README.md").read_text())
    assert model_card.data.eval_results, "the results are of this network in its base"
    assert shown(folder, world, half=True).size == (16, 16)


def test_a_component_in_half_precision(run: Path, tmp_path: Path) -> None:
    done("export", run, "--as", "component", "--dtype", "bf16", "--out", tmp_path / "half")
    assert {v.dtype for v in load_file(tmp_path / "half" / f"{UNET}.safetensors").values()} == {torch.bfloat16}
    assert "dtype=torch.bfloat16" in (tmp_path / "half" / "README.md").read_text()


def test_a_component_that_its_base_does_not_take_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "with_parts", lambda base, *_, dtype: export.from_pretrained(base, dtype=dtype))
    result = fastgen("export", run, "--as", "component", "--out", tmp_path / "out")
    assert result.code == 1
    assert "not exported: " in result.err
    assert list(tmp_path.iterdir()) == []


def test_experts_are_no_component_of_stock_pipelines(world: Path, tmp_path: Path) -> None:
    tree = read(world / "run.yaml")
    tree["method"] = {"name": "phased_dmd", "guidance_scale": 1.0}
    tree["student"] = {"steps": 2}
    tree["run"] |= {"out": str(tmp_path / "run"), "steps": 2}
    session = training.build(recipe.decode(tree, "run.yaml"))
    with pytest.raises(ValueError, match=r"the student's unet is a UNetExperts, whose code only a pipeline's folder"):
        training.export_run(session, tmp_path / "component", Wanted("component"))
    assert list(tmp_path.iterdir()) == []
    training.export_run(session, tmp_path / "experts")
    card = (tmp_path / "experts" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "brings code that Diffusers does not have" in card


# LoRA files


def test_a_lora_file_alone_is_that_beside_the_pipeline(adapters: Path, world: Path, tmp_path: Path) -> None:
    said = done("export", adapters, "--as", "lora", "--out", tmp_path / "alone").out
    assert said == f"{tmp_path / 'alone'} written from checkpoint-2\n"
    assert [p.name for p in tmp_path.iterdir()] == ["alone"], "the pipeline it was compared with is gone"
    for folder in (tmp_path / "alone", adapters / "lora"):
        assert sorted(p.name for p in folder.iterdir()) == [
            "README.md",
            "fastgen.json",
            "pytorch_lora_weights.safetensors",
            "samples.png",
            "scheduler",
        ]
        assert shown(folder, world).size == (16, 16)
        assert "The LoRA file is of rank 2" in (folder / "README.md").read_text()
        assert ModelCard((folder / "README.md").read_text()).data.to_dict()["base_model_relation"] == "adapter"
    assert same(load_file(tmp_path / "alone" / export.LORA), load_file(adapters / "lora" / export.LORA))
    assert (adapters / "pipeline" / "README.md").is_file()


def test_a_lora_file_goes_into_the_run_by_default(adapters: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapters, tmp_path / "copy"))
    for name in ("pipeline", "lora"):
        shutil.rmtree(copy / name)
    done("export", copy, "--as", "lora", "--dtype", "fp16")
    assert {v.dtype for v in load_file(copy / "lora" / export.LORA).values()} == {torch.float16}
    assert not (copy / "pipeline").exists()
    assert "dtype=torch.float16" in (copy / "lora" / "README.md").read_text()


def test_a_run_without_adapters_has_no_lora_file(run: Path, adapters: Path, tmp_path: Path) -> None:
    result = fastgen("export", run, "--as", "lora")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "trained all weights, no adapters; `fastgen extract-lora`" in result.err
    result = fastgen("export", adapters, "--as", "lora", "--variant", "fp16")
    assert "a LoRA file has no variant fp16" in result.err
    result = fastgen("export", run, "--variant", "fp16", "--dtype", "bf16")
    assert "variant fp16 stands beside weights in float32, not bf16" in result.err


def test_a_pipeline_that_takes_no_lora_files_says_so(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "adapters_of", lambda method: [])
    session = training.build(recipe.decode(read(adapters / "config.yaml") | {"student": {"steps": 2}}, "x"))
    with pytest.raises(
        ValueError, match=r"teacher: its pipeline takes no LoRA files; export the student as a pipeline"
    ):
        training.export_run(session, tmp_path / "lora", Wanted("lora"))


def test_a_lora_file_that_needs_the_guidance_scale_shows_no_stock_call(world: Path, tmp_path: Path) -> None:
    tree = read(world / "run.yaml")
    tree["method"] = {"name": "lcm", "guidance": {"embed": True}}
    tree["student"] = {"steps": 2, "lora": {"rank": 2}}
    tree["data"] = {"source": "images", "path": str(world / "images")}
    tree["optim"] = {"student": {"lr": 1e-3}}
    tree["run"] |= {"out": str(tmp_path / "run"), "steps": 2}
    session = training.build(recipe.decode(tree, "run.yaml"))
    training.export_run(session, tmp_path / "pipeline")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "```python" not in card
    assert (
        "## Use\n\nfastgen.lora.loaded: stock pipelines of base\\_model have no place for its guidance scale." in card
    )
    scale = export.read_card(tmp_path / "pipeline")["guidance_scale"]
    assert f"guidance_scale={scale}" in (tmp_path / "pipeline" / "README.md").read_text()
    assert lora.View.__name__ == type(session.method.networks["student"]).__name__


# The whole card


def test_a_licence_that_is_given_is_the_card_s(world: Path, run: Path, tmp_path: Path) -> None:
    result = fastgen("export", run, "--license", "mit", "--out", tmp_path / "out")
    assert result.code == 2
    assert "its README.md says its licence is cc-by-nc-4.0; leave out --license mit" in result.err
    assert not (tmp_path / "out").exists()
    copy = Path(shutil.copytree(world / "teacher", tmp_path / "teacher"))
    (copy / "README.md").unlink()
    session = training.build(recipe.decode(read(run / "config.yaml") | {"model": {"path": str(copy)}}, "x"))
    measured = Results(("images", "x"), [Value("fid", "FID", 1.0, {})], "| |\n")
    training.export_run(
        session, tmp_path / "out", Wanted(licence="mit", steps_done=3, results=lambda opened: measured)
    )
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert "| Steps | 3 |" in card.text
    assert card.data.eval_results[0].metric_value == 1.0


def test_a_card_that_cannot_be_written_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(facts: Any) -> str:
        raise OSError("no space")

    monkeypatch.setattr(training, "model_card", broken)
    assert fastgen("export", run, "--out", tmp_path / "out").code == 1
    assert list(tmp_path.iterdir()) == []


# The Hub


class Api:
    """In the place of the Hub."""

    sent: list[dict[str, Any]]

    def __init__(self) -> None:
        pass

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        type(self).sent = [{"repo": repo_id, "private": private}]

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
        files = sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
        self.sent.append({"repo": repo_id, "files": files, "card": (Path(folder_path) / "README.md").read_text()})
        return f"https://huggingface.co/{repo_id}/tree/main/"


def test_an_export_is_pushed(run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secretsecretsecretsecret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    out = tmp_path / "out"
    result = done("export", run, "--out", out, "--push-to-hub", "owner/student", "--private")
    assert result.out.splitlines()[-1] == "https://huggingface.co/owner/student/tree/main/"
    first, second = Api.sent
    assert first == {"repo": "owner/student", "private": True}
    assert {"README.md", "model_index.json", "fastgen.json", "samples.png", f"{UNET}.safetensors"} <= set(
        second["files"]
    )
    assert 'from_pretrained("owner/student")' in second["card"]
    assert second["card"].partition("\n# ")[2].startswith("student\n")
    assert "hf_secret" not in result.out + result.err + second["card"]
    done("extract-lora", world / "teacher", run / "pipeline", "--rank", 2, "--leave-out", "--out", tmp_path / "x",
         "--push-to-hub", "owner/lora")  # fmt: skip
    assert Api.sent[0] == {"repo": "owner/lora", "private": None}
    assert 'load_lora_weights("owner/lora"' in Api.sent[1]["card"]


def test_without_a_token_or_offline_the_folder_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    out = tmp_path / "out"
    for offline, message in ((False, "no token; log in by"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        result = fastgen("export", run, "--out", out, "--push-to-hub", "owner/student")
        assert result.code == 2
        assert [line for line in result.err.splitlines() if line.startswith("fastgen: ")] == [
            result.err.splitlines()[-1]
        ]
        assert f"fastgen: not pushed to owner/student: {message}" in result.err
        assert f"{out} is written" in result.err
        assert (out / "model_index.json").is_file()
        shutil.rmtree(out)
