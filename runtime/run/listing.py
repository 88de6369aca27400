"""Lists the images of a folder, and names their labels."""

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
"""Most bytes of a file name on most file systems."""
_LONGEST_ENDING = 12
"""Most characters of a file ending that is counted on its own."""
_MOST_ENDINGS = 100
"""Most endings that are counted on their own; files with further endings count as ``other``."""
SIDECARS = (".xml", ".txt", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".md")
"""Endings of files that commonly accompany images."""


@dataclass(frozen=True, slots=True)
class Found:
    """An image of a source: its path in it, with forward slashes, and its label's path below ``labels/``."""

    name: str
    label: str
    stamp: Mapping[str, int | str] | None = None
    """Size and ETag, where the listing gives them."""


@dataclass(slots=True)
class LeftOut:
    """Files and folders that a listing leaves out. Hidden ones do not count."""

    files: Counter[str] = field(default_factory=Counter)
    """Number of files that are not images, by their ending in lower case, ``none`` or ``other``."""
    links: list[str] = field(default_factory=list)
    """Links to folders."""
    folders: dict[str, str] = field(default_factory=dict)
    """Sub-folders that cannot be read, and why."""

    def clear(self) -> None:
        """Start again."""
        self.files.clear()
        self.links.clear()
        self.folders.clear()

    def count(self, name: str) -> None:
        """Count a file that is not an image."""
        ending = PurePosixPath(name).suffix.lower() or "none"
        known = (
            ending.isprintable() and len(ending) <= _LONGEST_ENDING and (ending in self.files or len(self.files) < _MOST_ENDINGS)
        )
        self.files[ending if known else "other"] += 1


def describe_left_out(files: Mapping[str, int]) -> str:
    """Describe the counts of `LeftOut.files`, most frequent first, sidecars together at the end."""
    words = {"none": "without an ending", "other": "with other endings"}
    counts = sorted((-count, ending) for ending, count in files.items() if ending not in SIDECARS)
    parts = [f"{-count} {words.get(ending, ending)}" for count, ending in counts[:6]]
    if rest := -sum(count for count, _ in counts[6:]):
        parts.append(f"{rest} others")
    if sidecars := {ending: files[ending] for ending in SIDECARS if ending in files}:
        parts.append(f"{sum(sidecars.values())} of {' '.join(sidecars)}")
    return ", ".join(parts)


class Listing(Protocol):
    """Images sorted by name (by code points); may be iterated several times."""

    @property
    def left_out(self) -> LeftOut:
        """What the last iteration has left out so far."""
        ...

    @property
    def path(self) -> object:
        """What messages call it."""
        ...

    def __iter__(self) -> Iterator[Found]: ...


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of images, or one image.

    Args:
        path: the folder or file.
        leave_out: a folder that is not entered: the label store, whose labels are not photographs.
        shard: (I, N): only the I-th of N shares of the images. Which share an image is in depends on its name alone.
        left_out: filled by iterating. Links to folders are not followed.
        only: images and sub-folders below ``path``, with forward slashes; nothing else is entered. Empty takes all.
    """

    path: Path
    leave_out: Path | None = None
    shard: tuple[int, int] | None = None
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    only: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[Found]:
        """Yield the images sorted by name (by code points), without hidden files and folders.

        Only the names of one folder and its parents are in memory at a time. Labels are named folder by folder.

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
        # With a slash at its end a folder's name sorts where its images do, so that all names come in order.
        for name in sorted([*files, *(f"{folder}/" for folder in folders)]):
            if not self._is_wanted(prefix + name):
                continue
            if name.endswith("/"):
                yield from self._walk(prefix + name, twin or alike[_folded(name[:-1])] > 1)
            else:
                yield Found(prefix + name, prefix + labels[name])

    def _is_wanted(self, name: str) -> bool:
        """Whether an image, or a folder (its name ends in a slash), is in ``only``, below a folder of it, or above something."""
        if not self.only:
            return True
        parts = name.rstrip("/").split("/")
        within = any("/".join(parts[:end]) in self.only for end in range(1, len(parts) + 1))
        return within or (name.endswith("/") and any(each.startswith(name) for each in self.only))

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
                    elif self._is_wanted(prefix + entry.name) and is_of_shard(prefix + entry.name, self.shard):
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
    """Whether the image of this name is in shard (I, N), which depends on its name alone."""
    return shard is None or zlib.crc32(os.fsencode(name)) % shard[1] == shard[0]


def check_images(images: Listing) -> None:
    """Raise ImageError unless there is an image."""
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
    """Name the label of each image of one folder.

    ``dog.jpg`` gets ``dog.png``; where two images would get the same name, also where case does not count, ``dog.jpg.png``;
    where that does not help, or the name is too long, a name with a part of a hash.

    Args:
        names: the images. taken: names of the folders beside them.
        twin: the path of their folder, if another folder beside it differs only in case.
    """
    plain = {name: str(PurePosixPath(name).with_suffix(".png")) for name in names}
    count = Counter([*map(_folded, plain.values()), *map(_folded, taken)])
    usual = [name for name in names if PurePosixPath(name).suffix.lower() in USUAL_SUFFIXES]
    # Images with usual endings keep the label names of older versions, which took no other endings.
    count_usual = Counter([*(_folded(plain[name]) for name in usual), *map(_folded, taken)])
    long = {name for name in names if count[_folded(plain[name])] > 1} - {
        name for name in usual if count_usual[_folded(plain[name])] == 1
    }
    # `a.jpg.png` is the label of a.jpg beside a.webp, and would also be that of a photograph a.jpg.png.
    while True:
        used = {_folded(f"{name}.png") for name in long}
        colliding = {name for name in names if _folded(plain[name]) in used} - long
        if not colliding:
            break
        long |= colliding
    labels = {name: f"{name}.png" if name in long else plain[name] for name in names}
    count = Counter([*map(_folded, labels.values()), *map(_folded, taken)])
    for name, label in labels.items():
        if count[_folded(label)] > 1 or len(os.fsencode(label)) > _LONGEST_NAME or twin is not None:
            labels[name] = _hashed(name, (twin or "") + name)
    return labels


def label_of(name: str) -> str:
    """Name the label of an image without knowing the names beside it; no two images get the same label.

    ``a/dog.jpg`` gets ``a/dog.png``, as in a folder; other formats keep their ending, ``a/dog.webp.png``. Labels of two images
    whose names differ only in case need a case-sensitive file system.
    """
    *folders, last = name.split("/")
    stem, suffix = PurePosixPath(last).stem, PurePosixPath(last).suffix
    plain = suffix == ".jpg" and PurePosixPath(stem).suffix.lower() not in USUAL_SUFFIXES and not stem.endswith("%")
    label = f"{stem}.png" if plain else f"{last}.png" if suffix.lower() in USUAL_SUFFIXES else f"{last}%.png"
    if len(os.fsencode(label)) > _LONGEST_NAME:
        label = _hashed(last, name)
    # A folder cannot have an empty name or be ``..``, and one that ends as labels do might be a label's name.
    safe = [f"{folder}%" if folder in ("", ".", "..") or folder.endswith((".png", "%")) else folder for folder in folders]
    return "/".join([*safe, label])


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _hashed(name: str, whole: str) -> str:
    end = f".{hashlib.sha256(os.fsencode(whole)).hexdigest()[:12]}.png"
    stem = os.fsencode(name)[: _LONGEST_NAME - len(end)]
    return stem.decode("utf-8", "ignore" if len(os.fsencode(name)) > len(stem) else "surrogateescape") + end
