"""What waits in host memory: what is away when, that nothing that is used is, and that no number changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from fastgen import checkpoint, config, health, lora, offload, recipe, train
from fastgen.engine import Engine
from fastgen.lora import Lora
from fastgen.method import Phase
from fastgen.offload import Host, Offload
from tests import command, tiny
from tests.golden import record
from tests.oracle import Samples, conv_family, optims, same, states
from tests.oracle import train as trained

CASES = [(name, variant) for name in record.methods() for variant in record.variants(name)]


class Beyond:
    """Where things wait as NaN, so that to use one there shows in all that comes of it."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def is_here(self, tensor: Tensor) -> bool:
        return id(tensor) not in self.kept

    def away(self, tensor: Tensor) -> Tensor:
        left = torch.full_like(tensor, torch.nan)
        self.kept[id(left)] = left, tensor.clone()
        return left

    def here(self, tensor: Tensor) -> Tensor:
        return self.kept[id(tensor)][1].clone()


class Copies:
    """Where things wait as they are; tells what goes which way."""

    def __init__(self) -> None:
        self.moved: list[str] = []

    def is_here(self, tensor: Tensor) -> bool:
        return True

    def away(self, tensor: Tensor) -> Tensor:
        self.moved.append("away")
        return tensor.clone()

    def here(self, tensor: Tensor) -> Tensor:
        self.moved.append("here")
        return tensor.clone()


def made(name: str, options: dict[str, Any], num_steps: int) -> tuple[Engine, nn.Module]:
    """An engine of the toy family, and the teacher."""
    family = conv_family()
    method = record.make(name, options, family, num_steps)
    engine = Engine(method, Samples((2, 8, 8)), optims(method, lr=1e-3), batch_size=2, accumulate=2, steps=4)
    return engine, family.denoiser.network


def waiting(engine: Engine, teacher: nn.Module) -> Engine:
    """The same engine with all that it has no use for beyond."""
    engine.offload = offload.of(engine.method, teacher, engine.optimizers, Beyond())
    return engine


def away(tensors: Any) -> set[bool]:
    return {bool(t.isnan().all()) for t in tensors}


def moments(engine: Engine, role: str) -> list[Tensor]:
    return [t for state in engine.optimizers[role].state.values() for t in state.values()]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_no_number_of_any_method_changes_and_nothing_that_is_used_is_away(name: str, variant: str) -> None:
    given = record.variants(name)[variant]
    plain, (engine, teacher) = made(name, *given)[0], made(name, *given)
    waiting(engine, teacher)
    assert trained(engine, range(3)) == trained(plain, range(3))
    changing = [role for phase in plain.method.phases for role in (*phase.trains, *phase.moves)]
    theirs, ours = states(plain.method), states(engine.method)
    assert changing
    for role in changing:
        assert same(ours[role], theirs[role])


def test_what_is_away_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """dmd2, whose student learns at every other step, and whose critic has no use for the teacher."""
    engine, teacher = made("dmd2", {"student_every": 2, "guidance_scale": 2.0}, 1)
    waiting(engine, teacher)
    assert away(teacher.parameters()) == {True}
    seen: list[tuple[int, str, bool, bool, bool]] = []

    def told(phase: Phase, step: int, update: Any = engine.update) -> None:
        seen.append(
            (
                step,
                phase.name,
                *(away(moments(engine, r)) == {True} for r in ("student", "fake_score")),
                *away(teacher.parameters()),
            )
        )
        update(phase, step)

    def within(phase: Phase) -> Phase:
        def loss(batch: Any, rng: Any) -> Any:
            terms = phase.loss(batch, rng)
            assert away(teacher.parameters()) == {phase.name == "critic"}
            return terms

        return dataclasses.replace(phase, loss=loss)

    monkeypatch.setattr(engine, "update", told)
    monkeypatch.setattr(engine.method, "phases", tuple(map(within, engine.method.phases)))
    trained(engine, range(4))
    # step, phase, student's and fake score's states away, teacher away at the update
    assert seen == [
        (0, "critic", False, False, True),  # the first has no states yet
        (0, "student", False, True, True),
        (1, "critic", True, False, True),
        (2, "critic", True, False, True),
        (2, "student", False, True, True),
        (3, "critic", True, False, True),
    ]


def test_what_is_there_is_less_by_all_that_a_turn_has_no_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes, as its loss is known and the backward pass begins; each memory counted once."""
    options = {"student_every": 2, "guidance_scale": 2.0}
    found: list[dict[str, int]] = []
    for way in ("plain", "away"):
        engine, teacher = made("dmd2", options, 1)
        move = Beyond()
        if way == "away":
            engine.offload = offload.of(engine.method, teacher, engine.optimizers, move)
        held = dict[str, int]()

        def there(engine: Engine, teacher: nn.Module, move: Beyond) -> int:
            networks = [teacher, *engine.method.networks.values()]
            tensors: list[Tensor] = [t for n in networks for t in n.parameters()]
            tensors += [t for role in engine.optimizers for t in moments(engine, role)]
            gone = {left.untyped_storage()._cdata for left, _ in move.kept.values()}
            places = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            return sum(size for place, size in places.items() if place not in gone)

        def within(phase: Phase, engine: Engine = engine, teacher: nn.Module = teacher, move: Beyond = move) -> Phase:
            def loss(batch: Any, rng: Any) -> Any:
                terms = phase.loss(batch, rng)
                held[phase.name] = there(engine, teacher, move)  # noqa: B023
                return terms

            return dataclasses.replace(phase, loss=loss)

        monkeypatch.setattr(engine.method, "phases", tuple(map(within, engine.method.phases)))
        trained(engine, range(3))
        found.append(held)
        sizes = {role: sum(t.nbytes for t in moments(engine, role)) for role in engine.optimizers}
    weights = sum(p.nbytes for p in teacher.parameters())
    assert {phase: found[0][phase] - found[1][phase] for phase in found[0]} == {
        "critic": weights + sizes["student"],
        "student": sizes["fake_score"],
    }


def test_each_state_is_copied_once_for_each_change_of_phase_and_weights_never_back() -> None:
    engine, teacher = made("dmd2", {"student_every": 4, "guidance_scale": 2.0}, 1)
    move = Copies()
    engine.offload = offload.of(engine.method, teacher, engine.optimizers, move)
    weights = len([*teacher.parameters()])
    assert move.moved == ["away"] * weights

    def at(step: int) -> list[str]:
        move.moved.clear()
        trained(engine, [step])
        return move.moved

    assert at(0) == ["away"] * len(moments(engine, "fake_score")) + ["here"] * weights
    student, fake_score = len(moments(engine, "student")), len(moments(engine, "fake_score"))
    assert at(1) == ["away"] * student + ["here"] * fake_score  # never both sets at once
    assert at(2) == at(3) == []
    assert at(4).count("here") == weights + student
    assert move.moved.count("away") == fake_score


def test_gradients_go_through_what_a_call_brought_until_it_rests() -> None:
    """The backward pass of a convolution reads the weight itself."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 3)).requires_grad_(False)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(network(x).sum(), x)[0]
    idle = Offload(Beyond(), [network])
    y = network(x).sum() + 0 * network(2 * x).sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)
    idle.rest()
    assert away(network.parameters()) == {True}
    y = network(x).sum()
    idle.rest()  # too early: it shows
    assert torch.autograd.grad(y, x)[0].isnan().all()


def test_weights_that_something_that_changes_has_stay() -> None:
    teacher = tiny.unet().requires_grad_(False)
    base: Any = lora.view(teacher, Lora(rank=2))
    student, other = base.with_adapter(), tiny.unet()
    assert offload.unchanging([base, other], [student]) == [other]
    assert offload.unchanging([teacher, other], [student]) == [other]
    assert offload.unchanging([nn.ModuleList([teacher, other])], []) == [teacher, other]
    assert offload.unchanging([teacher, teacher], [other]) == [teacher]


def test_of_nothing_it_does_nothing() -> None:
    engine, _ = made("dmd2", {"student_every": 2}, 1)
    before = states(engine.method)
    engine.offload.turn(["student"])
    engine.offload.rest()
    assert all(same(before[role], after) for role, after in states(engine.method).items())


def test_checkpoints_hold_states_wherever_they_are(tmp_path: Path) -> None:
    options = {"student_every": 2, "guidance_scale": 2.0}
    (plain, _), (engine, teacher) = made("dmd2", options, 1), made("dmd2", options, 1)
    engine.offload = offload.of(engine.method, teacher, engine.optimizers, Copies())
    paths = []
    for name, one in (("plain", plain), ("moved", engine)):
        trained(one, range(3))
        paths.append(checkpoint.save(tmp_path / name, 3, one, {}, 1))
    assert engine.offload.gone.keys() == {"fake_score"}
    for file in sorted(p.name for p in paths[0].glob("*.safetensors")):
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()
    rest = trained(plain, range(3, 4))
    resumed, teacher = made("dmd2", options, 1)
    waiting(resumed, teacher)
    trained(resumed, [0])  # some states are away now
    assert resumed.offload.gone
    assert checkpoint.load(paths[1], resumed, {}) == 3
    assert trained(resumed, range(3, 4)) == rest


def test_health_checks_bring_what_they_need() -> None:
    options = {"student_every": 2, "guidance_scale": 2.0}
    (plain, _), (engine, teacher) = made("dmd2", options, 1), made("dmd2", options, 1)
    waiting(engine, teacher)
    for one in (plain, engine):
        trained(one, range(2))
    assert health.of_losses(engine, 1) == health.of_losses(plain, 1)
    assert trained(engine, range(2, 4)) == trained(plain, range(2, 4))


def test_pinned_memory_keeps_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    empty_like = torch.empty_like

    def plain(*args: Any, pin_memory: bool, **named: Any) -> Tensor:
        asked.append(pin_memory)
        return empty_like(*args, **named)

    monkeypatch.setattr(torch, "empty_like", plain)
    value = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    move = Host(torch.device("cpu"))
    kept = move.away(value)
    assert asked == [True]
    assert torch.equal(kept, value)
    assert kept.stride() == value.stride()
    assert torch.equal(move.here(kept), value)
    assert move.is_here(value)
    assert not Host(torch.device("cuda")).is_here(value)


# Recipes


def decoded(changes: dict[str, Any]) -> recipe.Recipe:
    tree = yaml.safe_load(command.RECIPE.format(teacher="no/such", prompts="prompts.txt", out="out"))
    return recipe.decode(config.override(tree, ["run.offload=true"]) | changes, "run.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"path": "p", "compile": True}},
            "run.offload moves weights by hooks, which model.compile does not",
        ),
        (
            {"optim": {"student": {"name": "lion8bit"}, "fake_score": {}}},
            r"torch's own optimizers, and optim.student.name is 'lion8bit'; choose adamw",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.build(decoded(changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


def of_world(world: Path, *changes: str) -> recipe.Recipe:
    tree = config.override(config.read(world / "run.yaml"), ["run.offload=true", *changes])
    return recipe.decode(tree, "run.yaml")


def test_on_a_cpu_all_is_in_host_memory_already(world: Path) -> None:
    session = train.build(of_world(world), torch.device("cpu"))
    assert not session.engine.offload.waiting
    assert not session.engine.offload.optimizers
    assert isinstance(offload.way(torch.device("cuda")), Host)


@pytest.mark.parametrize("student", ["{steps: 2}", "{steps: 1, lora: {rank: 2}}"])
def test_a_whole_run_is_the_same_with_its_checks_pictures_checkpoints_and_export(
    student: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, moves = [], []

    def beyond(device: torch.device) -> Beyond:
        moves.append(Beyond())
        return moves[-1]

    for name, way in (("plain", lambda device: None), ("away", beyond)):
        monkeypatch.setattr(offload, "way", way)
        given = (f"student={student}", "health.every=2", f"run.out={tmp_path / name}", "run.trackers=[]")
        runs.append(train.train(of_world(world, *given)))
    assert len(moves) == 1
    assert len(moves[0].kept) > (8 if "lora" in student else 100)
    plain, ours = ({p.relative_to(r): p for p in r.rglob("*") if p.suffix in (".safetensors", ".png")} for r in runs)
    assert plain.keys() == ours.keys()
    compared = [name for name in plain if ".optim." not in name.name]  # states that wait here have no values to save
    assert len(compared) > 10
    for name in compared:
        assert plain[name].read_bytes() == ours[name].read_bytes(), name
    rows = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in runs]
    for one, two in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if "/" in k} == {k: v for k, v in two.items() if "/" in k}
