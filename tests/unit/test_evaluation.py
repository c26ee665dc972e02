"""Images that do not depend on the batch, rows of results, evaluations that are cut off and go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastgen import config
from fastgen.config import ConfigError
from fastgen.data import Item
from fastgen.evaluation import images, latency, per_image, runner
from fastgen.evaluation.config import EvalConfig
from fastgen.evaluation.context import Call, Context, Seen
from fastgen.evaluation.images import generate
from fastgen.evaluation.runner import Subject, evaluate
from fastgen.evaluation.seen import intervals
from fastgen.rng import seed_of

CONCEPTS = ("a red apple", "a dog", "a blue heart", "a banana")


def concept(prompt):
    """The open caption of "twemoji of a red apple"."""
    return prompt.rsplit(" of ", 1)[-1]


class Shapes:
    """A source of small coloured noise images, one per index; some captions name a style."""

    candidates = CONCEPTS

    def __init__(self, size=64, has_images=True):
        self.size, self.has_images, self.drawn = size, has_images, 0

    def __len__(self):
        return self.size

    def concept(self, prompt):
        return concept(prompt)

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
    call = images.arguments(pipeline, steps, guidance)
    values = latency.measure(pipeline, ["a dog", "a banana"], call, repeats=3, warmup=1)
    assert values["network_evaluations"] == evaluations
    assert 0 < values["seconds_min"] <= values["seconds_per_image"] <= values["seconds_max"]
    assert not pipeline.unet._forward_pre_hooks


def test_latency_is_the_median_of_the_calls_after_warmup(pipeline, monkeypatch):
    ticks = iter([0, 50, 100, 120, 200, 203, 300, 301, 400, 402])  # first, warm-up, then 3, 1 and 2 seconds
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    values = latency.measure(pipeline, ["a dog"], images.arguments(pipeline, 1, 1.0), repeats=3, warmup=1)
    assert [values[k] for k in ("seconds_to_first_image", "seconds_per_image", "seconds_min", "seconds_max")] == [
        50,
        2,
        1,
        3,
    ]


def test_latency_has_no_value_without_a_call(pipeline):
    seen = Seen(["a dog"] * 2, {})
    assert latency.Metric(Context()).compute(seen) == {}
    timed = latency.Metric(Context(call=Call(pipeline, images.arguments(pipeline, 1, 1.0), repeats=1)))
    assert timed.compute(seen)["network_evaluations"] == 1


# The runner


def settings(clip_folder, **changes):
    return EvalConfig(
        **{
            "features": "clip",
            "weights": {"clip": clip_folder},
            "num_images": 6,
            "batch_size": 4,
            "comparison": 2,
            "repeats": 1,
            "bootstrap": 5,
        }
        | changes
    )


def test_rows_of_results(clip_folder, pipeline_folder, tmp_path):
    student = tmp_path / "student"
    copy(pipeline_folder, student)
    (student / "fastgen.json").write_text('{"method": "dmd2", "num_inference_steps": 1, "guidance_scale": 1.0}')
    subjects = [Subject("teacher, 2 steps", "teacher", pipeline_folder, 2, 4.0), Subject("mine", "student", student)]
    rows = evaluate(subjects, settings(clip_folder), Shapes(), out=tmp_path / "run")
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
        assert told["num_images"] == 6
        assert told["metrics"]["fid"]["reference"]["num_images"] == 6
        assert len(told["metrics"]["clip_score"]["sha256"]) == 64
        for name in ("fid", "clip_score", "retrieval"):
            assert sum(row["intervals"][name]) / 2 == pytest.approx(row[name])
        low, high = row["intervals"]["fid"]
        # of the CLIP's scores all may be 0: its vocabulary, and so its captions, are other ones in each process
        assert low < row["fid"] < high
        assert "seconds_per_image" not in row["intervals"]
        assert {"torch", "diffusers", "transformers"} <= told["versions"].keys()
    assert rows[1]["protocol"]["scheduler"] == "DDIMScheduler"
    assert rows[1]["seconds_per_image"] > 0
    assert rows[0]["seconds_per_image"] is None
    scores = per_image.load(tmp_path / "run" / "per_image" / "mine.json")
    assert scores.prompts == rows[2]["protocol"]["prompts"]
    assert float(scores.values["clip_score"].mean()) == pytest.approx(rows[2]["clip_score"])
    assert len(list((tmp_path / "run" / "images" / "mine").glob("*.png"))) == 6
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
    with pytest.raises(ValueError, match=r"fid needs real images"):
        evaluate([], settings(clip_folder), Shapes(has_images=False))


def test_a_cut_off_run_resumes_and_gives_the_same(clip_folder, pipeline, tmp_path, monkeypatch):
    subject = Subject("x", "teacher", pipeline, 1, 1.0)
    config = settings(clip_folder, metrics=["fid", "clip_score"], batch_size=2, comparison=0)
    want = evaluate([subject], config, Shapes())[-1]
    whole, made = images.generate, []

    def cut(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args[1])
        return whole(*args, **kwargs)

    monkeypatch.setattr(images, "generate", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate([subject], config, Shapes(), out=tmp_path)
    files = sorted((tmp_path / "images" / "x").glob("*.png"))
    assert [f.name for f in files] == [f"{i:05d}.png" for i in range(4)]
    files[1].unlink()
    made.clear()
    got = evaluate([subject], config, Shapes(), out=tmp_path)[-1]
    assert sum(map(len, made)) == 3  # the one deleted and the two never made
    assert got["fid"] == pytest.approx(want["fid"], rel=1e-6)
    assert got["clip_score"] == pytest.approx(want["clip_score"], rel=1e-6)
    monkeypatch.setattr(images, "generate", None)
    assert evaluate([subject], config, Shapes(), out=tmp_path)[-1]["fid"] == pytest.approx(got["fid"], rel=1e-9)


def test_kept_images_of_other_settings_are_made_anew(clip_folder, pipeline, tmp_path, caplog):
    caplog.set_level("INFO", "fastgen")
    subject = Subject("x", "teacher", pipeline, 1, 1.0)
    config = settings(clip_folder, metrics=["fid"])
    first = evaluate([subject], config, Shapes(), out=tmp_path)[-1]
    weight = pipeline.unet.conv_out.bias.data
    old = weight.clone()
    for name, change in (
        ("steps 1, now it is 2", lambda: ([replace(subject, steps=2)], config)),
        ("seed 0, now it is 1", lambda: ([subject], replace(config, seed=1))),
        ("weights ", lambda: (weight.add_(1), ([subject], config))[1]),
    ):
        evaluate([subject], config, Shapes(), out=tmp_path)
        caplog.clear()
        subjects, other = change()
        assert evaluate(subjects, other, Shapes(), out=tmp_path)[-1]["fid"] != first["fid"]
        assert f"its images were made with {name}" in caplog.text
    weight.copy_(old)
    assert evaluate([subject], config, Shapes(), out=tmp_path)[-1]["fid"] == first["fid"]
    (tmp_path / "images" / "x" / "settings.json").write_text("{")
    assert evaluate([subject], config, Shapes(), out=tmp_path)[-1]["fid"] == first["fid"]


def test_a_damaged_kept_image_is_told(clip_folder, pipeline, tmp_path):
    subject = Subject("x", "teacher", pipeline, 1, 1.0)
    config = settings(clip_folder, metrics=["clip_score"])
    evaluate([subject], config, Shapes(), out=tmp_path)
    file = tmp_path / "images" / "x" / "00003.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"00003\.png: not a readable image .*; delete it to have it made again"):
        evaluate([subject], config, Shapes(), out=tmp_path)


def test_images_need_not_be_kept(clip_folder, pipeline, tmp_path):
    config = settings(clip_folder, metrics=["clip_score"], keep_images=False)
    evaluate([Subject("x", "teacher", pipeline, 1, 1.0)], config, Shapes(), out=tmp_path)
    assert not (tmp_path / "images").exists()
    assert (tmp_path / "comparison" / "x" / "1.png").is_file()


class Frames:
    """A pipeline of videos: frame number i of 5 is grey i."""

    def __init__(self):
        self.scheduler, self.components, self.device = None, {}, torch.device("cpu")

    def __call__(self, prompt, generator, output_type, **_):
        from PIL import Image

        return ([[Image.new("RGB", (4, 4), (i, i, i)) for i in range(5)] for _ in prompt],)


def test_of_a_video_the_middle_frame_is_judged():
    [made] = generate(Frames(), ["a", "b"], [1, 2])
    assert made.shape == (2, 3, 4, 4)
    assert (made == 2).all()


def test_steps_come_from_the_subject_the_card_or_the_call(pipeline, tmp_path):
    plain = runner.resolved(Subject("x", "teacher", pipeline), pipeline)
    assert (plain.steps, plain.guidance_scale) == (50, 7.5)
    (tmp_path / "fastgen.json").write_text('{"num_inference_steps": 2, "guidance_scale": 1.0}')
    card = runner.resolved(Subject("x", "student", tmp_path), pipeline)
    assert (card.steps, card.guidance_scale) == (2, 1.0)
    own = runner.resolved(Subject("x", "student", tmp_path, 4, 0.5), pipeline)
    assert (own.steps, own.guidance_scale) == (4, 0.5)


def test_what_the_card_says_of_the_call_is_given_to_it(clip_folder, pipeline_folder, tmp_path, monkeypatch):
    copy(pipeline_folder, tmp_path / "student")
    (tmp_path / "student" / "fastgen.json").write_text('{"num_inference_steps": 1, "call": {"eta": 0.5}}')
    seen = []
    whole = images.generate
    monkeypatch.setattr(images, "generate", lambda *a, **k: seen.append(k["call"]) or whole(*a, **k))
    rows = evaluate(
        [Subject("x", "student", tmp_path / "student")], settings(clip_folder, metrics=["clip_score"]), Shapes()
    )
    assert seen[0] == rows[-1]["protocol"]["call"] == {"eta": 0.5}


def test_commit_and_versions_are_told():
    assert runner.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    found = runner.commit()
    assert found is None or len(found.split("-")[0]) == 40


# Messages


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
    with pytest.raises(ValueError, match=r"none: cannot be opened as a pipeline \("):
        runner.open_pipeline(tmp_path / "none", torch.float32, "cpu")


def test_pipeline_without_a_known_network():
    class Odd:
        components: dict[str, nn.Module] = {}  # noqa: RUF012
        device = torch.device("cpu")

    with pytest.raises(ValueError, match="Odd has none of unet, transformer"):
        latency.measure(Odd(), ["a"], {})


def test_config_is_checked():
    assert config.decode(EvalConfig, {}, "x.yaml") == EvalConfig()
    tree = {"metrics": ["fid"], "reference": {"source": "emoji", "split": "heldout"}, "num_images": 8}
    decoded = config.decode(EvalConfig, tree, "x.yaml")
    assert config.decode(EvalConfig, config.encode(decoded), "x.yaml") == decoded
    with pytest.raises(ConfigError, match="num_images must be at least 2, got 1"):
        config.decode(EvalConfig, {"num_images": 1}, "x.yaml")


class Right:
    """A metric: the share of rows that are 1."""

    extractors = (None,)

    def compute(self, seen):
        return {"right": float(seen.rows["right"].mean())}


@pytest.mark.parametrize(("count", "of"), [(30, 100), (97, 100), (1, 100)])
def test_a_share_s_interval_is_the_binomial_s_and_ends_at_0_and_1(count, of):
    seen = Seen(["a"] * of, {"right": torch.tensor([1.0] * count + [0.0] * (of - count))})
    p, ends = count / of, {}
    for share in (False, True):
        ends[share] = intervals(Right(), seen, {"right": p}, 2000, 0, share)["right"]
    width = 1.96 * (p * (1 - p) / of) ** 0.5
    assert ends[False] == pytest.approx([p - width, p + width], abs=0.1 * width)
    assert ends[True] == [max(0.0, ends[False][0]), min(1.0, ends[False][1])]
    assert (ends[True] == ends[False]) == (count == 30)
