"""The label store: the folder that a run writes and a trainer reads. This module alone knows its format.

    labels/<image>.png   8-bit palette, original size: 0 background, 1..C classes, 255 void
    manifest.jsonl       one line a finished image, or its error
    classes.json         names by label value
    run.json             every setting that decided the labels

An image is published in two steps, each whole or not at all: its PNG (temporary file, fsync, rename), then its line.
A line without its PNG cannot happen; a PNG without its line is done again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .classes import ClassList, palette
from .errors import StoreError

Record = dict[str, Any]
"""A line of the manifest: path, label, bytes, sha256, and either the results or ``error``."""


class LabelStore:
    """A label store open for writing.

    Args:
        folder: made when absent; an existing store of the same settings is continued.
        classes: the run's class list.
        settings: what decides the labels; a store never mixes two of them.

    Raises:
        StoreError: not writable, not a store, or a store of other settings or classes.
    """

    def __init__(self, folder: Path, classes: ClassList, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._manifest = folder / "manifest.jsonl"
        run = {"format": 1, "classes": list(classes.names), **settings}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "run.json").exists():
                was = json.loads((folder / "run.json").read_text(encoding="utf-8"))
                if not isinstance(was, dict):
                    raise ValueError(f"expected an object, got {type(was).__name__}")
                _check_same(folder, was, json.loads(json.dumps(run)))
            elif any(not path.name.endswith(".tmp") for path in folder.iterdir()):  # a crash may leave a temporary
                raise StoreError(
                    f"--out {folder}: the folder is not empty and holds no label store", hint="give a new or empty folder"
                )
            write_atomically(folder / "run.json", _json(run))  # first: from here on the folder is known as a store
            (folder / "labels").mkdir(exist_ok=True)
            write_atomically(folder / "classes.json", _json({0: "background", **dict(enumerate(classes.names, 1)), 255: "void"}))
            self.done = {record["path"]: record for record in read_records(folder)}
            self._rewrite()
            self._lines = self._manifest.open("ab")
        except OSError as error:
            raise StoreError(
                f"--out {folder}: cannot be written: {error.strerror}", hint="give a folder you may write to"
            ) from None
        except ValueError as error:
            raise StoreError(f"{folder / 'run.json'}: damaged: {error}", hint="give a new --out") from None

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def forget(self, paths: Iterable[str]) -> None:
        """Drops the lines of images that will be done again."""
        gone = set(paths) & self.done.keys()
        if gone:
            self._lines.close()
            self.done = {path: record for path, record in self.done.items() if path not in gone}
            self._rewrite()
            self._lines = self._manifest.open("ab")

    def write(self, record: Record, label_map: np.ndarray | None) -> None:
        """Publishes one image: its label map (H, W) uint8 if it has one, then its line."""
        try:
            if label_map is not None:
                write_label(self.folder / "labels" / record["label"], label_map)
            self._lines.write(_line(record))
            self._lines.flush()
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot write the label of {record['path']}: {error.strerror}",
                hint="what was written so far is whole; make room and run the same command again",
            ) from None
        self.done[record["path"]] = record

    def _rewrite(self) -> None:
        write_atomically(self._manifest, b"".join(map(_line, self.done.values())))


def read_records(folder: Path) -> Iterator[Record]:
    """The manifest's lines in order; a last line cut by a crash is left out.

    Raises:
        StoreError: a damaged line before the last.
    """
    path = folder / "manifest.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                record["path"], record["label"]
            except (ValueError, KeyError, TypeError):
                if file.read(1):
                    raise StoreError(
                        f"{path}: line {number} is damaged", hint="delete that line: its image is done again"
                    ) from None
                return
            yield record


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of a store. Raises StoreError when ``folder`` is none."""
    try:
        run: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError(f"run.json holds {type(run).__name__}")
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: expected a label store (with run.json): {error}", hint="wsss label makes one") from None
    return run


def write_label(path: Path, label_map: np.ndarray) -> None:
    """Writes a label map (H, W) uint8 as an 8-bit palette PNG with VOC's colours, atomically."""
    image = Image.fromarray(label_map, mode="P")
    image.putpalette(palette().tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as temporary:
        image.save(temporary, format="PNG")


def read_label(path: Path) -> np.ndarray:
    """A label map (H, W) uint8 from a palette or grey PNG. Raises StoreError for anything else."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise StoreError(f"{path}: expected an 8-bit palette PNG, got mode {image.mode}")
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise StoreError(f"{path}: not a readable label: {error}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: temporary file beside it, fsync, rename, fsync of the folder."""
    with _temporary(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _line(record: Record) -> bytes:
    # File names that are no Unicode come as lone surrogates (PEP 383); json.loads reads them back from bytes.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _check_same(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise StoreError(
                f"--out {folder}: was made with {key} = {_short(was.get(key))}, this run has {_short(now.get(key))}",
                hint="give a new --out: a store never mixes settings",
            )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."
