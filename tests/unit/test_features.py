"""A CLIP's features against the CLIPModel's own, and hashes of weights and images."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fastgen.evaluation import features
from fastgen.evaluation.context import Context
from tests import command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return command.clip(tmp_path_factory.mktemp("clip") / "clip")


def noise(count, height=16, width=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_features_are_the_clip_models_own(folder):
    from transformers import CLIPModel, CLIPTokenizer

    images, prompts = noise(3), ["a dog", "a red apple", "a dog " * 40]
    eyes = features.extractor(Context(weights={"clip": str(folder)}, features="clip"))
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=(images / 255 - 0.5) / 0.25, **tokens)
    rows, texts = eyes(images, prompts), eyes.texts(prompts)
    assert rows.shape == (3, eyes.num_features)
    assert torch.allclose(cosine_similarity(rows, out.image_embeds), torch.ones(3))
    assert torch.allclose(cosine_similarity(texts, out.text_embeds), torch.ones(3))
    assert not torch.allclose(rows.norm(dim=1), torch.ones(3)), "CLIP-FID's are not normalised"


def test_images_are_prepared_by_the_clips_own_processor(folder):
    from transformers import CLIPModel, CLIPProcessor

    images = noise(2, 40, 23)
    pixels = CLIPProcessor.from_pretrained(folder).image_processor(images=list(images), return_tensors="pt")
    with torch.no_grad():
        want = CLIPModel.from_pretrained(folder).eval().get_image_features(**pixels)
    want = getattr(want, "pooler_output", want)
    assert torch.allclose(features.load_clip(str(folder), "cpu")(images), want, atol=1e-6)


def test_a_row_depends_on_its_own_image_alone(folder):
    eyes, images = features.load_clip(str(folder), "cpu"), noise(5)
    whole = eyes(images)
    assert torch.allclose(torch.cat([eyes(images[:2]), eyes(images[2:])]), whole, atol=1e-6)
    assert torch.allclose(eyes(images.flip(0)), whole.flip(0), atol=1e-6)


def test_key_is_of_weights_and_preparation(folder, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    for copy in (same, other):
        shutil.copytree(folder, copy)
    named = next(f for f in ("preprocessor_config.json", "processor_config.json") if (other / f).is_file())
    settings = (other / named).read_text()
    assert "0.25" in settings
    (other / named).write_text(settings.replace("0.25", "0.5"))
    keys = [features.Clip(str(path), "cpu").key for path in (folder, same, other)]
    assert keys[0] == keys[1] != keys[2]
    told = features.Clip(str(other), "cpu").protocol()
    assert told["extractor"] == f"CLIP {other.parent.name}/other"
    assert told["resize"]["image_std"] == [0.5] * 3
    assert json.loads(json.dumps(told)) == told


def test_what_is_no_clip(tmp_path):
    with pytest.raises(ValueError, match=r"gone: no such CLIP folder; set eval.weights.clip to one, or to a Hub id"):
        features.Clip(str(tmp_path / "gone"), "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a CLIPModel with tokenizer and image processor") as caught:
        features.Clip(str(tmp_path), "cpu")
    assert "\n" not in str(caught.value)


def test_hash_of_images_does_not_depend_on_the_batches():
    images = noise(5)
    assert features.hash_images([images]) == features.hash_images(images.split(2))
    assert features.hash_images([images]) != features.hash_images([images.flip(0)])


def test_fingerprint_is_of_names_and_numbers():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert features.fingerprint({"a": one}) == features.fingerprint({"a": other})
    assert features.fingerprint({"a": one}) != features.fingerprint({"b": one})
    with torch.no_grad():
        other.bias[1] += 1e-6
    assert features.fingerprint({"a": one}) != features.fingerprint({"a": other})
