"""Of every family: the call that the model card shows does run, and the network alone goes into its base."""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fastgen import export, publish, registry
from fastgen.card import Call, snippet
from fastgen.family import Family
from tests import tiny

FAMILIES = registry.names("family")


@functools.cache
def case(name: str) -> Any:
    return importlib.import_module(f"tests.families.{name}").CASE


def opened(name: str) -> tuple[Any, Family]:
    pipeline = case(name).pipeline(0)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    size, frames = case(name).image_size, case(name).num_frames
    more = {"num_frames": frames} if frames else {}
    return pipeline, registry.find("family", name).wrap(pipeline, image_size=size, **more)


def ran(call: Call) -> Any:
    found: dict[str, Any] = {}
    exec(snippet(call), found)
    return found["frames" if call.gives == "frames" else "image"]


def size_of(made: Any) -> tuple[int, int]:
    """(width, height) of a PIL image, or of the first of a video's; those may be an array [F, H, W, 3]."""
    if isinstance(made, np.ndarray):
        return made.shape[2], made.shape[1]
    size: tuple[int, int] = made[0].size if isinstance(made, list) else made.size
    return size


def takes_bins(pipeline: Any) -> bool:
    return "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters


@pytest.mark.parametrize("form", ["pipeline", "component"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_card_s_own_call_makes_an_image(name: str, form: str, tmp_path: Path) -> None:
    pipeline, family = opened(name)
    height, width = family.image_size
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0 if family.unguided is None else family.unguided}
    settings |= {"height": height, "width": width, "num_frames": case(name).num_frames}
    calls: list[Call] = []
    folder = tmp_path / "student"

    def finish(partial: Path, made: Any, opened: export.Opened) -> None:
        call = publish.call_of(
            made, settings, case(name).prompts[0], str(folder), global_noise=family.step_noise == "global"
        )
        networks = {p.name: type(made.components[p.name]).__name__ for p in partial.iterdir() if p.is_dir()}
        networks.pop("scheduler")
        if form == "component":
            beside = export.settings_beside(made, str(tmp_path / "base"))
            call = replace(call, networks=networks, base=str(tmp_path / "base"), settings=beside)
        if takes_bins(made):  # of sizes near those of the large networks, into which it would put ours
            call = replace(call, arguments={**call.arguments, "use_resolution_binning": False})
        calls.append(call)

    what = family, tiny.perturbed(family.student()), 2, folder
    given: dict[str, Any] = {"prompts": list(case(name).prompts), "card": settings, "finish": finish}
    if form == "pipeline":
        assert export.export(*what, **given) <= export.TOLERANCE
    else:
        pipeline.save_pretrained(tmp_path / "base")
        assert export.export_component(*what, str(tmp_path / "base"), **given) <= export.TOLERANCE
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted([*calls[0].networks, "scheduler"])
    assert size_of(ran(calls[0])) == (width, height)
