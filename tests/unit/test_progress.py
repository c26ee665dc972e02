"""How far a piece of work is: what a terminal and a log are shown."""

from __future__ import annotations

import io
import logging
import re
import sys
from typing import Any

import pytest
import torch

from fastgen import progress as progressing
from fastgen.clock import ago, clock
from fastgen.progress import fitted, progress

LONG = "student/" + "a_term_of_a_long_name_" * 5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stderr(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal from here on; no fixture, whose stderr pytest would take back before the test."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return shown


def lines(terminal: Terminal) -> list[str]:
    """Without the codes that move the cursor and colour."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\r", "", terminal.getvalue()).split("\n")]


def test_a_terminal_gets_a_bar_with_rate_time_left_memory_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr(monkeypatch)
    with progress(4, 1) as advance:
        for _ in range(3):
            advance({"critic/denoising": 0.1234, "critic/fake_score.grad_norm": 5.0, "student/dmd": torch.tensor(2.0)})
    last = lines(terminal)
    assert any("4/4" in line and "steps/s, 0 s left, " in line and line.endswith(" GB") for line in last)
    assert "  critic/denoising 0.123  student/dmd 2" in last
    assert "grad_norm" not in terminal.getvalue()


def test_nothing_is_wider_than_the_terminal_whatever_terms_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr(monkeypatch)
    with progress(12000, 350) as advance:
        advance({LONG: 0.5, "student/gan": 1.0, **{f"both/regression_{i}": 1.0 for i in range(12)}})
    shown = lines(terminal)
    assert max(map(len, shown)) <= 80
    assert any("more" in line for line in shown)


def test_a_term_that_does_not_come_every_step_stays(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastgen"), progress(2, 0) as advance:
        advance({"student/dmd": 0.5})
        advance({"critic/denoising": 0.25})
    assert caplog.records[-1].getMessage().endswith(" GB student/dmd 0.5 critic/denoising 0.25")


def test_log_lines_go_past_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr(monkeypatch)
    log = logging.getLogger("fastgen")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(log, "handlers", [handler])
    with progress(3, 0) as advance:
        advance({"student/dmd": 0.5})
        log.warning("step 1: look")
        assert handler.stream is not terminal
    assert handler.stream is terminal
    assert "step 1: look" in lines(terminal)


def test_elsewhere_a_line_a_minute_says_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progressing.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "fastgen"), progress(6, 2) as advance:
        for _ in range(4):
            now[0] += 25.0
            advance({"student/dmd": 0.5})
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(" GB")[0].rpartition(", ")[0] for line in told] == [
        "step 5/6 25.00 s/step, 25 s left",
        "step 6/6 25.00 s/step, 0 s left",
    ]
    assert told[-1].endswith("student/dmd 0.5")


def test_other_processes_say_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progressing.parallel, "rank", lambda: 1)
    with caplog.at_level(logging.DEBUG, "fastgen"), progress(1, 0) as advance:
        advance({"student/dmd": 0.5})
    assert caplog.records == []


@pytest.mark.parametrize(
    ("terms", "width", "expected"),
    [
        ([], 20, []),
        (["a 1", "b 2"], 20, ["a 1  b 2"]),
        (["a 1", "b 2", "c 3"], 8, ["a 1  b 2", "c 3"]),
        (["aaaaaa 1", "bbbbbb 2", "cccccc 3", "dddddd 4"], 17, ["aaaaaa 1", "bbbbbb 2  +2 more"]),
        (["aaaaaaaaaaaaaaaaaaaaaaaaaa 1"], 10, ["aaaaaaaaaaaaaaaaaaaaaaaaaa 1"]),
    ],
)
def test_terms_are_told_whole_and_what_has_no_room_is_counted(terms: Any, width: int, expected: list[str]) -> None:
    assert fitted(terms, width) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (185, "3:05"), (3723, "1:02:03"), (183600, "2 d 3 h")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.2, "7 s ago"), (750, "12 min ago"), (58000, "16 h ago"), (3e5, "3 d ago")]
)
def test_ages_are_rough(seconds: float, text: str) -> None:
    assert ago(seconds) == text
