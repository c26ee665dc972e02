"""YAML into dataclasses, and what each mistake is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from fastgen.config import ConfigError, decode, encode, merge, option, override, read, suggest


@dataclass(frozen=True)
class Inner:
    lr: float = option(1e-5, "learning rate", above=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decays", low=0, below=1)
    name: Literal["adamw", "sgd"] = "adamw"
    level: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.name == "sgd" and self.level == 2:
            raise ValueError("sgd has no level 2")


@dataclass(frozen=True)
class Outer:
    path: str = option(help="where the pipeline is")
    steps: int = option(10, "steps", low=1, high=100)
    fast: bool = False
    inner: Inner = Inner()
    optim: dict[str, Inner] = option({}, "by role")
    words: list[str] = option(["a"], "words")
    numbers: tuple[int, ...] = (1, 2)
    share: float | None = None
    either: int | str = 1
    extra: Any = None
    more: Sequence[float] = ()
    table: Mapping[str, int] = option({}, "counts")


def good(**values: Any) -> dict[str, Any]:
    return {"path": "somewhere", **values}


def outer(**values: Any) -> Outer:
    return decode(Outer, good(**values), "run.yaml")


# Decoding


def test_defaults_fill_what_is_left_out() -> None:
    assert outer() == Outer("somewhere")


def test_a_config_survives_encoding_yaml_and_decoding() -> None:
    config = outer(
        steps=7,
        fast=True,
        inner={"lr": 1, "betas": [0, 0.5], "name": "sgd"},
        optim={"student": {"lr": 3e-4}, "fake_score": {}},
        words=["x", "y"],
        numbers=[3],
        share=0.5,
        either="text",
        extra={"deep": [1, {"a": None}]},
        more=[1, 2.5],
        table={"n": 2},
    )
    tree = yaml.safe_load(yaml.safe_dump(encode(config)))
    assert decode(Outer, tree, "again") == config
    assert config.inner.betas == (0.0, 0.5)
    assert config.numbers == (3,)
    assert isinstance(config.inner.lr, float)


def test_a_number_that_yaml_reads_as_text_is_a_float() -> None:
    tree = yaml.safe_load("{path: p, inner: {lr: 1e-5}}")
    assert tree["inner"]["lr"] == "1e-5"
    assert decode(Outer, tree, "run.yaml").inner.lr == 1e-5


def test_lists_and_mappings_of_defaults_are_not_shared() -> None:
    one, two = outer(), outer()
    one.words.append("b")
    one.optim["x"] = Inner()
    assert two.words == ["a"]
    assert two.optim == {}


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        outer().steps = 3  # type: ignore[misc]


def test_null_is_taken_where_it_is_allowed() -> None:
    assert outer(share=None).share is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepps": 3}, r"run.yaml: unknown key 'stepps'; did you mean 'steps'\?"),
        ({"inner": {"lrr": 3}}, r"unknown key 'inner.lrr'; did you mean 'lr'\?"),
        ({"optim": {"student": {"beta": 3}}}, r"unknown key 'optim.student.beta'; did you mean 'betas'\?"),
        ({"zzz": 3}, "unknown key 'zzz'; known: either, extra, fast, inner, more, numbers, optim, path, share, steps"),
        ({3: 3}, "unknown key '3'; known: "),
        ({"inner": 3}, "run.yaml: inner must be a mapping, got 3"),
        ({"inner": None}, "inner must be a mapping, got None"),
        ({"steps": 0}, "run.yaml: steps must be at least 1, got 0"),
        ({"steps": 101}, "steps must be at most 100, got 101"),
        ({"inner": {"lr": 0}}, r"inner.lr must be above 0, got 0\.0"),
        ({"inner": {"lr": -1}}, r"inner.lr must be above 0, got -1\.0"),
        ({"inner": {"betas": [0.9, 1]}}, r"inner.betas must be below 1, got 1\.0"),
        ({"inner": {"betas": [-0.1, 0.5]}}, r"inner.betas must be at least 0, got -0\.1"),
        ({"inner": {"betas": [0.9]}}, "inner.betas must hold 2 values, got 1"),
        ({"inner": {"betas": 0.9}}, r"inner.betas must be a list, got 0\.9"),
        ({"inner": {"betas": [0.9, "x"]}}, r"inner.betas\[1\] must be a finite number, got 'x'"),
        ({"inner": {"name": "adam"}}, r"inner.name is 'adam'; did you mean 'adamw'\?"),
        ({"inner": {"name": "lion"}}, "inner.name is 'lion'; known: adamw, sgd"),
        ({"inner": {"level": True}}, "inner.level is True; known: 1, 2"),
        ({"inner": {"level": [1]}}, r"inner.level is \[1\]"),
        ({"inner": {"name": "sgd", "level": 2}}, "run.yaml: inner: sgd has no level 2"),
        ({"steps": 1.5}, r"steps must be a whole number, got 1\.5"),
        ({"steps": "7"}, "steps must be a whole number, got '7'"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"fast": 1}, "fast must be true or false, got 1"),
        ({"fast": "yes"}, "fast must be true or false, got 'yes'"),
        ({"inner": {"lr": "fast"}}, "inner.lr must be a finite number, got 'fast'"),
        ({"inner": {"lr": float("nan")}}, "inner.lr must be a finite number, got nan"),
        ({"inner": {"lr": "inf"}}, "inner.lr must be a finite number, got 'inf'"),
        ({"inner": {"lr": True}}, "inner.lr must be a finite number, got True"),
        ({"inner": {"lr": None}}, "inner.lr must be a finite number, got None"),
        ({"path": 3}, "path must be text, got 3"),
        ({"words": "abc"}, "words must be a list, got 'abc'"),
        ({"words": ["a", 1]}, r"words\[1\] must be text, got 1"),
        ({"numbers": [1, "x"]}, r"numbers\[1\] must be a whole number, got 'x'"),
        ({"optim": [1]}, r"optim must be a mapping, got \[1\]"),
        ({"table": {"n": "x"}}, "table.n must be a whole number, got 'x'"),
        ({"more": {"a": 1}}, "more must be a list"),
        ({"share": "much"}, "share must be a finite number, got 'much'"),
        ({"either": [1]}, r"either must be a whole number, got \[1\]"),
    ],
)
def test_a_mistake_is_told_with_file_key_value_and_remedy(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Outer, {"path": "somewhere", **values}, "run.yaml")


def test_what_has_no_default_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: path is missing; where the pipeline is"):
        decode(Outer, {}, "run.yaml")


def test_a_config_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: the config must be a mapping, got \[1\]"):
        decode(Outer, [1], "run.yaml")


def test_config_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, ValueError)


def test_a_value_error_of_the_whole_config_names_the_file() -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: the config: sgd has no level 2"):
        decode(Inner, {"name": "sgd", "level": 2}, "run.yaml")


def test_suggest_names_the_nearest_or_all() -> None:
    assert suggest("dmd", ["dmd2", "sid"]) == "; did you mean 'dmd2'?"
    assert suggest("x", ["b", "a"]) == "; known: a, b"
    assert suggest("x", []) == "; known: none"


# Files


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_bases_are_merged_in_order_and_the_file_wins(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", one="{a: 1, deep: {x: 1, y: 1}, list: [1, 2]}", two="{a: 2, deep: {y: 2}}")
    write(tmp_path, run="base: [base/one.yaml, base/two.yaml]\ndeep: {z: 3}\nlist: [9]")
    assert read(tmp_path / "run.yaml") == {"a": 2, "deep": {"x": 1, "y": 2, "z": 3}, "list": [9]}


def test_one_base_may_be_named_alone_and_bases_have_bases(tmp_path: Path) -> None:
    write(tmp_path, low="{a: 1, b: 1}", mid="{base: low.yaml, b: 2}", run="{base: mid.yaml, c: 3}")
    assert read(tmp_path / "run.yaml") == {"a": 1, "b": 2, "c": 3}


def test_two_bases_may_share_a_third(tmp_path: Path) -> None:
    write(
        tmp_path, low="{a: 1}", one="{base: low.yaml}", two="{base: low.yaml, b: 2}", run="base: [one.yaml, two.yaml]"
    )
    assert read(tmp_path / "run.yaml") == {"a": 1, "b": 2}


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    assert read(write(tmp_path, run="# nothing") / "run.yaml") == {}


def test_bases_that_include_each_other_are_named(tmp_path: Path) -> None:
    write(tmp_path, a="base: b.yaml", b="base: a.yaml", me="base: me.yaml")
    with pytest.raises(ConfigError, match=r"a.yaml: base files include each other: a.yaml -> b.yaml"):
        read(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"me.yaml: base files include each other: me.yaml"):
        read(tmp_path / "me.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"run.yaml: line 1 is not valid YAML: expected ',' or '\]'"),
        ("a: 1\nb: : 2", r"run.yaml: line 2 is not valid YAML"),
        ("\x00", "run.yaml:.* is not valid YAML"),
        ("[1, 2]", "run.yaml: must be a mapping of sections, got list"),
        ("word", "run.yaml: must be a mapping of sections, got str"),
        ("base: 3", "run.yaml: base must be a list of paths, got 3"),
        ("base: [1]", r"run.yaml: base must be a list of paths, got \[1\]"),
        ("base: gone.yaml", "gone.yaml: no such config file; `fastgen list configs` shows the ones shipped"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path, run=text) / "run.yaml")


def test_a_missing_file_a_folder_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.yaml: no such config file"):
        read(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read: "):
        read(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"bytes.yaml: cannot be read: "):
        read(tmp_path / "bytes.yaml")


# Merging and overriding


def test_merge_goes_into_mappings_and_replaces_all_else() -> None:
    under = {"a": {"x": 1, "y": [1]}, "b": 1}
    assert merge(under, {"a": {"y": [2]}, "b": {"c": 1}}) == {"a": {"x": 1, "y": [2]}, "b": {"c": 1}}
    assert under == {"a": {"x": 1, "y": [1]}, "b": 1}


def test_overrides_are_read_as_yaml_at_their_key() -> None:
    tree = {"optim": {"student": {"lr": 1}}, "steps": 1}
    changed = override(tree, ["optim.student.lr=1e-4", "steps=7", "words=[a, b]", "share=null", "path=a=b"])
    assert changed["optim"] == {"student": {"lr": "1e-4"}}
    assert (changed["steps"], changed["words"], changed["share"], changed["path"]) == (7, ["a", "b"], None, "a=b")
    assert tree == {"optim": {"student": {"lr": 1}}, "steps": 1}


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=3", "a.=3", ".a=3"])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"override '.*' is not of the form key.key=value"):
        override({}, [text])


def test_an_override_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"override 'a=\[1': '\[1' is not valid YAML"):
        override({}, ["a=[1"])
