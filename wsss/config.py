"""``wsss.toml``: the working folder's answers to flags that are not typed.

    [label]
    images = "photos"
    classes = "voc"
    out = "store"

One table a command, one key a flag, spelled as typed without the dashes. What is typed wins.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import UsageError

FILE = "wsss.toml"


def read_defaults(path: Path, commands: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Flag values by command and parameter name, as click's ``default_map`` wants them; empty when there is no file.

    Args:
        commands: for every command its flags as typed, without the dashes, and their parameter names.

    Raises:
        UsageError: not TOML, or a table or key that no command or flag has; names it and the nearest right one.
    """
    if not path.is_file():
        return {}
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from None
    defaults: dict[str, dict[str, Any]] = {}
    for command, values in told.items():
        if command not in commands or not isinstance(values, dict):
            raise UsageError(f"{path}: expected tables named after commands ({', '.join(sorted(commands))}), got {command!r}")
        flags = commands[command]
        defaults[command] = {}
        for key, value in values.items():
            typed = key.replace("_", "-")
            if typed not in flags:
                near = get_close_matches(typed, flags, 1)
                raise UsageError(
                    f"{path}: [{command}] has no flag {key!r}",
                    hint=f"did you mean {near[0]!r}?" if near else f"its flags: {', '.join(sorted(flags))}",
                )
            defaults[command][flags[typed]] = value
    return defaults
