"""Reads boxes from PASCAL VOC annotations: a folder of XML files named after the photographs.

Source of the format: VOC 2012 devkit, section "Annotation": corners are 1-based and inclusive.
"""

from __future__ import annotations

import codecs
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import WsssError
from ...reading.documents import decode_text, read_bytes
from .boxes import Annotation, GivenBox, size_of
from .names import image_key, stem_of

MAX_BYTES = 1 << 24
"""Most bytes of one annotation."""
_CHILDREN = {"folder", "filename", "path", "source", "owner", "size", "segmented", "object", "database", "verified"}
_HINT = "--boxes needs one VOC XML file for each image, with its name"
_DECLARED = re.compile(rb"""\s*<\?xml[^>]{0,99}?\sencoding\s*=\s*["']([\w.:-]{1,40})["']""")
_ENCODINGS = ("utf", "ascii", "iso8859", "cp", "gb", "big5", "euc", "shift_jis", "koi8", "mac", "tis-620")
"""Prefixes of the names of Python's text encodings."""
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030"}
"""Some tools declare one of these but write characters of its superset."""


class AnnotationFolder:
    """Annotation files named after the photographs (`Index`): ``a/dog.xml`` or ``a/dog.jpg.xml`` for ``a/dog.jpg``, or all in
    one folder.

    Args:
        what, ending, hint: what messages call a file, its ending, and the hint for a missing one.

    Raises:
        WsssError: the names of two files differ only in the case of the ending or in Unicode form.
    """

    def __init__(self, folder: Path, files: Iterable[Path], what: str, ending: str, hint: str) -> None:
        self._folder, self._what, self._ending, self._hint = folder, what, ending, hint
        self._files: dict[str, Path] = {}
        self._by_stem: dict[str, Path] | None = None
        for path in files:
            key = image_key(path.relative_to(folder).with_suffix("").as_posix())
            if (earlier := self._files.setdefault(key, path)) != path:
                raise WsssError(f"--boxes {folder}: {earlier.name!r} and {path.name!r} are of the same image", hint="keep one")

    def find(self, photo: str) -> str | None:
        """The key of a photograph's file: one in the same sub-folder as the photograph, else one in the folder itself."""
        name = image_key(photo)
        stem = stem_of(photo)
        parent, _, last = name.rpartition("/")
        beside = f"{parent}/" if parent else ""
        return next((key for key in (beside + last, beside + stem, last, stem) if key in self._files), None)

    def path(self, key: str) -> Path:
        """The file of this key."""
        return self._files[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def missing(self, photo: str) -> WsssError:
        """The error for a photograph without a file; its hint gives a file of the same stem, also in another folder or case."""
        if self._by_stem is None:
            self._by_stem = {stem_of(key).casefold(): path for key, path in self._files.items()}
        hint = self._hint
        if near := self._by_stem.get(stem_of(photo).casefold()):
            hint = f"there is {near}: " + (
                f"if it is the photograph's, give its folder: --boxes {near.parent}"
                if near.parent != self._folder and near.stem in (stem_of(photo), image_key(photo).rpartition("/")[2])
                else "the names must be the same, in upper and lower case, too"
            )
        return WsssError(f"has no {self._what} {stem_of(photo)}{self._ending} in {self._folder}", hint=hint)


class VocBoxes:
    """Boxes of a folder of VOC XML files (`BoxSource`)."""

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.index = AnnotationFolder(folder, files, "annotation", ".xml", _HINT)

    def read(self, key: str) -> Annotation:
        """As `BoxSource.read`; refuses an annotation whose ``<filename>`` names a photograph with another annotation."""
        path = self.index.path(key)
        annotation = read_voc_xml(path)
        named = annotation.filename
        if named and stem_of(named) != stem_of(key):
            parent = key.rpartition("/")[0]
            other = self.index.find(f"{parent}/{named}")
            if other not in (None, key):
                raise WsssError(
                    f"{path}: <filename> is {named!r}, which has its own annotation, {self.index.path(other or '').name}",
                    hint="name each XML file after its photograph, and correct or remove <filename>",
                )
        return annotation


def read_voc_xml(path: Path) -> Annotation:
    """Read a PASCAL VOC annotation; 1-based inclusive corners become 0-based with exclusive far edges.

    Raises:
        WsssError: unreadable, not a VOC annotation, an object without a box, or not in the declared encoding.
    """
    where = str(path)
    root = _parsed(read_bytes(path, hint=_HINT, max_bytes=MAX_BYTES), where)
    if root.tag != "annotation":
        raise WsssError(
            f"{where}: expected a VOC annotation, whose root is <annotation>, got <{root.tag}>", hint=_other_kind(root)
        )
    objects = root.findall("object")
    for child in root:
        if child.tag not in _CHILDREN and (not objects or child.find(".//object") is not None):
            raise WsssError(
                f"{where}: expected a VOC annotation, got <{child.tag}> in <annotation>",
                hint="objects must be in <object> elements",
            )
    size = root.find("size")
    return Annotation(
        where=where,
        boxes=[_box(element, where) for element in objects],
        size=None if size is None else size_of(_optional(size, "height", where), _optional(size, "width", where), where),
        filename=re.split(r"[/\\]", _text(root, "filename"))[-1],
        folder=re.split(r"[/\\]", _text(root, "folder"))[-1],
    )


def _parsed(data: bytes, where: str) -> ElementTree.Element:
    """Parse an XML document and remove namespaces from all names."""
    text = _decoded(data, where)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise WsssError(
            f"{where}: declares a document type or entities, which VOC annotations do not have", hint="remove <!DOCTYPE"
        )
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise WsssError(f"{where}: expected a VOC annotation: {error}", hint=_HINT) from None
    for element in root.iter():
        if isinstance(element.tag, str):
            element.tag = element.tag.rpartition("}")[2]
    return root


def _decoded(data: bytes, where: str) -> str:
    declared = _DECLARED.match(data)
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or not declared:
        if data[:2] in (b"<\0", b"\0<"):
            return data.decode("utf-16-le" if data[:1] == b"<" else "utf-16-be", "replace")
        return decode_text(
            data,
            where,
            hint='save it as UTF-8, or declare its encoding, such as iso-8859-1 or gb2312: <?xml version="1.0" encoding="NAME"?>',
        )
    name = declared[1].decode()
    try:
        codec = codecs.lookup(name).name
        if not codec.startswith(_ENCODINGS):
            raise LookupError
        return data.decode(_WIDER.get(codec, codec))
    except LookupError:
        raise WsssError(f"{where}: declares the unknown encoding {name!r}", hint="save it as UTF-8") from None
    except UnicodeError:
        raise WsssError(f"{where}: is not in the encoding that it declares, {name}", hint="save it as UTF-8") from None


def _box(thing: ElementTree.Element, where: str) -> GivenBox:
    name = _text(thing, "name")
    if not name:
        raise WsssError(f"{where}: expected a <name> in each <object>", hint="<object><name>dog</name><bndbox>...")
    box = thing.find("bndbox")
    if box is None:
        kinds = ", ".join(f"<{child.tag}>" for child in thing if child.tag in ("polygon", "robndbox", "segm", "points"))
        raise WsssError(
            f"{where}: expected a <bndbox> in each <object>, got {kinds or 'none'} for {name!r}",
            hint="write the upright box: <bndbox><xmin>48</xmin><ymin>240</ymin><xmax>195</xmax><ymax>371</ymax></bndbox>",
        )
    x0, y0, x1, y1 = (_number(box, side, where) for side in ("xmin", "ymin", "xmax", "ymax"))
    # The smaller coordinate is the near edge, even if the corners are swapped.
    near_x, near_y = x0 <= x1, y0 <= y1
    return GivenBox(name, (x0 - near_x, y0 - near_y, x1 - (not near_x), y1 - (not near_y)))


def _number(element: ElementTree.Element, tag: str, where: str) -> float:
    text = _text(element, tag)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise WsssError(f"{where}: expected a number in <{tag}>, got {text[:60]!r}", hint="coordinates and sizes are pixels")
    return number


def _optional(element: ElementTree.Element, tag: str, where: str) -> float | None:
    return _number(element, tag, where) if _text(element, tag) else None


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _other_kind(root: ElementTree.Element) -> str:
    if root.tag == "annotations" and root.find("image") is not None:
        return 'this is "CVAT for images": export as PASCAL VOC or COCO instead'
    return f"is it a file of another kind beside the image? {_HINT}"
