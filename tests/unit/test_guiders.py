"""Guidance without training, on worlds whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen.denoiser import Cond, Denoise, Denoiser, guided
from fastgen.guiders import (
    Coefficients,
    Recording,
    adaptive,
    alternate,
    cfgpp,
    cfgpp_scale,
    fit,
    linear,
    read_coefficients,
    recorded,
    sample_diverse,
)
from fastgen.pairs import solve
from fastgen.prediction import KINDS, Kind, Prediction
from fastgen.sampling import Sampler, ddim, ddim_times, sample, sample_student
from fastgen.schedule import Flow, Schedule, add_noise
from tests.oracle import Gaussians, call, labels, schedules, sd_schedule

CAPTIONS = ["left", "right", "", "left", "right"]
UNCOND = labels([""], torch.float64)
STEPS = (1, 4, 11)


@dataclass
class Counting:
    """A denoiser that keeps how many rows it was given at each call."""

    inner: Denoise
    rows: list[int] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.rows.append(len(x_t))
        return self.inner(x_t, t, cond)


def world(schedule: Schedule | None = None, kind: Kind = "v", means: Sequence[float] = (0.3, 1.0, -0.5)) -> Denoiser:
    schedule = schedule or sd_schedule()
    network = Gaussians(means, (0.5, 0.4, 0.6), schedule, kind).double().requires_grad_(False)
    return Denoiser(network, schedule, kind, call)


def conds(captions: Sequence[str] = CAPTIONS) -> Cond:
    return labels(captions, torch.float64)


def noise(n: int = len(CAPTIONS), seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solved(denoiser: Denoise, schedule: Schedule, times: Sequence[float], end: float | None = None) -> Tensor:
    return sample(denoiser, schedule, noise(), times, conds(), ddim, end=end)


def full(schedule: Schedule, t: float) -> Tensor:
    return torch.full((len(CAPTIONS),), t, dtype=torch.float64)


# CFG++


def own_cfgpp(denoiser: Denoiser, scale: float, times: Sequence[float], end: float | None) -> Tensor:
    """Algorithm 2 of the paper written out: x0 from the mixture, noise from the unconditional half."""
    schedule, x_t = denoiser.schedule, noise()
    for t, r in zip(times, [*times[1:], end], strict=True):
        at = schedule(full(schedule, t)).like(x_t)
        pos = denoiser(x_t, full(schedule, t), conds()).eps
        neg = denoiser(x_t, full(schedule, t), conds([""] * len(CAPTIONS))).eps
        x0 = (x_t - at.sigma * (neg + scale * (pos - neg))) / at.alpha
        x_t = x0 if r is None else add_noise(schedule, x0, neg, full(schedule, r))
    return x_t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("end", [None, 0.0])
def test_cfgpp_is_its_own_step_written_out(kind: Kind, num_steps: int, end: float | None) -> None:
    denoiser = world(kind=kind)
    times = ddim_times(denoiser.schedule, num_steps)
    found = solved(cfgpp(denoiser, UNCOND, 0.6, denoiser.schedule, times, end), denoiser.schedule, times, end)
    torch.testing.assert_close(found, own_cfgpp(denoiser, 0.6, times, end), rtol=1e-9, atol=1e-9)
    other = solved(guided(denoiser, UNCOND, 0.6), denoiser.schedule, times, end)
    assert num_steps == 1 or (found - other).abs().max() > 1e-2  # one step renoises little or nothing


def test_cfgpp_starts_on_flow_where_there_is_no_signal() -> None:
    """alpha is 0 at t = 1, where both halves see the noise itself: the scale is lambda."""
    denoiser = world(Flow(), "flow")
    times = ddim_times(Flow(), 4)
    found = solved(cfgpp(denoiser, UNCOND, 0.6, Flow(), times), Flow(), times)
    x_t = noise()
    for t, r in zip(times, [*times[1:], 0.0], strict=True):
        pos, neg = (denoiser(x_t, full(Flow(), t), c).flow for c in (conds(), conds([""] * 5)))
        x0 = x_t - t * (neg + 0.6 * (pos - neg))  # x0 = x - t v, eps = x + (1 - t) v
        x_t = (1 - r) * x0 + r * (x_t + (1 - t) * neg)
    torch.testing.assert_close(found, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("scale", [0.0, 0.3, 0.6, 1.0])
def test_where_the_condition_says_nothing_cfgpp_is_ddim(schedule: Schedule, scale: float) -> None:
    network = Gaussians((0.3,) * 3, (0.5,) * 3, schedule, "v").double().requires_grad_(False)
    denoiser = Denoiser(network, schedule, "v", call)
    times = ddim_times(schedule, 10)
    found = solved(cfgpp(denoiser, UNCOND, scale, schedule, times), schedule, times)
    torch.testing.assert_close(found, solved(denoiser, schedule, times), rtol=1e-9, atol=1e-9)


def test_cfgpp_of_scale_zero_is_unconditional() -> None:
    denoiser = world()
    times = ddim_times(denoiser.schedule, 10)
    found = solved(cfgpp(denoiser, UNCOND, 0.0, denoiser.schedule, times), denoiser.schedule, times)
    nothing = sample(denoiser, denoiser.schedule, noise(), times, conds([""] * 5), ddim)
    torch.testing.assert_close(found, nothing, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("num_steps", "low", "high"), [(4, 0.83, 1.06), (10, 1.38, 2.15), (50, 1.9, 9.5)], ids=["4", "10", "50"]
)
def test_the_guidance_that_cfgpp_amounts_to_grows_with_the_steps(num_steps: int, low: float, high: float) -> None:
    """w = lambda / (1 - rho), rho from the table of alphas alone; the last step is guided by lambda itself."""
    schedule = sd_schedule()
    times = ddim_times(schedule, num_steps)
    kappa = [((1 - schedule.alphas_cumprod[int(t)]) / schedule.alphas_cumprod[int(t)]).sqrt() for t in times]
    for k, t in enumerate(times):
        to = None if k + 1 == num_steps else schedule(torch.tensor([times[k + 1]]))
        found = float(cfgpp_scale(0.6, schedule(torch.tensor([t])), to))
        expected = 0.6 if to is None else 0.6 / (1 - float(kappa[k + 1] / kappa[k]))
        assert found == pytest.approx(expected, rel=1e-9)
        assert to is None or low <= found <= high


@pytest.mark.parametrize("scale", [-0.1, 1.5, 7.5])
def test_cfgpp_refuses_the_scales_of_cfg(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"CFG\+\+ takes a scale from 0 to 1, got {scale:g}; 0.6 is usual"):
        cfgpp(world(), UNCOND, scale, sd_schedule(), [999, 499])


def test_cfgpp_refuses_times_it_was_not_made_for() -> None:
    denoiser = world()
    guide = cfgpp(denoiser, UNCOND, 0.6, denoiser.schedule, [999, 499])
    with pytest.raises(ValueError, match=r"made for the times \[999.0, 499.0\], not for 749; make it anew"):
        solved(guide, denoiser.schedule, [999, 749])


# Adaptive guidance

TIMES = ddim_times(sd_schedule(), 10)


def test_adaptive_guidance_that_never_stops_is_guidance_bit_for_bit() -> None:
    one, two = Counting(world()), Counting(world())
    found = solved(adaptive(one, UNCOND, 3.0, float("inf")), sd_schedule(), TIMES)
    assert torch.equal(found, solved(guided(two, UNCOND, 3.0), sd_schedule(), TIMES))
    assert one.rows == two.rows == [10] * 10


def test_adaptive_guidance_that_never_starts_is_the_denoiser_and_costs_no_pass_more() -> None:
    counting = Counting(world())
    found = solved(adaptive(counting, UNCOND, 3.0, -1.0), sd_schedule(), TIMES)
    assert torch.equal(found, solved(world(), sd_schedule(), TIMES))
    assert counting.rows == [5] * 10


def halves(denoiser: Denoiser, x_t: Tensor, t: float) -> tuple[Prediction, Prediction]:
    """What the network says with and without the captions."""
    pos, neg = (denoiser(x_t, full(denoiser.schedule, t), c) for c in (conds(), conds([""] * len(x_t))))
    return pos, neg


def by_hand(kind: Kind, gamma: float) -> tuple[Tensor, Tensor, list[int]]:
    """Adaptive guidance at scale 3 written out: x0, the cosines [K, B], the steps at which the samples reach gamma."""
    denoiser, x_t, cosines = world(), noise(), []
    still = torch.ones(5, dtype=torch.bool)
    stops = [len(TIMES) - 1] * 5
    for k, (t, r) in enumerate(zip(TIMES, [*TIMES[1:], None], strict=True)):
        pos, neg = halves(denoiser, x_t, t)
        pred = replace(pos, y=torch.where(still[:, None, None], neg.y + 3 * (pos.y - neg.y), pos.y))
        one, two = pos.as_kind(kind), neg.as_kind(kind)
        cosines.append((one * two).sum((1, 2)) / (one.square().sum((1, 2)) * two.square().sum((1, 2))).sqrt())
        for i in range(5):
            if still[i] and cosines[k][i] >= gamma:
                still[i], stops[i] = False, k
        x_t = pred.x0 if r is None else add_noise(sd_schedule(), pred.x0, pred.eps, full(sd_schedule(), r))
    return x_t, torch.stack(cosines), stops


@pytest.mark.parametrize(("kind", "gamma"), [("x0", 0.9), ("eps", 0.9999), ("v", 0.5)])
def test_each_sample_stops_by_itself_and_its_passes_are_saved(kind: Kind, gamma: float) -> None:
    """The step that finds gamma reached is guided still, both passes being made; the empty caption stops first."""
    wanted, _, stops = by_hand(kind, gamma)
    assert stops[2] == 0  # its two halves are the same
    assert len(set(stops)) > 1
    counting = Counting(world())
    found = solved(adaptive(counting, UNCOND, 3.0, gamma, kind), sd_schedule(), TIMES)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert counting.rows == [5 + sum(stop >= k for stop in stops) for k in range(10)]
    assert sum(counting.rows) < 100


def test_why_x0_is_compared_and_not_eps() -> None:
    """With exact scores both eps begin as x_t itself and part; both x0 begin apart and meet."""
    _, of_eps, _ = by_hand("eps", 2.0)
    _, of_x0, _ = by_hand("x0", 2.0)
    right = [1, 4]  # whose mean lies on the other side of the empty caption's
    assert of_eps[0].min() > 0.99
    assert (of_eps[:, right] < of_eps[0, right]).any()
    assert of_x0[0, right].max() < -0.9
    assert of_x0[-1].min() > 0.99
    assert (of_x0[:, right].diff(dim=0) > 0).all()


@pytest.mark.parametrize("times", [TIMES, TIMES[:1]])
def test_every_batch_begins_guided_anew(times: Sequence[float]) -> None:
    """Also one of a single step, whose time does not fall, and one of another size."""
    counting = Counting(world())
    guide = adaptive(counting, UNCOND, 3.0, 0.0)
    first = solved(guide, sd_schedule(), times)
    rows = list(counting.rows)
    assert torch.equal(solved(guide, sd_schedule(), times), first)
    assert counting.rows == rows * 2
    alone = sample(guide, sd_schedule(), noise()[:1], times, conds(CAPTIONS[:1]), ddim)
    torch.testing.assert_close(alone, first[:1])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    guide = adaptive(world(), UNCOND, 3.0, 0.9)
    whole = solved(guide, sd_schedule(), TIMES)
    for i, caption in enumerate(CAPTIONS):
        alone = sample(guide, sd_schedule(), noise()[i : i + 1], TIMES, conds([caption]), ddim)
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-9, atol=1e-9)


def test_pairs_of_a_guided_teacher_do_not_depend_on_the_states_kept_on_the_way() -> None:
    """``fastgen pairs`` samples in pieces, batch after batch: one trajectory each all the same."""
    made = {
        "adaptive": adaptive(world(), UNCOND, 3.0, 0.9),
        "linear": linear(world(), UNCOND, fit(recording_of(world()), 2.0)),
        "cfgpp": cfgpp(world(), UNCOND, 0.6, sd_schedule(), TIMES),
    }
    for guide in made.values():
        whole = solved(guide, sd_schedule(), TIMES)
        for _ in range(2):
            x0, states = solve(guide, sd_schedule(), noise(), conds(), TIMES, [TIMES[3], TIMES[6]])
            assert torch.equal(x0, whole)
            assert len(states) == 2


# LinearAG


def test_a_recording_is_guidance_and_holds_both_halves() -> None:
    recording, denoiser = Recording(), world(kind="x0")
    found = solved(recorded(denoiser, UNCOND, 2.0, recording), sd_schedule(), TIMES)
    assert torch.equal(found, solved(guided(denoiser, UNCOND, 2.0), sd_schedule(), TIMES))
    assert recording.times == TIMES
    first = denoiser(noise(), full(sd_schedule(), 999.0), conds())
    torch.testing.assert_close(recording.cond[0], first.eps)
    torch.testing.assert_close(recording.uncond[0][2], first.eps[2])  # of the empty caption


def recording_of(denoiser: Denoise, scale: float = 2.0, times: Sequence[float] = TIMES) -> Recording:
    recording = Recording()
    solved(recorded(denoiser, UNCOND, scale, recording), sd_schedule(), times)
    return recording


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predicted", [None, [1], [9], list(range(1, 10))])
def test_linear_guidance_is_exact_where_both_halves_are_affine_in_each_other(
    kind: Kind, predicted: list[int] | None
) -> None:
    """One condition: every eps of a Gaussian world is affine in the noise it began with; regression loses nothing."""
    denoiser, left = world(kind=kind), conds(["left"] * 5)

    def run(guide: Denoise, seed: int) -> Tensor:
        return sample(guide, sd_schedule(), noise(seed=seed), TIMES, left, ddim)

    recording = Recording()
    run(recorded(denoiser, UNCOND, 2.0, recording), 0)
    found = fit(recording, 2.0, predicted)
    counting = Counting(denoiser)
    wanted = run(guided(denoiser, UNCOND, 2.0), 1)
    torch.testing.assert_close(run(linear(counting, UNCOND, found), 1), wanted, rtol=1e-6, atol=1e-6)
    chosen = alternate(10) if predicted is None else predicted
    assert counting.rows == [5 if k in chosen else 10 for k in range(10)]
    assert (run(denoiser, 1) - wanted).abs().max() > 0.1


def test_the_fit_is_least_squares() -> None:
    """Against a regression by the normal equations, on what no affine function gives."""
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(4, 3, 5, generator=g).double() for _ in range(6)]
    found = fit(Recording([3.0, 2.0, 1.0], made[:3], made[3:]), 2.0, [2])
    columns = torch.stack([torch.ones(60).double(), *(m.flatten() for m in (*made[:3], made[3], made[4]))], 1)
    target = made[5].flatten()
    expected = torch.linalg.solve(columns.T @ columns, columns.T @ target)
    torch.testing.assert_close(torch.tensor(found.weights[2], dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)


def test_most_steps_are_predicted_and_the_first_never() -> None:
    assert alternate(1) == []
    assert alternate(2) == [1]
    assert alternate(10) == [1, 3, 5, 6, 7, 8, 9]
    assert alternate(20) == [1, 3, 5, 7, 9, *range(10, 20)]


def test_coefficients_survive_the_disk(tmp_path: Path) -> None:
    found = fit(recording_of(world()), 2.0)
    found.save(tmp_path / "linear.json")
    assert read_coefficients(tmp_path / "linear.json") == found
    assert found.times == tuple(TIMES)
    assert found.guidance_scale == 2.0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        (json.dumps({"times": [1]}), "'weights'"),
        (json.dumps({"times": [2, 1], "guidance_scale": "x", "weights": {}}), "could not convert string"),
        (json.dumps({"times": [2, 1], "guidance_scale": 2, "weights": {"1": [0]}}), "step 1 of 2 needs 4 weights"),
    ],
)
def test_a_file_that_holds_no_coefficients_is_told(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "linear.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"linear.json: holds no coefficients of LinearAG \(.*{reason}"):
        read_coefficients(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coefficients(2.0, (), {}), r"LinearAG's times must fall, got \[\]"),
        (lambda: Coefficients(2.0, (1.0, 1.0), {}), r"LinearAG's times must fall, got \[1.0, 1.0\]"),
        (lambda: Coefficients(2.0, (2.0, 1.0), {0: (0.0, 1.0)}), "step 0 of 2 needs 2 weights, got 2, and the first"),
        (lambda: Coefficients(2.0, (2.0, 1.0), {2: (0.0,) * 6}), "step 2 of 2 needs 6 weights"),
        (lambda: fit(Recording(), 2.0), "LinearAG has no trajectory to be fitted on; record one first"),
    ],
)
def test_coefficients_that_cannot_be_are_refused(make: Callable[[], Coefficients], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("times", "step"), [(TIMES[:4] + TIMES[5:], "step 5 is at 499"), ([*TIMES, 50.0], "step 11")])
def test_linear_guidance_refuses_other_times(times: list[float], step: str) -> None:
    guide = linear(world(), UNCOND, fit(recording_of(world()), 2.0))
    with pytest.raises(ValueError, match=rf"LinearAG was fitted on 10 steps at \[999.0, .*, but {step}"):
        solved(guide, sd_schedule(), times)


def test_linear_guidance_begins_anew_with_each_batch() -> None:
    guide = linear(world(), UNCOND, fit(recording_of(world()), 2.0))
    assert torch.equal(solved(guide, sd_schedule(), TIMES), solved(guide, sd_schedule(), TIMES))


# Diversity distillation


def drawn(seed: int = 7) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(5, 2, 3, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
def test_a_teacher_of_no_interval_is_the_student_and_of_all_the_teacher(sampler: Sampler) -> None:
    student, schedule, grid, times = (
        world(means=(2.0, 3.0, 4.0)),
        sd_schedule(),
        ddim_times(sd_schedule(), 20),
        [999, 499],
    )
    one, two = Counting(world()), Counting(student)
    found = sample_diverse(one, two, schedule, noise(), grid, times, conds(), sampler, 0, drawn())
    assert torch.equal(found, sample_student(student, schedule, noise(), times, conds(), sampler, drawn()))
    assert (one.rows, two.rows) == ([], [5, 5])
    found = sample_diverse(one, two, schedule, noise(), grid, times, conds(), sampler, 2, drawn())
    assert torch.equal(found, sample(world(), schedule, noise(), grid, conds(), ddim))
    assert (one.rows, two.rows) == ([5] * 20, [5, 5])


@pytest.mark.parametrize("intervals", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [20, 7])
def test_the_student_goes_on_from_where_the_teacher_left_off(intervals: int, num_steps: int) -> None:
    """At its own time, also where the teacher's grid does not meet it."""
    schedule, times, seen = sd_schedule(), [999.0, 749.0, 499.0, 249.0], []
    inner, teacher = world(means=(2.0, 3.0, 4.0)), Counting(world())

    def student(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        seen.append((x_t, float(t[0])))
        return inner(x_t, t, cond)

    grid = ddim_times(schedule, num_steps)
    sample_diverse(teacher, student, schedule, noise(), grid, times, conds(), "renoise", intervals, drawn())
    before = [t for t in grid if t > times[intervals]]
    left = sample(world(), schedule, noise(), before, conds(), ddim, end=times[intervals])
    assert torch.equal(seen[0][0], left)
    assert [t for _, t in seen] == times[intervals:]
    assert len(teacher.rows) == len(before)


@pytest.mark.parametrize(("intervals", "count"), [(3, 2), (-1, 2), (2, 1)])
def test_a_teacher_of_more_intervals_than_there_are_is_refused(intervals: int, count: int) -> None:
    grid, times = [999.0, 499.0], [999.0, 499.0][:count]
    with pytest.raises(ValueError, match=rf"can take 0 to {count} of the {count} intervals? .*, got {intervals}"):
        sample_diverse(world(), world(), sd_schedule(), noise(), grid, times, conds(), "renoise", intervals)
