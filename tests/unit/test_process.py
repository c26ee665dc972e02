"""The memory of a process: what it says of itself, and that it keeps what it frees."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgen import process

HELD = """
import torch
from fastgen import process
before = process.resident("VmRSS")
held = torch.ones(16 * 2**20)
print(process.resident("VmRSS") - before)
del held
print(process.resident("VmHWM") - before)
"""


def test_resident_memory_grows_with_what_is_kept_and_its_peak_stays() -> None:
    """In a process of its own: this one may still keep what an earlier test has freed."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    assert min(map(int, done.stdout.split())) > 60 * 2**20


def test_without_proc_the_most_so_far_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert process.resident("VmRSS") == process.resident("VmHWM") > 2**20


def test_the_peak_memory_is_the_process_s_own_and_grows_with_it() -> None:
    """On Linux getrusage also counts what the parent held: a bare child of this process would seem as large as it."""
    before = process.peak_memory(torch.device("cpu")) / 1e6
    block = torch.ones(300_000_000)  # 1.2 GB
    held = process.peak_memory(torch.device("cpu")) / 1e6
    assert held > before + 200
    assert held > block.nbytes / 1e6
    code = "import torch; from fastgen.process import peak_memory; print(peak_memory(torch.device('cpu')) / 1e6)"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(seen) < 1000 < held


FREED = """
import sys, torch
from fastgen import process
if sys.argv[1] == "kept":
    assert process.keep_freed_memory()
blocks = [torch.ones(2**20) for _ in range(64)]  # 4 MB each
held = process.resident("VmRSS")
del blocks
print((held - process.resident("VmRSS")) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own allocator is on Linux")
def test_what_is_freed_is_kept_for_the_next_pass() -> None:
    def returned(how: str) -> float:
        done = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert returned("kept") < 32 < 200 < returned("as it is")


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: None) -> object:
        return object()

    monkeypatch.setattr(process.ctypes, "CDLL", missing)
    assert not process.keep_freed_memory()


KEEPS = """
try:
    raise OSError
except OSError as error:
    kept = error
"""
"""What xformers does where its kernels are built for another torch."""


def test_what_a_module_keeps_of_its_import_is_nothing_of_the_caller_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def after(load: Callable[[str], ModuleType], name: str) -> weakref.ref[torch.nn.Module]:
        (tmp_path / f"{name}.py").write_text(KEEPS)
        importlib.invalidate_caches()
        assert isinstance(load(name).kept, OSError)
        network = torch.nn.Linear(1, 1)
        return weakref.ref(network)

    try:
        held, free = after(importlib.import_module, "keeps_one"), after(process.import_apart, "keeps_two")
        gc.collect()
        assert held() is not None, "python itself no longer keeps it"
        assert free() is None
    finally:
        for name in ("keeps_one", "keeps_two"):
            sys.modules.pop(name, None)
    with pytest.raises(ModuleNotFoundError, match="keeps_three"):
        process.import_apart("keeps_three")
