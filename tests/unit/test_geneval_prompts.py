"""GenEval's prompts: the official ones, files of them, and the source."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from fastgen.data import geneval
from fastgen.geneval import COLOURS, RELATIONS, TAGS


@pytest.fixture(scope="module")
def records():
    return geneval.official()


def test_the_official_prompts_are_the_official_file_s_to_the_byte(records):
    # facts of evaluation_metadata.jsonl and object_names.txt at github.com/djghosh13/geneval
    text = geneval.dumps(records).encode()
    assert hashlib.sha256(text).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    names = hashlib.sha256(("\n".join(geneval.CLASSES) + "\n").encode()).hexdigest()
    assert names == "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"


def test_there_are_553_of_six_tags(records):
    assert Counter(record["tag"] for record in records) == dict(zip(TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    assert len({record["prompt"] for record in records}) == 553


def test_counting_asks_for_exactly_so_many(records):
    counting = [record for record in records if record["tag"] == "counting"]
    assert Counter(record["include"][0]["count"] for record in counting) == {2: 26, 3: 28, 4: 26}
    for record in counting:
        (include,), (exclude,) = record["include"], record["exclude"]
        assert exclude == {"class": include["class"], "count": include["count"] + 1}


def test_positions_name_the_reference_first(records):
    for record in (r for r in records if r["tag"] == "position"):
        target, placed = record["include"]
        assert placed["position"][1] == 0
        assert placed["position"][0] in RELATIONS
        first, second = record["prompt"].removeprefix("a photo of ").split(f" {placed['position'][0]} ")
        assert first.endswith(placed["class"])
        assert second.endswith(target["class"])


def test_no_person_is_coloured(records):
    coloured = [clause for record in records for clause in record["include"] if "color" in clause]
    assert len(coloured) == 94 + 200
    assert "person" not in {clause["class"] for clause in coloured}
    assert {clause["color"] for clause in coloured} == set(COLOURS)


def test_another_numpy_s_draws_would_be_told(monkeypatch):
    geneval._official.cache_clear()
    monkeypatch.setattr(geneval, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"draws other GenEval prompts \(SHA-256 5c48e081, official 00000000\)"):
        geneval.official()


def test_what_is_written_is_read(records, tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(geneval.dumps(records[::40]), encoding="utf-8")
    assert geneval.read(path) == records[::40]


GOOD = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], "prompt": "p"}


def clause(**changes):
    return {**GOOD, "include": [GOOD["include"][0], {**GOOD["include"][1], **changes}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], 'line 2: \\["a"\\] is no object with a prompt'),
        ({**GOOD, "tag": "colour"}, "line 2: unknown tag 'colour'"),
        ({**GOOD, "include": []}, "line 2: no include; it must list at least one object"),
        (clause(**{"class": "mouse"}), "line 2: unknown class 'mouse'"),
        (clause(count=0), "line 2: count of 'cat' is 0; it must be 1 or more"),
        (clause(color="grey"), "line 2: unknown color 'grey'"),
        (clause(position=["over", 0]), "line 2: unknown position 'over'"),
        (clause(position=["above", 1]), "line 2: position of 'cat' refers to object 1; 1 are named before it"),
        ({**GOOD, "exclude": [{"class": "dog", "count": None}]}, "line 2: count of 'dog' is None"),
    ],
)
def test_a_line_that_no_verdict_could_be_passed_on_is_told(record, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        geneval.read(path)


def test_a_file_without_prompts_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file of GenEval's prompts"):
        geneval.read(tmp_path / "none.jsonl")
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"p\.jsonl: no prompts; it must have a JSON object a line"):
        geneval.read(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: Expecting"):
        geneval.read(tmp_path / "p.jsonl")


def test_the_source_has_each_prompt_once_then_again(records):
    source = geneval.open(geneval.Config(), (512, 512))
    assert len(source) == 553 * 4
    assert not source.has_images
    for i in (0, 17, 552):
        assert source.item(i).prompt == source.item(i + 553).prompt == records[i]["prompt"]
        assert source.item(i).metadata == records[i]
    assert source.concept("x") == "x"


def test_the_source_takes_the_first_of_each_tag(records):
    source = geneval.open(geneval.Config(per_tag=2, images=1), (32, 32))
    assert [source.item(i).metadata["tag"] for i in range(len(source))] == [tag for tag in TAGS for _ in range(2)]
    assert source.item(2).metadata == next(r for r in records if r["tag"] == "two_object")


def test_the_source_reads_a_file(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(GOOD) + "\n")
    source = geneval.open(geneval.Config(path=str(tmp_path / "p.jsonl"), images=3), (32, 32))
    assert len(source) == 3
    assert source.item(2).prompt == "p"


def test_other_seeds_draw_other_prompts_by_the_same_rules():
    made = geneval.generate(np.random.default_rng(1), 30)
    assert geneval.dumps(made) != geneval.dumps(geneval.generate(np.random.default_rng(2), 30))
    for record in made:
        assert geneval.checked(record) is record
