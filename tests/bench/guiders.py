"""Judge the guiders on the emoji world, write the table of docs/guiders.md: ``python -m tests.bench.guiders``.

Wants the students of configs/emoji/dmd2.yaml and pcm.yaml in runs/emoji. Judged is as in configs/emoji/eval.yaml.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.data import emoji
from fastgen.evaluation import runner
from fastgen.evaluation.context import Context
from fastgen.evaluation.report import place
from fastgen.evaluation.seen import Real
from fastgen.export import load
from fastgen.pipelines import guiders
from fastgen.recipe import locate
from fastgen.rng import seed_of
from fastgen.tables import markdown

DOCUMENT = Path(__file__).parents[2] / "docs" / "guiders.md"
BATCH, STEPS, SCALE, AWAY = 50, 20, 2.5, "fluent 3d"
FITTED_ON = 32
"""Training prompts of LinearAG's regression."""


@dataclass(frozen=True)
class Case:
    """A row: a pipeline, its call, and what is switched on around it."""

    name: str
    pipeline: Any
    call: dict[str, Any]
    guider: Callable[[], AbstractContextManager[Any]] = nullcontext
    evaluations: float | None = None


def cases(teacher: Any, one: Any, four: Any, coefficients: Any) -> list[Case]:
    """The rows of the table. one, four: students of as many steps."""
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE}
    single, several = {"num_inference_steps": 1}, {"num_inference_steps": 4}

    def steered(scale: float) -> Case:
        return Case(f"dmd2, `nasa` {scale:g} away from {AWAY!r}", one, single, lambda: guiders.nasa(one, AWAY, scale))

    return [
        Case(f"teacher, guidance {SCALE:g}", teacher, call, evaluations=2 * STEPS),
        Case("teacher, no guidance", teacher, call | {"guidance_scale": 1.0}, evaluations=STEPS),
        Case("`cfgpp`, 0.6", teacher, call, lambda: guiders.cfgpp(teacher, 0.6)),
        Case("`adaptive`, 0.99", teacher, call, lambda: guiders.adaptive(teacher, 0.99)),
        Case("`adaptive`, 0.95", teacher, call, lambda: guiders.adaptive(teacher, 0.95)),
        Case("`linear`", teacher, call, lambda: guiders.linear(teacher, coefficients)),
        Case("dmd2, 1 step", one, single, evaluations=1),
        *(steered(scale) for scale in (0.1, 0.3, 0.5)),
        Case("pcm, 4 steps", four, several, evaluations=4),
        Case("pcm, `diversity`", four, several, lambda: guiders.diversity(four, teacher, 1, STEPS, SCALE)),
    ]


@torch.no_grad()
def images(case: Case, prompts: Sequence[str]) -> tuple[Tensor, float]:
    """uint8 [B, 3, H, W], a seed each, and network evaluations per image."""
    made = []
    with case.guider() as count:
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            noises = [torch.Generator().manual_seed(seed_of(0, start + i)) for i in range(len(part))]
            made += [np.asarray(x) for x in case.pipeline(prompt=list(part), generator=noises, **case.call).images]
    evaluations = count.evaluations / len(prompts) if case.evaluations is None else case.evaluations
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2), evaluations


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images that are there: uint8 [N, 3, H, W]."""

    pixels: Tensor

    def __call__(self, part: Sequence[int]) -> Tensor:
        return self.pixels[list(part)]


def opened(path: str) -> Any:
    pipeline = load(locate(path))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    """Make, judge and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guiders", description=__doc__)
    parser.add_argument("--number", type=int, default=300, help="images of each row")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"), help="folder of the students' runs")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    chosen = parser.parse_args(arguments)
    teacher, *students = map(
        opened, ("assets:emoji/teacher", *(f"{chosen.runs}/{n}/pipeline" for n in ("dmd2", "pcm")))
    )
    size = (teacher.unet.config.sample_size * teacher.vae_scale_factor,) * 2
    train, held_out = (emoji.open(emoji.Config(split=split), size) for split in ("train", "heldout"))
    prompts = [train.item(i).prompt for i in range(FITTED_ON)]
    noise = torch.Generator().manual_seed(1)
    fitted = guiders.fit(teacher, prompts, SCALE, num_inference_steps=STEPS, generator=noise)
    prompts = [held_out.item(i).prompt for i in range(chosen.number)]
    context = Context(
        weights={"clip": locate("assets:emoji/clip")},
        features="clip",
        reference=Real(held_out, range(chosen.number), BATCH),
        candidates=held_out.candidates,
        concept=held_out.concept,
        prompts=prompts,
    )
    columns = ["", "Evaluations", "FID ↓", "CLIP score ↑", "Retrieval ↑", "Pixels off guidance (of 255)"]
    lines: list[list[str]] = []
    first: Tensor | None = None
    for case in cases(teacher, *students, fitted):
        pixels, evaluations = images(case, prompts)
        first = pixels if first is None else first
        found = runner.measure_images(Pictures(pixels), context, ["fid", "clip_score"], BATCH)
        off = f"{(pixels.float() - first.float()).abs().mean():.1f}" if case.pipeline is teacher else ""
        score, share = found["clip_score"], found["retrieval"]
        lines.append([case.name, f"{evaluations:.3g}", f"{found['fid']:.1f}", f"{score:.1f}", f"{share:.0%}", off])
        print(lines[-1], flush=True)
    commit = runner.commit() or "unknown"
    said = f"{chosen.number} images a row, one seed each; torch {torch.__version__}, commit {commit[:12]}."
    place(f"{markdown(columns, lines)}\n\n{said}", chosen.document, "guiders")


if __name__ == "__main__":
    main()
