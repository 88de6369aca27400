"""The commands that install missing extras."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from urllib.parse import unquote, urlsplit

from .errors import WsssError


def install_line(extra: str) -> str:
    """The command that adds an extra to this installation: from its folder, its git URL, or the package index."""
    origin = _origin()
    url = str(origin.get("url", ""))
    if url.startswith("file://"):
        editable = "-e " if "dir_info" in origin else ""
        return f"pip install {editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    if "vcs_info" in origin:
        return f"pip install 'wsss[{extra}] @ git+{url}'"
    return f"pip install 'wsss[{extra}]'"


def _origin() -> dict[str, object]:
    """The content of ``direct_url.json`` (PEP 610). Build leftovers in the current folder are distributions without one."""
    for found in metadata.distributions(name="wsss"):
        with suppress(ValueError):
            if text := found.read_text("direct_url.json"):
                return dict(json.loads(text))
    return {}


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Convert a ModuleNotFoundError into a WsssError with the command that installs the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("wsss"):
            raise
        raise WsssError(f"this command needs {error.name}, which is not installed", hint=install_line(extra)) from None
