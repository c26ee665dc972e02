"""geneval as a metric and on folders of the official layout, with a detector and a CLIP whose answers are known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from fastgen.data.geneval import CLASSES, official
from fastgen.emoji import world
from fastgen.evaluation import geneval, mask2former
from fastgen.evaluation.context import Context, Seen
from fastgen.evaluation.geneval import Colours, Metric, Objects, judge_folder, read_folder, write_sample
from fastgen.evaluation.mask2former import Detections
from fastgen.evaluation.verdict import COLOURS, Options, summary

CLIP = Path(world.__file__).parent / "assets" / "clip"
RGB = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "black": (0, 0, 0)}
DOG, CAT = CLASSES.index("dog"), CLASSES.index("cat")


class Clip:
    """Sees the mean colour of a picture, and in a text the colour it names."""

    key = "clip"

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        self.read: list[str] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.shown.append(images[0])
        return images.float().mean((2, 3)) / 255 - 0.4

    def texts(self, texts: Sequence[str]) -> Tensor:
        self.read += texts
        named = [next((c for c in RGB if c in text.replace("-", " ").split()), "grey") for text in texts]
        return torch.tensor([RGB.get(c, (0.3, 0.5, 0.4)) for c in named]) - 0.4

    def protocol(self) -> dict[str, str]:
        return {"extractor": "a clip"}


class Detector:
    """Finds, for every row of pixels that is not black, an object whose class is the row's number from DOG on."""

    key = "detector"

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.above: set[float] = set()

    def __call__(self, images: Tensor, above: float) -> Iterator[Detections]:
        self.calls.append(tuple(images.shape))
        self.above.add(above)
        for image in images:
            masks = []
            for y in torch.nonzero(image.amax((0, 2))).flatten().tolist():
                mask = torch.zeros(image.shape[1:], dtype=torch.bool)
                mask[y] = image[:, y].amax(0) > 0
                masks.append(mask)
            boxes = [mask2former.box(mask) for mask in masks]
            yield Detections(
                torch.tensor([(int(box[1]) + DOG) % 80 for box in boxes], dtype=torch.long),
                torch.tensor([0.9 - 0.1 * i for i in range(len(boxes))]),
                torch.tensor(boxes).view(-1, 4),
                torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.bool),
            )

    def protocol(self) -> dict[str, str]:
        return {"extractor": "a detector", "sha256": "0"}


def picture(dog: str | None = None, next_one: str | None = None, size: tuple[int, int] = (6, 8)) -> Tensor:
    """The first rows of pixels in these colours, four wide; the rest black."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for y, colour in enumerate((dog, next_one)):
        if colour is not None:
            image[:, y, 1:5] = 255 * torch.tensor(RGB[colour], dtype=torch.uint8)[:, None]
    return image


def record(prompt: str, tag: str, *include: dict) -> dict:
    return {"tag": tag, "include": list(include), "prompt": prompt}


RECORDS = {
    r["prompt"]: r
    for r in (
        record("a dog", "single_object", {"class": "dog", "count": 1}),
        record("a red dog", "colors", {"class": "dog", "count": 1, "color": "red"}),
        record("two red dogs", "counting", {"class": "dog", "count": 2, "color": "red"}),
    )
}


def test_colours_are_seen_in_the_mask_cut_to_the_box_on_grey():
    clip = Clip()
    image = torch.zeros(3, 6, 8, dtype=torch.uint8)
    image[2] = 255  # all blue but for a red corner
    image[:, 2:4, 3:6] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:4, 3:6] = True
    mask[3, 5] = False
    assert COLOURS[Colours(clip)(image, mask, (3, 2, 6, 4), "dog")] == "red"
    (shown,) = clip.shown
    assert shown.shape == (3, 2, 3)
    assert shown[:, 1, 2].tolist() == [0x99] * 3
    assert shown[:, 0, 2].tolist() == [255, 0, 0]


def test_colours_are_asked_for_by_three_templates_and_the_class_s_own_name():
    clip = Clip()
    colours = Colours(clip)
    for _ in range(2):
        colours(picture("green"), torch.ones(6, 8, dtype=torch.bool), (0, 0, 8, 1), "computer mouse")
    assert len(clip.read) == 30  # once for both
    assert clip.read[:3] == [
        "a photo of a red computer mouse",
        "a photo of a red-colored computer mouse",
        "a photo of a red object",
    ]
    assert clip.read[-1] == "a photo of a white object"


def test_a_colour_s_direction_is_the_mean_of_the_templates_directions():
    class Uneven(Clip):
        def texts(self, texts: Sequence[str]) -> Tensor:
            return torch.stack(
                [torch.tensor([1.0, 0]) if "object" in t else 50 * torch.tensor([0.0, 1]) for t in texts]
            )

    head = Colours(Uneven())._head("dog")
    assert torch.allclose(head, torch.tensor([[1.0, 2.0]]) / 5**0.5)


def test_a_row_holds_what_the_detector_found_and_the_colours_asked_for():
    clip, detector = Clip(), Detector()
    objects = Objects(detector, Colours(clip), RECORDS)
    images = torch.stack([picture("red", "blue"), picture("red", "blue"), picture()])
    rows = objects(images, ["a dog", "a red dog", "a red dog"])
    assert rows.shape == (3, 100, 7)
    red = COLOURS.index("red")
    plain = [[DOG, 0.9, 1, 0, 5, 1, -1], [DOG + 1, 0.8, 1, 1, 5, 2, -1]]
    assert torch.allclose(rows[0, :2], torch.tensor(plain))
    assert rows[1, :2, 6].tolist() == [red, -1]  # of the dog alone
    assert rows[:, 2:].isnan().all()
    assert rows[2].isnan().all()
    assert len(clip.shown) == 1
    assert detector.above == {0.3}


def test_a_colour_is_not_looked_for_where_objects_are_too_few():
    clip = Clip()
    objects = Objects(Detector(), Colours(clip), RECORDS)
    objects(picture("red")[None], ["two red dogs"])
    assert not clip.shown


def test_rows_do_not_depend_on_the_batch():
    objects = Objects(Detector(), Colours(Clip()), RECORDS)
    images = torch.stack([picture("red"), picture("blue", "red"), picture("green")])
    prompts = ["a red dog", "a dog", "a red dog"]
    together = objects(images, prompts)
    alone = torch.cat([objects(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert torch.equal(together.nan_to_num(-9), alone.nan_to_num(-9))
    assert objects(images[:0], []).shape == (0, 100, 7)


def test_the_key_tells_what_makes_rows_differ():
    keys = {
        objects.key
        for objects in (
            Objects(Detector(), Colours(Clip()), RECORDS),
            Objects(Detector(), None, RECORDS),
            Objects(Detector(), Colours(Clip()), RECORDS, Options(threshold=0.2)),
            Objects(Detector(), Colours(Clip()), {}),
        )
    }
    assert len(keys) == 4


def test_a_prompt_that_asks_for_a_colour_needs_a_clip():
    with pytest.raises(ValueError, match="prompt 'a red dog' asks for a colour, which no CLIP was given to tell"):
        Objects(Detector(), None, RECORDS)(picture("red")[None], ["a red dog"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Mask2Former of random weights."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(embed_dim=12, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=7, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=80,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=5,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
    )
    place = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(place)
    return place


def test_the_metric_of_real_networks_of_random_weights(folder, monkeypatch):
    monkeypatch.setattr(
        geneval.mask2former, "load", lambda path, device: mask2former.Mask2Former(path, device, (64, 96))
    )
    prompts = [record["prompt"] for record in official()[::60]]
    metric = Metric(Context(weights={"mask2former": str(folder), "clip": str(CLIP)}, prompts=prompts))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(prompts), 3, 32, 32), np.uint8))
    (objects,) = metric.extractors
    seen = Seen(prompts, {objects.key: objects(images, prompts)})
    made = metric.compute(seen)
    assert set(made) <= set(geneval.ABOUT.values)
    assert made["geneval"] == 0  # nothing is found by chance
    assert {name: float(v.nansum()) for name, v in metric.per_image(seen).items()} == {
        name: 0.0 for name in made if name != "geneval"
    }
    assert all(not verdict.correct and verdict.reason for verdict in metric.verdicts(seen))
    assert len(metric.lines(seen, ["x"] * len(prompts))) == len(prompts)
    said = metric.protocol()
    assert said["options"]["threshold"] == 0.3
    assert said["colours"]["extractor"].startswith("CLIP")
    assert said["num_prompts"] == len(prompts)
    json.dumps(said)


def test_the_metric_counts_what_is_seen(folder, monkeypatch):
    monkeypatch.setattr(geneval, "open_detector", lambda context: Detector())
    monkeypatch.setattr(geneval, "open_colours", lambda context: Colours(Clip()))
    prompts = ["a dog", "a red dog", "a dog", "a red dog", "a red dog"]
    metric = Metric(Context(prompts=prompts, metadata=RECORDS))
    images = torch.stack([picture("red"), picture("red"), picture(), picture("blue"), picture("green", "red")])
    (objects,) = metric.extractors
    seen = Seen(prompts, {objects.key: objects(images, prompts)})
    assert metric.compute(seen) == {
        "geneval": (1 / 2 + 1 / 3) / 2,
        "geneval_single_object": 1 / 2,
        "geneval_colors": 1 / 3,
    }
    assert [verdict.reason for verdict in metric.verdicts(seen)] == [
        "",
        "",
        "expected dog>=1, found 0",
        "expected red dog>=1, found 0 red; and 1 blue",
        "expected red dog>=1, found 0 red; and 1 green",
    ]


def test_no_clip_is_needed_where_no_prompt_asks_for_a_colour(folder):
    context = Context(weights={"mask2former": str(folder), "clip": "no/such/folder"}, prompts=["a dog"])
    assert "colours" not in Metric(Context(**{**vars(context), "metadata": RECORDS})).protocol()


def test_a_prompt_without_a_record_is_told():
    with pytest.raises(
        ValueError, match=r"geneval has no record of prompt 'a photo of joy'; set eval\.geneval to the source"
    ):
        Metric(Context(prompts=["a photo of a bench", "a photo of joy"]))


def test_a_prompt_about_no_coco_object_is_told():
    records = {"a leaf": record("a leaf", "single_object", {"class": "leaf", "count": 1})}
    with pytest.raises(ValueError, match="geneval cannot judge prompt 'a leaf': unknown class 'leaf'"):
        Metric(Context(prompts=["a leaf"], metadata=records))


def test_missing_weights_are_told(tmp_path):
    context = Context(weights={"mask2former": str(tmp_path / "none")}, prompts=["a dog"], metadata=RECORDS)
    with pytest.raises(ValueError, match=r"none: .*mask2former"):
        Metric(context)


def filled(folder: Path) -> list[str]:
    """Two prompts of two images, one of them of another size; the third is wrong."""
    made = [
        write_sample(folder, 0, 0, RECORDS["a dog"], picture("blue")),
        write_sample(folder, 0, 1, RECORDS["a dog"], picture("red", size=(9, 8))),
        write_sample(folder, 12, 0, RECORDS["a red dog"], picture("blue", size=(9, 8))),
        write_sample(folder, 12, 1, RECORDS["a red dog"], picture("red", "blue", size=(9, 8))),
    ]
    return [str(file) for file in made]


def test_the_layout_is_the_official_one(tmp_path):
    filled(tmp_path)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    assert files == [
        "00000/metadata.jsonl",
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00012/metadata.jsonl",
        "00012/samples/0000.png",
        "00012/samples/0001.png",
    ]
    assert json.loads((tmp_path / "00012" / "metadata.jsonl").read_text()) == RECORDS["a red dog"]
    assert torch.equal(geneval.read_image(tmp_path / files[1]), picture("blue"))


def test_only_images_of_the_layout_are_read(tmp_path):
    names = filled(tmp_path)
    (tmp_path / "00000" / "grid.png").write_bytes(b"")
    (tmp_path / "00000" / "samples" / "0002.png.part").write_bytes(b"")
    (tmp_path / "00000" / "samples" / "a.png").write_bytes(b"")
    (tmp_path / "notes").mkdir()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "metadata.jsonl").write_text(json.dumps(RECORDS["a dog"]))
    assert [str(sample.file) for sample in read_folder(tmp_path)] == names


def test_a_picture_is_turned_as_it_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture("red").permute(1, 2, 0).numpy()).save(tmp_path / "a.png", exif=exif)
    assert geneval.read_image(tmp_path / "a.png").shape == (3, 8, 6)


def judged(folder: Path, detector: Detector, **more) -> list[dict]:
    return judge_folder(folder, detector, Colours(Clip()), folder / "results.jsonl", **more)


def test_a_folder_is_judged(tmp_path):
    names, detector = filled(tmp_path), Detector()
    lines = judged(tmp_path, detector)
    assert [line["filename"] for line in lines] == names
    assert [line["correct"] for line in lines] == [True, True, False, True]
    assert lines[2]["reason"] == "expected red dog>=1, found 0 red; and 1 blue"
    assert json.loads(lines[0]["metadata"]) == RECORDS["a dog"]
    assert json.loads(lines[3]["details"]).keys() == {"dog", CLASSES[DOG + 1]}
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == lines
    assert detector.calls == [(1, 3, 6, 8), (3, 3, 9, 8)]  # a batch is of one size
    assert summary(lines)["overall"] == 0.75
    assert json.loads((tmp_path / "results.jsonl.protocol.json").read_text())["extractor"] == "a detector"


def test_the_batch_size_changes_no_line(tmp_path):
    filled(tmp_path)
    one = judge_folder(tmp_path, Detector(), Colours(Clip()), tmp_path / "one.jsonl", batch_size=1)
    assert judge_folder(tmp_path, Detector(), Colours(Clip()), tmp_path / "many.jsonl", batch_size=3) == one


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    filled(tmp_path)
    whole = judged(tmp_path, Detector())
    out = tmp_path / "results.jsonl"
    text = out.read_text().splitlines(keepends=True)
    out.write_text("".join(text[:2]) + text[2][:30])
    detector = Detector()
    assert judged(tmp_path, detector) == whole
    assert detector.calls == [(2, 3, 9, 8)]
    assert judged(tmp_path, detector) == whole
    assert len(detector.calls) == 1


def test_what_changed_since_is_judged_again(tmp_path):
    names, detector = filled(tmp_path), Detector()
    judged(tmp_path, detector)
    detector.calls.clear()
    write_sample(tmp_path, 0, 1, RECORDS["a dog"], picture(size=(9, 8)))
    later = (tmp_path / "results.jsonl").stat().st_mtime + 10
    os.utime(names[1], (later, later))
    other = record("a red dog", "colors", {"class": "dog", "count": 1, "color": "blue"})
    (tmp_path / "00012" / "metadata.jsonl").write_text(json.dumps(other))
    lines = judged(tmp_path, detector)
    assert detector.calls == [(3, 3, 9, 8)]
    assert [line["correct"] for line in lines] == [True, False, True, False]


def test_results_of_another_detector_or_other_thresholds_are_told(tmp_path):
    filled(tmp_path)
    judged(tmp_path, Detector())
    with pytest.raises(ValueError, match=r"results\.jsonl: was made by another detector or with other thresholds"):
        judged(tmp_path, Detector(), options=Options(threshold=0.5))


def test_a_folder_of_no_images_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no images of GenEval's layout; they are at 00000/samples/0000\.png"):
        read_folder(tmp_path)
    (tmp_path / "00000").mkdir()
    with pytest.raises(ValueError, match=r"00000/metadata\.jsonl: no record of a GenEval prompt"):
        read_folder(tmp_path)


def test_a_folder_that_asks_for_colours_needs_a_clip(tmp_path):
    filled(tmp_path)
    with pytest.raises(ValueError, match="there are prompts that ask for a colour; give the CLIP that tells them"):
        judge_folder(tmp_path, Detector(), None, tmp_path / "results.jsonl")


def test_the_summary_in_words(tmp_path):
    filled(tmp_path)
    said = geneval.told(judged(tmp_path, Detector())).splitlines()
    assert said == [
        "4 images of 2 prompts; correct: 75.00% of the images, 100.00% of the prompts at least once",
        "single_object    100.00%  (2 of 2)",
        "colors            50.00%  (1 of 2)",
        "overall          0.75000  (mean of the tasks)",
    ]
