"""Metrics against closed forms, images that do not depend on the batch, runs that are cut off and resumed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fastgen import config, registry
from fastgen.config import ConfigError
from fastgen.data import Item
from fastgen.evaluation import clip_score, features, fid, latency, runner
from fastgen.evaluation.config import EvalConfig
from fastgen.evaluation.context import Call, Context, merge
from fastgen.evaluation.runner import Subject, evaluate, generate, measure_images
from fastgen.rng import seed_of

CONCEPTS = ("a red apple", "a dog", "a blue heart", "a banana")


def concept(prompt):
    """The open caption of "twemoji of a red apple"."""
    return prompt.rsplit(" of ", 1)[-1]


class Shapes:
    """A source of small coloured noise images, one per index; some captions name a style."""

    has_images = True

    def __init__(self, size=64, has_images=True):
        self.size, self.has_images, self.drawn = size, has_images, 0

    def __len__(self):
        return self.size

    def item(self, index):
        self.drawn += 1
        index %= self.size
        caption = CONCEPTS[index % 4]
        pixels = np.random.default_rng([7, index]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Item(f"twemoji of {caption}" if index % 5 == 0 else caption, pixels if self.has_images else None)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from fastgen.emoji import networks

    folder = tmp_path_factory.mktemp("clip")
    words = networks.tokenizer([*CONCEPTS, "twemoji of"], folder)
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, **shared, **ids}
    vision = {"image_size": 16, "patch_size": 8, **shared}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, **ids))
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=processor, tokenizer=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory, clip_folder):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel.from_pretrained(clip_folder),
        tokenizer=CLIPTokenizer.from_pretrained(clip_folder),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    return runner.open_pipeline(pipeline_folder, torch.float32, "cpu")


class Pixels:
    """Features that are the pixels themselves."""

    def __init__(self, num_features):
        self.num_features = num_features

    def images(self, images):
        return images.flatten(1).float()

    def protocol(self):
        return {"extractor": "pixels"}


@pytest.fixture
def pixels(monkeypatch):
    """Let fid see pixels; gives the function that makes its context."""

    def context(real: Tensor) -> Context:
        eyes = Pixels(real[0].numel())
        monkeypatch.setattr(features, "extractor", lambda _: eyes)
        return Context(reference=lambda: real.split(5))

    return context


def fid_of(metric, images):
    metric.update(images, [""] * len(images))
    return metric.compute()["fid"]


def cross(mean, *axes):
    """Points mean +- axis for each axis: mean exact, covariance 2 sum(axis axis^T) / (2 n - 1)."""
    mean = torch.tensor(mean)
    points = torch.stack([mean + sign * torch.tensor(axis) for axis in axes for sign in (1, -1)])
    return points.to(torch.uint8)[:, :, None, None]


# FID


def test_fid_of_gaussians_with_diagonal_covariances(pixels):
    real = cross([100, 50, 20], [10, 0, 0], [0, 4, 0], [0, 0, 2])
    made = cross([103, 50, 16], [20, 0, 0], [0, 6, 0], [0, 0, 8])
    std = (2 / 5) ** 0.5
    want = 3**2 + 4**2 + std**2 * (10**2 + 2**2 + 6**2)
    assert fid_of(fid.Metric(pixels(real)), made) == pytest.approx(want, rel=1e-9)


def test_fid_of_gaussians_whose_covariances_do_not_commute(pixels):
    real, made = cross([100, 100, 0], [9, 3, 0], [1, -4, 0]), cross([100, 101, 0], [2, 7, 0], [5, -1, 0])
    a, b = (torch.cov(x[:, :2, 0, 0].double().T) for x in (real, made))
    root = (torch.trace(a @ b) + 2 * (a.det() * b.det()).sqrt()).sqrt()  # tr sqrt(M) of a 2 x 2 matrix
    assert not torch.allclose(a @ b, b @ a)
    want = 1 + a.trace() + b.trace() - 2 * root
    assert fid_of(fid.Metric(pixels(real)), made) == pytest.approx(float(want), rel=1e-6)


def test_fid_is_exact_with_fewer_images_than_features(pixels):
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8) for n in (5, 7))
    x, y = (v.flatten(1).double() for v in (real, made))
    xc, yc = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    # tr sqrt(Xc^T Xc Yc^T Yc) is the nuclear norm of Xc Yc^T
    want = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() + yc.square().sum()
    want -= 2 * torch.linalg.svdvals(xc @ yc.T).sum()
    assert fid_of(fid.Metric(pixels(real)), made) == pytest.approx(float(want), rel=1e-6)


def test_fid_of_images_to_themselves_is_zero(pixels):
    real = torch.randint(0, 256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert fid_of(fid.Metric(pixels(real)), real) < 1e-2  # of a trace near 3e5
    real = cross([100, 50, 20], [10, 0, 0], [0, 4, 0], [0, 0, 2])
    assert fid_of(fid.Metric(pixels(real)), real) < 1e-9


def test_reference_is_gone_through_once(clip_folder):
    source = Shapes(8)
    reference = runner.Real(source, range(8), 3)
    context = Context(clip_folder, reference=reference)
    first, again = fid.Metric(context), fid.Metric(replace(context, candidates=CONCEPTS))
    assert source.drawn == 8
    told = first.protocol()["reference"]
    assert told == again.protocol()["reference"] == {"num_images": 8, "sha256": features.hash_images(reference())}


# CLIP score and retrieval


def reference_cosines(folder, images, prompts):
    """Cosines by the CLIPModel's own forward pass: [B]."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=(images / 255 - 0.5) / 0.25, **tokens)
    return cosine_similarity(out.image_embeds, out.text_embeds)


def batch_of(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, [Shapes().item(i).prompt for i in range(n)]


def test_clip_score_is_the_mean_of_clamped_cosines(clip_folder):
    images = torch.cat([batch_of(6)[0], torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)])
    prompts = [CONCEPTS[i] for i in (0, 1, 2, 3, 0, 2, 1)]
    cosine = reference_cosines(clip_folder, images, prompts)
    metric = clip_score.Metric(Context(clip_folder))
    metric.update(images, prompts)
    assert metric.compute()["clip_score"] == pytest.approx(100 * float(cosine.clamp(min=0).mean()), rel=1e-5)
    assert metric.compute()["clip_score"] > 1


def test_clip_score_clamps_each_score_before_the_mean(monkeypatch):
    monkeypatch.setattr(features, "load_clip", lambda *_: FakeClip())
    metric = clip_score.Metric(Context("x"))
    images = torch.tensor([[138, 128, 0], [131, 132, 0], [28, 128, 0]], dtype=torch.uint8)[:, :, None, None]
    metric.update(images, ["an apple"] * 3)  # cosines 1, 0.6 and -1
    assert metric.compute() == {"clip_score": pytest.approx(100 * 1.6 / 3)}


class FakeClip:
    """Two axes: captions about apples and about dogs; an image's first two pixels are its embedding."""

    def images(self, images):
        return images[:, :2, 0, 0].float() - 128

    def texts(self, texts):
        return torch.tensor([[3.0, 0.0] if "apple" in text else [0.0, 0.5] for text in texts])

    def protocol(self):
        return {}


def test_retrieval_asks_for_the_concept_of_the_prompt(monkeypatch):
    monkeypatch.setattr(features, "load_clip", lambda *_: FakeClip())
    metric = clip_score.Metric(Context("x", candidates=["an apple", "a dog"], concept=concept))
    images = torch.tensor([[138, 129], [129, 138], [138, 129], [138, 129]], dtype=torch.uint8)
    images = torch.cat([images, torch.zeros(4, 1, dtype=torch.uint8)], 1)[:, :, None, None]
    metric.update(images, ["twemoji of an apple", "a dog", "noto of a dog", "an apple"])
    assert metric.compute()["retrieval"] == 0.75  # the third shows an apple; lengths of embeddings do not count
    assert "retrieval" not in measure_images([(images, ["a"] * 4)], Context("x"), ["clip_score"])


@pytest.mark.parametrize("name", ["fid", "clip_score"])
def test_any_split_order_or_merge_gives_the_same_number(clip_folder, name):
    reference = runner.Real(Shapes(), range(20), 8)
    context = Context(clip_folder, reference=reference, candidates=CONCEPTS, concept=concept)
    images, prompts = batch_of(11)

    def value(*parts):
        whole = registry.find("metric", name).Metric(context)
        for part in parts:
            other = registry.find("metric", name).Metric(context)
            for i in range(0, len(part), 4):
                some = part[i : i + 4]
                other.update(images[some], [prompts[j] for j in some])
            merge(whole, other)
        return whole.compute()

    want = value(range(11))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3)).tolist()
    for parts in ([range(1), range(1, 11)], [order], [order[:5], order[5:]], [[i] for i in order]):
        got = value(*map(list, parts))
        assert got.keys() == want.keys()
        for key in want:
            assert got[key] == pytest.approx(want[key], rel=1e-5)
    assert value(range(10)) != want


def test_prompts_longer_than_the_clip_takes_are_cut(clip_folder):
    images, _ = batch_of(1)
    values = measure_images([(images, ["a dog " * 40])], Context(clip_folder), ["clip_score"])
    assert 0 <= values["clip_score"] <= 100


# Images


def images_of(pipeline, batch_size, count=8, **kwargs):
    prompts = [Shapes().item(i).prompt for i in range(count)]
    seeds = [seed_of(0, i) for i in range(count)]
    made = list(generate(pipeline, prompts, seeds, steps=2, guidance_scale=3.0, batch_size=batch_size, **kwargs))
    assert {image.dtype for image in made} == {torch.uint8}
    assert [len(b) for b in made[:-1]] == [batch_size] * (len(made) - 1)
    return torch.cat(made)


def test_images_do_not_depend_on_the_batch_size(pipeline):
    whole = images_of(pipeline, 8).int()
    assert whole.shape == (8, 3, 16, 16)
    assert len({image.numpy().tobytes() for image in whole}) == 8
    for batch_size in (1, 3):
        difference = (images_of(pipeline, batch_size).int() - whole).abs()
        assert difference.max() <= 1  # of 255: another kernel may round otherwise
        assert (difference > 0).float().mean() < 0.01


def test_images_depend_on_the_seed(pipeline):
    one, other = (next(generate(pipeline, ["a dog"], [seed], steps=1)) for seed in (1, 2))
    assert (one.int() - other.int()).abs().float().mean() > 1


@pytest.mark.parametrize(("steps", "guidance", "evaluations"), [(1, 1.0, 1), (3, 1.0, 3), (1, 5.0, 2), (3, 5.0, 6)])
def test_network_evaluations_count_rows(pipeline, steps, guidance, evaluations):
    call = runner.arguments(pipeline, steps, guidance)
    values = latency.measure(pipeline, ["a dog", "a banana"], call, repeats=3, warmup=1)
    assert values["network_evaluations"] == evaluations
    assert 0 < values["seconds_min"] <= values["seconds_per_image"] <= values["seconds_max"]
    assert not pipeline.unet._forward_pre_hooks


def test_latency_is_the_median_of_the_calls_after_warmup(pipeline, monkeypatch):
    ticks = iter([0, 50, 100, 120, 200, 203, 300, 301, 400, 402])  # first, warm-up, then 3, 1 and 2 seconds
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    values = latency.measure(pipeline, ["a dog"], runner.arguments(pipeline, 1, 1.0), repeats=3, warmup=1)
    assert [values[k] for k in ("seconds_to_first_image", "seconds_per_image", "seconds_min", "seconds_max")] == [
        50,
        2,
        1,
        3,
    ]


def test_latency_has_no_value_without_a_call(pipeline):
    assert measure_images([batch_of(2)], Context(), ["latency"]) == {}
    context = Context(call=Call(pipeline, runner.arguments(pipeline, 1, 1.0), repeats=1))
    assert measure_images([batch_of(2)], context, ["latency"])["network_evaluations"] == 1


# The runner


def settings(clip_folder, **changes):
    return EvalConfig(
        **{"clip": clip_folder, "num_images": 6, "batch_size": 4, "comparison": 2, "repeats": 1} | changes
    )


def test_rows_of_results(clip_folder, pipeline_folder, tmp_path):
    student = tmp_path / "student"
    copy(pipeline_folder, student)
    (student / "fastgen.json").write_text('{"method": "dmd2", "num_inference_steps": 1, "guidance_scale": 1.0}')
    subjects = [Subject("teacher, 2 steps", "teacher", pipeline_folder, 2, 4.0), Subject("mine", "student", student)]
    rows = evaluate(
        subjects, settings(clip_folder), Shapes(), candidates=CONCEPTS, concept=concept, out=tmp_path / "run"
    )
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == rows
    assert [(r["name"], r["role"], r["steps"], r["guidance_scale"]) for r in rows] == [
        ("real images", "data", None, None),
        ("teacher, 2 steps", "teacher", 2, 4.0),
        ("mine", "student", 1, 1.0),
    ]
    assert [r["network_evaluations"] for r in rows] == [None, 4, 1]
    for row in rows:
        assert set(runner.VALUES) <= row.keys()
        assert row["fid"] > 0
        assert 0 <= row["retrieval"] <= 1
        told = row["protocol"]
        assert told["num_images"] == told["metrics"]["fid"]["num_images"] == 6
        assert told["metrics"]["fid"]["reference"]["num_images"] == 6
        assert len(told["metrics"]["clip_score"]["sha256"]) == 64
        assert {"torch", "diffusers", "transformers", "torchmetrics"} <= told["versions"].keys()
    assert rows[1]["protocol"]["scheduler"] == "DDIMScheduler"
    assert rows[1]["seconds_per_image"] > 0
    assert rows[0]["seconds_per_image"] is None
    assert rows[1]["protocol"]["weights"] == rows[2]["protocol"]["weights"] != rows[0]["protocol"].get("weights")
    shown = json.loads((tmp_path / "run" / "comparison" / "prompts.json").read_text())
    assert shown["prompts"] == [Shapes().item(i).prompt for i in range(2)]
    assert [s["folder"] for s in shown["subjects"]] == ["real-images", "teacher-2-steps", "mine"]
    for subject in shown["subjects"]:
        assert sorted(p.name for p in (tmp_path / "run" / "comparison" / subject["folder"]).iterdir()) == [
            "0.png",
            "1.png",
        ]


def copy(source: Path, target: Path):
    import shutil

    shutil.copytree(source, target)


def test_real_row_is_another_draw_where_there_is_one(clip_folder):
    config = settings(clip_folder, metrics=["fid", "clip_score"])
    assert evaluate([], config, Shapes(12))[0]["fid"] > 0
    small = evaluate([], config, Shapes(11))[0]
    assert small["fid"] is None
    assert "too small for a second draw" in small["protocol"]["images"]
    assert small["clip_score"] is not None
    few = evaluate([], config, Shapes(4))[0]
    assert few["protocol"]["num_images"] == 4


def test_prompts_alone_give_scores_and_no_real_row(clip_folder, pipeline):
    config = settings(clip_folder, metrics=["clip_score"])
    rows = evaluate([Subject("x", "teacher", pipeline, 1, 1.0)], config, Shapes(has_images=False))
    assert [row["role"] for row in rows] == ["teacher"]
    assert rows[0]["fid"] is None
    with pytest.raises(ValueError, match=r"fid needs real images; set eval\.reference"):
        evaluate([], settings(clip_folder), Shapes(has_images=False))


def test_a_cut_off_run_resumes_and_gives_the_same(clip_folder, pipeline, tmp_path, monkeypatch):
    subject = Subject("x", "teacher", pipeline, 1, 1.0)
    config = settings(clip_folder, metrics=["fid", "clip_score"], batch_size=2)
    want = evaluate([subject], config, Shapes())[-1]
    whole, made = runner.generate, []

    def cut(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args[1])
        return whole(*args, **kwargs)

    monkeypatch.setattr(runner, "generate", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate([subject], config, Shapes(), keep=tmp_path)
    files = sorted((tmp_path / "x").glob("*.png"))
    assert [f.name for f in files] == [f"{i:05d}.png" for i in range(4)]
    files[1].unlink()
    made.clear()
    got = evaluate([subject], config, Shapes(), keep=tmp_path)[-1]
    assert sum(map(len, made)) == 3  # the one deleted and the two never made
    assert got["fid"] == pytest.approx(want["fid"], rel=1e-6)
    assert got["clip_score"] == pytest.approx(want["clip_score"], rel=1e-6)
    monkeypatch.setattr(runner, "generate", None)
    assert evaluate([subject], config, Shapes(), keep=tmp_path)[-1]["fid"] == pytest.approx(got["fid"], rel=1e-9)


def test_kept_images_of_other_settings_or_damaged_ones_are_refused(clip_folder, pipeline, tmp_path):
    subject = Subject("x", "teacher", pipeline, 1, 1.0)
    config = settings(clip_folder, metrics=["clip_score"])
    evaluate([subject], config, Shapes(), keep=tmp_path)
    with pytest.raises(ValueError, match=r"x: holds images made with steps 1, now it is 2; delete it"):
        evaluate([replace(subject, steps=2)], config, Shapes(), keep=tmp_path)
    with pytest.raises(ValueError, match="made with seed 0, now it is 1"):
        evaluate([subject], replace(config, seed=1), Shapes(), keep=tmp_path)
    weight = pipeline.unet.conv_out.bias.data
    old = weight.clone()
    weight += 1
    with pytest.raises(ValueError, match="made with weights"):
        evaluate([subject], config, Shapes(), keep=tmp_path)
    weight.copy_(old)
    file = tmp_path / "x" / "00003.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"00003\.png: not a readable image .*; delete it to have it made again"):
        evaluate([subject], config, Shapes(), keep=tmp_path)
    (tmp_path / "x" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: not valid JSON; delete the folder"):
        evaluate([subject], config, Shapes(), keep=tmp_path)


def test_steps_come_from_the_subject_the_card_or_the_call(pipeline, tmp_path):
    plain = runner.resolved(Subject("x", "teacher", pipeline), pipeline)
    assert (plain.steps, plain.guidance_scale) == (50, 7.5)
    (tmp_path / "fastgen.json").write_text('{"num_inference_steps": 2, "guidance_scale": 1.0}')
    card = runner.resolved(Subject("x", "student", tmp_path), pipeline)
    assert (card.steps, card.guidance_scale) == (2, 1.0)
    own = runner.resolved(Subject("x", "student", tmp_path, 4, 0.5), pipeline)
    assert (own.steps, own.guidance_scale) == (4, 0.5)


def test_commit_and_versions_are_told():
    assert runner.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    found = runner.commit()
    assert found is None or len(found.split("-")[0]) == 40


# Messages


def test_missing_or_wrong_clip(tmp_path, clip_folder):
    missing = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"nowhere: no such CLIP folder; set eval\.clip"):
        fid.Metric(Context(str(missing), reference=lambda: []))
    with pytest.raises(ValueError, match=r"not a CLIPModel with tokenizer and image processor \("):
        clip_score.Metric(Context(str(tmp_path)))
    with pytest.raises(ValueError, match="clip_score needs a CLIP"):
        clip_score.Metric(Context())
    with pytest.raises(ValueError, match="must be distinct"):
        clip_score.Metric(Context(clip_folder, candidates=["a dog", "a dog"]))


def test_prompt_without_candidate(clip_folder):
    metric = clip_score.Metric(Context(clip_folder, candidates=CONCEPTS, concept=concept))
    with pytest.raises(ValueError, match=r"'noto of a dogg' stands for 'a dogg', which is no candidate.*mean 'a dog'"):
        metric.update(batch_of(1)[0], ["noto of a dogg"])


def test_too_few_images(clip_folder):
    context = Context(clip_folder, reference=runner.Real(Shapes(), range(4), 4))
    metric = fid.Metric(context)
    metric.update(*batch_of(1))
    with pytest.raises(ValueError, match="fid needs at least 2 images, got 1"):
        metric.compute()
    with pytest.raises(ValueError, match="clip_score needs at least 1 image, got 0"):
        clip_score.Metric(context).compute()
    with pytest.raises(ValueError, match="needs at least 2 real images, the reference has 1"):
        fid.Metric(replace(context, reference=runner.Real(Shapes(), range(1), 4)))


def test_no_prompts_or_too_few_seeds(pipeline):
    with pytest.raises(ValueError, match="no prompts to make images from"):
        next(generate(pipeline, [], []))
    with pytest.raises(ValueError, match="2 prompts need as many seeds, got 1"):
        next(generate(pipeline, ["a", "b"], [1]))
    with pytest.raises(ValueError, match="latency needs at least one prompt"):
        latency.measure(pipeline, [], {})


def test_unknown_metric(clip_folder):
    with pytest.raises(ValueError, match=r"unknown metric 'fdi'; did you mean 'fid'\?"):
        evaluate([], settings(clip_folder, metrics=["fdi"]), Shapes())
    with pytest.raises(ValueError, match="unknown metric 'runner'"):
        runner.metrics(["runner"], Context())


def test_subjects_of_one_name(clip_folder, pipeline):
    subject = Subject("x y", "teacher", pipeline)
    for names in (("x y", "x/y"), ("real images",)):
        with pytest.raises(ValueError, match="subjects must have distinct names"):
            evaluate([replace(subject, name=n) for n in names], settings(clip_folder), Shapes())


def test_pipeline_that_cannot_be_opened(tmp_path, clip_folder):
    with pytest.raises(ValueError, match=r"none: not a pipeline that Diffusers can open \("):
        runner.open_pipeline(tmp_path / "none", torch.float32, "cpu")


def test_pipeline_without_a_known_network():
    class Odd:
        components: dict[str, nn.Module] = {}  # noqa: RUF012
        device = torch.device("cpu")

    with pytest.raises(ValueError, match="Odd has none of unet, transformer"):
        latency.measure(Odd(), ["a"], {})


def test_inception_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path / "weights"))
    with pytest.raises(ValueError, match=r"weights/inception-2015-12-05\.pt: no InceptionV3 weights; put https://"):
        fid.Metric(Context(reference=lambda: []))
    with pytest.raises(ValueError, match=r"other\.pt: no InceptionV3 weights"):
        features.inception_file(str(tmp_path / "other.pt"))
    (tmp_path / "other.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"reads InceptionV3 from a file named inception-2015-12-05\.pt; rename it"):
        features.inception_file(str(tmp_path / "other.pt"))
    (tmp_path / features.INCEPTION).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"inception-2015-12-05\.pt: not readable \(.*fetch it again from https"):
        fid.Metric(Context(inception=str(tmp_path), reference=lambda: []))


class Averages(nn.Module):
    """In place of InceptionV3: 2048 local averages of a mixture of the channels."""

    def __init__(self):
        super().__init__()
        mixture = nn.Conv2d(3, 1, 1, bias=False)
        mixture.weight.data.copy_(torch.tensor(MIXTURE).reshape(1, 3, 1, 1))
        self.layers = nn.Sequential(mixture, nn.AdaptiveAvgPool2d((32, 64)), nn.Flatten(1))

    def forward(self, x):
        return self.layers(x)


MIXTURE = (0.5, 0.3, 0.2)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_inception_sees_images_as_clean_fid_resizes_them(tmp_path):
    from PIL import Image

    file = tmp_path / features.INCEPTION
    torch.jit.script(Averages()).save(str(file))
    extractor = features.extractor(Context(inception=str(tmp_path)))
    images, _ = batch_of(2)
    want = torch.zeros(2, 2048)
    for i, image in enumerate(images):
        for weight, channel in zip(MIXTURE, image, strict=True):
            resized = Image.fromarray(channel.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.asarray(resized).clip(0, 255)) / 128 - 1
            want[i] += weight * nn.functional.adaptive_avg_pool2d(pixels[None], (32, 64)).flatten()
    torch.testing.assert_close(extractor.images(images), want, atol=1e-5, rtol=0)
    assert extractor.protocol()["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_config_is_checked():
    assert config.decode(EvalConfig, {}, "x.yaml") == EvalConfig()
    tree = {"metrics": ["fid"], "reference": {"source": "emoji", "split": "heldout"}, "num_images": 8}
    decoded = config.decode(EvalConfig, tree, "x.yaml")
    assert config.decode(EvalConfig, config.encode(decoded), "x.yaml") == decoded
    with pytest.raises(ConfigError, match="num_images must be at least 2, got 1"):
        config.decode(EvalConfig, {"num_images": 1}, "x.yaml")
