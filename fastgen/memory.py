"""``fastgen bench memory``: the peak of a few training steps against what must be held, for each form of student.

Each form is built and trained in a process of its own, ``python -m fastgen.memory``, so that none meets what another
left behind. On CUDA the peak is that of torch's tensors on the device. Elsewhere it is that of the process's resident
memory above what its imports had taken, which counts what the allocator keeps for later as well.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import lora, registry
from . import recipe as recipes
from .experts import members
from .process import peak_memory, resident
from .recipe import Recipe
from .train import Session, build, family_of

log = logging.getLogger("fastgen")

STEPS = 3
"""Turns of each phase: optimizers have their moments after the first, and the second holds all at once."""
FORMS: Mapping[str, Mapping[str, Any]] = {
    "whole": {"lora": None, "share_backbone": False},
    "adapters": {"share_backbone": False},
    "shared": {"share_backbone": True},
}
"""Name -> what it sets in the section ``student``; adapters are the config's own, or those of ``lora: {}``."""
COLUMNS = ("weights", "gradients", "optimizer", "ema", "pipeline", "held", "peak", "rest")
"""Of the table, in MiB; ``rest`` is the peak less what is held: activations, and what is there in passing."""


def rows(tree: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """A row for each form that the recipe of this tree can have. name: what its config is called.

    Returns:
        peak, held, and held by parts (weights by role, gradients, optimizer, ema, pipeline), all in bytes.

    Raises ValueError if no form can be had.
    """
    found, refused = [], ""
    for form in FORMS:
        log.info("%s: %s", name, form)
        given = json.dumps({"tree": formed(tree, form), "where": where})
        command = [sys.executable, "-m", "fastgen.memory"]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        said = done.stderr.strip().rpartition("\n")[2]
        if done.returncode == 2:
            refused = said
            log.warning("%s: left out %s: %s", name, form, said)
        elif done.returncode:
            raise OSError(f"{where}: the process that measured {form} ended with {done.returncode}: {said}")
        else:
            found.append({"config": name, "form": form, **json.loads(done.stdout)})
    if not found:
        raise ValueError(refused)
    return found


def formed(tree: Mapping[str, Any], form: str) -> dict[str, Any]:
    """The tree with a student of this form."""
    student = tree.get("student", {})
    adapters = {"lora": student.get("lora") or {}}
    return {**tree, "student": {**student, **adapters, **FORMS[form]}}


def size(tensors: Iterable[Tensor], known: set[int]) -> int:
    """Bytes of the tensors' storages that are not in ``known``, which they then are."""
    # not data_ptr, which is 0 for all tensors without data
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    new = found.keys() - known
    known |= new
    return sum(found[key] for key in new)


def held(session: Session) -> dict[str, Any]:
    """What must be held, in bytes, by what it is for; nothing counts twice.

    Gradients are those of the phase that has most; each phase drops its own.
    """
    engine, networks, known = session.engine, session.method.networks, set[int]()
    weights = {role: size([*n.parameters(), *n.buffers()], known) for role, n in networks.items()}
    plain = [lora.plain(n) for network in networks.values() for n in members(network)]
    weights["under adapters"] = size([t for n in plain for t in (*n.parameters(), *n.buffers())], known)
    pipeline: Any = session.family.pipeline(lora.plain(session.family.denoiser.network), None)
    others = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    moments = [t for o in engine.optimizers.values() for s in o.state.values() for t in s.values()]
    trained = {
        role: sum(p.numel() * p.element_size() for p in engine.parameters[role].values()) for role in engine.parameters
    }
    return {
        "weights": {role: count for role, count in weights.items() if count},
        "gradients": max(sum(trained[role] for role in phase.trains) for phase in session.method.phases),
        "optimizer": size([t for t in moments if isinstance(t, Tensor)], known),
        "ema": size([t for average in session.ema.values() for t in average.average.values()], known),
        "pipeline": size([t for part in others for t in (*part.parameters(), *part.buffers())], known),
    }


def total(parts: Mapping[str, Any]) -> int:
    """Bytes of all parts of ``held``."""
    return sum(sum(part.values()) if isinstance(part, Mapping) else part for part in parts.values())


def measure(recipe: Recipe) -> dict[str, Any]:
    """The row of a recipe, measured in this process, which should have done nothing else before."""
    family_of(recipes.locate(recipe.model.path), recipe.model.family)  # all imports are none of the peak's
    for kind, name in (("method", recipe.method.name), ("source", recipe.data.name)):
        registry.find(kind, name)
    if recipe.student.lora:
        import peft  # noqa: F401
    before = resident("VmRSS")
    session = build(recipe)
    for turn in range(STEPS):
        for phase in session.method.phases:
            session.engine.turn(phase, turn * phase.every)
        for average in session.ema.values():
            average.update()
    on_device = session.device.type == "cuda"
    peak = peak_memory(session.device) - (0 if on_device else before)
    parts = held(session)
    return {
        "method": recipe.method.name,
        "peak": peak,
        "held": total(parts),
        "parts": parts,
        "trained": {role: sum(map(Tensor.numel, ps.values())) for role, ps in session.engine.parameters.items()},
        "batch_size": recipe.run.batch_size,
        "precision": recipe.run.precision,
        "device": str(session.device),
        "measured": "torch's tensors" if on_device else "resident memory",
    }


WORDS = 2
"""Columns of ``table`` that are no numbers."""


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line a form; MiB."""
    lines = []
    for row in rows:
        parts = {name: total({name: part}) for name, part in row["parts"].items()}
        sizes = {**parts, "held": row["held"], "peak": row["peak"], "rest": row["peak"] - row["held"]}
        lines.append([row["config"], row["form"], *(f"{sizes[name] / 2**20:,.1f}" for name in COLUMNS)])
    return ["config", "student", *COLUMNS], lines


def main() -> None:
    """Read {"tree", "where"} from standard input and write a row; exit code 2 and a line for bad input."""
    given = json.loads(sys.stdin.read())
    try:
        row = measure(recipes.decode(given["tree"], given["where"]))
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
