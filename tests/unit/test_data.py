"""Prompts, image folders, and the batches made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.data import Item, Source, images, prompts
from fastgen.data import batches as batches_module
from fastgen.data.batches import Batches, pixels, to_uint8
from fastgen.denoiser import Cond
from fastgen.family import Family
from tests.oracle import CAPTIONS, gaussian_family, labels

SIZE = (8, 8)


def picture(
    path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = SIZE, mode: str = "RGB"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


# Prompts


def prompt_file(folder: Path, text: str, name: str = "prompts.txt") -> prompts.Config:
    (folder / name).write_text(text, encoding="utf-8")
    return prompts.Config(str(folder / name))


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    config = prompt_file(tmp_path, "a red apple\n\n  a blue é heart  \n")
    assert prompts.read(Path(config.path)) == ["a red apple", "a blue é heart"]


def test_json_lines_hold_a_prompt_under_its_key(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"prompt": p, "id": 1}) for p in ("one", "two"))
    config = prompt_file(tmp_path, rows + "\n\n", "prompts.jsonl")
    assert prompts.read(Path(config.path)) == ["one", "two"]


def test_a_turn_gives_each_prompt_once_and_turns_differ_in_order(tmp_path: Path) -> None:
    source = prompts.open(prompt_file(tmp_path, "\n".join(map(str, range(20)))), SIZE)
    turns = [[source.item(20 * turn + i).prompt for i in range(20)] for turn in range(3)]
    assert len(source) == 20
    assert all(Counter(turn) == Counter(map(str, range(20))) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    assert not source.has_images
    assert source.item(3).image is None


def test_the_order_belongs_to_the_seed(tmp_path: Path) -> None:
    config = prompt_file(tmp_path, "\n".join(map(str, range(20))))
    one, again, other = (
        [prompts.open(c, SIZE).item(i).prompt for i in range(20)] for c in (config, config, replace(config, seed=1))
    )
    assert one == again != other


def test_the_order_of_a_turn_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn anew for each item, a batch of 64 out of a million prompts would take most of a second."""
    drawn = []
    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: drawn.append(key) or rng(key))
    source = prompts.open(replace(prompt_file(tmp_path, "\n".join(map(str, range(20)))), seed=77), SIZE)
    for index in range(40):
        source.item(index)
    assert len(drawn) <= 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "p.txt: holds no prompt; write one a line"),
        ("p.txt", "\n  \n", "p.txt: holds no prompt"),
        ("p.jsonl", "", "p.jsonl: holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\nnot json', "p.jsonl: line 2 is not a JSON object with the key 'prompt'"),
        ("p.jsonl", '{"caption": "a"}', "p.jsonl: line 1 is not a JSON object with the key 'prompt'"),
        ("p.jsonl", '["a"]', "line 1 is not a JSON object"),
        ("p.jsonl", '"a"', "line 1 is not a JSON object"),
        ("p.jsonl", '{"prompt": null}', "line 1 is not a JSON object"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_told(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts.open(prompt_file(tmp_path, text, name), SIZE)


def test_a_missing_prompt_file_a_folder_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.txt: no such prompt file"):
        prompts.open(prompts.Config(str(tmp_path / "gone.txt")), SIZE)
    with pytest.raises(ValueError, match="cannot be read: "):
        prompts.open(prompts.Config(str(tmp_path)), SIZE)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"bytes.txt: cannot be read: "):
        prompts.open(prompts.Config(str(tmp_path / "bytes.txt")), SIZE)


# Image folders


def test_captions_come_from_the_list_then_from_beside_the_image_then_not_at_all(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.jpg", "c.webp"):
        picture(tmp_path / name)
    (tmp_path / "captions.jsonl").write_text('{"file": "sub/b.jpg", "caption": "listed"}\n')
    (tmp_path / "sub" / "b.txt").write_text("beside")
    (tmp_path / "a.txt").write_text(" beside é\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    source = images.open(images.Config(str(tmp_path)), SIZE)
    assert len(source) == 3
    assert source.has_images
    assert sorted(source.item(i).prompt for i in range(3)) == ["", "beside é", "listed"]


def test_an_image_goes_with_its_own_caption_in_every_turn(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / f"{i}.png", (40 * i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(str(i))
    source = images.open(images.Config(str(tmp_path), seed=3), SIZE)
    items = [source.item(i) for i in range(18)]
    assert all(item.image is not None and item.image[0, 0, 0] == 40 * int(item.prompt) for item in items)
    assert all(Counter(item.prompt for item in items[i : i + 6]) == Counter("012345") for i in (0, 6, 12))


@pytest.mark.parametrize("size", [(8, 8), (16, 4), (4, 16), (7, 9), (64, 33), (1, 1)])
@pytest.mark.parametrize("target", [(8, 8), (4, 12)])
def test_images_are_made_to_cover_the_size(tmp_path: Path, size: tuple[int, int], target: tuple[int, int]) -> None:
    array = images.load_image(picture(tmp_path / "a.png", (10, 20, 30), size), target)
    assert array.shape == (*target, 3)
    assert array.dtype == np.uint8
    assert (array == [10, 20, 30]).all()


def test_the_centre_is_kept(tmp_path: Path) -> None:
    wide = Image.new("RGB", (24, 8))
    wide.paste((255, 255, 255), (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    assert images.load_image(tmp_path / "wide.png", SIZE).min() == 255


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    assert np.array_equal(images.load_image(tmp_path / "a.png", SIZE), array)


@pytest.mark.parametrize(("mode", "colour"), [("L", (7,)), ("P", (0,)), ("RGBA", (1, 2, 3, 255))])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: tuple[int, ...]) -> None:
    colour = colour if len(colour) > 1 else colour[0]  # type: ignore[assignment]
    assert images.load_image(picture(tmp_path / "a.png", colour, mode=mode), SIZE).shape == (8, 8, 3)


def test_what_is_transparent_is_white_and_an_image_stands_as_its_exif_says(tmp_path: Path) -> None:
    picture(tmp_path / "clear.png", (1, 2, 3, 0), mode="RGBA")
    assert images.load_image(tmp_path / "clear.png", SIZE).min() == 255
    tall = Image.new("RGB", (8, 16))
    tall.paste((255, 255, 255), (0, 8, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    tall.save(tmp_path / "turned.png", exif=exif)
    found = images.load_image(tmp_path / "turned.png", (8, 16))
    assert found[:, :8].min() == 255
    assert found[:, 8:].max() == 0


def test_a_missing_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone: no such image folder"):
        images.open(images.Config(str(tmp_path / "gone")), SIZE)
    with pytest.raises(ValueError, match=r"holds no image \(.bmp, .jpeg, .jpg, .png, .webp\)"):
        images.open(images.Config(str(tmp_path)), SIZE)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    source = images.open(images.Config(str(tmp_path)), SIZE)
    with pytest.raises(ValueError, match=r"bad.png: not a readable image \(.*\); remove or replace it"):
        source.item(0)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "bad.jpg")
    content = (tmp_path / "bad.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"bad.jpg: not a readable image"):
        images.load_image(tmp_path / "bad.jpg", SIZE)


def test_an_image_too_large_to_open_safely_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "bad.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bad.png: not a readable image"):
        images.load_image(tmp_path / "bad.png", SIZE)


@pytest.mark.parametrize("line", ["nonsense", '{"file": "a.png"}', '["a.png", "x"]'])
def test_a_bad_list_of_captions_is_told(tmp_path: Path, line: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"captions.jsonl: line 2 is not a JSON object with 'file' and 'caption'"):
        images.open(images.Config(str(tmp_path)), SIZE)


# Batches


class Counted:
    """A source of numbered pictures and captions in turn, and a family that counts what it encodes."""

    has_images = True
    candidates = CAPTIONS

    def __init__(self, n: int = 6) -> None:
        self.n, self.items, self.images, self.prompts = n, Counter[int](), 0, Counter[str]()
        self.calls: list[tuple[str, int]] = []
        plain = gaussian_family()

        def encode(x: Tensor) -> Tensor:
            self.images += len(x.flatten(1).unique(dim=0))  # some may be there again
            self.calls.append(("images", len(x)))
            return plain.encode(x)

        def encode_prompts(names: Sequence[str]) -> Cond:
            self.prompts.update({*names})  # some may be there again
            self.calls.append(("prompts", len(names)))
            return labels(names)

        self.family: Family = replace(plain, encode=encode, encode_prompts=encode_prompts)

    def __len__(self) -> int:
        return self.n

    def concept(self, prompt: str) -> str:
        return prompt

    def item(self, index: int) -> Item:
        self.items[index] += 1
        array = np.full((8, 8, 3), index % self.n * 10, dtype=np.uint8)
        return Item(CAPTIONS[index % self.n % 3], array if self.has_images else None)


class Words(Counted):
    has_images = False


def test_a_batch_holds_the_samples_latents_and_conditions() -> None:
    source = Counted()
    batch = Batches(source, source.family, images=True).batch([0, 4, 5, 6])
    assert batch.samples == [0, 4, 5, 6]
    assert len(batch) == 4
    assert torch.equal(batch.cond["label"], labels(["", "left", "right", ""])["label"])
    assert torch.equal(batch.uncond["label"], labels([""])["label"])
    assert batch.x0 is not None
    assert batch.x0.shape == (4, 2, 2, 2)
    torch.testing.assert_close(batch.x0[:, 0, 0, 0], torch.tensor([0.0, 40, 50, 0]) / 127.5 - 1)


@pytest.mark.parametrize("cache", [False, True])
def test_batches_do_not_depend_on_their_size_or_order(cache: bool) -> None:
    source = Counted()
    whole = Batches(source, source.family, True, cache).batch(range(12))
    parts = Batches(source, source.family, True, cache)
    for samples in ([10, 11], [0, 1, 2], [3], [4, 5, 6, 7, 8, 9], [1, 0]):
        part = parts.batch(samples)
        assert part.x0 is not None
        assert whole.x0 is not None
        assert torch.equal(part.x0, whole.x0[samples])
        assert torch.equal(part.cond["label"], whole.cond["label"][samples])


def test_a_prompt_is_encoded_once() -> None:
    source = Words()
    subject = Batches(source, source.family, images=False)
    for start in range(0, 24, 4):
        assert subject.batch(range(start, start + 4)).x0 is None
    assert source.prompts == Counter(CAPTIONS)


def test_encoders_are_given_the_same_number_of_rows_whatever_is_known() -> None:
    """Of three prompts, with repeats within a batch; what comes later, first; and a prompt that comes alone."""
    orders = [[[0, 1, 2, 6], [3, 4, 5, 0], [0, 0, 0, 0]], [[3, 3, 3, 3], [4, 4, 3, 3], [1, 7, 8, 2]], [[5, 5, 5, 5]]]
    for order in orders:
        source = Counted(9)
        subject = Batches(source, source.family, True, cache=True)
        for samples in order:
            batch = subject.batch(samples)
            assert torch.equal(batch.cond["label"], labels([CAPTIONS[s % 9 % 3] for s in samples])["label"])
            assert batch.x0 is not None
            assert torch.equal(batch.x0[:, 0, 0, 0], torch.tensor([10.0 * s for s in samples]) / 127.5 - 1)
        assert {*source.calls} == {("prompts", 4), ("images", 4)}


def test_only_what_is_new_takes_memory() -> None:
    source = Counted(9)
    subject = Batches(source, source.family, True, cache=True)
    subject.batch([3, 3, 3, 3])
    subject.batch([4, 4, 3, 3])
    kept = [*subject._latents.values(), *(value for cond in subject._conds.values() for value in cond.values())]
    assert len(kept) == 4
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in kept)


def test_the_cache_of_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_CACHED_BYTES", 2 * labels([""])["label"].nbytes)
    source = Words()
    subject = Batches(source, source.family, images=False)
    for start in (0, 2, 1, 4):
        batch = subject.batch([start, start + 1])
        expected = labels([CAPTIONS[s % 6 % 3] for s in (start, start + 1)])
        assert torch.equal(batch.cond["label"], expected["label"])
    assert sum(source.prompts.values()) > len(set(CAPTIONS)), "what was dropped is encoded again"


def test_with_a_cache_an_image_is_encoded_once() -> None:
    source = Counted()
    subject = Batches(source, source.family, True, cache=True)
    first = subject.batch(range(6))
    again = subject.batch(range(6, 12))
    assert first.x0 is not None
    assert again.x0 is not None
    assert torch.equal(first.x0, again.x0)
    assert torch.equal(first.cond["label"], again.cond["label"])
    assert source.images == 6


def test_with_a_cache_an_image_is_loaded_once() -> None:
    """Opening and drawing it again would cost what encoding it no longer does."""
    source = Counted()
    subject = Batches(source, source.family, True, cache=True)
    for start in (0, 3, 6, 9):
        subject.batch(range(start, start + 3))
    assert source.items == Counter(range(6))


def test_without_a_cache_an_image_stays_for_the_next_phase_of_its_step_and_no_longer() -> None:
    source = Counted()
    subject = Batches(source, source.family, True)
    for samples in (range(3), range(3), range(2, 6), range(2, 6), range(3)):
        again = subject.batch(samples).x0
        assert again is not None
        assert torch.equal(again[:, 0, 0, 0], torch.tensor([10.0 * s for s in samples]) / 127.5 - 1)
    assert source.items == Counter({0: 2, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1})
    assert source.images == 8


def test_a_sample_twice_in_a_batch_is_twice_in_the_result() -> None:
    source = Counted()
    batch = Batches(source, source.family, True, cache=True).batch([1, 7, 1])
    assert batch.x0 is not None
    assert torch.equal(batch.x0[0], batch.x0[1])
    assert len(batch.x0) == 3


def test_a_method_that_needs_images_refuses_a_source_of_prompts() -> None:
    source: Source = Words()
    with pytest.raises(ValueError, match="this method needs images and the data source has prompts only"):
        Batches(source, gaussian_family(), images=True)


def test_pixels_are_in_minus_one_to_one_and_go_back_unchanged() -> None:
    array = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    x = pixels([array, 255 - array])
    assert x.shape == (2, 3, 8, 8)
    assert x.min() == -1
    assert x.max() == 1
    assert np.array_equal(to_uint8(x)[0].permute(1, 2, 0).numpy(), array)


def test_to_uint8_rounds_and_clamps() -> None:
    x = torch.tensor([-3.0, -1.0, -1 + 1.4 / 127.5, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 1, 128, 255, 255]
