from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastgen import memory
from fastgen.recipe import Student


def test_forms_set_the_student_and_nothing_else() -> None:
    tree = {"run": {"steps": 1}, "student": {"steps": 4}}
    assert memory.formed(tree, "whole") == {
        "run": {"steps": 1},
        "student": {"steps": 4, "lora": None, "share_backbone": False},
    }
    assert memory.formed(tree, "shared")["student"] == {"steps": 4, "lora": {}, "share_backbone": True}
    own = {"student": {"lora": {"rank": 8}, "share_backbone": True}}
    assert memory.formed(own, "adapters")["student"] == {"lora": {"rank": 8}, "share_backbone": False}
    assert own == {"student": {"lora": {"rank": 8}, "share_backbone": True}}
    assert set(memory.FORMS["whole"]) <= set(Student.__dataclass_fields__)


def test_a_storage_counts_once_whatever_shares_it() -> None:
    known: set[int] = set()
    whole, apart = torch.zeros(10), torch.zeros(3, dtype=torch.float64)
    assert memory.size([whole, whole[2:], whole.view(2, 5)], known) == 40
    assert memory.size([whole, apart], known) == 24
    assert memory.size([apart], known) == 0


def test_the_total_is_of_all_parts() -> None:
    assert memory.total({"weights": {"teacher": 1, "student": 20}, "ema": 300}) == 321


def ended(monkeypatch: pytest.MonkeyPatch, *ends: tuple[int, str, str]) -> list[dict[str, Any]]:
    """Let the processes end so, in turn; what they were given."""
    given: list[dict[str, Any]] = []
    left = iter(ends)

    def run(command: list[str], input: str, **options: object) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", "fastgen.memory"]
        given.append(json.loads(input))
        code, out, err = next(left)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(memory.subprocess, "run", run)
    return given


def test_a_form_that_the_recipe_refuses_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = (2, "", "a warning\nstudent.lora: no\n")
    given = ended(monkeypatch, (0, '{"peak": 5}\n', ""), refusal, refusal)
    assert memory.rows({"method": {"name": "x"}}, "name", "where.yaml") == [
        {"config": "name", "form": "whole", "peak": 5}
    ]
    assert [tree["tree"]["student"]["share_backbone"] for tree in given] == [False, False, True]
    assert {tree["where"] for tree in given} == {"where.yaml"}
    assert "name: left out adapters: student.lora: no" in caplog.text


def test_what_no_form_can_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ended(monkeypatch, *[(2, "", "no such teacher")] * 3)
    with pytest.raises(ValueError, match="no such teacher"):
        memory.rows({}, "name", "where.yaml")


def test_a_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ended(monkeypatch, (1, "", "Traceback\nMemoryError: all is full"))
    with pytest.raises(OSError, match=r"where.yaml: .* measured whole ended with 1: MemoryError: all is full"):
        memory.rows({}, "name", "where.yaml")


def test_the_process_tells_bad_input_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory.sys.stdin, "read", lambda: json.dumps({"tree": {}, "where": "w.yaml"}), raising=False)
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "w.yaml: model is missing\n"
