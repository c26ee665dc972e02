"""Regression on teacher pairs and paths, against teachers whose maps are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import losses
from fastgen.denoiser import guided
from fastgen.engine import Engine
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.pairs import solve
from fastgen.rng import Noise
from fastgen.sampling import ddim, ddim_times, ddim_x0, sample_student
from fastgen.schedule import Flow, Schedule, add_noise
from fastgen.trainers.kd import Config, Method
from tests.oracle import (
    PATH,
    Affine,
    Gaussian,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    labels,
    moved,
    optims,
    same,
    sd_schedule,
    states,
    train,
)

MEANS, STDS, SHAPE = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3), (4, 4)
CAPTION = "left"


def noise(step: int = 0, n: int = 4) -> Noise:
    return Noise(range(n), 0, step, "student")


class Solved:
    """Pairs and paths of an exact teacher of one caption, by the steps that ``fastgen pairs`` takes."""

    def __init__(self, num_steps: int = 40, scale: float = 1.0, schedule: Schedule | None = None) -> None:
        self.schedule = schedule or sd_schedule()
        kind = "flow" if isinstance(self.schedule, Flow) else "v"
        self.family = gaussian_family(MEANS, STDS, self.schedule, kind, SHAPE)
        self.num_steps, self.scale = num_steps, scale

    def batch(self, samples: Any) -> Batch:
        eps = Noise(samples, 0, 0, "pairs").normal(SHAPE)
        cond, uncond = labels([CAPTION] * len(samples)), labels([""])
        teacher = guided(self.family.denoiser, uncond, self.scale)
        path = self.family.student_times(4)[1:]
        x0, between = solve(teacher, self.schedule, eps, cond, ddim_times(self.schedule, self.num_steps), path)
        return Batch(list(samples), cond, uncond, x0, eps, dict(zip(path, between, strict=True)))


class Rows:
    """The rows of a batch, again and again."""

    def __init__(self, pool: Batch) -> None:
        self.pool = pool

    def batch(self, samples: Any) -> Batch:
        x0, eps, path = self.pool.pairs()
        rows = torch.tensor([s % len(self.pool) for s in samples])
        cond = {name: value[rows] for name, value in self.pool.cond.items()}
        return Batch(list(samples), cond, self.pool.uncond, x0[rows], eps[rows], {t: x[rows] for t, x in path.items()})


def fit(method: Method, batch: Batch) -> None:
    """Give an affine student, at each of its times, the map from the teacher's state to its target."""
    x0, eps, path = batch.pairs()
    between, ends = [eps, *(path[t] for t in method.path_times)], [*method.times[1:], method.schedule.t_min]
    for k, t in enumerate(method.times):
        at, to = (torch.full((len(batch),), s, dtype=torch.float64) for s in (t, ends[k]))
        target = x0
        if method.sampler == "ddim":
            target = ddim_x0(between[k], at, [*between[1:], x0][k], to, method.schedule)
        columns = torch.stack([torch.ones(x0.numel()), between[k].flatten()], 1).double()
        shift, scale = torch.linalg.lstsq(columns, target.flatten().double()).solution
        quarter = int(method.student.network.quarter(at)[0])
        with torch.no_grad():
            method.student.network.shift[quarter, 1] = shift
            method.student.network.scale[quarter, 1] = scale


# The loss


def test_one_step_loss_and_gradient_are_those_of_the_regression() -> None:
    """mean (a + b eps - x0)^2, whose gradient is 2 mean(...) by a and 2 mean(... eps) by b."""
    family = gaussian_family(MEANS, STDS, shape=SHAPE, student=lambda: Affine(sd_schedule(), "v", 0.4, 0.7))
    method = Method(Config(), family, 1)
    batch = Samples(SHAPE, MEANS, STDS, captions=("right",)).batch(range(4))
    x0, eps, _ = batch.pairs()
    loss = method.student_loss(batch, noise())["regression"]
    error = 0.4 + 0.7 * eps - x0
    torch.testing.assert_close(loss, error.square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    shift, scale = torch.autograd.grad(loss.sum(), [method.student.network.shift, method.student.network.scale])
    assert shift[3, 2].item() == pytest.approx(2 * error.flatten(1).mean(1).sum().item(), rel=1e-4)
    assert scale[3, 2].item() == pytest.approx(2 * (error * eps).flatten(1).mean(1).sum().item(), rel=1e-4)
    assert shift.abs().sum() == shift[3, 2].abs()


def test_the_optimum_is_where_the_flow_takes_the_noise() -> None:
    """Of data N(m, s^2): m + s eps, at loss 0; a little off it is not."""
    batch = Samples(SHAPE, MEANS, STDS, captions=("left",)).batch(range(4))
    found = []
    for shift, scale in ((1.0, 0.5), (1.1, 0.5), (1.0, 0.6)):
        family = gaussian_family(student=lambda a=shift, b=scale: Affine(sd_schedule(), "v", a, b))
        found.append(Method(Config(), family, 1).student_loss(batch, noise())["regression"].mean().item())
    assert found[0] < 1e-9
    assert found[1] == pytest.approx(0.1**2, rel=1e-3)
    assert found[2] > 5e-3


def test_pseudo_huber_is_an_option() -> None:
    batch = Samples((2, 8, 8)).batch(range(4))
    x0, eps, _ = batch.pairs()
    method = Method(Config(distance="pseudo_huber", huber=0.1), conv_family(), 1)
    t = torch.full((4,), 999.0, dtype=torch.float64)
    expected = losses.pseudo_huber(method.student(eps, t, batch.cond).x0, x0, 0.1)
    torch.testing.assert_close(method.student_loss(batch, noise())["regression"], expected)


@pytest.mark.parametrize("schedule", [sd_schedule(), Flow()], ids=["sd", "flow"])
def test_the_target_is_the_x0_by_which_ddim_lands_on_the_next_state(schedule: Schedule) -> None:
    g = torch.Generator().manual_seed(0)
    x_t, x_r = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    span = schedule.t_max
    t = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64) * span
    r = torch.tensor([0.75, 0.5, 0.25, 0.0], dtype=torch.float64) * span
    x0 = ddim_x0(x_t, t, x_r, r, schedule)
    at = schedule(t).like(x_t)
    from fastgen.prediction import Prediction

    pred = Prediction(x0, "x0", x_t, at)
    torch.testing.assert_close(ddim(pred, r, schedule, lambda: x_t), x_r, rtol=1e-4, atol=1e-4)


def test_each_sample_is_trained_at_a_time_of_its_own_on_the_state_of_that_time() -> None:
    method, n = Method(Config(), conv_family(), 4), 200
    batch = Samples((2, 8, 8)).batch(range(n))
    _, eps, path = batch.pairs()
    seen: list[tuple[Tensor, Tensor]] = []
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    method.student_loss(batch, noise(n=n))
    x_t, t = seen[0]
    counts = [int((t == s).sum()) for s in (999.0, *PATH)]
    assert sum(counts) == n
    assert min(counts) > 30
    for s, state in {999.0: eps, **path}.items():
        assert torch.equal(x_t[t == s], state[t == s])


def test_a_student_that_starts_later_is_called_there_on_the_pair_s_noise() -> None:
    """As DMD2 warms up its one-step SDXL student, at t = 399."""
    method = Method(Config(), gaussian_family(MEANS, STDS, shape=SHAPE, start=0.4), 1)
    batch = Samples(SHAPE, MEANS, STDS).batch(range(4))
    seen: list[tuple[Tensor, Tensor]] = []
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    method.student_loss(batch, noise())
    assert batch.eps is not None
    assert torch.equal(seen[0][0], batch.eps)
    assert seen[0][1].tolist() == [399.0] * 4


# Several steps


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("num_steps", [2, 4])
@pytest.mark.parametrize("schedule", [sd_schedule(), Flow()], ids=["sd", "flow"])
def test_a_student_at_loss_0_gives_the_teacher_s_own_image_of_each_noise(
    num_steps: int, scale: float, schedule: Schedule
) -> None:
    data = Solved(40, scale, schedule)
    method = Method(Config(), data.family, num_steps)
    assert method.sampler == "ddim"
    batch = data.batch(range(8))
    fit(method, batch)
    for step in range(4):
        assert method.student_loss(batch, noise(step, 8))["regression"].max() < 1e-7
    other = data.batch(range(8, 12))
    x0, eps, _ = other.pairs()
    with torch.no_grad():
        found = sample_student(method.student, data.schedule, eps, method.times, other.cond, method.sampler)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


def test_a_student_of_x0_is_right_when_noised_afresh_and_wrong_by_ddim() -> None:
    """Deviation 0.5; DDIM, which keeps the noise that the map to x0 implies, makes it 0.73."""
    n, schedule = 4000, sd_schedule()
    family = gaussian_family(MEANS, STDS, shape=SHAPE)
    method = Method(Config(target="x0"), family, 4)
    assert method.sampler == "renoise"
    truth = Gaussian(MEANS[1], STDS[1])
    for t in method.times:  # its optimum: where the flow goes from each of its times
        at = schedule(torch.tensor([t]))
        quarter = int(method.student.network.quarter(torch.tensor([t]))[0])
        zero, one = (truth.consistency(torch.full((1,), x, dtype=torch.float64), at) for x in (0.0, 1.0))
        with torch.no_grad():
            method.student.network.shift[quarter, 1], method.student.network.scale[quarter, 1] = zero, one - zero
    batch = Samples(SHAPE, MEANS, STDS, captions=("left",)).batch(range(4))
    x0, eps, _ = batch.pairs()
    exact = {
        t: truth.flow_map(eps, schedule(torch.tensor([999.0])), schedule(torch.tensor([t]))).float() for t in PATH
    }
    whole = truth.consistency(eps, schedule(torch.tensor([999.0]))).float()
    assert (
        method.student_loss(replace(batch, x0=whole.reshape(x0.shape), path=exact), noise())["regression"].max() < 1e-8
    )

    g = torch.Generator().manual_seed(0)
    fresh = lambda: torch.randn(n, *SHAPE, generator=g)  # noqa: E731
    std = {}
    for sampler in ("renoise", "ddim"):
        with torch.no_grad():
            found = sample_student(
                method.student, schedule, fresh(), method.times, labels(["left"] * n), sampler, fresh
            )
        std[sampler] = found.std().item()
    assert std["renoise"] == pytest.approx(0.5, abs=0.01)
    assert std["ddim"] > 0.65


def test_how_it_is_sampled_follows_from_what_it_learns() -> None:
    family = gaussian_family()
    found = [Method(Config(target=target), family, n) for target in ("next", "x0") for n in (1, 4)]  # type: ignore[arg-type]
    assert [m.sampler for m in found] == ["renoise", "ddim", "renoise", "renoise"]
    assert [list(m.path_times) for m in found] == [[], list(PATH), [], list(PATH)]


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_student_learns_the_guided_teacher_s_images(num_steps: int) -> None:
    """Through the engine, from pairs alone; the teacher's mean and deviation, and each image of other noise."""
    data = Solved(20, 2.0)
    method, pool = Method(Config(), data.family, num_steps), data.batch(range(256))
    settings = Optim(lr=0.05, schedule="linear", betas=(0.9, 0.99), weight_decay=0.0)
    train(Engine(method, Rows(pool), {"student": settings}, batch_size=16, steps=250), range(250))
    batch = data.batch(range(10**6, 10**6 + 64))
    x0, eps, _ = batch.pairs()
    with torch.no_grad():
        found = sample_student(method.student, data.schedule, eps, method.times, batch.cond, method.sampler)
    assert x0.mean().item() == pytest.approx(0.3 + 2 * 0.7, abs=0.1)  # uncond + 2 (cond - uncond), up to DDIM's error
    assert (found - x0).abs().max() < 0.03


# Who learns


def test_only_the_student_learns_and_all_of_it() -> None:
    method = Method(Config(), conv_family(), 4)
    found = gradients_by_phase(method)  # type: ignore[arg-type]
    teacher = {name: p.clone() for name, p in conv_family().denoiser.network.state_dict().items()}
    before = states(method)
    train(Engine(method, Samples((2, 8, 8)), optims(method, lr=1e-3), batch_size=4, steps=2), range(2))
    assert set(method.networks) == {"student"}
    assert {key.partition(".")[0] for key in found["student"]} == {"student"}
    assert moved(before["student"], states(method)["student"]) == set(before["student"])
    assert same(teacher, dict(conv_family().denoiser.network.state_dict()))


def test_a_step_is_one_pass_of_the_student() -> None:
    family = conv_family()
    method, calls = Method(Config(), family, 4), {"student": 0, "teacher": 0}
    for name, network in (("student", method.student.network), ("teacher", family.denoiser.network)):
        network.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    method.student_loss(Samples((2, 8, 8)).batch(range(4)), noise())
    assert calls == {"student": 1, "teacher": 0}


def test_data_without_pairs_are_refused() -> None:
    method = Method(Config(), conv_family(), 1)
    with pytest.raises(
        ValueError, match=r"this batch holds no teacher pairs; train this method on data\.source: pairs"
    ):
        method.student_loss(Samples((2, 8, 8), images=False).batch(range(2)), noise(n=2))


def test_states_on_the_way_are_noised_x0_only_in_law() -> None:
    """The path is the teacher's own: noising x0 by the pair's noise is another state, also with an exact teacher."""
    data = Solved()
    x0, eps, path = data.batch(range(4)).pairs()
    t = torch.full((4,), 499.0, dtype=torch.float64)
    assert (add_noise(data.schedule, x0, eps, t) - path[499.0]).abs().mean() > 0.05
