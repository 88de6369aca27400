"""Convert JSON values to dataclasses, checking every value against its field's annotation."""

from __future__ import annotations

import dataclasses
import types
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import SpecError

MAX_DEPTH = 16
"""Levels of lists and objects in a value of type ``Any``."""
MAX_INT = 1 << 63


def checked(kind: Any, value: Any, where: str) -> Any:
    """Check a JSON value against an annotation and convert it.

    Args:
        kind: ``int``, ``float``, ``str``, ``Any``, ``Literal``, ``X | Y``, ``tuple``, ``Mapping[str, X]``, or a dataclass of
            such fields. An object must have all fields of the dataclass that lack a default, and no others.
        value: a value parsed by the module ``json``.
        where: its name in messages, for example ``graphs.text.opset``.

    Returns:
        The value; tuples for lists, dataclasses for objects.

    Raises:
        SpecError: wrong type, a number that is not finite or exceeds 64 bits, or a string with control characters.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _any(value, where, 0)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise _mismatch(" or ".join(arguments), value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [part for part in arguments if part is not type(None)]
        return checked(next((part for part in kinds if part in (int, str) and type(value) is part), kinds[0]), value, where)
    if origin is tuple:
        is_open = arguments[-1] is ...
        if not isinstance(value, list | tuple) or not (is_open or len(value) == len(arguments)):
            raise _mismatch("a list" if is_open else f"a list of {len(arguments)}", value, where)
        kinds = [arguments[0]] * len(value) if is_open else list(arguments)
        return tuple(checked(part, item, f"{where}[{n}]") for n, (part, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping:
        pairs = _object(value, where).items()
        return {checked(arguments[0], key, where): checked(arguments[1], item, _at(where, key)) for key, item in pairs}
    return _scalar(kind, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    record, hints = _object(value, where), _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := record.keys() - fields.keys():
        raise SpecError(f"{where or 'it'}: unknown field {min(unknown)!r:.80}")
    for name, field in fields.items():
        if name not in record and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SpecError(f"{_at(where, name)}: missing")
    arguments = {name: checked(hints[name], record[name], _at(where, name)) for name in fields if name in record}
    try:
        return kind(**arguments)
    except SpecError as error:
        raise SpecError(f"{where}: {error.message}") from None


@lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _mismatch("an object", value, where)
    return value


def _scalar(kind: type[Any], value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float) and abs(value) < MAX_INT:  # false for NaN
        return float(value) if type(value) is float else value
    if kind is int and type(value) is int and abs(value) < MAX_INT:
        return value
    if kind is str and type(value) is str:
        if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in value):
            raise _mismatch("text without control characters", value, where)
        return value
    raise _mismatch({int: "a whole number", float: "a finite number", str: "text"}[kind], value, where)


def _any(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SpecError(f"{where:.80}: expected at most {MAX_DEPTH} levels of lists and objects")
    if isinstance(value, dict):
        return {_scalar(str, key, where): _any(item, _at(where, key), depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_any(item, where, depth + 1) for item in value]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return _scalar(type(value), value, where)
    return value


def _at(where: str, name: str) -> str:
    return f"{where}.{name:.80}" if where else f"{name:.80}"


def _mismatch(expected: str, value: Any, where: str) -> SpecError:
    return SpecError(f"{where or 'it'}: expected {expected}, got {value!r:.80}")
