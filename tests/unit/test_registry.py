"""Modules found by name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from fastgen import registry

SHIPPED = {
    "method": {"dmd2", "pretrain"},
    "family": {"sd"},
    "metric": {
        *("fid", "kid", "sfid", "patch_fid", "inception_score", "fd_dinov2", "cmmd", "prdc"),
        *("clip_score", "hpsv2", "pickscore", "image_reward", "geneval", "geneval_emoji"),
        *("diversity", "lpips_diversity", "vendi", "latency"),
    },
    "source": {"prompts", "images", "emoji"},
}


@pytest.mark.parametrize("kind", registry.ROOMS)
def test_every_kind_lists_what_is_there_sorted_and_nothing_else(kind: str) -> None:
    found = registry.names(kind)
    assert SHIPPED[kind] <= set(found)
    assert found == sorted(found)
    for name in found:
        assert registry.ROOMS[kind][1] in vars(registry.find(kind, name))
    assert not {"batches", "runner", "judge", "config", "report", "context", "features"} & set(found)


@pytest.mark.parametrize("kind", registry.ROOMS)
def test_each_says_in_one_line_what_it_is(kind: str) -> None:
    for name in registry.names(kind):
        assert 10 < len(registry.summary(registry.find(kind, name))) < 130


def test_a_dotted_path_finds_a_module_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("elsewhere.method")
    module.Method = object  # type: ignore[attr-defined]
    module.__spec__ = registry.importlib.util.spec_from_loader("elsewhere.method", None)
    monkeypatch.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
    monkeypatch.setitem(sys.modules, "elsewhere.method", module)
    assert registry.find("method", "elsewhere.method") is module


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("method", "dmd22", "unknown method 'dmd22'; did you mean 'dmd2'?"),
        ("family", "none", "unknown family 'none'; known: .*sd"),
        ("source", "prompt", "unknown source 'prompt'; did you mean 'prompts'?"),
        ("source", "batches", "unknown source 'batches'; did you mean 'cached'"),
        ("metric", "runner", "unknown metric 'runner'; known: clip_score, cmmd, diversity, fd_dinov2, fid"),
        ("method", "no.such.module", "unknown method 'no.such.module'; known: "),
        ("method", "json.decoder", "unknown method 'json.decoder'; known: "),
        ("method", "a/b", "unknown method 'a/b'; known: "),
        ("method", "", "unknown method ''; known: "),
    ],
)
def test_what_is_not_there_is_told_with_what_is(kind: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        registry.find(kind, name)


def test_the_summary_of_an_undocumented_module_is_empty() -> None:
    assert registry.summary(ModuleType("bare")) == ""
