"""Whatever is given to a command: exit code 2 and one line that says what is wrong, nothing half-written.

``FASTGEN_FAULTS=long`` (``make faults``) tries more of each.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import json
import math
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from fastgen import best, checkpoint, config, export, guiders, plain, recipe, registry, tracking
from fastgen.config import ConfigError
from fastgen.data import Unreadable, cached, geneval, images, pairs, pictures, prompts, webdataset
from fastgen.evaluation import openmmlab, per_image, report, stats
from fastgen.evaluation import pictures as comparison
from tests import command
from tests.command import Result, fastgen

LONG = os.environ.get("FASTGEN_FAULTS") == "long"


def some(few: int, many: int) -> settings:
    """The same examples each time, ``few`` of them, ``many`` in the long part."""
    return settings(
        max_examples=many if LONG else few,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files the next example overwrites."""
    return tmp_path_factory.mktemp("place")


def clear(result: Result, *words: str) -> None:
    """Assert that a command refused, in one line with these words."""
    lines = [line for line in result.err.splitlines() if line.startswith("fastgen: ")]
    assert result.code == 2, (result.code, result.err)
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err + result.out
    assert "--debug" not in result.err
    for word in words:
        assert word in lines[0], (word, lines[0])


def put(file: Path, content: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return file


# What is thrown

DEEP = "[" * 200_000 + "]" * 200_000
BOMB = "[&a [x,x,x,x,x,x,x,x,x]" + "".join(
    f", &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMB += "]"
TEXTS = ("", "\0", "\x1b[31m", "‮abc", "😀", "a\nb", "../../etc/passwd", "{x}%s$y", "- a: b", "<script>", "a" * 5000)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**63, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
YAMLS = VALUES | st.dates() | st.binary(max_size=5) | st.just({3: 4}) | st.just({None: None})
JSONS = st.one_of(
    VALUES.map(json.dumps),
    st.text(max_size=40).filter(lambda text: "\n" not in text),
    st.sampled_from(
        [DEEP, '{"a":' * 100_000, "NaN", "9" * 5000, '"\\ud800"', '{"prompt": "\\ud800"}', "", "\ufeff{}"]
    ),
)


def leaves(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a tree, mappings too."""
    if at:
        yield at
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from leaves(value, (*at, key))


WHOLE = {
    "model": {"path": "t", "family": "sd", "image_size": [16, 16], "attention": "eager", "compile": False},
    "method": {"name": "dmd2", "guidance_scale": 2.0, "student_every": 2},
    "student": {"steps": 1, "init": "", "start": 1.0, "lora": {"rank": 4}, "route": None, "share_backbone": False},
    "data": {"source": "prompts", "path": "p", "seed": 0},
    "optim": {"student": {"lr": 1e-3, "betas": [0.9, 0.999]}, "fake_score": {"lr": 1e-3}},
    "run": {"out": "o", "steps": 4, "batch_size": 2, "seed": 0, "ema": 0.9, "sample_prompts": ["a"], "trackers": []},
    "eval": {"metrics": ["fid"], "reference": {"source": "emoji"}, "every": 0},
    "health": {"every": 0},
    "pairs": {"out": "o", "number": 4},
}
PLACES = list(leaves(WHOLE))


# Configs


@some(60, 3000)
@given(at=st.sampled_from(PLACES), value=YAMLS, drop=st.booleans())
def test_a_config_with_anything_anywhere_is_taken_or_refused(place: Path, at: Any, value: Any, drop: bool) -> None:
    tree = copy.deepcopy(WHOLE)
    inner: Any = tree
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    if drop and isinstance(value, type(None)):
        del inner[at[-1]]
    if at[0] != "pairs":
        del tree["pairs"]
    file, out = put(place / "given.yaml", yaml.safe_dump(tree, allow_unicode=True)), place / "made"
    with mock.patch("fastgen.train.train", return_value=out), mock.patch("fastgen.evaluation.judge.Quick"):
        result = fastgen("train", file)
    assert result.code in (0, 2), result.err
    if result.code:
        clear(result, "given.yaml")
        assert len(result.err) < 3000
    else:
        with contextlib.suppress(ConfigError):
            kept = recipe.decode(config.read(file), "given.yaml")
            assert recipe.decode(recipe.encode(kept), "again") == kept
    assert not out.exists()


@some(40, 2000)
@given(content=st.binary(max_size=60) | st.text("[]{}:&*!<>|-?,'\"\\ \n\tab1~.", max_size=40).map(str.encode))
def test_a_config_of_any_bytes_is_refused(place: Path, content: bytes) -> None:
    clear(fastgen("train", put(place / "given.yaml", content)), "given.yaml")


@some(40, 2000)
@given(
    text=st.text(max_size=30) | st.tuples(st.sampled_from(["run", "run.steps", "a.b"]), YAMLS.map(repr)).map("=".join)
)
def test_an_override_of_any_text_is_taken_or_refused(world: Path, text: str) -> None:
    tree = config.read(world / "run.yaml")
    told = "run.yaml"
    try:
        recipe.decode(config.override(tree, [text]), "run.yaml")
    except ConfigError as error:
        told = str(error)
    assert "override" in told or "run.yaml" in told


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "given.yaml: model is missing"),
        ("[" * 1000, "given.yaml: is not valid YAML: it is nested too deeply"),
        ("a: " + "{a: " * 150 + "1" + "}" * 150, "given.yaml: is not valid YAML: it is nested"),
        ("a: &a {b: *a}", "given.yaml: is not valid YAML: an alias stands within what it names"),
        (f"eval: {BOMB}", "given.yaml: is not valid YAML: its aliases unfold to"),
        ("run: {steps: 1}\nrun: {steps: 2}", "given.yaml: line 2 is not valid YAML: the key 'run' stands twice"),
        ("run: {steps: 1, 'steps': 2}", "line 1 is not valid YAML: the key 'steps' stands twice"),
        ("model: 2020-13-45", "given.yaml: is not valid YAML: month must be in 1..12"),
        ("model: " + "9" * 5000, "given.yaml: is not valid YAML: Exceeds the limit"),
        ('model: "\\ud800"', "given.yaml: is not valid YAML: '\\ud800' is half a character"),
        ('base: "a\\0b"', "given.yaml: base must be a list of paths"),
        ("base: [given.yaml]", "given.yaml: base files include each other"),
        ("base: nowhere.yaml", "nowhere.yaml: no such config file"),
        ("base: .", "cannot be read"),
        ("eval: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_config_that_is_none_is_refused(place: Path, content: str, says: str) -> None:
    clear(fastgen("train", put(place / "given.yaml", content)), says)


def test_a_config_may_have_a_byte_order_mark_and_carriage_returns(world: Path, place: Path) -> None:
    told = (world / "run.yaml").read_bytes()
    file = put(place / "given.yaml", b"\xef\xbb\xbf" + told.replace(b"\n", b"\r\n"))
    assert config.read(file) == config.read(world / "run.yaml")
    assert plain.from_yaml("a: &a [1]\nb: *a") == {"a": [1], "b": [1]}  # an alias is no bomb


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("optim.student.lr=" + "9" * 400, "optim.student.lr must be a finite number"),
        ("run.seed=99999999999999999999", "run.seed must be a whole number of 64 bits, got 99999999999999999999"),
        ('run.out="a\\0b"', "run.out must be text without NUL"),
        ("model.family=..", "unknown family '..'"),
        ("method.name=../x", "method.name: unknown method '../x'"),
        ("data.source=.", "data.source: unknown source '.'"),
        ("run.steps=[", "override 'run.steps=[': '[' is not valid YAML"),
        ("a.b.c=", "unknown key 'a'"),
        ("=x", "override '=x' is not of the form key.key=value"),
        ("run=3", "run must be a mapping, got 3"),
        ("model.path=" + "a" * 300, "File name too long"),
        ("model.path=/", "/: not a Diffusers pipeline"),
        ("data.path=/", "/: cannot be read"),
    ],
)
def test_a_change_that_cannot_be_is_refused(world: Path, place: Path, change: str, says: str) -> None:
    clear(fastgen("train", world / "run.yaml", f"run.out={place / 'never'}", change), says)
    assert not (place / "never").exists()


@pytest.mark.parametrize("words", [["train"], ["cache"], ["pairs"], ["estimate"], ["prefetch"], ["bench", "cost"]])
@pytest.mark.parametrize("name", ["deep.yaml", "absent.yaml", "."])
def test_every_command_refuses_a_config_that_is_none(place: Path, words: list[str], name: str) -> None:
    put(place / "deep.yaml", "[" * 1000)
    clear(fastgen(*words, place / name), str(place))


@pytest.mark.parametrize("told", ["eval: 3", "eval: [a]", "eval:"])
def test_an_eval_section_that_is_no_mapping_is_refused(world: Path, place: Path, told: str) -> None:
    file = put(place / "eval.yaml", told)
    clear(fastgen("evaluate", world / "teacher", "--config", file, "--out", place / "never"), "eval must be a mapping")
    with mock.patch("fastgen.cache.decode"):
        clear(fastgen("cache", file), "eval must be a mapping")
    assert not (place / "never").exists()


# Files of others: each reader by the name of the file that it is given


def _wds(file: Path) -> Any:
    return webdataset.index(file)


READERS: dict[str, Callable[[Path], Any]] = {
    "prompts.jsonl": prompts.read,
    "prompts.txt": prompts.read,
    "geneval.jsonl": geneval.read,
    "in/captions.jsonl": lambda file: images._captions(file.parent),
    "in/metadata.csv": lambda file: images._captions(file.parent),
    "pairs/card.json": lambda file: pairs.read_card(file.parent, "make them"),
    "cache/card.json": lambda file: cached.read_card(file.parent),
    "student/fastgen.json": lambda file: export.read_card(file.parent),
    "pipeline/model_index.json": lambda file: export.check_pipeline(file.parent),
    "run/best.json": lambda file: best.read(file.parent),
    "run/metrics.jsonl": tracking.read,
    "run/checkpoint-1/state.json": lambda file: checkpoint.read_state(file.parent),
    "results.json": report.read_results,
    "comparison/prompts.json": lambda file: comparison.listed(file.parent),
    "images.json": per_image.load,
    "coefficients.json": guiders.read_coefficients,
    "shard.tar": _wds,
    "detector.safetensors": openmmlab.read,
    "detector.pth": openmmlab.read,
    "statistics.npz": stats.load,
}


def reads(file: Path, content: bytes | str) -> Any:
    """What the reader of a file of this name makes of a content; a ValueError that names the file is as good."""
    shutil.rmtree(file.parent, ignore_errors=True) if file.parent.name in ("in",) else None
    put(file, content)
    name = file.parent.name if file.name == "state.json" else file.name
    try:
        return next(reader for key, reader in READERS.items() if str(file).endswith(f"/{key}"))(file)
    except ValueError as error:
        told = str(error)
    assert name in told
    assert len(told) < 2000
    return None


@pytest.mark.parametrize("name", list(READERS))
@some(25, 1000)
@given(lines=st.lists(JSONS, max_size=3), raw=st.none() | st.binary(max_size=200))
def test_a_file_of_any_content_is_read_or_refused_by_name(
    place: Path, name: str, lines: list[str], raw: bytes | None
) -> None:
    reads(place / name, "\n".join(lines) if raw is None else raw)


@pytest.mark.parametrize("name", list(READERS))
def test_a_folder_in_a_file_s_place_is_refused_or_as_none(place: Path, name: str) -> None:
    folder = place / "instead" / name
    folder.mkdir(parents=True)
    with contextlib.suppress(ValueError, OSError):
        READERS[name](folder)


RECORD = {
    "prompt": "a photo of a dog",
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    "exclude": [{"class": "dog", "count": 2}],
}
GOOD: dict[str, Any] = {
    "prompts.jsonl": {"prompt": "a dog"},
    "geneval.jsonl": RECORD,
    "in/captions.jsonl": {"file": "a.png", "caption": "a dog"},
    "student/fastgen.json": {"method": "dmd2", "num_inference_steps": 1, "guidance_scale": 1.0, "call": {}},
    "pipeline/model_index.json": {"_class_name": "StableDiffusionPipeline"},
    "run/best.json": {"metric": "fid", "value": 3.0, "step": 4, "better": "low"},
    "run/metrics.jsonl": {"step": 3, "loss": 0.5},
    "comparison/prompts.json": {"prompts": ["a"], "subjects": [{"name": "x", "role": "student", "folder": "x"}]},
    "coefficients.json": {"guidance_scale": 2.0, "times": [1.0], "weights": {}},
}


@pytest.mark.parametrize("name", list(GOOD))
@some(30, 1000)
@given(data=st.data())
def test_a_row_with_anything_in_the_place_of_a_value_is_read_or_refused(place: Path, name: str, data: Any) -> None:
    tree = copy.deepcopy(GOOD[name])
    spots = [at for at in _spots(tree) if at]
    *at, last = data.draw(st.sampled_from(spots))
    inner = tree
    for key in at:
        inner = inner[key]
    inner[last] = data.draw(VALUES)
    reads(place / name, json.dumps(tree))


def _spots(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    pairs_ = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs_:
        yield from _spots(value, (*at, key))


def test_rows_that_are_whole_are_read(place: Path) -> None:
    for name, tree in GOOD.items():
        put(place / name, json.dumps(tree))
        if name.startswith("in/"):
            assert READERS[name](place / name) == {"a.png": "a dog"}
        elif name != "pipeline/model_index.json":
            assert READERS[name](place / name)
    nested = put(place / "prompts.jsonl", '{"prompt": "a", "more": ' + "[" * 500 + "]" * 500 + "}")
    assert prompts.read(nested) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("prompts.jsonl", DEEP, "line 1 is not a JSON object with the key 'prompt'"),
        ("prompts.jsonl", '{"prompt": "\\ud800 cat"}', "line 1 is not a JSON object with the key 'prompt'"),
        ("geneval.jsonl", DEEP, "line 1: it is nested too deeply"),
        ("geneval.jsonl", b"\xff", "geneval.jsonl: cannot be read"),
        ("geneval.jsonl", json.dumps(RECORD | {"include": 3}), "include must be a list of objects, got 3"),
        ("geneval.jsonl", json.dumps(RECORD | {"include": [3]}), r"include must be a list of objects, got \[3\]"),
        ("geneval.jsonl", json.dumps(RECORD | {"exclude": None}), "exclude must be a list of objects, got None"),
        (
            "geneval.jsonl",
            json.dumps(RECORD | {"include": [{"class": "dog", "count": 1, "position": 3}]}),
            r"position of 'dog' must be \[relation, object\], got 3",
        ),
        (
            "geneval.jsonl",
            json.dumps(RECORD | {"include": [{"class": "dog", "count": 1, "position": ["left of", False]}]}),
            "position of 'dog' refers to object False",
        ),
        ("geneval.jsonl", json.dumps(RECORD | {"tag": "a" * 5000}), r"unknown tag 'a{199} \.\.\."),
        ("coefficients.json", '{"guidance_scale": ' + "1" * 400 + "}", r"1{20}\.\.\. is a number of 400 digits"),
        ("in/captions.jsonl", DEEP, "line 1 is not a JSON object with 'file' and 'caption'"),
        ("in/captions.jsonl", '{"file": 3, "caption": "a"}', "line 1 is not a JSON object"),
        ("in/captions.jsonl", '{"file": "a.png", "caption": [1]}', "line 1 is not a JSON object"),
        ("in/metadata.csv", "name,words\na.png,a\n", "line 1 must name the columns 'file_name' and 'text'"),
        ("student/fastgen.json", "null", r"fastgen.json: damaged \(it is no object\); export the pipeline again"),
        ("student/fastgen.json", '{"num_inference_steps": "x"}', "num_inference_steps is 'x'"),
        ("student/fastgen.json", '{"call": 3}', "call is 3"),
        ("pipeline/model_index.json", DEEP, "model_index.json: not valid JSON; save the pipeline again"),
        ("run/best.json", DEEP, "best.json: damaged"),
        ("run/checkpoint-1/state.json", DEEP, "damaged checkpoint"),
        ("results.json", '[{"name": "a", "role": []}]', r"results.json: not a list of results \(role is \[\]\)"),
        ("results.json", '[{"name": "a", "role": "student", "protocol": 3}]', "protocol is 3"),
        ("results.json", '[{"name": "a", "role": "student", "fid": [1]}]', r"fid is \[1\]"),
        (
            "comparison/prompts.json",
            '{"prompts": ["a"], "subjects": [{"name": "x", "role": "student", "folder": "../../x"}]}',
            "folder '../../x' is no name",
        ),
        ("detector.safetensors", b"", "not readable as plain tensors"),
        ("detector.pth", b"\x80\x04cos\ngetcwd\n(tR.", "not readable as plain tensors"),
        ("statistics.npz", b"", "statistics.npz: not an .npz of plain arrays"),
    ],
)
def test_a_file_that_is_none_is_refused(place: Path, name: str, content: bytes | str, says: str) -> None:
    shutil.rmtree(place / "in", ignore_errors=True)
    with pytest.raises(ValueError, match=says):
        READERS[name](put(place / name, content))


def test_rows_of_metrics_that_are_none_are_left_out(place: Path) -> None:
    file = put(place / "metrics.jsonl", "null\n[1]\n3\n{}\n" + DEEP + '\n{"step": "x"}\n{"step": 2, "loss": NaN}\n')
    assert tracking.read(file) == [{"step": 2}]


# Pictures


def encoded(mode: str, form: str, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (16, 12)).save(file, form, **how)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge(side: int) -> bytes:
    """A PNG of few bytes that says it is side x side."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


EXIF = Image.Exif()
EXIF[0x112] = 99
PICTURES = {
    "png": encoded("RGB", "PNG"),
    "jpeg": encoded("RGB", "JPEG"),
    "webp": encoded("RGB", "WEBP"),
    "cmyk": encoded("CMYK", "JPEG"),
    "16 bits": encoded("I;16", "PNG"),
    "palette": encoded("P", "PNG", transparency=0),
    "alpha": encoded("LA", "PNG"),
    "bits": encoded("1", "PNG"),
    "animated": encoded("RGB", "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 12), "red")]),
    "exif": encoded("RGB", "JPEG", exif=EXIF),
}


@pytest.mark.parametrize("kind", list(PICTURES))
def test_pictures_of_all_kinds_are_read_whatever_they_are_called(place: Path, kind: str) -> None:
    made = images.load_image(put(place / "a.png", PICTURES[kind]), (8, 8))
    assert made.shape == (8, 8, 3)
    assert made.dtype == np.uint8


@pytest.mark.parametrize("content", [b"", b"text", huge(60_000), huge(2**31 - 1), PICTURES["png"][:40]], ids=repr)
def test_pictures_that_are_none_or_too_large_are_refused_by_name(place: Path, content: bytes) -> None:
    with pytest.raises(Unreadable, match=r"bad\.png: not a readable image"):
        images.load_image(put(place / "bad.png", content), (8, 8))


@some(60, 5000)
@given(kind=st.sampled_from(list(PICTURES)), at=st.integers(0, 10**6), cut=st.booleans(), byte=st.integers(1, 255))
def test_a_damaged_picture_is_read_or_refused_by_name(kind: str, at: int, cut: bool, byte: int) -> None:
    content = bytearray(PICTURES[kind])
    at %= len(content)
    content[at] ^= byte
    try:
        told = str(pictures.load(io.BytesIO(content[:at] if cut else content), "bad.png", (8, 8)).shape)
    except Unreadable as error:
        told = str(error)
    assert told == "(8, 8, 3)" or "bad.png: not a readable image" in told


# Tensors


def header(tree: Any) -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text


NOT_TENSORS = {
    "empty": b"",
    "cut": b"\x10\0",
    "endless header": struct.pack("<Q", 2**62) + b"{}",
    "list": header([1]),
    "number": header({"a": 3}),
    "unknown dtype": header({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}) + b"0000",
    "pickle": b"\x80\x04cos\ngetcwd\n(tR.",
}


@pytest.mark.parametrize("content", list(NOT_TENSORS.values()), ids=list(NOT_TENSORS))
def test_weights_that_are_none_are_refused_by_name(world: Path, place: Path, content: bytes) -> None:
    folder = place / "pipe"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / "teacher", folder)
    file = put(folder / "unet" / "diffusion_pytorch_model.safetensors", content)
    with pytest.raises(ValueError, match=f"{file}: damaged weights"):
        export.check_pipeline(folder)
    with pytest.raises(checkpoint.CheckpointError, match=str(file)):
        checkpoint.load_weights(file, {})


@pytest.mark.parametrize("words", [["generate", "-p", "a", "--out"], ["train"]])
def test_weights_of_which_some_are_missing_are_refused(world: Path, place: Path, words: list[str]) -> None:
    folder, out = place / "lacks", place / "never"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / "teacher", folder)
    save_file({"other": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    if words[0] == "train":
        result = fastgen("train", world / "run.yaml", f"model.path={folder}", f"run.out={out}")
    else:
        result = fastgen(words[0], folder, *words[1:], out)
    clear(result, str(folder), "the files of its unet lack", "download it again")
    assert not out.exists()


@some(30, 1000)
@given(at=st.integers(0, 10**9), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_shard_of_pairs_is_refused(place: Path, at: int, bit: int, cut: bool) -> None:
    """Whatever bit of it changes or wherever it ends: its digest is of names, numbers and prompts."""
    whole = place / "whole.safetensors"
    card = pairs.Card("sd", "t", (4, 2, 2), 2, 1, 1.0, (), 0, "fp32", "fp32", 2, "p")
    if not whole.is_file():
        g = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(2, 4, 2, 2, generator=g) for name in ("x0", "eps")}
        pairs.write_shard(whole, tensors, ["a", "b"])
    content = bytearray(whole.read_bytes())
    at %= len(content)
    content[at] ^= 1 << bit
    file = put(place / "shard-00000.safetensors", bytes(content[:at] if cut else content))
    try:
        opened, told, digest = pairs.open_shard(file, card, 2)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        found = pairs._digest(dict(sorted(tensors.items())), told)
    except ValueError as error:
        found, digest = str(error), "shard-00000.safetensors"
        assert digest in found
    assert found != digest


# Statistics


def arrays(**given: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **given)
    return file.getvalue()


def declared(shape: str) -> bytes:
    """An .npz of few bytes whose mean says that it has this shape."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        opened.writestr("mu.npy", b"\x93NUMPY\x01\x00v\x00" + text)
    return file.getvalue()


EYE = np.eye(2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (arrays(mu=np.array([{}, {}], dtype=object), sigma=EYE), "Object arrays cannot be loaded"),
        (arrays(a=np.zeros(2)), "has neither mu and sigma nor feats"),
        (arrays(mu=np.zeros((2, 2)), sigma=EYE), "a mean of shape"),
        (arrays(mu=np.array(["a", "b"]), sigma=EYE), "mu is <U1"),
        (arrays(mu=np.zeros(2, complex), sigma=EYE), "mu is complex128"),
        (arrays(mu=np.zeros(2, [("a", "f4")]), sigma=EYE), "not an .npz of plain arrays"),
        (arrays(mu=np.zeros(2), sigma=EYE, number=np.array("x")), "number is <U1"),
        (arrays(mu=np.zeros(2), sigma=EYE, number=np.zeros(3, int)), "number is int64 of shape"),
        (arrays(mu=np.zeros(2), sigma=EYE, sha256=np.zeros(3)), "sha256 is float64"),
        (arrays(feats=np.array(["a"])), "feats is <U1"),
        (arrays(feats=np.zeros(())), "feats must be"),
        (declared("(99999999999999,)"), "not an .npz of plain arrays"),
        (arrays(mu=np.zeros(20), sigma=np.eye(20))[:400], "not an .npz of plain arrays"),
    ],
)
def test_statistics_that_are_none_are_refused(place: Path, content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        stats.load(put(place / "statistics.npz", content))


def test_an_evaluation_that_is_refused_leaves_no_folder(world: Path, place: Path) -> None:
    file = put(place / "statistics.npz", b"")
    more = [f"reference={{source: images, path: {world / 'images'}}}", "--out", place / "never"]
    result = fastgen("evaluate", world / "teacher", "--metrics", "fid", "--reference", file, *more)
    clear(result, "statistics.npz: not an .npz of plain arrays")
    assert not (place / "never").exists()


# Prompts and other words of commands


def test_prompts_of_all_kinds_are_drawn(world: Path, place: Path) -> None:
    given = [text for text in TEXTS if "\0" not in text] + ["word " * 30_000]
    words = [word for text in given for word in ("-p", text)]
    result = fastgen("generate", world / "teacher", *words, "--steps", "1", "--out", place / "drawn")
    assert result.code == 0, result.err
    assert sorted(p.name for p in (place / "drawn").iterdir()) == [f"{i:04d}_00.png" for i in range(len(given))]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-p", "a\udcff"], "prompt 'a\\udcff' holds half a character; give it in UTF-8"),
        (["-p", "a", "--guidance-scale", "nan"], "--guidance-scale must be a finite number, got nan"),
        (["-p", "a", "--fps", "inf"], "--fps must be a finite number, got inf"),
        (["-p", "a", "--guider", "cfgpp", "--guider-scale", "nan"], "--guider-scale must be a finite number"),
        (["-p", "a", "--teacher", "nope/nope/nope"], "nope/nope/nope"),
        (["-p", "a", "--steps", "0"], "--steps"),
        (["-p", "a", "--out", __file__], "is a file; name a folder for the images"),
    ],
)
def test_images_that_cannot_be_made_leave_no_folder(world: Path, tmp_path: Path, words: list[str], says: str) -> None:
    out = [] if "--out" in words else ["--out", tmp_path / "never"]
    clear(fastgen("generate", world / "teacher", *words, *out), says)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "nope/nope/nope", "--metrics", "fid", "--reference", "emoji", "--out", "OUT"],
        ["evaluate", "TEACHER", "--metrics", "nope", "--reference", "emoji", "--out", "OUT"],
        ["evaluate", "TEACHER", "--metrics", "fid", "--reference", "[" * 3000, "--out", "OUT"],
        ["evaluate", "TEACHER", "--metrics", "fid", "--reference", "emoji", "--out", "OUT", "=x"],
        ["export", "nope", "--out", "OUT"],
        ["export", "WORLD", "--out", "OUT"],
        ["join", "nope", "nope", "--out", "OUT"],
        ["extract-lora", "nope/nope/nope", "TEACHER", "--out", "OUT"],
        ["stats", "nope", "--out", "OUT"],
        ["stats", "{source: images, path: nope}", "--out", "OUT"],
        ["stats", "&a [*a]", "--out", "OUT"],
        ["geneval", "images", "TEACHER", "--prompts", "nope.jsonl", "--out", "OUT"],
        ["geneval", "judge", "nope", "--out", "OUT"],
        ["geneval", "convert", "nope.pth", "OUT"],
        ["geneval", "convert", "WORLD", "OUT"],
        ["report", "compare", "nope", "nope"],
        ["bench", "memory", "nope.yaml"],
        ["bench", "methods", "nope.yaml", "--out", "OUT"],
        ["bench", "cost", "=x"],
        ["list", "families", "--into", "nope.md"],
        ["list", "nothing"],
        ["nothing"],
        ["train"],
    ],
    ids=" ".join,
)
def test_every_command_refuses_what_is_not_there(world: Path, tmp_path: Path, words: list[str]) -> None:
    names = {"TEACHER": world / "teacher", "WORLD": world, "OUT": tmp_path / "never"}
    clear(fastgen(*(names.get(word, word) for word in words)))
    assert not (tmp_path / "never").exists()


@some(40, 2000)
@given(name=st.text(max_size=12) | st.sampled_from(["..", ".", "os.path", "a.b", "stock", "class", "\0", "é"]))
@pytest.mark.parametrize("kind", list(registry.ROOMS))
def test_a_module_of_any_name_is_found_or_refused(kind: str, name: str) -> None:
    try:
        told = f"unknown {kind} " * hasattr(registry.find(kind, name), registry.ROOMS[kind][1])
    except ValueError as error:
        told = str(error)
    assert f"unknown {kind} " in told


def test_plain_values_are_as_json_and_yaml_have_them() -> None:
    assert plain.from_json('{"a": [1, NaN, "\\ud83d\\ude00"]}')["a"][::2] == [1, "😀"]
    assert math.isnan(plain.from_json("NaN"))
    assert plain.from_json("NaN", lambda _: None) is None
    assert plain.from_yaml("a: 2020-01-02\n<<: {b: 1}") == {"a": datetime.date(2020, 1, 2), "b": 1}


# Pipelines: what any of their JSON files says


@pytest.fixture(scope="module")
def bent(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose teacher is bent."""
    folder = tmp_path_factory.mktemp("bent")
    shutil.copytree(world / "teacher", folder / "teacher")
    told = (world / "run.yaml").read_text().replace(str(world / "teacher"), str(folder / "teacher"))
    put(folder / "run.yaml", told.replace(str(world / "run"), str(folder / "run")))
    return folder


PIPELINE = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "vae/config.json",
)
# a huge number of layers, steps or channels is no mistake to be seen before it is made
SMALL = SCALARS.filter(lambda value: isinstance(value, bool) or not isinstance(value, int | float) or abs(value) < 50)
BENT = st.recursive(
    SMALL, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@contextlib.contextmanager
def changed(file: Path, content: str) -> Iterator[None]:
    before = file.read_bytes()
    try:
        put(file, content)
        yield
    finally:
        put(file, before)


@pytest.mark.parametrize("name", PIPELINE)
@pytest.mark.parametrize("words", [["generate", "teacher"], ["train", "run.yaml"]], ids=["generate", "train"])
@pytest.mark.filterwarnings("default:a prompt of . tokens was cut to:UserWarning")  # as its settings have it
@some(10, 300)
@given(data=st.data())
def test_a_pipeline_with_anything_in_a_file_is_taken_or_refused_by_name(
    world: Path, bent: Path, words: list[str], name: str, data: Any
) -> None:
    file = bent / "teacher" / name
    tree = json.loads(file.read_text())
    top = [at for at in _spots(tree) if len(at) in (1, 2)]
    *at, last = data.draw(st.sampled_from(top))
    inner = tree
    for key in at:
        inner = inner[key]
    inner[last] = data.draw(BENT)
    if inner[last] is None and isinstance(inner, dict) and data.draw(st.booleans()):
        del inner[last]
    more = ["-p", "a", "--steps", "1", "--out", bent / "drawn"] if words[0] == "generate" else ["--dry-run"]
    with changed(file, json.dumps(tree)):
        result = fastgen(words[0], bent / words[1], *more)
    if "not finite at step 0" in result.err:
        return  # settings that mean something, but no numbers come of it
    assert result.code in (0, 2), result.err
    if result.code:
        clear(result, "teacher")
        assert len(result.err.splitlines()[-1]) < 1000


@pytest.mark.parametrize("words", [["generate", "teacher"], ["train", "run.yaml"], ["evaluate", "teacher"]], ids=str)
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**40}, "its tokenizer: OverflowError: int too big"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "its tokenizer: TypeError: "),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 2**63}, "its tokenizer: PanicException: capacity"),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": False},
            "its tokenizer has the model_max_length False",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": -1},
            "its tokenizer has the model_max_length -1, not",
        ),
        ("tokenizer/tokenizer_config.json", {"pad_token": "new"}, "its text_encoder: IndexError: index out of range"),
        ("tokenizer/tokenizer_config.json", None, "tokenizer_config.json: not the settings of a component (it is no"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "its scheduler: TypeError: "),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json: not the settings of a component (it is no"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "the files of its text_encoder lack 2224 of the num"),
        ("text_encoder/config.json", {"intermediate_size": 64}, "its text_encoder: "),
        ("unet/config.json", {"norm_eps": "x"}, "its unet: TypeError: "),
        ("unet/config.json", {"block_out_channels": [32, 32]}, "its unet: "),
        ("unet/config.json", None, "config.json: not the settings of a component (it is no object); save or download"),
        ("vae/config.json", {"layers_per_block": 2}, "the files of its vae lack 32 weights"),
        ("vae/config.json", {"act_fn": 3}, "its vae: AttributeError: "),
    ],
)
def test_a_pipeline_with_a_bent_component_is_refused_by_its_name(
    bent: Path, words: list[str], name: str, change: dict[str, Any] | None, says: str
) -> None:
    file = bent / "teacher" / name
    tree = json.loads(file.read_text())
    more = {
        "generate": ["-p", "a", "--steps", "1", "--out", bent / "never"],
        "train": ["--dry-run"],
        "evaluate": ["--metrics", "latency", "--reference", "emoji", "--out", bent / "judged", "num_images=2"],
    }
    with changed(file, '"x"' if change is None else json.dumps(tree | change)):
        result = fastgen(words[0], bent / words[1], *more[words[0]])
    clear(result, str(bent / "teacher"), says)
    assert "save or download" in result.err or "download it again" in result.err
    assert not (bent / "never").exists()


def test_mistakes_of_our_own_are_no_pipeline_s(world: Path) -> None:
    with mock.patch("fastgen.pipelines.sd.unet.embedded", None):
        result = fastgen("train", world / "run.yaml", "--dry-run")
    assert result.code == 1
    assert "fastgen: TypeError: 'NoneType' object is not callable; `fastgen --debug ...` shows where" in result.err


def test_what_worked_once_is_no_longer_the_pipeline_s_fault(tmp_path: Path) -> None:
    once = export.tried(lambda size: torch.zeros(size), tmp_path)
    with pytest.raises(ValueError, match=r"does not work as a pipeline \(TypeError: .+\); if others do here, save"):
        once("x")
    assert len(once(3)) == 3
    with pytest.raises(TypeError):
        once("x")
    for error in (torch.OutOfMemoryError("full"), MemoryError(), torch.distributed.DistError("gone")):
        with pytest.raises(type(error)), export.opening(tmp_path):
            export.tried(mock.Mock(side_effect=error), tmp_path)()


def test_a_call_that_a_pipeline_refuses_is_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^\S+pipeline: negative dimensions are not allowed$"):
        export.tried(lambda: np.zeros(-1), tmp_path / "pipeline")()
