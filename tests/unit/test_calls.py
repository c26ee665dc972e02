"""What stock calls take: prompts, class labels in their place, or a number of images; and who calls them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import calls, export
from fastgen.evaluation import images, latency, runner
from fastgen.evaluation.judge import image_size
from fastgen.evaluation.runner import Subject
from fastgen.pipelines import ddpm, dit
from tests import tiny
from tests.command import done, fastgen
from tests.families import ddpm as of_ddpm
from tests.families import dit as of_dit

Make = Callable[[], Any]
UNLABELLED = "unlabelled"
MADE: dict[str, Make] = {
    "sd": tiny.pipeline,
    "dit": lambda: of_dit.pipeline(0),
    "ddpm": lambda: of_ddpm.ddpm(0),
    "ddim": lambda: of_ddpm.ddim(0),
    "labelled": lambda: of_ddpm.labelled(0),
    UNLABELLED: lambda: of_ddpm.ConsistencyModelPipeline(of_ddpm.network(0, sample_size=8), tiny.scheduler()),
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sd", {"prompt": ["3", "7"]}),
        ("dit", {"class_labels": [3, 7]}),
        ("ddpm", {"batch_size": 2}),
        ("ddim", {"batch_size": 2}),
        ("labelled", {"batch_size": 2, "class_labels": [3, 7]}),
        (UNLABELLED, {"batch_size": 2}),
    ],
)
def test_a_call_is_given_what_it_takes(name: str, given: dict[str, Any]) -> None:
    pipeline = MADE[name]()
    assert calls.prompted(pipeline, ("3", "7")) == given
    alone = {"prompt": "3"} if name == "sd" else calls.prompted(pipeline, ["3"])
    assert calls.prompted(pipeline, "3") == alone
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(**given, num_inference_steps=1, output_type="np")[0]
    assert len(made) == 2


def test_settings_that_a_call_does_not_take_are_left_out() -> None:
    given = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": None}
    assert calls.settled(MADE["sd"](), given) == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert calls.settled(MADE["ddpm"](), given) == {"num_inference_steps": 2}

    class Anything:
        def __call__(self, **named: Any) -> None: ...

    assert calls.takes(Anything(), "guidance_scale")


def test_labels_are_words_of_the_pipeline_or_numbers() -> None:
    assert calls.labels(MADE["dit"](), ["goldfish", " white shark ", "0", "999"]) == [1, 2, 0, 999]
    assert calls.labels(MADE["labelled"](), ["0", "9"]) == [0, 9]


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("dit", "goldfsh", "unknown class label 'goldfsh'; did you mean 'goldfish'?"),
        ("dit", "emu", "unknown class label 'emu'; give a word of its labels, or a number from 0 to 999"),
        ("dit", "1000", "unknown class label '1000'; give a word of its labels, or a number from 0 to 999"),
        ("labelled", "10", "unknown class label '10'; give a number from 0 to 9"),
        ("labelled", "-1", "unknown class label '-1'; give a number from 0 to 9"),
        ("labelled", "", "unknown class label ''; give a number from 0 to 9"),
    ],
)
def test_an_unknown_label_is_said_in_one_line(name: str, label: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        calls.prompted(MADE[name](), [label])


# Where pipelines are called


@pytest.mark.parametrize("name", [name for name in MADE if name != "sd"])
def test_evaluation_calls_them(name: str) -> None:
    """Guided by a scale where the call takes one; an image is that of its own seed and prompt."""
    pipeline = runner.open_pipeline(MADE[name](), torch.float32, "cpu")
    network = pipeline.transformer if name == "dit" else pipeline.unet
    network.eval()  # as it comes from disk

    def made(prompts: list[str], seeds: list[int]) -> Tensor:
        return torch.cat(list(images.generate(pipeline, prompts, seeds, steps=2, guidance_scale=3.0, batch_size=2)))

    found = made(["3", "7", "3"], [0, 1, 2])
    assert found.shape[:2] == (3, 3)
    assert (found[1:2].int() - made(["7"], [1]).int()).abs().max() <= 1
    subject = runner.resolved(Subject("teacher", "teacher", pipeline, 2, 3.0), pipeline)
    assert subject.guidance_scale == (3.0 if name == "dit" else None)
    arguments = images.arguments(pipeline, subject.steps, 3.0)
    values = latency.measure(pipeline, ["3", "7"], arguments, repeats=1)
    assert values["network_evaluations"] == (4 if name == "dit" else 2)


def test_the_size_of_images_is_known_without_a_word_of_the_pipeline(tmp_path: Path) -> None:
    for name, size in {"dit": (16, 16), "ddpm": (8, 16), "labelled": (8, 8), "sd": (16, 16)}.items():
        MADE[name]().save_pretrained(tmp_path / name)
        assert image_size(tmp_path / name) == size


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students of two steps that renoise: ``dit`` and ``ddpm``."""
    folder = tmp_path_factory.mktemp("students")
    for name, module, prompts in (("dit", dit, ["goldfish", "7"]), ("ddpm", ddpm, ["", "any"])):
        family: Any = module.wrap(MADE[name]())
        card = {"num_inference_steps": 2, "guidance_scale": 1.0}
        export.export(family, tiny.perturbed(family.student()), 2, folder / name, prompts=prompts, card=card)
    return folder


def test_a_student_s_card_names_a_guidance_scale_where_its_call_takes_one(students: Path) -> None:
    cards = {name: json.loads((students / name / "fastgen.json").read_text()) for name in ("dit", "ddpm")}
    assert cards["dit"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert cards["ddpm"] == {"num_inference_steps": 2}


def test_load_calls_a_student_as_it_was_trained(students: Path) -> None:
    for name in ("dit", "ddpm"):
        card = students / name / "fastgen.json"
        card.write_text('{"num_inference_steps": 2, "guidance_scale": 1.0}')  # of whichever version
        pipeline = export.load(students / name)
        values = latency.measure(pipeline, ["7"], {}, repeats=1)
        assert values["network_evaluations"] == 2


def test_generate_takes_labels_for_prompts(students: Path, tmp_path: Path) -> None:
    """And the noise between the steps is that of the seed, though DiTPipeline hands no generator on."""
    for place in ("one", "two"):
        done("generate", students / "dit", "-p", "goldfish", "-p", "1", "-p", "7", "-o", tmp_path / place)
    found = {file.name: images.read_png(file) for file in sorted((tmp_path / "one").iterdir())}
    assert list(found) == ["0000_00.png", "0001_00.png", "0002_00.png"]
    assert torch.equal(found["0000_00.png"], found["0001_00.png"])
    assert not torch.equal(found["0000_00.png"], found["0002_00.png"])
    for name, image in found.items():
        assert torch.equal(images.read_png(tmp_path / "two" / name), image)
    done("generate", students / "ddpm", "-p", "whatever", "-o", tmp_path / "ddpm")
    assert images.read_png(tmp_path / "ddpm" / "0000_00.png").shape == (3, 8, 16)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("ddpm", ["--guidance-scale", "2"], r"ddpm: is a DDPMPipeline, whose call takes no guidance_scale; leave it"),
        ("dit", ["-p", "goldfsh"], r"unknown class label 'goldfsh'; did you mean 'goldfish'\?"),
    ],
)
def test_generate_says_what_a_pipeline_does_not_take(
    students: Path, tmp_path: Path, name: str, words: list[str], message: str
) -> None:
    result = fastgen("generate", students / name, "-p", "7", *words, "-o", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(rf"fastgen: [^\n]*{message}[^\n]*\n", result.err)
    assert not (tmp_path / "out").exists()
