"""Two processes share the images of an evaluation and get the numbers of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.data import Item
from fastgen.evaluation import features
from fastgen.evaluation.config import EvalConfig
from fastgen.evaluation.runner import Subject, evaluate


class Noise:
    """A source of 30 noise images."""

    has_images = True
    candidates = ()

    def concept(self, prompt):
        return prompt

    def __len__(self):
        return 30

    def item(self, index):
        return Item(f"number {index % 7}", np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8))


class Pixels:
    """Features that are the pixels themselves."""

    key, num_features = "pixels", 48

    def __call__(self, images, prompts):
        return images.flatten(1).float()

    def protocol(self):
        return {}


class Painter:
    """A pipeline whose picture is its generator's noise."""

    def __init__(self):
        from diffusers import DDIMScheduler

        self.network, self.scheduler = torch.nn.Identity(), DDIMScheduler()
        self.components, self.device = {"unet": self.network}, torch.device("cpu")

    def set_progress_bar_config(self, **_):
        pass

    def to(self, device):
        return self

    def __call__(self, prompt, generator, **_):
        from PIL import Image

        noise = [torch.randint(0, 256, (4, 4, 3), generator=g, dtype=torch.uint8) for g in generator]
        return ([Image.fromarray(self.network(n).numpy()) for n in noise],)


def run(out):
    features.extractor = lambda _: Pixels()
    config = EvalConfig(metrics=["fid"], num_images=13, batch_size=3, comparison=5, bootstrap=3)
    return evaluate([Subject("painter", "teacher", Painter(), 1, 1.0)], config, Noise(), out=out)


def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "extractor", features.extractor)
    want = run(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    children = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path / "two")], env=environment | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    got = json.loads((tmp_path / "two" / "results.json").read_text())
    for one, two in zip(want, got, strict=True):
        assert two["fid"] == pytest.approx(one["fid"], rel=1e-9)
        assert two["protocol"]["processes"] == 2
        assert two["protocol"]["metrics"]["fid"] == one["protocol"]["metrics"]["fid"]
    for folder in ("real-images", "painter"):
        for i in range(5):
            pictures = [(tmp_path / n / "comparison" / folder / f"{i}.png").read_bytes() for n in ("one", "two")]
            assert pictures[0] == pictures[1]
    assert len(list((tmp_path / "two" / "images" / "painter").glob("*.png"))) == 13


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    run(Path(sys.argv[1]))
    torch.distributed.barrier()  # as in test_parallel.py
    torch.distributed.destroy_process_group()
