"""Networks split over two processes (gloo) do what whole ones in one process do with the same global batch.

The tiny Stable Diffusion of ``tests.tiny``, whose U-Net has blocks within blocks. All that two processes do is done in
one start of them, ``work``; what they leave in files is looked at here.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from fastgen import checkpoint, derivative, parallel, sharding
from fastgen.adversary import Adversarial
from fastgen.ema import EMA
from fastgen.engine import Engine
from fastgen.family import Family
from fastgen.guidance import Scales
from fastgen.method import Batch, Method
from fastgen.pipelines import sd
from fastgen.rng import seed_of
from fastgen.trainers import dmd2, lcm
from tests import tiny
from tests.oracle import optims

PROCESSES, STEPS, BATCH = 2, 4, 4
WAYS = ("whole", "full", "zero2")


class Images:
    """Latents and prompts by number."""

    def __init__(self, family: Family) -> None:
        with torch.no_grad():
            self.cond, self.uncond = family.encode_prompts(tiny.PROMPTS), family.uncond()
        self.shape = family.latent_shape

    def batch(self, samples: Sequence[int]) -> Batch:
        rows = torch.tensor([s % len(tiny.PROMPTS) for s in samples])
        cond = {name: value[rows] for name, value in self.cond.items()}
        seeds = [torch.Generator().manual_seed(seed_of("data", s)) for s in samples]
        x0 = torch.stack([torch.randn(self.shape, generator=g) for g in seeds])
        return Batch(list(samples), cond, self.uncond, x0)


def one_network(family: Family) -> Method:
    """A student, and an average of it as the target."""
    # larger scales, and the Huber distance by its small c, would enlarge the last bits, which differ by batch size
    return lcm.Method(lcm.Config(guidance=Scales(default=7.5, low=1.0, high=7.5), metric="l2"), family, 2)


def two_networks(family: Family) -> Method:
    """A student and a fake score, each with an optimizer."""
    return dmd2.Method(dmd2.Config(guidance_scale=2.0, student_every=2), family, 2)


def three_networks(family: Family) -> Method:
    """And a discriminator on the fake score's features, with a gradient penalty."""
    adversarial = Adversarial(0.1, features="fake_score", r1=0.1)
    return dmd2.Method(dmd2.Config(guidance_scale=2.0, student_every=2, adversarial=adversarial), family, 2)


METHODS: dict[str, Callable[[Family], Method]] = {f.__name__: f for f in (one_network, two_networks, three_networks)}


class Run:
    """A method's engine and average, its networks whole or split."""

    def __init__(self, name: str, path: Path, way: str = "whole", family: Family | None = None) -> None:
        # from files: the words of two processes' own tiny tokenizers have different numbers
        self.family = family or sd.load(path / "pipeline")
        torch.manual_seed(parallel.rank())  # what starts at random starts as the main process's
        self.method = METHODS[name](self.family)
        if name == "one_network" and way == "full":  # recomputed blocks are put together anew
            student: Any = self.method.networks["student"]
            student.enable_gradient_checkpointing()
        if way != "whole":
            sharding.shard(self.method.networks.values(), way, torch.device("cpu"))  # type: ignore[arg-type]
        self.ema = {"student": EMA(self.method.networks["student"], 0.9)}
        # eps: differences in the last bits of small gradients are not to be blown up to whole steps
        rates = optims(self.method, lr=1e-3, eps=1e-3, clip=0.5)
        self.engine = Engine(self.method, Images(self.family), rates, batch_size=BATCH // parallel.size(), steps=STEPS)

    def train(self, start: int, stop: int) -> list[dict[str, float]]:
        logs = []
        for _, log in self.engine.run(range(start, stop)):
            self.ema["student"].update()
            logs.append(log)
        return logs

    def save(self, folder: Path, step: int) -> Path:
        return checkpoint.save(folder, step, self.engine, self.ema, 9)


def work(rank: int, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    path = Path(folder)
    for name in METHODS:
        for way in WAYS:
            run = Run(name, path, way)
            logs = run.train(0, STEPS)
            run.save(path / f"{name}-{way}", STEPS)
            (path / f"{name}-{way}-{rank}.json").write_text(json.dumps(logs))
    measure(path, rank)
    exchange(path)
    from_files(path, rank)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in test_parallel


def measure(path: Path, rank: int) -> None:
    """The share of each network's numbers that this process holds."""
    run = Run("three_networks", path, "full")
    shares = {}
    for role, network in run.method.networks.items():
        own = sum(parallel.local(p).numel() for p in network.parameters())
        shares[role] = own / sum(p.numel() for p in network.parameters())
    shares["ema"] = sum(t.numel() for t in run.ema["student"].average.values()) / sum(
        p.numel() for p in run.ema["student"].parameters.values()
    )
    run.train(0, 1)
    states = run.engine.optimizers["fake_score"].state
    shares["moments"] = sum(parallel.local(s["exp_avg"]).numel() for s in states.values()) / sum(
        p.numel() for p in states
    )
    with run.ema["student"].applied():  # after a call the weights are together, and must not stay as they were
        x, t = torch.ones(2, 4, 8, 8), torch.full((2,), 500.0)
        cond = run.engine.data.batch([0, 1]).cond
        denoiser = run.method.student  # type: ignore[attr-defined]
        with torch.no_grad():
            averaged = denoiser(x, t, cond).y
    with torch.no_grad():
        own_weights = denoiser(x, t, cond).y
        shares["applied"] = float((averaged - own_weights).abs().max() > 0)
    (path / f"shares-{rank}.json").write_text(json.dumps(shares))


def exchange(path: Path) -> None:
    """Go on from what one process has saved, and save it again as it is."""
    run = Run("three_networks", path, "full")
    assert checkpoint.load(path / "one" / "checkpoint-2", run.engine, run.ema) == 2
    run.save(path / "again", 2)
    run.train(2, STEPS)
    run.save(path / "on", STEPS)


def from_files(path: Path, rank: int) -> None:
    """Networks that are read when they have been split."""
    family = sd.load(path / "pipeline", "cpu", None, 1.0, None, None, ("blocks",))
    outlined = family.denoiser.network
    found = {"outlined": sharding.is_outlined(outlined), "device": str(outlined.device)}
    empty = sum(p.numel() for p in outlined.parameters() if p.is_meta)
    found["share"] = empty / sum(p.numel() for p in outlined.parameters())
    run = Run("three_networks", path, "full", family)
    whole = Run("three_networks", path)
    heads = [r.method.networks["discriminator"].state_dict().values() for r in (run, whole)]
    found["heads"] = max(float((a - b).abs().max()) for a, b in zip(*heads, strict=True))
    batch = whole.engine.data.batch([0, 1])
    x, t = torch.ones(2, 4, 8, 8), torch.full((2,), 500.0)
    for role in ("teacher", "student", "fake_score"):
        one, other = (getattr(r.method, role) for r in (run, whole))
        with torch.no_grad():
            found[role] = float((one(x, t, batch.cond).y - other(x, t, batch.cond).y).abs().max())
    sides = [derivative.along(r.method.teacher, lambda p: p.y, x, t, batch.cond, x, t) for r in (run, whole)]
    found["derivative"] = max(float((a - b).abs().max()) for a, b in zip(*sides, strict=True))
    (path / f"files-{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the two processes: sums in another order differ by a rounding, which AdamW's first steps make larger."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny.pipeline().save_pretrained(folder / "pipeline")
    run = Run("three_networks", folder)
    run.train(0, 2)
    run.save(folder / "one", 2)
    mp.spawn(work, args=(str(folder),), nprocs=PROCESSES)
    return folder


@functools.cache
def alone(name: str, folder: Path) -> tuple[list[dict[str, float]], Path]:
    """Logs and checkpoint of one process with whole networks."""
    run = Run(name, folder)
    logs = run.train(0, STEPS)
    return logs, run.save(folder / f"{name}-alone", STEPS)


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest and the mean difference of all tensors of two checkpoints."""
    assert [f.name for f in sorted(one.iterdir())] == [f.name for f in sorted(other.iterdir())]
    each = []
    for file in sorted(one.glob("*.safetensors")):
        a, b = load_file(file), load_file(other / file.name)
        assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
        each += [(a[n].double() - b[n].double()).abs().flatten() for n in a]
    found = torch.cat(each)
    return float(found.max()), float(found.mean())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one_with_the_same_global_batch(results: Path, name: str, way: str) -> None:
    logs, path = alone(name, results)
    largest, mean = differences(path, results / f"{name}-{way}" / f"checkpoint-{STEPS}")
    assert largest < 1e-5
    assert mean < 1e-7
    found = json.loads((results / f"{name}-{way}-0.json").read_text())
    assert found == json.loads((results / f"{name}-{way}-1.json").read_text())
    for ours, theirs in zip(found, logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_each_process_holds_half_of_every_network_average_and_moment(results: Path, rank: int) -> None:
    found = json.loads((results / f"shares-{rank}.json").read_text())
    assert found.pop("discriminator") == 1  # its penalty differentiates twice
    assert found.pop("applied") == 1
    assert found == pytest.approx(dict.fromkeys(("teacher", "student", "fake_score", "ema", "moments"), 0.5), abs=0.02)


def test_a_checkpoint_of_one_process_is_loaded_by_two_and_saved_again_byte_for_byte(results: Path) -> None:
    one, again = results / "one" / "checkpoint-2", results / "again" / "checkpoint-2"
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}
    largest, mean = differences(alone("three_networks", results)[1], results / "on" / f"checkpoint-{STEPS}")
    assert largest < 1e-5
    assert mean < 1e-7


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_two_processes_is_loaded_by_one_bit_for_bit(results: Path, way: str, tmp_path: Path) -> None:
    path = results / f"three_networks-{way}" / f"checkpoint-{STEPS}"
    run = Run("three_networks", results)
    assert checkpoint.load(path, run.engine, run.ema) == STEPS
    again = run.save(tmp_path, STEPS)
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in path.iterdir()}


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_a_network_read_from_files_when_it_has_been_split_is_the_same(results: Path, rank: int) -> None:
    found = json.loads((results / f"files-{rank}.json").read_text())
    assert found.pop("outlined")
    assert found.pop("device") == "cpu"
    assert found.pop("share") > 0.8
    assert found.pop("derivative") < 1e-5
    assert found == dict.fromkeys(("teacher", "student", "fake_score", "heads"), 0.0)
