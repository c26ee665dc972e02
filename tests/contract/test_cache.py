"""``fastgen cache``, and training on what it made: the same numbers, without an encoder in memory."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from fastgen import cache, config, parallel, recipe, train
from fastgen.data import Item, Source, cached
from fastgen.data.cached import Cached, Card, Shard
from fastgen.recipe import Model
from tests import command, tiny
from tests.command import Result, done, fastgen

UNET = "pipeline/unet/diffusion_pytorch_model.safetensors"
COUNT, SHARDS = 10, 4
"""Items, one of which cannot be read, and files of them."""


def one_line(result: Result, message: str, code: int = 2) -> None:
    assert (result.code, result.out) == (code, "")
    told = result.err.splitlines()[-1]
    assert re.search(message, told), told


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def tree(world: Path, name: str = "images", **run: Any) -> dict[str, Any]:
    """A training run on images or prompts."""
    found: dict[str, Any] = yaml.safe_load((world / "run.yaml").read_text())
    if name == "images":
        found["method"] = {"name": "lcm", "guidance": {"embed": False}}
        found["optim"].pop("fake_score")
        found["data"] = {"source": "images", "path": str(world / "images"), "unreadable": 1, "seed": 5}
    elif name == "emoji":
        found["method"] = {"name": "lcm", "guidance": {"embed": False}}
        found["optim"].pop("fake_score")
        found["data"] = {"source": "emoji", "size": 5}
    found["run"] |= {"steps": 12, "checkpoint_every": 12, "sample_every": 0, **run}
    return found


def on_cache(plain: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """The same run on a cache of its data."""
    made = json.loads(json.dumps(plain))
    made["data"] = {"source": "cached", "path": str(folder), "of": plain["data"], "shard_size": 3, **options}
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """command.world with one image that cannot be read, run.yaml on them, cache.yaml on a cache, and the cache."""
    folder = command.world(tmp_path_factory.mktemp("world"))
    rows = [json.loads(line) for line in (folder / "images" / "captions.jsonl").read_text().splitlines()]
    for i in (8, 9):
        Image.new("RGB", (16, 16), (0, 25 * i, 0)).save(folder / "images" / f"{i}.png")
        rows.append({"file": f"{i}.png", "caption": command.CAPTIONS[i % 7]})
    (folder / "images" / "3.png").write_bytes(b"no image")
    (folder / "images" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(
        folder / "cache.yaml",
        on_cache(tree(folder, sample_prompts=["a cat", "a dog left of a red cat"]), folder / "cache"),
    )
    result = done("cache", folder / "cache.yaml")
    assert result.out == f"{folder / 'cache'} is whole; made now: {COUNT} items, 8 prompts\n"  # 6 of items, 2 more
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def losses(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "/" in k} for row in rows]


# Training on it


@pytest.mark.parametrize("name", ["images", "prompts", "emoji"])
def test_the_same_training_gives_the_same_losses_and_weights_to_the_bit(
    name: str, world: Path, tmp_path: Path
) -> None:
    """Over several turns of the data, in which others stand in for the image that cannot be read."""
    plain = tree(world, name, out=str(tmp_path / "plain"))
    done("train", write(tmp_path / "plain.yaml", plain))
    made = on_cache(plain, tmp_path / "cache", batch_size=plain["run"]["batch_size"])
    made["run"]["out"] = str(tmp_path / "cached")
    done("cache", write(tmp_path / "cached.yaml", made))
    if name == "images":
        shutil.move(world / "images", world / "gone")
    try:
        done("train", tmp_path / "cached.yaml")
    finally:
        if name == "images":
            shutil.move(world / "gone", world / "images")
    one, two = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    assert len(one) == 12
    assert one == two
    for file in (UNET, "checkpoint-12/student.safetensors"):
        ours, theirs = load_file(tmp_path / "plain" / file), load_file(tmp_path / "cached" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if name == "images":
        listed = (tmp_path / "plain" / "skipped.txt").read_text()
        assert listed.startswith(f"{world / 'images' / '3.png'}\tcannot identify image file")
        assert listed == (tmp_path / "cache" / "skipped.txt").read_text()
        assert "3.png: not a readable image" in (tmp_path / "plain" / "train.log").read_text()


def encoders() -> set[int]:
    """Those in memory that have weights."""
    gc.collect()
    found = [part for part in gc.get_objects() if issubclass(type(part), CLIPTextModel | AutoencoderKL)]
    return {id(part) for part in found if not all(p.is_meta for p in part.parameters())}


def test_no_encoder_is_in_memory_until_the_export(world: Path, tmp_path: Path) -> None:
    before = encoders()
    made = yaml.safe_load((world / "cache.yaml").read_text())
    session = train.build(recipe.decode(made, "x"))
    for _ in session.engine.run(range(2)):
        assert encoders() <= before
    assert not session.shows
    with pytest.raises(ValueError, match=r"vae: was left out of memory, .*; data.decoder: true keeps a VAE"):
        session.images(["a cat"], [0])
    train.export_run(session, tmp_path / "pipeline")
    assert len(encoders() - before) >= 2
    made["data"]["decoder"] = True
    before = encoders()
    kept = train.build(recipe.decode(made, "x"))
    assert kept.shows
    assert len(encoders() - before) == 1
    assert kept.images(["a cat"], [0]).shape == (1, 3, 16, 16)


def test_the_exported_pipeline_is_whole(world: Path, tmp_path: Path) -> None:
    """And so is what ``fastgen export`` writes of the same run."""
    done("train", world / "cache.yaml", f"run.out={tmp_path / 'run'}", "run.steps=1")
    done("export", tmp_path / "run", "--out", tmp_path / "again")
    for folder in (tmp_path / "run" / "pipeline", tmp_path / "again"):
        made = DiffusionPipeline.from_pretrained(folder)
        assert type(made) is StableDiffusionPipeline
        made.set_progress_bar_config(disable=True)
        assert made("a dog", num_inference_steps=1).images[0].size == (16, 16)
        teacher = DiffusionPipeline.from_pretrained(world / "teacher")
        for name in ("vae", "text_encoder"):
            ours, theirs = getattr(made, name).state_dict(), getattr(teacher, name).state_dict()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
            assert type(getattr(made, name)) is type(getattr(teacher, name))


def test_adapters_and_another_start_go_with_it(world: Path, tmp_path: Path) -> None:
    """The pipeline that the student starts from is opened without its encoders, too."""
    start = teacher(world, tmp_path / "start", "unet")
    before = encoders()
    made = yaml.safe_load((world / "cache.yaml").read_text())
    made["student"] |= {"init": str(start), "lora": {"rank": 2}}
    made["run"] |= {"out": str(tmp_path / "run"), "steps": 1}
    train.build(recipe.decode(made, "x"))
    assert encoders() <= before
    done("train", write(tmp_path / "run.yaml", made))
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_with_the_decoder_there_are_grids_and_without_the_log_says_why(world: Path, tmp_path: Path) -> None:
    prompts = yaml.safe_load((world / "cache.yaml").read_text())["run"]["sample_prompts"]
    plain = tree(world, out=str(tmp_path / "plain"), steps=2, sample_prompts=prompts)
    done("train", write(tmp_path / "plain.yaml", plain))
    short = ["run.steps=2", "data.decoder=true", f"run.out={tmp_path / 'with'}"]
    done("train", world / "cache.yaml", *short)
    done("train", world / "cache.yaml", short[0], f"run.out={tmp_path / 'without'}")
    grid = "samples/step_000002.png"
    assert (tmp_path / "plain" / grid).read_bytes() == (tmp_path / "with" / grid).read_bytes()
    assert not (tmp_path / "without" / "samples").exists()
    assert "no sample grids and no quick evaluations" in (tmp_path / "without" / "train.log").read_text()


def test_quick_evaluations_find_their_prompts(world: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    for i, caption in enumerate(("a red dog", "a cat left of a cat", "an apple")):
        Image.new("RGB", (16, 16), (0, 60 * i, 0)).save(tmp_path / "held" / f"{i}.png")
        (tmp_path / "held" / f"{i}.txt").write_text(caption)
    made = on_cache(tree(world, out=str(tmp_path / "run"), steps=2), tmp_path / "cache", decoder=True)
    made["eval"] = {
        "metrics": ["clip_score"],
        "features": "clip",
        "weights": {"clip": str(command.clip(tmp_path / "clip"))},
        "reference": {"source": "images", "path": str(tmp_path / "held")},
        "num_images": 3,
        "num_images_training": 3,
        "batch_size": 3,
        "every": 1,
    }
    done("cache", write(tmp_path / "run.yaml", made))
    done("train", tmp_path / "run.yaml")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("clip_score" in row for row in rows)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_half_precision_it_is_smaller_and_close_and_the_export_as_exact(
    dtype: str, world: Path, tmp_path: Path
) -> None:
    options = [f"data.path={tmp_path / 'cache'}", f"data.dtype={dtype}", f"run.out={tmp_path / 'run'}"]
    done("cache", world / "cache.yaml", *options)
    half, full = (Cached(cached.Config(str(p))) for p in (tmp_path / "cache", world / "cache"))
    ours, theirs = half.latents(range(6)), full.latents(range(6))
    assert ours.dtype == theirs.dtype == torch.float32
    assert 0 < (ours - theirs).abs().max() < 0.01 * theirs.abs().max()
    assert half.cond(["a cat"])["text"].dtype == torch.float32
    size = lambda folder: sum(p.stat().st_size for p in folder.glob("prompts-*"))  # noqa: E731
    assert size(tmp_path / "cache") < 0.6 * size(world / "cache")
    result = done("train", world / "cache.yaml", *options, "run.steps=1")
    assert re.search(r"differs from the trainer's sampler by \d\.\de-0[5678]", result.err)


def test_a_seed_of_its_own_is_another_order(world: Path) -> None:
    one, two = (Cached(cached.Config(str(world / "cache"), seed=seed)) for seed in (None, 6))
    assert [one.item(i).prompt for i in range(20)] != [two.item(i).prompt for i in range(20)]
    assert len(one) == COUNT
    assert one.has_images
    assert set(one.candidates) == {one.concept(one.item(i).prompt) for i in range(COUNT)}


def test_what_a_row_is_given_in_it_is_given_back_in(tmp_path: Path) -> None:
    """Masks and numbers too, and rows that are single numbers."""
    tensors = {
        "text": torch.randn(3, 2, 5),
        "mask": torch.tensor([[True, False], [False, True], [True, True]]),
        "label": torch.tensor([3, 1, 2]),
        "wide": torch.randn(3, 2, dtype=torch.float64),
    }
    cached.write_shard(tmp_path / "x", tensors, ["a", "b", "c"], torch.bfloat16, more=[1])
    shard = Shard(tmp_path / "x")
    assert (shard.prompts, shard.said["more"]) == (["a", "b", "c"], [1])
    for i in range(3):
        row = shard.row(i)
        assert row.keys() == tensors.keys()
        for name, value in row.items():
            assert value.dtype == tensors[name].dtype
            exact = tensors[name][i] if not value.is_floating_point() else tensors[name][i].bfloat16()
            assert torch.equal(value, exact.to(value.dtype))
    cached.write_shard(tmp_path / "none", {}, ["a"], torch.float32)
    assert Shard(tmp_path / "none").row(0) == {}


# Making it


def test_given_again_it_makes_nothing_and_further_prompts_alone(world: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world / "cache", tmp_path / "cache"))
    (tmp_path / "more.txt").write_text("a cat\na red apple left of a dog\n")
    again = ["cache", world / "cache.yaml", f"data.path={copy}"]
    assert done(*again).out == f"{copy} is whole; made now: 0 items, 0 prompts\n"
    assert files(copy) == files(world / "cache")
    assert done(*again, f"data.prompts={tmp_path / 'more.txt'}").out.endswith("0 items, 3 prompts\n")
    before, after = files(world / "cache"), files(copy)
    assert {name for name in after if after[name] != before[name]} == {"extra.safetensors"}
    found = Cached(cached.Config(str(copy))).cond(["a red apple left of a dog", "a cat"])["text"]
    assert found.shape[0] == 2
    family, _ = train.load_teacher(Model(str(world / "teacher")), "fp32", torch.device("cpu"))
    assert torch.equal(found, family.encode_prompts(["a red apple left of a dog", "a cat"])["text"])


class Stop(BaseException):
    pass


@pytest.mark.parametrize("written", range(8))
def test_what_is_cut_off_goes_on_and_ends_the_same(
    written: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many files, in the middle of the next."""
    saved: list[Path] = []

    def stopping(tensors: dict[str, torch.Tensor], path: Path, said: dict[str, str]) -> None:
        if len(saved) == written:
            path.write_bytes(b"half")
            path.with_name(".left-over.partial-1").write_bytes(b"by a process that was killed")
            raise Stop
        saved.append(path)
        save_file(tensors, path, said)

    chosen = cache.decode(config.read(world / "cache.yaml"), "x")
    chosen = cache.Recipe(chosen.model, config_with(chosen.options, tmp_path / "cache"), chosen.of, chosen.prompts)
    with monkeypatch.context() as patch:
        patch.setattr(cached, "save_file", stopping)
        with pytest.raises(Stop):
            cache.make(chosen)
    with pytest.raises(ValueError, match=r"is not finished; `fastgen cache CONFIG` goes on"):
        Cached(cached.Config(str(tmp_path / "cache")))
    items, _ = cache.make(chosen)
    assert items == max(0, COUNT - 3 * written)
    assert files(tmp_path / "cache") == files(world / "cache")


def config_with(options: cached.Config, path: Path) -> cached.Config:
    return config.decode(cached.Config, {**config.encode(options), "path": str(path)}, "x")


@pytest.mark.parametrize("name", ["items-00001", "prompts-00000", "extra", "uncond"])
def test_a_file_that_is_lacking_is_made_again(name: str, world: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world / "cache", tmp_path / "cache"))
    (copy / f"{name}.safetensors").unlink()
    result = fastgen("train", world / "cache.yaml", f"data.path={copy}", f"run.out={tmp_path / 'run'}")
    one_line(result, rf"cache: lacks {name}.safetensors, the cache is not finished; `fastgen cache CONFIG` goes on")
    done("cache", world / "cache.yaml", f"data.path={copy}")
    assert files(copy) == files(world / "cache")


def test_processes_share_the_work(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = cache.decode(config.read(world / "cache.yaml"), "x")
    chosen = cache.Recipe(chosen.model, config_with(chosen.options, tmp_path / "cache"), chosen.of, chosen.prompts)
    here, together = threading.local(), threading.Barrier(2, timeout=60)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: here.rank)
    monkeypatch.setattr(parallel, "barrier", together.wait)
    monkeypatch.setattr(cache, "opened", locked(cache.opened))
    counts: dict[int, tuple[int, int]] = {}

    def work(rank: int) -> None:
        here.rank = rank
        counts[rank] = cache.make(chosen, device=torch.device("cpu"))

    workers = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counts == {0: (6, 5), 1: (4, 3)}
    assert files(tmp_path / "cache") == files(world / "cache")


def locked(function: Callable[..., Any]) -> Callable[..., Any]:
    """One at a time: pipelines are not opened in threads."""
    lock = threading.Lock()

    def one_by_one(*arguments: Any) -> Any:
        with lock:
            return function(*arguments)

    return one_by_one


def test_a_cache_of_too_many_unreadable_images_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "images", tmp_path / "images")
    options = [f"data.path={tmp_path / 'cache'}", f"data.of.path={tmp_path / 'images'}"]
    one_line(
        fastgen("cache", world / "cache.yaml", *options, "data.of.unreadable=0.05"),
        r"3.png: not a readable image .* 1 of 10 cannot be read, 0 may be, .*skipped.txt lists them",
    )
    (tmp_path / "images" / "9.png").write_bytes(b"no image")
    shutil.rmtree(tmp_path / "cache")
    one_line(fastgen("cache", world / "cache.yaml", *options), r"9.png: not a readable image .* 2 of 10 cannot be")
    assert [p.name for p in (tmp_path / "cache").glob("items-*")] != []
    one_line(fastgen("cache", world / "cache.yaml", *options), r"9.png: not a readable image .* 2 of 10 cannot be")


# What is refused


def stale(world: Path, tmp_path: Path, *changes: str) -> Result:
    return fastgen("train", world / "cache.yaml", f"run.out={tmp_path / 'run'}", *changes)


def teacher(world: Path, folder: Path, part: str) -> Path:
    """The same pipeline, but for one of its parts."""
    pipeline, other = tiny.pipeline("v_prediction"), tiny.pipeline("v_prediction", seed=1)
    if part:
        setattr(pipeline, part, getattr(other, part))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_encoder_makes_it_stale(part: str, world: Path, tmp_path: Path) -> None:
    path = teacher(world, tmp_path / "other", part)
    result = stale(world, tmp_path, f"model.path={path}")
    one_line(result, rf"cache: stale, made with encoders.{part} '\w+', not '\w+' \(by \S+teacher\); make it anew in")
    assert not (tmp_path / "run").exists()
    one_line(
        fastgen("cache", world / "cache.yaml", f"model.path={path}"),
        rf"cache: stale, holds a cache with encoders.{part} '\w+', not '\w+'; set another data.path, or delete it",
    )


def test_another_network_does_not(world: Path, tmp_path: Path) -> None:
    path = teacher(world, tmp_path / "other", "unet")
    index = path / "vae" / "config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_name_or_path": "elsewhere"}))
    result = stale(world, tmp_path, f"model.path={path}", "--dry-run")
    assert result.code == 0, result.err


def test_another_tokenizer_and_other_settings_do(world: Path, tmp_path: Path) -> None:
    path = teacher(world, tmp_path / "other", "")
    file = path / "tokenizer" / "tokenizer_config.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"model_max_length": 12}))
    one_line(stale(world, tmp_path, f"model.path={path}"), "made with encoders.tokenizer ")
    file.write_text(json.dumps(kept | {"name_or_path": "elsewhere", "transformers_version": "6"}))
    assert stale(world, tmp_path, f"model.path={path}", "--dry-run").code == 0
    index = path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"requires_safety_checker": True}))
    one_line(stale(world, tmp_path, f"model.path={path}"), "made with encoders.model_index ")


def test_encoders_that_were_used_and_saved_again_are_the_same(world: Path, tmp_path: Path) -> None:
    """As those of an exported student are, from which another run may start; half precision is another."""
    made = DiffusionPipeline.from_pretrained(world / "teacher")
    made.set_progress_bar_config(disable=True)
    for name in ("once", "twice"):
        made("a dog", num_inference_steps=1)
        made.save_pretrained(tmp_path / name)
        made = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert cached.encoders_of(str(tmp_path / name)) == cached.encoders_of(str(world / "teacher"))
    made.to(torch.float16).save_pretrained(tmp_path / "half")
    assert cached.encoders_of(str(tmp_path / "half")) != cached.encoders_of(str(world / "teacher"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.image_size=[32, 16]"], r"made with latent_shape \(4, 8, 8\), not \(4, 16, 8\)"),
        (["data.of.seed=6"], r"made with data.seed 5, not 6 "),
        (["data.of.source=prompts", "data.of.unreadable=1"], r"unknown key 'data.of.unreadable'"),
        (["data.dtype=fp16"], r"made with dtype 'fp32', not 'fp16'"),
        (["data.path=nowhere"], r"nowhere: holds no cache; `fastgen cache CONFIG` makes it, where data.of names"),
        (["run.sample_prompts=[a mouse]"], r"cache: lacks the prompt 'a mouse'; add it to run.sample_prompts or to"),
    ],
)
def test_a_run_that_the_cache_is_not_for_is_refused(
    changes: list[str], message: str, world: Path, tmp_path: Path
) -> None:
    one_line(stale(world, tmp_path, "data.decoder=true", *changes), message)


def test_of_need_not_be_said_in_training(world: Path, tmp_path: Path) -> None:
    made = yaml.safe_load((world / "cache.yaml").read_text())
    made["data"] = {"source": "cached", "path": str(world / "cache")}
    made["run"]["out"] = str(tmp_path / "run")
    done("train", write(tmp_path / "run.yaml", made), "--dry-run")
    one_line(fastgen("cache", tmp_path / "run.yaml"), r"run.yaml: data.of is missing; it names the source")


def test_data_that_have_changed_make_it_stale(world: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(world / "images", tmp_path / "images")
    options = [f"data.path={tmp_path / 'cache'}", f"data.of.path={copy}"]
    done("cache", world / "cache.yaml", *options)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "images" / "99.png")
    one_line(
        fastgen("cache", world / "cache.yaml", *options), r"stale, holds a cache with source '\w+', not '\w+'; set"
    )


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "items-*",
            lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            r"damaged \(the digest of row \d differs\); delete it, and",
        ),
        ("prompts-*", lambda b: b[:-1] + bytes([b[-1] ^ 1]), r"damaged \(the digest of row \d differs\); delete it"),
        ("items-*", lambda b: b[: len(b) // 2], r"items-0000\d.safetensors: damaged \(.*\); delete it, and `fastgen"),
        ("extra*", lambda b: b"", r"extra.safetensors: damaged \(.*\); delete it, and `fastgen cache CONFIG` goes on"),
        (
            "card.json",
            lambda b: b[:9],
            r"card.json: cannot be read \(.*\); delete the folder and make the cache again",
        ),
    ],
)
def test_damage_is_found_before_it_is_learnt(
    name: str, damage: Callable[[bytes], bytes], message: str, world: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(world / "cache", tmp_path / "cache"))
    for file in copy.glob(name):
        file.write_bytes(damage(file.read_bytes()))
    one_line(stale(world, tmp_path, f"data.path={copy}"), message)


def test_a_shard_with_rows_of_other_number_is_damaged(tmp_path: Path) -> None:
    cached.write_shard(tmp_path / "x", {"a": torch.zeros(2, 3)}, ["a", "b"], torch.float32)
    said = {"prompts": ["a"], "digests": ["0"], "dtypes": {"a": "float32"}}
    save_file(load_file(tmp_path / "x"), tmp_path / "y", {"cache": json.dumps(said)})
    with pytest.raises(ValueError, match=r"y: damaged \(its rows are not as many as its prompts\)"):
        Shard(tmp_path / "y")


def test_what_does_not_fit_into_half_precision_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x: text is not finite as float16; set data.dtype=fp32, and another"):
        cached.write_shard(tmp_path / "x", {"text": torch.full((1, 2), 1e6)}, ["a"], torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_told(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cached, "save_file", full)
    result = fastgen("cache", world / "cache.yaml", f"data.path={tmp_path / 'cache'}")
    one_line(result, r"cannot be written \(No space left on device\); the shards before it are whole: make room", 1)


def test_configs_that_cannot_be_cached_are_told(world: Path, tmp_path: Path) -> None:
    for changes, message in (
        (["data={source: prompts, path: x}"], r"x.yaml: data.source is 'prompts'; write data: {source: cached, path"),
        (["data.of={source: prompt}"], r"data.of.source: unknown source 'prompt'; did you mean 'prompts'"),
        (["data.of={source: prompts, file: x}"], r"unknown key 'data.of.file'"),
        (["pairs={}"], r"x.yaml: unknown key 'pairs'"),
    ):
        found = config.override(config.read(world / "cache.yaml"), [])
        for change in changes:
            key, _, value = change.partition("=")
            if key == "data":
                found["data"] = yaml.safe_load(value)
            elif key == "data.of":
                found["data"]["of"] = yaml.safe_load(value)
            else:
                found[key] = yaml.safe_load(value)
        one_line(fastgen("cache", write(tmp_path / "x.yaml", found)), message)
    found = config.read(world / "cache.yaml")
    found.pop("model")
    one_line(fastgen("cache", write(tmp_path / "x.yaml", found)), r"x.yaml: model is missing")
    found = config.read(world / "cache.yaml")
    found["data"] |= {"of": {"source": "cached", "path": str(world / "cache")}, "path": str(tmp_path / "c")}
    one_line(
        fastgen("cache", write(tmp_path / "x.yaml", found)), r"data.of: source cached needs no cache; name another"
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    result = fastgen("cache", world / "cache.yaml", f"data.path={tmp_path / 'taken'}")
    one_line(result, r"taken: is not a folder of a cache; set another data.path")


def test_a_source_without_numbers_is_cached_in_its_order() -> None:
    class Plain:
        has_images = False

        def item(self, index: int) -> Item:
            return Item(f"item {index}")

    source: Source = Plain()  # type: ignore[assignment]
    items, missing = cache.read(source, range(2, 4))
    assert ([item.prompt for item in items if item], missing) == (["item 2", "item 3"], [])


def test_cards_of_the_same_cache_have_no_difference(world: Path) -> None:
    card = cached.read_card(world / "cache")
    assert isinstance(card, Card)
    assert card.difference(card) == ""
    assert list(card.encoders) == ["model_index", "text_encoder", "tokenizer", "vae"]
    assert len(card.items()) == SHARDS
