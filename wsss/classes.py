"""Class lists: names, what CLIP and the detector are told for each, negative prompts, colours.

A list comes by name (``voc``, ``coco``, ``mini``), from a file, or as names on the command line:

    dog
    person: people, human        # other wordings of the same class
    !statue                      # a negative prompt: takes probability, gets no label (``-statue`` does as well)

or as JSON: ``["dog", "cat"]``, or ``{"dog": {"prompts": ["dog", "puppy"], "phrases": ["dog"]}, "negatives": ["statue"]}``.
Sources of the built-in lists: VOC 2012 devkit, VOCinit.m; COCO 2014, instances_val2014.json; the CLIP prompts of both
from CLIP-ES (arXiv:2212.09506; github.com/linyq2117/CLIP-ES 78e0198, clip_text.py: ``new_class_names`` and
``new_class_names_coco``, there in one sentence with their synonyms).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ClassError

LISTS = ("voc", "coco", "mini")
MOST_CLASSES = 254
"""An 8-bit label has 256 values: 0 is background, 255 is void."""
_SPLITTING = ".?,;:[]"
"""Signs that end a phrase in a caption (Grounding-DINO: ``.``, ``?``, special tokens in brackets) or an entry of a list."""
_FILE = re.compile(r"[/\\]|\.(txt|json|names|csv|toml|ya?ml)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """The classes of a run; label i is ``names[i - 1]``, 0 is background.

    Raises:
        ClassError: no class, too many, a name twice, or a name that would split a caption.
    """

    names: tuple[str, ...]
    """As written into label stores; background is not among them."""
    prompts: tuple[tuple[str, ...], ...]
    """CLIP's wordings of each class, put into its templates; their embeddings are averaged."""
    phrases: tuple[tuple[str, ...], ...]
    """The detector's wordings of each class, clean: lower case, no signs that end a phrase."""
    negatives: tuple[str, ...] = ()
    """Further names that CLIP weighs against the classes, beside a model's own backgrounds."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ClassError("the class list is empty", hint='--classes voc, or --classes "dog, potted plant"')
        if len(self.names) > MOST_CLASSES:
            raise ClassError(f"{len(self.names)} classes, an 8-bit label map holds {MOST_CLASSES}", hint="split the list")
        if not len(self.names) == len(self.prompts) == len(self.phrases):
            counts = f"{len(self.names)} names, {len(self.prompts)} prompts, {len(self.phrases)} phrases"
            raise ClassError(f"each class needs its prompts and phrases, got {counts}")
        seen: dict[str, str] = {}
        for name, prompts, phrases in zip(self.names, self.prompts, self.phrases, strict=True):
            _check_name(name)
            if (key := cleaned(name)) in seen:
                raise ClassError(f"the class {name!r} stands twice in the list", hint=f"keep one of {seen[key]!r} and {name!r}")
            seen[key] = name
            if not prompts or not phrases or not all(prompts) or not all(phrases):
                raise ClassError(f"the class {name!r} has an empty prompt or phrase")
        for phrase in (phrase for phrases in self.phrases for phrase in phrases):
            if phrase != cleaned(phrase):
                raise ClassError(f"the detector phrase {phrase!r} is not clean", hint=f"write {cleaned(phrase)!r}")

    def __len__(self) -> int:
        return len(self.names)


def parse_classes(text: str) -> ClassList:
    """The class list that ``--classes`` means: a list's name, a file, or names separated by commas.

    Raises:
        ClassError: no such list or file, or a list that `ClassList` refuses. Says how to write it.
    """
    text = text.strip()
    if text.lower() in LISTS:
        return named_list(text.lower())
    if os.path.isfile(text):  # unlike Path.is_file, False for a list too long to be a name
        return _from_file(Path(text))
    if "," not in text:
        if _FILE.search(text):
            raise ClassError(f"--classes {text}: no such file", hint=f"give a file with one name a line, or {', '.join(LISTS)}")
        near = difflib.get_close_matches(text.lower().rstrip("0123456789-_"), LISTS, n=1, cutoff=0.8)
        if near:
            raise ClassError(
                f"--classes {text}: no such class list; did you mean {near[0]}?",
                hint=f'--classes {near[0]}; for a single class of that name: --classes "{text},"',
            )
    return class_list(part for part in text.split(","))


def class_list(entries: Iterable[str]) -> ClassList:
    """A list from entries as a text file has them: ``name``, ``name: synonym, synonym``, ``!negative``. Skips empty ones."""
    names: list[str] = []
    wordings: list[tuple[str, ...]] = []
    negatives: list[str] = []
    for entry in (entry.strip() for entry in entries):
        if entry[:1] in ("!", "-"):
            negatives.append(cleaned(entry[1:]))
        elif entry:
            name, _, synonyms = entry.partition(":")
            names.append(_spaced(name))
            wordings.append(_wordings([name, *synonyms.split(",")]))
    for name in names:
        _check_name(name)
    prompts = tuple(wordings)
    return ClassList(names=tuple(names), prompts=prompts, phrases=prompts, negatives=_distinct(negatives))


def named_list(name: str) -> ClassList:
    """A built-in list: ``voc`` (20 classes), ``coco`` (80) or ``mini`` (the 12 of the drawn scenes)."""
    if name == "mini":
        from .mini.scenes import CLASSES

        return class_list(CLASSES)
    table = {"voc": _VOC, "coco": _COCO}[name]
    names, prompts, phrases = zip(*(_columns(row) for row in table.strip().splitlines()), strict=True)
    return ClassList(names=names, prompts=tuple((each,) for each in prompts), phrases=tuple((each,) for each in phrases))


def backgrounds_for(classes: ClassList, names: tuple[str, ...]) -> tuple[str, ...]:
    """The background names that do not stand for a class of the run.

    A name collides when it equals a wording of a class or is its last word, plural or not: ``sign`` goes when ``stop
    sign`` is a class, ``house`` stays beside ``house cat``. With COCO's classes this leaves the list that CLIP-ES uses there.
    """
    wordings = [each for group in ((classes.names,), classes.prompts, classes.phrases) for words in group for each in words]
    heads = {_singular(part.split()[-1]) for each in wordings for part in cleaned(each, keep=",").split(",") if part.split()}
    whole = {_singular(cleaned(each)) for each in wordings}
    return tuple(name for name in names if _singular(cleaned(name)) not in whole | heads)


def cleaned(text: str, *, keep: str = "") -> str:
    """A name as models are told it: NFC, lower case, single spaces, without signs that end a phrase."""
    for sign in set(_SPLITTING) - set(keep):
        text = text.replace(sign, " ")
    return _spaced(text.replace("_", " ")).lower()


def palette() -> npt.NDArray[np.uint8]:
    """VOC's colour map: (256, 3) uint8 RGB; 0 is black, 255 (void) is (224, 224, 192).

    Source: VOC 2012 devkit, VOClabelcolormap.m: the bits of a label are dealt to red, green and blue, highest first.
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    for label in range(256):
        for bit in range(8):
            colours[label, bit % 3] |= (label >> bit & 1) << (7 - bit // 3)
    return colours


def _from_file(path: Path) -> ClassList:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return _from_json(json.loads(text, object_pairs_hook=_without_doubles))
        return class_list(line.partition("#")[0] for line in text.splitlines())
    except ClassError as error:
        raise ClassError(f"--classes {path}: {error.message}", hint=error.hint) from None
    except (OSError, ValueError) as error:
        raise ClassError(f"--classes {path}: expected names, one a line, or JSON: {error}") from None


def _from_json(told: Any) -> ClassList:
    if isinstance(told, list):
        told = _without_doubles([(name, None) for name in _strings(told, "the list")])
    if not isinstance(told, dict):
        raise ClassError(f"expected a JSON list or object, got {type(told).__name__}")
    names, prompts, phrases = [], [], []
    for name, about in told.items():
        if name == "negatives":
            continue
        both = about if isinstance(about, list) else [name]
        fields = about if isinstance(about, dict) else {}
        if not isinstance(about, dict | list | None) or fields.keys() - {"prompts", "phrases"}:
            raise ClassError(f'{name!r}: expected {{"prompts": [...], "phrases": [...]}}, got {json.dumps(about)[:60]}')
        names.append(_spaced(name))
        prompts.append(_distinct(map(_spaced, _strings(fields.get("prompts", both), name))))
        phrases.append(_wordings(_strings(fields.get("phrases", both), name)))
    negatives = _wordings(_strings(told.get("negatives", []), "negatives"))
    return ClassList(names=tuple(names), prompts=tuple(prompts), phrases=tuple(phrases), negatives=negatives)


def _strings(told: Any, where: str) -> list[str]:
    if not isinstance(told, list) or not all(isinstance(each, str) for each in told):
        raise ClassError(f"{where}: expected a list of strings, got {json.dumps(told)[:60]}")
    return told


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for number, (name, _) in enumerate(pairs):
        if any(name == earlier for earlier, _ in pairs[:number]):
            raise ClassError(f"the class {name!r} stands twice in the list", hint="keep one of them")
    return dict(pairs)


def _check_name(name: str) -> None:
    signs = [sign for sign in _SPLITTING if sign in name]
    if signs:
        raise ClassError(
            f"the class name {name!r} has {' '.join(signs)} in it, which would split the detector's caption",
            hint=f"write {_spaced(name.translate(str.maketrans(_SPLITTING, ' ' * len(_SPLITTING))))!r}",
        )
    if not cleaned(name):
        raise ClassError("a class has no name", hint="remove the empty entry")
    if cleaned(name) == "background":
        raise ClassError(f"{name!r} is label 0 of every list already", hint="remove it from the list")


def _wordings(told: Iterable[str]) -> tuple[str, ...]:
    return _distinct(cleaned(each) for each in told)


def _distinct(told: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each for each in told if each))


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _singular(name: str) -> str:
    return name[:-1] if name.endswith("s") and not name.endswith("ss") and len(name) > 3 else name


def _columns(row: str) -> tuple[str, str, str]:
    """name, CLIP prompt and detector phrase of a table's row; a missing column is the name."""
    name, prompt, phrase = (*(part.strip() for part in row.split("|")), "", "")[:3]
    return name, prompt or name, phrase or name


# name | CLIP prompt | detector phrase; an empty column means the name.
_VOC = """
aeroplane
bicycle
bird | bird avian
boat
bottle
bus
car
cat
chair | chair seat
cow
diningtable | | dining table
dog
horse
motorbike
person | person with clothes,people,human
pottedplant | | potted plant
sheep
sofa
train
tvmonitor | tvmonitor screen | tv monitor
"""

# CLIP-ES's "sknowboard" is spelled right here.
_COCO = """
person | person with clothes,people,human
bicycle
car
motorcycle | motorbike
airplane | aeroplane
bus
train
truck
boat
traffic light
fire hydrant
stop sign
parking meter
bench
bird | bird avian
cat
dog
horse
sheep
cow
elephant
bear
zebra
giraffe
backpack | backpack,bag
umbrella | umbrella,parasol
handbag | handbag,purse
tie | necktie
suitcase
frisbee
skis
snowboard
sports ball
kite
baseball bat
baseball glove | glove
skateboard
surfboard
tennis racket
bottle
wine glass
cup
fork
knife
spoon | dessertspoon
bowl
banana
apple
sandwich
orange
broccoli
carrot
hot dog
pizza
donut
cake
chair | chair seat
couch | sofa
potted plant | pottedplant
bed
dining table | diningtable
toilet
tv | tvmonitor screen
laptop
mouse
remote | remote control
keyboard
cell phone
microwave
oven
toaster
sink
refrigerator
book
clock
vase
scissors
teddy bear
hair drier | hairdrier,blowdrier
toothbrush
"""
