"""Seconds, network evaluations and memory per image of a pipeline called for one image at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import calls
from fastgen.export import called

from .context import About, Context, Extractor, Seen

ABOUT = About(
    "Latency",
    ("call",),
    (
        "seconds_per_image",
        "seconds_min",
        "seconds_max",
        "seconds_to_first_image",
        "images_per_second",
        "network_evaluations",
        "peak_memory_mib",
    ),
    "low",
)

WARMUP = 1
"""Calls between the first, which is timed as such, and the timed ones."""
_DENOISERS = ("unet", "transformer", "transformer_2")


def measure(
    pipeline: Any, prompts: Sequence[str], arguments: Mapping[str, Any], *, repeats: int = 5, warmup: int = WARMUP
) -> dict[str, float]:
    """Time calls of one image each, prompts in turn.

    Returns:
        seconds_to_first_image: of the very first call, with whatever is set up or compiled in it; then, after
        ``warmup`` calls, seconds_per_image, the median of ``repeats`` calls, with seconds_min and seconds_max, and
        images_per_second, one divided by it;
        network_evaluations: rows the denoising network saw per image, so that guidance by a doubled batch counts
        twice; peak_memory_mib: on CUDA what torch allocated, on Linux otherwise the resident memory of the whole
        process, elsewhere left out.
    """
    if not prompts:
        raise ValueError("latency needs at least one prompt")
    seconds, draw = [], called(pipeline)
    with counted(pipeline) as rows, peak_memory(pipeline.device) as peak:
        for i in range(1 + warmup + repeats):
            generator, prompt = torch.Generator().manual_seed(i), calls.prompted(pipeline, prompts[i % len(prompts)])
            began = time.perf_counter()
            _ = draw(**prompt, generator=generator, **arguments)[0]
            seconds.append(time.perf_counter() - began)
    timed = seconds[1 + warmup :]
    return {
        "seconds_per_image": statistics.median(timed),
        "seconds_min": min(timed),
        "seconds_max": max(timed),
        "seconds_to_first_image": seconds[0],
        "images_per_second": 1 / statistics.median(timed),
        "network_evaluations": sum(rows) / len(seconds),
        **peak,
    }


@contextmanager
def counted(pipeline: Any) -> Iterator[list[int]]:
    """Within it, the batch rows of each call of the pipeline's denoising networks are appended to the list.

    Raises ValueError if the pipeline has none of the known names.
    """
    rows: list[int] = []
    networks = [part for name, part in pipeline.components.items() if name in _DENOISERS and part is not None]
    if not networks:
        raise ValueError(f"{type(pipeline).__name__} has none of {', '.join(_DENOISERS)} to count calls of")

    def hook(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else next(iter(kwargs.values()))))

    handles = [network.register_forward_pre_hook(hook, with_kwargs=True) for network in networks]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """On leaving, the mapping holds ``peak_memory_mib``, if this machine can tell."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
    except OSError:
        yield found
        return
    yield found
    status = Path("/proc/self/status").read_text()
    found["peak_memory_mib"] = int(status.split("VmHWM:")[1].split()[0]) / 1024


class Metric:
    """Times the context's call on its prompts; without one it has no value. It reads no image."""

    extractors: Sequence[Extractor] = ()

    def __init__(self, context: Context) -> None:
        """context.call: what is timed."""
        self._call = context.call

    def compute(self, seen: Seen) -> dict[str, float]:
        """What ``measure`` gives: under several processes each times its own device, and the main one's is written."""
        if self._call is None:
            return {}
        call = self._call
        return measure(call.pipeline, list(dict.fromkeys(seen.prompts)), call.arguments, repeats=call.repeats)

    def per_image(self, seen: Seen) -> dict[str, Tensor]:
        """Nothing: it is no matter of single images."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """How it was timed."""
        if self._call is None:
            return {}
        return {
            "batch_size": 1,
            "warmup": 1 + WARMUP,
            "repeats": self._call.repeats,
            "statistic": "median",
            "threads": torch.get_num_threads(),
        }
