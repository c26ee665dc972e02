"""A student of N steps called with fewer: the times it is called at, and what comes out, in plain Diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fastgen.evaluation import judge
from fastgen.evaluation.config import EvalConfig
from fastgen.pipelines import sd, vp
from fastgen.sampling import Sampler, sample_student
from tests import tiny

COUNTS = [(made_for, called) for made_for in (1, 2, 4, 5, 8) for called in range(1, made_for + 1)]
PROMPTS = ["a red apple", "a dog left of a cat"]
SAMPLERS: tuple[Sampler, ...] = ("renoise", "ddim")


def times_of(scheduler: object, num_steps: int) -> list[float]:
    scheduler.set_timesteps(num_steps)  # type: ignore[attr-defined]
    return [float(t) for t in scheduler.timesteps]  # type: ignore[attr-defined]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("made_for", "called"), COUNTS)
def test_fewer_steps_use_some_of_the_trained_times_from_the_first_on(
    made_for: int, called: int, sampler: Sampler
) -> None:
    trained = sd.wrap(tiny.pipeline()).student_times(made_for)
    found = times_of(vp.student_scheduler(tiny.scheduler(), made_for, sampler), called)
    assert found == [trained[made_for * i // called] for i in range(called)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_of_four_steps_are_those_of_a_student_made_for_two(sampler: Sampler) -> None:
    assert times_of(vp.student_scheduler(tiny.scheduler(), 4, sampler), 2) == [999, 499]
    assert times_of(vp.student_scheduler(tiny.scheduler(), 4, sampler), 3) == [999, 749, 499]


@pytest.fixture(scope="module", params=SAMPLERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sampler, Path]:
    """A student of four steps on disk that is no longer its teacher."""
    family = sd.wrap(tiny.pipeline("v_prediction"))
    network = tiny.perturbed(family.student())
    folder = tmp_path_factory.mktemp(request.param)
    family.pipeline(network, 4, request.param).save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("called", [1, 2, 3, 4])
def test_the_pipeline_gives_what_the_trainer_s_sampler_gives_at_those_times(
    exported: tuple[Sampler, Path], called: int
) -> None:
    sampler, folder = exported
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    family = sd.wrap(tiny.pipeline("v_prediction"))
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    noise = [torch.Generator().manual_seed(2) for _ in range(2)]
    call = {"num_inference_steps": called, "latents": x_t, "generator": noise[0], "output_type": "latent"}
    theirs = pipeline(PROMPTS, **call).images
    student = family.denoiser.with_network(pipeline.unet)
    with torch.no_grad():
        ours = sample_student(
            student,
            student.schedule,
            x_t,
            [family.student_times(4)[4 * i // called] for i in range(called)],
            family.encode_prompts(PROMPTS),
            sampler,
            lambda: torch.randn(x_t.shape, generator=noise[1]),
        )
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_more_steps_than_it_was_made_for_are_refused(exported: tuple[Sampler, Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(exported[1])
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(
        ValueError, match=r"original_steps x strength`: 4 x 1\.0 is smaller than `num_inference_steps`: 5"
    ):
        pipeline(PROMPTS, num_inference_steps=5)


@pytest.mark.parametrize(
    ("card", "want"),
    [
        (
            {"method": "lcm", "num_inference_steps": 4},
            [("lcm, 4 steps", None), ("lcm, 2 steps", 2), ("lcm, 1 step", 1)],
        ),
        ({"method": "dmd", "num_inference_steps": 1}, [("dmd, 1 step", None)]),
        ({"method": "agd"}, [("agd", None), ("agd, 4 steps", 4), ("agd, 2 steps", 2), ("agd, 1 step", 1)]),
    ],
)
def test_a_student_is_judged_at_its_own_steps_and_at_those_asked_for_that_it_takes(
    tmp_path: Path, card: dict[str, object], want: list[tuple[str, int | None]]
) -> None:
    (tmp_path / "fastgen.json").write_text(json.dumps(card))
    found = judge.students(tmp_path, EvalConfig(student_steps=[4, 2, 1]))
    assert [(subject.name, subject.steps) for subject in found] == want
    assert {(subject.role, subject.pipeline) for subject in found} == {("student", str(tmp_path))}
    assert [s.name for s in judge.students(tmp_path, EvalConfig())] == [want[0][0]], "its own only, if none is asked"
    renamed = judge.students(tmp_path, EvalConfig(), "mine")
    assert renamed[0].name == want[0][0].replace(str(card["method"]), "mine")
