"""What losses do not say: whether students collapse, colours burn, the critic lags, or one term drowns another.

A check measures, on a few prompts with several seeds each and on one micro-batch:

    diversity        root mean square distance between a prompt's images, over the teacher's from the same noise
    saturation       HSV's, mean over pixels, over the teacher's
    contrast         deviation of the luminance, over the teacher's
    clipped          share of values that are 0 or 255, less the teacher's
    critic_lag       the fake score's denoising error on fresh samples of the student, over the teacher's on the same
    PHASE/B_to_A     norm of term B's gradient over that of the phase's first term A, where both reach

The critic's error is held against the teacher's and not against its own loss in training: that is the same error on
samples just as fresh, so that the two always agree, whereas a critic that knows the student's samples less well than a
network that never saw one cannot say how they differ from the teacher's. It starts at 1, falls while the student is
far from the teacher, and comes back to 1 from below as the two meet.

``Monitor`` judges the numbers as they come and warns once an onset. A check draws random numbers of its own, and
leaves weights, gradients, optimizers and generators as they were: a run is the same bit for bit with and without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import write_text
from .config import option
from .engine import Engine
from .experts import Experts, members
from .method import Batch, Phase, Terms
from .plain import from_json

FILE = "health.json"
"""The teacher's numbers in the run folder, so that its images are made once."""
PREFIX = "health/"
"""Of the values' names in metrics.jsonl."""
ALONE = 1000
"""Steps between checks of a run without quick evaluations."""
SAMPLES = 8
"""At most so many of a micro-batch; both errors of a critic are of the same samples and noise."""


@dataclass(frozen=True)
class Health:
    """What is watched, how often, and from where on it is worth a warning; the section ``health``."""

    # on emoji/dmd2 a check costs 1.4 training steps and the teacher's images 2 to 3, once: of its 750 steps under 1 %
    every: int | None = option(
        None, "steps between checks; null: with quick evaluations, without them 1000; 0: never", low=0
    )
    stop: bool = option(False, "end the run at the first warning, after a checkpoint")
    prompts: int = option(4, "of the sample grid, whose images are looked at", low=1, high=16)
    seeds: int = option(4, "images of each prompt", low=2)
    teacher_steps: int = option(10, "DDIM steps of the teacher's images, which are made once", low=1)
    diversity: float = option(0.5, "least share of the teacher's", low=0, below=1)
    saturation: float = option(1.5, "most times the teacher's, and as many times less", above=1)
    contrast: float = option(1.5, "most times the teacher's, and as many times less", above=1)
    clipped: float = option(0.25, "largest share of values at 0 or 255 beyond the teacher's", above=0, high=1)
    critic: float = option(1.1, "largest error of the fake score, over the teacher's", above=1)
    gradients: float = option(10.0, "largest norm of a term's gradient, over that of its phase's first", above=1)
    patience: int = option(2, "checks in a row outside a limit before it warns", low=1)
    margin: float = option(
        0.05, "how far within a limit, as a share of it, what warned must come back", low=0, below=1
    )
    warmup: float = option(0.1, "share of the run in which what never was within its limit is no news", low=0, high=1)

    def limits(self, name: str) -> tuple[float, float]:
        """The least and the largest value that are well, of a name without prefix."""
        found = {
            "diversity": (self.diversity, math.inf),
            "saturation": (1 / self.saturation, self.saturation),
            "contrast": (1 / self.contrast, self.contrast),
            "clipped": (-math.inf, self.clipped),
            "critic_lag": (-math.inf, self.critic),
        }
        return found.get(name, (-math.inf, self.gradients))


class Unhealthy(RuntimeError):
    """A run that its monitor ended, as ``health.stop`` asks; its checkpoint is written."""


# Images


@dataclass(frozen=True)
class Look:
    """What the pixels of a set of images say, each value in [0, 1]."""

    diversity: float
    saturation: float
    contrast: float
    clipped: float


def look(images: Iterable[Tensor]) -> Look:
    """images: of each prompt the images of its seeds, uint8 [S, 3, H, W], S at least 2 -> means over the prompts."""
    measures: tuple[Callable[[Tensor], Tensor], ...] = (diversity, saturation, contrast, clipped)
    rows = [torch.stack([measure(batch) for measure in measures]) for batch in images]
    return Look(*torch.stack(rows).mean(0).tolist())


def diversity(images: Tensor) -> Tensor:
    """Root mean square difference of two images, mean over the pairs: uint8 [S, 3, H, W] -> float64."""
    x = images.double() / 255
    return torch.stack([(a - b).square().mean().sqrt() for a, b in combinations(x, 2)]).mean()


def saturation(images: Tensor) -> Tensor:
    """HSV's (max - min) / max over the colours, 0 in black, mean over pixels: uint8 [S, 3, H, W] -> float64."""
    x = images.double()
    high, low = x.amax(1), x.amin(1)
    return ((high - low) / high.clamp(min=1)).mean()


def contrast(images: Tensor) -> Tensor:
    """Deviation of Rec. 709's luma (of the values as they are) within an image: uint8 [S, 3, H, W] -> float64 mean."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    luma = (images.double() / 255 * weights[:, None, None]).sum(1)
    return luma.flatten(1).std(1, correction=0).mean()


def clipped(images: Tensor) -> Tensor:
    """Share of values that are 0 or 255: uint8 [S, 3, H, W] -> float64."""
    return ((images == 0) | (images == 255)).double().mean()


def against(student: Look, teacher: Look) -> dict[str, float]:
    """The student's look over the teacher's, of clipped values the difference; nan where the teacher's is 0."""
    mine, its = asdict(student), asdict(teacher)
    found = {name: ratio(mine[name], its[name]) for name in ("diversity", "saturation", "contrast")}
    return found | {"clipped": student.clipped - teacher.clipped}


def ratio(one: float, other: float) -> float:
    """one / other; nan where that has no meaning."""
    return one / other if other else math.nan


def known_look(file: Path, made_of: Mapping[str, Any]) -> Look | None:
    """The teacher's look as ``keep_look`` wrote it; None if there is none, or of images made otherwise."""
    try:
        kept = from_json(file.read_text(encoding="utf-8"))
        return Look(**kept["teacher"]) if kept["made_of"] == made_of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_look(file: Path, made_of: Mapping[str, Any], teacher: Look) -> None:
    """Write the teacher's look with what its images were made of, as JSON."""
    write_text(file, json.dumps({"made_of": made_of, "teacher": asdict(teacher)}, indent=1) + "\n")


# Losses


def of_losses(engine: Engine, step: int) -> dict[str, float]:
    """critic_lag and PHASE/B_to_A on samples of a step's last micro-batch, with noise of their own."""
    *_, samples = engine.micro_batches(step)
    batch, found = engine.data.batch(samples[:SAMPLES]), dict[str, float]()
    with untouched(engine):
        for phase in engine.method.phases:
            engine.train_only(phase.trains)
            terms = _terms(engine, phase, batch, step)
            error = denoising(terms)
            found |= pulls(engine, phase, terms)
            del terms  # and its graph
            if "fake_score" in phase.trains:
                with answering(engine.method.networks["fake_score"], engine.method.networks["teacher"]):
                    found["critic_lag"] = ratio(error, denoising(_terms(engine, phase, batch, step)))
    return found


def _terms(engine: Engine, phase: Phase, batch: Batch, step: int) -> Terms:
    return phase.loss(batch, engine.noise(batch.samples, engine.seed, step, f"{PREFIX}{phase.name}", engine.device))


def denoising(terms: Terms) -> float:
    """The sum of the terms that are a fake score's denoising error, by name; 0 if there are none."""
    return sum(float(term.detach().mean()) for name, term in terms.items() if name.startswith("denoising"))


@contextmanager
def answering(fake_score: nn.Module, teacher: nn.Module) -> Iterator[None]:
    """Within it whoever calls the fake score gets what the teacher says; of several networks each one's own."""
    theirs = members(teacher) if isinstance(teacher, Experts) else repeat(teacher)

    def answer(other: nn.Module) -> Callable[..., Any]:
        return lambda module, args, named, output: other(*args, **named)

    handles = [
        one.register_forward_hook(answer(other), with_kwargs=True)
        for one, other in zip(members(fake_score), theirs, strict=False)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pulls(engine: Engine, phase: Phase, terms: Terms) -> dict[str, float]:
    """Of each further term the norm of its gradient over the first one's, on the weights that both reach."""
    parameters = [p for role in phase.trains for p in engine.parameters[role].values()]
    scale = engine.scalers[phase.name].get_scale()
    learnt = {name: term.mean() * scale for name, term in terms.items() if term.requires_grad}
    if len(learnt) < 2:
        return {}
    first, found = next(iter(learnt)), {}
    norms: dict[str, list[Tensor | None]] = {}
    for name, term in learnt.items():
        # one term's gradients at a time, of which only the norms are kept: as many bytes as a turn of the phase takes
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            term, parameters, retain_graph=True, allow_unused=True
        )
        norms[name] = [None if g is None else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    for name in [*learnt][1:]:
        both = [(a, b) for a, b in zip(norms[name], norms[first], strict=True) if a is not None and b is not None]
        if both:
            one, other = (float(torch.stack(side).double().norm()) for side in zip(*both, strict=True))
            found[f"{phase.name}/{name}_to_{first}"] = ratio(one, other)
    return found


@contextmanager
def untouched(engine: Engine) -> Iterator[None]:
    """Within it losses may be computed; after it modes, buffers, what learns and torch's generators are as before."""
    networks = list(engine.method.networks.values())
    modes = {module: module.training for network in networks for module in network.modules()}
    learning = {p: p.requires_grad for network in networks for p in network.parameters()}
    buffers = {b: b.clone() for network in networks for b in network.buffers()}
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p, learns in learning.items():
            p.requires_grad_(learns)
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


# Warnings


@dataclass(frozen=True)
class Onset:
    """A value that has left its limits.

    Attributes:
        name: of the value, without prefix.
        value: as it is now.
        limit: the one it is beyond.
        since: the last step at which it was within; None: it never was.
    """

    name: str
    value: float
    limit: float
    since: int | None

    @property
    def low(self) -> bool:
        """Whether it is below its limit, not above."""
        return self.value < self.limit


@dataclass(frozen=True)
class _Course:
    """How a value went so far."""

    since: int | None = None
    outside: int = 0
    warned: bool = False


class Monitor:
    """Judges the values of a run's checks in their order: a warning at the onset, none until it was well again."""

    def __init__(self, health: Health, steps: int, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """steps: of the whole run. rows: of metrics.jsonl, of the checks before, so that a resumed run goes on."""
        self.health, self.warmup = health, health.warmup * steps
        self._courses: dict[str, _Course] = {}
        for row in rows:
            self.observe(int(row["step"]), row)

    def observe(self, step: int, values: Mapping[str, float]) -> list[Onset]:
        """values: by their names in metrics.jsonl, others left aside, and so those that are not finite."""
        found = []
        for name, value in values.items():
            if name.startswith(PREFIX) and math.isfinite(value):
                onset = self._judge(step, name.removeprefix(PREFIX), value)
                found += [onset] if onset else []
        return found

    def _judge(self, step: int, name: str, value: float) -> Onset | None:
        low, high = self.health.limits(name)
        course = self._courses.get(name, _Course())
        if low <= value <= high:
            margin = self.health.margin
            well = low + margin * abs(low) <= value if math.isfinite(low) else True
            well = well and (value <= high - margin * abs(high) if math.isfinite(high) else True)
            self._courses[name] = _Course(since=step, warned=course.warned and not well)
            return None
        course = self._courses[name] = replace(course, outside=course.outside + 1)
        if course.warned or course.outside < self.health.patience:
            return None
        if course.since is None and step < self.warmup:
            return None
        self._courses[name] = replace(course, warned=True)
        return Onset(name, value, low if value < low else high, course.since)


_SAID = {
    "diversity": ("students are collapsing: diversity", ""),
    "saturation": ("colours fade: saturation", "colours burn: saturation"),
    "contrast": ("pictures go flat: contrast", "pictures harden: contrast"),
}


def words(onset: Onset, options: Mapping[str, Any], lr: Mapping[str, float]) -> str:
    """What a warning says, and what would do. options: the method's, as plain values. lr: by role."""
    name, low = onset.name, onset.low
    since = f"since step {onset.since}" if onset.since is not None else "and never was within the limit"
    moved = ("fell to" if low else "rose to") if onset.since is not None else "is"
    if name in _SAID:
        text = f"{_SAID[name][not low]} {moved} {_percent(onset.value)} of the teacher's {since}"
    elif name == "clipped":
        text = (
            f"pictures clip: the share of values at 0 or 255 {moved} {_percent(onset.value)} of all values beyond the "
            f"teacher's {since}"
        )
    elif name == "critic_lag":
        text = (
            f"the critic lags: its error on the student's samples {moved} {_percent(onset.value)} of that of the "
            f"teacher, which never learnt from them, {since}"
        )
    else:
        phase, term, first = _terms_of(name)
        text = (
            f"{term} drowns {first} in phase {phase}: the norm of its gradient {moved} {onset.value:.3g} times the "
            f"other's {since}"
        )
    return f"{text}; {remedy(name, low, options, lr)}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _terms_of(name: str) -> tuple[str, str, str]:
    """PHASE/B_to_A -> PHASE, B, A."""
    phase, _, terms = name.partition("/")
    term, _, first = terms.partition("_to_")
    return phase, term, first


def remedy(name: str, low: bool, options: Mapping[str, Any], lr: Mapping[str, float]) -> str:
    """What to change in the config, at most two things of those that the method has, with their present values."""
    guidance, gan = options.get("guidance_scale"), options.get("adversarial", {}).get("weight")
    scales = options.get("guidance", {}).get("high")
    every, pairs = options.get("student_every"), options.get("regression_weight")
    slower = [f"lower optim.student.lr ({lr['student']:g})"] if "student" in lr else []
    tracking = [f"raise method.student_every ({every})"] if every else []
    judged = []
    if gan is not None:
        judged = [f"raise method.adversarial.weight ({gan:g}{'' if gan else ', it then needs images'})"]
    if name == "diversity":
        ways = [*([f"raise method.regression_weight ({pairs:g})"] if pairs else []), *tracking, *judged, *slower]
    elif name == "critic_lag":
        faster = [f"raise optim.fake_score.lr ({lr['fake_score']:g})"] if "fake_score" in lr else []
        ways = [*tracking, *faster, *slower]
    elif name in ("saturation", "contrast", "clipped"):
        less = [f"lower method.guidance_scale ({guidance:g})"] if guidance and guidance > 1 else []
        less += [f"lower method.guidance.high ({scales:g})"] if scales and scales > 1 else []
        ways = [*(judged if low else less), *tracking, *slower]
    else:
        ways = [_weight(name, options)]
    return " or ".join(ways[:2]) or "stop it, and go on from an earlier checkpoint with other options"


def _weight(name: str, options: Mapping[str, Any]) -> str:
    """The option that weighs the term of PHASE/B_to_A."""
    phase, term, _ = _terms_of(name)
    gan = "adversarial.weight" if phase == "student" else "adversarial.critic_weight"
    for path in [gan] if term == "gan" else [f"{term}_weight", f"{term}.weight", term]:
        value: Any = options
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            return f"lower method.{path} ({value:g})"
    return f"give {term} less weight"
