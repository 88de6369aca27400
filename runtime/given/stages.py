"""Stages that take class names (``--labels``) or boxes (``--boxes``) from the user's files instead of running a model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...batch import MAX_BOXES, Boxes, Images, Labels, Photograph
from ...classes import ClassList
from ...errors import WsssError
from ...reading.documents import read_names_by_image
from .boxes import Annotation, GivenBox, place
from .forms import open_boxes
from .names import ClassNames, Entries, image_key, listed, stem_of

Warn = Callable[[str], None]
_LABELS = '{"a/dog.jpg": ["dog"]}'
_TWINS = "name the annotation of a/dog.jpg a/dog.jpg.xml, in the same folders as the photographs, or set <filename> and <folder>"


PERCENT_PHOTOS, PERCENT_BOXES, PERCENT_PX = 3, 5, 150
"""Coordinates up to 100 are suspected to be percent once this many photographs with both sides longer than ``PERCENT_PX``, and
this many boxes in them, were seen, and no annotation has a larger coordinate."""


class LabelsFromFile:
    """Tags from a file instead of CLIP; every score is 1.

    Args:
        path: JSON, image name to a list of class names: ``{"a/dog.jpg": ["dog"]}``.
        ignore_unknown: leave out names that are not in the list instead of refusing the file.

    Raises:
        WsssError: the file has another form, or names a class that is not in the list.
    """

    def __init__(self, path: Path, classes: ClassList, *, ignore_unknown: bool = False) -> None:
        where = f"--labels {path}"
        document = read_names_by_image(path, where, hint=_LABELS)
        known = ClassNames(classes, ignore_unknown=ignore_unknown)
        self._path, self._classes = path, len(known)
        self._entries = Entries(document, str(path))
        self._present: dict[str, list[int]] = {}
        self.ignored: Counter[str] = Counter()
        """How often each name was left out."""
        for image, names in document.items():
            labels = [(name, known.find(name, f"{where}: {image}")) for name in names]
            self._present[image] = [label for _, label in labels if label is not None]
            self.ignored.update(name for name, label in labels if label is None)
        _check_ignored(self.ignored, any(self._present.values()), where, classes)

    def missing(self, photo: Photograph, twins: Sequence[str] = ()) -> WsssError | None:
        """Why this image cannot be labeled, or None. ``twins``: photographs of the run with the same stem, this one included."""
        if (entry := self._entries.find(photo.name)) is None:
            return self._entries.missing(photo.name)
        sharing = self.sharing(photo.name, twins)
        return _ambiguous(f"{self._path}: {entry}", sharing, "rename one of them") if len(sharing) > 1 else None

    def content(self, name: str) -> object:
        """What the file says about the photograph of this name, in values whose ``repr`` is always the same. Raises WsssError."""
        if (entry := self._entries.find(name)) is None:
            raise self._entries.missing(name)
        return sorted(set(self._present[entry]))

    def sharing(self, name: str, twins: Sequence[str]) -> list[str]:
        """Those of the photographs that have the entry of the photograph of this name."""
        return [twin for twin in twins if self._entries.find(twin) == self._entries.find(name)]

    def __call__(self, images: Images) -> Labels:
        score = np.zeros((len(images), self._classes), np.float32)
        for row, photo in enumerate(images):
            entry = self._entries.find(photo.name)
            assert entry is not None  # `missing` was called before
            score[row, [label - 1 for label in self._present[entry]]] = 1
        return Labels(score, score > 0)


class BoxesFromFile:
    """Boxes from files instead of Grounding-DINO; the tags are not used.

    Args:
        path: in any format of `open_boxes`.
        ignore_unknown: leave out boxes of classes that are not in the list instead of failing their image.
        threshold: leave out boxes with a lower score; None keeps all.
        warn: called when boxes were left out, cut or sorted, or their frame was assumed.

    Raises:
        WsssError: as `open_boxes`.
    """

    def __init__(
        self,
        path: Path,
        classes: ClassList,
        *,
        ignore_unknown: bool = False,
        threshold: float | None = None,
        warn: Warn = lambda message: None,
    ) -> None:
        self._where, self._warn, self._threshold = f"--boxes {path}", warn, threshold or 0.0
        self._percent: tuple[int, int] | None = 0, 0
        """Photographs and boxes that might be in percent; None once that is decided."""
        self._classes = ClassNames(classes, ignore_unknown=ignore_unknown)
        self._source = open_boxes(path)
        self.ignored: Counter[str] = Counter()
        """Number of boxes that were left out in all annotations, by class name."""
        if ignore_unknown:
            self._count_ignored(self._where, classes)

    def missing(self, photo: Photograph, twins: Sequence[str] = ()) -> WsssError | None:
        """Why this image cannot be labeled, or None. ``twins``: photographs of the run with the same stem, this one included."""
        try:
            annotation, _, _ = self._of(photo)
        except WsssError as error:
            return error
        sharing = self.sharing(photo.name, twins)
        if len(sharing) < 2 or (owner := _owner(annotation, sharing)) == photo.name:
            return None
        if owner:
            return WsssError(f"{annotation.where}: is the annotation of {owner}, according to its <filename>", hint=_TWINS)
        return _ambiguous(annotation.where, sharing, _TWINS)

    def content(self, name: str) -> object:
        """As `LabelsFromFile.content`."""
        annotation, known = self._known(name)
        boxes = [(box.name, box.xyxy, box.score) for box in known]
        frame = annotation.size, annotation.shares, annotation.upright
        return boxes, frame, sorted(annotation.left_out.items()), annotation.filename, annotation.folder

    def sharing(self, name: str, twins: Sequence[str]) -> list[str]:
        """As `LabelsFromFile.sharing`."""
        return [twin for twin in twins if self._source.index.find(twin) == self._source.index.find(name)]

    def __call__(self, images: Images, labels: Labels) -> Boxes:
        parts = [Boxes.none()]
        for row, photo in enumerate(images):
            annotation, boxes, notes = self._of(photo)
            self._suspect_percent(annotation, photo)
            for note in notes:
                self._warn(f"{photo.name}: {note}")
            if boxes:
                found = Boxes(
                    np.array([box.xyxy for box in boxes], np.float32),
                    np.array([box.score for box in boxes], np.float32),
                    np.array([self._classes.find(box.name, annotation.where) for box in boxes], np.int64),
                    np.full(len(boxes), row, np.int64),
                )
                parts.append(found)
        return Boxes.join(parts)

    def _known(self, name: str) -> tuple[Annotation, list[GivenBox]]:
        """The annotation of the photograph of this name, and its boxes of known classes."""
        if (key := self._source.index.find(name)) is None:
            raise self._source.index.missing(name)
        annotation = self._source.read(key)
        return annotation, [box for box in annotation.boxes if self._classes.find(box.name, annotation.where) is not None]

    def _of(self, photo: Photograph) -> tuple[Annotation, list[GivenBox], list[str]]:
        """A photograph's annotation, its boxes in pixels of the photograph, and notes about them."""
        annotation, known = self._known(photo.name)
        strong = [box for box in known if box.score >= self._threshold]
        boxes, notes = place(replace(annotation, boxes=strong), photo)
        if len(boxes) > MAX_BOXES:
            raise WsssError(
                f"{annotation.where}: {len(boxes)} boxes, an image may have {MAX_BOXES}", hint="keep those of the highest scores"
            )
        return annotation, boxes, notes

    def _suspect_percent(self, annotation: Annotation, photo: Photograph) -> None:
        """Warn once if all coordinates of all annotations may be percent."""
        if self._percent is None or not annotation.boxes or min(photo.shape) <= PERCENT_PX:
            return
        photos, boxes = self._percent[0] + 1, self._percent[1] + len(annotation.boxes)
        if annotation.shares or _exceeds_percent(annotation):
            self._percent = None
        elif photos < PERCENT_PHOTOS or boxes < PERCENT_BOXES:
            self._percent = photos, boxes
        else:
            self._percent = None
            if not any(map(_exceeds_percent, self._annotations())):
                self._warn(
                    f"{self._where}: no coordinate exceeds 100, but photographs such as {photo.name} are larger, "
                    f"{photo.shape[1]} x {photo.shape[0]}: expected pixels; are these percent?"
                )

    def _annotations(self) -> Iterator[Annotation]:
        for key in self._source.index:
            with suppress(WsssError):  # reported with its image, if there is one
                yield self._source.read(key)

    def _count_ignored(self, where: str, classes: ClassList) -> None:
        known = False
        for annotation in self._annotations():
            unknown = [box.name for box in annotation.boxes if self._classes.find(box.name, annotation.where) is None]
            known |= len(unknown) < len(annotation.boxes)
            self.ignored.update(unknown)
        _check_ignored(self.ignored, known, where, classes)


def _exceeds_percent(annotation: Annotation) -> bool:
    return any(max(box.xyxy) > 100 for box in annotation.boxes)


@dataclass(frozen=True)
class Given:
    """The labels and boxes that were given to a run."""

    labels: LabelsFromFile | None = None
    boxes: BoxesFromFile | None = None

    @classmethod
    def open(
        cls,
        classes: ClassList,
        labels: str | Path | None,
        boxes: str | Path | None,
        *,
        ignore_unknown: bool = False,
        threshold: float | None = None,
        warn: Warn = lambda message: None,
    ) -> Given:
        """Open what ``--labels`` and ``--boxes`` name. Arguments and errors as of `LabelsFromFile` and `BoxesFromFile`."""
        return cls(
            LabelsFromFile(Path(labels), classes, ignore_unknown=ignore_unknown) if labels else None,
            BoxesFromFile(Path(boxes), classes, ignore_unknown=ignore_unknown, threshold=threshold, warn=warn) if boxes else None,
        )

    def hash(self, name: str, twins: Sequence[str] = ()) -> str:
        """Hash of what was given for a photograph, or of the reason why that cannot be used; empty if nothing was given.

        Args:
            twins: photographs of the run with the same stem, this one included, which may share its annotation.
        """
        parts: list[object] = []
        for stage in (self.labels, self.boxes):
            if stage is None:
                parts.append(None)
                continue
            try:
                content = stage.content(name)
            except WsssError as error:
                content = error.message
            sharing = stage.sharing(name, twins)
            parts.append((content, sharing if len(sharing) > 1 else []))
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16] if any(parts) else ""


def _owner(annotation: Annotation, sharing: Sequence[str]) -> str | None:
    """The one of these photographs that an annotation names; None where it is not clear."""
    filename = image_key(annotation.filename)
    named = [name for name in sharing if filename in ("", stem_of(name), image_key(name).rpartition("/")[2])]
    if len(named) > 1 and annotation.folder:
        folder = image_key(annotation.folder)
        named = [name for name in named if image_key(name).rpartition("/")[0].rpartition("/")[2] == folder]
    return named[0] if len(named) == 1 else None


def _ambiguous(where: str, sharing: Sequence[str], hint: str) -> WsssError:
    return WsssError(f"{where}: fits {len(sharing)} photographs, but belongs to one: {listed(sharing, 4)}", hint=hint)


def _check_ignored(ignored: Counter[str], any_known: bool, where: str, classes: ClassList) -> None:
    if ignored and not any_known:
        raise WsssError(
            f"{where}: none of its classes is in this run's list: {listed(list(ignored))}",
            hint=f"--ignore-unknown would leave out everything; --classes has {listed(classes.names)}",
        )
