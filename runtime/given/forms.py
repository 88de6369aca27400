"""Which form boxes are given in, told by content; and the hash of the files that decide."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ...errors import WsssError
from ...reading.documents import decode_text, parse_json, read_bytes
from .boxes import BoxSource, short
from .coco import CocoBoxes, is_coco, refuse_detections
from .own_json import JsonBoxes, ManifestBoxes
from .voc import VocBoxes
from .yolo import LISTS, YoloBoxes, class_file, is_label_file

FORMS = "a folder of VOC XML or YOLO txt files, a COCO file, a JSON file of our own, or a label store"


def open_boxes(path: Path) -> BoxSource:
    """Open boxes in any form; the content tells which, not the name.

    Args:
        path: a folder of VOC XML files, or of YOLO labels with their list of classes; a COCO file; a JSON object of images to
            boxes; a label store, or its manifest.

    Raises:
        WsssError: missing, of another form, or contradicting itself.
    """
    where = f"--boxes {path}"
    if path.is_dir():
        return _open_folder(path, where)
    if not path.exists():
        raise WsssError(f"{where}: no such file or folder", hint=FORMS)
    return _open_file(path, where)


def given_hash(path: Path) -> str:
    """SHA-256 of what ``--labels`` or ``--boxes`` names: a file, or the files of a folder that decide, with their names.

    Raises:
        WsssError: it cannot be read.
    """
    total = hashlib.sha256()
    for each in _deciding_files(path):
        name = os.fsencode(os.path.relpath(each, path)) if path.is_dir() and not _is_store(path) else b""
        data = read_bytes(each)
        total.update(b"%d %s%d " % (len(name), name, len(data)) + data)
    return total.hexdigest()


def _open_file(path: Path, where: str) -> BoxSource:
    data = read_bytes(path, where=where, hint=FORMS)
    if data.lstrip()[:1] == b"<":
        raise WsssError(f"{where}: expected a folder of XML files, got one XML file", hint=f"give its folder, or {FORMS}")
    text = decode_text(data, where)
    if _is_manifest(text):
        return ManifestBoxes(text, where)
    document = parse_json(text, where, hint=FORMS)
    if isinstance(document, dict):
        return CocoBoxes(document, where) if is_coco(document) else JsonBoxes(document, where)
    if isinstance(document, list):
        raise refuse_detections(document, where)
    raise WsssError(f"{where}: expected a JSON object of image names to lists of boxes, got {short(document)}", hint=FORMS)


def _open_folder(folder: Path, where: str) -> BoxSource:
    if _is_store(folder):
        text = "".join(decode_text(read_bytes(each, hint=FORMS), str(each)) for each in _manifests(folder))
        return ManifestBoxes(text, where)
    files = _annotation_files(folder)
    if files and files[0].suffix.lower() == ".xml":
        return VocBoxes(folder, files)
    if files:
        return YoloBoxes(folder, files)
    inside = sorted(path.name for path in folder.glob("*.json"))
    hint = f"give the file itself: --boxes {folder / inside[0]}" if inside else FORMS
    raise WsssError(f"{where}: expected {FORMS}, got a folder with none of them", hint=hint)


def _deciding_files(path: Path) -> Sequence[Path]:
    """What --labels PATH or --boxes PATH reads."""
    if not path.is_dir():
        return [path]
    if _is_store(path):
        return _manifests(path)
    files = _annotation_files(path)
    return [*files, class_file(path)] if files and files[0].suffix.lower() == ".txt" else files


def _annotation_files(folder: Path) -> list[Path]:
    """The VOC XML files below a folder, or its YOLO labels; sorted, empty where there is neither.

    Raises:
        WsssError: there are both.
    """
    found = sorted(each for each in folder.rglob("*") if each.suffix.lower() in (".xml", ".txt") and each.is_file())
    annotations = [each for each in found if each.suffix.lower() == ".xml"]
    texts = [each for each in found if each.suffix.lower() == ".txt" and each.name.lower() not in LISTS]
    labeled = next((each for each in texts if is_label_file(each)), None)
    if annotations and labeled:
        raise WsssError(
            f"--boxes {folder}: holds VOC XML files and YOLO labels: {annotations[0].name}, {labeled.name}",
            hint="give a folder with one of the two",
        )
    return texts if labeled else annotations


def _is_manifest(text: str) -> bool:
    """Is the first line one of a label store's manifest?"""
    try:
        first = json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get("path"), str)


def _is_store(folder: Path) -> bool:
    return (folder / "run.json").is_file() and bool(_manifests(folder))


def _manifests(folder: Path) -> list[Path]:
    """A store's manifests, those of shards last: their lines are newer."""
    return sorted(folder.glob("manifest*.jsonl"), key=lambda path: (path.name != "manifest.jsonl", path.name))
