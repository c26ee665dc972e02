"""The emoji world's detector: targets, decoding and losses in closed form; the shipped weights by what they hold."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from fastgen.emoji import compose, detector
from fastgen.emoji.detector import COLOURS, FLOOR, GRID, IGNORED, MOST, NOUNS, SIZE, Example, Maps

NONE = COLOURS.index("none")


def maps(*objects, background=-20.0):
    """Maps with a peak for each (x cell, y cell, logit, noun, colour, box)."""
    made = Maps(
        torch.full((1, GRID, GRID), background),
        torch.zeros(1, len(NOUNS), GRID, GRID),
        torch.zeros(1, len(COLOURS), GRID, GRID),
        torch.zeros(1, 4, GRID, GRID),
    )
    for x, y, logit, noun, colour, box in objects:
        made.centre[0, y, x] = logit
        made.noun[0, noun, y, x] = made.colour[0, colour, y, x] = 50.0
        made.sides[0, :, y, x] = detector.sides_of(torch.tensor(box))[:, y, x]
    return made


@pytest.fixture(scope="module")
def shipped():
    return detector.load()


def tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def scenes(count, *, split="train", task=None, seed=31_000_001):
    return [compose.scene(np.random.default_rng([seed, i]), task, split=split) for i in range(count)]


def test_sides_and_boxes_are_inverse():
    boxes = torch.tensor([[[1.5, 2.0, 11.0, 31.0], [0.0, 0.0, 32.0, 32.0]]])
    back = detector.boxes_of(detector.sides_of(boxes))
    assert back.shape == (1, 2, 4, GRID, GRID)
    torch.testing.assert_close(back, boxes[..., None, None].expand_as(back))


def test_a_centre_is_assigned_its_cell_and_its_neighbours():
    targets = detector.assign(torch.tensor([[[4.0, 6.0, 12.0, 14.0]]]), torch.tensor([[True]]))  # middle (8, 10)
    assert (targets.centre == 1).nonzero().tolist() == [[0, 5, 4]]
    assert targets.centre[0, 5, 5] == pytest.approx(math.exp(-1 / (2 * (8 / 2 / 6) ** 2)))
    assert sorted((targets.owner == 0).nonzero().tolist()) == [[0, y, x] for y in (4, 5, 6) for x in (3, 4, 5)]
    assert (targets.owner == IGNORED).sum() == GRID * GRID - 9
    assert targets.sides[0, :, 5, 4].tolist() == [9 - 4, 11 - 6, 12 - 9, 14 - 11]


def test_a_cell_belongs_to_the_nearest_object_and_padding_to_none():
    boxes = torch.tensor([[[4.0, 4.0, 8.0, 8.0], [8.0, 4.0, 12.0, 8.0], [20.0, 20.0, 28.0, 28.0]]])  # cells x 3, 5, 12
    targets = detector.assign(boxes, torch.tensor([[True, True, False]]))
    assert targets.owner[0, 3].tolist() == [IGNORED] * 2 + [0, 0, 0, 1, 1] + [IGNORED] * 9
    assert targets.owner[0, 8:].eq(IGNORED).all()
    assert targets.centre[0, 12, 12] < 1e-3
    assert not detector.assign(boxes, torch.zeros(1, 3, dtype=torch.bool)).centre.any()


def test_decoding_gives_back_what_was_encoded_best_first():
    boxes = [[2.0, 2.0, 9.0, 12.0], [17.0, 18.5, 31.0, 30.0]]
    rows = detector.decode(maps((2, 3, 0.0, 7, 4, boxes[0]), (12, 12, 4.0, 139, NONE, boxes[1])))
    assert rows.shape == (1, MOST, 7)
    expected = [[139, 1 / (1 + math.exp(-4.0)), *boxes[1], NONE], [7, 0.5, *boxes[0], 4]]
    torch.testing.assert_close(rows[0, :2], torch.tensor(expected))
    assert rows[0, 2:].isnan().all()


def test_a_score_is_the_chance_of_a_centre_times_that_of_the_noun():
    made = maps((5, 5, 0.0, 3, 1, [4.0, 4.0, 16.0, 16.0]))
    made.noun[0, :, 5, 5] = 0
    made.noun[0, 3, 5, 5], made.noun[0, 8, 5, 5] = 50.0, 50.0 + math.log(0.25)
    assert detector.decode(made)[0, 0, 1] == pytest.approx(0.5 * 0.8)


def test_only_peaks_above_the_floor_that_overlap_no_better_one_are_reported():
    box = [4.0, 4.0, 16.0, 16.0]
    beside = detector.decode(maps((4, 4, 1.0, 3, 1, box), (5, 4, 0.9, 3, 1, [40.0] * 4)))  # a neighbour is no peak
    assert beside[0, :, 0].isnan().tolist() == [False] + [True] * (MOST - 1)
    same = detector.decode(
        maps((4, 4, 1.0, 3, 1, box), (8, 4, 0.9, 5, 1, box), (13, 13, 0.5, 6, 1, [20.0, 20, 30, 30]))
    )
    assert same[0, :3, 0].tolist()[:2] == [3, 6]
    assert same[0, 2:].isnan().all()
    low = math.log(FLOOR / (1 - FLOOR))
    assert detector.decode(maps((4, 4, low - 0.01, 3, 1, box))).isnan().all()
    assert not detector.decode(maps((4, 4, low + 0.01, 3, 1, box)))[0, 0].isnan().any()


def test_overlap():
    a = torch.tensor([0.0, 0.0, 4.0, 4.0])
    others = torch.tensor([[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0], [4.0, 0.0, 8.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(detector.overlap(a, others), torch.tensor([1.0, 8 / 24, 0.0, 0.0]))
    assert detector.overlap(others[3], others[3]) == 0


def test_focal_loss_in_closed_form():
    target = torch.zeros(1, GRID, GRID)
    target[0, 2, 3], target[0, 2, 4] = 1.0, 0.5
    logits = torch.full((1, GRID, GRID), -40.0)
    logits[0, 2, 3], logits[0, 2, 4], logits[0, 9, 9] = 0.3, -0.2, 0.7
    p = [1 / (1 + math.exp(-v)) for v in (0.3, -0.2, 0.7)]
    expected = -(
        (1 - p[0]) ** 2 * math.log(p[0]) + 0.5**4 * p[1] ** 2 * math.log(1 - p[1]) + p[2] ** 2 * math.log(1 - p[2])
    )
    assert detector.focal(logits, target).tolist() == pytest.approx([expected], rel=1e-5)


def test_sides_loss_in_closed_form():
    true = torch.tensor([[2.0, 3.0, 4.0, 5.0]])
    assert detector.sides_loss(true, true).item() == pytest.approx(0, abs=1e-6)
    wider = torch.tensor([[4.0, 3.0, 4.0, 5.0]])  # 8 x 8 about 6 x 8
    assert detector.sides_loss(wider, true).item() == pytest.approx(1 - 48 / 64 + 2 / 4 / 8)
    beside = torch.tensor([[-5.0, 3.0, 11.0, 5.0]])  # begins where the other has ended
    assert detector.sides_loss(beside, true).item() == pytest.approx(1 + (7 + 7) / 4 / 8)


def test_losses_are_means_over_objects_and_ignore_what_is_ignored():
    class Fixed(torch.nn.Module):
        def forward(self, pixels):
            made = maps((4, 5, 1.0, 7, 2, [4.0, 6.0, 12.0, 14.0]))
            made.noun[:] = 0
            made.colour[:] = 0
            made.sides[:] = detector.sides_of(torch.tensor([[4.0, 6.0, 12.0, 14.0]]))
            return made

    def terms(noun, colour):
        batch = detector.Batch(
            [0],
            {
                "boxes": torch.tensor([[[4.0, 6.0, 12.0, 14.0]]]),
                "there": torch.tensor([[True]]),
                "nouns": torch.tensor([[noun]]),
                "colours": torch.tensor([[colour]]),
            },
            {},
            torch.zeros(1, 3, SIZE, SIZE),
        )
        return {k: v.item() for k, v in detector.Detecting(Fixed()).loss(batch, None).items()}

    known = terms(7, 2)
    assert known["noun"] == pytest.approx(math.log(len(NOUNS)))
    assert known["colour"] == pytest.approx(0.5 * math.log(len(COLOURS)))
    assert known["sides"] == pytest.approx(0, abs=1e-6)
    ignored = terms(IGNORED, IGNORED)
    assert (ignored["noun"], ignored["colour"], ignored["centre"]) == (0, 0, known["centre"])


def test_quality_counts_each_object_once():
    truth = Example(np.zeros((SIZE, SIZE, 3), np.uint8), *example_of([(5, 2), (5, NONE), (9, 3)]))
    row = torch.full((MOST, 7), torch.nan)
    row[0] = torch.tensor([5, 0.9, *truth.boxes[0], 2.0])
    row[1] = torch.tensor([5, 0.8, *truth.boxes[0], 2.0])  # found twice
    row[2] = torch.tensor([9, 0.7, *truth.boxes[2], 4.0])  # of another colour
    row[3] = torch.tensor([11, 0.6, *truth.boxes[1], 4.0])  # another noun
    row[4] = torch.tensor([5, 0.3, *truth.boxes[1], 4.0])  # not above the threshold
    made = detector.quality(row[None], [truth], 0.3)
    assert (made.precision[5], made.recall[5]) == (0.5, 0.5)
    assert (made.precision[9], made.recall[9], made.precision[11]) == (1, 1, 0)
    assert np.isnan(made.recall[11])
    assert np.isnan(made.precision[12])
    assert (made.colour, made.objects) == (0.5, 3)


def example_of(objects):
    boxes = np.array([[10 * i, 2, 10 * i + 8, 10] for i in range(len(objects))], np.float32)
    return boxes, np.array([noun for noun, _ in objects]), np.array([colour for _, colour in objects])


def test_recolouring_turns_hues_and_tells_what_it_knows():
    names = ("red", "black", "white", "pink", "none")
    shown = Example(
        np.full((SIZE, SIZE, 3), (255, 0, 0), np.uint8), *example_of([(5, COLOURS.index(c)) for c in names])
    )

    class Angle:
        def integers(self, low, high):
            return 120

    made = detector.recoloured(shown, Angle())
    assert (made.nouns == IGNORED).all()
    assert made.colours.tolist() == [COLOURS.index(c) for c in ("green", "black", "white")] + [IGNORED, IGNORED]
    red, green, blue = made.image[0, 0].tolist()
    assert (green, blue) == (255, 0) or (green > 250 and max(red, blue) < 10)
    assert made.boxes is shown.boxes


def test_spoilt_pictures_lose_objects():
    some = [detector.example(scene) for scene in scenes(120, task="two_object")]
    pairs = enumerate(itertools.pairwise(some))
    left = [len(detector.spoilt(a, b, np.random.default_rng(i)).boxes) for i, (a, b) in pairs]
    assert set(left) <= {0, 1, 2}
    assert left.count(0) > 30
    assert left.count(1) > 30
    assert left.count(2) <= 4  # two of one noun were to be joined


def test_examples_depend_on_their_number_alone():
    data = detector.Examples(3, 50)
    whole, part = data.batch([4, 9, 61]), data.batch([11])
    assert whole.x0.shape == (3, 3, SIZE, SIZE)
    torch.testing.assert_close(whole.x0[2:], part.x0)  # 61 is 11 again
    for name, rows in whole.cond.items():
        assert torch.equal(rows[2:], part.cond[name])
    assert not torch.equal(data.batch([12]).x0, part.x0)


def test_an_example_says_what_the_scene_says():
    (scene,) = scenes(1, task="color_attr")
    made = detector.example(scene)
    assert [NOUNS[i] for i in made.nouns] == [box.noun for box in scene.boxes]
    assert [COLOURS[i] for i in made.colours] == [box.colour for box in scene.boxes]
    assert made.boxes.tolist() == [list(box.xyxy) for box in scene.boxes]


def test_saved_and_loaded_it_is_the_same(tmp_path):
    torch.manual_seed(0)
    network = detector.Detector(16, 32)
    detector.save(network, tmp_path / "saved")
    again = detector.load(tmp_path / "saved")
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())
    with pytest.raises(ValueError, match="no emoji detector there"):
        detector.load(tmp_path / "elsewhere")
    about = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**about, "nouns": about["nouns"][1:]}))
    with pytest.raises(ValueError, match="knows other nouns or colours"):
        detector.load(tmp_path / "saved")


def test_training_runs_from_a_config_and_resumes(tmp_path):
    recipe = tmp_path / "detector.yaml"
    recipe.write_text(f"out: {tmp_path / 'run'}\nsteps: 1\nbatch_size: 4\nsave_every: 1\n")
    assert detector.main([str(recipe)]) == 0
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    first = detector.load(tmp_path / "run" / "detector")
    assert detector.main([str(recipe)]) == 0  # nothing is left to do
    for a, b in zip(first.parameters(), detector.load(tmp_path / "run" / "detector").parameters(), strict=True):
        assert torch.equal(a, b)
    assert detector.main([]) == 2


def test_images_must_be_square():
    with pytest.raises(ValueError, match="takes square images, got 32 x 24"):
        detector.resized(torch.zeros(1, 3, 24, 32, dtype=torch.uint8))
    images = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    assert torch.equal(detector.resized(images), images.float() / 127.5 - 1)


def test_a_blank_image_shows_nothing(shipped):
    blank = torch.tensor([[255, 255, 255], [140, 156, 176], [0, 0, 0], [253, 243, 214]], dtype=torch.uint8)
    assert detector.detect(shipped, blank[:, :, None, None].expand(-1, -1, SIZE, SIZE)).isnan().all()
    assert detector.detect(shipped, torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)).shape == (0, MOST, 7)


def test_detections_do_not_depend_on_the_other_images(shipped):
    images = tensor([scene.image for scene in scenes(7)])
    rows = detector.detect(shipped, images)
    torch.testing.assert_close(rows[[3]], detector.detect(shipped, images[[3]]), rtol=1e-4, atol=1e-3, equal_nan=True)
    torch.testing.assert_close(rows, detector.detect(shipped, images, chunk=2), rtol=1e-4, atol=1e-3, equal_nan=True)


def test_mirrored_pictures_have_mirrored_boxes(shipped):
    images = tensor([scene.image for scene in scenes(40, task="counting")])
    rows, mirrored = (detector.detect(shipped, side) for side in (images, images.flip(-1)))
    errors, same = [], []
    for a, b in zip(rows, mirrored, strict=True):
        there = [r[r[:, 1] > 0.3] for r in (a, b)]  # the threshold of geneval_emoji
        same.append(len(there[0]) == len(there[1]))
        back = there[1][:, [4, 3, 2, 5]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([SIZE, 0, SIZE, 0])
        for box in there[0][:, 2:6]:
            errors.append((back - box).abs().amax(1).min() if len(back) else torch.tensor(32.0))
    assert np.mean(same) >= 0.9
    assert torch.stack(errors).median() < 1.5


def test_boxes_are_in_the_pixels_of_the_image(shipped):
    image = tensor([scenes(1, task="two_object")[0].image])
    large = image.repeat_interleave(4, -1).repeat_interleave(4, -2)
    small, big = detector.detect(shipped, image)[0], detector.detect(shipped, large)[0]
    assert torch.equal(small[:2, 0], big[:2, 0])
    torch.testing.assert_close(4 * small[:2, 2:6], big[:2, 2:6], rtol=0, atol=4)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_what_is_shipped_finds_the_drawings_of_both_splits(shipped, split):
    some = scenes(300, split=split)
    rows = detector.detect(shipped, tensor([scene.image for scene in some]))
    made = detector.quality(rows, [detector.example(scene) for scene in some], 0.3)
    assert np.nanmean(made.recall) >= 0.95
    assert np.nanmean(made.precision) >= 0.95
    assert made.colour >= 0.97
    assert detector.weights_file().stat().st_size < 3e6
