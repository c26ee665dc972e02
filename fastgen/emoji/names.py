"""The core concepts: what each is called in a caption, and what may be done to its picture.

`CORE` lists, in a fixed order, the concepts that training and evaluation use. Each is one CLDR emoji (`label`) under
one caption name; GenEval's own word is the name wherever GenEval has the object. A concept whose drawing has one
obvious colour in every style says which, in GenEval's ten colour words.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from fastgen.geneval import COLOURS as COLOURS

STYLES = ("noto", "twemoji", "fluent flat", "blob", "emojione", "fluent 3d")
"""The six drawing styles, by the words that name them in a caption."""

NUMBERS = ("zero", "one", "two", "three", "four")

OTHER_NAMES = {
    "cat": "standing cat",
    "dog": "standing dog",
    "cow": "standing cow",
    "monkey": "whole monkey",
    "pig": "standing pig",
    "rabbit": "whole rabbit",
    "whale": "blue whale",
    "snowman": "snowman in snow",
}
"""Names for concepts outside the core whose CLDR label is the caption name of a core concept."""

_IRREGULAR_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "mouse": "mice",
    "computer mouse": "computer mice",
    "knife": "knives",
    "die": "dice",
    "fish": "fish",
    "leaf": "leaves",
    "maple leaf": "maple leaves",
    "wolf": "wolves",
    "snowman": "snowmen",
    "octopus": "octopuses",
    "bus": "buses",
}


@dataclasses.dataclass(frozen=True)
class Core:
    """One core concept.

    Attributes:
        name: caption name without article, unique ("red apple").
        label: CLDR short name of the emoji ("red apple").
        noun: the object class, shared by differently coloured concepts ("apple").
        colour: one of `COLOURS` if every style draws it mostly in that colour, else None.
        group: section of the list ("food").
        geneval: whether `noun` is one of GenEval's 80 objects.
        mirror: whether the mirror image is as right a picture as the original.
        countable: whether "three ..." reads well; False for "scissors" and the like, which take no article.
    """

    name: str
    label: str
    noun: str
    colour: str | None
    group: str
    geneval: bool
    mirror: bool
    countable: bool

    @property
    def phrase(self) -> str:
        """The name with its article: "a red apple", "an umbrella", "scissors"."""
        return with_article(self.name) if self.countable else self.name

    @property
    def noun_phrase(self) -> str:
        """The noun with its article: "an apple"."""
        return with_article(self.noun) if self.countable else self.noun

    @property
    def coloured_phrase(self) -> str:
        """The noun with its colour and article: "a yellow banana"; the noun phrase if it has no colour."""
        if self.colour is None:
            return self.noun_phrase
        words = f"{self.colour} {self.noun}"
        return with_article(words) if self.countable else words

    @property
    def plural(self) -> str:
        """Plural of the name: "red apples"."""
        return self.name[: len(self.name) - len(self.noun)] + self.noun_plural

    @property
    def noun_plural(self) -> str:
        """Plural of the noun: "apples"."""
        return plural(self.noun) if self.countable else self.noun


def with_article(words: str) -> str:
    """Put "a" or "an" before `words`."""
    vowel = words[0].lower() in "aeiou" and not words.startswith(("uni", "one", "eu"))
    return f"{'an' if vowel or words.startswith(('hour', 'x-')) else 'a'} {words}"


def plural(noun: str) -> str:
    """English plural of a singular noun."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    if noun in ("tomato", "potato"):
        return f"{noun}es"
    return f"{noun}s"


# One line each: name [= CLDR label] [; noun] [; colour] [; flags]. Flags: G = a GenEval object, F = fixed (not to be
# mirrored), P = plural only (no article, not counted). "@ noun" says that the name is "colour noun".
_TABLE = """
[shape]
red heart ; @heart
orange heart ; @heart
yellow heart ; @heart
green heart ; @heart
blue heart ; @heart
purple heart ; @heart
pink heart ; @heart
brown heart ; @heart
black heart ; @heart
white heart ; @heart
red circle ; @circle
orange circle ; @circle
yellow circle ; @circle
green circle ; @circle
blue circle ; @circle
purple circle ; @circle
brown circle ; @circle
black circle ; @circle
white circle ; @circle
red square ; @square
orange square ; @square
yellow square ; @square
green square ; @square
blue square ; @square
purple square ; @square
brown square ; @square
black square = black large square ; @square
white square = white large square ; @square
orange diamond = large orange diamond ; @diamond
blue diamond = large blue diamond ; @diamond
red triangle = red triangle pointed up ; @triangle
star ; yellow
[food]
red apple ; @apple ; G
green apple ; @apple ; G
banana ; yellow ; G
orange = tangerine ; G
broccoli ; green ; G P
carrot ; orange ; G
hot dog ; G
pizza ; G
donut = doughnut ; G
cake = birthday cake ; G
sandwich ; G
grapes ; purple ; P
watermelon
lemon ; yellow
pineapple
cherries ; red ; P
strawberry ; red
avocado ; green
eggplant ; purple
cheese = cheese wedge ; yellow ; P
hamburger
french fries ; P
fried egg = cooking
ice cream cone = soft ice cream
[kitchen]
wine glass ; G
cup = hot beverage ; G
bottle = bottle with popping cork ; G
knife = kitchen knife ; G
spoon ; G
bowl = bowl with spoon ; G
vase = amphora ; G
beer mug
[animal]
bird ; G
cat = cat face ; G
dog = dog face ; G
horse ; G
sheep = ewe ; G
cow = cow face ; G
elephant ; G
bear ; brown ; G
zebra ; G
giraffe ; G
panda
lion
fox ; orange
rabbit = rabbit face
pig = pig face ; pink
monkey = monkey face ; brown
frog ; green
penguin
owl
chick = baby chick ; yellow
turtle ; green
snake ; green
fish
octopus
crab ; red
whale = spouting whale ; blue
snail
butterfly
bee = honeybee
spider
[face]
person ; G
smiley face = grinning face with big eyes ; yellow
sunglasses face = smiling face with sunglasses
sobbing face = loudly crying face
ghost
robot
pumpkin = jack-o-lantern ; orange
[nature]
potted plant ; G
sunflower ; yellow
tulip
cactus ; green
palm tree
pine tree = evergreen tree ; green
maple leaf
mushroom
sun ; yellow
moon = crescent moon ; yellow
cloud
rainbow
fire ; P
snowflake ; blue
snowman = snowman without snow
water drop = droplet ; blue
lightning bolt = high voltage
globe = globe showing Americas ; F
[travel]
bicycle ; G
car = automobile ; G
motorcycle ; G
airplane ; G
bus ; G
train ; G
truck = delivery truck ; G F
boat = sailboat ; G
traffic light = vertical traffic light ; G
stop sign ; red ; G F
rocket
helicopter
house
[object]
backpack ; G
umbrella ; G
handbag ; G
tie = necktie ; G
suitcase = luggage ; G
frisbee = flying disc ; G
skis ; G P
sports ball = soccer ball ; G
kite ; G
skateboard ; G
chair ; G
couch = couch and lamp ; G
bed ; G
toilet ; G
tv = television ; G
laptop ; G
computer mouse ; G
computer keyboard = keyboard ; G
cell phone = mobile phone ; G
red book = closed book ; @book ; G
green book ; @book ; G
blue book ; @book ; G
orange book ; @book ; G
clock = three o'clock ; G F
scissors ; G P
teddy bear ; G
toothbrush ; G
guitar
balloon ; red
gift = wrapped gift
trophy ; yellow
crown ; yellow
key
bell
light bulb ; yellow
magnet ; red
pencil
die = game die
"""


def _parse(table: str) -> Iterator[Core]:
    """Read the table above."""
    group = ""
    for line in table.strip().splitlines():
        if line.startswith("["):
            group = line.strip("[]")
            continue
        head, *fields = (field.strip() for field in line.split(";"))
        name, _, label = (part.strip() for part in head.partition("="))
        noun, colour, flags = name, None, set[str]()
        for field in fields:
            if field.startswith("@"):
                noun = field[1:]
                colour = name.removesuffix(noun).strip()
            elif field in COLOURS:
                colour = field
            else:
                flags |= set(field.split())
        yield Core(
            name=name,
            label=(label or name).replace("'", "\u2019"),
            noun=noun,
            colour=colour,
            group=group,
            geneval="G" in flags,
            mirror="F" not in flags,
            countable="P" not in flags,
        )


CORE: tuple[Core, ...] = tuple(_parse(_TABLE))
"""All core concepts, in order."""

GENEVAL_NAMES: tuple[str, ...] = tuple(core.name for core in CORE if core.geneval)
"""Names of the core concepts whose noun is one of GenEval's objects."""


@functools.cache
def by_name() -> dict[str, Core]:
    """The core concepts by name."""
    return {core.name: core for core in CORE}


@functools.cache
def by_label() -> dict[str, Core]:
    """The core concepts by CLDR label."""
    return {core.label: core for core in CORE}


@functools.cache
def by_noun() -> dict[str, tuple[Core, ...]]:
    """The core concepts by noun, in order."""
    nouns: dict[str, list[Core]] = {}
    for core in CORE:
        nouns.setdefault(core.noun, []).append(core)
    return {noun: tuple(cores) for noun, cores in nouns.items()}


def phrase(name: str) -> str:
    """What a caption calls a concept: the core phrase, or else the CLDR label with an article if it seems singular."""
    core = by_name().get(name)
    if core is not None:
        return core.phrase
    return name if name.endswith("s") and not name.endswith("ss") else with_article(name)
