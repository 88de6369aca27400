"""Class files of other tools: parsed as they are meant, or refused; what may not be meant is announced."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from wsss import class_files
from wsss.classes import MAX_LETTERS, MAX_WORDINGS, ClassList, Names, class_list, parse_classes
from wsss.errors import ClassError

CATEGORIES = [
    {"id": number, "name": name, "supercategory": "any"} for number, name in ((1, "cat"), (2, "traffic_light"), (3, "bird"))
]


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the command line would print."""
    monkeypatch.setattr(logging.getLogger("wsss"), "propagate", True)
    caplog.set_level(logging.INFO, "wsss")
    return caplog


def read(folder: Path, name: str, content: str | bytes) -> ClassList:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return parse_classes(str(folder / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # lists
        ("a.txt", "cat\n\ntraffic_light\nbird # a comment\n# another\n"),
        ("a.txt", "\ufeffcat\r\ntraffic_light\r\nbird\r\n"),
        ("a.txt", "cat\rtraffic_light\rbird\r"),
        ("a.txt", "cat\ntraffic_light\nbird\n".encode("utf-16")),
        ("a.names", "  cat \n\ttraffic_light\t\nbird"),
        ("a.txt", "* cat\n* traffic_light\n* bird\n"),
        # numbered
        ("a.txt", "0 cat\n1 traffic_light\n2 bird\n"),
        ("a.txt", "0: cat\n1: traffic_light\n2: bird\n"),
        ("a.txt", "1\tcat\n2\ttraffic_light\n3\tbird\n"),
        ("a.txt", "1. cat\n2. traffic_light\n3. bird\n"),
        ("a.txt", "0, cat\n1, traffic_light\n2, bird\n"),
        ("a.txt", "cat 0\ntraffic_light 1\nbird 2\n"),
        ("a.txt", "cat: 1\ntraffic_light: 2\nbird: 3\n"),
        ("a.txt", "n02121808 cat\nn06874185 traffic_light\nn01503061 bird\n"),
        # tools
        ("labelmap.txt", "# label:color_rgb:parts:actions\ncat:128,0,0::\ntraffic_light:0,128,0::\nbird:1,2,3:head,tail:fly\n"),
        (
            "a.pbtxt",
            "item {\n  id: 2\n  name: 'traffic_light'\n}\nitem {\n  name: \"cat\"\n  id: 1\n}\nitem { id: 9 name: 'bird' }",
        ),
        ("a.txt", "item { id: 1 name: '/m/01yrx' display_name: 'cat' }\nitem{id:2 name:'traffic_light'}\nitem{id:3 name:'bird'}"),
        ("a.csv", "name\ncat\ntraffic_light\nbird\n"),
        ("a.csv", '"cat"\n"traffic_light"\n"bird"\n'),
        ("a.txt", '"cat",\n"traffic_light",\n"bird"\n'),
        ("a.csv", "cat,traffic_light,bird\n"),
        ("a.csv", "id,name\n1,cat\n3,bird\n2,traffic_light\n"),
        ("a.csv", "name,r,g,b\ncat,64,128,64\ntraffic_light,192,0,128\nbird,0,128,192\n"),
        ("a.csv", "cat;0\ntraffic_light;1\nbird;2\n"),
        ("a.tsv", "Index\tName\n0\tcat\n1\ttraffic_light\n2\tbird\n"),
        # documents
        ("a.yaml", "train: ../train/images\nval: ../val/images\n\nnc: 3\nnames: ['cat', 'traffic_light', 'bird']\n"),
        ("a.yaml", "path: .\nnames:\n- cat\n- traffic_light\n- bird\n"),
        ("a.yml", "names:\n  0: cat\n  1: traffic_light\n  2: bird\ndownload: |\n  yes: no\n"),
        ("a.yaml", "names:\n  2: bird\n  0: cat\n  1: traffic_light\n"),
        ("a.yaml", "- cat\n- traffic_light\n- bird\n"),
        ("a.yaml", "cat:\ntraffic_light:\nbird:\n"),
        ("a.txt", "- cat\n- traffic_light\n- bird\n"),
        ("a.txt", "nc: 3\nnames: [cat, traffic_light, bird]\n"),
        ("a.txt", "['cat', 'traffic_light', 'bird']"),
        ("a.txt", '["cat",\n "traffic_light",\n "bird"]'),
        ("a.json", b'\xef\xbb\xbf["cat", "traffic_light", "bird"]'),
        ("a.json", '[{"id": 1, "name": "cat"}, {"id": 3, "name": "bird"}, {"id": 2, "name": "traffic_light"}]'),
        ("a.json", '[{"name": "cat", "color": "#fff"}, {"name": "traffic_light"}, {"name": "bird"}]'),
        ("a.json", json.dumps({"info": {}, "images": [], "annotations": [], "licenses": [], "categories": CATEGORIES})),
        ("a.json", '{"0": "cat", "1": "traffic_light", "2": "bird"}'),
        ("a.json", '{"cat": 0, "bird": 2, "traffic_light": 1}'),
        ("a.json", '{"model_type": "x", "id2label": {"0": "cat", "1": "traffic_light", "2": "bird"}, "label2id": {"cat": 0}}'),
        ("a.json", '{"classes": ["cat", "traffic_light", "bird"]}'),
        ("a.json", '{"cat": {}, "traffic_light": null, "bird": ["bird"]}'),
        ("a.toml", 'classes = ["cat", "traffic_light", "bird"]\n'),
        ("a.toml", 'names = "cat, traffic_light, bird"\n'),
        ("a.txt", 'classes = ["cat", "traffic_light", "bird"]\n'),
    ],
)
def test_one_list_in_every_form(tmp_path: Path, warned: pytest.LogCaptureFixture, name: str, content: str | bytes) -> None:
    classes = read(tmp_path, name, content)
    assert classes.names == ("cat", "traffic_light", "bird")
    assert classes.phrases == classes.prompts == (("cat",), ("traffic light",), ("bird",))
    assert classes.negatives == ()
    assert "left out" not in warned.text
    assert ("not kept" in warned.text) == ("id: 9" in str(content)), "a gap in the numbers is announced, nothing else"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("dog # the pet\n#cat\nC#\n", ("dog", "C#")),
        ("3 wheeler\ndog\n", ("3 wheeler", "dog")),
        ("0\n1\n2\n", ("0", "1", "2")),
        ("thing 0\ndog\n", ("thing 0", "dog")),
        ("odd thing 0\nodd thing 1\n", ("odd thing 0", "odd thing 1")),
        ("crane (machine)\ncrane (bird)\n", ("crane (machine)", "crane (bird)")),
        ("dog\n- statue\n", ("dog",)),
        ("train: railway train\nval\n", ("train", "val")),
        ("می‌خواهم\n", ("می‌خواهم",)),
    ],
)
def test_names_that_look_like_something_else(tmp_path: Path, content: str, names: tuple[str, ...]) -> None:
    assert read(tmp_path, "a.txt", content).names == names


def test_synonyms_of_wordnet_are_wordings(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "n01440764 tench, Tinca tinca\n").phrases == (("tench", "tinca tinca"),)


@pytest.mark.parametrize(
    ("name", "content", "said", "hint"),
    [
        ("a.txt", "armoire, wardrobe\nalarm_clock\n", "expected one class per line", "armoire: wardrobe"),
        ("a.txt", "name\ndog\n", "is a column header", "remove it"),
        ("a.txt", "0: dog\ncat\n", "some lines are numbered and some are not: '0: dog'", "number all"),
        ("a.txt", "0 dog\n1 cat\nbird\n", "some lines are numbered", "number all"),
        ("a.txt", "1 dog\n2 cat\nbird\n", "some lines are numbered", "number all"),
        ("a.txt", "5 dog\n6 cat\n", "ascend from 0 or 1", "JSON"),
        ("a.txt", "0 dog\n0 cat\n", "ascend from", "JSON"),
        ("a.txt", "dog 128 0 0\ncat 0 128 0\n", "names and colors", "only the names"),
        ("a.txt", "dog\tcat\n", "'\\t'", ""),
        ("a.txt", "dog# comment\ncat", "is # part of the name", "space before"),
        ("a.txt", "dog\n!\n", "a negative prompt has no name", "!statue"),
        ("a.txt", "dog\nn02084071\n", "an ID of WordNet", "name"),
        ("a.txt", "'dog'\n'cat'\n", "is in quotes", "write 'dog'"),
        ("a.txt", "dog\n" * 400_000, "expected at most 5,000 lines, got 400,001", "4,096"),
        ("a.txt", "\n".join(f"thing{n}" for n in range(4_900)), "got 4,900", "split"),
        ("a.txt", "x" * 20_000, "at most 10,000 characters", "one name per line"),
        ("a.txt", "x" * 9_000, "at most 500 characters, got 9,000", "short"),
        ("a.txt", "<annotation>\n</annotation>", "got XML or HTML", "JSON"),
        ("a.txt", "dog\x00\n", "'\\x00'", "invisible"),
        ("a.txt", "d\n".encode("utf-16-le"), "'\\x00'", "invisible"),
        ("a.txt", b"caf\xe9\n", "expected UTF-8 text", "UTF-8"),
        ("a.txt", "red disc: white cross\nblue ring: white cross\n", "'red disc' and 'blue ring' share the wording", "keep it"),
        ("a.txt", "dog: puppy\nPuppy\n", "'dog' and 'Puppy' share the wording 'puppy'", "keep it"),
        ("a.txt", "dog\n!Dog\n", "'dog' is a negative and a wording of the class 'dog'", "keep one"),
        ("a.csv", "1,dog,brown\n2,cat,gray\n", "which column has the names", "id,name"),
        ("a.csv", "name\ndog,brown\n", "expected 1 columns", "quote"),
        ("a.csv", "id,name\none,dog\n", "expected a number in column 1", "1,dog"),
        ("a.csv", '"dog\n', "expected CSV", "JSON"),
        ("a.csv", "id,name\n1,dog\n1,cat\n", "'dog' and 'cat' have the same number, 1", "own"),
        ("a.pbtxt", "item { id: 1 }", "an item with id and name", "item {"),
        ("a.pbtxt", "item { id: 1 name: 'dog'", "a label map of items", "item {"),
        ("a.yaml", "nc: 3\nnames: [dog, cat]", "nc is 3, names has 2 entries", "correct"),
        ("a.yaml", "nc: 3\ntrain: x", "expected names beside nc", "names:"),
        ("a.yaml", "names:\ntrain: x", "names: expected class names, got null", "names:"),
        ("a.yaml", "names: [yes, no]", "expected a list of strings, got true", 'quote it: "yes"'),
        ("a.yaml", "names: {0: dog, 1: no}", "expected a list of strings, got false", "quote"),
        ("a.yaml", "names: [1, 2]", "got 1", "quote"),
        ("a.yaml", "dog\ncat", "expected class names, got 'dog cat'", "JSON"),
        ("a.yaml", "a: &x [dog]\nnames: *x", "YAML without aliases", "write the names out"),
        ("a.yaml", "names: [dog]\nnames: [cat]", "'names' occurs twice", "keep one"),
        ("a.yaml", "names: [dog", "expected YAML", "JSON"),
        ("a.yaml", "names: !!python/object/apply:os.system ['true']", "expected YAML", "JSON"),
        ("a.yaml", "[" * 100_000, "nested too deep", "JSON"),
        ("a.yaml", "? [a]\n: b\n", "expected YAML", "JSON"),
        ("a.yaml", "names: 2001-13-45", "expected YAML", "JSON"),
        ("a.yaml", "- dog\n" * 100_000, "expected at most 5,000 lines", "4,096"),
        ("a.yaml", "[" + "dog, " * 80_000 + "]", "YAML of at most", "JSON"),
        ("a.json", "[" * 200_000, "nested too deep", "JSON"),
        ("a.json", json.dumps([f"thing{n}" for n in range(40_000)]), "got 40,000", "split"),
        ("a.json", json.dumps({f"thing{n}": {} for n in range(40_000)}), "got 40,000", "split"),
        ("a.json", '{"images": [], "annotations": [{"id": 1}]}', "expected a list of strings", "quote"),
        ("a.json", '{"version": "5.0", "shapes": []}', "'version': expected {", "another tool"),
        ("a.json", '{"labels": ["tag"], "dog": {}}', "is labels the list of classes, or a class beside 'dog'", "prompts"),
        ("a.json", '{"names": ["tag"], "negatives": ["dog"]}', "is names the list", "prompts"),
        ("a.json", '[{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]', "have the same number", "own"),
        (
            "a.json",
            '[{"id": 2, "name": "dog"}, {"name": "cat"}]',
            "'cat' has no number, and other classes have one",
            "number all",
        ),
        ("a.json", '[{"id": 1, "title": "dog"}]', "expected entries with a name", '"name"'),
        ("a.json", '["dog", null]', "got null", "quote"),
        ("a.json", '{"dog": ["hound"], "cat": ["Hound"]}', "share the wording 'hound'", "keep it"),
        ("a.json", '{"dog": {"prompts": "hound"}}', "expected a list of strings, got 'hound'", "puppy"),
        ("a.json", json.dumps({"dog": [f"dog {n}" for n in range(2_000)]}), "at most 1000 wordings, got 2000", "best"),
        ("a.toml", "classes = 3\n", "classes: expected class names, got 3", "dog"),
        ("a.toml", 'classes = ["dog"', "expected TOML", "classes ="),
        ("a.toml", "a = " + "[\n" * 4_000, "nested too deep", "classes ="),
        ("a.txt", "dog\nbackground\ncat\n", "'background' is listed between classes", "label 0"),
        ("a.json", '{"0": "dog", "1": "void", "2": "cat"}', "'void' is listed between classes", "label 0"),
        ("a.txt", "background\n", "empty", "--classes voc"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_hint(
    tmp_path: Path, name: str, content: str | bytes, said: str, hint: str
) -> None:
    with pytest.raises(ClassError) as caught:
        read(tmp_path, name, content)
    assert caught.value.message.startswith(f"--classes {tmp_path / name}: ")
    assert said in caught.value.message
    assert caught.value.hint and hint in caught.value.hint
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("limit", "most", "name", "content", "said"),
    [
        ("MAX_LINES", 2, "a.txt", "dog\n{}", "expected at most 2 lines, got 3"),
        ("MAX_LINE", 10, "a.txt", "dog: puppy{}", "expected lines of at most 10 characters, got 11"),
        ("MAX_YAML_BYTES", 12, "a.yaml", "names: [dog]{}", "expected YAML of at most 12 characters, got 13"),
        ("MAX_LIST_BYTES", 3, "a.txt", "dog{}", "expected at most 3 bytes, got 4"),
        ("MAX_JSON_BYTES", 7, "a.json", '["dog"]{}', "expected at most 7 bytes, got 8"),
    ],
)
def test_a_file_of_the_largest_size_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int, name: str, content: str, said: str
) -> None:
    monkeypatch.setattr(class_files, limit, most)
    if limit == "MAX_JSON_BYTES":  # whatever lists of names may take
        monkeypatch.setattr(class_files, "MAX_LIST_BYTES", 1)
    assert read(tmp_path, name, content.format("")).names == ("dog",)
    with pytest.raises(ClassError, match=said):
        read(tmp_path, name, content.format("\n" if limit != "MAX_LINE" else "x"))


@pytest.mark.parametrize(("longest", "text"), [(MAX_LETTERS, "x" * MAX_LETTERS), (MAX_WORDINGS, "dog:" + "a," * MAX_WORDINGS)])
def test_a_name_of_the_most_letters_and_a_class_of_the_most_wordings(longest: int, text: str) -> None:
    assert len(class_list([text])) == 1
    with pytest.raises(ClassError, match=f"at most {longest}"):
        class_list([f"{text}a"])


@pytest.mark.parametrize(
    ("name", "content", "left"),
    [
        ("a.txt", "background\ndog\ncat\n", "'background'"),
        ("a.txt", "_background_\n__ignore__\ndog\ncat\n", "'_background_', '__ignore__'"),
        ("a.txt", "void\ndog\ncat\nunlabeled\n", "'void', 'unlabeled'"),
        ("a.txt", "0: unlabeled\n1: dog\n2: cat\n", "'unlabeled'"),
        ("a.json", '{"0": "Background", "1": "dog", "2": "cat", "255": "void"}', "'Background', 'void'"),
        ("a.json", '{"background": 0, "dog": 1, "cat": 2}', "'background'"),
        ("labelmap.txt", "dog:128,0,0::\nbackground:0,0,0::\ncat:0,128,0::\n", "'background'"),
        ("a.pbtxt", "item { id: 0 name: 'background' } item { id: 1 name: 'dog' } item { id: 2 name: 'cat' }", "'background'"),
        ("a.pbtxt", "item { id: 1 name: 'background' } item { id: 2 name: 'dog' } item { id: 3 name: 'cat' }", "'background'"),
    ],
)
def test_labels_0_and_255_are_no_classes(
    tmp_path: Path, warned: pytest.LogCaptureFixture, name: str, content: str, left: str
) -> None:
    assert read(tmp_path, name, content).names == ("dog", "cat")
    assert f"left out {left}, which is not a class to look for; labels are 1 'dog' to 2 'cat'" in warned.text


def test_numbers_that_move_by_one_are_announced(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    read(tmp_path, "a.txt", "0 dog\n1 cat\n")
    (record,) = warned.records
    assert record.levelname == "INFO"
    assert record.message.endswith("labels are 1 'dog' to 2 'cat'; 0 is background")


def test_digits_as_names_are_announced(warned: pytest.LogCaptureFixture) -> None:
    assert parse_classes("dog, 2, 3").names == ("dog", "2", "3")
    assert "2, 3: the models look for these digits" in warned.text


@pytest.mark.parametrize("name", ["background", "Void", "__ignore__", "unlabeled"])
def test_nor_on_the_command_line(name: str) -> None:
    with pytest.raises(ClassError, match="is not a class to look for") as caught:
        parse_classes(f"{name}, dog")
    assert "remove it" in caught.value.hint


def test_a_plural_beside_its_singular_is_announced(warned: pytest.LogCaptureFixture) -> None:
    parse_classes("dog, dogs")
    assert "'dog' and 'dogs' differ only by an s" in warned.text
    warned.clear()
    for quiet in ("voc", "coco", "mini", "glass, glasses"):
        parse_classes(quiet)
    assert not warned.text


@pytest.mark.parametrize("sign", list("\x00\x07\t\n\x1b\x7f\x85\u2028\u2029\u202e\u2066\u200b\ufeff\ufffd\ue000\ud800"))
@pytest.mark.parametrize("where", ["name", "synonym", "negative", "prompt"])
def test_what_no_one_types_is_refused_everywhere(tmp_path: Path, sign: str, where: str) -> None:
    text = f"do{sign}g"
    told = {"name": {text: {}}, "synonym": {"x": ["x", text]}, "negative": {"x": {}, "negatives": [text]}}
    told["prompt"] = {"x": {"prompts": [text]}}
    with pytest.raises(ClassError) as caught:
        read(tmp_path, "a.json", json.dumps(told[where]))
    assert repr(sign) in caught.value.message and (sign.isprintable() or sign not in caught.value.message) and caught.value.hint
    with pytest.raises(ClassError):
        ClassList(names=("x",), prompts=(("x",),), phrases=(("x",),), negatives=(text,))
    if sign not in "\t\n\u2028\u2029\x85":
        with pytest.raises(ClassError):
            class_list([{"name": text, "negative": f"x\n!{text}"}.get(where, f"x: {text}")])


@pytest.mark.parametrize("text", ['[" "]', '["dog", "\\u3000"]', '{"": {}}', '{"dog": {"phrases": ["."]}}'])
def test_names_of_nothing_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ClassError, match="has no name|empty prompt or phrase") as caught:
        read(tmp_path, "a.json", text)
    assert caught.value.hint


def test_a_pipe_is_no_class_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "classes")
    with pytest.raises(ClassError, match="expected a regular file, got a named pipe"):
        parse_classes(str(tmp_path / "classes"))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("pottedplant", 1),
        ("Potted Plant", 1),
        ("potted-plant", 1),
        ("potted__plant", 1),
        ("CAFÉ", 2),
        ("cafe\u0301", 2),
        ("cafe", None),
        ("hot dog", 3),
        ("hotdog", 4),
        ("hot-dog", None),
        ("", None),
        ("\ud800", None),
    ],
)
def test_a_class_is_found_as_people_write_it(name: str, label: int | None) -> None:
    assert class_list(["pottedplant", "café", "hot dog", "hotdog"]).find(name) == label


def test_of_names_that_differ_by_case_alone_each_is_found_as_it_is_written_and_else_the_first() -> None:
    names = Names(["Dog", "dog"])
    assert [names.find(name) for name in ("Dog", "dog", "DOG")] == [1, 2, 1]
    assert names.nearest("dgo") == "Dog"


def test_the_nearest_class() -> None:
    classes = class_list(["Traffic_Light", "dog"])
    assert classes.nearest("trafic light") == "Traffic_Light"
    assert classes.nearest("zebra") is None
    assert classes.nearest("") is None
