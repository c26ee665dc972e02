"""Guidance without training: each guider takes a denoiser and gives a denoiser, as ``denoiser.guided`` does.

CFG++ (Chung et al. 2024, arXiv 2406.08070), adaptive guidance and LinearAG (Castillo et al. 2023, arXiv 2312.12487),
and a student that goes on from its teacher's first steps (Gandikota & Bau 2025, arXiv 2503.10637).
``fastgen.pipelines.guiders`` switches them on in stock pipelines.

What remembers earlier steps is written for one trajectory, ``..._once``, and made anew for each by ``per_trajectory``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .checkpoint import write_text
from .denoiser import Cond, Denoise, guided, unconditional
from .plain import from_json
from .prediction import Kind, Prediction
from .sampling import Sampler, ddim, sample, sample_student
from .schedule import Level, Schedule


def per_trajectory(make: Callable[[], Denoise]) -> Denoise:
    """A denoiser made anew at each start: wherever t does not fall below the call before, or the batch changes."""
    now, last = make(), torch.empty(0)

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        nonlocal now, last
        if len(last) and (len(t) != len(last) or not bool((t < last).all())):
            now = make()
        last = t
        return now(x_t, t, cond)

    return denoise


def with_uncond(
    denoiser: Denoise, uncond: Cond, x_t: Tensor, t: Tensor, cond: Cond, rows: Tensor
) -> tuple[Prediction, Prediction]:
    """One pass: every sample with its condition, [B, ...], those of rows, [R], once more without, [R, ...]."""
    nothing, count = unconditional(uncond, cond), len(x_t)
    both = {name: torch.cat([cond[name], nothing[name][rows]]) for name in cond}
    out = denoiser(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), both)

    def part(of: slice) -> Prediction:
        level = (out.at.alpha, out.at.sigma, out.at.d_alpha, out.at.d_sigma)
        return Prediction(out.y[of], out.kind, out.x_t[of], Level(*(value[of] for value in level)))

    return part(slice(count)), part(slice(count, None))


def all_rows(x_t: Tensor) -> Tensor:
    """The indices of a batch: [B]."""
    return torch.arange(len(x_t), device=x_t.device)


# CFG++


def cfgpp_scale(scale: float, at: Level, to: Level | None) -> Tensor:
    """The scale with which classifier-free guidance takes CFG++'s DDIM step: [B].

    CFG++ takes x0 from uncond + scale (cond - uncond) and the noise from uncond. Solved for one output that gives
    both, this is guidance by scale / (1 - rho), rho = (sigma_r / alpha_r) / (sigma_t / alpha_t). scale: the paper's
    lambda, 0 to 1. to: the level stepped to, None where that is clean data (rho = 0). Raises ValueError on the scale.
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"CFG++ takes a scale from 0 to 1, got {scale:g}; 0.6 is usual")
    if to is None:
        return torch.full_like(at.alpha, scale)
    return scale / (1 - to.sigma * at.alpha / (to.alpha * at.sigma))


def guided_by_time(denoiser: Denoise, uncond: Cond, scales: Mapping[float, Tensor]) -> Denoise:
    """Classifier-free guidance with a scale of its own, [1], at each time; at others ValueError."""

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        missing = [float(time) for time in t if float(time) not in scales]
        if missing:
            raise ValueError(f"guidance was made for the times {list(scales)}, not for {missing[0]:g}; make it anew")
        return guided(denoiser, uncond, torch.cat([scales[float(time)] for time in t]))(x_t, t, cond)

    return denoise


def cfgpp(
    denoiser: Denoise,
    uncond: Cond,
    scale: float,
    schedule: Schedule,
    times: Sequence[float],
    end: float | None = None,
) -> Denoise:
    """CFG++ for ``sample(..., times, ..., ddim, end=end)``: renoises with what the network says without a condition.

    scale: 0 to 1. The guidance it amounts to grows with the number of steps: 0.6 is a scale of 0.8 to 1.1 for 4 steps
    of Stable Diffusion's, 1.4 to 2.1 for 10, 2 to 9 for 50.
    Raises ValueError on the scale, and in use at a time which is not one of ``times``.
    """
    stops = [torch.tensor([t], dtype=torch.float64) for t in times]
    ends = [*stops[1:], None if end is None else torch.tensor([end], dtype=torch.float64)]
    scales = {
        float(t): cfgpp_scale(scale, schedule(t), None if r is None else schedule(r))
        for t, r in zip(stops, ends, strict=True)
    }
    return guided_by_time(denoiser, uncond, scales)


# Adaptive guidance


def adaptive_once(denoiser: Denoise, uncond: Cond, scale: float, gamma: float, compared: Kind = "x0") -> Denoise:
    """``adaptive`` for one trajectory."""
    if gamma <= -1:
        return denoiser  # no cosine is below it
    on = torch.empty(0, dtype=torch.bool)

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        nonlocal on
        if not len(on):
            on = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
        rows = on.nonzero().flatten()
        if not len(rows):
            return denoiser(x_t, t, cond)
        pos, neg = with_uncond(denoiser, uncond, x_t, t, cond, rows)
        cosine = cosine_similarity(pos.as_kind(compared)[rows].flatten(1), neg.as_kind(compared).flatten(1))
        on = on.index_copy(0, rows, cosine < gamma)
        return replace(pos, y=pos.y.index_copy(0, rows, neg.y + scale * (pos.y[rows] - neg.y)))

    return denoise


def adaptive(denoiser: Denoise, uncond: Cond, scale: float, gamma: float, compared: Kind = "x0") -> Denoise:
    """Adaptive guidance: once a sample's cos(cond, uncond) reaches gamma, its later steps go without guidance.

    Each sample stops by itself, and its unconditional pass is not made any more. gamma: -1 never guides, above 1
    always does. compared: of what the cosine is. The paper's is "eps"; but where there is little signal both eps are
    all but x_t itself, so that their cosine may begin next to 1 and fall (the emoji teacher's: 0.9996 at the first of
    20 steps, 0.994 at the last). The two x0 meet as the noise goes (there: 0.62 at the first, 0.9998 at the last).
    """
    return per_trajectory(lambda: adaptive_once(denoiser, uncond, scale, gamma, compared))


# LinearAG


@dataclass
class Recording:
    """What a guided denoiser saw on its way, for ``fit``: t, eps_cond and eps_uncond [B, ...] of every call."""

    times: list[float] = field(default_factory=list)
    cond: list[Tensor] = field(default_factory=list)
    uncond: list[Tensor] = field(default_factory=list)


def recorded(denoiser: Denoise, uncond: Cond, scale: float, into: Recording) -> Denoise:
    """Classifier-free guidance of a batch that leaves one trajectory in ``into``."""

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        pos, neg = with_uncond(denoiser, uncond, x_t, t, cond, all_rows(x_t))
        into.times.append(float(t[0]))
        into.cond.append(pos.eps.detach().cpu())
        into.uncond.append(neg.eps.detach().cpu())
        return replace(pos, y=neg.y + scale * (pos.y - neg.y))

    return denoise


@dataclass(frozen=True)
class Coefficients:
    """LinearAG's regressions.

    Attributes:
        guidance_scale: of the trajectories they were fitted on.
        times: of those, falling.
        weights: step that goes without its unconditional pass -> intercept, then a weight for the eps_cond of each
            step up to it, then one for the eps_uncond of each earlier step that has the pass.
    """

    guidance_scale: float
    times: tuple[float, ...]
    weights: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        """Raise ValueError unless every step has as many weights as it has terms."""
        if not self.times or any(a <= b for a, b in pairwise(self.times)):
            raise ValueError(f"LinearAG's times must fall, got {list(self.times)}")
        for step, row in self.weights.items():
            wanted = 1 + step + 1 + sum(k not in self.weights for k in range(step))
            if not 0 < step < len(self.times) or len(row) != wanted:
                raise ValueError(
                    f"LinearAG's step {step} of {len(self.times)} needs {wanted} weights, got {len(row)}, and the "
                    "first step none; fit again"
                )

    def eps(self, step: int, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> Tensor:
        """The eps_uncond of a step from the eps_cond of all steps up to it and the eps_uncond there are: [B, ...]."""
        intercept, *rest = self.weights[step]
        terms = zip(rest, [*cond, *uncond], strict=True)
        return sum((weight * eps for weight, eps in terms), torch.full_like(cond[0], intercept))

    def save(self, path: Path) -> None:
        """Write JSON that ``read_coefficients`` reads."""
        rows = {str(step): list(row) for step, row in self.weights.items()}
        tree = {"guidance_scale": self.guidance_scale, "times": list(self.times), "weights": rows}
        write_text(path, json.dumps(tree, indent=1) + "\n")


def read_coefficients(path: Path) -> Coefficients:
    """What ``Coefficients.save`` wrote. Raises ValueError, naming the file."""
    try:
        tree = from_json(path.read_text(encoding="utf-8"))
        weights = {int(step): tuple(map(float, row)) for step, row in tree["weights"].items()}
        return Coefficients(float(tree["guidance_scale"]), tuple(map(float, tree["times"])), weights)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: holds no coefficients of LinearAG ({error}); fit them and save them") from None


def alternate(count: int) -> list[int]:
    """The steps that LinearAG predicts of ``count``: every other one of the first half, all of the second."""
    return [k for k in range(1, count) if k % 2 or 2 * k >= count]


def fit(recording: Recording, guidance_scale: float, predicted: Sequence[int] | None = None) -> Coefficients:
    """Regress each predicted step's eps_uncond on what is known by then, by least squares over all elements.

    Only passes that are made in use are regressed on: one that is itself predicted adds nothing, being a linear
    function of the others. predicted: steps without an unconditional pass, by default ``alternate``'s. Raises
    ValueError where nothing was recorded.
    """
    count = len(recording.times)
    if not count:
        raise ValueError("LinearAG has no trajectory to be fitted on; record one first")
    chosen = sorted(alternate(count) if predicted is None else predicted)
    weights = {}
    for step in chosen:
        known = [*recording.cond[: step + 1], *(recording.uncond[k] for k in range(step) if k not in chosen)]
        columns = torch.stack([torch.ones_like(known[0]), *known], -1).double().flatten(0, -2)
        target = recording.uncond[step].double().flatten()[:, None]
        # gelsd: the smallest solution where columns depend on each other, as those of late steps nearly do
        weights[step] = tuple(torch.linalg.lstsq(columns, target, driver="gelsd").solution.flatten().tolist())
    return Coefficients(guidance_scale, tuple(recording.times), weights)


def linear_once(denoiser: Denoise, uncond: Cond, coefficients: Coefficients) -> Denoise:
    """``linear`` for one trajectory."""
    scale, times = coefficients.guidance_scale, coefficients.times
    conds: list[Tensor] = []
    unconds: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        step = len(conds)
        if step >= len(times) or not bool((t == times[step]).all()):
            raise ValueError(
                f"LinearAG was fitted on {len(times)} steps at {[round(time, 1) for time in times]}, but step "
                f"{step + 1} is at {float(t[0]):g}; sample at these times, or fit again"
            )
        if step in coefficients.weights:
            pos = denoiser(x_t, t, cond)
            conds.append(pos.eps)
            neg = replace(pos, y=coefficients.eps(step, conds, unconds), kind="eps")
        else:
            pos, neg = with_uncond(denoiser, uncond, x_t, t, cond, all_rows(x_t))
            conds.append(pos.eps)
            unconds.append(neg.eps)
        y = neg.as_kind(pos.kind)
        return replace(pos, y=y + scale * (pos.y - y))

    return denoise


def linear(denoiser: Denoise, uncond: Cond, coefficients: Coefficients) -> Denoise:
    """LinearAG: guidance whose unconditional pass is, at most steps, a regression on those before.

    Its scale and times are those of the coefficients. Raises ValueError in use at other times.
    """
    return per_trajectory(lambda: linear_once(denoiser, uncond, coefficients))


# Diversity distillation


def check_intervals(intervals: int, count: int) -> None:
    """Raise ValueError unless a teacher can take this many of a student's ``count`` intervals."""
    if not 0 <= intervals <= count:
        raise ValueError(
            f"the teacher can take 0 to {count} of the {count} interval{'s' * (count != 1)} of this student, "
            f"got {intervals}"
        )


def sample_diverse(
    teacher: Denoise,
    student: Denoise,
    schedule: Schedule,
    x_t: Tensor,
    teacher_times: Sequence[float],
    times: Sequence[float],
    cond: Cond,
    sampler: Sampler,
    intervals: int = 1,
    eps: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The teacher's DDIM down to the student's time number ``intervals``, the student from there on: [B, ...].

    teacher: guided, if at all. teacher_times: its grid, of which it uses the part above that time, then lands on it.
    intervals: 0 is the student alone, len(times) the teacher alone. Raises ValueError on others.
    """
    check_intervals(intervals, len(times))
    if intervals == len(times):
        return sample(teacher, schedule, x_t, teacher_times, cond, ddim)
    if intervals:
        until = times[intervals]
        x_t = sample(teacher, schedule, x_t, [t for t in teacher_times if t > until], cond, ddim, end=until)
    return sample_student(student, schedule, x_t, times[intervals:], cond, sampler, eps)
