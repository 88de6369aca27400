"""A trained run of twelve labels on small scenes, for the tests of what is done with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsss.train.args import config_from
from wsss.train.loop import train

from ..conftest import TINY, write_store

Trained = tuple[Path, Path, Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run after four steps, its label store, and the images."""
    folder = tmp_path_factory.mktemp("trained")
    store, images = write_store(folder)
    train(store, images, folder / "run", config_from(TINY, {"optimizer": {"steps": 4}}))
    return folder / "run", store, images
