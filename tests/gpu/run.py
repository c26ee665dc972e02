"""``make gpu``: each file of this folder in a process of its own, then docs/gpu.json.

A crash of one file, or one that hangs, leaves the others alone. What is timed runs with nothing beside it.
FASTGEN_GPU_REPORT: the report, docs/gpu.json if not set. FASTGEN_GPU_LOG: what pytest said, runs/gpu.log. Words on the
command line go to pytest (-k NAME), but for names of files, which choose these: ``python -m tests.gpu.run waits``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.gpu import report, world

HERE = Path(__file__).parent
TIMED = ("offload", "compiled", "costs")
"""Files whose figures are times: after all others, one by one."""
SECONDS = 300
"""Most that a file may take."""
AT_ONCE = 8


def one(name: str, words: Sequence[str]) -> tuple[str, int, float, str]:
    """Run a file: its name, exit code, seconds and output."""
    began = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", HERE / f"test_{name}.py", "-q", "-rfEs", "--tb=short", "--no-header"]
    try:
        done = world.child(*pytest, "-p", "no:cacheprovider", "-W", "default", *words, timeout=SECONDS)
        code, said = done.returncode, done.stdout + done.stderr
    except AssertionError as error:
        code, said = 124, str(error)
        report.outcome(f"test_{name}.py", {"outcome": "failed", "why": f"did not end within {SECONDS} s"})
    return name, code, time.monotonic() - began, said


def main() -> int:
    """Exit code: 0 if all is well, 1 if a test failed, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    path = Path(os.environ.setdefault(report.VARIABLE, str(report.DEFAULT))).absolute()
    os.environ[report.VARIABLE] = str(path)
    log = Path(os.environ.get("FASTGEN_GPU_LOG", report.ROOT / "runs" / "gpu.log"))
    log.parent.mkdir(parents=True, exist_ok=True)
    files = [file.stem.removeprefix("test_") for file in sorted(HERE.glob("test_*.py"))]
    chosen = [word for word in sys.argv[1:] if word in files] or files
    words = [word for word in sys.argv[1:] if word not in files]
    if chosen == files and not words:
        path.unlink(missing_ok=True)
    with report.changed(path) as tree:
        tree["about"] = report.about()
    failed, began = [], time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as beside, ThreadPoolExecutor(1) as alone, log.open("w") as out:

        def told(ended: tuple[str, int, float, str]) -> None:
            name, code, seconds, said = ended
            out.write(f"==== {name} ({seconds:.0f} s, exit code {code})\n{said}\n")
            out.flush()
            summary = said.strip().splitlines()[-1] if said.strip() else "said nothing"
            print(f"{name}: exit code {code}, {seconds:.0f} s: {summary}", flush=True)
            for line in said.splitlines():
                if line.startswith(("FAILED", "ERROR")):
                    print(f"  {line[:300]}", flush=True)
            if code not in (0, 5):  # 5: -k left out all of them
                failed.append(name)

        for ended in beside.map(lambda name: one(name, words), [n for n in chosen if n not in TIMED]):
            told(ended)
        for ended in alone.map(lambda name: one(name, words), [n for n in chosen if n in TIMED]):
            told(ended)
    print(f"{path}: {time.monotonic() - began:.0f} s; {log} has what pytest said")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
