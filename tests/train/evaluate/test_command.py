"""``wsss eval``: the table, the JSON, the picture, and every mistake as one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.train.evaluate.picture import write_confusion

if TYPE_CHECKING:
    from ..conftest import Answer

    Run = Callable[..., Answer]

TRUTH = {"a": [[0, 0, 1, 1]], "sub/b": [[2, 2, 2, 255]], "c": [[0, 0, 0, 0]]}
PREDICTED = {"a": [[0, 1, 1, 1]], "sub/b": [[2, 2, 255, 0]], "other": [[0, 0, 0, 0]]}


def write(folder: Path, label_maps: dict[str, list[list[int]]]) -> None:
    for name, rows in label_maps.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(rows, np.uint8)).save(path)


@pytest.fixture
def score(wsss: Run, tmp_path: Path) -> Run:
    """``wsss eval predicted truth --classes "dog, cat"``, with further flags."""
    write(tmp_path / "truth", TRUTH)
    write(tmp_path / "predicted", PREDICTED)

    def run(*flags: str | Path, predicted: str = "predicted", truth: str = "truth", classes: str = "dog, cat") -> Answer:
        return wsss("eval", predicted, truth, *(("--classes", classes) if classes else ()), *flags)

    return run


def store(folder: Path, classes: tuple[str, ...] = ("dog", "cat")) -> None:
    """The predictions as a label store in which an image failed and one label is wrong."""
    write(folder / "labels", {"a": PREDICTED["a"], "sub/b": PREDICTED["sub/b"]})
    lines = [
        {"path": "a.jpg", "label": "a.png", "classes": {classes[0]: 0.9, classes[1]: 0.2}},
        {"path": "c.jpg", "label": "c.png", "error": "not a readable image"},
        {"path": "sub/b.jpg", "label": "sub/b.png", "classes": {classes[1]: 0.5}},
    ]
    (folder / "run.json").write_text(json.dumps({"classes": classes}))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def refused(answer: Answer, code: int, *said: str) -> None:
    assert answer.code == code, answer
    assert answer.out == ""
    assert answer.err.startswith("wsss: ")
    assert "Traceback" not in answer.err
    for each in said:
        assert each in answer.err


def test_the_table(score: Run) -> None:
    answer = score()
    assert answer.code == 0
    assert answer.err == (
        "1 of 3 predictions are missing and count as errors: c\n1 other predictions are without a true label map in truth\n"
    )
    lines = [re.split(r"\s{2,}", line) for line in answer.out.splitlines()]
    assert lines[0] == ["predicted against truth: 3 images"]
    assert lines[2][1:] == ["IoU %", "precision %", "recall %", "boundary IoU %", "share of truth %"]
    # background: 1 of 6 true pixels found, nothing else said to be it (the 0 of sub/b lies on the truth's void)
    assert lines[4] == ["background", "16.67", "100.00", "16.67", "16.67", "54.55"]
    assert lines[5] == ["dog", "66.67", "66.67", "100.00", "66.67", "18.18"]
    assert lines[6] == ["cat", "66.67", "100.00", "66.67", "66.67", "27.27"]
    assert lines[8] == ["mean of 3", "50.00", "88.89", "61.11", "50.00"]
    assert lines[9] == ["without background", "66.67"]
    assert lines[11] == ["pixel accuracy 45.45 %, void 45.45 % of the pixels; 8.33 % of the truth is void and not scored"]
    assert len(lines) == 12, "a plain folder has no scores of image labels"
    widths = {len(line) for line in answer.out.splitlines()[3:8]}
    assert len(widths) == 1, "the columns are aligned"


def test_json_holds_all_of_it(score: Run) -> None:
    told: dict[str, Any] = json.loads(score("--json").out)
    assert (told["images"], told["missing"], told["unused_predictions"]) == (3, ["c"], 1)
    assert told["confusion"] == [[1, 1, 0, 4], [0, 2, 0, 0], [0, 0, 2, 1]]
    assert told["miou"] == pytest.approx(1 / 2)
    assert told["miou_without_background"] == pytest.approx(2 / 3)
    assert told["pixel_accuracy"] == pytest.approx(5 / 11)
    assert told["void_share"] == pytest.approx(5 / 11)
    assert told["truth_void_share"] == pytest.approx(1 / 12)
    assert told["warnings"] == []
    assert told["labels"] is None
    assert [each["name"] for each in told["classes"]] == ["background", "dog", "cat"]
    assert told["classes"][1]["truth_px"] == 2
    assert told["classes"][1]["predicted_px"] == 3


def test_what_no_image_has_is_null_and_a_dash(score: Run) -> None:
    told = json.loads(score("--json", classes="dog, cat, horse").out)
    assert told["classes"][3] == {
        **dict.fromkeys(("iou", "precision", "recall", "boundary_iou")),
        "name": "horse",
        "truth_px": 0,
        "predicted_px": 0,
    }
    assert told["classes_seen"] == 3
    answer = score(classes="dog, cat, horse")
    assert re.search(r"horse( +-){4} +0\.00\n", answer.out)
    assert "mean of 3 that occur  50.00" in answer.out


def test_a_list(score: Run, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("sub/b 1\n")
    answer = score("--list", "val.txt")
    assert "1 images" in answer.out
    assert answer.err == "2 other predictions are not in the list\n"


def test_a_label_store_brings_classes_and_scores(score: Run, tmp_path: Path) -> None:
    store(tmp_path / "store")
    told = json.loads(score("--json", predicted="store", classes="").out)
    assert told["predicted"] == "store/labels"
    assert told["missing"] == ["c"]
    assert told["classes"][1]["name"] == "dog"
    # Truth: a dog, sub/b cat. Said: a dog and cat, sub/b cat.
    assert told["labels"] == pytest.approx({"map": 1, "precision": 2 / 3, "recall": 1, "f1": 4 / 5, "macro_f1": 5 / 6})
    assert "image labels: mAP 100.00 %, F1 80.00 % (mean of classes 83.33 %)" in score(predicted="store").out


def test_true_labels_from_a_file(score: Run, tmp_path: Path) -> None:
    store(tmp_path / "store")
    (tmp_path / "labels.json").write_text(json.dumps({"a.jpg": ["cat"], "sub/b.jpg": [], "c.jpg": ["cat"]}))
    told = json.loads(score("--json", "--labels", "labels.json", predicted="store").out)
    # cat: sub/b 0.5 wrong, a 0.2 right, c (not labeled, so 0) right
    assert told["labels"]["map"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert told["labels"]["recall"] == pytest.approx(1 / 2)
    refused(score("--labels", "labels.json"), 1, "--labels labels.json: predicted is not a label store")


def test_a_store_made_from_boxes_has_no_scores_of_image_labels(score: Run, tmp_path: Path) -> None:
    """Nothing was tagged, which is not the same as no class found."""
    store(tmp_path / "store")
    lines = [json.loads(line) for line in (tmp_path / "store" / "manifest.jsonl").read_text().splitlines()]
    box = {"label": "dog", "score": 1.0, "xyxy": [0, 0, 2, 2], "quality": 1.0, "won_px": 2}
    lines = [line if "error" in line else {**line, "classes": {}, "boxes": [box]} for line in lines]
    (tmp_path / "store" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert json.loads(score("--json", predicted="store").out)["labels"] is None
    assert "image labels" not in score(predicted="store").out
    (tmp_path / "labels.json").write_text("{}")
    refused(score("--labels", "labels.json", predicted="store"), 1, "store was made from boxes", "hint: omit --labels")


def test_the_picture(score: Run, tmp_path: Path) -> None:
    assert score("--png", "confusion.png").code == 0
    with Image.open(tmp_path / "confusion.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    dark = (pixels == (8, 48, 107)).all(axis=-1)  # a share of 1: both true dog pixels, and nothing else
    assert 25 * 25 < dark.sum() < 34 * 34
    y, x = dark.nonzero()
    assert x.max() - x.min() < 34
    assert y.max() - y.min() < 34
    refused(score("--png", "nowhere/confusion.png"), 1, "--png nowhere/confusion.png: there is no folder nowhere", "hint: ")
    refused(
        score("--png", "confusion.png/x.png"), 1, "--png confusion.png/x.png: there is no folder confusion.png", "nothing was"
    )


def test_a_picture_of_thirty_rows_has_room_for_numbers(tmp_path: Path) -> None:
    def width(classes: int) -> int:
        names = [str(number) for number in range(classes)]
        write_confusion(np.zeros((classes + 1, classes + 2), np.int64), names, tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as image:
            return image.width

    assert width(29) > 30 * 34 > width(30)


def test_many_classes_make_a_picture_too(score: Run, tmp_path: Path) -> None:
    assert score("--png", "coco.png", classes="coco").code == 0
    with Image.open(tmp_path / "coco.png") as image:
        assert min(image.size) > 81 * 10


def test_mistakes(score: Run, wsss: Run, tmp_path: Path) -> None:
    assert "Missing argument 'PRED'" in wsss("eval").err
    assert "Missing argument 'TRUTH'" in wsss("eval", "predicted").err
    refused(score(classes=""), 2, "--classes is missing", "wsss eval predicted truth --classes voc")
    refused(score(classes="vocc"), 1, "--classes vocc: no such class list; did you mean voc?")
    refused(score(classes="dog,"), 1, "b.png: label 2, the class list ends at 1", "hint: check --classes")
    refused(score(predicted="nowhere"), 1, "nowhere: expected a folder of label maps, found nothing")
    (tmp_path / "empty").mkdir()
    refused(score(truth="empty"), 1, "empty: no label map in it")
    write(tmp_path / "others", {"x": [[0]]})
    refused(score(truth="others"), 1, "no common names: predicted has a.png, others has x.png", "hint: ")
    write(tmp_path / "sizes", {"a": [[0, 0], [0, 0]]})
    refused(score(truth="sizes"), 1, "predicted/a.png: is 4 x 1 pixels, its truth sizes/a.png is 2 x 2", "never resized")
    (tmp_path / "predicted" / "a.png").write_bytes((tmp_path / "predicted" / "a.png").read_bytes()[:50])
    refused(score(), 1, "predicted/a.png: not a readable PNG")


def test_a_store_of_other_classes(score: Run, tmp_path: Path) -> None:
    store(tmp_path / "store", ("cat", "dog"))
    refused(
        score(predicted="store"), 1, "store: a label store of the classes cat, dog (2), --classes dog, cat means dog, cat (2)"
    )
    store(tmp_path / "spelled", ("Dog", "cat"))
    assert score(predicted="spelled").code == 0
    refused(score(predicted="spelled", truth="store", classes=""), 1, "store: a label store of the classes cat, dog (2), spelled")
