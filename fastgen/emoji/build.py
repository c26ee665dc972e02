"""Rebuild the shipped sprites from pinned npm packages: `python -m fastgen.emoji.build [--packages DIR]`.

Reads the tarballs in DIR (fetched by `npm pack` where missing), draws every emoji of each set, and writes one
lossless atlas per style, `index.jsonl` and `LICENSES.md` into `assets/sprites/`. The same tarballs give the same bytes
under one version of Pillow and resvg. Needs Pillow, numpy and `resvg-py`; nothing else in fastgen imports this module.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastgen.emoji import names

SIDE = 48
"""Side of a sprite in pixels."""

COLUMNS = 40
"""Sprites in one row of an atlas."""

HELDOUT_SHARE = 0.125
"""Chance that a core (name, style) pair is held out, before `MIN_TRAIN_STYLES` takes some back: about 12 % remain."""

MIN_TRAIN_STYLES = 3
"""Styles that every core name keeps for training."""

ASSETS = Path(__file__).parent / "assets" / "sprites"

GROUPS = ("smileys", "people", "component", "animals", "food", "travel", "activities", "objects", "symbols", "flags")
"""emojibase's groups by number."""

_SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned npm package.

    Attributes:
        name: npm name.
        version: exact version.
        sha256: of the tarball.
        style: the style it draws, or None if it holds only labels.
        author: who made the content.
        source: where the content comes from.
        licence: SPDX identifier of the content.
        text: file in `licenses/` with the licence's text.
    """

    name: str
    version: str
    sha256: str
    style: str | None
    author: str
    source: str
    licence: str
    text: str

    @property
    def tarball(self) -> str:
        """File name that `npm pack` gives."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "noto",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
        "Apache-2.0.txt",
    ),
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "twemoji",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "fluent flat",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
        "MIT-fluent-emoji.txt",
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "blob",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
        "Apache-2.0.txt",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "emojione",
        "EmojiOne and the EmojiTwo contributors",
        "https://github.com/EmojiTwo/emojitwo",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "fluent 3d",
        "Microsoft Corporation (drawings), LobeHub (package)",
        "https://github.com/lobehub/fluent-emoji",
        "MIT",
        "MIT-fluent-emoji.txt",
    ),
    Package(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        None,
        "Miles Johnson",
        "https://github.com/milesj/emojibase",
        "MIT",
        "MIT-emojibase.txt",
    ),
)


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji that is neither a skin tone, a flag, a keycap nor a button.

    Attributes:
        code: its code points in lower-case hexadecimal, joined by "-", without variation selectors.
        name: what captions call it.
        label: its CLDR short name.
        group: one of `GROUPS`.
    """

    code: str
    name: str
    label: str
    group: str


def normalise_code(code: str) -> str:
    """Lower-case code points without the variation selector FE0F: "1F441-FE0F" -> "1f441"."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """A label as icon sets spell it, without apostrophes: "woman's hat" -> "womans-hat"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("\u2019", "").replace("'", "")).strip("-")


def keep(entry: Mapping[str, Any]) -> bool:
    """Whether an emojibase entry is drawn: no skin tone, flag, keycap, button, nor one without a group."""
    group = entry.get("group")
    if group is None or GROUPS[group] in ("component", "flags"):
        return False
    if not _SKIN_TONES.isdisjoint(normalise_code(entry["hexcode"]).split("-")):
        return False
    words = re.split(r"[^a-z0-9]+", entry["label"].lower())
    return "keycap" not in words and "button" not in words


def concept_name(label: str) -> str:
    """What captions call the emoji with this CLDR label."""
    core = names.by_label().get(label)
    return core.name if core is not None else names.OTHER_NAMES.get(label, label)


def concepts(data: Sequence[Mapping[str, Any]]) -> list[Concept]:
    """The concepts of emojibase's data, in Unicode's order, with unique names."""
    found = [
        Concept(normalise_code(e["hexcode"]), concept_name(e["label"]), e["label"], GROUPS[e["group"]])
        for e in sorted(data, key=lambda e: e.get("order", 0))
        if keep(e)
    ]
    seen: dict[str, str] = {}
    for concept in found:
        if concept.name in seen:
            raise ValueError(
                f"name {concept.name!r} is given to both {seen[concept.name]!r} and {concept.label!r}; "
                "rename one in fastgen/emoji/names.py"
            )
        seen[concept.name] = concept.label
    missing = sorted(set(names.by_label()) - {concept.label for concept in found})
    if missing:
        raise ValueError(f"core label {missing[0]!r} is not an emoji that is drawn; correct fastgen/emoji/names.py")
    return found


def code_table(sets: Iterable[Mapping[str, Any]], data: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Code point of each icon name that any source knows.

    Labels count first, then the tables from character to icon, then each set's aliases, which carry older names over.

    Args:
        sets: per icon set, `{"icons": icons.json, "chars": chars.json}`.
        data: emojibase's entries.
    """
    table = {slug(entry["label"]): normalise_code(entry["hexcode"]) for entry in data}
    aliases: list[tuple[str, str]] = []
    for icon_set in sets:
        for code, icon in icon_set["chars"].items():
            table.setdefault(icon, normalise_code(code))
        for alias, target in icon_set["icons"].get("aliases", {}).items():
            if set(target) <= {"parent", "hidden"}:
                aliases.append((alias, target["parent"]))
    changed = True
    while changed:
        changed = False
        for pair in aliases:
            for known, new in (pair, pair[::-1]):
                if known in table and new not in table:
                    table[new] = table[known]
                    changed = True
    return table


def icon_codes(icon_set: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, str]:
    """Icon name for each code point that a set draws; the set's own table of characters counts first."""
    own = {normalise_code(code): icon for code, icon in icon_set["chars"].items()}
    named = set(own.values())
    drawn = icon_set["icons"]["icons"]
    found = {code: icon for code, icon in own.items() if icon in drawn}
    for icon in drawn:
        if icon not in named and icon in table:
            found.setdefault(table[icon], icon)
    return found


def svg(icon_set: Mapping[str, Any], icon: str, side: int) -> str:
    """The SVG document of one icon, `side` pixels wide and high."""
    body = icon_set["icons"][icon]
    width = body.get("width", icon_set.get("width", 16))
    height = body.get("height", icon_set.get("height", 16))
    box = f"{body.get('left', 0)} {body.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}">{body["body"]}</svg>'
    )


def stable_share(name: str, style: str) -> float:
    """A number in [0, 1) that depends on the pair only."""
    digest = hashlib.sha256(f"{name}|{style}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def heldout_styles(name: str, styles: Iterable[str]) -> frozenset[str]:
    """The styles held out for a core name; `MIN_TRAIN_STYLES` stay for training."""
    ranked = sorted(styles, key=lambda style: stable_share(name, style))
    chosen = [style for style in ranked if stable_share(name, style) < HELDOUT_SHARE]
    return frozenset(chosen[: max(0, len(ranked) - MIN_TRAIN_STYLES)])


def clean(rgba: np.ndarray) -> np.ndarray:
    """Zero the colour of wholly transparent pixels, which nobody sees and the file would carry."""
    return np.where(rgba[..., 3:] > 0, rgba, 0).astype(np.uint8)


def pack(tiles: Sequence[np.ndarray], side: int, columns: int) -> np.ndarray:
    """Lay tiles [side, side, 4] out row by row on one sheet."""
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((rows * side, columns * side, 4), np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    return sheet


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball in `folder`, fetched by npm if it is not there; its hash is checked."""
    path = folder / package.tarball
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(f"{path} is missing and npm is not installed; install npm or put the tarball there")
        folder.mkdir(parents=True, exist_ok=True)
        spec = f"{package.name}@{package.version}"
        done = subprocess.run(
            [npm, "pack", "--silent", "--pack-destination", str(folder), spec], capture_output=True, text=True
        )
        if done.returncode != 0 or not path.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"npm could not fetch {spec}: {last}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{path} has sha256 {digest}, not {package.sha256}; delete it and run again")
    return path


def read_members(path: Path, wanted: str) -> dict[str, bytes]:
    """The files of a tarball whose path below `package/` matches the pattern `wanted`."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            stream = archive.extractfile(member) if member.isfile() and re.fullmatch(wanted, name) else None
            if stream is not None:
                found[name] = stream.read()
    return found


def _render_icons(
    icon_set: Mapping[str, Any], table: Mapping[str, str], wanted: Sequence[Concept]
) -> Iterator[tuple[Concept, str, np.ndarray]]:
    """Draw the wanted concepts that an icon set has."""
    import resvg_py

    icons = icon_codes(icon_set, table)
    for concept in wanted:
        icon = icons.get(concept.code)
        if icon is not None:
            png = resvg_py.svg_to_bytes(svg_string=svg(icon_set["icons"], icon, SIDE))
            yield concept, icon, clean(np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")))


def _render_images(files: Mapping[str, bytes], wanted: Sequence[Concept]) -> Iterator[tuple[Concept, str, np.ndarray]]:
    """Shrink the wanted concepts of a folder of pictures named by code point."""
    pictures = {normalise_code(Path(name).stem): name for name in files}
    for concept in wanted:
        name = pictures.get(concept.code)
        if name is not None:
            picture = Image.open(io.BytesIO(files[name])).convert("RGBA")
            small = picture.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")
            yield concept, Path(name).stem, clean(np.asarray(small))


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def licences_page(counts: Mapping[str, int]) -> str:
    """The text of `LICENSES.md`; `counts` is the number of sprites per style."""
    lines = [
        "# Licences of the sprites",
        "",
        "Written by `python -m fastgen.emoji.build`; the licence texts are in `licenses/`.",
        "",
        "| Style | File | Sprites | Drawings by | Source | npm package | Licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for package in PACKAGES:
        if package.style is not None:
            lines.append(
                f"| {package.style} | `{atlas_name(package.style)}` | {counts[package.style]} | {package.author} "
                f"| <{package.source}> | `{package.name}` {package.version} "
                f"| [{package.licence}](licenses/{package.text}) |"
            )
    labels = next(package for package in PACKAGES if package.style is None)
    lines += [
        "",
        f"Names and groups in `index.jsonl` come from `{labels.name}` {labels.version} by {labels.author} "
        f"(<{labels.source}>, [{labels.licence}](licenses/{labels.text})), which takes them from Unicode's CLDR.",
        "",
        "## What was changed",
        "",
        "- The SVG sets were taken as Iconify repackaged them. The package of fluent 3d is LobeHub's "
        "([MIT](licenses/MIT-lobehub.txt)), the drawings in it are Microsoft's.",
        f"- Each drawing was rasterised at {SIDE} x {SIDE} pixels with its own margins: the SVG sets by resvg, "
        "fluent 3d from 256 x 256 WebP by Lanczos resampling. Wholly transparent pixels lost their colour.",
        "- Skin-tone variants, flags, keycaps and buttons were left out; the rest lies on one sheet per style.",
        "- Some were renamed for captions (`fastgen/emoji/names.py`); `index.jsonl` keeps the CLDR name as `label` "
        "and the source's own name as `icon`.",
        "- Training and evaluation place the sprites on coloured backgrounds, scale them and may mirror them.",
        "",
    ]
    return "\n".join(lines)


def atlas_name(style: str) -> str:
    """File name of a style's atlas."""
    return f"{style.replace(' ', '-')}.webp"


def build(packages: Path, out: Path) -> None:
    """Write atlases, index and licences page into `out` from the tarballs in `packages`."""
    by_style = {package.style: package for package in PACKAGES}
    data = json.loads(read_members(fetch(by_style[None], packages), r"en/data\.json")["en/data.json"])
    sets: dict[str, dict[str, Any]] = {}
    pictures: dict[str, dict[str, bytes]] = {}
    for style in names.STYLES:
        members = read_members(fetch(by_style[style], packages), r"icons\.json|chars\.json|assets/.*\.webp")
        if "icons.json" in members:
            sets[style] = {key: json.loads(members[f"{key}.json"]) for key in ("icons", "chars")}
        else:
            pictures[style] = members
    wanted = concepts(data)
    table = code_table(sets.values(), data)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for style in names.STYLES:
        drawn = _render_icons(sets[style], table, wanted) if style in sets else _render_images(pictures[style], wanted)
        tiles: list[np.ndarray] = []
        for concept, icon, tile in drawn:
            row, column = divmod(len(tiles), COLUMNS)
            rows.append(
                {
                    "name": concept.name,
                    "style": style,
                    "group": concept.group,
                    "code": concept.code,
                    "icon": icon,
                    "label": concept.label,
                    "row": row,
                    "column": column,
                    "split": "train",
                    "core": concept.name in names.by_name(),
                }
            )
            tiles.append(tile)
        Image.fromarray(pack(tiles, SIDE, COLUMNS)).save(
            out / atlas_name(style), lossless=True, quality=100, method=6, exact=True
        )
        print(f"{style}: {len(tiles)} sprites, {(out / atlas_name(style)).stat().st_size / 1e6:.2f} MB", flush=True)
    mark_heldout(rows)
    (out / "index.jsonl").write_text("".join(map(_json_line, rows)), encoding="utf-8")
    counts = {style: sum(row["style"] == style for row in rows) for style in names.STYLES}
    (out / "LICENSES.md").write_text(licences_page(counts), encoding="utf-8")


def mark_heldout(rows: Sequence[dict[str, Any]]) -> None:
    """Set `split` to "heldout" in the core rows that are held out, in place."""
    styles: dict[str, list[str]] = {}
    for row in rows:
        if row["core"]:
            styles.setdefault(row["name"], []).append(row["style"])
    for name, drawn in styles.items():
        if len(drawn) < MIN_TRAIN_STYLES + 1:
            raise ValueError(
                f"core name {name!r} is drawn in {len(drawn)} styles only; at least {MIN_TRAIN_STYLES + 1} are needed"
            )
    heldout = {name: heldout_styles(name, drawn) for name, drawn in styles.items()}
    for row in rows:
        if row["core"] and row["style"] in heldout[row["name"]]:
            row["split"] = "heldout"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastgen.emoji.build", description="Rebuild the shipped sprites.")
    parser.add_argument(
        "--packages", type=Path, default=Path(".cache/emoji"), help="folder of the npm tarballs (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write into (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        build(options.packages, options.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
