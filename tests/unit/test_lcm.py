"""Latent consistency on a world with known answers, and who learns what from whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgen import lora, losses, times
from fastgen.engine import Engine
from fastgen.export import export
from fastgen.guidance import Scales, with_guidance
from fastgen.method import Batch
from fastgen.optimizers import Optim
from fastgen.pipelines import sd
from fastgen.rng import Noise
from fastgen.sampling import sample_student
from fastgen.schedule import Flow, Schedule, TabulatedVP, add_noise
from fastgen.trainers.lcm import Config, Method
from tests import tiny
from tests.oracle import (
    Gaussian,
    Map,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    labels,
    moved,
    optims,
    same,
    scaled_linear,
    sd_schedule,
    states,
    train,
)

MEANS, STD, SHAPE = (0.3, 1.0, -0.5), 0.5, (4, 4)
SLOPES = tuple(m - MEANS[0] for m in MEANS)
"""What one more of the scale adds to the guided mean m_u + scale (m_c - m_u)."""
CONV = Samples((2, 8, 8))
WIDE = Scales(1.0, 8.0, default=2.5)


def noise(step: int = 0, n: int = 4) -> Noise:
    return Noise(range(n), 0, step, "student")


def world(
    means: tuple[float, ...] = MEANS,
    slopes: tuple[float, ...] = SLOPES,
    std: float = STD,
    schedule: Schedule | None = None,
    num_steps: int = 1,
    **options: object,
) -> Method:
    """An exact teacher and a student that is the consistency map of N(means + slopes (scale - 1), std^2)."""
    schedule = schedule or sd_schedule()
    kind = "flow" if isinstance(schedule, Flow) else "v"

    def student(embed_guidance: bool = False) -> nn.Module:
        wide = embed_guidance * len(means)
        return Map((*means, *slopes[:wide]), (std,) * len(means) + (1.0,) * wide, schedule, kind)

    family = gaussian_family(MEANS, (STD,) * 3, schedule, kind, SHAPE, student)
    return Method(Config(**{"guidance": WIDE, **options}), family, num_steps)  # type: ignore[arg-type]


def conv_method(num_steps: int = 1, **options: object) -> Method:
    return Method(Config(**options), conv_family(), num_steps)  # type: ignore[arg-type]


def by_hand(method: Method, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x and y of a batch of "left" from the closed forms, and dx/dmean; shift: added to the teacher's scale."""
    schedule, n = method.teacher.schedule, 64
    batch, rng = data().batch(range(n)), noise(n=n)
    assert batch.x0 is not None
    i = (rng.uniform() * (len(method.grid) - 1)).long()
    t, r = torch.tensor(method.grid)[i], torch.tensor(method.grid)[i + 1]
    scale = (1 + 7 * rng.uniform()).float()[:, None, None]
    x_t, at, to = add_noise(schedule, batch.x0, rng.normal(SHAPE), t), schedule(t), schedule(r)
    at, to = at.like(x_t), to.like(x_t)
    guided = Gaussian(MEANS[0] + (scale + shift) * (MEANS[1] - MEANS[0]), STD)  # type: ignore[arg-type]
    x_r = to.alpha * guided.x0(x_t, at) + to.sigma * guided.eps(x_t, at)
    own = Gaussian(0.8 + 0.5 * (scale - 1), 0.7)  # type: ignore[arg-type]
    y = torch.where((r == schedule.t_min)[:, None, None], x_r, own.consistency(x_r, to))
    return own.consistency(x_t, at), y, 1 - 0.7 * at.alpha / own.variance(at).sqrt()


def data() -> Samples:
    return Samples(SHAPE, captions=("left",))


# The loss


@pytest.mark.parametrize("num_steps", [1, 4])
def test_loss_and_gradient_are_those_of_the_closed_forms(num_steps: int) -> None:
    method = world((0.0, 0.8, 0.0), (0.0, 0.5, 0.0), 0.7, num_steps=num_steps)
    x, y, slope = by_hand(method)
    found = method.loss(data().batch(range(64)), noise(n=64))["consistency"]
    expected = (((x - y).square() + 1e-6).sqrt() - 1e-3).flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.mean(), [method.student.network.mean])
    wanted = (slope * (x - y) / ((x - y).square() + 1e-6).sqrt()).mean()
    assert gradient[1].item() == pytest.approx(wanted.item(), rel=1e-2, abs=1e-4)
    assert gradient[[0, 2, 3, 5]].abs().max() == 0
    assert gradient[4].item() != 0  # the scale's part learns as well


def test_with_l2_it_is_the_mean_square() -> None:
    method = world((0.0, 0.8, 0.0), (0.0, 0.5, 0.0), 0.7, metric="l2")
    x, y, _ = by_hand(method)
    found = method.loss(data().batch(range(64)), noise(n=64))["consistency"]
    torch.testing.assert_close(found, (x - y).square().flatten(1).mean(1), rtol=1e-3, atol=1e-4)


def test_the_scale_is_not_the_paper_s_w() -> None:
    """Off by one, as where w = scale - 1 is taken for the scale, the loss is another."""
    method = world((0.0, 0.8, 0.0), (0.0, 0.5, 0.0), 0.7)
    found = method.loss(data().batch(range(64)), noise(n=64))["consistency"]
    for shift in (-1.0, 1.0):
        x, y, _ = by_hand(method, shift)
        assert (found - losses.huber(x, y, 1e-3)).abs().max() > 0.01


def test_the_true_map_s_loss_falls_as_the_square_of_the_solver_s_step() -> None:
    """Euler's local error: a quarter for half the step. A wrong map's does not vanish."""
    batch = data().batch(range(256))
    rms = {}
    for steps in (20, 40, 80):
        method = world(solver_steps=steps, metric="l2")
        rms[steps] = method.loss(batch, noise(n=256))["consistency"].mean().sqrt().item()
    assert rms[20] / rms[40] == pytest.approx(4, rel=0.35)
    assert rms[40] / rms[80] == pytest.approx(4, rel=0.35)
    off = world(slopes=(0.0, 0.5, -0.8), solver_steps=80, metric="l2").loss(batch, noise(n=256))
    assert off["consistency"].mean().sqrt() > 3 * rms[80]


def test_at_the_grid_s_end_the_target_is_the_teacher_s_step_itself() -> None:
    """The boundary condition, which a student that forgets it has no other hold on."""
    batch = data().batch(range(400))
    one, two = world(), world()
    with torch.no_grad():
        two.target.denoiser.network.mean += 100  # all but the boundary is lost
    terms = [m.loss(batch, noise(n=400))["consistency"] for m in (one, two)]
    t, _ = times.on_grid(noise(n=400), one.grid)
    assert 0 < (t == 19).sum() < 30
    assert torch.equal(terms[0][t == 19], terms[1][t == 19])
    assert (terms[1] - terms[0])[t != 19].min() > 0.01


def test_without_guidance_it_is_the_unguided_loss_at_half_the_teacher_s_cost() -> None:
    """Scales that are all 1 give what no guidance gives, drawn or not; where all are, the second pass is saved."""
    batch, rows = CONV.batch(range(4)), []
    drawn = conv_method(guidance=WIDE)
    plain = conv_method(guidance=Scales(1.0, 1.0, embed=False))
    plain.teacher.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    drawn.config = replace(drawn.config, guidance=replace(WIDE, low=1.0, high=1.0 + 1e-12, default=1.0))
    one, two = (m.loss(batch, noise())["consistency"] for m in (drawn, plain))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert rows == [4]
    guided = conv_method(guidance=WIDE).loss(batch, noise())["consistency"]
    assert (guided - two).abs().max() > 1e-4


def test_huber_is_square_below_c_and_the_distance_above() -> None:
    x = torch.tensor([[3e-6, 0.0], [4.0, -2.0]], dtype=torch.float64)
    found = losses.huber(x, torch.zeros_like(x), 1e-3)
    assert found.tolist() == pytest.approx([(3e-6) ** 2 / 2e-3 / 2, 3.0 - 1e-3], rel=1e-3)


# The grid


@pytest.mark.parametrize(("steps", "skip"), [(50, 20), (40, 25), (20, 50), (1, 1000)])
def test_for_one_step_the_grid_is_the_paper_s(steps: int, skip: int) -> None:
    """Every k-th time down from the last, and 0: the skipping step."""
    assert times.solver_grid(sd_schedule(), [999.0], steps) == [*range(999, 0, -skip), 0]


@pytest.mark.parametrize("num_steps", range(1, 9))
@pytest.mark.parametrize("steps", [20, 50])
def test_the_student_s_own_times_are_on_the_grid(num_steps: int, steps: int) -> None:
    own = [1000 // num_steps * (num_steps - i) - 1.0 for i in range(num_steps)]  # LCMScheduler's
    grid = times.solver_grid(sd_schedule(), own, steps)
    assert set(own) <= set(grid)
    assert steps <= len(grid) - 1 < steps + num_steps
    assert grid[-1] == 0


def test_on_rectified_flow_the_grid_is_even_and_ends_on_clean_data() -> None:
    grid = times.solver_grid(Flow(), [1.0, 0.5], 4)
    assert grid == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_more_solver_steps_than_times_are_refused() -> None:
    with pytest.raises(ValueError, match="solver_steps 12 is more than the schedule has times for; lower it"):
        times.solver_grid(TabulatedVP(scaled_linear(10)), [9.0, 4.0], 12)


def test_a_student_that_starts_below_pure_noise_is_refused() -> None:
    """It would be fed pure noise where it was trained on noised images."""
    with pytest.raises(ValueError, match=r"meets pure noise at time 999, not 399; set student\.start 1"):
        Method(Config(), gaussian_family(start=0.4), 1)


def test_student_and_target_are_called_at_neighbours_of_the_grid_and_at_one_scale() -> None:
    seen: dict[str, list[tuple[Tensor, ...]]] = {"teacher": [], "student": [], "target": []}
    method = conv_method(4, guidance=WIDE)
    for role, calls in seen.items():
        method.networks[role].register_forward_pre_hook(lambda _, args, to=calls: to.append(args))
    method.loss(CONV.batch(range(64)), noise(n=64))
    assert {role: [len(args[0]) for args in calls] for role, calls in seen.items()} == {
        "teacher": [128],  # guided: once for each caption and once for the empty one
        "student": [64],
        "target": [64],
    }
    (x_t, t, label), (_, r, other) = seen["student"][0], seen["target"][0]
    steps = {method.grid[i]: method.grid[i + 1] for i in range(len(method.grid) - 1)}
    assert [steps[v] for v in t.tolist()] == r.tolist()
    assert len(set(t.tolist())) > 20
    assert torch.equal(label, other)
    assert torch.equal(seen["teacher"][0][0][:64], x_t)
    scales = 1 + label[:, 3:].sum(1)
    assert 1 <= scales.min() < scales.max() < 8
    assert len(set(scales.tolist())) == 64


# Who learns


def test_only_the_student_gets_gradients_and_the_target_follows_it() -> None:
    method = conv_method(target_decay=0.9, guidance=WIDE)
    found, before = gradients_by_phase(method), states(method)  # type: ignore[arg-type]
    train(Engine(method, CONV, optims(method, lr=1e-2), batch_size=2, steps=1), range(1))
    after = states(method)
    assert found == {"student": {f"student.{name}" for name in before["student"]}}
    assert moved(before["student"], after["student"]) == set(before["student"])
    assert same(before["teacher"], after["teacher"])
    for name, value in after["target"].items():
        expected = 0.9 * before["target"][name] + 0.1 * after["student"][name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    assert method.phases[0].moves == ["target"]


def test_without_decay_the_target_is_the_student_itself_without_gradient() -> None:
    """Its gradient is that of a frozen copy."""
    batch = CONV.batch(range(4))
    own, copied = conv_method(target_decay=0.0), conv_method(target_decay=0.95)
    assert set(own.networks) == {"teacher", "student"}
    assert own.phases[0].moves == []
    one, two = (
        torch.autograd.grad(m.loss(batch, noise())["consistency"].sum(), list(m.student.network.parameters()))
        for m in (own, copied)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_student_without_the_scale_as_input_is_the_family_s_plain_one() -> None:
    method = conv_method(guidance=Scales(2.0, 4.0, embed=False))
    assert method.student_guidance is None
    assert method.networks["student"].label.in_features == 3
    assert conv_method(guidance=WIDE).student_guidance == 2.5
    assert conv_method(guidance=WIDE).networks["student"].label.in_features == 6


@pytest.mark.parametrize("share_backbone", [False, True])
@pytest.mark.parametrize(
    ("scales", "decay"), [(WIDE, 0.95), (Scales(2.0, 4.0, embed=False), 0.0)], ids=["embedded", "lcm-lora"]
)
def test_it_trains_adapters(scales: Scales, decay: float, share_backbone: bool, tmp_path: Path) -> None:
    """LCM-LoRA, and adapters that take the scale: what is exported is what the sampler gives, and not the teacher."""
    torch.manual_seed(0)
    family = lora.adapted(sd.wrap(tiny.pipeline("v_prediction")), lora.Lora(rank=2), share_backbone)
    method = Method(Config(guidance=scales, target_decay=decay), family, 2)
    batch = replace(Samples((4, 8, 8)).batch(range(2)), cond=family.encode_prompts(["a dog", "a cat"]))
    batch = replace(batch, uncond=family.uncond())
    before = states(method)
    train(Engine(method, Same(batch), optims(method, lr=1e-2), batch_size=2, steps=2), range(2))
    assert moved(before["student"], states(method)["student"])
    assert same(before["teacher"], states(method)["teacher"])
    assert ("target" in method.networks) == (decay > 0)
    call = {"prompts": ["a dog"], "card": {}, "guidance_scale": method.student_guidance}
    export(family, method.networks["student"], 2, tmp_path / "pipeline", **call)  # type: ignore[arg-type]


class Same:
    """Data that are always the same batch."""

    def __init__(self, whole: Batch) -> None:
        self.whole = whole

    def batch(self, samples: Sequence[int]) -> Batch:
        return self.whole


def test_images_are_needed() -> None:
    method = conv_method()
    assert method.needs_images
    with pytest.raises(ValueError, match="lcm needs images; this data source has prompts only"):
        method.loss(replace(CONV.batch(range(2)), x0=None), noise(n=2))


# End to end


def test_the_student_takes_on_the_guided_means_at_each_scale_and_the_deviation() -> None:
    """From the map of N(0, 1) at every scale, by the engine; 20 DDIM steps themselves make the deviation 0.44."""
    method = world((0.0,) * 3, (0.0,) * 3, 1.0, num_steps=2, solver_steps=20, target_decay=0.3)
    settings = Optim(lr=0.1, schedule="linear", betas=(0.5, 0.99), weight_decay=0.0)
    train(Engine(method, Samples(SHAPE), {"student": settings}, batch_size=16, steps=450), range(450))
    g, n = torch.Generator().manual_seed(1), 500
    for caption, mean in (("left", 1.0), ("right", -0.5)):
        for scale in (1.0, 3.0):
            x_t = torch.randn(n, *SHAPE, generator=g)
            cond = with_guidance(labels([caption] * n), scale)
            fresh = lambda: torch.randn(n, *SHAPE, generator=g)  # noqa: E731
            with torch.no_grad():
                x0 = sample_student(method.student, sd_schedule(), x_t, [999.0, 499.0], cond, "renoise", fresh)
            assert x0.mean().item() == pytest.approx(0.3 + scale * (mean - 0.3), abs=0.1)
            assert x0.std().item() == pytest.approx(0.47, abs=0.05)
