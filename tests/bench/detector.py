"""Judge the emoji world's detector on fresh compositions: ``python -m tests.bench.detector``.

Writes docs/emoji/detector.json and its tables, docs/emoji/detector.md. Seeds are used by no training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.checkpoint import write_text
from fastgen.emoji import compose, detector, sprites
from fastgen.evaluation import geneval_emoji
from fastgen.tables import markdown

DOCS = Path(__file__).parents[2] / "docs" / "emoji"
SEED = 20_000_001
SEED_UNTRUE = 20_000_002
ABOVE = geneval_emoji.OPTIONS.threshold


def scenes(split: str, count: int, seed: int = SEED) -> list[compose.Scene]:
    """``count`` scenes, the tasks in turn."""
    return [
        compose.scene(np.random.default_rng([seed, sprites.SPLITS.index(split), i]), compose.TASKS[i % 6], split=split)
        for i in range(count)
    ]


def figures(drawings: geneval_emoji.Drawings, network: detector.Detector, split: str, count: int) -> dict[str, Any]:
    """Of a split: detection by task, and how far the evaluator agrees with the truth."""
    made = scenes(split, count)
    images = torch.from_numpy(np.stack([scene.image for scene in made])).permute(0, 3, 1, 2)
    rows, truths = detector.detect(network, images), [detector.example(scene) for scene in made]
    found: dict[str, dict[str, float]] = {}
    for number, task in enumerate((*compose.TASKS, "all")):
        of = slice(number, None, 6) if task != "all" else slice(None)
        quality = detector.quality(rows[of], truths[of], ABOVE)
        found[task] = {
            "precision": float(np.nanmean(quality.precision)),
            "recall": float(np.nanmean(quality.recall)),
            "colour": quality.colour,
            "objects": quality.objects,
        }
        if task == "all":
            order = np.argsort(np.nan_to_num(quality.recall, nan=2))[:8]
            worst = {detector.NOUNS[i]: round(float(quality.recall[i]), 3) for i in order}
    agreed = geneval_emoji.agreement(drawings, made, SEED_UNTRUE)
    return {"scenes": count, "detection": found, "worst_recall": worst, "agreement": agreed}


def document(made: dict[str, Any]) -> str:
    """The tables."""
    columns = ["split", "task", "precision", "recall", "colour", "true captions", "changed", "others'"]
    lines = []
    for split in sprites.SPLITS:
        for task in (*compose.TASKS, "all"):
            found = made[split]["detection"][task]
            agreed = made[split]["agreement"]["overall" if task == "all" else task]
            numbers = [found["precision"], found["recall"], found["colour"]]
            numbers += [agreed["true"], agreed["changed"], agreed["others"]]
            lines.append([split, task, *(f"{100 * number:.1f}" for number in numbers)])
    return f"""# The detector of the emoji world

Written by `python -m tests.bench.detector` from {made["train"]["scenes"]} fresh scenes of each split of the drawings;
the figures are per cent. Precision and recall are means over nouns: a detection of a score above {ABOVE} is right if
an object of its noun overlaps it by an IoU of at least 0.5. Colour: of the objects found that have one.

The last three columns say how `geneval_emoji` judges captions of these scenes: the share it calls true of true ones,
of those made false by one change of the kind the task tests (another object, number or colour, exchanged colours, the
opposite relation), and of those of other scenes. The row "all" holds the mean over the tasks.

{markdown(columns, lines, left=2)}

Weights: {made["bytes"]} bytes, {made["parameters"]} parameters, SHA-256 {made["sha256"]}.
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=3000, help="of each split")
    parser.add_argument("--folder", default=str(detector.ASSETS), help="of the detector")
    given = parser.parse_args()
    drawings, network = geneval_emoji.Drawings(given.folder), detector.load(given.folder)
    made: dict[str, Any] = {split: figures(drawings, network, split, given.scenes) for split in sprites.SPLITS}
    made["bytes"] = detector.weights_file(given.folder).stat().st_size
    made["parameters"] = sum(p.numel() for p in network.parameters())
    made["sha256"] = drawings.protocol()["sha256"]
    write_text(DOCS / "detector.json", json.dumps(made, indent=1) + "\n")
    write_text(DOCS / "detector.md", document(made))
    print(document(made))


if __name__ == "__main__":
    main()
