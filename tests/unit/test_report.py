"""The results as tables and as a page that carries everything in itself."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastgen.evaluation import chart, columns, protocol, report
from fastgen.evaluation import pictures as pages
from tests.reports import FOLDERS, NAMES, PROMPTS, made_up_rows, made_up_run


class Page(HTMLParser):
    """Tags with their attributes, and whether they nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run):
    return report.write_report(run).read_text()


def test_page_is_whole_and_asks_for_nothing(page):
    tags = Page(page)
    assert not {name for name, _ in tags.tags} & {"iframe", "object", "base"}
    assert tags.all("script") == [{}]
    assert tags.all("link") == [{"rel": "icon", "href": "data:,"}]
    for _, attrs in tags.tags:
        for name in {"src", "href", "srcset", "data", "poster"} & attrs.keys():
            assert attrs[name].startswith(("data:image/png;base64,", "data:image/webp;base64,", "data:,", "#"))
    assert not re.search(r"@import|url\(", page)
    assert "http" not in page.replace("https://arxiv.org", "", 1).replace("http-equiv", "")  # the config's own comment


def test_page_carries_each_picture_unchanged(page, run):
    pictures = {attrs["alt"]: attrs for attrs in Page(page).all("img")}
    assert len([name for name in pictures if not name.startswith("samples")]) == len(NAMES) * len(PROMPTS)
    assert len(pictures) == len(NAMES) * len(PROMPTS) + report.GRIDS
    for name, folder in zip(NAMES, FOLDERS, strict=True):
        for i, prompt in enumerate(PROMPTS):
            shown = pictures[f"{name}: {prompt}"]
            data = base64.b64decode(shown["src"].split(",")[1])
            with Image.open(io.BytesIO(data)) as got, Image.open(run / "comparison" / folder / f"{i}.png") as want:
                np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
            assert (shown["class"], shown["width"]) == ("pixels", "128")
    heads = re.findall(r'<th scope="col" class="(\w+)">(.*?)</th>', page)
    assert [name for _, name in heads] == [NAMES[i] for i in (0, 1, 4, 2, 3)]  # teacher and student side by side
    assert ".pixels { image-rendering: pixelated; }" in page
    assert {"samples at step 100", "samples at step 900"} <= pictures.keys()


def test_page_shows_the_table_with_the_best_emphasised(page):
    rows = re.findall(r'<tr class="(\w+)"><th scope="row">(.*?)</th>(.*?)</tr>', page)
    assert [(role, name) for role, name, _ in rows] == [(r["role"], r["name"]) for r in made_up_rows()]
    cells = [re.findall(r"<td>(.*?)</td>", line) for *_, line in rows]
    assert cells[0] == ["–", "–", "1.20", "31.4", "96.2%", "–", "–"]
    assert cells[1] == ["50", "4", "<strong>6.32</strong>", "30.2", "87.1%", "1.93", "100"]
    best = ["1", "1", "7.75", *(f"<strong>{v}</strong>" for v in ("30.3", "88.4%", "0.0337", "1"))]
    assert cells[4] == best


def test_page_says_what_came_out(page):
    said = re.search(r'<p class="verdict">(.*?)</p>', page)[1]
    assert said == (
        "The student reaches FID 7.75 in 1 step; the teacher 6.32 in 50 steps and 164.80 in 1 step. "
        "An image takes 0.034 s instead of 1.9 s: 57 times faster."
    )


def test_page_has_curves_with_labelled_axes(page):
    page = page[page.index('id="training"') :]
    svgs = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(svgs) == 7  # fid, clip_score, retrieval and four terms; not seconds_per_step
    for svg in svgs:
        assert ">training step</text>" in svg
    names = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert names[:7] == [
        "CLIP score ↑",
        "FID ↓",
        "Retrieval ↑",
        "critic: denoising",
        "student: dmd",
        "critic: fake score grad norm",
        "student: student grad norm",
    ]
    fid, grad_norm = svgs[1], svgs[5]
    assert fid.count("<circle") == 9
    assert "<title>training step 100: " in fid
    assert "log scale" in grad_norm
    assert "log scale" not in svgs[0]


def test_page_shows_protocol_and_config_escaped(page):
    assert "<h3>FID</h3><dl><dt>extractor</dt><dd>CLIP clip</dd>" in page
    assert "<h3>Versions</h3><dl><dt>python</dt><dd>3.11.9</dd>" in page
    assert f'<code title="{"3f" * 32}">3f3f3f3f3f3f…</code>' in page
    assert '<code title="' + "a1b2c3d4" * 5 + '-dirty">a1b2c3d4a1b2…-dirty</code>' in page
    assert re.search(r'<th scope="row">scheduler</th><td></td>(<td>DDIMScheduler</td>){3}<td>LCMScheduler</td>', page)
    assert "# &lt;see&gt;" in page
    assert "a &lt;b&gt;blue&lt;/b&gt; heart" in page
    assert "<b>" not in page


def test_parts_that_are_not_there_are_left_out(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(made_up_rows()[:2]))
    text = report.write_report(tmp_path).read_text()
    Page(text)
    assert re.findall(r'<section id="(\w+)">', text) == ["results", "protocol"]
    assert 'class="verdict"' not in text
    (tmp_path / "results.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "student/dmd": 1.0}\n{"step": 2, "student/dmd": NaN}\n')
    text = report.write_report(tmp_path).read_text()
    assert re.findall(r'<section id="(\w+)">', text) == ["training"]


def test_large_pictures_are_scaled_down(tmp_path):
    Image.new("RGB", (1024, 512), (200, 10, 10)).save(tmp_path / "x.png")
    [shown] = Page(report.inline(tmp_path / "x.png", 'a "quoted" word', 256)).all("img")
    assert (shown["width"], shown["height"], shown["alt"]) == ("256", "128", 'a "quoted" word')
    assert "class" not in shown


def test_unusable_folders(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither results\.json nor metrics\.jsonl; `fastgen evaluate"):
        report.write_report(tmp_path)
    (tmp_path / "results.json").write_text('[{"name": "x"}]')
    with pytest.raises(ValueError, match=r"results\.json: not a list of results \('role'\)"):
        report.write_report(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(made_up_rows()))
    (tmp_path / "comparison").mkdir()
    listed = tmp_path / "comparison" / "prompts.json"
    listed.write_text('{"prompts": ["a"]}')
    with pytest.raises(ValueError, match=r"prompts\.json: damaged \('subjects'\)"):
        report.write_report(tmp_path)
    listed.write_text('{"prompts": ["a"], "subjects": [{"name": "x", "role": "data", "folder": "x"}]}')
    (tmp_path / "comparison" / "x").mkdir()
    (tmp_path / "comparison" / "x" / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"0\.png: not a readable image"):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_markdown_table():
    rows = [made_up_rows()[i] for i in (0, 1, 4)]
    rows[1] |= {"name": "a|b", "retrieval": None}
    assert report.markdown_table(rows).splitlines() == [
        "| | Steps | Guidance | FID ↓ | CLIP score ↑ | Retrieval ↑ | Seconds per image ↓ | Network evaluations ↓ |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| real images | – | – | 1.20 | 31.4 | 96.2% | – | – |",
        "| a\\|b | 50 | 4 | **6.32** | 30.2 | – | 1.93 | 100 |",
        "| dmd2, 1 step | 1 | 1 | 7.75 | **30.3** | 88.4% | **0.0337** | **1** |",
    ]
    assert "CLIP" not in report.markdown_table([row | {"clip_score": None} for row in rows])


def test_values_that_look_the_same_are_both_best():
    rows = [{"name": n, "role": "teacher", "fid": v} for n, v in (("a", 1.2341), ("b", 1.2342), ("c", 2.0))]
    assert report.best(rows, report.COLUMNS[2]) == {0, 1}


def test_printed_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    report.print_table(made_up_rows())
    lines = capsys.readouterr().out.splitlines()
    [student] = [line for line in lines if "dmd2" in line]
    assert student.split() == ["dmd2,", "1", "step", "1", "1", "7.75", "30.3", "88.4%", "0.0337", "1"]


# Charts


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (10, 900, [200, 400, 600, 800]), (0.31, 0.34, [0.31, 0.32, 0.33, 0.34])],
)
def test_linear_ticks(low, high, want):
    assert chart.linear_ticks(low, high) == pytest.approx(want)


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [(0.5, 2e3, [1, 10, 100, 1000]), (9, 180, [10, 30, 100]), (1e-9, 1e9, [10.0**p for p in range(-9, 10, 4)])],
)
def test_log_ticks(low, high, want):
    assert chart.log_ticks(low, high) == pytest.approx(want)


@pytest.mark.parametrize(
    "points", [[(1, 5.0)], [(1, 0.0), (2, 0.0)], [(0, 1e-6), (1, 1.0)], [(i, math.sin(i)) for i in range(5000)]]
)
def test_lines_stay_within_the_frame(points):
    svg = chart.line_chart(points, "x", "y")
    lines = re.findall(r'class="(?:line|raw)" d="M(.*?)"', svg)
    for x, y in (pair.split() for line in lines for pair in line.split("L")):
        assert chart.LEFT - 0.1 <= float(x) <= chart.WIDTH - chart.RIGHT + 0.1
        assert chart.TOP - 0.1 <= float(y) <= chart.HEIGHT - chart.BOTTOM + 0.1
    assert len(svg) < 40_000


def test_axis_places_values():
    linear, log = chart.Axis([0, 10], log=False), chart.Axis([1, 100], log=True)
    assert [linear.place(v) for v in (0, 2.5, 10)] == [0, 0.25, 1]
    assert [log.place(v) for v in (1, 10, 100)] == [0, 0.5, 1]


def test_thinning_and_smoothing_keep_means():
    points = [(i, float(i % 2)) for i in range(100)]
    assert chart.thinned(points, 50) == [(i, 0.5) for i in range(1, 100, 2)]
    assert len(chart.thinned(points, 30)) == 25
    straight = [(i, 3.0 * i) for i in range(20)]
    assert chart.smoothed(straight, 4)[4:-4] == straight[4:-4]
    assert chart.smoothed([(0, 0.0), (1, 3.0), (2, 0.0)], 1) == [(0, 1.5), (1, 1.0), (2, 1.5)]


@pytest.mark.parametrize(
    ("value", "want"),
    [(20000, "20k"), (1500, "1.5k"), (1234, "1234"), (2e6, "2M"), (0, "0"), (1e-4, "1e-4"), (0.2, "0.2")],
)
def test_short_numbers(value, want):
    assert chart.short(value) == want


def test_a_table_goes_to_its_place_in_a_document_and_replaces_the_old_one(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("# Title\n\n<!-- demo -->\nold\n<!-- /demo -->\n\nthe rest\n")
    for _ in range(2):
        report.insert(made_up_rows(), document, "demo")
        text = document.read_text()
        assert text.startswith("# Title\n\n<!-- demo -->\n\n| |")
        assert text.endswith("<!-- /demo -->\n\nthe rest\n")
        assert "old" not in text
        assert text.count("| dmd2, 1 step |") == 1
        assert "1000 images a row" in text


@pytest.mark.parametrize("text", ["", "<!-- demo -->", "<!-- /demo --> <!-- demo -->"])
def test_a_document_without_a_place_is_left_alone(tmp_path, text):
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(ValueError, match="has no place for the results; write <!-- demo -->"):
        report.insert(made_up_rows(), document, "demo")
    assert document.read_text() == text


def test_nothing_of_the_rows_is_markup_in_a_document(tmp_path):
    document, rows = tmp_path / "README.md", [dict(row) for row in made_up_rows()]
    bad = "<!-- /demo --> <script>x</script> **a** | [b](c)"
    for row in rows[1:]:
        row["name"] += f", {bad}"
        row["protocol"] = row["protocol"] | {"device": bad, "commit": bad}
    document.write_text("<!-- demo -->\n<!-- /demo -->\nafter")
    for _ in range(2):
        report.insert(rows, document, "demo")
        text = document.read_text()
        assert text.endswith("<!-- /demo -->\nafter")
        assert "<script>" not in text
        assert "**a**" not in text
        assert "[b]" not in text
        assert text.count("&lt;script>") == len(rows)


def test_rows_that_do_not_compare_get_no_place_in_a_document(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("<!-- demo -->\n<!-- /demo -->\n")
    rows = of_pipelines()
    rows[4]["protocol"]["dtype"] = "bf16"
    with pytest.raises(ValueError, match="rows 'teacher, 50 steps' and 'dmd2, 1 step' differ in dtype: fp32; bf16"):
        report.insert(rows, document, "demo")
    assert document.read_text() == "<!-- demo -->\n<!-- /demo -->\n"


def test_the_picture_shows_each_subject_and_prompt(tmp_path):
    def shade(subject, prompt):
        return np.full((32, 32, 3), 40 * subject + 10 * prompt, np.uint8)

    run = tmp_path / "run"
    run.mkdir()
    made_up_run(run, shade)
    report.picture(run, tmp_path / "out.png", side=64)
    with Image.open(tmp_path / "out.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))
    for j in range(len(FOLDERS)):
        for i in range(len(PROMPTS)):
            assert (pixels[46 + j * 68 + 32, 150 + i * 68 + 32] == 40 * j + 10 * i).all()


def test_no_picture_without_a_comparison(tmp_path):
    with pytest.raises(ValueError, match="has no comparison; `fastgen evaluate"):
        report.picture(tmp_path, tmp_path / "out.png")


# Protocols


def changed(row, *names, to):
    """The row with another value at a place of its protocol."""
    row = json.loads(json.dumps(row))
    *above, last = names
    place = row["protocol"]
    for name in above:
        place = place[name]
    place[last] = to
    return row


def of_pipelines():
    """Rows with a seed, prompts and dtype, as the runner's have, and real images without."""
    rows = made_up_rows()
    for row in rows[1:]:
        row["protocol"] |= {"prompts": "ab" * 32, "dtype": "fp32"}
    return rows


MUST_AGREE = {
    "fid extractor": ("metrics", "fid", "extractor"),
    "fid sha256": ("metrics", "fid", "sha256"),
    "fid resize resample": ("metrics", "fid", "resize", "resample"),
    "fid reference sha256": ("metrics", "fid", "reference", "sha256"),
    "fid reference num_images": ("metrics", "fid", "reference", "num_images"),
    "clip_score candidates": ("metrics", "clip_score", "candidates"),
    "num_images": ("num_images",),
    "prompts": ("prompts",),
    "seed": ("seed",),
    "dtype": ("dtype",),
    "device": ("device",),
}


@pytest.mark.parametrize("told", MUST_AGREE)
def test_rows_of_other_protocols_are_not_put_in_one_table(told):
    rows = of_pipelines()
    rows[4] = changed(rows[4], *MUST_AGREE[told], to="other")
    groups = protocol.tables(rows)
    assert [[row["name"] for row in group if row["role"] != "data"] for group in groups] == [
        list(NAMES[1:4]),
        [NAMES[4]],
    ]
    with pytest.raises(
        ValueError, match=rf"rows '.*' and 'dmd2, 1 step' differ in {told}: .*; other; their values do"
    ):
        protocol.joined(rows)
    assert protocol.joined(rows[:4]) == rows[:4]


@pytest.mark.parametrize(
    "name", ["scheduler", "steps", "guidance_scale", "weights", "commit", "versions", "processes"]
)
def test_what_is_the_subject_s_own_may_differ_in_a_table(name):
    rows = of_pipelines()
    rows[4]["protocol"][name] = "other"
    assert protocol.tables(rows) == [rows]
    assert protocol.joined(rows) == rows


def test_machines_must_agree_for_times_alone():
    rows = [row | {"seconds_per_image": None} for row in of_pipelines()]
    rows[4]["protocol"]["device"] = "cuda (NVIDIA H100)"
    rows[4]["protocol"]["metrics"] = rows[4]["protocol"]["metrics"] | {"latency": {"repeats": 3}}
    rows[1]["protocol"]["metrics"] = rows[1]["protocol"]["metrics"] | {"latency": {"repeats": 5}}
    assert len(protocol.tables(rows)) == 1
    for i in (1, 4):
        rows[i]["seconds_per_image"] = 1.0
    assert protocol.differences(rows[1], rows[4]) == {
        "device": ("cpu (x86_64, 2 threads)", "cuda (NVIDIA H100)"),
        "latency repeats": (5, 3),
    }


def test_real_images_stand_in_every_table_that_they_fit():
    rows = of_pipelines()
    rows[4]["protocol"]["seed"] = 1  # real images have none
    first, second = protocol.tables(rows)
    assert first[0] is second[0] is rows[0]
    rows[0]["protocol"]["num_images"] = 10
    assert [[row["name"] for row in group] for group in protocol.tables(rows)] == [
        list(NAMES[1:4]),
        [NAMES[4]],
        [NAMES[0]],
    ]
    assert protocol.tables(rows[:1]) == [rows[:1]]
    assert protocol.tables([]) == []


def test_real_images_have_counts_of_their_own_draw():
    one, other = of_pipelines()[0], of_pipelines()[4]
    for row, pairs in ((one, 30), (other, 28)):
        row["protocol"]["metrics"] = row["protocol"]["metrics"] | {"diversity": {"pairs": pairs, "num_images": pairs}}
    assert protocol.differences(one, other) == {}
    assert protocol.differences(one | {"role": "student"}, other).keys() == {"diversity pairs", "diversity num_images"}


def test_the_report_shows_a_table_for_each_protocol_and_says_why(tmp_path, capsys, monkeypatch):
    rows = of_pipelines()
    rows[4] = changed(rows[4], "metrics", "fid", "resize", "resample", to=2)
    (tmp_path / "results.json").write_text(json.dumps(rows))
    text = report.write_report(tmp_path).read_text()
    results = text[text.index('id="results"') : text.index('id="protocol"')]
    assert results.count("<table") == 2
    why = "The first two differ in fid resize resample: 3; 2."
    assert why in re.search(r'<p class="separate">(.*?)</p>', text)[1]
    assert why.replace("_", "\\_") in (tmp_path / "report.md").read_text()
    monkeypatch.setenv("COLUMNS", "140")
    report.print_table(rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert why in printed
    assert printed.count("Steps") == 2


# Columns and intervals


def test_columns_come_from_the_metrics():
    rows = made_up_rows()
    for row in rows:
        row["protocol"]["metrics"] = row["protocol"]["metrics"] | {"prdc": {}, "kid": {}, "some.where": {}}
        row |= {"precision": 0.5, "kid": 0.001234}
    found = {column.key: column for column in columns.used_columns(rows)}
    assert list(found) == [
        *("steps", "guidance_scale", "fid", "clip_score", "retrieval"),
        *("precision", "kid", "seconds_per_image", "network_evaluations"),
    ]
    about = vars(columns.registry.find("metric", "kid"))["ABOUT"]
    assert (found["kid"].title, found["kid"].better) == (about.title, "low")
    assert (found["precision"].title, found["precision"].better) == ("Precision", "high")
    assert columns.cell(rows[0], found["kid"]) == "0.00123"


def test_the_columns_with_a_notation_of_their_own_agree_with_their_metrics():
    own = {column.key: column for column in columns.COLUMNS}
    for name in ("fid", "clip_score"):
        about = vars(columns.registry.find("metric", name))["ABOUT"]
        assert (own[name].title, own[name].better) == (about.title, about.better)


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (8.284, "8.28"),
        (0.43, "0.430"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (0.0, "0.00"),
        (1e-6, "1.00e-06"),
        (-2, "-2.00"),
    ],
)
def test_numbers_of_metrics(value, want):
    assert columns.number(value) == want


def with_intervals():
    rows = made_up_rows()
    for row in rows:
        row["intervals"] = {"fid": [row["fid"] - 0.2, row["fid"] + 0.25], "retrieval": [0.8, 0.9]}
    return rows


def test_intervals_stand_beside_their_values(tmp_path):
    rows = with_intervals()
    assert "| **6.32** [6.12, 6.57] | 30.2 | 87.1% [80.0%, 90.0%] |" in report.markdown_table(rows)
    (tmp_path / "results.json").write_text(json.dumps(rows))
    page = report.write_report(tmp_path).read_text()
    assert "<td><strong>6.32</strong><small>[6.12, 6.57]</small></td><td>30.2</td>" in page
    assert "Brackets: 95 % interval, by bootstrap over the images." in page
    assert "Brackets" not in tmp_page(tmp_path, made_up_rows())


def tmp_page(folder, rows):
    (folder / "results.json").write_text(json.dumps(rows))
    return report.write_report(folder).read_text()


# Plots


def charts(page, name):
    """Caption -> svg of the figures of a section."""
    start = page.index(f'<section id="{name}">')
    section = page[start : page.index("</section>", start)]
    return dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", section, re.S))


def test_quality_is_plotted_by_steps_and_by_latency(tmp_path):
    found = charts(tmp_page(tmp_path, with_intervals()), "quality")
    captions = [
        f"{what} by {by}" for what in ("FID", "CLIP score", "Retrieval") for by in ("steps", "seconds per image")
    ]
    assert [re.sub(r"\s[↑↓]", "", caption) for caption in found] == captions
    fid = found["FID\N{NO-BREAK SPACE}↓ by steps"]
    assert fid.count('class="mark c0"') == 3, "the teacher at 50, 4 and 1 steps"
    assert fid.count('class="mark c1"') == 1, "dmd2"
    assert fid.count('class="whisker') == 4
    assert "<title>dmd2: FID 7.75 [7.55, 8.00] in 1 step, 0.0337 s an image</title>" in fid
    assert re.findall(r'text-anchor="middle">(\d+)</text>', fid)[:3] == ["1", "4", "50"]
    assert "log scale" in fid
    # a step count lies at its tick
    ticks = dict(re.findall(r'x="([\d.]+)" y="204" text-anchor="middle">(\d+)<', fid))
    marks = [float(x) for x in re.findall(r'class="mark c0" transform="translate\(([\d.]+) ', fid)]
    assert sorted(map(float, ticks)) == pytest.approx(sorted(marks))


def test_one_mark_is_no_chart(tmp_path):
    assert 'id="quality"' not in tmp_page(tmp_path, made_up_rows()[:2])


@pytest.mark.parametrize(
    ("marks", "inside"),
    [
        ([(1, 5.0)], True),
        ([(1, 5.0), (1, 5.0)], True),
        ([(1, 1e-3), (1000, 10.0)], True),
        ([(2, -1.0), (3, 4.0)], True),
    ],
)
def test_marks_intervals_and_levels_lie_within_the_frame(marks, inside):
    points = [chart.Mark(x, y, (y - 0.0005, y + 0.5), str(x)) for x, y in marks]
    svg = chart.scatter({"a": points[:1], "b": points[1:] or points}, "x", "y", level=("real", 3.0))
    heights = [float(v) for v in re.findall(r'class="whisker c\d" d="M[\d.]+ ([\d.]+)L', svg)]
    heights += [float(v) for v in re.findall(r'class="level" d="M\d+ ([\d.]+)H', svg)]
    places = [tuple(map(float, p)) for p in re.findall(r"translate\(([\d.]+) ([\d.]+)\)\" d", svg)]
    assert len(places) == len(marks) + (len(marks) == 1)
    for x, y in [*places, *((chart.LEFT, h) for h in heights)]:
        assert chart.LEFT <= x <= chart.WIDTH - chart.RIGHT
        assert chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM


def test_every_series_has_a_look_of_its_own():
    most = len(chart.COLOURS) * len(chart.SHAPES)
    assert len({chart.look(i) for i in range(most)}) == most


def test_labels_cover_neither_marks_nor_each_other():
    rng = np.random.default_rng(0)
    points = [chart.Mark(float(x), float(y), None, "88") for x, y in rng.uniform(1, 2, (20, 2))]
    svg = chart.scatter({"a": points}, "x", "y")
    labels = [tuple(map(float, p)) for p in re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)"', svg)]
    assert 5 < len(labels) <= 20
    for i, (x, y) in enumerate(labels):
        assert all(abs(x - a) > 10 or abs(y - b) > 8 for a, b in labels[:i])


# GenEval


def with_geneval(folder, rows=None):
    """A run with values by task and verdicts on the comparison's pictures."""
    rows = rows or made_up_rows()
    for row, share in zip(rows, (1.0, 0.9, 0.5, 0.1, 0.8), strict=True):
        tasks = {f"geneval_{tag}": share * (1 - 0.1 * i) for i, tag in enumerate(columns.TASKS)}
        row |= tasks | {"geneval": sum(tasks.values()) / 6, "intervals": {"geneval_colors": [0.1, 0.9]}}
    made_up_run(folder)
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "geneval").mkdir()
    for name, wrong in (("teacher-50-steps", 1), ("dmd2-1-step", 3)):
        entries = [
            {"tag": "colors", "prompt": PROMPTS[i], "correct": i >= wrong, "reason": "expected <b>red</b>, found 0"}
            | {"filename": f"comparison/{name}/{i}.png"}
            for i in range(3)
        ]
        entries.append({"tag": "position", "prompt": "p", "correct": False, "reason": "", "filename": "gone.png"})
        (folder / "geneval" / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return folder


def test_geneval_by_task_with_the_failing_images(tmp_path):
    page = report.write_report(with_geneval(tmp_path)).read_text()
    Page(page)
    start = page.index('<section id="geneval">')
    section = page[start : page.index("</section>", start)]
    heads = re.findall(r'<th scope="col">(.*?)\s↑</th>', section)
    want = ["Overall", "Single object", "Two objects", "Counting", "Colours", "Position", "Colour attribution"]
    assert heads == want
    [svg] = re.findall(r'aria-label="Share of right images.*?</svg>', section, re.S)
    assert [t for t in want if f">{t}</text>" in svg] == want
    assert svg.count('class="mark c0"') == svg.count('class="mark c1"') == 7
    assert "<title>dmd2, 1 step: Colours 56.0% [10.0%, 90.0%]</title>" in svg
    assert svg.count('class="whisker') == 2
    summaries = re.findall(r"<summary>(.*?)</summary>", section)
    assert summaries == [
        "dmd2, 1 step: 4 of 4 images failed; 3 of them",
        "teacher, 50 steps: 2 of 4 images failed; 1 of them",
    ]
    assert section.count('<span class="why">expected &lt;b&gt;red&lt;/b&gt;, found 0</span>') == 4
    assert "<q>a &lt;b&gt;blue&lt;/b&gt; heart</q>" in section
    assert "Geneval" not in page.replace("GenEval", ""), "values by task are in their own section alone"


def test_the_chart_of_tasks_leaves_out_students_but_the_table_none(tmp_path):
    rows = made_up_rows()[:2]
    for i in range(9):
        rows.append(made_up_rows()[4] | {"name": f"m{i}, 1 step", "geneval_colors": i / 10, "geneval": i / 10})
    page = tmp_page(tmp_path, rows)
    section = page[page.index('<section id="geneval">') :]
    legend = re.search(r'<ul class="legend">(.*?)</ul>', section, re.S)[1]
    assert re.findall(r"</svg>(.*?)</li>", legend) == [f"m{i}, 1 step" for i in range(3, 9)]
    assert all(f">m{i}, 1 step</th>" in section for i in range(9))


def test_failing_images_are_bounded_and_of_each_task_in_turn(tmp_path):
    folder = with_geneval(tmp_path)
    path = folder / "geneval" / "dmd2-1-step.jsonl"
    entry = {"correct": False, "reason": "no", "filename": "comparison/dmd2-1-step/0.png"}
    tags = ["colors"] * 30 + ["position"] * 3
    path.write_text("".join(json.dumps(entry | {"tag": t, "prompt": f"{t} {i}"}) + "\n" for i, t in enumerate(tags)))
    page = report.write_report(folder).read_text()
    assert f"33 of 33 images failed; {pages.FAILURES} of them" in page
    assert re.findall(r"<q>(\w+) \d+</q>", page)[: pages.FAILURES] == ["colors", "position"] * 3 + ["colors"] * (
        pages.FAILURES - 6
    )


@pytest.mark.parametrize("line", ["{", '{"tag": "colors"}', "[]"])
def test_damaged_verdicts_are_named(tmp_path, line):
    folder = with_geneval(tmp_path)
    (folder / "geneval" / "dmd2-1-step.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"dmd2-1-step\.jsonl: line 1 is no verdict .*run `fastgen evaluate` again"):
        report.write_report(folder)


# Diversity, speed, Markdown


def test_prompts_that_come_twice_are_shown_by_seed(tmp_path):
    made_up_run(tmp_path)
    listed = tmp_path / "comparison" / "prompts.json"
    kept = json.loads(listed.read_text())
    listed.write_text(json.dumps(kept | {"prompts": ["a dog", "a cat", "a dog"]}))
    rows = [row | {"diversity": 0.2512} for row in made_up_rows()]
    page = tmp_page(tmp_path, rows)
    section = page[page.index('<section id="diversity">') : page.index('<section id="training">')]
    assert re.findall(r"<h3>(.*?)</h3>", section) == ["a dog"]
    assert "dmd2, 1 step: a dog, image 2" in section
    assert section.count("<img") == 2 * len(NAMES)
    assert section.count("<td>0.251</td>") == len(NAMES)
    (tmp_path / "results.json").write_text(json.dumps(made_up_rows()))
    listed.write_text(json.dumps(kept))
    assert 'id="diversity"' not in report.write_report(tmp_path).read_text()


def test_all_that_was_timed_is_in_a_table_of_its_own(tmp_path):
    rows = made_up_rows()
    rows[4] |= {"seconds_to_first_image": 0.05, "peak_memory_mib": 1178.79}
    rows[4]["protocol"]["metrics"] = rows[4]["protocol"]["metrics"] | {"latency": {"batch_size": 1, "repeats": 5}}
    page = tmp_page(tmp_path, rows)
    section = page[page.index('<section id="speed">') : page.index('<section id="protocol">')]
    assert "<td>1,179</td>" in section
    assert "Batch size 1, repeats 5." in section
    assert "Peak memory" not in page[: page.index('<section id="speed">')]


def test_large_pictures_are_stored_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((512, 512), 3).save(tmp_path / "x.png")
    [shown] = Page(report.inline(tmp_path / "x.png", "x", 256)).all("img")
    kind, _, data = shown["src"].partition(";base64,")
    assert kind == "data:image/webp"
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        assert opened.size == (256, 256)


def test_the_markdown_report(run):
    report.write_report(run)
    text = (run / "report.md").read_text()
    assert text.startswith(f"# {report.plain(run.name)}\n\nThe student reaches FID 7.75 in 1 step; ")
    assert report.markdown_table(made_up_rows()).strip() in text
    assert "- fid extractor: CLIP clip\n" in text
    assert f"- fid sha256: {'3f' * 32}\n" in text
    assert "| a &lt;b>blue&lt;/b> heart | ![](comparison/real-images/2.png) |" in text
    for link in re.findall(r"!\[\]\((.*?)\)", text):
        assert (run / link).is_file()


def test_the_markdown_report_has_geneval_by_task(tmp_path):
    report.write_report(with_geneval(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "### By task: geneval\n\n| | Overall ↑ | Single object ↑ |" in text
    assert "| 56.0% [10.0%, 90.0%] |" in text


def test_plain_text_in_markdown():
    assert report.plain("a_b*c\n[x](y) <i> `q` | # \\") == r"a\_b\*c \[x\](y) &lt;i> \`q\` \| \# " + "\\\\"


def test_prompts_cannot_bring_tags_into_the_page(tmp_path):
    made_up_run(tmp_path)
    listed = tmp_path / "comparison" / "prompts.json"
    kept = json.loads(listed.read_text())
    evil = "</script><script>alert(1)</script><img src=x onerror='alert(1)'>\""
    listed.write_text(json.dumps(kept | {"prompts": [evil] * 3}))
    rows = made_up_rows()
    rows[4] |= {"name": evil, "role": "student"}
    rows[4]["protocol"]["scheduler"] = evil
    text = tmp_page(tmp_path, rows)
    page = Page(text)
    assert page.all("script") == [{}]
    assert not [attrs for attrs in page.all("img") if attrs["src"] == "x" or "onerror" in attrs]
