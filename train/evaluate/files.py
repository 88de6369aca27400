"""Find the label maps of two folders, pair them by name, and read them as indices."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ...errors import StoreError, WsssError
from ...photographs import MAX_PIXELS, SUFFIXES
from ...reading.documents import read_bytes, read_text
from ...store.local import read_records, read_run

VOC_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
"""Sub-folders for label maps in VOC's layout; the first one that exists is used."""


@dataclass(frozen=True, kw_only=True)
class LabelMaps:
    """The label maps of a folder by name: the path below the folder, with forward slashes, without ``.png``."""

    folder: Path
    """The folder as given."""
    inside: Path
    """The folder that the names are below: ``folder``, or ``labels/`` of a store, or ``SegmentationClass/``."""
    paths: Mapping[str, Path]
    classes: tuple[str, ...] | None = None
    """Names of labels 1, 2, ... if the folder is a label store."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of a label store: scores of the classes found in each image."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Of a label store: the path of each label map's photograph."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of true and predicted label maps."""

    names: tuple[str, ...]
    """Names of the true label maps, in the order of the list, or sorted."""
    truth: tuple[Path, ...]
    predicted: tuple[Path | None, ...]
    """None if the prediction is missing."""
    matched: tuple[str | None, ...]
    """Names of the predictions, which may include the suffix of their photograph."""
    missing: tuple[str, ...]
    unused: int
    """Number of predictions without a true label map, or not in the list."""
    warnings: tuple[str, ...] = ()
    """Possible mistakes in the comparison."""


@dataclass(frozen=True, kw_only=True)
class IndexedMap:
    """The content of a label map's file."""

    labels: np.ndarray
    """(H, W) uint8."""
    colors: np.ndarray | None
    """(N, 3) uint8 RGB of labels 0 to N - 1; None for a gray PNG."""
    bits: int
    """Bits per pixel."""


def find_label_maps(folder: Path) -> LabelMaps:
    """Find the label maps of a label store, of a folder in VOC's layout, or of a plain folder with sub-folders.

    Raises:
        StoreError: no such folder, no PNG in it, or two files with the same name.
    """
    if not folder.is_dir():
        raise StoreError(
            f"{folder}: expected a folder of label maps, found {'a file' if folder.exists() else 'nothing'}",
            hint="give a label store, a folder of PNG files, or one in VOC's layout",
        )
    if (folder / "run.json").is_file():
        return _of_store(folder)
    inside = next((folder / name for name in VOC_FOLDERS if (folder / name).is_dir()), folder)
    paths: dict[str, Path] = {}
    try:
        for name, path in sorted((_name(path.relative_to(inside)), path) for path in _walk(inside)):
            if name in paths:
                raise StoreError(f"{path}: has the name of {paths[name]}", hint="keep one of them")
            paths[name] = path
    except OSError as error:
        raise StoreError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if not paths:
        others = sum(path.suffix.lower() in SUFFIXES for path in inside.rglob("*"))
        raise StoreError(
            f"{inside}: no label map in it",
            hint=f"its {others} images are not PNG: other formats change labels, save the label maps as PNG"
            if others
            else "label maps are PNG files, also in sub-folders",
        )
    return LabelMaps(folder=folder, inside=inside, paths=paths)


def pair_up(predicted: LabelMaps, truth: LabelMaps, list_file: Path | None = None) -> Pairs:
    """Pair label maps by name, or by photograph: ``x.jpg.png`` and ``x.png``, and in a label store by its manifest.

    Args:
        list_file: a list of names, see `read_list`; default: every true label map.

    Raises:
        StoreError: there is no common name, or a name has two partners. WsssError: a list that does not fit the truth.
    """
    names = read_list(list_file, truth) if list_file else tuple(truth.paths)
    known: dict[str, set[str]] = {}
    for name in predicted.paths:
        for alias in _aliases(predicted, name):
            known.setdefault(alias, set()).add(name)
    matched = tuple(_partner(name, known, predicted, truth) for name in names)
    partners: dict[str, str] = {}
    for name, partner in zip(names, matched, strict=True):
        if partner is not None and partners.setdefault(partner, name) != name:
            raise StoreError(
                f"{predicted.paths[partner]}: matches both {partners[partner]}.png and {name}.png of {truth.inside}",
                hint="use the same names on both sides",
            )
    missing = tuple(name for name, partner in zip(names, matched, strict=True) if partner is None)
    if len(missing) == len(names):
        raise StoreError(
            f"no common names: {predicted.inside} has {next(iter(predicted.paths))}.png, "
            f"{list_file or truth.inside} has {names[0]}.png",
            hint="label maps are matched by their path below the folder; give the folders at which the common part starts",
        )
    warnings = []
    if predicted.inside.resolve() == truth.inside.resolve():
        warnings.append(f"{predicted.inside} is compared with itself")
    if list_file and (negative := sum(line.split()[1:] == ["-1"] for _, line in list_lines(list_file, "--list"))):
        warnings.append(
            f"--list {list_file}: {negative} of its {len(names)} lines end in -1, as VOC's lists of one class mark images "
            "without it; they are scored too"
        )
    return Pairs(
        names=names,
        truth=tuple(truth.paths[name] for name in names),
        predicted=tuple(None if partner is None else predicted.paths[partner] for partner in matched),
        matched=matched,
        missing=missing,
        unused=len(predicted.paths.keys() - set(matched)),
        warnings=tuple(warnings),
    )


def _aliases(maps: LabelMaps, name: str) -> set[str]:
    """Possible names of a label map's partner: its own name or its photograph's, with and without the image suffix."""
    image = maps.images.get(name, name)
    return {name, plain_name(name), image, plain_name(image)}


def _partner(name: str, known: Mapping[str, set[str]], predicted: LabelMaps, truth: LabelMaps) -> str | None:
    if not predicted.images and name in predicted.paths:
        return name
    found = known.get(name, set()) or {other for alias in _aliases(truth, name) for other in known.get(alias, ())}
    if len(found) > 1:
        raise StoreError(
            f"{truth.paths[name]}: several predictions match: {', '.join(f'{other}.png' for other in sorted(found))}",
            hint="name the true label map after the full name of its photograph, as x.jpg.png",
        )
    return next(iter(found), None)


def read_list(path: Path, truth: LabelMaps, flag: str = "--list") -> tuple[str, ...]:
    """Read the names of a list file, one per line. ``flag`` is named in messages.

    Common formats are supported: ``2007_000032``; ``COCO_train2014_000000000009 45 49 50`` (the classes are ignored);
    ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png``.

    Raises:
        WsssError: unreadable, empty, a duplicate name, or names without a true label map.
    """
    names: dict[str, int] = {}
    unknown: list[str] = []
    for number, line in list_lines(path, flag):
        name = next((candidate for candidate in possible_names(line) if candidate in truth.paths), None)
        if name is None:
            unknown.append(line)
        elif name in names:
            raise WsssError(f"{flag} {path}: {name} is in line {names[name]} and in line {number}", hint="remove one of them")
        else:
            names[name] = number
    if unknown:
        others = [folder for name in VOC_FOLDERS if (folder := truth.folder / name).is_dir() and folder != truth.inside]
        raise WsssError(
            f"{flag} {path}: {truth.inside} has no label map of {len(unknown)} of {len(unknown) + len(names)} names, "
            f"for example {unknown[0][:100]}",
            hint=f"try {others[0]}" if others else "give the list that belongs to these label maps",
        )
    return tuple(names)


def list_lines(path: Path, flag: str) -> list[tuple[int, str]]:
    """Non-empty lines of a list file with their numbers. Raises WsssError, naming the flag, if it is unreadable or empty."""
    hint = "give a text file with one name per line"
    lines = read_text(path, where=f"{flag} {path}", hint=hint).splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise WsssError(f"{flag} {path}: is empty", hint=hint)
    return numbered


def possible_names(line: str) -> Iterator[str]:
    """Possible label map names in a line of a list, most literal first."""
    for text in (line, line.split()[0], line.split()[0].replace("\\", "/")):
        text = unicodedata.normalize("NFC", text.strip("/"))
        yield from (text, plain_name(text), PurePosixPath(plain_name(text)).name)


def plain_name(image: str) -> str:
    """An image's name without its image suffix."""
    return os.path.splitext(image)[0] if PurePosixPath(image).suffix.lower() in SUFFIXES else image


def read_label_map(path: Path) -> np.ndarray:
    """Read a label map (H, W) uint8 from a PNG with one channel. Raises StoreError as `read_indexed` does."""
    return read_indexed(path).labels


def read_indexed(path: Path) -> IndexedMap:
    """Read a label map from a PNG with one channel: its palette indices or gray values are the labels.

    Raises:
        StoreError: not a regular file, not a PNG, damaged, colors instead of indices, a label above 255, or too large.
    """
    data = read_bytes(path, error=StoreError, hint="write the file again")
    try:
        width, height, depth, color = _header(data)
        if color not in (0, 3):  # gray, palette
            kind = {2: "RGB", 4: "LA", 6: "RGBA"}.get(color, str(color))
            raise StoreError(
                f"{path}: expected labels as indices (a palette or gray PNG), got mode {kind}",
                hint="save only the first channel, as a gray PNG"
                if color == 4
                else "colors are not labels: map them to indices first, or give the folder of index PNGs",
            )
        if width * height > MAX_PIXELS:
            raise StoreError(
                f"{path}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}",
                hint="give label maps of the photographs' size",
            )
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = np.array(image)  # writable, as torch wants it
            palette = image.getpalette("RGB") if color == 3 else None
    except StoreError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StoreError(f"{path}: not a readable PNG: {error or type(error).__name__}", hint="write the file again") from None
    if color == 0 and depth < 8:  # Pillow stretches these to 0..255 (1 bit: to bool), which changes the labels
        pixels = pixels.astype(np.uint8) if depth == 1 else pixels // np.uint8(255 // (2**depth - 1))
    elif pixels.dtype != np.uint8 and pixels.size and pixels.max() > 255:
        raise StoreError(
            f"{path}: expected labels of 0 to 255, got {pixels.max()} in a 16-bit PNG",
            hint="write void as 255, and classes instead of instances",
        )
    colors = None if palette is None else np.array(palette, np.uint8).reshape(-1, 3)
    return IndexedMap(labels=pixels.astype(np.uint8, copy=False), colors=colors, bits=depth)


def _of_store(folder: Path) -> LabelMaps:
    classes = read_run(folder)["classes"]
    paths: dict[str, Path] = {}
    scores: dict[str, dict[str, float]] = {}
    images: dict[str, str] = {}
    boxed = False
    for record in read_records(folder):  # an image without a line is unfinished; a failed one has no label map
        path = folder / "labels" / record["label"]
        if "error" not in record and path.is_file():
            name = _name(Path(record["label"]))
            if (found := record.get("classes")) is None or found.keys() - set(classes):
                raise StoreError(
                    f"{folder / 'manifest.jsonl'}: damaged: {name} has classes that are not in run.json, or no scores"
                )
            paths[name], scores[name] = path, found
            images[name] = unicodedata.normalize("NFC", record["path"])
            boxed = boxed or bool(record.get("boxes"))
    if not paths:
        raise StoreError(f"{folder}: a label store without a finished image", hint="wsss label continues it")
    if boxed and not any(scores.values()):
        scores = {}  # of `wsss label --boxes`, which tags nothing
    return LabelMaps(folder=folder, inside=folder / "labels", paths=paths, classes=tuple(classes), scores=scores, images=images)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.name.lower().endswith(".png") and entry.is_file():  # reading a pipe would never end
            yield Path(entry.path)


def _name(path: Path) -> str:
    return unicodedata.normalize("NFC", path.as_posix()[: -len(".png")])


def _header(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, bit depth and color type of a complete PNG (IHDR; PNG specification, section 11.2.2)."""
    if len(data) < 26 or data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG header")
    if b"IEND\xaeB`\x82" not in data[-1024:]:  # Pillow accepts a file without its end; some writers append text
        raise ValueError("it is cut off")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), data[24], data[25]
