"""The command line. The only file that wires the rooms together; every import that costs time is inside a command."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from . import interrupt
from .plain import hidden, shown

app = typer.Typer(
    name="fastgen",
    help="Distil a Diffusers pipeline into a student that makes an image in 1 to 4 steps, and judge it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench = typer.Typer(
    help="Compare methods: what their students are worth, and what an iteration costs and holds.", no_args_is_help=True
)
app.add_typer(bench, name="bench")

Configs = Annotated[
    list[str] | None,
    typer.Argument(
        help="YAML configs, and changes to them all: key.key=value. None: the emoji world's of every method.",
        metavar="CONFIG|KEY=VALUE",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the config: key.key=value, values read as YAML.", metavar="KEY=VALUE"),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Options before the command."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("fastgen").setLevel(logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("fastgen")
    root.handlers, root.propagate = [handler], False
    if not debug:
        quiet()


def quiet() -> None:
    """Silence the libraries' loading bars and notices; what concerns the user is said by fastgen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML config; `fastgen list configs` shows the shipped ones.")],
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: from the run folder's newest checkpoint; never: start anew; or a checkpoint.")
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, run two steps, print sizes and times, write nothing.")
    ] = False,
) -> None:
    """Distil (or pretrain) as a config says; the student is left in <run.out>/pipeline.

    SIGTERM, Ctrl-C and run.max_hours end it after the step in hand, with a checkpoint and exit code 75: the same
    command goes on. A second signal ends it at once.
    """
    from .config import override, read

    tree = override(read(find_config(config)), overrides or [])  # a file that is not there is told before torch loads
    from . import recipe as recipes
    from .evaluation.judge import Quick
    from .interrupt import CODE, Interrupted
    from .train import train as run

    decoded = recipes.decode(tree, str(config))
    quick = Quick(decoded.eval, str(config)) if decoded.eval else None
    if dry_run:
        from .dry_run import dry_run as rehearse

        rehearse(decoded)
        return
    try:
        folder = run(decoded, resume, quick)
    except Interrupted as stopped:
        fail(str(stopped), CODE, once=True)
    say(f"{folder / 'pipeline'} holds the result; `fastgen evaluate {folder}` judges it")


def find_config(path: Path) -> Path:
    """A config by its path, or by its name among the shipped ones ("emoji/demo")."""
    if path.exists() or path.is_absolute():
        return path
    shipped = shipped_configs()
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    return shipped.get(name, path)


def shipped_configs() -> dict[str, Path]:
    """Name -> path of every config in fastgen.configs."""
    import importlib

    folder = Path(str(importlib.import_module("fastgen.configs").__path__[0]))
    found = {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("accelerate/")}  # a launcher's


@app.command()
def cache(
    config: Annotated[
        Path, typer.Argument(help="A YAML config with model: and data: {source: cached, path: ..., of: {...}}.")
    ],
    overrides: Overrides = None,
) -> None:
    """Encode the images and prompts of a training run, once; it then needs no text encoder and no VAE."""
    from .config import override, read

    tree = override(read(find_config(config)), overrides or [])
    from .cache import decode, make

    recipe, evaluation = decode(tree, str(config)), tree.get("eval", {})
    if not isinstance(evaluation, dict):
        raise ValueError(f"{config}: eval must be a mapping, got {shown(evaluation)}")

    def quick(image_size: tuple[int, int]) -> list[str]:
        """The prompts of quick evaluations, which are others."""
        if not (evaluation and evaluation.get("every")):
            return []
        from .evaluation.judge import reference, settings

        chosen = settings(evaluation, str(config))
        source = reference(chosen, image_size, str(config))
        return [source.item(i).prompt for i in range(chosen.num_images_training)]

    items, prompts = make(recipe, quick)
    say(f"{recipe.options.path} is whole; made now: {items} items, {prompts} prompts")


@app.command()
def pairs(
    config: Annotated[
        Path, typer.Argument(help="A YAML config with model:, data: (whose prompts are used) and pairs: sections.")
    ],
    overrides: Overrides = None,
) -> None:
    """Make a teacher's noise-latent pairs, once; methods kd and dmd train on them (data.source: pairs)."""
    from .config import override, read

    tree = override(read(find_config(config)), overrides or [])
    from .pairs import decode, make

    recipe = decode(tree, str(config))
    made = make(recipe)
    say(f"{recipe.pairs.out} holds {recipe.pairs.number} pairs, {made or 'none'} made now")


@app.command()
def generate(
    pipeline: Annotated[str, typer.Argument(help="A pipeline folder or Hub id.")],
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What to draw, or a class; may be given several times.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs, WebPs of videos.")] = Path("images"),
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; a student knows its own.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="A student needs none; 1.0 is off. With --teacher it is the teacher's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i of a prompt depends on this and i alone.")] = 0,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Images per prompt.")] = 1,
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of the weights.")] = "fp32",
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to draw; a student needs --guider nasa for it.")
    ] = None,
    guider: Annotated[
        Literal["cfgpp", "adaptive", "linear", "nasa"] | None,
        typer.Option(
            help="Guidance without training, see docs/guiders.md: nasa for students, the others for teachers."
        ),
    ] = None,
    guider_scale: Annotated[
        float | None,
        typer.Option(
            help="cfgpp: 0 to 1, default 0.6. adaptive: cosine at which guidance stops, default 0.99. nasa: weight of "
            "the negative prompt, default 0.1."
        ),
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="With --guider linear: what fastgen.pipelines.guiders.fit gave and save wrote.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Pipeline that takes the first of a student's intervals, for diversity.")
    ] = None,
    teacher_steps: Annotated[int, typer.Option(min=1, help="With --teacher: its steps from noise to image.")] = 20,
    height: Annotated[int | None, typer.Option(min=1, help="Of an image in pixels; the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of an image in pixels; the pipeline's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Of a video; the pipeline's own.")] = None,
    fps: Annotated[float, typer.Option(min=1, help="Frames of a video a second.")] = 16.0,
) -> None:
    """Make images or videos with a pipeline, distilled or not."""
    import contextlib
    import inspect

    import torch

    from . import calls, parallel
    from .export import called, load, read_card
    from .pipelines import guiders
    from .recipe import DTYPES, locate
    from .rng import seed_of

    if guider is None and (guider_scale is not None or coefficients is not None):
        raise ValueError("--guider-scale and --coefficients say more of a guider; give --guider too")
    for what, number in (("guidance-scale", guidance_scale), ("guider-scale", guider_scale), ("fps", fps)):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"--{what} must be a finite number, got {number}")
    for text in [*prompt, negative_prompt or ""]:
        if not text.isascii() and text.encode(errors="replace") != text.encode(errors="surrogatepass"):
            raise ValueError(f"prompt {text!a} holds half a character; give it in UTF-8")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder for the images")
    chosen = guiders.Choice(guider, guider_scale, negative_prompt, coefficients) if guider else None
    device, path = parallel.device(), locate(pipeline)
    own = read_card(Path(path)).get("num_inference_steps")
    if steps and own and steps > own:
        raise ValueError(f"{pipeline}: is a student of {own} step{'s' * (own > 1)}; leave out --steps {steps}")
    if own == 1 and teacher is not None:
        raise ValueError(f"{pipeline}: is a student of 1 step, which --teacher would replace; leave one out")
    if negative_prompt is not None and guider != "nasa":
        if own and teacher is None:
            raise ValueError(f"{pipeline}: is a student, whose call ignores a negative prompt; add --guider nasa")
        if guidance_scale is not None and guidance_scale <= 1:
            raise ValueError(f"a negative prompt does nothing at guidance scale {guidance_scale:g}; give more than 1")
    pipe = load(path, dtype=DTYPES[dtype])
    if num_frames is not None and "num_frames" not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(f"{pipeline}: is a {type(pipe).__name__}, which makes images; leave out --num-frames")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    given = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": num_frames,
    }
    call = calls.settled(pipe, given)
    for name, value in given.items():
        if value is not None and name not in call:
            raise ValueError(f"{pipeline}: is a {type(pipe).__name__}, whose call takes no {name}; leave it out")
    told = [calls.prompted(pipe, text) for text in prompt]
    wanted = [(number, index) for number in range(len(prompt)) for index in range(num_images)]
    mine, counts = wanted[parallel.rank() :: parallel.size()], []
    with contextlib.ExitStack() as stack:
        if teacher is not None:
            first = load(locate(teacher), dtype=DTYPES[dtype]).to(device)
            first.set_progress_bar_config(disable=True)
            its_own = float(call.pop("guidance_scale", 7.5))
            counts.append(stack.enter_context(guiders.diversity(pipe, first, 1, teacher_steps, its_own)))
        if chosen is not None:
            counts.append(stack.enter_context(chosen.switched_on(pipe)))
            call = chosen.call() | call
        draw = called(pipe)
        for number, index in mine:
            generator = torch.Generator().manual_seed(seed_of(seed, index))
            torch.manual_seed(seed_of(seed, index, "steps"))  # some hand no generator to a scheduler that draws noise
            made = draw(**told[number], generator=generator, output_type="pil", **call)[0][0]  # an image, or frames
            out.mkdir(parents=True, exist_ok=True)
            file = save_frames(made if isinstance(made, list) else [made], out / f"{number:04d}_{index:02d}", fps)
            typer.echo(f"{file}  {prompt[number]}")
    if counts and mine:
        say(f"{counts[0].evaluations / len(mine):.4g} network evaluations an image")


def save_frames(frames: list[Any], stem: Path, fps: float) -> Path:
    """PIL images -> the file: one frame as a PNG, more as an animated WebP that begins anew without end."""
    from .checkpoint import atomic_file

    file = stem.with_name(f"{stem.name}.{'png' if len(frames) == 1 else 'webp'}")
    film = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0, "quality": 90}
    with atomic_file(file) as partial:
        if len(frames) == 1:
            frames[0].save(partial, "PNG")
        else:
            frames[0].save(partial, "WEBP", **film)
    return file


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Run folders and pipeline folders, and changes to the eval: section, KEY=VALUE.",
            metavar="RUN|PIPELINE|KEY=VALUE",
        ),
    ],
    metrics: Annotated[
        str | None, typer.Option(help="As `fastgen list metrics` names them, with commas between.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Folder of captioned images, .npz of statistics (`fastgen stats`), name of a data source, or one in "
            "braces: '{source: hf, path: ...}'."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML with an eval: section; the first run's own if not given.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Judged beside them; the first run's own teacher if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="For results.json, report.md and report.html; the one run's if not given.")
    ] = None,
) -> None:
    """Judge pipelines and their teacher by the metrics of the eval: section; write results and a report."""
    from . import recipe as recipes
    from .config import override, read
    from .evaluation import judge as judging
    from .evaluation.report import print_table

    changes = [text for text in targets if "=" in text]
    places = {text: Path(recipes.locate(text)) for text in targets if "=" not in text}
    runs = {}
    for text, place in places.items():
        if (place / "config.yaml").is_file():
            runs[text] = recipes.decode(read(place / "config.yaml"), str(place / "config.yaml"))
        elif not (place / "model_index.json").is_file():
            raise ValueError(f"{text}: neither a run folder (config.yaml) nor a pipeline folder (model_index.json)")
    if not places:
        raise ValueError("nothing to judge; name a run folder or a pipeline folder")
    first = next(iter(runs), None)
    if config is None and first is None and (metrics is None or reference is None):
        raise ValueError(
            f"{next(iter(places))}: a pipeline by itself says nothing of metrics; give --config with an eval: "
            "section, or --metrics and --reference"
        )
    where = find_config(config) if config else places[first] / "config.yaml" if first else None
    said = judging.said(metrics, reference)
    given = read(where).get("eval", {}) if where else {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: eval must be a mapping, got {shown(given)}")
    tree = {"eval": {**given, **said}}
    tree = override(tree, [f"eval.{text}" for text in changes])
    decoded = judging.settings(tree["eval"], str(where or "the command line"))
    if teacher is None and first is not None and runs[first].method.name != "pretrain":
        teacher = runs[first].model.path
    if out is None and (len(places) > 1 or next(iter(places)).startswith(recipes.ASSETS)):
        raise ValueError("several pipelines, and those in the package, have no folder for results; give --out")
    chosen = judging.targets(places, {name: recipe.method.name for name, recipe in runs.items()}, teacher is not None)
    located = recipes.locate(teacher) if teacher else None
    folder = out or next(iter(places.values()))
    rows = judging.judge(chosen, decoded, str(where or "the command line"), located, folder)
    if is_main():
        print_table(rows)
    say(f"{folder / 'report.html'}")


@app.command()
def stats(
    reference: Annotated[
        str,
        typer.Argument(help="Folder of images, name of a data source, or one in braces: '{source: hf, path: ...}'."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz; as --reference it stands for the images.")],
    features: Annotated[
        Literal["clean", "legacy_pytorch", "legacy_tensorflow", "clip"], typer.Option(help="As eval.features.")
    ] = "clean",
    weights: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH, as eval.weights: inception, inception_pytorch, clip.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Images are cut to a square and scaled to this side.")] = 256,
    rows: Annotated[bool, typer.Option("--rows", help="Keep the features of each image too, for kid.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images seen at a time.")] = 32,
) -> None:
    """Compute the statistics of real images that FID is taken against, once, with their number and hash."""
    from .evaluation import judge as judging

    given = dict(text.partition("=")[::2] for text in weights or [])
    made = judging.statistics(reference, out, features, given, size, rows, batch_size)
    say(
        f"{out} holds statistics of {made['number']} images by {made['features']}, sha256 of their pixels "
        f"{made['sha256']}"
    )


geneval = typer.Typer(
    help="GenEval in its official layout: images, verdicts, the published detector.", no_args_is_help=True
)
app.add_typer(geneval, name="geneval")


@geneval.command()
def images(
    pipeline: Annotated[str, typer.Argument(help="A pipeline folder or Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; images that are there are kept.")],
    prompts: Annotated[
        Path | None, typer.Option(help="An evaluation_metadata.jsonl; the official 553 prompts if not given.")
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Of each prompt.")] = 4,
    per_tag: Annotated[int, typer.Option(min=0, help="Only so many prompts of each task; 0: all.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; a student knows its own.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="A student needs none.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Each image's noise depends on this and its number.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 4,
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of the weights.")] = "fp32",
) -> None:
    """Make GenEval's images: OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png and so on."""
    from . import parallel
    from .data import geneval as source
    from .evaluation.geneval_images import make
    from .evaluation.runner import Subject
    from .recipe import locate

    known = source.Prompts(source.Config(str(prompts or ""), num_images, per_tag))
    subject = Subject(pipeline, "student", locate(pipeline), steps, guidance_scale)
    device = str(parallel.device())
    made = make(subject, out, known, seed=seed, batch_size=batch_size, dtype=dtype, device=device)
    say(f"{out} holds {len(known)} images, {made or 'none'} made now; `fastgen geneval judge {out}` judges them")


@geneval.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="Images in the official layout, whoever made them.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The results.jsonl; in FOLDER if not given.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="NAME=PATH, as eval.weights: mask2former, clip.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size that are seen at a time.")] = 4,
) -> None:
    """Judge a folder as the official evaluator does; write results.jsonl and print its summary; goes on if cut off."""
    from . import parallel
    from .evaluation import geneval as judging
    from .evaluation.context import Context
    from .recipe import locate

    given = {name: locate(path) for name, _, path in (text.partition("=") for text in weights or [])}
    context = Context(weights=given, device=parallel.device())
    asks = judging.needs_colours(sample.record for sample in judging.read_folder(folder))
    colours = judging.open_colours(context) if asks else None
    target = out or folder / "results.jsonl"
    lines = judging.judge_folder(folder, judging.open_detector(context), colours, target, batch_size=batch_size)
    say(judging.told(lines))
    say(f"{target}")


@geneval.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="OpenMMLab's .pth, or its tensors as .safetensors.")],
    folder: Annotated[Path, typer.Argument(help="To write; then --weights mask2former=FOLDER.")],
) -> None:
    """Turn the detector of GenEval's published scores into a folder that Transformers reads."""
    from .evaluation.openmmlab import convert as turn

    turn(checkpoint, folder)
    say(f"{folder} holds the detector; `fastgen geneval judge --weights mask2former={folder}` uses it")


report = typer.Typer(help="Pages and tables of what was measured, and comparisons of two of it.", no_args_is_help=True)
app.add_typer(report, name="report")


@report.command()
def page(
    run: Annotated[Path, typer.Argument(help="A folder with a results.json.")],
    into: Annotated[Path | None, typer.Option(help="A Markdown file that shall hold the table too.")] = None,
    name: Annotated[str, typer.Option(help="Its place in that file: <!-- NAME --> ... <!-- /NAME -->.")] = "results",
    picture: Annotated[Path | None, typer.Option(help="A PNG for the comparison of all subjects.")] = None,
) -> None:
    """Write the report anew from what a folder holds, and the table and the pictures into documents."""
    from .evaluation import report as reports

    rows = reports.read_results(run / "results.json")
    if into is not None:
        reports.insert(rows, into, name)
        say(f"{into}")
    if picture is not None:
        reports.picture(run, picture)
        say(f"{picture}")
    written = reports.write_report(run)
    reports.print_table(rows)
    say(f"{written}")


@report.command()
def compare(
    a: Annotated[str, typer.Argument(help="FOLDER of results, FOLDER:ROW, or the name of a row in --out's.")],
    b: Annotated[str, typer.Argument(help="Likewise.")],
    out: Annotated[Path | None, typer.Option(help="The folder of rows that are given by name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows for a machine.")] = False,
) -> None:
    """Say whether two pipelines differ, image by image: same prompts, same seeds."""
    from .evaluation import compare as comparing

    one, two = comparing.sides(a, b, out)
    rows = comparing.compare(one, two)
    typer.echo(json.dumps(rows, indent=1) if as_json else comparing.text(one, two, rows))


Push = Annotated[
    str, typer.Option(metavar="REPO", help="Upload it to this repository of the Hub; the token is your login's.")
]
Licence = Annotated[str, typer.Option("--license", help="Of the base, where its own README.md says none.")]
Private = Annotated[bool, typer.Option("--private", help="With --push-to-hub: make the repository a private one.")]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path | None, typer.Option(help="Where to; the run's own pipeline/ if not given.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="By its steps or its folder, or best (run.keep_best); the newest if not given.")
    ] = None,
    form: Annotated[
        Literal["pipeline", "component", "lora"],
        typer.Option("--as", help="component: the network alone, with its scheduler; lora: the adapter it trained."),
    ] = "pipeline",
    save_dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option("--dtype", "--save-dtype", help="Of the weights on disk; the config's if not given."),
    ] = None,
    variant: Annotated[
        Literal["fp16", "bf16"] | None, typer.Option(help="Files in this precision, besides those in float32.")
    ] = None,
    license_: Licence = "",
    push_to_hub: Push = "",
    private: Private = False,
) -> None:
    """Write a run's student for Diffusers, with a model card; it must first give what the trainer's sampler gives."""
    from functools import partial

    from . import best, publish
    from . import checkpoint as checkpoints
    from . import recipe as recipes
    from .config import override, read
    from .evaluation.judged import judged
    from .train import build, export_run

    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: not a run folder (no config.yaml)")
    if push_to_hub:
        publish.check_repo(push_to_hub)
    changes = [f"run.save_dtype={save_dtype}"] if save_dtype else []
    recipe = recipes.decode(override(read(run / "config.yaml"), changes), str(run / "config.yaml"))
    wanted = publish.Wanted(form, variant or "", license_, push_to_hub, results=partial(judged, run))
    publish.check(recipe, wanted)
    found = checkpoints.all_checkpoints(run)
    if checkpoint is None and not found:
        raise ValueError(f"{run}: holds no checkpoint yet")
    by_steps = checkpoint is not None and checkpoint.isdecimal()
    named = run / f"checkpoint-{checkpoint}" if by_steps else Path(checkpoint or found[-1])
    if checkpoint == "best":
        named = best.find(run)[1]
    checkpoints.read_state(named)
    session = build(recipe)
    steps_done = checkpoints.load(named, session.engine, session.ema, goes_on=False)
    folder = out or run / form
    if is_main():
        export_run(session, folder, dataclasses.replace(wanted, steps_done=steps_done))
    say(f"{folder} written from {named.name}")
    if push_to_hub and is_main():
        say(publish.push(folder, push_to_hub, private))


@app.command()
def join(
    runs: Annotated[list[Path], typer.Argument(help="The run folders of all students, in any order.")],
    out: Annotated[Path, typer.Option(help="Folder for the pipeline.")],
    save_dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option("--dtype", help="Of the weights on disk; the config's if not given."),
    ] = None,
    license_: Licence = "",
    push_to_hub: Push = "",
    private: Private = False,
) -> None:
    """Make one pipeline of several students (student.route), which sends each prompt to the one that learnt it."""
    from . import publish
    from .join import join as run

    if push_to_hub:
        publish.check_repo(push_to_hub)
    count = run(runs, out, save_dtype, publish.Wanted(licence=license_, repo=push_to_hub))
    say(f"{out} holds {count} students")
    if push_to_hub:
        say(publish.push(out, push_to_hub, private))


@app.command(name="extract-lora")
def extract_lora(
    base: Annotated[str, typer.Argument(help="A pipeline folder: what the LoRA file will be loaded into.")],
    student: Annotated[str, typer.Argument(help="A pipeline folder of its family, or a component's.")],
    out: Annotated[Path, typer.Option(help="Folder for the LoRA file, the scheduler and the model card.")],
    rank: Annotated[int, typer.Option(min=1, help="Of each layer's part of the difference.")] = 64,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Go on without the differences that no LoRA file holds.")
    ] = False,
    save_dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option("--dtype", help="Of the LoRA file.")] = "fp32",
    license_: Licence = "",
    push_to_hub: Push = "",
    private: Private = False,
) -> None:
    """Make a LoRA file of the difference of two checkpoints, and say how much of it the file keeps."""
    from . import extract, publish, tables

    if push_to_hub:
        publish.check_repo(push_to_hub)
    options = extract.Options(rank, leave_out, save_dtype, license_, push_to_hub)
    kept = extract.extract(base, student, out, options)
    tables.show(("module", "layers", "kept"), extract.table(kept))
    say(f"{out} keeps {kept.share:.2%} of the squared Frobenius norm of the difference")
    if push_to_hub:
        say(publish.push(out, push_to_hub, private))


@app.command(name="list")
def list_(
    what: Annotated[
        Literal["methods", "families", "metrics", "sources", "configs"] | None,
        typer.Argument(help="One kind, or all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows for a machine.")] = False,
    into: Annotated[
        Path | None, typer.Option(help="With families: Markdown with a place <!-- families --> for their table.")
    ] = None,
) -> None:
    """List methods, model families, metrics, data sources and shipped configs."""
    from . import registry
    from .tables import markdown

    if into and what != "families":
        raise ValueError(f"--into writes the table of families, not of {what or 'all'}; give: list families --into")
    check_place(into, "families")
    kinds = {"methods": "method", "families": "family", "metrics": "metric", "sources": "source"}
    rows: list[dict[str, Any]] = []
    for plural in [what] if what else [*kinds, "configs"]:
        if plural == "configs":
            for name, path in shipped_configs().items():
                first = path.read_text(encoding="utf-8").split("\n")[0].removeprefix("#").strip()
                rows.append({"kind": "config", "name": name, "summary": first})
            continue
        for name in registry.names(kinds[plural]):
            module = registry.find(kinds[plural], name)
            about = {k: list(v) if k in ("needs", "steps", "values") else v for k, v in about_of(module).items()}
            rows.append({"kind": kinds[plural], "name": name, "summary": registry.summary(module), **about})
    if into:
        from .evaluation.report import place

        place(markdown(*families_table(rows), left=5), into, "families")
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "summary", box=None, header_style="bold")
    for row in rows:
        table.add_row(row["kind"], row["name"], row["summary"])
    Console().print(table)


def families_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line a family: its pipelines, what networks give, schedulers of students, forms tested."""
    lines = []
    for row in rows:
        schedulers = list(dict.fromkeys(row["schedulers"].values()))
        classes, shipped = (", ".join(f"`{name}`" for name in names) for names in (row["pipelines"], schedulers))
        forms = "whole, LoRA" if row["lora"] else "whole"
        lines.append([f"`{row['name']}`", classes, ", ".join(row["kinds"]), shipped, forms])
    return ["Family", "Pipelines", "Network gives", "Students' scheduler", "Students' forms"], lines


def about_of(module: object) -> dict[str, Any]:
    """What a method's module says of itself under ABOUT; empty for what is no method."""
    about = vars(module).get("ABOUT")
    return dataclasses.asdict(about) if about else {}


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where runs are looked for, at any depth; or a run.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Rows for a machine.")] = False,
) -> None:
    """List runs: their state, step, best quick evaluation, time trained and age of the last row.

    running: a process holds its train.log. done: at its last step, with a pipeline. unhealthy: ended by health.stop.
    failed: ended by an error, which is told below. stopped: anything else before its end, as by a signal or a kill;
    the command that started it goes on. damaged: config.yaml or metrics.jsonl cannot be read.
    """
    from . import runs as known
    from . import tables

    rows = known.rows(folder)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo(f"{folder} holds no runs")
        return
    tables.show(*known.table(rows), known.WORDS)
    for line in known.told(rows):
        typer.echo(line)


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, drawn over each other.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The PNG; if not given RUN/plot.png, of several plot.png here.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Values of metrics.jsonl by name or pattern: fid,student/*; all but the machine's.")
    ] = "",
    smooth: Annotated[
        int | None,
        typer.Option(min=0, help="Rows averaged to either side, over a faint line of all; 0: none. Else a 25th."),
    ] = None,
) -> None:
    """Draw curves of runs as a PNG: quick evaluations, losses, gradient norms, health."""
    from .evaluation import curves

    found = curves.read(folders, [name.strip() for name in metrics.split(",") if name.strip()])
    file = out or (folders[0] / "plot.png" if len(folders) == 1 else Path("plot.png"))
    title = str(folders[0]) if len(folders) == 1 else f"{len(folders)} runs"
    curves.write(curves.picture(found, title, smooth), file)
    typer.echo(str(file))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML config of a training, for what it would lack here.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows for a machine.")] = False,
) -> None:
    """Say what this machine has: versions, devices, attention kernels that work, caches; and what a config lacks.

    Exit code 1 if something that is needed is not there. What can be downloaded `fastgen prefetch` downloads.
    """
    from .config import override, read

    tree = override(read(find_config(config)), overrides or []) if config else None
    from .doctor import findings, missing

    rows = findings()
    if tree is not None:
        from .recipe import decode

        rows += missing(decode(tree, str(config)), str(config))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            typer.echo(f"{'ok ' if row['ok'] else '-- '}{row['what']:<28}{row['found']}")
    if not all(row["ok"] for row in rows if row["needed"]):
        raise typer.Exit(1)


@app.command()
def estimate(
    config: Annotated[Path, typer.Argument(help="A YAML config of a training; no weights are needed.")],
    overrides: Overrides = None,
    form: Annotated[
        Literal["own", "whole", "adapters", "shared", "all"], typer.Option(help="Of the student; own: the config's.")
    ] = "all",
    precision: Annotated[Literal["fp32", "bf16", "both"], typer.Option(help="fp16 takes as much as bf16.")] = "both",
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="Whose kernels it is for; no such device is needed.")
    ] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Rows for a machine.")] = False,
) -> None:
    """Tell what a training would hold and compute, by role, and which graphics cards have room for it."""
    from .config import override, read

    tree = override(read(find_config(config)), overrides or [])
    from . import estimate as estimates
    from . import memory as memories
    from . import tables

    forms = list(memories.FORMS) if form == "all" else [form]
    precisions = estimates.PRECISIONS if precision == "both" else [precision]
    rows = estimates.rows(tree, str(config), str(config), forms, precisions, device)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for line in estimates.told(rows):
        typer.echo(line)
    tables.show(*estimates.table(rows), estimates.WORDS)


@app.command()
def prefetch(
    config: Annotated[Path, typer.Argument(help="A YAML config of a training.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what is needed and download nothing.")] = False,
) -> None:
    """Download all that a training needs from the Hub, and check what must be here already."""
    from .config import override, read

    tree = override(read(find_config(config)), overrides or [])
    from . import prefetch as prefetching
    from . import recipe as recipes

    for need in prefetching.needs(recipes.decode(tree, str(config))):
        if dry_run:
            state = "from the Hub" if need.downloads else "here" if need.there else f"missing; {need.remedy}"
        else:
            state = prefetching.fetch(need)
        say(f"{need.key}: {need.path}  {state}")


@bench.command()
def cost(
    configs: Configs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows for a machine.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Of every config.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Of which medians are taken.")] = 9,
    clock: Annotated[
        Literal["wall", "cpu"], typer.Option(help="cpu: this process's time, steadier where others work too.")
    ] = "wall",
    into: Annotated[Path | None, typer.Option(help="Markdown with a place <!-- cost -->.")] = None,
) -> None:
    """Time a training step of each method against its floor: the network passes that its algorithm needs."""
    from . import cost as costs
    from . import recipe as recipes

    check_place(into, "cost")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in benched(configs or [], [f"run.batch_size={batch_size}"], Path(folder)):
            rows.append(costs.measure(recipes.decode(tree, name), name, rounds, clock))
    told(rows, costs.table(rows), costs.WORDS, as_json, into, "cost")


@bench.command()
def memory(
    configs: Configs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Rows for a machine.")] = False,
    into: Annotated[Path | None, typer.Option(help="Markdown with a place <!-- memory -->.")] = None,
) -> None:
    """Measure the peak memory of training against what must be held: the student whole, as adapters, all on one."""
    from . import memory as memories

    check_place(into, "memory")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in benched(configs or [], [], Path(folder)):
            rows += memories.rows(tree, name, name)
    told(rows, memories.table(rows), memories.WORDS, as_json, into, "memory")


def check_place(into: Path | None, name: str) -> None:
    """Raise ValueError, before anything is measured, if a document has no place of that name."""
    from .evaluation.report import around

    if into:
        around(into, name)


def told(
    rows: list[dict[str, Any]],
    table: tuple[list[str], list[list[str]]],
    words: int,
    as_json: bool,
    into: Path | None,
    name: str,
) -> None:
    """Print rows as JSON or a table, and put the table into a document if one is given."""
    from . import tables
    from .evaluation.report import place

    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        tables.show(*table, words)
    if into:
        place(tables.markdown(*table, words), into, name)


def benched(given: list[str], changes: list[str], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and tree of the configs to be measured, changed by all KEY=VALUE among ``given``, last of all.

    Without a config those of the emoji world, on the shipped teacher, each method and its options once; each
    ``by_itself``.
    """
    from .config import override, read

    changes = [*changes, *(text for text in given if "=" in text)]
    trees = {name: read(path) for name, path in named(text for text in given if "=" not in text).items()}
    if not trees:
        found = {name: read(path) for name, path in shipped_configs().items() if name.startswith("emoji/")}
        recipes = {name: tree for name, tree in found.items() if "method" in tree}
        kinds = {name: str(tree["method"]["name"]) for name, tree in recipes.items()}
        for name in sorted(recipes, key=lambda name: (kinds[name], name != f"emoji/{kinds[name]}", name)):
            if not any(tree["method"] == recipes[name]["method"] for tree in trees.values()):
                trees[name] = override(recipes[name], ["model.path=assets:emoji/teacher"])
    for name, tree in trees.items():
        yield name, by_itself(override(tree, changes), folder)


def named(configs: Iterable[str | Path]) -> dict[str, Path]:
    """Configs as they were given, by the names that shipped ones have, others by their paths."""
    names = {path.resolve(): name for name, path in shipped_configs().items()}
    return {names.get(path.resolve(), str(path)): path for path in (find_config(Path(c)) for c in configs)}


def by_itself(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree without what other runs leave, for what does not depend on weights: only shapes, which stay the same.

    Of pairs, if it says by which config they are made, it gets a few in ``folder``. A student whose start is not there
    starts from the teacher.
    """
    from .config import override, read
    from .recipe import locate

    data, start = tree.get("data", {}), tree.get("student", {}).get("init", "")
    if start and not Path(locate(start)).exists():
        told = "student.init %s is no folder here; the teacher, whose shape it has, is measured in its place"
        logging.getLogger(__name__).info(told, start)
        tree = override(tree, ['student.init=""'])
    if data.get("source") != "pairs" or not data.get("made_by"):
        return tree
    from .pairs import decode, make

    out = folder / data["made_by"].replace("/", "-")
    if not out.exists():
        own = read(find_config(Path(data["made_by"])))
        changes = [f"pairs.out={out}", f"pairs.number={tree.get('run', {}).get('batch_size', 8)}"]
        make(decode({**override(own, changes), "model": tree["model"]}, data["made_by"]))
    return {**tree, "data": {**data, "path": str(out)}}


@bench.command()
def methods(
    configs: Annotated[
        list[Path] | None, typer.Argument(help="YAML configs; the emoji world's of every method if none is given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="For the rows; the chart goes beside it.")] = Path("docs/results.json"),
    into: Annotated[
        Path | None, typer.Option(help="Markdown with a place <!-- methods -->; beside --out if not given.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="For pictures and report.html of all together.")] = Path("runs/methods"),
) -> None:
    """Train every method that is not trained yet, judge all beside their teacher, write the comparison; resumes."""
    from . import registry
    from .evaluation import methods as comparison
    from .evaluation.methods_report import compared_by, worse_than_teacher
    from .evaluation.report import print_table

    shipped = shipped_configs()
    given = named(configs or [f"emoji/{m}" for m in registry.names("method") if f"emoji/{m}" in shipped])
    places = comparison.Places(out, into or out.with_suffix(".md"), folder)
    rows, failed = comparison.bench(comparison.entries(given), places)
    print_table(rows)
    for row in rows:
        if worse_than_teacher(row, rows):
            say(f"{row['name']}: worse than the undistilled teacher at as many {compared_by(row).replace('_', ' ')}")
    say(f"{out}, {places.document}, {folder / 'report.html'}")
    if failed:
        fail(f"the training of {', '.join(failed)} failed; the same command goes on", 1)


def say(text: str) -> None:
    """A line of result, from the main process only."""
    if is_main():
        typer.echo(text)


def is_main() -> bool:
    """Whether this is the main process; to be asked after ``parallel.device()``."""
    from . import parallel

    return parallel.rank() == 0


def main() -> None:
    """A process that runs the command line."""
    code: Any = 1  # of what --debug lets through
    try:
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
        raise
    finally:
        interrupt.over(code)


def run() -> None:
    """Run the command line, with no traceback unless --debug.

    Exit codes: 0 done, 1 failed, 2 bad input, 3 ended by ``health.stop``, 75 training that was asked to stop and goes
    on by the same command, 130 Ctrl-C elsewhere, or twice, and 143 so for SIGTERM: other commands end where they are.
    """
    usage: Any = typer.BadParameter.__mro__[1]  # UsageError, of click or of the click within newer typers
    code: Any = 0
    kept = "what was written before is whole"
    try:
        with interrupt.watched(kept=kept) as watch:
            code = app(standalone_mode=False)  # else a usage error would be a box of several lines
    except interrupt.Interrupted:
        code = 128 + watch.number
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except usage as error:
        told = error.format_message()
        if told:
            command = error.ctx.command_path if error.ctx else "fastgen"
            fail(f"{told[0].lower()}{told[1:].rstrip('.')}; `{command} -h` shows what there is", 2)
        code = 2  # no command was given, and the help is printed
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if not watch.number:  # else it comes of a library that went on with half of an import
            fail(*explained(error))
        code = 128 + watch.number
    if code in (130, 143):  # newer typers catch Ctrl-C themselves
        fail(f"ended by {signal.Signals(code - 128).name}; {kept}", code)
    if code:
        sys.exit(code)


def fail(text: str, code: int, once: bool = False) -> NoReturn:
    """One line on stderr, whatever the text's own lines, and out. once: from the main process only."""
    if not once or is_main():
        typer.echo(f"fastgen: {hidden(' '.join(text.split()))}", err=True)
    sys.exit(code)


def explained(error: Exception) -> tuple[str, int]:
    """What to say of an error that ended a command, and the exit code."""
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, OSError):
        names = FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError
        told = f"{error.filename or 'i/o'}: {error.strerror}" if error.strerror else str(error)
        return told, 2 if isinstance(error, names) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else 1
    import torch

    from .engine import NonFiniteLoss
    from .export import ExportError
    from .health import Unhealthy
    from .interrupt import ProcessGone

    if isinstance(error, torch.OutOfMemoryError):
        return no_room(str(error)), 1
    if isinstance(error, NonFiniteLoss | ExportError | ProcessGone):
        return str(error), 1
    if isinstance(error, Unhealthy):
        return str(error), 3
    return f"{type(error).__name__}: {error}; `fastgen --debug ...` shows where", 1


def no_room(text: str) -> str:
    """What torch says when a GPU has no memory left, without its advice on its allocator -> what would do here."""
    tried = re.search(r"ried to allocate [\d.]+ \w+", text)
    told = f" (t{tried[0]})" if tried else ""
    return (
        f"the GPU has no room left{told}; a smaller batch takes less: in a training run.batch_size, which "
        "run.accumulate makes up for, or model.gradient_checkpointing=true, run.offload=true, student.lora; "
        "`fastgen estimate CONFIG` tells what it takes"
    )


if __name__ == "__main__":
    main()
