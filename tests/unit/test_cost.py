from __future__ import annotations

import pytest

from fastgen.cost import Even, Times, Work, interleave, once, quartiles
from fastgen.method import Phase, Terms
from fastgen.passes import Pass
from fastgen.rng import Noise

READ, LEARN, GUIDED = Pass("teacher"), Pass("student", "weights", 3), Pass("teacher", count=2, rows=2)


def no_loss(*_: object) -> Terms:
    return {}


PHASES = (
    Phase("critic", ["fake_score"], no_loss, passes=[READ, LEARN]),
    Phase("student", ["student"], no_loss, every=4, passes=[GUIDED, LEARN, Pass("unused", count=0)]),
)
TIMES = Times(
    turns={"critic": 10.0, "student": 40.0},
    clips={"critic": 0.1, "student": 0.2},
    updates={"critic": 0.3, "student": 0.4},
    afters={"critic": 0.0, "student": 0.8},
    passes={READ: 1.0, once(LEARN): 2.0, once(GUIDED): 1.5},
    first=0.5,
    again=0.1,
    averages=0.7,
    row=6.0,
)


def test_the_floor_is_what_each_phase_declares_by_how_often_it_is_due() -> None:
    critic, student = 1 + 3 * 2, 2 * 1.5 + 3 * 2
    assert TIMES.floor(PHASES) == pytest.approx(critic + student / 4)
    assert TIMES.floor(PHASES, accumulate=3) == pytest.approx(3 * (critic + student / 4))


def test_a_step_is_its_turns_averages_and_a_share_of_a_row() -> None:
    assert TIMES.step(PHASES, log_every=12) == pytest.approx(10 + 40 / 4 + 0.7 + 6 / 12)


def test_the_rest_is_told_by_part() -> None:
    assert TIMES.rest(PHASES, cached=True, log_every=12) == pytest.approx(
        {
            "data": 0.1 + 0.1 / 4,
            "clipping": 0.1 + 0.2 / 4,
            "optimizer": 0.3 + 0.4 / 4,
            "ema": 0.8 / 4 + 0.7,
            "logging": 6 / 12,
        }
    )
    assert TIMES.rest(PHASES, cached=False, log_every=1)["data"] == pytest.approx(0.5 + 0.1 / 4), "the first is new"
    assert TIMES.encoding == pytest.approx(0.4)


def test_works_are_timed_in_turn_without_what_goes_before() -> None:
    now, order = [0.0], list[str]()

    def does(name: str, seconds: float) -> Work:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        def before() -> None:
            now[0] += 100

        return Work(run, before)

    def sync() -> None:
        order.append("sync")

    one, two = does("one", 1.0), does("two", 2.0)
    interleave(iter([one, two]), 2, lambda: now[0], sync)
    assert order == ["sync", "one", "sync", "sync", "two", "sync"] * 2
    assert (one.seconds, two.seconds) == ([1.0, 1.0], [2.0, 2.0])


def test_every_depth_of_a_rollout_comes_in_its_turn() -> None:
    assert [Even([0], 0, step, "student").shared_integer(4) for step in range(5)] == [0, 1, 2, 3, 0]
    shape = (2, 3)
    assert Even([5], 1, 2, "student").normal(shape).equal(Noise([5], 1, 2, "student").normal(shape))


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 4.0)
