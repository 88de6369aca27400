"""Pages made from commands and result files are up to date; the files and modules that they name exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from wsss.benchmarks.demo import SEED
from wsss.benchmarks.studies.tables import PAGES, TABLES, proofs, updated
from wsss.export.catalog import PROVEN
from wsss.mini.scenes import write_scenes

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert updated(text) == text, "run: python -m wsss.benchmarks.studies.tables"


def test_what_wsss_models_lists_as_measured_is_in_the_result_files() -> None:
    assert json.loads(PROVEN.read_text(encoding="utf-8")) == proofs(), "run: python -m wsss.benchmarks.studies.tables"


def test_every_table_stands_somewhere() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {name for name in TABLES if f"<!-- table: {name} -->" in text} == set(TABLES)


def test_the_command_reference_is_that_of_the_commands() -> None:
    module = script("commands")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: make docs"


def script(name: str) -> ModuleType:
    """A module of the folder .ci."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_of_python_run(tmp_path: Path) -> None:
    """As one program, in a folder where `wsss demo` drew its scenes."""
    write_scenes(tmp_path / "demo", 3, seed=SEED)
    text = script("examples").program()
    assert text.count("labeler.") >= 8
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", text]
    environment = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 labeled, 0 failed" in done.stdout
    assert "missing.jpg: cannot be read" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scene-1000000.png", "scene-1000000.json", "picture.jpg"}
    assert (tmp_path / "store/manifest.jsonl").read_text().count("\n") == 3


def test_the_smallest_model_is_exported_and_its_fault_seen(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
    text = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    [program] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    fault = program.replace("values.flatten(1).std(1, keepdim=True)", "values.std()")
    done, failed = (
        subprocess.run([sys.executable, "-c", each], cwd=tmp_path, capture_output=True, text=True) for each in (program, fault)
    )
    assert done.returncode == 0, done.stderr
    assert "image agrees with its reference" in done.stdout and (tmp_path / "bundle/color/manifest.json").is_file()
    assert failed.returncode == 1 and "ParityError" in failed.stderr and "row" in failed.stderr


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its code cells one after another, with the small models and drawn scenes in place of a bundle and photographs."""
    notebook = json.loads((ROOT / "docs" / "photographs.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0].startswith('BUNDLE = "bundle"\nPHOTOS = "photos"')
    write_scenes(tmp_path, 3, seed=SEED)
    cells[0] = f'BUNDLE, PHOTOS, CLASSES = "mini", {str(tmp_path / "images")!r}, ["striped box", "red disc"]'
    environment = {**os.environ, "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", "\n".join(cells)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 labeled, 0 failed" in done.stdout


@pytest.mark.parametrize("page", [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "wsss|export|engines|runtime|train|mini|benchmarks|tests|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/.-]*)`", text):
        if "*" not in name and "NAME" not in name:
            assert (ROOT / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"python -m (wsss[\w.]*)", text):
        assert importlib.util.find_spec(name) is not None, f"{page.name} names {name}"
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readme_fits_one_screen_and_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert "make demo" in text and "make test" in text
