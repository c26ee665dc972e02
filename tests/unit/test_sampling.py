"""Samplers: each step equal to Diffusers' own, and their errors on a world with known answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from fastgen.denoiser import Cond
from fastgen.prediction import Kind, Prediction, combine
from fastgen.sampling import ddim, ddim_times, renoise, sample
from fastgen.schedule import Flow, Schedule, TabulatedVP
from tests.oracle import Gaussian, schedules, sd_schedule

TYPES: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
WORLD = Gaussian(0.3, 0.5)
NO_COND: Cond = {}


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, y, eps: [3, 2, 4, 4] float64."""
    g = torch.Generator().manual_seed(seed)
    x_t, y, eps = (torch.randn(3, 2, 4, 4, generator=g).double() for _ in range(3))
    return x_t, y, eps


def prediction(schedule: Schedule, x_t: Tensor, y: Tensor, kind: Kind, t: float) -> Prediction:
    return Prediction(y, kind, x_t, schedule(times(x_t, t)).like(x_t))


def times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)


def none() -> Tensor:
    raise AssertionError("a deterministic step drew noise")


class Exact:
    """A denoiser from a function of (x_t, level) that gives x0; keeps what it was called on."""

    def __init__(self, schedule: Schedule, x0: object) -> None:
        self.schedule, self.x0, self.seen = schedule, x0, []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.seen.append((x_t, t))
        at = self.schedule(t).like(x_t)
        x0 = self.x0(x_t, at)
        # as flow: the only kind that gives x0 back where alpha is 0 and eps where sigma is
        return Prediction(combine("flow", x0, (x_t - at.alpha * x0) / at.sigma, at), "flow", x_t, at)


# Against Diffusers


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 25])
def test_ddim_equals_diffusers_at_every_step(name: str, num_steps: int) -> None:
    reference = DDIMScheduler(**SD, prediction_type=name, timestep_spacing="trailing")
    reference.set_timesteps(num_steps)
    schedule = TabulatedVP(reference.alphas_cumprod)
    x_t, y, _ = tensors()
    grid = ddim_times(schedule, num_steps)
    for t, r in zip(grid, [*grid[1:], None], strict=True):
        ours = prediction(schedule, x_t, y, TYPES[name], t)
        theirs = reference.step(y, int(t), x_t, eta=0.0).prev_sample
        x_r = ours.x0 if r is None else ddim(ours, times(x_t, r), schedule, none)
        torch.testing.assert_close(x_r, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_renoise_equals_lcm_at_every_step(name: str, num_steps: int) -> None:
    """Up to LCM's boundary scalings, which a large timestep_scaling removes."""
    config = {**SD, "prediction_type": name, "original_inference_steps": num_steps, "timestep_scaling": 1e4}
    reference = LCMScheduler(**config)
    reference.set_timesteps(num_steps)
    schedule = TabulatedVP(reference.alphas_cumprod)
    x_t, y, _ = tensors()
    grid = [float(t) for t in reference.timesteps]
    for t, r in zip(grid, [*grid[1:], None], strict=True):
        ours = prediction(schedule, x_t, y, TYPES[name], t)
        torch.manual_seed(7)
        theirs = reference.step(y, int(t), x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        fresh = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x_r = ours.x0 if r is None else renoise(ours, times(x_t, r), schedule, lambda eps=fresh: eps)
        torch.testing.assert_close(x_r, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10])
def test_ddim_on_flow_equals_the_euler_step_of_flow_matching(num_steps: int) -> None:
    reference = FlowMatchEulerDiscreteScheduler()
    reference.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)])
    x_t, y, _ = tensors()
    grid = ddim_times(Flow(), num_steps)
    assert grid == pytest.approx(reference.sigmas[:-1].tolist())
    for i, (t, r) in enumerate(zip(grid, [*grid[1:], None], strict=True)):
        ours = prediction(Flow(), x_t, y, "flow", t)
        theirs = reference.step(y, reference.timesteps[i], x_t).prev_sample
        x_r = ours.x0 if r is None else ddim(ours, times(x_t, r), Flow(), none)
        torch.testing.assert_close(x_r, theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 7, 8, 25, 30, 50, 60, 1000])
def test_ddim_times_are_the_trailing_timesteps_of_diffusers(num_steps: int) -> None:
    reference = DDIMScheduler(**SD, timestep_spacing="trailing")
    reference.set_timesteps(num_steps)
    assert ddim_times(sd_schedule(), num_steps) == reference.timesteps.tolist()


@pytest.mark.parametrize("num_steps", [1, 3, 7, 12, 30, 60])
def test_ddim_times_start_at_pure_noise_and_fall(num_steps: int) -> None:
    for schedule in schedules():
        grid = ddim_times(schedule, num_steps)
        assert len(grid) == num_steps
        assert grid[0] == schedule.t_max
        assert all(a > b for a, b in itertools.pairwise(grid))
        assert grid[-1] >= schedule.t_min


# The loop


def test_one_step_returns_the_predicted_x0() -> None:
    denoiser = Exact(sd_schedule(), lambda x_t, at: x_t * 0 + 2)
    x_t, _, _ = tensors()
    x0 = sample(denoiser, denoiser.schedule, x_t, [999], NO_COND, renoise, none)
    torch.testing.assert_close(x0, torch.full_like(x_t, 2))


def test_the_denoiser_is_called_once_at_each_time() -> None:
    denoiser = Exact(sd_schedule(), WORLD.consistency)
    x_t, _, eps = tensors()
    sample(denoiser, denoiser.schedule, x_t, [999, 749, 499, 249], NO_COND, renoise, lambda: eps)
    assert [t.tolist() for _, t in denoiser.seen] == [[999] * 3, [749] * 3, [499] * 3, [249] * 3]
    assert torch.equal(denoiser.seen[0][0], x_t)


def test_without_a_source_of_noise_the_global_generator_serves() -> None:
    denoiser = Exact(sd_schedule(), WORLD.consistency)
    x_t, _, _ = tensors()
    torch.manual_seed(3)
    ours = sample(denoiser, denoiser.schedule, x_t, [999, 499], NO_COND)
    torch.manual_seed(3)
    noises = [torch.randn_like(x_t)]
    assert torch.equal(ours, sample(denoiser, denoiser.schedule, x_t, [999, 499], NO_COND, eps=noises.pop))


@pytest.mark.parametrize("grid", [[], [499, 999], [999, 999], [999, 499, 499]])
def test_times_that_do_not_fall_are_refused(grid: list[float]) -> None:
    x_t, _, _ = tensors()
    with pytest.raises(ValueError, match="times must be a falling list with at least one entry, got"):
        sample(Exact(sd_schedule(), WORLD.x0), sd_schedule(), x_t, grid, NO_COND)


# On the Gaussian


@pytest.mark.parametrize("schedule", schedules())
def test_twice_the_steps_halve_the_error_of_ddim(schedule: Schedule) -> None:
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    start = schedule(times(x_t, schedule.t_max)).like(x_t)
    exact = WORLD.consistency(x_t, start)
    errors = []
    for num_steps in (50, 100, 200):
        grid = ddim_times(schedule, num_steps)
        x0 = sample(Exact(schedule, WORLD.x0), schedule, x_t, grid, NO_COND, ddim, none)
        errors.append((x0 - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_few_steps_of_the_teacher_shrink_the_deviation_as_known() -> None:
    """The trailing DDIM of an exact teacher of std 0.5 gives .017, .143, .272, .364, .446 and .470 at these steps."""
    schedule = sd_schedule()
    x_t = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    stds = []
    for num_steps in (1, 2, 4, 8, 25, 50):
        grid = ddim_times(schedule, num_steps)
        low, high = sample(Exact(schedule, WORLD.x0), schedule, x_t, grid, NO_COND, ddim, none).flatten().tolist()
        stds.append((high - low) / 2)
    assert stds == pytest.approx([0.017, 0.143, 0.272, 0.364, 0.446, 0.470], abs=1e-3)


@pytest.mark.parametrize("grid", [[999], [999, 499], [999, 749, 499, 249], [999, 100, 20]])
def test_renoising_an_exact_consistency_map_gives_the_data(grid: list[float]) -> None:
    schedule, n = sd_schedule(), 100_000
    g = torch.Generator().manual_seed(0)
    noises = iter(torch.randn(len(grid) + 1, n, 1, generator=g, dtype=torch.float64))
    start = schedule(times(torch.zeros(1, 1), 999.0)).like(torch.zeros(1, 1, dtype=torch.float64))
    x_t = start.alpha * WORLD.mean + WORLD.variance(start).sqrt() * next(noises)
    x0 = sample(Exact(schedule, WORLD.consistency), schedule, x_t, grid, NO_COND, renoise, lambda: next(noises))
    assert x0.mean().item() == pytest.approx(WORLD.mean, abs=5 * WORLD.std / n**0.5)
    assert x0.std().item() == pytest.approx(WORLD.std, abs=5 * WORLD.std / (2 * n) ** 0.5)


def test_a_consistency_map_sampled_deterministically_is_wrong() -> None:
    """Why the sampler is part of what a student is: DDIM with the same perfect map widens the data."""
    schedule = sd_schedule()
    x_t = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    x0 = sample(Exact(schedule, WORLD.consistency), schedule, x_t, [999, 749, 499, 249], NO_COND, ddim, none)
    assert x0.diff(dim=0).abs().item() / 2 > 1.3 * WORLD.std


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_an_earlier_start_is_the_same_grid_on_the_first_part_of_the_times(num_steps: int) -> None:
    reference = DDIMScheduler(num_train_timesteps=400, timestep_spacing="trailing")
    reference.set_timesteps(num_steps)
    assert ddim_times(sd_schedule(), num_steps, 0.4) == reference.timesteps.tolist()
    assert ddim_times(Flow(), num_steps, 0.4) == pytest.approx([0.4 * t for t in ddim_times(Flow(), num_steps)])
