"""What a run with ``student.route`` trains on: its share of the prompts by a router, which the run folder keeps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoint import atomic_file
from .data import PairSource, Skips, Source
from .data.prompts import shuffled
from .family import Family
from .students import Route, Router, fit, points_of

log = logging.getLogger("fastgen")

ROUTER = "router.safetensors"
"""In the run folder: axes and cuts, and of which student the run is."""
_ENCODED = 64
"""Prompts at a time."""


@dataclass(frozen=True)
class Share:
    """A student's part of a data source.

    Attributes:
        router: that sends each prompt to its student.
        own: the number of the student.
        numbers: of the source's items, by student; none is in two.
    """

    router: Router
    own: int
    numbers: Sequence[Sequence[int]]

    def place(self, sample: int) -> int:
        """The number of an item of this student's: its items are gone through again and again, in changing order."""
        mine = self.numbers[self.own]
        return mine[shuffled(sample, len(mine), 0)]


@torch.no_grad()
def shared(source: Source, family: Family, route: Route) -> Share:
    """The share of one of several students: the same router for all, whichever it is.

    Raises ValueError if the source's prompts cannot be had alone or must not be shared, if the family's pipeline has
    no place for several students, or if one would have no prompt.
    """
    if not family.routed_by:
        raise ValueError("student.route: this family has no pipeline of several students; leave it out")
    if isinstance(source, PairSource):
        raise ValueError(
            "student.route: teacher pairs are not shared out, which would narrow each student (arXiv 2410.23274); use "
            "another data.source, and a method without pairs"
        )
    if isinstance(source, Skips) and source.has_images:
        raise ValueError(
            "student.route: this data source reads an image with each prompt; let `fastgen cache` encode it first, "
            "data: {source: cached, path: FOLDER, of: {...}}"
        )
    prompts = [source.item(i).prompt for i in range(len(source))]
    distinct = sorted(set(prompts))
    parts = [distinct[i : i + _ENCODED] for i in range(0, len(distinct), _ENCODED)]
    points = torch.cat([points_of(family.encode_prompts(part)[family.routed_by]).cpu() for part in parts])
    router = fit(points, route.students)
    which = torch.cat([router.which(part) for part in points.split(_ENCODED)])
    counts = which.bincount(minlength=route.students).tolist()
    if 0 in counts:
        raise ValueError(
            f"student.route: student {counts.index(0)} of {route.students} would have no prompt, since the router "
            "cannot tell enough of them apart; lower student.route.students"
        )
    student_of = dict(zip(distinct, which.tolist(), strict=True))
    numbers = [[i for i, p in enumerate(prompts) if student_of[p] == k] for k in range(route.students)]
    log.info("student %d of %d; prompts of each: %s", route.own, route.students, ", ".join(map(str, counts)))
    return Share(router, route.own, numbers)


def record(run: Path, share: Share) -> None:
    """Keep the router in the run folder."""
    tensors = {"axes": share.router.axes.contiguous(), "cuts": share.router.cuts.contiguous()}
    with atomic_file(run / ROUTER) as partial:
        save_file(tensors, partial, {"own": str(share.own)})


def read(run: Path) -> tuple[Router, int]:
    """The router of a run, and the number of its student. Raises ValueError if there is none, or a damaged one."""
    path = run / ROUTER
    if not path.is_file():
        raise ValueError(f"{run}: lacks {ROUTER}; give the command of its training again")
    try:
        with safe_open(path, framework="pt") as opened:
            router = Router(opened.get_tensor("axes"), opened.get_tensor("cuts"))
            return router, int((opened.metadata() or {})["own"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it, and give the command of its training again") from None


def check(run: Path, share: Share) -> None:
    """Raise ValueError if a run that goes on would do so as another student, or with another router."""
    if not (run / ROUTER).is_file():
        return
    router, own = read(run)
    if own != share.own:
        raise ValueError(
            f"{run}: is the run of student {own}, this would be {share.own}; set another run.out for each student"
        )
    if not router.close(share.router):
        raise ValueError(f"{run}: its prompts were shared otherwise; set back data and model, or another run.out")
