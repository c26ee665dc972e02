"""Where the weights of extractors are: one table of names, files, sources and usual places.

Nothing is downloaded by ``find``; ``fetch`` does, when asked to. ``tensors`` reads checkpoints of others; what
Transformers wrote is read by those who use it (features.py, ...).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgen import lpips
from fastgen.checkpoint import atomic_file
from fastgen.config import suggest
from fastgen.prefetch import HUB_ID, IGNORED
from fastgen.recipe import locate


def nowhere() -> Sequence[Path]:
    """No further folders."""
    return ()


@dataclass(frozen=True)
class Weights:
    """What is known of some weights by name.

    Attributes:
        files: names that the file, or the folder, may have; the first is the source's own.
        url: where the file comes from; empty: ``hub``.
        hub: id of the repository on the Hub; with ``url`` empty and one file with a suffix, that file in it.
        made_by: the command that writes the file, where no one offers it.
        sha256: the file's from ``url``, or its first digits; empty: not known.
        caches: folders where the libraries that use the same file keep it.
    """

    files: tuple[str, ...]
    url: str = ""
    hub: str = ""
    made_by: str = ""
    sha256: str = ""
    caches: Callable[[], Sequence[Path]] = nowhere

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, as Transformers writes them."""
        return not Path(self.files[0]).suffix

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        if self.made_by:
            return f"`{self.made_by}`"
        return self.url or f"https://huggingface.co/{self.hub}"


def torch_hub() -> Sequence[Path]:
    """torch.hub's checkpoints, where pytorch-fid, torch-fidelity and torchmetrics keep theirs."""
    return (Path(torch.hub.get_dir()) / "checkpoints",)


def clean_fid() -> Sequence[Path]:
    """The folder for temporary files, where clean-fid keeps InceptionV3."""
    return (Path(tempfile.gettempdir()),)


def hps() -> Sequence[Path]:
    """hpsv2's own folder."""
    return (Path(os.environ.get("HPS_ROOT") or Path.home() / ".cache" / "hpsv2"),)


def image_reward() -> Sequence[Path]:
    """ImageReward's own folder."""
    return (Path.home() / ".cache" / "ImageReward",)


TABLE = {
    "inception": Weights(
        ("inception-2015-12-05.pt", "inception-2015-12-05.safetensors"),
        url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        caches=clean_fid,
    ),
    "inception_pytorch": Weights(
        (
            "pt_inception-2015-12-05-6726825d.pth",
            "weights-inception-2015-12-05-6726825d.pth",  # torch-fidelity's name for it, by the hash the same file
            "pt_inception-2015-12-05-6726825d.safetensors",
        ),
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        sha256="6726825d",
        caches=torch_hub,
    ),
    "clip": Weights(("clip-vit-large-patch14",), hub="openai/clip-vit-large-patch14"),
    "clip_336": Weights(("clip-vit-large-patch14-336",), hub="openai/clip-vit-large-patch14-336"),
    "dinov2": Weights(("dinov2-large",), hub="facebook/dinov2-large"),
    "emoji_detector": Weights(("detector",), made_by="python -m fastgen.emoji.detector configs/emoji/detector.yaml"),
    "lpips": Weights((lpips.FILE,), made_by="python -m fastgen.lpips"),
    "hpsv2": Weights(("HPS_v2.1_compressed.pt",), hub="xswu/HPSv2", caches=hps),
    "image_reward": Weights(("ImageReward.pt",), hub="THUDM/ImageReward", caches=image_reward),
    "bert": Weights(("bert-base-uncased",), hub="google-bert/bert-base-uncased"),
    "pickscore": Weights(("PickScore_v1",), hub="yuvalkirstain/PickScore_v1"),
    "mask2former": Weights(
        ("mask2former-swin-small-coco-instance",), hub="facebook/mask2former-swin-small-coco-instance"
    ),
}
"""By name, as ``eval.weights`` and ``About.needs`` have it."""


def known(name: str) -> Weights:
    """The table's entry. Raises ValueError for another name."""
    if name not in TABLE:
        raise ValueError(f"unknown weights {name!r}{suggest(name, TABLE)}")
    return TABLE[name]


def home() -> Path:
    """The folder for weights: $FASTGEN_WEIGHTS_DIR, else ~/.cache/fastgen."""
    return Path(os.environ.get("FASTGEN_WEIGHTS_DIR") or Path.home() / ".cache" / "fastgen")


def find(name: str, given: str | None = None) -> Path:
    """The file or folder of the weights of this name.

    Args:
        name: of the table.
        given: a file, a folder (of a file: with it inside), a Hub id that is in the Hub's cache, or a place in the
            package's own assets; None: looked for in $FASTGEN_WEIGHTS_DIR, ~/.cache/fastgen, the folders of other
            libraries and the Hub's cache, in that order.

    Raises:
        ValueError: if it is not there, or the name is not known.
    """
    entry = known(name)
    if given:
        return _given(name, entry, locate(given))
    for folder in dict.fromkeys((home(), Path.home() / ".cache" / "fastgen", *entry.caches())):
        for file in entry.files:
            if (folder / file).exists():
                return (folder / file).absolute()
    found = _cached(entry.hub, entry) if entry.hub else None
    if found is None:
        raise ValueError(
            f"{home() / entry.files[0]}: no weights of {name} there; they come from {entry.source}: put them there, "
            f"or set eval.weights.{name}"
        )
    return found


def _given(name: str, entry: Weights, given: str) -> Path:
    path = Path(given).expanduser()
    if path.is_dir() and not entry.is_folder:
        inside = [path / file for file in entry.files if (path / file).is_file()]
        if not inside:
            raise ValueError(
                f"{path / entry.files[0]}: eval.weights.{name} names a folder without it; it comes from {entry.source}"
            )
        return inside[0].absolute()
    if path.exists():
        return path.absolute()
    # a folder that is not there is no Hub id
    if not entry.is_folder or not HUB_ID.fullmatch(given) or path.parent.is_dir():
        kind = "folder" if entry.is_folder else "file"
        also = ", or to a Hub id" if entry.is_folder else ""
        raise ValueError(
            f"{given}: no such {kind}; weights of {name} come from {entry.source}: set eval.weights.{name} to "
            f"their {kind}{also}"
        )
    found = _cached(given, entry)
    if found is None:
        raise ValueError(
            f"{given}: not in the Hub's cache; `hf download {given}` puts it there, or set eval.weights.{name} to a "
            "folder with it"
        )
    return found


def _cached(repository: str, entry: Weights) -> Path | None:
    """A repository, or the one file of it, in the Hub's cache; None if it is not there."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if entry.is_folder:
            return Path(snapshot_download(repository, local_files_only=True))
        return Path(hf_hub_download(repository, entry.files[0], local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None


def fetch(name: str) -> Path:
    """Where the weights are, after they were downloaded into ``home`` (or the Hub's cache) if they were not there.

    Raises ValueError if they cannot be had.
    """
    entry = known(name)
    try:
        return find(name)
    except ValueError:
        if entry.made_by:
            raise
    if not entry.url:
        return _from_hub(name, entry)
    file = home() / entry.files[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(file) as partial:
            with urllib.request.urlopen(entry.url, timeout=60) as response, partial.open("wb") as out:
                while block := response.read(1 << 20):
                    out.write(block)
            got = sha256(partial)
            if not got.startswith(entry.sha256):
                raise ValueError(f"{entry.url}: gave a file of SHA-256 {got}, not {entry.sha256}...; try again")
    except OSError as error:
        raise ValueError(f"{file}: cannot be had from {entry.url} ({error}); put it there by hand") from None
    return file


def _from_hub(name: str, entry: Weights) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if not entry.is_folder:
            return Path(hf_hub_download(entry.hub, entry.files[0]))
        folder = Path(snapshot_download(entry.hub, ignore_patterns=list(IGNORED)))
        if not list(folder.glob("*.safetensors")):  # an old repository, which Transformers reads by weights_only
            hf_hub_download(entry.hub, "pytorch_model.bin")
        return folder
    except Exception as error:  # of several libraries: no network, a licence, a full disk
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise ValueError(
            f"{home() / entry.files[0]}: weights of {name} cannot be had from {entry.source} ({reason}); put them "
            "there by hand"
        ) from None


def tensors(file: Path, remedy: str) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, of its ``state_dict`` if it has one; what else it holds is left out.

    A .safetensors, or a file of torch's own, which is read as numbers and containers alone (``weights_only``): nothing
    in it is run. remedy: what to do about another. Raises ValueError, naming the file.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such checkpoint; {remedy}")
    try:
        if file.suffix == ".safetensors":
            held: Any = load_file(file)
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)
        named = held.get("state_dict", held)
        found = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    except Exception as error:  # of several libraries: cut, of another format, or with code in it, which is not run
        reason = " ".join(str(error).split()).partition(". ")[0][:200]  # torch goes on to advise against safety
        raise ValueError(f"{file}: not readable as plain tensors ({reason}); {remedy}") from None
    if not found:
        raise ValueError(f"{file}: has no tensors, nor any in `state_dict`; {remedy}")
    return found


def sha256(path: Path) -> str:
    """Of a file's bytes, or of all files of a folder: their paths in it and their bytes, in sorted order."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
