"""Values of JSON files are checked against the annotations of the fields that they are for."""

from __future__ import annotations

from typing import Any

import pytest

from wsss.errors import SpecError
from wsss.reading.typed_json import MAX_DEPTH, checked


def nested(levels: int) -> Any:
    """A number in that many lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_any_value_has_a_bounded_depth() -> None:
    assert checked(Any, nested(MAX_DEPTH), "settings.x") == nested(MAX_DEPTH)
    with pytest.raises(SpecError, match=r"^settings\.x: expected at most 16 levels of lists and objects$"):
        checked(Any, nested(MAX_DEPTH + 1), "settings.x")
