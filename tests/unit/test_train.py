"""The loop around the engine on toy networks: what it writes, when, and that going on changes nothing."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastgen import best, checkpoint, health, interrupt, parallel, recipe, tracking, train
from fastgen.checkpoint import CheckpointError
from fastgen.data import Item
from fastgen.ema import EMA
from fastgen.engine import Engine
from fastgen.health import Health, Unhealthy
from fastgen.optimizers import Optim
from fastgen.publish import Wanted
from fastgen.train import Session, write_grid
from fastgen.trainers import dmd2
from tests.oracle import CAPTIONS, Samples, conv_family, optims, same, states


class Words:
    """A source of the toy's captions."""

    has_images = False
    candidates = CAPTIONS[1:]

    def concept(self, prompt: str) -> str:
        return prompt

    def __len__(self) -> int:
        return 2

    def item(self, index: int) -> Item:
        return Item(CAPTIONS[1 + index % 2])


def settings(folder: Path, **run: Any) -> recipe.Recipe:
    run = {"steps": 8, "batch_size": 2, "log_every": 3, "checkpoint_every": 2, "keep": 9, "ema": 0.9} | run
    tree = {
        "model": {"family": "sd", "path": "toy"},
        "method": {"name": "dmd2", "student_every": 2, "guidance_scale": 2.0},
        "data": {"source": "prompts", "path": "none"},
        "optim": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "run": {"out": str(folder), **run},
    }
    return recipe.decode(tree, "toy")


def build(chosen: recipe.Recipe, device: torch.device | None = None) -> Session:
    """A session of toy networks in the place of ``train.build``."""
    family, run = conv_family(), chosen.run
    method = dmd2.Method(chosen.method.options, family, chosen.student.steps)
    data = Samples((2, 8, 8), images=False)
    ema = {"student": EMA(method.networks["student"], run.ema)} if run.ema else {}
    engine = Engine(method, data, chosen.optim, batch_size=run.batch_size, steps=run.steps, seed=run.seed)
    return Session(chosen, torch.device("cpu"), family, method, Words(), data, engine, ema, "eager")  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def export_run(session: Session, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(train, "export_run", export_run)
    log = logging.getLogger("fastgen")
    kept = log.level
    log.setLevel(logging.DEBUG)
    yield
    log.setLevel(kept)


def rows(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without the time it took."""
    return [
        {k: v for k, v in row.items() if k not in tracking.MEASURED} for row in tracking.read(run / "metrics.jsonl")
    ]


def interrupted(chosen: recipe.Recipe, steps: int, quick: train.Quick | None = None) -> None:
    """Train and stop without a word after so many steps, as a kill does."""

    class Stop(BaseException):
        pass

    def stop(*_: Any) -> Any:
        def advance(_: Any) -> None:
            nonlocal steps
            steps -= 1
            if not steps:
                raise Stop

        return advance

    import contextlib

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "progress", lambda *_: contextlib.nullcontext(stop()))
        with pytest.raises(Stop):
            train.train(chosen, quick=quick)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", build)
        patch.setattr(train, "export_run", lambda session, folder: None)
        train.train(settings(run))
    return run


@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (5,), (7,), (3, 2), (1, 3, 3)])
def test_rows_and_weights_after_going_on_are_those_of_an_unbroken_run(
    unbroken: Path, tmp_path: Path, cuts: Sequence[int]
) -> None:
    """Also where a row's steps lie on both sides of the checkpoint."""
    chosen = settings(tmp_path / "run")
    for steps in cuts:
        interrupted(chosen, steps)
    train.train(chosen)
    assert rows(tmp_path / "run") == rows(unbroken)
    for file in (unbroken / "checkpoint-8").glob("*.safetensors"):
        assert same(load_file(file), load_file(tmp_path / "run" / "checkpoint-8" / file.name))


def test_rows_are_means_over_the_steps_since_the_last_one(unbroken: Path, tmp_path: Path) -> None:
    assert [row["step"] for row in rows(unbroken)] == [2, 3, 4, 6, 8]
    train.train(settings(tmp_path, log_every=1, checkpoint_every=100))
    single = rows(tmp_path)
    assert [row["step"] for row in single] == list(range(1, 9))
    assert set(single[0]) == {
        "step",
        "images_seen",
        "critic/denoising",
        "critic/fake_score.grad_norm",
        "student/dmd",
        "student/student.grad_norm",
    }
    assert "student/dmd" not in single[1]  # the student learns every other step
    mean = (single[4]["critic/denoising"] + single[5]["critic/denoising"]) / 2
    assert rows(unbroken)[3]["critic/denoising"] == pytest.approx(mean, rel=1e-5)
    assert rows(unbroken)[3]["student/dmd"] == pytest.approx(single[4]["student/dmd"], rel=1e-5)


def test_checkpoints_grids_and_config_are_where_they_should_be(tmp_path: Path) -> None:
    chosen = settings(tmp_path, steps=7, checkpoint_every=3, keep=2, sample_every=2)
    assert train.train(chosen) == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-6",
        "checkpoint-7",
        "config.yaml",
        "metrics.jsonl",
        "pipeline",
        "samples",
        "train.log",
    ]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"step_{n:06d}.png" for n in (2, 4, 6, 7)]
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert recipe.decode(tree, "config.yaml") == chosen
    log = (tmp_path / "train.log").read_text()
    assert "dmd2 on cpu, attention eager" in log
    assert "DEBUG step 3 critic/denoising" in log


def test_a_finished_run_is_only_exported_again(unbroken: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    train.train(replace(settings(run)))
    assert rows(run) == rows(unbroken)
    assert (run / "pipeline").is_dir()


def test_never_refuses_a_folder_with_checkpoints(unbroken: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"run: holds checkpoint-8 of an earlier run; use another run.out or"):
        train.train(settings(run), "never")
    train.train(settings(tmp_path / "new", steps=1), "never")
    assert (tmp_path / "new" / "checkpoint-1").is_dir()


def test_a_checkpoint_may_be_named(unbroken: Path, tmp_path: Path) -> None:
    """Of this run or of another; later rows are dropped and made anew."""
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="holds checkpoint-8, which is newer than checkpoint-4; move it away"):
        train.train(settings(run), str(run / "checkpoint-4"))
    for later in checkpoint.all_checkpoints(run)[1:]:
        shutil.rmtree(later)
    first = checkpoint.all_checkpoints(run)[0]
    train.train(settings(run), str(first))
    assert rows(run) == rows(unbroken)
    train.train(settings(tmp_path / "other"), str(unbroken / "checkpoint-6"))
    for name in ("student", "student.ema", "fake_score"):
        one, two = (load_file(r / "checkpoint-8" / f"{name}.safetensors") for r in (unbroken, tmp_path / "other"))
        assert same(one, two)
    with pytest.raises(CheckpointError, match="nothing: no such checkpoint; leave out --resume"):
        train.train(settings(run), str(tmp_path / "nothing"))


def test_leftovers_of_a_kill_go_and_a_folder_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    for name in (".checkpoint-4.partial-77", ".pipeline.old-77", ".checkpoint-2.old-77", "checkpoint-2", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / ".pipeline.old-77" / "model_index.json").write_text("{}")
    for name in (".config.yaml.partial-77", "samples/.step_000002.png", "samples/step_000001.png", "notes.txt"):
        (tmp_path / name).write_text("")
    train.clear(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "checkpoint-2",
        "notes.txt",
        "pipeline",
        "pipeline/model_index.json",
        "samples",
        "samples/step_000001.png",
    ]


# Quick evaluations


def test_a_quick_evaluation_sees_the_averaged_weights_every_so_many_steps(tmp_path: Path) -> None:
    chosen = replace(settings(tmp_path, steps=5, log_every=10, checkpoint_every=10), eval={"every": 2})
    seen = []

    def quick(session: Session) -> dict[str, float]:
        network, average = session.method.networks["student"], session.ema["student"].average
        seen.append(same(dict(network.named_parameters()), average))
        return {"fid": 10.0 - len(seen)}

    train.train(chosen, quick=quick)
    assert seen == [True, True, True]
    assert [(row["step"], row["fid"]) for row in rows(tmp_path)] == [(2, 9.0), (4, 8.0), (5, 7.0)]
    assert "critic/denoising" not in rows(tmp_path)[0]


def test_evaluation_and_grids_do_not_disturb_the_training(unbroken: Path, tmp_path: Path) -> None:
    chosen = replace(settings(tmp_path, sample_every=1), eval={"every": 1})

    def quick(session: Session) -> dict[str, float]:
        session.images(["left"], [0])
        torch.rand(3)
        return {}

    train.train(chosen, quick=quick)
    file = "checkpoint-8/student.safetensors"
    assert same(load_file(unbroken / file), load_file(tmp_path / file))


# The best checkpoint


def keeping(folder: Path, **run: Any) -> recipe.Recipe:
    """A run that is judged at every step and saves only its last checkpoint and the best."""
    chosen = settings(folder, **({"keep_best": "fid", "keep": 1, "checkpoint_every": 100, "steps": 12} | run))
    return replace(chosen, eval={"every": 1, "metrics": ["fid"]}, health=Health(every=0))


def by_weights(session: Session) -> dict[str, float]:
    """A value that goes up and down as the weights move, and depends on nothing else."""
    return {
        "fid": float(
            sum((1e4 * p.detach().double().sum()).sin() for p in session.method.networks["student"].parameters())
        )
    }


def given(*values: float) -> train.Quick:
    """A quick evaluation with these values in turn."""
    turns = iter(values)
    return lambda session: {"fid": next(turns)}


def names(run: Path) -> list[str]:
    return [p.name for p in checkpoint.all_checkpoints(run)]


def test_the_best_checkpoint_stays_and_is_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quick = given(9.0, 5.0, 7.0, float("nan"), 3.0, 8.0, 3.0, 8.0)
    with caplog.at_level(logging.INFO, "fastgen"):
        train.train(keeping(tmp_path, steps=8), quick=quick)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-8"]
    assert (tmp_path / "best.json").read_text() == (
        '{\n "step": 5,\n "metric": "fid",\n "value": 3.0,\n "better": "low"\n}\n'
    )
    assert caplog.messages[-1] == (
        f"best fid 3 at step 5; {tmp_path / 'pipeline'} holds step 8, the last; `fastgen export {tmp_path} "
        "--checkpoint best` writes the best"
    )


def test_the_one_before_goes_as_soon_as_there_is_a_better_one(tmp_path: Path) -> None:
    seen = []
    values = given(9.0, 5.0, 7.0, 3.0)

    def quick(session: Session) -> dict[str, float]:
        seen.append(names(tmp_path))
        return values(session)

    train.train(keeping(tmp_path, steps=4, checkpoint_every=3), quick=quick)
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert names(tmp_path) == ["checkpoint-4"]


def test_which_way_is_better_is_the_metric_s_own(tmp_path: Path) -> None:
    chosen = replace(keeping(tmp_path, steps=3, keep_best="clip_score"), eval={"every": 1, "metrics": ["clip_score"]})
    values = iter([0.2, 0.3, 0.1])
    train.train(chosen, quick=lambda session: {"clip_score": next(values)})
    assert best.read(tmp_path) == best.Best(2, "clip_score", 0.3, "high")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run that keeps its best."""
    run = tmp_path_factory.mktemp("kept") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", build)
        patch.setattr(train, "export_run", lambda session, folder: None)
        train.train(keeping(run, log_every=5), quick=by_weights)
    fids = {row["step"]: row["fid"] for row in rows(run)}
    found = best.read(run)
    assert found
    assert found.step == min(fids, key=fids.__getitem__) not in (1, 12)  # else it would show little
    return run


@pytest.mark.parametrize("cuts", [(1,), (7,), (3, 2, 4)])
def test_the_best_of_a_run_that_goes_on_is_that_of_an_unbroken_one(
    kept: Path, tmp_path: Path, cuts: Sequence[int]
) -> None:
    """Rows, too: they are means since the last one, and the best checkpoints come at steps of their own."""
    chosen = keeping(tmp_path, log_every=5)
    for steps in cuts:
        interrupted(chosen, steps, by_weights)
    train.train(chosen, quick=by_weights)
    assert rows(tmp_path) == rows(kept)
    assert (tmp_path / "best.json").read_text() == (kept / "best.json").read_text()
    assert names(tmp_path) == names(kept)
    for path in checkpoint.all_checkpoints(kept):
        for file in path.glob("*.safetensors"):
            assert same(load_file(file), load_file(tmp_path / path.name / file.name))


def test_a_kill_between_checkpoint_and_mark_loses_nothing(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = keeping(tmp_path, log_every=5)
    write, calls = best.write, []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(best, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(chosen, quick=by_weights)
    assert len(names(tmp_path)) == 2
    train.train(chosen, quick=by_weights)
    assert (tmp_path / "best.json").read_text() == (kept / "best.json").read_text()
    assert names(tmp_path) == names(kept)


def test_the_best_may_become_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exported = []

    def export_run(session: Session, folder: Path, wanted: Wanted) -> None:
        with session.weights():
            exported.append((states(session.method)["student"], wanted.steps_done))

    monkeypatch.setattr(train, "export_run", export_run)
    chosen = keeping(tmp_path, steps=4, export="best")
    with caplog.at_level(logging.INFO, "fastgen"):
        train.train(chosen, quick=given(9.0, 2.0, 7.0, 3.0))
    assert [steps for _, steps in exported] == [2]
    assert same(exported[0][0], load_file(tmp_path / "checkpoint-2/student.ema.safetensors"))
    assert caplog.messages[-1] == f"best fid 2 at step 2; {tmp_path / 'pipeline'} holds step 2"


def test_without_a_finite_value_the_last_is_exported_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastgen"):
        train.train(keeping(tmp_path, steps=1, export="best"), quick=given(float("nan")))
    assert caplog.messages[-1] == f"no quick evaluation gave a finite fid; {tmp_path / 'pipeline'} holds the last step"
    assert not (tmp_path / "best.json").exists()


def test_a_best_that_cannot_be_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.keep_best 'fid' needs quick evaluations; set eval.every, or leave"):
        train.train(keeping(tmp_path))
    with pytest.raises(ValueError, match=r"run.keep_best 'fid': the quick evaluation gives kid; choose one of these"):
        train.train(keeping(tmp_path), quick=lambda session: {"kid": 1.0})


def test_only_the_main_process_keeps_a_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    train.train(keeping(tmp_path / "run", steps=2), quick=by_weights)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("rank", "answers"), [(0, [True, False]), (1, [False, False])])
def test_processes_answer_what_the_main_one_does(
    monkeypatch: pytest.MonkeyPatch, rank: int, answers: list[bool]
) -> None:
    """What a process adds to the sum that all then see."""
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    assert train.agreed(torch.device("cpu"), True, False) == answers


# Health


def watched(folder: Path, section: dict[str, Any] | None = None, **run: Any) -> recipe.Recipe:
    chosen = settings(folder, **run)
    return replace(chosen, health=replace(Health(every=1, prompts=2, seeds=3, teacher_steps=4), **(section or {})))


def collapsed(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the student's pictures be the teacher's until so many checks are done, then all alike."""
    looks: list[int] = []

    def images(session: Session, prompts: Sequence[str], samples: Sequence[int]) -> torch.Tensor:
        looks.append(len(samples))
        found = session.teacher_images(prompts, samples, 4, 2.0)
        return found if len(looks) <= 2 * after else found[:1].expand_as(found)

    monkeypatch.setattr(Session, "images", images)


def warnings(run: Path) -> list[str]:
    lines = (run / "train.log").read_text().splitlines()
    return [line.partition(" WARNING ")[2] for line in lines if " WARNING " in line]


def test_a_watched_run_is_the_same_bit_for_bit(unbroken: Path, tmp_path: Path) -> None:
    train.train(watched(tmp_path))
    for file in (unbroken / "checkpoint-8").glob("*.safetensors"):
        assert same(load_file(file), load_file(tmp_path / "checkpoint-8" / file.name)), file.name
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 9))
    logged = [{k: v for k, v in row.items() if not k.startswith("health/")} for row in found]
    assert [row for row in logged if len(row) > 1] == rows(unbroken)
    assert all("health/critic_lag" in row and "health/diversity" in row for row in found)


def test_a_collapse_is_in_the_log_and_in_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collapsed(monkeypatch, after=4)
    train.train(watched(tmp_path, {"critic": 99.0}))
    assert [row["health/diversity"] for row in rows(tmp_path)] == [1.0] * 4 + [0.0] * 4
    assert warnings(tmp_path) == [
        "step 6: students are collapsing: diversity fell to 0 % of the teacher's since step 4; raise "
        "method.student_every (2) or raise method.adversarial.weight (0, it then needs images)"
    ]
    assert (tmp_path / "pipeline").is_dir()


@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 2, 1)])
def test_a_watched_run_that_goes_on_has_the_rows_and_warnings_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: Sequence[int]
) -> None:
    """The teacher's pictures are made once, and the monitor goes on from the rows."""
    made = []
    teacher_images = Session.teacher_images
    monkeypatch.setattr(Session, "teacher_images", lambda *args: made.append(args[1:]) or teacher_images(*args))
    limits = {"diversity": 0.95, "critic": 1.0001, "warmup": 0.3}
    train.train(watched(tmp_path / "whole", limits))
    assert len(made) == 2  # one call a prompt
    for steps in cuts:
        interrupted(watched(tmp_path / "broken", limits), steps)
    train.train(watched(tmp_path / "broken", limits))
    assert len(made) == 4
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    # a step after the newest checkpoint is trained twice, and so may be what it says
    assert warnings(tmp_path / "whole") == list(dict.fromkeys(warnings(tmp_path / "broken"))) != []


def test_pictures_of_teacher_and_student_are_of_the_same_prompts_and_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[Any]] = {"images": [], "teacher_images": []}
    for name, calls in asked.items():
        whole = getattr(Session, name)
        monkeypatch.setattr(Session, name, lambda *a, calls=calls, whole=whole: calls.append(a[1:]) or whole(*a))
    chosen = watched(tmp_path, {"prompts": 3})
    session = build(chosen)
    found = train.check(session, tmp_path, 0)
    rows_of = [(["left"] * 3, range(3)), (["right"] * 3, range(3, 6))]  # the data have two captions
    assert asked == {"images": rows_of, "teacher_images": [(*row, 4, 2.0) for row in rows_of]}
    seen = [health.look(getattr(session, name)(*row) for row in list(calls)) for name, calls in asked.items()]
    assert found["health/diversity"] == pytest.approx(seen[0].diversity / seen[1].diversity, rel=1e-6)
    before = asked["teacher_images"].copy()
    train.check(session, tmp_path, 0)
    assert asked["teacher_images"] == before
    other = replace(session, recipe=watched(tmp_path, {"prompts": 3, "teacher_steps": 5}))
    train.check(other, tmp_path, 0)
    assert len(asked["teacher_images"]) == len(before) + 2


def test_a_teacher_s_pictures_are_guided_ddim_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many steps as asked, from the noise that the student's begin with."""
    session = build(settings(tmp_path))
    seen = []
    whole = train.sample

    def sample(denoise: Any, schedule: Any, x_t: torch.Tensor, times: Sequence[float], *rest: Any) -> torch.Tensor:
        seen.append((x_t, list(times), rest[1]))
        return whole(denoise, schedule, x_t, times, *rest)

    monkeypatch.setattr(train, "sample", sample)
    monkeypatch.setattr(train, "sample_student", lambda d, s, x_t, *rest: seen.append((x_t,)) or x_t)
    images = session.teacher_images(["left", "right"], [3, 4], 5, 2.0)
    session.images(["left", "right"], [3, 4])
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert seen[0][1:] == ([999.0, 799.0, 599.0, 399.0, 199.0], train.ddim)
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(images, session.teacher_images(["left", "right"], [3, 4], 5, 9.0))


@pytest.mark.parametrize(
    ("method", "options", "scale"),
    [
        ("dmd2", {"guidance_scale": 3.0}, 3.0),
        ("lcm", {"guidance": {"low": 2.0, "high": 9.0, "default": 4.0}}, 4.0),
        ("lcm", {"guidance": {"low": 2.0, "high": 9.0, "embed": False}}, 5.5),
        ("kd", {}, 1.0),
    ],
)
def test_the_teacher_is_guided_as_the_method_guides_it(
    tmp_path: Path, method: str, options: dict[str, Any], scale: float
) -> None:
    chosen = settings(tmp_path)
    decoded = recipe.choose("method", "name", {"name": method, **options}, "toy", "method")
    session = build(chosen)
    assert train.teacher_scale(replace(session, recipe=replace(chosen, method=decoded))) == scale


def test_the_teacher_of_pairs_is_guided_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made:
        class card:
            guidance_scale = 6.5

    monkeypatch.setattr(train, "Pairs", Made)
    assert train.teacher_scale(replace(build(settings(tmp_path)), source=Made())) == 6.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("every", "judged", "steps"),
    [(None, 3, [3, 6]), (2, 3, [2, 4, 6, 8]), (0, 3, []), (None, 0, [5]), (4, 0, [4, 8])],
)
def test_checks_come_with_the_quick_evaluations_or_at_steps_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, judged: int, steps: list[int]
) -> None:
    monkeypatch.setattr(health, "ALONE", 5)
    chosen = replace(watched(tmp_path, {"every": every}), eval={"every": judged})
    train.train(chosen, quick=lambda session: {"fid": 1.0})
    assert [row["step"] for row in rows(tmp_path) if "health/critic_lag" in row] == steps


def test_without_pictures_or_with_compiled_networks_the_rest_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build(watched(tmp_path))
    both = train.check(session, tmp_path, 0).keys()
    monkeypatch.setattr(train, "encoders_left_out", lambda recipe: ("text", "vae"))
    of_losses = train.check(session, tmp_path, 0).keys()
    assert of_losses == {"health/critic_lag"} < both
    monkeypatch.undo()
    monkeypatch.setattr(session.method, "num_steps", None)  # it samples as its teacher does
    assert train.check(session, tmp_path, 0).keys() == of_losses
    monkeypatch.undo()
    compiled = replace(session.recipe, model=replace(session.recipe.model, compile=True))
    assert train.check(replace(session, recipe=compiled), tmp_path, 0).keys() == both - of_losses


def test_a_run_may_end_at_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint, from which it then goes on: what was told is not told again."""
    collapsed(monkeypatch, after=4)
    chosen = watched(tmp_path, {"critic": 99.0, "stop": True}, checkpoint_every=100)
    with pytest.raises(
        Unhealthy, match=r"ended at step 6, since students are collapsing: diversity fell to 0 % "
    ) as e:
        train.train(chosen)
    assert str(e.value).endswith("; checkpoint-6 is whole, and the same command goes on from it")
    assert names(tmp_path) == ["checkpoint-6"]
    assert checkpoint.read_state(tmp_path / "checkpoint-6")["steps_done"] == 6
    assert rows(tmp_path)[-1]["step"] == 6
    assert not (tmp_path / "pipeline").exists()
    train.train(chosen)
    assert names(tmp_path)[-1] == "checkpoint-8"
    assert len(warnings(tmp_path)) == 1
    assert (tmp_path / "pipeline").is_dir()


# Pictures


def test_images_belong_to_their_number_and_the_network_learns_on_afterwards(tmp_path: Path) -> None:
    session = build(settings(tmp_path))
    network = session.method.networks["student"].train()
    whole = session.images(["left", "right", "left"], [0, 1, 2])
    assert network.training
    assert whole.shape == (3, 3, 8, 8)
    assert whole.dtype == torch.uint8
    assert torch.equal(session.images(["right"], [1]), whole[1:2])


def test_a_teacher_s_images_are_guided_samples_of_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = build(settings(tmp_path, sample_guidance=3.0))
    asked = []
    monkeypatch.setattr(train, "guided", lambda d, uncond, scale: asked.append(scale) or d)
    monkeypatch.setattr(session.method, "num_steps", None)
    monkeypatch.setattr(train, "TEACHER_STEPS", 3)
    session.images(["left"], [0])
    assert asked == [3.0]


def test_without_averages_the_weights_are_the_network_s_own(tmp_path: Path) -> None:
    session = build(settings(tmp_path, ema=0.0))
    before = states(session.method)["student"]
    with session.weights():
        assert same(before, states(session.method)["student"])


def test_the_grid_s_prompts_are_the_recipe_s_or_the_data_s_first(tmp_path: Path) -> None:
    assert train.sample_prompts(build(settings(tmp_path))) == ["left", "right"] * 8
    chosen = settings(tmp_path, sample_prompts=["left", "left", "right"])
    assert train.sample_prompts(build(chosen)) == (["left", "left", "right"] * 6)[: train.GRID]


def cells(count: int, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, height, width)


@pytest.mark.parametrize(("count", "columns", "lines"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (16, 4, 4)])
def test_a_grid_is_near_square_row_by_row_and_white_where_empty(
    tmp_path: Path, count: int, columns: int, lines: int
) -> None:
    write_grid(cells(count), tmp_path / "deep" / "grid.png", scale=2)
    with Image.open(tmp_path / "deep" / "grid.png") as picture:
        assert picture.size == (columns * 6 * 2, lines * 4 * 2)
        for i in range(columns * lines):
            x, y = (i % columns) * 12, (i // columns) * 8
            expected = (i + 1,) * 3 if i < count else (255,) * 3
            assert picture.getpixel((x, y)) == picture.getpixel((x + 11, y + 7)) == expected
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_large_pictures_are_not_enlarged(tmp_path: Path) -> None:
    write_grid(cells(2, 128, 128), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (256, 128)


# Several processes


def test_only_the_main_process_speaks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    with caplog.at_level(logging.DEBUG, "fastgen"):
        train.train(
            replace(settings(tmp_path, steps=2, sample_every=1), eval={"every": 1}), quick=lambda _: {"fid": 0.0}
        )
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []
    assert not logging.getLogger("fastgen").disabled


# Interruptions


@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (5,), (8,), (1, 2, 5, 7)])
def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not_been(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: Sequence[int]
) -> None:
    """Each time with a checkpoint of the step in hand; rows and weights are an unbroken run's."""
    chosen, steps = settings(tmp_path / "run"), [0]

    def asked(watch: interrupt.Watch) -> bool:
        steps[0] += 1
        return steps[0] in cuts

    monkeypatch.setattr(interrupt.Watch, "asked", asked)
    for done in cuts:
        told = rf"^{chosen.run.out}: ended by run.max_hours 0; checkpoint-{done} is whole, and the same command "
        with pytest.raises(interrupt.Interrupted, match=told):
            train.train(chosen)
        # rows come every 3 steps and before checkpoints, every 2
        assert (tmp_path / "run" / train.UNLOGGED).is_file() == (done in (1, 5, 7))
        assert not (tmp_path / "run" / "pipeline").exists()
    train.train(chosen)
    assert rows(tmp_path / "run") == rows(unbroken)
    for file in (unbroken / "checkpoint-8").glob("*.safetensors"):
        assert same(load_file(file), load_file(tmp_path / "run" / "checkpoint-8" / file.name))
    assert not (tmp_path / "run" / train.UNLOGGED).exists()
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_a_limit_that_is_too_short_still_gets_on_by_a_step_a_call(tmp_path: Path) -> None:
    chosen = settings(tmp_path, steps=3, max_hours=1e-9)
    for done in (1, 2, 3):
        with pytest.raises(interrupt.Interrupted, match=f"ended by run.max_hours 1e-09; checkpoint-{done} is whole"):
            train.train(chosen)
    train.train(chosen)
    assert (tmp_path / "pipeline").is_dir()


# A full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "x"),
        OSError("encoder error -2 when writing image file"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (checkpoint, "save", "checkpoint-4"),
        (train, "write_grid", "samples/step_000004.png"),
        (tracking.JsonLines, "log", "metrics.jsonl"),
        (train, "export_run", "pipeline"),
    ],
)
def test_what_cannot_be_written_is_named_and_the_same_command_goes_on_later(
    unbroken: Path, tmp_path: Path, error: Exception, module: Any, name: str, what: str
) -> None:
    chosen, whole, calls = settings(tmp_path, sample_every=2), getattr(module, name), []

    def full(*args: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == (1 if name == "export_run" else 2):
            raise error
        return whole(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(
            OSError, match=rf"^{tmp_path}/{what.replace('metrics', '.*')}: cannot be written \("
        ) as told:
            train.train(chosen)
    assert "make room" in str(told.value)
    assert "\n" not in str(told.value)
    assert all(checkpoint.read_state(found) for found in checkpoint.all_checkpoints(tmp_path))
    train.train(chosen)
    assert rows(tmp_path) == rows(unbroken)


def test_the_optimizer_of_the_toy_is_the_recipe_s(tmp_path: Path) -> None:
    """What stands for ``train.build`` here does as it does."""
    session = build(settings(tmp_path))
    assert session.engine.optim == {"student": Optim(lr=1e-3), "fake_score": Optim(lr=1e-3)}
    assert set(optims(session.method)) == set(session.engine.optim)


def test_rows_say_what_was_spent_and_a_resume_goes_on_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock by which each step takes a second."""

    def ticking(steps: Iterator[Any]) -> Iterator[Any]:
        for step, logs in steps:
            yield step, logs, 1.0

    monkeypatch.setattr(train, "timed", ticking)
    chosen = settings(tmp_path / "run")
    interrupted(chosen, 5)
    train.train(chosen)
    found = tracking.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["train_seconds"] for row in found] == [float(row["step"]) for row in found]
    assert [row["images_seen"] for row in found] == [row["step"] * chosen.run.batch_size for row in found]
    assert all(row["seconds_per_step"] == 1.0 for row in found)
    assert all(b["peak_memory_mb"] >= a["peak_memory_mb"] > 10 for a, b in pairwise(found))


def test_timed_leaves_out_what_happens_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])

    def steps() -> Iterator[tuple[int, dict[str, float]]]:
        for step in range(3):
            now[0] += 2.0
            yield step, {}

    seconds = []
    for _, _, spent in train.timed(steps()):
        seconds.append(spent)
        now[0] += 50.0
    assert seconds == [2.0, 2.0, 2.0]
