"""``fastgen join``: the students of several runs, each of which learnt its share of the prompts, as one pipeline."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from . import best, checkpoint, config, lora, parallel, publish, route
from . import recipe as recipes
from .guidance import student_guidance
from .method import Phase
from .publish import Wanted
from .recipe import Recipe
from .sampling import Sampler
from .students import Route, Router, Students
from .train import GRID, Session, build, export_run

log = logging.getLogger("fastgen")


@dataclass(frozen=True)
class Part:
    """A run of one of the students, and the checkpoint that its own pipeline was made of at its end.

    Attributes:
        steps_done: by its newest checkpoint.
    """

    run: Path
    recipe: Recipe
    route: Route
    router: Router
    checkpoint: Path
    steps_done: int


@dataclass(frozen=True)
class Joined:
    """What ``export_run`` needs to know of a method, with all students in the place of its own."""

    networks: Mapping[str, nn.Module]
    exported: str
    num_steps: int | None
    sampler: Sampler
    student_guidance: float | None
    phases: Sequence[Phase] = ()
    needs_images: bool = False


def join(
    runs: Sequence[Path],
    out: Path,
    save_dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    wanted: Wanted = publish.PIPELINE,
) -> int:
    """Write the students of all runs as one pipeline, through the gate, and return how many they are.

    save_dtype: of the weights on disk; None: that of the first student's config. Raises ValueError if the runs are
    not each of one student of the same, or ExportError.
    """
    parts = sorted((part_of(run) for run in runs), key=lambda part: part.route.own)
    check(parts)
    run = parts[0].recipe.run
    recipe = replace(parts[0].recipe, run=replace(run, save_dtype=save_dtype or run.save_dtype))
    publish.check(recipe, wanted)
    session = build(recipe)
    if session.share is None or not session.share.router.close(parts[0].router):
        raise ValueError(f"{parts[0].run}: its data are no longer those that it was trained on; set them back")
    networks = [student_of(part, session) for part in parts]
    students = Students(networks, parts[0].router, session.family.routed_by)
    if parallel.rank() == 0:
        export_run(joined(session, students, session.share, out), out, replace(wanted, steps_done=parts[0].steps_done))
    return len(parts)


def part_of(run: Path) -> Part:
    """A run as it lies there. Raises ValueError if it is none, or not of one of several students."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: not a run folder (no config.yaml)")
    recipe = recipes.decode(config.read(run / "config.yaml"), str(run / "config.yaml"))
    if recipe.student.route is None:
        raise ValueError(f"{run}: its student takes all prompts; train it with student.route to share them")
    found = checkpoint.all_checkpoints(run)
    if not found:
        raise ValueError(f"{run}: holds no checkpoint yet")
    steps_done = int(checkpoint.read_state(found[-1])["steps_done"])
    router, own = route.read(run)
    chosen = best.find(run)[1] if recipe.run.export == "best" else found[-1]
    return Part(run, recipe, replace(recipe.student.route, own=own), router, chosen, steps_done)


def check(parts: Sequence[Part]) -> None:
    """Raise ValueError, naming the runs, unless these are all the students of one router, trained alike.

    parts: in the order of their numbers.
    """
    first = parts[0]
    for part in parts[1:]:
        difference = different(common(part.recipe), common(first.recipe))
        if difference:
            raise ValueError(f"{part.run}: its {difference} of {first.run}; train the students of one pipeline alike")
        if not part.router.close(first.router):
            raise ValueError(f"{part.run}: shares the prompts otherwise than {first.run}; train it on the same data")
        if part.steps_done != first.steps_done:
            raise ValueError(
                f"{part.run}: has done {part.steps_done} steps, {first.run} {first.steps_done}; let both end"
            )
    numbers = [part.route.own for part in parts]
    for part, before in zip(parts[1:], parts, strict=False):
        if part.route.own == before.route.own:
            raise ValueError(f"{before.run} and {part.run}: both are student {part.route.own}; leave one out")
    missing = [str(k) for k in range(first.route.students) if k not in numbers]
    if missing:
        raise ValueError(
            f"student {', '.join(missing)} of {first.route.students} is not among the runs; name the run with this "
            "student.route.own too"
        )


def common(recipe: Recipe) -> dict[str, Any]:
    """What runs of several students must have in common, by its key in the config; not how each was computed."""
    tree = recipes.encode(recipe)
    for key in ("attention", "gradient_checkpointing", "compile"):
        del tree["model"][key]
    del tree["student"]["route"]["own"]
    shared = {"model": tree["model"], "method": tree["method"], "student": tree["student"]}
    return flat(shared | {"run": {"ema": tree["run"]["ema"]}})


def flat(tree: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Dotted names -> values."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        full = f"{key}.{name}" if key else name
        found |= flat(value, full) if isinstance(value, Mapping) else {full: value}
    return found


def different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first key in which two differ, with both values; empty if none."""
    key = next((k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)), None)
    return "" if key is None else f"{key} is {mine.get(key)!r}, not the {theirs.get(key)!r}"


def student_of(part: Part, session: Session) -> nn.Module:
    """The exported network of a run, its adapter in its weights, by a session of a run like it."""
    checkpoint.load(part.checkpoint, session.engine, session.ema, goes_on=False)
    log.info("student %d from %s", part.route.own, part.checkpoint)
    with session.weights():
        return copy.deepcopy(lora.fused(session.method.networks[session.method.exported])).eval()


def joined(session: Session, students: Students, share: route.Share, out: Path) -> Session:
    """The session with these students in the place of its own, its sample grid with prompts of each in turn."""
    method, recipe = session.method, session.recipe
    shares = [replace(share, own=own) for own in range(len(students))]
    prompts = [session.source.item(one.place(turn)).prompt for turn in range(GRID) for one in shares]
    return replace(
        session,
        recipe=replace(recipe, run=replace(recipe.run, out=str(out), sample_prompts=prompts[:GRID])),
        method=Joined(
            {**method.networks, method.exported: students},
            method.exported,
            method.num_steps,
            method.sampler,
            student_guidance(method),
        ),
        ema={},
    )
