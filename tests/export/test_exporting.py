"""Publishing: a whole model or nothing, and the old one until then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsss.errors import BundleError, ParityError, WeightsError
from wsss.export import exporting
from wsss.export.family import Family, Graph, Options, Prepared, Tolerance
from wsss.spec import AxisRange, Manifest, Preprocess, TensorSpec, open_bundle

PREPROCESS = Preprocess(
    resize="squash", longest_px=8, filter="bilinear", canvases=((8, 8),), mean=(0, 0, 0), std=(1, 1, 1), source="test"
)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((400,), factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scale_graph(factor: float, truth: float) -> Graph:
    return Graph(
        name="scale",
        module=Scale(factor),
        inputs=(TensorSpec("x", ("batch", 400), "float32"),),
        outputs=(TensorSpec("y", ("batch", 400), "float32"),),
        axes={"batch": AxisRange(1, 2, 3)},
        row_axis="batch",
        sample=lambda rows, seed: {"x": np.random.default_rng(seed).normal(size=(rows, 400)).astype(np.float32)},
        reference=lambda feeds, _: {"y": feeds["x"] * np.float32(truth)},
        tolerance={"y": Tolerance(relative=1e-6, why="test")},
    )


def make_family(*, factor: float = 3.0, truth: float = 3.0) -> Family:
    """A model that multiplies by ``factor`` where ``truth`` is right; ``weights`` is its own hash."""

    def prepare(variant: str, weights: str, options: Options) -> Prepared:
        return Prepared(
            variant=variant,
            graphs=(lambda: scale_graph(factor, truth),),
            preprocess=PREPROCESS,
            weights={"source": weights, "sha256": weights * 8},
        )

    return Family(name="toy", variants=("one",), default="one", prepare=prepare, official=lambda variant: variant)


def export(bundle: Path, family: Family, weights: str = "abcdefgh") -> Manifest:
    return exporting.export_model(family, variant="one", weights=weights, bundle=bundle, options=Options(), log=print)


def test_export_fail_replace_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "deep" / "bundle"
    export(bundle, make_family())
    model = open_bundle(bundle).model("toy")  # checks every hash
    assert model.manifest.tools["torch"] == torch.__version__.split("+")[0] or "+" in model.manifest.tools["torch"]
    assert sorted(path.name for path in bundle.iterdir()) == ["toy"]

    # A graph that is wrong leaves the old model, and nothing beside it.
    with pytest.raises(ParityError, match="toy scale: output 'y'"):
        export(bundle, make_family(factor=3.1))
    assert [path.name for path in bundle.iterdir()] == ["toy"]
    assert open_bundle(bundle).model("toy").manifest == model.manifest

    # Nor does Ctrl-C.
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exporting, "write_manifest", interrupt)
        export(bundle, make_family())
    assert [path.name for path in bundle.iterdir()] == ["toy"]

    export(bundle, make_family(factor=5.0, truth=5.0), weights="other---")
    changed = open_bundle(bundle).model("toy")
    assert changed.manifest.identity() != model.manifest.identity()

    # The stored files against the module again: right weights, other weights, another truth.
    monkeypatch.setattr(exporting, "family", lambda name: make_family(factor=5.0, truth=5.0))
    assert exporting.verify_model(changed, None, print)["scale"].worst("y").error < 1e-6
    with pytest.raises(WeightsError, match="was exported from"):
        exporting.verify_model(changed, "elsewhere", print)
    monkeypatch.setattr(exporting, "family", lambda name: make_family(factor=3.0, truth=3.0))
    with pytest.raises(ParityError):
        exporting.verify_model(changed, None, print)


def test_a_bundle_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        export(tmp_path / "file", make_family())


def test_canvases_other_than_the_familys_own_are_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Options] = []
    plain = make_family()

    def prepare(variant: str, weights: str, options: Options) -> Prepared:
        asked.append(options)
        prepared = plain.prepare(variant, weights, options)
        return replace(prepared, preprocess=replace(PREPROCESS, canvases=options.sizes or PREPROCESS.canvases))

    monkeypatch.setattr(exporting, "family", lambda name: replace(plain, prepare=prepare))
    manifest = Manifest(
        family="toy",
        variant="one",
        preprocess=replace(PREPROCESS, canvases=((4, 9),)),
        graphs={},
        weights={"source": "abcdefgh", "sha256": "abcdefgh" * 8},
        tools={},
    )
    assert exporting.prepare_again(manifest).preprocess.canvases == ((4, 9),)
    assert [options.sizes for options in asked] == [(), ((4, 9),)]
