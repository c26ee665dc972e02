"""GenEval's terms (Ghosh et al. 2023, arXiv 2310.11513): what composing scenes and judging images have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The tasks."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The colour words."""

RELATIONS = ("left of", "right of", "above", "below")
"""The positions."""

POSITION_THRESHOLD = 0.1
"""Share of the two boxes' summed sizes by which centres must differ before a relation holds."""


def relations(
    first: Sequence[float], second: Sequence[float], threshold: float = POSITION_THRESHOLD
) -> frozenset[str]:
    """How the first box lies to the second: none, one or two of `RELATIONS`; boxes are x0, y0, x1, y1 in pixels.

    The offset of the centres, shortened on each axis by `threshold` times both sizes, is divided by the length of the
    whole offset; a relation holds where more than half is left.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    slack = threshold * (np.abs(a[2:] - a[:2]) + np.abs(b[2:] - b[:2]))
    revised = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return frozenset()
    dx, dy = revised / np.hypot(*offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(relation for relation, true in holds.items() if true)
