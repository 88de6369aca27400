"""``wsss.toml`` in the working folder: values for flags that are not typed.

    [label]
    images = "photos"
    classes = ["dog", "potted plant"]
    out = "store"

One table per command and one key per flag, spelled as on the command line without the dashes. A typed flag takes precedence.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError, WsssError
from ..files import write_atomically
from ..reading.documents import read_toml

FILE = "wsss.toml"
_COMMA = ("classes", "devices")
"""Flags that take a comma-separated list; TOML may give an array instead."""
_KINDS = {
    "text": ("a text", '"..."'),
    "integer": ("a whole number", "8"),
    "number": ("a number", "0.5"),
    "switch": ("true or false", "true"),
}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The type of a flag's value, as far as a TOML file can get it wrong."""

    parameter: str
    """Parameter name in the command's function."""
    kind: Literal["text", "integer", "number", "switch"] = "text"
    count: int = 1
    """Values per use: 3 for ``--batch MIN OPT MAX``."""
    repeats: bool = False
    """The flag may be given several times, so that an array may give several values."""


def read_defaults(path: Path, commands: Mapping[str, Mapping[str, Flag]]) -> dict[str, dict[str, Any]]:
    """Read flag values by command and parameter name, for click's ``default_map``; empty when there is no file.

    Args:
        commands: the flags of every command, as typed but without the dashes.

    Raises:
        UsageError: not TOML; an unknown table or key (names the closest match); a value of the wrong type.
    """
    if not os.path.lexists(path):
        return {}
    defaults: dict[str, dict[str, Any]] = {}
    for command, values in read_toml(path, error=UsageError).items():
        if command not in commands or not isinstance(values, dict):
            raise UsageError(
                f"{path}: expected tables named after commands ({', '.join(sorted(commands))}), got {reprlib.repr(command)}",
                hint="put the flags of wsss label below a line [label]",
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
        texts = [
            str(item) if isinstance(item, int) and not isinstance(item, bool) else _checked(item, flag, where) for item in value
        ]
        if split := [text for text in texts if "," in text]:
            raise UsageError(f"{where}: expected one entry in each text, got {reprlib.repr(split[0])}", hint='["dog", "cat"]')
        return ", ".join(texts)
    if is_list and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # devices = 0
    if flag.repeats:
        return [_checked(item, flag, where) for item in (value if isinstance(value, list) else [value])]
    if flag.count == 1:
        return _checked(value, flag, where)
    if not isinstance(value, list) or len(value) != flag.count:
        raise UsageError(
            f"{where}: expected {flag.count} values, got {reprlib.repr(value)}",
            hint=f"[{', '.join([_KINDS[flag.kind][1]] * flag.count)}]",
        )
    return [_checked(item, flag, where) for item in value]


def _checked(value: Any, flag: Flag, where: str) -> Any:
    kinds: dict[str, type | tuple[type, ...]] = {"text": str, "integer": int, "number": (int, float), "switch": bool}
    is_right = isinstance(value, kinds[flag.kind]) and isinstance(value, bool) == (flag.kind == "switch")
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        kind, example = _KINDS[flag.kind]
        raise UsageError(
            f"{where}: expected {kind}, got {reprlib.repr(value)}",
            hint=f"{where.rpartition(' ')[2]} = {_corrected(value, flag, example)}",
        )
    return value


def _corrected(value: Any, flag: Flag, example: str) -> str:
    """The value in the right type if its meaning is clear, otherwise ``example``."""
    if flag.kind in ("integer", "number") and isinstance(value, str) and value.strip().isdecimal():
        return value.strip()[:20]
    if flag.kind == "switch" and str(value).lower() in ("no", "off", "false", "0"):
        return "false"
    if flag.kind == "text" and isinstance(value, int | float) and not isinstance(value, bool):
        return f'"{str(value)[:20]}"'
    return example


def write_values(path: Path, table: str, values: Mapping[str, str | bool | int | float]) -> None:
    """Set values in a table of a TOML file, which is made if there is none; everything else in it stays as it is.

    Args:
        values: by parameter name; written as flags.

    Raises:
        UsageError: the file is not TOML, or its table cannot be changed line by line. WsssError: it cannot be written.
    """
    before = read_toml(path, error=UsageError) if os.path.lexists(path) else {}
    lines = path.read_text(encoding="utf-8").splitlines() if before or os.path.lexists(path) else []
    flags = {name.replace("_", "-"): value for name, value in values.items()}
    kept, inside = [], False
    for line in lines:
        if header := re.match(r"\s*\[+\s*([^\]]*?)\s*\]+", line):
            inside = header[1] == table
        key = re.match(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""", line)
        if not (inside and key and key[1].replace("_", "-") in flags):
            kept.append(line)
    start = next((row for row, line in enumerate(kept) if re.fullmatch(rf"\s*\[\s*{table}\s*\]\s*(#.*)?", line)), None)
    if start is None:
        kept += [*([""] if kept else []), f"[{table}]"]
        start = len(kept) - 1
    kept[start + 1 : start + 1] = [f"{flag} = {json.dumps(value)}" for flag, value in flags.items()]
    text = "\n".join(kept) + "\n"
    others = {key: value for key, value in before.get(table, {}).items() if key.replace("_", "-") not in flags}
    try:
        is_meant = tomllib.loads(text) == {**before, table: {**others, **flags}}
    except tomllib.TOMLDecodeError:
        is_meant = False
    if not is_meant:
        raise UsageError(
            f"{path}: the table [{table}] has a form that cannot be changed line by line",
            hint="add by hand: " + "; ".join(f"{flag} = {json.dumps(value)}" for flag, value in flags.items()),
        )
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise WsssError(f"{path}: cannot be written: {error.strerror or error}", hint="give a file you may write") from None
