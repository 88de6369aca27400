"""VOC XML as tools write it: encodings, namespaces, other kinds of XML, and whose annotation it is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from wsss.batch import Labels, Photograph
from wsss.classes import class_list
from wsss.errors import WsssError
from wsss.runtime.given.boxes import GivenBox
from wsss.runtime.given.names import twins_of
from wsss.runtime.given.stages import BoxesFromFile
from wsss.runtime.given.voc import read_voc_xml

CLASSES = class_list(["dog", "cat", "potted plant"])
NOTHING = Labels(np.zeros((0, 3), np.float32), np.zeros((0, 3), bool))
OBJECT = "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>"
VOC = """<annotation><filename>x.jpg</filename>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>500</xmax><ymax>375</ymax></bndbox>
  <part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part></object>
<object><name> potted plant </name><bndbox><ymin>20.5</ymin><xmin>10</xmin><ymax>40</ymax><xmax>30</xmax></bndbox></object>
</annotation>"""


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def photo(name: str) -> Photograph:
    return Photograph(name=name, pixels=np.zeros((40, 60, 3), np.uint8))


def reasons(folder: Path, *names: str) -> dict[str, str]:
    """Why each of a run's photographs cannot be labeled; empty where it can."""
    given, twins = BoxesFromFile(folder, CLASSES), twins_of(names)
    return {name: str(given.missing(photo(name), twins.get(name, ())) or "") for name in names}


def test_corners_become_zero_based(tmp_path: Path) -> None:
    """1-based inclusive: a box over the whole of 500 x 375 is [0, 0, 500, 375]. A dog's head is not an object."""
    annotation = read_voc_xml(written(tmp_path / "x.xml", VOC))
    assert annotation.boxes == [GivenBox("dog", (0, 0, 500, 375)), GivenBox("potted plant", (9, 19.5, 30, 40))]
    assert (annotation.filename, annotation.size) == ("x.jpg", None)


@pytest.mark.parametrize("text", ["<annotation/>", "<annotation><size><width>6</width><height>4</height></size></annotation>"])
def test_an_empty_annotation_is_background(tmp_path: Path, text: str) -> None:
    assert read_voc_xml(written(tmp_path / "x.xml", text)).boxes == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a VOC annotation"),
        ("<annotation>", "expected a VOC annotation"),
        ("<PAMDataset><Metadata/></PAMDataset>", "got <PAMDataset>"),
        ('<annotations><image name="x.jpg"><box label="dog"/></image></annotations>', "CVAT for images"),
        (f"<doc><outputs>{OBJECT}</outputs></doc>", "got <doc>"),
        (f"<annotation><objects>{OBJECT}</objects></annotation>", "got <objects> in <annotation>"),
        ("<annotation><items/></annotation>", "got <items> in <annotation>"),
        ("<annotation><object><name>dog</name></object></annotation>", "expected a <bndbox> in each <object>, got none"),
        ("<annotation><object><name>dog</name><robndbox/></object></annotation>", "got <robndbox> for 'dog'"),
        (f"<annotation>{OBJECT.replace('<name>dog</name>', '')}</annotation>", "expected a <name>"),
        (VOC.replace("<xmin>1<", "<xmin>one<"), "expected a number in <xmin>, got 'one'"),
        (VOC.replace("<xmin>1<", "<xmin>nan<"), "expected a number in <xmin>, got 'nan'"),
        (VOC.replace("<xmin>1<", "<xmin>inf<"), "expected a number in <xmin>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "declares a document type or entities"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>'.encode("utf-16"), "declares a document type or entities"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>'.encode("utf-16-le"), "declares a document type or entities"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "declares the unknown encoding 'klingon'"),
        (b'<?xml version="1.0" encoding="zlib"?><annotation/>', "declares the unknown encoding 'zlib'"),
        (b'<?xml version="1.0" encoding="unicode_escape"?><annotation/>', "declares the unknown encoding"),
        (b'<?xml version="1.0" encoding="ascii"?><annotation>\xfc</annotation>', "not in the encoding that it declares, ascii"),
        (b"<annotation><filename>M\xfcller.jpg</filename></annotation>", "expected UTF-8 text"),
        ("<annotation><size><width>6</width></size></annotation>", "expected a height and width"),
        ("<annotation><size><width>6</width><height>4.5</height></size></annotation>", "expected a height and width"),
    ],
)
def test_what_is_no_annotation_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(WsssError) as caught:
        read_voc_xml(written(tmp_path / "x.xml", text))
    assert caught.value.message.startswith(f"{tmp_path / 'x.xml'}: ")
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("before", "encoding"),
    [
        ('<?xml version="1.0" encoding="gb2312"?>', "gb18030"),
        ('<?xml version="1.0" encoding="GBK"?>', "gbk"),
        ("<?xml version='1.0' encoding='latin-1' standalone='yes'?>", "latin-1"),
        ('<?xml version="1.0" encoding="shift_jis"?>', "shift_jis"),
        ('<?xml version="1.0" encoding="utf-16"?>', "utf-16"),
        ("", "utf-16"),
        ("", "utf-16-le"),
        ("", "utf-16-be"),
        ("", "utf-8-sig"),
        ('<?xml version="1.0"?>', "utf-8"),
    ],
)
def test_encodings(tmp_path: Path, before: str, encoding: str) -> None:
    name = "Müller" if encoding == "latin-1" else "図片" if encoding == "shift_jis" else "图片镕" if "gb" in encoding else "图片"
    text = f"{before}<annotation><filename>{name}.jpg</filename>{OBJECT}</annotation>"
    annotation = read_voc_xml(written(tmp_path / "x.xml", text.encode(encoding)))
    assert (annotation.filename, annotation.boxes) == (f"{name}.jpg", [GivenBox("dog", (0, 0, 5, 5))])


def test_namespaces(tmp_path: Path) -> None:
    text = f'<v:annotation xmlns:v="http://a"><v:folder/>{OBJECT.replace("<", "<v:").replace("<v:/", "</v:")}</v:annotation>'
    assert len(read_voc_xml(written(tmp_path / "x.xml", text)).boxes) == 1
    assert len(read_voc_xml(written(tmp_path / "x.xml", f'<annotation xmlns="http://a">{OBJECT}</annotation>')).boxes) == 1
    assert len(read_voc_xml(written(tmp_path / "x.xml", f"<annotation><time/>{OBJECT}</annotation>")).boxes) == 1, "a tool's own"


def test_a_file_much_longer_than_annotations_are_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "x.xml", "<annotation/>")
    os.truncate(path, (1 << 24) + 1)
    with pytest.raises(WsssError, match=r"x\.xml: expected at most 16,777,216 bytes"):
        read_voc_xml(path)


# ---- whose annotation ----


def test_names_of_the_files(tmp_path: Path) -> None:
    for name in ("a/x.xml", "y.png.xml", "z.XML", "cafe\u0301.xml"):
        written(tmp_path / name, f"<annotation>{OBJECT}</annotation>")
    assert reasons(tmp_path, "a/x.jpg", "deep/y.png", "z.jpg", "caf\u00e9.jpg") == dict.fromkeys(
        ("a/x.jpg", "deep/y.png", "z.jpg", "caf\u00e9.jpg"), ""
    )
    missing = reasons(tmp_path, "w.jpg")["w.jpg"]
    assert "has no annotation w.xml" in missing
    assert "hint: " in missing


def test_the_file_in_the_photograph_s_own_folder_with_its_ending_comes_first(tmp_path: Path) -> None:
    """The dog's box ends where the file says; each file is removed in turn."""
    files = ("a/x.jpg.xml", "a/x.xml", "x.jpg.xml", "x.xml")
    for end, name in enumerate(files, 10):
        written(tmp_path / name, f"<annotation>{OBJECT.replace('<xmax>5<', f'<xmax>{end}<')}</annotation>")
    for end, name in enumerate(files, 10):
        boxes = BoxesFromFile(tmp_path, CLASSES)([photo("a/x.jpg")], NOTHING)
        assert boxes.xyxy_image.tolist() == [[0, 0, end, 5]]
        (tmp_path / name).unlink()


def test_two_files_of_one_image(tmp_path: Path) -> None:
    written(tmp_path / "x.xml", "<annotation/>")
    written(tmp_path / "x.XML", "<annotation/>")
    with pytest.raises(WsssError, match="of the same image"):
        BoxesFromFile(tmp_path, CLASSES)


@pytest.mark.parametrize(
    ("fields", "owner"),
    [
        ("<filename>x.png</filename>", "x.png"),
        ("<filename>photos\\x.jpg</filename>", "x.jpg"),
        ("<filename>x.webp</filename>", None),
        ("<filename>x</filename>", None),
        ("", None),
    ],
)
def test_one_annotation_for_two_endings(tmp_path: Path, fields: str, owner: str | None) -> None:
    written(tmp_path / "x.xml", f"<annotation>{fields}{OBJECT}</annotation>")
    for name, reason in reasons(tmp_path, "x.jpg", "x.png", "y.png").items():
        if name == owner:
            assert reason == ""
        elif name[0] == "x":
            assert (f"is the annotation of {owner}" if owner else "fits 2 photographs, but belongs to one") in reason
            assert "hint: " in reason


@pytest.mark.parametrize(
    ("fields", "owner"),
    [
        ("<folder>left</folder><filename>x.png</filename>", "left/x.png"),
        ("<folder>data/right</folder>", "right/x.png"),
        ("<folder>middle</folder>", None),
        ("<filename>x.png</filename>", None),
    ],
)
def test_one_annotation_for_two_folders(tmp_path: Path, fields: str, owner: str | None) -> None:
    written(tmp_path / "x.xml", f"<annotation>{fields}{OBJECT}</annotation>")
    names = ("left/x.png", "right/x.png")
    assert [name for name, reason in reasons(tmp_path, *names).items() if not reason] == ([owner] if owner else [])
    written(tmp_path / "left" / "x.xml", f"<annotation>{OBJECT}</annotation>")
    assert not any(reasons(tmp_path, *names).values()), "each has its own"


def test_a_name_that_nobody_else_has_does_not_matter(tmp_path: Path) -> None:
    """Photographs are renamed and converted; the annotation follows the photograph by its own name."""
    written(tmp_path / "x.xml", f"<annotation><filename>IMG_1.jpg</filename>{OBJECT}</annotation>")
    assert reasons(tmp_path, "x.png") == {"x.png": ""}


def test_the_name_of_a_photograph_with_an_annotation_of_its_own(tmp_path: Path) -> None:
    written(tmp_path / "x.xml", f"<annotation><filename>y.jpg</filename>{OBJECT}</annotation>")
    written(tmp_path / "y.xml", f"<annotation>{OBJECT}</annotation>")
    found = reasons(tmp_path, "x.jpg", "y.jpg")
    assert "<filename> is 'y.jpg', which has its own annotation" in found["x.jpg"]
    assert found["y.jpg"] == ""
