"""The family ``sd`` on tiny components of the real classes: what we compute is what plain Diffusers computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor, nn

from fastgen.data.batches import to_uint8
from fastgen.denoiser import Denoiser, guided
from fastgen.discriminator import Heads, features
from fastgen.export import ExportError, export
from fastgen.family import Family
from fastgen.pipelines import sd, unet
from fastgen.sampling import Sampler, ddim, ddim_times, renoise, sample, sample_student
from tests import tiny

PROMPTS = ["a red apple", "a dog left of a cat"]
TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
STUDENTS = [(kind, k) for kind in ("epsilon", "v_prediction") for k in (1, 2, 4)]
TOLERANCE = 1e-4


def noise(seed: int = 0, n: int = 2) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.abs().max().item())


def perturbed(family: Family) -> nn.Module:
    """A student that is no longer its teacher."""
    return tiny.perturbed(family.student())


def few_steps(family: Family, network: nn.Module, num_steps: int, seed: int, prompts: list[str]) -> Tensor:
    """Our sampler, all noise from one generator in the order in which the pipeline draws it: latents [B, 4, 8, 8]."""
    g = torch.Generator().manual_seed(seed)
    x_t = torch.randn(len(prompts), 4, 8, 8, generator=g)
    student = family.denoiser.with_network(network)
    with torch.no_grad():
        return sample(
            student,
            student.schedule,
            x_t,
            family.student_times(num_steps),
            family.encode_prompts(prompts),
            renoise,
            lambda: torch.randn(x_t.shape, generator=g),
        )


# The teacher


@pytest.mark.parametrize("prediction_type", TYPES)
def test_schedule_and_kind_are_read_from_the_pipeline(prediction_type: str) -> None:
    pipeline = tiny.pipeline(prediction_type)
    family = sd.wrap(pipeline)
    assert family.denoiser.kind == TYPES[prediction_type]
    at = family.denoiser.schedule(torch.arange(1000))
    torch.testing.assert_close(at.alpha.square(), pipeline.scheduler.alphas_cumprod.double(), rtol=1e-9, atol=1e-12)
    assert family.latent_shape == (4, 8, 8)
    assert family.image_size == (16, 16)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize(("num_steps", "scale"), [(1, 1.0), (2, 7.5), (8, 1.0), (10, 4.0)])
def test_the_teacher_s_sampler_equals_the_stock_pipeline(prediction_type: str, num_steps: int, scale: float) -> None:
    """Guided DDIM on the trailing grid, as latents and as images."""
    pipeline = tiny.pipeline(prediction_type)
    family = sd.wrap(pipeline)
    call = {"num_inference_steps": num_steps, "guidance_scale": scale, "latents": noise()}
    theirs = pipeline(PROMPTS, **call, output_type="latent").images
    with torch.no_grad():
        ours = sample(
            guided(family.denoiser, family.uncond(), scale),
            family.denoiser.schedule,
            noise(),
            ddim_times(family.denoiser.schedule, num_steps),
            family.encode_prompts(PROMPTS),
            ddim,
        )
    close(ours, theirs)
    images = pipeline(PROMPTS, **call, output_type="np").images
    close((family.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(images))
    drawn = pipeline(PROMPTS, **call, output_type="pil").images
    found = to_uint8(family.decode(ours)).permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - np.stack([np.asarray(i) for i in drawn]).astype(int)).max() <= 1


def test_prompts_are_encoded_as_the_pipeline_does() -> None:
    pipeline = tiny.pipeline()
    family = sd.wrap(pipeline)
    positive, negative = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    torch.testing.assert_close(family.encode_prompts(PROMPTS)["text"], positive)
    torch.testing.assert_close(family.uncond()["text"], negative[:1])
    assert not family.encode_prompts(PROMPTS)["text"].requires_grad


def test_a_long_prompt_is_cut_with_a_warning_as_the_pipeline_cuts_it() -> None:
    pipeline = tiny.pipeline()
    family = sd.wrap(pipeline)
    long = "a dog left of a cat and a red apple and a dog left of a cat and a red apple"
    tokens = len(pipeline.tokenizer(long).input_ids)
    with pytest.warns(UserWarning, match=f"a prompt of {tokens} tokens was cut to 16; shorten it"):
        ours = family.encode_prompts([long, "a red apple"])["text"]
    torch.testing.assert_close(ours[:1], pipeline.encode_prompt(long, torch.device("cpu"), 1, False)[0])


def test_a_prompt_that_fits_does_not_warn() -> None:
    sd.wrap(tiny.pipeline()).encode_prompts(PROMPTS)  # warnings are errors


def test_encoding_scales_latents_as_the_pipeline_decodes_them() -> None:
    pipeline = tiny.pipeline()
    family = sd.wrap(pipeline)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(family.encode(pixels), pipeline.vae.encode(pixels).latent_dist.mean * 0.4)
        decoded = pipeline.vae.decode(noise() / 0.4).sample
    found = family.decode(noise())
    torch.testing.assert_close(found, decoded)
    assert not found.requires_grad


def test_the_gradient_of_pixels_reaches_latents_also_where_the_decoder_overshoots() -> None:
    family, latents = sd.wrap(tiny.pipeline()), (3 * noise()).requires_grad_()
    pixels = family.decode(latents)
    over = pixels.abs() > 1
    assert over.any()
    (gradient,) = torch.autograd.grad(pixels[over].sum(), latents)
    assert gradient.abs().max() > 0


def test_loading_from_disk_gives_the_same_family(tmp_path: Path) -> None:
    pipeline = tiny.pipeline("v_prediction")
    pipeline.save_pretrained(tmp_path)
    family, loaded = sd.wrap(pipeline), sd.load(tmp_path)
    t = torch.tensor([5.0, 900.0])
    for one, two in ((family, loaded), (loaded, sd.load(str(tmp_path), torch.device("cpu")))):
        cond = one.encode_prompts(PROMPTS)
        with torch.no_grad():
            assert torch.equal(one.denoiser(noise(), t, cond).y, two.denoiser(noise(), t, cond).y)
    assert loaded.denoiser.kind == "v"
    assert sd.load(tmp_path, autocast=torch.bfloat16).denoiser.autocast == torch.bfloat16


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    tiny.pipeline().to(dtype=torch.float16).save_pretrained(tmp_path)
    family = sd.load(tmp_path)
    assert {p.dtype for p in family.denoiser.network.parameters()} == {torch.float32}


def test_the_teacher_is_frozen() -> None:
    pipeline = tiny.pipeline()
    sd.wrap(pipeline)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler, LCMScheduler])
def test_any_scheduler_of_a_variance_preserving_table_is_understood(cls: type) -> None:
    pipeline = tiny.pipeline("v_prediction")
    expected = sd.wrap(pipeline).denoiser.schedule(torch.arange(1000)).alpha
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    family = sd.wrap(pipeline)
    assert family.denoiser.kind == "v"
    torch.testing.assert_close(family.denoiser.schedule(torch.arange(1000)).alpha, expected)
    assert family.student_times(4) == [999, 749, 499, 249]


def test_a_scheduler_that_is_not_understood_is_refused() -> None:
    pipeline = tiny.pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        sd.wrap(pipeline)


def test_an_unknown_prediction_type_is_refused() -> None:
    pipeline = tiny.pipeline()
    pipeline.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type 'flow' is not one of epsilon, v_prediction, sample"):
        sd.wrap(pipeline)


def test_a_zero_terminal_snr_teacher_of_noise_is_refused() -> None:
    pipeline = tiny.pipeline("epsilon")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="prediction_type 'epsilon' names no image at a last alpha of 0; this sch"):
        sd.wrap(pipeline)


@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
@pytest.mark.parametrize("start", [1.0, 0.4])
def test_a_student_of_a_zero_terminal_snr_teacher_has_its_table(sampler: Sampler, start: float) -> None:
    pipeline = tiny.pipeline("v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    family = sd.wrap(pipeline, start=start)
    made = family.pipeline(family.student(), 2, sampler).scheduler
    table = pipeline.scheduler.alphas_cumprod[: round(1000 * start)]
    torch.testing.assert_close(made.alphas_cumprod, table, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(1 - made.alphas_cumprod, 1 - table, rtol=1e-3, atol=0)
    assert bool(made.alphas_cumprod[-1] == 0) == (start == 1)


# Blocks


@pytest.mark.parametrize("side", [8, 10, 7])
def test_blocks_are_what_the_network_gives(side: int) -> None:
    """Names, channels and sides as declared, and heads that fit."""
    pipeline = tiny.pipeline(sample_size=side)
    family = sd.wrap(pipeline)
    assert [b.name for b in family.blocks] == ["down_blocks.0", "down_blocks.1", "mid_block"]
    x_t, t = torch.randn(2, 4, side, side), torch.tensor([10.0, 900.0])
    names = [b.name for b in family.blocks]
    maps = features(family.denoiser, names, x_t, t, family.encode_prompts(PROMPTS))
    assert [tuple(m.shape) for m in maps] == [(2, b.channels, b.size, b.size) for b in family.blocks]
    assert Heads([b.channels for b in family.blocks], [b.size for b in family.blocks])(maps).shape == (2, 3)


# The student


@pytest.mark.parametrize(
    ("num_steps", "times"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 749, 499, 249]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
def test_student_times_are_those_of_the_scheduler_that_ships(num_steps: int, times: list[int]) -> None:
    family = sd.wrap(tiny.pipeline())
    assert family.student_times(num_steps) == times
    scheduler = family.pipeline(family.student(), num_steps).scheduler
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == times


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_untrained_student_is_its_teacher(prediction_type: str) -> None:
    family = sd.wrap(tiny.pipeline(prediction_type))
    student = family.denoiser.with_network(family.student())
    t, cond = torch.tensor([5.0, 900.0]), family.encode_prompts(PROMPTS)
    with torch.no_grad():
        assert torch.equal(student(noise(), t, cond).y, family.denoiser(noise(), t, cond).y)


def test_all_of_a_student_learns_but_its_guidance_embedding_which_is_zero() -> None:
    network = sd.wrap(tiny.pipeline()).student()
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen == ["time_embedding.cond_proj.weight"]
    assert network.time_embedding.cond_proj.weight.abs().max() == 0


def test_a_student_does_not_share_its_teacher_s_weights() -> None:
    family = sd.wrap(tiny.pipeline())
    one, two = family.student(), family.student()
    pointers = [{p.data_ptr() for p in n.parameters()} for n in (family.denoiser.network, one, two)]
    assert pointers[0].isdisjoint(pointers[1] | pointers[2])
    assert pointers[1].isdisjoint(pointers[2])


def test_a_student_of_a_teacher_read_from_disk_is_made_too(tmp_path: Path) -> None:
    """Also where the config on disk predates the option, as Stable Diffusion 1.5's does."""
    tiny.pipeline().save_pretrained(tmp_path)
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    del config["time_cond_proj_dim"]
    path.write_text(json.dumps(config))
    family = sd.load(tmp_path)
    assert family.student().config.time_cond_proj_dim == unet.GUIDANCE_EMBEDDING


def test_a_student_of_a_guidance_embedded_teacher_ignores_guidance_too() -> None:
    """An LCM as teacher: what its embedding adds must be gone, since the stock call would feed it guidance_scale."""
    torch.manual_seed(0)
    family = sd.wrap(tiny.pipeline(time_cond_proj_dim=8))
    network = perturbed(family)
    close(few_steps(family, network, 2, 0, PROMPTS), call(family.pipeline(network, 2), 2, guidance_scale=7.5))
    assert "time_embedding.cond_proj.weight" not in {n for n, p in network.named_parameters() if p.requires_grad}


def test_the_student_s_noise_is_the_teacher_s_whatever_defaults_its_scheduler_left_unsaid() -> None:
    """A config that leaves betas at DDIM's defaults must not fall to LCM's, which differ."""
    pipeline = tiny.pipeline()
    pipeline.scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, timestep_spacing="trailing")
    family = sd.wrap(pipeline)
    shipped = family.pipeline(family.student(), 2).scheduler
    torch.testing.assert_close(shipped.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def call(pipeline: StableDiffusionPipeline, num_steps: int, seed: int = 0, **kwargs: object) -> Tensor:
    """The stock call, all noise from one generator: latents [B, 4, 8, 8]."""
    pipeline.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(seed)
    return pipeline(PROMPTS, num_inference_steps=num_steps, generator=g, output_type="latent", **kwargs).images


@pytest.mark.parametrize(("prediction_type", "num_steps"), STUDENTS)
def test_the_student_s_pipeline_equals_the_trainer_s_sampler(prediction_type: str, num_steps: int) -> None:
    family = sd.wrap(tiny.pipeline(prediction_type))
    network = perturbed(family)
    ours = few_steps(family, network, num_steps, 3, PROMPTS)
    close(ours, call(family.pipeline(network, num_steps), num_steps, 3))


def test_a_student_s_image_does_not_depend_on_guidance_scale() -> None:
    family = sd.wrap(tiny.pipeline())
    pipeline = family.pipeline(perturbed(family), 2)
    images = [call(pipeline, 2, guidance_scale=w) for w in (0.0, 1.0, 7.5, 30.0)]
    assert all(torch.equal(images[0], other) for other in images[1:])
    assert torch.equal(images[0], call(pipeline, 2))  # the default of 7.5


def test_a_student_s_image_does_not_depend_on_a_negative_prompt() -> None:
    family = sd.wrap(tiny.pipeline())
    pipeline = family.pipeline(perturbed(family), 1)
    assert torch.equal(call(pipeline, 1), call(pipeline, 1, negative_prompt=["a dog", "a cat"]))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_more_steps_than_trained_are_an_error(num_steps: int) -> None:
    family = sd.wrap(tiny.pipeline())
    pipeline = family.pipeline(family.student(), num_steps)
    with pytest.raises(ValueError, match="num_inference_steps"):
        call(pipeline, num_steps + 1)
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline("a red apple")  # Diffusers' default of 50


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_shipped_scheduler_returns_x0_itself(num_steps: int) -> None:
    """LCM mixes the noised sample in again by c_skip, which must vanish in float32 at every trained time."""
    family = sd.wrap(tiny.pipeline())
    scheduler = family.pipeline(family.student(), num_steps).scheduler
    for t in family.student_times(num_steps):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(int(t))
        assert float(c_skip) < 2**-24
        assert float(np.float32(c_out)) == 1


def test_fewer_steps_than_trained_use_times_that_were_trained() -> None:
    family = sd.wrap(tiny.pipeline())
    scheduler = family.pipeline(family.student(), 4).scheduler
    for num_steps in (1, 2, 3):
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps[0] == 999
        assert set(scheduler.timesteps.tolist()) <= {999, 749, 499, 249}


# In a process that has never heard of fastgen

FRESH = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
jobs, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for folder, num_steps in jobs:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline", type(pipeline)
    for kind in ("latent", "np"):
        found = pipeline(
            prompts,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(3),
            output_type=kind,
        ).images
        np.save(f"{folder}/{kind}.npy", found.numpy() if kind == "latent" else found)
assert not [name for name in sys.modules if name.split(".")[0] == "fastgen"]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Students saved, then called by plain Diffusers in one fresh process."""
    base, folders = tmp_path_factory.mktemp("exported"), {}
    for kind, num_steps in STUDENTS:
        family = sd.wrap(tiny.pipeline(kind))
        folders[kind, num_steps] = base / f"{kind}-{num_steps}"
        family.pipeline(perturbed(family), num_steps).save_pretrained(folders[kind, num_steps])
    jobs = json.dumps([(str(folder), key[1]) for key, folder in folders.items()])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, jobs, json.dumps(PROMPTS)],
        cwd=base,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folders


@pytest.mark.parametrize(("prediction_type", "num_steps"), STUDENTS)
def test_an_exported_student_opens_in_plain_diffusers_and_gives_our_image(
    exported: dict[tuple[str, int], Path], prediction_type: str, num_steps: int
) -> None:
    folder = exported[prediction_type, num_steps]
    family = sd.wrap(tiny.pipeline(prediction_type))
    ours = few_steps(family, perturbed(family), num_steps, 3, PROMPTS)
    close(ours, torch.from_numpy(np.load(folder / "latent.npy")))
    pixels = (family.decode(ours) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    close(pixels, torch.from_numpy(np.load(folder / "np.npy")))


def test_an_exported_student_is_nothing_but_stock_parts(exported: dict[tuple[str, int], Path]) -> None:
    folder = exported["v_prediction", 4]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {v[0] for k, v in index.items() if isinstance(v, list)} <= {"diffusers", "transformers", None}
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".ckpt", ".py"}]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["original_inference_steps"]) == ("LCMScheduler", 4)
    assert scheduler["prediction_type"] == "v_prediction"


# The gate


def test_export_passes_the_gate_and_writes_the_pipeline_and_its_card(tmp_path: Path) -> None:
    family = sd.wrap(tiny.pipeline("v_prediction"))
    network = perturbed(family)
    card = {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert export(family, network, 2, tmp_path / "pipeline", prompts=PROMPTS, card=card) <= TOLERANCE
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    close(few_steps(family, network, 2, 0, PROMPTS), call(pipeline, 2))
    assert json.loads((tmp_path / "pipeline" / "fastgen.json").read_text()) == card


def test_a_teacher_exports_with_its_own_scheduler(tmp_path: Path) -> None:
    family = sd.wrap(tiny.pipeline("v_prediction"))
    export(family, family.denoiser.network, None, tmp_path / "pipeline", prompts=PROMPTS, card={})
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "pipeline").scheduler, DDIMScheduler)


def test_a_pipeline_that_differs_from_the_sampler_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """As when a student was trained in the belief that the network predicts something else."""
    family = sd.wrap(tiny.pipeline("v_prediction"))
    teacher = family.denoiser
    wrong = Family(**{**vars(family), "denoiser": Denoiser(teacher.network, teacher.schedule, "eps", teacher.call)})
    with pytest.raises(ExportError, match="not exported: the reloaded pipeline differs from the trainer's sampler by"):
        export(wrong, perturbed(family), 2, tmp_path / "pipeline", prompts=PROMPTS, card={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_ddim_student_ships_a_scheduler_of_the_same_times_that_ends_at_the_cleanest(
    prediction_type: str, num_steps: int
) -> None:
    family = sd.wrap(tiny.pipeline(prediction_type))
    network = perturbed(family)
    shipped = family.pipeline(network, num_steps, "ddim")
    shipped.scheduler.set_timesteps(num_steps)
    assert shipped.scheduler.timesteps.tolist() == family.student_times(num_steps)
    start = noise()
    with torch.no_grad():
        ours = sample_student(
            family.denoiser.with_network(network),
            family.denoiser.schedule,
            start,
            family.student_times(num_steps),
            family.encode_prompts(PROMPTS),
            "ddim",
        )
    close(ours, call(shipped, num_steps, latents=start))
    with pytest.raises(ValueError, match="original"):
        call(shipped, num_steps + 1)


# A student that starts at another time than the last


@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
@pytest.mark.parametrize(("num_steps", "times"), [(1, [399]), (2, [399, 199]), (4, [399, 299, 199, 99])])
def test_an_earlier_start_is_in_the_scheduler_that_ships(sampler: Sampler, num_steps: int, times: list[int]) -> None:
    """A shorter table: the times follow from the saved config alone, and the noise at each is the teacher's."""
    pipeline = tiny.pipeline("v_prediction")
    family = sd.wrap(pipeline, start=0.4)
    assert family.student_times(num_steps) == times
    shipped = family.pipeline(family.student(), num_steps, sampler).scheduler
    shipped.set_timesteps(num_steps)
    assert shipped.timesteps.tolist() == times
    assert shipped.init_noise_sigma == 1
    assert torch.equal(shipped.alphas_cumprod, pipeline.scheduler.alphas_cumprod[:400])
    assert family.denoiser.schedule.t_max == 999  # the teacher's own times stay


@pytest.mark.parametrize(
    ("prediction_type", "num_steps", "sampler"),
    [("epsilon", 1, "renoise"), ("v_prediction", 2, "renoise"), ("epsilon", 2, "ddim")],
)
def test_a_student_of_an_earlier_start_passes_the_gate_and_feeds_pure_noise_at_that_time(
    prediction_type: str, num_steps: int, sampler: Sampler, tmp_path: Path
) -> None:
    family = sd.wrap(tiny.pipeline(prediction_type), start=0.4)
    network = perturbed(family)
    folder = tmp_path / "pipeline"
    assert export(family, network, num_steps, folder, prompts=PROMPTS, card={}, sampler=sampler) <= TOLERANCE
    pipeline, seen = DiffusionPipeline.from_pretrained(folder), []
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args), with_kwargs=True)
    images = call(pipeline, num_steps, 3)
    x_t, t = seen[0][:2]
    assert t == 399
    assert torch.equal(x_t, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    if sampler == "renoise":
        close(few_steps(family, network, num_steps, 3, PROMPTS), images)
    later = sd.wrap(tiny.pipeline(prediction_type)).pipeline(network, num_steps, sampler)
    assert (call(later, num_steps, 3) - images).abs().max() > 100 * TOLERANCE
    with pytest.raises(ValueError, match="original"):
        call(pipeline, num_steps + 1)


def test_the_first_of_a_full_table_s_calls_at_399_is_that_of_the_short_one() -> None:
    """As DMD2's card calls its one-step student: LCMScheduler with timesteps=[399]."""
    pipeline = tiny.pipeline("epsilon")
    short, full = sd.wrap(pipeline, start=0.4), sd.wrap(pipeline)
    network = perturbed(short)
    g = torch.Generator().manual_seed(3)
    reference = full.pipeline(network, 1)(PROMPTS, timesteps=[399], generator=g, output_type="latent").images
    close(call(short.pipeline(network, 1), 1, 3), reference)


def test_a_start_without_enough_times_is_refused() -> None:
    family = sd.wrap(tiny.pipeline(), start=0.003)
    assert family.student_times(3) == [2, 1, 0]
    with pytest.raises(ValueError, match=r"student\.start 0\.003 leaves 3 of 1000 times for 4 steps; raise it"):
        family.student_times(4)


def test_loading_hands_the_start_on(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path)
    assert sd.load(tmp_path, start=0.4).student_times(1) == [399]
