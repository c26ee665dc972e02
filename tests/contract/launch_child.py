"""What each process of test_launch.py finds: how many there are, where it is, and how networks are to be split."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from fastgen import parallel, sharding

if __name__ == "__main__":
    device = parallel.device()
    total = parallel.sum_over_processes(torch.ones(1)).item()
    found = [parallel.size(), total, device.type, sharding.chosen()]
    Path(sys.argv[1], f"{parallel.rank()}.json").write_text(json.dumps(found))
    parallel.barrier()
    os._exit(0)  # as in test_parallel
