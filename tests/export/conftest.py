"""What the exporters' tests share: real photographs where the machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """Paths of the real VOC photographs, sorted. Skips, naming the folder, where there are none."""
    folder = Path(os.environ.get("WSSS_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "voc_pairs" / "JPEGImages"
    if not folder.is_dir():
        pytest.skip(f"needs real photographs in {folder} (or $WSSS_TEST_DATA)")
    return sorted(folder.glob("*.jpg"))
