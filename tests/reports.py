"""A made-up run for tests of the report: plausible rows, curves, pictures and GenEval's verdicts."""

import json
import math

import numpy as np
from PIL import Image

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
