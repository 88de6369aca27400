"""Class lists: every way to write one, and every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from wsss.classes import MAX_CLASSES, MAX_NAMES, ClassList, backgrounds_for, check_label_map, cleaned, palette, parse_classes
from wsss.errors import ClassError, WsssError

BACKGROUNDS = (
    *("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway", "railroad"),
    *("keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley", "bridge", "sign"),
)


@pytest.mark.parametrize("text", ["", "  ", ",", " , ,", "!grass", "-grass, !tree"])
def test_a_list_without_a_class_is_refused(text: str) -> None:
    with pytest.raises(ClassError, match="empty") as caught:
        parse_classes(text)
    assert "--classes voc" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "names", "phrases"),
    [
        ("dog", ("dog",), (("dog",),)),
        ("dog, potted plant", ("dog", "potted plant"), (("dog",), ("potted plant",))),
        ("Golden  Retriever,traffic_light,", ("Golden Retriever", "traffic_light"), (("golden retriever",), ("traffic light",))),
        ("cocoa,", ("cocoa",), (("cocoa",),)),
        ("mink", ("mink",), (("mink",),)),
        ("'s-Gravenhage, 5\"", ("'s-Gravenhage", '5"'), (("'s-gravenhage",), ('5"',))),
        ("',", ("'",), (("'",),)),
        ("café", ("café",), (("café",),)),
        ("dog, !statue, -toy dog", ("dog",), (("dog",),)),
    ],
)
def test_names_on_the_command_line(text: str, names: tuple[str, ...], phrases: tuple[tuple[str, ...], ...]) -> None:
    classes = parse_classes(text)
    assert (classes.names, classes.phrases, classes.prompts) == (names, phrases, phrases)
    assert classes.negatives == (("statue", "toy dog") if "!" in text else ())


@pytest.mark.parametrize(("name", "count"), [("voc", 20), ("COCO", 80), ("mini", 12)])
def test_named_lists_are_complete(name: str, count: int) -> None:
    classes = parse_classes(name)
    assert len(classes) == len(set(classes.names)) == count
    assert all(phrase == cleaned(phrase) for phrases in classes.phrases for phrase in phrases)


def test_voc_is_in_the_official_order_with_the_wordings_of_clip_es() -> None:
    voc = parse_classes("voc")
    assert voc.names[0] == "aeroplane"
    assert voc.names[10] == "diningtable"
    assert voc.names[14:16] == ("person", "pottedplant")
    assert voc.names[-1] == "tvmonitor"
    assert voc.prompts[14] == ("person with clothes,people,human",)
    assert voc.prompts[-1] == ("tvmonitor screen",)


def test_the_detector_reads_coco_s_names() -> None:
    """Grounding-DINO's authors evaluate it with them; VOC's are other names of some of these classes."""
    voc, coco = parse_classes("voc"), parse_classes("coco")
    assert coco.phrases == tuple((name,) for name in coco.names)
    assert all(phrase in coco.names for phrases in voc.phrases for phrase in phrases)
    other = {name: phrases[0] for name, phrases in zip(voc.names, voc.phrases, strict=True) if phrases != (name,)}
    assert other == {
        "aeroplane": "airplane",
        "diningtable": "dining table",
        "motorbike": "motorcycle",
        "pottedplant": "potted plant",
        "sofa": "couch",
        "tvmonitor": "tv",
    }


def test_coco_is_in_the_official_order() -> None:
    coco = parse_classes("coco")
    assert [coco.names.index(name) for name in ("person", "stop sign", "bear", "couch", "tv", "toothbrush")] == [
        0,
        11,
        21,
        57,
        62,
        79,
    ]
    assert coco.prompts[57] == ("sofa",)
    assert coco.prompts[24] == ("backpack,bag",)


@pytest.mark.parametrize(
    ("file", "content", "names", "prompts", "negatives"),
    [
        ("c.txt", "dog\n\n# a comment\ncat  # another\n", ("dog", "cat"), (("dog",), ("cat",)), ()),
        (
            "c.txt",
            "\ufeffPerson: people, human\r\n!statue\r\n-toy\r\n",
            ("Person",),
            (("person", "people", "human"),),
            ("statue", "toy"),
        ),
        ("voc.names", "dog\ncat", ("dog", "cat"), (("dog",), ("cat",)), ()),
        ("c.json", '["dog", "cat"]', ("dog", "cat"), (("dog",), ("cat",)), ()),
        ("c.json", '{"dog": {}, "cat": ["cat", "kitten"]}', ("dog", "cat"), (("dog",), ("cat", "kitten")), ()),
        ("c.json", '{"dog": {"prompts": ["a dog, a hound"]}, "negatives": ["Toy"]}', ("dog",), (("a dog, a hound",),), ("toy",)),
    ],
)
def test_files(
    tmp_path: Path,
    file: str,
    content: str,
    names: tuple[str, ...],
    prompts: tuple[tuple[str, ...], ...],
    negatives: tuple[str, ...],
) -> None:
    (tmp_path / file).write_bytes(content.encode())
    classes = parse_classes(str(tmp_path / file))
    assert (classes.names, classes.prompts, classes.negatives) == (names, prompts, negatives)


def test_json_gives_the_detector_its_own_phrases(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"tv": {"prompts": ["tv screen"], "phrases": ["TV", "tv set."]}}))
    assert parse_classes(str(tmp_path / "c.json")).phrases == (("tv", "tv set"),)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("vocc", "did you mean voc", "--classes voc"),
        ("voc2012", "did you mean voc", "--classes voc"),
        ("cocoa", "did you mean coco", '"cocoa,"'),
        ("pascal_voc_2012", "did you mean voc", "--classes voc"),
        ("mscoco", "did you mean coco", "--classes coco"),
        ("dog|cat", "contains |", "commas"),
        ("nowhere/list.txt", "no such file", "one name per line"),
        ("list.json", "no such file", "voc, coco, mini"),
        ("dog, cat, Dog", "'Dog' occurs twice", "'dog'"),
        ("traffic light, traffic_light", "occurs twice", ""),
        ("dog.", "split the detector's caption", "'dog'"),
        ("St. Bernard, cat", "'St. Bernard' contains .", "'St Bernard'"),
        ("what?", "contains ?", "'what'"),
        ("dog [SEP], cat", "contains [ ]", "'dog SEP'"),
        ("dog; cat", "contains ;", "'dog cat'"),
        ('"dog", cat', "the class name '\"dog\"' is in quotes", "write 'dog'"),
        ("background, dog", "labels 0", "remove"),
        (",".join(f"thing{n}" for n in range(MAX_NAMES + 1)), "got 4,097", "split"),
    ],
)
def test_mistakes_are_named_with_a_way_out(text: str, said: str, hint: str) -> None:
    with pytest.raises(WsssError) as caught:
        parse_classes(text)
    assert isinstance(caught.value, ClassError)
    assert said in caught.value.message
    assert caught.value.message.startswith("--classes")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("c.txt", b"", "empty"),
        ("c.txt", b"dog\ncat\ndog\n", "'dog' occurs twice"),
        ("c.txt", b"caf\xe9", "expected UTF-8 text"),
        ("c.json", b"{", "expected JSON"),
        ("c.json", b"3", "expected class names"),
        ("c.json", b'["dog", 3]', "list of strings"),
        ("c.json", b'["dog", "dog"]', "occurs twice"),
        ("c.json", b'{"dog": {}, "dog": {}}', "occurs twice"),
        ("c.json", b'{"dog": {"phrase": ["dog"]}}', "expected {"),
        ("c.json", b'{"dog": {"prompts": []}}', "empty prompt"),
        ("c.json", b'{"dog.": {}}', "split"),
    ],
)
def test_mistakes_in_files_name_the_file(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ClassError) as caught:
        parse_classes(str(tmp_path / file))
    assert said in caught.value.message
    assert file in caught.value.message


def test_254_classes_fit_a_label_map() -> None:
    long = ",".join(f"thing{number}" for number in range(MAX_CLASSES + 1))
    fitting = parse_classes(long.rpartition(",")[0])
    assert len(check_label_map(fitting)) == 254
    with pytest.raises(ClassError, match="at most 254 classes in an 8-bit label map, got 255") as caught:
        check_label_map(parse_classes(long))
    assert "--stage detect" in caught.value.hint


def test_a_list_made_in_python_is_checked_too() -> None:
    with pytest.raises(ClassError, match="not clean"):
        ClassList(names=("dog",), prompts=(("dog",),), phrases=(("Dog.",),))
    with pytest.raises(ClassError, match="1 names, 0 prompts"):
        ClassList(names=("dog",), prompts=(), phrases=(("dog",),))


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("dog", set()),
        ("voc", set()),
        ("coco", {"keyboard", "sign"}),  # as CLIP-ES's BACKGROUND_CATEGORY_COCO
        ("Trees, house cat", {"tree"}),
        ("street", {"street"}),
    ],
)
def test_backgrounds_that_are_classes_are_dropped(text: str, dropped: set[str]) -> None:
    kept = backgrounds_for(parse_classes(text), BACKGROUNDS)
    assert set(BACKGROUNDS) - set(kept) == dropped
    assert list(kept) == [name for name in BACKGROUNDS if name in kept]


def test_palette_is_vocs() -> None:
    colors = palette()
    assert (colors.shape, colors.dtype) == ((256, 3), np.uint8)
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {label: tuple(int(value) for value in colors[label]) for label in known} == known
    assert len({tuple(row) for row in colors.tolist()}) == 256
