"""Images with their captions from folders, tar shards and `datasets` sets, and what of them cannot be read."""

from __future__ import annotations

import importlib
import io
import json
import logging
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgen.data import Item, Listed, Skips, Source, Unreadable, hf, images, pictures, webdataset
from fastgen.data.prompts import shuffled
from fastgen.data.skipped import Skipped

SIZE = (8, 8)
datasets: Any = pytest.importorskip("datasets")


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(place: Path, count: int = 6, bad: tuple[int, ...] = ()) -> Path:
    """Images whose red is 10 times their number, and captions that say it."""
    place.mkdir(parents=True)
    for i in range(count):
        (place / f"{i}.png").write_bytes(b"nothing" if i in bad else png(10 * i))
        (place / f"{i}.txt").write_text(str(i))
    return place


def shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return file


def tars(place: Path, count: int = 6, bad: tuple[int, ...] = ()) -> Path:
    """The same in two shards."""
    for k, numbers in enumerate((range(count // 2), range(count // 2, count))):
        members: dict[str, bytes] = {}
        for i in numbers:
            members[f"{i}.png"] = b"nothing" if i in bad else png(10 * i)
            members[f"{i}.txt"] = str(i).encode()
        shard(place / f"{k:04d}.tar", members)
    return place


def rows(place: Path, count: int = 6, bad: tuple[int, ...] = ()) -> Path:
    """The same on disk as `datasets` saves it."""
    made = {
        "image": [{"bytes": b"nothing" if i in bad else png(10 * i), "path": None} for i in range(count)],
        "text": [str(i) for i in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(made, features=features).cast_column("image", datasets.Image()).save_to_disk(str(place))
    return place


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


MAKE: dict[str, Callable[..., Path]] = {"images": folder, "webdataset": tars, "hf": rows}
MODULES: dict[str, Any] = {"images": images, "webdataset": webdataset, "hf": hf}


def opened(name: str, place: Path, **options: Any) -> Any:
    return MODULES[name].open(MODULES[name].Config(str(place), **options), SIZE)


def shade(item: Item) -> int:
    assert item.image is not None
    assert item.image.shape == (8, 8, 3)
    return int(item.image[0, 0, 0])


# What all of them promise


@pytest.mark.parametrize("name", MAKE)
def test_every_image_comes_once_a_turn_with_its_own_caption(name: str, tmp_path: Path) -> None:
    source = opened(name, MAKE[name](tmp_path / "x"), seed=3)
    items = [source.item(i) for i in range(18)]
    assert isinstance(source, Listed)
    assert isinstance(source, Skips)
    assert source.has_images
    assert len(source) == 6
    assert all(shade(item) == 10 * int(item.prompt) for item in items)
    assert all(Counter(item.prompt for item in items[i : i + 6]) == Counter("012345") for i in (0, 6, 12))
    assert list(source.candidates) == list("012345") == source.candidates[:6]
    assert source.concept("3") == "3"
    assert [item.prompt for item in items] == [source.read(shuffled(i, 6, 3)).prompt for i in range(18)]


@pytest.mark.parametrize("name", MAKE)
def test_the_next_readable_image_stands_in_whoever_reads_whatever_first(name: str, tmp_path: Path) -> None:
    place = MAKE[name](tmp_path / "x", bad=(2, 5))
    found = [opened(name, place, unreadable=2) for _ in range(2)]
    forwards = [found[0].item(i).prompt for i in range(18)]
    backwards = [found[1].item(i).prompt for i in reversed(range(18))][::-1]
    alone = [opened(name, place, unreadable=2).item(i).prompt for i in range(18)]
    assert forwards == backwards == alone
    for turn in (0, 6, 12):
        order = [str(shuffled(turn + i, 6, 0)) for i in range(6)]
        for i in range(6):
            expected = next(n for n in (order[i:] + order[:i]) if n not in "25")
            assert forwards[turn + i] == expected
    assert len(found[0].skipped) == 2


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (0.3, 1), (0.4, 2), (1, 1), (2, 2)])
def test_more_unreadable_images_than_may_be_end_the_run(name: str, limit: float, allowed: int, tmp_path: Path) -> None:
    source = opened(name, MAKE[name](tmp_path / "x", bad=(0, 3, 4)), unreadable=limit)
    with pytest.raises(ValueError, match="not a readable image") as caught:
        [source.item(i) for i in range(6)]
    assert f"; {allowed + 1} of 6 cannot be read, {allowed} may be, by the data's `unreadable`" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", MAKE)
def test_what_differs_in_the_data_differs_in_the_digest(name: str, tmp_path: Path) -> None:
    digests = {
        opened(name, MAKE[name](tmp_path / f"{count}-{bad}", count, bad)).digest()
        for count, bad in ((4, ()), (6, ()), (6, (1,)))
    }
    assert len(digests) == 3
    assert opened(name, tmp_path / "4-()").digest() in digests


# The list of what was passed over


def test_what_is_skipped_is_logged_and_listed_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = folder(tmp_path / "x", bad=(2, 5))
    source = opened("images", place, unreadable=2)
    with caplog.at_level(logging.WARNING, "fastgen"):
        source.skipped.keep(tmp_path / "run" / "skipped.txt")
        for i in range(6):
            source.item(i)
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert {line.partition("\t")[0] for line in listed} == {str(place / "2.png"), str(place / "5.png")}
    assert all("cannot identify image file" in line for line in listed)
    assert [record.message.rpartition("; ")[2] for record in caplog.records] == [
        "skipped, as 1 of 6 so far",
        "skipped, as 2 of 6 so far",
    ]


def test_processes_count_what_all_of_them_have_listed(tmp_path: Path) -> None:
    one, two = Skipped(100, 2), Skipped(100, 2)
    for each in (one, two):
        each.keep(tmp_path / "skipped.txt")
    one.add(1, Unreadable("a", "x"))
    two.add(1, Unreadable("a", "x"))
    two.add(2, Unreadable("b", "x"))
    with pytest.raises(ValueError, match=r"c: not a readable .* 3 of 100 .*skipped.txt lists them"):
        one.add(3, Unreadable("c", "x"))


def test_a_list_begins_anew_with_each_start(tmp_path: Path) -> None:
    Skipped(9, 9).keep(tmp_path / "skipped.txt")
    (tmp_path / "skipped.txt").write_text("repaired\tsince\n")
    Skipped(9, 9).keep(tmp_path / "skipped.txt")
    assert not (tmp_path / "skipped.txt").exists()


def test_where_none_can_be_read_that_is_told(tmp_path: Path) -> None:
    source = opened("images", folder(tmp_path / "x", 2, bad=(0, 1)), unreadable=5)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 2 images can be read; .*png is one of them"):
            source.item(0)


def test_a_disk_that_fails_is_no_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be readable the next time must not decide what an item is."""

    def failing(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    source = opened("images", folder(tmp_path / "x"), unreadable=6)
    monkeypatch.setattr(pictures.Image, "open", failing)
    with pytest.raises(OSError, match="cannot be read now: Input/output error") as caught:
        source.item(0)
    assert caught.value.filename == str(tmp_path / "x" / f"{shuffled(0, 6, 0)}.png")

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(pictures.Image, "open", full)
    with pytest.raises(MemoryError):
        source.item(0)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), FileNotFoundError(2, "gone"), EOFError(), ValueError("x")]
)
def test_what_stays_unreadable_is_passed_over(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pictures.Image, "open", failing)
    with pytest.raises(Unreadable, match=r"a.png: not a readable image \(\S.*\); remove or replace it$"):
        pictures.load(tmp_path / "a.png", "a.png", SIZE)


# Folders


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "captions.jsonl",
            '{"file": "0.png", "caption": "a, b"}\n\n{"file": "sub/1.png", "caption": "two \\"c\\""}\n',
        ),
        ("captions.csv", 'file,caption\n0.png,"a, b"\nsub/1.png,"two ""c"""\n'),
        ("captions.csv", '\ufeffid,caption,file\n7,"a, b",0.png\n8,"two ""c""",sub/1.png\n'),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a, b"}\n{"file_name": "sub/1.png", "text": "two \\"c\\""}',
        ),
        ("metadata.csv", 'file_name,text\n0.png,"a, b"\nsub/1.png,"two ""c"""\n'),
    ],
)
def test_captions_come_from_any_list(name: str, text: str, tmp_path: Path) -> None:
    for file in ("0.png", "sub/1.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(png(0))
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(opened("images", tmp_path).candidates) == ["a, b", 'two "c"']


def test_a_caption_of_csv_may_have_several_lines(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "captions.csv").write_text('file,caption\n0.png,"one\ntwo"\n')
    assert opened("images", tmp_path).item(0).prompt == "one\ntwo"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "file,text\n0.png,x\n", "captions.csv: line 1 must name the columns 'file' and 'caption'"),
        ("captions.csv", "file,caption\n0.png,x\n1.png\n", "captions.csv: line 3 is not a row with 'file' and"),
        ("captions.csv", 'file,caption\n0.png,"x"y\n', "captions.csv: line 2 is not CSV"),
        ("metadata.jsonl", '{"file": "0.png"}', "line 1 is not a JSON object with 'file_name' and 'text'"),
        (
            "captions.jsonl",
            '{"file": "0.png", "caption": null}',
            "line 1 is not a JSON object with 'file' and 'caption'",
        ),
    ],
)
def test_a_list_that_is_none_is_told(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        opened("images", tmp_path)


def test_two_lists_and_a_caption_that_is_no_text_are_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "0.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"0.txt: cannot be read: "):
        opened("images", tmp_path).item(0)
    for name in ("captions.csv", "captions.jsonl"):
        (tmp_path / name).write_text("file,caption\n")
    with pytest.raises(ValueError, match=r"holds captions.jsonl and captions.csv; keep one list of captions"):
        opened("images", tmp_path)


def test_a_class_folder_s_name_is_the_caption(tmp_path: Path) -> None:
    for file in ("tabby cat/0.png", "tabby cat/deep/1.png", "dog/2.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(png(0))
    (tmp_path / "dog" / "2.txt").write_text("not this")
    source = opened("images", tmp_path, captions="folders")
    assert Counter(source.item(i).prompt for i in range(3)) == Counter({"tabby cat": 2, "dog": 1})
    (tmp_path / "3.png").write_bytes(png(0))
    with pytest.raises(
        ValueError, match=r"3.png: lies in no class folder; move it to .*/CLASS/, or set captions: files"
    ):
        opened("images", tmp_path, captions="folders")


# Tar shards


def test_samples_are_members_of_one_name_whatever_else_there_is(tmp_path: Path) -> None:
    members = {
        "a/one.jpg": png(10),
        "a/one.json": json.dumps({"caption": "from json", "alt": "other"}).encode(),
        "b/one.png": png(20),
        "b/one.txt": b" from txt\n",
        "b/one.json": b'{"caption": "not this"}',
        "two.left.png": png(30),
        "two.cls": b"7",
        "three.webp": png(40),
        "four.txt": b"no image",
        "readme": b"no suffix",
        ".hidden": b"",
        "../../five.png": png(50),
        "/six.png": png(60),
        "six.json": b'{"alt": "has no caption"}',
    }
    place = shard(tmp_path / "x.tar", members)
    with tarfile.open(place, "a") as opened_:
        link = tarfile.TarInfo("seven.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened_.addfile(link)
    found = {shade(item): item.prompt for item in (opened("webdataset", place).read(i) for i in range(6))}
    assert found == {10: "from json", 20: "from txt", 30: "7", 40: "", 50: "", 60: ""}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar", "x.tar.fastgen-index.npy"]
    assert "other" in opened("webdataset", place, caption="alt").candidates


def test_shards_are_a_folder_a_file_or_a_range(tmp_path: Path) -> None:
    place = tars(tmp_path / "x")
    assert len(opened("webdataset", place)) == 6
    assert len(opened("webdataset", place / "0001.tar")) == 3
    assert len(opened("webdataset", place / "{0000..0001}.tar")) == 6
    assert [p.name for p in webdataset.shards(str(place / "{0000..0001}.tar"))] == ["0000.tar", "0001.tar"]


def test_an_index_is_built_once_and_again_when_its_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, scanned = shard(tmp_path / "x.tar", {"a.png": png(10)}), []
    scan = webdataset._scan
    monkeypatch.setattr(webdataset, "_scan", lambda shard: scanned.append(shard) or scan(shard))
    assert [shade(opened("webdataset", place).item(0)) for _ in range(3)] == [10] * 3
    assert len(scanned) == 1
    shard(place, {"longer name.png": png(20), "b.png": png(30)})
    assert len(opened("webdataset", place)) == 2
    (tmp_path / "x.tar.fastgen-index.npy").write_bytes(b"\x93NUMPY half")
    assert len(opened("webdataset", place)) == 2
    assert len(scanned) == 3


def test_where_no_index_can_be_written_it_is_built_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    place = shard(tmp_path / "x.tar", {"a.png": png(10)})
    monkeypatch.setattr(webdataset.checkpoint, "atomic_file", forbidden)
    with caplog.at_level(logging.INFO, "fastgen"):
        assert shade(opened("webdataset", place).item(0)) == 10
    assert "its index is built anew each time (Permission denied)" in caplog.text


def test_shards_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.tar: no such shard"):
        opened("webdataset", tmp_path / "none.tar")
    with pytest.raises(ValueError, match=r"holds no .tar shard"):
        opened("webdataset", tmp_path)
    with pytest.raises(ValueError, match=r"its shards hold no image \(.bmp"):
        opened("webdataset", shard(tmp_path / "texts.tar", {"a.txt": b"x"}))
    whole = shard(tmp_path / "cut.tar", {"a.png": png(0), "b.png": bytes(4000)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"cut.tar: not a whole, uncompressed tar \(.*\); make or download it again"):
        opened("webdataset", tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "small.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"small.tar: not a whole, uncompressed tar"):
        opened("webdataset", tmp_path / "small.tar")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1]", "caption at byte 1536 is not a JSON object"),
        ("a.json", b"{", "is not a JSON object"),
        ("a.txt", b"\xff\xfe", "is not text"),
    ],
)
def test_a_caption_that_is_none_is_told(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    source = opened("webdataset", shard(tmp_path / "x.tar", {"a.png": png(0), name: content}))
    with pytest.raises(ValueError, match=message):
        source.item(0)


# `datasets`


@pytest.mark.parametrize("kind", ["dict", "parquet", "folder of parquet", "arrow", "binary"])
def test_a_set_may_lie_on_disk_in_many_forms(kind: str, tmp_path: Path) -> None:
    data = datasets.load_from_disk(str(rows(tmp_path / "x")))
    place, options = tmp_path / "y", {}
    if kind == "dict":
        datasets.DatasetDict({"few": data.select(range(2)), "all": data}).save_to_disk(str(place))
        options = {"split": "all"}
    elif kind == "arrow":
        place = next((tmp_path / "x").glob("*.arrow"))
    elif kind == "binary":  # a parquet that knows nothing of images
        place = tmp_path / "y.parquet"
        plain = {"image": [png(10 * i) for i in range(6)], "text": [str(i) for i in range(6)]}
        datasets.Dataset.from_dict(plain).to_parquet(str(place))
    else:
        place = tmp_path / "y.parquet" if kind == "parquet" else place / "train.parquet"
        place.parent.mkdir(exist_ok=True)
        data.to_parquet(str(place))
        place = place if kind == "parquet" else place.parent
    source = opened("hf", place, **options)
    assert sorted((shade(source.item(i)), source.item(i).prompt) for i in range(6)) == [
        (10 * i, str(i)) for i in range(6)
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `datasets` puts what it reads from parquet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_class_labels_are_their_names_and_columns_may_be_left_out(tmp_path: Path) -> None:
    made = {"image": [{"bytes": png(0), "path": None}] * 2, "label": [1, -1], "text": ["a", None]}
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_dict(made, features=features).save_to_disk(str(tmp_path / "x"))
    labelled = opened("hf", tmp_path / "x", caption="label")
    assert sorted(labelled.item(i).prompt for i in range(2)) == ["", "dog"]
    assert list(labelled.candidates) == ["cat", "dog"]
    without = opened("hf", tmp_path / "x", caption="")
    assert (without.item(0).prompt, list(without.candidates)) == ("", [])
    words = opened("hf", tmp_path / "x", image="")
    assert not words.has_images
    assert sorted(words.item(i).prompt for i in range(2)) == ["", "a"]
    assert words.item(0).image is None


def test_an_image_may_be_a_path_or_missing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(70))
    made = {"image": [{"bytes": None, "path": str(tmp_path / "a.png")}, None], "text": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(made, features=features).save_to_disk(str(tmp_path / "x"))
    source = opened("hf", tmp_path / "x", unreadable=1)
    assert [shade(source.item(i)) for i in range(2)] == [70, 70]
    with pytest.raises(Unreadable, match=r"x, split train, row 1: not a readable image \(the row has none\)"):
        source.read(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "imag"}, "has no column 'imag'; set image; did you mean 'image'"),
        ({"caption": "caption"}, "has no column 'caption'; set caption; known: image, number, text"),
        ({"caption": "number"}, r"column 'number' holds Value\(.*int64.*\), not text; set caption to another"),
        ({"image": "number"}, r"column 'number' holds Value\(.*int64.*\), not images; set image to another"),
        ({"image": "", "caption": ""}, "neither image nor caption names a column; set one"),
    ],
)
def test_columns_that_cannot_be_used_are_told(options: dict[str, str], message: str, tmp_path: Path) -> None:
    data = datasets.load_from_disk(str(rows(tmp_path / "x")))
    data.add_column("number", list(range(6))).save_to_disk(str(tmp_path / "y"))
    with pytest.raises(ValueError, match=message):
        opened("hf", tmp_path / "y", **options)


def test_sets_that_cannot_be_opened_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.load_from_disk(str(rows(tmp_path / "x")))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "y"))
    with pytest.raises(ValueError, match=r"y: cannot be opened as a data set \(no split 'tain'; did you mean 'train'"):
        opened("hf", tmp_path / "y", split="tain")

    def nowhere(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    message = r"\(no such file or folder, and not on the Hub or not reachable: Couldn't reach the Hub\)"
    with pytest.raises(ValueError, match=f"nobody/nothing: cannot be opened as a data set {message}"):
        opened("hf", Path("nobody") / "nothing")
    (tmp_path / "z.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"z.parquet: cannot be opened as a data set \(\S+"):
        opened("hf", tmp_path / "z.parquet")


def test_a_set_of_the_hub_is_asked_for_as_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    data = datasets.load_from_disk(str(rows(tmp_path / "x")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or data)
    source = opened("hf", Path("owner/name"), subset="small", split="test[:6]", revision="v1")
    assert asked == [(("owner/name", "small"), {"split": "test[:6]", "revision": "v1"})]
    assert len(source) == 6
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data.select([]))
    with pytest.raises(ValueError, match=r"owner/name, split train: holds no row"):
        opened("hf", Path("owner/name"))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"source hf needs the package datasets; pip install 'fastgen-diffusion\[hf\]'"
    ):
        opened("hf", Path("owner/name"))


def test_no_source_imports_datasets_before_it_is_opened() -> None:
    code = "import sys; from fastgen import registry; registry.names('source'); print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert importlib.util.find_spec("datasets")


def test_the_protocols_ask_for_no_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask what a source is may not read all of its captions, as asking for ``candidates`` could."""
    source: Source = opened("webdataset", tars(tmp_path / "x"))
    monkeypatch.setattr(source, "_caption", lambda _: pytest.fail("read"))
    from fastgen.data import PairSource

    assert not isinstance(source, PairSource)
    assert source.candidates is not None


def test_replace_keeps_the_options() -> None:
    assert replace(images.Config("x"), unreadable=0.5).captions == "files"
    assert np.isclose(images.Config("x").unreadable, 0.01)
