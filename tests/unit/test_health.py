"""The health monitor: what it measures, in closed form; when it warns and what it says; that it changes nothing."""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import config, health, losses
from fastgen.config import ConfigError
from fastgen.denoiser import Denoiser
from fastgen.engine import Engine
from fastgen.experts import Experts
from fastgen.health import Health, Look, Monitor, Onset
from fastgen.method import Batch, Phase, Terms
from fastgen.rng import Noise
from fastgen.schedule import add_noise
from tests.golden import record
from tests.oracle import (
    CAPTIONS,
    Gaussian,
    Gaussians,
    Samples,
    Toy,
    call,
    conv_family,
    optims,
    same,
    sd_schedule,
    states,
    train,
)

METHODS = record.methods()
CASES = [(name, variant) for name in METHODS for variant in record.variants(name)]


def plain(*colours: tuple[int, int, int], side: int = 4) -> Tensor:
    """Images of one colour each: uint8 [S, 3, side, side]."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, side, side)


# Images


def test_diversity_is_the_mean_distance_of_the_pairs() -> None:
    """Of greys 0, 51 and 204 the distances are 0.2, 0.8 and 0.6."""
    images = plain((0, 0, 0), (51, 51, 51), (204, 204, 204))
    assert float(health.diversity(images)) == pytest.approx((0.2 + 0.8 + 0.6) / 3, rel=1e-12)
    assert float(health.diversity(images[[2, 0, 1]])) == pytest.approx(float(health.diversity(images)), rel=1e-12)
    assert float(health.diversity(images[[1, 1, 1]])) == 0


def test_a_distance_is_a_root_mean_square_over_pixels_and_colours() -> None:
    images = plain((0, 0, 0), (0, 0, 0)).clone()
    images[1, 0, :2] = 255  # half of one colour of three
    assert float(health.diversity(images)) == pytest.approx(math.sqrt(1 / 6), rel=1e-12)


def test_saturation_is_that_of_hsv() -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 5, 7), generator=g, dtype=torch.uint8)
    images[0, :, 0, 0] = 0  # black has none
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    expected = sum(colorsys.rgb_to_hsv(*(value / 255 for value in pixel))[1] for pixel in pixels) / len(pixels)
    assert float(health.saturation(images)) == pytest.approx(expected, rel=1e-12)
    assert float(health.saturation(plain((9, 9, 9), (0, 0, 0)))) == 0
    assert float(health.saturation(plain((255, 0, 0), (100, 50, 50)))) == pytest.approx(0.75)


def test_contrast_is_the_deviation_of_the_luma_within_an_image() -> None:
    images = plain((0, 0, 0), (255, 255, 255)).clone()
    assert float(health.contrast(images)) == pytest.approx(0, abs=1e-12)  # between images it is no contrast
    images[0, :, :2] = 204  # half at 0.8
    assert float(health.contrast(images)) == pytest.approx(0.4 / 2, rel=1e-12)
    images[1, 1, 1:] = 0  # three quarters lack their green
    assert float(health.contrast(images)) == pytest.approx((0.4 + 0.7152 * math.sqrt(3) / 4) / 2, rel=1e-12)


def test_clipped_is_the_share_of_values_at_either_end() -> None:
    assert float(health.clipped(plain((0, 128, 255), (1, 254, 128)))) == pytest.approx(2 / 6)


def test_a_look_is_the_mean_over_prompts() -> None:
    one, two = plain((0, 0, 0), (51, 51, 51)), plain((255, 0, 0), (255, 0, 0))
    found = health.look([one, two])
    assert found == Look(pytest.approx(0.1), pytest.approx(0.5), pytest.approx(0, abs=1e-12), pytest.approx(0.75))


def test_a_student_is_seen_against_its_teacher() -> None:
    found = health.against(Look(0.1, 0.3, 0.2, 0.5), Look(0.25, 0.2, 0.2, 0.1))
    assert found == pytest.approx({"diversity": 0.4, "saturation": 1.5, "contrast": 1.0, "clipped": 0.4})


def test_where_the_teacher_has_nothing_there_is_no_ratio() -> None:
    found = health.against(Look(0.1, 0.3, 0.2, 0.5), Look(0.25, 0.0, 0.2, 0.1))
    assert math.isnan(found["saturation"])
    assert Monitor(Health(patience=1, warmup=0), 10).observe(5, {"health/saturation": found["saturation"]}) == []


def test_the_teacher_s_look_is_kept_for_the_same_images_only(tmp_path: Path) -> None:
    file, made_of, seen = tmp_path / health.FILE, {"prompts": ["a"], "seeds": 4}, Look(0.1, 0.2, 0.3, 0.4)
    assert health.known_look(file, made_of) is None
    health.keep_look(file, made_of, seen)
    assert health.known_look(file, made_of) == seen
    assert json.loads(file.read_text())["teacher"]["contrast"] == 0.3
    assert health.known_look(file, made_of | {"seeds": 3}) is None
    file.write_text(file.read_text()[:-20])
    assert health.known_look(file, made_of) is None


# The critic

SHAPE = (4, 64, 64)
T = 500.0


def score(mean: float, std: float) -> Gaussians:
    """The exact eps network of this Gaussian under every caption."""
    return Gaussians([mean] * len(CAPTIONS), [std] * len(CAPTIONS), sd_schedule(), "eps")


def error(seen: Gaussian, believed: Gaussian) -> float:
    """E |eps - E[eps | x_t]|^2 at T of who believes in one Gaussian and sees samples of another, per coordinate."""
    at = sd_schedule()(torch.tensor([T], dtype=torch.float64))
    alpha, sigma, variance = float(at.alpha), float(at.sigma), float(believed.variance(at))
    off = seen.std**2 + (seen.mean - believed.mean) ** 2
    return (1 - sigma**2 / variance) ** 2 + (alpha * sigma / variance) ** 2 * off


def critic(fake: nn.Module, teacher: nn.Module, student: Gaussian) -> Toy:
    """A phase in which the fake score learns from the student's samples, all at T."""

    def loss(batch: Batch, rng: Noise) -> Terms:
        x0 = student.mean + student.std * rng.normal(SHAPE)
        t, eps = torch.full((len(x0),), T, dtype=torch.float64), rng.normal(SHAPE)
        members = list(fake) if isinstance(fake, nn.ModuleList) and not isinstance(fake, Experts) else [fake]
        terms = {}
        for k, network in enumerate(members):
            denoiser = Denoiser(network, sd_schedule(), "eps", call)
            pred = denoiser(add_noise(sd_schedule(), x0, eps, t), t, batch.cond)
            terms[f"denoising_{k}" if k else "denoising"] = losses.denoising(pred, x0, eps)
        return terms

    return Toy({"teacher": teacher, "fake_score": fake}, (Phase("critic", ["fake_score"], loss),))


def engine(method: Any, **settings: Any) -> Engine:
    given = {"batch_size": 4, "steps": 8} | settings
    return Engine(method, Samples((2, 8, 8)), optims(method, lr=1e-3), **given)


TEACHER, STUDENT = Gaussian(0.3, 0.5), Gaussian(-0.4, 0.2)


@pytest.mark.parametrize("believed", [STUDENT, TEACHER, Gaussian(0.3, 0.1), Gaussian(1.0, 0.4)])
def test_the_critic_s_lag_is_its_error_over_the_teacher_s(believed: Gaussian) -> None:
    """An exact one is below 1, one that is still the teacher at 1, one that is far off above."""
    method = critic(score(believed.mean, believed.std), score(TEACHER.mean, TEACHER.std), STUDENT)
    found = health.of_losses(engine(method), 3)
    assert found.keys() == {"critic_lag"}
    assert found["critic_lag"] == pytest.approx(error(STUDENT, believed) / error(STUDENT, TEACHER), rel=0.02)
    assert (found["critic_lag"] < 0.9) == (believed == STUDENT)


def test_a_critic_that_is_the_teacher_is_at_exactly_one() -> None:
    method = critic(score(0.3, 0.5), score(0.3, 0.5), STUDENT)
    assert health.of_losses(engine(method), 0) == {"critic_lag": 1.0}


def test_of_several_fake_scores_the_errors_are_added() -> None:
    fakes = [STUDENT, Gaussian(1.0, 0.4)]
    method = critic(nn.ModuleList(score(f.mean, f.std) for f in fakes), score(0.3, 0.5), STUDENT)
    expected = sum(error(STUDENT, f) for f in fakes) / 2 / error(STUDENT, TEACHER)
    assert health.of_losses(engine(method), 0)["critic_lag"] == pytest.approx(expected, rel=0.02)


def test_an_expert_is_answered_for_by_the_teacher_s_own() -> None:
    other = Gaussian(2.0, 0.5)  # of the times below 500, which are not asked
    fake = Experts([score(STUDENT.mean, STUDENT.std), score(other.mean, other.std)], [999.0, T - 1])
    teacher = Experts([score(TEACHER.mean, TEACHER.std), score(other.mean, other.std)], [999.0, T - 1])
    found = health.of_losses(engine(critic(fake, teacher, STUDENT)), 0)
    assert found["critic_lag"] == pytest.approx(error(STUDENT, STUDENT) / error(STUDENT, TEACHER), rel=0.02)


def test_afterwards_the_fake_score_answers_for_itself() -> None:
    fake, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    before = fake(x)
    with health.answering(fake, teacher):
        assert torch.equal(fake(x), teacher(x))
    assert torch.equal(fake(x), before)
    assert not fake._forward_hooks


def test_noise_and_samples_are_of_the_check_alone() -> None:
    """Another step has other numbers, the same step the same; of a large micro-batch a few samples are enough."""
    asked: list[int] = []
    method = critic(score(0.0, 0.5), score(0.3, 0.5), STUDENT)
    phase = method.phases[0]

    def loss(batch: Batch, rng: Noise) -> Terms:
        asked.append(len(batch))
        assert rng.key == (0, 3, "health/critic")
        return phase.loss(batch, rng)

    method.phases = (Phase("critic", ["fake_score"], loss),)
    made = engine(method, batch_size=12)
    assert health.of_losses(made, 3) == health.of_losses(made, 3)
    assert asked == [health.SAMPLES] * 4


# Gradients


class Weights(nn.Module):
    """Parameters that terms read."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))


def pulling(terms: Mapping[str, Mapping[str, Sequence[float]]], role: str = "student") -> Toy:
    """A phase whose terms are linear in the weights: the gradients are what is given, {term: {weight: gradient}}."""
    sizes = {name: len(gradient) for term in terms.values() for name, gradient in term.items()}
    network = Weights(**sizes)
    own = dict(network.named_parameters())

    def loss(batch: Batch, rng: Noise) -> Terms:
        one = torch.ones(len(batch))
        return {t: one * sum((own[n] * torch.tensor(g)).sum() for n, g in grads.items()) for t, grads in terms.items()}

    return Toy({role: network}, (Phase("turn", [role], loss),))


def test_a_pull_is_the_ratio_of_gradient_norms() -> None:
    made = engine(pulling({"dmd": {"a": (3.0, 4.0)}, "gan": {"a": (0.0, 0.5)}, "more": {"a": (20.0, 0.0)}}))
    assert health.of_losses(made, 0) == pytest.approx({"turn/gan_to_dmd": 0.1, "turn/more_to_dmd": 4.0})
    assert all(p.grad is None for p in made.parameters["student"].values())


def test_a_pull_is_on_the_weights_that_both_terms_reach() -> None:
    method = pulling({"dmd": {"a": (3.0,), "b": (100.0,)}, "gan": {"a": (6.0,), "c": (50.0,)}, "own": {"c": (1.0,)}})
    assert health.of_losses(engine(method), 0) == pytest.approx({"turn/gan_to_dmd": 2.0})


def test_one_term_has_nothing_to_be_held_against_and_no_gradient_is_no_number() -> None:
    assert health.of_losses(engine(pulling({"dmd": {"a": (3.0,)}})), 0) == {}
    found = health.of_losses(engine(pulling({"dmd": {"a": (0.0,)}, "gan": {"a": (1.0,)}})), 0)
    assert math.isnan(found["turn/gan_to_dmd"])


def test_a_loss_scale_cancels() -> None:
    terms = {"dmd": {"a": (3e-7,)}, "gan": {"a": (6e-7,)}}
    assert health.of_losses(engine(pulling(terms), fp16=True), 0) == pytest.approx({"turn/gan_to_dmd": 2.0})


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("dmd2", {"adversarial": record.GAN}, {"critic_lag", "critic/gan_to_denoising", "student/gan_to_dmd"}),
        ("dmd2", {}, {"critic_lag"}),
        ("dmd", {}, {"critic_lag", "both/regression_to_dmd"}),
        ("decoupled_dmd", {}, {"critic_lag", "student/ca_to_dm"}),
        ("phased_dmd", {}, {"critic_lag"}),
        ("sid", {"guidance_scale": 1.0, "fake_guidance_scale": 0.0}, {"critic_lag"}),
        ("consistency", {"adversarial": record.GAN | {"features": "teacher"}}, {"student/gan_to_consistency"}),
        ("lcm", {}, set()),
    ],
)
def test_methods_have_what_their_losses_allow(name: str, options: dict[str, Any], keys: set[str]) -> None:
    method = record.make(name, options, conv_family(), 2 if name == "phased_dmd" else 1)
    assert health.of_losses(engine(method), 0).keys() == keys


# What it leaves


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_training_is_the_same_bit_for_bit_with_checks_between_the_steps(name: str, variant: str) -> None:
    options, num_steps = record.variants(name)[variant]
    results = []
    for watched in (False, True):
        method = record.make(name, options, conv_family(), num_steps)
        made, logs = engine(method, accumulate=2), []
        for step, log in made.run(range(4)):
            logs.append(log)
            if watched:
                health.of_losses(made, step)
        results.append((logs, states(method), made.optimizers))
    (one, before, _), (two, after, _) = results
    assert one == two
    assert all(same(before[role], after[role]) for role in before)
    for role, optimizer in results[0][2].items():
        other = results[1][2][role]
        for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
            assert same(a, b)


def test_modes_buffers_generators_and_what_learns_are_as_before() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def loss(batch: Batch, rng: Noise) -> Terms:
        assert network.training
        return {"error": network(rng.normal((4,))).square().mean(1)}

    made = engine(Toy({"a": network, "b": nn.Linear(1, 1)}, (Phase("turn", ["a"], loss),)))
    network.eval()
    network[0].requires_grad_(False)
    before, state = states(made.method), torch.get_rng_state()
    health.of_losses(made, 0)
    assert all(same(before[role], found) for role, found in states(made.method).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert [p.requires_grad for p in network.parameters()] == [False] * 4
    train(made, [0])
    assert not same(before["a"], states(made.method)["a"])  # by training it does change


def test_it_is_left_so_after_an_error_too() -> None:
    def loss(batch: Batch, rng: Noise) -> Terms:
        torch.rand(3)
        raise RuntimeError("no memory")

    network = nn.Linear(4, 4)
    made = engine(Toy({"a": network}, (Phase("turn", ["a"], loss),)))
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no memory"):
        health.of_losses(made, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training


# Warnings


def course(monitor: Monitor, name: str, values: Sequence[float], every: int = 100) -> list[tuple[int, Onset]]:
    """(step, onset) of each warning over a course of values."""
    found = []
    for i, value in enumerate(values, start=1):
        found += [(i * every, onset) for onset in monitor.observe(i * every, {f"health/{name}": value})]
    return found


def test_a_collapse_is_told_once_at_its_step_with_its_numbers() -> None:
    values = [0.2, 0.6, 0.9, 0.95, 0.9, 0.8, 0.7, 0.55, 0.45, 0.4, 0.3, 0.2, 0.1]
    assert course(Monitor(Health(), 1300), "diversity", values) == [(1000, Onset("diversity", 0.4, 0.5, since=800))]


def test_health_is_not_told() -> None:
    monitor = Monitor(Health(), 1000)
    well = {"diversity": 0.93, "saturation": 1.2, "contrast": 0.9, "clipped": 0.1, "critic_lag": 0.85}
    for step in range(100, 1100, 100):
        assert monitor.observe(step, {f"health/{k}": v for k, v in well.items()} | {"fid": 400.0, "dmd": 9.9}) == []
        assert monitor.observe(step, {"health/student/gan_to_dmd": 0.5}) == []


@pytest.mark.parametrize(
    ("name", "well", "ill", "limit"),
    [
        ("diversity", 0.5, 0.499, 0.5),
        ("saturation", 1.5, 1.51, 1.5),
        ("saturation", 2 / 3, 0.66, 2 / 3),
        ("contrast", 1.5, 1.51, 1.5),
        ("contrast", 2 / 3, 0.66, 2 / 3),
        ("clipped", 0.25, 0.26, 0.25),
        ("critic_lag", 1.1, 1.11, 1.1),
        ("student/gan_to_dmd", 10.0, 10.1, 10.0),
    ],
)
def test_each_value_has_its_limits(name: str, well: float, ill: float, limit: float) -> None:
    assert course(Monitor(Health(), 1000), name, [well] * 9) == []
    expected = [(300, Onset(name, ill, pytest.approx(limit), since=100))]
    assert course(Monitor(Health(), 1000), name, [well, ill, ill, ill]) == expected


@pytest.mark.parametrize("patience", [1, 3])
def test_so_many_checks_in_a_row_are_waited_for(patience: int) -> None:
    values = [0.9, 0.4, 0.9, 0.4, 0.4, 0.9, 0.4, 0.4, 0.4]
    found = course(Monitor(Health(patience=patience), 900), "diversity", values)
    # one that came back well is told anew
    assert [(step, onset.since) for step, onset in found] == {
        1: [(200, 100), (400, 300), (700, 600)],
        3: [(900, 600)],
    }[patience]


def test_what_wavers_at_its_limit_is_told_once() -> None:
    """Only beyond the margin, at 0.525, a value is well enough for a next warning."""
    monitor = Monitor(Health(patience=1), 1000)
    found = course(monitor, "diversity", [0.9, 0.49, 0.51, 0.49, 0.52, 0.48, 0.53, 0.47])
    assert [(step, onset.since) for step, onset in found] == [(200, 100), (800, 700)]
    monitor = Monitor(Health(patience=1), 1000)
    found = course(monitor, "critic_lag", [1.0, 1.11, 1.09, 1.12, 1.06, 1.2, 1.04, 1.2])
    assert [(step, onset.since) for step, onset in found] == [(200, 100), (800, 700)]


def test_what_never_was_well_is_told_after_the_warm_up() -> None:
    """A student begins far from its teacher."""
    assert course(Monitor(Health(warmup=0.5), 1000), "diversity", [0.1] * 10) == [
        (500, Onset("diversity", 0.1, 0.5, since=None))
    ]
    risen = [0.1, 0.2, 0.4, 0.7] + [0.9] * 6
    assert course(Monitor(Health(warmup=0.5), 1000), "diversity", risen) == []
    assert (
        course(Monitor(Health(warmup=0.5), 1000), "diversity", [0.1, 0.7, 0.1, 0.1])[0][0] == 400
    )  # it had been well


def test_a_value_that_is_missing_or_not_finite_is_passed_over() -> None:
    monitor = Monitor(Health(), 400)
    assert course(monitor, "diversity", [0.9, 0.4, math.nan]) == []
    assert monitor.observe(400, {"fid": 1.0}) == []
    assert course(monitor, "diversity", [0.4]) == [(100, Onset("diversity", 0.4, 0.5, since=100))]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_resumed_run_goes_on_judging_where_it_was(cut: int) -> None:
    values = [0.3, 0.9, 0.49, 0.4, 0.3, 0.51, 0.4, 0.9, 0.2, 0.2, 0.2, 0.9]
    whole = course(Monitor(Health(), 1200), "diversity", values)
    assert [step for step, _ in whole] == [400, 1000]
    rows = [{"step": 100 * (i + 1), "critic/denoising": 3.0, "health/diversity": v} for i, v in enumerate(values)]
    resumed, found = Monitor(Health(), 1200, rows[:cut]), []
    for row in rows[cut:]:
        found += [(row["step"], onset) for onset in resumed.observe(int(row["step"]), row)]
    assert found == [(step, onset) for step, onset in whole if step > 100 * cut]


# Words

DMD2 = {"guidance_scale": 7.5, "student_every": 5, "adversarial": {"weight": 0.05, "critic_weight": 0.01}}
RATES = {"student": 1e-5, "fake_score": 2e-5}


@pytest.mark.parametrize(
    ("onset", "expected"),
    [
        (
            Onset("diversity", 0.4, 0.5, 800),
            "students are collapsing: diversity fell to 40 % of the teacher's since step 800; raise "
            "method.student_every (5) or raise method.adversarial.weight (0.05)",
        ),
        (
            Onset("diversity", 0.123, 0.5, None),
            "students are collapsing: diversity is 12.3 % of the teacher's and never was within the limit; raise "
            "method.student_every (5) or raise method.adversarial.weight (0.05)",
        ),
        (
            Onset("saturation", 1.8, 1.5, 300),
            "colours burn: saturation rose to 180 % of the teacher's since step 300; lower method.guidance_scale "
            "(7.5) or raise method.student_every (5)",
        ),
        (
            Onset("saturation", 0.3, 2 / 3, 300),
            "colours fade: saturation fell to 30 % of the teacher's since step 300; raise method.adversarial.weight "
            "(0.05) or raise method.student_every (5)",
        ),
        (
            Onset("contrast", 2.0, 1.5, 0),
            "pictures harden: contrast rose to 200 % of the teacher's since step 0; lower method.guidance_scale "
            "(7.5) or raise method.student_every (5)",
        ),
        (
            Onset("contrast", 0.5, 2 / 3, 20),
            "pictures go flat: contrast fell to 50 % of the teacher's since step 20; raise "
            "method.adversarial.weight (0.05) or raise method.student_every (5)",
        ),
        (
            Onset("clipped", 0.31, 0.25, 20),
            "pictures clip: the share of values at 0 or 255 rose to 31 % of all values beyond the teacher's since "
            "step 20; lower method.guidance_scale (7.5) or raise method.student_every (5)",
        ),
        (
            Onset("critic_lag", 1.3, 1.1, 40),
            "the critic lags: its error on the student's samples rose to 130 % of that of the teacher, which never "
            "learnt from them, since step 40; raise method.student_every (5) or raise optim.fake_score.lr (2e-05)",
        ),
        (
            Onset("student/gan_to_dmd", 14.0, 10.0, 40),
            "gan drowns dmd in phase student: the norm of its gradient rose to 14 times the other's since step 40; "
            "lower method.adversarial.weight (0.05)",
        ),
        (
            Onset("critic/gan_to_denoising", 14.0, 10.0, None),
            "gan drowns denoising in phase critic: the norm of its gradient is 14 times the other's and never was "
            "within the limit; lower method.adversarial.critic_weight (0.01)",
        ),
    ],
)
def test_a_warning_says_what_since_when_and_what_would_do(onset: Onset, expected: str) -> None:
    assert health.words(onset, DMD2, RATES) == expected


@pytest.mark.parametrize(
    ("name", "low", "options", "rates", "expected"),
    [
        ("diversity", True, {}, RATES, "lower optim.student.lr (1e-05)"),
        (
            "diversity",
            True,
            {"regression_weight": 0.25},
            RATES,
            "raise method.regression_weight (0.25) or lower optim.student.lr (1e-05)",
        ),
        (
            "diversity",
            True,
            {"adversarial": {"weight": 0.0}},
            {},
            "raise method.adversarial.weight (0, it then needs images)",
        ),
        ("diversity", True, {}, {}, "stop it, and go on from an earlier checkpoint with other options"),
        ("saturation", False, {"guidance_scale": 1.0}, RATES, "lower optim.student.lr (1e-05)"),
        (
            "contrast",
            False,
            {"guidance": {"low": 3.0, "high": 15.0}},
            RATES,
            "lower method.guidance.high (15) or lower optim.student.lr (1e-05)",
        ),
        (
            "critic_lag",
            False,
            {},
            RATES,
            "raise optim.fake_score.lr (2e-05) or lower optim.student.lr (1e-05)",
        ),
        ("both/regression_to_dmd", False, {"regression_weight": 0.25}, RATES, "lower method.regression_weight (0.25)"),
        ("student/ca_to_dm", False, {"ca": {"weight": 1.0}}, RATES, "lower method.ca.weight (1)"),
        ("student/distillation_to_gan", False, {"distillation": 2.5}, RATES, "lower method.distillation (2.5)"),
        ("turn/other_to_one", False, {}, RATES, "give other less weight"),
    ],
)
def test_a_remedy_is_one_that_the_method_has(
    name: str, low: bool, options: dict[str, Any], rates: dict[str, float], expected: str
) -> None:
    assert health.remedy(name, low, options, rates) == expected


@pytest.mark.parametrize("name", METHODS)
def test_options_of_every_method_are_read(name: str) -> None:
    """Whatever they hold, there is something to say."""
    module = METHODS[name]
    options = config.encode(config.decode(module.Config, {}, "x"))
    for value, limit in ((0.1, 0.5), (99.0, 10.0)):
        for what in ("diversity", "saturation", "contrast", "clipped", "critic_lag", "student/gan_to_dmd"):
            assert "; " in health.words(Onset(what, value, limit, 3), options, RATES)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"diversity": 1.0}, r"health.diversity must be below 1"),
        ({"saturation": 1.0}, r"health.saturation must be above 1"),
        ({"every": -1}, r"health.every must be at least 0"),
        ({"seeds": 1}, r"health.seeds must be at least 2"),
        ({"eevry": 1}, r"unknown key 'health.eevry'; did you mean 'every'"),
    ],
)
def test_options_are_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.decode(Health, section, "run.yaml", "health")
