"""Print the examples of docs/python.md as one program, which `.ci/types` checks and the tests run."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def program() -> str:
    """The code blocks of the page, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


if __name__ == "__main__":
    print(program())
