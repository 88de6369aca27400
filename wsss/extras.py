"""What an installation lacks, and the line that installs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from urllib.parse import unquote, urlsplit

from .errors import WsssError


def install_line(extra: str) -> str:
    """The line that adds an extra to this installation: from its folder, its git address, or the package index."""
    origin = _origin()
    url = str(origin.get("url", ""))
    if url.startswith("file://"):
        editable = "-e " if "dir_info" in origin else ""
        return f"pip install {editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    if "vcs_info" in origin:
        return f"pip install 'wsss[{extra}] @ git+{url}'"
    return f"pip install 'wsss[{extra}]'"


def _origin() -> dict[str, object]:
    """``direct_url.json`` (PEP 610); build leftovers in the current folder are distributions too, but have none."""
    for found in metadata.distributions(name="wsss"):
        with suppress(ValueError):
            if text := found.read_text("direct_url.json"):
                return dict(json.loads(text))
    return {}


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a missing package of an extra into the line that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("wsss"):
            raise
        raise WsssError(f"this command needs {error.name}, which is not installed", hint=install_line(extra)) from None
