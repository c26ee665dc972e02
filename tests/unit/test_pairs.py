"""Teacher pairs on disk: what is made, that what is cut off goes on, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen import pairs, parallel, registry
from fastgen.data import PairSource, prompts
from fastgen.data import pairs as source_module
from fastgen.data.batches import Batches
from fastgen.data.pairs import Card, Config, Pairs, fingerprint
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.pairs import decode, make, solve
from fastgen.pipelines import sd
from fastgen.rng import Noise
from fastgen.sampling import ddim_times
from tests import tiny
from tests.oracle import conv_family, gaussian_family, labels, same

SHAPE = (2, 2, 2)
PATH = [749.0, 499.0, 249.0]
Change = Callable[[Path], None]


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> dict[str, Family]:
    """What is loaded as the teacher; a test may put another in its place."""
    chosen = {"family": gaussian_family()}
    monkeypatch.setattr(pairs, "load_teacher", lambda *_: (chosen["family"], registry.find("family", "sd")))
    return chosen


def recipe(folder: Path, **changes: Any) -> pairs.Recipe:
    """Ten pairs of "left" and "right", in shards of four."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("left\nright\nleft")
    options = {"number": 10, "num_steps": 8, "guidance_scale": 2.0, "shard_size": 4, "batch_size": 3, "path": PATH}
    tree = {
        "model": {"family": "sd", "path": "toy"},
        "data": {"source": "prompts", "path": str(folder / "prompts.txt")},
        "pairs": {"out": str(folder / "pairs"), **options, **changes},
    }
    return decode(tree, "toy")


def made(folder: Path, **changes: Any) -> Path:
    make(recipe(folder, **changes))
    return folder / "pairs"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of all shards, in order."""
    files = [load_file(f) for f in sorted(folder.glob("shard-*"))]
    return {name: torch.cat([f[name] for f in files]) for name in files[0]}


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


# What is made


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pairs_are_the_stock_pipeline_s_ddim_images_of_the_same_noise(
    tmp_path: Path, teacher: dict[str, Family], prediction_type: str
) -> None:
    """And the states between are those that it goes through."""
    pipeline = tiny.pipeline(prediction_type)
    teacher["family"] = sd.wrap(pipeline)
    chosen = recipe(tmp_path, number=2)
    (tmp_path / "prompts.txt").write_text("a red apple")
    make(chosen)
    found = tensors(tmp_path / "pairs")
    between: list[torch.Tensor] = []

    def keep(_: Any, step: int, timestep: int, state: dict[str, Any]) -> dict[str, Any]:
        between.append(state["latents"].clone())
        return state

    stock = pipeline(
        ["a red apple"] * 2,
        latents=found["eps"].clone(),
        num_inference_steps=8,
        guidance_scale=2.0,
        output_type="latent",
        callback_on_step_end=keep,
    ).images
    torch.testing.assert_close(found["x0"], stock, rtol=1e-4, atol=1e-4)
    for i, after in enumerate((2, 4, 6)):  # steps: 999, 874, 749, ...
        torch.testing.assert_close(found[f"path.{i}"], between[after - 1], rtol=1e-4, atol=1e-4)
    assert found["x0"].std() > 0.1
    assert not torch.equal(found["x0"][0], found["x0"][1])


def test_pairs_belong_to_their_prompt_and_to_keyed_noise(tmp_path: Path, teacher: dict[str, Family]) -> None:
    folder = made(tmp_path)
    found = tensors(folder)
    assert torch.equal(found["eps"], Noise(range(10), 0, 0, "pairs").normal(SHAPE))
    order = prompts.open(prompts.Config(str(tmp_path / "prompts.txt")), (8, 8))
    names = [order.item(i).prompt for i in range(10)]
    assert set(names) == {"left", "right"}
    family = gaussian_family()
    ours = guided(family.denoiser, labels([""]), 2.0)
    times = ddim_times(family.denoiser.schedule, 8)
    x0, states = solve(ours, family.denoiser.schedule, found["eps"], labels(names), times, PATH)
    torch.testing.assert_close(found["x0"], x0)
    for i, x_t in enumerate(states):
        torch.testing.assert_close(found[f"path.{i}"], x_t)
    opened = Pairs(Config(str(folder)))
    for index in range(30):
        (x0, eps, path), prompt = opened.pairs([index], [499.0]), opened.item(index).prompt
        row = int((found["eps"] == eps).flatten(1).all(1).nonzero())
        assert names[row] == prompt
        assert torch.equal(x0[0], found["x0"][row])
        assert torch.equal(path[499.0][0], found["path.1"][row])


def test_stops_on_the_way_change_nothing() -> None:
    """The states are those of one unbroken run."""
    family = gaussian_family()
    eps, cond, schedule = torch.randn(3, *SHAPE), labels(["left"] * 3), family.denoiser.schedule
    times = ddim_times(schedule, 8)
    x0, states = solve(family.denoiser, schedule, eps, cond, times, PATH)
    assert torch.equal(x0, solve(family.denoiser, schedule, eps, cond, times)[0])
    every = solve(family.denoiser, schedule, eps, cond, times, times[1:])[1]
    assert all(torch.equal(state, every[i]) for state, i in zip(states, (1, 3, 5), strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_the_batch_size_changes_no_noise_and_no_image(
    tmp_path: Path, teacher: dict[str, Family], batch_size: int
) -> None:
    teacher["family"] = conv_family()
    one = tensors(made(tmp_path / "a"))
    two = tensors(made(tmp_path / "b", batch_size=batch_size))
    assert torch.equal(one["eps"], two["eps"])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_in_half_precision_an_image_is_that_of_the_rounded_noise(tmp_path: Path, teacher: dict[str, Family]) -> None:
    found = tensors(made(tmp_path, dtype="fp16", path=[]))
    assert {x.dtype for x in found.values()} == {torch.float16}
    exact = tensors(made(tmp_path / "fp32", path=[]))
    assert torch.equal(found["eps"], exact["eps"].half())
    family = gaussian_family()
    opened = Pairs(Config(str(tmp_path / "pairs")))
    x0, eps, _ = opened.pairs(range(10), [])
    names = [opened.item(i).prompt for i in range(10)]
    ours = guided(family.denoiser, labels([""]), 2.0)
    again, _ = solve(ours, family.denoiser.schedule, eps, labels(names), ddim_times(family.denoiser.schedule, 8))
    assert {x0.dtype, eps.dtype} == {torch.float32}
    torch.testing.assert_close(x0, again.half().float(), rtol=1e-3, atol=1e-4)


def test_the_card_says_how_they_were_made(tmp_path: Path, teacher: dict[str, Family]) -> None:
    card = json.loads((made(tmp_path) / "card.json").read_text())
    assert card["teacher"] == fingerprint(gaussian_family())
    assert (card["teacher_path"], card["family"], card["num_steps"], card["guidance_scale"]) == ("toy", "sd", 8, 2.0)
    assert (card["number"], card["path"], card["seed"], card["dtype"]) == (10, PATH, 0, "fp32")
    assert card["data"]["source"] == "prompts"
    assert card["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_processes_share_the_shards(
    tmp_path: Path, teacher: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(made(tmp_path / "one"))
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "barrier", lambda: None)
    counts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        counts.append(make(recipe(tmp_path / "two")))
    assert counts == [6, 4]  # shards 0 and 2, shard 1
    shared = files(tmp_path / "two" / "pairs")
    assert {n: b for n, b in shared.items() if n != "card.json"} == {
        n: b for n, b in whole.items() if n != "card.json"
    }


# Going on


class Stop(BaseException):
    pass


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_what_is_cut_off_goes_on_and_ends_the_same(
    tmp_path: Path, teacher: dict[str, Family], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    whole = files(made(tmp_path))
    folder = Path(shutil.move(tmp_path / "pairs", tmp_path / "whole"))
    kept, count = pairs.write_shard, [0]

    def stops(file: Path, *rest: Any) -> None:
        if count[0] == shards:
            (file.parent / f".{file.name}.partial-1").write_bytes(b"half")  # as a kill leaves it
            raise Stop
        count[0] += 1
        kept(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "write_shard", stops)
        with pytest.raises(Stop):
            make(recipe(tmp_path))
    assert len(list((tmp_path / "pairs").glob("shard-*"))) == shards
    assert make(recipe(tmp_path)) == (10, 6, 2)[shards]
    assert files(tmp_path / "pairs") == whole == files(folder)


def test_the_same_request_again_calls_no_teacher_and_writes_nothing(
    tmp_path: Path, teacher: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path)
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    monkeypatch.setattr(pairs, "solve", None)
    assert make(recipe(tmp_path)) == 0
    assert make(recipe(tmp_path, batch_size=1)) == 0
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"number": 9}, "number 10, not 9"),
    "number and scale": ({"number": 14, "guidance_scale": 3.0}, r"guidance_scale 2\.0, not 3\.0"),
    "number and shards": ({"number": 14, "shard_size": 5}, "shard_size 4, not 5"),
    "steps": ({"num_steps": 16}, "num_steps 8, not 16"),
    "scale": ({"guidance_scale": 3.0}, r"guidance_scale 2\.0, not 3\.0"),
    "path": ({"path": []}, r"path \(749\.0, 499\.0, 249\.0\), not \(\)"),
    "seed": ({"seed": 1}, "seed 0, not 1"),
    "dtype": ({"dtype": "fp16"}, "dtype 'fp32', not 'fp16'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_request_is_refused_by_name(tmp_path: Path, teacher: dict[str, Family], name: str) -> None:
    folder = made(tmp_path)
    before = files(folder)
    changes, message = OTHERS[name]
    with pytest.raises(
        ValueError, match=rf"pairs: holds other pairs \({message}\); set another pairs\.out, or delete"
    ):
        make(recipe(tmp_path, **changes))
    assert files(folder) == before


@pytest.mark.parametrize(("first", "size"), [(10, 4), (8, 4), (3, 4), (10, 16)])
@pytest.mark.parametrize("number", [11, 12, 14, 21])
def test_a_larger_number_adds_to_what_is_there(
    tmp_path: Path, teacher: dict[str, Family], first: int, size: int, number: int
) -> None:
    """The folder is then what it would be, had the number been so from the start; whole shards stay untouched."""
    whole = files(made(tmp_path / "whole", number=number, shard_size=size))
    folder = made(tmp_path, number=first, shard_size=size)
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    kept = {f"shard-{k:05d}.safetensors" for k in range(first // size)}
    added = make(recipe(tmp_path, number=number, shard_size=size))
    assert added == number - len(kept) * size
    assert tensors(folder)["x0"].shape[0] == number
    after = files(folder)
    assert {k: v for k, v in after.items() if k != "card.json"} == {k: v for k, v in whole.items() if k != "card.json"}
    cards = [json.loads(text["card.json"]) for text in (after, whole)]
    assert cards[0] | {"data": None} == cards[1] | {"data": None}  # whose paths differ
    assert {name for name, time in before.items() if (folder / name).stat().st_mtime_ns == time} == kept
    assert len(Pairs(Config(str(folder)))) == number
    assert make(recipe(tmp_path, number=number, shard_size=size)) == 0


@pytest.mark.parametrize("shards", [0, 1])
def test_adding_that_is_cut_off_goes_on(
    tmp_path: Path, teacher: dict[str, Family], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    folder, kept, count = made(tmp_path), pairs.write_shard, [0]
    whole = files(made(tmp_path / "whole", number=16))

    def stops(*arguments: Any) -> None:
        if count[0] == shards:
            raise Stop
        count[0] += 1
        kept(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "write_shard", stops)
        with pytest.raises(Stop):
            make(recipe(tmp_path, number=16))
    with pytest.raises(ValueError, match=r"pairs: lacks \d of 4 shards; `fastgen pairs CONFIG .*` makes the rest"):
        Pairs(Config(str(folder)))
    assert make(recipe(tmp_path, number=16)) == 8 - 4 * shards
    assert {f: data for f, data in files(folder).items() if f.startswith("shard")} == {
        f: data for f, data in whole.items() if f.startswith("shard")
    }


@pytest.mark.parametrize("number", [10, 16])
def test_a_kill_before_the_new_card_leaves_a_folder_that_the_old_and_the_new_request_complete(
    tmp_path: Path, teacher: dict[str, Family], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def stops(*_: Any) -> None:
        raise Stop

    folder = made(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "write_card", stops)
        with pytest.raises(Stop):
            make(recipe(tmp_path, number=16))
    assert [f.name for f in sorted(folder.iterdir())] == ["card.json", *(f"shard-0000{k}.safetensors" for k in (0, 1))]
    make(recipe(tmp_path, number=number))
    assert len(Pairs(Config(str(folder)))) == number


def test_a_larger_number_of_other_prompts_is_refused(tmp_path: Path, teacher: dict[str, Family]) -> None:
    folder = made(tmp_path)
    before = files(folder)
    again = recipe(tmp_path, number=20)
    (tmp_path / "prompts.txt").write_text("right")
    with pytest.raises(ValueError, match=r"holds other pairs \(prompts '\w+', not '\w+'\)"):
        make(again)
    assert files(folder) == before


def test_other_prompts_or_another_teacher_are_refused_by_name(tmp_path: Path, teacher: dict[str, Family]) -> None:
    made(tmp_path)
    again = recipe(tmp_path)
    teacher["family"] = gaussian_family(means=(0.3, 1.0, -0.4))
    with pytest.raises(ValueError, match=r"holds other pairs \(teacher '\w+', not '\w+'\)"):
        make(again)
    teacher["family"] = gaussian_family()
    (tmp_path / "prompts.txt").write_text("right")
    with pytest.raises(ValueError, match=r"holds other pairs \(prompts '\w+', not '\w+'\)"):
        make(again)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, teacher: dict[str, Family]) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"pairs: is not a folder of pairs; set another pairs\.out"):
        make(recipe(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: is not a folder of pairs"):
        make(recipe(tmp_path, out=str(tmp_path / "file")))


def test_a_full_disk_says_that_the_rest_is_whole(
    tmp_path: Path, teacher: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pairs, "write_shard", full)
    with pytest.raises(
        OSError, match=r"shard-00000.safetensors: cannot be written \(No space left on device\); the sh"
    ):
        make(recipe(tmp_path))


def test_what_is_not_finite_is_not_written(tmp_path: Path, teacher: dict[str, Family]) -> None:
    teacher["family"] = gaussian_family(means=(0.0, float("nan"), 0.0))
    with pytest.raises(ValueError, match=r"shard-00000.*: the teacher's output is not finite in fp32, stored as fp32"):
        make(recipe(tmp_path))
    assert not list((tmp_path / "pairs").glob("*shard*"))


# What is asked for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": [499, 749]}, r"pairs\.path must fall, got \[499\.0, 749\.0\]"),
        ({"num_steps": 50}, r"50 DDIM steps do not meet \[749\.0, 249\.0\]; pairs\.num_steps=\d+ meets all"),
        ({"path": [999]}, r"8 DDIM steps do not meet \[999\.0\]; no number of steps meets all: change pairs\.path"),
        ({"path": [499.5]}, r"do not meet \[499\.5\]; no number of steps meets all"),
    ],
)
def test_states_where_the_teacher_does_not_pass_are_refused(
    tmp_path: Path, teacher: dict[str, Family], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(recipe(tmp_path, **changes))
    assert not (tmp_path / "pairs").exists()


def test_the_number_of_steps_that_is_named_does_meet_them() -> None:
    family = gaussian_family()
    with pytest.raises(ValueError, match=r"pairs\.num_steps=") as told:
        pairs.check_path(family.denoiser.schedule, 50, PATH)
    found = re.search(r"num_steps=(\d+)", str(told.value))
    assert found
    pairs.check_path(family.denoiser.schedule, int(found[1]), PATH)


TREE: dict[str, Any] = {
    "model": {"family": "sd", "path": "toy"},
    "data": {"source": "prompts", "path": "p.txt"},
    "pairs": {"out": "pairs", "number": 4},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": None}, "x.yaml: pairs is missing"),
        ({"model": None}, "x.yaml: model is missing"),
        ({"pears": {}}, "x.yaml: unknown key 'pears'; did you mean 'pairs'"),
        ({"pairs": {"out": "pairs"}}, r"x.yaml: pairs\.number is missing; pairs; past the end"),
        ({"pairs": {"out": "pairs", "number": 0}}, r"pairs\.number must be at least 1, got 0"),
        (
            {"data": {"source": "pairs", "path": "p"}},
            r"x.yaml: data\.source pairs is what is made here; name the source",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_told(changes: dict[str, Any], message: str) -> None:
    tree = {key: value for key, value in {**TREE, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        decode(tree, "x.yaml")


def test_a_training_recipe_with_the_section_serves() -> None:
    found = decode({**TREE, "method": {"name": "dmd"}, "optim": {}, "run": {"out": "x"}}, "x.yaml")
    assert (found.pairs.number, found.pairs.num_steps, found.pairs.guidance_scale) == (4, 50, 7.5)


# Reading


@pytest.fixture
def folder(tmp_path: Path, teacher: dict[str, Family]) -> Path:
    return made(tmp_path)


def test_a_source_of_pairs_is_one_of_prompts_too(folder: Path) -> None:
    source = source_module.open(Config(str(folder)), (8, 8))
    assert isinstance(source, PairSource)
    assert not source.has_images
    assert len(source) == 10
    assert set(source.candidates) == {"left", "right"}
    assert source.concept("left") == "left"
    assert source.item(3).image is None
    assert not isinstance(prompts.open(prompts.Config(str(folder.parent / "prompts.txt")), (8, 8)), PairSource)


def test_the_order_belongs_to_the_seed_and_each_turn_has_every_pair(folder: Path) -> None:
    def rows(seed: int, indices: range) -> torch.Tensor:
        return Pairs(Config(str(folder), seed)).pairs(indices, [])[1]

    assert torch.equal(rows(0, range(25)), rows(0, range(25)))
    assert not torch.equal(rows(0, range(10)), rows(1, range(10)))
    assert torch.equal(rows(0, range(25))[20:], rows(0, range(20, 25)))  # as a resumed run asks
    every = tensors(folder)["eps"].flatten(1)
    for turn in (range(10), range(10, 20)):
        assert torch.equal(rows(0, turn).flatten(1).sort(0).values, every.sort(0).values)


def test_a_batch_holds_pair_and_path(folder: Path) -> None:
    source, family = Pairs(Config(str(folder))), gaussian_family()
    batch = Batches(source, family, images=False, path_times=[749.0, 249.0]).batch([0, 4, 11])
    x0, eps, path = batch.pairs()
    wanted = source.pairs([0, 4, 11], [749.0, 249.0])
    assert torch.equal(x0, wanted[0])
    assert torch.equal(eps, wanted[1])
    assert same(dict(path), wanted[2])  # type: ignore[arg-type]
    assert set(path) == {749.0, 249.0}
    assert torch.equal(batch.cond["label"], labels([source.item(i).prompt for i in (0, 4, 11)])["label"])
    assert Batches(source, family, images=False, path_times=()).batch([0]).path == {}


def test_without_the_need_a_batch_holds_prompts_alone(folder: Path) -> None:
    batch = Batches(Pairs(Config(str(folder))), gaussian_family(), images=False).batch([0, 1])
    assert batch.x0 is batch.eps is batch.path is None
    with pytest.raises(
        ValueError, match=r"this batch holds no teacher pairs; train this method on data\.source: pairs"
    ):
        batch.pairs()


def test_the_teacher_s_images_do_not_pass_for_real_ones_unless_asked(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts only; set data\.as_images for those of the teacher"):
        Batches(Pairs(Config(str(folder))), gaussian_family(), images=True)
    source = Pairs(Config(str(folder), as_images=True))
    assert source.has_images
    batch = Batches(source, gaussian_family(), images=True).batch([0, 4, 11])
    assert torch.equal(batch.images("the test"), source.pairs([0, 4, 11], [])[0])


def test_a_method_that_needs_pairs_refuses_another_source(folder: Path) -> None:
    other = prompts.open(prompts.Config(str(folder.parent / "prompts.txt")), (8, 8))
    with pytest.raises(
        ValueError, match=r"needs teacher pairs and the data source has none; make them by `fastgen pa"
    ):
        Batches(other, gaussian_family(), images=False, path_times=())


def test_states_that_were_not_kept_are_named(folder: Path) -> None:
    source = Pairs(Config(str(folder)))
    source.check_path([])
    source.check_path([749.0, 249.0])
    with pytest.raises(
        ValueError, match=r"needs the teacher's states at \[499\.0, 124\.0\], kept are those at \[749\.0"
    ):
        source.check_path([499.0, 124.0])


def test_another_scale_than_the_method_s_is_refused_with_both_remedies(folder: Path) -> None:
    source = Pairs(Config(str(folder)))
    source.check_guidance(2.0)
    source.check_guidance(None)
    with pytest.raises(
        ValueError,
        match=r"pairs: pairs made at guidance scale 2, while this method guides the same teacher by 7\.5, .*; set "
        r"method\.guidance_scale=2, or make pairs with pairs\.guidance_scale=7\.5$",
    ):
        source.check_guidance(7.5)


def test_dmd_guides_the_teacher_as_its_pairs_were_and_kd_takes_any() -> None:
    from fastgen.trainers import dmd, kd

    assert dmd.Method(dmd.Config(guidance_scale=3.0), conv_family(), 1).pairs_guidance_scale == 3.0
    assert kd.Method(kd.Config(), conv_family(), 2).pairs_guidance_scale is None


def test_another_teacher_family_or_shape_is_refused_by_name(folder: Path) -> None:
    source, family = Pairs(Config(str(folder))), gaussian_family()
    source.check("sd", family)
    with pytest.raises(ValueError, match="pairs of a teacher of family 'sd', this one is 'flux'"):
        source.check("flux", family)
    with pytest.raises(ValueError, match=r"latents of shape \(2, 2, 2\), this teacher's are \(2, 8, 8\)"):
        source.check("sd", conv_family())
    with pytest.raises(ValueError, match=r"pairs of another teacher \(toy\); set model\.path to it"):
        source.check("sd", gaussian_family(stds=(0.5, 0.5, 0.4)))


def test_a_fingerprint_is_of_weights_kind_and_schedule() -> None:
    from fastgen.schedule import Flow

    made = [
        gaussian_family(),
        gaussian_family(means=(0.3, 1.0, -0.5000001)),
        gaussian_family(kind="eps"),
        gaussian_family(schedule=Flow()),
        conv_family(),
    ]
    assert len({fingerprint(f) for f in made}) == 5
    assert fingerprint(gaussian_family()) == fingerprint(made[0])
    assert fingerprint(replace(made[0], image_size=(1, 1))) == fingerprint(made[0])


# Damage


def flip(folder: Path) -> None:
    file = folder / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut(folder: Path) -> None:
    file = folder / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def nonsense(folder: Path) -> None:
    (folder / "shard-00001.safetensors").write_bytes(b"no")


def foreign(folder: Path) -> None:
    save_file({"x": torch.zeros(2)}, folder / "shard-00001.safetensors")


def misplaced(folder: Path) -> None:
    shutil.copy(folder / "shard-00002.safetensors", folder / "shard-00001.safetensors")


DAMAGE: dict[str, tuple[Change, str]] = {
    "cut": (cut, r"shard-00001\.safetensors: damaged \(.*\); delete it and give `fastgen pairs` again"),
    "nonsense": (nonsense, r"shard-00001\.safetensors: damaged \("),
    "foreign": (foreign, r"shard-00001\.safetensors: damaged \('pairs'\)"),
    "misplaced": (misplaced, r"shard-00001\.safetensors: is not as card\.json says; delete it and"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_refused_by_name_by_reader_and_maker(folder: Path, name: str) -> None:
    change, message = DAMAGE[name]
    whole = files(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        Pairs(Config(str(folder)))
    with pytest.raises(ValueError, match=message):
        make(recipe(folder.parent))
    (folder / "shard-00001.safetensors").unlink()
    assert make(recipe(folder.parent)) == 4
    assert files(folder) == whole


def test_a_changed_byte_is_found_when_the_shard_is_read(folder: Path) -> None:
    flip(folder)
    source = Pairs(Config(str(folder)))
    with pytest.raises(
        ValueError, match=r"shard-00001\.safetensors: damaged \(its digest differs\); delete it and give"
    ):
        source.pairs(range(10), [])
    with pytest.raises(ValueError, match="shard-00001"):  # and at each further try
        source.pairs(range(10), [])


def test_a_whole_shard_is_digested_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kept = source_module._digest
    monkeypatch.setattr(source_module, "_digest", lambda *a: calls.append(1) or kept(*a))
    source = Pairs(Config(str(folder)))
    for start in range(0, 30, 5):
        source.pairs(range(start, start + 5), [])
    assert len(calls) == 3


def test_pairs_that_are_not_there_name_the_command_that_makes_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"gone: holds no teacher pairs; `fastgen pairs emoji/pairs pairs\.out=.*gone` makes them"
    ):
        Pairs(Config(str(tmp_path / "gone"), made_by="emoji/pairs"))
    with pytest.raises(ValueError, match=r"prompts.txt: holds no teacher pairs; `fastgen pairs CONFIG "):
        Pairs(Config(str(tmp_path / "prompts.txt")))
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pairs: lacks 1 of 3 shards; `fastgen pairs CONFIG .*` makes the rest"):
        Pairs(Config(str(folder)))


def test_a_damaged_card_is_told(folder: Path) -> None:
    card = folder / "card.json"
    text = card.read_text()
    card.write_text(text[:-30])
    with pytest.raises(
        ValueError, match=r"card\.json: cannot be read \(.*\); delete the folder and make the pairs again"
    ):
        Pairs(Config(str(folder)))
    card.write_text("[]")
    with pytest.raises(ValueError, match=r"card\.json: the config must be a mapping"):
        Pairs(Config(str(folder)))
    card.write_text(text.replace('"number": 10', '"number": "ten"'))
    with pytest.raises(ValueError, match=r"card\.json: number must be a whole number, got 'ten'"):
        Pairs(Config(str(folder)))


def test_shards_cover_the_numbers_once() -> None:
    card = Card("sd", "", (1,), 10, 1, 1.0, (), 0, "fp32", "fp32", 4, "")
    assert [list(numbers) for numbers in card.shards().values()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(card.shards())[2] == "shard-00002.safetensors"
