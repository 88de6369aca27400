"""Which images a folder holds, and how their labels are called."""

from __future__ import annotations

import hashlib
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Protocol

from ...errors import ImageError
from ...photographs import SUFFIXES, USUAL_SUFFIXES

_LONGEST_NAME = 255
"""Bytes of a file's name on most file systems."""
_LONGEST_ENDING = 12
"""Characters of what counts as a file's ending."""
_MOST_ENDINGS = 100
"""Counted apart; the files of any further ones are counted as ``other``."""
SIDECARS = (".xml", ".txt", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".md")
"""Endings of files that lie beside images and are none."""


@dataclass(frozen=True, slots=True)
class Found:
    """An image of a folder: its path in it, with forward slashes, and its label's path below ``labels/``."""

    name: str
    label: str
    stamp: Mapping[str, int | str] | None = None
    """Size and etag, where the listing told them."""


@dataclass(slots=True)
class LeftOut:
    """What a place holds beside the images that its listing gives. Hidden files and folders do not count."""

    files: Counter[str] = field(default_factory=Counter)
    """Files that are not taken, by their ending in lower case, ``none`` or ``other``."""
    links: list[str] = field(default_factory=list)
    """Links to folders."""
    folders: dict[str, str] = field(default_factory=dict)
    """Sub-folders that cannot be read, and why."""

    def clear(self) -> None:
        """Forgets everything."""
        self.files.clear()
        self.links.clear()
        self.folders.clear()

    def count(self, name: str) -> None:
        """Counts a file that is not taken."""
        ending = PurePosixPath(name).suffix.lower() or "none"
        known = (
            ending.isprintable() and len(ending) <= _LONGEST_ENDING and (ending in self.files or len(self.files) < _MOST_ENDINGS)
        )
        self.files[ending if known else "other"] += 1


def describe_left_out(files: Mapping[str, int]) -> str:
    """The counts of `LeftOut.files` in words, most frequent first, sidecars together at the end."""
    words = {"none": "without an ending", "other": "with other endings"}
    told = sorted(
        ((count, ending) for ending, count in files.items() if ending not in SIDECARS), key=lambda each: (-each[0], each[1])
    )
    parts = [f"{count} {words.get(ending, ending)}" for count, ending in told[:6]]
    if rest := sum(count for count, _ in told[6:]):
        parts.append(f"{rest} others")
    if beside := {ending: files[ending] for ending in SIDECARS if ending in files}:
        parts.append(f"{sum(beside.values())} of {' '.join(beside)}")
    return ", ".join(parts)


class Listing(Protocol):
    """Images by name, order of code points; may be gone through again and again."""

    @property
    def left_out(self) -> LeftOut:
        """What there is beside the images, as far as they were gone through the last time."""
        ...

    @property
    def path(self) -> object:
        """What a user calls it."""
        ...

    def __iter__(self) -> Iterator[Found]: ...


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of images, or one image.

    Args:
        path: the folder or file.
        leave_out: a folder that is not entered: the label store, whose labels are no photographs.
        shard: (I, N): of N shares of the images, the I-th; each image is in one, whatever else is in the folder.
        left_out: filled while the images are gone through. Links to folders are not followed.
    """

    path: Path
    leave_out: Path | None = None
    shard: tuple[int, int] | None = None
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)

    def __iter__(self) -> Iterator[Found]:
        """The images by name (order of code points), hidden files and folders left out.

        One folder's names are in memory at a time, those above it too. Labels are named folder by folder.

        Raises:
            ImageError: no such folder, or it cannot be read; sub-folders that cannot be read are noted in ``left_out``.
        """
        self.left_out.clear()
        if os.path.isfile(self.path):  # unlike those of pathlib, never raises
            return iter([Found(self.path.name, label_names([self.path.name])[self.path.name])])
        if not os.path.isdir(self.path):
            found = "something else" if os.path.lexists(self.path) else "nothing"
            raise ImageError(
                f"{self.path}: expected a folder of images, found {found}",
                hint="wsss label IMAGES takes a folder, an image, or a list of images that ends in .txt" + _similar(self.path),
            )
        return (found for found in self._walk("", False) if is_of_shard(found.name, self.shard))

    def _walk(self, prefix: str, twin: bool) -> Iterator[Found]:
        files, folders = self._list(prefix)
        labels = label_names(files, taken=folders, twin=prefix if twin else None)
        alike = Counter(map(_folded, folders))
        # With its slash, a folder sorts where its images do: all names come out in order.
        for name in sorted([*files, *(f"{folder}/" for folder in folders)]):
            if name.endswith("/"):
                yield from self._walk(prefix + name, twin or alike[_folded(name[:-1])] > 1)
            else:
                yield Found(prefix + name, prefix + labels[name])

    def _list(self, prefix: str) -> tuple[list[str], list[str]]:
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(self.path / prefix) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if self.leave_out is None or Path(entry.path).resolve() != self.leave_out.resolve():
                            folders.append(entry.name)
                    elif Path(entry.name).suffix.lower() in SUFFIXES:
                        files.append(entry.name)
                    elif entry.is_symlink() and Path(entry.path).is_dir():
                        self.left_out.links.append(prefix + entry.name)
                    elif is_of_shard(prefix + entry.name, self.shard):
                        self.left_out.count(entry.name)
        except OSError as error:
            if not prefix:
                raise ImageError(
                    f"{self.path}: cannot be read: {error.strerror}", hint="check its permissions, and that it is mounted"
                ) from None
            self.left_out.folders[prefix] = error.strerror or str(error)
            return [], []
        return files, folders


def _similar(path: Path) -> str:
    try:
        near = get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return ""
    return f". Did you mean {path.parent / near[0]}?" if near else ""


def is_of_shard(name: str, shard: tuple[int, int] | None) -> bool:
    """Is the image of this name one of shard (I, N)? Each is in one, whatever other images there are."""
    return shard is None or zlib.crc32(os.fsencode(name)) % shard[1] == shard[0]


def check_images(images: Listing) -> None:
    """Raises ImageError unless there is an image among them."""
    if next(iter(images), None) is not None:
        return
    others = describe_left_out(images.left_out.files)
    unread = "".join(f"; {name}: cannot be read: {reason}" for name, reason in images.left_out.folders.items())
    plugin = "; pip install pillow-heif takes .heic" if images.left_out.files.keys() & {".heic", ".heif"} else ""
    raise ImageError(
        f"{images.path}: no images in it{f'; left out: {others}' if others else ''}{unread}",
        hint=f"files ending in {' '.join(SUFFIXES)} are taken, also in sub-folders{plugin}",
    )


def label_names(names: list[str], *, taken: Iterable[str] = (), twin: str | None = None) -> dict[str, str]:
    """How the label of each image of one folder is called.

    ``dog.jpg`` to ``dog.png``; where two would meet, also on a file system that does not tell case, ``dog.jpg.png``; where
    that does not help, or is too long a name, with a few letters of a hash.

    Args:
        names: the images. taken: names of the folders beside them.
        twin: the path of their folder if it has a twin that differs by case only.
    """
    plain = {name: str(PurePosixPath(name).with_suffix(".png")) for name in names}
    count = Counter([*map(_folded, plain.values()), *map(_folded, taken)])
    usual = [name for name in names if PurePosixPath(name).suffix.lower() in USUAL_SUFFIXES]
    # Labels are called as they were before other endings were taken: where two would meet, those yield.
    count_usual = Counter([*(_folded(plain[name]) for name in usual), *map(_folded, taken)])
    long = {name for name in names if count[_folded(plain[name])] > 1} - {
        name for name in usual if count_usual[_folded(plain[name])] == 1
    }
    # `a.jpg.png` is the label of a.jpg beside a.webp, and would be that of a photograph a.jpg.png too.
    while True:
        theirs = {_folded(f"{name}.png") for name in long}
        met = {name for name in names if _folded(plain[name]) in theirs} - long
        if not met:
            break
        long |= met
    labels = {name: f"{name}.png" if name in long else plain[name] for name in names}
    count = Counter([*map(_folded, labels.values()), *map(_folded, taken)])
    for name, label in labels.items():
        if count[_folded(label)] > 1 or len(os.fsencode(label)) > _LONGEST_NAME or twin is not None:
            labels[name] = _hashed(name, (twin or "") + name)
    return labels


def label_of(name: str) -> str:
    """How the label of an image is called where the names beside it are too many to be looked at; no two meet.

    ``a/dog.jpg`` to ``a/dog.png``, as in a folder; of any other format to ``a/dog.webp.png``. Labels of two images whose
    names differ by case only need a file system that tells case.
    """
    *folders, last = name.split("/")
    stem, suffix = PurePosixPath(last).stem, PurePosixPath(last).suffix
    plain = suffix == ".jpg" and PurePosixPath(stem).suffix.lower() not in USUAL_SUFFIXES and not stem.endswith("%")
    label = f"{stem}.png" if plain else f"{last}.png" if suffix.lower() in USUAL_SUFFIXES else f"{last}%.png"
    if len(os.fsencode(label)) > _LONGEST_NAME:
        label = _hashed(last, name)
    # An empty name, or ``..``, is none for a folder; one that ends as labels do might be a label's.
    safe = [f"{each}%" if each in ("", ".", "..") or each.endswith((".png", "%")) else each for each in folders]
    return "/".join([*safe, label])


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _hashed(name: str, whole: str) -> str:
    end = f".{hashlib.sha256(os.fsencode(whole)).hexdigest()[:12]}.png"
    stem = os.fsencode(name)[: _LONGEST_NAME - len(end)]
    return stem.decode("utf-8", "ignore" if len(os.fsencode(name)) > len(stem) else "surrogateescape") + end
