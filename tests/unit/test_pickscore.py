"""PickScore: CLIPModel's own logits, with the scale that the checkpoint has learnt."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.evaluation import pickscore
from fastgen.evaluation.context import Context, Seen
from tests import command
from tests.rows import images, same_however_seen

PROMPTS = ("a red apple", "a dog", "a cat", "a dog", "a red dog " * 20)
SCALE = 3.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel of a learnt scale, with its processor."""
    from transformers import CLIPModel

    folder = command.clip(tmp_path_factory.mktemp("weights") / "PickScore_v1")
    network = CLIPModel.from_pretrained(folder)
    network.logit_scale.data.fill_(SCALE)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def metric(folder):
    return pickscore.Metric(Context(weights={"pickscore": str(folder)}))


def test_scores_are_the_clips_own_logits(metric, folder):
    from transformers import CLIPModel, CLIPTokenizer

    pictures = images(len(PROMPTS), 16, 16)
    words = CLIPTokenizer.from_pretrained(folder)(list(PROMPTS), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder)(pixel_values=(pictures / 255 - 0.5) / 0.25, **words)
    [eyes] = metric.extractors
    rows = eyes(pictures, PROMPTS)
    torch.testing.assert_close(rows[:, 0], out.logits_per_image.diag(), rtol=1e-4, atol=1e-4)
    assert rows.abs().max() > 1
    got = metric.compute(Seen(PROMPTS, {eyes.key: rows}))
    assert got == {"pickscore": pytest.approx(float(out.logits_per_image.diag().mean()), rel=1e-4, abs=1e-4)}


def test_any_order_or_merge_gives_the_same_number(metric):
    [eyes] = metric.extractors
    what = Seen(PROMPTS, {eyes.key: eyes(images(len(PROMPTS)), PROMPTS)})
    values = same_however_seen(metric, what)
    assert metric.compute(what.take(range(4))) != values
    assert metric.protocol()["score"] == f"{math.exp(SCALE):g} cos"
    with pytest.raises(ValueError, match="pickscore needs at least 1 image, got 0"):
        metric.compute(what.take([]))


def test_missing_or_wrong_weights(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder; weights of pickscore come from https"):
        pickscore.Metric(Context(weights={"pickscore": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match=r"not a CLIPModel with tokenizer and image processor \("):
        pickscore.Metric(Context(weights={"pickscore": str(tmp_path)}))
