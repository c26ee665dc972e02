"""GenEval on the emoji world: rows and records, false captions, and the bar that the shipped evaluator is held to."""

import numpy as np
import pytest
import torch

from fastgen.emoji import compose, names
from fastgen.evaluation import geneval_emoji
from fastgen.evaluation.context import Context, Seen
from fastgen.evaluation.verdict import TAGS, judge

SEED = 31_000_002


def scenes(count, split="train"):
    rngs = [np.random.default_rng([SEED, i]) for i in range(count)]
    return [compose.scene(rng, TAGS[i % 6], split=split) for i, rng in enumerate(rngs)]


def tensor(some):
    return torch.from_numpy(np.stack([scene.image for scene in some])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def drawings():
    return geneval_emoji.Drawings()


def test_the_truth_makes_captions_true_and_changed_ones_false():
    tags = set()
    for i, scene in enumerate(scenes(600)):
        assert judge(scene.metadata, geneval_emoji.truth(scene)).correct
        false = geneval_emoji.untrue(scene.metadata, np.random.default_rng(i))
        assert false["tag"] == scene.metadata["tag"]
        assert false["prompt"] != scene.prompt
        assert not judge(false, geneval_emoji.truth(scene)).correct
        tags.add(false["tag"])
    assert tags == set(TAGS)


def test_captions_are_those_of_the_composer():
    for scene in scenes(120):
        assert geneval_emoji.caption(scene.metadata) == scene.prompt


def test_one_thing_is_changed_of_the_kind_that_the_task_tests():
    def changed(record):
        return [geneval_emoji.untrue({**record, "tag": record["tag"]}, np.random.default_rng(i)) for i in range(40)]

    two = {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
    assert all(len({c["class"] for c in r["include"]} - {"cat", "dog"}) == 1 for r in changed(two))
    count = {"tag": "counting", "include": [{"class": "cat", "count": 3}]}
    assert {(r["include"][0]["count"], r["exclude"][0]["count"], r["prompt"]) for r in changed(count)} == {
        (2, 3, "two cats"),
        (4, 5, "four cats"),
    }
    first, second = {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}
    place = {"tag": "position", "include": [first, second]}
    assert {r["prompt"] for r in changed(place)} == {"a dog below a cat"}
    assert place["include"][1]["position"] == ["above", 0]  # the record given stays as it is
    clauses = [{"class": "apple", "count": 1, "color": "red"}, {"class": "frog", "count": 1, "color": "green"}]
    pairs = {tuple(c["color"] for c in r["include"]) for r in changed({"tag": "color_attr", "include": clauses})}
    assert ("green", "red") in pairs
    assert ("red", "green") not in pairs
    assert len({a for a, b in pairs if b == "green"}) > 3


def test_the_metric_judges_scenes_by_their_records(drawings):
    some = scenes(60)
    prompts = [f"a photo of {scene.prompt}" for scene in some]
    records = {f"a photo of {scene.prompt}": scene.metadata for scene in some}
    metric = geneval_emoji.Metric(Context(prompts=prompts, metadata=records))
    (extractor,) = metric.extractors
    rows = extractor(tensor(some), prompts)
    assert rows.dtype == torch.float32
    assert rows.shape[0] == 60
    seen = Seen(prompts, {extractor.key: rows})
    values, each = metric.compute(seen), metric.per_image(seen)
    assert set(values) == {"geneval_emoji", *(f"geneval_emoji_{tag}" for tag in TAGS)}
    assert values["geneval_emoji"] == pytest.approx(np.mean([values[f"geneval_emoji_{tag}"] for tag in TAGS]))
    assert values["geneval_emoji"] > 0.9
    for tag in TAGS:
        right = each[f"geneval_emoji_{tag}"]
        assert values[f"geneval_emoji_{tag}"] == float(right[~right.isnan()].mean())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    assert metric.compute(seen.take(order)) == pytest.approx(values)
    halves = torch.cat([extractor(tensor(part), prompts) for part in (some[:30], some[30:])])
    torch.testing.assert_close(halves, rows, rtol=1e-4, atol=1e-3, equal_nan=True)
    blank = Seen(prompts, {extractor.key: torch.full_like(rows, torch.nan)})
    assert metric.compute(blank)["geneval_emoji"] == 0
    with pytest.raises(ValueError, match="geneval_emoji needs at least 1 image, got 0"):
        metric.compute(seen.take([]))


def test_the_protocol_names_the_detector(drawings):
    metric = geneval_emoji.Metric(Context())
    assert metric.protocol()["sha256"].startswith(drawings.key.removeprefix("drawings-"))
    assert metric.protocol()["options"]["threshold"] == 0.3


def test_a_colourless_drawing_has_no_colour(drawings):
    rows = drawings(tensor(scenes(60)), [""] * 60)
    colours = rows[..., 6][~rows[..., 6].isnan()]
    assert colours.min() == -1
    assert colours.max() <= 9


def test_prompts_must_have_records_of_this_world():
    with pytest.raises(ValueError, match="no record of prompt 'a cat'; take the prompts from the source scenes"):
        geneval_emoji.Metric(Context(prompts=["a cat"]))
    record = {"tag": "single_object", "include": [{"class": "refrigerator", "count": 1}], "prompt": "a refrigerator"}
    with pytest.raises(ValueError, match="cannot judge prompt 'a refrigerator': no emoji is a 'refrigerator'"):
        geneval_emoji.Metric(Context(prompts=["a refrigerator"], metadata={"a refrigerator": record}))
    assert "refrigerator" not in names.by_noun()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_true_captions_are_called_true_and_false_ones_false(drawings, split):
    shares = geneval_emoji.agreement(drawings, scenes(360, split), SEED + 1)
    assert shares["overall"]["true"] >= 0.95
    assert shares["overall"]["changed"] <= 0.10
    assert shares["overall"]["others"] <= 0.10
    for tag in TAGS:
        assert shares[tag]["changed"] <= 0.10
        assert shares[tag]["others"] <= 0.10
