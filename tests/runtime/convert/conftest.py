"""A store of awkward images, and its conversions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import class_list
from wsss.photographs import read_photograph
from wsss.runtime.convert.dataset import Conversion, convert
from wsss.runtime.run.listing import Folder
from wsss.store.local import LabelStore

if TYPE_CHECKING:
    pass

from .stores import CLASSES, NAMES, TURNED, scene


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos`` and their ``store``; it must not be written to."""
    root = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(3)
    for number, name in enumerate(NAMES):
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (1, 1) if name == "one.png" else (30 + number, 47)
        exif = Image.Exif()
        if name == TURNED:
            exif[0x0112] = 6
        Image.fromarray(random.integers(0, 255, (*size, 3)).astype(np.uint8)).save(path, exif=exif)
    with LabelStore(root / "store", class_list(CLASSES), {}) as store:
        for found in Folder(root / "photos"):
            photo = read_photograph(root / "photos", found.name)
            label_map, boxes = (np.zeros(photo.shape, np.uint8), []) if found.name == "empty.jpg" else scene(photo.shape, random)
            store.write(
                {
                    "path": found.name,
                    "label": found.label,
                    "bytes": photo.size_bytes,
                    "mtime_ns": photo.mtime_ns,
                    "sha256": photo.sha256,
                    "height": photo.shape[0],
                    "width": photo.shape[1],
                    "classes": {},
                    "boxes": boxes,
                    "void_px": int((label_map == 255).sum()),
                    "seconds": {},
                },
                label_map,
            )
        store.write({"path": "z.jpg", "label": "z.png", "bytes": 0, "mtime_ns": 0, "sha256": "", "error": "z.jpg: broken"}, None)
    return root


@pytest.fixture
def converted(made: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(to: str, **flags: Any) -> Path:
        convert(made / "store", made / "photos", tmp_path / to, to, **flags)
        return tmp_path / to

    return run


@pytest.fixture
def losses(made: Path, tmp_path: Path) -> Callable[[str], Conversion]:
    return lambda to: convert(made / "store", made / "photos", tmp_path / to, to)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The photographs and the store, to be harmed."""
    return Path(shutil.copytree(made, tmp_path / "copy", symlinks=True))
