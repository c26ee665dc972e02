"""What one of several students trains on: its share of a source, the same router whichever it is, and on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import route
from fastgen.data import Item, Skipped
from fastgen.data.batches import Batches
from fastgen.family import Family
from fastgen.students import Route, Router, fit
from tests.oracle import gaussian_family, labels

WORDS = [f"a {colour} {thing}" for colour in ("red", "blue", "green", "pale") for thing in ("cat", "dog", "hat")]


@dataclass
class Words:
    """Each prompt as often as its number says, the last once."""

    has_images: bool = False
    words: tuple[str, ...] = tuple(word for i, word in enumerate(WORDS) for _ in range(i % 3 + 1))

    def __len__(self) -> int:
        return len(self.words)

    def item(self, index: int) -> Item:
        return Item(self.words[index % len(self)])


def embedded(prompts: Any) -> dict[str, Tensor]:
    """Off 0, and told apart along any axis."""
    rows = [
        torch.randn(4, 5, generator=torch.Generator().manual_seed(len(p) * 97 + sum(map(ord, p)))) for p in prompts
    ]
    return {**labels([""] * len(prompts)), "text": 3 + torch.stack(rows)}


@pytest.fixture
def family() -> Family:
    return replace(gaussian_family(), encode_prompts=embedded, routed_by="text")


def shared(family: Family, own: int, students: int = 5, source: Any = None) -> route.Share:
    return route.shared(source or Words(), family, Route(students, own))


def test_each_item_is_of_one_student_and_each_has_as_many_prompts(family: Family) -> None:
    source, share = Words(), shared(family, 0)
    numbers = [i for some in share.numbers for i in some]
    assert sorted(numbers) == list(range(len(source)))
    prompts = [{source.item(i).prompt for i in some} for some in share.numbers]
    assert sum(map(len, prompts)) == len(WORDS) == len(set.union(*prompts))
    assert sorted(map(len, prompts)) == [2, 2, 2, 3, 3]


def test_all_students_have_the_same_router_whatever_the_order_of_their_data(family: Family) -> None:
    shares = [shared(family, own, 5, Words(words=tuple(WORDS if own % 2 else WORDS[::-1]))) for own in range(5)]
    assert all(torch.equal(s.router.axes, shares[0].router.axes) for s in shares)
    assert all(torch.equal(s.router.cuts, shares[0].router.cuts) for s in shares)


def test_a_student_goes_through_its_own_items_again_and_again(family: Family) -> None:
    share, source = shared(family, 3), Words()
    own = share.numbers[3]
    turns = [[share.place(len(own) * turn + i) for i in range(len(own))] for turn in range(8)]
    assert all(Counter(turn) == Counter(own) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    batches = Batches(source, family, images=False, place=share.place)  # type: ignore[arg-type]
    batch = batches.batch(range(20))
    wanted = embedded([source.item(share.place(i)).prompt for i in range(20)])["text"]
    assert torch.equal(batch.cond["text"], wanted)
    assert share.router.which(batch.cond["text"].mean(1)).tolist() == [3] * 20
    assert batch.samples == list(range(20))  # which key the noise


def test_what_cannot_be_shared_is_refused_in_a_line(family: Family) -> None:
    with pytest.raises(ValueError, match=r"student.route: this family has no pipeline of several students; leave it"):
        shared(replace(family, routed_by=""), 0)

    @dataclass
    class Read(Words):
        skipped: Skipped = Skipped(1, 0)  # noqa: RUF009

    with pytest.raises(
        ValueError, match=r"student.route: this data source reads an image with each prompt; let `fast"
    ):
        shared(family, 0, source=Read(has_images=True))
    assert shared(family, 0, source=Read()).own == 0

    class Paired(Words):
        candidates = ()
        concept = check = check_path = check_guidance = pairs = print

    with pytest.raises(ValueError, match=r"student.route: teacher pairs are not shared out, which would narrow each"):
        shared(family, 0, source=Paired())
    with pytest.raises(ValueError, match=r"12 distinct prompts cannot be shared by 13 students"):
        shared(family, 0, 13)
    blind = replace(family, encode_prompts=lambda prompts: {"text": torch.zeros(len(prompts), 2, 3)})
    with pytest.raises(ValueError, match=r"1 distinct prompts cannot be shared by 5 students; lower student.route"):
        shared(blind, 0)


def test_a_student_without_prompts_is_refused(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "fit", lambda points, k: Router(torch.ones(k - 1, 5), torch.full((k - 1,), -1e9)))
    message = r"student.route: student 0 of 3 would have no prompt, since the router cannot tell enough of them apart"
    with pytest.raises(ValueError, match=message):
        shared(family, 0, 3)


def test_a_run_keeps_its_router(family: Family, tmp_path: Path) -> None:
    share = shared(family, 2)
    route.check(tmp_path, share)  # nothing is there yet
    route.record(tmp_path, share)
    router, own = route.read(tmp_path)
    assert own == 2
    assert torch.equal(router.axes, share.router.axes)
    assert torch.equal(router.cuts, share.router.cuts)
    route.check(tmp_path, share)
    with pytest.raises(ValueError, match=r": is the run of student 2, this would be 1; set another run.out for each"):
        route.check(tmp_path, replace(share, own=1))
    other = replace(share, router=fit(torch.randn(9, 5, generator=torch.Generator().manual_seed(1)), 5))
    with pytest.raises(
        ValueError, match=r": its prompts were shared otherwise; set back data and model, or another ru"
    ):
        route.check(tmp_path, other)


def test_a_router_that_is_gone_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r": lacks router.safetensors; give the command of its training again"):
        route.read(tmp_path)
    (tmp_path / route.ROUTER).write_bytes(b"router")
    with pytest.raises(ValueError, match=r"router.safetensors: damaged \(.*\); delete it, and give the command"):
        route.read(tmp_path)
