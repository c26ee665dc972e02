"""The script that measures trainings of full size on a GPU, on networks as small as they go."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import estimate
from fastgen.precision import lowered
from tests.gpu import memory as script

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("world")
    script.write_data(folder, ["sd", "sdxl"])
    return folder


@pytest.mark.parametrize("name", script.CASES)
def test_each_case_is_a_recipe_of_its_family_and_model(name: str, world: Path, tmp_path: Path) -> None:
    family, method, _ = script.CASES[name]
    full, tiny = script.recipe_of(name, tmp_path), script.recipe_of(name, world)
    assert (full.model.family, full.method.name) == (family, method)
    assert estimate.folder_of(full.model)[1] is not None
    assert tiny.model.path == (str(world / family) if family in ("sd", "sdxl") else full.model.path)
    assert ("offload" in name, "fp32" in name) == (full.run.offload, full.run.precision == "fp32")
    assert ("dtype" in name) == (full.model.dtype == "bf16")
    assert ("8bit" in name) == (full.optim["student"].name == "adamw8bit")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's fake tensors look
@pytest.mark.parametrize("name", ["sd-dmd2", "sd-dmd2-shared", "sd-lcm-checkpointing", "sdxl-dmd2-offload"])
def test_what_is_measured_is_what_is_estimated(name: str, world: Path) -> None:
    given = script.recipe_of(name, world)
    found, row = script.measured(given, CPU, with_ratio=False), estimate.estimate(given, "cpu")
    assert found["held"] == {phase: turn["held"] for phase, turn in row["turns"].items()}
    assert found["parts"] == row["parts"]
    assert (found["peak"], found["device"]) == (None, "cpu")
    phases = {"critic": 1, "student": 5} if "dmd2" in name else {"student": 1}
    assert {phase: len(turns["seconds"]) for phase, turns in found["turns"].items()} == dict.fromkeys(phases, 3)
    later = {phase: sum(turns["seconds"][1:]) / 2 for phase, turns in found["turns"].items()}
    assert found["seconds"] == pytest.approx(sum(later[phase] / every for phase, every in phases.items()))
    shown = script.line(name, {"measured": found, "estimated": row})
    assert len(shown) == len(script.COLUMNS)
    assert shown[script.COLUMNS.index("held")] == "equal"
    row["turns"]["student"]["held"] -= 5
    differs = script.line(name, {"measured": {**found, "peak": 10**9}, "estimated": {**row, "peak": 11 * 10**8}})
    assert "student +5" in differs[script.COLUMNS.index("held")]
    assert differs[1:4] == ["1.10", "1.00", "+10.0 %"]


def test_the_ratio_is_that_of_bench_cost(world: Path) -> None:
    found = script.measured(script.recipe_of("sd-dmd2", world), CPU, with_ratio=True)
    assert found["ratio"] == pytest.approx(found["bench_seconds"] / found["floor_seconds"])
    assert found["rounds"] == script.ROUNDS


def test_a_full_model_is_made_of_the_shipped_files_with_random_conditions(tmp_path: Path) -> None:
    given = script.recipe_of("sana-dmd2", tmp_path)
    with estimate.without_weights(estimate.Ledger(), "cuda"):
        family, module = script.teacher(given.model, "bf16", CPU)
        assert module.__name__.endswith(".sana")
        assert estimate.counted([family.denoiser.network]) == 591_747_872
        cond = family.encode_prompts(["a", "b"])
    assert {name: tuple(row.shape) for name, row in cond.items()} == {"text": (2, 300, 2304), "mask": (2, 300)}
    assert cond["mask"].all()
    assert not lowered(family.denoiser.network)


def test_a_case_that_fails_or_hangs_is_a_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"peak": 10**9, "host": 0, "turns": {"student": {"held": 7}}}
    good = {"peak": 10**9, "held": {"student": 7}, "seconds": 0.5}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        name, what = command[3], command[5]
        if name == "sd-dmd2" and what == "measured":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        if name == "sd-lcm" and what == "measured":
            return subprocess.CompletedProcess(command, 1, "", "Traceback\ntorch.OutOfMemoryError: full\n")
        assert (options["env"].get("CUDA_VISIBLE_DEVICES") == "") == (what == "estimated")
        found = row if what == "estimated" else good
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(found)}\n", "")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "write_data", lambda folder, tiny: None)
    out = tmp_path / "rows.json"
    assert script.run(["sd-dmd2", "sd-lcm", "sana-dmd2"], out, tiny=False, limit=3) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].startswith("| sd-dmd2 | measured: not measured within 3 s |")
    assert shown[3].startswith("| sd-lcm | measured: ended with 1: torch.OutOfMemoryError: full |")
    assert shown[4] == "| sana-dmd2 | 1.00 | 1.00 | +0.0 % | equal | 0.00 | 0.500 |  |  |"
    assert json.loads(out.read_text())["sana-dmd2"] == {"measured": good, "estimated": row}
    assert script.run(["sana-dmd2"], None, tiny=False) == 0


def test_the_command_measures_a_tiny_case_in_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert script.run(["sdxl-dmd2-shared"], out, tiny=True) == 0
    row = json.loads(out.read_text())["sdxl-dmd2-shared"]
    assert row["measured"]["held"] == {name: turn["held"] for name, turn in row["estimated"]["turns"].items()}


def test_without_a_gpu_it_ends_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script.sys, "argv", ["memory"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "no CUDA device: --tiny runs the same on small networks\n"
    monkeypatch.setattr(script.sys, "argv", ["memory", "sd-dmd3"])
    with pytest.raises(SystemExit):
        script.main()
    assert "no case 'sd-dmd3'; known are sd-dmd2-fp32, " in capsys.readouterr().err
