"""What is particular to ``ddpm``: which class runs which student, pixels for latents, no guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMPipeline, DDPMScheduler

from fastgen import export
from fastgen.attention import set_attention
from fastgen.denoiser import guided
from fastgen.method import Batch, drop_captions
from fastgen.pipelines import ddpm
from fastgen.sampling import Sampler
from tests import tiny

from .ddpm import ddim, labelled, network
from .ddpm import ddpm as plain


def labelled_ddpm(seed: int) -> DDPMPipeline:
    """As it may come from training; its own class cannot call it."""
    return DDPMPipeline(labelled(seed).unet, tiny.scheduler())


def published(seed: int) -> DDPMPipeline:
    """With the scheduler of most that are published: it clips, and draws noise at each step."""
    return DDPMPipeline(network(seed), DDPMScheduler(beta_end=0.02, variance_type="fixed_large"))


@pytest.mark.parametrize(
    ("teacher", "num_steps", "sampler", "wanted"),
    [
        (published, None, "renoise", "DDPMPipeline"),
        (published, 2, "renoise", "DDPMPipeline"),
        (published, 2, "ddim", "DDPMPipeline"),
        (plain, None, "renoise", "DDPMPipeline"),
        (plain, 2, "renoise", "DDPMPipeline"),
        (plain, 2, "ddim", "DDPMPipeline"),
        (ddim, None, "renoise", "DDIMPipeline"),
        (ddim, 2, "renoise", "DDPMPipeline"),
        (ddim, 2, "ddim", "DDIMPipeline"),
        (labelled, None, "renoise", "ConsistencyModelPipeline"),
        (labelled, 2, "renoise", "ConsistencyModelPipeline"),
        (labelled, 2, "ddim", "ConsistencyModelPipeline"),
        (labelled_ddpm, None, "renoise", "ConsistencyModelPipeline"),
        (labelled_ddpm, 2, "renoise", "ConsistencyModelPipeline"),
    ],
)
def test_a_student_leaves_as_the_class_that_runs_it(
    teacher: Any, num_steps: int | None, sampler: Sampler, wanted: str, tmp_path: Path
) -> None:
    """The export's gate calls it, at a number of steps that does not divide the table."""
    family = ddpm.wrap(teacher(0))
    made: Any = tiny.perturbed(family.student())
    difference = export.export(
        family,
        made,
        num_steps and 3,
        tmp_path / "out",
        prompts=["3", "7"],
        card={"guidance_scale": 1.0},
        sampler=sampler,
    )
    assert difference < 1e-5
    assert export.class_of(tmp_path / "out") == wanted
    assert export.read_card(tmp_path / "out").get("guidance_scale") is None


def test_ddim_pipeline_would_not_keep_a_renoising_scheduler() -> None:
    """Why its students leave as another class."""
    family = ddpm.wrap(ddim(0))
    made: Any = family.pipeline(family.student(), 2)
    assert type(ddpm.DDIMPipeline(made.unet, made.scheduler).scheduler).__name__ == "DDIMScheduler"
    assert type(made.scheduler).__name__ == "LCMScheduler"


def test_latents_are_pixels() -> None:
    family = ddpm.wrap(plain(0))
    pixels = torch.rand(2, 3, 8, 16) * 2 - 1
    assert torch.equal(family.encode(pixels), pixels)
    assert torch.equal(family.decode(pixels), pixels)
    assert family.latent_shape == (3, *family.image_size) == (3, 8, 16)


def test_where_nothing_is_a_condition_guidance_changes_nothing() -> None:
    family = ddpm.wrap(plain(0))
    cond = family.encode_prompts(["a", "b"])
    assert cond == family.uncond() == {}
    x_t, t = torch.randn(2, 3, 8, 16), torch.tensor([10.0, 800.0])
    with torch.no_grad():
        wanted = family.denoiser(x_t, t, cond).y
        for scale in (7.5, torch.tensor([2.0, 3.0])):
            assert torch.equal(guided(family.denoiser, family.uncond(), scale)(x_t, t, cond).y, wanted)


def test_classes_without_a_null_class_cannot_guide() -> None:
    family = ddpm.wrap(labelled(0))
    cond = family.encode_prompts(["3", "7"])
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 800.0])
    guided(family.denoiser, family.uncond(), 1.0)(x_t, t, cond)
    with pytest.raises(ValueError, match="no prediction without its label to guide it by; set guidance scales to 1"):
        guided(family.denoiser, family.uncond(), 2.0)(x_t, t, cond)
    batch = Batch([0, 1], cond, family.uncond())
    assert drop_captions(batch, torch.tensor([False, False])) is cond
    with pytest.raises(ValueError, match="drop no captions"):
        drop_captions(batch, torch.tensor([False, True]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 1, "out_channels": 1}, "a U-Net of 1 channels in and 1 out; this family takes 3 and 3"),
        ({"out_channels": 6}, "a U-Net of 3 channels in and 6 out; this family takes 3 and 3"),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 1000},
            "a table of timesteps is none between them; time_embedding_type must be another",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'; use num_class_embeds"),
        ({"sample_size": None}, "no stock pipeline runs this U-Net at its sample_size None; a number of pixels"),
        ({"num_class_embeds": 10}, r"at its sample_size \(8, 16\); a number of pixels would do"),
    ],
)
def test_what_no_stock_pipeline_runs_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddpm.wrap(DDPMPipeline(network(0, **changes), tiny.scheduler()))


def test_consistency_models_are_no_teachers() -> None:
    made = labelled(0)
    made.scheduler = CMStochasticIterativeScheduler()
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler has no table of alphas_cumprod"):
        ddpm.wrap(made)


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="image size 16 x 16: the call of DDPMPipeline takes none and makes 8 x 16"):
        ddpm.wrap(plain(0), image_size=(16, 16))


def test_a_network_without_a_middle_names_none() -> None:
    family = ddpm.wrap(DDPMPipeline(network(0, mid_block_type=None), tiny.scheduler()))
    assert [block.name for block in family.blocks] == ["down_blocks.0", "down_blocks.1"]


def test_attention_is_switched_though_the_network_does_not_list_it() -> None:
    unet, x_t = network(0).eval(), torch.randn(2, 3, 8, 16)
    outputs = []
    for choice in ("eager", "sdpa"):
        set_attention([unet], choice, torch.device("cpu"))
        with torch.no_grad():
            outputs.append(unet(x_t, torch.tensor([3.0, 900.0])).sample)
    kinds = {type(layer.processor).__name__ for layer in unet.modules() if hasattr(layer, "set_processor")}
    assert kinds == {"AttnProcessor2_0"}
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
