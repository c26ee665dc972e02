"""CLIP score and retrieval: closed forms, the CLIPModel's own forward pass, and any order of the images."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fastgen.evaluation import clip_score, features
from fastgen.evaluation.context import Context, Seen
from tests import command
from tests.rows import Known, images, noise, same_however_seen, seen

CONCEPTS = ("a red apple", "a dog", "a cat", "an apple")
PROMPTS = ("a dog", "a red apple", "a cat", "an apple", "a dog", "a cat", "an apple", "a red apple", "a dog")


def axes(texts):
    """Two axes: captions about apples and about dogs."""
    return torch.tensor([[3.0, 0.0] if "apple" in text else [0.0, 0.5] for text in texts])


def concept(prompt):
    """The open caption of "twemoji of a red apple"."""
    return prompt.rsplit(" of ", 1)[-1]


@pytest.fixture
def metric(monkeypatch):
    """Gives the metric whose CLIP knows two axes."""
    clip = Known(texts=axes)
    monkeypatch.setattr(features, "clip", lambda context, wanted_by: clip)
    return lambda **given: clip_score.Metric(Context(**given))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(command.clip(tmp_path_factory.mktemp("clip") / "clip"))


def test_each_score_is_clamped_before_the_mean(metric):
    """Cosines 1, 0.6 and -1, whatever the lengths."""
    rows, prompts = [[10.0, 0.0], [3.0, 4.0], [-5.0, 0.0]], ["an apple"] * 3
    got = metric().per_image(seen(rows, prompts))
    assert got["clip_score"].tolist() == pytest.approx([100, 60, 0])
    assert metric().compute(seen(rows, prompts)) == {"clip_score": pytest.approx(160 / 3)}


def test_retrieval_asks_for_the_concept_of_the_prompt(metric):
    """The third image shows an apple where a dog is asked for."""
    prompts = ["twemoji of an apple", "a dog", "noto of a dog", "an apple"]
    one = metric(candidates=["an apple", "a dog"], concept=concept, prompts=prompts)
    what = seen([[10, 1], [1, 10], [10, 1], [10, 1]], prompts)
    assert one.compute(what)["retrieval"] == 0.75
    assert one.per_image(what)["retrieval"].tolist() == [1, 1, 0, 1]
    assert one.protocol() == {"extractor": "known", "score": "mean of 100 max(cos, 0)", "candidates": 2}


def test_many_images_are_retrieved_in_blocks(metric, monkeypatch):
    prompts = ["an apple", "a dog"] * 5
    one, what = metric(candidates=["an apple", "a dog"]), seen(noise(10, 2), prompts)
    want = one.compute(what)
    monkeypatch.setattr(clip_score, "_BLOCK", 3)
    assert one.compute(what) == want
    assert 0 < want["retrieval"] < 1


def test_it_is_what_the_clips_own_forward_pass_gives(folder):
    from transformers import CLIPModel, CLIPTokenizer

    model, prompts = CLIPModel.from_pretrained(folder).eval(), PROMPTS * 4
    colours = images(len(prompts), 1, 1, seed=1)  # plain ones, with a little noise; of many some suit their prompts
    pictures = images(len(prompts), 16, 16) // 8 + colours // 8 * 7
    tokens = CLIPTokenizer.from_pretrained(folder)(list(prompts), padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=(pictures / 255 - 0.5) / 0.25, **tokens)
    cosine = cosine_similarity(out.image_embeds, out.text_embeds)
    context = Context(weights={"clip": folder}, prompts=prompts)
    one = clip_score.Metric(context)
    [clip] = one.extractors
    got = one.per_image(Seen(prompts, {clip.key: clip(pictures, prompts)}))["clip_score"]
    torch.testing.assert_close(got.float(), 100 * cosine.clamp(min=0), rtol=1e-4, atol=1e-4)
    assert (got > 1).sum() > 2


def test_any_order_or_merge_gives_the_same_numbers(folder):
    pictures, prompts = images(len(PROMPTS), 16, 16), [*PROMPTS[:-1], "noto of a dog"]
    one = clip_score.Metric(Context(weights={"clip": folder}, candidates=CONCEPTS, concept=concept, prompts=prompts))
    [clip] = one.extractors
    what = Seen(prompts, {clip.key: clip(pictures, prompts)})
    values = same_however_seen(one, what)
    assert set(values) == {"clip_score", "retrieval"}
    assert one.compute(what.take(range(8))) != values


def test_prompts_longer_than_the_clip_takes_are_cut(folder):
    one = clip_score.Metric(Context(weights={"clip": folder}))
    [clip] = one.extractors
    rows = {clip.key: clip(images(2, 16, 16))}
    long, cut = (one.compute(Seen([text] * 2, rows)) for text in ("a dog " * 40, "a dog " * 7 + "a"))
    assert long == cut


def test_messages(metric, monkeypatch):
    with pytest.raises(ValueError, match="must be distinct"):
        metric(candidates=["a dog", "a dog"])
    wrong = r"'noto of a dogg' stands for 'a dogg', which is no candidate.*mean 'a dog'"
    with pytest.raises(ValueError, match=wrong):
        metric(candidates=CONCEPTS, concept=concept, prompts=["a cat", "noto of a dogg"])
    one = metric(candidates=CONCEPTS, concept=concept)
    with pytest.raises(ValueError, match=wrong):
        one.compute(seen([[1, 0]], ["noto of a dogg"]))
    with pytest.raises(ValueError, match=r"clip_score needs at least 1 image, got 0"):
        one.compute(seen(torch.zeros(0, 2)))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"clip_score needs a CLIP; .*no such folder"):
        clip_score.Metric(Context(weights={"clip": "/nowhere/clip"}))
