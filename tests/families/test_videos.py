"""What the contract does not show of families of videos: experts, frames, positions, and what the trainer shows."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import fastgen
from fastgen import export, extract, lora, recipe, registry, train
from fastgen.denoiser import guided
from fastgen.discriminator import features
from fastgen.experts import Experts
from fastgen.family import Family
from fastgen.sampling import ddim, sample
from tests import command, tiny

from . import cogvideox, ltx, wan
from .parts import PROMPTS, flow_scheduler
from .test_families import called_at, close

SIZE = (32, 32)


def wrapped(pipeline: Any, name: str = "wan", **settings: Any) -> Family:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"image_size": SIZE, "num_frames": 5, **settings}
    found: Family = registry.find("family", name).wrap(pipeline, **settings)
    return found


def called(pipeline: WanPipeline) -> list[tuple[int, float]]:
    """Which transformer is called at which timestep, from now on."""
    found: list[tuple[int, float]] = []
    for k, network in enumerate((pipeline.transformer, pipeline.transformer_2)):
        network.register_forward_pre_hook(
            lambda _, args, given, k=k: found.append((k, round(float(given["timestep"][0]), 3))), with_kwargs=True
        )
    return found


# Wan's scheduler


def test_the_shift_of_wan_s_own_scheduler_is_read() -> None:
    pipeline = wan.pipeline(0)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    family = wrapped(pipeline)
    assert family.denoiser.schedule.shift == 5.0
    assert family.pipeline(family.student(), None).scheduler is pipeline.scheduler
    assert family.student_times(4) == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8])
    family.run(pipeline, PROMPTS, 4, torch.Generator())  # whose times are ours but for whole numbers
    assert pipeline.scheduler.timesteps[0] >= 999


def test_a_scheduler_without_flow_is_refused() -> None:
    pipeline = wan.pipeline(0)
    pipeline.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="UniPCMultistepScheduler is not of rectified flow"):
        wrapped(pipeline)


# Experts


def test_each_expert_takes_the_times_that_the_pipeline_gives_it() -> None:
    """Also the boundary itself, which is the first one's."""
    pipeline = wan.pipeline(0, experts=True)
    family = wrapped(pipeline)
    network: Any = family.denoiser.network
    found = called(pipeline)
    family.run(pipeline, PROMPTS, 5, torch.Generator(), 1.0)
    ours = [int(k) for k in network.which(torch.tensor([t / 1000 for _, t in found]))]
    assert ours == [k for k, _ in found]
    assert set(ours) == {0, 1}
    for dtype in (torch.float32, torch.float64):
        edge = torch.tensor([0.875, 0.8751, 0.8749], dtype=dtype)
        assert network.which(edge).tolist() == [0, 0, 1]


def test_a_student_of_experts_calls_them_where_its_pipeline_does() -> None:
    family = wrapped(wan.pipeline(0, experts=True))
    made = family.pipeline(family.student(), 4)
    assert made.config.boundary_ratio == 0.875
    found = called(made)
    family.run(made, PROMPTS, 4, torch.Generator(), 1.0)
    assert found == [(0, 1000), (0, 937.5), (1, 833.333), (1, 625)]


def test_features_of_experts_are_each_one_s_for_its_own_rows() -> None:
    family = wrapped(wan.pipeline(0, experts=True))
    network: Any = family.denoiser.network
    x_t, t = torch.randn(3, *family.latent_shape), torch.tensor([0.3, 0.95, 0.5])
    cond = family.encode_prompts([*PROMPTS, PROMPTS[0]])
    names = [block.name for block in family.blocks]
    with torch.no_grad():
        together = features(family.denoiser, names, x_t, t, cond)
        for i, k in enumerate([1, 0, 1]):
            row = {name: value[i : i + 1] for name, value in cond.items()}
            alone = features(family.denoiser.with_network(network[k]), names, x_t[i : i + 1], t[i : i + 1], row)
            for one, all_rows in zip(alone, together, strict=True):
                torch.testing.assert_close(one[0], all_rows[i], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    wan.pipeline(0).save_pretrained(folder / "one")
    wan.pipeline(0, experts=True).save_pretrained(folder / "two")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def made_for(folders: Path, teacher: str, method: str, /, **sections: Any) -> recipe.Recipe:
    step = {"lr": 1e-3, "warmup": 0}
    tree = {
        "model": {"path": str(folders / teacher), "image_size": list(SIZE), "num_frames": 5},
        "method": {"name": method},
        "student": {"steps": 4},
        "data": {"source": "prompts", "path": str(folders / "prompts.txt")},
        "optim": {"student": step, "fake_score": step},
        "run": {"out": str(folders / f"{teacher}-{method}"), "steps": 1, "batch_size": 1},
    }
    for name, section in sections.items():
        tree[name] |= section
    return recipe.decode(tree, "test")


@pytest.mark.parametrize("form", [{}, {"lora": {"rank": 2}}], ids=["whole", "lora"])
def test_a_student_of_two_phases_leaves_as_wan_2_2(folders: Path, form: dict[str, Any]) -> None:
    """Of a teacher of one transformer; alone, its adapters are switched on the teacher's."""
    out = str(folders / f"phases-{len(form)}")
    run = train.train(made_for(folders, "one", "phased_dmd", student={"steps": 4, **form}, run={"out": out}))
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert type(pipeline) is WanPipeline
    assert pipeline.config.boundary_ratio == pytest.approx(5 / 6, abs=2e-6)
    assert not torch.equal(pipeline.transformer.proj_out.weight, pipeline.transformer_2.proj_out.weight)
    assert (run / "lora").is_dir() == bool(form)
    card = export.read_card(run / "pipeline")
    assert (card["height"], card["width"], card["num_frames"]) == (*SIZE, 5)
    made = fastgen.load(run / "pipeline")
    made.set_progress_bar_config(disable=True)
    assert made(PROMPTS[0]).frames.shape == (1, 5, *SIZE, 3)


def test_more_phases_than_wan_has_transformers_are_refused() -> None:
    family = wrapped(wan.pipeline(0))
    with pytest.raises(ValueError, match=r"WanPipeline has two transformers, not 3; set method\.phases to 2 or 1"):
        family.pipeline(Experts([family.student() for _ in range(3)], [1.0, 0.9, 0.5]), 3)
    made = family.pipeline(Experts([family.student()], [1.0]), 1)  # one phase
    assert (made.transformer_2, made.config.boundary_ratio) == (None, None)


def test_experts_of_experts_are_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match="a student of experts cannot have a teacher of several experts; choose a me"):
        train.build(made_for(folders, "two", "phased_dmd"))


@pytest.mark.parametrize("share", [False, True])
def test_adapters_go_on_each_of_two_experts(folders: Path, share: bool) -> None:
    """Also those of a fake score, on the teacher's own weights if they are shared."""
    student = {"lora": {"rank": 2}, "share_backbone": share}
    session = train.build(made_for(folders, "two", "dmd2", student=student, method={"student_every": 1}))
    before = {name: p.detach().clone() for name, p in session.method.networks["student"].named_parameters()}
    assert {name.split(".")[0] for name in before} == {"0", "1"}
    assert all(".lora_" in name for name in before)
    assert len(list(session.engine.run(range(4)))) == 4  # among whose times are both experts'
    now = dict(session.method.networks["student"].named_parameters())
    for k in "01":
        assert any(not torch.equal(p, before[name]) for name, p in now.items() if name.startswith(k))
    roles = [[*session.method.networks[role].children()] for role in ("teacher", "student", "fake_score")]
    for teacher, view, fake in zip(*roles, strict=True):
        assert isinstance(view, lora.View)
        assert (lora.plain(teacher) is lora.plain(view)) == (lora.plain(fake) is lora.plain(view)) == share


@pytest.fixture(scope="module")
def adapters(folders: Path) -> Path:
    """Exported by a run on a teacher of two experts: its pipeline, and the adapters beside it."""
    session = train.build(made_for(folders, "two", "dmd2", student={"lora": {"rank": 2}}))
    tiny.perturbed(session.method.networks["student"].requires_grad_(True))
    train.export_run(session, folders / "adapters" / "pipeline")
    return folders / "adapters"


def test_adapters_of_two_experts_say_how_each_is_loaded(adapters: Path) -> None:
    readme, card = (adapters / "lora" / "README.md").read_text(), export.read_card(adapters / "lora")
    assert readme.count("pipeline.load_lora_weights(") == 2
    assert 'weight_name="expert_1.safetensors")\n' in readme
    assert 'weight_name="expert_2.safetensors", load_into_transformer_2=True)\n' in readme
    assert card["lora"] == {"rank": 2, "scale": 1.0}
    each = (
        "each file has its own network: expert_1.safetensors, expert_2.safetensors with load_into_transformer_2=True"
    )
    fuse = "fuse_lora takes components=['transformer', 'transformer_2']; load_lora_weights on base_model, "
    assert card["use"].startswith(f"{each}; {fuse}")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_of_two_experts_leave_as_a_file_for_each_transformer(folders: Path, adapters: Path) -> None:
    student = DiffusionPipeline.from_pretrained(adapters / "pipeline")
    family = wrapped(student)
    files = [adapters / "lora" / f"expert_{k}.safetensors" for k in (1, 2)]
    assert sorted((adapters / "lora").glob("*.safetensors")) == files

    def made(pipeline: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(7)
        return family.run(pipeline, PROMPTS, 4, torch.Generator().manual_seed(7), 1.0)

    stock = DiffusionPipeline.from_pretrained(folders / "two")
    stock.scheduler = student.scheduler
    stock.load_lora_weights(adapters / "lora", weight_name=files[0].name)
    assert (made(stock) - made(student)).abs().max() > 1e-2  # the one alone is not enough
    stock.load_lora_weights(adapters / "lora", weight_name=files[1].name, load_into_transformer_2=True)
    close(made(stock), made(student))
    stock.fuse_lora(components=["transformer", "transformer_2"])
    stock.unload_lora_weights()
    close(made(stock), made(student))
    base = wrapped(DiffusionPipeline.from_pretrained(folders / "two"))
    again = base.pipeline(lora.fused(lora.loaded(base, *files)), 4)
    close(made(again), made(student))
    with pytest.raises(ValueError, match="1 LoRA files for 2 networks; name one for each"):
        lora.loaded(base, files[0])


def test_files_of_experts_that_the_base_does_not_take_are_not_written(
    folders: Path, adapters: Path, tmp_path: Path
) -> None:
    """Each is held to its own transformer."""
    family = wrapped(DiffusionPipeline.from_pretrained(folders / "two"))
    weights = [load_file(adapters / "lora" / f"expert_{k}.safetensors") for k in (1, 2)]
    given: dict[str, Any] = {"num_steps": 4, "prompts": PROMPTS, "card": {}}
    wrong = [weights[0], {f"{name.replace('blocks.0', 'blocks.7')}": value for name, value in weights[1].items()}]
    for found, message in (
        (wrong, r"expert_2.safetensors not written: loading it in .*two drops \['transformer.blocks.7"),
        (weights[::-1], r"expert_1.safetensors, expert_2.safetensors not written: with it .*two differs from the exp"),
    ):
        with pytest.raises(export.ExportError, match=message):
            export.export_adapter(
                family,
                functools.partial(export.from_pretrained, adapters / "pipeline"),
                found,
                str(folders / "two"),
                tmp_path / "lora",
                **given,
            )
        assert not (tmp_path / "lora").exists()


def test_no_lora_file_is_extracted_of_two_experts(folders: Path, tmp_path: Path) -> None:
    both = str(folders / "two"), str(folders / "two")
    with pytest.raises(ValueError, match="two: is of several experts, of which no difference is taken; name a base"):
        extract.extract(*both, tmp_path / "lora", extract.Options())


def test_model_settings_reach_each_expert(folders: Path) -> None:
    session = train.build(made_for(folders, "two", "dmd2", model={"gradient_checkpointing": True}))
    for role in ("teacher", "student", "fake_score"):
        experts: Any = session.method.networks[role]
        assert [network.gradient_checkpointing for network in experts] == [True, True]
    logs = [logs for _, logs in session.engine.run(range(1))]
    assert len(logs) == 1


@pytest.mark.parametrize(("boundary", "lacks"), [(0.9, "transformer_2"), (None, "transformer")])
def test_a_pipeline_that_lacks_a_transformer_is_refused(boundary: float | None, lacks: str) -> None:
    pipeline = wan.pipeline(0, experts=True)
    pipeline.register_modules(**{lacks: None})
    pipeline.register_to_config(boundary_ratio=boundary)
    with pytest.raises(ValueError, match=rf"boundary_ratio {boundary} needs transformer.*, which this pipeline lacks"):
        wrapped(pipeline)


def test_a_timestep_for_each_token_is_the_same_timestep() -> None:
    """Wan 2.2 5B's pipeline gives the network one for each, all alike."""
    pipeline = wan.pipeline(0)
    pipeline.register_to_config(expand_timesteps=True)
    family = wrapped(pipeline)
    theirs = family.run(pipeline, PROMPTS, 4, torch.Generator().manual_seed(5), 4.0)
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    denoise, cond = guided(family.denoiser, family.uncond(), 4.0), family.encode_prompts(PROMPTS)
    with torch.no_grad():
        close(sample(denoise, family.denoiser.schedule, x_t, called_at(pipeline.scheduler), cond, ddim), theirs)


# Frames

FAMILIES = {"wan": (wan.pipeline, 5), "ltx": (ltx.pipeline, 5), "cogvideox": (cogvideox.pipeline, 9)}
"""Each with a number of frames that it takes."""


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_is_a_clip_that_stands_still(name: str) -> None:
    made, frames = FAMILIES[name]
    family = wrapped(made(0), name, num_frames=frames)
    g = torch.Generator().manual_seed(0)
    image, clip = torch.rand(2, 3, *SIZE, generator=g) * 2 - 1, torch.rand(2, 3, frames, *SIZE, generator=g) * 2 - 1
    still = family.encode(image)
    torch.testing.assert_close(family.encode(image[:, :, None].expand(-1, -1, frames, -1, -1)), still)
    assert (family.encode(clip) - still).abs().max() > 1e-3
    with torch.no_grad():
        assert family.decode(family.encode(clip)).shape == clip.shape
    with pytest.raises(ValueError, match=rf"clips of 4 frames, this family has {frames}; set model\.num_frames"):
        family.encode(clip[:, :, :4])


@pytest.mark.parametrize(
    ("name", "num_frames", "message"),
    [
        ("wan", 6, "WanPipeline makes 1 and a multiple of 4; give 5 or 9"),
        ("ltx", 3, "LTXPipeline makes 1 and a multiple of 4; give 1 or 5"),
        ("cogvideox", 13, "CogVideoXPipeline makes 1 and a multiple of 8; give 9 or 17"),
    ],
)
def test_frames_that_do_not_come_out_even_are_refused(name: str, num_frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"num_frames {num_frames}: {message}"):
        wrapped(FAMILIES[name][0](0), name, num_frames=num_frames)


@pytest.mark.parametrize(
    ("name", "shape"), [("wan", (4, 21, 60, 104)), ("ltx", (4, 41, 64, 88)), ("cogvideox", (4, 4, 4, 4))]
)
def test_without_settings_a_family_is_of_its_pipeline_s_own_call(name: str, shape: tuple[int, ...]) -> None:
    pipeline = FAMILIES[name][0](0)
    if name == "ltx":  # whose tiny scheduler shifts by no size as large as this
        pipeline.scheduler = flow_scheduler()
    assert wrapped(pipeline, name, image_size=None, num_frames=None).latent_shape == shape


def test_an_image_pipeline_has_no_frames(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_frames 5: this pipeline makes images; leave it out"):
        registry.find("family", "sd").load(tmp_path, num_frames=5)


def test_a_sample_grid_shows_the_middle_frame(folders: Path) -> None:
    session = train.build(made_for(folders, "one", "dmd2"))
    shown: list[Tensor] = []
    family = session.family

    def decode(latents: Tensor) -> Tensor:
        shown.append(family.decode(latents))
        return shown[-1]

    object.__setattr__(session, "family", train.replace(family, decode=decode))
    images = session.images(PROMPTS, [0, 1])
    assert images.shape == (2, 3, *SIZE)
    assert images.dtype == torch.uint8
    torch.testing.assert_close(images / 127.5 - 1, shown[0][:, :, 2].clamp(-1, 1), rtol=0, atol=0.005)


# CogVideoX and LTX


def test_positions_that_do_not_reach_are_refused() -> None:
    """The stock call of 1.5 fails there, too."""
    pipeline = cogvideox.pipeline(0)
    with pytest.raises(ValueError, match=r"image size 32 x 48: the positions of this transformer reach 32 x 32; give"):
        wrapped(pipeline, "cogvideox", image_size=(32, 48), num_frames=9)
    with pytest.raises(RuntimeError):
        pipeline(PROMPTS, height=32, width=48, num_inference_steps=1, output_type="latent")


def test_a_teacher_of_noise_on_a_table_that_ends_in_noise_is_refused() -> None:
    pipeline = cogvideox.pipeline(0)
    pipeline.scheduler = cogvideox.scheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type 'epsilon' names no image at a last alpha of 0"):
        wrapped(pipeline, "cogvideox", num_frames=9)
    pipeline.scheduler = cogvideox.scheduler(prediction_type="epsilon", rescale_betas_zero_snr=False)
    assert wrapped(pipeline, "cogvideox", num_frames=9).denoiser.kind == "eps"


def test_cogvideox_s_other_scheduler_is_the_same_schedule() -> None:
    pipeline = cogvideox.pipeline(0)
    one = wrapped(pipeline, "cogvideox", num_frames=9).denoiser.schedule
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    family = wrapped(pipeline, "cogvideox", num_frames=9)
    t = torch.arange(1000)
    assert torch.equal(family.denoiser.schedule(t).alpha, one(t).alpha)
    made = family.pipeline(family.student(), 2).scheduler
    assert made.alphas_cumprod[-1] == 0
    torch.testing.assert_close(made.alphas_cumprod.double().sqrt(), one(t).alpha, rtol=1e-4, atol=1e-7)
    assert family.student_times(2) == [999, 499]


def test_frames_that_fill_a_patch_up_are_not_shown() -> None:
    """9 frames are 3 of the latents, which 1.5 takes by two."""
    pipeline = cogvideox.pipeline(0)
    family = wrapped(pipeline, "cogvideox", num_frames=9)
    assert family.latent_shape[0] == 4
    latents = family.encode(torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert torch.equal(latents[:, 0], latents[:, 1])
    other = latents.clone()
    other[:, 0] = 7.0
    with torch.no_grad():
        assert family.decode(latents).shape == (1, 3, 9, *SIZE)
        assert torch.equal(family.decode(latents), family.decode(other))


def test_an_autoencoder_of_ltx_may_be_told_no_timestep() -> None:
    pipeline = ltx.pipeline(0)
    pipeline.register_modules(vae=ltx.autoencoder(timestep_conditioning=False))
    family = wrapped(pipeline, "ltx")
    latents = family.run(pipeline, PROMPTS, 2, torch.Generator().manual_seed(5))
    shown = family.run(pipeline, PROMPTS, 2, torch.Generator().manual_seed(5), output_type="pt")
    with torch.no_grad():
        close((family.decode(latents) / 2 + 0.5).clamp(0, 1).movedim(1, -3), shown)


# The command line


@pytest.mark.parametrize(("frames", "suffix"), [(5, ".webp"), (1, ".png")])
def test_generate_writes_a_video_as_an_animation(folders: Path, tmp_path: Path, frames: int, suffix: str) -> None:
    student = folders / "student"
    family = wrapped(wan.pipeline(0))
    network: nn.Module = tiny.perturbed(family.student())
    export.export(family, network, 2, student, prompts=PROMPTS, card={"num_inference_steps": 2, "guidance_scale": 1.0})
    words = ["generate", student, "-p", "a dog", "-o", tmp_path, "--height", 32, "--width", 48, "--fps", 10]
    done = command.fastgen(*words, "--num-frames", frames)
    assert done.code == 0, done.err
    with Image.open(tmp_path / f"0000_00{suffix}") as made:
        assert made.size == (48, 32)
        assert getattr(made, "n_frames", 1) == frames
        if frames > 1:
            made.seek(1)
            made.load()
            assert made.info["duration"] == 100
    assert json.loads((student / "fastgen.json").read_text())["num_inference_steps"] == 2


def test_generate_has_no_frames_for_images(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "teacher")
    done = command.fastgen("generate", tmp_path / "teacher", "-p", "a dog", "-o", tmp_path, "--num-frames", 5)
    assert done.code != 0
    assert "is a StableDiffusionPipeline, which makes images; leave out --num-frames" in done.err
