"""Prompts from a text file (one a line) or JSON lines with the key "prompt"; all that a data-free method needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from fastgen.config import option
from fastgen.data import Item, Source
from fastgen.plain import from_json


@dataclass(frozen=True)
class Config:
    """Options of the source ``prompts``."""

    path: str = option(help="a .txt file, one prompt a line, or .jsonl rows with the key 'prompt'")
    seed: int = option(0, "of the order, which is shuffled anew each time round", low=0)


class Prompts:
    """A shuffled list of prompts."""

    has_images = False

    def __init__(self, config: Config) -> None:
        """Read the file. Raises ValueError if it is missing, empty or malformed."""
        self._prompts, self.seed = read(Path(config.path)), config.seed
        self.candidates = list(dict.fromkeys(self._prompts))

    def concept(self, prompt: str) -> str:
        """The prompt itself."""
        return prompt

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self._prompts)

    def item(self, index: int) -> Item:
        """A prompt without a picture."""
        return self.read(shuffled(index, len(self), self.seed))

    def read(self, number: int) -> Item:
        """The prompt in this line."""
        return Item(self._prompts[number])

    def digest(self) -> str:
        """Of all prompts."""
        return blake2b(repr(self._prompts).encode(), digest_size=16).hexdigest()


def shuffled(index: int, n: int, seed: int) -> int:
    """Where ``index`` falls when n items are gone through again and again, each time in a new order."""
    turn, place = divmod(index, n)
    return int(_order(seed, turn, n)[place])


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(n)


def read(path: Path) -> list[str]:
    """The prompts of a file, in order, empty lines skipped. Raises ValueError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such prompt file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line.strip())
            continue
        try:
            prompt = from_json(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: line {number} is not a JSON object with the key 'prompt'")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one a line")
    return prompts


def open(config: Config, image_size: tuple[int, int]) -> Source:
    """Open the source."""
    return Prompts(config)
