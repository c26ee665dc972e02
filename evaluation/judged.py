"""What an evaluation said of a pipeline that is about to be published, for its model card."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastgen import config, registry
from fastgen.card import Results, Value
from fastgen.export import Opened
from fastgen.recipe import DTYPES

from . import columns, judge, report, runner
from .features import fingerprint

log = logging.getLogger("fastgen")

_OF_ROW = ("num_images", "seed", "seeds", "prompts", "dtype", "device", "weights", "commit")
"""What of a row's protocol each of its values depends on."""


def judged(run: Path, opened: Opened) -> Results | None:
    """The results.json of a run folder, if any of its rows is of the weights that ``opened`` gives; else None.

    Raises ValueError if the file is damaged.
    """
    rows = report.read_results(run / "results.json")
    known: dict[str, str] = {}

    def same(row: Mapping[str, Any]) -> bool:
        protocol = row.get("protocol") or {}
        dtype = protocol.get("dtype")
        if row["role"] == "data" or dtype not in DTYPES:
            return False
        if dtype not in known:
            parts = opened(dtype=DTYPES[dtype]).components.items()
            known[dtype] = fingerprint({name: part for name, part in parts if isinstance(part, torch.nn.Module)})
        return bool(protocol.get("weights") == known[dtype])

    own = [row for row in rows if same(row)]
    if not own:
        if rows:
            log.info("%s: is of other weights than these, and stays out of the model card", run / "results.json")
        return None
    table = f"{report.markdown_table(rows)}\n{report.said(rows)}"
    return Results(dataset(run, own[0]["protocol"]), [value for row in own for value in values(row)], table)


def values(row: Mapping[str, Any]) -> Iterator[Value]:
    """All that was measured of one subject."""
    titles = {column.key: column.title for column in columns.columns([row])}
    protocol = row["protocol"]
    measured = {value: name for name in protocol.get("metrics", {}) for value in values_of(name)}
    common = {"steps": row["steps"], "guidance_scale": row["guidance_scale"]}
    common |= {name: protocol.get(name) for name in _OF_ROW}
    for key, value in row.items():
        if key in common or key == "intervals" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        metric = protocol.get("metrics", {}).get(measured.get(key, key), {})
        by = metric.get("extractor", "")
        title = titles.get(key, key) + (f" ({by})" if by and by != "InceptionV3" else "")
        its_own = {"extractor": metric.get("extractor"), "extractor_sha256": metric.get("sha256")}
        reference = metric.get("reference", {})
        its_own |= {"reference_images": reference.get("num_images"), "reference_sha256": reference.get("sha256")}
        yield Value(key, title, value, common | its_own)


def values_of(metric: str) -> tuple[str, ...]:
    """The values of a metric by name; of one that is not installed here the one of its own name."""
    try:
        found: tuple[str, ...] = registry.find("metric", metric).ABOUT.values
    except ValueError:
        return (metric,)
    return found


def dataset(run: Path, protocol: Mapping[str, Any]) -> tuple[str, str]:
    """Type and name of the reference: the run's own, if its prompts are those of the evaluation."""
    try:
        where = str(run / "config.yaml")
        decoded = judge.settings(config.read(run / "config.yaml").get("eval", {}), where)
        source = judge.reference(decoded, (8, 8), where)
        prompts = [source.item(i).prompt for i in range(protocol["num_images"])]
    except (ValueError, OSError, KeyError):
        prompts = []
    if prompts and runner.digest("\n".join(prompts)) == protocol.get("prompts"):
        kind = str(decoded.reference["source"])
        return kind, Path(str(decoded.reference.get("path", kind))).name
    return "unknown", f"prompts of SHA-256 {protocol.get('prompts')}"
