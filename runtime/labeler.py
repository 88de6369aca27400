"""The chain for Python programs: images of any kind in, results as numpy arrays out."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast, overload

import numpy as np

from ..batch import Boxes, Images, Photograph
from ..classes import ClassList, class_list
from ..errors import ImageError, WsssError, WsssWarning
from ..photographs import read_photograph
from ..progress import end_progress, progress_line
from .chain import AnyImage, Chain, ConstantTags, Rules, photograph
from .given.names import twins_of
from .masks.runs import masks_of
from .results import Detections, Result, results_of
from .run.label_folder import Summary
from .run.label_folder import label_folder as run_label_folder
from .run.listing import Folder
from .run.sources import source_of, store_of
from .trained_segmenter import no_boxes, no_masks

OneOf = TypeVar("OneOf", bound=AnyImage)
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
_ONLY_FLAG = re.compile(r'--([a-z][a-z-]*) "?([^"]*)"?')


class Labeler:
    """Labels images with a bundle's models. Make one with ``Labeler.open``.

    An image is a path, a PIL image (its EXIF rotation is applied), or an array (H, W, 3) uint8 RGB. Call methods from one thread
    at a time.
    """

    def __init__(self, chain: Chain) -> None:
        if not isinstance(cast(object, chain), Chain):
            bundle = chain if isinstance(chain, (str, Path)) else "bundle"
            raise WsssError(
                f"Labeler: expected a Chain, got {type(chain).__name__}", hint=f'Labeler.open("{bundle}", classes="dog, cat")'
            )
        self.chain = chain
        """The stages, and the settings that a label store records."""

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        classes: str | Path | Sequence[str] | ClassList | None = None,
        model: str = "chain",
        engine: str = "auto",
        device: str = "auto",
        unverified: bool = False,
        labels: str | Path | None = None,
        boxes: str | Path | None = None,
        ignore_unknown: bool = False,
        rules: Rules | None = None,
        masks: bool = True,
        confidence: bool = False,
    ) -> Labeler:
        """Load only the engines that are needed.

        Args:
            bundle: a folder made by ``wsss export``, ``mini``, or ``hub:OWNER/NAME``.
            classes: a list of names, names separated by commas, a file, ``voc`` or ``coco``. A segmenter has its own.
            model: ``chain`` (CLIP, Grounding-DINO, SAM; of a bundle without the last two, its SAM 3), ``sam3`` (CLIP, SAM 3), or
                ``segmenter``, the bundle's trained segmenter. SAM 3 needs no CLIP.
            engine: ``auto``, ``ort``, ``openvino``, ``trt``, ``trt-rtx``, ``eager``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            unverified: accept TensorRT engines whose parity gate has not run; the settings record it.
            labels: JSON of image names to class names; replaces CLIP.
            boxes: VOC XML or YOLO folder, COCO or wsss JSON file, or a label store; replaces CLIP and Grounding-DINO.
            ignore_unknown: ignore and count entries of ``labels`` and ``boxes`` with classes that are not in the list.
            rules: thresholds.
            masks: keep SAM's mask of each box, in results and in label stores. A segmenter has none.
            confidence: make a map of each pixel's confidence too. A segmenter always does.

        Warns:
            WsssWarning: the bundle's models are ``mini`` and know none of the classes.

        Raises:
            WsssError: the bundle lacks a model, a file is damaged, or an argument is not valid.
        """
        for name, path in (("bundle", bundle), ("labels", labels), ("boxes", boxes)):
            if not isinstance(path, (str, Path)) and (path is not None or name == "bundle"):
                raise WsssError(f"{name}: expected a path, got {type(path).__name__}", hint='Labeler.open("bundle", ...)')
        if rules is not None and not isinstance(rules, Rules):
            raise WsssError(f"rules: expected Rules, got {type(rules).__name__}", hint="Rules(margin=0.2)")
        with _in_python_words():
            return cls(
                Chain.open(
                    bundle,
                    classes=_classes_of(classes),
                    model=model,
                    engine=engine,
                    device=device,
                    unverified=unverified,
                    labels=labels,
                    boxes=boxes,
                    ignore_unknown=ignore_unknown,
                    rules=rules,
                    masks=masks,
                    confidence=confidence,
                )
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes: label 1 of a label map is ``names[0]``."""
        return self.chain.classes.names

    @overload
    def label(self, images: AnyImage) -> Result: ...
    @overload
    def label(self, images: list[OneOf] | tuple[OneOf, ...]) -> list[Result]: ...
    def label(self, images: AnyImage | list[OneOf] | tuple[OneOf, ...]) -> Result | list[Result]:
        """Label an image, which gives one result, or a list, which gives a list. For many images use ``iter``.

        Warns:
            WsssWarning: an image is almost blank.

        Raises:
            ImageError: a file that is not a readable image.
            WsssError: an image of another type or shape, or without an entry in ``labels`` or ``boxes``.
        """
        with _in_python_words():
            if _is_one(images):
                return self._label([_read(images, 0)], None)[0]
            photos = [_read(image, number) for number, image in enumerate(_several(images))]
            twins, size = twins_of(photo.name for photo in photos), self.chain.usual_batch()
            return [
                result for start in range(0, len(photos), size) for result in self._label(photos[start : start + size], twins)
            ]

    def iter(
        self,
        images: str | Path | Iterable[AnyImage],
        *,
        batch: int | None = None,
        progress: bool = True,
        skip_failed: bool = False,
    ) -> Iterator[Result]:
        """Label any number of images, with a batch of them in memory at a time.

        Args:
            images: a folder, whose images come sorted by their path below it, sub-folders included; or any images.
            batch: images labeled together; None takes the batch size that the engines were built for.
            progress: show a line on stderr, if that is a terminal.
            skip_failed: warn of images that cannot be read or labeled, and go on, instead of raising their error.

        Raises:
            WsssError: as ``label``, while iterating; or at once: no such folder, or no images.
        """
        if batch is not None and (not isinstance(batch, int) or batch < 1):
            raise WsssError(f"batch: expected a number of images, 1 or more, got {batch!r}")
        with _in_python_words():
            readers, twins = self._readers(images)
        return self._iterate(readers, twins, batch or self.chain.usual_batch(), progress, skip_failed)

    def label_folder(
        self,
        photos: str | Path,
        store: str | Path,
        *,
        batch: int | None = None,
        retry_failed: bool = False,
        progress: bool = True,
    ) -> Summary:
        """Label a folder into a label store, as ``wsss label`` does: stages overlap, and a second call continues.

        Args:
            photos: a folder, an image, a list of images (``.txt``), or ``s3://``, ``gs://`` and other URLs.
            store: a folder or URL to write or continue.
            batch: images labeled together; None takes the batch size that the engines were built for.
            retry_failed: try the images again that an earlier run could not label.
            progress: show a line on stderr, if that is a terminal.

        Returns:
            What the run did; images that failed are counted in it.

        Warns:
            WsssWarning: each image that failed, and other problems that do not end the run.

        Raises:
            WsssError: no images, or the store cannot be written or belongs to other settings.
        """
        for name, path in (("photos", photos), ("store", store)):
            if not isinstance(path, (str, Path)):
                raise WsssError(f"{name}: expected a path, got {type(path).__name__}", hint="label() and iter() take images")

        def show(summary: Summary) -> None:
            progress_line(f"{summary.skipped + summary.labelled + summary.failed:,} of {summary.images:,} images")

        with _in_python_words():
            summary = run_label_folder(
                self.chain,
                source_of(str(photos)),
                store_of(str(store)),
                batch=batch,
                retry_failed=retry_failed,
                progress=show if progress else None,
                warn=lambda message: warnings.warn(_python_words(message), WsssWarning, stacklevel=4),
            )
        if progress:
            end_progress()
        return summary

    def tag(self, image: AnyImage) -> dict[str, float]:
        """The classes that an image contains, with their scores in 0..1, best first. Raises WsssError as ``label`` does."""
        if isinstance(self.chain.tag.stage, ConstantTags):
            raise WsssError("tag: this labeler was opened without CLIP", hint="open one without boxes, model and gate=False")
        with _in_python_words():
            photo = self._checked(image)
            labels = self.chain.tag([photo])
        score = labels.score[0]
        present = sorted(np.flatnonzero(labels.present[0]).tolist(), key=lambda label: -score[label])
        return {self.names[label]: round(float(score[label]), 4) for label in present}

    def detect(self, image: AnyImage) -> Detections:
        """The boxes of an image: of the classes that it contains, or those that were given. Raises WsssError as ``label``."""
        if self.chain.detect.stage is no_boxes:
            raise WsssError("detect: this labeler was opened with model='segmenter', which has no boxes")
        with _in_python_words():
            photo = self._checked(image)
            found = self.chain.detect([photo], self.chain.tag([photo]))
        return Detections(boxes=found.xyxy_image, scores=found.score, labels=found.label, names=self.names)

    def segment(self, image: AnyImage, boxes: Detections | np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """SAM's mask of each box: (N, H, W) bool, the photograph's size.

        Args:
            boxes: what ``detect`` returned, or (N, 4), x0, y0, x1, y1 in pixels of the photograph.

        Raises:
            WsssError: as ``label``; or boxes of another shape, or with corners that are swapped or outside of the photograph.
        """
        if self.chain.segment.stage is no_masks:
            raise WsssError("segment: this labeler was opened with model='segmenter', which has no SAM")
        photo = _read(image, 0)
        xyxy = _boxes_of(boxes, photo)
        count = len(xyxy)
        asked = Boxes(xyxy, np.ones(count, np.float32), np.ones(count, np.int64), np.zeros(count, np.int64))
        with _in_python_words():
            masks = self.chain.segment([photo], asked)
        masks = replace(masks, logits=[np.asarray(part) for part in masks.logits])
        return np.array([mask.mask() for mask in masks_of(masks, asked, 0)], bool).reshape(count, *photo.shape)

    def _checked(self, image: AnyImage) -> Photograph:
        photo = _read(image, 0)
        self.chain.check([photo])
        return photo

    def _label(self, photos: Images, twins: Mapping[str, Sequence[str]] | None) -> list[Result]:
        self.chain.check(photos, twins)
        return results_of(self.chain.pseudo_label(photos), [photo.pixels for photo in photos], self.names)

    def _readers(
        self, images: str | Path | Iterable[AnyImage]
    ) -> tuple[Iterator[Callable[[], Photograph]], Mapping[str, Sequence[str]] | None]:
        """A function for each image that reads it, and the twins of a folder's images."""
        if not isinstance(images, (str, Path)):
            if _is_one(images):
                one = type(images).__name__
                raise WsssError(f"images: expected a folder or several images, got one {one}", hint="label(image)")
            return (partial(_read, image, number) for number, image in enumerate(_several(images))), None
        folder = Path(images)
        listing = Folder(folder)
        if next(iter(listing), None) is None:
            raise ImageError(f"images: no images below {folder}")
        twins = twins_of(found.name for found in listing) if "given" in self.chain.settings else {}
        return (partial(read_photograph, folder, found.name) for found in listing), twins

    def _iterate(
        self,
        readers: Iterator[Callable[[], Photograph]],
        twins: Mapping[str, Sequence[str]] | None,
        size: int,
        progress: bool,
        skip_failed: bool,
    ) -> Iterator[Result]:
        start, done = time.perf_counter(), 0

        def read(reader: Callable[[], Photograph]) -> list[Photograph]:
            try:
                photo = reader()
                if skip_failed and (reason := self.chain.missing(photo, (twins or {}).get(photo.name, ()))):
                    raise WsssError(reason)
                return [photo]
            except WsssError as error:
                if not skip_failed:
                    raise
                warnings.warn(_python_words(error.message), WsssWarning, stacklevel=4)
                return []

        try:
            while some := list(islice(readers, size)):
                with _in_python_words():
                    results = self._label([photo for reader in some for photo in read(reader)], twins)
                while results:
                    yield results.pop(0)
                done += len(some)
                if progress:
                    progress_line(f"{done:,} images, {done / (time.perf_counter() - start):.1f} a second")
        finally:
            if progress and done:
                end_progress()


def _is_one(images: object) -> bool:
    return isinstance(images, (str, Path, np.ndarray, Photograph)) or hasattr(images, "getexif")


def _several(images: object) -> Iterable[AnyImage]:
    if not isinstance(images, Iterable) or isinstance(images, (bytes, bytearray, Mapping)):
        raise WsssError(
            f"images: expected an image or several, got {type(images).__name__}",
            hint="an image is a path, an array (H, W, 3) uint8 RGB or a PIL image",
        )
    return images


def _read(image: object, number: int) -> Photograph:
    if isinstance(image, (str, Path)) and Path(image).is_dir():
        raise WsssError(f"image {number}: {image} is a folder", hint="iter(folder), or label_folder(folder, store)")
    return photograph(image, number)


def _classes_of(classes: object) -> str | ClassList | None:
    if classes is None or isinstance(classes, (str, ClassList)):
        return classes
    if isinstance(classes, Path):
        return str(classes)
    if isinstance(classes, Sequence) and all(isinstance(name, str) for name in classes):
        return class_list(list(classes))
    raise WsssError(
        f"classes: expected names or a file, got {type(classes).__name__}", hint='classes=["dog", "cat"] or classes="classes.txt"'
    )


def _boxes_of(boxes: object, photo: Photograph) -> np.ndarray:
    """(N, 4) float32 within the photograph. Raises WsssError."""
    try:
        xyxy = np.asarray(boxes.boxes if isinstance(boxes, Detections) else boxes, np.float32)
    except (TypeError, ValueError):
        raise WsssError(f"boxes: expected (N, 4) numbers, got {type(boxes).__name__}", hint="[[x0, y0, x1, y1], ...]") from None
    if xyxy.size == 0:
        return np.zeros((0, 4), np.float32)
    if xyxy.ndim != 2 or xyxy.shape[1] != 4:
        raise WsssError(f"boxes: expected shape (N, 4), got {xyxy.shape}", hint="[[x0, y0, x1, y1], ...], also of a single box")
    height, width = photo.shape
    clipped = np.clip(xyxy, 0, (width, height, width, height))
    wrong = np.flatnonzero(~((clipped[:, 0] < clipped[:, 2]) & (clipped[:, 1] < clipped[:, 3])))
    if len(wrong):
        raise WsssError(
            f"boxes: box {wrong[0]} is {xyxy[wrong[0]].tolist()}, expected x0 < x1 and y0 < y1 within {width} x {height} pixels",
            hint="x0, y0, x1, y1 in pixels of the photograph, not in 0..1, and not x, y, width, height",
        )
    return clipped


@contextmanager
def _in_python_words() -> Iterator[None]:
    """Errors name arguments, not the flags of the command line."""
    try:
        yield
    except WsssError as error:
        message, hint = _python_words(error.message), _python_hint(error.hint)
        if (message, hint) == (error.message, error.hint):
            raise
        raise type(error)(message, hint=hint) from None


def _python_words(text: str) -> str:
    """``--box-threshold: expected ...`` as ``box_threshold: expected ...``."""
    return _FLAG.sub(lambda flag: flag[1].replace("-", "_"), text)


def _python_hint(hint: str) -> str:
    """``--classes voc`` as ``classes="voc"``; commands stay as they are."""
    if flag := _ONLY_FLAG.fullmatch(hint):
        return f'{flag[1].replace("-", "_")}="{flag[2]}"'
    return hint if hint.startswith(("wsss ", "pip ")) else _python_words(hint)
