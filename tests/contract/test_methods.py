"""What every method in ``fastgen.trainers`` keeps, found by being there."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastgen import checkpoint, config, lora
from fastgen.ema import EMA
from fastgen.engine import Engine, NonFiniteLoss
from fastgen.experts import members
from fastgen.family import Family
from fastgen.guidance import student_guidance
from fastgen.method import Batch, NeedsPairs
from fastgen.pipelines import sd
from tests import tiny
from tests.golden import record
from tests.oracle import (
    Samples,
    conv_family,
    gradients_by_phase,
    labels,
    moved,
    optims,
    same,
    states,
    train,
    trained,
)

METHODS = record.methods()
CASES = [(name, variant) for name in METHODS for variant in record.variants(name)]


class SD:
    """The data of the tiny Stable Diffusion: its prompts in turn, latents from the oracle."""

    def __init__(self, family: Family) -> None:
        self.family, self.latents = family, Samples(family.latent_shape)

    def batch(self, samples: Sequence[int]) -> Batch:
        prompts = [tiny.PROMPTS[s % len(tiny.PROMPTS)] for s in samples]
        cond = self.family.encode_prompts(prompts)
        return dataclasses.replace(self.latents.batch(samples), cond=cond, uncond=self.family.uncond())


def toy() -> tuple[Family, Any]:
    return conv_family(), Samples((2, 8, 8))


def real(prediction_type: str) -> tuple[Family, Any]:
    family = sd.wrap(tiny.pipeline(prediction_type))
    return family, SD(family)


WORLDS: dict[str, Callable[[], tuple[Family, Any]]] = {
    "toy": toy,
    "sd-epsilon": lambda: real("epsilon"),
    "sd-v": lambda: real("v_prediction"),
}


def build(name: str, variant: str, world: str) -> tuple[Any, Any]:
    """A method and its data. Blocks are the toy's names, so a real network takes its own default instead."""
    family, data = WORLDS[world]()
    options, num_steps = record.variants(name)[variant]
    return record.make(name, options if world == "toy" else without_blocks(options), family, num_steps), data


def without_blocks(options: dict[str, Any]) -> dict[str, Any]:
    """The options without the toy's names of blocks."""
    return {
        key: without_blocks(value) if isinstance(value, dict) else value
        for key, value in options.items()
        if key != "blocks"
    }


def test_there_are_methods() -> None:
    assert {"dmd2", "pretrain"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_is_the_algorithm_with_its_arxiv_id(name: str) -> None:
    doc = METHODS[name].__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{4,5}", doc.split("\n")[0]), "the first line names paper, year and arXiv id"
    assert len(doc.splitlines()) > 5


@pytest.mark.parametrize("name", METHODS)
def test_it_says_what_a_user_chooses_by(name: str) -> None:
    about = METHODS[name].ABOUT
    assert about.paper
    assert f"arXiv {about.arxiv}" in (METHODS[name].__doc__ or "")
    assert about.needs
    assert {need.split(" ")[0] for need in about.needs} <= {"prompts", "images", "pairs"}
    assert all(1 <= steps <= 8 for steps in about.steps)


@pytest.mark.parametrize("name", METHODS)
def test_config_is_frozen_documented_and_has_defaults(name: str) -> None:
    cls = METHODS[name].Config
    assert cls.__doc__
    assert dataclasses.is_dataclass(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), dataclasses.fields(cls)[0].name, None)
    assert all(f.metadata.get("help") for f in dataclasses.fields(cls)), "each field says what it is"


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_config_survives_yaml(name: str, variant: str) -> None:
    options, _ = record.variants(name)[variant]
    original = config.decode(METHODS[name].Config, options, "variant")
    tree = yaml.safe_load(yaml.safe_dump(config.encode(original)))
    assert config.decode(METHODS[name].Config, tree, "config.yaml") == original


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_it_builds_and_says_what_it_is(name: str, variant: str, world: str) -> None:
    method, _ = build(name, variant, world)
    assert method.exported in method.networks
    assert method.exported in trained(method)
    assert isinstance(method.needs_images, bool)
    names = [phase.name for phase in method.phases]
    assert len(set(names)) == len(names)
    assert any(phase.every == 1 for phase in method.phases)


@pytest.mark.parametrize("name", METHODS)
def test_it_builds_on_a_family_without_blocks_unless_it_is_about_them(name: str) -> None:
    options, family = METHODS[name].Config(), dataclasses.replace(conv_family(), blocks=[])
    num_steps = next(iter(METHODS[name].ABOUT.steps), 1)
    if name == "adversarial":
        with pytest.raises(ValueError, match="needs blocks to read"):
            METHODS[name].Method(options, family, num_steps)
    else:
        METHODS[name].Method(options, family, num_steps)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_two_steps_train_only_what_a_phase_trains_and_all_of_it(name: str, variant: str, world: str) -> None:
    """Gradients, movement and finiteness; what no phase trains stays bit-equal; the result exports."""
    method, data = build(name, variant, world)
    learning = {f"{r}.{n}" for r, net in method.networks.items() for n, p in net.named_parameters() if p.requires_grad}
    found, before = gradients_by_phase(method), states(method)
    engine = Engine(method, data, optims(method, lr=1e-3, weight_decay=0.0), batch_size=2, steps=2 * period(method))
    logs = train(engine, [0, period(method)])  # steps at which every phase has its turn
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert {key.split("/")[0] for key in logs[0]} == {phase.name for phase in method.phases}
    after = states(method)
    for phase in method.phases:
        expected = {key for key in learning if key.partition(".")[0] in phase.trains}
        assert found[phase.name] == expected
    for role in method.networks:
        if role in trained(method):
            trainable = {key.partition(".")[2] for key in learning if key.startswith(f"{role}.")}
            assert trainable - balanced(method, role) <= moved(before[role], after[role]) <= trainable
        elif role in {role for phase in method.phases for role in phase.moves}:
            assert moved(before[role], after[role])
        else:
            assert same(before[role], after[role])


def balanced(method: Any, role: str) -> set[str]:
    """Parameters that may rest: within its margin the hinge pulls real and fake alike, and no head's last bias."""
    options = getattr(getattr(method, "config", None), "adversarial", None)
    if role != "discriminator" or options is None or options.loss != "hinge":
        return set()
    return {f"heads.{i}.{len(head) - 1}.bias" for i, head in enumerate(method.networks[role].heads)}


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize(("name", "variant"), [case for case in CASES if case[0] != "pretrain"])
def test_its_student_may_be_adapters_and_its_teacher_the_same_network(name: str, variant: str, share: bool) -> None:
    """All that a phase trains moves, and nothing else; the frozen network is the teacher's own tensors still."""
    family = conv_family()
    own = {key: value.clone() for key, value in family.denoiser.network.state_dict().items()}
    options, num_steps = record.variants(name)[variant]
    method = record.make(name, options, lora.adapted(family, lora.Lora(rank=2), share), num_steps)
    student = method.networks[method.exported]
    assert all(isinstance(network, lora.View) for network in members(student))
    assert all(".lora_" in key for key in student.state_dict())
    before = states(method)
    engine = Engine(method, build(name, variant, "toy")[1], optims(method, lr=1e-3), batch_size=2, steps=100)
    train(engine, [0, period(method)])
    after = states(method)
    moving = {role for phase in method.phases for role in phase.moves}
    assert {role for role in before if not same(before[role], after[role])} == {*trained(method), *moving}
    assert same(own, family.denoiser.network.state_dict())


def period(method: Any) -> int:
    return math.lcm(*(phase.every for phase in method.phases))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_each_phase_moves_its_own_networks_and_no_other(name: str, variant: str) -> None:
    for i in range(len(build(name, variant, "toy")[0].phases)):
        method, data = build(name, variant, "toy")
        engine = Engine(method, data, optims(method, lr=1e-3), batch_size=2, steps=1)
        before = states(method)
        engine.turn(method.phases[i], 0)
        after = states(method)
        phase = method.phases[i]
        assert {role for role in before if not same(before[role], after[role])} == {*phase.trains, *phase.moves}


class Spoilt:
    """Data whose conditions are NaN from a sample on."""

    def __init__(self, data: Any, start: int) -> None:
        self.data, self.start = data, start

    def batch(self, samples: Sequence[int]) -> Batch:
        batch = self.data.batch(samples)
        if samples[0] < self.start:
            return batch
        return dataclasses.replace(batch, cond={name: value * math.nan for name, value in batch.cond.items()})


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_nan_stops_each_phase_before_anything_moves_and_names_step_and_phase(name: str, variant: str) -> None:
    for i in range(len(build(name, variant, "toy")[0].phases)):
        method, data = build(name, variant, "toy")
        step = 2 * period(method)
        engine = Engine(method, Spoilt(data, 2 * step), optims(method, lr=1e-3), batch_size=2, steps=100)
        train(engine, range(2))
        before = states(method)
        with pytest.raises(NonFiniteLoss, match=f"step {step}, phase '{method.phases[i].name}'"):
            engine.turn(method.phases[i], step)
        assert all(same(before[role], after) for role, after in states(method).items())


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_terms_are_one_value_a_sample_and_do_not_depend_on_the_batch(name: str, variant: str) -> None:
    """A sample's terms are the same alone and among others: nothing is averaged over the batch."""
    from fastgen.rng import Noise

    method, data = build(name, variant, "toy")
    for phase in method.phases:
        for step in range(3):
            whole = phase.loss(data.batch(range(4)), Noise(range(4), 0, step, phase.name))
            for i in range(4):
                alone = phase.loss(data.batch([i]), Noise([i], 0, step, phase.name))
                assert alone.keys() == whole.keys()
                for key, term in whole.items():
                    assert term.shape == (4,)
                    torch.testing.assert_close(alone[key][0], term[i], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_method_that_needs_no_image_runs_on_prompts_alone(name: str, variant: str) -> None:
    method, _ = build(name, variant, "toy")
    if method.needs_images or isinstance(method, NeedsPairs):
        pytest.skip("needs more")
    data = Samples((2, 8, 8), images=False)
    train(Engine(method, data, optims(method, lr=1e-3), batch_size=2, steps=2), range(2))


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("autocast", [torch.bfloat16])
def test_it_trains_under_autocast(name: str, variant: str, autocast: torch.dtype) -> None:
    """Every parameter still gets its gradient, in float32."""
    family = sd.wrap(tiny.pipeline("v_prediction"), autocast)
    options, num_steps = record.variants(name)[variant]
    method = record.make(name, without_blocks(options), family, num_steps)
    learning = {f"{r}.{n}" for r, net in method.networks.items() for n, p in net.named_parameters() if p.requires_grad}
    found = gradients_by_phase(method)
    engine = Engine(method, SD(family), optims(method, lr=1e-3), batch_size=2, steps=1)
    logs = train(engine, [0])
    assert all(math.isfinite(value) for value in logs[0].values())
    assert set().union(*found.values()) == {key for key in learning if key.partition(".")[0] in trained(method)}
    assert {p.dtype for net in method.networks.values() for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("world", ["sd-epsilon", "sd-v"])
@pytest.mark.parametrize("name", METHODS)
def test_what_it_trained_exports_through_the_gate(name: str, world: str, tmp_path: Path) -> None:
    from fastgen.export import export

    method, data = build(name, next(iter(record.variants(name))), world)
    train(Engine(method, data, optims(method, lr=1e-3), batch_size=2, steps=2), range(2))
    network = method.networks[method.exported]
    options: Any = {"sampler": method.sampler, "guidance_scale": student_guidance(method)}
    export(data.family, network, method.num_steps, tmp_path / "pipeline", prompts=["a red apple"], card={}, **options)
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_accumulated_micro_batches_equal_one_batch(name: str, variant: str) -> None:
    """1 x 8 = 2 x 4 = 8 x 1, by largest and by mean difference."""
    results = []
    for batch_size in (8, 4, 1):
        method, data = build(name, variant, "toy")
        optim = optims(method, lr=1e-3, eps=1e-4)  # gradients of rounding size must not become whole steps
        train(Engine(method, data, optim, batch_size=batch_size, accumulate=8 // batch_size, steps=3), range(3))
        results.append(torch.cat([v.flatten() for s in states(method).values() for v in s.values()]))
    for other in results[1:]:
        difference = (results[0] - other).abs()
        assert difference.max() < 1e-4
        assert difference.mean() < 1e-6


RESUMED = [(name, variant, 3, False) for name, variant in CASES]
RESUMED += [(name, next(iter(record.variants(name))), 4, True) for name in METHODS]


@pytest.mark.parametrize(("name", "variant", "cut", "fp16"), RESUMED)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    name: str, variant: str, cut: int, fp16: bool, tmp_path: Path
) -> None:
    """All that a run holds: networks, targets, averages, moments, learning rates, loss scales, the order of data."""

    def start() -> tuple[Any, Engine, dict[str, EMA]]:
        method, data = build(name, variant, "toy")
        ema = {method.exported: EMA(method.networks[method.exported], 0.9)}
        optim = optims(method, lr=1e-3, schedule="cosine", warmup=2)
        return method, Engine(method, data, optim, batch_size=2, steps=8, fp16=fp16), ema

    def go(engine: Engine, ema: dict[str, EMA], steps: range) -> list[dict[str, float]]:
        logs = []
        for _, log in engine.run(steps):
            logs.append(log)
            for average in ema.values():
                average.update()
        return logs

    method, engine, ema = start()
    logs = go(engine, ema, range(6))
    _, first, first_ema = start()
    assert shown(go(first, first_ema, range(cut))) == shown(logs[:cut])
    path = checkpoint.save(tmp_path, cut, first, first_ema, 1)
    resumed, second, second_ema = start()
    assert shown(go(second, second_ema, range(checkpoint.load(path, second, second_ema), 6))) == shown(logs[cut:])
    assert all(same(one, states(resumed)[role]) for role, one in states(method).items())
    assert same(ema[method.exported].average, second_ema[method.exported].average)
    assert ema[method.exported].updates == second_ema[method.exported].updates
    assert moments(engine) == moments(second)
    scales = [{phase: scaler.state_dict() for phase, scaler in one.scalers.items()} for one in (engine, second)]
    assert scales[0] == scales[1]


def shown(logs: list[dict[str, float]]) -> list[dict[str, str]]:
    """Logs whose NaN, as the norm of a gradient that overflowed, equals itself."""
    return [{name: repr(value) for name, value in log.items()} for log in logs]


def moments(engine: Engine) -> dict[str, bytes]:
    """All that the optimizers hold, by role, parameter and kind."""
    return {
        f"{role}.{name}.{kind}": value.numpy().tobytes()
        for role, parameters in engine.parameters.items()
        for name, p in parameters.items()
        for kind, value in engine.optimizers[role].state[p].items()
    }


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_gradient_checkpointing_changes_no_loss(name: str, variant: str) -> None:
    results = []
    for on in (False, True):
        method, data = build(name, variant, "sd-v")
        for network in [n for role in method.networks.values() for n in members(role)]:
            if on and hasattr(network, "enable_gradient_checkpointing"):
                network.enable_gradient_checkpointing()
        results.append(train(Engine(method, data, optims(method, lr=1e-3), batch_size=2, steps=2), range(2)))
    for one, two in zip(*results, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


# Golden


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_ten_losses_are_as_recorded(name: str, variant: str) -> None:
    """Re-record with ``python -m tests.golden.record`` where the change is meant."""
    golden = json.loads((record.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    expected = golden["losses"][variant]
    found = record.losses(name, *record.variants(name)[variant])
    assert len(found) == len(expected) == record.STEPS
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=golden["tolerance"]["rtol"], abs=golden["tolerance"]["atol"]), (
            f"step {step}, recorded with {golden['versions']}"
        )


def test_golden_files_are_those_of_the_methods() -> None:
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in record.FOLDER.glob("*.json")}
    assert set(files) == set(METHODS)
    assert all(set(golden["losses"]) == set(record.variants(name)) for name, golden in files.items())


def test_captions_of_the_toy_serve_as_prompts() -> None:
    assert conv_family().encode_prompts(["left"])["label"].tolist() == labels(["left"])["label"].tolist()
