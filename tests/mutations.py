"""Damage to files, reproducible by a seed: bits and slices of any file, tokens of text, values and keys of JSON."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

_TOKEN = re.compile(r"\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\w+|[^\s\w]")
_NUMBERS = [
    *("0", "-1", "-0", "0.5", "256", "65536", "2147483648", "99999999999999999999", "1e308", "1e999", "-1e999"),
    *("NaN", "nan", "Infinity", "inf", "1_000", "0x10", "٣"),
]
_WORDS = [
    "",
    " ",
    "../../victim.txt",
    "/etc/passwd",
    "..",
    "\x00",
    "a\x00b",
    "\u202e",
    "😀",
    "\x1b[2J",
    "null",
    "true",
    "-",
    "x" * 5000,
]
_BRACKETS = [
    "[]",
    "{}",
    "[[1]]",
    '{"a": 1}',
    "[" * 3000,
    "{" * 3000,
    '"',
    "'",
    ":",
    ",",
    "#",
    "&a",
    "*a",
    "<a>",
    "</a>",
    "<!--",
    "&lt;",
]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 256, 2**31, 2**63, 10**30, -0.5, 0.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "0", "../../victim.txt", "/etc/passwd", "..", ".", "a\0b", "\ud800", "😀", "\x1b[2J", "\n", "y" * 5000),
    *([], {}, [None], [[]], {"a": None}, ["x"], [1, 2, 3, 4], [1e400] * 4, {"x": {"y": [1]}}),
]  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Damage bits, slices or the end of a file."""
    if not data:
        return draw.randbytes(draw.randint(1, 9))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1) if draw.random() < 0.6 else draw.randrange(min(len(data), 64) + 1)
        length = draw.choice((1, 2, 4, 16, 300, len(data) // 3))
        piece = data[at : at + length]
        match draw.randrange(8):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + piece * draw.choice((2, 2, 3, 50)) + data[at + length :]
            case 2:
                data = data[:at] + data[at + length :]
            case 3:
                data = data[:at] + bytes(draw.choice((b"\0", b"\xff", b"\x7f")) * len(piece)) + data[at + length :]
            case 4:
                data = data[:at] + draw.randbytes(length) + data[at:]
            case _ if data:
                flipped = bytearray(data)
                for _ in range(draw.choice((1, 1, 3, 20))):
                    spot = draw.randrange(len(data)) if draw.random() < 0.6 else draw.randrange(min(len(data), 64))
                    flipped[spot] ^= 1 << draw.randrange(8)
                data = bytes(flipped)
    return data


def tokens_changed(data: bytes, draw: random.Random) -> bytes:
    """Change numbers, words, signs or lines of a text; in one of five draws its bytes."""
    if draw.random() < 0.2:
        return damaged(data, draw)
    text = data.decode()
    for _ in range(draw.choice((1, 1, 2, 4))):
        found = list(_TOKEN.finditer(text))
        if not found:
            break
        token = draw.choice(found)
        old, (start, end) = token.group(), token.span()
        other = draw.choice(found).group()
        lines = text.splitlines(keepends=True)
        number = draw.randrange(len(lines))
        match draw.randrange(12):
            case 0:
                text = text[:start] + text[end:]
            case 1:
                text = text[:start] + old * 2 + text[end:]
            case 2:
                text = text[:start] + other + text[end:]
            case 3:
                text = "".join([*lines[:number], *lines[number + 1 :]])
            case 4:
                text = "".join([*lines[:number], lines[number] * draw.choice((2, 2, 300)), *lines[number + 1 :]])
            case 5:
                text = draw.choice(
                    ("\ufeff" + text, text.replace("\n", "\r\n"), text.replace("\n", "\r"), text * 2, text.upper())
                )
            case 6:
                text = text[:start] + draw.choice(_BRACKETS) + text[end:]
            case _:
                quote = old[0] if old[0] in "\"'" and draw.random() < 0.6 else ""
                text = text[:start] + quote + draw.choice(_NUMBERS + _WORDS) + quote + text[end:]
    return text.encode("utf-8", "surrogatepass")


def json_changed(data: bytes, draw: random.Random) -> bytes:
    """Change values and keys of a JSON document, or of one line of JSON lines; in some draws its tokens or bytes."""
    if draw.random() < 0.3:
        return tokens_changed(data, draw)
    lines = data.decode().splitlines() if b"\n{" in data else [data.decode()]
    number = draw.randrange(len(lines))
    document = json.loads(lines[number])
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        document = _one_changed(document, draw)
    text = json.dumps(document)
    if draw.random() < 0.1 and (pair := re.search(r'"[^"]*": ("[^"]*"|[-\d.]+)', text)):
        text = text[: pair.start()] + pair.group() + ", " + text[pair.start() :]
    if draw.random() < 0.02:
        text = text.replace("1", "[" * 100_000, 1)
    lines[number] = text
    return ("\n".join(lines) + "\n").encode()


def _one_changed(document: Any, draw: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return copy.deepcopy(draw.choice(_VALUES))
    inside, key = draw.choice(places)
    match draw.randrange(8):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[draw.choice((str(key).upper(), f"{key}s", f" {key}", "", "format", "..", "\0"))] = inside.pop(key)
        case 2:
            inside[key] = [inside[key]] if draw.random() < 0.5 else {"x": inside[key]}
        case 3:
            other, name = draw.choice(places)
            inside[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
        case _:
            inside[key] = copy.deepcopy(draw.choice(_VALUES))
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found: list[tuple[Any, Any]] = []
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        found += [(document, key), *_places(document[key])]
    return found
