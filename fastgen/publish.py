"""An export for others: what its model card says of bases, call and versions, and the way of a folder to the Hub."""

from __future__ import annotations

import inspect
import json
import logging
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import calls, export
from . import recipe as recipes
from .card import HUB_LICENCES, Base, Call, Form, Licence, Results, licence_called, public
from .checkpoint import atomic_file
from .plain import from_json, from_yaml
from .recipe import Recipe

log = logging.getLogger("fastgen")

README = "README.md"
"""The model card's name on the Hub."""
GRID = "samples.png"
"""The sample grid's, beside it."""
_PACKAGES = ("fastgen-diffusion", "torch", "diffusers", "transformers", "peft")


def no_results(opened: export.Opened) -> Results | None:
    """No evaluation is known."""
    return None


@dataclass(frozen=True)
class Wanted:
    """How a run is to be exported.

    Attributes:
        form: of the export.
        variant: of ``export.VARIANTS``, written besides float32; empty: none.
        licence: of the bases, where they do not say theirs; empty: unknown.
        repo: the Hub id that the card's call names; empty: the folder.
        steps_done: of training, by the weights that are exported; None: all of the run's.
        results: an evaluation of the pipeline that it is given the opener of.
    """

    form: Form = "pipeline"
    variant: str = ""
    licence: str = ""
    repo: str = ""
    steps_done: int | None = None
    results: Callable[[export.Opened], Results | None] = no_results


PIPELINE = Wanted()
"""As the end of a training run exports it."""


def check(recipe: Recipe, wanted: Wanted) -> None:
    """Raise ValueError, before anything is loaded, if a run cannot be exported so."""
    if wanted.form == "lora" and recipe.student.lora is None:
        raise ValueError(
            f"{recipe.run.out}: trained all weights, no adapters; `fastgen extract-lora` makes a LoRA file of two "
            "pipelines' difference"
        )
    if wanted.variant and wanted.form == "lora":
        raise ValueError(f"a LoRA file has no variant {wanted.variant}; write it in that precision: --dtype")
    if wanted.variant and recipe.run.save_dtype != "fp32":
        raise ValueError(
            f"variant {wanted.variant} stands beside weights in float32, not {recipe.run.save_dtype}; add --dtype "
            "fp32, or leave out --variant"
        )
    bases_of(recipe, wanted.licence)


def bases_of(recipe: Recipe, licence: str = "") -> list[Base]:
    """What a run's student is made from: the teacher, and what it started from if that is another pipeline."""
    return [base_of(path, licence) for path in (recipe.model.path, recipe.student.init) if path]


def base_of(path: str, licence: str = "") -> Base:
    """What a pipeline's own README.md says of its licence and origin.

    licence: where it says none. Raises ValueError if it says another.
    """
    folder = Path(recipes.locate(path))
    local = folder.exists()
    head = front_matter((folder / README).read_text(encoding="utf-8") if (folder / README).is_file() else "")
    if not local:
        head = front_matter(_from_hub(path))
    origin = head.get("base_model")
    origin = origin[0] if isinstance(origin, list) and origin else origin
    nearest = origin if isinstance(origin, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", origin) else ""
    own = _licence(head, "" if local else path)
    if licence:
        given = licence_called(licence)
        if own.id != "unknown" and own.called != given.called:
            raise ValueError(f"{path}: its {README} says its licence is {own.called}; leave out --license {licence}")
        own = own if own.id != "unknown" else given
    return Base(_called(folder) if local else path, nearest if local else path, own)


def front_matter(text: str) -> Mapping[str, Any]:
    """The YAML at the head of a model card; empty if there is none that can be read."""
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        tree = from_yaml(found[1]) if found else {}
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _licence(head: Mapping[str, Any], hub: str) -> Licence:
    said, name, link = (str(head.get(key) or "") for key in ("license", "license_name", "license_link"))
    if not said:
        return Licence()
    if said.lower() not in HUB_LICENCES:
        said, name = "other", name or said
    if hub and re.fullmatch(r"[\w./-]+", link):
        link = f"https://huggingface.co/{hub}/blob/main/{link}"
    return Licence(said.lower(), name, link if re.fullmatch(r"https?://[^\s()<>\"]+", link) else "")


def _from_hub(name: str) -> str:
    """The README.md of a Hub repository, from the cache or the Hub; empty if neither has it."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, README)).read_text(encoding="utf-8")
    except Exception as error:  # offline, gated, none there: the card says that the licence is unknown
        log.debug("no model card of %s: %s", name, error)
        return ""


def _called(folder: Path) -> str:
    """What a folder is called: a run's pipeline by the run."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("pipeline", "component", "lora") else folder.name


def name_of(folder: Path, wanted: Wanted) -> str:
    """What the model is called."""
    return wanted.repo.rpartition("/")[2] or _called(folder) + "-lora" * (wanted.form == "lora")


def place_of(base: Base) -> str:
    """Where a card's reader finds a base."""
    return base.name if base.hub == base.name else f"path/to/{base.name}"


def call_of(pipeline: Any, settings: Mapping[str, Any], prompt: str, place: str, **more: Any) -> Call:
    """How a pipeline of this class is called with a student's settings; more: the other fields of ``Call``."""
    given = {name: settings.get(name) for name in ("num_inference_steps", *export.DEFAULTS)}
    arguments = calls.prompted(pipeline, prompt) | calls.settled(pipeline, given)
    frames = "num_frames" in inspect.signature(type(pipeline).__call__).parameters
    gives = "frames" if frames else "images"
    scheduler = type(pipeline.scheduler).__name__
    return Call(place, type(pipeline).__name__, arguments, gives, scheduler=scheduler, **more)


def versions() -> dict[str, str]:
    """Of the packages that an export depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_repo(repo: str) -> None:
    """Raise ValueError if this cannot be a repository's id."""
    from huggingface_hub import utils

    check: Any = utils.validate_repo_id  # type: ignore[attr-defined]  # which its own commands call
    try:
        check(repo)
    except ValueError:
        raise ValueError(f"--push-to-hub {repo!r}: is not a repository's id; write OWNER/NAME") from None


def without_paths(folder: Path) -> None:
    """Let an exported folder name what it was made from by Hub id or folder's name, not by where that lies here.

    Diffusers, too, writes where a component came from.
    """
    for file in (folder / export.CARD, folder / "model_index.json", *folder.glob("*/config.json")):
        own = from_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
        named = own | {key: _named(own[key]) for key in ("base_model", "_name_or_path") if own.get(key)}
        made = public(named) if file.name == export.CARD else named
        if made != own:
            with atomic_file(file) as partial:
                partial.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _named(path: str) -> str:
    folder = Path(recipes.locate(path))
    return _called(folder) if folder.is_absolute() or folder.exists() else path


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a folder to the Hub and return where it is then; the token is the environment's or the login's.

    private: of a repository that is made now. The folder stays, but no longer says where its bases lie on this
    machine. Raises ValueError without a connection or a token, OSError if the Hub does not take it.
    """
    import huggingface_hub

    without_paths(folder)
    later = f"{folder} is written; `hf upload {repo} {folder}` pushes it later"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"not pushed to {repo}: HF_HUB_OFFLINE is set; {later}")
    token = huggingface_hub.get_token()
    if token is None:
        raise ValueError(f"not pushed to {repo}: no token; log in by `hf auth login` or set HF_TOKEN. {later}")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        url = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from fastgen")
    except Exception as error:
        reason = textwrap.shorten(str(error).replace(token, "(token)"), 300, placeholder=" ...")
        raise OSError(f"not pushed to {repo}: {reason or type(error).__name__}; {later}") from None
    return str(url)
