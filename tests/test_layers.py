"""Imports point one way, and no mapped folder is imported under its bare name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("export", "engines", "runtime", "train", "benchmarks", "mini")
TOP = {"cli", "__main__"}  # the command line, with the folder commands/, stands above all
# Which folders each folder may import. "wsss" are the words below everyone (spec, batch, frame, ...).
MAY = {
    "wsss": set(),
    "engines": {"wsss"},
    "export": {"wsss", "engines", "export"},
    "runtime": {"wsss", "engines"},
    "train": {"wsss"},
    "mini": {"wsss", "export"},
    "benchmarks": {"wsss", "engines", "export", "runtime", "train", "mini"},
}
# export reads the configurations and weights of the small models where they are trained; classes names their list.
KNOWN = {
    ("wsss/classes.py", "mini"),
    ("wsss/__init__.py", "runtime"),
    ("export/clip/family.py", "mini"),
    ("export/segmenter.py", "train"),
}


def modules() -> list[Path]:
    return sorted(path for folder in ("wsss", "wsss/commands", *MAPPED) for path in (ROOT / folder).glob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything a module imports."""
    folder = path.parent.name
    package = ["wsss"] if folder == "wsss" else ["wsss", folder]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def folder_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "wsss":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAPPED else "wsss"


@pytest.mark.parametrize("path", modules(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_one_way(path: Path) -> None:
    folder = path.parent.name
    if folder == "commands" or (folder == "wsss" and path.stem in TOP):
        return
    for name in imported(path):
        assert name.split(".")[0] not in MAPPED, f"{path}: imports {name}, which makes a second copy; say wsss.{name}"
        target = folder_of(name)
        if target is None or target == folder or (f"{folder}/{path.name}", target) in KNOWN:
            continue
        assert target in MAY[folder], f"{path.relative_to(ROOT)} imports {name}: {folder} stands below {target}"


# What needs an extra: the one engine that is PyTorch, and the trainer. Settings, survey and scores are in the base install.
TRAINER = ("checkpoint", "curve", "data", "distributed", "loop", "loss", "mask_loss", "model", "optimizer", "page", "run")
WITH_TORCH = {"engines/eager.py", "wsss/checkpoints.py", *(f"train/{name}.py" for name in (*TRAINER, "validate", "weights"))}
HEAVY = {"torch", "torchvision", "transformers", "onnx", "open_clip", "segmentation_models_pytorch", "matplotlib", "scipy"}


@pytest.mark.parametrize("folder", ["wsss", "engines", "runtime", "train"])
def test_base_install_needs_no_torch(folder: str) -> None:
    beyond = {f"wsss.{name.removesuffix('.py').replace('/', '.')}" for name in WITH_TORCH if name.startswith("train/")}
    for path in (ROOT / folder).glob("*.py"):
        if f"{folder}/{path.name}" in WITH_TORCH:
            continue
        names = set(imported(path))
        heavy = {name.split(".")[0] for name in names} & HEAVY | {
            name for name in names if ".".join(name.split(".")[:3]) in beyond
        }
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_the_exceptions_are_still_there() -> None:
    assert not [name for name in WITH_TORCH if not (ROOT / name).is_file()]
