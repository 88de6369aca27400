"""Read untrusted text, JSON and TOML files: one set of rules for every reader.

Files must be regular (reading a named pipe would never end) and of limited size. UTF-8, or UTF-16 with a byte-order mark, is
accepted. Duplicate keys, numbers that are not finite, and documents nested too deeply are refused. Every error names the file,
what was expected and what came, and carries a hint.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import re
import reprlib
import stat
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import WsssError

MAX_BYTES = 1 << 28
"""Size of a text file: 256 MiB. COCO's training instances take 450 bytes per box, so half a million boxes fit."""
MAX_TOML = 1 << 16
"""Characters of a TOML document: tomllib's time grows with the square of a dotted key's parts, to a second at this length."""
_BINARY = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a ZIP archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x93NUMPY": "a NumPy array",
}
"""Starts of common files that are not text."""
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def read_bytes(
    path: Path, *, where: str = "", hint: str = "", error: type[WsssError] = WsssError, max_bytes: int = MAX_BYTES
) -> bytes:
    """Read a regular file of at most ``max_bytes``.

    Args:
        where: name of the file in messages, for a flag ``--labels FILE``; default: its path.
        hint: hint of the error if the file cannot be read.
        error: the exception class to raise.

    Raises:
        WsssError (``error``): missing, unreadable, not a regular file, or too large.
    """
    return read_regular(path, where=where, hint=hint, error=error, max_bytes=max_bytes)[0]


def read_regular(
    path: Path, *, where: str = "", hint: str = "", error: type[WsssError] = WsssError, max_bytes: int = MAX_BYTES
) -> tuple[bytes, os.stat_result]:
    """Read a regular file and its status. Arguments and errors as in `read_bytes`."""
    where = where or str(path)
    try:
        # O_NONBLOCK: opening a pipe without a writer would block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{where}: expected a regular file, got {_kind(status.st_mode)}", hint=hint)
            if status.st_size > max_bytes:
                raise error(f"{where}: expected at most {max_bytes:,} bytes, got {status.st_size:,}", hint=hint)
            return file.read(), status
    except OSError as problem:
        if problem.errno == errno.ENXIO:  # sockets cannot be opened
            raise error(f"{where}: expected a regular file, got a socket", hint=hint) from None
        raise error(f"{where}: cannot be read: {problem.strerror or problem}", hint=hint) from None
    except ValueError:  # a name with a NUL byte
        raise error(f"{where!r}: cannot be read: not a file name", hint=hint) from None


def decode_text(data: bytes, where: str, *, hint: str = "", error: type[WsssError] = WsssError) -> str:
    """Decode UTF-8, or UTF-16 with a byte-order mark; the mark is removed. Raises ``error`` for other bytes."""
    mark, encoding = next(((mark, name) for mark, name in _BOMS if data.startswith(mark)), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as problem:
        if kind := next((kind for start, kind in _BINARY.items() if data.startswith(start)), ""):
            raise error(f"{where}: expected UTF-8 text, got {kind}", hint="give a text file; unpack an archive first") from None
        raise error(
            f"{where}: expected UTF-8 text, got byte 0x{data[len(mark) + problem.start]:02x} at {len(mark) + problem.start}",
            hint=hint or "save the file as UTF-8",
        ) from None


def parse_json(data: bytes | str, where: str, *, hint: str = "", error: type[WsssError] = WsssError) -> Any:
    """Parse a JSON document.

    Raises:
        WsssError (``error``): not JSON, a duplicate key, NaN or an infinity, or nested too deeply.
    """
    hint = hint or "check the file: it may be damaged or of another format"

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{where}: the key {twice!r} occurs twice", hint="keep one of them")
        return found

    def not_finite(name: str) -> Any:
        at = re.search(rf"[:,\[]\s*{re.escape(name)}", text)
        line = text[: at.end() if at else 0].count("\n") + 1
        raise error(f"{where}: line {line}: expected finite numbers, got {name}", hint="correct the number, or remove its entry")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else not_finite(digits[:40])

    text = data if isinstance(data, str) else decode_text(data, where, error=error)
    try:
        return json.loads(text, object_pairs_hook=without_duplicates, parse_constant=not_finite, parse_float=finite)
    except json.JSONDecodeError as problem:
        raise error(f"{where}: expected JSON, got {_excerpt(text, problem.pos)}: {problem}", hint=hint) from None
    except RecursionError:
        raise error(f"{where}: expected JSON of a few levels, got a document nested too deeply", hint=hint) from None
    except ValueError as problem:  # a number with more digits than Python converts
        raise error(f"{where}: expected JSON: {problem}", hint=hint) from None


def parse_toml(data: bytes | str, where: str, *, hint: str = "", error: type[WsssError] = WsssError) -> dict[str, Any]:
    """Parse a TOML document. Raises ``error`` if it is invalid, too long, or nested too deeply."""
    hint = hint or 'a line of TOML is: key = "value"'
    text = data if isinstance(data, str) else decode_text(data, where, error=error)
    if len(text) > MAX_TOML:
        raise error(f"{where}: expected TOML of at most {MAX_TOML:,} characters, got {len(text):,}", hint=hint)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise error(f"{where}: expected TOML: {problem}", hint=hint) from None
    except RecursionError:
        raise error(f"{where}: expected TOML of a few levels, got a document nested too deeply", hint=hint) from None
    except ValueError as problem:  # a date or number outside Python's range
        raise error(f"{where}: expected TOML: {problem}", hint=hint) from None


def read_text(path: Path, *, where: str = "", hint: str = "", error: type[WsssError] = WsssError) -> str:
    """Read a text file. Raises as `read_bytes` and `decode_text`."""
    return decode_text(read_bytes(path, where=where, hint=hint, error=error), where or str(path), error=error)


def read_json(path: Path, *, where: str = "", hint: str = "", error: type[WsssError] = WsssError) -> Any:
    """Read a JSON file. Raises as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, where=where, hint=hint, error=error), where or str(path), hint=hint, error=error)


def read_names_by_image(path: Path, where: str, *, hint: str) -> dict[str, list[Any]]:
    """Read a JSON object of image names to lists of class names, which are not checked. Raises WsssError."""
    document = read_json(path, where=where, hint=hint)
    expected = f"{where}: expected a JSON object of image names to lists of class names"
    if not isinstance(document, dict):
        raise WsssError(f"{expected}, got {short(document)}", hint=hint)
    for name, names in document.items():
        if not isinstance(names, list):
            raise WsssError(f"{expected}, got {short(names)} for {name!r}", hint=hint)
    return document


class _Shortener(reprlib.Repr):
    """Shows null, true and false as documents write them."""

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


def short(value: object) -> str:
    """A shortened representation of a document's value, however large or nested it is."""
    shortener = _Shortener()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 3, 60, 60
    return shortener.repr(value)


def read_toml(path: Path, *, where: str = "", hint: str = "", error: type[WsssError] = WsssError) -> dict[str, Any]:
    """Read a TOML file. Raises as `read_bytes` and `parse_toml`."""
    return parse_toml(read_bytes(path, where=where, hint=hint, error=error), where or str(path), hint=hint, error=error)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


def _excerpt(text: str, position: int) -> str:
    return repr(text[position : position + 20]) if text[position : position + 20] else "the end of the file"
