"""The family ``sd`` for the contract."""

from __future__ import annotations

from tests import tiny

from .parts import Case

CASE = Case(lambda seed: tiny.pipeline("v_prediction", seed), image_sizes=[(16, 24), (32, 16)])
