"""What the call of a stock pipeline takes: prompts, class labels in their place, or no more than a number of images.

A class label is written as a prompt is: a word of the pipeline's own ``labels``, or a number.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def takes(pipeline: Any, name: str) -> bool:
    """Whether the pipeline's call has an argument of this name."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def prompted(pipeline: Any, prompts: str | Sequence[str]) -> dict[str, Any]:
    """What its call is told of one prompt or several: ``prompt``, or ``class_labels`` and ``batch_size``.

    An unconditional pipeline takes their number alone. Raises ValueError if a class label is not known.
    """
    if takes(pipeline, "prompt"):
        return {"prompt": prompts if isinstance(prompts, str) else list(prompts)}
    given: dict[str, Any] = {}
    several = [prompts] if isinstance(prompts, str) else prompts
    if takes(pipeline, "batch_size"):
        given["batch_size"] = len(several)
    if takes(pipeline, "class_labels") and count(pipeline):
        given["class_labels"] = labels(pipeline, several)
    return given


def settled(pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of these settings those that are not None and that its call takes."""
    return {name: value for name, value in settings.items() if value is not None and takes(pipeline, name)}


def count(pipeline: Any) -> int:
    """The number of classes that its network knows by number; 0: none."""
    network = pipeline.components.get("transformer") or pipeline.components["unet"]
    return network.config.get("num_embeds_ada_norm") or network.config.get("num_class_embeds") or 0


def labels(pipeline: Any, prompts: Sequence[str]) -> list[int]:
    """The numbers of these classes. Raises ValueError if the pipeline has no such word and no such number."""
    known, numbers = vars(pipeline).get("labels", {}), count(pipeline)
    found = []
    for prompt in prompts:
        number = known.get(prompt.strip(), int(prompt) if prompt.strip().isdecimal() else -1)
        if not 0 <= number < numbers:
            near = difflib.get_close_matches(prompt, list(known), n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; give {'a word of its labels, or ' * bool(known)}"
            raise ValueError(
                f"unknown class label {prompt!r}{meant}" + ("" if near else f"a number from 0 to {numbers - 1}")
            )
        found.append(number)
    return found
