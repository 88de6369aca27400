"""What the report says, read from its data file, and that no name can become markup. The page itself: test_report_page.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wsss.classes import palette
from wsss.errors import ImageError, StoreError, UsageError
from wsss.runtime.chain import Chain
from wsss.runtime.report.page import write_report
from wsss.runtime.run.label_folder import label_folder
from wsss.store.format import line_of
from wsss.store.local import LabelStore

if TYPE_CHECKING:
    from ..conftest import World


@pytest.fixture
def store(world: World, photos: Path, tmp_path: Path) -> Path:
    world.save(photos / "<b>&.png", 20, 20, red=(0, 0, 20, 20))
    (photos / "bad.jpg").write_text("no")
    label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / "store", warn=lambda _: None)
    return tmp_path / "store"


def data_of(page: Path) -> dict[str, Any]:
    text = (page.with_name(f"{page.stem}.files") / "data.js").read_text()
    assert text.startswith("showReport(") and text.endswith(");\n")
    data: dict[str, Any] = json.loads(text.removeprefix("showReport(").removesuffix(");\n"))
    return data


def names(data: dict[str, Any]) -> list[str]:
    return [image[0] for image in data["images"]]


def test_the_summary_counts_every_image(store: Path, photos: Path, tmp_path: Path) -> None:
    data = data_of(write_report(store, photos, tmp_path / "page.html"))
    totals = data["totals"]
    assert {key: totals[key] for key in ("images", "empty", "boxes", "failed", "void")} == {
        "images": 6,
        "empty": 1,
        "boxes": 8,
        "failed": 1,
        "void": 0,
    }
    assert data["title"] == "store"
    assert data["settings"]["classes"] == ["red", "green", "blue"]
    [(path, reason)] = data["failures"]
    assert path == "bad.jpg"
    assert "not a readable image" in reason


def test_seconds_an_image_over_all_runs(store: Path, photos: Path, tmp_path: Path) -> None:
    runs = [
        {"labelled": 4, "seconds": 2.0, "stage_seconds": {"tag": 1.0, "fuse": 2.0}},
        {"labelled": 0, "failed": 1, "seconds": 9.0, "stage_seconds": {"tag": 9.0}},
        {"labelled": 2, "seconds": 1.0, "stage_seconds": {"tag": 0.5}},
    ]
    (store / "history.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    totals = data_of(write_report(store, photos, tmp_path / "page.html"))["totals"]
    assert totals["seconds"] == pytest.approx(0.5)
    assert totals["stages"] == {"tag": pytest.approx(0.25), "fuse": pytest.approx(2 / 6)}
    (store / "history.jsonl").unlink()
    totals = data_of(write_report(store, photos, tmp_path / "page.html"))["totals"]
    assert (totals["seconds"], totals["stages"]) == (0, {})


def test_the_classes_are_counted(store: Path, photos: Path, tmp_path: Path) -> None:
    red, green, blue = data_of(write_report(store, photos, tmp_path / "page.html"))["classes"]
    assert red["name"] == "red"
    assert red["color"] == f"rgb({', '.join(map(str, palette()[1]))})"
    assert [(each["images"], each["boxes"], each["unboxed"]) for each in (red, green, blue)] == [(4, 4, 0), (2, 2, 0), (2, 2, 0)]
    # Rectangles of conftest.photos: 20x20, 24x32, 20x30, 20x20; the scripted SAM outlines on a coarse grid.
    assert red["pixels"] == pytest.approx(400 + 768 + 600 + 400, rel=0.15)


def test_tags_without_a_box_are_counted(store: Path, photos: Path, tmp_path: Path) -> None:
    manifest = store / "manifest.jsonl"
    records = [json.loads(line) for line in manifest.read_bytes().splitlines()]
    for record in records:
        if record["path"] in ("green.png", "red.png"):
            record["classes"]["blue"] = record["classes"].get("blue", 0.9)
    manifest.write_bytes(b"".join(map(line_of, records)))
    classes = data_of(write_report(store, photos, tmp_path / "page.html"))["classes"]
    assert [(each["images"], each["unboxed"]) for each in classes] == [(4, 0), (2, 0), (2, 2)]


def test_an_image_has_its_tags_boxes_and_pictures(store: Path, photos: Path, tmp_path: Path) -> None:
    data = data_of(write_report(store, photos, tmp_path / "page.html"))
    image = next(image for image in data["images"] if image[0] == "two.png")
    _, label, photo, picture, note, width, height, doubt, parts, cause, reason, tags, boxes, version = image
    assert (label, note, width, height, len(version)) == ("two.png", "", 60, 40, 12)
    assert (tmp_path / data["files"] / photo).is_file()
    assert (tmp_path / data["files"] / picture).is_file()
    assert (tmp_path / data["photographs"] / "two.png").is_file()
    assert (tmp_path / data["labels"] / "two.png").is_file()
    assert 0 < doubt < 1000
    assert (len(parts), parts[2:]) == (4, [0, 0])
    assert cause and reason
    assert sorted(row for row, _ in tags) == [0, 2]
    assert {box[0]: box[3:] for box in boxes} == {0: [0, 0, 333, 500], 2: [500, 250, 1000, 1000]}


def test_tags_that_nothing_decided_are_not_shown(world: World, photos: Path, tmp_path: Path) -> None:
    from wsss.runtime.chain import Rules

    ungated = Chain.open(world.bundle, classes=world.classes, rules=Rules(gate=False))
    label_folder(ungated, photos, tmp_path / "store")
    data = data_of(write_report(tmp_path / "store", photos, tmp_path / "page.html"))
    assert [image[11] for image in data["images"]] == [[]] * 5
    assert [each["unboxed"] for each in data["classes"]] == [0, 0, 0]


def test_a_segmenters_store(store: Path, photos: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    without = [{**line, "boxes": []} if "boxes" in line else line for line in lines]
    (store / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    run = json.loads((store / "run.json").read_text())
    (store / "run.json").write_text(json.dumps({**run, "models": {"segmenter": "abc"}}))
    data = data_of(write_report(store, photos, tmp_path / "page.html"))
    assert (data["boxed"], data["totals"]["empty"], data["totals"]["boxes"]) == (False, 1, 0)
    assert [(each["images"], each["unboxed"]) for each in data["classes"]] == [(4, 0), (2, 0), (2, 0)]
    assert {image[9] for image in data["images"]} <= {"", "score"}


def test_doubtful_images_come_first_and_limit_keeps_them(world: World, tmp_path: Path) -> None:
    photos, scores = tmp_path / "photos", {"sure.png": 0.95, "unsure.png": 0.4, "middling.png": 0.7}
    boxes = {}
    for name, score in scores.items():
        world.save(photos / name, 20, 20, red=(0, 0, 10, 10))
        boxes[name] = [{"label": "red", "xyxy": [0, 0, 10, 10], "score": score}]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    for number in range(3):  # fail, because they have no boxes
        world.save(photos / f"unknown{number}.png", 20, 20)
    labeler = Chain.open(world.bundle, classes=world.classes, boxes=tmp_path / "boxes.json")
    label_folder(labeler, photos, tmp_path / "store", warn=lambda _: None)
    data = data_of(write_report(tmp_path / "store", photos, tmp_path / "page.html"))
    assert names(data) == ["unsure.png", "middling.png", "sure.png"]
    data = data_of(write_report(tmp_path / "store", photos, tmp_path / "page.html", limit=2))
    assert names(data) == ["unsure.png", "middling.png"]
    assert (data["totals"]["images"], data["totals"]["failed"]) == (3, 3)
    assert [name for name, _ in data["failures"]] == ["unknown0.png", "unknown1.png"]
    assert len(list((tmp_path / "page.files").glob("*/*.png"))) == 2, "the third image's label is gone"


def test_an_image_gone_from_disk_has_a_note(store: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "red.png").unlink()
    data = data_of(write_report(store, photos, tmp_path / "page.html"))
    assert {image[0]: image[4] for image in data["images"] if image[4]} == {
        "red.png": "red.png: cannot be read: No such file or directory"
    }


def test_a_page_in_the_store_and_one_elsewhere_find_their_pictures(store: Path, photos: Path, tmp_path: Path) -> None:
    data = data_of(write_report(store, photos, store / "report.html"))
    assert (data["files"], data["photographs"], data["labels"]) == ("report.files/", "../photos/", "labels/")
    (tmp_path / "a b#").mkdir()
    page = write_report(store, photos, tmp_path / "a b#" / "50%.html")
    data = data_of(page)
    assert (data["files"], data["photographs"], data["labels"]) == ("50%25.files/", "../photos/", "../store/labels/")
    assert 'src="50%25.files/data.js"' in page.read_text()


def test_names_never_become_markup(world: World, tmp_path: Path) -> None:
    from wsss.classes import class_list

    name = "<script>alert(1)<\u2028script>\"'&.png"
    world.save(tmp_path / "photos" / name, 20, 20, red=(0, 0, 10, 10))
    (tmp_path / "photos" / "<img src=x onerror=alert(1)>.png").write_text("no")
    store = tmp_path / "<i>store&"
    labeler = Chain.open(world.bundle, classes=class_list(["red", "green"]))
    label_folder(labeler, tmp_path / "photos", store, warn=lambda _: None)
    (store / "run.json").write_text((store / "run.json").read_text().replace('"green"', '"<s>green"'))  # a stranger's
    page = write_report(store, tmp_path / "photos", tmp_path / "<u>.html")
    text = page.read_text()
    assert "<title>&lt;i&gt;store&amp; · label report</title>" in text
    assert 'src="%3Cu%3E.files/data.js"' in text
    for markup in ("<i>store", "<s>", "onerror", "alert(1)", "<u>"):
        assert markup not in text
    data = data_of(page)
    assert names(data) == [name]
    assert data["failures"][0][0] == "<img src=x onerror=alert(1)>.png"
    assert data["classes"][1]["name"] == "<s>green"
    assert re.fullmatch(r"[\x20-\x7e\n]*", (tmp_path / "<u>.files" / "data.js").read_text()), "ASCII alone"


def test_the_page_needs_no_network_and_lets_run_its_own_script_alone(store: Path, photos: Path, tmp_path: Path) -> None:
    text = write_report(store, photos, tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert re.search(
        r"default-src 'none'; img-src 'self' file:; style-src 'sha256-\S+'; script-src 'sha256-\S+' 'self' file:", text
    )
    assert len(re.findall(r"<script", text)) == 2
    assert "$" not in re.sub(r"\$\{", "", text), "every placeholder is filled"


def test_a_name_that_is_no_unicode_can_be_shown(world: World, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    world.save(photos / "plain.png", 20, 20, red=(0, 0, 10, 10))
    (photos / "plain.png").rename(photos / "caf\udce9.png")
    label_folder(Chain.open(world.bundle, classes=world.classes), photos, tmp_path / "store", warn=lambda _: None)
    data = data_of(write_report(tmp_path / "store", photos, tmp_path / "page.html"))
    assert names(data)[0].startswith("caf\ufffd")
    assert data["images"][0][2], "and its thumbnail is made"


def test_the_wrong_folder_and_no_store(world: World, store: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ImageError, match="has none of the store's images"):
        write_report(store, tmp_path / "other", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(StoreError, match="expected a label store"):
        write_report(tmp_path / "other", tmp_path / "other", tmp_path / "page.html")
    with LabelStore(tmp_path / "new", world.classes, {}):
        pass
    with pytest.raises(StoreError, match="no image in it yet"):
        write_report(tmp_path / "new", tmp_path / "other", tmp_path / "page.html")


def test_a_store_of_failures_alone_has_a_page(world: World, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.jpg").write_text("no")
    label_folder(Chain.open(world.bundle, classes=world.classes), tmp_path / "photos", tmp_path / "store", warn=lambda _: None)
    data = data_of(write_report(tmp_path / "store", tmp_path / "photos", tmp_path / "page.html"))
    assert (data["images"], data["totals"]["failed"]) == ([], 1)


def test_a_page_among_the_photographs_is_refused(store: Path, photos: Path) -> None:
    for page in (photos / "page.html", photos / "sub" / "page.html"):
        with pytest.raises(UsageError, match="would take its thumbnails for photographs"):
            write_report(store, photos, page)
    assert not (photos / "page.files").exists()


def test_a_store_below_the_photographs_takes_its_page(world: World, photos: Path) -> None:
    label_folder(Chain.open(world.bundle, classes=world.classes), photos, photos / "store")
    assert len(names(data_of(write_report(photos / "store", photos, photos / "store" / "report.html")))) == 5


BOX = {"label": "red", "score": 0.5, "quality": 0.5, "xyxy": [0, 0, 1, 1], "won_px": 1}


@pytest.mark.parametrize("changed", [{"boxes": None}, {"classes": ["red"]}, {"void_px": -1}])
def test_a_damaged_line_is_said(store: Path, photos: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    *lines, last = (store / "manifest.jsonl").read_text().splitlines()
    (store / "manifest.jsonl").write_text("\n".join([*lines, json.dumps(json.loads(last) | changed)]) + "\n")
    with pytest.raises(StoreError, match=rf"manifest\.jsonl: line {len(lines) + 1} is damaged: {next(iter(changed))}: expected"):
        write_report(store, photos, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes": [{"label": "red", "xyxy": [0, 0, 1, 1]}]}, "has a box that lacks one of label, quality, score, won_px, xyxy"),
        ({"classes": {"mauve": 0.5}}, "names mauve, which is none of the classes of run.json"),
        ({"boxes": [{**BOX, "label": "mauve"}]}, "names mauve, which is none of the classes of run.json"),
    ],
)
def test_a_line_of_another_version(store: Path, photos: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    *lines, last = (store / "manifest.jsonl").read_text().splitlines()
    record = {**json.loads(last), **changed}
    (store / "manifest.jsonl").write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    with pytest.raises(StoreError, match=f"manifest.jsonl: the line of {record['path']} {message}"):
        write_report(store, photos, tmp_path / "page.html")
    del record["void_px"]
    (store / "manifest.jsonl").write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    with pytest.raises(StoreError, match=f"the line of {record['path']} lacks void_px"):
        write_report(store, photos, tmp_path / "page.html")


def test_a_page_that_cannot_be_written_is_named(store: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(StoreError, match=r"page.html: cannot be written"):
        write_report(store, photos, tmp_path / "page.html")
