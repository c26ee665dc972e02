"""Curves of runs as a PNG: which charts there are, and that each line lies where its values are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from fastgen import health
from fastgen.evaluation import curves
from tests.command import done, fastgen


def run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def one(tmp_path: Path) -> Path:
    rows = [
        {
            "step": n,
            "student/dmd": 1.0 / n,
            "student/net.grad_norm": 10.0**n,
            "health/clipped": -0.1 * n,
            "seconds_per_step": 1,
        }
        for n in range(1, 7)
    ]
    return run(tmp_path / "one", [*rows, {"step": 8, "fid": 12.0, "student/dmd": None}])


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or [] if isinstance(colour, tuple)}


def test_values_stand_in_groups_and_the_machine_s_only_where_asked_for(one: Path) -> None:
    assert curves.HEALTH == health.PREFIX
    found = curves.read([one])
    assert [(curves.group(name), name) for name in found] == [
        ("Quick evaluations", "fid"),
        ("Losses", "student/dmd"),
        ("Gradient norms", "student/net.grad_norm"),
        ("Health", "health/clipped"),
    ]
    assert found["fid"] == {"one": [(8.0, 12.0)]}
    assert len(found["student/dmd"]["one"]) == 6  # without what was not finite
    assert list(curves.read([one], ["seconds_*", "student/*"])) == [
        "student/dmd",
        "student/net.grad_norm",
        "seconds_per_step",
    ]


def test_what_is_not_there_is_an_error_that_says_what_is(one: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--metrics 'kid': no run has it; there are fid, student/dmd, "):
        curves.read([one], ["kid"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: is no run folder: it holds no metrics.jsonl"):
        curves.read([one, tmp_path / "none"])
    with pytest.raises(ValueError, match="new: has no rows yet"):
        curves.read([run(tmp_path / "new", [])])


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "a" / "demo", tmp_path / "b" / "demo"
    assert curves.short_names([a]) == ["demo"]
    assert curves.short_names([a, tmp_path / "c"]) == ["demo", "c"]
    assert curves.short_names([a, b]) == ["a/demo", "b/demo"]
    assert curves.short_names([a, a]) == [f"{a} (1)", f"{a} (2)"]


def test_each_run_has_its_colour(tmp_path: Path, one: Path) -> None:
    two = run(tmp_path / "two", [{"step": n, "student/dmd": 0.5 * n} for n in range(1, 5)])
    inks = [ImageColor.getrgb(curves.colour(number)) for number in range(3)]
    alone = colours(curves.picture(curves.read([one]), "one"))
    both = colours(curves.picture(curves.read([one, two]), "two runs"))
    assert [ink in alone for ink in inks] == [True, False, False]
    assert [ink in both for ink in inks] == [True, True, False]
    assert len({curves.colour(number) for number in range(14)}) == 14


def rows_of(image: Image.Image, ink: str) -> tuple[float, float]:
    """Mean height of the ink in the left and in the right third of where it is, 0 on top."""
    pixels, wanted = image.convert("RGB").load(), ImageColor.getrgb(ink)
    assert pixels is not None
    found = [(x, y) for x in range(image.width) for y in range(image.height) if pixels[x, y] == wanted]
    low, high = min(x for x, _ in found), max(x for x, _ in found)
    left = [y for x, y in found if x < low + (high - low) / 3]
    right = [y for x, y in found if x > high - (high - low) / 3]
    return sum(left) / len(left), sum(right) / len(right)


@pytest.mark.parametrize(("values", "rises"), [([1.0, 2.0, 3.0], True), ([3.0, 2.0, 1.0], False)])
def test_a_line_rises_as_its_values_do(tmp_path: Path, values: list[float], rises: bool) -> None:
    folder = run(tmp_path / "run", [{"step": n, "a/b": v} for n, v in enumerate(values, 1)])
    left, right = rows_of(curves.picture(curves.read([folder]), ""), curves.colour(0))
    assert (right < left) == rises


def test_many_rows_are_smoothed_over_a_faint_line_unless_told_otherwise(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [{"step": n, "a/b": 1.0 + n % 2} for n in range(100)])
    found, faint = curves.read([folder]), ImageColor.getrgb(curves.paler(curves.colour(0), 0.28))
    assert faint in colours(curves.picture(found, ""))
    assert faint not in colours(curves.picture(found, "", 0))
    few = curves.read([run(tmp_path / "few", [{"step": n, "a/b": 1.0 + n % 2} for n in range(9)])])
    assert faint not in colours(curves.picture(few, ""))
    assert faint in colours(curves.picture(few, "", 2))


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [0.0, 0.0], [-1.0, 1e9], [1e-12, 1e12]])
def test_any_numbers_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    folder = run(tmp_path / "run", [{"step": n, "a/b": v} for n, v in enumerate(values)])
    assert ImageColor.getrgb(curves.colour(0)) in colours(curves.picture(curves.read([folder]), ""))


def test_long_names_stay_in_their_chart_and_legend() -> None:
    text = curves.fit("student/" + "a_very_long_name_" * 9, 13, 200)
    assert "…" in text
    assert text.startswith("student/")
    assert curves.fit("fid", 13, 200) == "fid"
    names = ["a" * 30] * 5
    at = curves.placed(names, 500)
    assert [line for _, line in at] == sorted(line for _, line in at)
    assert at[0] == (0, 0)
    assert at[-1][1] > 0


def test_the_command_writes_a_png(tmp_path: Path, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert done("plot", one).out == f"{one / 'plot.png'}\n"
    monkeypatch.chdir(tmp_path)
    two = run(tmp_path / "two", [{"step": 1, "student/dmd": 1.0}])
    assert done("plot", one, two).out == "plot.png\n"
    done("plot", one, "--out", tmp_path / "new" / "c.png", "--metrics", "fid, student/*", "--smooth", "3")
    with Image.open(tmp_path / "new" / "c.png") as shown, Image.open(one / "plot.png") as all_of_it:
        assert shown.format == "PNG"
        assert shown.height < all_of_it.height
    assert not [path for path in tmp_path.rglob(".*")]
    result = fastgen("plot", tmp_path / "none")
    assert (result.code, result.err) == (
        2,
        f"fastgen: {tmp_path / 'none'}: is no run folder: it holds no metrics.jsonl; `fastgen runs` lists runs\n",
    )
