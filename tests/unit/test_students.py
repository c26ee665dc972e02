"""The router in closed form, and that a batch goes to its students row by row."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.experts import Experts, members
from fastgen.lora import fused
from fastgen.pipelines import students as shipped
from fastgen.students import Route, Router, Students, fit, points_of
from tests.oracle import Affine, call, sd_schedule


def cloud(n: int, width: int = 3, seed: int = 0) -> Tensor:
    """Points off the origin, whose axes are unlike."""
    points = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return 5.0 + points * torch.arange(1, width + 1)


@pytest.mark.parametrize("students", range(2, 10))
@pytest.mark.parametrize("n", [9, 23, 64])
def test_each_point_is_one_student_s_and_shares_differ_by_one_at_most(n: int, students: int) -> None:
    router = fit(cloud(n), students)
    counts = router.which(cloud(n)).bincount(minlength=students)
    assert len(router) == students == len(counts)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1


def test_the_order_and_the_number_of_equal_points_change_nothing() -> None:
    points = cloud(20)
    router = fit(points, 3)
    for other in (points.flip(0), torch.cat([points, points[:7]]), points[torch.randperm(20)]):
        again = fit(other, 3)
        assert torch.equal(again.axes, router.axes)
        assert torch.equal(again.cuts, router.cuts)


@pytest.mark.parametrize(("students", "runs"), [(4, [3, 3, 3, 3]), (5, [2, 2, 3, 2, 3]), (2, [6, 6])])
def test_classes_are_cut_into_runs_of_consecutive_numbers(students: int, runs: Sequence[int]) -> None:
    numbers = torch.arange(100, 112)
    which = fit(points_of(numbers), students).which(points_of(numbers)).tolist()
    assert which == [k for k, count in enumerate(runs) for _ in range(count)]


def test_four_students_of_points_in_a_plane_have_its_quadrants() -> None:
    """Across the longer axis first; the centre of the points is not 0."""
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    points = torch.cat([torch.tensor([7.0, -2.0]) + signs * torch.tensor([3.0, 1.0]) * k for k in (1.0, 1.1, 0.9)])
    router = fit(points, 4)
    torch.testing.assert_close(router.axes, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(router.cuts, torch.tensor([-2.0, 7.0, -2.0]))
    assert router.which(points).tolist() == [0, 1, 2, 3] * 3
    assert router.which(torch.tensor([[-100.0, 50.0], [8.0, -3.0]])).tolist() == [1, 2]


def test_where_a_point_goes_does_not_depend_on_the_others() -> None:
    router, points = fit(cloud(40), 6), cloud(25, seed=1)
    together = router.which(points)
    assert [int(router.which(point[None])[0]) for point in points] == together.tolist()
    assert torch.equal(router.which(points.flip(0)), together.flip(0))


def test_the_code_that_travels_routes_alike() -> None:
    for students in range(2, 9):
        router = fit(cloud(40), students)
        text = cloud(2 * 50, seed=2).reshape(50, 2, 3)
        assert torch.equal(shipped.which(text, router.axes, router.cuts), router.which(points_of(text)))
        own = fit(points_of(torch.arange(30)), students)
        assert torch.equal(shipped.which(torch.arange(30), own.axes, own.cuts), own.which(points_of(torch.arange(30))))


def test_what_the_router_reads() -> None:
    text = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]], dtype=torch.float16)
    assert points_of(text).tolist() == [[2.0, 4.0]]
    assert points_of(text).dtype == torch.float32
    assert points_of(torch.tensor([7, 1000])).tolist() == [[7.0], [1000.0]]


def test_routers_are_close_up_to_rounding() -> None:
    router = fit(cloud(40), 4)
    assert router.close(Router(router.axes + 1e-5, router.cuts * (1 + 1e-5)))
    assert not router.close(fit(cloud(40, seed=1), 4))
    assert not router.close(fit(cloud(40), 5))


def test_too_few_prompts_and_students_that_are_not_there() -> None:
    with pytest.raises(
        ValueError, match=r"3 distinct prompts cannot be shared by 4 students; lower student.route.stu"
    ):
        fit(torch.cat([cloud(3), cloud(3)]), 4)
    with pytest.raises(ValueError, match="own 4 is none of 4 students, which are 0 to 3"):
        Route(students=4, own=4)


# In the place of one network


def trio() -> tuple[Students, dict[str, Tensor]]:
    """Three students, and conditions for each: the oracle's labels, and numbers of classes to route by."""
    networks = [Affine(sd_schedule(), "x0", float(shift), 0.5) for shift in (1, 2, 3)]
    numbers = torch.tensor([5, 1, 3, 0, 4])
    router = fit(points_of(torch.arange(6)), 3)
    cond = {"label": torch.eye(3)[[0, 1, 2, 1, 0]], "class": numbers}
    return Students(networks, router, "class"), cond


def test_each_row_goes_to_its_own_student_in_the_order_of_the_batch() -> None:
    """And its gradient reaches that student alone."""
    students, cond = trio()
    denoiser = Denoiser(students, sd_schedule(), "x0", call)
    x_t, t = torch.randn(5, 2, 2), torch.full((5,), 700.0, dtype=torch.float64)
    found = denoiser(x_t, t, cond)
    for i, k in enumerate((2, 0, 1, 0, 2)):
        one = slice(i, i + 1)
        alone = denoiser.with_network(students[k])(x_t[one], t[one], {name: v[one] for name, v in cond.items()})
        assert torch.equal(found.y[one], alone.y)
        shifts: list[Tensor] = [p for name, p in students.named_parameters() if name.endswith("shift")]
        grads = torch.autograd.grad(found.x0[i].sum(), shifts, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in grads] == [j == k for j in range(3)]


def test_students_that_are_one_network_are_that_network() -> None:
    students, cond = trio()
    same = Students([students[0]] * 3, students.router, "class")
    denoiser, x_t, t = Denoiser(students[0], sd_schedule(), "x0", call), torch.randn(5, 2, 2), torch.full((5,), 700.0)
    assert torch.equal(denoiser.with_network(same)(x_t, t, cond).y, denoiser(x_t, t, cond).y)


def test_students_that_are_needed_are_called_once_and_no_other() -> None:
    students, cond = trio()
    calls = [0, 0, 0]
    for k, network in enumerate(students):
        network.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
    denoiser, some = Denoiser(students, sd_schedule(), "x0", call), [0, 1, 3]
    denoiser(torch.randn(3, 2), torch.full((3,), 9.0), {name: value[some] for name, value in cond.items()})
    assert calls == [1, 0, 1]


def test_they_are_networks_of_a_role_and_have_no_adapters() -> None:
    students, _ = trio()
    assert members(students) == list(students)
    assert fused(students) is students


def test_a_student_of_several_experts_is_refused() -> None:
    students, _ = trio()
    experts = Experts([students[0], students[1]], [999.0, 499.0])
    with pytest.raises(ValueError, match="a student of several experts cannot be one of several students; choose"):
        Students([experts, students[2]], fit(cloud(4), 2), "class")


def test_the_arguments_of_a_call_for_some_of_its_rows() -> None:
    rows, x = torch.tensor([2, 0]), torch.arange(3.0)
    given = {"a": x, "b": [x, "text"], "c": (torch.tensor(7.0), None, torch.arange(2)), "d": {"e": x[:, None]}}
    found = shipped.of_rows(given, rows, 3)
    assert found["a"].tolist() == [2, 0]
    assert (found["b"][0].tolist(), found["b"][1]) == ([2, 0], "text")
    assert (found["c"][0].item(), found["c"][1], found["c"][2].tolist()) == (7, None, [0, 1])
    assert found["d"]["e"].tolist() == [[2], [0]]
