"""Read class lists from the files of common tools.

Supported are lists with one name per line; numbered lines; WordNet lines; CSV with or without a header; CVAT's
``labelmap.txt``; TensorFlow's ``labelmap.pbtxt``; and JSON, YAML and TOML with a list of names, COCO's ``categories``,
Ultralytics' ``names``, ``id2label`` or ``label2id``. Formats are recognized by their content first. Structured formats are parsed
or refused, never read as lines.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from .errors import ClassError
from .reading import documents

MAX_JSON_BYTES = 1 << 26
"""COCO's instances_val2014.json has 158 MB, instances_val2017.json 20 MB. Parsed JSON takes about six times as much."""
MAX_LIST_BYTES = 1 << 24
MAX_YAML_BYTES = 1 << 18
"""PyYAML reads 0.2 MB per second."""
MAX_LINES = 5_000
"""Enough for 4,096 classes, comments and negative prompts."""
MAX_LINE = 10_000
"""Characters."""
FORMS = 'give one name per line, or JSON: ["dog", "cat"]'
_LIST_KEYS = ("names", "class_names", "classes", "categories", "id2label", "label2id", "labels")
_KEYS = "names|class_names|classes|categories|id2label|label2id|nc|num_classes"
"""The list keys and count keys that begin no line of a plain list."""
_COUNTS = ("nc", "num_classes")
_NAME_COLUMNS = ("name", "class_name", "classname", "display_name", "class", "label", "category", "names", "classes", "labels")
_NUMBER_COLUMNS = ("id", "index", "idx", "class_id", "label_id", "category_id", "value", "number")
_FILE = "the file"
_HEADERS = ("name", "names", "class", "classes", "class_name", "classname")
"""First lines of a plain list that are a column's header, not a class."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One class as listed in a file, not normalized or checked."""

    name: str
    synonyms: tuple[str, ...] = ()
    prompts: tuple[str, ...] | None = None
    """Wordings for CLIP if the file gives them; otherwise the name and its synonyms are used."""
    phrases: tuple[str, ...] | None = None
    """Wordings for the detector, likewise."""
    number: int | None = None
    """The label or index of the class in the file."""


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The entries of a class file, sorted by number if they have numbers."""

    classes: Sequence[Entry]
    negatives: Sequence[str] = ()


def read_class_file(path: Path) -> Entries:
    """Read the entries of a class file.

    Raises:
        ClassError: unreadable, too large, or of an unsupported format.
    """
    suffix = path.suffix.lower()
    limit = MAX_JSON_BYTES if suffix == ".json" else MAX_LIST_BYTES
    hint = "write the names to a text file, one per line"
    data = documents.read_bytes(path, where=_FILE, hint=hint, error=ClassError, max_bytes=limit)
    text = documents.decode_text(data, _FILE, error=ClassError)
    if suffix == ".json":
        return entries_from_data(documents.parse_json(text, _FILE, hint=FORMS, error=ClassError))
    return entries_from_text(text, suffix)


def entries_from_data(data: Any) -> Entries:
    """The entries of a JSON, YAML or TOML document."""
    if not isinstance(data, dict):
        return Entries(classes=_names(data, _FILE))
    for key in _LIST_KEYS:
        held = data.get(key)
        if isinstance(held, list | str) or (isinstance(held, dict) and _is_numbered(held)):
            found = _names(held, key)
            for count in _COUNTS:
                if isinstance(stated := data.get(count), int) and stated != len(found):
                    raise ClassError(f"{count} is {stated}, {key} has {len(found)} entries", hint="correct the wrong one")
            if others := [other for other, entry in data.items() if other != key and _is_own_format(other, entry)]:
                raise ClassError(
                    f"is {key} the list of classes, or a class beside {excerpt(others[0])}?",
                    hint=f'as a class: {{"{key}": {{"prompts": ["{key}"]}}}}',
                )
            return Entries(classes=found)
        if key in data and (not held or not isinstance(held, dict)):
            raise ClassError(f"{key}: expected class names, got {excerpt(held)}", hint=f'{key}: ["dog", "cat"]')
    for count in _COUNTS:
        if isinstance(data.get(count), int):
            raise ClassError(f"expected names beside {count}, got none", hint='names: ["dog", "cat"]')
    return Entries(classes=_names(data, _FILE)) if data and _is_numbered(data) else _from_own_format(data)


def entries_from_text(text: str, suffix: str = "") -> Entries:
    """The entries of a text file; ``suffix`` decides where the content is ambiguous."""
    body = text.lstrip()
    if body.startswith("<"):
        raise ClassError(f"expected class names, got XML or HTML: {excerpt(body[:30])}", hint=FORMS)
    raw_lines = re.split(r"\r\n|\r|\n", text)
    if len(raw_lines) > MAX_LINES:
        raise ClassError(f"expected at most {MAX_LINES:,} lines, got {len(raw_lines):,}", hint="a list has at most 4,096 classes")
    long = next((line for line in raw_lines if len(line) > MAX_LINE), "")
    if long and body[:1] not in ("[", "{"):
        raise ClassError(f"expected lines of at most {MAX_LINE:,} characters, got {len(long):,}: {excerpt(long, 30)}", hint=FORMS)
    lines = [line for raw in raw_lines if (line := re.sub(r"(^|\s)#.*", "", re.sub(" +", " ", raw)).strip(" \t"))]
    if suffix == ".toml" or any(re.match(rf"({_KEYS})\s*=", line) for line in lines):
        return entries_from_data(documents.parse_toml(text, _FILE, hint='classes = ["dog", "cat"]', error=ClassError))
    if suffix == ".pbtxt" or re.match(r"item\s*(:\s*)?\{", " ".join(lines[:2])):
        return Entries(classes=_from_pbtxt(text))
    listed = lines and all(re.match(r"-(\s|$)", line) for line in lines)
    keyed = any(re.match(rf"({_KEYS})\s*:(\s|$)", line) for line in lines)
    if suffix in (".yaml", ".yml") or body[:1] in ("[", "{") or listed or keyed:
        return entries_from_data(_parse_yaml(text))
    if not lines:
        return Entries(classes=())
    if suffix in (".csv", ".tsv") or all(re.fullmatch(r'"[^"]*",?', line) for line in lines):
        return Entries(classes=_from_csv([line for line in raw_lines if line.strip() and line.lstrip()[0] != "#"]))
    return _from_lines(lines)


def entries_from_list(lines: Sequence[str]) -> Entries:
    """The entries of a list in our own format: ``name``, ``name: synonym, synonym``, ``!negative``. Skips empty lines."""
    classes, negatives = [], []
    for line in (raw.strip(" \t\r\n") for raw in lines):
        if line[:1] in ("!", "-"):
            negatives.append(line[1:])
        elif line:
            name, _, synonyms = line.partition(":")
            classes.append(Entry(name=name, synonyms=tuple(text for text in synonyms.split(",") if text.strip(" \t"))))
    return Entries(classes=classes, negatives=negatives)


def excerpt(value: object, length: int = 60) -> str:
    """A value, shortened for a message."""
    if isinstance(value, str):
        return repr(value) if len(value) <= length else f"{value[:length]!r}..."
    return documents.short(value)


# ---- lines ----


def _from_lines(lines: list[str]) -> Entries:
    if all(re.match(r"[*+•]\s", line) for line in lines):
        lines = [line[2:] for line in lines]
    if lines[0].lower() in _HEADERS:
        raise ClassError(f"the first line, {lines[0]!r}, is a column header", hint="remove it, or name the file .csv")
    if all(re.fullmatch(r"[^:]+:\d+,\d+,\d+:[^:]*:[^:]*", line) for line in lines):  # CVAT: label:color_rgb:parts:actions
        cells = [line.split(":") for line in lines]
        return Entries(classes=[Entry(name=name, number=0 if rgb == "0,0,0" else None) for name, rgb, *_ in cells])
    if all(re.fullmatch(r"n\d{8}\s.+", line) for line in lines):  # WordNet: n01440764 tench, Tinca tinca
        names = [[name.strip() for name in line[9:].split(",")] for line in lines]
        return Entries(classes=[Entry(name=first, synonyms=tuple(others)) for first, *others in names])
    if all(re.search(r"\D([\s,]\s?\d{1,3}){3}$", line) for line in lines):
        raise ClassError(f"expected names, got names and colors: {lines[0]!r}", hint="keep only the names, one per line")
    if numbered := _numbered(lines):
        return Entries(classes=numbered)
    for line in lines:
        if "#" in line[:-1].lstrip("#"):
            raise ClassError(f"{excerpt(line)}: is # part of the name or a comment?", hint="a comment has a space before its #")
        name = line.partition(":")[0]
        if "," in name and line[0] not in "!-":
            first, *others = (part.strip() for part in name.split(","))
            raise ClassError(
                f"{excerpt(line)}: expected one class per line",
                hint=f"for synonyms: {first[:60]}: {', '.join(filter(None, others))[:60]}; classes go on lines of their own",
            )
    return entries_from_list(lines)


def _numbered(lines: list[str]) -> list[Entry] | None:
    """Entries of lines like ``0 dog``, ``0: dog`` or ``dog 0``, in ascending order; None if the lines are plain names."""
    before = [re.fullmatch(r"(-?\d{1,6})(\s*[:,=\t]\s*|[.)]\s+|\s+)(.+)", line) for line in lines]
    if all(before):
        found = [(int(match[1]), match[3]) for match in before if match]
        if found[0][0] > 1 or any(low >= high for (low, _), (high, _) in pairwise(found)):
            raise ClassError(
                f"expected line numbers that ascend from 0 or 1: {excerpt(lines[0])}",
                hint='number the lines in order, or give names that start with numbers as JSON: ["4 wheeler"]',
            )
        return [Entry(name=name, number=number) for number, name in found]
    marked = [line for line, match in zip(lines, before, strict=True) if match and match[2].strip(" ")]
    counted = [line for row, line in enumerate(lines) if (match := before[row]) and int(match[1]) - row in (0, 1)]
    if marked or len(counted) > 1:
        raise ClassError(
            f"some lines are numbered and some are not: {excerpt((marked or counted)[0])}", hint="number all, or none"
        )
    after = [re.search(r"[\s:,=](\d{1,6})$", line) for line in lines]
    if len(lines) > 1 and all(after):
        ends = [
            (line[: match.start()].rstrip(" \t:,="), int(match[1])) for line, match in zip(lines, after, strict=True) if match
        ]
        is_count = [number - ends[0][1] for _, number in ends] == list(range(len(ends))) and ends[0][1] in (0, 1)
        if is_count and len({name for name, _ in ends}) == len(ends):
            return [Entry(name=name, number=number) for name, number in ends]
    return None


def _from_csv(lines: list[str]) -> list[Entry]:
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    try:
        rows = [
            [cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        ]
    except csv.Error as problem:
        raise ClassError(f"expected CSV: {problem}", hint=FORMS) from None
    rows = [[*row[:-1]] if len(row) > 1 and not row[-1] else row for row in rows if any(row)]  # trailing commas
    if not rows:
        return []
    head = [re.sub(r"[\s-]+", "_", cell.lower()) for cell in rows[0]]
    name = next((head.index(key) for key in _NAME_COLUMNS if key in head), None)
    number = next((head.index(key) for key in _NUMBER_COLUMNS if key in head), None)
    width = len(rows[0])
    if any(len(row) != width for row in rows):
        raise ClassError(f"expected {width} columns in every row of the CSV file", hint="quote names that contain commas")
    if name is not None:
        rows = rows[1:]
    elif width == 1:
        name, number = 0, None
    elif width == 2 and number is None and (all(_is_number(a) for a, _ in rows) != all(_is_number(b) for _, b in rows)):
        number = 0 if _is_number(rows[0][0]) else 1
        name = 1 - number
    elif len(rows) == 1:
        return [Entry(name=cell) for cell in rows[0]]
    else:
        raise ClassError(f"which column has the names? The first row is {excerpt(rows[0])}", hint="add a header: id,name")
    found = []
    for row in rows:
        if number is not None and not _is_number(row[number]):
            raise ClassError(f"expected a number in column {number + 1}, got {excerpt(row[number])}", hint="a row is: 1,dog")
        found.append(Entry(name=row[name], number=None if number is None else int(row[number])))
    return _in_order(found)


def _from_pbtxt(text: str) -> list[Entry]:
    """The entries of a TensorFlow label map: ``item { id: 1 name: 'dog' }``; ``display_name`` is preferred."""
    text = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    item = re.compile(r"item\s*(?::\s*)?\{([^{}]*)\}\s*,?")
    if rest := item.sub("", text).strip():
        raise ClassError(f"expected a label map of items, got {excerpt(rest)}", hint="item { id: 1 name: 'dog' }")
    found = []
    for body in item.findall(text):
        fields = dict(re.findall(r"(\w+)\s*:\s*(\"[^\"]*\"|'[^']*'|-?\d{1,9}\b)", body))
        name = fields.get("display_name") or fields.get("name") or ""
        if name[:1] not in ("'", '"') or not _is_number(fields.get("id", "")):
            raise ClassError(f"expected an item with id and name, got {excerpt(body.strip())}", hint="item { id: 1 name: 'dog' }")
        found.append(Entry(name=name[1:-1], number=int(fields["id"])))
    return _in_order(found)


# ---- documents ----


def _names(held: Any, where: str) -> list[Entry]:
    if isinstance(held, str) and where != _FILE:
        return [Entry(name=name) for name in held.split(",") if name.strip()]
    if isinstance(held, dict):
        pairs = held.items() if all(_is_number(key) for key in held) else [(number, name) for name, number in held.items()]
        return _in_order([Entry(name=_text(name, where), number=int(number)) for number, name in pairs])
    if not isinstance(held, list):
        raise ClassError(f"{where}: expected class names, got {excerpt(held)}", hint=FORMS)
    if not any(isinstance(item, dict) for item in held):
        return [Entry(name=_text(item, where)) for item in held]
    found = []
    for item in held:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise ClassError(f"{where}: expected entries with a name, got {excerpt(item)}", hint='{"id": 1, "name": "dog"}')
        number = item.get("id")
        found.append(Entry(name=item["name"], number=number if isinstance(number, int) else None))
    return _in_order(found)


def _from_own_format(data: dict[Any, Any]) -> Entries:
    """``{"dog": {"prompts": [...], "phrases": [...]}, "cat": ["cat", "kitten"], "bird": {}, "negatives": [...]}``."""
    classes = []
    for key, about in data.items():
        name = _text(key, _FILE)
        if name == "negatives":
            continue
        if not isinstance(about, dict | list | None) or (isinstance(about, dict) and about.keys() - {"prompts", "phrases"}):
            raise ClassError(
                f'{excerpt(name)}: expected {{"prompts": [...], "phrases": [...]}}, got {excerpt(about)}',
                hint=f"a file of another tool? Then {FORMS}",
            )
        both = about if isinstance(about, list) else None
        fields = about if isinstance(about, dict) else {}
        prompts, phrases = fields.get("prompts", both), fields.get("phrases", both)
        classes.append(
            Entry(
                name=name,
                prompts=None if prompts is None else _texts(prompts, name),
                phrases=None if phrases is None else _texts(phrases, name),
            )
        )
    return Entries(classes=classes, negatives=_texts(data.get("negatives", []), "negatives"))


def _in_order(entries: list[Entry]) -> list[Entry]:
    """Sort by number; entries without numbers keep their order."""
    numbers = [entry.number for entry in entries if entry.number is not None]
    if not numbers:
        return entries
    if len(numbers) < len(entries):
        without = next(entry.name for entry in entries if entry.number is None)
        raise ClassError(f"{excerpt(without)} has no number, and other classes have one", hint="number all, or none")
    if len(set(numbers)) < len(numbers):
        twice = Counter(numbers).most_common(1)[0][0]
        one, other = [entry.name for entry in entries if entry.number == twice][:2]
        raise ClassError(f"{excerpt(one)} and {excerpt(other)} have the same number, {twice}", hint="give each its own number")
    return sorted(entries, key=lambda entry: entry.number or 0)


def _is_numbered(held: dict[Any, Any]) -> bool:
    """Whether the form is ``{"0": "dog"}`` or ``{"dog": 0}``."""
    if all(_is_number(key) for key in held):
        return not any(isinstance(name, dict | list | None) for name in held.values())
    return all(isinstance(number, int) and not isinstance(number, bool) for number in held.values())


def _is_own_format(key: object, entry: object) -> bool:
    """Whether an entry beside a list of classes is a class in our own format."""
    if isinstance(entry, dict) and not entry.keys() - {"prompts", "phrases"}:
        return bool(entry) or key not in ("info", "licenses", "flags")
    return key == "negatives"


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"-?[0-9]{1,9}", value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ClassError(f"{where}: expected a list of strings, got {excerpt(value)}", hint='quote it: "yes", "2"')
    return value


def _texts(values: object, where: str) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise ClassError(f"{excerpt(where)}: expected a list of strings, got {excerpt(values)}", hint='["dog", "puppy"]')
    return tuple(_text(value, excerpt(where)) for value in values)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without aliases, which let a small file expand to any size, and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ClassError("expected YAML without aliases (*name)", hint="write the names out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            twice = Counter(str(key.value) for key, _ in node.value).most_common(1)[0][0]
            raise ClassError(f"the key {excerpt(twice)} occurs twice", hint="keep one of them")
        return found


def _parse_yaml(text: str) -> Any:
    if len(text) > MAX_YAML_BYTES:
        raise ClassError(f"expected YAML of at most {MAX_YAML_BYTES:,} characters, got {len(text):,}", hint=FORMS)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as problem:
        raise ClassError(f"expected YAML: {' '.join(str(problem).split())[:200]}", hint=FORMS) from None
    except RecursionError:
        raise ClassError("expected YAML of a few levels, got a document nested too deeply", hint=FORMS) from None
    except (ValueError, TypeError, OverflowError) as problem:  # an invalid date, an unhashable key
        raise ClassError(f"expected YAML: {problem}", hint=FORMS) from None
