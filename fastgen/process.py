"""The memory of this process: how much it holds, and what it keeps of what it frees."""

from __future__ import annotations

import ctypes
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch


def resident(what: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most; without /proc both are the most so far."""
    try:
        # not getrusage, whose maximum a new process takes over from the one that started it
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of CUDA's allocator; on a CPU of the whole process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


KEPT = {-1: 2**31 - 1, -2: 2**28, -3: 2**25}
"""mallopt's M_TRIM_THRESHOLD: freed memory is given back from 2 GB on; M_TOP_PAD: taken by 256 MB; M_MMAP_THRESHOLD:
blocks up to 32 MB, the largest that glibc takes, come from what was kept."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, if this is glibc.

    Every pass frees what the next one takes again. By default much of it goes back to the system in between and comes
    back page by page, which on the emoji teacher is 5 to 20 % of a training step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc
        return False
    return all(mallopt(name, value) for name, value in KEPT.items())


def import_apart(name: str) -> ModuleType:
    """Import a module in a thread, so that nothing of the caller's lives on with it.

    A library may keep what was raised while it was imported. That keeps the frames that asked for it, and what these
    hold when they end: an xformers that is built for another torch kept the networks of the first training.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(importlib.import_module, name).result()
