"""Write docs/commands.md: the help of every command, as a terminal of 100 columns shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from wsss.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """\
# Commands

Every flag may stand in a `wsss.toml` of the working folder, in a table named after the command. What is typed wins.

This page is generated from the commands themselves (`make docs`).
"""


def page() -> str:
    """The text of the page."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in root.commands.items():
        context = command.make_context(f"wsss {name}", [], resilient_parsing=True, terminal_width=100, max_content_width=100)
        parts.append(f"## wsss {name}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
