"""The model card: what the Hub reads of it, what a reader can run, and what text from elsewhere cannot do to it."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from fastgen.card import (
    HUB_LICENCES,
    Base,
    Call,
    Facts,
    Licence,
    Results,
    Value,
    escaped,
    fenced,
    front_matter,
    licence_called,
    model_card,
    public,
    snippet,
    strictest,
)

EVIL = 'a "cat"\n---\nlicense: mit\n---\n<script>x</script> ![i](http://e/x.png) | `a` ```` \\ $x$ __b__'
CALL = Call(
    "owner/student",
    "StableDiffusionPipeline",
    {"prompt": "a red apple", "num_inference_steps": 2, "guidance_scale": 1.0},
    scheduler="LCMScheduler",
)
BASE = Base("owner/teacher", "owner/teacher", Licence("openrail++"))
PROTOCOL = {"num_images": 1000, "seed": 0, "steps": 2, "dtype": "fp32", "commit": "abc", "extractor_sha256": "123"}
RESULTS = Results(
    ("images", "coco"),
    [Value("fid", "FID", 12.5, PROTOCOL), Value("clip_score", "CLIP score (x)", 31.0, PROTOCOL | {"commit": None})],
    "| | FID |\n|---|---:|\n| dmd2 | 12.50 |\n",
)
FACTS = Facts(
    name="student",
    form="pipeline",
    settings={"num_inference_steps": 2, "guidance_scale": 1.0},
    call=CALL,
    bases=[BASE],
    method=("dmd2", "Improved Distribution Matching Distillation", "2405.14867"),
    config={"method": {"name": "dmd2"}, "run": {"steps": 10}},
    steps=10,
    images_seen=80,
    trained={"student": {"name": "adamw", "lr": 1e-5}},
    results=RESULTS,
    grid="samples.png",
    prompts=["a red apple", "", "a red apple"],
    versions={"torch": "2.14.1"},
)


def read(facts: Facts) -> Any:
    """As the Hub's library reads it."""
    return ModelCard(model_card(facts))


# The metadata


def test_the_hub_s_library_reads_the_front_matter() -> None:
    data = read(FACTS).data
    assert isinstance(data, ModelCardData)
    assert (data.license, data.base_model, data.library_name) == ("openrail++", "owner/teacher", "diffusers")
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.pipeline_tag == "text-to-image"
    assert {"text-to-image", "dmd2", "few-step", "diffusers:StableDiffusionPipeline"} <= set(data.tags)
    assert "license_name" not in data.to_dict()


def test_results_are_read_with_their_protocol() -> None:
    data = read(FACTS).data
    assert data.model_name == "student"
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("fid", "FID", 12.5),
        ("clip_score", "CLIP score (x)", 31.0),
    ]
    first, second = data.eval_results
    assert (first.dataset_type, first.dataset_name, first.task_type) == ("images", "coco", "text-to-image")
    assert first.metric_args == PROTOCOL
    assert "commit" not in second.metric_args, "what is not known is not said"
    assert RESULTS.table.strip() in model_card(FACTS)


def test_without_results_there_is_no_index() -> None:
    for results in (None, replace(RESULTS, values=[])):
        assert "model-index" not in front_matter(replace(FACTS, results=results))
    assert "## Results" not in model_card(replace(FACTS, results=None))


@pytest.mark.parametrize(
    ("call", "task"),
    [
        (CALL, "text-to-image"),
        (replace(CALL, gives="frames"), "text-to-video"),
        (replace(CALL, arguments={"class_labels": [1]}), "unconditional-image-generation"),
    ],
)
def test_the_task_is_the_call_s(call: Call, task: str) -> None:
    data = read(replace(FACTS, call=call)).data
    assert data.pipeline_tag == task
    assert data.eval_results[0].task_type == task
    assert ("makes a video in" in model_card(replace(FACTS, call=call))) == (task == "text-to-video")


def test_a_base_without_a_hub_id_is_named_in_the_text_alone() -> None:
    """The Hub refuses a card whose base_model is no repository."""
    facts = replace(FACTS, bases=[Base("my-teacher")])
    assert "base_model" not in front_matter(facts)
    assert "distilled from my-teacher by fastgen's method `dmd2`" in model_card(facts)
    facts = replace(FACTS, bases=[Base("my-copy", "owner/teacher")])
    assert front_matter(facts)["base_model"] == "owner/teacher"
    assert "my-copy (made from [owner/teacher](https://huggingface.co/owner/teacher))" in model_card(facts)


def test_what_it_started_from_is_a_base_too() -> None:
    facts = replace(FACTS, bases=[BASE, Base("owner/warm", "owner/warm")])
    assert read(facts).data.base_model == ["owner/teacher", "owner/warm"]
    assert ", starting from [owner/warm](https://huggingface.co/owner/warm)." in model_card(facts)


def test_a_teacher_s_card_speaks_of_no_steps() -> None:
    facts = replace(FACTS, settings={}, method=("pretrain", "Denoising Diffusion", "2006.11239"), bases=[])
    assert "A model trained by fastgen's method `pretrain`." in model_card(facts)
    assert not {"few-step", "distillation"} & set(front_matter(facts)["tags"])
    sampled = replace(facts, method=("guidance", "Guidance", "2210.03142"))
    assert "A student that is sampled as its teacher is, distilled by" in model_card(sampled)


# Licences


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("apache-2.0", "allowed"),
        ("mit", "allowed"),
        ("cc-by-sa-4.0", "allowed"),
        ("openrail++", "restricted"),
        ("creativeml-openrail-m", "restricted"),
        ("stabilityai-ai-community", "limited"),
        ("cc-by-nc-4.0", "forbidden"),
        ("cc-by-nc-sa-2.0", "forbidden"),
        ("flux-1-dev-non-commercial-license", "forbidden"),
        ("sai-nc-community", "forbidden"),
        ("deepfloyd-if-license", "forbidden"),
        ("FLUX Non-Commercial License", "forbidden"),
        ("unknown", "unknown"),
        ("ours-1.0", "unknown"),
        ("concise-nce", "unknown"),  # nc within a word
    ],
)
def test_what_a_licence_says_of_commercial_use(name: str, terms: str) -> None:
    licence = licence_called(name)
    assert licence.terms == terms
    assert licence.called.lower() == name.lower()
    text = model_card(replace(FACTS, bases=[Base("owner/teacher", "owner/teacher", licence)]))
    assert ("> **Warning:**" in text) == (terms == "forbidden")
    assert ("forbids commercial use, and this model was made from it" in text) == (terms == "forbidden")
    assert ("under conditions only" in text) == (terms == "limited")
    assert ("is not known here" in text) == (terms == "unknown")


@pytest.mark.parametrize("name", ["ours-1.0", "flux-1-dev-non-commercial-license", "stabilityai-ai-community"])
def test_a_licence_that_the_hub_does_not_list_is_another_one_by_name(name: str) -> None:
    assert name not in HUB_LICENCES
    data = read(replace(FACTS, bases=[Base("t", "", licence_called(name))])).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", name)


def test_an_unknown_licence_is_said_to_be_unknown() -> None:
    for bases in ([Base("teacher")], []):
        facts = replace(FACTS, bases=bases)
        assert read(facts).data.license == "unknown"
        assert "unknown" in model_card(facts).partition("## Licence")[2].lower()
    assert "The licence of teacher is unknown, and so is that of this model." in model_card(
        replace(FACTS, bases=[Base("teacher")])
    )


def test_a_licence_without_derivatives_is_warned_of() -> None:
    text = model_card(replace(FACTS, bases=[Base("t", "", Licence("cc-by-nd-4.0"))]))
    assert "forbids passing on changed versions, which this model is." in text
    assert "forbids commercial" not in text
    both = model_card(replace(FACTS, bases=[Base("t", "", Licence("cc-by-nc-nd-4.0"))]))
    assert both.count("> **Warning:**") == 2


def test_of_several_bases_the_strictest_licence_is_the_card_s() -> None:
    free, unknown, never = Licence("mit"), Licence(), Licence("cc-by-nc-4.0")
    for order in ([free, never, unknown], [never, unknown, free]):
        assert strictest([Base("x", "", licence) for licence in order]) == never
    assert strictest([Base("x", "", free), Base("y", "", unknown)]) == unknown
    assert strictest([Base("x", "", free), Base("y", "", Licence("openrail++"))]) == Licence("openrail++")
    text = model_card(replace(FACTS, bases=[Base("one", "", free), Base("two", "", never)]))
    assert "Inherited from one: mit." in text
    assert "Inherited from two: cc-by-nc-4.0. **It forbids commercial use, of this model too.**" in text


def test_a_licence_s_link_is_kept() -> None:
    licence = Licence("other", "ours", "https://example.org/licence")
    facts = replace(FACTS, bases=[Base("t", "", licence)])
    assert front_matter(facts)["license_link"] == licence.link
    assert "Inherited from t: [ours](https://example.org/licence)." in model_card(facts)


# The call


def calls(text: str) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call in a snippet."""
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    call = next(n for n in found if n.func.id == "pipeline")  # type: ignore[attr-defined]
    return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg != "generator"}


@pytest.mark.parametrize("prompt", ["a red apple", EVIL, 'say "hi" \\n', "日本語 🍎"])
def test_the_snippet_calls_with_exactly_these_arguments(prompt: str) -> None:
    arguments = {"prompt": prompt, "num_inference_steps": 2, "guidance_scale": 7.5, "class_labels": [1, 2]}
    assert calls(snippet(replace(CALL, arguments=arguments))) == arguments
    assert calls(snippet(replace(CALL, arguments={"batch_size": 1}))) == {"batch_size": 1}


def test_a_pipeline_s_snippet() -> None:
    text = snippet(CALL)
    assert 'DiffusionPipeline.from_pretrained("owner/student")' in text
    assert text.endswith(".images[0]")
    assert "manual_seed(0)\nimage" not in text
    half = snippet(replace(CALL, dtype="float16", variant="fp16", code=True))
    assert '("owner/student", variant="fp16", dtype=torch.float16, trust_remote_code=True)' in half
    assert snippet(replace(CALL, gives="frames")).splitlines()[-1].startswith("frames = pipeline(")


def test_noise_of_the_global_generator_is_seeded_and_said() -> None:
    call = replace(CALL, global_noise=True)
    assert "\ntorch.manual_seed(0)\nimage = " in snippet(call)
    assert "torch's global generator" in model_card(replace(FACTS, call=call))
    one = replace(FACTS, call=call, settings={"num_inference_steps": 1})
    assert "torch's global generator" not in model_card(one), "one step draws no noise between steps"
    assert "torch's global generator" not in model_card(FACTS)


def test_code_in_the_folder_is_said() -> None:
    assert "brings code that Diffusers does not have" in model_card(replace(FACTS, call=replace(CALL, code=True)))
    assert "brings code" not in model_card(FACTS)


def test_a_component_s_snippet_puts_it_into_its_base() -> None:
    call = replace(CALL, networks={"unet": "UNet2DConditionModel"}, base="owner/teacher", dtype="bfloat16")
    facts = replace(FACTS, form="component", call=call)
    text = snippet(call)
    ast.parse(text)
    assert "from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel" in text
    assert (
        'unet = UNet2DConditionModel.from_pretrained("owner/student", subfolder="unet", dtype=torch.bfloat16)' in text
    )
    whole = 'pipeline = StableDiffusionPipeline.from_pretrained("owner/teacher", unet=unet, scheduler=scheduler'
    assert f"{whole}, dtype=torch.bfloat16)" in text
    assert f"{whole}, is_distilled=True, dtype=" in snippet(replace(call, settings={"is_distilled": True}))
    assert "the denoising network alone (`UNet2DConditionModel`)" in model_card(facts)
    assert not [tag for tag in front_matter(facts)["tags"] if tag.startswith("diffusers:")]


def test_a_lora_file_s_card() -> None:
    call = replace(CALL, weights={"pytorch_lora_weights.safetensors": {}}, base="owner/teacher")
    facts = replace(FACTS, form="lora", call=call, settings=FACTS.settings | {"lora": {"rank": 8, "scale": 1.0}})
    assert read(facts).data.to_dict()["base_model_relation"] == "adapter"
    assert "lora" in read(facts).data.tags
    text = snippet(call)
    ast.parse(text)
    assert 'pipeline.load_lora_weights("owner/student", weight_name="pytorch_lora_weights.safetensors")' in text
    assert 'pipeline.scheduler = LCMScheduler.from_pretrained("owner/student", subfolder="scheduler")' in text
    assert "The LoRA file is of rank 8" in model_card(facts)
    assert "squared Frobenius" not in model_card(facts)
    lora = {"rank": 8, "scale": 1.0, "energy": 0.987654, "left_out": ["conv_in.bias"]}
    extracted = replace(facts, settings=FACTS.settings | {"lora": lora}, bases=[BASE, Base("student")])
    assert "keeps 98.77% of the squared Frobenius norm" in model_card(extracted)
    assert "Left out, as no LoRA holds it: `conv_in.bias`." in model_card(extracted)
    assert ", extracted from student." in model_card(extracted)


def test_a_card_of_several_lora_files_loads_each_into_its_network() -> None:
    files: dict[str, dict[str, Any]] = {"one.safetensors": {}, "two.safetensors": {"load_into_transformer_2": True}}
    call = replace(CALL, pipeline="WanPipeline", weights=files, base="owner/teacher")
    text = snippet(call)
    ast.parse(text)
    assert 'load_lora_weights("owner/student", weight_name="one.safetensors")\n' in text
    assert 'load_lora_weights("owner/student", weight_name="two.safetensors", load_into_transformer_2=True)\n' in text
    lora = FACTS.settings | {"lora": {"rank": 8, "scale": 1.0}}
    card = model_card(replace(FACTS, form="lora", call=call, settings=lora))
    assert "This is a LoRA file for each of its experts, for a `WanPipeline`, with the student's scheduler." in card
    assert "Each LoRA file is of rank 8, its scale" in card


def test_what_no_stock_call_takes_has_no_snippet() -> None:
    settings = {"use": "fastgen.lora.loaded: no place", "num_inference_steps": 2}
    text = model_card(replace(FACTS, form="lora", call=replace(CALL, arguments={}), settings=settings))
    assert "## Use\n\nfastgen.lora.loaded: no place." in text
    assert "```python" not in text


# Text from elsewhere


def test_no_prompt_name_or_config_breaks_out_of_its_place() -> None:
    facts = replace(
        FACTS,
        name=EVIL,
        prompts=[EVIL],
        bases=[Base(EVIL, "", Licence("other", EVIL))],
        call=replace(CALL, arguments=CALL.arguments | {"prompt": EVIL}),  # type: ignore[operator]
        config={"data": {"prompt": EVIL}},
        trained={EVIL: {"lr": EVIL}},
    )
    text = model_card(facts)
    card = ModelCard(text)
    assert card.data.to_dict()["license_name"] == EVIL
    assert card.data.license == "other"
    prose, fence = [], ""
    for line in card.text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(ticks) >= 3:
            fence = ticks
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence:
            prose.append(line)
    assert fence == "", "every fence is closed by its own"
    assert "details>" in prose[-1] or [line for line in prose if line == "</details>"]
    outside = "\n".join(prose)
    assert "<script" not in outside
    assert "![i]" not in outside
    assert "\nlicense: mit" not in outside


def test_escaped_text_is_one_line_of_plain_letters() -> None:
    assert escaped("a_b*c`d[e](f)|g~h$i\\j\nk <b> & l") == (
        "a\\_b\\*c\\`d\\[e\\](f)\\|g\\~h\\$i\\\\j k &lt;b&gt; &amp; l"
    )
    assert escaped("a red apple, 2.5 - left!") == "a red apple, 2.5 - left!"


def test_a_fence_is_longer_than_what_is_in_it() -> None:
    assert fenced("x", "yaml") == "```yaml\nx\n```"
    assert fenced("a ````` b\n", "") == "``````\na ````` b\n``````"


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"hf_token": "abc", "api_key": "x"}, {"hf_token": "(left out)", "api_key": "(left out)"}),
        ({"token": None}, {"token": None}),
        ({"tokenizer": "t5", "keep": 2}, {"tokenizer": "t5", "keep": 2}),
        ({"note": "with hf_abcdefghijklmnopqrstuv in it"}, {"note": "with (left out) in it"}),
        ({"url": "https://me:pass@example.org/x"}, {"url": "https://example.org/x"}),
        ({"path": "/home/me/data/coco"}, {"path": ".../coco"}),
        ({"path": "~/data/coco/"}, {"path": ".../coco"}),
        ({"path": "C:\\Users\\me\\coco"}, {"path": ".../coco"}),
        ({"path": ["runs/emoji", "owner/name"]}, {"path": ["runs/emoji", "owner/name"]}),
        ({"path": "assets:emoji/teacher"}, {"path": "assets:emoji/teacher"}),
        ({"lr": 1e-5, "n": None, "on": True}, {"lr": 1e-5, "n": None, "on": True}),
    ],
)
def test_neither_secrets_nor_a_machine_s_folders_are_written(tree: Any, said: Any) -> None:
    assert public(tree) == said
    text = model_card(replace(FACTS, config=tree))
    block = text.partition("```yaml\n")[2].partition("\n```")[0]
    assert yaml.safe_load(block) == said


def test_training_and_versions_are_said() -> None:
    text = model_card(FACTS)
    assert "| Images seen | 80 |" in text
    assert "| Optimizer of student | name adamw, lr 1e-05 |" in text
    assert "[arXiv:2405.14867](https://arxiv.org/abs/2405.14867)" in text
    assert "![Samples by the trainer's own sampler](samples.png)" in text
    assert "row by row: a red apple; (none)." in text
    assert "torch 2.14.1." in text
    bare = model_card(Facts("x", "pipeline", {}, CALL))
    for heading in ("Training", "Samples", "Method", "Versions", "Results"):
        assert f"## {heading}" not in bare
