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

from fastgen.evaluation import chart, report

NAMES = ("real images", "teacher, 50 steps", "teacher, 4 steps", "teacher, 1 step", "dmd2, 1 step")
FOLDERS = ("real-images", "teacher-50-steps", "teacher-4-steps", "teacher-1-step", "dmd2-1-step")
PROMPTS = ("a red apple", "twemoji of a dog", "a <b>blue</b> heart")
VALUES = (
    {"fid": 1.204, "clip_score": 31.42, "retrieval": 0.962},
    {"fid": 6.317, "clip_score": 30.18, "retrieval": 0.871, "seconds_per_image": 1.934, "network_evaluations": 100.0},
    {"fid": 38.92, "clip_score": 25.07, "retrieval": 0.522, "seconds_per_image": 0.1612, "network_evaluations": 8.0},
    {"fid": 164.8, "clip_score": 9.861, "retrieval": 0.043, "seconds_per_image": 0.0518, "network_evaluations": 2.0},
    {"fid": 7.755, "clip_score": 30.31, "retrieval": 0.884, "seconds_per_image": 0.0337, "network_evaluations": 1.0},
)


def made_up_rows():
    """Rows as the runner writes them, with plausible numbers."""
    sha, commit = "3f" * 32, "a1b2c3d4" * 5 + "-dirty"
    common = {
        "metrics": {
            "fid": {
                "extractor": "CLIP clip",
                "features": "projected image embedding, 128 wide",
                "sha256": sha,
                "resize": {"size": {"shortest_edge": 32}, "resample": 3, "image_mean": [0.5, 0.5, 0.5]},
                "num_images": 1000,
                "reference": {"num_images": 1000, "sha256": sha[::-1]},
                "torchmetrics": "1.9.0",
            },
            "clip_score": {"extractor": "CLIP clip", "score": "mean of 100 max(cos, 0)", "candidates": 160},
        },
        "num_images": 1000,
        "device": "cpu (x86_64, 2 threads)",
        "versions": {"python": "3.11.9", "torch": "2.14.1", "diffusers": "0.42.1", "transformers": "5.23.0"},
        "commit": commit,
    }
    rows = []
    for name, values in zip(NAMES, VALUES, strict=True):
        role = {"r": "data", "t": "teacher", "d": "student"}[name[0]]
        steps = int(name.split(", ")[1].split()[0]) if role != "data" else None
        guidance = {"data": None, "teacher": 4.0, "student": 1.0}[role]
        own = {"images": "items 1000 to 1999 of the reference source"}
        if role != "data":
            own = {
                "scheduler": "LCMScheduler" if role == "student" else "DDIMScheduler",
                "steps": steps,
                "weights": sha if role == "student" else sha[1:] + "0",
                "seed": 0,
            }
        filled = {"seconds_per_image": None, "network_evaluations": None} | values
        rows.append(
            {
                "name": name,
                "role": role,
                "steps": steps,
                "guidance_scale": guidance,
                **filled,
                "protocol": common | own,
            }
        )
    return rows


def made_up_run(folder, picture=None, steps=900):
    """A run folder as a run leaves it. picture: (subject, prompt) numbers -> [32, 32, 3]; noise if not given."""
    rng = np.random.default_rng(0)
    noise = lambda *_: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)  # noqa: E731
    (folder / "results.json").write_text(json.dumps(made_up_rows()))
    rows = []
    for step in range(10, steps + 1, 10):
        row = {
            "step": step,
            "critic/denoising": 0.2 + 0.9 * math.exp(-step / 90) + 0.05 * rng.standard_normal(),
            "critic/fake_score.grad_norm": 0.8 + 30 * math.exp(-step / 40) * rng.uniform(0.5, 1.5),
            "student/dmd": 0.5 + 0.1 * rng.standard_normal(),
            "student/student.grad_norm": math.exp(0.3 * rng.standard_normal()),
            "seconds_per_step": 0.31,
        }
        if step % 100 == 0:
            row |= {"fid": 9 + 180 * math.exp(-step / 110), "clip_score": 30 - 20 * math.exp(-step / 160)}
            row |= {"retrieval": 0.9 - 0.8 * math.exp(-step / 150)}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 91')
    listed = [
        {"name": n, "role": r["role"], "folder": f} for n, f, r in zip(NAMES, FOLDERS, made_up_rows(), strict=True)
    ]
    (folder / "comparison").mkdir()
    (folder / "comparison" / "prompts.json").write_text(json.dumps({"prompts": PROMPTS, "subjects": listed}))
    (folder / "samples").mkdir()
    for i, subject in enumerate(FOLDERS):
        (folder / "comparison" / subject).mkdir()
        for j in range(len(PROMPTS)):
            Image.fromarray((picture or noise)(i, j)).save(folder / "comparison" / subject / f"{j}.png")
    for step in range(100, steps + 1, 100):
        sheet = np.concatenate([np.concatenate([(picture or noise)(4, j % 3) for j in range(4)], 1) for _ in range(4)])
        Image.fromarray(sheet).resize((512, 512), 0).save(folder / "samples" / f"step_{step:06d}.png")
    (folder / "config.yaml").write_text("run: {steps: 900}\nmethod: {name: dmd2}  # <see> https://arxiv.org\n")
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and whether they nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path"):
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
    assert not {name for name, _ in tags.tags} & {"script", "link", "iframe", "object", "base"}
    for _, attrs in tags.tags:
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attrs.get(name, "data:").startswith("data:image/png;base64,") or name not in attrs
    assert not re.search(r"@import|url\(", page)
    assert "http" not in page.replace("https://arxiv.org", "", 1)  # the config's own comment


def test_page_carries_each_picture_unchanged(page, run):
    pictures = {attrs["alt"]: attrs for attrs in Page(page).all("img")}
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
    assert "<dt>fid extractor</dt><dd>CLIP clip</dd>" in page
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
