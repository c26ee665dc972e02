"""The health monitor and the best checkpoint in whole runs, called as a user calls them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastgen import checkpoint, health, tracking
from fastgen.evaluation import judge
from fastgen.train import Session
from tests import command
from tests.command import Result, done, fastgen
from tests.oracle import same

WATCHED = "health={every: 1, warmup: 0, prompts: 2, seeds: 3, teacher_steps: 4}"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


def train(world: Path, out: Path, *overrides: str) -> Result:
    return fastgen("train", world / "run.yaml", f"run.out={out}", *overrides)


def healths(run: Path) -> list[dict[str, Any]]:
    """The rows of checks, without the rest."""
    rows = tracking.read(run / "metrics.jsonl")
    found = [{k.removeprefix("health/"): v for k, v in r.items() if k == "step" or "health/" in k} for r in rows]
    return [row for row in found if len(row) > 1]


# A student that collapses


@pytest.fixture(scope="module")
def forced(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """A run that begins well and then goes on, first to its end and then again, at a learning rate that ruins it."""
    out = tmp_path_factory.mktemp("forced") / "run"
    same_run = [WATCHED, "run.ema=0", "run.sample_every=0", "run.checkpoint_every=4"]
    ruined = [*same_run, "optim.student.lr=1.0", "run.steps=10"]
    results = [
        train(world, out, *same_run, "run.steps=4"),
        train(world, out, *ruined, "health.stop=true"),
        train(world, out, *ruined),
    ]
    return out, results


def test_a_student_that_begins_well_gives_no_warning(forced: tuple[Path, list[Result]]) -> None:
    out, results = forced
    assert results[0].code == 0, results[0].err
    assert "collapsing" not in results[0].err
    assert all(row["diversity"] > 0.5 for row in healths(out)[:4])


def test_a_collapse_is_told_in_words_and_ends_the_run_with_its_own_code(forced: tuple[Path, list[Result]]) -> None:
    out, results = forced
    seen = {row["step"]: row["diversity"] for row in healths(out)}
    assert seen[5] < 0.5
    assert seen[6] < 0.5
    share = re.escape(f"{100 * seen[6]:.3g} %")
    words = (
        rf"students are collapsing: diversity fell to {share} of the teacher's since step 4; raise "
        r"method.student_every \(2\) or raise method.adversarial.weight \(0, it then needs images\)"
    )
    assert results[1].code == 3
    assert re.search(rf"^step 6: {words}$", results[1].err, re.MULTILINE), results[1].err
    assert re.search(
        rf"^fastgen: {re.escape(str(out))}: ended at step 6, since .*{words}", results[1].err, re.MULTILINE
    )
    assert results[1].err.endswith("; checkpoint-6 is whole, and the same command goes on from it\n")


def test_it_goes_on_from_there_and_does_not_repeat_itself(forced: tuple[Path, list[Result]]) -> None:
    out, results = forced
    assert results[2].code == 0, results[2].err
    assert f"resuming from {out / 'checkpoint-6'}" in results[2].err
    assert "collapsing" not in results[2].err
    assert [row["step"] for row in healths(out)] == list(range(1, 11))
    assert (out / "pipeline" / UNET).is_file()


def test_the_teacher_s_numbers_are_kept_with_what_they_are_of(forced: tuple[Path, list[Result]]) -> None:
    kept = json.loads((forced[0] / health.FILE).read_text())
    assert len(set(kept["made_of"]["prompts"]) & set(command.CAPTIONS)) == 2
    assert kept["made_of"]["guidance_scale"] == 2.0
    assert {"diversity", "saturation", "contrast", "clipped"} == set(kept["teacher"])


# A run that is watched


def test_a_watched_run_trains_as_another(world: Path, tmp_path: Path) -> None:
    """Adapters on one network for all roles, too, where the teacher answers for the fake score by switching."""
    for changes in ([], ["student={lora: {rank: 2}, share_backbone: true}", "run.batch_size=1", "run.accumulate=2"]):
        plain, watched = (tmp_path / f"{name}{len(changes)}" for name in ("plain", "watched"))
        for out, section in ((plain, "health.every=0"), (watched, WATCHED)):
            result = train(world, out, "run.steps=3", *changes, section)
            assert result.code == 0, result.err
        for file in (plain / "checkpoint-3").glob("*.safetensors"):
            assert same(load_file(file), load_file(watched / "checkpoint-3" / file.name)), file.name
        assert healths(plain) == []
        assert [set(row) for row in healths(watched)] == [
            {"step", "diversity", "saturation", "contrast", "clipped", "critic_lag"}
        ] * 3
        assert healths(watched)[0]["critic_lag"] != 1


# The best checkpoint


@pytest.fixture(scope="module")
def kept(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps of which the second is the best."""
    values = iter([9.0, 3.0, 5.0, 4.0])

    class Quick:
        def __init__(self, tree: Mapping[str, Any], where: str) -> None:
            pass

        def __call__(self, session: Session) -> dict[str, float]:
            return {"fid": next(values)}

    out = tmp_path_factory.mktemp("kept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "Quick", Quick)
        result = train(
            world, out, "eval={every: 1, metrics: [fid]}", "run.keep_best=fid", "run.keep=1", "health.every=0"
        )
    assert result.code == 0, result.err
    assert f"best fid 3 at step 2; {out / 'pipeline'} holds step 4, the last; `fastgen export {out} --checkpoint " in (
        result.err
    )
    return out


def test_the_best_is_exported_by_its_name(kept: Path, tmp_path: Path) -> None:
    assert [p.name for p in checkpoint.all_checkpoints(kept)] == ["checkpoint-2", "checkpoint-4"]
    out = tmp_path / "best"
    assert done("export", kept, "--checkpoint", "best", "--out", out).out == f"{out} written from checkpoint-2\n"
    found = load_file(out / UNET)
    average = load_file(kept / "checkpoint-2" / "student.ema.safetensors")
    assert average
    assert all((found[name] == value).all() for name, value in average.items())
    last = load_file(kept / "checkpoint-4" / "student.ema.safetensors")
    assert any((found[name] != value).any() for name, value in last.items())


def test_a_run_without_a_best_says_so(kept: Path, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(world, out, "run.steps=2", "health.every=0").code == 0
    result = fastgen("export", out, "--checkpoint", "best", "--out", tmp_path / "best")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"fastgen: {out}: no checkpoint is marked as the best; train with run.keep_best, such as fid, or name a "
        "checkpoint\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.keep_best=fid"], "run.keep_best 'fid' needs quick evaluations"),
        (["run.export=best"], "run: export best needs keep_best to say by which value"),
        (["health.diversity=2"], "health.diversity must be below 1, got 2"),
    ],
)
def test_what_cannot_be_kept_or_watched_is_one_line(
    world: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    result = train(world, tmp_path / "run", *changes)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
