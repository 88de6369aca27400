"""Label maps that are not what they seem are refused or warned of, on the terminal and in the JSON."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.classes import palette

if TYPE_CHECKING:
    from ..conftest import Answer

    Run = Callable[..., Answer]

VOC = palette()
TRUTH = np.array([[0, 0, 1, 1], [2, 2, 2, 255]], np.uint8)
PREDICTED = np.array([[0, 1, 1, 1], [2, 2, 0, 0]], np.uint8)


def write(path: Path, label_map: np.ndarray, colors: np.ndarray | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label_map)
    if colors is not None:
        image.putpalette(colors.astype(np.uint8).tobytes())
    image.save(path, **options)


def score(wsss: Run, *flags: str, classes: str = "voc") -> tuple[dict[str, Any], str]:
    answer = wsss("eval", "predicted", "truth", "--classes", classes, "--json", *flags)
    assert answer.code == 0, answer.err
    return json.loads(answer.out), answer.err


def refused(wsss: Run, classes: str = "voc") -> str:
    answer = wsss("eval", "predicted", "truth", "--classes", classes)
    assert answer.code == 1 and answer.out == "" and "hint: " in answer.err
    return answer.err


@pytest.fixture(autouse=True)
def pair(tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "truth" / "x.png", TRUTH, VOC)
    write(tmp_path / "predicted" / "x.png", PREDICTED, VOC)


def test_honest_maps_are_scored_without_a_word(wsss: Run) -> None:
    scores, said = score(wsss)
    # background 1 of 3, aeroplane 2 of 3, bicycle 2 of 3
    assert scores["miou"] == pytest.approx(5 / 9) and scores["warnings"] == [] and said == ""
    assert scores["truth_void_share"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("classes", ["voc", "dog, cat, cow"])
@pytest.mark.parametrize("side", ["truth", "predicted"])
def test_colors_that_were_numbered_anew(side: str, classes: str, tmp_path: Path, wsss: Run) -> None:
    """RGB quantized: void is label 0, green 1, red 2, black 3."""
    write(tmp_path / side / "x.png", np.array([[3, 3, 2, 2], [1, 1, 1, 0]], np.uint8), VOC[[255, 2, 1, 0]])
    assert f"{side}/x.png: the palette contradicts the labels: label " in refused(wsss, classes)


def test_a_class_with_the_color_of_another(tmp_path: Path, wsss: Run) -> None:
    """Black stays 0, but label 1 is green: refused for VOC's classes, said where the palette may be the user's own."""
    write(tmp_path / "truth" / "x.png", TRUTH % 3, VOC[[0, 2, 1]])
    assert "label 1 has the color of VOC's label 2 (0, 128, 0)" in refused(wsss)
    scores, said = score(wsss, classes="dog, cat")
    [warning] = scores["warnings"]
    assert warning == "1 of 1 true label maps have VOC's colors at other labels: were they made from RGB?"
    assert said == f"warning: {warning}\n"


@pytest.mark.parametrize(
    "colors",
    [
        np.vstack([VOC[:21], np.zeros((235, 3))]),  # filled up with black, as many papers' code does: 255 is black
        np.repeat(np.arange(256)[:, None], 3, axis=1),  # gray
        np.vstack([VOC[:3], np.full((253, 3), 255)]),
        np.random.default_rng(0).integers(1, 255, (256, 3)),
    ],
    ids=["filled", "gray", "short", "own"],
)
def test_other_palettes_are_right(colors: np.ndarray, tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "truth" / "x.png", TRUTH, colors)
    assert score(wsss)[0]["warnings"] == [] and score(wsss)[0]["miou"] == pytest.approx(5 / 9)


def test_the_webs_palette(tmp_path: Path, wsss: Run) -> None:
    """What ``convert("P")`` makes of black and blue: labels 0 and 10 + 2 * 36, within COCO's list but for the dither."""
    colors = VOC[np.zeros((4, 4), np.uint8)]
    Image.fromarray(colors).convert("P").save(tmp_path / "predicted" / "x.png")
    write(tmp_path / "truth" / "x.png", np.array([[0, 1, 1, 1]] * 4, np.uint8))
    assert "predicted/x.png: expected labels as indices, got the web palette" in refused(wsss, "coco")


@pytest.mark.parametrize("classes", ["voc", "dog"])
def test_a_mask_of_0_and_255(classes: str, tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "truth" / "x.png", np.array([[0, 255, 255, 255], [0, 0, 0, 0]], np.uint8))
    write(tmp_path / "predicted" / "x.png", np.array([[0, 0, 0, 1], [0, 0, 0, 0]], np.uint8))
    assert "truth: its 1 label maps have only 0 and 255: 255 is void" in refused(wsss, classes)
    write(tmp_path / "truth" / "y.png", TRUTH % 2)
    write(tmp_path / "predicted" / "y.png", TRUTH % 2)
    assert score(wsss, classes=classes)[0]["warnings"] == ["1 of 2 true label maps have only 0 and 255: 255 is void, not a class"]


def test_truth_of_void_alone(tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "truth" / "x.png", np.full((2, 4), 255, np.uint8))
    assert "truth: its 1 label maps have only void (255)" in refused(wsss)


def test_a_prediction_of_0_and_255_or_of_nothing(tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "predicted" / "x.png", np.array([[0, 255, 255, 255], [0, 0, 0, 0]], np.uint8))
    assert score(wsss)[0]["warnings"] == [
        "1 of 1 predicted label maps have only 0 and 255: 255 is void, not a class",
        "no prediction has any of the 20 classes",
    ]


def test_truth_of_background_alone(tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "truth" / "x.png", np.zeros((2, 4), np.uint8))
    assert score(wsss)[0]["warnings"] == ["the truth has only background, none of the 20 classes"]


def test_one_bit(tmp_path: Path, wsss: Run) -> None:
    for side in ("truth", "predicted"):
        Image.fromarray(PREDICTED > 0).save(tmp_path / side / "x.png")
    scores, _ = score(wsss)
    assert scores["miou"] == 1
    assert [warning.partition(" label maps")[0] for warning in scores["warnings"]] == ["all 1 true", "all 1 predicted"]
    assert "only background and aeroplane, of 20 classes" in scores["warnings"][0]
    assert score(wsss, classes="dog")[0]["warnings"] == []


def test_mostly_void_truth_and_a_folder_against_itself(tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "truth" / "x.png", np.where(TRUTH == 1, TRUTH, 255).astype(np.uint8))
    assert score(wsss)[0]["warnings"] == ["75.0% of the truth's pixels are void (255) and not scored"]
    write(tmp_path / "truth" / "x.png", np.where(TRUTH == 2, 255, TRUTH).astype(np.uint8))
    assert score(wsss)[0]["warnings"] == [], "half of it is not most of it"
    answer = wsss("eval", "truth", "truth", "--classes", "voc", "--json")
    assert "truth is compared with itself" in json.loads(answer.out)["warnings"]


# ---- names ----


def test_the_photographs_suffix_in_the_name(tmp_path: Path, wsss: Run) -> None:
    (tmp_path / "predicted" / "x.png").rename(tmp_path / "predicted" / "x.jpg.png")
    scores, _ = score(wsss)
    assert scores["missing"] == [] and scores["unused_predictions"] == 0 and scores["miou"] == pytest.approx(5 / 9)
    write(tmp_path / "predicted" / "x.webp.png", PREDICTED)
    assert "truth/x.png: several predictions match: x.jpg.png, x.webp.png" in refused(wsss)
    (tmp_path / "truth" / "x.png").rename(tmp_path / "truth" / "x.webp.png")
    assert score(wsss)[0]["unused_predictions"] == 1


def test_two_names_of_one_prediction(tmp_path: Path, wsss: Run) -> None:
    write(tmp_path / "truth" / "x.jpg.png", TRUTH)
    assert "predicted/x.png: matches both x.jpg.png and x.png of truth" in refused(wsss).replace(
        "x.png and x.jpg", "x.jpg.png and x"
    )


def test_a_store_made_from_a_list(tmp_path: Path, wsss: Run) -> None:
    """Its labels keep the suffix of what is no ``.jpg``, and long names are cut: the manifest knows the photograph."""
    labels = {"one.JPG": "one.JPG.png", "two.jpeg": "two.jpeg.png", "three.png": "three.png.png", "four.jpg": "fo.0f3a.png"}
    lines = []
    for image, label in labels.items():
        write(tmp_path / "store" / "labels" / label, PREDICTED, VOC)
        write(tmp_path / "of" / f"{Path(image).stem}.png", TRUTH, VOC)
        lines.append(
            {"path": image, "label": label, "bytes": 1, "sha256": "0" * 64, "classes": {"dog": 0.5}, "height": 2, "width": 4}
        )
    (tmp_path / "store" / "run.json").write_text(json.dumps({"format": 1, "classes": ["dog", "cat"]}))
    lines.sort(key=lambda line: str(line["path"]))
    (tmp_path / "store" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = wsss("eval", "store", "of", "--json")
    scores = json.loads(answer.out)
    assert (scores["images"], scores["missing"], scores["unused_predictions"]) == (4, [], 0)
    assert scores["miou"] == pytest.approx(5 / 9)
    assert scores["labels"]["recall"] == pytest.approx(1 / 2), "the scores are found by the label's name, too"


def test_names_in_other_normal_forms(tmp_path: Path, wsss: Run) -> None:
    for side, form in (("truth", "NFC"), ("predicted", "NFD")):
        (tmp_path / side / "x.png").rename(tmp_path / side / unicodedata.normalize(form, "caf\u00e9.png"))  # type: ignore[arg-type]
    assert score(wsss)[0]["missing"] == []
    (tmp_path / "list.txt").write_text("JPEGImages\\cafe\u0301.jpg SegmentationClass\\cafe\u0301.png\r\n", encoding="utf-8")
    assert score(wsss, "--list", "list.txt")[0]["images"] == 1


def test_a_list_of_one_class(tmp_path: Path, wsss: Run) -> None:
    for side in ("truth", "predicted"):
        write(tmp_path / side / "y.png", TRUTH)
    (tmp_path / "list.txt").write_text("x  1\ny -1\n")
    [warning] = score(wsss, "--list", "list.txt")[0]["warnings"]
    assert warning.startswith("--list list.txt: 1 of its 2 lines end in -1") and warning.endswith("they are scored too")


def test_pictures_of_another_format(tmp_path: Path, wsss: Run) -> None:
    Image.fromarray(PREDICTED).save(tmp_path / "predicted" / "x.jpg")
    (tmp_path / "predicted" / "x.png").unlink()
    assert "its 1 images are not PNG: other formats change labels" in refused(wsss)
