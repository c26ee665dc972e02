"""The report in a browser: it opens offline without an error, shows what it should, and the sliders work.

Needs Chromium or Chrome on the machine, and the package playwright, which drives it; skipped where either is missing.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgen.evaluation import report
from fastgen.evaluation.columns import TASKS
from tests.reports import NAMES, made_up_rows, made_up_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROMPTS = ("a red apple", "a dog", "a dog", "</script><img src=x onerror=alert(1)>", "long" * 60)
SHADES = {"real-images": 250, "teacher-50-steps": 40, "dmd2-1-step": 200}
"""Grey of each subject's pictures; of others black."""
EDGE = 2
"""Pixels of a picture's outline."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium or Chrome is installed (Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        # a container's root may not make the sandbox; the page is our own
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything: intervals, GenEval, several seeds, two protocols."""
    run = made_up_run(tmp_path_factory.mktemp("run"))
    rows = made_up_rows()
    for row, share in zip(rows, (1.0, 0.9, 0.5, 0.1, 0.8), strict=True):
        row |= {f"geneval_{tag}": share * (1 - 0.1 * i) for i, tag in enumerate(TASKS)}
        row |= {"diversity": 0.25, "geneval": 0.7 * share, "intervals": {"fid": [row["fid"] - 0.5, row["fid"] + 0.5]}}
    other = json.loads(json.dumps(rows[4])) | {"name": "lcm with a rather long name, 4 steps", "steps": 4}
    other["protocol"]["metrics"]["fid"]["sha256"] = "e" * 64
    (run / "results.json").write_text(json.dumps([*rows, other]))
    listed = run / "comparison" / "prompts.json"
    kept = json.loads(listed.read_text())
    listed.write_text(json.dumps(kept | {"prompts": PROMPTS}))
    for subject in kept["subjects"]:
        for i in range(len(PROMPTS)):
            pixels = np.full((32, 32, 3), SHADES.get(subject["folder"], 0), np.uint8)
            Image.fromarray(pixels).save(run / "comparison" / subject["folder"] / f"{i}.png")
    (run / "geneval").mkdir()
    verdict = {"tag": "colors", "prompt": PROMPTS[3], "correct": False, "reason": "expected red apple>=1, found 0"}
    lines = [verdict | {"filename": f"comparison/dmd2-1-step/{i}.png"} for i in range(3)]
    (run / "geneval" / "dmd2-1-step.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.write_report(run)


class Watched:
    """A page, and what it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | context))
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message) or dialog.dismiss())
        self.page.goto(file.as_uri())

    def pixels(self, selector: str) -> np.ndarray:
        """What is seen of the first such element: [H, W, 3]."""
        shot = self.page.locator(selector).first.screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)

    def cut(self, selector: str = ".pair") -> str:
        """Where the first slider stands."""
        return str(self.page.locator(selector).first.evaluate("pair => pair.style.getPropertyValue('--cut')"))


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def open_(**context: Any) -> Watched:
        made.append(Watched(browser, file, **context))
        return made[-1]

    yield open_
    for watched in made:
        assert watched.complaints == []
        assert [url for url in watched.requests if not url.startswith("data:")] == [file.as_uri()]
        watched.context.close()


def test_the_page_opens_whole_and_offline(opened: Callable[..., Watched]) -> None:
    watched = opened(offline=True)
    page = watched.page
    sections = page.locator("section").evaluate_all("all => all.map(one => one.id)")
    assert sections == [
        *("results", "pictures", "quality", "geneval", "diversity", "training", "samples", "protocol", "config"),
    ]
    assert page.locator("#results table").count() == 2, "a table for each protocol"
    assert page.locator("#pictures table.pictures tbody tr").count() == len(PROMPTS)
    assert page.locator("#quality svg[role=img]").count() == 6
    assert page.locator("#geneval svg[role=img]").count() == 2
    assert page.locator("#geneval .failures img").count() == 3
    assert page.locator("#diversity table.seeds img").count() == 2 * len(NAMES)
    loaded = "all => all.every(one => one.complete && one.naturalWidth > 0)"
    assert page.locator("img").evaluate_all(loaded)
    for svg in page.locator("#quality svg[role=img]").all():
        assert svg.bounding_box()["height"] > 100
        assert svg.locator(".mark").count() >= 4
    assert page.locator("img[src=x]").count() == 0, "a prompt is text"
    assert page.locator("nav a").evaluate_all("all => all.every(one => document.querySelector(one.hash))")


def test_the_slider_shows_the_teacher_left_and_the_student_right(opened: Callable[..., Watched]) -> None:
    watched = opened()
    chosen = [select.evaluate("one => one.selectedOptions[0].text") for select in watched.page.locator("select").all()]
    assert chosen == ["teacher, 50 steps", "dmd2, 1 step"]
    seen = watched.pixels(".pair")
    width = seen.shape[1]
    assert (seen[5, EDGE : width // 2 - 4] == SHADES["teacher-50-steps"]).all()
    assert (seen[5, width // 2 + 4 : -EDGE] == SHADES["dmd2-1-step"]).all()


def test_the_slider_by_keyboard(opened: Callable[..., Watched]) -> None:
    watched = opened()
    first = watched.page.locator(".pair input").first
    assert first.get_attribute("aria-label") == "a red apple: from dmd2, 1 step to teacher, 50 steps"
    first.focus()
    for _ in range(10):
        watched.page.keyboard.press("ArrowRight")
    assert watched.cut() == "60%"
    assert first.get_attribute("aria-valuetext") == "60 % teacher, 50 steps"
    watched.page.keyboard.press("Home")
    assert watched.cut() == "0%"
    seen = watched.pixels(".pair")
    assert (seen[8, 24:-8] == SHADES["dmd2-1-step"]).all(), "the student alone"
    assert watched.cut(".cards figure:nth-child(2) .pair") == "50%", "each picture has its own"


def test_the_slider_by_mouse_and_by_touch(opened: Callable[..., Watched]) -> None:
    for context, act in (({}, "click"), ({"has_touch": True}, "tap")):
        watched = opened(**context)
        pair = watched.page.locator(".pair").first
        box = pair.bounding_box()
        getattr(pair, act)(position={"x": 0.25 * box["width"], "y": 0.3 * box["height"]})
        assert float(watched.cut().rstrip("%")) == pytest.approx(25, abs=6)
        seen = watched.pixels(".pair")
        assert (seen[5, EDGE : int(0.15 * box["width"])] == SHADES["teacher-50-steps"]).all()
        assert (seen[5, int(0.35 * box["width"]) : -EDGE] == SHADES["dmd2-1-step"]).all()


def test_one_slider_moves_all_and_the_subjects_can_be_chosen(opened: Callable[..., Watched]) -> None:
    watched = opened()
    page = watched.page
    page.get_by_label("Every slider at once").fill("20")
    cuts = page.locator(".pair").evaluate_all("all => all.map(one => one.style.getPropertyValue('--cut'))")
    assert cuts == ["20%"] * len(PROMPTS)
    page.get_by_label("Left picture").select_option("real images")
    seen = watched.pixels(".pair")
    assert (seen[5, EDGE:15] == SHADES["real-images"]).all()
    assert watched.cut() == "20%"


def test_without_scripts_the_pictures_stand_side_by_side(opened: Callable[..., Watched]) -> None:
    page = opened(java_script_enabled=False).page
    assert page.locator("#pictures input, #pictures select").count() == 0
    heads = page.locator("table.pictures:not(.seeds) thead th").all_inner_texts()
    assert heads[:3] == ["real images", "teacher, 50 steps", "dmd2, 1 step"]
    assert page.locator("#pictures tbody img").count() == len(NAMES) * len(PROMPTS)


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_the_page_fits_its_window(opened: Callable[..., Watched], width: int) -> None:
    page = opened(viewport={"width": width, "height": 740}, has_touch=width < 500, is_mobile=width < 500).page
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # nor does anything stand out to the right that cannot be scrolled to
    beyond = """(width) => [...document.querySelectorAll('body *')].filter((one) =>
      !one.closest('.wide, pre, svg') && one.getBoundingClientRect().right > width).map((one) => one.outerHTML)"""
    assert page.evaluate(beyond, width) == []
    assert page.locator("#results table").first.is_visible()


CONTRAST = """
() => {
  const channels = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (text) => channels(text).reduce((sum, v, i) => sum + [0.2126, 0.7152, 0.0722][i] * v, 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const found = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$/.test(found)) return found;
    }
    return "rgb(255, 255, 255)";
  };
  const worst = {};
  const told = "h1, h2, p, a, th, td, td small, li, dt, dd, figcaption, .why, summary, svg text";
  for (const one of document.querySelectorAll(told)) {
    const style = getComputedStyle(one);
    const pair = [light(one.closest("svg") ? style.fill : style.color), light(behind(one))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    const name = one.localName + (one.className.baseVal ?? one.className);
    worst[name] = Math.min(worst[name] ?? 21, ratio);
  }
  return worst;
}
"""


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_light_and_dark_can_be_read(opened: Callable[..., Watched], scheme: str, dark: bool) -> None:
    watched = opened(color_scheme=scheme)
    corner = watched.pixels("header")[0, -1]
    assert (corner.mean() < 60) == dark
    ratios = watched.page.evaluate(CONTRAST)
    assert len(ratios) > 12
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    colours = watched.page.evaluate("getComputedStyle(document.querySelector('#quality path.mark.c1')).fill")
    assert colours != "rgb(0, 0, 0)"


def test_served_by_http_it_asks_for_nothing_more(browser: Any, file: Path) -> None:
    """Not even for an icon, as browsers do of a page that names none."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(file.parent)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        page = browser.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"http://127.0.0.1:{server.server_port}/{file.name}", wait_until="networkidle")
        assert page.locator(".pair").count() == len(PROMPTS)
        page.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == [f"/{file.name}"]
    assert complaints == []
