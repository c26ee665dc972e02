"""A student of several experts on disk: what Diffusers needs to open it, and that it switches them as we do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import fastgen
from fastgen import config, export, lora, recipe
from fastgen import train as training
from fastgen.evaluation import judge, runner
from fastgen.experts import Experts
from fastgen.family import Family
from fastgen.pipelines import experts as shipped
from fastgen.pipelines import sd
from fastgen.sampling import sample_student
from tests import command, tiny

PROMPTS = ["a red apple", "a dog left of a cat"]
TOLERANCE = 1e-4
STARTS = {2: [999.0, 499.0], 3: [999.0, 749.0, 249.0], 4: [999.0, 749.0, 499.0, 249.0]}
"""For four steps; three experts need not have as many each."""
CARD = {"method": "phased_dmd", "num_inference_steps": 4, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def family() -> Family:
    return sd.wrap(tiny.pipeline("v_prediction"))


def student(family: Family, count: int) -> Experts:
    """Experts that are neither their teacher nor each other."""
    return Experts([tiny.perturbed(family.student(), seed) for seed in range(count)], STARTS.get(count, [999.0]))


def ours(family: Family, network: Experts, called: int = 4) -> Tensor:
    """The trainer's sampler at ``called`` of four times: latents."""
    denoiser, own = family.denoiser.with_network(network), family.student_times(4)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    times = [own[4 * i // called] for i in range(called)]
    with torch.no_grad():
        return sample_student(denoiser, denoiser.schedule, x_t, times, family.encode_prompts(PROMPTS), "ddim")


def theirs(pipeline: Any, called: int = 4, **call: Any) -> Tensor:
    """The stock call from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": called, "generator": g, "output_type": "latent"} | call
    return pipeline(PROMPTS, **call).images


def close(one: Tensor, two: Tensor) -> None:
    assert torch.isfinite(one).all()
    assert (one - two).abs().max() <= TOLERANCE * two.abs().max()


@pytest.fixture(scope="module")
def exported(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Through the gate, by the number of experts."""
    base = tmp_path_factory.mktemp("experts")
    for count in STARTS:
        network = student(family, count)
        export.export(family, network, 4, base / str(count), prompts=PROMPTS, card=CARD, sampler="ddim")
    return {count: base / str(count) for count in STARTS}


# In a process that has never heard of fastgen

FRESH = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
folders, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for folder in folders:
    try:
        DiffusionPipeline.from_pretrained(folder)
        raise SystemExit("its code ran unasked")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error) and "fastgen_experts.py" in str(error), error
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline", type(pipeline)
    g = torch.Generator().manual_seed(3)
    images = pipeline(prompts, num_inference_steps=4, generator=g, output_type="latent").images
    np.save(f"{folder}/latent.npy", images.numpy())
    pipeline.save_pretrained(f"{folder}/again")
    again = DiffusionPipeline.from_pretrained(f"{folder}/again", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    assert torch.equal(again(prompts, num_inference_steps=4, generator=g, output_type="latent").images, images)
assert not [name for name in sys.modules if name.split(".")[0] == "fastgen"]
"""


def test_diffusers_alone_opens_it_when_told_to_trust_the_folder_and_gives_our_image(
    exported: dict[int, Path], family: Family, tmp_path: Path
) -> None:
    """In a fresh process without fastgen; what it saves again opens again."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path)}
    folders = json.dumps([str(folder) for folder in exported.values()])
    command = [sys.executable, "-I", "-c", FRESH, folders, json.dumps(PROMPTS)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr + run.stdout
    for count, folder in exported.items():
        close(torch.from_numpy(np.load(folder / "latent.npy")), ours(family, student(family, count)))


def test_all_is_stock_but_one_component_whose_code_is_beside_its_weights(exported: dict[int, Path]) -> None:
    for count, folder in exported.items():
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionPipeline"
        assert export.read_card(folder) == CARD | {"use": export.USE}
        assert index["scheduler"] == ["diffusers", "TCDScheduler"]
        assert index["unet"] == ["fastgen_experts", "UNetExperts"]
        assert {v[0] for k, v in index.items() if isinstance(v, list) and k != "unet"} <= {
            "diffusers",
            "transformers",
            None,
        }
        assert json.loads((folder / "unet" / "config.json").read_text())["starts"] == STARTS[count]
        brought = {p.relative_to(folder).as_posix() for p in folder.rglob("*.py") if "again" not in p.parts}
        assert brought == {"unet/fastgen_experts.py"}
        assert (folder / "unet" / "fastgen_experts.py").read_bytes() == Path(str(shipped.__file__)).read_bytes()


def test_the_code_that_travels_needs_only_torch_and_diffusers() -> None:
    tree = ast.parse(Path(str(shipped.__file__)).read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    used = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)
    assert used - set(sys.stdlib_module_names) == {"torch", "diffusers"}


def test_fastgen_load_asks_for_no_trust_in_its_own_code(exported: dict[int, Path], family: Family) -> None:
    """And calls it as it was trained."""
    pipeline = fastgen.load(exported[2])
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(3)
    close(pipeline(PROMPTS, generator=g, output_type="latent").images, ours(family, student(family, 2)))
    with pytest.raises(ValueError, match="num_inference_steps"):
        theirs(pipeline, 5)


def test_it_can_be_judged(exported: dict[int, Path], family: Family) -> None:
    """As any pipeline, by its folder; a call of any expert is one evaluation of the network."""
    pipeline = runner.open_pipeline(exported[3], torch.float32, "cpu")
    assert judge.image_size(exported[3]) == (16, 16)
    calls: list[int] = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    close(theirs(pipeline), ours(family, student(family, 3)))
    assert len(calls) == 4


def test_code_that_differs_is_not_trusted_unless_the_user_says_so(exported: dict[int, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "pipeline"
    shutil.copytree(exported[2], folder)
    code = folder / "unet" / "fastgen_experts.py"
    code.write_text(code.read_text(encoding="utf-8") + "\nTHEIRS = True\n", encoding="utf-8")
    message = r"unet/fastgen_experts.py: is not this fastgen's code; read it, and if you trust it pass trust_remote"
    with pytest.raises(ValueError, match=message):
        fastgen.load(folder)
    assert type(fastgen.load(folder, trust_remote_code=True).unet).__name__ == "UNetExperts"
    (folder / "more.py").write_text("")
    code.write_bytes(Path(str(shipped.__file__)).read_bytes())
    with pytest.raises(ValueError, match=r"more.py: is not this fastgen's code"):  # besides ours
        fastgen.load(folder)


@pytest.mark.parametrize("count", STARTS)
@pytest.mark.parametrize("called", [1, 2, 3, 4])
def test_fewer_steps_switch_experts_by_the_timestep_too(family: Family, count: int, called: int) -> None:
    network = student(family, count)
    pipeline = family.pipeline(network, 4, "ddim")
    close(theirs(pipeline, called), ours(family, network, called))


def test_guidance_scale_does_nothing_here_either(family: Family) -> None:
    pipeline = family.pipeline(student(family, 2), 4, "ddim")
    assert torch.equal(theirs(pipeline, guidance_scale=1.0), theirs(pipeline, guidance_scale=7.5))


def test_each_expert_is_called_at_its_own_timesteps(family: Family) -> None:
    pipeline, seen = family.pipeline(student(family, 3), 4, "ddim"), []
    for k, network in enumerate(pipeline.unet.experts):
        network.register_forward_pre_hook(lambda _, args, k=k: seen.append((k, int(args[1]))))
    theirs(pipeline)
    assert seen == [(0, 999), (1, 749), (1, 499), (2, 249)]


def test_a_call_needs_one_expert(family: Family) -> None:
    unet = family.pipeline(student(family, 2), 4, "ddim").unet
    x, text = torch.randn(2, 4, 8, 8), family.encode_prompts(PROMPTS)["text"]
    with torch.no_grad():
        both = unet(x, torch.tensor([999, 500]), text).sample
        torch.testing.assert_close(both, unet.experts[0](x, torch.tensor([999, 500]), text).sample)
        assert torch.equal(unet(x, 499, text).sample, unet(x, torch.tensor(499), text, return_dict=False)[0])
    with pytest.raises(ValueError, match=r"timesteps \[500, 499\] are of several experts, which start at \[999"):
        unet(x, torch.tensor([500, 499]), text)


def test_one_expert_leaves_as_a_stock_unet(family: Family, tmp_path: Path) -> None:
    network = student(family, 1)
    export.export(family, network, 4, tmp_path / "pipeline", prompts=PROMPTS, card=CARD, sampler="ddim")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline.unet) is UNet2DConditionModel
    assert export.read_card(tmp_path / "pipeline") == CARD
    close(theirs(pipeline), ours(family, network))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk(family: Family, tmp_path: Path, dtype: torch.dtype) -> None:
    network, folder = student(family, 2), tmp_path / "pipeline"
    options: Any = {"prompts": PROMPTS, "card": CARD, "sampler": "ddim", "dtype": dtype}
    assert export.export(family, network, 4, folder, **options) <= TOLERANCE
    pipeline = export.from_pretrained(folder)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    difference = (theirs(pipeline) - ours(family, network)).abs().max()
    assert 0 < difference <= export.HALF_TOLERANCE * ours(family, network).abs().max()
    assert export.from_pretrained(folder, dtype=dtype).unet.dtype == dtype


def test_the_keywords_of_saving_are_diffusers_own(family: Family, tmp_path: Path) -> None:
    family.pipeline(student(family, 2), 4, "ddim").save_pretrained(tmp_path, variant="fp16")
    assert [p.name for p in (tmp_path / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]


def test_it_cannot_be_a_teacher_or_a_start(exported: dict[int, Path]) -> None:
    message = "its unet is a UNetExperts, which brings its own code; this family takes Diffusers' own: name another"
    with pytest.raises(ValueError, match=message) as error:
        export.check_pipeline(exported[2], *sd.ABOUT.pipelines)
    assert "\n" not in str(error.value)
    export.check_pipeline(exported[2])


# Whole runs

RUN = {
    "method": {"name": "phased_dmd", "guidance_scale": 2.0, "student_every": 2},
    "student": {"steps": 4},
    "data": {"source": "prompts"},
    "optim": {"student": {"lr": 1.0e-3, "eps": 1.0e-4}, "fake_score": {"lr": 1.0e-3, "eps": 1.0e-4}},
    "run": {"steps": 3, "batch_size": 2, "checkpoint_every": 2, "ema": 0.5},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    command.teacher(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(command.CAPTIONS))
    return folder


def run(world: Path, out: Path, **options: Any) -> recipe.Recipe:
    tree = json.loads(json.dumps(RUN)) | {"model": {"family": "sd", "path": str(world / "teacher")}}
    tree["data"]["path"], tree["run"]["out"] = str(world / "prompts.txt"), str(out)
    tree["student"] |= options
    return recipe.decode(tree, "test")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of the second LoRA file that a user loads
@pytest.mark.parametrize("share", [None, False, True], ids=["full", "adapters", "shared"])
def test_a_whole_run_trains_checkpoints_resumes_and_exports(world: Path, tmp_path: Path, share: bool | None) -> None:
    """As adapters, also one LoRA file an expert, which a plain teacher takes and its user's callback switches."""
    options: Any = {} if share is None else {"lora": {"rank": 2}, "share_backbone": share}
    decoded = run(world, tmp_path / "run", **options)
    folder = training.train(decoded)
    assert (folder / "checkpoint-3").is_dir()
    assert training.train(decoded) == folder  # goes on from the last step, and exports again
    pipeline = fastgen.load(folder / "pipeline")
    assert type(pipeline.unet).__name__ == "UNetExperts"
    card = export.read_card(folder / "pipeline")
    assert (card["method"], card["num_inference_steps"], card["times"]) == ("phased_dmd", 4, [999, 749, 499, 249])
    assert (folder / "lora").is_dir() == (share is not None)
    if share is None:
        return
    card = export.read_card(folder / "lora")
    assert card["lora"] == {"rank": 2, "scale": 1.0, "starts": [999.0, 499.0]}
    files = sorted(p.name for p in (folder / "lora").glob("*.safetensors"))
    assert files == ["expert_1.safetensors", "expert_2.safetensors"]
    stock = StableDiffusionPipeline.from_pretrained(world / "teacher")
    stock.scheduler = pipeline.scheduler
    for name in ("expert_1", "expert_2"):
        stock.load_lora_weights(folder / "lora", weight_name=f"{name}.safetensors", adapter_name=name)

    def after(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipe.set_adapters("expert_2" if step >= 1 else "expert_1")
        return tensors

    stock.set_adapters("expert_1")
    wanted = theirs(pipeline, guidance_scale=1.0)
    close(theirs(stock, guidance_scale=1.0, callback_on_step_end=after), wanted)
    stock.set_adapters("expert_1")
    assert (theirs(stock, guidance_scale=1.0) - wanted).abs().max() > 20 * TOLERANCE  # without the callback
    family = sd.load(world / "teacher")
    assert isinstance(lora.loaded(family, folder / "lora" / "expert_2.safetensors"), lora.View)


def test_attention_compilation_and_checkpointing_reach_each_expert_and_each_fake_score(
    world: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from diffusers.models.attention_processor import AttnProcessor

    decoded = run(world, tmp_path / "run")
    session = training.build(replace(decoded, model=replace(decoded.model, gradient_checkpointing=True)))
    networks = [n for role in ("student", "fake_score") for n in session.method.networks[role].children()]
    assert len(networks) == 4
    for network in networks:
        assert {type(p) for p in network.attn_processors.values()} == {AttnProcessor}
        assert network.is_gradient_checkpointing


def test_the_shipped_config_says_what_it_makes() -> None:
    tree = config.read(Path(__file__).parents[2] / "configs" / "emoji" / "phased_dmd.yaml")
    decoded = recipe.decode(tree, "phased_dmd.yaml")
    assert (decoded.student.steps, decoded.method.options.phases) == (4, 2)
