"""The training loop: accumulation, phases, precision, and stopping before harm is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from fastgen import optimizers
from fastgen.engine import Engine, NonFiniteLoss
from fastgen.method import Batch, Phase, Terms
from fastgen.optimizers import Optim
from fastgen.rng import Noise
from tests.oracle import Samples, Toy, gradients_by_phase, linear_method, moved, optims, same, states, train

DATA = Samples((4,))


def engine(method: Toy, **settings: object) -> Engine:
    arguments = {"batch_size": 4, "steps": 10, **settings}
    return Engine(method, DATA, optims(method, lr=1e-2), **arguments)  # type: ignore[arg-type]


def one_phase(loss: Callable[[nn.Module, Batch, Noise], Tensor], **networks: nn.Module) -> Toy:
    """A network "a" and one phase "only" whose term "error" is the loss given."""
    networks = networks or {"a": ones(4)}

    def terms(batch: Batch, rng: Noise) -> Terms:
        return {"error": loss(networks["a"], batch, rng)}

    return Toy(networks, (Phase("only", ["a"], terms),))


def ones(width: int) -> nn.Linear:
    network = nn.Linear(width, 1, bias=False)
    nn.init.ones_(network.weight)
    return network


# Accumulation


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulated_micro_batches_equal_one_batch(batch_size: int, accumulate: int) -> None:
    """By largest and by mean difference of the weights, and by every log."""

    def result(batch_size: int, accumulate: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        method = linear_method()
        logs = train(engine(method, batch_size=batch_size, accumulate=accumulate), range(10))
        return {f"{r}.{n}": v for r, s in states(method).items() for n, v in s.items()}, logs

    (whole, logs), (parts, part_logs) = result(8, 1), result(batch_size, accumulate)
    differences = torch.cat([(whole[n] - parts[n]).abs().flatten() for n in whole])
    assert differences.max() < 1e-5
    assert differences.mean() < 1e-6
    for a, b in zip(logs, part_logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_each_step_takes_the_next_samples_and_misses_none() -> None:
    seen: list[int] = []

    def loss(network: nn.Module, batch: Batch, rng: Noise) -> Tensor:
        seen.extend(batch.samples)
        assert list(batch.samples) == rng.samples
        return network(rng.normal((4,)))[:, 0]

    train(engine(one_phase(loss), batch_size=2, accumulate=3), range(4))
    assert seen == list(range(24))


def test_the_loss_is_the_mean_over_samples_of_the_sum_of_terms() -> None:
    network = ones(1)
    x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])

    def loss(batch: Batch, rng: Noise) -> Terms:
        y = network(x)[:, 0]
        return {"one": y, "two": 10 * y}

    method = Toy({"a": network}, (Phase("only", ["a"], loss),))
    logs = train(engine(method), [0])[0]
    assert logs == pytest.approx({"only/one": 3, "only/two": 30, "only/a.grad_norm": 33})


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    """What a step draws is keyed by its number, so a resumed run sees what an unbroken one would."""
    seen: dict[int, list[Tensor]] = {}

    def loss(network: nn.Module, batch: Batch, rng: Noise) -> Tensor:
        x = rng.normal((4,))
        seen.setdefault(batch.samples[0], []).append(x)
        return network(x)[:, 0]

    train(engine(one_phase(loss)), range(4))
    train(engine(one_phase(loss)), [3, 1])
    assert [len(draws) for draws in seen.values()] == [1, 2, 1, 2]
    assert all(torch.equal(d[0], d[1]) for d in seen.values() if len(d) == 2)


# Phases


def test_only_what_a_phase_trains_gets_gradients_and_all_of_it_does() -> None:
    method = linear_method()
    found = gradients_by_phase(method)
    train(engine(method), range(2))
    assert found == {"first": {"a.weight", "a.bias"}, "second": {"b.weight", "b.bias"}}


def test_only_what_a_phase_trains_moves_and_all_of_it_does() -> None:
    method = linear_method(every=3)
    before = states(method)
    running = engine(method).run(range(6))
    for step, _ in running:
        after = states(method)
        assert moved(before["a"], after["a"]) == {"weight", "bias"}
        assert moved(before["b"], after["b"]) == ({"weight", "bias"} if step % 3 == 0 else set())
        assert same(before["frozen"], after["frozen"])
        before = after


def test_no_gradient_is_left_behind_after_a_phase() -> None:
    method = linear_method()
    train(engine(method), [0])
    assert all(p.grad is None for network in method.networks.values() for p in network.parameters())


def test_networks_train_in_their_own_phase_only_and_the_frozen_never() -> None:
    modes: list[tuple[str, dict[str, bool], dict[str, bool]]] = []
    method = linear_method()

    def watch(phase: Phase) -> Phase:
        def loss(batch: Batch, rng: Noise) -> Terms:
            training = {role: network.training for role, network in method.networks.items()}
            learning = {r: all(p.requires_grad for p in n.parameters()) for r, n in method.networks.items()}
            modes.append((phase.name, training, learning))
            return phase.loss(batch, rng)

        return Phase(phase.name, phase.trains, loss)

    method.phases = tuple(watch(phase) for phase in method.phases)
    train(engine(method), [0])
    for name, training, learning in modes:
        expected = {"a": name == "first", "b": name == "second", "frozen": False}
        assert training == learning == expected


def test_phases_run_in_order_at_their_steps_and_after_follows_each_update() -> None:
    calls: list[str] = []
    method = linear_method(every=2, after=lambda: calls.append("after"))
    logs = train(engine(method), range(5))
    assert calls == ["after"] * 3
    assert [sorted({key.split("/")[0] for key in log}) for log in logs] == [["first", "second"], ["first"]] * 2 + [
        ["first", "second"]
    ]


def test_after_sees_the_updated_weights() -> None:
    method = linear_method()
    before = states(method)["b"]
    seen: list[bool] = []
    method.phases[1].after()
    method.phases = (
        method.phases[0],
        Phase(
            "second", ["b"], method.phases[1].loss, after=lambda: seen.append(not same(before, states(method)["b"]))
        ),
    )
    train(engine(method), [0])
    assert seen == [True]


def test_parameters_frozen_by_the_method_stay_frozen() -> None:
    method = linear_method()
    method.networks["a"].bias.requires_grad_(False)
    before = states(method)["a"]
    train(engine(method), range(3))
    assert moved(before, states(method)["a"]) == {"weight"}


# Not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer_moves(bad: float) -> None:
    method = linear_method()
    spoil = {"second": method.phases[1].loss}

    def loss(batch: Batch, rng: Noise) -> Terms:
        terms = spoil["second"](batch, rng)
        return {
            name: term * bad if batch.samples[0] == 12 and name == "size" else term for name, term in terms.items()
        }

    method.phases = (method.phases[0], Phase("second", ["b"], loss))
    subject = engine(method)
    train(subject, range(3))
    before, moments = states(method)["b"], optimizer_state(subject, "b")
    with pytest.raises(
        NonFiniteLoss, match=r"not finite at step 3, phase 'second': error=.*, size=(nan|inf)"
    ) as error:
        train(subject, [3])
    assert "the optimizer has not moved; lower the learning rate or resume from an earlier checkpoint" in str(error)
    assert same(before, states(method)["b"])
    assert same(moments, optimizer_state(subject, "b"))


def test_a_gradient_that_is_not_finite_stops_the_run_too() -> None:
    method = one_phase(lambda network, batch, rng: (network(rng.normal((4,)))[:, 0] * 0).abs().sqrt())
    before = states(method)
    with pytest.raises(NonFiniteLoss, match=r"step 7, phase 'only': error=0, a.grad_norm=nan"):
        train(engine(method), [7])
    assert same(before["a"], states(method)["a"])


def optimizer_state(engine: Engine, role: str) -> dict[str, Tensor]:
    state = engine.optimizers[role].state
    return {f"{n}.{key}": v.clone() for n, p in engine.parameters[role].items() for key, v in state[p].items()}


# Learning rate and clipping


def test_learning_rates_follow_their_schedules() -> None:
    constant = Optim(lr=1.0, warmup=4)
    assert [constant.lr_at(s, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = Optim(lr=2.0, schedule="linear")
    assert [linear.lr_at(s, 4) for s in range(5)] == pytest.approx([2, 1.5, 1, 0.5, 0])
    cosine = Optim(lr=1.0, schedule="cosine", warmup=2)
    assert cosine.lr_at(1, 10) == 1
    assert cosine.lr_at(2, 10) == 1
    assert cosine.lr_at(6, 10) == pytest.approx(0.5)
    assert cosine.lr_at(10, 10) == pytest.approx(0)
    assert cosine.lr_at(12, 10) == pytest.approx(0)  # past the end it stays
    assert Optim(lr=1.0, schedule="linear", warmup=10).lr_at(10, 10) == 1  # warm-up as long as the run


def test_the_optimizer_uses_the_rate_of_its_step() -> None:
    method = linear_method()
    optim = {"a": Optim(lr=1e-2, warmup=4), "b": Optim(lr=1e-3, schedule="linear")}
    subject = Engine(method, DATA, optim, batch_size=2, steps=8)
    for step, _ in subject.run(range(8)):
        for role in "ab":
            assert subject.optimizers[role].param_groups[0]["lr"] == optim[role].lr_at(step, 8)


def test_optimizer_settings_reach_adamw() -> None:
    method = linear_method()
    settings = {"betas": (0.5, 0.7), "weight_decay": 0.3, "eps": 1e-3}
    subject = Engine(method, DATA, optims(method, **settings), batch_size=2, steps=8)
    group = subject.optimizers["a"].param_groups[0]
    assert {name: group[name] for name in settings} == settings


def test_the_first_update_is_adam_by_hand() -> None:
    method = one_phase(lambda network, batch, rng: 3 * network(torch.ones(len(batch), 4))[:, 0])
    subject = Engine(method, DATA, optims(method, lr=0.1, weight_decay=0.5, clip=0), batch_size=2, steps=8)
    train(subject, [0])
    # w (1 - lr wd) - lr g / |g|
    torch.testing.assert_close(method.networks["a"].weight, torch.full((1, 4), 0.95 - 0.1))


@pytest.mark.parametrize(("clip", "applied"), [(10.0, 6.0), (1.5, 1.5), (0.0, 6.0)])
def test_gradients_are_clipped_by_norm_and_logged_before(clip: float, applied: float) -> None:
    method = one_phase(lambda network, batch, rng: 3 * network(torch.ones(len(batch), 4))[:, 0])
    subject = Engine(method, DATA, optims(method, clip=clip), batch_size=2, steps=8)
    logs = train(subject, [0])[0]
    assert logs["only/a.grad_norm"] == pytest.approx(6)  # 3 in each of four weights
    moment = next(iter(subject.optimizers["a"].state.values()))["exp_avg"]
    assert moment.norm().item() / 0.1 == pytest.approx(applied, rel=1e-4)  # beta1 is 0.9


@pytest.mark.parametrize("excess", [-1e-3, -1e-6, -1e-7, 0.0, 1e-7, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "muon"])
def test_clipping_is_torchs_own_and_leaving_it_out_changes_no_bit(name: str, excess: float) -> None:
    method = one_phase(lambda network, batch, rng: 3 * network(torch.ones(len(batch), 4))[:, 0])
    phase, clip = method.phases[0], 6.0 / (1 + excess)
    p = method.networks["a"].weight
    start, moved = p.detach().clone(), []
    for own in (True, False):
        settings = optims(method, name=name, lr=1.0, clip=clip if own else 0.0)
        subject = Engine(method, DATA, settings, batch_size=2, steps=8)
        p.data = start.clone()
        p.requires_grad_(True)
        for _ in range(2):  # nothing is left of the first for the second
            p.grad = torch.tensor([[3.0, -3.0, 3.0, 3.0]])
            norms = subject.gradient_norms(phase)
            if own:
                subject.clip(phase, norms, {"a": float(norms["a"])})
            else:
                torch.nn.utils.clip_grads_with_norm_([p], clip, norms["a"])
            subject.update(phase, 0)
        p.grad = torch.full_like(p, 0.5)  # below what is clipped
        subject.update(phase, 1)
        moved.append([p.detach().clone(), *optimizers.tensors(subject.optimizers["a"], {"a": p}).values()])
    for ours, torchs in zip(*moved, strict=True):
        if 6.0 + 1e-6 <= clip:
            assert torch.equal(ours, torchs)
        else:
            torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)


def test_each_role_is_clipped_by_its_own_norm() -> None:
    networks = {"a": ones(4), "b": ones(4)}

    def loss(batch: Batch, rng: Noise) -> Terms:
        x = torch.ones(len(batch), 4)
        return {"error": 30 * networks["a"](x)[:, 0] + 0.03 * networks["b"](x)[:, 0]}

    method = Toy(networks, (Phase("only", ["a", "b"], loss),))
    subject = Engine(method, DATA, optims(method, clip=1.0), batch_size=2, steps=8)
    logs = train(subject, [0])[0]
    assert logs["only/a.grad_norm"] == pytest.approx(60)
    assert logs["only/b.grad_norm"] == pytest.approx(0.06)
    norms = {role: next(iter(subject.optimizers[role].state.values()))["exp_avg"].norm().item() for role in "ab"}
    assert norms == pytest.approx({"a": 0.1, "b": 0.006}, rel=1e-4)


# fp16


def overflowing(scale: float) -> Toy:
    """At step 1 the gradient is finite but its product with the loss scale is not."""

    def loss(network: nn.Module, batch: Batch, rng: Noise) -> Tensor:
        return network(rng.normal((4,)))[:, 0] * (scale if batch.samples[0] == 4 else 1.0)

    return one_phase(loss)


def test_with_fp16_an_overflowing_update_is_skipped_and_the_scale_halved() -> None:
    method = overflowing(1e36)
    subject = engine(method, fp16=True)
    start = subject.scalers["only"].get_scale()
    train(subject, [0])
    before, scale = states(method)["a"], subject.scalers["only"].get_scale()
    assert scale == start
    logs = train(subject, [1])[0]
    assert not math.isfinite(logs["only/a.grad_norm"])
    assert math.isfinite(logs["only/error"])
    assert same(before, states(method)["a"])
    assert subject.scalers["only"].get_scale() == scale / 2
    train(subject, [2])
    assert moved(before, states(method)["a"]) == {"weight"}
    assert all(torch.isfinite(p).all() for p in method.networks["a"].parameters())


def test_without_fp16_losses_are_not_scaled() -> None:
    subject = engine(linear_method())
    assert not any(scaler.is_enabled() for scaler in subject.scalers.values())


def test_with_fp16_a_loss_that_is_not_finite_still_stops_the_run() -> None:
    with pytest.raises(NonFiniteLoss, match="step 1, phase 'only'"):
        train(engine(overflowing(math.nan), fp16=True), range(2))


@pytest.mark.parametrize("clip", [10.0, 0.01])
def test_with_fp16_updates_clipping_and_logs_are_those_without(clip: float) -> None:
    results = []
    for fp16 in (False, True):
        method = linear_method()
        subject = Engine(method, DATA, optims(method, name="sgd", clip=clip), batch_size=2, steps=8, fp16=fp16)
        logs = train(subject, range(5))
        assert logs[-1]["first/a.grad_norm"] > 0.01
        results.append((states(method)["b"], logs))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1][-1] == pytest.approx(results[1][1][-1], rel=1e-4)


# What is refused


def test_a_phase_that_trains_an_unknown_role_is_refused() -> None:
    method = Toy({"a": ones(4)}, (Phase("only", ["student"], lambda batch, rng: {}),))
    with pytest.raises(ValueError, match="a phase trains 'student', but the networks are a"):
        Engine(method, DATA, {"student": Optim()}, batch_size=1, steps=1)


def test_a_trained_role_without_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no optimizer for 'b'; add optim\.b"):
        Engine(linear_method(), DATA, {"a": Optim()}, batch_size=1, steps=1)


def test_an_optimizer_for_nothing_is_refused() -> None:
    optim = {"a": Optim(), "b": Optim(), "frozen": Optim()}
    with pytest.raises(ValueError, match=r"optim\.frozen is given, but this method trains only a, b"):
        Engine(linear_method(), DATA, optim, batch_size=1, steps=1)


def test_a_trained_role_without_trainable_parameters_is_refused() -> None:
    method = linear_method()
    method.networks["a"].requires_grad_(False)
    with pytest.raises(ValueError, match="'a' has no trainable parameter"):
        engine(method)


def two_roles(loss: Callable[[Mapping[str, nn.Module], Tensor], Tensor], trains: Sequence[str]) -> Toy:
    networks = {"a": ones(4), "b": ones(4)}

    def terms(batch: Batch, rng: Noise) -> Terms:
        return {"error": loss(networks, rng.normal((4,)))[:, 0]}

    return Toy(networks, (Phase("only", trains, terms),))


def test_a_loss_that_misses_one_of_its_networks_is_refused() -> None:
    method = two_roles(lambda networks, x: networks["a"](x), ["a", "b"])
    with pytest.raises(ValueError, match="the loss of phase 'only' reaches no parameter of 'b', which it trains"):
        train(engine(method), [0])


def test_a_loss_that_reaches_no_network_at_all_is_refused() -> None:
    method = two_roles(lambda networks, x: networks["a"](x), ["b"])
    with pytest.raises(ValueError, match="the loss of phase 'only' reaches no parameter of 'b', which it trains"):
        train(engine(method), [0])
