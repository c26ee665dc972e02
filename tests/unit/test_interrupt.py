"""Signals and limits of time: when a training is asked to stop, by what, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastgen import interrupt, parallel, train
from fastgen.interrupt import Interrupted, ProcessGone, Watch, watched


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_between_two_steps_waits_until_it_is_asked_for(number: int) -> None:
    with watched() as watch, pytest.raises(Interrupted, match=signal.Signals(number).name), watch.stepping():  # noqa: PT012
        assert not watch.asked()
        send(number)
        assert watch.asked()
        assert watch.reason == signal.Signals(number).name
        assert watch.asked(), "it stays asked"


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_elsewhere_it_ends_the_training_where_it_is(number: int) -> None:
    with pytest.raises(Interrupted), watched():  # noqa: PT012
        send(number)
        pytest.fail("it went on")


def test_one_that_came_in_the_last_step_is_not_forgotten() -> None:
    with pytest.raises(Interrupted, match="SIGTERM"), watched() as watch:  # noqa: PT012
        with watch.stepping():
            send(signal.SIGTERM)
        pytest.fail("it went on")


@pytest.mark.parametrize("number", interrupt.SIGNALS)
@pytest.mark.parametrize(("words", "code"), [(["list", "methods"], 0), (["train", "nowhere.yaml"], 2)])
def test_once_a_command_is_done_a_signal_leaves_it_its_exit_code(number: int, words: list[str], code: int) -> None:
    """While Python clears up: the first of what is called at exit sends one."""
    program = (
        "import atexit, os, signal, sys, time\n"
        "from fastgen import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"atexit.register(lambda: (os.kill(os.getpid(), {int(number)}), time.sleep(20), print('still there')))\n"
        f"sys.argv = ['fastgen', *{words}]\n"
        "cli.main()"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert "still there" not in ended.stdout
    assert time.monotonic() - began < 20
    assert ("dmd2" in ended.stdout) if code == 0 else ("nowhere.yaml" in ended.stderr)


def test_in_another_thread_a_command_that_is_done_takes_no_signals() -> None:
    before = [signal.getsignal(number) for number in interrupt.SIGNALS]
    thread, failed = threading.Thread(target=interrupt.over, args=(0,)), list[Any]()
    with mock.patch.object(threading, "excepthook", failed.append):
        thread.start()
        thread.join()
    assert failed == []
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == before


def test_several_at_once_are_one_request() -> None:
    with watched() as watch, pytest.raises(Interrupted), watch.stepping():  # noqa: PT012
        for _ in range(5):
            send(signal.SIGTERM)
            send(signal.SIGINT)
        assert watch.asked()
    with pytest.raises(Interrupted), watched():  # noqa: PT012
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)  # while it is on its way out


def test_no_library_takes_it_for_a_failure_of_its_own() -> None:
    assert not issubclass(Interrupted, Exception)


def test_a_second_signal_later_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    monkeypatch.setattr(interrupt, "AGAIN", 0.05)
    monkeypatch.setattr(os, "_exit", left.append)
    with watched() as watch, pytest.raises(Interrupted), watch.stepping():  # noqa: PT012
        send(signal.SIGTERM)
        time.sleep(0.2)
        send(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not left and time.monotonic() < deadline:
            time.sleep(0.01)
    assert left == [143]
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "SIGTERM: this step is finished and a checkpoint saved; a second one leaves at once",
        "fastgen: SIGTERM again, left at once; the same command goes on from the newest checkpoint",
    ]


def test_handlers_and_the_listener_go_with_the_training() -> None:
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    with watched():
        assert any(thread.name == "fastgen-signals" for thread in threading.enumerate())
        assert all(signal.getsignal(number) != handlers[number] for number in handlers)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert not any(thread.name == "fastgen-signals" for thread in threading.enumerate())
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watched():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_there_are_no_handlers_and_the_limit_holds() -> None:
    found: list[bool] = []

    def work() -> None:
        with watched(1e-9) as watch:
            found.append(watch.asked())

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_the_time_is_over_where_one_more_step_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10, 30 and 10 seconds in 100: after the 30 there must be 30 left. The wall clock does not matter."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 0.0)
    watch, answers = Watch(100 / 3600), []
    with watch.stepping():
        for seconds in (10, 30, 10, 10, 10, 10):
            now[0] += seconds
            answers.append(watch.asked())
    assert answers == [False, False, False, False, False, True]
    assert watch.reason == "run.max_hours 0.0277778"
    assert Watch(0).limit == float("inf")


def test_processes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this one does is what the largest of all answers says."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda backend: backend)

    def other(number: int, over: int) -> None:
        def all_reduce(mine: torch.Tensor, how: Any, group: str) -> None:
            assert (how, group) == (dist.ReduceOp.MAX, "gloo")
            mine.copy_(torch.maximum(mine, torch.tensor([number, over])))

        monkeypatch.setattr(dist, "all_reduce", all_reduce)

    watch = Watch(0)
    other(0, 0)
    assert not watch.asked()
    other(0, 1)
    assert watch.asked()
    assert watch.reason.startswith("run.max_hours")
    other(signal.SIGTERM, 0)
    assert watch.asked()
    assert watch.reason == "SIGTERM"


@pytest.mark.parametrize(
    ("error", "size", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), 2, True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), 1, False),
        (dist.DistNetworkError("Connection reset by peer"), 2, True),
        (RuntimeError("a shape is wrong"), 2, False),
        (ValueError("gloo"), 2, False),
    ],
)
def test_the_end_of_another_process_is_told_from_other_failures(
    monkeypatch: pytest.MonkeyPatch, error: Exception, size: int, expected: bool
) -> None:
    monkeypatch.setattr(parallel, "size", lambda: size)
    assert interrupt.of_another(error) == expected


def test_what_a_run_leaves_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted, match=r"ended by SIGINT; there is no checkpoint yet, and the same command begins"):
        with watched() as watch, train.going_on(tmp_path, watch):
            send(signal.SIGINT)
    (tmp_path / "checkpoint-7").mkdir()
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(
        ProcessGone, match=r"another process of this training has gone, .*; checkpoint-7 is whole, and"
    ):
        with train.going_on(tmp_path, Watch(0)):
            raise RuntimeError("gloo: Connection closed by peer")
    with pytest.raises(ZeroDivisionError), train.going_on(tmp_path, Watch(0)):
        raise ZeroDivisionError


def test_what_no_row_holds_yet_is_kept_for_its_step_alone(tmp_path: Path) -> None:
    rest = train.Unlogged(5, {"loss": [1 / 3, float("inf")]}, 1.5, 2)
    train.keep_unlogged(tmp_path, rest)
    assert train.unlogged(tmp_path, 5) == rest
    nothing = train.Unlogged(6, {})
    assert train.unlogged(tmp_path, 6) == nothing
    for damaged in ({"step": 6}, {"step": 6, "logs": ["loss"]}, {"step": 6, "logs": {"loss": 1.0}}):
        (tmp_path / train.UNLOGGED).write_text(json.dumps(damaged))
        assert train.unlogged(tmp_path, 6) == nothing
    (tmp_path / train.UNLOGGED).unlink()
    assert train.unlogged(tmp_path, 6) == nothing
