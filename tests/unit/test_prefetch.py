"""What a recipe needs from outside, and the one line where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fastgen import config, prefetch, recipe
from fastgen.evaluation import weights
from fastgen.prefetch import Need
from tests import command


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    command.world(tmp_path)
    return config.read(tmp_path / "run.yaml")


def needed(tree: dict[str, Any], *changes: str) -> dict[str, Need]:
    decoded = recipe.decode(config.override(tree, changes), "run.yaml")
    return {need.key: need for need in prefetch.needs(decoded)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """A Hub that has everything but what is called nothing; what it was asked for."""
    calls = []

    def snapshot_download(
        repo_id: str, repo_type: str, local_files_only: bool, ignore_patterns: list[str] | None
    ) -> str:
        calls.append((repo_id, repo_type, local_files_only))
        if repo_id.endswith("nothing"):
            raise OSError("no such\nrepository")
        return f"/cache/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return calls


def test_teacher_and_data_are_needed(tree: dict[str, Any]) -> None:
    found = needed(tree)
    assert {key: need.path for key, need in found.items()} == {
        "model.path": tree["model"]["path"],
        "data.path": tree["data"]["path"],
    }
    assert all(need.there and not need.downloads for need in found.values())


def test_what_ships_is_not_needed(tree: dict[str, Any]) -> None:
    emoji = [
        "model.path=assets:emoji/teacher",
        "data={source: emoji}",
        "eval={features: clip, weights: {clip: 'assets:emoji/clip'}, reference: {source: emoji}}",
    ]
    assert needed({**tree, "data": {}}, *emoji) == {}


def test_start_and_evaluation_are_needed(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", "/weights")
    reference = "reference: {source: images, path: real}"
    found = needed(tree, "student.init=runs/one/pipeline", f"eval={{metrics: [fid], {reference}}}")
    assert found["student.init"].path == "runs/one/pipeline"
    assert found["eval.weights.inception"].path == "/weights/inception-2015-12-05.pt"
    assert found["eval.weights.inception"].downloads
    assert found["eval.reference.path"].path == "real"
    found = needed(tree, f"eval={{features: clip, weights: {{clip: openai/clip-vit-base-patch32}}, {reference}}}")
    assert found["eval.weights.clip"].downloads
    assert "eval.weights.inception" not in found


def test_weights_of_an_evaluation_are_had_from_their_own_source(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    section = "eval={metrics: [fid], features: legacy_pytorch, reference: {source: images, path: real}}"
    [need] = [need for key, need in needed(tree, section).items() if key.startswith("eval.weights")]
    assert need.weights == "inception_pytorch"
    monkeypatch.setattr(weights, "fetch", lambda name: tmp_path / name)
    assert prefetch.fetch(need) == str(tmp_path / "inception_pytorch")
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"x")
    [need] = [need for key, need in needed(tree, section).items() if key.startswith("eval.weights")]
    assert need.there
    assert prefetch.fetch(need) == need.path


def test_lpips_is_needed_where_it_is_the_distance(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", "/weights")
    tree["optim"] = {"student": {}}
    tree["method"] = {"name": "consistency"}
    assert "method.lpips" not in needed(tree)
    found = needed(tree, "method.distance=lpips")["method.lpips"]
    assert found.path == "/weights/lpips_vgg16.safetensors"
    with pytest.raises(
        ValueError, match=r"/weights/\S+: method.lpips is not there; `python -m fastgen.lpips /weights/"
    ):
        prefetch.fetch(found)


def test_missing_pairs_name_the_command_that_makes_them(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"] = {"source": "pairs", "path": str(tmp_path / "pairs"), "made_by": "sd/pairs"}
    need = needed(tree)["data.path"]
    with pytest.raises(ValueError, match=r"is not there; `fastgen pairs sd/pairs pairs.out=\S+/pairs` makes them"):
        prefetch.fetch(need)


def test_a_range_of_shards_is_there_if_its_first_is(tmp_path: Path) -> None:
    (tmp_path / "0000.tar").touch()
    chosen = recipe.choose(
        "source", "source", {"source": "webdataset", "path": str(tmp_path / "{0000..0012}.tar")}, "x", "data"
    )
    (need,) = prefetch.of_source("data", chosen)
    assert need.there


def test_hub_ids_are_downloaded(asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prefetch.fetch(Need("model.path", "some/model", "", "model")) == "/cache/some/model"
    assert prefetch.fetch(Need("data.path", "some/set", "", "dataset")) == "/cache/some/set"
    assert asked == [("some/model", "model", False), ("some/set", "dataset", False)]


def test_folders_are_not_asked_of_the_hub(asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert prefetch.fetch(Need("model.path", "some/model", "", "model")) == "some/model"
    with pytest.raises(ValueError, match=r"some/other: model.path is not there; put it there"):  # beside one that is
        prefetch.fetch(Need("model.path", "some/other", "put it there", "model"))
    with pytest.raises(ValueError, match=r"data.path is not there"):
        prefetch.fetch(Need("data.path", "a/prompts.txt", "one prompt a line"))
    assert asked == []


def test_what_the_hub_lacks_is_told_in_a_line(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    need = Need("model.path", "some/nothing", "", "model")
    with pytest.raises(ValueError, match=r"model.path cannot be downloaded \(no such repository\); where there is a"):
        prefetch.fetch(need)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wanted = r"HF_HUB_OFFLINE is set and it is not in the Hub's cache; .* set model.path=FOLDER"
    with pytest.raises(ValueError, match=wanted):
        prefetch.fetch(need)
    assert prefetch.fetch(Need("model.path", "some/model", "", "model")) == "/cache/some/model"  # from the cache
    assert [offline for _, _, offline in asked] == [False, True, True]


def test_the_command_lists_and_fetches(tmp_path: Path, asked: list[Any]) -> None:
    command.world(tmp_path)
    listed = command.done("prefetch", tmp_path / "run.yaml", "student.init=some/model", "--dry-run")
    assert "student.init: some/model  from the Hub" in listed.out
    assert "data.path" in listed.out
    assert asked == []
    fetched = command.done("prefetch", tmp_path / "run.yaml", "student.init=some/model")
    assert "student.init: some/model  /cache/some/model" in fetched.out
    (tmp_path / "prompts.txt").unlink()
    listed = command.done("prefetch", tmp_path / "run.yaml", "--dry-run")
    assert "missing; a .txt file" in listed.out
    failed = command.fastgen("prefetch", tmp_path / "run.yaml")
    assert failed.code == 2
    assert failed.err.startswith(f"fastgen: {tmp_path}/prompts.txt: data.path is not there; a .txt file")
    assert failed.err.count("\n") == 1
