"""Gradient checkpointing by Diffusers' own switch, and ``torch.compile``: less memory or time, the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen import checkpoint, config, lora, recipe, train
from fastgen.lora import Lora
from tests import command, tiny
from tests.families import ddpm, dit
from tests.unit import test_attention as attentions

Call = Callable[[nn.Module, Tensor], Tensor]


def of_unet(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, torch.tensor([5.0, 900.0]), encoder_hidden_states=torch.ones(2, 16, 16), return_dict=False)[0]


def of_pixels(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, torch.tensor([5.0, 900.0]), return_dict=False)[0]


def of_dit(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, torch.tensor([5, 900]), torch.tensor([1, 2]), return_dict=False)[0]


def of_flux(network: nn.Module, x: Tensor) -> Tensor:
    text, pooled = torch.ones(2, 3, 8), torch.ones(2, 8)
    ids = torch.zeros(4, 3), torch.zeros(3, 3)
    return network(x, text, pooled, torch.tensor([0.5, 0.9]), *ids, return_dict=False)[0]


def flux() -> nn.Module:
    return attentions.flux()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Call, tuple[int, ...]]] = {
    "unet": (attentions.unet, of_unet, (2, 4, 8, 8)),
    "ddpm": (lambda: ddpm.network(0).eval(), of_pixels, (2, 3, 8, 16)),
    "dit": (lambda: dit.pipeline(0).transformer.eval(), of_dit, (2, 4, 8, 8)),
    "flux": (flux, of_flux, (2, 4, 4)),
}


def spread(network: nn.Module) -> nn.Module:
    """The network with no layer that starts at zero, behind which there would be no gradient."""
    return tiny.perturbed(network)


def learnt(network: nn.Module, call: Call, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a loss on it by what they are of."""
    x = x.clone().requires_grad_()
    y = call(network, x)
    y.square().sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def noting(calls: list[str], part: str) -> Any:
    return lambda module, args: calls.append(part)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 20
    for name, value in expected.items():
        assert value.abs().max() > 0 or name.endswith("to_k.bias"), name  # a constant in all keys changes nothing
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-6, name


@pytest.mark.parametrize("name", NETWORKS)
def test_with_and_without_gradient_checkpointing_gradients_are_equal(name: str) -> None:
    """To 1e-5 of each one's largest entry; and blocks do run twice."""
    make, call, shape = NETWORKS[name]
    x, found, counts = torch.randn(shape, generator=torch.Generator().manual_seed(1)), [], []
    for on in (False, True):
        network, calls = spread(make()), list[str]()
        if on:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        for part, module in network.named_modules():
            module.register_forward_pre_hook(noting(calls, part))
        found.append(learnt(network, call, x))
        counts.append(calls)
    close(found[1], found[0])
    once, twice = ({part: calls.count(part) for part in {*calls}} for calls in counts)
    assert {part for part in once if twice[part] > once[part]}
    assert all(twice[part] <= 2 * once[part] for part in once)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


def of_world(world: Path, *changes: str) -> recipe.Recipe:
    return recipe.decode(config.override(config.read(world / "run.yaml"), changes), "run.yaml")


def test_a_network_without_the_switch_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "_supports_gradient_checkpointing", False)
    train.build(of_world(world))
    with pytest.raises(ValueError, match="Diffusers' UNet2DConditionModel has no such switch; leave it out"):
        train.build(of_world(world, "model.gradient_checkpointing=true"))


# Compiled networks. The default backend writes C++ and takes a minute for the smallest of them


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Lets ``torch.compile`` trace and run what it has traced, without making machine code; the graphs."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **named: plain(*args, **{**named, "backend": backend}))
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["unet", "dit", "flux"])
def test_a_compiled_network_computes_the_same_under_the_same_names(name: str, traced: list[Any]) -> None:
    make, call, shape = NETWORKS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    plain, network = spread(make()), spread(make())
    network.compile()
    close(learnt(network, call, x), learnt(plain, call, x))
    assert traced
    assert [*network.state_dict()] == [*plain.state_dict()]


def test_a_compiled_run_leaves_what_a_plain_one_leaves(world: Path, tmp_path: Path, traced: list[Any]) -> None:
    """Checkpoints and exports of the same files, names and shapes, with the same weights to 1e-4."""
    runs = []
    for name, on in (("plain", "false"), ("compiled", "true")):
        given = (f"model.compile={on}", f"run.out={tmp_path / name}", "run.steps=1")
        runs.append(train.train(of_world(world, *given)))
        assert bool(traced) == (on == "true")
    plain, ours = ({p.relative_to(r): p for p in r.rglob("*.safetensors")} for r in runs)
    assert plain.keys() == ours.keys()
    assert {"pipeline", "checkpoint-1"} <= {name.parts[0] for name in plain}
    for name, path in plain.items():
        expected, found = load_file(path), load_file(ours[name])
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-4 * value.abs().max().clamp(min=1), (name, key)
    session = train.build(of_world(world, f"run.out={tmp_path / 'compiled'}", "run.steps=1"))
    assert checkpoint.load(runs[1] / "checkpoint-1", session.engine, session.ema) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_that_is_not_compiled_is_warned_of(
    compiled: bool, world: Path, tmp_path: Path, traced: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with mock.patch.object(train.attention, "set_attention", return_value="flex"), caplog.at_level("WARNING"):
        train.build(of_world(world, f"model.compile={str(compiled).lower()}", f"run.out={tmp_path / 'run'}"))
    assert ("model.attention flex is one kernel only where it is compiled" in caplog.text) != compiled


def test_adapters_are_compiled_with_their_base(traced: list[Any]) -> None:
    base: Any = lora.view(tiny.unet().requires_grad_(False), Lora(rank=2, targets=["to_q"]))
    student = base.with_adapter()
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    expected, names = of_unet(student, x), [*student.state_dict()]
    lora.plain(student).compile()
    assert (of_unet(student, x) - expected).abs().max() < 1e-5
    assert traced
    assert [*student.state_dict()] == names
