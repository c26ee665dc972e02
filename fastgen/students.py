"""Several students with a router: each makes the images of its own share of the prompts (Song et al. 2024).

Multi-student distillation, arXiv 2410.23274: as many ordinary trainings, each on its own share, and one look-up before
sampling, so that an image costs what one student's costs. The paper cuts the classes of ImageNet into runs of
consecutive numbers, text embeddings into quadrants, all of equal size. Both are one router here: it halves the
prompts across the axis along which they differ most, then each half again, where the counts come out even; along
numbers of classes that is the line they stand on. What it reads is what the network is given, so that a pipeline
routes as the training did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import option


@dataclass(frozen=True)
class Route:
    """Which of several students is trained; all are on the same data, each on its own share of the prompts."""

    students: int = option(help="that share the prompts; as many runs, joined by `fastgen join`", low=2)
    own: int = option(help="number of this run's student, from 0 on", low=0)

    def __post_init__(self) -> None:
        """Raise ValueError if there is no student of this number."""
        if self.own >= self.students:
            raise ValueError(f"own {self.own} is none of {self.students} students, which are 0 to {self.students - 1}")


def points_of(condition: Tensor) -> Tensor:
    """Where a router sees prompts: the mean over the tokens of text [B, L, D], a class's number [B] -> [B, D or 1]."""
    return condition.float().mean(1) if condition.ndim == 3 else condition.float()[:, None]


@dataclass(frozen=True)
class Router:
    """Sends points to students by a search whose every comparison has its own axis.

    Cut i stands between the students up to i and those after: below ``cuts[i]`` along ``axes[i]`` a point goes to the
    former. The search halves the students that are left, so that it asks cuts as a binary search does.

    Attributes:
        axes: [K - 1, D], of length 1.
        cuts: [K - 1].
    """

    axes: Tensor
    cuts: Tensor

    def __len__(self) -> int:
        """The number of students, K."""
        return len(self.cuts) + 1

    def which(self, points: Tensor) -> Tensor:
        """The number of the student of each point: [B, D] -> [B]."""
        axes, cuts = self.axes.to(points), self.cuts.to(points)
        above = (points[:, None] * axes).sum(2) > cuts
        low = torch.zeros(len(points), dtype=torch.long, device=points.device)
        high = torch.full_like(low, len(cuts))
        for _ in range(len(cuts).bit_length()):
            middle = (low + high) // 2
            up = above.gather(1, middle.clamp(max=len(cuts) - 1)[:, None])[:, 0] & (low < high)
            low, high = torch.where(up, middle + 1, low), torch.where(up, high, middle)
        return low

    def close(self, other: Router) -> bool:
        """Whether both cut alike, up to what embeddings of one text differ by from device to device."""
        mine, theirs = ((r.axes, r.cuts) for r in (self, other))
        alike = (a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-3) for a, b in zip(mine, theirs, strict=True))
        return all(alike)


def fit(points: Tensor, students: int) -> Router:
    """The router that shares distinct points equally: [N, D]. Numbers of points differ by 1 at most.

    It depends on which points there are and not on their order. Those that stand at a cut together stay together.
    Raises ValueError if there are fewer points than students.
    """
    distinct = points.unique(dim=0).double().cpu()
    n = len(distinct)
    if n < students:
        raise ValueError(f"{n} distinct prompts cannot be shared by {students} students; lower student.route.students")
    axes, cuts = torch.zeros(students - 1, points.shape[1]), torch.zeros(students - 1)

    def share(own: Tensor, first: int, last: int) -> None:
        if first == last:
            return
        middle = (first + last) // 2
        below = n * (middle + 1) // students - n * first // students
        axis = _longest(own)
        along, order = (own @ axis).sort(stable=True)
        axes[middle], cuts[middle] = axis, along[below - 1 : below + 1].mean()
        share(own[order[:below]], first, middle)
        share(own[order[below:]], middle + 1, last)

    share(distinct, 0, students - 1)
    return Router(axes, cuts)


def _longest(points: Tensor) -> Tensor:
    """The axis along which points differ most, its largest entry positive: [N, D] -> [D]."""
    centred = points - points.mean(0)
    axis: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    return axis * axis[axis.abs().argmax()].sign()


class Students(nn.ModuleList):
    """Students in the place of one; a ``Denoiser`` calls whichever the conditions need.

    Attributes:
        by: the name of the condition that the router reads.
    """

    def __init__(self, networks: Sequence[nn.Module], router: Router, by: str) -> None:
        """networks: as many as the router knows. Raises ValueError if one is several networks itself."""
        if any(isinstance(network, nn.ModuleList) for network in networks):
            raise ValueError("a student of several experts cannot be one of several students; choose another method")
        super().__init__(networks)
        self.router, self.by = router, by

    def rows(self, cond: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
        """The numbers of the students that these conditions need, with the rows of each."""
        which = self.router.which(points_of(cond[self.by]))
        return [(k, (which == k).nonzero()[:, 0]) for k in which.unique().tolist()]
