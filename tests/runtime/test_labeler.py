"""The chain for Python programs: images of any kind, results as arrays, single stages, any number of images."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss import Detections, Labeler, Result, Rules, WsssError
from wsss.batch import Photograph
from wsss.errors import ImageError, WsssWarning
from wsss.rle import MaskRuns
from wsss.runtime.chain import Chain
from wsss.runtime.trained_segmenter import no_boxes, no_masks
from wsss.store.local import read_label, read_label_and_masks, read_records

if TYPE_CHECKING:
    from ..conftest import World

pytestmark = [
    pytest.mark.filterwarnings("ignore:OpenCV .* is not installed:UserWarning"),  # of supervision
    pytest.mark.filterwarnings("ignore:.*next to no range:wsss.errors.WsssWarning"),  # the scenes are simple
]


@pytest.fixture
def labeler(world: World) -> Labeler:
    return Labeler.open(world.bundle, classes=world.classes)


def two_colors(world: World) -> np.ndarray:
    return world.scene(32, 48, red=(0, 0, 20, 20), blue=(24, 8, 48, 32))


# ---- images in, results out ----


def test_a_result_has_what_the_chain_found(world: World, labeler: Labeler) -> None:
    pixels = two_colors(world)
    result = labeler.label(pixels)
    expected = labeler.chain.label(pixels)
    assert np.array_equal(result.label_map, expected.label_maps[0]) and result.label_map.dtype == np.uint8
    assert np.array_equal(result.boxes, expected.boxes.xyxy_image)
    assert np.array_equal(result.scores, expected.boxes.score)
    assert (result.labels.tolist(), result.classes, result.names) == ([1, 3], ["red", "blue"], ("red", "green", "blue"))
    assert np.array_equal(result.quality, expected.quality)
    assert result.pixels is pixels
    assert list(result.tags) == sorted(result.tags, key=lambda name: -result.tags[name]) and set(result.tags) == {"red", "blue"}
    assert result.masks.shape == (2, 32, 48) and result.masks.dtype == bool
    assert result.masks.sum(axis=(1, 2)).tolist() == expected.area.tolist()
    assert result.masks is result.masks, "decoded once"
    assert repr(result) == "<Result 0: 48 x 32, red 0.98, blue 0.98>"


def test_masks_are_those_before_the_competition(world: World, tmp_path: Path) -> None:
    boxes = [{"label": name, "xyxy": [0, 0, 20, 20], "score": score} for name, score in (("red", 0.9), ("green", 0.5))]
    (tmp_path / "boxes.json").write_text(json.dumps({"0": boxes}))
    result = Labeler.open(world.bundle, classes=world.classes, boxes=tmp_path / "boxes.json").label(two_colors(world))
    assert np.array_equal(result.masks[0], result.masks[1])
    assert np.unique(result.label_map).tolist() == [0, 1]


def test_one_image_gives_a_result_and_a_list_a_list(world: World, labeler: Labeler, photos: Path) -> None:
    path, array = photos / "two.png", two_colors(world)
    for image in (path, str(path), Image.open(path), Image.open(path).convert("RGBA")):
        result = labeler.label(image)
        assert isinstance(result, Result)
        assert result.classes == ["red", "blue"]
    assert labeler.label(Image.open(path)).name == labeler.label(path).name == "two.png"
    results = labeler.label([path, array, Image.fromarray(array)])
    assert [result.name for result in results] == ["two.png", "1", "2"]
    assert labeler.label([]) == labeler.label(()) == []
    assert [result.name for result in labeler.label((array,))] == ["0"]
    assert [result.name for result in labeler.label([array] * 20)] == [str(number) for number in range(20)]


def test_a_pil_image_has_the_pixels_of_its_file(labeler: Labeler, tmp_path: Path) -> None:
    """EXIF rotation, transparency, gray and palettes are treated as in files; the image is not changed."""
    exif = Image.Exif()
    exif[0x0112] = 6
    random = np.random.default_rng(0)
    gray = Image.fromarray(random.integers(0, 256, (20, 30), np.uint8))
    clear = Image.fromarray(random.integers(0, 256, (20, 30, 4), np.uint8))
    for name, image in (("gray", gray), ("rgba", clear), ("palette", gray.quantize(16)), ("deep", gray.convert("I;16"))):
        image.save(tmp_path / f"{name}.png", exif=exif)
        with Image.open(tmp_path / f"{name}.png") as opened:
            before = opened.size
            from_pillow = labeler.label(opened)
            assert opened.size == before
        assert np.array_equal(from_pillow.pixels, labeler.label(tmp_path / f"{name}.png").pixels)
        assert from_pillow.pixels.shape == (30, 20, 3)


def test_an_image_without_any_class(world: World, labeler: Labeler) -> None:
    result = labeler.label(world.scene(30, 40))
    assert (len(result), result.classes, result.tags, result.masks.shape) == (0, [], {}, (0, 30, 40))
    assert repr(result) == "<Result 0: 40 x 30, nothing found>"
    assert len(result.to_supervision()) == 0


def test_without_masks(world: World) -> None:
    result = Labeler.open(world.bundle, classes=world.classes, masks=False).label(two_colors(world))
    assert result.runs is None
    with pytest.raises(WsssError, match="masks: not kept, because the labeler was opened with masks=False"):
        _ = result.masks
    assert result.to_supervision().mask is None


# ---- to other libraries ----


def test_to_supervision(world: World, labeler: Labeler) -> None:
    result = labeler.label(two_colors(world))
    found = result.to_supervision()
    assert np.array_equal(found.xyxy, result.boxes)
    assert np.array_equal(found.mask, result.masks)
    assert found.confidence is not None and np.array_equal(found.confidence, result.scores)
    assert found.class_id is not None and found.class_id.tolist() == [0, 2]
    assert found.data["class_name"].tolist() == ["red", "blue"]
    assert labeler.detect(two_colors(world)).to_supervision().mask is None


def test_plots_and_pictures(world: World, labeler: Labeler, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    result = labeler.label(two_colors(world))
    picture = np.asarray(result.picture())
    assert picture.shape == (32, 48, 3)
    outside = np.zeros((32, 48), bool)
    outside[22:, :20] = True
    assert np.array_equal(picture[outside], result.pixels[outside]), "background is the photograph"
    assert not np.array_equal(picture[14, 10], result.pixels[14, 10])
    assert result._repr_png_().startswith(b"\x89PNG")
    axes = result.plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["red", "blue"]
    assert result.plot(axes) is axes
    labeler.label(world.scene(5, 4)).plot()
    axes.figure.savefig(tmp_path / "plot.png")
    pyplot.close("all")


def test_a_notebook_shows_large_images_small(labeler: Labeler, world: World, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(labeler.label(world.scene(1500, 300, red=(10, 10, 90, 90)))._repr_png_())
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (160, 800)


@pytest.mark.parametrize(("name", "call"), [("supervision", Result.to_supervision), ("matplotlib", Result.plot)])
def test_a_library_that_is_not_installed_is_named(
    world: World, labeler: Labeler, monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[[Result], object]
) -> None:
    result = labeler.label(two_colors(world))
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(WsssError, match=f"needs {name}, which is not installed") as error:
        call(result)
    assert error.value.hint == f"pip install {name}"


def test_save(world: World, labeler: Labeler, photos: Path, tmp_path: Path) -> None:
    result = labeler.label(photos / "two.png")
    path = result.save(tmp_path / "out")
    assert path == tmp_path / "out/two.png"
    label_map, masks = read_label_and_masks(path, shape=(40, 60), boxes=2)
    assert np.array_equal(label_map, result.label_map)
    document = json.loads((tmp_path / "out/two.json").read_text())
    assert (document["height"], document["width"], document["tags"]) == (40, 60, result.tags)
    assert [each["label"] for each in document["objects"]] == ["red", "blue"]
    assert [each["segmentation"]["counts"] for each in document["objects"]] == masks
    assert np.array_equal(
        MaskRuns.from_counts(document["objects"][1]["segmentation"]["counts"], (40, 60)).mask(), result.masks[1]
    )
    assert result.save(str(tmp_path / "out")) == path, "again"
    (below,) = (each for each in labeler.iter(photos) if each.name == "sub/three.png")
    assert below.save(tmp_path / "out") == tmp_path / "out/sub/three.png"
    with pytest.raises(WsssError, match="leads out of"):
        labeler.label([Photograph(name="../x.png", pixels=two_colors(world))])[0].save(tmp_path / "out")  # type: ignore[list-item]
    (tmp_path / "file").touch()
    with pytest.raises(WsssError, match="cannot be written"):
        result.save(tmp_path / "file")


# ---- single stages ----


def test_single_stages_are_those_of_the_chain(world: World, labeler: Labeler) -> None:
    pixels = two_colors(world)
    result = labeler.label(pixels)
    assert labeler.tag(pixels) == result.tags
    found = labeler.detect(pixels)
    assert isinstance(found, Detections) and not isinstance(found, Result)
    assert np.array_equal(found.boxes, result.boxes)
    assert np.array_equal(found.scores, result.scores)
    assert found.classes == result.classes
    assert np.array_equal(labeler.segment(pixels, found), result.masks)
    assert np.array_equal(labeler.segment(pixels, found.boxes.tolist()), result.masks)
    assert labeler.segment(pixels, []).shape == (0, 32, 48)
    many = labeler.segment(pixels, np.tile([[0, 0, 20, 20]], (9, 1)))
    assert many.shape == (9, 32, 48) and (many == many[0]).all(), "more boxes than a call of the decoder takes"
    outside = labeler.segment(pixels, [[-5, -5, 20, 20]])
    assert np.array_equal(outside[0], many[0]), "boxes are clipped"


def test_a_labeler_without_a_stage_says_so(world: World, labeler: Labeler, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(json.dumps({"0": [{"label": "red", "xyxy": [0, 0, 20, 20]}]}))
    given = Labeler.open(world.bundle, classes=world.classes, boxes=tmp_path / "boxes.json")
    assert given.detect(two_colors(world)).boxes.tolist() == [[0, 0, 20, 20]]
    for without in (given, Labeler.open(world.bundle, classes=world.classes, rules=Rules(gate=False))):
        with pytest.raises(WsssError, match="^tag: this labeler was opened without CLIP"):
            without.tag(two_colors(world))
    chain = labeler.chain
    segmenter = Labeler(Chain(chain.classes, tag=chain.tag, detect=no_boxes, segment=no_masks, fuse=chain.fuse))
    with pytest.raises(WsssError, match="^detect: .*has no boxes"):
        segmenter.detect(two_colors(world))
    with pytest.raises(WsssError, match="^segment: .*has no SAM"):
        segmenter.segment(two_colors(world), [[0, 0, 20, 20]])


# ---- any number of images ----


def test_iter_over_a_folder(labeler: Labeler, photos: Path) -> None:
    results = list(labeler.iter(photos, batch=2))
    assert [result.name for result in results] == ["black.png", "green.png", "red.png", "sub/three.png", "two.png"]
    for result in results:
        assert np.array_equal(result.label_map, labeler.label(photos / result.name).label_map)
    assert [result.name for result in labeler.iter(str(photos))] == [result.name for result in results]


def test_iter_over_images_of_any_kind_holds_one_batch(world: World, labeler: Labeler) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def drawn() -> Iterator[np.ndarray]:
        for number in range(60):
            image = world.scene(32, 48, red=(0, 0, 10 + number % 9, 20))
            alive.append(weakref.ref(image))
            yield image
            del image

    most = 0
    count = 0
    gc.freeze()  # what was imported so far is not looked through again after every image
    for result in labeler.iter(drawn(), batch=4):
        assert result.classes == ["red"] and result.masks.any()
        count += 1
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))
    gc.unfreeze()
    assert (count, most <= 8) == (60, True)


def test_iter_is_lazy(labeler: Labeler, world: World) -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            yield two_colors(world)

    results = labeler.iter(endless(), batch=2)
    assert [next(results).name for _ in range(3)] == ["0", "1", "2"]


def test_iter_skips_images_that_fail_only_if_asked(labeler: Labeler, photos: Path, world: World) -> None:
    (photos / "m.jpg").write_text("no image")
    results = labeler.iter(photos, batch=1)
    with pytest.raises(ImageError, match=r"m\.jpg"):
        list(results)
    with pytest.warns(WsssWarning, match=r"m\.jpg"):
        assert len(list(labeler.iter(photos, skip_failed=True))) == 5
    with pytest.warns(WsssWarning, match="image 1: expected"):
        assert len(list(labeler.iter([two_colors(world), 3], skip_failed=True))) == 1  # type: ignore[list-item]


def test_iter_shows_progress_on_a_terminal(
    labeler: Labeler, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(labeler.iter(photos))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    list(labeler.iter(photos, batch=2))
    assert "4 images" in (shown := capsys.readouterr().err) and "5 images" in shown
    list(labeler.iter(photos, progress=False))
    assert capsys.readouterr().err == ""


def test_given_boxes_of_twins_in_a_folder(world: World, tmp_path: Path) -> None:
    """One annotation that might be of either of two photographs fails both, as in a run."""
    for name in ("a/x.png", "b/x.png"):
        world.save(tmp_path / "photos" / name, 32, 48, red=(0, 0, 20, 20))
    (tmp_path / "boxes.json").write_text(json.dumps({"x.png": [{"label": "red", "xyxy": [0, 0, 20, 20]}]}))
    labeler = Labeler.open(world.bundle, classes=world.classes, boxes=tmp_path / "boxes.json")
    with pytest.raises(WsssError, match=r"a/x\.png"):
        next(labeler.iter(tmp_path / "photos", batch=1))


def test_label_folder_is_what_the_command_does(labeler: Labeler, photos: Path, tmp_path: Path) -> None:
    summary = labeler.label_folder(photos, tmp_path / "store")
    assert (summary.images, summary.labelled, summary.failed) == (5, 5, 0)
    again = labeler.label_folder(str(photos), str(tmp_path / "store"), batch=1)
    assert (again.skipped, again.labelled) == (5, 0)
    records = {record["path"]: record for record in read_records(tmp_path / "store")}
    for result in labeler.iter(photos):
        assert np.array_equal(read_label(tmp_path / "store/labels" / records[result.name]["label"]), result.label_map)
    (photos / "m.jpg").write_text("no image")
    with pytest.warns(WsssWarning, match=r"failed: m\.jpg"):
        assert labeler.label_folder(photos, tmp_path / "store").failed == 1


# ---- wrong uses ----


WRONG: dict[str, tuple[Callable[[Labeler], object], str, str]] = {
    "a bundle's name": (
        lambda _: Labeler("mini"),
        "Labeler: expected a Chain, got str",
        'Labeler.open("mini", classes="dog, cat")',
    ),  # type: ignore[arg-type]
    "a number": (lambda it: it.label(5), "images: expected an image or several, got int", "an image is a path"),  # type: ignore[call-overload]
    "bytes": (lambda it: it.label(b"png"), "images: expected an image or several, got bytes", ""),  # type: ignore[call-overload]
    "nothing": (lambda it: it.label(None), "got NoneType", ""),  # type: ignore[call-overload]
    "a dict": (lambda it: it.label({"a": 1}), "got dict", ""),  # type: ignore[call-overload]
    "floats": (lambda it: it.label(np.zeros((4, 4, 3))), "got (4, 4, 3) float64", "(255 * image)"),
    "gray": (lambda it: it.label(np.zeros((4, 4), np.uint8)), "got (4, 4) uint8", "np.stack"),
    "a number in a list": (lambda it: it.label(["x", 5][1:]), "image 0: expected a path, an array", ""),  # type: ignore[type-var]
    "a folder": (lambda it: it.label("."), "image 0: . is a folder", "iter(folder), or label_folder(folder, store)"),
    "one image to iter": (lambda it: it.iter(np.zeros((4, 4, 3), np.uint8)), "got one ndarray", "label(image)"),
    "a folder that is none": (lambda it: it.iter("nowhere"), "nowhere: expected a folder of images", ""),
    "a batch of none": (lambda it: it.iter(".", batch=0), "batch: expected a number of images, 1 or more, got 0", ""),
    "a batch of a half": (lambda it: it.iter(".", batch=0.5), "batch: expected a number", ""),  # type: ignore[arg-type]
    "one flat box": (lambda it: it.segment(np.zeros((9, 9, 3), np.uint8), [1, 2, 3, 4]), "shape (N, 4), got (4,)", "[["),  # type: ignore[list-item]
    "a box of shares": (lambda it: it.segment(np.zeros((9, 9, 3), np.uint8), [[0.5, 0, 0.2, 1]]), "x0 < x1", "not in 0..1"),
    "NaN": (lambda it: it.segment(np.zeros((9, 9, 3), np.uint8), [[np.nan, 0, 2, 1]]), "x0 < x1", ""),
    "boxes of text": (lambda it: it.segment(np.zeros((9, 9, 3), np.uint8), "dog"), "boxes: expected (N, 4) numbers, got str", ""),
    "a list to detect": (lambda it: it.detect([]), "image 0: expected a path", ""),  # type: ignore[arg-type]
    "images to label_folder": (lambda it: it.label_folder([], "x"), "photos: expected a path, got list", "iter()"),  # type: ignore[arg-type]
    "no bundle": (lambda _: Labeler.open(None, classes="dog"), "bundle: expected a path, got NoneType", ""),  # type: ignore[arg-type]
    "classes that are a number": (
        lambda _: Labeler.open("mini", classes=5),
        "classes: expected names or a file",
        'classes=["dog"',
    ),  # type: ignore[arg-type]
    "no classes": (lambda _: Labeler.open("mini"), "classes is missing", 'classes="voc"'),
    "an engine that is none": (lambda _: Labeler.open("mini", classes="dog", engine="tpu"), "engine: expected one of", ""),
    "a dict for rules": (lambda _: Labeler.open("mini", classes="dog", rules={}), "rules: expected Rules", "Rules("),  # type: ignore[arg-type]
    "boxes that are a list": (lambda _: Labeler.open("mini", classes="dog", boxes=[]), "boxes: expected a path, got list", ""),  # type: ignore[arg-type]
    "ignore_unknown alone": (
        lambda _: Labeler.open("mini", classes="dog", ignore_unknown=True),
        "ignore_unknown needs labels or boxes",
        "without them, classes alone decides",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_uses_are_named_in_pythons_words(
    name: str, labeler: Labeler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, message, hint = WRONG[name]
    with pytest.raises(WsssError) as error:
        call(labeler)
    assert message in error.value.message
    assert hint in error.value.hint
    assert "--" not in str(error.value), "no flags of the command line"


def test_a_hint_that_is_a_command_stays_one() -> None:
    with pytest.raises(WsssError) as error:
        Labeler.open("nowhere", classes="dog")
    assert error.value.hint == "wsss export --model all --bundle nowhere"


def test_names_are_loaded_on_first_use() -> None:
    import wsss

    assert {name: getattr(wsss, name).__name__ for name in wsss.__all__ if not name.startswith("_")} == {
        name: name for name in ("Detections", "Labeler", "Result", "Rules", "WsssError")
    }
    with pytest.raises(AttributeError, match="has no attribute 'Labeller'"):
        wsss.Labeller  # noqa: B018


def test_classes_in_any_form(world: World, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red\nblue\n")
    forms: list[Any] = [["red", "blue"], ("red", "blue"), "red, blue", tmp_path / "classes.txt", str(tmp_path / "classes.txt")]
    for classes in forms:
        assert Labeler.open(world.bundle, classes=classes).names == ("red", "blue")
