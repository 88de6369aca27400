"""The commands that install missing extras."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from urllib.parse import unquote, urlsplit

from .errors import WsssError

NVIDIA_INDEX = "https://pypi.nvidia.com"
"""Has the libraries of the full TensorRT, which are not on PyPI."""


def install_line(extra: str) -> str:
    """The command that adds an extra to this installation: from its folder, its git URL, or the package index."""
    origin = _origin()
    url = str(origin.get("url", ""))
    what = f"'wsss[{extra}]'"
    if url.startswith("file://"):
        folder = origin.get("dir_info")
        editable = "-e " if isinstance(folder, dict) and folder.get("editable") else ""
        what = f"{editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    elif "vcs_info" in origin:
        what = f"'wsss[{extra}] @ git+{url}'"
    index = f" --extra-index-url {NVIDIA_INDEX}" if extra in ("trt", "trt-cu12") else ""
    return f"pip install {what}{index}"


def replace_onnxruntime(extra: str) -> str:
    """The command that installs the extra ``cpu`` or ``gpu`` where either package of ONNX Runtime may be installed.

    Both use one folder: the last one installed overwrites the other, and removing either breaks the other.
    """
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {install_line(extra)}"


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
