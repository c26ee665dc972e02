"""LPIPS diversity: a closed form with a plain distance, all pairs with LPIPS's own, and which pairs are taken."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastgen import lpips
from fastgen.evaluation import lpips_diversity
from fastgen.evaluation.context import Context, Seen
from tests.rows import images

PROMPTS = ("a dog", "a cat", "a dog", "an apple", "a cat", "a dog")


class Plain(nn.Module):
    """The mean difference of pixels in the place of LPIPS; it counts its pairs."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def forward(self, x, y):
        self.pairs += len(x)
        return (x - y).abs().mean((1, 2, 3))


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Gives the metric with a plain distance, for plain images of these levels of grey."""
    network = Plain()
    (tmp_path / lpips.FILE).write_bytes(b"x")
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(lpips, "load", lambda file: network)

    def metric(prompts, levels):
        grey = [torch.full((3, 16, 16), level, dtype=torch.uint8) for level in levels]
        return lpips_diversity.Metric(Context(prompts=prompts, images=lambda i: grey[i])), network

    return metric


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """LPIPS's true architecture with random weights."""
    torch.manual_seed(0)
    network = lpips.Lpips()
    for parameter in network.features.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    tensors = network.state_dict() | {f"heads.{i}": head.data.uniform_() for i, head in enumerate(network.heads)}
    file = tmp_path_factory.mktemp("weights") / lpips.FILE
    save_file(tensors, file)
    return file


def seen(prompts=PROMPTS):
    return Seen(list(prompts), {})


def test_it_is_the_mean_over_prompts_of_the_mean_over_pairs(plain):
    """Dogs 0, 51, 255: distances 0.4, 1.6, 2 of [-1, 1]'s 2; cats 102, 102: 0; the apple has no pair."""
    one, network = plain(PROMPTS, [0, 102, 51, 7, 102, 255])
    assert one.compute(seen()) == {"lpips_diversity": pytest.approx((4 / 3 + 0) / 2)}
    assert network.pairs == 4
    assert one.compute(seen())["lpips_diversity"] == pytest.approx(2 / 3)
    assert network.pairs == 4, "distances are found once"
    assert one.extractors == ()
    assert one.per_image(seen()) == {}


def test_any_order_gives_the_same_number_and_fewer_prompts_another(plain):
    one, _ = plain(PROMPTS, [0, 102, 51, 7, 102, 255])
    want = one.compute(seen())["lpips_diversity"]
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 1, 5, 3, 4]):
        assert one.compute(seen().take(order)) == {"lpips_diversity": pytest.approx(want, rel=1e-12)}
    assert one.compute(seen().take([0, 2, 5, 1])) == {"lpips_diversity": pytest.approx(4 / 3)}
    other, _ = plain([PROMPTS[i] for i in (5, 4, 3, 2, 1, 0)], [255, 102, 7, 51, 102, 0])
    assert other.compute(seen()) == {"lpips_diversity": pytest.approx(want, rel=1e-6)}


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_few_images_are_all_paired(count):
    pairs = [tuple(sorted(pair)) for pair in lpips_diversity.rings(count)]
    assert sorted(pairs) == list(combinations(range(count), 2))
    assert len(pairs) <= lpips_diversity.PAIRS


def test_many_images_are_paired_evenly(plain, monkeypatch):
    """The first ring of 14: every image twice, each with the next."""
    monkeypatch.setattr(lpips_diversity, "PAIRS", 14)
    one, network = plain(["a"] * 14, range(0, 140, 10))
    got = one.compute(seen(["a"] * 14))["lpips_diversity"]
    assert network.pairs == 14
    assert got == pytest.approx((13 * 10 + 130) / 14 / 127.5)


def test_with_lpips_it_equals_all_pairs(weights):
    pictures = images(len(PROMPTS), 24, 20) // torch.tensor([1, 2, 3, 1, 4, 2], dtype=torch.uint8)[:, None, None, None]
    one = lpips_diversity.Metric(
        Context(weights={"lpips": str(weights)}, prompts=PROMPTS, images=lambda i: pictures[i])
    )
    network, means = lpips.load(weights), []
    for prompt in ("a dog", "a cat"):
        own = [pictures[i] / 255 * 2 - 1 for i, p in enumerate(PROMPTS) if p == prompt]
        found = [float(network(x[None], y[None])) for x, y in combinations(own, 2)]
        means.append(sum(found) / len(found))
    got = one.compute(seen())["lpips_diversity"]
    assert got == pytest.approx(sum(means) / 2, rel=1e-4)
    assert got > 1e-3
    told = one.protocol()
    assert (told["size"], told["num_prompts"], len(told["sha256"])) == ("20 x 24", 2, 64)


def test_messages(plain, weights, monkeypatch, tmp_path):
    with pytest.raises(
        ValueError, match=r"lpips_diversity compares images of one prompt, but none of the 2 comes twi"
    ):
        plain(["a", "b"], [0, 0])
    one, _ = plain(["a", "a", "b"], [0, 0, 0])
    with pytest.raises(ValueError, match="lpips_diversity needs at least 2 images of one prompt, got none"):
        one.compute(seen(["a", "b"]))
    nothing = lpips_diversity.Metric(Context(weights={"lpips": str(weights)}, prompts=["a", "a"]))
    with pytest.raises(ValueError, match=r"compares images in pairs; give Context\.images"):
        nothing.compute(seen(["a", "a"]))
    small = Context(prompts=["a", "a"], images=lambda i: torch.zeros(3, 8, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 16 pixels a side, image 0 has 8 x 32"):
        lpips_diversity.Metric(small).compute(seen(["a", "a"]))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"other: no such file; weights of lpips come from `python -m fastgen\.lpips"):
        lpips_diversity.Metric(Context(weights={"lpips": str(tmp_path / "other")}, prompts=["a", "a"]))
