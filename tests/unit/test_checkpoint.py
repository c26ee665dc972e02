"""Checkpoints: exact resumption, and folders that are whole or not there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen import checkpoint
from fastgen.checkpoint import CheckpointError, all_checkpoints, atomic_folder, load, read_state, save, write_text
from fastgen.ema import EMA
from fastgen.engine import Engine
from tests.oracle import Samples, Toy, linear_method, optims, same, states


class Run:
    """A method with a buffer, its engine and an average of "b"."""

    def __init__(self, width: int = 4, fp16: bool = False, **settings: int) -> None:
        self.method = linear_method(every=2)
        if width != 4:
            self.method.networks["a"] = nn.Linear(width, 4)  # type: ignore[index]
        self.method.networks["b"].register_buffer("count", torch.zeros(()))
        self.ema = {"b": EMA(self.method.networks["b"], 0.9)}
        arguments = {"batch_size": 2, "steps": 10, "seed": 3, **settings}
        self.engine = Engine(
            self.method, Samples((4,)), optims(self.method, lr=1e-2, schedule="cosine"), fp16=fp16, **arguments
        )

    def train(self, start: int, stop: int) -> list[dict[str, float]]:
        logs = []
        for _, log in self.engine.run(range(start, stop)):
            self.ema["b"].update()
            self.method.networks["b"].get_buffer("count").add_(1)
            logs.append(log)
        return logs

    def everything(self) -> dict[str, Tensor]:
        found = {f"{r}.{n}": v for r, s in states(self.method).items() for n, v in s.items()}
        found |= {f"ema.{n}": v.clone() for n, v in self.ema["b"].average.items()}
        for role, optimizer in self.engine.optimizers.items():
            for name, p in self.engine.parameters[role].items():
                found |= {f"{role}.optim.{name}.{n}": v.clone() for n, v in optimizer.state.get(p, {}).items()}
        return found


def saved(folder: Path, steps: int = 3, keep: int = 2) -> Path:
    run = Run()
    run.train(0, steps)
    return save(folder, steps, run.engine, run.ema, keep)


# Exact resumption


@pytest.mark.parametrize("fp16", [False, True])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, fp16: bool) -> None:
    unbroken = Run(fp16=fp16)
    logs = unbroken.train(0, 7)

    first = Run(fp16=fp16)
    first.train(0, 3)
    path = save(tmp_path, 3, first.engine, first.ema, 2)
    second = Run(fp16=fp16)
    with torch.no_grad():
        for network in second.method.networks.values():
            for p in network.parameters():
                p.add_(1 if network is not second.method.networks["frozen"] else 0)
    done = load(path, second.engine, second.ema)
    assert done == 3
    assert second.train(done, 7) == logs[3:]
    assert same(unbroken.everything(), second.everything())
    assert second.ema["b"].updates == 7
    assert {k: s.state_dict() for k, s in unbroken.engine.scalers.items()} == {
        k: s.state_dict() for k, s in second.engine.scalers.items()
    }


def test_a_checkpoint_before_the_first_step_resumes(tmp_path: Path) -> None:
    first, second = Run(), Run()
    path = save(tmp_path, 0, first.engine, first.ema, 2)
    assert load(path, second.engine, second.ema) == 0
    first.train(0, 2)
    second.train(0, 2)
    assert same(first.everything(), second.everything())


def test_saving_changes_nothing(tmp_path: Path) -> None:
    one, two = Run(), Run()
    one.train(0, 2)
    save(tmp_path, 2, one.engine, one.ema, 2)
    one.train(2, 4)
    two.train(0, 4)
    assert same(one.everything(), two.everything())


def test_a_checkpoint_holds_trained_weights_moments_averages_and_state_and_no_pickle(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert sorted(f.name for f in path.iterdir()) == [
        "a.optim.safetensors",
        "a.safetensors",
        "b.ema.safetensors",
        "b.optim.safetensors",
        "b.safetensors",
        "state.json",
    ]
    assert set(load_file(path / "b.safetensors")) == {"weight", "bias", "buffer:count"}
    state = read_state(path)
    assert {state["steps_done"], state["seed"]} == {3}
    assert state["samples_per_step"] == 2


def test_another_split_of_the_same_batch_may_resume(tmp_path: Path) -> None:
    first = Run(batch_size=4)
    path = save(tmp_path, 1, first.engine, first.ema, 2)
    second = Run(batch_size=2, accumulate=2)
    assert load(path, second.engine, second.ema) == 1


# What is refused, and that nothing has changed then


def refused(path: Path, run: Run, message: str) -> None:
    before = run.everything()
    with pytest.raises(CheckpointError, match=message):
        load(path, run.engine, run.ema)
    assert same(before, run.everything())
    assert run.ema["b"].updates == 0


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "checkpoint-9", Run(), "checkpoint-9: no such checkpoint; leave out --resume to start anew")


@pytest.mark.parametrize("name", ["a.safetensors", "b.optim.safetensors", "b.ema.safetensors"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-7])
    refused(path, Run(), f"checkpoint-3: damaged checkpoint, {name} is incomplete; none before it is whole")


@pytest.mark.parametrize("name", ["a.safetensors", "b.optim.safetensors", "b.ema.safetensors"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    (path / name).unlink()
    refused(path, Run(), f"damaged checkpoint, {name} is incomplete")


@pytest.mark.parametrize("name", ["a.safetensors", "b.optim.safetensors", "b.ema.safetensors"])
def test_a_file_of_the_right_size_with_wrong_bytes(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    (path / name).write_bytes(b"\xff" * (path / name).stat().st_size)
    refused(path, Run(), f"damaged checkpoint, {name} is not as it was written; none before it is whole")


def test_a_flipped_bit_anywhere_in_any_file(tmp_path: Path) -> None:
    path, chance = saved(tmp_path), random.Random(5)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(12))}:
            harmed = bytearray(whole)
            harmed[place] ^= 1 << chance.randrange(8)
            file.write_bytes(harmed)
            with pytest.raises(CheckpointError, match=r"checkpoint-3: damaged checkpoint"):
                read_state(path, thorough=True)
        file.write_bytes(whole)
    assert read_state(path, thorough=True)["steps_done"] == 3


def test_the_newest_whole_one_before_it_is_offered(tmp_path: Path) -> None:
    paths = [saved(tmp_path, steps, keep=4) for steps in (1, 2, 3)]
    for path in paths[1:]:
        weights = path / "a.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    offer = "damaged checkpoint, a.safetensors is not as it was written; checkpoint-1 before it is whole: `mv "
    refused(paths[2], Run(), offer)
    with pytest.raises(CheckpointError) as found:
        read_state(paths[2], thorough=True)
    assert f"`mv {paths[2]} {paths[2]}.damaged`, then the same command goes on from there" in str(found.value)
    assert f"(--resume {paths[0]})" in str(found.value)


def test_one_of_an_older_version_has_no_digests_and_loads(tmp_path: Path) -> None:
    path, run = saved(tmp_path), Run()
    rewrite(path / "a.safetensors", load_file(path / "a.safetensors"))
    assert "sha256" not in read_state(path)
    assert load(path, run.engine, run.ema) == 3


def test_states_of_another_optimizer(tmp_path: Path) -> None:
    path = saved(tmp_path)
    moments = load_file(path / "a.optim.safetensors")
    rewrite(path / "a.optim.safetensors", {n: t for n, t in moments.items() if not n.endswith("exp_avg")})
    with pytest.raises(
        CheckpointError, match=r"a.optim.safetensors: the state .* is missing; .*set optim.a.name back"
    ):
        load(path, Run().engine, Run().ema)


def test_states_of_a_parameter_that_is_not_there(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path / "a.optim.safetensors", {"other:exp_avg": torch.zeros(1)})
    refused(path, Run(), "a.optim.safetensors: holds 'other:exp_avg', which the network lacks")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"files": []}', "\x00"])
def test_a_damaged_state(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path)
    (path / "state.json").write_text(content)
    refused(path, Run(), r"checkpoint-3: damaged checkpoint \(.*\); none before it is whole")


def test_a_missing_state(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "state.json").unlink()
    refused(path, Run(), "damaged checkpoint")


def test_another_seed(tmp_path: Path) -> None:
    refused(saved(tmp_path), Run(seed=4), "was made with seed 3, this run has 4; set it back")


def test_another_batch_size(tmp_path: Path) -> None:
    refused(saved(tmp_path), Run(batch_size=8), "was made with samples_per_step 2, this run has 8; set it back")


def test_weights_alone_may_come_from_a_run_of_other_batches(tmp_path: Path) -> None:
    """One process exports what several have trained."""
    path, whole, other = saved(tmp_path), Run(), Run(batch_size=8, seed=4)
    assert load(path, whole.engine, whole.ema) == load(path, other.engine, other.ema, goes_on=False) == 3
    assert all(same(one, states(other.method)[role]) for role, one in states(whole.method).items())
    assert same(whole.ema["b"].average, other.ema["b"].average)


def test_a_network_of_another_shape(tmp_path: Path) -> None:
    refused(saved(tmp_path), Run(width=5), r"a.safetensors: 'weight' is \(4, 4\), the network has \(4, 5\)")


def rewrite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a file of a checkpoint and its size in the state, as if it had been saved so, before digests were."""
    save_file(dict(tensors), path)
    state = json.loads((path.parent / "state.json").read_text())
    del state["sha256"], state["own"]
    state["files"][path.name] = path.stat().st_size
    (path.parent / "state.json").write_text(json.dumps(state))


def test_a_network_with_a_further_parameter(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path / "a.safetensors", {"weight": torch.zeros(4, 4)})
    refused(path, Run(), "a.safetensors: lacks 'bias'; it belongs to another network or method")


def test_a_network_without_one_of_the_parameters(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path / "b.ema.safetensors", {**load_file(path / "b.ema.safetensors"), "more": torch.zeros(1)})
    refused(path, Run(), "b.ema.safetensors: holds 'more', which the network lacks")


def test_a_checkpoint_of_another_method(tmp_path: Path) -> None:
    method = Toy({"a": nn.Linear(4, 4)}, linear_method().phases[:1])
    method.phases = (method.phases[0],)
    other = Engine(method, Samples((4,)), optims(method), batch_size=2, steps=10, seed=3)
    path = save(tmp_path, 1, other, {}, 2)
    refused(path, Run(), "b.safetensors: cannot be read")


def test_an_average_that_was_not_kept(tmp_path: Path) -> None:
    run = Run()
    path = save(tmp_path, 1, run.engine, {}, 2)
    refused(path, Run(), "b.ema.safetensors: cannot be read")


def test_weights_are_read_with_the_same_checks(tmp_path: Path) -> None:
    path = saved(tmp_path) / "a.safetensors"
    like = {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)}
    assert set(checkpoint.load_weights(path, like)) == set(like)
    with pytest.raises(CheckpointError, match="the network has"):
        checkpoint.load_weights(path, {**like, "bias": torch.zeros(3)})


# How many stay


def test_all_but_the_newest_are_deleted_by_number(tmp_path: Path) -> None:
    run = Run()
    for steps in (8, 9, 10, 11):
        save(tmp_path, steps, run.engine, run.ema, 2)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_the_checkpoint_just_written_stays_even_among_later_ones(tmp_path: Path) -> None:
    """As after --resume checkpoint-2 in a folder that goes on to 10: what was just saved is not what is deleted."""
    run = Run()
    for steps in (2, 9, 10):
        save(tmp_path, steps, run.engine, run.ema, 3)
    path = save(tmp_path, 4, run.engine, run.ema, 2)
    assert path.is_dir()
    assert len(all_checkpoints(tmp_path)) == 2


def test_saving_again_replaces(tmp_path: Path) -> None:
    saved(tmp_path)
    run = Run()
    path = save(tmp_path, 3, run.engine, run.ema, 2)
    assert load_file(path / "b.safetensors")["buffer:count"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-3.bak", ".checkpoint-4.partial-1", "my-checkpoint-5"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    assert [p.name for p in all_checkpoints(tmp_path)] == ["checkpoint-7", "checkpoint-12"]
    assert all_checkpoints(tmp_path / "nowhere") == []


# Whole or not at all


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result"
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        assert not path.exists()
    assert (path / "sub" / "file").read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("swaps", [True, False], ids=["swaps", "renames twice"])
def test_a_folder_is_replaced_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    path = tmp_path / "result"
    for text in ("old", "new"):
        with atomic_folder(path) as folder:
            (folder / text).touch()
            if not swaps:
                monkeypatch.setattr(checkpoint, "_swap", lambda one, other: False)
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' renameat2")
def test_while_a_folder_is_replaced_it_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, renamed = tmp_path / "result", []
    monkeypatch.setattr(Path, "rename", lambda one, other: renamed.append(one) or os.rename(one, other))
    for text in ("old", "new"):
        with atomic_folder(path) as folder:
            (folder / text).touch()
    assert len(renamed) == 1  # the first time only, where there was none
    assert [p.name for p in path.iterdir()] == ["new"]


def test_what_interrupts_a_replacement_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "result", os.rename
    with atomic_folder(path) as folder:
        (folder / "old").touch()

    def interrupted(one: Path, other: Path) -> None:
        if ".partial-" in one.name:
            raise KeyboardInterrupt
        rename(one, other)

    monkeypatch.setattr(checkpoint, "_swap", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as folder:
        (folder / "new").touch()
    assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_an_exception_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with atomic_folder(path) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(path) as folder:  # noqa: PT012
        (folder / "file").write_text("half")
        raise OSError("disk full")
    assert (path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_a_failed_save_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    count = [0]

    writing = checkpoint.save_file

    def failing(*args: Any) -> str:
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        return writing(*args)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    run = Run()
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 5, run.engine, run.ema, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert before == {f.name: f.read_bytes() for f in path.iterdir()}


def test_leftovers_of_a_killed_write_are_ignored(tmp_path: Path) -> None:
    """A process that dies in the middle leaves nothing that is taken for a checkpoint, and the next write succeeds."""
    code = (
        "import os, signal, sys; from pathlib import Path; from fastgen.checkpoint import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as f:\n"
        "    (f / 'file').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "checkpoint-3")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1  # the leftover
    assert all_checkpoints(tmp_path) == []
    saved(tmp_path)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_other_processes_are_writing_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / f".result.partial-{os.getppid()}"
    theirs.mkdir()
    with atomic_folder(tmp_path / "result") as folder:
        (folder / "file").touch()
    assert theirs.is_dir()


def test_a_leftover_of_a_process_of_the_same_number_is_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / f".result.partial-{os.getpid()}"
    leftover.mkdir()
    (leftover / "stale").touch()
    with atomic_folder(tmp_path / "result") as folder:
        (folder / "file").touch()
    assert [p.name for p in (tmp_path / "result").iterdir()] == ["file"]


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "new é"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
