"""A run over a folder: resumed, repaired, never stopped by a bad image, the same bytes whatever the batch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss import __version__
from wsss.classes import class_list
from wsss.errors import ImageError, StoreError
from wsss.runtime.chain import Chain, Rules
from wsss.runtime.run.label_folder import Summary, _in_order, _Tally, label_folder
from wsss.runtime.run.stream import Receipt
from wsss.store.local import read_history, read_label, read_records, read_run

if TYPE_CHECKING:
    from ..conftest import World

NAMES = ["black.png", "green.png", "red.png", "sub/three.png", "two.png"]


def run(world: World, photos: Path, out: Path, **how: Any) -> Summary:
    """Labels the folder with engines opened anew; ``how`` goes to `label_folder`."""
    world.engines.clear()
    return label_folder(Chain.open(world.bundle, classes=world.classes, rules=how.pop("rules", None)), photos, out, **how)


def labels(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "labels").rglob("*")) if path.is_file()}


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {record["path"]: record for record in read_records(out)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_an_empty_folder_makes_no_store(world: World, tmp_path: Path, out: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ImageError, match="no images in it"):
        run(world, tmp_path / "none", out)
    assert not out.exists()


def test_every_image_gets_a_label_of_its_size_and_a_line(world: World, photos: Path, out: Path) -> None:
    summary = run(world, photos, out)
    assert (summary.images, summary.labelled, summary.skipped, summary.failed, summary.boxes) == (5, 5, 0, 0, 7)
    assert list(summary.stage_seconds) == ["tag", "detect", "segment", "fuse"]
    assert all(0 < seconds < summary.seconds for seconds in summary.stage_seconds.values())
    assert 0 < summary.engine_seconds < summary.seconds
    assert summary.padding is not None and 0 < summary.padding < 0.3
    assert list(labels(out)) == [f"labels/{name}" for name in NAMES]
    for name in NAMES:
        with Image.open(photos / name) as photo:
            assert read_label(out / "labels" / name).shape == (photo.height, photo.width)
    assert not read_label(out / "labels" / "black.png").any()
    assert np.unique(read_label(out / "labels" / "sub" / "three.png")).tolist() == [0, 1, 2, 3]


def test_a_second_run_of_one_labeler_counts_its_own_seconds(world: World, photos: Path, tmp_path: Path) -> None:
    labeler = Chain.open(world.bundle, classes=world.classes)
    label_folder(labeler, photos, tmp_path / "first")
    before = labeler.device.seconds
    assert before > 0
    summary = label_folder(labeler, photos / "red.png", tmp_path / "second")
    assert summary.engine_seconds == pytest.approx(labeler.device.seconds - before)


def test_a_line_tells_all_of_an_image(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    record = records(out)["two.png"]
    data = (photos / "two.png").read_bytes()
    label_map = read_label(out / "labels" / "two.png")
    assert record["label"] == "two.png"
    assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (record["height"], record["width"]) == (40, 60)
    assert list(record["classes"]) == ["red", "blue"]
    assert all(0.5 < score <= 1 for score in record["classes"].values())
    assert [box["label"] for box in record["boxes"]] == ["red", "blue"]
    assert np.allclose([box["xyxy"] for box in record["boxes"]], [[0, 0, 20, 20], [30, 10, 60, 40]], atol=1.5)
    for box, value in zip(record["boxes"], (1, 3), strict=True):
        assert (box["score"], box["quality"]) == (pytest.approx(0.982, abs=1e-3), 0.9)
        assert box["won_px"] == (label_map == value).sum() <= box["area_px"]
    assert record["void_px"] == (label_map == 255).sum()
    assert record["mtime_ns"] == (photos / "two.png").stat().st_mtime_ns
    assert records(out)["black.png"]["boxes"] == []


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_the_same_bytes_whatever_the_batch(world: World, photos: Path, tmp_path: Path, batch: int) -> None:
    run(world, photos, tmp_path / "alone", batch=1)
    run(world, photos, tmp_path / "batched", batch=batch)
    assert labels(tmp_path / "alone") == labels(tmp_path / "batched")

    assert (tmp_path / "alone" / "manifest.jsonl").read_bytes() == (tmp_path / "batched" / "manifest.jsonl").read_bytes()


def test_lines_wait_for_those_before_them() -> None:
    def record(number: int) -> Receipt:
        return Receipt(number, {"path": f"{number}"})

    groups = [[record(2), record(0)], [record(4)], [], [record(1)], [record(6), record(5)]]
    paths = [[line["path"] for line in lines] for lines in _in_order(groups)]
    assert paths == [["0"], ["1", "2"], ["4", "5", "6"]], "3 never came: the run was stopped"


def test_one_image_instead_of_a_folder(world: World, photos: Path, out: Path) -> None:
    assert run(world, photos / "red.png", out).labelled == 1
    assert run(world, photos / "red.png", out).skipped == 1
    assert list(labels(out)) == ["labels/red.png"]


# ---- again ----


def test_a_second_run_does_nothing(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*.png")}
    manifest = (out / "manifest.jsonl").read_bytes()
    summary = run(world, photos, out)
    assert (summary.skipped, summary.labelled, summary.failed) == (5, 0, 0)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*.png")}
    assert manifest == (out / "manifest.jsonl").read_bytes()
    assert world.rows("clip", "image") == []


def test_a_stopped_run_goes_on(world: World, photos: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(world, photos, whole)

    def stop(summary: Summary) -> None:
        if summary.labelled == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(world, photos, stopped, batch=1, progress=stop)
    assert len(records(stopped)) == 3 <= len(labels(stopped)), "a label may be ahead of its line"
    summary = run(world, photos, stopped)
    assert (summary.skipped, summary.labelled) == (3, 2)
    assert labels(stopped) == labels(whole)
    assert list(records(stopped)) == list(records(whole))


def test_new_and_changed_images_are_done_and_no_others(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    world.save(photos / "new.png", 20, 20)
    world.save(photos / "red.png", 48, 64, green=(8, 8, 32, 40))
    summary = run(world, photos, out)
    assert (summary.images, summary.skipped, summary.labelled) == (6, 4, 2)
    assert np.unique(read_label(out / "labels" / "red.png")).tolist() == [0, 2]
    assert len(records(out)) == 6
    assert list(records(out)["red.png"]["classes"]) == ["green"]


@pytest.mark.parametrize("lost", ["label", "bytes", "line"])
def test_a_lost_label_or_line_is_made_again(world: World, photos: Path, out: Path, lost: str) -> None:
    run(world, photos, out)
    before = labels(out)
    if lost == "label":
        (out / "labels" / "red.png").unlink()
    elif lost == "bytes":
        (out / "labels" / "red.png").write_bytes(b"")
    else:
        lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
        (out / "manifest.jsonl").write_text("".join(line for line in lines if '"red.png"' not in line))
    assert run(world, photos, out).labelled == 1
    assert labels(out) == before
    assert len(list(read_records(out))) == 5


def test_other_settings_are_refused_before_any_image(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    with pytest.raises(StoreError, match="was made with rules"):
        run(world, photos, out, rules=Rules(margin=0.2))


def test_other_given_labels_are_refused(world: World, photos: Path, out: Path, tmp_path: Path) -> None:
    for label in ("red", "green"):
        (tmp_path / f"{label}.json").write_text(json.dumps({name: [label] for name in NAMES}))
        labeler = Chain.open(world.bundle, classes=world.classes, labels=tmp_path / f"{label}.json")
        if label == "red":
            label_folder(labeler, photos, out)
    with pytest.raises(StoreError, match=r'was made with given = \{"labels": '):
        label_folder(labeler, photos, out)


def test_a_store_inside_the_folder_is_not_labeled(world: World, photos: Path) -> None:
    out = photos / "store"
    assert run(world, photos, out).images == 5
    summary = run(world, photos, out)
    assert (summary.images, summary.skipped) == (5, 5)


def test_run_json_holds_what_decided_the_labels(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    saved = read_run(out)
    assert saved["rules"] == {**vars(Rules()), "tag_threshold": 0.5, "score_rule": "mean", "box_threshold": 0.3}
    assert saved["wsss"] == __version__
    assert saved["bundle"] == {
        "name": world.bundle.name,
        "variants": dict.fromkeys(("clip", "grounding-dino", "sam"), "fake"),
        "thresholds": {"tag_threshold": 0.5, "box_threshold": 0.3},
    }
    assert saved["models"] == {name: world.model(name).manifest.identity() for name in saved["models"]}
    assert read_history(out)[0]["wsss"] == __version__


def test_thresholds_that_are_the_bundle_s_are_the_same_settings(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    assert run(world, photos, out, rules=Rules(tag_threshold=0.5, box_threshold=0.3)).skipped == 5
    for rules in (Rules(tag_threshold=0.4), Rules(box_threshold=0.4)):
        with pytest.raises(StoreError, match="was made with rules"):
            run(world, photos, out, rules=rules)


def test_a_store_of_another_version_or_from_before_thresholds_were_kept_goes_on(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    saved = read_run(out)
    (out / "run.json").write_text(json.dumps({**saved, "wsss": "0.0.1", "bundle": {"name": "moved"}}))
    assert run(world, photos, out).skipped == 5
    del saved["wsss"], saved["bundle"]
    saved["rules"] |= {"tag_threshold": None, "box_threshold": None}
    (out / "run.json").write_text(json.dumps(saved))
    assert run(world, photos, out).skipped == 5
    assert run(world, photos, out, rules=Rules(tag_threshold=0.5)).skipped == 5, "None was the bundle's"
    with pytest.raises(StoreError, match="was made with rules"):
        run(world, photos, out, rules=Rules(tag_threshold=0.4))


@pytest.mark.parametrize(
    "rules", [Rules(score_rule="max"), Rules(enclosing=False), Rules(tiles=2), Rules(views=3), Rules(quality_exponent=0.5)]
)
def test_a_store_of_a_version_without_a_rule_was_made_as_that_version_did(
    world: World, photos: Path, out: Path, rules: Rules
) -> None:
    run(world, photos, out)
    saved = read_run(out)
    for name in ("tag_thresholds", "score_rule", "enclosing", "views", "tiles", "quality_exponent"):
        del saved["rules"][name]
    (out / "run.json").write_text(json.dumps(saved))
    assert run(world, photos, out).skipped == 5
    with pytest.raises(StoreError, match="was made with rules"):
        run(world, photos, out, rules=replace(rules, box_threshold=0.3))


def test_a_labeled_image_that_became_unreadable_is_not_done(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    (photos / "red.png").unlink()
    (photos / "red.png").symlink_to("gone.png")
    summary = run(world, photos, out, warn=lambda _: None)
    assert (summary.skipped, summary.failed) == (4, 1)
    assert records(out)["red.png"]["error"].startswith("red.png: cannot be read")
    again = run(world, photos, out, warn=lambda _: None)
    assert (again.skipped, again.failed_before, again.failed) == (5, 1, 0), "it could not be read then, and cannot now"


# ---- messages ----


def test_images_that_hold_nothing_and_classes_never_found(world: World, photos: Path, out: Path) -> None:
    warnings: list[str] = []
    first = run(world, photos, out, warn=warnings.append)
    assert (first.empty, first.never_found, first.warned) == (1, [], 1)
    assert warnings == [warnings[0]] and warnings[0].startswith("black.png: next to no range")
    for name in ("red.png", "two.png", "sub/three.png"):
        (photos / name).unlink()
    world.save(photos / "new.png", 20, 20)
    warnings.clear()
    second = run(world, photos, out, warn=warnings.append)
    assert (second.skipped, second.labelled, second.empty, second.never_found) == (2, 1, 2, ["red", "blue"])
    assert second.warned == 2, "those that were labeled before count too"
    assert warnings[-1] == "2 of 3 images hold none of the classes; never found: red, blue"


@pytest.mark.parametrize(("found", "warned"), [(1, True), (2, False)])
def test_half_of_the_images_without_a_class_are_warned_of(
    world: World, tmp_path: Path, out: Path, found: int, warned: bool
) -> None:
    for number in range(found):
        world.save(tmp_path / "in" / f"{number}.png", 20, 20, red=(2, 2, 9, 9), blue=(11, 2, 18, 9))
    world.save(tmp_path / "in" / "none.png", 20, 20)
    warnings: list[str] = []
    run(world, tmp_path / "in", out, warn=warnings.append)
    assert any(line.startswith(f"1 of {found + 1} images hold none of the classes") for line in warnings) == warned


@pytest.mark.parametrize(("won_px", "empty", "never_found"), [(0, 1, ["red", "blue"]), (1, 0, ["blue"])])
def test_a_class_whose_boxes_own_no_pixel_was_not_found(won_px: int, empty: int, never_found: list[str]) -> None:
    tally = _Tally(SimpleNamespace(settings={}, classes=class_list(["red", "blue"])))  # type: ignore[arg-type]
    tally.add([{"classes": {"red": 0.9}, "boxes": [{"label": "red", "won_px": won_px}]}])
    tally.report(summary := Summary())
    assert (summary.empty, summary.never_found) == (empty, never_found)


def test_failed_images_hold_neither_nothing_nor_something(world: World, tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("no")
    warnings: list[str] = []
    summary = run(world, tmp_path / "in", out, warn=warnings.append)
    assert (summary.empty, summary.describe_empty()) == (0, "")
    assert [line.partition(":")[0] for line in warnings] == ["failed"]


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        (Summary(), ""),
        (Summary(labelled=3), ""),
        (Summary(labelled=3, empty=3, never_found=["a"]), "3 of 3 images hold none of the classes; never found: a"),
        (Summary(skipped=3, failed_before=1, labelled=2, empty=1), "1 of 4 images hold none of the classes"),
        (Summary(labelled=3, never_found=list("abcdefghijkl")), "never found: a, b, c, d, e, f, g, h, i, j and 2 others"),
        (Summary(failed=2, never_found=["a"]), ""),
    ],
)
def test_how_empty_results_are_described(summary: Summary, message: str) -> None:
    assert summary.describe_empty() == message


def test_files_and_links_that_are_left_out_are_told(world: World, photos: Path, out: Path) -> None:
    (photos / "notes.txt").touch()
    warnings: list[str] = []
    assert run(world, photos, out, warn=warnings.append).left_out == {".txt": 1}
    assert not [line for line in warnings if line.startswith("left out")], "what lies beside images is no news"
    (photos / "a.heic").touch()
    (photos / "up").symlink_to(photos)
    warnings.clear()
    assert run(world, photos, out, warn=warnings.append).left_out == {".heic": 1, ".txt": 1}
    assert warnings == [
        "left out: 1 .heic, 1 of .txt",
        "left out: up: a link to a folder; label that folder itself",
    ]


# ---- bad images ----


def test_a_bad_image_is_named_and_the_run_goes_on(world: World, photos: Path, out: Path) -> None:
    (photos / "bad.jpg").write_text("no image")
    (photos / "cut.png").write_bytes((photos / "red.png").read_bytes()[:60])
    warnings: list[str] = []
    summary = run(world, photos, out, batch=2, warn=warnings.append)
    assert (summary.images, summary.labelled, summary.failed) == (7, 5, 2)
    assert [line.split(":")[1].strip() for line in warnings if line.startswith("failed:")] == ["bad.jpg", "cut.png"]
    record = records(out)["bad.jpg"]
    assert record["error"].startswith("bad.jpg: not a readable image")
    assert record["bytes"] == 8
    assert not (out / "labels" / "bad.png").exists()
    assert len(labels(out)) == 5


def test_a_batch_of_bad_images_only(world: World, tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("no")
    summary = run(world, tmp_path / "in", out, warn=lambda _: None)
    assert (summary.failed, summary.labelled, summary.boxes) == (1, 0, 0)


def test_a_failed_image_is_tried_again_when_asked_or_changed(world: World, photos: Path, out: Path) -> None:
    quiet = {"warn": lambda _: None}
    (photos / "bad.jpg").write_text("no image")
    run(world, photos, out, **quiet)
    second = run(world, photos, out, **quiet)
    assert (second.skipped, second.failed_before) == (6, 1)
    again = run(world, photos, out, retry_failed=True, **quiet)
    assert (again.skipped, again.failed) == (5, 1)
    assert len(list(read_records(out))) == 6
    Image.new("RGB", (8, 8)).save(photos / "bad.jpg")
    mended = run(world, photos, out, **quiet)
    assert (mended.skipped, mended.labelled, mended.failed) == (5, 1, 0)
    assert "error" not in records(out)["bad.jpg"]


def test_an_image_without_given_labels_fails_by_name(world: World, photos: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({name: ["red"] for name in NAMES if name != "two.png"}))
    labeler = Chain.open(world.bundle, classes=world.classes, labels=tmp_path / "labels.json")
    warnings: list[str] = []
    summary = label_folder(labeler, photos, out, warn=warnings.append)
    assert (summary.labelled, summary.failed) == (4, 1)
    assert f"failed: two.png: has no entry in {tmp_path / 'labels.json'}; add an entry, [] if empty" in warnings


def test_corrected_annotations_are_labeled_in_the_same_store(world: World, photos: Path, out: Path, tmp_path: Path) -> None:
    """Only the images whose annotation changed are labeled; the store equals one that was made without the mistakes."""
    xml, quiet = tmp_path / "xml", {"warn": lambda _: None}

    def annotate(name: str, label: str, width: int = 9) -> None:
        (xml / name).parent.mkdir(parents=True, exist_ok=True)
        box = f"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{width}</xmax><ymax>9</ymax></bndbox>"
        (xml / name).with_suffix(".xml").write_text(f"<annotation><object><name>{label}</name>{box}</object></annotation>")

    def label(out: Path, **how: bool) -> tuple[int, int, int]:
        labeler = Chain.open(world.bundle, classes=world.classes, boxes=xml, ignore_unknown=how.pop("ignore_unknown", False))
        summary = label_folder(labeler, photos, out, **quiet, **how)
        return summary.skipped, summary.labelled, summary.failed

    for name in NAMES[:3]:
        annotate(name, "red")
    annotate(NAMES[3], "cow")
    assert label(out) == (0, 3, 2)
    assert label(out) == (5, 0, 0)
    assert label(out, retry_failed=True) == (3, 0, 2)
    assert label(out, ignore_unknown=True) == (4, 1, 0)
    annotate(NAMES[3], "blue")  # corrected
    annotate(NAMES[4], "green")  # added
    annotate(NAMES[0], "red", 7)  # changed
    assert label(out) == (2, 3, 0)
    assert label(out) == (5, 0, 0)
    assert label(tmp_path / "new") == (0, 5, 0)
    assert records(out)["two.png"]["given"]
    for file in ("run.json", "manifest.jsonl"):
        assert (out / file).read_bytes() == (tmp_path / "new" / file).read_bytes()
    assert labels(out) == labels(tmp_path / "new")
    xml.rename(tmp_path / "other")
    xml = tmp_path / "other"
    with pytest.raises(StoreError, match='was made with given = {"boxes": "xml"}, this run has {"boxes": "other"}'):
        label(out)


def test_a_store_that_kept_one_hash_of_all_that_was_given_is_refused(
    world: World, photos: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "boxes.json").write_text(json.dumps({name: [] for name in NAMES}))
    labeler = Chain.open(world.bundle, classes=world.classes, boxes=tmp_path / "boxes.json")
    label_folder(labeler, photos, out, warn=lambda _: None)
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**settings, "given": {"boxes": "a" * 64}}))
    with pytest.raises(StoreError, match="made by an earlier version, which did not record what was given for each image"):
        label_folder(labeler, photos, out)


def test_an_annotation_of_two_photographs_and_one_that_exif_turns(world: World, out: Path, tmp_path: Path) -> None:
    """Boxes of the stored frame lie on the drawn rectangle; x.xml says that it is x.png's."""
    photos, xml = tmp_path / "photos", tmp_path / "xml"
    exif = Image.Exif()
    exif[0x0112] = 6
    world.save(photos / "turned.png", 30, 50, red=(5, 2, 25, 12))
    with Image.open(photos / "turned.png") as image:
        image.save(photos / "turned.png", exif=exif)
    world.save(photos / "x.png", 30, 50, red=(5, 2, 25, 12))
    world.save(photos / "x.bmp", 30, 50)
    xml.mkdir()
    box = "<bndbox><xmin>6</xmin><ymin>3</ymin><xmax>25</xmax><ymax>12</ymax></bndbox>"
    size = "<size><width>50</width><height>30</height></size>"
    outside = box.replace("<xmin>6<", "<xmin>200<").replace("<xmax>25<", "<xmax>220<")
    objects = "".join(
        f"<object><name>{name}</name>{place}</object>" for name, place in (("Red", box), ("cow", box), ("red", outside))
    )
    for name in ("x", "turned"):
        (xml / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{size}{objects}</annotation>")
    labeler = Chain.open(world.bundle, classes=world.classes, boxes=xml, ignore_unknown=True)
    warnings: list[str] = []
    summary = label_folder(labeler, photos, out, warn=warnings.append)
    assert (summary.labelled, summary.failed) == (2, 1)
    assert read_run(out)["ignored"] == {"boxes": {"cow": 2}}
    assert warnings[0] == "--ignore-unknown: left out of --boxes: cow (2)"
    assert sum("1 of 2 boxes left out: 1 outside the photograph" in each for each in warnings) == 2
    assert "x.xml: is the annotation of x.png" in records(out)["x.bmp"]["error"]
    assert records(out)["x.png"]["boxes"][0]["xyxy"] == [5, 2, 25, 12]
    assert records(out)["turned.png"]["boxes"][0]["xyxy"] == [18, 5, 28, 25]
    label_map = read_label(out / "labels" / records(out)["turned.png"]["label"])
    assert label_map[10:20, 20:26].all(), "red, seen there in the upright photograph"
    assert not label_map[:, :15].any()


def test_progress_counts_up_after_each_batch(world: World, photos: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(world, photos, out, batch=2, progress=lambda summary: seen.append((summary.labelled, summary.images)))
    assert seen == sorted(seen)
    assert 1 < len(seen) <= 5
    assert seen[-1] == (5, 5)


def test_a_labeled_image_that_became_unreadable_is_done_again_and_one_that_was_is_not(
    world: World, photos: Path, out: Path
) -> None:
    run(world, photos, out)
    (photos / "two.png").unlink()
    (photos / "two.png").symlink_to("nowhere.png")
    summary = run(world, photos, out)
    assert (summary.skipped, summary.labelled, summary.failed) == (4, 0, 1)
    assert "two.png: cannot be read" in records(out)["two.png"]["error"]
    summary = run(world, photos, out)
    assert (summary.skipped, summary.failed_before, summary.failed) == (5, 1, 0)


@pytest.mark.parametrize("lacking", ["bytes", "sha256", "mtime_ns"])
def test_a_line_that_lacks_what_tells_its_image_is_checked_by_content_or_done_again(
    world: World, photos: Path, out: Path, lacking: str
) -> None:
    run(world, photos, out)
    before = (out / "manifest.jsonl").read_bytes()
    lines = [json.loads(line) for line in before.splitlines()]
    del lines[0][lacking]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(world, photos, out).labelled == (lacking != "mtime_ns")


@pytest.mark.parametrize("lacking", ["classes", "boxes", "won_px"])
def test_a_line_of_another_version_is_done_again(world: World, photos: Path, out: Path, lacking: str) -> None:
    run(world, photos, out)
    before = (out / "manifest.jsonl").read_bytes()
    lines = [json.loads(line) for line in before.splitlines()]
    boxed = next(line for line in lines if line["boxes"])
    del (boxed["boxes"][0] if lacking == "won_px" else boxed)[lacking]
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(world, photos, out).labelled == 1
    assert (out / "manifest.jsonl").read_bytes() == before


def test_a_line_of_a_stranger_deletes_nothing(world: World, photos: Path, out: Path) -> None:
    run(world, photos, out)
    victim = out.parent / "victim.txt"
    victim.write_text("thesis")
    manifest = out / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"label": "two.png"', '"label": "../../victim.txt"'))
    with pytest.raises(StoreError, match=r"manifest\.jsonl: line 5 is damaged: label: .*victim") as caught:
        run(world, photos, out)
    assert "delete that line" in caught.value.hint
    assert victim.read_text() == "thesis"
