"""Draw docs/recovery.png and write the numbers of docs/recovery.md: ``python -m tests.recovery.plot``.

Every method is trained as in the tests, only three times as long, and so is the teacher.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgen.evaluation.report import place
from fastgen.family import Family
from fastgen.tables import markdown
from tests.recovery import recover
from tests.recovery.recover import ASKED, GUIDED_STEPS, METHODS, POOL, SCALES, SETTINGS, TEACHER_STEPS, Draws, measure

DOCS = Path(__file__).parents[2] / "docs"
LONGER = 3
NUMBER = 1 << 17
"""Points of each caption in a picture and behind a number."""

SIDE, GAP, LABEL, HEAD, COLUMNS = 140, 8, 38, 34, 8
LOW, HIGH = (-2.6, -2.6), (2.6, 2.6)
GROUND, FRAME, INK, FAINT = (17, 19, 28), (48, 52, 66), (236, 238, 244), (152, 158, 172)
HUES = {"left": (255, 160, 72), "right": (76, 178, 255)}


# The picture


@dataclass(frozen=True)
class Panel:
    """One density, and what is said below it."""

    name: str
    note: str
    draws: Draws


def density(x: Tensor) -> np.ndarray:
    """Points per unit of area, lightly smoothed: [n, 2] -> [SIDE, SIDE], the first row on top."""
    counts, _, _ = np.histogram2d(*x.numpy().T[::-1], SIDE, list(zip(LOW, HIGH, strict=True))[::-1])
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)
    for axis in (0, 1):
        counts = np.apply_along_axis(np.convolve, axis, counts, kernel / kernel.sum(), "same")
    area = (HIGH[0] - LOW[0]) * (HIGH[1] - LOW[1]) / SIDE**2
    return counts[::-1] / (len(x) * area)


def picture(draws: Draws) -> Image.Image:
    """Both captions' densities, each a light of its own colour."""
    light = np.zeros((SIDE, SIDE, 3))
    for caption, x in draws.items():
        bright = 1 - np.exp(-1.4 * density(x) ** 0.6)  # a power below 1, so that faint bridges between modes show
        light += bright[:, :, None] * (np.array(HUES[caption]) - GROUND)
    return Image.fromarray((GROUND + light).clip(0, 255).astype(np.uint8))


def sheet(rows: Sequence[tuple[str, Sequence[Panel]]]) -> Image.Image:
    """Titled rows of panels, wrapped."""
    lines = [
        (title if i == 0 else "", panels[i : i + COLUMNS])
        for title, panels in rows
        for i in range(0, len(panels), COLUMNS)
    ]
    height = GAP + sum(HEAD * bool(title) + SIDE + LABEL for title, _ in lines)
    canvas = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), height), GROUND)
    draw, y = ImageDraw.Draw(canvas), GAP
    large, middle, small = (ImageFont.load_default(size) for size in (16, 13, 12))
    for title, panels in lines:
        if title:
            draw.text((GAP, y + 5), title, INK, large)
            y += HEAD
        for i, panel in enumerate(panels):
            x = GAP + i * (SIDE + GAP)
            canvas.paste(picture(panel.draws), (x, y))
            draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=FRAME)
            draw.text((x, y + SIDE + 2), panel.name, INK, middle)
            draw.text((x, y + SIDE + 17), panel.note, FAINT, small)
        y += SIDE + LABEL
    return canvas


def save(canvas: Image.Image, file: Path) -> None:
    """As a PNG of few colours."""
    canvas.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, optimize=True)


# The numbers


def steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


def row(name: str, num_steps: str, draws: Draws, beside: Draws | None = None) -> list[str]:
    """beside: the undistilled teacher's at the same number of steps."""
    found = measure(draws)
    return [
        name,
        num_steps,
        f"{found.distance:.3f}",
        f"{measure(beside).distance:.3f}" if beside else "–",
        f"{found.mass_error:.0%}",
        f"{found.spread.min():.2f} to {found.spread.max():.2f}",
        f"{found.outside:.1%}",
    ]


# The whole


def few_steps(made: Family, longer: int, number: int) -> tuple[list[Panel], list[list[str]]]:
    """Of every method that makes few steps, and of several calls under one fake score."""
    panels, rows = [], []

    def add(name: str, n: int, draws: Draws, said: str = "") -> None:
        panels.append(Panel(name, f"{said or steps(n)}, {measure(draws).distance:.3f}", draws))
        rows.append(row(f"`{name}`{f', {said}' if said else ''}", str(n), draws, recover.undistilled(made, n, number)))

    for name in METHODS:
        if METHODS[name].ABOUT.steps:
            setting = SETTINGS[name].longer(longer)
            add(name, setting.num_steps, recover.draw_student(recover.distil(name, setting, made), made, number))
    student = recover.distil("dmd2", POOL.longer(longer), made)
    for k in range(POOL.num_steps):
        add("dmd2", POOL.num_steps, recover.draw_student(student, made, number, calls=k + 1), f"call {k + 1} of 2")
    add("dmd2", POOL.num_steps, recover.pool(student, made, number), "both calls")
    return panels, rows


def guidance(made: Family, longer: int, number: int) -> tuple[list[Panel], list[list[str]]]:
    """Of every method that distils guidance."""
    plain = recover.draw_guided(made, 1.0, number)
    panels, rows = [Panel("teacher", "no guidance", plain)], []
    targets = {scale: recover.draw_guided(made, scale, number) for scale in SCALES}
    students = {
        name: recover.distil(name, SETTINGS[name].longer(longer), made)
        for name in METHODS
        if not METHODS[name].ABOUT.steps
    }
    for scale, target in targets.items():
        panels.append(Panel("teacher", f"scale {scale:g}, two passes", target))
        for name, student in students.items():
            draws = recover.draw_student(student, made, number, scale)
            wrong, without = recover.off(draws, target), recover.off(plain, target)
            panels.append(Panel(name, f"scale {scale:g}, one pass", draws))
            rows.append([f"`{name}`", f"{scale:g}", f"{wrong:.3f}", f"{without:.3f}", f"{wrong / without:.0%}"])
    return panels, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.recovery.plot", description=__doc__)
    parser.add_argument("--longer", type=int, default=LONGER, help="updates over those of the tests")
    parser.add_argument("--number", type=int, default=NUMBER, help="points of each caption")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of recovery.png and recovery.md")
    chosen = parser.parse_args(arguments)
    longer, number = chosen.longer, chosen.number
    torch.set_num_threads(1)
    begun = time.process_time()

    made = recover.teacher(recover.PRETRAINING * longer)
    exact: Mapping[str, Tensor] = {caption: recover.exact(caption, 1, number) for caption in ASKED}
    panels, rows = [Panel("the mixture", "exact samples", exact)], [row("two exact sets", "–", exact)]
    for n in (TEACHER_STEPS, 32, 16, 8, 4, 2, 1):
        draws = recover.undistilled(made, n, number)
        panels.append(Panel("teacher", f"{steps(n)}, {measure(draws).distance:.3f}", draws))
        rows.append(row("the teacher", str(n), draws))
    students, of_students = few_steps(made, longer, number)
    one_pass, of_guidance = guidance(made, longer, number)
    pictures = [
        ("The learnt teacher, and its distance from the mixture at falling numbers of steps", panels),
        ("Students of few steps, and their distance", students),
        (f"Guidance in one pass, at {steps(GUIDED_STEPS)}", one_pass),
    ]
    save(sheet(pictures), chosen.docs / "recovery.png")
    columns = ["", "Steps", "Distance", "Teacher at these steps", "Worst mode's mass", "Modes' spread", "Outside"]
    place(markdown(columns, [*rows, *of_students]), chosen.docs / "recovery.md", "students")
    columns = ["", "Scale", "Off the guided teacher", "Teacher without guidance", "Left of it"]
    spent = f"{(time.process_time() - begun) / 60:.1f} minutes of one core, torch {torch.__version__}."
    place(f"{markdown(columns, of_guidance)}\n\n{spent}", chosen.docs / "recovery.md", "guidance")


if __name__ == "__main__":
    main()
