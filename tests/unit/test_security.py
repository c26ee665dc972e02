"""Nothing that is read runs code, leads out of its folder or carries a secret on."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import yaml
from PIL import Image

from fastgen import cli, config, export, plain, tables
from fastgen.config import ConfigError
from fastgen.data import images, webdataset
from fastgen.evaluation import report
from tests import command, reports
from tests.command import fastgen

ROOT = Path(__file__).parents[2]
ROOMS = ("fastgen", "trainers", "pipelines", "evaluation")
CODE = re.compile(
    r"(pickle|cPickle|dill|joblib|shelve|marshal|cloudpickle)\.\w+|torch\.(load|save)|np\.load|numpy\.load|np\.save"
    r"|yaml\.(load|full_load|unsafe_load|load_all|dump)|eval|exec|compile|__import__|os\.(system|popen|exec\w*|spawn\w*)"
    r"|\w+\.(extractall|extract|unpack_archive)|subprocess\.\w+|input"
)
"""Calls that run what they are given, or unpickle it, or write outside the place they are told."""
ALLOWED = {
    ("evaluation/weights.py", "torch.load"): "checkpoints of others (.pt, .pth), tensors alone",
    ("evaluation/stats.py", "np.load"): "statistics, allow_pickle=False",
    ("fastgen/data/webdataset.py", "np.load"): "its own index beside a shard, allow_pickle=False",
    ("fastgen/data/webdataset.py", "np.save"): "its own index, numbers alone",
    ("fastgen/emoji/build.py", "subprocess.run"): "npm, to draw the shipped sprites anew; no part of a run",
    ("fastgen/cli.py", "extract.extract"): "our own, of a LoRA",
    ("fastgen/memory.py", "subprocess.run"): "this Python on this module, to measure its memory",
    ("evaluation/runner.py", "subprocess.run"): "git, for the commit in a protocol",
    ("evaluation/runner.py", "subprocess.TimeoutExpired"): "what that raises",
    ("evaluation/methods.py", "subprocess.run"): "this Python on fastgen, a training at a time",
}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield file.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def test_nothing_is_unpickled_or_run_but_for_what_is_listed() -> None:
    found = {(file, name) for file, name, _ in calls() if CODE.fullmatch(name)}
    assert found <= set(ALLOWED), found - set(ALLOWED)
    assert set(ALLOWED) - found <= {("evaluation/runner.py", "subprocess.TimeoutExpired")}


def test_what_is_listed_reads_plain_numbers_alone() -> None:
    wanted = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    for file, name, node in calls():
        said = {
            word.arg: ast.literal_eval(word.value) for word in node.keywords if isinstance(word.value, ast.Constant)
        }
        if name in wanted:
            assert wanted[name] in said.items(), (file, name)
        assert "shell" not in said, (file, name)


def test_pipelines_and_models_of_others_are_read_from_safetensors_alone() -> None:
    opened = [
        (file, ast.unparse(node.func), {word.arg for word in node.keywords}, ast.unparse(node))
        for file, name, node in calls()
        if name == "DiffusionPipeline.from_pretrained" and file != "fastgen/card.py"
    ]
    assert len(opened) >= 4
    for file, _, _, text in opened:
        assert "use_safetensors" in text, (file, text)
    remote = [
        (file, ast.unparse(n)) for file, _, n in calls() if any(k.arg == "trust_remote_code" for k in n.keywords)
    ]
    assert not remote  # only export.from_pretrained says it, of code that is its own to the byte


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("words", ["generate", "train"])
def test_pickled_weights_are_refused_and_not_opened(world: Path, tmp_path: Path, words: str) -> None:
    folder, out = Path(shutil.copytree(world / "teacher", tmp_path / "pickled")), tmp_path / "out"
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))  # whatever is in it, it must not be opened
    with mock.patch("torch.load", side_effect=AssertionError("unpickled")):
        if words == "train":
            result = fastgen("train", world / "run.yaml", f"model.path={folder}", f"run.out={out}")
        else:
            result = fastgen("generate", folder, "-p", "a", "--steps", "1", "--out", out)
    assert result.code == 2
    assert str(folder) in result.err
    assert "unpickled" not in result.err
    assert not out.exists()


def test_code_that_a_pipeline_brings_is_not_run_unless_it_is_trusted(world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world / "teacher", tmp_path / "brings"))
    marker = tmp_path / "ran"
    (folder / "pipeline.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    result = fastgen("generate", folder, "-p", "a", "--steps", "1", "--out", tmp_path / "out")
    assert result.code == 2
    assert (
        "pipeline.py: is not this fastgen's code; read it, and if you trust it pass trust_remote_code=True"
        in result.err
    )
    with pytest.raises(ValueError, match="is not this fastgen's code"):
        export.load(folder)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_config_s_tags_make_no_objects(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for text in (f'!!python/object/apply:os.system ["touch {marker}"]', "!!python/name:os.system", "!x y"):
        with pytest.raises(ValueError, match="could not determine a constructor"):
            plain.from_yaml(text)
    assert not marker.exists()


# Archives and lists


def test_a_shard_is_read_in_place_and_nothing_leaves_it(tmp_path: Path) -> None:
    """Links, absolute names and names with .. are names: nothing is extracted, no link followed."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(picture, "PNG")
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as opened:
        for name, kind, target in [
            ("../../up.png", tarfile.REGTYPE, ""),
            ("/abs.png", tarfile.REGTYPE, ""),
            ("link.png", tarfile.SYMTYPE, str(secret)),
            ("hard.png", tarfile.LNKTYPE, "../secret.png"),
            ("dev.png", tarfile.CHRTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = len(picture.getvalue()) if kind == tarfile.REGTYPE else 0
            opened.addfile(member, io.BytesIO(picture.getvalue()) if member.size else None)
    before = {p for p in tmp_path.rglob("*")}
    source = webdataset.open(webdataset.Config(str(folder)), (8, 8))
    assert len(source) == 2
    seen = [source.item(i).image for i in range(2)]
    assert all(image is not None and image[0, 0].tolist() == [0, 0, 255] for image in seen)
    assert {p for p in tmp_path.rglob("*")} - before == {folder / f"a.tar{webdataset.INDEX}"}


def test_a_list_of_captions_opens_no_file_that_is_not_in_its_folder(tmp_path: Path) -> None:
    """It only names captions of the images that the folder has; links in the folder are its owner's to make."""
    folder = command.images(tmp_path / "images", 2)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "secret.png")
    rows = [{"file": name, "caption": "taken"} for name in ("../secret.png", str(tmp_path / "secret.png"), "0.png")]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = images.open(images.Config(str(folder)), (16, 16))
    assert len(source) == 2
    assert sorted(source.item(i).prompt for i in range(2)) == ["", "taken"]


# Secrets

TOKEN, KEY, WANDB, LOGIN = (
    "hf_PlantedPlantedPlanted42",
    "Planted/AwsKey+0123456789",
    "planted0wandb1key2",
    "plantedpass",
)
PLANTED = {"HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": KEY, "WANDB_API_KEY": WANDB}


@pytest.mark.parametrize("value", [TOKEN, KEY, f"https://user:{LOGIN}@host/x", f"https://{TOKEN}@host/x"])
@pytest.mark.parametrize("where", ["file", "override"])
def test_a_config_with_a_secret_in_it_is_refused_without_showing_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, where: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    out = tmp_path / "out"
    if where == "file":
        tree = yaml.safe_load((world / "run.yaml").read_text())
        tree["run"]["sample_prompts"] = [value]
        (tmp_path / "given.yaml").write_text(yaml.safe_dump(tree))
        result = fastgen("train", tmp_path / "given.yaml", f"run.out={out}")
    else:
        result = fastgen("train", world / "run.yaml", f"run.out={out}", f"model.path={value}")
    assert result.code == 2
    assert "holds a token or a login" in result.err
    assert "sample_prompts" in result.err or "model.path" in result.err
    for secret in (TOKEN, KEY, LOGIN):
        assert secret not in result.err + result.out
    assert not out.exists()


def test_messages_show_no_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "another-kind-of-token")
    with pytest.raises(SystemExit):
        cli.fail(f"https://me:{LOGIN}@host/x: no {TOKEN}, no another-kind-of-token", 2)
    assert capsys.readouterr().err == "fastgen: https://host/x: no (left out), no (left out)\n"
    assert (
        plain.hidden("what https://huggingface.co/a/b says of a_key")
        == "what https://huggingface.co/a/b says of a_key"
    )
    config.check_secrets({"a": ["https://huggingface.co/a/b", 3, None]}, "run.yaml")
    with pytest.raises(ConfigError, match=r"run\.yaml: a\.1 holds a token"):
        config.check_secrets({"a": [3, TOKEN]}, "run.yaml")


def test_no_file_of_a_run_its_export_and_its_report_holds_a_secret(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    out, said = tmp_path / "run", []
    said.append(fastgen("train", world / "run.yaml", f"run.out={out}", "run.steps=2", "run.trackers=[tensorboard]"))
    said.append(fastgen("export", out, "--out", tmp_path / "exported"))
    source = f"{{source: images, path: {world / 'images'}}}"
    words = ["num_images=4", "batch_size=4", "teacher_steps=[1]", "bootstrap=0"]
    said.append(fastgen("evaluate", out, "--metrics", "diversity", "--reference", source, *words[:3]))
    said.append(fastgen("generate", f"https://me:{LOGIN}@host/x", "-p", "a", "--out", tmp_path / "never"))
    assert [result.code for result in said[:2]] == [0, 0], [result.err for result in said]
    assert said[3].code == 2
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"config.yaml", "train.log", "metrics.jsonl", "README.md", "state.json"} <= {p.name for p in files}
    texts = {str(p): p.read_bytes() for p in files} | {str(i): (r.out + r.err).encode() for i, r in enumerate(said)}
    for secret in (*PLANTED.values(), LOGIN):
        assert not [name for name, text in texts.items() if secret.encode() in text], secret


# Pages

EVIL = (
    '</script><script>alert(1)</script><img src=x onerror="alert(1)">\'" javascript:alert(1) | `a` [x](http://e)\n# h'
)


def test_a_report_shows_evil_names_prompts_and_reasons_as_text(tmp_path: Path) -> None:
    reports.made_up_run(tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    for row in rows:
        row["name"] = f"{EVIL} {row['name']}"
        row["protocol"]["device"] = EVIL
    (tmp_path / "results.json").write_text(json.dumps(rows))
    listed = tmp_path / "comparison" / "prompts.json"
    tree = json.loads(listed.read_text())
    tree["prompts"] = [EVIL] * len(tree["prompts"])
    for subject, row in zip(tree["subjects"], rows, strict=False):
        subject["name"] = row["name"]
    listed.write_text(json.dumps(tree))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"note": EVIL}))
    page = report.write_report(tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert page.count("<script") == page.count("</script>") == 1
    assert "<img src=x" not in page
    assert 'onerror="' not in page.replace("&quot;", "")
    assert "&lt;img src=x" in page
    assert "<script" not in markdown
    assert "\n# h" not in markdown
    assert "<img" not in markdown
    for line in markdown.splitlines():
        if EVIL[:8].replace("<", "&lt;") in line and line.startswith("|"):
            assert "[x](http" not in line.replace("\\", "#")


def test_a_table_shows_names_with_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(("name", "fid"), [("[/red] [bold]x", "3")])
    assert "[/red] [bold]x" in capsys.readouterr().out
