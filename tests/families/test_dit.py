"""What is particular to ``dit``: class labels, learned variances, a call that gives one size of images alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import calls
from fastgen.attention import set_attention
from fastgen.pipelines import dit, vp
from fastgen.sampling import Sampler
from tests import tiny

from .dit import LABELS, pipeline


def output(network: Any, x_t: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return dit.call(network, x_t, torch.tensor([3.0, 900.0]), {"label": torch.tensor([1, 7])})


def test_variances_are_dropped_and_those_that_are_not_there_are_not() -> None:
    network, x_t = pipeline(0).transformer.eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        whole = network(x_t, timestep=torch.tensor([3, 900]), class_labels=torch.tensor([1, 7])).sample
    assert whole.shape == (2, 8, 8, 8)
    assert torch.equal(output(network, x_t), whole[:, :4])
    plain = type(network).from_config(network.config, out_channels=4)
    assert output(plain, x_t).shape == x_t.shape


def test_a_network_in_training_drops_no_label_by_itself() -> None:
    """Diffusers' drops one of ten, by torch's global noise."""
    made, x_t = pipeline(0), torch.randn(2, 4, 8, 8)
    family = dit.wrap(made)
    student: Any = family.student()
    alone = output(student.eval(), x_t)
    student.train()
    assert all(torch.equal(output(student, x_t), alone) for _ in range(30))


def test_no_label_is_the_null_class() -> None:
    family = dit.wrap(pipeline(0))
    assert family.uncond()["label"].tolist() == [1000]
    assert family.encode_prompts(["goldfish", "12"])["label"].tolist() == [1, 12]
    with pytest.raises(ValueError, match="unknown class label 'a red apple'"):
        family.encode_prompts(["a red apple"])


def test_labels_go_with_the_student(tmp_path: Path) -> None:
    """Also those of a pipeline from disk, whose class does not keep them in its config."""
    pipeline(0).save_pretrained(tmp_path / "teacher")
    family = dit.load(tmp_path / "teacher")
    made: Any = family.pipeline(family.student(), 1)
    made.save_pretrained(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "model_index.json").read_text())["id2label"] == LABELS
    again: Any = dit.DiTPipeline.from_pretrained(tmp_path / "student")
    assert calls.labels(again, ["goldfish", "white shark"]) == [1, 2]


def test_another_size_is_refused() -> None:
    assert dit.wrap(pipeline(0), image_size=(16, 16)).image_size == (16, 16)
    with pytest.raises(ValueError, match="image size 16 x 32: the call of DiTPipeline takes none and makes 16 x 16"):
        dit.wrap(pipeline(0), image_size=(16, 32))


def test_attention_is_switched_though_the_network_does_not_list_it() -> None:
    network, x_t = pipeline(0).transformer.eval(), torch.randn(2, 4, 8, 8)
    before = output(network, x_t)
    for choice in ("eager", "sdpa"):
        assert set_attention([network], choice, torch.device("cpu")) == choice
        kinds = {type(block.attn1.processor).__name__ for block in network.transformer_blocks}
        assert kinds == {"AttnProcessor" if choice == "eager" else "AttnProcessor2_0"}
        assert (output(network, x_t) - before).abs().max() < 1e-5


@pytest.mark.parametrize("start", [1.0, 0.4])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 7])
def test_a_student_s_ddim_scheduler_steps_on_the_times_of_its_other_one(num_steps: int, start: float) -> None:
    """Also where the table cannot be divided evenly: the scheduler then reaches, and steps by, whole entries."""
    teacher = tiny.scheduler()
    wanted = vp.times(vp.student_scheduler(teacher, num_steps, start=start), num_steps)
    made = {s: vp.plain_student_scheduler(teacher, num_steps, s, start) for s in ("renoise", "ddim")}
    for sampler, scheduler in made.items():
        assert vp.times(scheduler, num_steps) == wanted
        again: Any = type(scheduler).from_config(json.loads(scheduler.to_json_string()))
        assert vp.times(again, num_steps) == wanted, sampler
    scheduler = made["ddim"]
    skipped = scheduler.config.num_train_timesteps // num_steps
    assert [t - skipped for t in wanted[:-1]] == wanted[1:]
    assert wanted[-1] - skipped == -1
    assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod[: len(scheduler.alphas_cumprod)])
    assert scheduler.final_alpha_cumprod == teacher.alphas_cumprod[0]


@pytest.mark.parametrize(("sampler", "name"), [("renoise", "LCMScheduler"), ("ddim", "DDIMScheduler")])
def test_students_have_the_schedulers_that_their_call_can_step(sampler: Sampler, name: str) -> None:
    family = dit.wrap(pipeline(0))
    made: Any = family.pipeline(family.student(), 3, sampler)
    assert type(made.scheduler).__name__ == name
