"""Every test of this folder needs a CUDA device and is left out without one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import process
from tests.gpu import report

HERE = Path(__file__).parent
REASON = "needs a CUDA device"

if torch.cuda.is_available():  # before the first handle of cuBLAS is made: its sums are then in a fixed order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with warnings.catch_warnings():  # what libraries warn of as they are imported is no error of a file of tests
        warnings.simplefilter("ignore")
        process.import_apart("diffusers.pipelines.pipeline_utils")
        process.import_apart("diffusers.models.attention_processor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            # what libraries warn of on a GPU is not what these tests are about
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not there:
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    keep(report)


def keep(ended: pytest.TestReport) -> None:
    """How a test ended, for the report."""
    if "tests/gpu/" not in ended.nodeid or (ended.when != "call" and ended.passed):
        return
    found: dict[str, Any] = {"outcome": ended.outcome, "seconds": round(ended.duration, 2)}
    if ended.failed:
        found["why"] = last_line(str(ended.longrepr))
    elif ended.skipped:
        told: Any = ended.longrepr
        found["why"] = str(told[2] if isinstance(told, tuple) else told).removeprefix("Skipped: ")
    report.outcome(ended.nodeid.partition("tests/gpu/")[2], found)


def last_line(text: str) -> str:
    """What was raised: the first line that pytest marks as an error."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (marked or text.strip().splitlines() or [""])[0][:400]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What a test changes of torch's own is changed back, and the device's memory is free for the next."""
    precision = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = precision
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


@pytest.fixture
def full_float32() -> None:
    """float32 products in float32: not rounded to TF32, which convolutions are by default."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def ordered(full_float32: None) -> None:
    """Sums in a fixed order wherever torch can."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
