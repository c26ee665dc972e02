"""What is read of a base's own card, and the way to the Hub, whose library is a fake here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fastgen import cli, publish, recipe
from fastgen.card import Base, Licence
from fastgen.publish import Wanted, base_of, front_matter
from tests import command, tiny

TOKEN = "hf_" + "s" * 30


def card(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text)
    return str(folder)


# The base


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: mit\n---", {"license": "mit"}),
        ("# x\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matter_is_what_stands_at_the_head(text: str, head: dict[str, Any]) -> None:
    assert front_matter(text) == head


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: mit", Licence("mit")),
        ("license: MIT", Licence("mit")),
        (
            "license: other\nlicense_name: ours\nlicense_link: https://e.org/x",
            Licence("other", "ours", "https://e.org/x"),
        ),
        ("license: other\nlicense_name: ours\nlicense_link: LICENSE.md", Licence("other", "ours")),
        ("license: mit\nlicense_link: 'https://e.org/x) evil'", Licence("mit")),
        ("license: ours-2.0", Licence("other", "ours-2.0")),
        ("tags: [x]", Licence()),
    ],
)
def test_the_licence_is_the_base_s_own(tmp_path: Path, head: str, licence: Licence) -> None:
    assert base_of(card(tmp_path / "teacher", f"---\n{head}\n---\n")) == Base("teacher", "", licence)


def test_a_base_without_a_card_has_an_unknown_licence_or_the_one_given(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    assert base_of(str(tmp_path / "teacher")) == Base("teacher")
    assert base_of(str(tmp_path / "teacher"), "MIT").licence == Licence("mit")
    assert base_of(str(tmp_path / "teacher"), "ours").licence == Licence("other", "ours")


def test_a_licence_given_against_the_base_s_own_is_refused(tmp_path: Path) -> None:
    path = card(tmp_path / "teacher", "---\nlicense: cc-by-nc-4.0\n---\n")
    assert base_of(path, "cc-by-nc-4.0").licence.id == "cc-by-nc-4.0"
    with pytest.raises(
        ValueError, match=r"teacher: its README.md says its licence is cc-by-nc-4.0; leave out --license mit"
    ):
        base_of(path, "mit")


@pytest.mark.parametrize(
    ("said", "nearest"),
    [("owner/name", "owner/name"), ("[owner/one, owner/two]", "owner/one"), ("./here", ""), ("[]", ""), ("3", "")],
)
def test_the_nearest_base_on_the_hub_is_known_by_the_card(tmp_path: Path, said: str, nearest: str) -> None:
    assert base_of(card(tmp_path / "teacher", f"---\nbase_model: {said}\n---\n")).hub == nearest


def test_a_run_s_pipeline_is_called_by_its_run(tmp_path: Path) -> None:
    for name in ("pipeline", "component", "lora"):
        folder = tmp_path / "emoji-dmd2" / name
        folder.mkdir(parents=True)
        assert base_of(str(folder)).name == "emoji-dmd2"
    assert publish.name_of(tmp_path / "emoji-dmd2" / "lora", Wanted("lora")) == "emoji-dmd2-lora"
    assert publish.name_of(tmp_path / "other", Wanted()) == "other"
    assert publish.name_of(tmp_path / "other", Wanted(repo="owner/student")) == "student"


def test_a_hub_id_is_asked_for_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = card(tmp_path / "cached", "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE.md\n---\n")
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return f"{path}/README.md"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    link = "https://huggingface.co/owner/name/blob/main/LICENSE.md"
    assert base_of("owner/name") == Base("owner/name", "owner/name", Licence("other", "ours", link))
    assert asked == [("owner/name", "README.md")]
    assert publish.place_of(base_of("owner/name")) == "owner/name"
    assert publish.place_of(Base("copy", "owner/name")) == "path/to/copy"


def test_a_hub_id_whose_card_is_not_reachable_has_an_unknown_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert base_of("owner/name") == Base("owner/name", "owner/name")


# What can be exported


def made(tmp_path: Path, **changes: dict[str, Any]) -> recipe.Recipe:
    (tmp_path / "teacher").mkdir(exist_ok=True)
    tree: dict[str, Any] = {
        "model": {"family": "sd", "path": str(tmp_path / "teacher")},
        "method": {"name": "dmd2"},
        "data": {"source": "prompts", "path": "prompts.txt"},
        "optim": {"student": {}, "fake_score": {}},
        "run": {"out": "runs/x", "steps": 1},
    }
    return recipe.decode({key: value | changes.get(key, {}) for key, value in (tree | {"student": {}}).items()}, "x")


@pytest.mark.parametrize(
    ("wanted", "changes", "message"),
    [
        (Wanted("lora"), {}, "runs/x: trained all weights, no adapters; `fastgen extract-lora` makes a LoRA file"),
        (
            Wanted("lora", "fp16"),
            {"student": {"lora": {"rank": 2}}},
            "a LoRA file has no variant fp16; write it in that precision: --dtype",
        ),
        (
            Wanted(variant="fp16"),
            {"run": {"save_dtype": "bf16"}},
            "variant fp16 stands beside weights in float32, not bf16; add --dtype fp32, or leave out --variant",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(
    tmp_path: Path, wanted: Wanted, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        publish.check(made(tmp_path, **changes), wanted)


def test_what_can_be_passes(tmp_path: Path) -> None:
    publish.check(made(tmp_path), Wanted("component", "fp16"))
    publish.check(made(tmp_path, student={"lora": {"rank": 2}}), Wanted("lora"))
    card(tmp_path / "teacher", "---\nlicense: cc-by-nc-4.0\n---\n")
    with pytest.raises(ValueError, match="leave out --license mit"):
        publish.check(made(tmp_path), Wanted(licence="mit"))


def test_a_student_s_bases_are_its_teacher_and_what_it_started_from(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    found = publish.bases_of(made(tmp_path, student={"init": str(tmp_path / "first")}))
    assert [base.name for base in found] == ["teacher", "first"]
    assert [base.name for base in publish.bases_of(made(tmp_path))] == ["teacher"]


def test_the_call_takes_what_the_class_takes() -> None:
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 24, "times": [1.0]}
    call = publish.call_of(tiny.pipeline(), settings, "a dog", "owner/x")
    expected = {"prompt": "a dog", "num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 24}
    assert call.arguments == expected
    assert (call.pipeline, call.gives, call.scheduler) == ("StableDiffusionPipeline", "images", "DDIMScheduler")
    assert publish.call_of(tiny.pipeline(), {}, "a dog", "x").arguments == {"prompt": "a dog"}


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"torch", "diffusers"} <= set(publish.versions())
    monkeypatch.setattr(publish, "_PACKAGES", ("torch", "no-such-package"))
    assert list(publish.versions()) == ["torch"]


# The Hub


class Api:
    """In the place of ``HfApi``: keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.failure: Exception | None = None

    def __call__(self, **named: Any) -> Api:
        assert not named, "the token is the library's to find"
        return self

    def create_repo(self, repo_id: str, **named: Any) -> None:
        self.asked.append(("create_repo", {"repo_id": repo_id, **named}))

    def upload_folder(self, **named: Any) -> str:
        if self.failure:
            raise self.failure
        self.asked.append(("upload_folder", named))
        return f"https://huggingface.co/{named['repo_id']}"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return made


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_goes_to_the_hub(api: Api, tmp_path: Path, private: bool) -> None:
    assert publish.push(tmp_path, "owner/student", private) == "https://huggingface.co/owner/student"
    (first, made), (second, sent) = api.asked
    assert (first, second) == ("create_repo", "upload_folder")
    assert made == {"repo_id": "owner/student", "private": True if private else None, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("owner/student", tmp_path)
    assert TOKEN not in str(api.asked)


def test_where_bases_lie_on_this_machine_stays_here(api: Api, tmp_path: Path) -> None:
    """Also where the push fails, and the folder is uploaded by hand later."""
    run = tmp_path / "mine" / "pipeline"
    files = {
        "fastgen.json": ({"base_model": str(run), "data": "/home/me/x"}, {"base_model": "mine", "data": ".../x"}),
        "model_index.json": ({"_name_or_path": "owner/teacher"}, {"_name_or_path": "owner/teacher"}),
        "unet/config.json": ({"_name_or_path": f"{run}/unet", "a": "/b"}, {"_name_or_path": "unet", "a": "/b"}),
        "tokenizer/config.json": ({"bos_token": "<s>"}, {"bos_token": "<s>"}),
    }
    for name, (before, _) in files.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "out" / name).write_text(json.dumps(before))
    api.failure = RuntimeError("gone")
    with pytest.raises(OSError, match="not pushed to owner/x: gone"):
        publish.push(tmp_path / "out", "owner/x")
    for name, (_, after) in files.items():
        assert json.loads((tmp_path / "out" / name).read_text()) == after


def test_offline_or_without_a_token_nothing_is_asked(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = rf"{tmp_path} is written; `hf upload owner/x {tmp_path}` pushes it later"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=rf"^not pushed to owner/x: no token; log in by `hf auth login`.*{later}"):
        publish.push(tmp_path, "owner/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"^not pushed to owner/x: HF_HUB_OFFLINE is set; {later}"):
        publish.push(tmp_path, "owner/x")
    assert api.asked == []


def test_what_the_hub_refuses_is_one_line_without_the_token(api: Api, tmp_path: Path) -> None:
    api.failure = RuntimeError(f"403 Forbidden\nfor Bearer {TOKEN}")
    with pytest.raises(OSError, match=r"^not pushed to owner/x: 403 Forbidden for Bearer \(token\); ") as error:
        publish.push(tmp_path, "owner/x")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None
    assert cli.explained(error.value)[1] == 1
    api.failure = RuntimeError()
    with pytest.raises(OSError, match="owner/x: RuntimeError; "):
        publish.push(tmp_path, "owner/x")


@pytest.mark.parametrize("repo", ["owner/name/more", "owner name", "-", "a..b"])
def test_what_is_no_repository_is_told_at_once(repo: str) -> None:
    with pytest.raises(ValueError, match=rf"^--push-to-hub '{repo}': is not a repository's id; write OWNER/NAME$"):
        publish.check_repo(repo)


def test_a_repository_s_id_passes() -> None:
    publish.check_repo("owner/name")
    publish.check_repo("name")


def test_both_commands_check_the_repository_before_they_work(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    for words in (["export", tmp_path], ["extract-lora", tmp_path, tmp_path, "--out", tmp_path / "x"]):
        result = command.fastgen(*words, "--push-to-hub", "a b")
        assert result.code == 2
        assert result.err == "fastgen: --push-to-hub 'a b': is not a repository's id; write OWNER/NAME\n"
