"""``wsss bench`` on the scripted world: what is measured, what is left out, the table, the CSV file, the plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsss.benchmarks import bench, plot, scaling, throughput
from wsss.benchmarks.bench import COLUMNS
from wsss.benchmarks.ceiling import Ceiling
from wsss.benchmarks.plot import write_curves
from wsss.benchmarks.published import published_for
from wsss.benchmarks.scaling import class_names, measure_scaling, scaling_table
from wsss.benchmarks.throughput import (
    agreement,
    drawn_boxes,
    gather_images,
    gmacs_an_image,
    measure_chain,
    reference_for,
    stages_of,
)
from wsss.classes import class_list
from wsss.errors import WsssError
from wsss.runtime.bundles import MINI
from wsss.runtime.run.label_folder import Summary, label_folder
from wsss.spec import open_bundle, read_manifest, write_manifest
from wsss.store.local import LabelStore, read_records

if TYPE_CHECKING:
    from ..conftest import Answer, World

    Run = Callable[..., Answer]

COLORS = "red, green, blue"


@pytest.fixture
def quick(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The scripted world for graphs too, which know few words; nothing is measured of the machine."""
    monkeypatch.setattr("wsss.benchmarks.latency.open_graph", world.open_graph)
    monkeypatch.setattr("wsss.benchmarks.feeds.WORDS", (4, 6))
    monkeypatch.setattr("wsss.benchmarks.feeds.PIECES", (4, 6))
    known = Ceiling(teraflops=2.0, gigabytes_per_second=8.0, how="known")
    monkeypatch.setattr(bench, "measure_ceiling", lambda engine, device, precision: known)
    monkeypatch.setattr(bench, "commit", lambda: "abc+")
    return world


@pytest.fixture
def run(quick: World, photos: Path, wsss: Run) -> Run:
    flags = ("--bundle", quick.bundle, "--images", photos, "--classes", COLORS, "--seconds", "0", "--engine", "ort")
    return lambda *more: wsss("bench", *flags, *more)


def test_every_graph_and_the_chain(run: Run, quick: World) -> None:
    answer = run("--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    sizes = [(row["model"], row["graph"], row["batch"], row["unit"]) for row in report["graphs"]]
    assert ("clip", "text", 1, "prompts") in sizes and ("sam", "decoder", 2, "boxes") in sizes
    assert {(model, graph) for model, graph, _, _ in sizes} == {
        (name, graph) for name in quick_models(quick) for graph in quick.model(name).manifest.graphs
    }
    assert report["chain"]["images"] == 5 and report["chain"]["boxes_an_image"] == 1.4
    assert set(report["chain"]["stages"]) == {"tag", "detect", "segment", "fuse"}
    assert report["chain"]["agreement"] is None and report["published"] == []
    assert [reason.partition(":")[0] for reason in report["left_out"]] == ["parity"], "the scripted graphs passed no gate"
    assert (report["engine"], report["device"], report["commit"]) == ("ort", "cpu", "abc+")
    assert report["ceilings"]["fp32"]["teraflops"] == 2.0


def quick_models(world: World) -> list[str]:
    return open_bundle(world.bundle).models()


def test_the_table(run: Run) -> None:
    answer = run("--batch", "1", "--batch", "3")
    assert answer.code == 0, answer.err
    assert "maximum here in fp32: 2 TFLOP/s, 8 GB/s (known)" in answer.out
    assert "sam/encoder" in answer.out and "3 images" in answer.out
    assert "5 images in batches of 3" in answer.out and "its thread waited" in answer.out
    assert answer.out.count("left out") == answer.out.count("left out   parity: clip/image, ") == 1


def test_one_model_alone(run: Run) -> None:
    answer = run("--model", "sam")
    assert "sam/encoder" in answer.out and "clip/" not in answer.out
    assert "left out   the chain: --model selects graphs alone" in answer.out
    wrong = run("--model", "segmenter")
    assert wrong.code == 2 and "--model segmenter" in wrong.err and "clip, grounding-dino, sam" in wrong.err


def test_a_bundle_without_a_model_leaves_the_chain_out(run: Run, quick: World) -> None:
    (quick.bundle / "clip" / "manifest.json").unlink()
    assert "left out   the chain: the bundle has no clip" in run().out


def test_a_graph_that_cannot_be_opened_is_left_out(run: Run, quick: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsss.errors import BundleError

    def refuse(model: Any, graph: str, engine: str, **rest: Any) -> Any:
        if graph == "encoder":
            raise BundleError("no engine")
        return quick.open_graph(model, graph, engine)

    monkeypatch.setattr("wsss.benchmarks.latency.open_graph", refuse)
    answer = run()
    assert answer.code == 0 and "left out   sam/encoder: no engine" in answer.out
    monkeypatch.setattr("wsss.benchmarks.latency.open_graph", lambda *args, **rest: refuse(args[0], "encoder", "ort"))
    none = run()
    assert none.code == 1 and "no graph could be run" in none.err and "hint: wsss doctor" in none.err


def test_the_csv_file_is_continued(run: Run, tmp_path: Path) -> None:
    run("--csv", "rows.csv", "--model", "sam")
    run("--csv", "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["graph"] for row in rows[:6]] == ["encoder", "encoder", "decoder", "decoder", "fuse", "fuse"]
    last = rows[-1]
    assert (last["model"], last["calls"], last["commit"], last["precision"]) == ("chain", "5", "abc+", "fp32")
    assert all(row["processor"] and row["onnxruntime"] and float(row["per_second"]) > 0 for row in rows)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    wrong = run("--csv", "rows.csv", "--model", "sam")
    assert wrong.code == 1 and "rows.csv: expected the columns" in wrong.err
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,2\n"


def test_the_plot_is_a_picture_with_a_bar_for_each_row(run: Run, tmp_path: Path) -> None:
    from wsss.benchmarks.plot import BAR_PX, GAP_PX, LEFT_PX, REACHED, TOP_PX

    def bars(*flags: str) -> int:
        assert run("--plot", "out/p.png", *flags).code == 0
        with Image.open(tmp_path / "out" / "p.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        middle = range(TOP_PX + BAR_PX // 2, len(pixels) - 40, BAR_PX + GAP_PX)
        assert all((pixels[row, LEFT_PX + 1] == REACHED).all() for row in middle)
        return len(middle)

    assert bars("--model", "sam") == 6
    rows = len(json.loads(run("--json").out)["graphs"])
    assert bars() == rows + 1, "the last is the chain's"
    assert run("--plot", "p.jpg").code == 2


def test_columns_that_need_onnx_say_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "counted with onnx" not in run("--model", "sam").out
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert "left out   Gmac, of bound, work: counted with onnx, which is not installed: pip" in run().out


# ---- scaling ----


def test_curves_of_the_scripted_chain(quick: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(scaling, "BOXES", (1, 3))
    monkeypatch.setattr(scaling, "SIZES", ((48, 32), (96, 64)))
    monkeypatch.setattr(scaling, "class_names", lambda count: tuple(COLORS.split(", ")))
    seen: list[tuple[int, int, int]] = []

    def noted(executor: Any, images: Path, *rest: Any, **others: Any) -> Summary:
        summary = label_folder(executor, images, *rest, **others)
        seen.append((summary.labelled, summary.boxes, others["batch"] or 0))
        return summary

    monkeypatch.setattr(scaling, "label_folder", noted)
    report = measure_scaling(
        quick.bundle, curves=("batch", "boxes", "size", "empty"), count=4, rounds=1, engine="ort", device="cpu", log=print
    )
    assert report["left_out"] == [] and [curve["name"] for curve in report["curves"]] == ["batch", "boxes", "size", "empty"]
    one_round = [(4, 20, 1), (4, 20, 2), (4, 20, 4)], [(4, 4, 0), (4, 12, 0)], [(4, 20, 0)] * 2
    empty = [(4, 5 * full, 0) for full in (4, 3, 2, 1, 0)]
    assert seen == [call for curve in (*one_round, empty) for call in curve * 2], "once to warm up, once measured"
    assert all(point["per_second"] > 0 and point["cpu_seconds"] > 0 for curve in report["curves"] for point in curve["points"])
    lines = list(scaling_table(report))
    assert len([line for line in lines if line.strip().startswith("100%")]) == 1
    write_curves(tmp_path / "curves.png", report)
    with Image.open(tmp_path / "curves.png") as image:
        assert {color for _, color in image.getcolors(1 << 20) or ()} >= {plot.REACHED, plot.INK}


def test_curves_of_classes_and_processes() -> None:
    names = class_names(1203)
    assert len(set(names)) == 1203 and len(class_list(names)) == 1203 and class_names(3) == names[:3]
    report = measure_scaling(MINI, curves=("classes",), count=1, rounds=1, engine="ort", device="cpu", log=print)
    (curve,) = report["curves"]
    assert [point["value"] for point in curve["points"]] == [1, 20, 80, 300, 1203]
    assert curve["points"][-1]["per_second"] < curve["points"][0]["per_second"]


def test_a_curve_that_cannot_be_measured_is_left_out(quick: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise WsssError("no memory")

    monkeypatch.setitem(scaling.CURVES, "size", ("sizes", refuse))
    report = measure_scaling(quick.bundle, curves=("size",), engine="ort", device="cpu", log=print)
    assert report["left_out"] == ["size: no memory"] and report["curves"] == []


def test_scaling_takes_no_photographs(wsss: Run) -> None:
    answer = wsss("bench", "--scaling", "--images", "photos", "--boxes", "3")
    assert answer.code == 2 and "--scaling: --images, --boxes cannot be used with it" in answer.err


# ---- the chain ----


def test_images_are_gathered_and_repeated(tmp_path: Path, photos: Path) -> None:
    names = gather_images(tmp_path / "work", photos, 3, 2)
    assert len(names) == 6 and len(set(names)) == 6
    assert names[3:] == [f"{Path(name).stem}-001.png" for name in names[:3]]
    assert all((tmp_path / "work" / "images" / name).is_file() for name in names)
    scenes = gather_images(tmp_path / "scenes", None, 2, 1)
    assert len(scenes) == 2 and (tmp_path / "scenes" / "truth").is_dir()


def test_waiting_is_what_a_thread_did_not_work() -> None:
    seconds = {"tag": 1.0, "detect": 2.0, "segment": 3.0, "fuse": 4.0}
    stages = stages_of(Summary(seconds=10.0, stage_seconds=seconds))
    assert stages == {
        "tag": {"seconds": 1.0, "waiting": 9.0},
        "detect": {"seconds": 2.0, "waiting": 8.0},
        "segment": {"seconds": 3.0, "waiting": 3.0},
        "fuse": {"seconds": 4.0},
    }


def test_the_load_of_trained_weights(quick: World, photos: Path, tmp_path: Path) -> None:
    result = measure_chain(
        quick.bundle, tmp_path / "work", engine="ort", device="cpu", images=photos, classes=COLORS, batch=2, boxes=4
    )
    assert result.boxes_an_image == 4.0 and result.images == 5 and result.batch == 2
    records = list(read_records(tmp_path / "work" / "timed"))
    assert all(len(record["boxes"]) == 4 and len(record["classes"]) == 3 for record in records), "black images too"
    boxes = drawn_boxes(7, 30, 40, 50, 3)
    assert set(boxes.image) == {7} and set(boxes.label) == {1, 2, 3}
    assert (boxes.xyxy_image >= 0).all() and (boxes.xyxy_image <= (40, 30, 40, 30)).all()
    assert (boxes.xyxy_image[:, 2:] > boxes.xyxy_image[:, :2]).all()


def test_a_reference_is_labeled_too(quick: World, photos: Path, tmp_path: Path) -> None:
    result = measure_chain(
        quick.bundle,
        tmp_path / "work",
        engine="ort",
        device="cpu",
        images=photos,
        classes=COLORS,
        count=4,
        repeat=2,
        reference=quick.bundle,
        ceiling=Ceiling(teraflops=1.0, gigabytes_per_second=1.0, how=""),
    )
    assert (result.agreement, result.agreement_miou, result.reference) == (1.0, 1.0, str(quick.bundle))
    assert result.images == 8 and result.truth_miou is None
    assert result.gmacs_an_image is None and result.share_of_bound is None, "these graphs are no ONNX"


def test_agreement_counts_pixels(tmp_path: Path) -> None:
    maps = {"one": np.zeros((4, 5), np.uint8), "two": np.zeros((4, 5), np.uint8)}
    maps["one"][:2] = 1
    maps["two"][:3] = 1
    for name, label_map in maps.items():
        with LabelStore(tmp_path / name, class_list(("red",)), {}) as store:
            store.write({"path": "x.png", "label": "x.png"}, label_map)
    scores = agreement(tmp_path / "one", tmp_path / "two", 1)
    assert scores["agreement"] == 0.75
    assert scores["agreement_miou"] == pytest.approx((10 / 15 + 5 / 10) / 2, abs=1e-5)


def test_the_shipped_models_are_a_reference_for_their_weights(tmp_path: Path) -> None:
    import shutil

    assert reference_for(MINI, "ort", "cpu") is None, "they are the reference"
    assert reference_for(MINI, "ort", "cuda:0") == MINI
    for name in ("clip", "grounding-dino", "sam"):
        shutil.copytree(MINI / name, tmp_path / name)
    manifest = read_manifest(tmp_path / "sam")
    write_manifest(tmp_path / "sam", type(manifest)(**{**vars(manifest), "precision": "fp16"}))
    assert reference_for(tmp_path, "ort", "cpu") == MINI
    write_manifest(tmp_path / "sam", type(manifest)(**{**vars(manifest), "weights": {"source": "random:0", "sha256": "0"}}))
    assert reference_for(tmp_path, "trt", "cuda:0") is None
    shutil.rmtree(tmp_path / "clip")
    assert reference_for(tmp_path, "trt", "cuda:0") is None


def test_work_of_the_chain_follows_what_was_found() -> None:
    pytest.importorskip("onnx")
    bundle = open_bundle(MINI)
    nothing = {"height": 240, "width": 320, "classes": {}, "boxes": []}
    tagging = gmacs_an_image(bundle, [nothing])
    looked = gmacs_an_image(bundle, [{**nothing, "classes": {"red disc": 0.9}}])
    boxed = gmacs_an_image(bundle, [{**nothing, "classes": {"red disc": 0.9}, "boxes": [{}] * 4}])
    assert tagging == pytest.approx(14 * 0.0427, rel=1e-2), "CLIP's 14 views"
    assert looked is not None and looked - tagging == pytest.approx(0.471, rel=0.06)  # type: ignore[operator]
    assert boxed is not None and boxed - looked == pytest.approx(0.9767 + 4 * 0.0238, rel=1e-2)
    half = gmacs_an_image(bundle, [nothing, {**nothing, "classes": {"red disc": 0.9}, "boxes": [{}] * 4}])
    assert half == pytest.approx((tagging + boxed) / 2)  # type: ignore[operator]


def test_published_figures_are_for_the_same_model_alone() -> None:
    manifest = read_manifest(MINI / "sam")
    assert published_for([manifest]) == []
    found = published_for([type(manifest)(**{**vars(manifest), "variant": "vit_h"})])
    assert [each.per_second for each in found] == [23.6, 25.0, 11]
    assert all(each.source for each in found)


def test_no_other_benchmark_uses_the_seed() -> None:
    from wsss.benchmarks import demo
    from wsss.benchmarks.studies.quality import mini_quality

    assert len({throughput.SEED, demo.SEED, mini_quality.SEED}) == 3
