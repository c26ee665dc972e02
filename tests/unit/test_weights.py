"""Where weights are looked for, and what is said where they are not."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import pytest
import torch
from safetensors.torch import save_file

from fastgen.evaluation import weights

NAMES = {
    "inception",
    "inception_pytorch",
    "clip",
    "dinov2",
    "lpips",
    "hpsv2",
    "image_reward",
    "pickscore",
    "mask2former",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No weights of this machine are seen."""
    for name in ("FASTGEN_WEIGHTS_DIR", "TORCH_HOME", "HPS_ROOT", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def put(path, text="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def in_hub(tmp_path, repository, *files):
    """A repository as the Hub's cache keeps it."""
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    put(folder / "refs" / "main", "0" * 40)
    for file in files:
        put(folder / "snapshots" / ("0" * 40) / file)
    return folder / "snapshots" / ("0" * 40)


def test_table_has_a_source_for_each_name():
    assert NAMES <= weights.TABLE.keys()
    assert all(entry.source for entry in weights.TABLE.values())
    assert [bool(e.url) + bool(e.hub) + bool(e.made_by) for e in weights.TABLE.values()] == [1] * len(weights.TABLE)


def test_places_are_looked_at_in_order(tmp_path, monkeypatch):
    name = weights.TABLE["inception_pytorch"].files[0]
    third = put(tmp_path / "torch" / "hub" / "checkpoints" / name)
    assert weights.find("inception_pytorch") == third
    second = put(tmp_path / "home" / ".cache" / "fastgen" / name)
    assert weights.find("inception_pytorch") == second
    first = put(tmp_path / "mine" / name)
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path / "mine"))
    assert weights.find("inception_pytorch") == first
    given = put(tmp_path / "any.pth")
    assert weights.find("inception_pytorch", str(given)) == given
    assert weights.find("inception_pytorch", str(tmp_path / "mine")) == first


def test_caches_of_other_libraries(tmp_path):
    assert weights.find("inception_pytorch", str(put(tmp_path / "torch-fidelity.pth"))).name == "torch-fidelity.pth"
    other = put(tmp_path / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")
    assert weights.find("inception_pytorch") == other
    theirs = put(tmp_path / "temporary" / "inception-2015-12-05.pt")
    assert weights.find("inception") == theirs
    hps = put(tmp_path / "home" / ".cache" / "hpsv2" / "HPS_v2.1_compressed.pt")
    assert weights.find("hpsv2") == hps
    reward = put(tmp_path / "home" / ".cache" / "ImageReward" / "ImageReward.pt")
    assert weights.find("image_reward") == reward


def test_hub_ids_are_read_from_the_hubs_cache(tmp_path):
    folder = in_hub(tmp_path, "facebook/dinov2-large", "config.json", "model.safetensors")
    assert weights.find("dinov2") == weights.find("dinov2", "facebook/dinov2-large") == folder
    small = in_hub(tmp_path, "facebook/dinov2-small", "config.json")
    assert weights.find("dinov2", "facebook/dinov2-small") == small
    file = in_hub(tmp_path, "xswu/HPSv2", "HPS_v2.1_compressed.pt") / "HPS_v2.1_compressed.pt"
    assert weights.find("hpsv2") == file


def test_a_place_in_the_assets():
    assert (weights.find("clip", "assets:emoji/clip")).is_dir()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("inceptoin", None, "unknown weights 'inceptoin'; did you mean 'inception'?"),
        (
            "inception",
            None,
            "{home}/.cache/fastgen/inception-2015-12-05.pt: no weights of inception there; they come from "
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt: put "
            "them there, or set eval.weights.inception",
        ),
        ("lpips", None, "no weights of lpips there; they come from `python -m fastgen.lpips`: put"),
        (
            "clip",
            None,
            "no weights of clip there; they come from https://huggingface.co/openai/clip-vit-large-patch14:",
        ),
        ("inception", "{tmp}", "{tmp}/inception-2015-12-05.pt: eval.weights.inception names a folder without it; it"),
        ("inception", "{tmp}/x.pt", "{tmp}/x.pt: no such file; weights of inception come from https://nvlabs"),
        ("inception", "some/one", "some/one: no such file; weights of inception"),
        ("clip", "{tmp}/clip", "{tmp}/clip: no such folder; weights of clip come from https://huggingface.co/openai"),
        ("clip", "some/one", "some/one: not in the Hub's cache; `hf download some/one` puts it there, or set"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, name, given, message):
    message = message.format(home=tmp_path / "home", tmp=tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        weights.find(name, given.format(tmp=tmp_path) if given else None)
    assert "\n" not in str(caught.value)


def test_fetch_downloads_what_is_not_there(tmp_path, monkeypatch):
    served = put(tmp_path / "served.pt", "numbers")
    digest = hashlib.sha256(b"numbers").hexdigest()
    entry = dataclasses.replace(weights.TABLE["inception"], url=served.as_uri(), sha256=digest[:8])
    monkeypatch.setitem(weights.TABLE, "inception", entry)
    file = weights.fetch("inception")
    assert file == weights.home() / entry.files[0]
    assert weights.sha256(file) == digest
    served.unlink()
    assert weights.fetch("inception") == file, "what is there is not asked for again"


def test_fetch_leaves_nothing_half_done(tmp_path, monkeypatch):
    served = put(tmp_path / "served.pt", "broken")
    entry = dataclasses.replace(weights.TABLE["inception"], url=served.as_uri(), sha256="6726825d")
    monkeypatch.setitem(weights.TABLE, "inception", entry)
    with pytest.raises(ValueError, match=r"served.pt: gave a file of SHA-256 \w{64}, not 6726825d...; try again"):
        weights.fetch("inception")
    served.unlink()
    with pytest.raises(ValueError, match=r"inception-2015-12-05.pt: cannot be had from file://.*put it there by hand"):
        weights.fetch("inception")
    assert not list(weights.home().iterdir())


def test_fetch_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repository, *files, local_files_only=False, ignore_patterns=()):
        asked.append((repository, *files))
        if local_files_only:
            raise FileNotFoundError
        if repository == "openai/clip-vit-large-patch14":
            raise OSError("no\nnetwork")
        folder = tmp_path / repository
        names = [*files] or ["config.json", *(["model.safetensors"] if "dinov2" in repository else [])]
        for name in names:
            put(folder / name)
        return str(folder / files[0] if files else folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert weights.fetch("hpsv2") == tmp_path / "xswu/HPSv2/HPS_v2.1_compressed.pt"
    assert asked[-1] == ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    assert weights.fetch("dinov2") == tmp_path / "facebook/dinov2-large"
    assert asked[-1] == ("facebook/dinov2-large",)
    assert weights.fetch("clip_336") == tmp_path / "openai/clip-vit-large-patch14-336"
    assert asked[-1] == ("openai/clip-vit-large-patch14-336", "pytorch_model.bin"), "where there is nothing else"
    with pytest.raises(
        ValueError, match=r"weights of clip cannot be had from https://.*large-patch14 \(no network\);"
    ):
        weights.fetch("clip")
    with pytest.raises(ValueError, match=r"no weights of lpips there"):
        weights.fetch("lpips")


def test_hash_of_a_folder_is_of_names_and_bytes(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        put(folder / "b" / "x", "1")
        put(folder / "a", "2")
    assert weights.sha256(one) == weights.sha256(other)
    (other / "a").rename(other / "c")
    assert weights.sha256(one) != weights.sha256(other)
    assert weights.sha256(one / "a") == hashlib.sha256(b"2").hexdigest()


def test_checkpoints_are_read_as_numbers_alone(tmp_path, monkeypatch):
    asked = []
    held = {"state_dict": {"a": torch.ones(2), "version": 3}, "epoch": 3}
    monkeypatch.setattr("torch.load", lambda file, **how: asked.append(how) or held)
    (tmp_path / "x.pt").touch()
    assert weights.tensors(tmp_path / "x.pt", "").keys() == {"a"}
    assert asked == [{"map_location": "cpu", "weights_only": True}]
    held = {"b": torch.ones(2)}
    assert weights.tensors(tmp_path / "x.pt", "").keys() == {"b"}
    save_file({"c": torch.ones(2)}, tmp_path / "x.safetensors")
    assert weights.tensors(tmp_path / "x.safetensors", "").keys() == {"c"}


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_that_are_no_checkpoint(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: no such checkpoint; buy one$"):
        weights.tensors(tmp_path / name, "buy one")
    (tmp_path / name).write_bytes(b"not at all a checkpoint")
    with pytest.raises(ValueError, match=rf"{name}: not readable as plain tensors \(.+\); buy one$"):
        weights.tensors(tmp_path / name, "buy one")


@pytest.mark.parametrize("held", [{"a": 1}, {"state_dict": {"a": 1}, "b": torch.ones(2)}, {}])
def test_a_checkpoint_without_tensors(tmp_path, held):
    torch.serialization.save(held, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: has no tensors, nor any in `state_dict`; buy one$"):
        weights.tensors(tmp_path / "x.pt", "buy one")
