"""JSON read into dataclasses: every value checked against the annotation of its field."""

from __future__ import annotations

import dataclasses
import types
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import SpecError

MAX_DEPTH = 16
"""Of lists and objects in a value of any kind."""
MAX_INT = 1 << 63


def checked(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as what an annotation says.

    Args:
        kind: ``int``, ``float``, ``str``, ``Any``, ``Literal``, ``X | Y``, ``tuple``, ``Mapping[str, X]``, or a dataclass of
            such fields; an object must have its fields, those with a default excepted, and no others.
        value: as the module ``json`` gives it.
        where: how messages name it, ``graphs.text.opset``.

    Returns:
        The value; tuples for lists, dataclasses for objects.

    Raises:
        SpecError: another type, a number that is not finite or beyond 64 bits, a string with control characters.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, of = get_origin(kind), get_args(kind)
    if kind is Any:
        return _any(value, where, 0)
    if origin is Literal:
        if isinstance(value, str) and value in of:
            return value
        raise _unlike(" or ".join(of), value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in of:
            return None
        fitting = [each for each in of if each in (int, str) and type(value) is each]
        return checked(fitting[0] if fitting else next(each for each in of if each is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (of[-1] is not ... and len(value) != len(of)):
            raise _unlike("a list" if of[-1] is ... else f"a list of {len(of)}", value, where)
        kinds = (of[0],) * len(value) if of[-1] is ... else of
        return tuple(checked(each, one, f"{where}[{n}]") for n, (each, one) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping:
        return {checked(of[0], key, where): checked(of[1], one, _at(where, key)) for key, one in _object(value, where).items()}
    return _scalar(kind, value, where)


def _record(kind: Any, value: Any, where: str) -> Any:
    told, hints = _object(value, where), _hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}
    if surplus := told.keys() - fields.keys():
        raise SpecError(f"{where or 'it'}: no field {min(surplus)!r:.80} is known")
    for name, each in fields.items():
        if name not in told and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise SpecError(f"{_at(where, name)}: missing")
    made = {name: checked(hints[name], told[name], _at(where, name)) for name in fields if name in told}
    try:
        return kind(**made)
    except SpecError as error:
        raise SpecError(f"{where}: {error.message}") from None


@lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unlike("an object", value, where)
    return value


def _scalar(kind: type[Any], value: Any, where: str) -> Any:
    if kind is float and type(value) in (int, float) and abs(value) < MAX_INT:  # NaN is below nothing
        return float(value) if type(value) is float else value
    if kind is int and type(value) is int and abs(value) < MAX_INT:
        return value
    if kind is str and type(value) is str:
        if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in value):
            raise _unlike("text without control characters", value, where)
        return value
    raise _unlike({int: "a whole number", float: "a finite number", str: "text"}[kind], value, where)


def _any(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SpecError(f"{where:.80}: expected at most {MAX_DEPTH} levels of lists and objects")
    if isinstance(value, dict):
        return {_scalar(str, key, where): _any(one, _at(where, key), depth + 1) for key, one in value.items()}
    if isinstance(value, list):
        return [_any(one, where, depth + 1) for one in value]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return _scalar(type(value), value, where)
    return value


def _at(where: str, name: str) -> str:
    return f"{where}.{name:.80}" if where else f"{name:.80}"


def _unlike(expected: str, value: Any, where: str) -> SpecError:
    return SpecError(f"{where or 'it'}: expected {expected}, got {value!r:.80}")
