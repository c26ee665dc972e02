"""The embedded world: the shipped sprites, the split, draws, captions and scenes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen.emoji import build, compose, names, sprites
from fastgen.geneval import COLOURS

HELDOUT_SHA256 = "41993ce0aadf97663aee73840a1dc20389efd998ff38e506aaf25ab3e2faf408"
CAPTIONS_SHA256 = "52cfeca81fa47845a41236cfa3f131818bda549faadc4b25294da569676d9e4d"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Names


def test_core_is_well_formed() -> None:
    assert 150 <= len(names.CORE) <= 170
    assert len(names.by_name()) == len(names.by_label()) == len(names.CORE)
    assert len({core.phrase for core in names.CORE}) == len(names.CORE)
    assert {core.colour for core in names.CORE} == {None, *COLOURS}
    assert len({core.noun for core in names.CORE if core.geneval}) >= 60
    for core in names.CORE:
        assert core.name == core.noun or core.name == f"{core.colour} {core.noun}"


@pytest.mark.parametrize(
    ("name", "phrase", "plural"),
    [
        ("red apple", "a red apple", "red apples"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("scissors", "scissors", "scissors"),
        ("orange book", "an orange book", "orange books"),
        ("computer mouse", "a computer mouse", "computer mice"),
        ("toothbrush", "a toothbrush", "toothbrushes"),
        ("butterfly", "a butterfly", "butterflies"),
        ("sheep", "a sheep", "sheep"),
        ("key", "a key", "keys"),
    ],
)
def test_phrases(name: str, phrase: str, plural: str) -> None:
    core = names.by_name()[name]
    assert (core.phrase, core.plural) == (phrase, plural)


def test_noun_phrases() -> None:
    apple, banana, grapes, clock = (names.by_name()[name] for name in ("green apple", "banana", "grapes", "clock"))
    assert (apple.noun_phrase, apple.coloured_phrase, apple.noun_plural) == ("an apple", "a green apple", "apples")
    assert (banana.noun_phrase, banana.coloured_phrase) == ("a banana", "a yellow banana")
    assert (grapes.noun_phrase, grapes.coloured_phrase) == ("grapes", "purple grapes")
    assert clock.coloured_phrase == "a clock"
    assert names.with_article("unicorn") == "a unicorn"
    assert names.with_article("hourglass done") == "an hourglass done"
    assert names.phrase("grinning face") == "a grinning face"
    assert names.phrase("beans") == "beans"
    assert names.plural("potato") == "potatoes"


# The shipped sprites


def test_sprites_are_whole() -> None:
    everything = sprites.load()
    assert everything is sprites.load()
    assert everything.rgba.shape == (len(everything), build.SIDE, build.SIDE, 4)
    assert everything.rgba.dtype == np.uint8
    assert not everything.rgba.flags.writeable
    assert everything.side == build.SIDE
    assert len({(row.name, row.style) for row in everything.rows}) == len(everything)
    assert everything.rgba[..., 3].max((1, 2)).min() >= 128
    shipped = sum(path.stat().st_size for path in sprites.ASSETS.rglob("*") if path.is_file())
    assert shipped <= 14e6


def test_each_core_name_has_four_styles() -> None:
    core = sprites.load().select(core=True)
    assert set(core.names()) == set(names.by_name())
    for numbers in core.by_name().values():
        assert len(numbers) >= 4


def test_atlas_cells_are_the_index_order() -> None:
    everything = sprites.load()
    number = everything.where(name="red apple", style="twemoji")[0]
    row = everything.rows[number]
    sheet = np.asarray(Image.open(sprites.ASSETS / "twemoji.webp").convert("RGBA"))
    side = everything.side
    cell = sheet[row.row * side : (row.row + 1) * side, row.column * side : (row.column + 1) * side]
    assert np.array_equal(cell, everything.rgba[number])


def test_selection() -> None:
    everything = sprites.load()
    apples = everything.select(name="red apple")
    assert {row.name for row in apples.rows} == {"red apple"}
    assert len(apples) == len(apples.rgba) == len(everything.where(name="red apple"))
    train, heldout = (everything.where(core=True, split=split) for split in sprites.SPLITS)
    assert sorted(train + heldout) == everything.where(core=True)
    assert everything.take([5, 3]).rows == (everything.rows[5], everything.rows[3])
    assert len(everything.select(style="noto", name="red apple")) == 1
    assert sum(len(everything.where(style=style)) for style in names.STYLES) == len(everything)


def test_licences_are_beside_the_sprites() -> None:
    page = (sprites.ASSETS / "LICENSES.md").read_text()
    for package in build.PACKAGES:
        assert package.name in page
        assert package.version in page
        assert package.source in page
        text = (sprites.ASSETS / "licenses" / package.text).read_text()
        assert {"MIT": "MIT License", "Apache-2.0": "Apache License", "CC-BY-4.0": "Attribution 4.0"}[
            package.licence
        ] in text
        assert "SA" not in package.licence


# The split


def test_split_is_stable_and_disjoint() -> None:
    everything = sprites.load()
    heldout = sorted((row.name, row.style) for row in everything.rows if row.split == "heldout")
    assert hashlib.sha256(json.dumps(heldout).encode()).hexdigest() == HELDOUT_SHA256
    train = {(row.name, row.style) for row in everything.rows if row.split == "train"}
    assert train.isdisjoint(heldout)
    core = [row for row in everything.rows if row.core]
    assert 0.10 <= len(heldout) / len(core) <= 0.14
    assert {style for _, style in heldout} == set(names.STYLES)
    left = Counter(row.name for row in core if row.split == "train")
    assert min(left.values()) >= build.MIN_TRAIN_STYLES
    assert set(left) == set(names.by_name())


def test_the_rule_of_the_split_gives_the_shipped_one() -> None:
    core = sprites.load().select(core=True)
    for name, numbers in core.by_name().items():
        rows = [core.rows[number] for number in numbers]
        chosen = {row.style for row in rows if row.split == "heldout"}
        assert chosen == build.heldout_styles(name, [row.style for row in rows])


# Draws and captions


def test_items_depend_on_seed_and_index_only() -> None:
    one, two = compose.EmojiSet(seed=3), compose.EmojiSet(seed=3)
    forward = [one.item(index) for index in range(40)]
    backward = [two.item(index) for index in reversed(range(40))][::-1]
    for (pixels, words), (again, same) in zip(forward, backward, strict=True):
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, again)
        assert words == same
    others = [compose.EmojiSet(seed=4).item(index)[1] for index in range(40)]
    assert others != [words for _, words in forward]
    joined = "\n".join(words for _, words in forward)
    assert hashlib.sha256(joined.encode()).hexdigest() == CAPTIONS_SHA256


def test_items_cover_names_evenly_and_keep_to_their_split() -> None:
    everything = sprites.load()
    for split in sprites.SPLITS:
        emoji = compose.EmojiSet(split, size=16)
        allowed = set(everything.where(split=split, core=True))
        drawn: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compose, "draw", lambda number, generator, size, seen=drawn: seen.append(number))
            for index in range(2000):
                emoji.item(index)
        assert set(drawn) <= allowed
        counts = Counter(everything.rows[number].name for number in drawn)
        assert set(counts) == set(emoji.names)
        assert max(counts.values()) < 4 * 2000 / len(emoji.names)


def test_the_whole_set_has_the_other_names_too() -> None:
    emoji = compose.EmojiSet(core=False)
    assert len(emoji.names) > 1500
    assert emoji.item(7)[0].shape == (32, 32, 3)
    assert not set(compose.EmojiSet("heldout", core=False).names) - set(names.by_name())


def test_open_prompts() -> None:
    prompts = compose.EmojiSet().prompts()
    assert prompts == [core.phrase for core in names.CORE]
    assert "a red apple" in prompts
    assert set(compose.EmojiSet("heldout").prompts()) < set(prompts)


def test_captions_name_the_style_one_time_in_five() -> None:
    generator = rng()
    words = Counter(compose.caption("red apple", "fluent 3d", generator) for _ in range(2000))
    assert set(words) == {"a red apple", "fluent 3d of a red apple"}
    assert 340 <= words["fluent 3d of a red apple"] <= 460


@pytest.mark.parametrize("size", [32, 64])
def test_a_draw_stays_inside_and_keeps_its_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    number = sprites.load().where(name="red square", style="noto")[0]
    monkeypatch.setattr(compose, "_background", lambda generator, shown: (255, 255, 255))
    whole = sprites.load().rgba[number][..., 3] > 127
    share = whole.any(0).mean()
    sides = []
    for seed in range(60):
        pixels = compose.draw(number, rng(seed), size)
        assert pixels.shape == (size, size, 3)
        seen = (pixels != 255).any(-1).any(0)
        sides.append(seen.sum() / share / size)
    assert min(sides) >= 0.70
    assert max(sides) <= 1.08
    assert max(sides) - min(sides) > 0.2


def test_backgrounds_are_half_white_and_never_hide_a_white_sprite() -> None:
    generator = rng()
    seen = Counter(compose._background(generator, ["red apple"]) for _ in range(2000))
    assert set(seen) == {compose.WHITE, *compose.BACKGROUNDS.values()}
    assert 900 <= seen[compose.WHITE] <= 1100
    behind = {compose._background(generator, ["red apple", "white circle"]) for _ in range(200)}
    assert behind == {compose.BACKGROUNDS[name] for name in compose.DARK_BACKGROUNDS}


def test_some_concepts_are_never_mirrored() -> None:
    assert not any(compose._mirrored(rng(seed), "clock") for seed in range(50))
    assert not any(compose._mirrored(rng(seed), "grinning face") for seed in range(50))
    assert 10 < sum(compose._mirrored(rng(seed), "horse") for seed in range(50)) < 40


def test_edges_are_antialiased_without_a_dark_fringe(monkeypatch: pytest.MonkeyPatch) -> None:
    number = sprites.load().where(name="white circle", style="twemoji")[0]
    monkeypatch.setattr(compose, "_background", lambda generator, shown: (255, 255, 255))
    core_value = int(sprites.load().rgba[number][24, 24, :3].min())
    for seed in range(10):
        assert compose.draw(number, rng(seed)).min() >= core_value - 2


# Scenes

ALL_TASKS = compose.TASKS + compose.EXTRA_TASKS


def alpha_of(task: str, seed: int, size: int, split: str) -> np.ndarray:
    """Coverage of a scene, from the same scene on black and on white."""
    pictures = []
    for value in (0, 255):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compose, "_background", lambda generator, shown, v=value: (v, v, v))
            pictures.append(compose.scene(rng(seed), task, split=split, size=size).image.astype(int))
    return 1 - (pictures[1] - pictures[0]).max(-1) / 255


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("task", ALL_TASKS)
def test_boxes_are_the_visible_extents(task: str, size: int) -> None:
    for seed in range(12):
        split = sprites.SPLITS[seed % 2]
        scene = compose.scene(rng(seed), task, split=split, size=size)
        alpha = alpha_of(task, seed, size, split)
        rest = alpha > 0.52
        for box in scene.boxes:
            x0, y0, x1, y1 = box.xyxy
            assert 0 <= x0 < x1 <= size
            assert 0 <= y0 < y1 <= size
            inside = alpha[y0:y1, x0:x1] > 0.48
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            rest[y0:y1, x0:x1] = False
        assert not rest.any()
        for a, b in itertools.combinations([box.xyxy for box in scene.boxes], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def geneval_relations(a: tuple[int, ...], b: tuple[int, ...]) -> set[str]:
    """GenEval's rule for where box a lies to box b, written out axis by axis (facts/evaluation.md G6)."""
    centre = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a, b)]
    sides = [(box[2] - box[0], box[3] - box[1]) for box in (a, b)]
    offset = [centre[0][axis] - centre[1][axis] for axis in (0, 1)]
    revised = []
    for axis in (0, 1):
        length = abs(offset[axis]) - 0.1 * (sides[0][axis] + sides[1][axis])
        revised.append(math.copysign(max(length, 0.0), offset[axis]))
    if max(abs(value) for value in revised) < 1e-3:
        return set()
    norm = math.sqrt(offset[0] ** 2 + offset[1] ** 2)
    found = set()
    if revised[0] / norm < -0.5:
        found.add("left of")
    if revised[0] / norm > 0.5:
        found.add("right of")
    if revised[1] / norm < -0.5:
        found.add("above")
    if revised[1] / norm > 0.5:
        found.add("below")
    return found


@pytest.mark.parametrize("size", [16, 32, 64])
def test_positions_satisfy_the_rule_of_geneval(size: int) -> None:
    seen = Counter()
    for seed in range(150):
        scene = compose.scene(rng(seed), "position", size=size)
        target, placed = scene.metadata["include"]
        relation, index = placed["position"]
        assert index == 0
        assert "position" not in target
        positioned, reference = scene.boxes
        assert (positioned.noun, reference.noun) == (placed["class"], target["class"])
        assert geneval_relations(positioned.xyxy, reference.xyxy) == {relation}
        assert relation in scene.prompt
        assert scene.prompt.split(f" {relation} ")[1].endswith(target["class"])
        seen[relation] += 1
    assert set(seen) == set(compose.RELATIONS)


def test_relations_agree_with_the_independent_rule() -> None:
    generator = rng()
    for _ in range(500):
        corners = generator.integers(0, 20, (2, 2))
        sides = generator.integers(1, 14, (2, 2))
        a, b = (
            tuple(int(v) for v in (*corner, *(corner + side))) for corner, side in zip(corners, sides, strict=True)
        )
        assert compose.relations(a, b) == geneval_relations(a, b)
    assert compose.relations((0, 0, 4, 4), (0, 0, 4, 4)) == frozenset()


@pytest.mark.parametrize("task", ALL_TASKS)
def test_metadata_has_the_form_of_geneval(task: str) -> None:
    for seed in range(40):
        scene = compose.scene(rng(seed), task)
        record = scene.metadata
        assert json.loads(json.dumps(record)) == record
        keys = ["tag", "include", "exclude", "prompt"] if task == "counting" else ["tag", "include", "prompt"]
        assert list(record) == keys
        assert record["tag"] == task
        assert record["prompt"] == scene.prompt
        include = record["include"]
        assert len(include) == (1 if task in ("single_object", "counting", "colors") else 2)
        for clause in include:
            extra = {"position": {"position"} if clause is include[-1] else set()}.get(task, set())
            extra = extra | ({"color"} if task.startswith("color") else set())
            assert set(clause) == {"class", "count"} | extra
            assert clause["class"] in names.by_noun()
            if "color" in clause:
                assert clause["color"] in COLOURS
                assert f"{clause['color']} {clause['class']}" in scene.prompt
        assert Counter(box.noun for box in scene.boxes) == sum(
            (Counter({clause["class"]: clause["count"]}) for clause in include), Counter()
        )
        if task == "counting":
            count = include[0]["count"]
            assert count in (2, 3, 4)
            assert record["exclude"] == [{"class": include[0]["class"], "count": count + 1}]
            assert scene.prompt.startswith(names.NUMBERS[count])
        if task == "color_pair":
            assert include[0]["class"] == include[1]["class"]
        elif len(include) == 2:
            assert include[0]["class"] != include[1]["class"]
        if task.startswith("color"):
            assert [box.colour for box in scene.boxes] == [clause["color"] for clause in include]
            assert len({box.colour for box in scene.boxes}) == len(include)


def test_scenes_are_deterministic_and_cover_every_task() -> None:
    tags = Counter()
    for seed in range(60):
        one, two = (compose.scene(rng(seed)) for _ in range(2))
        assert np.array_equal(one.image, two.image)
        assert (one.metadata, one.boxes) == (two.metadata, two.boxes)
        tags[one.metadata["tag"]] += 1
    assert set(tags) == set(compose.TASKS)


def test_scenes_keep_to_their_split() -> None:
    heldout = {(row.name, row.style) for row in sprites.load().rows if row.split == "heldout"}
    for seed in range(60):
        assert all((box.name, box.style) in heldout for box in compose.scene(rng(seed), split="heldout").boxes)
        assert not any((box.name, box.style) in heldout for box in compose.scene(rng(seed)).boxes)


# The build


ENTRY = {"label": "red apple", "hexcode": "1F34E", "group": 4, "order": 1}


def entry(**changes: object) -> dict[str, object]:
    return {**ENTRY, **changes}


def test_codes_and_slugs() -> None:
    assert build.normalise_code("1F441-FE0F-200D-1F5E8-FE0F") == "1f441-200d-1f5e8"
    assert build.slug("woman\u2019s hat") == "womans-hat"
    assert build.slug("ON! arrow") == "on-arrow"
    assert build.atlas_name("fluent 3d") == "fluent-3d.webp"
    assert build.PACKAGES[0].tarball == "iconify-json-noto-1.2.9.tgz"
    assert {package.style for package in build.PACKAGES} == {*names.STYLES, None}


@pytest.mark.parametrize(
    "changes",
    [
        {"group": 9},
        {"group": 2},
        {"group": None},
        {"hexcode": "1F44B-1F3FB"},
        {"label": "keycap: 3"},
        {"label": "OK button"},
    ],
)
def test_what_is_left_out(changes: dict[str, object]) -> None:
    assert build.keep(ENTRY)
    assert not build.keep(entry(**changes))


def test_codes_come_from_labels_tables_and_aliases() -> None:
    icon_set = {
        "icons": {
            "icons": {"red-apple": {"body": "<g/>"}, "old-pear": {"body": "<g/>"}, "unknown": {"body": "<g/>"}},
            "aliases": {"old-pear": {"parent": "pear"}, "flipped": {"parent": "pear", "hFlip": True}},
            "width": 36,
            "height": 36,
        },
        "chars": {"1f351": "a-peach", "1f350": "pear"},
    }
    table = build.code_table([icon_set], [ENTRY])
    assert table == {"red-apple": "1f34e", "pear": "1f350", "a-peach": "1f351", "old-pear": "1f350"}
    assert build.icon_codes(icon_set, table) == {"1f34e": "red-apple", "1f350": "old-pear"}
    assert 'viewBox="0 0 36 36" width="48" height="48"' in build.svg(icon_set["icons"], "red-apple", 48)


def test_sheets_are_laid_out_row_by_row() -> None:
    tiles = [np.full((2, 2, 4), value, np.uint8) for value in (1, 2, 3)]
    sheet = build.pack(tiles, 2, 2)
    assert sheet[::2, ::2, 0].tolist() == [[1, 2], [3, 0]]
    cleaned = build.clean(np.array([[[9, 9, 9, 0], [9, 9, 9, 1]]], np.uint8))
    assert cleaned.tolist() == [[[0, 0, 0, 0], [9, 9, 9, 1]]]


def test_heldout_styles_leave_enough() -> None:
    for name in ("a", "b", "c", "d", "e", "f"):
        for count in range(3, 7):
            styles = names.STYLES[:count]
            assert len(set(styles) - build.heldout_styles(name, styles)) >= build.MIN_TRAIN_STYLES
    assert 0 <= build.stable_share("red apple", "noto") == build.stable_share("red apple", "noto") < 1


def tarball(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_members_are_read_by_pattern(tmp_path: Path) -> None:
    tarball(tmp_path / "x.tgz", {"icons.json": b"{}", "assets/1.webp": b"1", "README.md": b""})
    assert build.read_members(tmp_path / "x.tgz", r"icons\.json|assets/.*") == {
        "icons.json": b"{}",
        "assets/1.webp": b"1",
    }


def test_two_builds_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    picture = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 20, 20, 255)).save(picture, "WEBP", lossless=True)
    apple = {"body": '<circle cx="8" cy="8" r="7" fill="red"/>'}
    data = [entry(), entry(label="pear", hexcode="1F350", order=2)]
    packages = []
    for package in build.PACKAGES:
        files = {"icons.json": json.dumps({"icons": {"red-apple": apple}}).encode(), "chars.json": b"{}"}
        if package.style is None:
            files = {"en/data.json": json.dumps(data).encode()}
        elif package.style == "fluent 3d":
            files = {"assets/1f34e.webp": picture.getvalue(), "assets/1f350.webp": picture.getvalue()}
        tarball(tmp_path / package.tarball, files)
        digest = hashlib.sha256((tmp_path / package.tarball).read_bytes()).hexdigest()
        packages.append(dataclasses.replace(package, sha256=digest))
    monkeypatch.setattr(build, "PACKAGES", tuple(packages))
    monkeypatch.setattr(names, "by_label", lambda: {"red apple": names.CORE[0]})
    monkeypatch.setattr(names, "by_name", lambda: {names.CORE[0].name: names.CORE[0]})
    monkeypatch.setattr(build, "COLUMNS", 2)
    for out in ("one", "two"):
        assert build.main(["--packages", str(tmp_path), "--out", str(tmp_path / out)]) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "one" / "index.jsonl").read_text().splitlines()]
    assert Counter(row["name"] for row in rows) == {names.CORE[0].name: 6, "pear": 1}
    assert rows[0]["core"]
    assert not rows[-1]["core"]


# Messages


def test_messages_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="name 'red apple' is given to both 'red apple' and 'red apple'; rename"):
        build.concepts([ENTRY, ENTRY])
    with pytest.raises(ValueError, match="core label 'airplane' is not an emoji that is drawn"):
        build.concepts([ENTRY])
    with pytest.raises(ValueError, match="core name 'red apple' is drawn in 1 styles only; at least 4 are needed"):
        build.mark_heldout([{"name": "red apple", "style": "noto", "core": True, "split": "train"}])
    package = build.PACKAGES[0]
    monkeypatch.setattr(build.shutil, "which", lambda program: None)
    with pytest.raises(ValueError, match="is missing and npm is not installed"):
        build.fetch(package, tmp_path)
    monkeypatch.setattr(build.shutil, "which", lambda program: "npm")
    for stderr, message in (("one\nnot found\n", "not found"), ("", "no message")):
        failed = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(build.subprocess, "run", lambda *args, done=failed, **options: done)
        with pytest.raises(ValueError, match=f"npm could not fetch @iconify-json/noto@1.2.9: {message}"):
            build.fetch(package, tmp_path / "new")
    (tmp_path / package.tarball).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"has sha256 .* delete it and run again"):
        build.fetch(package, tmp_path)
    capsys.readouterr()
    assert build.main(["--packages", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_messages_of_the_sprites(tmp_path: Path) -> None:
    everything = sprites.load()
    with pytest.raises(ValueError, match="unknown split 'test'; known are 'train', 'heldout'"):
        everything.where(split="test")
    with pytest.raises(ValueError, match="unknown style 'apple'; known are 'noto'"):
        everything.select(style="apple")
    with pytest.raises(ValueError, match="no sprite is named 'red pear'"):
        everything.where(name="red pear")
    with pytest.raises(ValueError, match=r"cannot read .*index.jsonl"):
        sprites.read(tmp_path)
    index = tmp_path / "index.jsonl"
    index.write_text("")
    with pytest.raises(ValueError, match=r"index.jsonl is empty"):
        sprites.read(tmp_path)
    index.write_text('{"name": "red apple"}\n')
    with pytest.raises(ValueError, match=r"cannot read .*index.jsonl .*missing"):
        sprites.read(tmp_path)
    row = {
        "name": "x",
        "style": "noto",
        "group": "food",
        "code": "1",
        "icon": "x",
        "label": "x",
        "row": 0,
        "column": 1,
    }
    index.write_text(json.dumps({**row, "split": "train", "core": False}) + "\n")
    with pytest.raises(ValueError, match=r"cannot read .*noto.webp"):
        sprites.read(tmp_path)
    (tmp_path / "noto.webp").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read .*noto.webp"):
        sprites.read(tmp_path)
    Image.new("RGBA", (9, 4)).save(tmp_path / "noto.webp", lossless=True)
    with pytest.raises(ValueError, match="has 9 x 4 pixels, which does not fit its index"):
        sprites.read(tmp_path)


def test_messages_of_the_composer() -> None:
    with pytest.raises(ValueError, match="size is 8 pixels; sprites need a canvas of at least 16"):
        compose.draw(0, rng(), 8)
    with pytest.raises(ValueError, match="unknown task 'colour'; known are 'single_object'"):
        compose.scene(rng(), "colour")
    with pytest.raises(ValueError, match="unknown split 'test'; known are 'train', 'heldout'"):
        compose.EmojiSet("test")
    with pytest.raises(ValueError, match="seed is -1; it must be 0 or more"):
        compose.EmojiSet(seed=-1)
    with pytest.raises(ValueError, match="index is -1; it must be 0 or more"):
        compose.EmojiSet().item(-1)
