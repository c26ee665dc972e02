"""What the preference metrics share: how images are prepared, and how networks are filled."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

from fastgen.evaluation import preference
from tests.rows import images

SIZES = [(20, 20), (64, 48), (301, 500), (224, 224), (225, 224)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_images_are_resized_as_torchvision_does(height, width):
    from torchvision.transforms import v2

    pictures = images(2, height, width)
    steps = [v2.Resize(64, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(64)]
    floats = v2.Compose([v2.ToDtype(torch.float32, scale=True), *steps])
    torch.testing.assert_close(preference.resized(pictures, 64), floats(pictures), rtol=0, atol=1e-6)
    made = [v2.Compose([*steps, v2.PILToTensor()])(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures]
    assert torch.equal(preference.resized_in_steps(pictures, 64), torch.stack(made) / 255)


def test_colours_are_in_clips_units():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert (list(preference.MEAN), list(preference.STD)) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    grey = preference.coloured(torch.full((1, 3, 2, 2), 0.5))
    want = [(0.5 - m) / s for m, s in zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, strict=True)]
    assert grey[0, :, 0, 0].tolist() == pytest.approx(want)


class Counted(nn.Module):
    """A linear layer, and numbers that no checkpoint keeps."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.linear = nn.Linear(2, 3)
        self.inner.register_buffer("position_ids", torch.arange(4).expand(1, -1), persistent=False)


def test_a_network_is_filled_with_all_its_tensors_and_no_others():
    tensors = {"inner.linear.weight": torch.ones(3, 2), "inner.linear.bias": torch.zeros(3)}
    before = torch.get_rng_state()
    for given in (tensors, tensors | {"inner.position_ids": torch.zeros(1, 4)}):
        made = preference.filled(Counted, given)
        assert {name: value.tolist() for name, value in made.state_dict().items()} == {
            name: value.tolist() for name, value in tensors.items()
        }
        assert made.inner.position_ids.tolist() == [[0, 1, 2, 3]]
        assert not any(p.requires_grad for p in made.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"lacks 'inner\.linear\.bias'"):
        preference.filled(Counted, {"inner.linear.weight": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="has the unknown 'head'"):
        preference.filled(Counted, tensors | {"head": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'inner\.linear\.bias' is \(2,\), not \(3,\)"):
        preference.filled(Counted, tensors | {"inner.linear.bias": torch.ones(2)})
