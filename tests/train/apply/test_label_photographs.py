"""Predictions of a run as label stores, and ``wsss eval --run``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from wsss.errors import StoreError
from wsss.store.local import read_images_folder, read_label, read_records
from wsss.train.apply import predictor as predictor_module
from wsss.train.apply.inference import Inference
from wsss.train.apply.label_photographs import READ_AHEAD, _ahead, label_photographs
from wsss.train.apply.predictor import Prediction, Predictor
from wsss.train.dataset.survey import survey_store

from .conftest import Trained

if TYPE_CHECKING:
    from ...conftest import Answer

    Run = Callable[..., Answer]

NAMES = [f"scene-{number:02}.png" for number in range(4)]


def test_a_store_of_predictions_can_be_trained_on(trained: Trained, tmp_path: Path) -> None:
    run, _, images = trained
    predictor = Predictor(run, Inference(), device="cpu")
    done = label_photographs(predictor, images, NAMES, tmp_path / "store")
    assert (done.labeled, done.skipped, done.failed) == (4, 0, 0)
    survey = survey_store(tmp_path / "store", images)
    assert [item.path for item in survey.items] == NAMES and survey.classes == predictor.record.classes
    assert read_images_folder(tmp_path / "store").resolve() == images.resolve()
    pixels = np.array(Image.open(images / NAMES[0]))
    probabilities = predictor.probabilities(pixels).numpy()
    label = read_label(tmp_path / "store" / "labels" / NAMES[0])
    np.testing.assert_array_equal(label, probabilities.argmax(axis=0))
    confidence = np.array(Image.open(tmp_path / "store" / "confidence" / NAMES[0]))
    np.testing.assert_allclose(confidence / 255, probabilities.max(axis=0), atol=1 / 255)
    record = next(iter(read_records(tmp_path / "store")))
    names = ("background", *survey.classes)
    for name, score in record["classes"].items():
        assert score == pytest.approx(confidence[label == names.index(name)].mean() / 255, abs=1e-4)
    assert set(record["classes"]) == {names[value] for value in np.unique(label) if value}


def test_stopped_it_goes_on(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, images = trained
    predictor = Predictor(run, Inference(), device="cpu")
    honest = Predictor.predict

    def interrupted(self: Predictor, photographs: Iterable[np.ndarray]) -> Iterator[Prediction]:
        for number, prediction in enumerate(honest(self, photographs)):
            if number == 2:
                raise KeyboardInterrupt
            yield prediction

    monkeypatch.setattr(Predictor, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label_photographs(predictor, images, NAMES, tmp_path / "store")
    monkeypatch.setattr(Predictor, "predict", honest)
    done = label_photographs(predictor, images, NAMES, tmp_path / "store")
    assert (done.labeled, done.skipped, done.failed) == (2, 2, 0)
    label_photographs(predictor, images, NAMES, tmp_path / "whole")
    for name in ("manifest.jsonl", "run.json", *(f"labels/{name}" for name in NAMES)):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_photographs_that_change_are_labeled_again_and_broken_ones_named(trained: Trained, tmp_path: Path) -> None:
    run, _, originals = trained
    images = Path(shutil.copytree(originals, tmp_path / "images"))
    predictor = Predictor(run, Inference(), device="cpu")
    label_photographs(predictor, images, NAMES, tmp_path / "store")
    Image.open(images / NAMES[1]).rotate(180).save(images / NAMES[1])
    (images / NAMES[2]).write_bytes(b"no photograph")
    said: list[str] = []
    done = label_photographs(predictor, images, NAMES, tmp_path / "store", log=said.append)
    assert (done.labeled, done.skipped, done.failed) == (1, 2, 1)
    assert len(said) == 1 and said[0].startswith("failed: scene-02.png: not a readable image")
    records = {record["path"]: record for record in read_records(tmp_path / "store")}
    assert list(records) == NAMES and "error" in records[NAMES[2]]
    assert [item.path for item in survey_store(tmp_path / "store", images).items] == [NAMES[0], NAMES[1], NAMES[3]]


def test_other_settings_need_another_store(trained: Trained, tmp_path: Path) -> None:
    run, _, images = trained
    label_photographs(Predictor(run, Inference(), device="cpu"), images, NAMES[:1], tmp_path / "store")
    with pytest.raises(StoreError, match="was made with rules = "):
        label_photographs(Predictor(run, Inference(flip=True), device="cpu"), images, NAMES[:1], tmp_path / "store")


def test_photographs_of_one_name_have_two_labels(trained: Trained, tmp_path: Path) -> None:
    run, _, images = trained
    (tmp_path / "images").mkdir()
    for end in ("png", "bmp"):
        Image.open(images / NAMES[0]).save(tmp_path / "images" / f"a.{end}")
    label_photographs(Predictor(run, Inference(), device="cpu"), tmp_path / "images", ["a.bmp", "a.png"], tmp_path / "store")
    assert {path.name for path in (tmp_path / "store" / "labels").iterdir()} == {"a.bmp.png", "a.png.png"}


@pytest.fixture
def fake_crf(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CRF that gives every pixel the least probable label; in this process."""
    monkeypatch.setattr(predictor_module, "check_crf", lambda: None)
    monkeypatch.setattr(predictor_module, "refine_probabilities", lambda p, pixels: p.argmin(axis=0).astype(np.uint8))


def test_the_crf_gets_averaged_probabilities(trained: Trained, fake_crf: None) -> None:
    run, _, images = trained
    pixels = np.array(Image.open(images / NAMES[0]))
    predictor = Predictor(run, Inference(scales=(0.75, 1.25), flip=True, crf=True), device="cpu", workers=1)
    probabilities = predictor.probabilities(pixels).numpy()
    (found,) = predictor.predict([pixels])
    np.testing.assert_array_equal(found.label, probabilities.argmin(axis=0))
    np.testing.assert_allclose(found.confidence / 255, probabilities.min(axis=0), atol=1 / 255)
    assert "on probabilities" in predictor.settings["rules"]["crf"]


# ---- wsss eval --run ----


def test_a_run_is_scored_as_its_label_maps_are(trained: Trained, wsss: Run, tmp_path: Path) -> None:
    run, store, images = trained
    answer = wsss("eval", images, store, "--run", run, "--flip", "--save", tmp_path / "maps", "--device", "cpu", "--json")
    assert answer.code == 0, answer
    told = json.loads(answer.out)
    assert (told["images"], told["missing"], told["crf"]) == (8, [], None)
    assert told["inference"] == {"scales": [1.0], "flip": True, "window": 0, "stride": 0, "crf": False}
    maps = json.loads(wsss("eval", tmp_path / "maps", store, "--classes", "mini", "--json").out)
    assert told["confusion"] == maps["confusion"] and told["miou"] == maps["miou"] is not None
    again = wsss("eval", images, store, "--run", run, "--window", "32", "--device", "cpu")
    assert again.code == 0 and ": 8 images, scale 1, windows of 32 px every 21 px\n" in again.out
    assert {path.name for path in tmp_path.iterdir()} == {"maps"}


def test_only_the_images_of_a_list(trained: Trained, wsss: Run, tmp_path: Path) -> None:
    run, store, images = trained
    (tmp_path / "list.txt").write_text("scene-03\nscene-01\n")
    answer = wsss("eval", images, store / "labels", "--run", run, "--list", tmp_path / "list.txt", "--json")
    assert json.loads(answer.out)["images"] == 2


def test_a_refined_run_says_so(trained: Trained, wsss: Run, fake_crf: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsss.train.evaluate import crf

    monkeypatch.setattr(crf, "check_crf", lambda: None)
    run, store, images = trained
    answer = wsss("eval", images, store, "--run", run, "--crf", "--workers", "1")
    assert answer.code == 0 and "refined by DenseCRF on probabilities (10 steps" in answer.out


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--run", "nowhere"], 1, "nowhere: expected the folder of a training"),
        (["--flip"], 2, "--flip is for --run"),
        (["--window", "64"], 2, "--window is for --run"),
        (["--save", "maps"], 2, "--save is for --run"),
        (["--run", "RUN", "--stride", "9"], 2, "it needs --window"),
        (["--run", "RUN", "--scales", "1;2"], 2, "--scales: expected numbers with commas"),
        (["--run", "RUN", "--labels", "x.json"], 2, "--labels cannot be used with --run"),
        (["--run", "RUN", "--images", "x"], 2, "--images gives the photographs for --crf on label maps"),
        (["--run", "RUN", "--classes", "dog, cat"], 1, "--classes dog, cat: means the classes dog, cat (2), the run"),
        (["--run", "RUN", "--save", "STORE"], 1, "expected a new or empty folder"),
        (["--run", "RUN", "--list", "none.txt"], 1, "--list none.txt: "),
    ],
)
def test_mistakes_are_one_message(trained: Trained, wsss: Run, flags: list[str], code: int, said: str) -> None:
    run, store, images = trained
    typed = [{"RUN": run, "STORE": store}.get(flag, flag) for flag in flags]
    answer = wsss("eval", images, store, *typed)
    assert answer.code == code and answer.out == "" and "Traceback" not in answer.err
    assert said in answer.err


def test_photographs_that_do_not_fit_the_truth(trained: Trained, wsss: Run, tmp_path: Path) -> None:
    run, store, originals = trained
    images = Path(shutil.copytree(originals, tmp_path / "images"))
    (images / "scene-03.png").unlink()
    answer = wsss("eval", images, store, "--run", run)
    assert answer.code == 1 and "has no photograph of 1 of 8 label maps, for example scene-03" in answer.err
    Image.new("RGB", (56, 47)).save(images / "scene-03.png")
    answer = wsss("eval", images, store, "--run", run)
    assert answer.code == 1 and "scene-03.png: is 56 x 47 pixels, its true label map" in answer.err
    (images / "scene-03.png").write_bytes(b"no photograph")
    answer = wsss("eval", images, store, "--run", run)
    assert answer.code == 1 and "scene-03.png: " in answer.err and "not a readable image" in answer.err


def test_photographs_are_read_ahead_and_come_in_order() -> None:
    names = iter(range(3 * READ_AHEAD))
    found = _ahead(lambda name: -name, names)
    assert [next(found), next(found)] == [0, -1]
    assert next(names) == READ_AHEAD + 1, "as many are being read as there are threads"
    assert list(found)[:3] == [-2, -3, -4]
