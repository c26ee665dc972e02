"""What a training would hold: the ledger against hand counts, the networks against published sizes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastgen import config, estimate, memory, offload, recipe
from fastgen.recipe import Model
from fastgen.train import build
from tests import command, tiny
from tests.gpu import memory as real

# Counts of denoising networks that were not found anywhere to the last digit: the size in the model's name
ROUNDED = {
    "sana-1600m-1024px": 1.6e9,
    "sana-600m-1024px": 0.6e9,
}
MODELS = {folder.name: (folder, about) for folder, about in estimate.shipped().items()}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def components(folder: Path) -> dict[str, list[str]]:
    index = json.loads((folder / "model_index.json").read_text())
    return {name: value for name, value in index.items() if isinstance(value, list) and value[0]}


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_of_a_shipped_model_are_those_published(name: str) -> None:
    folder, about = MODELS[name]
    found = {}
    with torch.device("meta"):
        for part, (library, cls) in components(folder).items():
            made = (
                estimate.component(folder / part, library, cls) if (folder / part / "config.json").is_file() else None
            )
            if isinstance(made, nn.Module):
                found[part] = estimate.counted([made])
    assert found == about.parameters
    assert set(about.sources) == set(about.parameters)
    network = found.get("transformer") or found["unet"]
    if name in ROUNDED:
        assert "name" in about.sources["transformer"]
        assert network == pytest.approx(ROUNDED[name], rel=0.02)


def test_diffusers_dit_is_the_published_one_with_an_embedding_of_its_own_in_each_block() -> None:
    """675,129,632 are DiT-XL/2's (facebookresearch/DiT), positions included, which Diffusers has as a buffer."""
    embedding = (256 * 1152 + 1152) + (1152 * 1152 + 1152) + 1001 * 1152
    _, about = MODELS["dit-xl-2-256"]
    assert about.parameters["transformer"] == 675_129_632 - 256 * 1152 + 27 * embedding


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_says_which_of_its_files_are_read(name: str) -> None:
    folder, _ = MODELS[name]
    for part, (library, cls) in components(folder).items():
        file = {"scheduler": "scheduler_config.json"}.get(part, "config.json")
        assert (folder / part / file).is_file() != part.startswith("tokenizer"), (library, cls)


def test_a_ledger_adds_what_is_made_and_takes_off_what_is_let_go() -> None:
    ledger = estimate.Ledger(block=512)
    with estimate.without_weights(ledger, "cpu"):
        x = torch.zeros(1000, 1000)
        y = x + 1
        z = y[10:]  # of y's storage
        small = torch.zeros(3)
    assert ledger.held == 2 * 4_000_256 + 512
    del y
    assert ledger.held == 2 * 4_000_256 + 512
    del z, x
    assert ledger.held == 512
    assert ledger.peak == 2 * 4_000_256 + 512
    assert small.tolist() == [0.0, 0.0, 0.0]


def test_a_ledger_counts_products_forward_and_backward() -> None:
    ledger = estimate.Ledger()
    with estimate.without_weights(ledger, "cpu"):
        layer, x = nn.Linear(512, 256), torch.zeros(300, 512)
        layer(x).sum().backward()
        assert ledger.flops == 2 * (2 * 300 * 512 * 256)  # x itself learns nothing
        ledger.flops = 0
        q = torch.zeros(2, 4, 100, 64, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    product = 2 * 2 * 4 * 100 * 100 * 64
    assert ledger.flops == 2 * product + 5 * product  # the backward pass makes the scores again


def test_a_fake_tensor_is_not_nothing_and_equal_to_its_copies() -> None:
    with estimate.without_weights(estimate.Ledger(), "cpu"):
        large, other = torch.zeros(1000, 1000), torch.ones(1000, 1000)
        assert large.any()
        assert int(large.long().sum()) == 1
        assert float(large.sum()) == 1.0
        assert torch.equal(large, other)
        assert not torch.equal(large, other[:10])
        with pytest.raises(Exception, match="nonzero"):
            large.nonzero()
    with estimate.without_weights(estimate.Ledger(same=False), "cpu"):
        assert not torch.equal(torch.zeros(1000, 1000), torch.zeros(1000, 1000))


def test_autocast_is_that_of_the_device() -> None:
    x = torch.zeros(2, 8)
    for device, wanted in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        with estimate.without_weights(estimate.Ledger(), device), torch.autocast("cpu", torch.bfloat16):  # type: ignore[arg-type]
            y = nn.Linear(8, 8)(x)
            assert y.dtype == torch.bfloat16
            assert torch.nn.functional.layer_norm(y, (8,)).dtype == wanted
            assert y.softmax(-1).dtype == wanted
    with estimate.without_weights(estimate.Ledger(), "cuda"):
        assert torch.nn.functional.layer_norm(x.bfloat16(), (8,)).dtype == torch.bfloat16


def test_modules_can_be_moved_again_afterwards() -> None:
    layer = nn.Linear(2, 2)
    with estimate.without_weights(estimate.Ledger(), "cpu"):
        assert layer.to(torch.float64).weight.dtype == torch.float32
    assert layer.to(torch.float64).weight.dtype == torch.float64


def test_eight_bit_moments_are_a_byte_and_their_scales() -> None:
    assert estimate.fewer_bits([torch.zeros(4096), torch.zeros(10, 10)], (2, 1.0)) == 2 * (4096 + 4 * 16) + 800
    assert estimate.fewer_bits([torch.zeros(4097)], (2, 1.0)) == 2 * (4097 + 4 * 17)
    assert estimate.fewer_bits([torch.zeros(4096)], (1, 4.0)) == 4 * 4096
    assert estimate.fewer_bits([torch.zeros(4096)], (2, 0.5)) == 4096 + 2 * 4 * 32


def test_a_card_needs_room_for_more_than_the_peak() -> None:
    gib = 2**30
    assert estimate.fits(10 * gib) == [12, 16, 24, 40, 80, 141]
    assert estimate.fits(int(10.1 * gib)) == [16, 24, 40, 80, 141]
    assert estimate.fits(200 * gib) == []


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    command.world(tmp_path)
    return config.read(tmp_path / "run.yaml")


@pytest.mark.parametrize("form", memory.FORMS)
@pytest.mark.parametrize("extra", [{}, {"adversarial": {"weight": 0.1}}])
def test_what_must_be_held_is_what_is_held(tree: dict[str, Any], form: str, extra: dict[str, Any]) -> None:
    tree["method"] |= extra
    if extra:
        tree["optim"]["discriminator"] = tree["optim"]["student"]
        tree["data"] = {"source": "images", "path": str(Path(tree["data"]["path"]).parent / "images")}
    decoded = recipe.decode(memory.formed(tree, form), "run.yaml")
    session = build(decoded)
    session.engine.turn(session.method.phases[0], 0)
    session.engine.turn(session.method.phases[1], 0)
    row = estimate.estimate(decoded, "cpu")
    held = memory.held(session)
    assert row["parts"] == held
    assert row["held"] == memory.total(held)
    assert row["trained"] == {
        role: sum(p.numel() for p in found.values()) for role, found in session.engine.parameters.items()
    }
    assert row["peak"] > row["held"] - held["gradients"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the profiler looks at it
@pytest.mark.parametrize("form", memory.FORMS)
def test_the_peak_is_that_of_a_real_run(tree: dict[str, Any], form: str) -> None:
    """What torch's own allocator says of the same turns on real tensors."""
    tree["run"] |= {"batch_size": 32, "precision": "bf16"}
    decoded = recipe.decode(memory.formed(tree, form), "run.yaml")
    session = build(decoded)
    estimate.warm(session.engine)
    held = memory.held(session)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for phase in session.method.phases:
            session.engine.turn(phase, 0)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    measured = memory.total(held) - held["gradients"] + peak
    assert estimate.estimate(decoded, "cpu")["peak"] == pytest.approx(measured, rel=0.1)


def test_eight_bit_optimizers_hold_a_quarter(tree: dict[str, Any]) -> None:
    plain = estimate.estimate(recipe.decode(tree, "run.yaml"), "cpu")
    tree["optim"]["student"]["name"] = "adamw8bit"
    found = estimate.estimate(recipe.decode(tree, "run.yaml"), "cpu")
    saved = plain["parts"]["optimizer"] - found["parts"]["optimizer"]
    assert 0 < saved < plain["parts"]["optimizer"] / 2
    assert plain["peak"] - found["peak"] == saved
    assert {k: v for k, v in plain["parts"].items() if k != "optimizer"} == {
        k: v for k, v in found["parts"].items() if k != "optimizer"
    }


# What waits in the host's memory


def numbers(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def blocks(network: nn.Module, copies: int, block: int) -> int:
    """Bytes of so many float32 copies of its parameters, each rounded up to blocks."""
    return copies * sum(-(-4 * p.numel() // block) * block for p in network.parameters())


def test_with_offload_a_turn_holds_what_it_needs_and_the_rest_waits(tree: dict[str, Any]) -> None:
    """DMD2 of whole networks: its critic has no use for the teacher and the student's moments."""
    teacher, student = tiny.unet(), tiny.unet(time_cond_proj_dim=32)  # of which the projection does not learn
    one, tensors = 4 * numbers(teacher), 4 * len([*teacher.parameters()])
    encoders = 4 * sum(numbers(part) for part in (tiny.pipeline().vae, tiny.pipeline().text_encoder))
    ids = 8 * 16  # the text encoder's positions, which are a buffer
    plain = estimate.estimate(recipe.decode(tree, "run.yaml"), "cuda")
    tree["run"]["offload"] = True
    row = estimate.estimate(recipe.decode(tree, "run.yaml"), "cuda")
    moments = 2 * one + tensors  # of a role: two numbers for each of its weights, and a count for each tensor
    learning = 4 * numbers(student) + one  # student's and fake score's weights
    expected = {
        "weights": {"teacher": 0, "student": 4 * numbers(student), "fake_score": one},
        "gradients": one,
        "optimizer": moments,
        "ema": one,
        "pipeline": encoders + ids,
    }
    assert row["turns"]["critic"]["parts"] == expected
    assert row["turns"]["critic"]["held"] == learning + one + moments + one + encoders + ids
    expected["weights"]["teacher"] = one
    assert row["turns"]["student"]["parts"] == row["parts"] == expected
    assert row["turns"]["student"]["held"] == row["held"] == learning + 3 * one + moments + encoders + ids
    assert row["host"] == one + 2 * moments  # at a change of phase the moments of both
    assert row["peak"] == max(turn["peak"] for turn in row["turns"].values())
    assert plain["host"] == 0
    assert plain["held"] == row["held"] + moments
    # all that passes through a turn is the same, and what waits is off its peak, in blocks of the allocator
    waits = blocks(teacher, 2, 512) + 512 * len([*teacher.parameters()])
    for name, more in (("critic", blocks(teacher, 1, 512)), ("student", 0)):
        assert plain["turns"][name]["peak"] - row["turns"][name]["peak"] == waits + more
    assert plain["peak"] - row["peak"] == waits


def test_without_a_device_of_its_own_nothing_waits(tree: dict[str, Any]) -> None:
    plain = estimate.estimate(recipe.decode(tree, "run.yaml"), "cpu")
    tree["run"]["offload"] = True
    row = estimate.estimate(recipe.decode(tree, "run.yaml"), "cpu")
    assert {**row, "offload": True} == {**plain, "offload": True}
    assert not row["offload"]


class Tracked:
    """A way to the host's memory that knows which tensors wait there."""

    def __init__(self) -> None:
        self.waiting: dict[int, torch.Tensor] = {}

    def is_here(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata not in self.waiting

    def away(self, tensor: torch.Tensor) -> torch.Tensor:
        left = tensor.clone()
        self.waiting[left.untyped_storage()._cdata] = left
        return left

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


@pytest.mark.parametrize("form", memory.FORMS)
def test_what_a_turn_holds_with_offload_is_what_a_real_one_holds(
    tree: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = Tracked()
    monkeypatch.setattr(offload, "way", lambda device: move)
    tree["run"]["offload"] = True
    decoded = recipe.decode(memory.formed(tree, form), "run.yaml")
    session = build(decoded)
    engine, held = session.engine, dict[str, int]()
    rest, now = engine.offload.rest, [""]

    def resting() -> None:
        if any(p.grad is not None for found in engine.parameters.values() for p in found.values()):
            held[now[0]] = real.held_now(session, move.is_here)
        rest()

    monkeypatch.setattr(engine.offload, "rest", resting)
    for step in (0, 2):
        for phase in session.method.phases:
            now[0] = phase.name
            engine.turn(phase, step)
    row = estimate.estimate(decoded, "cuda")
    assert {name: turn["held"] for name, turn in row["turns"].items()} == held
    assert (row["turns"]["critic"]["parts"]["weights"].get("teacher") == 0) == (form == "whole")
    assert row["host"] > 0


def test_what_offload_does_not_go_with_is_refused(tree: dict[str, Any]) -> None:
    tree["run"]["offload"] = True
    tree["optim"]["student"]["name"] = "adamw8bit"
    with pytest.raises(ValueError, match=r"torch's own optimizers, and optim.student.name is 'adamw8bit'"):
        estimate.estimate(recipe.decode(tree, "run.yaml"), "cuda")


def test_frozen_weights_of_layers_take_half_in_half_precision(tree: dict[str, Any]) -> None:
    def row(dtype: str) -> dict[str, Any]:
        given = config.override(tree, ["run.precision=bf16", f"model.dtype={dtype}"])
        return estimate.estimate(recipe.decode(given, "run.yaml"), "cuda")

    teacher = tiny.unet()
    layers = [m.weight.numel() for m in teacher.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    full, half = row("fp32"), row("bf16")
    assert full["parts"]["weights"]["teacher"] == 4 * numbers(teacher)
    assert half["parts"]["weights"]["teacher"] == 4 * numbers(teacher) - 2 * sum(layers)
    assert full["held"] - half["held"] == 2 * sum(layers)
    for name in ("gradients", "optimizer", "ema", "pipeline"):
        assert full["parts"][name] == half["parts"][name]
    saved = sum(-(-4 * n // 512) * 512 - -(-2 * n // 512) * 512 for n in layers)
    assert full["peak"] - half["peak"] >= saved  # and casts of the teacher's weights, where they count


def test_rows_of_a_lower_dtype_are_each_held_in_what_it_computes_in(tree: dict[str, Any]) -> None:
    tree["model"]["dtype"] = "bf16"
    tree["run"]["offload"] = True
    rows = estimate.rows(tree, "run", "run.yaml", ["whole"], ["fp32", "bf16"], "cuda")
    assert [(row["precision"], row["dtype"]) for row in rows] == [("fp32", "fp32"), ("bf16", "bf16")]
    weights = [row["parts"]["weights"]["teacher"] for row in rows]
    assert weights[0] == 4 * numbers(tiny.unet()) > weights[1]
    columns, lines = estimate.table(rows)
    assert columns[columns.index("peak") + 1] == "host"
    assert [len(line) for line in lines] == [len(columns)] * 2
    told = estimate.told(rows)
    assert told[0].endswith("gradient checkpointing off, frozen weights in what is computed in")
    assert told[2].startswith("whole, fp32: held in the turn of critic 0.00, peak 0.0")
    assert told[3].endswith("run.offload lets up to 0.00 wait in the host's memory")


def test_a_longer_chain_costs_a_call_more_on_average(tree: dict[str, Any]) -> None:
    def of(steps: int) -> dict[str, Any]:
        return estimate.estimate(recipe.decode(config.override(tree, [f"student.steps={steps}"]), "run.yaml"), "cpu")

    one, three = of(1), of(3)
    calls = 1 + 1 / tree["method"]["student_every"]  # in the critic's turn, and in the student's
    assert three["flops_call"] == one["flops_call"]
    assert three["flops_image"] == 3 * one["flops_image"]
    assert three["flops"] - one["flops"] == pytest.approx(calls * one["batch_size"] * one["flops_call"], rel=1e-6)


def test_rows_are_of_forms_and_precisions_and_say_what_was_left_out(
    tree: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tree["student"]["init"] = tree["model"]["path"]
    rows = estimate.rows(tree, "run", "run.yaml", ["whole", "shared"], ["fp32", "bf16"], "cuda")
    assert [(row["form"], row["precision"]) for row in rows] == [("whole", "fp32"), ("whole", "bf16")]
    assert "run: left out shared: student.share_backbone needs a student that starts as the teacher" in caplog.text
    columns, lines = estimate.table(rows)
    assert all(len(line) == len(columns) for line in lines)
    assert lines[1][:3] == ["run", "whole", "bf16, fp16"]
    told = estimate.told(rows)
    assert told[0] == "run: dmd2, 2 images of 16 x 16 a micro-batch, attention sdpa, gradient checkpointing off"
    assert told[1].startswith("whole: parameters of teacher ")


def test_what_no_form_can_do_is_refused(tree: dict[str, Any]) -> None:
    tree["model"]["path"] = "nobody/nothing"
    with pytest.raises(
        ValueError, match=r"nobody/nothing: no such folder, .* \(.*FLUX.1-dev.*\); give a local snapshot"
    ):
        estimate.rows(tree, "run", "run.yaml", ["whole"], ["fp32"], "cuda")


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_index.json: cannot be read \(.*No such file"):
        estimate.opened(tmp_path)


def test_a_part_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diffusers has no NewestModel; this model cannot be estimated"):
        estimate.component(tmp_path / "unet", "diffusers", "NewestModel")
    with pytest.raises(ValueError, match="elsewhere has no Model"):
        estimate.component(tmp_path / "unet", "elsewhere", "Model")


@pytest.mark.parametrize("text", ["{", "[]", '{"num_train_timesteps": "many"}'])
def test_a_part_whose_settings_are_broken_is_named(text: str, tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot be opened as a pipeline \(its scheduler: "):
        estimate.opened(tmp_path)


def test_a_shipped_model_is_found_by_its_hub_id(tmp_path: Path) -> None:
    folder, about = MODELS["stable-diffusion-v1-5"]
    assert estimate.folder_of(Model(path=about.hub)) == (folder, about)
    assert estimate.folder_of(Model(path=str(tmp_path))) == (tmp_path, None)


def test_a_shipped_model_is_built_in_full_size_without_weights() -> None:
    tree = {
        "model": {"path": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
        "method": {"name": "lcm"},
        "data": {"source": "images", "path": "none"},
        "optim": {"student": {}},
        "run": {"out": "none", "steps": 1, "batch_size": 1},
    }
    with estimate.without_weights(estimate.Ledger(), "cuda"):
        session = estimate.build(recipe.decode(tree, "x"), "cuda", torch.device("cpu"))
        batch = session.engine.data.batch([0])
    assert estimate.counted([session.method.networks["teacher"]]) == 859_520_964
    assert batch.cond["text"].shape == (1, 77, 768)
    assert batch.x0 is not None
    assert batch.x0.shape == (1, 4, 64, 64)
    assert session.family.image_size == (512, 512)


def test_the_command_prints_tables_and_rows(tmp_path: Path) -> None:
    command.world(tmp_path)
    shown = command.done("estimate", tmp_path / "run.yaml", "--form", "own", "--precision", "fp32")
    assert "TFLOP/step" in shown.out
    assert "parameters of teacher" in shown.out
    rows = json.loads(
        command.done("estimate", tmp_path / "run.yaml", "run.batch_size=3", "--form", "whole", "--json").out
    )
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert {row["batch_size"] for row in rows} == {3}
