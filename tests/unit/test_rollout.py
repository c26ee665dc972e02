"""What the student is called on in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgen.denoiser import Cond, Denoiser
from fastgen.prediction import Prediction
from fastgen.rng import Noise
from fastgen.rollout import backward_simulation, from_data, from_noise, inputs, needs_images
from fastgen.sampling import renoise, sample
from fastgen.schedule import add_noise
from tests.oracle import Affine, call, labels, sd_schedule

TIMES = [999.0, 749.0, 499.0, 249.0]
SHAPE = (2, 3)


def student() -> Denoiser:
    schedule = sd_schedule()
    network = Affine(schedule, "v", 0.2, 0.7)
    with torch.no_grad():
        network.scale += torch.arange(4.0)[:, None] / 10  # each time has its own
    return Denoiser(network, schedule, "v", call)


def noise(step: int, samples: range = range(4)) -> Noise:
    return Noise(samples, 0, step, "student")


def cond(n: int = 4) -> Cond:
    return labels(["left", "right", "", "left"][:n])


def depth(t: Tensor) -> int:
    assert (t == t[0]).all()
    return TIMES.index(t[0].item())


def test_backward_simulation_sees_what_the_sampler_sees_bit_for_bit() -> None:
    found = set()
    for step in range(24):
        x_in, t = backward_simulation(student(), noise(step), SHAPE, TIMES, cond())
        k = depth(t)
        found.add(k)

        inputs = []
        denoiser = student()

        def recorded(
            x_t: Tensor, t: Tensor, cond: Cond, denoiser: Denoiser = denoiser, to: list = inputs
        ) -> Prediction:
            to.append(x_t)
            return denoiser(x_t, t, cond)

        rng = noise(step)
        assert rng.shared_integer(4) == k
        with torch.no_grad():
            sample(
                recorded,
                denoiser.schedule,
                rng.normal(SHAPE),
                TIMES,
                cond(),
                renoise,
                lambda rng=rng: rng.normal(SHAPE),
            )
        assert torch.equal(x_in, inputs[k])
    assert found == {0, 1, 2, 3}


def test_backward_simulation_carries_no_gradient() -> None:
    for step in range(8):
        x_in, _ = backward_simulation(student(), noise(step), SHAPE, TIMES, cond())
        assert not x_in.requires_grad


def test_backward_simulation_of_a_part_of_the_batch_is_that_part() -> None:
    for step in range(8):
        whole, t = backward_simulation(student(), noise(step), SHAPE, TIMES, cond())
        part, s = backward_simulation(student(), noise(step, range(2)), SHAPE, TIMES, cond(2))
        assert torch.equal(part, whole[:2])
        assert torch.equal(s, t[:2])


def test_a_one_step_student_is_always_called_on_pure_noise() -> None:
    for step in range(4):
        x_in, t = backward_simulation(student(), noise(step), SHAPE, [999.0], cond())
        rng = noise(step)
        rng.shared_integer(1)
        assert torch.equal(x_in, rng.normal(SHAPE))
        assert t.tolist() == [999] * 4


def test_the_time_is_one_of_the_times_and_shared_by_every_micro_batch() -> None:
    for step in range(16):
        depths = {
            depth(backward_simulation(student(), noise(step, samples), SHAPE, TIMES, cond(len(samples)))[1])
            for samples in (range(4), range(2), range(2, 4), range(3, 4))
        }
        assert len(depths) == 1


def test_from_noise_is_pure_noise_at_the_first_time() -> None:
    x_in, t = from_noise(noise(0), SHAPE, TIMES)
    assert torch.equal(x_in, noise(0).normal(SHAPE))
    assert t.tolist() == [999] * 4


@pytest.mark.parametrize("step", range(12))
def test_from_data_noises_real_data_and_the_first_time_takes_pure_noise(step: int) -> None:
    x0 = torch.full((4, *SHAPE), 5.0)
    x_in, t = from_data(student(), noise(step), x0, TIMES)
    rng = noise(step)
    assert rng.shared_integer(4) == depth(t)
    eps = rng.normal(SHAPE)
    assert torch.equal(x_in, eps if depth(t) == 0 else add_noise(student().schedule, x0, eps, t))


def test_a_rollout_is_chosen_by_name() -> None:
    x0 = torch.full((4, *SHAPE), 5.0)
    for step in range(8):
        chain = backward_simulation(student(), noise(step), SHAPE, TIMES, cond())
        data = from_data(student(), noise(step), x0, TIMES)
        pure = from_noise(noise(step), SHAPE, TIMES)
        for name, expected in (("simulate", chain), ("data", data), ("noise", pure)):
            found = inputs(name, student(), noise(step), SHAPE, TIMES, cond(), x0)  # type: ignore[arg-type]
            assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_a_single_call_needs_no_images_and_pure_noise_trains_no_more_than_one() -> None:
    assert [needs_images(name, 1) for name in ("simulate", "data", "noise")] == [False] * 3
    assert [needs_images(name, 4) for name in ("simulate", "data")] == [False, True]
    message = "rollout noise trains only the first of 4 calls; choose simulate or data, or student.steps 1"
    with pytest.raises(ValueError, match=message):
        needs_images("noise", 4)
    x_in, t = inputs("data", student(), noise(0), SHAPE, TIMES[:1], cond())
    assert torch.equal(x_in, backward_simulation(student(), noise(0), SHAPE, TIMES[:1], cond())[0])
    assert t.tolist() == [999] * 4
