"""Set up before any test."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # the tests' networks are tiny, and a thread each for two of them is slower than one
