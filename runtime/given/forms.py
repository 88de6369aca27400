"""Opens given boxes in the format that their content shows."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from ...errors import WsssError
from ...reading.documents import parse_json, read_bytes, short
from .boxes import BoxSource
from .coco import CocoBoxes, is_coco, refuse_detections
from .own_json import json_boxes, manifest_boxes
from .voc import VocBoxes
from .yolo import LISTS, YoloBoxes, first_line, is_label, resembles_label

FORMS = "a folder of VOC XML or YOLO txt files, a COCO file, a JSON file of images to boxes, or a label store"


def open_boxes(path: Path) -> BoxSource:
    """Open boxes in any supported format, which is recognized by content, not by name.

    Args:
        path: a folder of VOC XML files, or of YOLO labels with their list of classes; a COCO file; a JSON object of images to
            boxes; a label store, or its manifest.

    Raises:
        WsssError: missing, in another format, or inconsistent.
    """
    where = f"--boxes {path}"
    if path.is_dir():
        return _open_folder(path, where)
    if not path.exists():
        raise WsssError(f"{where}: no such file or folder", hint=FORMS)
    return _open_file(path, where)


def _open_file(path: Path, where: str) -> BoxSource:
    data = read_bytes(path, where=where, hint=FORMS)
    if data.lstrip()[:1] == b"<":
        raise WsssError(f"{where}: expected a folder of XML files, got one XML file", hint=f"give its folder, or {FORMS}")
    if _is_manifest(data):
        return manifest_boxes({where: data}, where)
    document = parse_json(data, where, hint=FORMS)
    if isinstance(document, dict):
        return CocoBoxes(document, where) if is_coco(document) else json_boxes(document, where)
    if isinstance(document, list):
        raise refuse_detections(document, where)
    raise WsssError(f"{where}: expected a JSON object of image names to lists of boxes, got {short(document)}", hint=FORMS)


def _open_folder(folder: Path, where: str) -> BoxSource:
    if _is_store(folder):
        return manifest_boxes({str(file): read_bytes(file, hint=FORMS) for file in _manifests(folder)}, where)
    files = _annotation_files(folder)
    if files and files[0].suffix.lower() == ".xml":
        return VocBoxes(folder, files)
    if files:
        return YoloBoxes(folder, files)
    text = next((path for path in _texts(folder) if first_line(path)), None)
    got = f": {text} starts with {short(first_line(text))}" if text else ""
    inside = sorted(path.name for path in folder.glob("*.json"))
    hint = f"give the file itself: --boxes {folder / inside[0]}" if inside else FORMS
    raise WsssError(f"{where}: expected {FORMS}, got a folder with none of them{got}", hint=hint)


def _annotation_files(folder: Path) -> list[Path]:
    """The VOC XML files or YOLO labels below a folder, sorted; empty where there are none.

    Raises:
        WsssError: there are both. A text file that is empty, or a list, does not count beside XML files.
    """
    annotations, texts = _files(folder, ".xml"), _texts(folder)
    labeled = next((path for path in texts if is_label(first_line(path))), None)
    if annotations and labeled:
        raise WsssError(
            f"--boxes {folder}: holds VOC XML files and YOLO labels: {annotations[0].name}, {labeled.name}",
            hint="give a folder with only one of the two",
        )
    if annotations:
        return annotations
    return texts if labeled or any(not (line := first_line(path)) or resembles_label(line) for path in texts) else []


def _texts(folder: Path) -> list[Path]:
    return [path for path in _files(folder, ".txt") if path.name.lower() not in LISTS]


def _files(folder: Path, ending: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ending and path.is_file())


def _is_manifest(data: bytes) -> bool:
    """Whether the first line is one of a label store's manifest."""
    try:
        first = json.loads(data.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0].decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get("path"), str)


def _is_store(folder: Path) -> bool:
    return (folder / "run.json").is_file() and bool(_manifests(folder))


def _manifests(folder: Path) -> list[Path]:
    """A store's manifests. Those of shards come last, for their lines are newer."""
    return sorted(folder.glob("manifest*.jsonl"), key=lambda path: (path.name != "manifest.jsonl", path.name))
