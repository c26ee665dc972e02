"""``fastgen train CONFIG --dry-run``: two real steps of everything, and what the whole run would cost."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table
from torch import nn

from . import parallel
from .process import peak_memory
from .recipe import Recipe
from .train import Session, build

STEPS = 2


def dry_run(recipe: Recipe) -> None:
    """Build the recipe, run two steps, print shapes, parameters, memory and the expected time. Nothing is written.

    Raises what the run itself would.
    """
    session = build(recipe)
    terms: dict[str, float] = {}
    turns: dict[str, float] = {}
    for phase in session.method.phases:
        # a phase that is due every n steps is timed by itself, so that n steps need not be run
        for step in range(STEPS):
            began = time.perf_counter()
            terms |= session.engine.turn(phase, step * phase.every)
            turns[phase.name] = time.perf_counter() - began  # the last: the first one warms up
    per_step = sum(turns[p.name] / p.every for p in session.method.phases)
    if parallel.rank() == 0:
        _print(session, terms, turns, per_step)


def _print(session: Session, terms: dict[str, float], turns: dict[str, float], per_step: float) -> None:
    console, recipe = Console(), session.recipe
    sizes = Table("role", "parameters", "trained", "weights", box=None, header_style="bold", title="networks")
    for role, network in session.method.networks.items():
        count = sum(p.numel() for p in network.parameters())
        trained = sum(p.numel() for p in session.engine.parameters.get(role, {}).values())
        sizes.add_row(role, f"{count:,}", f"{trained:,}", _mib(_bytes(network)))
    console.print(sizes)
    shape = (recipe.run.batch_size, *session.family.latent_shape)
    update = recipe.run.batch_size * recipe.run.accumulate * parallel.size()
    console.print(f"latents {shape}, {update} samples an update, images {session.family.image_size}")
    console.print(f"attention {session.attention}, {recipe.run.precision}, {session.device}")
    console.print("  ".join(f"{name} {value:.4g}" for name, value in terms.items()))
    console.print(f"memory: {_memory(session)}")
    console.print("  ".join(f"{name} {seconds:.2f} s" for name, seconds in turns.items()))
    console.print(
        f"expected time: {per_step:.2f} s a step, {recipe.run.steps} steps: {_hours(per_step * recipe.run.steps)}"
    )


def _bytes(network: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _memory(session: Session) -> str:
    trained = sum(p.numel() for ps in session.engine.parameters.values() for p in ps.values())
    parts = f"gradients {_mib(4 * trained)}, optimizer {_mib(8 * trained)}"
    where = "on the device" if session.device.type == "cuda" else "of the process"
    return f"{parts}; peak {where} {_mib(peak_memory(session.device))}"


def _hours(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
