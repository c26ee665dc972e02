"""Set up before any test."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)  # the tests' networks are tiny, and a thread each for two of them is slower than one
os.environ["OMP_NUM_THREADS"] = "1"  # also what the tests start, which else would round otherwise than they do
