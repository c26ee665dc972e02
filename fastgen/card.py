"""The model card: ``README.md`` of an exported folder, written by one pure function from what is known of it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from .plain import hidden
from .tables import markdown

Form = Literal["pipeline", "component", "lora"]
"""A whole pipeline; its denoising network alone, beside the student's scheduler; a LoRA file, beside the same."""
Terms = Literal["allowed", "restricted", "limited", "unknown", "forbidden"]
"""What a licence says of commercial use, the strictest last."""

HUB_LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl
    gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other""".split()
)
"""What the Hub takes as ``license``; any other is a ``license_name`` (its documentation, repositories-licenses)."""

_TERMS: dict[str, Terms] = {
    **dict.fromkeys(
        """apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
        cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nd-4.0 cdla-permissive-1.0 cdla-permissive-2.0 afl-3.0 artistic-2.0
        bsl-1.0 ecl-2.0 isc mpl-2.0 ms-pl agpl-3.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 unlicense wtfpl
        zlib""".split(),
        "allowed",
    ),
    **dict.fromkeys(
        """openrail openrail++ creativeml-openrail-m bigscience-openrail-m bigcode-openrail-m
        bigscience-bloom-rail-1.0 gemma""".split(),
        "restricted",
    ),
    **dict.fromkeys(
        """stabilityai-ai-community stabilityai-community sai-community playground-v2-community
        playground-v2dot5-community tencent-hunyuan-community llama2""".split(),
        "limited",
    ),
    **dict.fromkeys(
        """flux-1-dev-non-commercial-license deepfloyd-if-license sai-nc-community stabilityai-nc-research-community
        apple-amlr fair-noncommercial-research-license""".split(),
        "forbidden",
    ),
}
_STRICTNESS: Sequence[Terms] = ("allowed", "restricted", "limited", "unknown", "forbidden")
_SAID: dict[Terms, str] = {
    "allowed": "",
    "restricted": "It forbids some uses, and whoever you pass this model on to must be bound to the same.",
    "limited": "**It allows commercial use under conditions only**, such as a limit of revenue or users; read it.",
    "unknown": "**What it allows is not known here**; read it, or ask the authors, before you use or share this.",
    "forbidden": "**It forbids commercial use, of this model too.**",
}


@dataclass(frozen=True)
class Licence:
    """As a model card names it: an identifier of the Hub's, and of ``other`` ones a name and perhaps a link."""

    id: str = "unknown"
    name: str = ""
    link: str = ""

    @property
    def called(self) -> str:
        """The one name to tell it by."""
        return self.name or self.id

    @property
    def terms(self) -> Terms:
        """What it says of commercial use."""
        words = re.split(r"[-_ .]+", self.called.lower())
        if "nc" in words or "noncommercial" in words or ("non" in words and "commercial" in words):
            return "forbidden"
        return _TERMS.get(self.called.lower(), "unknown")

    @property
    def forbids_changes(self) -> bool:
        """Whether changed versions, as a student is, must not be passed on: Creative Commons' NoDerivatives."""
        words = self.called.lower().split("-")
        return words[0] == "cc" and "nd" in words


def licence_called(name: str) -> Licence:
    """The licence that a user names."""
    return Licence(name.lower()) if name.lower() in HUB_LICENCES else Licence("other", name)


@dataclass(frozen=True)
class Base:
    """A model that an exported one was made from.

    Attributes:
        name: its Hub id, or the last part of its folder's path.
        hub: the Hub id of it, or of the nearest of its own bases that has one; empty: not known.
        licence: its own.
    """

    name: str
    hub: str = ""
    licence: Licence = Licence()


@dataclass(frozen=True)
class Call:
    """How an exported folder is opened and called.

    Attributes:
        place: Hub id, or a stand-in for the folder's path.
        pipeline: class of the stock pipeline.
        arguments: of its call, the prompt among them; none: no stock pipeline takes what is in the folder.
        gives: the field of what it returns: images or frames.
        networks: of a component, its classes by their names in the pipeline.
        scheduler: class of the student's.
        base: where the pipeline is that a component or a LoRA file goes into.
        settings: with which that is opened for a component.
        weights: names of LoRA files, and what ``load_lora_weights`` is told besides for each.
        global_noise: whether the scheduler's noise is torch's global one.
        code: whether the folder brings code, which the user must trust.
        dtype: in which it is to be loaded, as torch names it.
        variant: of the files to be loaded, which stand beside float32 ones.
    """

    place: str
    pipeline: str
    arguments: Mapping[str, Any]
    gives: str = "images"
    networks: Mapping[str, str] = field(default_factory=dict)
    scheduler: str = ""
    base: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    global_noise: bool = False
    code: bool = False
    dtype: str = "float32"
    variant: str = ""


@dataclass(frozen=True)
class Value:
    """A measured value, and all that it depends on."""

    metric: str
    title: str
    value: float
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What an evaluation said of this very model.

    Attributes:
        dataset: type and name of what it was measured on.
        values: of the exported model.
        table: Markdown of all that were judged together, with the protocol below.
    """

    dataset: tuple[str, str]
    values: Sequence[Value]
    table: str


@dataclass(frozen=True)
class Facts:
    """All that a model card is written from; what is empty is not known and not said.

    Attributes:
        name: of the model.
        form: of the export.
        settings: what ``fastgen.json`` beside it says.
        call: how it is called.
        bases: what it was made from, the first of which lends its other parts.
        method: its name, its paper's title and arXiv number.
        config: of the run, as a tree.
        steps: of training.
        images_seen: in training.
        trained: role -> its optimizer's options.
        results: of an evaluation.
        grid: file name of a picture of samples.
        prompts: of these, in order.
        versions: of the packages it was made with.
    """

    name: str
    form: Form
    settings: Mapping[str, Any]
    call: Call
    bases: Sequence[Base] = ()
    method: tuple[str, str, str] = ("", "", "")
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    images_seen: int | None = None
    trained: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    results: Results | None = None
    grid: str = ""
    prompts: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: Facts) -> str:
    """The whole ``README.md``: YAML between dashes as the Hub reads it, then Markdown."""
    head = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=1000)
    parts = [
        f"# {escaped(facts.name)}",
        _what(facts),
        _warnings(facts.bases),
        _how(facts),
        _grid(facts),
        _method(facts),
        _training(facts),
        f"## Results\n\n{facts.results.table.strip()}" if facts.results else "",
        _licence(facts.bases),
        _versions(facts.versions),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """The metadata of the card."""
    licence = strictest(facts.bases)
    made: dict[str, Any] = {"license": licence.id}
    made |= {"license_name": licence.name} if licence.name else {}
    made |= {"license_link": licence.link} if licence.link else {}
    bases = list(dict.fromkeys(base.hub for base in facts.bases if base.hub))
    if bases:
        made |= {"base_model": bases[0] if len(bases) == 1 else bases}
        made |= {"base_model_relation": "adapter" if facts.form == "lora" else "finetune"}
    task = _task(facts.call)
    tags = [task, "fastgen", *([facts.method[0]] if facts.method[0] else [])]
    tags += ["distillation", "few-step"] if _steps(facts) else []
    tags += ["lora"] if facts.form == "lora" else []
    tags += [f"diffusers:{facts.call.pipeline}"] if facts.form == "pipeline" else []
    made |= {"library_name": "diffusers", "pipeline_tag": task, "tags": list(dict.fromkeys(tags))}
    if facts.results and facts.results.values:
        made["model-index"] = [{"name": facts.name, "results": [_result(facts.results, task)]}]
    return made


def strictest(bases: Sequence[Base]) -> Licence:
    """Of the bases' licences the one that forbids most; unknown where there is none."""
    found = [base.licence for base in bases]
    return max(found, key=lambda licence: _STRICTNESS.index(licence.terms), default=Licence())


def escaped(text: str) -> str:
    """Text as Markdown shows it, letter by letter, on one line."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def fenced(text: str, language: str) -> str:
    """Text as a block of code, which no run of backticks in it ends."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key|private_?key)$", re.I)
"""Names of what is never written."""


def public(tree: Any) -> Any:
    """A config without what is not for others: secrets, and where folders lie on this machine but for their names."""
    if isinstance(tree, Mapping):
        return {
            key: "(left out)" if SECRET.search(str(key)) and value else public(value) for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [public(value) for value in tree]
    if isinstance(tree, str):
        tree = hidden(tree)
        absolute = re.fullmatch(r"(~|/|[A-Za-z]:\\).*?([^/\\]+)[/\\]?", tree)
        return f".../{absolute[2]}" if absolute else tree
    return tree


def _task(call: Call) -> str:
    if "prompt" not in call.arguments:
        return "unconditional-image-generation"
    return "text-to-video" if call.gives == "frames" else "text-to-image"


def _result(results: Results, task: str) -> dict[str, Any]:
    kind, name = results.dataset
    metrics = [
        {"type": v.metric, "name": v.title, "value": v.value, "args": _plain(v.protocol)} for v in results.values
    ]
    return {"task": {"type": task}, "dataset": {"type": kind, "name": name}, "metrics": metrics}


def _plain(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in protocol.items() if value is not None}


def _steps(facts: Facts) -> int | None:
    steps: int | None = facts.settings.get("num_inference_steps")
    return steps


def _what(facts: Facts) -> str:
    steps = _steps(facts)
    maker = f" by fastgen's method `{facts.method[0]}`" if facts.method[0] else ""
    if steps:
        made = "a video" if facts.call.gives == "frames" else "an image"
        kind = f"A student that makes {made} in **{steps} step{'s' * (steps > 1)}**, distilled"
    elif facts.method[0] == "pretrain":
        kind = "A model trained"
    else:
        kind = "A student that is sampled as its teacher is, distilled"
    teacher = f" from {_linked(facts.bases[0])}" if facts.bases else ""
    came = "extracted from" if "energy" in facts.settings.get("lora", {}) else "starting from"
    starts = f", {came} {_linked(facts.bases[1])}" if len(facts.bases) > 1 else ""
    network = ", ".join(f"`{kind}`" for kind in facts.call.networks.values())
    files = "a LoRA file" if len(facts.call.weights) < 2 else "a LoRA file for each of its experts,"
    holds = {
        "pipeline": f"a whole Diffusers pipeline, `{facts.call.pipeline}`",
        "component": f"the denoising network alone ({network}) with the student's scheduler, "
        f"for the other parts of a `{facts.call.pipeline}`",
        "lora": f"{files} for a `{facts.call.pipeline}`, with the student's scheduler",
    }[facts.form]
    return f"{kind}{teacher}{maker}{starts}. This is {holds}.{_students(facts.settings)}"


def _students(settings: Mapping[str, Any]) -> str:
    """Of a student that is one of several, or of all of them, whose the prompts are."""
    if "route" in settings:
        own, count = settings["route"]["own"], settings["route"]["students"]
        return (
            f" **It is student {own} of {count} and learnt its share of the prompts alone**; `fastgen join` makes one "
            "pipeline of them all."
        )
    if "students" in settings:
        return (
            f" Its network holds **{settings['students']} students**, each trained on its share of the prompts, and "
            "calls for each prompt the one that learnt it, so that an image costs what one student's does "
            "(multi-student distillation, [arXiv:2410.23274](https://arxiv.org/abs/2410.23274)). The config below is "
            "the first's."
        )
    return ""


def _linked(base: Base) -> str:
    if base.hub and base.hub == base.name:
        return f"[{escaped(base.name)}](https://huggingface.co/{base.hub})"
    return (
        f"{escaped(base.name)} (made from [{escaped(base.hub)}](https://huggingface.co/{base.hub}))"
        if base.hub
        else escaped(base.name)
    )


def _warnings(bases: Sequence[Base]) -> str:
    lines = []
    for base in bases:
        if base.licence.terms == "forbidden":
            lines.append(
                f"> **Warning:** the licence of {escaped(base.name)}, {escaped(base.licence.called)}, forbids "
                "commercial use, and this model was made from it."
            )
        if base.licence.forbids_changes:
            lines.append(
                f"> **Warning:** the licence of {escaped(base.name)}, {escaped(base.licence.called)}, forbids passing "
                "on changed versions, which this model is."
            )
    return "\n>\n".join(lines)


def _how(facts: Facts) -> str:
    call, settings = facts.call, facts.settings
    notes = []
    if not call.arguments:
        return f"## Use\n\n{escaped(str(settings.get('use', '')))}."
    if call.global_noise and (_steps(facts) or 0) > 1:
        notes.append(
            "The noise between the steps comes from torch's global generator, since this pipeline gives the scheduler "
            "none: to get an image again, set both seeds."
        )
    if call.code:
        notes.append("The folder brings code that Diffusers does not have, so read it before you trust it.")
    if _steps(facts):
        notes.append(
            "Steps and guidance scale are what it was trained for; more steps are refused, or do not make it better."
        )
    return "\n\n".join(["## Use", fenced(snippet(call), "python"), *notes])


def snippet(call: Call) -> str:
    """Python that makes an image with plain Diffusers."""
    place, base = _literal(call.place), _literal(call.base)
    precision = f", dtype=torch.{call.dtype}" if call.dtype != "float32" else ""
    variant = f", variant={_literal(call.variant)}" if call.variant else ""
    scheduler = f'{call.scheduler}.from_pretrained({place}, subfolder="scheduler")'
    if call.networks:
        classes = sorted({call.pipeline, call.scheduler, *call.networks.values()})
        parts = ", ".join(f"{name}={name}" for name in (*call.networks, "scheduler"))
        parts += _told(call.settings)
        lines = [
            f"from diffusers import {', '.join(classes)}",
            "",
            *(
                f"{name} = {kind}.from_pretrained({place}, subfolder={_literal(name)}{variant}{precision})"
                for name, kind in call.networks.items()
            ),
            f"scheduler = {scheduler}",
            f"pipeline = {call.pipeline}.from_pretrained({base}, {parts}{precision})",
        ]
    elif call.weights:
        lines = [
            f"from diffusers import {', '.join(sorted(['DiffusionPipeline', call.scheduler]))}",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({base}{precision})",
            *(
                f"pipeline.load_lora_weights({place}, weight_name={_literal(name)}{_told(told)})"
                for name, told in call.weights.items()
            ),
            f"pipeline.scheduler = {scheduler}",
        ]
    else:
        code = ", trust_remote_code=True" if call.code else ""
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({place}{variant}{precision}{code})",
        ]
    told = [f"{name}={_literal(value)}" for name, value in call.arguments.items()]
    told.append("generator=torch.Generator().manual_seed(0)")
    return "\n".join(
        [
            "import torch",
            *lines,
            'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
            *(["torch.manual_seed(0)"] if call.global_noise else []),
            f"{'image' if call.gives == 'images' else call.gives} = pipeline({', '.join(told)}).{call.gives}[0]",
        ]
    )


def _told(arguments: Mapping[str, Any]) -> str:
    return "".join(f", {name}={_literal(value)}" for name, value in arguments.items())


def _literal(value: Any) -> str:
    """A value as Python reads it; text in double quotes on one line, as JSON writes it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _grid(facts: Facts) -> str:
    if not facts.grid:
        return ""
    distinct = list(dict.fromkeys(facts.prompts))
    shown = (
        f"\n\nTheir prompts, row by row: {'; '.join(escaped(p) or '(none)' for p in distinct)}." if distinct else ""
    )
    return f"## Samples\n\n![Samples by the trainer's own sampler]({facts.grid}){shown}"


def _method(facts: Facts) -> str:
    name, paper, arxiv = facts.method
    if not name:
        return ""
    source = f": {escaped(paper)}, [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""
    adapter = facts.settings.get("lora", {})
    lines = [f"## Method\n\n`{name}`{source}."]
    if adapter:
        lines.append(
            f"{'The LoRA file is' if len(facts.call.weights) < 2 else 'Each LoRA file is'} of rank {adapter['rank']}, "
            "its scale multiplied into B, so that it needs none."
        )
    if "energy" in adapter:
        lines.append(
            f"It was extracted from the difference of two checkpoints and keeps {100 * adapter['energy']:.2f}% of the "
            "squared Frobenius norm of what it may hold."
        )
    if adapter.get("left_out"):
        lines.append(f"Left out, as no LoRA holds it: {', '.join(f'`{name}`' for name in adapter['left_out'])}.")
    return "\n\n".join(lines)


def _training(facts: Facts) -> str:
    rows = []
    if facts.steps is not None:
        rows.append(("Steps", str(facts.steps)))
    if facts.images_seen is not None:
        rows.append(("Images seen", str(facts.images_seen)))
    for role, options in facts.trained.items():
        rows.append((f"Optimizer of {role}", ", ".join(f"{key} {value}" for key, value in options.items())))
    if not rows and not facts.config:
        return ""
    parts = ["## Training"]
    if rows:
        parts.append(markdown(("", ""), [(escaped(name), escaped(value)) for name, value in rows], left=2))
    if facts.config:
        tree = yaml.safe_dump(public(facts.config), sort_keys=False, allow_unicode=True)
        parts.append(f"<details>\n<summary>Config</summary>\n\n{fenced(tree, 'yaml')}\n\n</details>")
    return "\n\n".join(parts)


def _licence(bases: Sequence[Base]) -> str:
    lines = []
    for base in bases:
        licence = base.licence
        if licence.id == "unknown":
            lines.append(
                f"The licence of {escaped(base.name)} is unknown, and so is that of this model. {_SAID['unknown']}"
            )
            continue
        called = f"[{escaped(licence.called)}]({licence.link})" if licence.link else escaped(licence.called)
        lines.append(f"Inherited from {escaped(base.name)}: {called}. {_SAID[licence.terms]}".strip())
    return "\n\n".join(["## Licence", *(lines or ["Unknown: nothing says what this model was made from."])])


def _versions(versions: Mapping[str, str]) -> str:
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"## Versions\n\n{escaped(told)}." if told else ""
