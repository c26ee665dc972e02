"""``fastgen bench cost``: the time of a training step against its floor, and where the rest goes.

The floor is the passes that the method declares (``passes``), each timed alone on the same networks, at the same batch
size and precision, in the same process. Turns of the phases, passes and what else a step consists of are timed in
rounds, one after the other, so that whatever else the machine does meets them alike; of each the median counts.
Weights move meanwhile, and nothing is kept of them.
"""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import derivative, losses
from .denoiser import Cond, Denoiser
from .discriminator import Heads, features
from .experts import members
from .guidance import student_guidance, with_guidance
from .method import Phase, nothing
from .passes import Pass
from .recipe import Recipe
from .rng import Noise
from .tracking import JsonLines
from .train import Session, build

log = logging.getLogger("fastgen")

Clock = Literal["wall", "cpu"]
"""``cpu`` is the processor's time of this process: with one thread, on a machine that others use, the steadier."""
CLOCKS: Mapping[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Work:
    """Something to be timed. before: not timed; seconds: of each round."""

    run: Callable[[], object]
    before: Callable[[], object] = nothing
    seconds: list[float] = field(default_factory=list)


def interleave(works: Iterable[Work], rounds: int, clock: Callable[[], float], sync: Callable[[], object]) -> None:
    """Time each work once a round, in turn. sync: waits until the device is done."""
    works = list(works)
    for _ in range(rounds):
        for work in works:
            work.before()
            sync()
            began = clock()
            work.run()
            sync()
            work.seconds.append(clock() - began)


class Even(Noise):
    """Random numbers whose shared integers come in their turn, so that a few steps stand for all depths of rollout."""

    def shared_integer(self, high: int) -> int:
        """The step's number, modulo ``high``."""
        return self.step % high


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        turns, clips, updates, afters: of a phase's turn, its clipping, its optimizers and what follows them, by phase.
        passes: of one of each; their count says nothing.
        first, again: the data of a step that were not there before, and the same again.
        averages, row: all averaged weights, and one row of metrics.
    """

    turns: Mapping[str, float]
    clips: Mapping[str, float]
    updates: Mapping[str, float]
    afters: Mapping[str, float]
    passes: Mapping[Pass, float]
    first: float
    again: float
    averages: float
    row: float

    def floor(self, phases: Sequence[Phase], accumulate: int = 1) -> float:
        """Of the declared passes of a training step, each phase by how often it is due."""
        needed = ((phase, p) for phase in phases for p in phase.passes if p.count)
        return sum(accumulate * p.count / phase.every * self.passes[once(p)] for phase, p in needed)

    def rest(self, phases: Sequence[Phase], cached: bool, log_every: int) -> dict[str, float]:
        """Of a training step, what is no arithmetic. cached: its images were there already."""

        def due(seconds: Mapping[str, float]) -> float:
            return sum(seconds[phase.name] / phase.every for phase in phases)

        return {
            "data": due({phase.name: self.again for phase in phases}) + (0 if cached else self.encoding),
            "clipping": due(self.clips),
            "optimizer": due(self.updates),
            "ema": due(self.afters) + self.averages,
            "logging": self.row / log_every,
        }

    def step(self, phases: Sequence[Phase], log_every: int) -> float:
        """Of a training step."""
        return sum(self.turns[phase.name] / phase.every for phase in phases) + self.averages + self.row / log_every

    @property
    def encoding(self) -> float:
        """Of a step's data, what is done once where they are kept."""
        return self.first - self.again


def once(p: Pass) -> Pass:
    """A single one."""
    return replace(p, count=1.0)


def measure(recipe: Recipe, name: str, rounds: int = 9, clock: Clock = "wall") -> dict[str, Any]:
    """The row of a recipe. name: what its config is called; rounds: of which medians are taken, at least.

    Returns:
        seconds, floor_seconds: of a training step, each phase by how often it is due; ratio, and its quartiles over
        the rounds; rest: seconds of a step by what they go to; passes: seconds of each; and how it was measured.
        With ``run.cache_latents`` the step is one whose images are encoded already, and encoding_seconds, on top of
        it, is what a step of this run takes on average for encoding each image once.

    Raises ValueError if the method declares no passes, or if the clock does not see the device.
    """
    session = build(recipe)
    if clock == "cpu" and session.device.type != "cpu":
        raise ValueError(f"clock cpu does not see what {session.device} does; use wall")
    for phase in session.method.phases:
        if not phase.passes:
            raise ValueError(f"method {recipe.method.name!r} declares no passes of its phase {phase.name!r}")
    log.info("%s: %s on %s, %d rounds", name, recipe.method.name, session.device, rounds)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(session, Path(folder), rounds)
        bench.go(clock)
        row = bench.row()
    log.info("%s: %.3g s a step, %.3f of its floor", name, row["seconds"], row["ratio"])
    return {"method": recipe.method.name, "config": name, **row, "clock": clock}


class Bench:
    """A built recipe, and what is timed of it."""

    def __init__(self, session: Session, folder: Path, rounds: int) -> None:
        """folder: for rows of metrics. rounds: at least; as many more as all depths of the student's rollouts need."""
        self.session, self.engine, self.phases = session, session.engine, session.method.phases
        self.depths = session.method.num_steps or 1
        self.rounds = self.depths * math.ceil(rounds / self.depths)
        self.engine.noise = Even
        self.cached = session.recipe.run.cache_latents
        self.now, self.ahead = -1, self.rounds  # the step of the turns; one whose data they never see
        self.logs: dict[str, float] = {}
        self.cond = self.engine.data.batch(range(self.engine.batch_size)).cond
        tracker = JsonLines(folder / "metrics.jsonl", 0)

        def each(run: Callable[[Phase], object], before: Callable[[Phase], object]) -> dict[str, Work]:
            return {phase.name: Work(partial(run, phase), partial(before, phase)) for phase in self.phases}

        given = partial(self.ready, gradients=True)
        self.turns = each(self.turn, self.begin)
        self.clips, self.updates = each(self.clip, given), each(lambda p: self.engine.update(p, self.now), given)
        self.afters = {phase.name: Work(phase.after) for phase in self.phases}
        self.passes = {
            once(p): Work(replay(session, phase, p, self.cond), partial(self.ready, phase))
            for phase in self.phases
            for p in phase.passes
            if p.count
        }
        self.first, self.again = (Work(lambda: self.fetch(self.ahead), before) for before in (self.skip, nothing))
        self.averages = [Work(average.update) for average in session.ema.values()]
        self.written = Work(lambda: tracker.log(self.now, self.logs))

    def go(self, clock: Clock) -> None:
        """Time everything, after a round that warms up."""
        groups = (self.turns, self.passes, self.clips, self.updates, self.afters)
        works = [*chain(*(group.values() for group in groups)), self.first, self.again, *self.averages, self.written]
        cuda = self.session.device.type == "cuda"
        sync = partial(torch.cuda.synchronize, self.session.device) if cuda else nothing
        interleave(works, 1, CLOCKS[clock], sync)
        for work in works:
            work.seconds.clear()
        interleave(works, self.rounds, CLOCKS[clock], sync)

    def begin(self, phase: Phase) -> None:
        """Go on to the next step at its first phase; if images are kept, their encoding is timed apart."""
        if phase is self.phases[0]:
            self.now += 1
            if self.cached:
                self.fetch(self.now)

    def turn(self, phase: Phase) -> None:
        """What a training step does in this phase."""
        self.logs |= self.engine.turn(phase, self.now)

    def fetch(self, step: int) -> None:
        """The data of a step."""
        for samples in self.engine.micro_batches(step):
            self.engine.data.batch(samples)

    def skip(self) -> None:
        """Go on to data that were not there yet."""
        self.ahead += 1

    def ready(self, phase: Phase, gradients: bool = False) -> None:
        """Let the phase's networks learn. gradients: give them some, of the size of the last turn's."""
        self.engine.train_only(phase.trains)
        for role, parameters in self.engine.parameters.items():
            norm, size = (
                self.logs.get(f"{phase.name}/{role}.grad_norm", 0.0),
                sum(map(Tensor.numel, parameters.values())),
            )
            for p in parameters.values():
                full = gradients and role in phase.trains
                p.grad = torch.full_like(p, norm / math.sqrt(size)) if full else None

    def clip(self, phase: Phase) -> None:
        """The norms of a phase's gradients, brought to the host, and what they lead to."""
        norms = self.engine.gradient_norms(phase)
        self.engine.clip(phase, norms, {role: float(norm) for role, norm in norms.items()})

    def times(self, rounds: slice) -> Times:
        """Medians over the rounds, of turns over the means of each run through all depths."""

        def median(work: Work) -> float:
            return statistics.median(work.seconds[rounds])

        def through(work: Work) -> float:
            seconds, n = work.seconds[rounds], self.depths
            return statistics.median(statistics.mean(seconds[i : i + n]) for i in range(0, len(seconds), n))

        def medians(works: Mapping[Any, Work]) -> dict[Any, float]:
            return {key: median(work) for key, work in works.items()}

        return Times(
            turns={name: through(work) for name, work in self.turns.items()},
            clips=medians(self.clips),
            updates=medians(self.updates),
            afters=medians(self.afters),
            passes=medians(self.passes),
            first=median(self.first),
            again=median(self.again),
            averages=sum(map(median, self.averages)),
            row=median(self.written),
        )

    def row(self) -> dict[str, Any]:
        """What was found."""
        run, engine, phases = self.session.recipe.run, self.engine, self.phases
        times = self.times(slice(None))
        seconds, floor = times.step(phases, run.log_every), times.floor(phases, engine.accumulate)
        rest = times.rest(phases, self.cached, run.log_every)
        parts = [self.times(slice(i, i + self.depths)) for i in range(0, self.rounds, self.depths)]
        ratios = [t.step(phases, run.log_every) / t.floor(phases, engine.accumulate) for t in parts]
        new = min(1.0, len(self.session.source) / (run.steps * run.batch_size * run.accumulate))
        low, high = quartiles(ratios)
        return {
            "seconds": seconds,
            "floor_seconds": floor,
            "ratio": seconds / floor,
            "ratio_low": low,
            "ratio_high": high,
            "rest": rest | {"other": seconds - floor - sum(rest.values())},
            "encoding_seconds": new * times.encoding if self.cached else 0.0,
            "turns": {phase.name: {"every": phase.every, "seconds": times.turns[phase.name]} for phase in phases},
            "passes": [
                {"phase": phase.name, **vars(p), "count": float(p.count), "seconds": times.passes[once(p)]}
                for phase in phases
                for p in phase.passes
                if p.count
            ],
            "batch_size": run.batch_size,
            "accumulate": run.accumulate,
            "precision": run.precision,
            "device": str(self.session.device),
            "threads": torch.get_num_threads(),
            "rounds": self.rounds,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; of a single value itself."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return low, high


def replay(session: Session, phase: Phase, p: Pass, cond: Cond) -> Callable[[], object]:
    """Makes one call of a declared pass. cond: of one batch."""
    network, denoiser = members(session.method.networks[p.role])[0], _denoiser(session, p.role)
    x_t, t, cond = _inputs(session, p, cond)
    maps = [x_t]
    if isinstance(network, Heads):
        read = next(q for q in phase.passes if q.blocks)
        with torch.no_grad():
            maps = features(_denoiser(session, read.role), read.blocks, x_t, t, cond)

    def call(given: list[Tensor]) -> list[Tensor]:
        if isinstance(network, Heads):
            return [network(given)]
        if p.blocks:
            return features(denoiser, p.blocks, given[0], t, cond)
        return [denoiser(given[0], t, cond).y]

    def run() -> None:
        if p.mode == "jvp" or p.mode == "finite_differences":
            dx, dt = torch.ones_like(x_t), torch.full_like(t, 1e-3)
            derivative.along(denoiser, lambda pred: pred.y, x_t, t, cond, dx, dt, p.mode)
            return
        with torch.set_grad_enabled(p.mode != "forward"):
            given = [x.detach().requires_grad_(p.mode in ("inputs", "penalty")) for x in maps]
            found = call(given)
            if p.mode == "penalty":
                found = [*found, losses.gradient_penalty(found[0], given)]
            if p.mode != "forward":
                torch.autograd.backward(found, [torch.ones_like(y) for y in found])

    return run


def _denoiser(session: Session, role: str) -> Denoiser:
    """The role's network, of several the first, called as the teacher is."""
    return session.family.denoiser.with_network(members(session.method.networks[role])[0])


def _inputs(session: Session, p: Pass, cond: Cond) -> tuple[Tensor, Tensor, Cond]:
    """x_t, t and cond of one call."""
    method, family, generator = session.method, session.family, torch.Generator().manual_seed(0)
    count = p.rows * session.engine.batch_size
    x_t = torch.randn((count, *family.latent_shape), generator=generator)
    t = family.denoiser.schedule.draw(0.25 + 0.5 * torch.rand(count, generator=generator, dtype=torch.float64))
    cond = {name: value.repeat(p.rows, *(1,) * (value.ndim - 1)) for name, value in cond.items()}
    scale = student_guidance(method)
    if scale is not None and p.role in (method.exported, *session.engine.moving):
        cond = with_guidance(cond, scale)
    return x_t.to(session.device), t.to(session.device), cond


WORDS = 2
"""Columns of ``table`` that are no numbers."""


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line a recipe; what a step takes beyond its floor, and for encoding on top, in % of the floor."""
    columns = ["method", "config", "seconds", "floor", "ratio", "quartiles", *rows[0]["rest"], "+ encoding"]
    lines = []
    for row in rows:
        shares = [100 * part / row["floor_seconds"] for part in (*row["rest"].values(), row["encoding_seconds"])]
        times = [f"{row['seconds']:.4g}", f"{row['floor_seconds']:.4g}", f"{row['ratio']:.3f}"]
        spread = f"{row['ratio_low']:.3f} {row['ratio_high']:.3f}"
        lines.append([row["method"], row["config"], *times, spread, *(f"{share:.1f} %" for share in shares)])
    return columns, lines
