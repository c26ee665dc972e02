"""Optimizers by name: what each takes, that it is the library's own, and that its state goes through checkpoints."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import checkpoint, config, optimizers
from fastgen.config import ConfigError
from fastgen.engine import Engine
from fastgen.method import Batch, Phase
from fastgen.optimizers import KINDS, Optim
from fastgen.rng import Noise

TORCH = [name for name, kind in KINDS.items() if kind.is_torch]
OTHERS = [name for name, kind in KINDS.items() if not kind.is_torch]
MADE = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "muon": optimizers.Muon,
}


class Points:
    def batch(self, samples: Sequence[int]) -> Batch:
        return Batch(samples, {}, {}, x0=torch.tensor([[s % 7 / 7.0, s % 5 / 5.0, 1.0] for s in samples]))


@dataclass(frozen=True)
class Fit:
    """A small network of matrices, vectors and a convolution."""

    networks: Mapping[str, nn.Module]

    @property
    def phases(self) -> Sequence[Phase]:
        return (Phase("only", ["student"], self.loss),)

    def loss(self, batch: Batch, rng: Noise) -> Mapping[str, Tensor]:
        assert batch.x0 is not None
        y = self.networks["student"](batch.x0[:, None])[:, 0]
        return {"error": (y - batch.x0.square().sum(1) + 0.1 * rng.normal([])).square()}


def engine(optim: Optim) -> Engine:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    return Engine(Fit({"student": network}), Points(), {"student": optim}, batch_size=4, steps=8)


def weights(subject: Engine) -> list[Tensor]:
    return [p.detach().clone() for p in subject.method.networks["student"].parameters()]


def small(count: int = 2) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(5, 4)) for _ in range(count)]


def test_the_names_of_torch_are_torch_s_own() -> None:
    assert {name: type(optimizers.make(Optim(name=name), small())) for name in TORCH} == MADE


@pytest.mark.parametrize("name", TORCH)
def test_each_takes_a_step_on_a_device_that_torch_fuses_nothing_for(name: str) -> None:
    """Such as the device of tensors without data."""
    for shapes in ([(5, 4), (3,)], [(3,)]):
        parameters = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in shapes]
        optimizer = optimizers.make(Optim(name=name), parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        if name == "adafactor":  # which reads numbers on the host
            continue
        optimizer.step()
        assert not any(group.get("fused") for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "adam", "adagrad", "sgd"])
def test_without_its_kernel_the_numbers_are_the_same_but_for_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.11 has none of Adagrad on CUDA, and says so in a step."""
    kind: Any = MADE[name]
    step, found = kind.step, dict[bool, list[Tensor]]()
    for fuses in (True, False):
        if not fuses:

            def without(self: Any, *args: Any) -> Any:
                if any(group["fused"] for group in self.param_groups):
                    raise RuntimeError("`fused=True` requires all the params to be of supported devices")
                return step(self, *args)

            monkeypatch.setattr(kind, "step", without)
        subject = engine(Optim(1e-2, name, weight_decay=0.1))
        before = weights(subject)
        assert [bool(group["fused"]) for group in subject.optimizers["student"].param_groups] == [fuses]
        [*subject.run(range(4))]
        found[fuses] = weights(subject)
        assert not any(torch.equal(a, b) for a, b in zip(before, found[fuses], strict=True))
    for mine, theirs in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TORCH)
def test_each_learns_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    optim = Optim(lr=1e-2, name=name, warmup=2, **({"momentum": 0.5} if "momentum" in KINDS[name].defaults else {}))
    whole = engine(optim)
    start, errors = weights(whole), [logs["only/error"] for _, logs in whole.run(range(8))]
    assert all(not torch.equal(old, new) for old, new in zip(start, weights(whole), strict=True))
    half = engine(optim)
    first = [logs["only/error"] for _, logs in half.run(range(3))]
    checkpoint.save(tmp_path, 3, half, {}, keep=1)
    resumed = engine(optim)
    assert checkpoint.load(tmp_path / "checkpoint-3", resumed, {}) == 3
    assert first + [logs["only/error"] for _, logs in resumed.run(range(3, 8))] == errors
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


@pytest.mark.parametrize("name", TORCH)
def test_states_given_back_leave_nothing_changed(name: str) -> None:
    """``tensors`` and ``restore`` alone: the same states, of the same kinds, and untouched weights and rates."""
    parameters = {"a": small()[0], "b": small()[1], "never": nn.Parameter(torch.ones(2))}

    def stepped(optimizer: torch.optim.Optimizer) -> None:
        for key in "ab":
            parameters[key].grad = parameters[key].detach().cos()
        optimizer.step()

    made = [optimizers.make(Optim(lr=0.1, name=name), parameters.values()) for _ in range(2)]
    stepped(made[0])
    stepped(made[0])
    found = {key: value.clone() for key, value in optimizers.tensors(made[0], parameters).items()}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    optimizers.restore(made[1], parameters, found)
    again = optimizers.tensors(made[1], parameters)
    assert found.keys() == again.keys()
    assert all(torch.equal(found[key], again[key]) for key in found)
    assert all(torch.equal(before[key], p) for key, p in parameters.items())
    assert [group["lr"] for group in made[1].param_groups] == [group["lr"] for group in made[0].param_groups]
    for p in parameters.values():
        kinds = [{key: type(value) for key, value in one.state.get(p, {}).items()} for one in made]
        assert kinds[0] == kinds[1]
    stepped(made[0])
    after = {key: p.detach().clone() for key, p in parameters.items()}
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(before[key])
    stepped(made[1])
    assert all(torch.equal(after[key], p) for key, p in parameters.items())


def test_states_of_another_optimizer_are_refused() -> None:
    one, two = (optimizers.make(Optim(name=name), (p := small(1))) for name in ("adamw", "adamax"))
    p[0].grad = torch.ones_like(p[0])
    one.param_groups[0]["params"][0].grad = torch.ones(5, 4)
    one.step()
    names = {"a": one.param_groups[0]["params"][0]}
    found = optimizers.tensors(one, names)
    other = {"a": two.param_groups[0]["params"][0]}
    with pytest.raises(
        ValueError, match="the state 'a:exp_avg_sq' of Adamax has no place; it is of another optimizer"
    ):
        optimizers.restore(two, other, found)
    found.pop("a:exp_avg_sq")
    with pytest.raises(ValueError, match="the state 'a:exp_inf' of Adamax is missing; it is of another optimizer"):
        optimizers.restore(two, other, found)


class Odd(torch.optim.SGD):
    """Keeps what is no tensor."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p] |= {"step": self.state[p].get("step", 0) + 1, "notes": ["x"]}


def test_a_number_is_kept_and_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Odd(small(1))
    made.step()
    names = {"a": made.param_groups[0]["params"][0]}
    with pytest.raises(ValueError, match="Odd keeps a list as its state 'notes', which no checkpoint holds; use adam"):
        optimizers.tensors(made, names)
    made.state[names["a"]].pop("notes")
    assert optimizers.tensors(made, names) == {"a:step": torch.tensor(1)}
    # one that a library would bring is refused before it trains
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", types.SimpleNamespace(AdamW8bit=lambda p, **_: Odd(p)))
    with pytest.raises(ValueError, match="Odd keeps a list as its state 'notes'"):
        optimizers.make(Optim(name="adamw8bit"), small(1))


def test_numbers_are_given_back_as_numbers() -> None:
    class Counts(Odd):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1

    made = Counts(small(1))
    optimizers.restore(made, {"a": made.param_groups[0]["params"][0]}, {"a:step": torch.tensor(41)})
    assert list(made.state.values()) == [{"step": 41}]


def test_shared_tables_are_stored_once_each() -> None:
    """bitsandbytes gives all parameters one table, and a safetensors file takes no tensors that share memory."""
    made, table = torch.optim.SGD(small()), torch.arange(3.0)
    for p in made.param_groups[0]["params"]:
        made.state[p]["qmap"] = table
    found = optimizers.tensors(made, dict(zip("ab", made.param_groups[0]["params"], strict=True)))
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == 2


def test_defaults_are_the_optimizer_s_own_and_written_out() -> None:
    assert Optim() == Optim(1e-5, "adamw", (0.9, 0.999), 0.01, 1e-8)
    assert Optim().settings == {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    plain = Optim(name="sgd", momentum=0.9)
    assert plain.settings == {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.0}
    assert config.decode(Optim, config.encode(plain), "x.yaml") == plain
    for name in TORCH:
        settings = Optim(name=name).settings
        if name not in ("muon", "adafactor"):
            own = MADE[name]([nn.Parameter(torch.ones(2, 2))]).defaults  # type: ignore[abstract]
            assert {key: own[key] for key in settings if key != "lr"} == {
                k: v for k, v in settings.items() if k != "lr"
            }


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "adammw"}, r"^r.yaml: optim.student: unknown optimizer 'adammw'; did you mean 'adamw'\?$"),
        ({"name": "zzz"}, "unknown optimizer 'zzz'; known: adafactor, adagrad, adam, "),
        (
            {"name": "sgd", "betas": [0.9, 0.99]},
            r"optimizer 'sgd' has no betas, got \(0.9, 0.99\); leave it out or set",
        ),
        ({"name": "adamw", "momentum": 0.9}, "'adamw' has no momentum, got 0.9; .*takes lr, betas, eps, weight_decay"),
        ({"name": "muon", "eps": 1e-8}, "optimizer 'muon' has no eps"),
        ({"betas": [0.9, 1.0]}, "betas must be below 1, got 1"),
    ],
)
def test_what_an_optimizer_has_no_use_for_is_refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.decode(Optim, tree, "r.yaml", "optim.student")


def test_null_takes_back_what_a_base_config_gives() -> None:
    assert config.decode(Optim, {"name": "sgd", "betas": None}, "r.yaml") == Optim(name="sgd")


@pytest.mark.parametrize("name", OTHERS)
def test_each_of_another_library_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "bitsandbytes.optim", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    package = (
        "torchao; pip install torchao" if "ao" in name else r"bitsandbytes; pip install 'fastgen-diffusion\[8bit\]'"
    )
    with pytest.raises(ValueError, match=f"^optimizer '{name}' needs {package}$"):
        engine(Optim(name=name))


def test_a_torch_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"^optimizer 'muon' needs a newer torch: pip install -U torch$"):
        engine(Optim(name="muon"))


def test_one_that_fails_on_this_device_is_refused_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("no kernel for cpu\nat line 3")

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", types.SimpleNamespace(Lion=lambda p, **_: Broken(p)))
    with pytest.raises(ValueError, match=r"^optimizer 'lion' does not work on cpu \(no kernel for cpu\); use adamw$"):
        engine(Optim(name="lion"))


def test_settings_reach_another_library_s_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def made(parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        given.append(settings)
        return torch.optim.AdamW(parameters, **settings)

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", types.SimpleNamespace(AdamW8bit=made))
    engine(Optim(0.5, "adamw8bit", (0.5, 0.6), 0.1, 1e-3))
    assert given[-1] == {"lr": 0.5, "betas": (0.5, 0.6), "weight_decay": 0.1, "eps": 1e-3}


def test_a_rate_that_is_a_tensor_is_changed_in_place() -> None:
    made = torch.optim.SGD(small(), lr=torch.tensor(1.0))
    rate = made.param_groups[0]["lr"]
    optimizers.set_lr(made, 0.25)
    assert made.param_groups[0]["lr"] is rate
    assert rate == 0.25


def test_muon_moves_matrices_as_muon_and_the_rest_as_adamw() -> None:
    torch.manual_seed(0)
    first = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (3,), (2, 3, 3, 3))]
    second = [nn.Parameter(p.detach().clone()) for p in first]
    made = optimizers.make(Optim(0.1, "muon", weight_decay=0.05, momentum=0.9), first)
    own = [
        torch.optim.Muon(second[:1], lr=0.1, weight_decay=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(second[1:], lr=0.1, weight_decay=0.05, fused=True),
    ]
    for _ in range(3):
        for p, q in zip(first, second, strict=True):
            p.grad, q.grad = p.detach().sin(), q.detach().sin()
        for one in (made, *own):
            one.step()
        made.zero_grad(set_to_none=True)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert all(p.grad is None for p in first)


@pytest.mark.parametrize("name", OTHERS)
def test_each_that_is_installed_and_works_resumes_bit_for_bit(name: str) -> None:
    """Quantised states, numbers and tables go through plain tensors."""
    torch.manual_seed(0)
    parameters = {"large": nn.Parameter(torch.randn(2, 4096)), "small": nn.Parameter(torch.randn(3))}
    copies = {key: nn.Parameter(p.detach().clone()) for key, p in parameters.items()}

    def stepped(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], count: int) -> None:
        for _ in range(count):
            for p in names.values():
                p.grad = p.detach().sin()
            optimizer.step()

    try:
        whole, other = (optimizers.make(Optim(1e-2, name), ps.values()) for ps in (parameters, copies))
    except ValueError as error:
        pytest.skip(str(error))
    stepped(whole, parameters, 2)
    found = {key: value.clone() for key, value in optimizers.tensors(whole, parameters).items()}
    assert all(type(value) is Tensor for value in found.values())
    optimizers.restore(other, copies, found)
    with torch.no_grad():
        for key, p in copies.items():
            p.copy_(parameters[key])
    stepped(whole, parameters, 2)
    stepped(other, copies, 2)
    assert all(torch.equal(p, copies[key]) for key, p in parameters.items())
