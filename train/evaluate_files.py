"""Finding the label maps of two folders, pairing them by name, and reading them as indices."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..errors import StoreError, WsssError
from ..labelstore import read_records, read_run
from ..photographs import MOST_PIXELS, SUFFIXES

VOC_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
"""Where a folder in VOC's layout keeps its label maps; the first that is there counts."""


@dataclass(frozen=True, kw_only=True)
class LabelMaps:
    """The label maps of one folder by name: the path below the folder, forward slashes, without ``.png``."""

    folder: Path
    """As given."""
    inside: Path
    """The folder that the names are below: ``folder``, or ``labels/`` of a store, or ``SegmentationClass/``."""
    paths: Mapping[str, Path]
    classes: tuple[str, ...] | None = None
    """Names of labels 1, 2, ... where the folder is a label store."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of a label store: the classes it found in each image, with their scores."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is compared with what."""

    names: tuple[str, ...]
    """Of the truth, in the order of the list, or sorted."""
    truth: tuple[Path, ...]
    predicted: tuple[Path | None, ...]
    """None where the prediction is missing."""
    missing: tuple[str, ...]
    unused: int
    """Predictions that no truth was asked for."""


def find_label_maps(folder: Path) -> LabelMaps:
    """The label maps of a label store, of a folder in VOC's layout, or of a plain folder with sub-folders.

    Raises:
        StoreError: no such folder, no PNG in it, or two files of one name.
    """
    if not folder.is_dir():
        raise StoreError(
            f"{folder}: expected a folder of label maps, found {'a file' if folder.exists() else 'nothing'}",
            hint="a label store, a folder of PNG files, or one in VOC's layout",
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
        raise StoreError(f"{inside}: no label map in it", hint="label maps are PNG files, also in sub-folders")
    return LabelMaps(folder=folder, inside=inside, paths=paths)


def pair_up(predicted: LabelMaps, truth: LabelMaps, wanted: Path | None = None) -> Pairs:
    """Pairs label maps of one name.

    Args:
        wanted: a list of names, see `read_list`; without it every label map of the truth is wanted.

    Raises:
        StoreError: nothing has a common name. WsssError: a list that does not fit the truth.
    """
    names = read_list(wanted, truth) if wanted else tuple(truth.paths)
    missing = tuple(name for name in names if name not in predicted.paths)
    if len(missing) == len(names):
        raise StoreError(
            f"no common names: {predicted.inside} has {next(iter(predicted.paths))}.png, "
            f"{wanted or truth.inside} asks for {names[0]}.png",
            hint="label maps are matched by their path below the folder; give the folders that the common part begins in",
        )
    return Pairs(
        names=names,
        truth=tuple(truth.paths[name] for name in names),
        predicted=tuple(predicted.paths.get(name) for name in names),
        missing=missing,
        unused=len(predicted.paths.keys() - set(names)),
    )


def read_list(path: Path, truth: LabelMaps) -> tuple[str, ...]:
    """The names a list file asks for, one a line.

    Read as the field writes them: ``2007_000032``; ``COCO_train2014_000000000009 45 49 50`` (the classes are passed over);
    ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png``.

    Raises:
        WsssError: unreadable, empty, a name twice, or names that the truth has no label map of.
    """
    names: dict[str, int] = {}
    unknown: list[str] = []
    for number, line in list_lines(path, "--list"):
        name = next((each for each in possible_names(line) if each in truth.paths), None)
        if name is None:
            unknown.append(line)
        elif name in names:
            raise WsssError(f"--list {path}: {name} stands in line {names[name]} and in line {number}", hint="remove one of them")
        else:
            names[name] = number
    if unknown:
        beside = [each for each in VOC_FOLDERS if (truth.folder / each).is_dir() and truth.folder / each != truth.inside]
        raise WsssError(
            f"--list {path}: {truth.inside} has no label map of {len(unknown)} of {len(unknown) + len(names)} names, "
            f"for example {unknown[0][:100]}",
            hint=f"{truth.folder / beside[0]} lies beside it" if beside else "give the list that belongs to TRUTH",
        )
    return tuple(names)


def list_lines(path: Path, flag: str) -> list[tuple[int, str]]:
    """Lines of a list file that are not empty, with their numbers. Raises WsssError naming the flag: unreadable or empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise WsssError(f"{flag} {path}: cannot be read: {reason}", hint="a text file with one name a line") from None
    told = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not told:
        raise WsssError(f"{flag} {path}: is empty", hint="a text file with one name a line")
    return told


def possible_names(line: str) -> Iterator[str]:
    """What a line of a list may mean, the most literal first."""
    for text in (line, line.split()[0]):
        text = text.strip("/")
        yield from (text, plain_name(text), PurePosixPath(plain_name(text)).name)


def plain_name(image: str) -> str:
    """An image's name without the suffix of a picture."""
    return os.path.splitext(image)[0] if PurePosixPath(image).suffix.lower() in SUFFIXES else image


def read_label_map(path: Path) -> np.ndarray:
    """A label map (H, W) uint8 from a PNG of one channel: its palette indices or grey values are the labels.

    Raises:
        StoreError: not a PNG, damaged, colours instead of indices, a label above 255, or too large.
    """
    try:
        data = path.read_bytes()
        depth, colour = _header(data)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if colour not in (0, 3):  # grey, palette
                raise StoreError(
                    f"{path}: expected labels as indices (a palette or grey PNG), got mode {image.mode}",
                    hint="colours are no labels: map them back to indices first, or give the folder of index PNGs",
                )
            if image.width * image.height > MOST_PIXELS:
                raise StoreError(f"{path}: {image.width} x {image.height} pixels, at most {MOST_PIXELS:,} are decoded")
            pixels = np.asarray(image)
    except StoreError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StoreError(f"{path}: not a readable PNG: {error or type(error).__name__}", hint="write the file again") from None
    if colour == 0 and depth < 8:  # Pillow stretches these to 0..255 (1 bit: to bool), which makes other labels of them
        return pixels.astype(np.uint8) if depth == 1 else pixels // np.uint8(255 // (2**depth - 1))
    if pixels.dtype != np.uint8 and pixels.size and pixels.max() > 255:
        raise StoreError(f"{path}: label {pixels.max()} in a 16-bit PNG; labels are 0 to 255")
    return pixels.astype(np.uint8, copy=False)


def _of_store(folder: Path) -> LabelMaps:
    told = read_run(folder).get("classes")
    if not isinstance(told, list) or not all(isinstance(each, str) for each in told):
        raise StoreError(f"{folder / 'run.json'}: damaged: expected the names of the classes")
    paths: dict[str, Path] = {}
    scores: dict[str, dict[str, float]] = {}
    for record in read_records(folder):  # only what has a line is finished; a failed image has no label map
        path = folder / "labels" / record["label"]
        if "error" not in record and path.is_file():
            name, found = _name(Path(record["label"])), record.get("classes")
            if (
                not isinstance(found, dict)
                or found.keys() - set(told)
                or not all(type(v) in (int, float) for v in found.values())
            ):
                raise StoreError(
                    f"{folder / 'manifest.jsonl'}: damaged: {name} has classes that are not in run.json, or no scores"
                )
            paths[name], scores[name] = path, found
    if not paths:
        raise StoreError(f"{folder}: a label store without a finished image", hint="wsss label continues it")
    return LabelMaps(folder=folder, inside=folder / "labels", paths=paths, classes=tuple(told), scores=scores)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.name.lower().endswith(".png") and entry.is_file():  # a pipe would never end
            yield Path(entry.path)


def _name(path: Path) -> str:
    return path.as_posix()[: -len(".png")]


def _header(data: bytes) -> tuple[int, int]:
    """Bit depth and colour type (IHDR; PNG specification, section 11.2.2) of a file with a beginning and an end."""
    if len(data) < 26 or data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG header")
    if b"IEND\xaeB`\x82" not in data[-1024:]:  # Pillow is content once it has all pixels; some writers append text
        raise ValueError("it is cut off")
    return data[24], data[25]
