"""``wsss app``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ..extras import needs
from .common import BundleFlag, Engine, log


def app(
    classes: Annotated[str, typer.Option(help='voc, coco, mini, a file, or names: "dog, potted plant".')],
    bundle: BundleFlag = "bundle",
    engine: Annotated[Engine, typer.Option(help="What runs the graphs.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Serve a page that labels an uploaded photograph."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reports its use otherwise
    with needs("app"):
        import gradio  # noqa: F401  # before the models are loaded
    from ..runtime.app import page_of
    from ..runtime.labeler import Labeler

    page = page_of(Labeler.open(bundle, classes=classes, engine=engine, device=device))
    log(f"http://{host}:{port}   (Ctrl-C ends it)")
    page.launch(server_name=host, server_port=port, share=False, quiet=True)
