"""From a name typed after ``--engine`` to loaded engines."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal, cast

from ..errors import UsageError, WsssError
from ..spec import Model
from .engine import Engine

EngineName = Literal["auto", "ort", "eager"]
ENGINES: tuple[EngineName, ...] = ("auto", "ort", "eager")


def open_graph(model: Model, graph: str, engine: str, *, device: str = "cpu") -> Engine:
    """Loads one graph of a model.

    Args:
        model: from ``Bundle.model``, files already checked.
        graph: a name in its manifest.
        engine: ``auto`` takes the best that works on this machine.
        device: ``cpu`` or ``cuda``; ``eager`` and ``ort`` take it.

    Raises:
        UsageError: an engine of another name.
        WsssError: the engine's package is missing; the message holds the line that installs it.
    """
    name = resolve(engine)
    if name == "ort":
        from .ort import OrtEngine

        return OrtEngine(model.path(graph), model.graph(graph), device=device)
    # PyTorch modules are rebuilt from weights, which only `export` can do; it stands above this folder, hence by name.
    try:
        reference = importlib.import_module("wsss.export.reference")
    except ModuleNotFoundError as error:
        raise WsssError(f"--engine eager: needs {error.name}", hint="pip install 'wsss[export]'") from None
    return cast(Callable[..., Engine], reference.open_eager)(model, graph, device=device)


def resolve(engine: str) -> EngineName:
    """The engine that ``engine`` stands for: ``auto`` becomes a name. Raises UsageError for an unknown one."""
    if engine not in ENGINES:
        raise UsageError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    return "ort" if engine == "auto" else cast(EngineName, engine)
