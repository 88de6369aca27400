"""Class lists: names, prompts for CLIP, phrases for the detector, negative prompts, and colors.

A list is given by name (``voc``, ``coco``, ``mini``), as a file, or as names on the command line:

    dog
    person: people, human        # synonyms of the same class
    !statue                      # a negative prompt: it competes for probability but gets no label (also ``-statue``)

or as JSON: ``["dog", "cat"]``, or ``{"dog": {"prompts": ["dog", "puppy"], "phrases": ["dog"]}, "negatives": ["statue"]}``;
`wsss.class_files` reads these and the formats of other tools.
Sources of the built-in lists: VOC 2012 devkit, VOCinit.m; COCO 2014, instances_val2014.json; the CLIP prompts of both
from CLIP-ES (arXiv:2212.09506; github.com/linyq2117/CLIP-ES 78e0198, clip_text.py: ``new_class_names`` and
``new_class_names_coco``, there in one sentence with their synonyms). The detector's phrases of both are COCO's names, with which
Grounding-DINO's authors evaluate it (demo/test_ap_on_coco.py): ``airplane`` and ``couch``, also where VOC has ``aeroplane`` and
``sofa``. VOC annotates computer monitors as ``tvmonitor`` too, which COCO has as ``tv``.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .class_files import Entries, Entry, entries_from_list, excerpt, read_class_file
from .errors import ClassError

_log = logging.getLogger("wsss")

LISTS = ("voc", "coco", "mini")
_KNOWN_AS = {"voc": "pascal", "coco": "mscoco"}
"""What else the lists are called."""
MAX_CLASSES = 254
"""In a label map. An 8-bit label has 256 values; 0 is background and 255 is void."""
MAX_NAMES = 4096
"""In a class list, for labels and boxes alone."""
_STUFF = (
    "ceiling cloud clouds dirt earth field floor fog forest grass gravel ground hill lake land mountain mud ocean pavement",
    "railroad river road sand sea sidewalk sky snow soil street terrain vegetation wall water",
)
STUFF = frozenset(" ".join(_STUFF).split())
"""Regions without a shape, after the materials of COCO-Stuff (arXiv:1612.03716), ADE20K and Cityscapes."""
MINI_CLASSES = (
    "red disc",
    "green triangle",
    "blue ring",
    "yellow star",
    "purple hexagon",
    "orange crescent",
    "white cross",
    "pink arrow",
    "teal drop",
    "striped box",
    "checkered diamond",
    "dotted heart",
)
"""Classes of the drawn scenes that the embedded models are trained on."""
_SPLITTING = ".?,;:[]"
"""Characters that end a phrase in a caption (Grounding-DINO: ``.``, ``?``, special tokens in brackets) or an entry of a list."""
_FILE = re.compile(r"[/\\]|\.(txt|json|names|csv|tsv|toml|ya?ml|pbtxt)$", re.IGNORECASE)
MAX_LETTERS = 500
"""Characters of a name or wording: CLIP reads 77 tokens of about four characters."""
MAX_WORDINGS = 1_000
"""Wordings of a class, and negatives: CLIP encodes each of them in each template."""
_NO_CLASS = frozenset(
    ("background", "bg", "void", "ignore", "ignored", "ignore region", "unlabeled", "unlabelled", "dontcare", "don't care")
)
"""Names that data sets use for labels 0 and 255."""


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """The classes of a run: label i is ``names[i - 1]``, label 0 is background.

    Raises:
        ClassError: no class, too many, a duplicate name, or a name that would split a caption.
    """

    names: tuple[str, ...]
    """Names as written to label stores, without background."""
    prompts: tuple[tuple[str, ...], ...]
    """Wordings of each class for CLIP's templates; their embeddings are averaged."""
    phrases: tuple[tuple[str, ...], ...]
    """Wordings of each class for the detector: lower case, without characters that end a phrase."""
    negatives: tuple[str, ...] = ()
    """Names that compete with the classes: in CLIP, in addition to a model's own backgrounds, and for the detector's boxes."""
    where: str = field(default="--classes", compare=False)
    """What messages call the list: the flag, and the file that it names."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ClassError("the class list is empty", hint='--classes voc, or --classes "dog, potted plant"')
        _check_count(len(self.names))
        if not len(self.names) == len(self.prompts) == len(self.phrases):
            counts = f"{len(self.names)} names, {len(self.prompts)} prompts, {len(self.phrases)} phrases"
            raise ClassError(f"each class needs prompts and phrases, got {counts}")
        seen: dict[str, str] = {}
        for name, prompts, phrases in zip(self.names, self.prompts, self.phrases, strict=True):
            _check_name(name)
            if (key := cleaned(name)) in seen:
                raise ClassError(f"the class {name!r} occurs twice in the list", hint=f"keep one of {seen[key]!r} and {name!r}")
            seen[key] = name
            if not prompts or not phrases or not all(prompts) or not all(phrases):
                raise ClassError(f"the class {name!r} has an empty prompt or phrase", hint='{"dog": {"prompts": ["dog"]}}')
            _check_wordings(f"the class {name!r}", (*prompts, *phrases))
        _check_wordings("the list", self.negatives)
        for phrase in (phrase for phrases in self.phrases for phrase in phrases):
            if phrase != cleaned(phrase):
                raise ClassError(f"the detector phrase {excerpt(phrase)} is not clean", hint=f"write {excerpt(cleaned(phrase))}")
        for column in (self.phrases, self.prompts):
            owner: dict[str, str] = {}
            for name, wordings in zip(self.names, column, strict=True):
                for wording in map(cleaned, wordings):
                    if (other := owner.setdefault(wording, name)) != name:
                        raise ClassError(
                            f"the classes {other!r} and {name!r} share the wording {wording!r}: no model can tell them apart",
                            hint="keep it for one of them",
                        )
            for negative in self.negatives:
                if cleaned(negative) in owner:
                    raise ClassError(
                        f"{negative!r} is a negative and a wording of the class {owner[cleaned(negative)]!r}",
                        hint="keep one of them",
                    )

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        """The label, 1 to C, of a class name in any common spelling, or None. See `Names`."""
        return self._lookup.find(name)

    def nearest(self, name: str) -> str | None:
        """The class name most similar to ``name``, for a message, or None."""
        return self._lookup.nearest(name)

    @cached_property
    def _lookup(self) -> Names:
        return Names(self.names)


class Names:
    """Finds labels 1 to C by name, in any common spelling.

    Case, Unicode forms, underscores, spaces and punctuation are ignored. If no name matches, spaces and hyphens are ignored too:
    ``potted plant`` and ``potted-plant`` are VOC's ``pottedplant``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._exact = {name: label for label, name in reversed(list(enumerate(names, 1)))}
        self._cleaned = {cleaned(name): label for label, name in reversed(list(enumerate(names, 1)))}
        joined = [_joined(name) for name in names]
        self._joined = {name: label for label, name in enumerate(joined, 1) if joined.count(name) == 1}

    def find(self, name: str) -> int | None:
        """The label of ``name``, or None."""
        return self._exact.get(name) or self._cleaned.get(cleaned(name)) or self._joined.get(_joined(name))

    def nearest(self, name: str) -> str | None:
        """The name most similar to ``name``, or None."""
        near = difflib.get_close_matches(cleaned(name[:MAX_LETTERS]), self._cleaned, n=1)
        return self._names[self._cleaned[near[0]] - 1] if near else None


def parse_classes(text: str) -> ClassList:
    """Parse ``--classes``: the name of a list, a file, or names separated by commas.

    Entries that are accepted but may be unintended are logged as warnings on the logger ``wsss``.

    Raises:
        ClassError: no such list or file, or a list that `ClassList` refuses.
    """
    text = text.strip()
    if text.lower() in LISTS:
        return named_list(text.lower())
    # Unlike Path's methods, these are False for a list too long to be a file name.
    is_file = os.path.exists(text) and not os.path.isdir(text)
    where = f"--classes {text}" if is_file else "--classes"
    if not is_file and "," not in text:
        _refuse_misspelled(text)
    try:
        return _list_of(_without_background(read_class_file(Path(text)), where) if is_file else _typed(text), where)
    except ClassError as error:
        raise ClassError(f"{where}: {error.message.removeprefix('the file: ')}", hint=error.hint) from None


def _refuse_misspelled(text: str) -> None:
    """Raises ClassError where one name looks like a file that does not exist, or like a misspelled list."""
    if _FILE.search(text):
        raise ClassError(
            f"--classes {text[:200]}: no such file", hint=f"give a file with one name per line, or {', '.join(LISTS)}"
        )
    near = difflib.get_close_matches(text[:40].lower().rstrip("0123456789-_"), LISTS, n=1, cutoff=0.8)
    near = near or [named for named, known in _KNOWN_AS.items() if known in text[:40].lower()]
    if near:
        raise ClassError(
            f"--classes {text}: no such class list; did you mean {near[0]}?",
            hint=f'--classes {near[0]}; for a single class of that name: --classes "{text},"',
        )


def _typed(text: str) -> Entries:
    """The entries of names separated by commas. Raises ClassError for names of labels 0 and 255."""
    entries = entries_from_list(text.split(","))
    for entry in entries.classes:
        if _is_background(entry.name):
            raise ClassError(
                f"{entry.name.strip()!r} is not a class to look for: labels 0 (background) and 255 (void) are in every list",
                hint="remove it from the list",
            )
    return entries


def class_list(entries: Iterable[str]) -> ClassList:
    """A list from entries as in a text file: ``name``, ``name: synonym, synonym``, ``!negative``. Skips empty ones."""
    return _list_of(entries_from_list(tuple(entries)))


def named_list(name: str) -> ClassList:
    """A built-in list: ``voc`` (20 classes), ``coco`` (80) or ``mini`` (the 12 of the drawn scenes)."""
    if name == "mini":
        return class_list(MINI_CLASSES)
    table = {"voc": _VOC, "coco": _COCO}[name]
    names, prompts, phrases = zip(*(_columns(row) for row in table.strip().splitlines()), strict=True)
    return ClassList(names=names, prompts=tuple((prompt,) for prompt in prompts), phrases=tuple((phrase,) for phrase in phrases))


def backgrounds_for(classes: ClassList, names: tuple[str, ...]) -> tuple[str, ...]:
    """The background names that do not denote a class of the run.

    A name is removed if it equals a wording of a class or its last word, singular or plural: ``sign`` is removed if ``stop
    sign`` is a class, ``house`` stays beside ``house cat``. For COCO's classes this gives the list that CLIP-ES uses.
    """
    wordings = [wording for group in ((classes.names,), classes.prompts, classes.phrases) for words in group for wording in words]
    parts = [part.split() for wording in wordings for part in cleaned(wording, keep=",").split(",")]
    taken = {_singular(cleaned(wording)) for wording in wordings} | {_singular(words[-1]) for words in parts if words}
    return tuple(name for name in names if _singular(cleaned(name)) not in taken)


def cleaned(text: str, *, keep: str = "") -> str:
    """Normalize a name for the models: NFC, lower case, single spaces, without characters that end a phrase."""
    for character in set(_SPLITTING) - set(keep):
        text = text.replace(character, " ")
    return _spaced(text.replace("_", " ")).lower()


def palette() -> npt.NDArray[np.uint8]:
    """VOC's color map: (256, 3) uint8 RGB; 0 is black, 255 (void) is (224, 224, 192).

    Source: VOC 2012 devkit, VOClabelcolormap.m: the bits of a label go to red, green and blue in turn, to the highest bits first.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    for label in range(256):
        for bit in range(8):
            colors[label, bit % 3] |= (label >> bit & 1) << (7 - bit // 3)
    return colors


def _list_of(entries: Entries, where: str = "") -> ClassList:
    """Normalize and check raw entries; with ``where``, log a warning for likely mistakes."""
    _check_count(len(entries.classes))
    counts = [(len(entries.negatives), "negatives"), *((_count_wordings(entry), entry.name) for entry in entries.classes)]
    for count, name in counts:
        if count > MAX_WORDINGS:
            raise ClassError(f"{excerpt(name)}: expected at most {MAX_WORDINGS} wordings, got {count}", hint="keep the best ones")
    names, prompts, phrases = [], [], []
    for entry in entries.classes:
        both = _wordings((entry.name, *entry.synonyms))
        names.append(_checked(entry.name))
        _check_name(names[-1])
        prompts.append(both if entry.prompts is None else _distinct(map(_checked, entry.prompts)))
        phrases.append(both if entry.phrases is None else _wordings(entry.phrases))
    for negative in entries.negatives:
        if not cleaned(negative):
            raise ClassError(f"a negative prompt has no name: {excerpt(negative)}", hint="remove it, or write !statue")
    classes = ClassList(
        names=tuple(names),
        prompts=tuple(prompts),
        phrases=tuple(phrases),
        negatives=_wordings(entries.negatives),
        where=where or "--classes",
    )
    if where:
        if numbers := [name for name in classes.names if name.isdecimal()]:
            _log.warning(
                "%s: %s: the models look for these digits, not for classes of that number", where, ", ".join(numbers[:10])
            )
        singular: dict[str, str] = {}
        for name in classes.names:
            if (other := singular.setdefault(_singular(cleaned(name)), name)) != name:
                _log.warning(
                    "%s: %r and %r differ only by an s: the models hardly tell them apart, keep one of them", where, other, name
                )
    return classes


def _without_background(entries: Entries, where: str) -> Entries:
    """Remove the names of labels 0 and 255, which tools list among the classes; warn of them, and of numbers that change.

    Raises:
        ClassError: such a name is between classes, so that removing it would change all labels after it.
    """
    classes = list(entries.classes)
    if len(classes) > MAX_NAMES + len(_NO_CLASS):
        _check_count(len(classes))
    is_background = [_is_background(entry.name) for entry in classes]
    first = is_background.index(False) if False in is_background else len(classes)
    last = len(classes) - is_background[::-1].index(False) if False in is_background else 0
    for row, entry in enumerate(classes):
        at_an_end = row < first or row >= last if entry.number is None else entry.number in (-1, 0, 255) or row >= last
        if is_background[row] and not at_an_end and not (row < first and entry.number == 1):
            raise ClassError(
                f"{entry.name!r} is listed between classes but is not a class to look for; without it, later labels would change",
                hint="put it first, for label 0, or remove it",
            )
    kept = [entry for row, entry in enumerate(classes) if not is_background[row]]
    numbers = [entry.number for entry in kept]
    labels = f"labels are 1 {kept[0].name[:40]!r} to {len(kept)} {kept[-1].name[:40]!r}" if kept else ""
    if removed := [repr(entry.name) for row, entry in enumerate(classes) if is_background[row]]:
        _log.warning("%s: left out %s, which is not a class to look for; %s", where, ", ".join(removed), labels)
    elif None not in numbers and numbers not in (list(range(len(kept))), list(range(1, len(kept) + 1))):
        _log.warning("%s: the file's numbers, %s to %s, have gaps and are not kept: %s", where, numbers[0], numbers[-1], labels)
    elif numbers[:1] == [0]:
        _log.info("%s: %s; 0 is background", where, labels)
    return Entries(classes=kept, negatives=entries.negatives)


def _is_background(name: str) -> bool:
    return cleaned(name[:MAX_LETTERS]) in _NO_CLASS


def check_label_map(classes: ClassList) -> ClassList:
    """Return a list whose classes fit a label map.

    Raises:
        ClassError: there are more than `MAX_CLASSES`.
    """
    if (count := len(classes.names)) > MAX_CLASSES:
        raise ClassError(
            f"expected at most {MAX_CLASSES} classes in an 8-bit label map, got {count}",
            hint="split the list; wsss label --stage tag and --stage detect take longer ones",
        )
    return classes


def _check_count(count: int) -> None:
    if count > MAX_NAMES:
        raise ClassError(f"expected at most {MAX_NAMES:,} classes, got {count:,}", hint="split the list")


def _count_wordings(entry: Entry) -> int:
    return max(len(entry.synonyms), len(entry.prompts or ()), len(entry.phrases or ()))


def _check_name(name: str) -> None:
    _check_wordings("the list", (name,))
    splitting = [character for character in _SPLITTING if character in name]
    if splitting:
        raise ClassError(
            f"the class name {excerpt(name)} contains {' '.join(splitting)}, which would split the detector's caption",
            hint=f"write {excerpt(_spaced(name.translate(str.maketrans(_SPLITTING, ' ' * len(_SPLITTING)))))}",
        )
    if not cleaned(name):
        raise ClassError("a class has no name", hint="remove the empty entry")
    if "|" in name:
        raise ClassError(f"the class name {excerpt(name)} contains |", hint='separate classes by commas: "dog, cat"')
    if cleaned(name) == "background":
        raise ClassError(f"{name!r} is label 0 of every list", hint="remove it from the list")
    if re.fullmatch(r"n\d{8}|/[mg]/\w+", name):
        raise ClassError(f"{name!r} is an ID of WordNet or Open Images, which no model can read", hint="give the class's name")
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        raise ClassError(f"the class name {excerpt(name)} is in quotes", hint=f"write {excerpt(name[1:-1])}")


def _check_wordings(where: str, wordings: Iterable[str]) -> None:
    """Raises ClassError for control characters, lone surrogates, and names that are too long."""
    for wording in wordings:
        if len(wording) > MAX_LETTERS:
            raise ClassError(
                f"{where}: expected names of at most {MAX_LETTERS} characters, got {len(wording):,}: {excerpt(wording, 30)}",
                hint="give a short name",
            )
        if bad := next((character for character in wording if not _is_text(character)), None):
            raise ClassError(
                f"{where}: the name {excerpt(wording)} contains {bad!r} ({unicodedata.name(bad, 'a control character')})",
                hint="use letters, digits, punctuation and spaces; copied text may contain invisible characters",
            )


def _is_text(character: str) -> bool:
    """False for controls, line separators, surrogates, private use and U+FFFD; true for the joiners that scripts need."""
    if character in "\u200c\u200d\ufffd":
        return character != "\ufffd"
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def _checked(text: str) -> str:
    _check_wordings("the list", (text.strip(" "),))
    return _spaced(text)


def _wordings(texts: Iterable[str]) -> tuple[str, ...]:
    return _distinct(cleaned(_checked(text)) for text in texts)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, texts)))


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _joined(name: str) -> str:
    return cleaned(name).replace(" ", "").replace("-", "")


def _singular(name: str) -> str:
    return name[:-1] if name.endswith("s") and not name.endswith("ss") and len(name) > 3 else name


def _columns(row: str) -> tuple[str, str, str]:
    """Name, CLIP prompt and detector phrase in a row of a table; a missing column equals the name."""
    name, prompt, phrase = (*(part.strip() for part in row.split("|")), "", "")[:3]
    return name, prompt or name, phrase or name


# name | CLIP prompt | detector phrase; an empty column means the name.
_VOC = """
aeroplane | | airplane
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
motorbike | | motorcycle
person | person with clothes,people,human
pottedplant | | potted plant
sheep
sofa | | couch
train
tvmonitor | tvmonitor screen | tv
"""

# CLIP-ES spells snowboard "sknowboard".
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
