"""Matches names of photographs in entries and annotations, and names of classes, despite differences in spelling."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from ...classes import ClassList
from ...errors import WsssError
from ...photographs import SUFFIXES
from ...reading.documents import short


def image_key(name: str) -> str:
    """Normalize a photograph's name for comparison: NFC, forward slashes, without ``./``."""
    path = unicodedata.normalize("NFC", name).replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return ("/" if path.startswith("/") else "") + "/".join(parts)


def stem_of(name: str) -> str:
    """The last part of a photograph's name without its ending; annotation files have the same stem."""
    stem = image_key(name).rpartition("/")[2]
    while PurePosixPath(stem).suffix.lower() in SUFFIXES:
        stem = PurePosixPath(stem).stem
    return stem


def twins_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map each photograph that shares its stem with others, in any folder, to all photographs of that stem."""
    by_stem: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_stem[stem_of(name)].append(name)
    return {name: tuple(group) for group in by_stem.values() if len(group) > 1 for name in group}


class Entries:
    """The photographs that a file has entries of (`Index`); the keys are their names.

    Args:
        names: as the file writes them. where: what messages call the file.

    Raises:
        WsssError: two names are of one photograph.
    """

    def __init__(self, names: Iterable[str], where: str) -> None:
        self._where = where
        self._by_key: dict[str, str] = {}
        self._by_stem: dict[str, str] | None = None
        for name in names:
            if (earlier := self._by_key.setdefault(image_key(name), name)) != name:
                raise WsssError(f"{where}: {earlier!r} and {name!r} are the same photograph", hint="keep one of the two entries")

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key.values())

    def find(self, photo: str) -> str | None:
        """The name of a photograph's entry as the file writes it, or None."""
        return self._by_key.get(image_key(photo))

    def missing(self, photo: str) -> WsssError:
        """The error for a photograph without an entry; its hint gives an entry of the same stem."""
        if self._by_stem is None:
            self._by_stem = {stem_of(name): name for name in self._by_key.values()}
        near = self._by_stem.get(stem_of(photo))
        hint = f"the file has {near!r}; entries need the photograph's path, {photo!r}" if near else "add an entry, [] if empty"
        return WsssError(f"has no entry in {self._where}", hint=hint)


class ClassNames:
    """Finds classes of a run by name, as `ClassList.find` does.

    Args:
        ignore_unknown: return None instead of raising an error for a name that is not in the list.
    """

    def __init__(self, classes: ClassList, *, ignore_unknown: bool) -> None:
        self._classes, self._ignore = classes, ignore_unknown

    def __len__(self) -> int:
        return len(self._classes)

    def find(self, name: object, where: str) -> int | None:
        """The 1-based label of the class of this name.

        Raises:
            WsssError: not a string, or not in the list; the hint names the nearest class.
        """
        if not isinstance(name, str):
            raise WsssError(
                f"{where}: expected the name of a class, got {short(name)}",
                hint="give names instead of numbers, whose base is not clear",
            )
        if (label := self._classes.find(name)) is not None or self._ignore:
            return label
        near = self._classes.nearest(name)
        did_you = f"did you mean {near!r}? " if near else ""
        raise WsssError(
            f"{where}: the class {short(name)} is not in this run's list: {listed(self._classes.names)}",
            hint=f"{did_you}check --classes; --ignore-unknown leaves out classes that are not in the list",
        )


def listed(names: Sequence[str], most: int = 20) -> str:
    """The first ``most`` names, separated by commas."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
