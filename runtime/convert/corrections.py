"""Reads masks that were corrected in an annotation tool, and puts them into a label store.

Reads what `wsss convert` has written and a tool has changed and exported again: COCO's instances (polygons or RLE), Label
Studio's JSON (brushes and polygons), and folders of VOC's or CVAT's segmentation masks. Objects that are as they were leave the
label map as it was, void included; those that were removed become background where no other object of their class is; those that
are new or changed are painted in the order of the file. The manifest line of a corrected image says so, and later runs keep its
label.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...batch import VOID
from ...errors import UsageError, WsssError
from ...photographs import MAX_PIXELS
from ...reading.documents import parse_json, read_bytes
from ...rle import MaskRuns
from ...store.local import LabelStore, Record, read_labeled_records, read_run
from .instances import instances_of
from .labeled import FIELDS, Labeled, original_path, read_labelled, void_name

MAX_BYTES = 1 << 32
"""Of a file of corrections."""
_HINT = "give COCO's instances, Label Studio's JSON export, or a folder with SegmentationClass/ and labelmap.txt"


@dataclass(frozen=True, slots=True)
class Correction:
    """An image of the file.

    name: as the tool calls it. objects: (label, mask) in the order of the file; the label 255 is void. label_map: instead of
    objects, (H, W) uint8. size: (height, width) of the image, if the file has it.
    """

    name: str
    objects: tuple[tuple[int, MaskRuns], ...] = ()
    label_map: np.ndarray | None = None
    size: tuple[int, int] | None = None


@dataclass(kw_only=True)
class Corrected:
    """What `correct_store` did."""

    corrected: int = 0
    unchanged: int = 0
    unknown: list[str] = field(default_factory=list)
    """Images of the file that the store does not have."""


def correct_store(store: Path, source: Path, *, progress: Callable[[int], None] = lambda images: None) -> Corrected:
    """Replace the labels of images that differ in ``source``; the others keep theirs.

    Raises:
        WsssError: ``source`` cannot be read, names a class that the store lacks, or has a mask of another size. StoreError: the
            store cannot be read or written, or is in use. UsageError: the store has none of the images.
    """
    classes = tuple(read_run(store)["classes"])
    found = Corrected()
    corrections: dict[str, Correction] = {}
    for each in read_corrections(source, classes):
        if each.name in corrections:
            raise WsssError(f"{source}: has {each.name!r} twice", hint="export each image once")
        corrections[each.name] = each
    if not corrections:
        raise UsageError(
            f"{source}: has no image with an annotation", hint="in Label Studio, submit the tasks, then export them as JSON"
        )
    names = _Names(corrections)
    with LabelStore.reopen(store) as target, target.replacing_labels() as replace:
        # The photographs are not read, hence any folder.
        for item, record in zip(read_labelled(store, store), read_labeled_records(store, FIELDS), strict=True):
            correction = names.take(item.path)
            if correction is None:
                continue
            if (edited := _edited(item, record, correction, classes, f"{source}: {correction.name}")) is None:
                found.unchanged += 1
            else:
                line, label_map, masks = edited
                replace({**line, "corrected": source.name}, label_map, masks if item.masks is not None else None)
                found.corrected += 1
            progress(found.corrected + found.unchanged)
        found.unknown = names.left()
        if not found.corrected + found.unchanged:
            raise UsageError(
                f"{source}: the store has none of its {len(corrections)} images, for example {next(iter(corrections))!r}",
                hint="give what was exported from this store's data set",
            )
    return found


def _edited(
    item: Labeled, record: Record, correction: Correction, classes: Sequence[str], where: str
) -> tuple[Record, np.ndarray, list[str]] | None:
    """The new line, label map and masks of an image; None if nothing differs."""
    if correction.label_map is not None:
        if correction.label_map.shape != item.shape:
            raise _other_size(where, correction.label_map.shape, item.shape)
        if np.array_equal(correction.label_map, item.label_map):
            return None
        label_map = correction.label_map
        kept: list[tuple[dict[str, Any], MaskRuns]] = []
        added = [(int(label), MaskRuns.of(label_map == label)) for label in np.unique(label_map) if label not in (0, VOID)]
        return _line(record, label_map, kept, added, classes)
    for size in (correction.size, *(mask.size for _, mask in correction.objects)):
        if size not in (None, item.shape):
            raise _other_size(where, size, item.shape)
    objects = [(label, mask) for label, mask in correction.objects if label != VOID and len(mask.spans)]
    voids = [mask for label, mask in correction.objects if label == VOID]
    wanted = Counter((label, mask.counts()) for label, mask in objects)
    label_map, removed, kept = item.label_map.copy(), [], []
    for label, mask, box in _present(item, record):
        if wanted[label, mask.counts()]:
            wanted[label, mask.counts()] -= 1
            kept.append((box or _box(label, mask, classes, label_map), mask))
        else:
            removed.append((label, mask))
    added = []
    for label, mask in objects:
        if wanted[label, mask.counts()]:
            wanted[label, mask.counts()] -= 1
            added.append((label, mask))
    void_before = item.label_map == VOID
    void_after = np.any([mask.mask() for mask in voids], axis=0) if voids else void_before
    if not removed and not added and np.array_equal(void_before, void_after):
        return None
    stays = {label: np.zeros(item.shape, bool) for label, _ in removed}
    for box, mask in kept:
        if (label := classes.index(box["label"]) + 1) in stays:
            stays[label] |= mask.mask()
    for label, mask in removed:
        label_map[(label_map == label) & mask.mask() & ~stays[label]] = 0
    label_map[void_before & ~void_after] = 0
    for label, mask in added:
        label_map[mask.mask()] = label
    label_map[void_after & ~void_before] = VOID
    return _line(record, label_map, kept, added, classes)


def _present(item: Labeled, record: Record) -> Iterator[tuple[int, MaskRuns, dict[str, Any] | None]]:
    """The objects of the store as `wsss convert` writes them, each with its box in the manifest."""
    if item.masks:
        for box, line in zip(item.boxes, record["boxes"], strict=True):
            if item.is_object(box):
                yield box.label, item.mask(box), line
        return
    for one in instances_of(item):
        yield one.label, one.mask, None


def _line(
    record: Record,
    label_map: np.ndarray,
    kept: Sequence[tuple[dict[str, Any], MaskRuns]],
    added: Sequence[tuple[int, MaskRuns]],
    classes: Sequence[str],
) -> tuple[Record, np.ndarray, list[str]]:
    pairs = [*kept, *((_box(label, mask, classes, label_map), mask) for label, mask in added)]
    found = {classes[label - 1] for label in np.unique(label_map).tolist() if 0 < label < VOID}
    scores = {name: record["classes"].get(name, 1.0) for name in classes if name in found}
    boxes = [box for box, _ in pairs]
    line = {**record, "classes": scores, "boxes": boxes, "void_px": int((label_map == VOID).sum())}
    return line, label_map, [mask.counts() for _, mask in pairs]


def _box(label: int, mask: MaskRuns, classes: Sequence[str], label_map: np.ndarray) -> dict[str, Any]:
    top, left, bottom, right = mask.bounds()
    won = int((label_map[top:bottom, left:right] == label)[mask.crop()].sum())
    numbers = {"score": 1.0, "quality": 1.0, "xyxy": [float(left), float(top), float(right), float(bottom)]}
    return {"label": classes[label - 1], **numbers, "area_px": mask.area(), "won_px": won}


def _other_size(where: str, got: tuple[int, ...], expected: tuple[int, int]) -> WsssError:
    sizes = f"expected {expected[0]} x {expected[1]} pixels (height x width), got {got[0]} x {got[1]}"
    return WsssError(f"{where}: {sizes}", hint="masks must have the photograph's size, EXIF rotation applied")


class _Names:
    """Finds the correction of an image by the names that tools give it: its path, that path encoded by `wsss convert`, without
    the folders ``images`` and ``train`` or ``val`` that it added."""

    def __init__(self, corrections: Mapping[str, Correction]) -> None:
        self._left = dict(corrections)
        self._by_name: dict[str, Correction] = {}
        self._taken: dict[str, str] = {}
        for name, each in corrections.items():  # exact names first: an image may be in a folder "train" of the photographs
            for path in (name, original_path(name)):
                self._by_name.setdefault(path.removeprefix("images/"), each)
        for name, each in corrections.items():
            for path in (name, original_path(name)):
                for split in ("train/", "val/"):
                    self._by_name.setdefault(path.removeprefix("images/").removeprefix(split), each)
            if each.label_map is not None:  # masks are named without the photograph's ending
                self._by_name.setdefault(f"{original_path(f'{name}.x').removesuffix('.x')}\0", each)

    def take(self, path: str) -> Correction | None:
        """The correction of an image of the store. Raises WsssError if another image has taken it."""
        found = self._by_name.get(path) or self._by_name.get(path.rpartition(".")[0] + "\0")
        if found is not None:
            if (other := self._taken.setdefault(found.name, path)) != path:
                raise WsssError(
                    f"{found.name!r} could be {other!r} or {path!r} of the store",
                    hint="name it as wsss convert does, with its folder",
                )
            self._left.pop(found.name, None)
        return found

    def left(self) -> list[str]:
        """Names that no image has asked for."""
        return list(self._left)


# ---- the formats ----


def read_corrections(source: Path, classes: Sequence[str]) -> Iterator[Correction]:
    """The images of a file or folder of corrected masks.

    Raises:
        WsssError: it cannot be read, is of no known format, or names a class that is not in ``classes``.
    """
    if source.is_dir():
        return _of_masks(source, classes)
    document = parse_json(read_bytes(source, hint=_HINT, max_bytes=MAX_BYTES), str(source), hint=_HINT)
    with _as_error(source):
        if isinstance(document, dict) and {"images", "annotations", "categories"} <= document.keys():
            return iter(_of_coco(source, document, classes))
        if isinstance(document, list) and document and all(isinstance(task, dict) and "data" in task for task in document):
            return iter(_of_label_studio(source, document, classes))
    raise WsssError(f"{source}: is of no known format", hint=_HINT)


@contextlib.contextmanager
def _as_error(source: Path) -> Iterator[None]:
    """Turn what a document of another shape raises into a WsssError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise WsssError(f"{source}: is damaged: {type(error).__name__} {error}", hint=_HINT) from None


def _label(source: object, name: str, classes: Sequence[str]) -> int:
    if name == void_name(tuple(classes)):
        return VOID
    if name not in classes:
        raise WsssError(
            f"{source}: has the class {name!r}, which the store lacks; it has {', '.join(classes)}",
            hint="rename it in the annotation tool, or label with a class list that has it",
        )
    return list(classes).index(name) + 1


def _of_coco(source: Path, document: Mapping[str, Any], classes: Sequence[str]) -> list[Correction]:
    names = {each["id"]: str(each["name"]) for each in document["categories"]}
    objects: dict[Any, list[tuple[int, MaskRuns]]] = {each["id"]: [] for each in document["images"]}
    sizes = {each["id"]: _size(each["height"], each["width"]) for each in document["images"]}
    for each in document["annotations"]:
        mask = _coco_mask(each["segmentation"], sizes[each["image_id"]])
        objects[each["image_id"]].append((_label(source, names[each["category_id"]], classes), mask))
    return [Correction(str(each["file_name"]), tuple(objects[each["id"]]), size=sizes[each["id"]]) for each in document["images"]]


def _coco_mask(segmentation: Any, size: tuple[int, int]) -> MaskRuns:
    if isinstance(segmentation, list):
        return _filled([np.array(polygon, float).reshape(-1, 2) for polygon in segmentation], size)
    counts: Any = segmentation["counts"]
    height, width = _size(*segmentation["size"])
    if isinstance(counts, str):
        return MaskRuns.from_counts(counts, (height, width))
    edges = np.cumsum(np.array(counts, np.int64))
    if len(counts) and (min(counts) < 0 or edges[-1] != height * width):
        raise ValueError("the runs do not have the pixels of the image")
    spans = edges[: len(edges) - len(edges) % 2].reshape(-1, 2)
    return MaskRuns((height, width), spans[spans[:, 0] < spans[:, 1]])


def _of_label_studio(source: Path, tasks: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Correction]:
    """The newest annotation of each task; tasks without one were not corrected."""
    found = []
    for task in tasks:
        annotations = [each for each in task.get("annotations", ()) if not each.get("was_cancelled")]
        if not annotations:
            continue
        objects = []
        for region in annotations[-1]["result"]:
            value, kind = region["value"], region["type"]
            size = _size(region["original_height"], region["original_width"])
            if kind == "brushlabels":
                mask = MaskRuns.of(_brush(value["rle"], size))
            elif kind == "polygonlabels":
                mask = _filled([np.array(value["points"], float) / 100 * size[::-1]], size)
            else:
                raise WsssError(f"{source}: has a region of type {kind}, expected brushes and polygons", hint=_HINT)
            objects.append((_label(source, str(value[kind][0]), classes), mask))
        place = str(task["data"]["image"])
        name = unquote(place.partition("?d=")[2] or place)
        found.append(Correction(name, tuple(objects)))
    return found


def _brush(rle: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Decode a brush (see `convert.label_studio.brush_rle`): (H, W) bool, where the alpha channel is at least a half."""
    bits = "".join(f"{int(byte):08b}" for byte in rle)
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        if place > len(bits):
            raise ValueError("a brush ends early")
        return int(bits[place - count : place], 2)

    total, word = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != 4 * size[0] * size[1]:
        raise ValueError(f"a brush has {total} values, expected {4 * size[0] * size[1]}")
    values, written = np.zeros(total, np.uint8), 0
    while written < total:
        repeated = take(1)
        length = take(lengths[take(2)]) + 1
        if repeated:
            values[written : written + length] = take(word)
        else:
            for number in range(length):
                value = take(word)
                if written + number < total:
                    values[written + number] = value
        written += length
    return values.reshape(*size, 4)[..., 3] >= 128


def _of_masks(source: Path, classes: Sequence[str]) -> Iterator[Correction]:
    folder, listing = source / "SegmentationClass", source / "labelmap.txt"
    if not folder.is_dir():
        raise WsssError(f"{source}: has no folder SegmentationClass", hint=_HINT)
    colors: dict[tuple[int, ...], int] = {}
    for line in read_bytes(listing, hint=_HINT).decode("utf-8", "replace").splitlines():
        if line.strip() and not line.startswith("#"):
            with _as_error(listing):
                name, color = line.rsplit(":", 3)[:2]
                rgb = tuple(int(part) for part in color.split(","))
            colors[rgb] = 0 if name == "background" else _label(listing, name, classes)
    for path in sorted(folder.rglob("*.png")):
        try:
            with Image.open(path, formats=("PNG",)) as image:
                _size(image.height, image.width)
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            raise WsssError(f"{path}: cannot be read: {error}", hint="export the masks again") from None
        yield Correction(path.relative_to(folder).with_suffix("").as_posix(), label_map=_of_colors(path, pixels, colors))


def _of_colors(path: Path, pixels: np.ndarray, colors: Mapping[tuple[int, ...], int]) -> np.ndarray:
    keys = pixels.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    known = {(r << 16) + (g << 8) + b: label for (r, g, b), label in colors.items()}
    found, inverse = np.unique(keys, return_inverse=True)
    if unknown := [int(key) for key in found if int(key) not in known]:
        raise WsssError(f"{path}: has the color #{unknown[0]:06x}, which labelmap.txt lacks", hint="export the masks again")
    return np.array([known[int(key)] for key in found], np.uint8)[inverse].reshape(keys.shape)


def _filled(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> MaskRuns:
    """Polygons (N, 2) of x, y in pixels, filled: the pixels whose centers are inside of one of them (even-odd rule)."""
    mask = np.zeros(size, bool)
    for polygon in polygons:
        if not np.isfinite(polygon).all():
            raise ValueError("a polygon has a number that is not finite")
        x0, y0 = polygon.T
        x1, y1 = np.roll(polygon, -1, axis=0).T
        rows = np.arange(*np.clip([np.floor(y0.min(initial=0)), np.ceil(y0.max(initial=0))], 0, size[0]).astype(int))
        for row in rows.tolist():
            crossed = (y0 <= row + 0.5) != (y1 <= row + 0.5)
            x = x0[crossed] + (row + 0.5 - y0[crossed]) * (x1[crossed] - x0[crossed]) / (y1[crossed] - y0[crossed])
            edges = np.clip(np.ceil(np.sort(x) - 0.5), 0, size[1]).astype(int)
            for start, stop in edges.reshape(-1, 2).tolist():
                mask[row, start:stop] = True
    return MaskRuns.of(mask)


def _size(height: Any, width: Any) -> tuple[int, int]:
    if type(height) is not int or type(width) is not int or not 0 < height * width <= MAX_PIXELS or height < 1:
        raise ValueError(f"a size of {json.dumps(height)} x {json.dumps(width)}")
    return height, width
