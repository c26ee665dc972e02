"""The fault campaign: faults are put into real commands, and each run must say so clearly and go on unharmed.

``make faults`` runs the long one and writes docs/reliability.json and docs/reliability.md; tests/faults/test_faults.py
runs a few of each kind. An injection has survived if the command ended with the exit code that is promised and one
clear line, without a traceback, and the same command then went on from the last whole checkpoint to what an unbroken
run ends with, bit for bit. It is lost if it did not; what went on but was told badly counts as unclear.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from fastgen import checkpoint, tracking
from fastgen.interrupt import CODE
from tests import command
from tests.contract import kill_child
from tests.faults import child
from tests.oracle import same

ROOT = Path(__file__).parents[2]
STEPS = 9
"""Of a run, with a checkpoint every 3 and a row every 2: rows and checkpoints lie across each other."""
CHANGES = (
    *(f"run.steps={STEPS}", "run.checkpoint_every=3", "run.log_every=2", "run.keep=9", "run.sample_every=0"),
    "health.every=0",
)
UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"
MINUTE = 60.0
BIG = 64
"""MB of a disk on which all has room."""


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What fastgen said of its end."""
        return [line for line in self.err.splitlines() if line.startswith("fastgen: ")]

    @property
    def traceback(self) -> bool:
        return "Traceback" in self.err or "Traceback" in self.out

    def unclear(self, codes: Sequence[int], message: str) -> str:
        """What is wrong with its end; empty: code and line are as promised. message: a pattern."""
        if self.code not in codes:
            return f"exit code {self.code}, not {' or '.join(map(str, codes))}: {self.err[-300:]}"
        if self.code < 0:
            return ""  # killed: it can say nothing
        if len(self.lines) != 1 or not re.search(message, self.lines[0]):
            return f"said {self.lines}, not {message!r}"
        return ""


@dataclass(frozen=True)
class Outcome:
    """What became of an injection.

    Attributes:
        what: the fault, with where and when.
        harm: why it is lost; empty: it went on as it should.
        unclear: what was wrong with how it ended.
        traceback: whether one was seen.
    """

    what: str
    harm: str = ""
    unclear: str = ""
    traceback: bool = False

    @property
    def survived(self) -> bool:
        return not (self.harm or self.unclear or self.traceback)


class Lab:
    """A small world on disk, processes to run commands on it, and what unbroken commands leave."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([child.__name__, kill_child.__name__])
        self.world = command.world(folder)
        self._known: dict[str, Any] = {}

    def fresh(self) -> Path:
        """A path at which nothing is."""
        self._number += 1
        return self.folder / f"n{self._number}"

    def start(
        self, arguments: Sequence[object], *faults: tuple[Any, ...], environment: Mapping[str, str] | None = None
    ) -> tuple[Any, Path, float]:
        """``fastgen ARGUMENTS`` in a process of its own: the process, where its words go, when it began."""
        said = self.fresh()
        process = self.context.Process(
            target=child.main, args=(list(map(str, arguments)), said, faults, dict(environment or {}))
        )
        process.start()
        return process, said, time.monotonic()

    def wait(self, started: tuple[Any, Path, float], seconds: float = 600) -> Ended:
        """Its end. What has not ended by then is killed, with code -9."""
        process, said, began = started
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        took = time.monotonic() - began
        out, err = (said.with_suffix(kind) for kind in (".out", ".err"))
        text = [path.read_text(errors="replace") if path.is_file() else "" for path in (out, err)]
        return Ended(process.exitcode, text[0], text[1], took)

    def run(self, arguments: Sequence[object], *faults: tuple[Any, ...]) -> Ended:
        return self.wait(self.start(arguments, *faults))

    def training(self, out: Path, *changes: str) -> list[object]:
        """The command that trains into a folder."""
        return ["train", self.world / "run.yaml", f"run.out={out}", *CHANGES, *changes]

    def known(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made once."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    def whole(self) -> tuple[Path, float]:
        """The unbroken run, and the seconds that it took when all was warm."""

        def make() -> tuple[Path, float]:
            out = self.fresh()
            self.done(self.training(out))
            again = self.fresh()
            return out, self.done(self.training(again)).seconds

        found: tuple[Path, float] = self.known("whole", make)
        return found

    def done(self, arguments: Sequence[object]) -> Ended:
        """A command that must succeed."""
        ended = self.run(arguments)
        if ended.code:
            raise RuntimeError(f"fastgen {' '.join(map(str, arguments))} ended with {ended.code}: {ended.err}")
        return ended

    def goes_on(self, out: Path, *changes: str) -> str:
        """Why the same command does not come to the unbroken run's end; empty: it does."""
        ended = self.run(self.training(out, *changes))
        if ended.code:
            return f"does not go on, code {ended.code}: {ended.err[-300:]}"
        return difference(out, self.whole()[0])


def difference(one: Path, two: Path, rows: bool = True) -> str:
    """In what two finished runs differ; empty: last checkpoint, rows and pipeline are the same, bit for bit."""
    ours, theirs = (checkpoint.all_checkpoints(run)[-1] for run in (one, two))
    if ours.name != theirs.name:
        return f"ended at {ours.name}, not {theirs.name}"
    for file in sorted(theirs.glob("*.safetensors")):
        if not same(load_file(ours / file.name), load_file(file)):
            return f"{file.name} differs"
    if not same(load_file(one / UNET), load_file(two / UNET)):
        return "the pipeline differs"
    if rows and rows_of(one) != rows_of(two):
        return f"rows differ: {rows_of(one)} and {rows_of(two)}"
    return ""


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without the time it took."""
    found = tracking.read(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in tracking.MEASURED} for row in found]


def name_of(number: int) -> str:
    return signal.Signals(number).name


ENDED = (
    r"^fastgen: \S+: ended by {}; (checkpoint-\d+ is whole, and the same command goes on from it|there is no check)"
)
NEXT = r"checkpoint-{} is whole, and the same command goes on from it$"

# Kinds of faults. Each takes the lab, a source of chance and how many to inject.


def killed(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """SIGKILL at any moment of `fastgen train`, from the start of its process to the end of the export."""
    _, seconds = lab.whole()
    while count > 0:
        out, moments = lab.fresh(), list[float]()
        for _ in range(min(count, 3)):  # several of one run, so that each later one meets what the first ones left
            moment = chance.uniform(0, seconds)
            if lab.run(lab.training(out), ("after", moment, signal.SIGKILL)).code != -signal.SIGKILL:
                break  # it was done before
            moments.append(moment)
        harm = lab.goes_on(out) if moments else ""
        for moment in moments:
            yield Outcome(f"SIGKILL after {moment:.2f} s", harm)
        count -= len(moments)


def killed_engine(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """SIGKILL at random steps and moments of the engine, its checkpoints and rows (tests/contract/kill_child.py)."""

    def run(folder: Path, kill: tuple[int, float] | None = None) -> int | None:
        process = lab.context.Process(target=kill_child.main, args=(folder, 120, kill))
        process.start()
        process.join(600)
        return process.exitcode

    def unbroken() -> Path:
        folder = lab.fresh()
        run(folder)
        return folder

    whole = lab.known("engine", unbroken)
    while count > 0:
        out, moments = lab.fresh(), list[tuple[int, float]]()
        for _ in range(min(count, 10)):
            moments.append((chance.randrange(1, 9), chance.uniform(0, 0.01)))
            if run(out, moments[-1]) != -signal.SIGKILL:
                raise RuntimeError("a kill came too late")
        harm = "" if run(out) == 0 else "does not go on"
        if not harm and not same(load_file(out / "final.safetensors"), load_file(whole / "final.safetensors")):
            harm = "the weights differ"
        if not harm and tracking.read(out / "metrics.jsonl") != tracking.read(whole / "metrics.jsonl"):
            harm = "rows differ"
        for step, moment in moments:
            yield Outcome(f"SIGKILL {moment:.4f} s after step {step} of its process", harm)
        count -= len(moments)


def asked(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """SIGTERM or SIGINT within a random step: exit code 75, a checkpoint of that step, rows of an unbroken run."""
    for i in range(count):
        number, step = (signal.SIGTERM, signal.SIGINT)[i % 2], chance.randrange(1, STEPS + 1)
        out = lab.fresh()
        ended = lab.run(lab.training(out), ("signal_at", step, number))
        unclear = ended.unclear([CODE], f"ended by {name_of(number)}; {NEXT.format(step)}")
        yield Outcome(f"{name_of(number)} in step {step}", lab.goes_on(out), unclear, ended.traceback)


def burst(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """Five SIGTERM within a tenth of a second, as from a launcher and its group: one request."""
    for _ in range(count):
        step, out = chance.randrange(1, STEPS), lab.fresh()
        ended = lab.run(lab.training(out), ("signal_at", step, signal.SIGTERM, 5, 0.02))
        unclear = ended.unclear([CODE], f"ended by SIGTERM; {NEXT.format(step)}")
        yield Outcome(f"5 SIGTERM in step {step}", lab.goes_on(out), unclear, ended.traceback)


def twice(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A second signal in a step that lasts a minute: it leaves at once, with code 130 or 143."""
    for i in range(count):
        number, step, out = (signal.SIGINT, signal.SIGTERM)[i % 2], chance.randrange(2, STEPS), lab.fresh()
        ended = lab.run(lab.training(out), ("twice_in_a_long_step", step, number))
        unclear = ended.unclear([128 + number], f"{name_of(number)} again, left at once; the same command goes on")
        if ended.seconds > 45:
            unclear = unclear or f"took {ended.seconds:.0f} s"
        yield Outcome(f"two {name_of(number)} in step {step}", lab.goes_on(out), unclear, ended.traceback)


def whenever(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """SIGTERM or SIGINT at any moment of `fastgen train`: while it loads, trains or exports."""
    _, seconds = lab.whole()
    while count > 0:
        number, moment, out = chance.choice(child.SIGNALS), chance.uniform(0, seconds), lab.fresh()
        ended = lab.run(lab.training(out), ("after", moment, number))
        if ended.code == 0:
            continue  # it was done before
        count -= 1
        # before the training begins it is as with any other command
        unclear = ended.unclear([CODE, 128 + number], rf"ended by {name_of(number)}; ")
        yield Outcome(f"{name_of(number)} after {moment:.2f} s", lab.goes_on(out), unclear, ended.traceback)


def out_of_time(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """run.max_hours shorter than a step: each call does one step, and all together the whole run."""
    for _ in range(count):
        out, limit = lab.fresh(), "run.max_hours=1.0e-9"
        unclear, trace = "", False
        for step in range(1, STEPS + 1):
            ended = lab.run(lab.training(out, limit))
            unclear = unclear or ended.unclear([CODE], f"ended by run.max_hours 1e-09; {NEXT.format(step)}")
            trace |= ended.traceback
        yield Outcome("no time but for one step a call", lab.goes_on(out), unclear, trace)


def long_time(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A wall clock that jumps by up to a day each time that it is read, under a limit of an hour."""
    for _ in range(count):
        out, seed = lab.fresh(), chance.randrange(2**31)
        ended = lab.run(lab.training(out, "run.max_hours=1"), ("jumping_clock", seed))
        harm = difference(out, lab.whole()[0]) if ended.code == 0 else f"code {ended.code}: {ended.err[-300:]}"
        yield Outcome(f"clock of seed {seed}", harm, "", ended.traceback)


@contextlib.contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of its own of that size at ``folder``; False where only root may make one."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        made = False
    try:
        yield made
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def disks(lab: Lab) -> bool:
    """Whether a file system can be made here."""

    def make() -> bool:
        with disk(lab.fresh(), BIG) as made:
            return made

    return bool(lab.known("disks", make))


def full_disk(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A real file system (tmpfs, by root) that is full at some moment; then it is made larger."""
    whole, _ = lab.whole()
    needed = sum(f.stat().st_size for f in whole.rglob("*") if f.is_file()) // 1000
    for _ in range(count if disks(lab) else 0):
        size, folder = int(needed * chance.uniform(0.05, 0.9)), lab.fresh()
        with disk(folder, size):
            out = folder / "run"
            ended = lab.run(lab.training(out))
            unclear = ended.unclear([1], r"No space left|os error 28|cannot be written|not enough (disk )?space")
            remount(folder, f"size={BIG}m")
            yield Outcome(f"a disk of {size} kB", lab.goes_on(out), unclear, ended.traceback)


def too_large(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """RLIMIT_FSIZE from some step on, which stands for the end of the disk where nobody is root."""
    for _ in range(count):
        step, size, out = chance.randrange(1, STEPS + 1), chance.randrange(100, 20_000), lab.fresh()
        ended = lab.run(lab.training(out), ("full_at", step, size))
        unclear = ended.unclear([1], r"File too large|os error 27|cannot be written")
        yield Outcome(f"files of {size} bytes from step {step} on", lab.goes_on(out), unclear, ended.traceback)


def read_only(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A file system that refuses: a run's own that became read-only before it goes on, and /proc."""
    for i in range(count):
        if i % 2 or not disks(lab):
            ended = lab.run(lab.training(Path("/proc/fastgen-run")))
            unclear = ended.unclear([1, 2], r"^fastgen: /proc/fastgen-run\S*: ")
            yield Outcome("run.out in /proc", "", unclear, ended.traceback)
            continue
        folder, step = lab.fresh(), chance.randrange(1, STEPS)
        with disk(folder, BIG * 1000):
            out = folder / "run"
            lab.run(lab.training(out), ("signal_at", step, signal.SIGTERM))
            remount(folder, "ro")
            ended = lab.run(lab.training(out))
            unclear = ended.unclear([1], r"Read-only file system")
            remount(folder, "rw")
            yield Outcome(f"read-only after step {step}", lab.goes_on(out), unclear, ended.traceback)


def harmed(file: Path, chance: random.Random) -> str:
    """Cut a file short or flip one of its bits; what was done."""
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        kept = chance.randrange(len(content))
        file.write_bytes(content[:kept])
        return f"{file.name} cut to {kept} of {len(content)} bytes"
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"{file.name}, bit {bit} of byte {place} flipped"


def half_done(lab: Lab) -> Path:
    """A copy of the unbroken run as it was before its last three steps."""
    out = Path(shutil.copytree(lab.whole()[0], lab.fresh()))
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    shutil.rmtree(out / "pipeline")
    return out


def harmed_checkpoint(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A file of the newest checkpoint is cut short or has a bit flipped: it is refused by name, an older goes on."""
    for _ in range(count):
        out = half_done(lab)
        newest = checkpoint.all_checkpoints(out)[-1]
        what = harmed(chance.choice(sorted(newest.iterdir())), chance)
        ended = lab.run(lab.training(out))
        told = rf"{newest.name}\b.*; checkpoint-{STEPS - 6} before it is whole: `mv "
        unclear = ended.unclear([2], told) if ended.code else ""
        if ended.code == 0 and not difference(out, lab.whole()[0], rows=False):
            yield Outcome(f"{what}: went on by itself", "", "", ended.traceback)
            continue
        if ended.code == 0:
            yield Outcome(what, f"not noticed: {difference(out, lab.whole()[0])}", "", ended.traceback)
            continue
        newest.rename(f"{newest}.damaged")  # as it is told
        yield Outcome(what, lab.goes_on(out), unclear, ended.traceback)


def harmed_rows(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """metrics.jsonl is cut short or has a bit flipped: training goes on to the same weights, other rows are kept."""
    for _ in range(count):
        out = half_done(lab)
        file = out / "metrics.jsonl"
        kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= STEPS - 3]
        file.write_text("".join(f"{line}\n" for line in kept))
        what = harmed(file, chance)
        left = file.read_text(encoding="utf-8", errors="replace").splitlines()
        ended = lab.run(lab.training(out))
        harm = (
            difference(out, lab.whole()[0], rows=False)
            if ended.code == 0
            else f"code {ended.code}: {ended.err[-300:]}"
        )
        after = [row for row in rows_of(lab.whole()[0]) if row["step"] > STEPS - 3]
        missing = [row for row in after if row not in rows_of(out)]
        missing += [line for line in kept if line in left and json.loads(line) not in tracking.read(file)]
        if not harm and missing:
            harm = f"rows are lost: {missing}"
        yield Outcome(what, harm, "", ended.traceback)


def cached(lab: Lab) -> Path:
    """The config of a training on a cache, which and whose run are made with it."""
    path: Path = lab.folder / "cached.yaml"
    if not path.is_file():
        tree = yaml.safe_load((lab.world / "run.yaml").read_text())
        tree["method"] = {"name": "lcm", "guidance": {"embed": False}}
        tree["optim"].pop("fake_score")
        of = {"source": "images", "path": str(lab.world / "images"), "seed": 5}
        tree["data"] = {"source": "cached", "path": str(lab.folder / "cache"), "shard_size": 3, "of": of}
        path.write_text(yaml.safe_dump(tree))
        lab.done(["cache", path])
        out = lab.folder / "cached"
        lab.done(["train", path, f"run.out={out}", *CHANGES])
    return path


def harmed_cache(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A file of a cache is cut short or has a bit flipped: it is refused by name, and `fastgen cache` mends it."""
    for _ in range(count):
        config, folder, out = cached(lab), lab.fresh(), lab.fresh()
        shutil.copytree(lab.folder / "cache", folder)
        file = chance.choice(sorted(folder.glob("*.safetensors")))
        what = harmed(file, chance)
        words = ["train", config, f"run.out={out}", f"data.path={folder}", *CHANGES]
        ended = lab.run(words)
        if ended.code == 0:
            harm = difference(out, lab.folder / "cached")
            yield Outcome(f"{what}: of no consequence" if not harm else what, harm, "", ended.traceback)
            continue
        unclear = ended.unclear([2], rf"{file.name}\b.*(delete it|goes on)")
        file.unlink()
        made = lab.run(["cache", config, f"data.path={folder}"])
        again = lab.run(words)
        harm = difference(out, lab.folder / "cached") if again.code == 0 else f"{made.err[-200:]} {again.err[-200:]}"
        yield Outcome(what, harm, unclear, ended.traceback or made.traceback)


def not_finite(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """NaN or Inf in data, weights or gradients: it ends naming step, phase and terms, and no optimizer has moved."""
    for i in range(count):
        where, value = ("data", "weights", "gradients")[i % 3], chance.choice(["NaN", "Inf"])
        step, out = chance.randrange(1, STEPS - 1), lab.fresh()
        if where == "weights" and step % 3 == 0:
            step += 1  # else the checkpoint of that step would hold it, as it would of a broken memory
        ended = lab.run(lab.training(out), (f"spoilt_{where}", step, child.NOT_FINITE[value]))
        at = f"({step - 1}|{step})" if where == "weights" else step - 1  # numbered from 0; who meets them comes later
        message = rf"not finite at step {at}, phase '\w+': \S+=.*; the optimizer has not moved"
        unclear = ended.unclear([1], message)
        yield Outcome(f"{value} in {where} at step {step}", lab.goes_on(out), unclear, ended.traceback)


def broken_source(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A data source that raises: data are read in the training process, there is no worker that could die."""
    for i in range(count):
        calls, kind, out = chance.randrange(0, 80), ("OSError", "RuntimeError")[i % 2], lab.fresh()
        ended = lab.run(lab.training(out), ("source_raises", calls, kind))
        unclear = ended.unclear([1], r"the data") if ended.code else ""
        harm = lab.goes_on(out) if ended.code else difference(out, lab.whole()[0])
        yield Outcome(f"{kind} at item {calls} that was asked for", harm, unclear, ended.traceback)


def two(lab: Lab, out: Path, faults: Mapping[int, tuple[Any, ...]]) -> tuple[list[Ended], float]:
    """A training in two processes over gloo; how they ended, and the seconds from the first end to the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        some = [faults[rank]] if rank in faults else []
        started.append(lab.start(lab.training(out, "run.batch_size=1"), *some, environment=environment))
    processes = [process for process, *_ in started]
    multiprocessing.connection.wait([process.sentinel for process in processes], 600)
    first = time.monotonic()
    ended = [lab.wait(one, 2 * MINUTE) for one in started]
    return ended, time.monotonic() - first


def whole_of_two(lab: Lab) -> Path:
    def make() -> Path:
        out = lab.fresh()
        ended, _ = two(lab, out, {})
        if any(one.code for one in ended):
            raise RuntimeError(f"two processes do not train: {[one.err for one in ended]}")
        return out

    found: Path = lab.known("two", make)
    return found


def both_go_on(lab: Lab, out: Path) -> str:
    ended, _ = two(lab, out, {})
    if any(one.code for one in ended):
        return f"does not go on: {[one.err[-300:] for one in ended]}"
    return difference(out, whole_of_two(lab))


def dead_rank(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """One of two processes is killed: the other says so and ends within a minute."""
    for i in range(count):
        rank, step, out = i % 2, chance.randrange(2, STEPS), lab.fresh()
        ended, seconds = two(lab, out, {rank: ("dies_at", step)})
        other = ended[1 - rank]
        unclear = other.unclear([1], r"another process of this training has gone, see what it said; ")
        if seconds > MINUTE:
            unclear = unclear or f"it took {seconds:.0f} s"
        harm = both_go_on(lab, out)
        yield Outcome(f"process {rank} of 2 killed in step {step}", harm, unclear, other.traceback)


def one_rank_asked(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """A signal to one of two processes ends both after the same step, with one line from the main one."""
    for i in range(count):
        rank, number, step, out = i % 2, chance.choice(child.SIGNALS), chance.randrange(1, STEPS + 1), lab.fresh()
        ended, _ = two(lab, out, {rank: ("signal_at", step, number)})
        unclear = ended[0].unclear([CODE], f"ended by {name_of(number)}; {NEXT.format(step)}")
        if (ended[1].code, ended[1].lines) != (CODE, []):
            unclear = unclear or f"the other ended with {ended[1].code}: {ended[1].err[-300:]}"
        trace = any(one.traceback for one in ended)
        yield Outcome(f"{name_of(number)} to process {rank} of 2 in step {step}", both_go_on(lab, out), unclear, trace)


def commands(lab: Lab) -> dict[str, Callable[[Path], list[object]]]:
    """Commands that write into a folder, by name."""
    run, _ = lab.whole()
    pairs = lab.folder / "pairs.yaml"
    if not pairs.is_file():
        tree = yaml.safe_load((lab.world / "run.yaml").read_text())
        options = {"out": "x", "number": 8, "num_steps": 4, "guidance_scale": 2.0, "shard_size": 2}
        pairs.write_text(yaml.safe_dump({"model": tree["model"], "data": tree["data"], "pairs": options}))
        judged = {
            "metrics": ["clip_score"],
            "weights": {"clip": str(command.clip(lab.folder / "clip"))},
            "reference": {"source": "images", "path": str(lab.world / "images")},
            "num_images": 4,
            "batch_size": 2,
        }
        (lab.folder / "eval.yaml").write_text(yaml.safe_dump({"eval": judged}))
    return {
        "export": lambda out: ["export", run, "--out", out],
        "cache": lambda out: ["cache", cached(lab), f"data.path={out}"],
        "pairs": lambda out: ["pairs", pairs, f"pairs.out={out}"],
        "geneval images": lambda out: ["geneval", "images", run / "pipeline", "-o", out, "--per-tag", "1", "-n", "1"],
        "generate": lambda out: ["generate", run / "pipeline", "-p", "a red apple", "-n", "4", "-o", out],
        "evaluate": lambda out: ["evaluate", run / "pipeline", "--config", lab.folder / "eval.yaml", "--out", out],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """The tensors and pictures that a command wrote, hidden files left out."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".png") and path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not re.search(r"(^|/)\.", name)}


def scores(folder: Path) -> list[Any]:
    """The values of results.json that are the same each time."""
    file = folder / "results.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    return [(row["name"], row.get("clip_score")) for row in rows]


def ctrl_c(lab: Lab, chance: random.Random, count: int) -> Iterator[Outcome]:
    """Ctrl-C at any moment of the other commands: code 130, nothing half-written, and the same command goes on."""
    made = commands(lab)
    names = sorted(made)
    for i in range(count):
        name = names[i % len(names)]

        def unbroken(words: Callable[[Path], list[object]] = made[name]) -> tuple[Path, float]:
            out = lab.fresh()
            return out, lab.done(words(out)).seconds

        whole, seconds = lab.known(f"command {name}", unbroken)
        for sooner in range(9):  # the first time may have been a slow one
            moment, out = chance.uniform(0.02, 0.95) * seconds * 0.8**sooner, lab.fresh()
            ended = lab.run(made[name](out), ("after", moment, signal.SIGINT))
            if ended.code:
                break
        else:
            raise RuntimeError(f"{name}: no signal came in time")
        unclear = ended.unclear([130], "ended by SIGINT; what was written before is whole")
        harm, wanted = "", contents(whole)
        half = [file for file, content in contents(out).items() if wanted.get(file) != content]
        if half:
            harm = f"{half[0]} is half-written"
        again = lab.run(made[name](out))
        if again.code or contents(out) != wanted or scores(out) != scores(whole):
            harm = harm or f"does not go on to the same: {again.code} {again.err[-300:]}"
        yield Outcome(f"{name} after {moment:.2f} s", harm, unclear, ended.traceback or again.traceback)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how it is injected, and how often in the quick part and in the long one."""

    name: str
    inject: Callable[[Lab, random.Random, int], Iterator[Outcome]]
    quick: int
    long: int


KINDS = [
    Kind("SIGKILL, fastgen train", killed, 2, 60),
    Kind("SIGKILL, engine", killed_engine, 0, 60),
    Kind("SIGTERM or SIGINT in a step", asked, 2, 24),
    Kind("SIGTERM or SIGINT at any moment", whenever, 1, 30),
    Kind("a burst of SIGTERM", burst, 1, 6),
    Kind("a second signal", twice, 1, 6),
    Kind("run.max_hours", out_of_time, 0, 2),
    Kind("wall clock jumps", long_time, 1, 5),
    Kind("full disk (tmpfs)", full_disk, 1, 20),
    Kind("full disk (RLIMIT_FSIZE)", too_large, 1, 10),
    Kind("read-only folder", read_only, 2, 6),
    Kind("damaged checkpoint", harmed_checkpoint, 2, 40),
    Kind("damaged metrics.jsonl", harmed_rows, 1, 20),
    Kind("damaged cache", harmed_cache, 1, 20),
    Kind("NaN or Inf", not_finite, 3, 18),
    Kind("data source that raises", broken_source, 1, 8),
    Kind("one of two processes dies", dead_rank, 1, 8),
    Kind("one of two processes is asked to stop", one_rank_asked, 1, 6),
    Kind("Ctrl-C in other commands", ctrl_c, 2, 36),
]


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """A lab in a folder that goes."""
    with tempfile.TemporaryDirectory(prefix="fastgen-faults-", ignore_cleanup_errors=True) as folder:
        yield Lab(Path(folder))


def inject(kind: Kind, room: Lab, seed: int, count: int) -> list[Outcome]:
    """So many faults of a kind, the same for the same seed but for what moments come to on this machine."""
    return list(kind.inject(room, random.Random(f"{seed} {kind.name}"), count))


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {
        "injected": len(outcomes),
        "survived": sum(one.survived for one in outcomes),
        "lost": sum(bool(one.harm) for one in outcomes),
        "unclear": sum(bool(one.unclear) and not one.harm for one in outcomes),
        "tracebacks": sum(one.traceback for one in outcomes),
    }


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


COLUMNS = ("injected", "survived", "lost", "unclear", "tracebacks")


def document(report: Mapping[str, Any]) -> str:
    """docs/reliability.md."""
    about = {kind.name: (kind.inject.__doc__ or "").strip() for kind in KINDS}
    rows = [*report["kinds"], {"name": "**all**", **report["all"]}]
    lines = [f"| {row['name']} | {' | '.join(str(row[name]) for name in COLUMNS)} |" for row in rows]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    trouble = [
        f"- {one['kind']}: {one['what']}: {one['harm'] or one['unclear'] or 'traceback'}" for one in report["trouble"]
    ]
    return "\n".join(
        [
            "# Reliability",
            "",
            "Written by `make faults` (tests/faults/campaign.py), which puts faults into commands on a tiny teacher.",
            "An injection has *survived* if the command ended with the exit code that is promised and one clear line,",
            "without a traceback, and the same command went on from the last whole checkpoint to what an unbroken",
            "run ends with: weights, averages, moments, rows of metrics.jsonl and the exported network, bit for bit.",
            "It is *lost* if it did not, *unclear* if it went on but was told badly.",
            "",
            f"Commit {report['commit']}, seed {report['seed']}, {report['minutes']} minutes; {versions}.",
            "",
            f"| Fault | {' | '.join(name.capitalize() for name in COLUMNS)} |",
            f"|---|{'---:|' * len(COLUMNS)}",
            *lines,
            "",
            "## What was not survived",
            "",
            *(trouble or ["Nothing."]),
            "",
            "## What each is",
            "",
            *(f"- {name}: {text}" for name, text in about.items()),
            "",
        ]
    )


def main() -> int:
    """Run the long campaign, and write its report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--only", default="", help="kinds whose name matches this pattern")
    parser.add_argument("--count", type=int, help="of each kind; the long campaign's own if not given")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.json", help="beside it goes the .md")
    given = parser.parse_args()
    began, found, trouble = time.monotonic(), [], []
    everything: list[Outcome] = []
    with lab() as room:
        for kind in (kind for kind in KINDS if re.search(given.only, kind.name)):
            outcomes = inject(kind, room, given.seed, kind.long if given.count is None else given.count)
            everything += outcomes
            found.append({"name": kind.name, **counts(outcomes)})
            trouble += [{"kind": kind.name, **asdict(one)} for one in outcomes if not one.survived]
            minutes = (time.monotonic() - began) / 60
            print(f"{minutes:6.1f} min  {kind.name}: {counts(outcomes)}", flush=True)
            for one in outcomes:
                if not one.survived:
                    print(f"  {one}", flush=True)
    report = {
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "seed": given.seed,
        "minutes": round((time.monotonic() - began) / 60),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "safetensors")},
        },
        "all": counts(everything),
        "kinds": found,
        "trouble": trouble,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(document(report), encoding="utf-8")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
