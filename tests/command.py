"""The command line called in this process, and a small world of files on disk for it to work on."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from fastgen import cli
from tests import tiny

CAPTIONS = ["a red apple", "a dog left of a cat", "a dog", "a cat", "an apple", "a red dog", "a red cat"]

RECIPE = """\
model: {{family: sd, path: {teacher}}}
method: {{name: dmd2, guidance_scale: 2.0, student_every: 2}}
student: {{steps: 1}}
data: {{source: prompts, path: {prompts}}}
optim:
  student: {{lr: 1.0e-3, eps: 1.0e-4}}
  fake_score: {{lr: 1.0e-3, eps: 1.0e-4}}
run: {{out: {out}, steps: 4, batch_size: 2, log_every: 1, sample_every: 2, checkpoint_every: 2, keep: 3, ema: 0.9}}
"""


@dataclass(frozen=True)
class Result:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def as_it_was():
    """Within it the process may be changed as the command line changes it; after it that is undone."""
    log = logging.getLogger("fastgen")
    kept = log.handlers, log.propagate, log.level
    with mock.patch.dict(os.environ, {"COLUMNS": "200"}):
        try:
            yield
        finally:
            log.handlers, log.propagate, log.level = kept


def fastgen(*arguments: object) -> Result:
    """What ``fastgen ARGUMENTS`` does. With --debug what it raises comes out."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()  # the command line does so by a variable that is read at import
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        as_it_was(),
        mock.patch.object(sys, "argv", ["fastgen", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.run()
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Result:
    """The same for a command that must succeed."""
    result = fastgen(*arguments)
    assert result.code == 0, result.err
    return result


def teacher(folder: Path, prediction_type: str = "v_prediction", **changes: object) -> Path:
    """A tiny pipeline on disk; changes: of the U-Net's config."""
    tiny.pipeline(prediction_type, **changes).save_pretrained(folder)
    return folder


def images(folder: Path, count: int = 8, side: int = 16) -> Path:
    """A folder of coloured squares with captions."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        Image.new("RGB", (side, side), (30 * i, 255 - 30 * i, 10 * i)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file": f"{i}.png", "caption": CAPTIONS[i % len(CAPTIONS)]}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


def clip(folder: Path) -> Path:
    """A tiny untrained CLIPModel with its processor, for the tiny pipeline's words."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = tiny.words()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, **shared, **ids}
    vision = {"image_size": 16, "patch_size": 8, **shared}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, **ids))
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=processor, tokenizer=words).save_pretrained(folder)
    return folder


def world(folder: Path) -> Path:
    """teacher/, prompts.txt, images/ and run.yaml, a short run of DMD2 on them whose folder is run/."""
    teacher(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    images(folder / "images")
    paths = {"teacher": folder / "teacher", "prompts": folder / "prompts.txt", "out": folder / "run"}
    (folder / "run.yaml").write_text(RECIPE.format(**paths))
    return folder
