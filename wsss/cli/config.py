"""``wsss.toml``: the working folder's answers to flags that are not typed.

    [label]
    images = "photos"
    classes = ["dog", "potted plant"]
    out = "store"

One table a command, one key a flag, spelled as typed without the dashes, one value of the flag's kind. What is typed wins.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..reading.documents import read_toml

FILE = "wsss.toml"
_COMMA = ("classes", "devices")
"""Flags whose text is a list with commas, which TOML may give as an array."""
_KINDS = {
    "text": ("a text", '"..."'),
    "integer": ("a whole number", "8"),
    "number": ("a number", "0.5"),
    "switch": ("true or false", "true"),
}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What a flag takes, as far as a file can contradict it."""

    parameter: str
    """Name of the command's parameter."""
    kind: Literal["text", "integer", "number", "switch"] = "text"
    count: int = 1
    """Values of one use: 3 for ``--batch MIN OPT MAX``."""
    repeats: bool = False
    """May be typed several times, so an array may give several values."""


def read_defaults(path: Path, commands: Mapping[str, Mapping[str, Flag]]) -> dict[str, dict[str, Any]]:
    """Flag values by command and parameter name, as click's ``default_map`` wants them; empty when there is no file.

    Args:
        commands: for every command its flags as typed, without the dashes.

    Raises:
        UsageError: not TOML; a table or key that no command or flag has, with the nearest right one; a value of another kind
            than the flag's.
    """
    if not os.path.lexists(path):
        return {}
    defaults: dict[str, dict[str, Any]] = {}
    for command, values in read_toml(path, error=UsageError).items():
        if command not in commands or not isinstance(values, dict):
            raise UsageError(
                f"{path}: expected tables named after commands ({', '.join(sorted(commands))}), got {reprlib.repr(command)}",
                hint="a flag of wsss label stands below a line [label]",
            )
        flags = commands[command]
        defaults[command] = {}
        for key, value in values.items():
            typed = key.replace("_", "-")
            if typed not in flags:
                near = get_close_matches(typed[:60], flags, 1)
                raise UsageError(
                    f"{path}: [{command}] has no flag {reprlib.repr(key)}",
                    hint=f"did you mean {near[0]!r}?" if near else f"its flags: {', '.join(sorted(flags))}",
                )
            flag = flags[typed]
            if flag.parameter in defaults[command]:
                raise UsageError(f"{path}: [{command}] has {typed} twice, with _ and with -", hint="keep one of them")
            defaults[command][flag.parameter] = _value(value, flag, f"{path}: [{command}] {key}", is_list=typed in _COMMA)
    return defaults


def _value(value: Any, flag: Flag, where: str, *, is_list: bool) -> Any:
    if is_list and isinstance(value, list) and flag.kind == "text":
        texts = [str(each) if isinstance(each, int) and not isinstance(each, bool) else _one(each, flag, where) for each in value]
        if split := [each for each in texts if "," in each]:
            raise UsageError(f"{where}: expected one entry in each text, got {reprlib.repr(split[0])}", hint='["dog", "cat"]')
        return ", ".join(texts)
    if is_list and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # devices = 0
    if flag.repeats:
        return [_one(each, flag, where) for each in (value if isinstance(value, list) else [value])]
    if flag.count == 1:
        return _one(value, flag, where)
    if not isinstance(value, list) or len(value) != flag.count:
        raise UsageError(
            f"{where}: expected {flag.count} values, got {reprlib.repr(value)}",
            hint=f"[{', '.join([_KINDS[flag.kind][1]] * flag.count)}]",
        )
    return [_one(each, flag, where) for each in value]


def _one(value: Any, flag: Flag, where: str) -> Any:
    kinds: dict[str, type | tuple[type, ...]] = {"text": str, "integer": int, "number": (int, float), "switch": bool}
    is_right = isinstance(value, kinds[flag.kind]) and isinstance(value, bool) == (flag.kind == "switch")
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        kind, example = _KINDS[flag.kind]
        raise UsageError(
            f"{where}: expected {kind}, got {reprlib.repr(value)}",
            hint=f"{where.rpartition(' ')[2]} = {_mended(value, flag, example)}",
        )
    return value


def _mended(value: Any, flag: Flag, example: str) -> str:
    """The value as it should be written, where its meaning is plain."""
    if flag.kind in ("integer", "number") and isinstance(value, str) and value.strip().isdecimal():
        return value.strip()[:20]
    if flag.kind == "switch" and str(value).lower() in ("no", "off", "false", "0"):
        return "false"
    if flag.kind == "text" and isinstance(value, int | float) and not isinstance(value, bool):
        return f'"{str(value)[:20]}"'
    return example
