"""``wsss triton``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def triton(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder of exported models, or 'mini'.")],
    out: Annotated[str, typer.Option(help="Model repository to write, or to replace.")],
    backend: Annotated[
        Literal["onnxruntime", "tensorrt"], typer.Option(help="What runs the graphs; tensorrt takes the bundle's engines.")
    ] = "onnxruntime",
    gpu: Annotated[str | None, typer.Option(help="tensorrt: name of the server's GPU, if engines for several exist.")] = None,
) -> None:
    """Write a bundle as a repository of Triton Inference Server.

    One model for each graph, with the shapes and types of the manifest. docs/triton.md has a client.
    """
    from ..export.triton import write_repository
    from ..runtime.bundles import find_bundle

    names = write_repository(find_bundle(bundle), Path(out), backend=backend, gpu=gpu)
    typer.echo(f"{out}: {', '.join(names)}\ntritonserver --model-repository={Path(out).resolve()}")
