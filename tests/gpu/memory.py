"""The memory of trainings of full size on a GPU, beside what ``fastgen estimate`` says of them.

    python -m tests.gpu.memory [CASE ...] --out FILE.json

Networks are of the configuration files that ship with fastgen, made on the GPU with random weights, so nothing is
downloaded and no pipeline is written to a disk. The training round them is the package's own (``train.build``); its
prompts' conditions are random, and images of random pixels go through the autoencoder. Each phase takes three turns.

Every case runs in a process of its own, and so does its estimate, which needs no GPU: these run beside the cases. Of
the cases of Stable Diffusion 1.5 the ratio of a step to its floor is measured, too, as ``fastgen bench cost`` does.

``--tiny`` runs the same on networks as small as they go, without a GPU as well. Without one there is no peak, and
``run.offload`` does nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastgen import config, cost, estimate, lora, memory, recipe, train
from fastgen.denoiser import Cond
from fastgen.experts import members
from fastgen.family import Family
from fastgen.method import Phase
from fastgen.recipe import Model, Recipe
from fastgen.train import Session

ROOT = Path(__file__).parents[2]
PATHS = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "sana": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
}
"""Family -> the model whose configuration files ship with fastgen."""
CASES: Mapping[str, tuple[str, str, str]] = {
    "sd-dmd2-fp32": ("sd", "dmd2", "run.batch_size=2"),
    "sd-dmd2": ("sd", "dmd2", "run.precision=bf16 run.batch_size=4"),
    "sd-dmd2-shared": (
        "sd",
        "dmd2",
        "run.precision=bf16 run.batch_size=4 student.lora={} student.share_backbone=true",
    ),
    "sd-lcm": ("sd", "lcm", "run.precision=bf16 run.batch_size=8"),
    "sd-lcm-checkpointing": ("sd", "lcm", "run.precision=bf16 run.batch_size=8 model.gradient_checkpointing=true"),
    "sdxl-dmd2-shared": ("sdxl", "dmd2", "run.precision=bf16 student.lora={} student.share_backbone=true"),
    "sd3-dmd2-adapters": ("sd3", "dmd2", "run.precision=bf16 student.lora={}"),
    "sana-dmd2": ("sana", "dmd2", "run.precision=bf16 run.batch_size=2"),
    "sana-dmd2-fp32": ("sana", "dmd2", "run.batch_size=2"),
    "sd-dmd2-offload": ("sd", "dmd2", "run.precision=bf16 run.batch_size=4 run.offload=true"),
    # averages and all activations would not fit beside whole networks
    "sdxl-dmd2-offload": (
        "sdxl",
        "dmd2",
        "run.precision=bf16 run.offload=true run.ema=0 model.gradient_checkpointing=true",
    ),
    "sd-dmd2-dtype": ("sd", "dmd2", "run.precision=bf16 run.batch_size=4 model.dtype=bf16"),
    "sd-lcm-8bit": ("sd", "lcm", "run.precision=bf16 run.batch_size=8 optim.student.name=adamw8bit"),
}
"""Name -> family, method, and what else is set, by default one image and averages of the weights."""
TURNS = 3
"""Of each phase; the first makes the optimizer's states and is not timed."""
ROUNDS = 5
"""Of turns and passes, for the ratio."""
ITEMS = 64
"""Prompts, of which each has an image where the method needs them."""
LIMIT, ESTIMATE_LIMIT = 90.0, 600.0
"""Seconds that the process of a case may take, and that of an estimate."""


def recipe_of(name: str, folder: Path) -> Recipe:
    """The recipe of a case. folder: with prompts.txt and images/, and tiny pipelines by family if they are meant."""
    family, method, changes = CASES[name]
    tiny = folder / family
    tree = {
        "model": {"family": family, "path": str(tiny) if tiny.is_dir() else PATHS[family]},
        "method": {"name": method},
        "data": {"source": "prompts", "path": str(folder / "prompts.txt")}
        if method == "dmd2"
        else {"source": "images", "path": str(folder / "images")},
        "optim": {role: {} for role in (("student", "fake_score") if method == "dmd2" else ("student",))},
        "run": {"out": str(folder / "run"), "steps": 1000, "batch_size": 1, "ema": 0.999, "cache_latents": True},
    }
    return recipe.decode(config.override(tree, changes.split()), name)


def write_data(folder: Path, tiny: Iterable[str]) -> None:
    """prompts.txt, images/ of random pixels, and tiny pipelines of these families."""
    prompts = [f"prompt {i}" for i in range(ITEMS)]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    for i in range(ITEMS):
        pixels = draw.integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png", compress_level=0)
    rows = [json.dumps({"file": f"{i}.png", "caption": prompt}) for i, prompt in enumerate(prompts)]
    (folder / "images" / "captions.jsonl").write_text("\n".join(rows))
    for family in tiny:
        module = importlib.import_module("tests.tiny" if family == "sd" else f"tests.families.{family}")
        module.pipeline(seed=0).save_pretrained(folder / family)


# A case, in its own process


def teacher(
    model: Model, precision: str, device: torch.device, start: float = 1.0, without: Sequence[str] = ()
) -> tuple[Family, ModuleType]:
    """What ``train.load_teacher`` gives, with random weights made on the device and random conditions of prompts."""
    folder, about = estimate.folder_of(model)
    made = estimate.component

    def component(place: Path, library: str, name: str) -> Any:
        with device if place.name != "scheduler" else nullcontext():  # whose tables are the host's
            return made(place, library, name)

    with mock.patch.object(estimate, "component", component):
        pipeline = estimate.opened(folder)
    module = train.family_of(str(folder), model.family)
    autocast = None if precision == "fp32" else recipe.DTYPES[precision]
    family: Family = module.load(pipeline.to(device), device, autocast, start, model.image_size, model.num_frames)
    train.fix_scale(family, model)
    like = estimate.conditions(family, about, 1, device)

    def encode_prompts(prompts: Sequence[str]) -> Cond:
        """Masks let all tokens through."""
        return {
            name: (torch.ones_like if name == "mask" else torch.randn_like)(row.expand(len(prompts), *row.shape[1:]))
            for name, row in like.items()
        }

    return replace(family, encode_prompts=encode_prompts, uncond=lambda: encode_prompts([""])), module


def held_now(session: Session, is_here: Callable[[Tensor], bool]) -> int:
    """Bytes of all that is held and ``is_here``, gradients as they are at the moment."""
    networks = [one for network in session.method.networks.values() for one in members(network)]
    pipeline: Any = session.family.pipeline(lora.plain(members(session.family.denoiser.network)[0]), None)
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    modules = [*session.method.networks.values(), *map(lora.plain, networks), *parts]
    found: list[Any] = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    found += [p.grad for p in found if isinstance(p, nn.Parameter) and p.grad is not None]
    found += [t for o in session.engine.optimizers.values() for state in o.state.values() for t in state.values()]
    found += [t for average in session.ema.values() for t in average.average.values()]
    return memory.size([t for t in found if isinstance(t, Tensor) and is_here(t)], set())


def measured(given: Recipe, device: torch.device, with_ratio: bool) -> dict[str, Any]:
    """What a training of this recipe holds and takes.

    Returns:
        peak: of torch's allocator while phases take their turns, in bytes; None without a GPU. built: its peak before.
        held: by phase, bytes on the device when its backward pass is done. parts: as ``memory.held`` has them.
        seconds: of a step, each phase by how often it is due; turns: seconds of each phase's later turns, and of one
        that follows another of the same phase.
        ratio, ratio_low, ratio_high, floor_seconds: as ``fastgen bench cost`` has them, if asked for.
    """
    cuda = device.type == "cuda"
    with mock.patch.object(train, "load_teacher", teacher):
        session = train.build(given, device)
    engine, phases = session.engine, session.method.phases
    held: dict[str, int] = {}
    rest = engine.offload.rest
    now = ""

    def resting() -> None:
        """Look at what is there before the weights that calls have brought are dropped."""
        if now and any(p.grad is not None for ps in engine.parameters.values() for p in ps.values()):
            held[now] = held_now(session, lambda tensor: tensor.device.type == device.type)
        rest()

    def timed(phase: Phase, step: int) -> float:
        for samples in engine.micro_batches(step):
            engine.data.batch(samples)  # encoding, which is done once
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        engine.turn(phase, step)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    found: dict[str, Any] = {"peak": None, "built": None}
    if cuda:
        found["built"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds: dict[str, list[float]] = {phase.name: [] for phase in phases}
    with mock.patch.object(engine.offload, "rest", resting):
        for turn in range(TURNS):
            for phase in phases:
                now = phase.name
                seconds[phase.name].append(timed(phase, turn * phase.every))
            now = ""
            for average in session.ema.values():
                average.update()
    if cuda:
        found["peak"] = torch.cuda.max_memory_allocated()
    again = {phase.name: [timed(phase, TURNS * phase.every), timed(phase, TURNS * phase.every)][1] for phase in phases}
    later = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    found |= {
        "held": held,
        "parts": memory.held(session),
        "seconds": sum(later[phase.name] / phase.every for phase in phases),
        "turns": {name: {"seconds": seconds[name], "again": again[name]} for name in seconds},
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "attention": session.attention,
    }
    if with_ratio:
        with tempfile.TemporaryDirectory() as folder:
            bench = cost.Bench(session, Path(folder), ROUNDS)
            bench.go("wall")
            row = bench.row()
        found |= {name: row[name] for name in ("ratio", "ratio_low", "ratio_high", "floor_seconds")}
        found |= {"bench_seconds": row["seconds"], "bench_rest": row["rest"], "rounds": row["rounds"]}
    return found


def part(what: str, name: str, folder: Path, device: estimate.Device) -> dict[str, Any]:
    """What a child process finds of a case."""
    given = recipe_of(name, folder)
    if what == "estimated":
        return estimate.estimate(given, device)
    # with run.offload each pass would bring the weights anew, and the floor would be none
    return measured(given, torch.device(device), CASES[name][0] == "sd" and not given.run.offload)


# All cases


def child(what: str, name: str, folder: Path, device: estimate.Device, limit: float) -> dict[str, Any]:
    """What a process of its own finds of a case within ``limit`` seconds; or ``error``, a line."""
    command = [sys.executable, "-m", "tests.gpu.memory", name, "--child", what, "--device", device]
    own = {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if what == "estimated":
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, "--folder", str(folder)],
            env={**os.environ, **own},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not {what} within {limit:g} s"}
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["nothing was said"]
        return {"error": f"ended with {done.returncode}: {said[-1].strip()[:300]}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return found


COLUMNS = (
    *("case", "estimate GB", "measured GB", "difference", "held", "host GB"),
    *("s/step", "ratio", "quartiles"),
)


def line(name: str, row: Mapping[str, Any]) -> list[str]:
    """A case's line of the table; ``held`` says by how many bytes the measured ones differ, by phase."""
    theirs, ours = row["estimated"], row["measured"]
    errors = [f"{what}: {row[what]['error']}" for what in ("estimated", "measured") if "error" in row[what]]
    if errors:
        return [name, *(f"{errors[0]}" if i == 0 else "" for i in range(len(COLUMNS) - 1))]
    peak, held = ours["peak"], {}
    for phase, size in ours["held"].items():
        held[phase] = size - theirs["turns"][phase]["held"]
    return [
        name,
        f"{theirs['peak'] / 1e9:.2f}",
        "" if peak is None else f"{peak / 1e9:.2f}",
        "" if peak is None else f"{100 * (theirs['peak'] / peak - 1):+.1f} %",
        "equal" if not any(held.values()) else ", ".join(f"{phase} {more:+,}" for phase, more in held.items()),
        f"{theirs['host'] / 1e9:.2f}",
        f"{ours['seconds']:.3f}",
        f"{ours['ratio']:.3f}" if "ratio" in ours else "",
        f"{ours['ratio_low']:.3f} {ours['ratio_high']:.3f}" if "ratio" in ours else "",
    ]


def run(names: Sequence[str], out: Path | None, tiny: bool, limit: float = LIMIT) -> int:
    """Measure and print these cases; the exit code, 1 if one could not be had."""
    device: estimate.Device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: dict[str, dict[str, Any]] = {}

    def written(name: str, **more: Any) -> None:
        rows.setdefault(name, {}).update(more)
        if out:
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 3)) as pool:
        folder = Path(place)
        write_data(folder, {CASES[name][0] for name in names} if tiny else ())
        slowest_first = sorted(names, key=lambda name: CASES[name][0] not in ("sd3", "sdxl"))
        estimates: dict[str, Future[dict[str, Any]]] = {
            name: pool.submit(child, "estimated", name, folder, device, ESTIMATE_LIMIT) for name in slowest_first
        }
        for name in names:
            found = child("measured", name, folder, device, limit)
            written(name, measured=found)
            print(f"{time.perf_counter() - began:5.0f} s  {name}: {told(found)}", file=sys.stderr, flush=True)
        for name, estimated in estimates.items():
            written(name, estimated=estimated.result())
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in names:
        print("| " + " | ".join(line(name, rows[name])) + " |")
    return int(any("error" in found for row in rows.values() for found in row.values()))


def told(found: Mapping[str, Any]) -> str:
    """What was measured, for who waits."""
    if "error" in found:
        return str(found["error"])
    return "no peak without a GPU" if found["peak"] is None else f"peak {found['peak'] / 1e9:.2f} GB"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--out", type=Path, help="JSON file, written after each case")
    parser.add_argument("--tiny", action="store_true", help="networks as small as they go; needs no GPU")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that the process of a case may take")
    parser.add_argument("--child", choices=("measured", "estimated"), help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.cases or list(CASES)
    for name in names:
        if name not in CASES:
            parser.error(f"no case {name!r}; known are {', '.join(CASES)}")
    if given.child:
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        print(json.dumps(part(given.child, names[0], given.folder, given.device)))
        return
    if not given.tiny and not torch.cuda.is_available():
        print("no CUDA device: --tiny runs the same on small networks", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(names, given.out, given.tiny, given.limit))


if __name__ == "__main__":
    main()
