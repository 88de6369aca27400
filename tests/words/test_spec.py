"""Manifests and bundles: what is written comes back, what is damaged or reaches outside is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wsss.errors import BundleError, SpecError
from wsss.spec import (
    AxisRange,
    GraphSpec,
    Manifest,
    Parity,
    ParityRow,
    Preprocess,
    TensorSpec,
    open_bundle,
    read_manifest,
    sha256_of,
    write_manifest,
)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        family="sam",
        variant="vit_b",
        preprocess=Preprocess(
            resize="longest",
            longest_px=1024,
            filter="bilinear",
            canvases=((1024, 1024), (800, 1344)),
            mean=(123.675, 116.28, 103.53),
            std=(58.395, 57.12, 57.375),
            source="SAM",
        ),
        graphs={
            "encoder": GraphSpec(
                file="encoder.onnx",
                inputs=(TensorSpec("pixels", ("batch", 1024, 1024, 3), "uint8"),),
                outputs=(TensorSpec("embedding", ("batch", 256, 64, 64), "float32"),),
                axes={"batch": AxisRange(1, 4, 8)},
                opset=18,
                parity=Parity(
                    engine="onnxruntime 1.32",
                    reference="segment_anything 1.0",
                    tolerance={"embedding": "1e-4"},
                    rows=(
                        ParityRow(output="embedding", batch=1, row=0, against="reference", error=1e-6, worst=2e-5),
                        ParityRow(output="embedding", batch=2, row=1, against="alone", error=3e-6, worst=1e-5),
                    ),
                ),
            ),
        },
        settings={"logits_side": 256, "templates": ["a photo of {}"], "note": "é"},
        weights={"source": "random:0", "sha256": "00"},
        tools={"onnx": "1.23"},
    )


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest) -> Path:
    """A bundle with one model of two files."""
    folder = tmp_path / "bundle" / "sam"
    folder.mkdir(parents=True)
    (folder / "encoder.onnx").write_bytes(b"graph")
    (folder / "weights.data").write_bytes(b"0123456789")
    files = {path.name: sha256_of(path) for path in folder.iterdir()}
    write_manifest(folder, replace(manifest, files=files))
    return tmp_path / "bundle"


@pytest.fixture
def edit(bundle: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Changes the manifest's JSON in place."""

    def change(how: Callable[[dict[str, Any]], object]) -> None:
        path = bundle / "sam" / "manifest.json"
        told = json.loads(path.read_text())
        how(told)
        path.write_text(json.dumps(told))

    return change


def test_a_manifest_comes_back_as_it_was(tmp_path: Path, manifest: Manifest) -> None:
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"], "no temporary left"


def test_identity_follows_files_settings_and_preprocessing_only(manifest: Manifest) -> None:
    same = replace(manifest, tools={"onnx": "9"}, weights={"source": "elsewhere", "sha256": "00"})
    assert same.identity() == manifest.identity()
    for other in (
        replace(manifest, files={"encoder.onnx": "1"}),
        replace(manifest, settings={"logits_side": 64}),
        replace(manifest, preprocess=replace(manifest.preprocess, longest_px=512)),
    ):
        assert other.identity() != manifest.identity()


def test_worst_row_of_an_output(manifest: Manifest) -> None:
    parity = manifest.graphs["encoder"].parity
    assert parity is not None
    assert parity.worst("embedding").row == 1


@pytest.mark.parametrize(("low", "usual", "high"), [(0, 1, 1), (2, 1, 3), (1, 4, 3), (-1, -1, -1)])
def test_axis_ranges_rise_from_one(low: int, usual: int, high: int) -> None:
    with pytest.raises(SpecError, match=f"min={low}, opt={usual}, max={high}"):
        AxisRange(low, usual, high)


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="found nothing") as caught:
        open_bundle(tmp_path / "none")
    assert "wsss export --model all" in caught.value.hint
    with pytest.raises(BundleError, match="found no model in it"):
        open_bundle(tmp_path)


def test_a_lacking_model_is_named_with_what_is_there(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"needs the model 'clip', the bundle has sam") as caught:
        open_bundle(bundle).model("clip")
    assert caught.value.hint == f"wsss export --model clip --bundle {bundle}"


def test_half_an_export_is_no_model(bundle: Path) -> None:
    (bundle / "clip").mkdir()
    (bundle / ".clip.new").mkdir()
    (bundle / ".clip.new" / "manifest.json").write_text("{}")
    assert open_bundle(bundle).models() == ["sam"]


def test_a_lacking_graph_is_named_with_what_is_there(bundle: Path) -> None:
    model = open_bundle(bundle).model("sam")
    assert model.path("encoder") == bundle / "sam" / "encoder.onnx"
    with pytest.raises(BundleError, match=r"no graph 'decoder', only encoder"):
        model.graph("decoder")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a JSON manifest"),
        ('{"format": 1, "fam', "expected a JSON manifest"),
        ("\xff\xfe", "expected a JSON manifest"),
        ("[]", "expected manifest format 1, got list"),
        ("{}", "expected manifest format 1, got None"),
        ('{"format": 2}', "expected manifest format 1, got 2"),
        ('{"format": 1}', "preprocess"),
    ],
)
def test_a_damaged_manifest_is_named(bundle: Path, text: str, said: str) -> None:
    path = bundle / "sam" / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=said) as caught:
        open_bundle(bundle).model("sam")
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "how",
    [
        lambda told: told.update(surplus=1),
        lambda told: told.pop("weights"),
        lambda told: told.update(graphs=[]),
        lambda told: told.update(files=None),
        lambda told: told.update(files=[]),
        lambda told: told.update(settings="none"),
        lambda told: told["graphs"]["encoder"].pop("inputs"),
        lambda told: told["graphs"]["encoder"].update(file=7),
        lambda told: told["graphs"]["encoder"]["inputs"][0].pop("dtype"),
        lambda told: told["graphs"]["encoder"]["axes"].update(batch={"min": 3, "opt": 2, "max": 1}),
        lambda told: told["graphs"]["encoder"]["axes"].update(batch={"min": "1", "opt": 2, "max": 3}),
        lambda told: told["preprocess"].update(canvases=[[1024]]),
        lambda told: told["preprocess"].update(mean=None),
    ],
)
def test_a_manifest_of_another_shape_is_named(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], how: Callable[[dict[str, Any]], object]
) -> None:
    edit(how)
    with pytest.raises(BundleError, match=r"manifest\.json: not a valid manifest"):
        open_bundle(bundle).model("sam")


def test_a_changed_file_is_named(bundle: Path) -> None:
    (bundle / "sam" / "weights.data").write_bytes(b"0123456780")
    with pytest.raises(BundleError, match=r"weights\.data: its sha256 is .*changed or truncated"):
        open_bundle(bundle).model("sam")


def test_a_truncated_file_is_named(bundle: Path) -> None:
    (bundle / "sam" / "encoder.onnx").write_bytes(b"gra")
    with pytest.raises(BundleError, match=r"encoder\.onnx: its sha256"):
        open_bundle(bundle).model("sam")


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "sam" / "weights.data").unlink()
    with pytest.raises(BundleError, match=r"weights\.data: named by the manifest but missing"):
        open_bundle(bundle).model("sam")


def test_a_link_is_refused_even_to_the_right_bytes(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "sam" / "weights.data"
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"manifest\.json: names 'weights\.data', expected a plain file"):
        open_bundle(bundle).model("sam")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ".", ""])
def test_names_that_leave_the_folder_are_refused(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], name: str
) -> None:
    outside = bundle / "outside"
    outside.write_bytes(b"x")
    edit(lambda told: told["files"].update({name: sha256_of(outside)}))
    with pytest.raises(BundleError, match="plain file of its own folder"):
        open_bundle(bundle).model("sam")


@pytest.mark.parametrize("name", ["../outside.onnx", "unlisted.onnx"])
def test_a_graph_or_tokenizer_whose_hash_is_not_listed_is_refused(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], name: str
) -> None:
    (bundle / "sam" / name).write_bytes(b"never hashed")
    edit(lambda told: told["graphs"]["encoder"].update(file=name))
    with pytest.raises(BundleError, match=r"uses .* without its sha256"):
        open_bundle(bundle).model("sam")
    edit(lambda told: (told["graphs"]["encoder"].update(file="encoder.onnx"), told.update(tokenizer=name)))
    with pytest.raises(BundleError, match=r"uses .* without its sha256"):
        open_bundle(bundle).model("sam")
