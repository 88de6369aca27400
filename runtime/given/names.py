"""Match names as people write them: of photographs, in entries and annotations, and of classes."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from ...classes import ClassList
from ...errors import WsssError
from ...photographs import SUFFIXES
from .boxes import short


def image_key(name: str) -> str:
    """A photograph's name as entries are compared: NFC, forward slashes, without ``./``."""
    path = unicodedata.normalize("NFC", name).replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return ("/" if path.startswith("/") else "") + "/".join(parts)


def stem_of(name: str) -> str:
    """The last part of a photograph's name without its ending: what annotations are named for."""
    stem = image_key(name).rpartition("/")[2]
    while PurePosixPath(stem).suffix.lower() in SUFFIXES:
        stem = PurePosixPath(stem).stem
    return stem


def twins_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The photographs of one stem, in any folder: each of them to all of them. Others are left out."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[stem_of(name)].append(name)
    return {name: tuple(group) for group in alike.values() if len(group) > 1 for name in group}


def by_key(entries: Mapping[str, object], where: str) -> dict[str, str]:
    """The names of a file's entries by `image_key`. Raises WsssError where two are of one photograph."""
    found: dict[str, str] = {}
    for name in entries:
        if (earlier := found.setdefault(image_key(name), name)) != name:
            raise WsssError(f"{where}: {earlier!r} and {name!r} are the same photograph", hint="keep one of the two entries")
    return found


class Entries:
    """The photographs that a file has entries of.

    Args:
        names: as the file writes them. where: what messages call the file.
    """

    def __init__(self, names: Iterable[str], where: str) -> None:
        self._where = where
        self._name = by_key(dict.fromkeys(names), where)
        self._alike: dict[str, str] | None = None

    def find(self, photo: str) -> str | None:
        """The entry of a photograph as the file writes it, None where there is none."""
        return self._name.get(image_key(photo))

    def missing(self, photo: str) -> WsssError:
        """The error of a photograph without an entry; names one of the same stem."""
        if self._alike is None:
            self._alike = {stem_of(name): name for name in self._name.values()}
        near = self._alike.get(stem_of(photo))
        hint = (
            f"the file has {near!r}; entries are named as IMAGES names them: {photo!r}" if near else "add an entry, [] if empty"
        )
        return WsssError(f"has no entry in {self._where}", hint=hint)


class ClassNames:
    """Finds classes of a run by name, as `ClassList.find` does.

    Args:
        ignore_unknown: a name that is not in the list is None instead of an error.
    """

    def __init__(self, classes: ClassList, *, ignore_unknown: bool = False) -> None:
        self._classes, self._ignore = classes, ignore_unknown

    def __len__(self) -> int:
        return len(self._classes)

    def find(self, name: object, where: str) -> int | None:
        """The label, 1-based, of the class of this name.

        Raises:
            WsssError: no string, or not in the list; names the nearest class.
        """
        if not isinstance(name, str):
            raise WsssError(
                f"{where}: expected the name of a class, got {short(name)}", hint="names, not numbers: they are safe from shifts"
            )
        if (label := self._classes.find(name)) is not None or self._ignore:
            return label
        near = self._classes.nearest(name)
        did_you = f"did you mean {near!r}? " if near else ""
        raise WsssError(
            f"{where}: the class {short(name)} is not in this run's list: {listed(self._classes.names)}",
            hint=f"{did_you}check --classes; --ignore-unknown leaves out what is not in the list",
        )


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names separated by commas, the first ones of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
