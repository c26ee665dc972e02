"""What the contract's one pipeline does not show of Sana: its usual scheduler, times from 0 to 1, the instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from fastgen import derivative, export, registry
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.sampling import ddim, sample
from tests import tiny

from . import sana
from .test_families import called_at, close

PROMPTS = list(sana.CASE.prompts)


def wrapped(made: Any, image_size: tuple[int, int] | None = None) -> Family:
    found: Family = registry.find("family", "sana").wrap(made, image_size=image_size)
    return found


def test_a_teacher_of_times_from_0_to_1() -> None:
    made = sana.pipeline(0, timestep_scale=0.001)
    family = wrapped(made)
    theirs = family.run(made, PROMPTS, 4, torch.Generator().manual_seed(5), 4.0)
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    denoise = guided(family.denoiser, family.uncond(), 4.0)
    with torch.no_grad():
        times = called_at(made.scheduler)
        close(sample(denoise, family.denoiser.schedule, x_t, times, family.encode_prompts(PROMPTS), ddim), theirs)


def test_conditions_are_those_of_the_stock_call() -> None:
    made = sana.pipeline(0)
    given: dict[str, Any] = {}
    made.transformer.register_forward_pre_hook(lambda _, args, named: given.update(named), with_kwargs=True)
    family = wrapped(made)
    family.run(made, PROMPTS, 1, torch.Generator().manual_seed(5), 4.0)
    cond, uncond = family.encode_prompts(PROMPTS), family.uncond()
    for name, key in (("text", "encoder_hidden_states"), ("mask", "encoder_attention_mask")):
        close(torch.cat([uncond[name].expand_as(cond[name]), cond[name]]), given[key].float())


def test_a_prompt_that_is_cut_is_warned_of() -> None:
    family = wrapped(sana.pipeline(0))
    fits = family.encode_prompts(["q" * 298])
    assert fits["mask"].all()
    with pytest.warns(UserWarning, match="a prompt was cut by 2 tokens; shorten it"):
        cut = family.encode_prompts(["q" * 300])
    close(cut["text"], fits["text"])


def test_a_call_that_rounds_sizes_is_the_same_where_the_size_is_of_the_table() -> None:
    made = sana.pipeline(0, sample_size=16)
    family = wrapped(made, (512, 512))
    given = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = made(PROMPTS[:1], height=500, width=500, generator=torch.Generator().manual_seed(5), **given)[0]
    close(family.run(made, PROMPTS[:1], 1, torch.Generator().manual_seed(5), 1.0), theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' own, of its scheduler
@pytest.mark.parametrize("num_steps", [1, 4])
def test_students_of_the_usual_teacher_s_scheduler_leave(num_steps: int, tmp_path: Path) -> None:
    made = sana.pipeline(0)
    made.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    family = wrapped(made, (32, 64))
    assert family.denoiser.schedule.shift == 2
    network = tiny.perturbed(family.student())
    folder = tmp_path / "student"
    assert export.export(family, network, num_steps, folder, prompts=PROMPTS, card={}) < 1e-4
    assert export.export(family, family.denoiser.network, None, folder, prompts=PROMPTS, card={}) < 1e-4


def test_its_derivative_is_exact_in_forward_mode() -> None:
    """sCM's needs it of linear attention, too."""
    family = wrapped(sana.pipeline(0, timestep_scale=0.001))
    x_t, dx = torch.randn(2, 2, *family.latent_shape)
    t, dt, cond = torch.tensor([0.3, 0.7]), torch.ones(2), family.encode_prompts(PROMPTS)
    _, exact = derivative.along(family.denoiser, lambda pred: pred.flow, x_t, t, cond, dx, dt, "jvp")
    _, near = derivative.along(
        family.denoiser, lambda pred: pred.flow, x_t, t, cond, dx, dt, "finite_differences", 3e-3
    )
    assert (exact - near).abs().max() < 0.03 * exact.abs().max()
