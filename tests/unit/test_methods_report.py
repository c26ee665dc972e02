"""The comparison of methods as tables and as a chart, from made-up rows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from fastgen.evaluation import chart, methods_report, report

PROTOCOL = {"num_images": 1000, "seeds": "one each", "dtype": "fp32", "device": "cpu", "commit": "ab" * 20}


def course(images: int, seconds: float, *fids: float) -> list[dict[str, float]]:
    """Quick evaluations evenly spaced up to these totals."""
    count = len(fids)
    return [
        {"step": i, "images_seen": images * i / count, "train_seconds": seconds * i / count, "fid": fid}
        for i, fid in enumerate(fids, 1)
    ]


def row(name: str, role: str, steps: int | None, fid: float | None, **more: object) -> dict[str, object]:
    values = {"clip_score": 70.0, "retrieval": 0.5, "diversity": 0.25, "seconds_per_image": 0.1}
    about = dict.fromkeys(("method", "config", "trained_steps", "curve", "pairs"))
    base = {"name": name, "role": role, "steps": steps, "guidance_scale": 2.5, "fid": fid, "network_evaluations": 1}
    return {**about, **base, **values, "protocol": PROTOCOL, **more}


def cost(iterations: int, images: int, seconds: float, memory: float | None) -> dict[str, object]:
    totals = {"iterations": iterations, "images_seen": images, "train_seconds": seconds}
    return totals | {"peak_memory_mb": memory}


def rows() -> list[dict[str, object]]:
    dmd2 = {"config": "emoji/dmd2", "trained_steps": 1, **cost(900, 28800, 1200.0, 1500.0)}
    lcm = {"config": "emoji/lcm", "trained_steps": 4, **cost(1700, 54400, 1000.0, 1100.4)}
    agd = {"config": "emoji/agd", "trained_steps": None, **cost(3000, 12000, 1100.0, 1000.0)}
    pairs = {"number": 16384, "num_steps": 20, "guidance_scale": 2.5}
    return [
        row("real images", "data", None, 2.0),
        row("teacher, 50 steps", "teacher", 50, 8.84, network_evaluations=100.0),
        row("teacher, 4 steps", "teacher", 4, 10.54, network_evaluations=8.0),
        row("teacher, 1 step", "teacher", 1, 33.8, network_evaluations=2.0),
        row("agd", "student", 50, 8.9, curve=course(12000, 1100, 9.0), **agd, network_evaluations=50.0),
        row("agd, 8 steps", "student", 8, 10.6, **agd, network_evaluations=8.0),
        row("agd, 4 steps", "student", 4, 10.55, **agd, network_evaluations=4.0),
        row("agd, 2 steps", "student", 2, 13.0, **agd, network_evaluations=2.0),
        row("dmd2, 1 step", "student", 1, 9.67, curve=course(28800, 1200, 14, 12, 11.1), **dmd2, pairs=pairs),
        row("lcm, 4 steps", "student", 4, 10.54, curve=course(54400, 1000, 30, 20, 15, 12), **lcm),
        row("lcm, 1 step", "student", 1, 40.0, **lcm),
    ]


def section(text: str, heading: str) -> list[str]:
    """The lines of a section's table, from its head on."""
    part = re.split(r"^### ", text, flags=re.M)
    [found] = [p for p in part if p.startswith(f"{heading}\n")]
    return [line for line in found.splitlines() if line.startswith("|")]


@pytest.fixture
def text() -> str:
    return methods_report.tables(rows(), "results.svg")


def test_each_number_of_steps_has_a_table_with_its_teacher(text: str) -> None:
    headings = re.findall(r"^### (.*)$", text, re.M)
    assert headings == [
        "1 step",
        "4 steps",
        *(f"{n} network evaluations" for n in (2, 4, 8, 50)),
        "The same budget",
        "Cost",
    ]
    one = section(text, "1 step")
    assert one[0] == (
        "| | Made for | Guidance | FID ↓ | CLIP score ↑ | Retrieval ↑ | Diversity | Seconds per image ↓ | "
        "Network evaluations ↓ |"
    )
    names = [line.split("|")[1].strip() for line in one[2:]]
    assert names == ["real images", "teacher, 50 steps", "teacher, 1 step", "dmd2", "lcm †"]
    assert [line.split("|")[1].strip() for line in section(text, "4 steps")[2:]] == [
        "real images",
        "teacher, 50 steps",
        "teacher, 4 steps",
        "lcm",
    ]


def test_students_sampled_as_their_teacher_stand_with_it_at_as_many_network_evaluations(text: str) -> None:
    found = {
        n: [line.split("|")[1].strip() for line in section(text, f"{n} network evaluations")[2:]] for n in (2, 8, 50)
    }
    above = ["real images", "teacher, 50 steps"]
    assert found == {
        2: [*above, "teacher, 1 step", "agd"],
        8: [*above, "teacher, 4 steps", "agd †"],
        50: [*above, "agd"],
    }
    assert section(text, "2 network evaluations")[0].startswith("| | Steps | Guidance | FID ↓ |")


def test_without_network_evaluations_all_are_compared_by_steps() -> None:
    found = [r | {"network_evaluations": None} for r in rows()]
    headings = re.findall(r"^### (.*)$", methods_report.tables(found, ""), re.M)
    assert headings[:5] == ["1 step", "2 steps", "4 steps", "8 steps", "50 steps"]
    worse = {r["name"] for r in found if methods_report.worse_than_teacher(r, found)}
    assert worse == {"agd", "agd, 4 steps", "lcm, 1 step"}


def test_the_best_of_a_table_is_bold_the_teacher_s_most_steps_aside(text: str) -> None:
    fid = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in section(text, "1 step")[2:]}
    assert fid["teacher, 50 steps"] == "8.84"
    assert fid["dmd2"] == "**9.67**"
    assert fid["real images"] == "2.00"
    made_for = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in section(text, "1 step")[2:]}
    assert made_for == {
        "real images": "–",
        "teacher, 50 steps": "–",
        "teacher, 1 step": "–",
        "dmd2": "1 step",
        "lcm †": "4 steps",
    }


def test_a_student_worse_than_its_teacher_is_marked() -> None:
    found = rows()
    worse = {r["name"] for r in found if methods_report.worse_than_teacher(r, found)}
    assert worse == {"agd, 8 steps", "lcm, 1 step"}, "not one that is as good"
    assert "† A larger FID than the undistilled teacher's in the same table." in methods_report.tables(found, "")
    good = [r for r in found if r["name"] not in worse]
    assert methods_report.WORSE not in methods_report.tables(good, "")
    nothing = [r | {"fid": None} for r in found]
    assert not any(methods_report.worse_than_teacher(r, nothing) for r in nothing)


def test_the_same_budget_takes_the_last_measurement_not_after_it(text: str) -> None:
    """28,800 images and 1,000 s are the smallest totals of the students of few steps."""
    assert section(text, "The same budget") == [
        "| | FID at 28,800 images ↓ | taken at images | FID at 1,000 s of training ↓ | taken at s |",
        "|---|---:|---:|---:|---:|",
        "| dmd2, 1 step | **11.10** | 28,800 | **12.00** | 800 |",
        "| lcm, 4 steps | 20.00 | 27,200 | **12.00** | 1,000 |",
    ]
    assert "![FID over images seen and over seconds of training](results.svg)" in text


def test_nothing_was_measured_before_the_first_quick_evaluation() -> None:
    found = course(100, 10, 5.0, 4.0)
    assert methods_report.last_before(found, "images_seen", 49) is None
    assert methods_report.last_before(found, "images_seen", 50)["fid"] == 5.0
    assert methods_report.last_before(found, "train_seconds", 9.9)["fid"] == 5.0
    assert methods_report.last_before(found, "train_seconds", 11)["fid"] == 4.0


def test_the_cost_of_each_run_is_told_once(text: str) -> None:
    assert section(text, "Cost") == [
        "| | Made for | Iterations | Seconds per iteration | Seconds of training | Images seen | Peak memory, MB ↓ |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| agd | – | 3,000 | 0.367 | 1,100 | 12,000 | **1,000** |",
        "| dmd2 | 1 step | 900 | 1.33 | 1,200 | 28,800 | 1,500 |",
        "| lcm | 4 steps | 1,700 | 0.588 | 1,000 | 54,400 | 1,100 |",
    ]
    assert text.endswith("dmd2: and before it 16,384 pairs of 20 guided steps of the teacher each.")


def test_runs_without_quick_evaluations_are_not_compared_on_the_way() -> None:
    found = [r | {"curve": [] if r["curve"] else None} for r in rows()]
    text = methods_report.tables(found, "")
    assert "The same budget" not in text
    assert "### Cost" in text
    assert methods_report.chart(found) == ""
    teachers = [r for r in found if r["role"] != "student"]
    assert methods_report.tables(teachers, "").startswith("Made for")


def test_the_protocol_names_every_commit() -> None:
    found = rows()
    assert f"commit {'ab' * 6}." in methods_report.tables(found, "")
    found[-1]["protocol"] = PROTOCOL | {"commit": "cd" * 20 + "-dirty"}
    assert f"commits {'ab' * 6}, {'cd' * 6}-dirty." in methods_report.tables(found, "")


def test_the_chart_has_a_line_for_each_student_of_few_steps_in_both_panels() -> None:
    svg = methods_report.chart(rows())
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{space}g")
    assert len(panels) == 2
    for panel, axis in zip(panels, ("images", "s of training"), strict=True):
        lines = [p for p in panel.findall(f"{space}path") if p.get("class") == "series"]
        assert len(lines) == 2
        hints = [c.findtext(f"{space}title") for c in panel.findall(f"{space}circle")]
        assert len(hints) == 3 + 4
        assert all(hint.endswith(axis) for hint in hints)
        for line in lines:
            for x, y in (pair.split() for pair in line.get("d")[1:].split("L")):
                assert chart.LEFT - 0.1 <= float(x) <= chart.WIDTH - chart.RIGHT + 0.1
                assert chart.TOP - 0.1 <= float(y) <= chart.HEIGHT - chart.BOTTOM + 0.1
    assert [t.text for t in root.findall(f"{space}text")] == ["dmd2, 1 step", "lcm, 4 steps"]
    assert "dmd2, 1 step: 11.1 at 28800 images" in svg


def test_lines_of_a_chart_differ_by_colour_and_then_by_dash() -> None:
    series = {f"m{i}": [(0.0, 1.0), (1.0, i + 1.0)] for i in range(16)}
    svg = chart.chart_file({"x": series}, "y")
    legend = re.findall(r'<path class="series" (stroke="[^"]*"(?: stroke-dasharray="[^"]*")?) d="M\d+ [\d.]+h22"', svg)
    assert len(set(legend)) == len(legend) == 16
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1])
    assert max(float(y) for y in re.findall(r'<text x="\d+" y="([\d.]+)">m', svg)) < height


def test_the_page_of_a_comparison_names_its_best_student(tmp_path: object) -> None:
    found = rows()
    assert "The best student, agd, reaches FID 8.90 in 50 steps" in report.verdict(found)
    assert "The student reaches FID 10.54 in 4 steps" in report.verdict(
        [r for r in found if str(r["name"]).startswith(("lcm", "teacher"))]
    )
