"""SANA-Sprint beyond the contract: the guidance scale as an input, and students of a ``SanaPipeline``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from torch import Tensor

from fastgen import export, recipe, registry, train
from fastgen.coordinates import trigflow
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.guidance import with_guidance
from fastgen.sampling import ddim, renoise, sample
from tests import tiny

from . import sana, sana_sprint
from .test_families import called_at, close

PROMPTS = list(sana.CASE.prompts)
SPRINT = registry.find("family", "sana_sprint")


def teacher(seed: int = 0) -> SanaPipeline:
    made = sana.pipeline(seed, timestep_scale=0.001)
    made.set_progress_bar_config(disable=True)
    return made


def ours(family: Family, num_steps: int, guidance_scale: float | None) -> Tensor:
    """By our sampler, on what a stock call of a student draws."""
    generator, cond = torch.Generator().manual_seed(5), family.encode_prompts(PROMPTS)
    cond = cond if guidance_scale is None else with_guidance(cond, guidance_scale)
    x_t = torch.randn(2, *family.latent_shape, generator=generator)
    with torch.no_grad():
        return sample(
            family.denoiser,
            family.denoiser.schedule,
            x_t,
            family.student_times(num_steps),
            cond,
            renoise,
            lambda: torch.randn(x_t.shape, generator=generator),
        )


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_its_network_takes_the_guidance_scale_as_the_stock_call_does(num_steps: int) -> None:
    made = sana_sprint.pipeline(0, guided=True)
    family = SPRINT.wrap(made, image_size=(32, 64))
    found = [family.run(made, PROMPTS, num_steps, torch.Generator().manual_seed(5), scale) for scale in (2.0, 6.0)]
    assert (found[0] - found[1]).abs().max() > 1e-3
    for scale, theirs in zip((2.0, 6.0), found, strict=True):
        close(ours(family, num_steps, scale), theirs)


def test_its_guidance_scale_can_be_fixed() -> None:
    made = sana_sprint.pipeline(0, guided=True)
    family = SPRINT.wrap(made)
    theirs = family.run(made, PROMPTS, 2, torch.Generator().manual_seed(5), 6.0)
    assert family.fix_guidance is not None
    family.fix_guidance(6.0)
    close(ours(family, 2, None), theirs)
    close(ours(family, 2, 3.0), theirs)
    assert SPRINT.wrap(made).fix_guidance is None


def test_the_pipeline_s_trigflow_is_ours() -> None:
    """Its network's output in TrigFlow, as its call has it, is the velocity of our coordinates."""
    made = sana_sprint.pipeline(0)
    family, x_t = SPRINT.wrap(made), torch.randn(2, 4, 8, 8)
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        pred = family.denoiser(x_t, t, family.encode_prompts(PROMPTS))
    here, s = trigflow(pred.at), t.reshape(-1, 1, 1, 1)
    stock = ((1 - 2 * s) * x_t + (1 - 2 * s + 2 * s**2) * pred.y) / (s**2 + (1 - s) ** 2).sqrt()
    close(here.velocity(pred.x0, pred.eps), stock)
    close(here.clock.flatten().tan() / (1 + here.clock.flatten().tan()), t)


def test_times_are_those_of_the_stock_call() -> None:
    made = sana_sprint.pipeline(0)
    met: list[float] = []
    made.transformer.register_forward_pre_hook(
        lambda _, args, named: met.append(float(named["timestep"][0])), with_kwargs=True
    )
    family = SPRINT.wrap(made)
    for num_steps in (1, 2, 4):
        met.clear()
        family.run(made, PROMPTS, num_steps, torch.Generator().manual_seed(5))
        assert met == pytest.approx(family.student_times(num_steps), abs=1e-5)
        assert family.student_times(num_steps)[0] == 1.0


def test_a_sana_pipeline_teaches_as_it_is() -> None:
    made = teacher()
    theirs = SPRINT.wrap(made).run(made, PROMPTS, 4, torch.Generator().manual_seed(5), 4.0)
    family = SPRINT.wrap(made)
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    denoise = guided(family.denoiser, family.uncond(), 4.0)
    with torch.no_grad():
        cond, times = family.encode_prompts(PROMPTS), called_at(made.scheduler)
        close(sample(denoise, family.denoiser.schedule, x_t, times, cond, ddim), theirs)
    assert family.fix_guidance is None
    own = {id(p) for p in made.transformer.parameters()}
    added = {name for name, p in family.denoiser.network.named_parameters() if id(p) not in own}
    assert {name.rsplit(".", 2)[0] for name in added} == {"time_embed.guidance_embedder"}


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_students_of_a_sana_pipeline_leave_as_sprint(num_steps: int, embed: bool, tmp_path: Path) -> None:
    family = SPRINT.wrap(teacher())
    network = tiny.perturbed(family.student(embed))
    folder, scale = tmp_path / "student", 4.5 if embed else None
    export.export(family, network, num_steps, folder, prompts=PROMPTS, card={}, guidance_scale=scale)
    made = SanaSprintPipeline.from_pretrained(folder)
    found = [family.run(made, PROMPTS, num_steps, torch.Generator().manual_seed(5), w) for w in (2.0, 6.0)]
    assert embed == bool((found[0] - found[1]).abs().max() > 1e-3)


def made_for(folder: Path, method: dict[str, Any], num_steps: int, *roles: str) -> recipe.Recipe:
    """A run on one picture with a SanaPipeline as the teacher."""
    from PIL import Image

    teacher().save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "images" / "0.png")
    line = {"file": "0.png", "caption": PROMPTS[0]}
    (folder / "images" / "captions.jsonl").write_text(json.dumps(line) + "\n")
    tree: dict[str, Any] = {
        "model": {"path": str(folder / "teacher"), "family": "sana_sprint"},
        "method": method,
        "student": {"steps": num_steps},
        "data": {"source": "images", "path": str(folder / "images")},
        "optim": {role: {"lr": 1e-2, "warmup": 0} for role in roles},
        "run": {"out": str(folder / "run"), "steps": 2, "batch_size": 2},
    }
    return recipe.decode(tree, "test")


@pytest.mark.parametrize("num_steps", [2, 4])
def test_a_sana_sprint_of_its_own(num_steps: int, tmp_path: Path) -> None:
    """``scm`` with guidance as an input on a SanaPipeline, through training, export and ``load``."""
    scales = {"low": 4.0, "high": 5.0, "embed": True, "default": 4.5}
    method = {"name": "scm", "guidance": scales, "adversarial": {"weight": 0.5}}
    run = train.train(made_for(tmp_path, method, num_steps, "student", "discriminator"))
    index = json.loads((run / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    assert index["scheduler"] == ["diffusers", "SCMScheduler"]
    card = export.read_card(run / "pipeline")
    assert (card["num_inference_steps"], card["guidance_scale"]) == (num_steps, 4.5)
    given = {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "latent"}
    ours = export.load(run / "pipeline")(PROMPTS, generator=torch.Generator().manual_seed(5), **given)[0]
    given |= {} if num_steps == 2 else {"num_inference_steps": 4, "intermediate_timesteps": None}
    plain = SanaSprintPipeline.from_pretrained(run / "pipeline")
    assert torch.equal(ours, plain(PROMPTS, generator=torch.Generator().manual_seed(5), **given)[0])


def test_what_sprint_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes them times 1000; name a teacher of timestep_scale 0\.001"):
        SPRINT.wrap(sana.pipeline(0))
    with pytest.raises(ValueError, match=r"student\.start 0\.5 cannot be told SCMScheduler"):
        SPRINT.wrap(teacher(), start=0.5)
    family = SPRINT.wrap(teacher())
    with pytest.raises(ValueError, match="are sampled by ddim; name the family sana"):
        family.pipeline(family.student(), 2, "ddim")
    with pytest.raises(ValueError, match=r"no guidance scale; set guidance\.embed: false"):
        family.pipeline(tiny.perturbed(family.student(True)), None)


def test_a_student_that_keeps_its_noise_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are sampled by ddim; name the family sana"):
        train.build(made_for(tmp_path, {"name": "pcm", "guidance": {"embed": False}}, 2, "student"))


def test_what_is_sampled_as_its_teacher_leaves_as_its_teacher(tmp_path: Path) -> None:
    made = teacher()
    family = SPRINT.wrap(made)
    network = tiny.perturbed(family.student())
    export.export(family, network, None, tmp_path / "made", prompts=PROMPTS, card={})
    found = SanaPipeline.from_pretrained(tmp_path / "made")
    assert type(found.scheduler) is type(made.scheduler)
    assert not found.transformer.config.guidance_embeds
    sprint = sana_sprint.pipeline(0)
    family_of_sprint = SPRINT.wrap(sprint)
    assert isinstance(family_of_sprint.pipeline(family_of_sprint.student(), None, "ddim"), SanaSprintPipeline)
    assert family.pipeline(family.denoiser.network, None).transformer.state_dict().keys() == (
        made.transformer.state_dict().keys()
    )
