"""Graphs of the eager engine: the traced modules, rebuilt from the weights that a model was exported from."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..engines.eager import EagerEngine
from ..engines.engine import Engine
from ..spec import Model, read_manifest
from .exporting import prepare_again
from .family import Graph


def open_eager(model: Model, graph: str, *, device: str = "cpu") -> Engine:
    """One graph of a model in PyTorch; graphs of one model share its weights.

    Raises:
        BundleError: the model has no such graph.
        WeightsError: the weights it was exported from are missing or changed.
    """
    spec = model.graph(graph)
    return EagerEngine(_graphs(model.folder, model.manifest.identity())[graph].module, spec, device=device)


@lru_cache(maxsize=3)  # the models of one bundle
def _graphs(folder: Path, identity: str) -> dict[str, Graph]:
    graphs = (make() for make in prepare_again(read_manifest(folder)).graphs)
    return {graph.name: graph for graph in graphs}
