"""Several processes: two over gloo do what one does with the same global batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen import checkpoint, parallel
from fastgen.adversary import Adversarial
from fastgen.ema import EMA
from fastgen.engine import Engine, NonFiniteLoss
from fastgen.method import Batch, Phase, Terms
from fastgen.rng import Noise
from fastgen.trainers import dmd2
from tests.oracle import Samples, Toy, conv_family, linear_method, optims, states, train

PROCESSES = 2
STEPS = 6


def linear(batch_size: int) -> Engine:
    method = linear_method(every=2)
    return Engine(method, Samples((4,)), optims(method, lr=1e-2), batch_size=batch_size, steps=STEPS)


def distilling(batch_size: int) -> Engine:
    config = dmd2.Config(guidance_scale=2.0, student_every=2, adversarial=Adversarial(0.1, features="fake_score"))
    torch.manual_seed(parallel.rank())  # heads start at random: the main process's must go to all
    family = conv_family()
    torch.manual_seed(parallel.rank())
    method = dmd2.Method(config, family, 2)
    return Engine(method, Samples((2, 8, 8)), optims(method, lr=1e-3), batch_size=batch_size, steps=STEPS)


ENGINES = {"linear": linear, "distilling": distilling}


def flat(engine: Engine) -> dict[str, Tensor]:
    found = {f"{r}/{n}": v.contiguous() for r, s in states(engine.method).items() for n, v in s.items()}
    return found


def run(name: str, batch_size: int) -> dict[str, Tensor]:
    engine = ENGINES[name](batch_size)
    logs = train(engine, range(STEPS))
    numbers = {f"log/{i}/{key}": torch.tensor(value) for i, log in enumerate(logs) for key, value in log.items()}
    return flat(engine) | numbers


def odd_one_out() -> Engine:
    """The loss is NaN for the second process's sample only."""
    network = nn.Linear(4, 1)

    def loss(batch: Batch, rng: Noise) -> Terms:
        bad = torch.tensor([float("nan") if s % 2 else 1.0 for s in batch.samples])
        return {"error": network(rng.normal((4,)))[:, 0] * bad}

    method = Toy({"a": network}, (Phase("only", ["a"], loss),))
    return Engine(method, Samples((4,)), optims(method), batch_size=1, steps=1)


def work(rank: int, folder: str) -> None:
    """What each process does; results go to files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    path = Path(folder)
    assert (parallel.size(), parallel.rank()) == (PROCESSES, rank)
    for name in ENGINES:
        save_file(run(name, 2), path / f"{name}-{rank}.safetensors")

    total = parallel.sum_over_processes(torch.tensor([1.0 + rank, 10.0]))
    network = nn.Linear(3, 2)
    gradients = [p for p in network.parameters()]
    gradients[0].grad = torch.full((2, 3), 1.0 + rank)
    if rank == 0:
        gradients[1].grad = torch.full((2,), 5.0)  # the other process's loss did not reach it
    parallel.sum_gradients(gradients)
    torch.manual_seed(rank)
    other = nn.BatchNorm1d(3)
    nn.init.normal_(other.weight)
    other.running_mean.fill_(rank)  # type: ignore[union-attr, operator]
    parallel.broadcast(other)
    found = {
        "total": total,
        "weight": gradients[0].grad,
        "bias": gradients[1].grad,
        "broadcast": other.weight.detach(),
    }
    found["buffer"] = other.running_mean  # type: ignore[assignment]
    save_file({n: v.contiguous() for n, v in found.items() if v is not None}, path / f"ops-{rank}.safetensors")

    assert parallel.first_of("" if rank == 0 else "the other's") == "the other's"
    with parallel.waiting():
        if rank == 0:
            with parallel.alone():  # nothing of this may wait for the other process
                parallel.barrier()
                parallel.broadcast(network)
                parallel.sum_gradients(network.parameters())
                assert parallel.sum_over_processes(torch.ones(1)) == 1
                assert parallel.first_of("") == ""
                assert not parallel.together()
    assert parallel.together()

    engine = linear(2)
    ema = {"b": EMA(nn.Linear(2, 2), 0.5)}
    train(engine, range(2))
    written = checkpoint.save(path, 2, engine, ema, 1)
    assert checkpoint.load(written, engine, ema) == 2  # every process, as soon as save returns

    with pytest.raises(NonFiniteLoss, match="step 0, phase 'only'"):
        train(odd_one_out(), [0])  # all stop, or the others would wait for ever
    dist.barrier()  # a process that is gone closes its connections, which another may still be using
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's own end was seen to abort: "terminate called without an active exception"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    mp.spawn(work, args=(str(folder),), nprocs=PROCESSES)
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_equal_one_with_the_same_global_batch(results: Path, name: str) -> None:
    one, two = run(name, 4), load_file(results / f"{name}-0.safetensors")
    assert one.keys() == two.keys()
    weights = torch.cat([(one[n] - two[n]).abs().flatten() for n in one if not n.startswith("log/")])
    assert weights.max() < 1e-5
    assert weights.mean() < 1e-6
    for key in (k for k in one if k.startswith("log/")):
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ENGINES)
def test_both_processes_hold_the_same_weights_and_logs_bit_for_bit(results: Path, name: str) -> None:
    a, b = (load_file(results / f"{name}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("rank", range(2))
def test_gradients_are_summed_also_where_one_process_has_none(results: Path, rank: int) -> None:
    found = load_file(results / f"ops-{rank}.safetensors")
    assert found["weight"].unique().tolist() == [3]
    assert found["bias"].tolist() == [5, 5]
    assert found["total"].tolist() == [3, 20]


def test_broadcast_gives_the_main_process_s_parameters_and_buffers_to_all(results: Path) -> None:
    a, b = (load_file(results / f"ops-{rank}.safetensors") for rank in range(2))
    assert torch.equal(a["broadcast"], b["broadcast"])
    assert torch.equal(a["buffer"], b["buffer"])
    assert b["buffer"].tolist() == [0, 0, 0]


def test_processes_wrote_one_checkpoint(results: Path) -> None:
    assert [p.name for p in checkpoint.all_checkpoints(results)] == ["checkpoint-2"]


def test_a_single_process_shares_nothing() -> None:
    assert (parallel.size(), parallel.rank()) == (1, 0)
    network = nn.Linear(2, 2)
    before = [p.clone() for p in network.parameters()]
    parallel.broadcast(network)
    parallel.sum_gradients(network.parameters())
    parallel.barrier()
    with parallel.waiting(), parallel.alone():
        assert parallel.first_of("a") == "a"
    assert parallel.units(network) == []
    parallel.reshard(network)
    values = torch.ones(3)
    assert parallel.sum_over_processes(values) is values
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


def test_large_gradients_go_in_several_messages_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_BUCKET", 10)
    tensors = [torch.zeros(n, dtype=d) for n, d in ((4, torch.float32), (6, torch.float32), (1, torch.float32))]
    tensors += [torch.zeros(30), torch.zeros(2, dtype=torch.float64)]
    sizes = [[t.numel() for t in bucket] for bucket in parallel._buckets(tensors)]
    assert sizes == [[4, 6], [1], [30], [2]]
