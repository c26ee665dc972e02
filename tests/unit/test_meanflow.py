"""MeanFlow on a world with known answers: its identity, its reductions, and why DDIM samples it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastgen import losses
from fastgen.coordinates import rectified
from fastgen.engine import Engine
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.prediction import Kind, combine
from fastgen.rng import Noise
from fastgen.sampling import sample_student
from fastgen.schedule import Flow, Level, Schedule
from fastgen.trainers import meanflow
from fastgen.trainers.meanflow import Config, Method
from tests.oracle import (
    Gaussian,
    Samples,
    conv_family,
    gaussian_family,
    labels,
    same,
    schedules,
    sd_schedule,
    states,
    train,
)

MEANS, STDS, SHAPE = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3), (4, 4)
LEFT = Gaussian(1.0, 0.5)
CONV = Samples((2, 8, 8))
WORLDS: list[tuple[Schedule, Kind]] = [(sd_schedule(), "v"), (sd_schedule(), "eps"), (Flow(), "flow")]


class Jump(nn.Module):
    """The exact average velocity of one Gaussian a caption, from t to the next of ``edges`` below it."""

    def __init__(
        self, means: Sequence[float], stds: Sequence[float], schedule: Schedule, kind: Kind, edges: Sequence[float]
    ) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(means)), nn.Parameter(torch.tensor(stds).log())
        self.schedule, self.kind = schedule, kind
        self.edges = torch.tensor(sorted(edges), dtype=torch.float64)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        t = t.double()
        r = self.edges[(torch.searchsorted(self.edges, t.detach()) - 1).clamp(min=0)]
        at, to = self.schedule(t).like(x_t), self.schedule(r).like(x_t)
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        mean, std = (label @ self.mean).reshape(shape), (label @ self.log_std).exp().reshape(shape)

        def size(level: Level) -> Tensor:
            return ((level.alpha * std).square() + level.sigma.square()).sqrt()

        x_r = to.alpha * mean + size(to) / size(at) * (x_t - at.alpha * mean)
        determinant = at.alpha * to.sigma - at.sigma * to.alpha
        x0 = (to.sigma * x_t - at.sigma * x_r) / determinant
        return combine(self.kind, x0, (at.alpha * x_r - to.alpha * x_t) / determinant, at)


def noise(step: int = 0, n: int = 4) -> Noise:
    return Noise(range(n), 0, step, "student")


def to_double(network: nn.Module, means: tuple[float, ...], stds: tuple[float, ...]) -> None:
    network.double()
    with torch.no_grad():
        network.mean.copy_(torch.tensor(means, dtype=torch.float64))
        network.log_std.copy_(torch.tensor(stds, dtype=torch.float64).log())


def jump_method(
    schedule: Schedule, kind: Kind, num_steps: int, means: tuple[float, ...] = MEANS, **options: object
) -> Method:
    """An exact teacher and a student that jumps as Gaussians at these means do; float64."""
    edges = [schedule.t_min, *gaussian_family(schedule=schedule).student_times(num_steps)]
    made: Callable[[], nn.Module] = lambda: Jump(means, STDS, schedule, kind, edges)  # noqa: E731
    family = gaussian_family(MEANS, STDS, schedule, kind, (3,), made)
    method = Method(Config(**{"guidance_scale": 1.0, **options}), family, num_steps)  # type: ignore[arg-type]
    to_double(method.teacher.network, MEANS, STDS)
    to_double(method.student.network, means, STDS)
    return method


def world(schedule: Schedule, n: int = 64) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """A batch of "left" in float64 with x0, eps: [n, 3] and t: [n] between the table's entries."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 3, generator=g, dtype=torch.float64)
    share = 0.01 + 0.98 * torch.rand(n, generator=g, dtype=torch.float64)
    t = schedule.t_min + share * (schedule.t_max - schedule.t_min)
    t = t.floor() + 0.5 if schedule.t_max > 1 else t
    batch = Batch(list(range(n)), labels(["left"] * n, torch.float64), labels([""], torch.float64), 1.0 + 0.5 * x0)
    return batch, 1.0 + 0.5 * x0, eps, t


# The identity


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_the_exact_average_velocity_is_its_own_target(schedule: Schedule, kind: Kind, num_steps: int) -> None:
    method = jump_method(schedule, kind, num_steps)
    batch, x0, eps, t = world(schedule)
    u, target = method.average(batch, x0, eps, t, method.next_time(t))
    torch.testing.assert_close(u, target, rtol=1e-7, atol=1e-8)
    other = jump_method(schedule, kind, num_steps, (0.3, 1.2, -0.5))
    u, target = other.average(batch, x0, eps, t, other.next_time(t))
    assert (u - target).square().mean().sqrt() > 1e-3


@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_it_is_the_mean_of_the_velocity_over_the_interval(schedule: Schedule, kind: Kind) -> None:
    """u = (z_t - z_r) / (s_t - s_r) of the exact flow map: what the target is a target for."""
    method = jump_method(schedule, kind, 2)
    batch, x0, eps, t = world(schedule)
    r = method.next_time(t)
    u, _ = method.average(batch, x0, eps, t, r)
    at, to = schedule(t).like(x0), schedule(r).like(x0)
    x_t, here, there = at.alpha * x0 + at.sigma * eps, rectified(at), rectified(to)
    x_r = LEFT.flow_map(x_t, at, to)
    expected = (here.scale * x_t - there.scale * x_r) / (here.clock - there.clock)
    torch.testing.assert_close(u, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_wrong_targets_are_wrong_at_the_exact_solution(schedule: Schedule, kind: Kind) -> None:
    """The plus sign; the partial derivative in t for the total one; a derivative left out."""
    method = jump_method(schedule, kind, 1)
    batch, x0, eps, t = world(schedule)
    r = method.next_time(t)
    u, target = method.average(batch, x0, eps, t, r)
    _, velocity = method.average(batch, x0, eps, t, r, share=0.0)
    change = velocity - target

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    assert rms(u - target) < 1e-7
    assert rms(u - (velocity + change)) > 0.1
    assert rms(u - velocity) > 0.1

    along = meanflow.derivative.along

    def partial(denoiser, read, x_t, t, cond, dx, *others):
        return along(denoiser, read, x_t, t, cond, torch.zeros_like(dx), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meanflow.derivative, "along", partial)
        u, target = method.average(batch, x0, eps, t, r)
    assert rms(u - target) > 0.1


@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_finite_differences_give_the_same_target(schedule: Schedule, kind: Kind) -> None:
    batch, x0, eps, t = world(schedule)
    found = []
    for how in ("jvp", "finite_differences"):
        method = jump_method(schedule, kind, 1, (0.2,) * 3, derivative=how, span=1e-7)
        found.append(method.average(batch, x0, eps, t, method.next_time(t))[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_wide_differences_stay_within_the_interval_of_their_sample() -> None:
    """Across one of the student's times the average jumps, which would be taken for its change."""
    schedule = sd_schedule()
    batch, x0, eps, _ = world(schedule)
    t = torch.cat([edge + torch.logspace(-2, 2, 16, dtype=torch.float64) for edge in (1.0, 249.0, 499.0, 749.0)])
    exact = jump_method(schedule, "v", 4)
    near = jump_method(schedule, "v", 4, derivative="finite_differences", span=0.03)
    r = exact.next_time(t)
    target, found = (method.average(batch, x0, eps, t, r)[1] for method in (exact, near))
    assert (found - target).norm() < 0.02 * target.norm()


def test_data_s_own_velocity_is_unbiased_and_noisy() -> None:
    """At the exact solution the residual has no regression on the sample, yet is not 0."""
    schedule, n = sd_schedule(), 60_000
    method = jump_method(schedule, "v", 1, velocity="data")
    batch, x0, eps, _ = world(schedule, n)
    for at_time in (150.5, 450.5, 750.5):
        t = torch.full((n,), at_time, dtype=torch.float64)
        u, target = method.average(batch, x0, eps, t, method.next_time(t))
        at = schedule(t).like(x0)
        x_t = at.alpha * x0 + at.sigma * eps
        z, residual = (x_t - x_t.mean()) / x_t.std(), u - target
        error = (residual.square().mean() / residual.numel()).sqrt()
        assert error > 1e-4
        assert residual.mean().abs() < 4 * error
        assert (residual * z).mean().abs() < 6 * error


@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_with_an_average_the_target_is_a_share_of_the_way_from_it(schedule: Schedule, kind: Kind) -> None:
    batch, x0, eps, t = world(schedule)
    method = jump_method(schedule, kind, 2, (0.2,) * 3, target_decay=0.75, relaxation=0.3)
    to_double(method.target.denoiser.network, (0.1,) * 3, STDS)
    average = jump_method(schedule, kind, 2, (0.1,) * 3)
    r = method.next_time(t)
    now, whole = average.average(batch, x0, eps, t, r)
    u, target = method.average(batch, x0, eps, t, r)
    torch.testing.assert_close(target, 0.7 * now + 0.3 * whole)
    torch.testing.assert_close(u, jump_method(schedule, kind, 2, (0.2,) * 3).average(batch, x0, eps, t, r)[0])
    method.target.follow()
    mean = method.target.denoiser.network.mean
    torch.testing.assert_close(mean, torch.full_like(mean, 0.75 * 0.1 + 0.25 * 0.2))


# What it reduces to


@pytest.mark.parametrize("velocity", ["data", "teacher"])
@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_at_r_equal_to_t_it_is_flow_matching_or_the_teacher_s_velocity(
    schedule: Schedule, kind: Kind, velocity: str
) -> None:
    method = jump_method(schedule, kind, 1, (0.2,) * 3, velocity=velocity)
    batch, x0, eps, t = world(schedule)
    u, target = method.average(batch, x0, eps, t, t)
    at = schedule(t).like(x0)
    x_t = at.alpha * x0 + at.sigma * eps
    pred = method.student(x_t, t, batch.cond)
    torch.testing.assert_close(u, pred.eps - pred.x0)
    expected = eps - x0 if velocity == "data" else LEFT.eps(x_t, at) - LEFT.x0(x_t, at)
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)
    matching = (u - expected).square().sum(1)
    torch.testing.assert_close(losses.adaptive(u, target, 0.0, 1e-3), matching, rtol=1e-7, atol=1e-7)


def test_a_student_that_is_its_teacher_is_right_only_where_r_is_t() -> None:
    schedule = sd_schedule()
    method = jump_method(schedule, "v", 1)
    method.target.denoiser = method.student = method.teacher
    batch, x0, eps, t = world(schedule)
    u, target = method.average(batch, x0, eps, t, t)
    torch.testing.assert_close(u, target, rtol=1e-9, atol=1e-9)
    u, target = method.average(batch, x0, eps, t, method.next_time(t))
    assert (u - target).square().mean().sqrt() > 0.05


# Sampling


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("schedule", schedules())
def test_ddim_steps_by_the_average_velocity_on_any_schedule(schedule: Schedule, num_steps: int) -> None:
    """z_r = z_t - (s_t - s_r) u with an arbitrary u, by hand, is what ``sample_student`` does."""
    method = jump_method(schedule, "x0", num_steps, (0.7, -0.2, 0.1))
    times = gaussian_family(schedule=schedule).student_times(num_steps)
    cond = labels(["left"] * 5, torch.float64)
    x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def at(t: float) -> Level:
        return schedule(torch.full((5,), t, dtype=torch.float64)).like(x_t)

    z = rectified(at(times[0])).scale * x_t
    for t, r in zip(times, [*times[1:], schedule.t_min], strict=True):
        here, there = rectified(at(t)), rectified(at(r))
        pred = method.student(z / here.scale, torch.full((5,), t, dtype=torch.float64), cond)
        torch.testing.assert_close(pred.x0, z - here.clock * (pred.eps - pred.x0))  # x0 := z - s u
        z = z - (here.clock - there.clock) * (pred.eps - pred.x0)
    found = sample_student(method.student, schedule, x_t, times, cond, method.sampler)
    torch.testing.assert_close(found, z / rectified(at(schedule.t_min)).scale, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(("schedule", "kind"), WORLDS)
def test_the_exact_student_s_samples_are_the_flow_s_at_the_schedule_s_cleanest_time(
    schedule: Schedule, kind: Kind, num_steps: int
) -> None:
    """Where the shipped scheduler ends: t_min, at which a table still holds a little noise."""
    method = jump_method(schedule, kind, num_steps)
    times = gaussian_family(schedule=schedule).student_times(num_steps)
    x_t = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = sample_student(method.student, schedule, x_t, times, labels(["left"] * 5, torch.float64), "ddim")
    ends = [schedule(torch.full((5,), t, dtype=torch.float64)).like(x_t) for t in (times[0], schedule.t_min)]
    torch.testing.assert_close(found, LEFT.flow_map(x_t, *ends), rtol=1e-8, atol=1e-8)


def test_the_next_time_is_the_one_below_and_an_edge_belongs_to_the_interval_below_it() -> None:
    method = jump_method(sd_schedule(), "v", 4)
    assert method.edges == [0.0, 249.0, 499.0, 749.0, 999.0]
    t = torch.tensor([999.0, 749.001, 749.0, 500.0, 249.5, 249.0, 0.5, 0.0], dtype=torch.float64)
    assert method.next_time(t).tolist() == [749.0, 749.0, 499.0, 499.0, 249.0, 0.0, 0.0, 0.0]


# The loss


def test_the_loss_is_the_square_under_its_adaptive_weight_and_the_target_is_still() -> None:
    method = jump_method(sd_schedule(), "v", 2, (0.2,) * 3, power=0.75, floor=0.01, warmup=8)
    batch, *_ = world(sd_schedule(), 16)
    parameters = list(method.student.network.parameters())
    loss = method.student_loss(batch, noise(2, 16))["meanflow"]
    found = torch.autograd.grad(loss.sum(), parameters)

    rng = noise(2, 16)
    assert batch.x0 is not None
    t = meanflow.times.logit_normal(rng, sd_schedule(), -0.4, 1.0, continuous=True)
    u, target = method.average(batch, batch.x0, rng.normal((3,)), t, method.next_time(t), 0.25)
    assert not target.requires_grad
    square = (u - target).square().sum(1)
    weight = (square.detach() + 0.01) ** -0.75
    torch.testing.assert_close(loss, weight * square)
    for one, two in zip(found, torch.autograd.grad((weight * square).sum(), parameters), strict=True):
        torch.testing.assert_close(one, two)
    assert max(one.abs().max() for one in found) > 0.1


def test_adaptive_weights() -> None:
    x, target = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2)
    assert losses.adaptive(x, target, 0.0, 1.0).tolist() == [25.0, 0.0]
    assert losses.adaptive(x, target, 1.0, 25.0).tolist() == [0.5, 0.0]
    assert losses.adaptive(x, target, 0.5, 0.0)[0].item() == pytest.approx(5.0)


def calls(network: nn.Module) -> list[int]:
    seen: list[int] = []
    network.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("how", "extra"), [("jvp", 1), ("finite_differences", 2)])
@pytest.mark.parametrize(("velocity", "scale", "passes"), [("teacher", 2.0, [8]), ("data", 1.0, [])])
def test_passes_are_counted(how: str, extra: int, velocity: str, scale: float, passes: list[int]) -> None:
    config = Config(velocity=velocity, guidance_scale=scale, derivative=how)  # type: ignore[arg-type]
    method = Method(config, conv_family(), 2)
    teacher, student = calls(method.teacher.network), calls(method.student.network)
    method.student_loss(CONV.batch(range(4)), noise())
    assert teacher == passes
    assert student == [4] * (1 + extra)


def test_only_the_student_learns() -> None:
    method = Method(Config(guidance_scale=2.0), conv_family(), 2)
    before = states(method)
    (logs,) = train(Engine(method, CONV, {"student": Optim(lr=1e-3)}, batch_size=2, steps=1), range(1))
    assert set(logs) == {"student/meanflow", "student/student.grad_norm"}
    after = states(method)
    assert same(before["teacher"], after["teacher"])
    assert not same(before["student"], after["student"])


# End to end


def distil(num_steps: int, schedule: Schedule, kind: Kind, updates: int = 100, **options: object) -> list[float]:
    """Train through the engine; the mean and deviation it learnt for "left" and for "right"."""
    edges = [schedule.t_min, *gaussian_family(schedule=schedule).student_times(num_steps)]
    made: Callable[[], nn.Module] = lambda: Jump((0.0,) * 3, (1.0,) * 3, schedule, kind, edges)  # noqa: E731
    family = gaussian_family(MEANS, STDS, schedule, kind, SHAPE, made)
    settings = {"guidance_scale": 1.0, "noise_mean": 0.0, **options}
    method = Method(Config(**settings), family, num_steps)  # type: ignore[arg-type]
    optim = Optim(lr=0.1, schedule="linear", betas=(0.9, 0.99), weight_decay=0.0)
    train(
        Engine(method, Samples(SHAPE, MEANS, STDS), {"student": optim}, batch_size=16, steps=updates), range(updates)
    )
    network = method.student.network
    return [value for c in (1, 2) for value in (network.mean[c].item(), network.log_std[c].exp().item())]


@pytest.mark.parametrize(("num_steps", "world"), [(1, WORLDS[0]), (2, WORLDS[1]), (2, WORLDS[2])])
def test_a_student_takes_on_the_teacher_s_mean_and_deviation(num_steps: int, world: tuple[Schedule, Kind]) -> None:
    assert distil(num_steps, *world) == pytest.approx([1.0, 0.5, -0.5, 0.3], abs=0.01)


def test_an_average_comes_after_it() -> None:
    found = distil(1, sd_schedule(), "v", 200, target_decay=0.9, relaxation=0.3)
    assert found == pytest.approx([1.0, 0.5, -0.5, 0.3], abs=0.02)


def test_from_data_alone_it_does_too() -> None:
    found = distil(1, sd_schedule(), "v", velocity="data", power=0.0)
    assert found == pytest.approx([1.0, 0.5, -0.5, 0.3], abs=0.05)


# What is refused


def test_data_s_velocity_cannot_be_guided() -> None:
    with pytest.raises(ValueError, match=r"velocity data leaves guidance_scale 3 no teacher; set it to 1\.0"):
        Config(velocity="data")


def test_prompts_alone_are_refused() -> None:
    method = Method(Config(), conv_family(), 1)
    with pytest.raises(ValueError, match="meanflow needs images"):
        method.student_loss(replace(CONV.batch(range(2)), x0=None), noise(n=2))


def test_a_student_that_starts_below_the_last_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"meets pure noise at time 999, not 399; set student\.start 1"):
        Method(Config(), gaussian_family(start=0.4), 1)
