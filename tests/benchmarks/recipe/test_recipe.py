"""The recipe: one command from a data folder to a table of results, on a few drawn scenes in VOC's and COCO's layouts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.benchmarks.recipe import __main__ as module
from wsss.benchmarks.recipe.__main__ import Recipe, draw_voc, main, run
from wsss.benchmarks.recipe.data import coco, link_photographs, voc
from wsss.benchmarks.recipe.table import Result, as_text
from wsss.benchmarks.recipe.tuning import rules_for
from wsss.errors import WsssError
from wsss.runtime.chain import Chain
from wsss.train.apply import predictor
from wsss.train.args import config_from

TINY = {
    "validation_steps": 3,
    "model": {"architecture": "unet", "encoder": "mobilenet_v2", "options": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}},
    "data": {"crop": 32, "batch": 4, "validation_share": 0.2},
    "optimizer": {"steps": 6, "rate": 0.01, "head_factor": 1},
    "machine": {"workers": 0, "checkpoint_seconds": 0, "log_steps": 1, "device": "cpu"},
}
Voc = Callable[[], Path]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = draw_voc(tmp_path_factory.mktemp("voc"), train=2, aug=3, val=3)
    for path in folder.glob("images/*.jpg"):  # small, to be quick
        truth = folder / "truth" / f"{path.stem}.png"
        for each, filter in ((path, Image.Resampling.BILINEAR), (truth, Image.Resampling.NEAREST)):
            with Image.open(each) as image:
                small = image.resize((image.width // 2, image.height // 2), filter)
            small.save(each)
    return folder


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(drawn, tmp_path / "VOC2012"))


def of(data: Path, out: Path, **others: object) -> Recipe:
    made = Recipe(data=voc(data), out=out, config=config_from(TINY), classes="mini", bundle="mini", scales=(0.75, 1.0))
    return dataclasses.replace(made, **others)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def unbroken(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("runs") / "voc"
    return out, run(of(drawn, out))


def test_every_step_is_scored(drawn: Path, unbroken: tuple[Path, Result]) -> None:
    out, result = unbroken
    assert [(row.what, row.split, row.images) for row in result.rows] == [
        ("pseudo-labels", "train", 2),
        ("pseudo-labels", "trainaug", 5),
        ("segmenter, scale 1", "val", 3),
        ("segmenter, scale 0.75 1 mirrored", "val", 3),
    ]
    assert result.rows[1].scores["labels"] is not None and result.rows[1].scores["miou"] > 0.3  # type: ignore[operator]
    for store, row in (("labels", result.rows[0]), ("val-1", result.rows[2]), ("val-0.75-1-mirrored", result.rows[3])):
        assert row.scores["miou"] == pytest.approx(counted_by_hand(drawn, out / store, row.split), abs=1e-12)
    assert json.loads((out / "result.json").read_text())["rows"][3]["scores"]["miou"] == result.rows[3].scores["miou"]


def counted_by_hand(data: Path, store: Path, split: str) -> float:
    hit, union = np.zeros(13), np.zeros(13)
    for name in (data / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split():
        truth, found = (
            np.array(Image.open(path)) for path in (data / "SegmentationClass" / f"{name}.png", store / "labels" / f"{name}.png")
        )
        for label in range(13):
            predicted, true = found[truth != 255] == label, truth[truth != 255] == label
            hit[label] += (predicted & true).sum()
            union[label] += (predicted | true).sum()
    return float((hit[union > 0] / union[union > 0]).mean())


def test_the_table_says_what_must_be_disclosed(unbroken: tuple[Path, Result]) -> None:
    out, result = unbroken
    text = (out / "table.txt").read_text()
    assert text == as_text(result) + "\n"
    for part in ("unet mobilenet_v2", "random weights", "weights mini", "scale 0.75 1 mirrored", "not measured (--crf)"):
        assert part in text
    assert "train has 2 images, usually 1,464" in text and "other lists, not comparable" in text
    ours = [line for line in text.splitlines() if line.startswith("this run")]
    assert len(ours) == 1 and f"{100 * result.rows[2].scores['miou']:.1f}" in ours[0].split()  # type: ignore[operator]
    assert "Chen & Sun" in text and "Chen & Sun" not in as_text(dataclasses.replace(result, dataset="drawn scenes"))


def test_the_crf_refines_probabilities_of_the_segmenter(
    drawn: Path, unbroken: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each scoring on val has one more row, from the same averaged probabilities; pseudo-labels have none to refine."""
    seen: list[np.ndarray] = []

    def refine(probabilities: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        seen.append(probabilities)
        return probabilities.argmax(axis=0).astype(np.uint8)

    for where in (module, predictor):
        monkeypatch.setattr(where, "check_crf", lambda: None)
    monkeypatch.setattr(predictor, "refine_probabilities", refine)
    monkeypatch.setattr(predictor, "cores", lambda: 1)
    out = Path(shutil.copytree(unbroken[0], tmp_path / "run", symlinks=True))
    result = run(of(drawn, out, crf=True))
    assert [(row.what, row.crf) for row in result.rows[2:]] == [
        ("segmenter, scale 1", False),
        ("segmenter, scale 1, DenseCRF", True),
        ("segmenter, scale 0.75 1 mirrored", False),
        ("segmenter, scale 0.75 1 mirrored, DenseCRF", True),
    ]
    assert len(seen) == 6 and all(np.allclose(each.sum(axis=0), 1, atol=1e-2) for each in seen)
    assert result.rows[:3] == unbroken[1].rows[:3] and result.rows[4] == unbroken[1].rows[3]
    assert [result.rows[number].scores for number in (3, 5)] == [result.rows[number].scores for number in (2, 4)]
    assert "DenseCRF on probabilities" in (out / "table.txt").read_text()


def test_stopped_anywhere_it_goes_on_to_the_same(drawn: Path, unbroken: tuple[Path, Result], tmp_path: Path) -> None:
    lines: list[str] = []

    def stop_at(word: str) -> Callable[[str], None]:
        def log(line: str) -> None:
            lines.append(line)
            if word and line.startswith(word):
                raise KeyboardInterrupt

        return log

    for word in ("step 3/6 ", "val-1:"):
        with pytest.raises(KeyboardInterrupt):
            run(of(drawn, tmp_path / "run", log=stop_at(word)))
    lines.clear()
    result = run(of(drawn, tmp_path / "run", log=stop_at("")))
    assert "labels: 0 labeled, 5 done before, 0 failed" in lines and "val-1: 0 labeled, 3 done before, 0 failed" in lines
    assert not any(line.startswith("step ") for line in lines), "the training is finished"
    for row, expected in zip(result.rows, unbroken[1].rows, strict=True):
        assert row.scores["confusion"] == expected.scores["confusion"]


def test_scores_are_kept_until_labels_or_truth_change(
    drawn: Path, data: Path, unbroken: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(unbroken[0], tmp_path / "run", symlinks=True))
    asked: list[int] = []
    count = module.count_pairs
    monkeypatch.setattr(module, "count_pairs", lambda *args, **kwargs: asked.append(1) or count(*args, **kwargs))
    first = run(of(drawn, out))
    assert not asked and first.rows == unbroken[1].rows
    moved = of(data, out)
    assert run(moved).rows == first.rows and len(asked) == 4, "the truth lies elsewhere"
    truth = data / "SegmentationClass" / f"{next(iter(moved.data.val.images))}.png"
    with Image.open(truth) as image:
        empty = Image.fromarray(np.zeros_like(np.array(image)))
    empty.save(truth)
    assert run(moved).rows[2] != first.rows[2] and len(asked) == 6, "val alone is counted again"


def test_broken_photographs_count_as_wrong_and_are_reported(data: Path, unbroken: tuple[Path, Result], tmp_path: Path) -> None:
    for split in voc(data).training, voc(data).val:
        list(split.images.values())[-1].write_bytes(b"no photograph")
    result = run(of(data, tmp_path / "run"))
    assert [row.missing for row in result.rows] == [0, 1, 1, 1]
    for row, before in zip(result.rows, unbroken[1].rows, strict=True):
        counted, counted_before = (np.array(each.scores["confusion"]).sum() for each in (row, before))
        assert counted == counted_before, "its pixels are counted"
    assert result.rows[0].scores == unbroken[1].rows[0].scores, "it is not in train"
    assert (result.rows[1].scores["miou"] or 0) < (unbroken[1].rows[1].scores["miou"] or 0)
    assert (result.rows[2].scores["void_share"] or 0) > 0


def test_other_lists_need_another_folder(data: Path, unbroken: tuple[Path, Result]) -> None:
    listed = data / "ImageSets" / "Segmentation" / "val.txt"
    listed.write_text("\n".join(listed.read_text().split()[:2]))
    with pytest.raises(WsssError, match="was started with other names in the lists"):
        run(of(data, unbroken[0]))


def drop(path: str) -> Callable[[Path], None]:
    def spoil(data: Path) -> None:
        target = data / path
        if target.is_symlink() or target.is_file():
            target.unlink()
        else:
            shutil.rmtree(target)

    return spoil


def add_name(path: str, name: str) -> Callable[[Path], None]:
    def spoil(data: Path) -> None:
        with (data / "ImageSets" / "Segmentation" / path).open("a") as file:
            file.write(f"{name}\n")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("JPEGImages"), "expected VOC 2012 with JPEGImages/"),
        (drop("ImageSets/Segmentation/val.txt"), "has no list .*val.txt"),
        (drop("ImageSets/Segmentation/trainaug.txt"), "(?s)has no list .*trainaug.txt.*--train-on train does without"),
        (drop("SegmentationClassAug"), "the true label maps of trainaug are missing"),
        (add_name("val.txt", "2007_000001"), "has no photograph of 2007_000001, which .*val.txt names"),
        (add_name("val.txt", "scene-7000005"), "scene-7000005 is listed twice"),
        (add_name("train.txt", "scene-7000005"), "lacks 1 images of train.txt, for example scene-7000005"),
        (drop("SegmentationClass/scene-7000006.png"), "has no label map of scene-7000006"),
    ],
)
def test_missing_files_are_named(data: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(data)
    with pytest.raises(WsssError, match=message.split(".*--")[0]) as caught:
        voc(data)
    assert "--train-on" not in message or "--train-on train" in str(caught.value)


def test_without_trainaug_train_is_labelled(data: Path) -> None:
    drop("SegmentationClassAug")(data)
    assert voc(data, trainaug=False).training.name == "train"


def test_lists_of_the_field_are_understood(data: Path) -> None:
    lists = data / "ImageSets" / "Segmentation"
    names = (lists / "trainaug.txt").read_text().split()
    (lists / "trainaug.txt").unlink()
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in names]
    (lists / "train_aug.txt").write_text("\n".join(lines))
    assert list(voc(data).training.images) == names


def test_coco_has_its_two_folders(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "COCO"
    for split, name in (("train", "COCO_train2014_000000000009"), ("val", "COCO_val2014_000000000042")):
        for target in (folder / f"{split}2014", folder / "SegmentationClass" / f"{split}2014"):
            target.mkdir(parents=True)
        shutil.copy(data / "images" / "scene-7000000.jpg", folder / f"{split}2014" / f"{name}.jpg")
        shutil.copy(data / "truth" / "scene-7000000.png", folder / "SegmentationClass" / f"{split}2014" / f"{name}.png")
        (tmp_path / f"{split}.txt").write_text(f"{name} 45 49 50\n")
    found = coco(folder, train_list=tmp_path / "train.txt", val_list=tmp_path / "val.txt")
    assert list(found.training.images) == ["COCO_train2014_000000000009"] and found.val.truth.name == "val2014"
    assert found.deviation() == "train has 1 images, usually 82,081, val has 1 images, usually 40,137"
    shutil.rmtree(folder / "val2014")
    with pytest.raises(WsssError, match="val2014 is missing"):
        coco(folder, train_list=tmp_path / "train.txt", val_list=tmp_path / "val.txt")


def test_links_follow_the_list(data: Path, tmp_path: Path) -> None:
    split = voc(data).training
    folder = link_photographs(split, tmp_path / "links")
    assert sorted(each.name for each in folder.iterdir()) == sorted(path.name for path in split.images.values())
    fewer = dataclasses.replace(split, images=dict(list(split.images.items())[:2]))
    assert len(list(link_photographs(fewer, folder).iterdir())) == 2
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(WsssError, match="expected links to photographs only"):
        link_photographs(split, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_the_command_ends_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["voc", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert ended.value.code == 1 and "recipe: --data" in capsys.readouterr().err


# ---- tuned rules ----


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """Twelve images of train, of which five may be tuned on."""
    return draw_voc(tmp_path / "VOC2012", train=12, aug=1, val=1)


def test_rules_are_tuned_on_training_images_that_are_not_scored_then(larger: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = of(larger, tmp_path / "run", tune=5, log=lines.append)
    result = run(recipe)
    assert [(row.split, row.images) for row in result.rows[:2]] == [("train", 7), ("trainaug", 8)]
    assert result.told == "5 label maps (rules)"
    tuned = json.loads((tmp_path / "run" / "tuned.json").read_text())
    listed = (larger / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    assert tuned["names"] == [listed[number] for number in (0, 2, 4, 7, 9)]
    assert json.loads((tmp_path / "run" / "labels" / "run.json").read_text())["rules"] == tuned["rules"]
    scored = (tmp_path / "run" / "lists" / "train.txt").read_text().split()
    assert scored == [name for name in listed if name not in tuned["names"]]
    assert sum("rules tuned on 5 images of train" in line for line in lines) == 1
    assert len((tmp_path / "run" / "labels" / "manifest.jsonl").read_text().splitlines()) == 13, "all are labeled and trained on"

    kept = {**tuned, "rules": {**tuned["rules"], "margin": 0.3}}
    (tmp_path / "run" / "tuned.json").write_text(json.dumps(kept))
    chain = Chain.open("mini", classes="mini")
    assert rules_for(chain, recipe.data, 5, recipe.out, lines.append).margin == 0.3, "kept from the run before"
    chain = Chain.open("mini", classes="mini", engine="eager")
    assert rules_for(chain, recipe.data, 5, recipe.out, lines.append).margin == tuned["rules"]["margin"], "another engine"


@pytest.mark.parametrize("count", [4, 7])
def test_too_few_or_too_many_images_to_tune_on(larger: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(WsssError, match=f"--tune {count}: expected 5 to 6, half of the images of train"):
        run(of(larger, tmp_path / "run", tune=count))
    assert not (tmp_path / "run").exists()
