"""Several networks in one role: which is called, and that a batch may need more than one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen import lora
from fastgen.denoiser import Denoiser
from fastgen.experts import Experts, each, members
from fastgen.schedule import Flow
from tests.oracle import Affine, call, conv_family, labels, sd_schedule

STARTS = [999.0, 499.0, 249.0]


def shifted(*shifts: float) -> list[Affine]:
    return [Affine(sd_schedule(), "x0", float(shift), 0.5) for shift in shifts]


def test_an_expert_takes_the_times_from_its_start_down_to_the_next_one_s() -> None:
    experts = Experts(shifted(1, 2, 3), STARTS)
    t = torch.tensor([999.0, 500.0, 499.5, 499.0, 250.0, 249.0, 0.0], dtype=torch.float64)
    assert experts.which(t).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_the_first_takes_all_noisier_times_too() -> None:
    assert Experts(shifted(1, 2), [399.0, 199.0]).which(torch.tensor([999.0, 400.0, 399.0])).tolist() == [0, 0, 0]


def test_one_expert_takes_all_times() -> None:
    assert Experts(shifted(1), [1.0]).which(torch.tensor([1.0, 0.5, 0.0])).tolist() == [0, 0, 0]


def test_each_sample_of_a_batch_goes_to_its_own_expert() -> None:
    """In the order of the batch, with its own caption; the gradient of a sample reaches its expert alone."""
    networks = shifted(1, 2, 3)
    schedule, label = sd_schedule(), labels(["left", "right", "", "left"])
    for k, network in enumerate(networks):
        with torch.no_grad():
            network.shift += torch.tensor([0.1, 0.2, 0.3]) * (k + 1)  # one for each caption
    denoiser = Denoiser(Experts(networks, STARTS), schedule, "x0", call)
    x_t, t = torch.randn(4, 2, 2), torch.tensor([100.0, 999.0, 300.0, 600.0], dtype=torch.float64)
    found = denoiser(x_t, t, label)
    for i, k in enumerate((2, 0, 1, 0)):
        one = slice(i, i + 1)
        alone = denoiser.with_network(networks[k])(x_t[one], t[one], {"label": label["label"][one]})
        torch.testing.assert_close(found.y[one], alone.y)
        grads = torch.autograd.grad(
            found.x0[i].sum(), [n.shift for n in networks], retain_graph=True, allow_unused=True
        )
        assert [g is not None and bool(g.any()) for g in grads] == [j == k for j in range(3)]


def test_experts_that_are_needed_are_called_once_and_no_other() -> None:
    networks, calls = shifted(1, 2, 3), [0, 0, 0]
    for k, network in enumerate(networks):
        network.register_forward_hook(lambda *_, k=k: calls.__setitem__(k, calls[k] + 1))
    denoiser = Denoiser(Experts(networks, STARTS), sd_schedule(), "x0", call)
    denoiser(torch.randn(3, 2), torch.tensor([10.0, 900.0, 20.0]), labels([""] * 3))
    assert calls == [1, 0, 1]
    denoiser(torch.randn(3, 2), torch.tensor([400.0] * 3), labels([""] * 3))
    assert calls == [1, 1, 1]


def test_on_a_continuous_clock_too() -> None:
    experts = Experts(shifted(1, 2), [1.0, 0.5])
    assert experts.which(Flow().draw(torch.tensor([0.999, 0.51, 0.5, 0.1]))).tolist() == [0, 0, 1, 1]


def test_the_networks_of_a_role() -> None:
    networks = shifted(1, 2)
    assert members(networks[0]) == [networks[0]]
    assert members(Experts(networks, [1.0, 0.5])) == members(nn.ModuleList(networks)) == networks


def test_the_same_change_is_made_to_each_of_experts_or_to_the_one_network() -> None:
    one, experts = nn.Linear(1, 1), Experts([nn.Linear(1, 1), nn.Linear(1, 1)], [1.0, 0.5])
    seen: list[nn.Module] = []

    def change(network: nn.Module) -> nn.Module:
        seen.append(network)
        return nn.Identity()

    assert isinstance(each(change, one), nn.Identity)
    made = each(change, experts)
    assert isinstance(made, Experts)
    assert made.starts == experts.starts
    assert [type(expert) for expert in made] == [nn.Identity, nn.Identity]
    assert seen == [one, *experts]


@pytest.mark.parametrize("share", [False, True])
def test_experts_that_are_adapters_are_fused_one_by_one(share: bool) -> None:
    """And stay what they were; a name for each parameter, though all are on one network."""
    family = lora.adapted(conv_family(), lora.Lora(rank=2), share)
    experts = Experts([family.student(), family.student()], [999.0, 499.0])
    names = [name for name, _ in experts.named_parameters()]
    assert len(names) == len({id(p) for p in experts.parameters()})
    assert {name.split(".")[0] for name in names} == {"0", "1"}
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(generator=torch.Generator().manual_seed(len(p.shape)))
        experts[1].load_state_dict({name: -0.5 * p for name, p in experts[0].state_dict().items()})
    fused = lora.fused(experts)
    assert isinstance(fused, Experts)
    assert fused.starts == [999.0, 499.0]
    assert not any(isinstance(network, lora.View) for network in fused)
    x_t, t, cond = torch.randn(2, 2, 8, 8), torch.tensor([900.0, 100.0]), labels(["left", "right"])
    one, two = (family.denoiser.with_network(network)(x_t, t, cond).y for network in (experts, fused))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert (one - family.denoiser(x_t, t, cond).y).abs().flatten(1).amax(1).min() > 1e-3
