"""The segmenter's way out: a run of `wsss train` to graphs that compute what the trained module computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from wsss.batch import Boxes, Labels, Photograph
from wsss.engines.ort import OrtEngine
from wsss.errors import UsageError, WeightsError
from wsss.export import segmenter
from wsss.export.exporting import export_model
from wsss.export.family import Options, family, gap_of_choices
from wsss.export.to_engine import BuildOptions, build_plans
from wsss.export.verify import photograph
from wsss.export.weights import spread
from wsss.runtime.trained_segmenter import SegmenterStage, no_masks
from wsss.spec import AxisRange, Bundle, Model, Precision
from wsss.train.args import DataArgs
from wsss.train.checkpoint import BEST, RunRecord, load_run, write_record, write_tensors
from wsss.train.model import Segmenter, build_segmenter
from wsss.train.validate import whole_image_logits

SMALL = {"batch": AxisRange(1, 2, 4), "sizes": ((64, 96),)}


def exported(variant: str, weights: str, bundle: Path, options: Options) -> Model:
    export_model(segmenter.FAMILY, variant=variant, weights=weights, bundle=bundle, options=options, log=lambda line: None)
    return Bundle(bundle).model("segmenter")


def ort_engine(model: Model, graph: str) -> OrtEngine:
    spec = model.graph(graph)
    return OrtEngine(model.folder / spec.file, spec)


def saved_run(
    folder: Path,
    architecture: str,
    encoder: str,
    segmenter: Segmenter,
    options: Mapping[str, Any] | None = None,
    step: int = 1,
    steps: int = 1,
) -> Path:
    """A run's folder as the trainer leaves it, with the best weights at ``step``."""
    record = RunRecord(
        architecture=architecture,
        encoder=encoder,
        options=options or {},
        classes=("cat", "dog"),
        mean=(120.0, 110.0, 100.0),
        std=(60.0, 55.0, 50.0),
        crop=90,
        multiple_of=segmenter.multiple_of,
        steps=steps,
        preset="mini",
        source="a test",
        init={},
        store="",
        images=1,
        tools={},
    )
    write_record(folder, record)
    write_tensors(folder / BEST, segmenter.network.state_dict(), {"step": step, "miou": 0.5})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    return saved_run(tmp_path_factory.mktemp("run"), "unet", "resnet18", build_segmenter("unet", "resnet18", {}, 3).eval())


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SegFormer that has learnt to tell dark, middle and bright: random ones hardly prefer any label, and any rounding
    changes their minds."""
    torch.manual_seed(5)
    segmenter = build_segmenter("segformer", "b0", {}, 3).train()
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=3e-4)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(60):
        pixels = torch.from_numpy(np.stack([photograph(rng, 64, 96) for _ in range(4)])).permute(0, 3, 1, 2).float()
        brightness = functional.avg_pool2d(pixels.mean(1, keepdim=True), 9, 1, 4)[:, 0]
        label = (brightness > 100).long() + (brightness > 150).long()
        loss = functional.cross_entropy(segmenter((pixels - 110) / 55), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.8, "it has learnt nothing"
    return saved_run(tmp_path_factory.mktemp("taught"), "segformer", "b0", segmenter.eval())


@pytest.mark.parametrize("variant", ["deeplabv3plus/resnet50", "segformer/b0"])
def test_random_weights_export_and_pass_the_gate_row_by_row(variant: str, tmp_path: Path) -> None:
    model = exported(variant, "random:1", tmp_path, Options(**SMALL))
    parity = model.graph("image-64x96").parity
    assert parity is not None and {row.batch for row in parity.rows} == {1, 2, 4}
    assert len(model.manifest.settings["classes"]) == 20


@pytest.mark.parametrize(("encoder", "side"), [("vit_small_patch14_dinov2", 56), ("vit_small_patch16_dinov3", 64)])
def test_a_vision_transformer_is_exported(encoder: str, side: int, tmp_path: Path) -> None:
    """Its table or rotation of positions is made for the canvas, also one that is not square."""
    options = {"depth": 4, "embed_dim": 48, "num_heads": 3}
    torch.manual_seed(5)
    (tmp_path / "run").mkdir()
    folder = saved_run(tmp_path / "run", "vit", encoder, build_segmenter("vit", encoder, options, 3).eval(), options)
    model = exported("trained", str(folder), tmp_path / "bundle", Options(batch=AxisRange(1, 1, 2), sizes=((side, 2 * side),)))
    parity = model.graph(f"image-{side}x{2 * side}").parity
    assert parity is not None and parity.worst("label_map").error <= 2e-3


@pytest.mark.parametrize(
    ("encoder", "step", "precision"),
    [("vit_small_patch14_reg4_dinov2", 10, "fp16"), ("vit_small_patch16_dinov3", 3, "fp32")],
)
def test_eomt_is_exported_as_it_is_validated(encoder: str, step: int, precision: Precision, tmp_path: Path) -> None:
    """After a whole training without attention masks; of one that was stopped, with the masks of its step."""
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "queries": 10, "blocks": 2}
    torch.manual_seed(5)
    network = build_segmenter("eomt", encoder, options, 3)
    with torch.no_grad():
        spread(network, 5)
    (tmp_path / "run").mkdir()
    folder = saved_run(tmp_path / "run", "eomt", encoder, network, options, step, 10)
    trained = load_run(folder)[0]
    assert trained.network.masked == ([8, 10] if step == 3 else [0, 0])
    with torch.inference_mode():
        assert len(trained(torch.randn(1, 3, 64, 96)).argmax(1).unique()) > 1
    model = exported("trained", str(folder), tmp_path / "bundle", Options(precision=precision, **SMALL))
    parity = model.graph("image-64x96").parity
    assert parity is not None and {row.batch for row in parity.rows} == {1, 2, 4}
    assert parity.worst("confidence").error <= (2e-3 if precision == "fp32" else 1e-2)


def test_random_weights_are_the_same_with_any_number_of_threads() -> None:
    """They make the hash that a bundle records."""
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(segmenter._random("deeplabv3plus/resnet50", 1)[0].state_dict())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(found[0].values(), found[1].values(), strict=True))


def test_half_precision_agrees_and_tensorrt_builds_it(taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'wsss[trt-rtx]'")
    model = exported("trained", str(taught), tmp_path, Options(precision="fp16", **{**SMALL, "batch": AxisRange(1, 2, 8)}))
    parity = model.graph("image-64x96").parity
    assert parity is not None and 0 < parity.worst("confidence").error <= 1e-2
    built = build_plans(model, BuildOptions(flavour="trt-rtx"), lambda line: None)
    assert built.graph("image-64x96").plans["trt-rtx"].axes["batch"] == AxisRange(1, 2, 8)


def test_a_run_brings_its_classes_and_preprocessing(run: Path, tmp_path: Path) -> None:
    model = exported("trained", str(run), tmp_path, Options(batch=AxisRange(1, 1, 2)))
    manifest = model.manifest
    assert (manifest.variant, list(manifest.graphs)) == ("unet/resnet18", ["image-96x96"])  # the crop, rounded up to 32
    assert manifest.settings == {"classes": ["cat", "dog"], "overlap_px": 24}
    assert manifest.preprocess.mean == (120.0, 110.0, 100.0) and manifest.preprocess.resize == "none"


def test_a_run_of_one_shorter_side_labels_as_the_trainer_does(taught: Path, tmp_path: Path) -> None:
    """Photographs of any size through the exported graph and the runtime, against logits resized in the trainer."""
    run = shutil.copytree(taught, tmp_path / "run")
    record = json.loads((run / "segmenter.json").read_text())
    (run / "segmenter.json").write_text(json.dumps({**record, "shorter_px": 64}))
    model = exported("trained", str(run), tmp_path / "bundle", Options(batch=AxisRange(1, 1, 2)))
    preprocess = model.manifest.preprocess
    assert (preprocess.resize, preprocess.short_px, preprocess.canvases) == ("shorter", 64, ((64, 96), (96, 64)))
    rng = np.random.default_rng(0)
    known = [photograph(rng, 64, 96) for _ in range(8)]  # of the kind it was trained on
    sizes = [(150, 225), (64, 96), (40, 60), (225, 150), (150, 225), (80, 120), (64, 96), (33, 50)]
    photos = [
        Photograph(name=f"{size}", pixels=np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)))
        for pixels, size in zip(known, sizes, strict=True)
    ]
    nothing = Labels(np.zeros((8, 2), np.float32), np.zeros((8, 2), np.bool_))
    stage = SegmenterStage(model, lambda canvas: ort_engine(model, f"image-{canvas[0]}x{canvas[1]}"))
    found = stage(photos, nothing, Boxes.none(), no_masks(photos, Boxes.none())).label_maps
    trained, run_record = load_run(run)
    args = DataArgs(mean=run_record.mean, std=run_record.std, shorter_px=run_record.shorter_px)
    seen: set[int] = set()
    for photo, label_map in zip(photos, found, strict=True):
        with torch.inference_mode():
            logits = whole_image_logits(trained, photo.pixels, args, torch.device("cpu")).numpy()
        want = logits.argmax(axis=0)
        if photo.shape == (64, 96):
            right = {"label": want[None], "label.values": logits[None]}
            assert gap_of_choices({"label": label_map[None]}, right, "label")[0] <= 2e-3, photo.name
        assert (label_map == want).mean() > 0.97, photo.name
        seen |= set(np.unique(want).tolist())
    assert len(seen) > 1


def test_canvases_of_a_shorter_side_hold_photographs_of_three_by_two(run: Path, tmp_path: Path) -> None:
    values = json.loads((shutil.copytree(run, tmp_path / "run") / "segmenter.json").read_text())
    (tmp_path / "run" / "segmenter.json").write_text(json.dumps({**values, "shorter_px": 500}))
    assert segmenter.prepare("trained", str(tmp_path / "run"), Options()).preprocess.canvases == ((512, 768), (768, 512))


def test_another_best_or_record_changes_the_hash(run: Path) -> None:
    before = segmenter.prepare("trained", str(run), Options()).weights["sha256"]
    record = run / "segmenter.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "mean": [1.0, 2.0, 3.0]}))
    try:
        assert segmenter.prepare("trained", str(run), Options()).weights["sha256"] != before
    finally:
        record.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("variant", "weights", "sizes", "message"),
    [
        ("vit_b", "RUN", (), "a run records its architecture"),
        ("trained", "RUN", ((100, 96),), "--size 100x96: unet needs sides that are multiples of 32"),
        ("unet", "random:0", (), "expected ARCHITECTURE/ENCODER, got 'unet'"),
        ("unet/nonet", "random:0", (), "cannot be built"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: Path, variant: str, weights: str, sizes: tuple[tuple[int, int], ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        segmenter.prepare(variant, weights.replace("RUN", str(run)), Options(sizes=sizes))


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected the folder of a training \(with segmenter.json\)"):
        segmenter.prepare("trained", str(tmp_path), Options())
    with pytest.raises(WeightsError, match="no official weights") as caught:
        family("segmenter").official("trained")
    assert "--weights RUN" in str(caught.value.hint)
