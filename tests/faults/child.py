"""What runs in the processes of the fault campaign: the command line as a user calls it, with a fault in it.

They are forked from one that has imported this module and done nothing else, so that each starts at once.
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen import cli

cli.quiet()  # before the libraries are imported, as the command line does it

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # else imported by the first optimizer step of each process
from diffusers.utils import logging as of_diffusers  # noqa: E402
from transformers.utils import logging as of_transformers  # noqa: E402

import fastgen.cache  # noqa: E402
import fastgen.evaluation.geneval_images  # noqa: E402
import fastgen.evaluation.judge  # noqa: E402
import fastgen.pairs  # noqa: E402
import fastgen.pipelines.sd  # noqa: E402
import fastgen.train  # noqa: E402, F401
from fastgen.data.batches import Batches  # noqa: E402
from fastgen.data.prompts import Prompts  # noqa: E402
from fastgen.engine import Engine  # noqa: E402
from fastgen.method import Batch, Phase  # noqa: E402

Action = Callable[[Engine], object]


def main(
    arguments: Sequence[str], said: Path, faults: Sequence[tuple[Any, ...]], environment: Mapping[str, str]
) -> None:
    """``fastgen ARGUMENTS`` with faults; stdout and stderr go to files beside ``said``. environment: besides."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    for fd, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said.with_suffix(kind), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), fd)
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # what a process has written outlives it without; a disk takes 10 ms each time
    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
    for name, *values in faults:
        globals()[name](*values)
    sys.argv = ["fastgen", *arguments]
    try:
        cli.main()
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out


# Faults. Each is called in the process before the command.


def after(seconds: float, number: int) -> None:
    """A signal at some moment."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def at_step(step: int, act: Action) -> None:
    """Something after the first turn of a step, numbered from 1."""
    whole, once = Engine.turn, itertools.count()

    def turn(self: Engine, phase: Phase, number: int) -> Any:
        logs = whole(self, phase, number)
        if number + 1 == step and not next(once):
            act(self)
        return logs

    Engine.turn = turn  # type: ignore[method-assign]


def signal_at(step: int, number: int, times: int = 1, pause: float = 0.0) -> None:
    """A signal, or several of them with pauses between, within a step."""

    def act(engine: Engine) -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(pause)

    at_step(step, act)


def twice_in_a_long_step(step: int, number: int) -> None:
    """A signal within a step that lasts, and another a little later."""

    def act(engine: Engine) -> None:
        for seconds in (0.0, 1.3):
            timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        time.sleep(60)  # goes on after a signal that raises nothing, as a long call into a library does

    at_step(step, act)


def full_at(step: int, size: int) -> None:
    """From a step on no file may grow beyond so many bytes: a limit stands for the end of the disk."""
    at_step(step, lambda engine: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


def spoilt_data(step: int, value: float) -> None:
    """From a step on a condition is not finite in one place."""
    whole = Batches.batch

    def batch(self: Batches, samples: Sequence[int]) -> Batch:
        found = whole(self, samples)
        if samples[0] < (step - 1) * len(samples):
            return found
        cond = {name: tensor.clone() for name, tensor in found.cond.items()}
        next(t for t in cond.values() if t.is_floating_point()).view(-1)[0] = value
        return replace(found, cond=cond)

    Batches.batch = batch  # type: ignore[method-assign]


def spoilt_weights(step: int, value: float) -> None:
    """After a step one weight of the student is not finite."""

    def act(engine: Engine) -> None:
        with torch.no_grad():
            next(iter(engine.parameters["student"].values())).view(-1)[0] = value

    at_step(step, act)


def spoilt_gradients(step: int, value: float) -> None:
    """In a step one gradient of each network that learns is not finite."""
    whole = Engine.turn

    def turn(self: Engine, phase: Phase, number: int) -> Any:
        handles = []
        if number + 1 == step:
            self.train_only(phase.trains)  # hooks are for what learns
            parameters = [next(iter(self.parameters[role].values())) for role in phase.trains]
            handles = [p.register_hook(lambda gradient: gradient * value) for p in parameters]
        try:
            return whole(self, phase, number)
        finally:
            for handle in handles:
                handle.remove()

    Engine.turn = turn  # type: ignore[method-assign]


def source_raises(calls: int, kind: str) -> None:
    """The data source fails at some call, as one whose disk or network has gone."""
    whole, count = Prompts.item, itertools.count()
    error = {"OSError": OSError(5, os.strerror(5), "the data"), "RuntimeError": RuntimeError("the data are gone")}[
        kind
    ]

    def item(self: Prompts, index: int) -> Any:
        if next(count) >= calls:
            raise error
        return whole(self, index)

    Prompts.item = item  # type: ignore[method-assign]


def jumping_clock(seed: int) -> None:
    """A wall clock that is set back and forth by up to a day each time that somebody reads it."""
    chance, whole = random.Random(seed), time.time
    time.time = lambda: whole() + chance.uniform(-86400, 86400)


def dies_at(step: int) -> None:
    """SIGKILL within a step."""
    at_step(step, lambda engine: os.kill(os.getpid(), signal.SIGKILL))


def shell_at(step: int, *words: str) -> None:
    """Run a program within a step."""
    at_step(step, lambda engine: subprocess.run(words, check=True))


SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOT_FINITE = {"NaN": math.nan, "Inf": math.inf}
