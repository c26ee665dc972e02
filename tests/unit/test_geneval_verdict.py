"""GenEval's verdict on hand-made detections: every branch of the rule, and the sums over images."""

from __future__ import annotations

import json

import pytest
import torch

from fastgen.evaluation.context import Seen
from fastgen.evaluation.verdict import COLOURS, TAGS, Found, Options, Verdict, judge, keep, overlap, row, summary
from fastgen.evaluation.verdicts import MOST, Verdicts, found, padded, values
from fastgen.geneval import relations

HERE, RIGHT, LOW = (0.0, 0.0, 10.0, 10.0), (40.0, 0.0, 50.0, 10.0), (0.0, 40.0, 10.0, 50.0)


def of(*scores, box=HERE, colour=None):
    return [Found(score, box, colour) for score in scores]


def asked(*clauses, tag="two_object", **more):
    return {"tag": tag, "include": list(clauses), "prompt": "a photo", **more}


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def exactly(count):
    return asked(clause("dog", count), tag="counting", exclude=[clause("dog", count + 1)])


RED, CUP = clause("cup", color="red"), clause("cup")
LEFT = asked(clause("cat"), clause("dog", position=["left of", 0]))
FAR = "expected dog left of target, found "


@pytest.mark.parametrize(
    ("metadata", "detections", "reason"),
    [
        # objects
        (asked(clause("dog"), tag="single_object"), {"dog": of(0.31)}, ""),
        (asked(clause("dog"), tag="single_object"), {}, "expected dog>=1, found 0"),
        (asked(clause("dog"), tag="single_object"), {"dog": of(0.3)}, "expected dog>=1, found 0"),  # not above
        (asked(clause("dog"), tag="single_object"), {"cat": of(0.9)}, "expected dog>=1, found 0"),
        (asked(clause("dog"), tag="single_object"), {"dog": of(0.9, 0.9), "cat": of(0.9)}, ""),  # others do no harm
        (asked(clause("dog"), clause("cat")), {"dog": of(0.5), "cat": of(0.5)}, ""),
        (asked(clause("dog"), clause("cat")), {"dog": of(0.5)}, "expected cat>=1, found 0"),
        (asked(clause("dog"), clause("cat")), {}, "expected dog>=1, found 0\nexpected cat>=1, found 0"),
        # counting
        (exactly(2), {"dog": of(0.95, 0.91)}, ""),
        (exactly(2), {"dog": of(0.95, 0.9)}, "expected dog>=2, found 1"),
        (exactly(2), {"dog": of(0.95, 0.89, 0.89, 0.89)}, "expected dog>=2, found 1"),
        (exactly(2), {"dog": of(0.95, 0.91, 0.92)}, "expected dog<3, found 3"),
        (exactly(2), {"dog": of(0.95, 0.91, 0.5)}, ""),  # what is not sure does not count as too many
        # colours
        (asked(RED, tag="colors"), {"cup": of(0.5, colour="red")}, ""),
        (asked(RED, tag="colors"), {}, "expected cup>=1, found 0"),
        (
            asked(RED, tag="colors"),
            {"cup": of(0.5, colour="blue")},
            "expected red cup>=1, found 0 red; and 1 blue",
        ),
        (
            asked(RED, tag="colors"),  # the surest one decides
            {"cup": of(0.5, colour="red") + of(0.6, colour="blue")},
            "expected red cup>=1, found 0 red; and 1 blue",
        ),
        (asked(RED, tag="colors"), {"cup": of(0.5)}, "expected red cup>=1, found 0 red; and "),  # of no colour
        (
            asked(clause("cup", 3, color="red"), tag="colors"),
            {"cup": of(0.5, colour="red") + of(0.6, colour="white") + of(0.7, colour="blue")},
            "expected red cup>=3, found 1 red; and 1 red, 1 blue, 1 white",
        ),
        (
            asked(RED, clause("bowl", color="blue"), tag="color_attr"),
            {"cup": of(0.5, colour="blue"), "bowl": of(0.5, colour="blue")},
            "expected red cup>=1, found 0 red; and 1 blue",
        ),
        # positions: the second clause's object to the first's
        (LEFT, {"dog": of(0.5, box=HERE), "cat": of(0.5, box=RIGHT)}, ""),
        (LEFT, {"dog": of(0.5, box=RIGHT), "cat": of(0.5, box=HERE)}, FAR + "right of target"),
        (LEFT, {"dog": of(0.5, box=LOW), "cat": of(0.5, box=HERE)}, FAR + "below target"),
        (LEFT, {"dog": of(0.5, box=HERE), "cat": of(0.5, box=(40, 40, 50, 50))}, ""),  # left of and above
        (LEFT, {"dog": of(0.5, box=(40, 40, 50, 50)), "cat": of(0.5, box=HERE)}, FAR + "right of and below target"),
        (LEFT, {"dog": of(0.5), "cat": of(0.5)}, FAR + " target"),  # no relation at all
        (LEFT, {"dog": of(0.5)}, "expected cat>=1, found 0\nno target for dog to be left of"),
        (LEFT, {"cat": of(0.5)}, "expected dog>=1, found 0"),
        (
            LEFT,  # the surest of each class are held against each other
            {"dog": of(0.5, box=HERE) + of(0.9, box=RIGHT), "cat": of(0.5, box=RIGHT) + of(0.9, box=HERE)},
            FAR + "right of target",
        ),
        (
            asked(clause("cat", 2), clause("dog", position=["left of", 0])),  # left of both
            {"dog": of(0.5, box=RIGHT), "cat": of(0.5, box=HERE) + of(0.6, box=(90, 0, 99, 9))},
            FAR + "right of target",
        ),
        (
            asked(
                clause("cat", color="red"), clause("dog", position=["left of", 0])
            ),  # the target has the wrong colour
            {"dog": of(0.5, box=HERE), "cat": of(0.5, box=RIGHT, colour="blue")},
            "expected red cat>=1, found 0 red; and 1 blue\nno target for dog to be left of",
        ),
        (
            asked(clause("cat"), clause("dog", color="red", position=["left of", 0])),  # place is not looked at then
            {"dog": of(0.5, box=RIGHT, colour="blue"), "cat": of(0.5, box=HERE)},
            "expected red dog>=1, found 0 red; and 1 blue",
        ),
        (
            asked(clause("cat"), CUP, clause("dog", position=["left of", 1])),  # the second clause is the target
            {"dog": of(0.5, box=HERE), "cat": of(0.5, box=HERE), "cup": of(0.5, box=RIGHT)},
            "",
        ),
        (
            asked(clause("cat"), clause("dog", position=["left of", 0]), clause("cup", position=["above", 1])),
            {"dog": of(0.5, box=RIGHT), "cat": of(0.5, box=HERE), "cup": of(0.5)},
            FAR + "right of target\nno target for cup to be above",
        ),
        # exclude
        (
            {"tag": "single_object", "exclude": [clause("dog")], "prompt": ""},
            {"dog": of(0.5)},
            "expected dog<1, found 1",
        ),
        ({"tag": "single_object", "exclude": [clause("dog")], "prompt": ""}, {}, ""),
        (
            asked(CUP, exclude=[clause("dog"), clause("cat", 2)]),
            {"cup": of(0.5), "dog": of(0.5), "cat": of(0.5, 0.5)},
            "expected dog<1, found 1\nexpected cat<2, found 2",
        ),
    ],
)
def test_every_branch(metadata, detections, reason):
    assert judge(metadata, detections) == Verdict(not reason, reason)


def test_a_colour_is_found_only_when_it_decides():
    def never():
        raise AssertionError("nobody asked")

    dog = Found(0.5, HERE, never)
    assert judge(asked(clause("dog")), {"dog": [dog]}).correct
    assert not judge(asked(clause("dog", 2, color="red")), {"dog": [dog]}).correct  # too few, whatever their colour
    assert judge(asked(RED), {"cup": [Found(0.5, HERE, lambda: "red"), Found(0.4, HERE, never)]}).correct


def test_the_best_are_kept_best_first_and_no_more_than_so_many():
    scores = [0.31 + i / 100 for i in range(20)]
    kept = keep(asked(), {"dog": of(*scores), "cat": of(0.1)})
    assert [one.score for one in kept.pop("dog")] == sorted(scores, reverse=True)[:16]
    assert not kept
    assert len(keep(asked(), {"dog": of(*scores)}, Options(max_objects=3))["dog"]) == 3


def test_thresholds_can_be_chosen():
    low = Options(threshold=0.1, counting_threshold=0.2)
    assert judge(asked(clause("dog")), {"dog": of(0.11)}, low).correct
    assert not judge(exactly(1), {"dog": of(0.2)}, low).correct
    near = {"dog": of(0.5, box=(0, 0, 10, 10)), "cat": of(0.5, box=(8, 0, 18, 10))}
    assert judge(LEFT, near).correct  # of 8 pixels, 2 are taken off: 6 / 8 > 0.5
    assert not judge(LEFT, near, Options(position_threshold=0.2)).correct  # 4 / 8 is not
    assert judge(LEFT, near, Options(position_threshold=0.19)).correct


def test_overlap_counts_the_last_pixel_in():
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (0, 0, 9, 4)) == 0.5  # 10 x 5 of 10 x 10
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert overlap((0, 0, 9, 9), (9, 0, 18, 9)) == 10 / 190
    assert overlap((5, 5, 0, 0), (5, 5, 0, 0)) == 0  # no area at all


def test_what_overlaps_a_better_one_can_be_dropped():
    half = {"dog": of(0.5, box=(0, 0, 9, 9)) + of(0.9, box=(0, 0, 9, 4)) + of(0.4, box=(0, 5, 9, 9))}
    assert [one.score for one in keep(asked(), half)["dog"]] == [0.9, 0.5, 0.4]
    assert [one.score for one in keep(asked(), half, Options(max_overlap=0.5))["dog"]] == [0.9, 0.4]  # 0.5 or more
    assert [one.score for one in keep(asked(), half, Options(max_overlap=0.51))["dog"]] == [0.9, 0.5, 0.4]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 10, 10), set()),
        ((2, 0, 12, 10), set()),  # |2| - 0.1 (10 + 10) = 0
        ((4, 0, 14, 10), set()),  # (4 - 2) / 4 is not over 0.5
        ((5, 0, 15, 10), {"right of"}),  # 3 / 5
        ((-5, 0, 5, 10), {"left of"}),
        ((0, 5, 10, 15), {"below"}),
        ((0, -5, 10, 5), {"above"}),
        ((30, 30, 40, 40), {"right of", "below"}),  # 28 / 42.4
        ((30, 10, 40, 20), {"right of"}),  # 28 / 31.6 and 8 / 31.6
        ((10, -10, 20, 0), {"right of", "above"}),  # 8 / 14.1
        ((5, 5, 15, 15), set()),  # 3 / 7.07
    ],
)
def test_relations_by_hand(box, expected):
    assert relations(box, (0, 0, 10, 10)) == expected


def test_a_line_is_of_the_official_form():
    metadata = asked(clause("cat"))
    line = row("x/0000.png", metadata, {"cat": of(0.5, 0.1), "dog": of(0.9), "cup": of(0.2)})
    assert [*line] == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert (line["filename"], line["tag"], line["prompt"]) == ("x/0000.png", "two_object", "a photo")
    assert (line["correct"], line["reason"]) == (True, "")
    assert json.loads(line["metadata"]) == metadata
    assert json.loads(line["details"]) == {"cat": [[0, 0, 10, 10, 0.5]], "dog": [[0, 0, 10, 10, 0.9]]}


def lines(*entries):
    return [{"tag": tag, "metadata": f"{tag} {prompt}", "correct": correct} for tag, prompt, correct in entries]


def test_the_summary_is_the_mean_of_the_tags_not_of_the_images():
    made = summary(
        lines(
            ("counting", 1, True),
            ("counting", 1, False),
            ("counting", 2, False),
            ("counting", 2, False),
            ("colors", 1, True),
        )
    )
    assert made == {
        "images": 5,
        "prompts": 3,
        "correct_images": 2 / 5,
        "correct_prompts": 2 / 3,
        "counting": 1 / 4,
        "colors": 1.0,
        "overall": 0.625,
    }
    assert [*made][4:6] == ["counting", "colors"]


def test_a_summary_of_nothing_is_told():
    with pytest.raises(ValueError, match="GenEval's summary needs at least 1 judged image, got 0"):
        summary([])


CLASSES = ("dog", "cat")
RECORDS = {
    "two": {**asked(clause("dog"), clause("cat")), "prompt": "two"},
    "red": {**asked(clause("dog", color="red"), tag="colors"), "prompt": "red"},
    "blue": {**asked(clause("dog", color="blue"), tag="colors"), "prompt": "blue"},
}


def seen() -> Seen:
    dog, cat = [0, 0.75, 0, 0, 4, 4, COLOURS.index("red")], [1, 0.5, 2, 2, 5, 6, -1]
    rows = [[dog, cat], [dog], [dog, cat], [dog, cat], []]
    made = torch.stack([padded(torch.tensor(r).view(-1, 7)) for r in rows])
    return Seen(["two", "two", "red", "blue", "two"], {"k": made})


@pytest.fixture
def verdicts():
    return Verdicts("mine", "k", RECORDS, CLASSES)


def test_a_row_gives_back_its_objects():
    dog, cat = Found(0.75, (0, 0, 4, 4), "red"), Found(0.5, (2, 2, 5, 6), None)
    assert found(seen().rows["k"][0], CLASSES) == {"dog": [dog], "cat": [cat]}
    assert found(seen().rows["k"][4], CLASSES) == {}
    assert padded(torch.zeros(MOST, 7)).shape == (MOST, 7)


def test_values_by_hand(verdicts):
    assert verdicts.compute(seen()) == {"mine": (1 / 3 + 1 / 2) / 2, "mine_two_object": 1 / 3, "mine_colors": 1 / 2}
    made = verdicts.per_image(seen())
    assert made["mine_two_object"].nan_to_num(-1).tolist() == [1, 0, -1, -1, 0]
    assert made["mine_colors"].nan_to_num(-1).tolist() == [-1, -1, 1, 0, -1]
    assert [v.reason for v in verdicts.of(seen())][1] == "expected cat>=1, found 0"


def test_values_are_the_official_summary_s(verdicts):
    names = [f"{i:05}/samples/0000.png" for i in range(5)]
    made = verdicts.lines(seen(), names)
    assert [line["filename"] for line in made] == names
    official = summary(made)
    computed = verdicts.compute(seen())
    assert computed["mine"] == official["overall"]
    assert {tag: computed[f"mine_{tag}"] for tag in TAGS if f"mine_{tag}" in computed} == {
        tag: official[tag] for tag in ("two_object", "colors")
    }


def test_order_does_not_matter_and_images_may_come_twice(verdicts):
    every = seen()
    assert verdicts.compute(every.take([4, 2, 0, 3, 1])) == verdicts.compute(every)
    assert verdicts.compute(every.take([0, 0, 0, 1])) == {"mine": 0.75, "mine_two_object": 0.75}


def test_no_images_are_told(verdicts):
    with pytest.raises(ValueError, match="mine needs at least 1 image, got 0"):
        verdicts.compute(seen().take([]))


def test_names_of_values():
    assert values("mine") == ("mine", *(f"mine_{tag}" for tag in TAGS))
