"""A few faults of each kind of the campaign: each ends in a clear line, nothing is lost. `make faults`: the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.campaign import KINDS, Ended, Kind, Lab, Outcome

SEED = 1


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with campaign.lab() as made:
        yield made


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.quick], ids=lambda kind: kind.name)
def test_nothing_is_lost(lab: Lab, kind: Kind) -> None:
    outcomes = campaign.inject(kind, lab, SEED, kind.quick)
    if not outcomes and "tmpfs" in kind.name:
        pytest.skip("only root may make a file system")
    assert len(outcomes) == kind.quick
    assert not [one for one in outcomes if not one.survived]


def test_the_long_campaign_kills_a_hundred_times() -> None:
    assert sum(kind.long for kind in KINDS if "SIGKILL" in kind.name) >= 100
    assert all(kind.long >= kind.quick for kind in KINDS)


# The campaign itself: it must see what goes wrong

GOOD = Ended(75, "", "a line\nfastgen: run: ended by SIGTERM; all is well\n", 1.0)


@pytest.mark.parametrize(
    ("ended", "message"),
    [
        (replace(GOOD, code=1), "exit code 1, not 75"),
        (replace(GOOD, err=""), "said []"),
        (replace(GOOD, err=GOOD.err + "fastgen: more\n"), "said ["),
        (replace(GOOD, err="fastgen: something else\n"), "said ["),
    ],
)
def test_an_end_that_is_not_as_promised_is_seen(ended: Ended, message: str) -> None:
    assert not GOOD.unclear([75], "ended by SIGTERM")
    assert ended.unclear([75], "ended by SIGTERM").startswith(message)
    assert replace(GOOD, err="Traceback (most recent call last)\n").traceback


def test_counts_are_of_what_became_of_each() -> None:
    outcomes = [
        Outcome("a"),
        Outcome("b", harm="x", unclear="y"),
        Outcome("c", unclear="y"),
        Outcome("d", traceback=True),
    ]
    found = {"injected": 4, "survived": 1, "lost": 1, "unclear": 1, "tracebacks": 1}
    assert campaign.counts(outcomes) == found


def test_runs_that_differ_are_seen(lab: Lab) -> None:
    whole, _ = lab.whole()
    assert not campaign.difference(whole, whole)
    other = lab.fresh()
    lab.done(lab.training(other, "run.seed=1"))
    assert re.search(r"safetensors differs|pipeline differs", campaign.difference(other, whole))


def test_the_document_has_a_row_a_kind_and_what_went_wrong() -> None:
    row = dict.fromkeys(campaign.COLUMNS, 3)
    report = {
        "commit": "abc",
        "seed": 1,
        "minutes": 2,
        "versions": {"torch": "2"},
        "all": row,
        "kinds": [{"name": KINDS[0].name, **row}],
        "trouble": [{"kind": "k", "what": "w", "harm": "gone", "unclear": ""}],
    }
    text = campaign.document(report)
    assert f"| {KINDS[0].name} | 3 | 3 | 3 | 3 | 3 |" in text
    assert "- k: w: gone" in text


def test_the_report_in_docs_lost_nothing() -> None:
    """What `make faults` wrote last."""
    file = Path(campaign.ROOT / "docs" / "reliability.json")
    if not file.is_file():
        pytest.skip("not run yet")
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["trouble"] == []
    assert [row["name"] for row in report["kinds"]] == [kind.name for kind in KINDS]
    assert file.with_suffix(".md").read_text(encoding="utf-8") == campaign.document(report)
