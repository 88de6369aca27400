"""Imports between packages point one way and have no cycles; the base install imports nothing heavy; the wheel is complete."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("export", "engines", "runtime", "train", "benchmarks", "mini")
TYPES, READING, PIXELS, STORE = "wsss", "wsss.reading", "wsss.pixels", "wsss.store"
CHAIN = {TYPES, "wsss.engines", "wsss.runtime"}
ALL_BUT_CLI = {
    *(TYPES, STORE, "wsss.engines", "wsss.mini", "wsss.benchmarks"),
    *("wsss.benchmarks.peers", "wsss.benchmarks.recipe", "wsss.benchmarks.studies"),
    *(
        "wsss.export",
        "wsss.export.clip",
        "wsss.export.grounding_dino",
        "wsss.export.precision",
        "wsss.export.sam",
        "wsss.export.sam3",
        "wsss.train",
        "wsss.train.apply",
        "wsss.train.dataset",
        "wsss.train.evaluate",
        "wsss.train.networks",
    ),
    *(
        "wsss.runtime",
        "wsss.runtime.given",
        "wsss.runtime.masks",
        "wsss.runtime.run",
        "wsss.runtime.ray",
        "wsss.runtime.convert",
        "wsss.runtime.report",
        "wsss.runtime.tune",
    ),
}
EXPORT = {TYPES, "wsss.engines", "wsss.export", "wsss.export.precision"}
# Packages that each package may import, besides itself. The most specific entry counts.
MAY: dict[str, set[str]] = {
    TYPES: set(),  # and `wsss.reading`, which stands on the errors alone, and `wsss.pixels`, which stands on nothing
    READING: {TYPES},
    PIXELS: set(),
    STORE: {TYPES},
    "wsss.cli": ALL_BUT_CLI | {"wsss.cli.tune"},
    "wsss.engines": {TYPES},
    "wsss.export": EXPORT,
    "wsss.export.clip": EXPORT,
    "wsss.export.grounding_dino": EXPORT,
    "wsss.export.precision": EXPORT,
    "wsss.export.sam": EXPORT,
    "wsss.export.sam3": EXPORT | {"wsss.export.clip", "wsss.export.sam"},
    "wsss.runtime": CHAIN | {STORE, "wsss.runtime.given", "wsss.runtime.masks", "wsss.runtime.run"},
    "wsss.runtime.masks": {TYPES},
    "wsss.runtime.given": {TYPES, STORE},
    "wsss.runtime.run": CHAIN | {STORE, "wsss.runtime.given", "wsss.runtime.masks"},
    "wsss.runtime.ray": CHAIN | {STORE, "wsss.runtime.run"},
    "wsss.runtime.convert": {TYPES, STORE},
    "wsss.runtime.report": {TYPES, STORE},
    "wsss.runtime.tune": CHAIN | {"wsss.train.evaluate"},
    "wsss.train": {TYPES, STORE, "wsss.train.dataset", "wsss.train.evaluate", "wsss.train.networks"},
    "wsss.train.apply": {TYPES, STORE, "wsss.train", "wsss.train.dataset", "wsss.train.evaluate"},
    "wsss.train.dataset": {TYPES, STORE, "wsss.train.evaluate"},
    "wsss.train.evaluate": {TYPES, STORE},
    "wsss.train.networks": set(),
    "wsss.mini": {TYPES, "wsss.export"},
    "wsss.benchmarks": ALL_BUT_CLI,
}
# Imports that point upward, each on purpose.
KNOWN = {
    *(("wsss", f"wsss.runtime.{name}") for name in ("chain", "labeler", "results")),  # `wsss.Labeler`, on first use
    ("wsss.__main__", "wsss.cli.main"),
    ("wsss.engines.opening", "wsss.export.reference"),  # --engine eager: the official modules, when they are asked for
    ("wsss.export.clip.family", "wsss.mini.scenes"),  # the backgrounds of the drawn scenes
    ("wsss.export.segmenter", "wsss.train.checkpoint"),  # a trained run is this model's checkpoint
    ("wsss.export.segmenter", "wsss.train.model"),
}


def module_of(path: Path) -> str:
    """``export/clip/family.py`` as wsss.export.clip.family; a package by its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "wsss" else ("wsss", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for folder in ("wsss", *MAPPED) for path in (ROOT / folder).rglob("*.py")}
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def imported(name: str, text: str) -> Iterator[str]:
    """Modules of the package, and names of others, that the text of a module imports; literal ``import_module`` too."""
    package = name.split(".") if name in PACKAGES else name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}" if f"{stem}.{alias.name}" in FILES else stem
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called == "import_module" and isinstance(node.args[0].value, str):
                yield node.args[0].value


def package_of(name: str) -> str:
    """The package that contains a module."""
    return name if name in PACKAGES else name.rpartition(".")[0]


def fault(name: str, target: str) -> str:
    """The error in this import, empty where there is none."""
    if target.split(".")[0] in MAPPED:
        return f"{name} imports {target}, which makes a second copy; write wsss.{target}"
    if target not in FILES or (name, target) in KNOWN or package_of(name) == package_of(target):
        return ""
    here = package_of(name)
    while here not in MAY:
        here = here.rpartition(".")[0]
    there = package_of(target)
    there = TYPES if there in (READING, PIXELS) else there  # what may import the shared types may import these
    allowed = there in MAY[here] or (here == "wsss.benchmarks" and there.startswith(f"{here}."))
    return "" if allowed or there == here else f"{name} imports {target}: {here} may not import {there}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_one_way(name: str) -> None:
    faults = [fault(name, target) for target in imported(name, FILES[name].read_text(encoding="utf-8"))]
    assert not any(faults), "\n".join(filter(None, faults))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wsss.runtime.detect", "from ..export import sam"),
        ("wsss.runtime.run.stream", "def late():\n    from ..convert import base"),
        ("wsss.store.local", "import importlib\nimportlib.import_module('wsss.runtime.chain')"),
        ("wsss.benchmarks.recipe.data", "from ...cli.common import log"),
        ("wsss.export.sam", "from export import clip"),
    ],
)
def test_a_planted_import_is_noticed(name: str, text: str) -> None:
    assert any(fault(name, target) for target in imported(name, text))


def test_there_are_no_import_cycles() -> None:
    """Imports inside functions count as well, except that `wsss` imports `Labeler` late."""
    arrows = {}
    for name, path in FILES.items():
        targets = set(imported(name, path.read_text(encoding="utf-8"))) & FILES.keys() - {"wsss", name}
        arrows[name] = {target for target in targets if (name, target) not in KNOWN}
    done: set[str] = set()
    for start in arrows:
        path, stack = [start], [iter(sorted(arrows[start]))]
        while stack:
            following = next(stack[-1], None)
            if following is None:
                done.add(path.pop())
                stack.pop()
            elif following in path:
                pytest.fail(" -> ".join([*path[path.index(following) :], following]))
            elif following not in done:
                path.append(following)
                stack.append(iter(sorted(arrows[following])))


def test_the_wheel_has_every_package_but_the_studies() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    not_in_it = ("wsss.benchmarks.peers", "wsss.benchmarks.studies", "wsss.benchmarks.recipe")
    out = {name for name in PACKAGES if name.startswith(not_in_it)}
    assert set(settings["packages"]) == PACKAGES - out
    assert settings["package-dir"] == {f"wsss.{name}": name for name in MAPPED}


def test_there_are_no_second_copies() -> None:
    import wsss

    assert len(wsss.__path__) == 1
    with pytest.raises(ModuleNotFoundError):
        __import__("wsss.wsss")
    with pytest.raises(ModuleNotFoundError):
        __import__("wsss.tests")


def test_packages_are_small_and_have_a_docstring() -> None:
    for name in PACKAGES:
        files = list(FILES[name].parent.glob("*.py"))
        assert len(files) <= 18, f"{name} has {len(files)} files: which two ideas are in it?"
        assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))), f"{name} has no docstring"


# What needs an extra: the one engine that is PyTorch, and the trainer. Settings, survey and scores are in the base install.
TRAINER = (
    "checkpoint",
    "curve",
    "data",
    "distributed",
    "loop",
    "loss",
    "mask_loss",
    "model",
    "optimizer",
    "page",
    "run",
    "source",
)
WITH_TORCH = {
    "wsss.engines.eager",
    "wsss.reading.checkpoints",
    *(f"wsss.train.{name}" for name in (*TRAINER, "validate", "weights")),
    *(f"wsss.train.apply.{name}" for name in ("label_photographs", "predictor", "probabilities", "seeds", "self_train")),
    *(f"wsss.train.networks.{name}" for name in ("deeplabv2", "eomt", "vit")),
}
HEAVY = {"torch", "torchvision", "transformers", "onnx", "open_clip", "segmentation_models_pytorch", "matplotlib", "scipy"}
BASE = sorted(
    name
    for name in FILES
    if not name.startswith(("wsss.export", "wsss.mini", "wsss.benchmarks", "wsss.cli", "wsss.runtime.ray"))
    and name not in WITH_TORCH
)


ON_REQUEST = {
    "wsss.train.evaluate.crf": {"scipy"},
    "wsss.runtime.masks.regions": {"scipy"},
    "wsss.runtime.results": {"matplotlib"},
}
"""Imported by the function that needs it, which says what to install."""


@pytest.mark.parametrize("name", BASE)
def test_base_install_needs_no_torch(name: str) -> None:
    names = set(imported(name, FILES[name].read_text(encoding="utf-8")))
    heavy = {each.split(".")[0] for each in names} & HEAVY | (names & WITH_TORCH)
    assert heavy <= ON_REQUEST.get(name, set()), f"{name} imports {heavy}"


def test_the_exceptions_are_still_there() -> None:
    assert not WITH_TORCH - FILES.keys()
    assert all(name in FILES and target in FILES for name, target in KNOWN)
