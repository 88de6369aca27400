"""Manifests and bundles: what is written comes back, what is damaged or reaches outside is refused by name."""

from __future__ import annotations

import json
import os
import random
import re
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
    box_thresholds,
    open_bundle,
    read_manifest,
    sha256_of,
    write_manifest,
)


def nested(levels: int) -> list[Any]:
    """``[[[...]]]``."""
    return [nested(levels - 1)] if levels else []


def field(number: int, data: bytes) -> bytes:
    """A field of a protobuf message, of less than 128 bytes."""
    return (
        bytes([number << 3 | 2]) + bytes([len(data)]) + data
        if number < 16
        else bytes([(number << 3 & 127 | 2) | 128, number >> 4, len(data)]) + data
    )


def external(location: str) -> bytes:
    """A tensor that lies in another file: ``TensorProto`` with one entry of ``external_data``."""
    return field(13, field(1, b"location") + field(2, location.encode()))


GRAPH = field(7, field(5, external("weights.data")))
"""An ONNX file whose one initializer lies in ``weights.data``."""


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
    (folder / "encoder.onnx").write_bytes(GRAPH)
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


def test_a_graph_adds_nothing_in_fp32_unless_its_manifest_says_so(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None]
) -> None:
    """Another number would have each export done again."""
    edit(lambda record: record["graphs"]["encoder"].pop("fp32_accumulation"))
    assert read_manifest(bundle / "sam").graphs["encoder"].fp32_accumulation == 0


def test_the_earlier_name_of_fp32_nodes_is_read(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], manifest: Manifest
) -> None:
    expected = {"a sum of squares": 3}

    def as_before(record: dict[str, Any]) -> None:
        graph = record["graphs"]["encoder"]
        del graph["fp32_nodes"]
        graph["islands"] = expected

    edit(as_before)
    read = read_manifest(bundle / "sam")
    assert read.graphs["encoder"] == replace(manifest.graphs["encoder"], fp32_nodes=expected)
    write_manifest(bundle / "sam", read)
    assert '"islands"' not in (bundle / "sam" / "manifest.json").read_text()
    edit(lambda record: record["graphs"]["encoder"].update(islands=expected))
    with pytest.raises(BundleError, match="unknown field 'islands'"):
        read_manifest(bundle / "sam")


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
    (bundle / "sam").rename(bundle / ".sam.old-0123abcd")  # by an export that was killed before the new model took its place
    assert open_bundle(bundle).models() == ["sam"]


def test_a_lacking_graph_is_named_with_what_is_there(bundle: Path) -> None:
    model = open_bundle(bundle).model("sam")
    assert model.path("encoder") == bundle / "sam" / "encoder.onnx"
    with pytest.raises(BundleError, match=r"no graph 'decoder', only encoder"):
        model.graph("decoder")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected JSON"),
        ('{"format": 1, "fam', "expected JSON"),
        ("\xff\xff", "expected UTF-8 text"),
        ('{"format": 1, "format": 1}', "occurs twice"),
        ("[" * 200_000, "nested too deep"),
        ('{"format": true}', "expected manifest format 1, got True"),
        ('{"format": 1.0}', "expected manifest format 1, got 1.0"),
        ("[]", "expected manifest format 1, got list"),
        ("{}", "expected manifest format 1, got None"),
        ('{"format": 2}', "expected manifest format 1, got 2"),
        ('{"format": 1}', "not a valid manifest: family: missing"),
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
        lambda told: told["preprocess"].update(mean=[1, 2]),
        lambda told: told["preprocess"].update(std=[1, 0, 1]),
        lambda told: told["preprocess"].update(resize="squeeze"),
        lambda told: told["preprocess"].update(canvases=[]),
        lambda told: told["preprocess"].update(canvases=[[0, 64]]),
        lambda told: told["preprocess"].update(canvases=[[1 << 40, 64]]),
        lambda told: told["preprocess"].update(canvases=[[64, True]]),
        lambda told: told["preprocess"].update(longest_px=0),
        lambda told: told["preprocess"].update(short_px=-1),
        lambda told: told["preprocess"].update(longest_px=10**400),
        lambda told: told.update(variant="vit\0b"),
        lambda told: told.update(variant="\x1b[2J"),
        lambda told: told.update(variant="\ud800"),
        lambda told: told.update(graphs={}),
        lambda told: told.update(tokenizer=7),
        lambda told: told.update(weights={"source": 1}),
        lambda told: told["files"].update({"weights.data": "00"}),
        lambda told: told["settings"].pop("logits_side"),
        lambda told: told["settings"].update(logits_side="many"),
        lambda told: told["settings"].update(note=nested(50)),
        lambda told: told["settings"].update(note=10**30),
        lambda told: told["graphs"]["encoder"].update(file="encoder.ort"),
        lambda told: told["graphs"]["encoder"].update(precision="fp4"),
        lambda told: told["graphs"]["encoder"].update(opset="18"),
        lambda told: told["graphs"]["encoder"].update(surplus=1),
        lambda told: told["graphs"]["encoder"].update(fp32_nodes={"why": "two"}),
        lambda told: told["graphs"]["encoder"].update(plans={"trt": {}}),
        lambda told: told["graphs"]["encoder"]["inputs"][0].update(dtype="float64"),
        lambda told: told["graphs"]["encoder"]["inputs"][0].update(shape=["batch", -1]),
        lambda told: told["graphs"]["encoder"]["inputs"][0].update(shape=["batch", 2.5]),
        lambda told: told["graphs"]["encoder"]["inputs"].append(told["graphs"]["encoder"]["inputs"][0]),
        lambda told: told["graphs"]["encoder"]["axes"].update(batch={"min": 1, "opt": 2, "max": 1 << 40}),
        lambda told: told["graphs"]["encoder"]["axes"].update(batch={"min": 1, "opt": True, "max": 2}),
        lambda told: told["graphs"]["encoder"]["axes"].pop("batch"),
        lambda told: told["graphs"].update(decoder={**told["graphs"]["encoder"], "plans": {}}),
        lambda told: told["graphs"]["encoder"]["parity"]["rows"][0].update(error="1e999"),
        lambda told: told["graphs"]["encoder"]["parity"]["rows"][0].update(error=10**400),
        lambda told: told["graphs"]["encoder"]["parity"].update(rows={}),
    ],
)
def test_a_manifest_of_another_shape_is_named(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], how: Callable[[dict[str, Any]], object]
) -> None:
    edit(how)
    with pytest.raises(BundleError, match=r"manifest\.json: not a valid manifest"):
        open_bundle(bundle).model("sam")


@pytest.mark.parametrize(
    ("part", "most", "more"),
    [
        ("preprocess", {"canvases": [[1, 32_768]]}, {"canvases": [[1, 32_769]]}),
        ("preprocess", {"longest_px": 32_768}, {"longest_px": 32_769}),
        ("preprocess", {"longest_px": 1}, {"longest_px": 0}),
        ("preprocess", {"short_px": 32_768}, {"short_px": 32_769}),
        ("axes", {"batch": {"min": 1, "opt": 1, "max": 2**31 - 1}}, {"batch": {"min": 1, "opt": 1, "max": 2**31}}),
        ("inputs", {"shape": ["batch", 1, 2**31 - 1]}, {"shape": ["batch", 1, 2**31]}),
        ("inputs", {"shape": ["batch", 1]}, {"shape": ["batch", 0]}),
        ("settings", {"logits_side": 2**63 - 1}, {"logits_side": 2**63}),
        ("settings", {"logits_side": 1 - 2**63}, {"logits_side": -(2**63)}),
    ],
)
def test_a_manifest_at_a_limit_is_read_and_beyond_it_refused(
    bundle: Path,
    edit: Callable[[Callable[[dict[str, Any]], object]], None],
    part: str,
    most: dict[str, Any],
    more: dict[str, Any],
) -> None:
    def change(changes: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
        def update(told: dict[str, Any]) -> None:
            graph = told["graphs"]["encoder"]
            {**told, "axes": graph["axes"], "inputs": graph["inputs"][0]}[part].update(changes)

        return update

    edit(change(most))
    open_bundle(bundle).model("sam")
    edit(change(more))
    with pytest.raises(BundleError, match="not a valid manifest"):
        open_bundle(bundle).model("sam")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_are_not_finite_are_refused(bundle: Path, number: str) -> None:
    path = bundle / "sam" / "manifest.json"
    path.write_text(path.read_text().replace("123.675", number))
    with pytest.raises(BundleError, match="finite number"):
        open_bundle(bundle).model("sam")


def test_random_damage_of_a_manifest_is_never_another_error(bundle: Path) -> None:
    """Values of another kind in every place, and bytes lost, doubled or changed at random (seeded)."""
    path = bundle / "sam" / "manifest.json"
    whole = path.read_text()
    rng, refused = random.Random(0), 0
    values = [None, True, -1, 0, 10**30, 0.5, "", "..", "\0", [], [[]], {}, {"": None}, "x" * 100_000]
    for number in range(600):
        if number % 3:
            told = json.loads(whole)
            at: Any = told
            while True:
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                key = rng.choice(keys)
                if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.2:
                    break
                at = at[key]
            at[key] = rng.choice(values)
            path.write_text(json.dumps(told))
        else:
            start = rng.randrange(len(whole))
            path.write_bytes(
                (
                    whole[:start] + rng.choice(["", "\0", "}", "9" * 500, whole[start:]]) + whole[start + rng.randrange(9) :]
                ).encode()
            )
        try:
            open_bundle(bundle).model("sam").manifest.identity()
        except BundleError as error:
            refused += 1
            assert error.hint
    assert refused > 400


def test_a_changed_file_is_named(bundle: Path) -> None:
    (bundle / "sam" / "weights.data").write_bytes(b"0123456780")
    with pytest.raises(BundleError, match=r"weights\.data: its sha256 is .*changed or truncated"):
        open_bundle(bundle).model("sam")


def test_a_truncated_file_is_named(bundle: Path) -> None:
    (bundle / "sam" / "encoder.onnx").write_bytes(GRAPH[:-1])
    with pytest.raises(BundleError, match=r"encoder\.onnx: its sha256"):
        open_bundle(bundle).model("sam")


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "sam" / "weights.data").unlink()
    with pytest.raises(BundleError, match=r"weights\.data: listed in the manifest but missing"):
        open_bundle(bundle).model("sam")


def relink(path: Path, target: Path) -> None:
    """Moves a file to ``target`` and leaves a relative link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(os.path.relpath(target, path.parent))


def test_a_link_is_refused_even_to_the_right_bytes(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "sam" / "weights.data"
    relink(path, tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"weights\.data: a link to .*elsewhere, outside of .*bundle/sam"):
        open_bundle(bundle).model("sam")
    path.unlink()
    for target in ("nowhere", "weights.data"):
        path.symlink_to(target)
        with pytest.raises(BundleError, match=rf"weights\.data: a link to {target}, which does not exist"):
            open_bundle(bundle).model("sam")
        path.unlink()


def test_a_link_within_the_folder_opens(bundle: Path) -> None:
    relink(bundle / "sam" / "weights.data", bundle / "sam" / "weights-2.data")
    assert open_bundle(bundle).model("sam").manifest.family == "sam"


@pytest.fixture
def cached(bundle: Path, tmp_path: Path) -> Path:
    """The bundle in the layout of the Hugging Face hub's cache: ``snapshots/REVISION`` with links into ``blobs``."""
    repository = tmp_path / "models--someone--bundle"
    snapshot = repository / "snapshots" / "8e9f"
    snapshot.parent.mkdir(parents=True)
    bundle.rename(snapshot)
    for path in list((snapshot / "sam").iterdir()):
        relink(path, repository / "blobs" / sha256_of(path))
    return snapshot


def test_a_hub_s_cache_opens_as_it_is(cached: Path) -> None:
    assert (cached / "sam" / "manifest.json").is_symlink()
    assert open_bundle(cached).model("sam").path("encoder").read_bytes() == GRAPH


def test_a_hub_s_cache_is_hashed_all_the_same(cached: Path) -> None:
    (cached / "sam" / "weights.data").resolve().write_bytes(b"0123456780")
    with pytest.raises(BundleError, match=r"weights\.data: its sha256 is .*changed or truncated"):
        open_bundle(cached).model("sam")


@pytest.mark.parametrize("place", ["blobs", "models--other--bundle/blobs", "models--someone--bundle/blobs/deeper"])
def test_blobs_of_another_cache_are_elsewhere(cached: Path, tmp_path: Path, place: str) -> None:
    path = cached / "sam" / "weights.data"
    target = tmp_path / place / "1"
    target.parent.mkdir(parents=True, exist_ok=True)
    path.resolve().rename(target)
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(BundleError, match=r"weights\.data: a link to .*, outside of"):
        open_bundle(cached).model("sam")


def test_a_changed_file_of_the_same_size_and_time_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "weights.data"
    path.write_bytes(b"0123456789")
    before, status = sha256_of(path), path.stat()
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # a file system's clock has ticks of milliseconds
        path.write_bytes(b"0123456780")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert sha256_of(path) != before


SHAPES = {
    "initializer": field(7, field(5, external("w.bin"))),
    "sparse initializer": field(7, field(15, field(1, external("w.bin")))),
    "indices of a sparse one": field(7, field(15, field(2, external("w.bin")))),
    "attribute": field(7, field(1, field(5, field(5, external("w.bin"))))),
    "list in an attribute": field(7, field(1, field(5, field(10, external("w.bin"))))),
    "sparse attribute": field(7, field(1, field(5, field(22, field(1, external("w.bin")))))),
    "sparse list": field(7, field(1, field(5, field(23, field(1, external("w.bin")))))),
    "subgraph": field(7, field(1, field(5, field(6, field(5, external("w.bin")))))),
    "list of subgraphs": field(7, field(1, field(5, field(11, field(5, external("w.bin")))))),
    "function": field(25, field(7, field(5, field(5, external("w.bin"))))),
    "default of a function": field(25, field(11, field(5, external("w.bin")))),
    "training": field(20, field(1, field(5, external("w.bin")))),
    "second of two graphs": field(7, b"") + field(7, field(5, external("w.bin"))),
    "location after its name": field(7, field(5, field(13, field(2, b"w.bin") + field(1, b"location")))),
    "tag of more than 32 bits": bytes([0xBA, 0x80, 0x80, 0x80, 0x10]) + field(7, field(5, external("w.bin")))[1:],
    "after a text of 16,384 bytes": b"\x32\x80\x80\x01" + bytes(1 << 14) + field(7, field(5, external("w.bin"))),
    "second of two locations": field(7, field(5, external("weights.data") + external("w.bin"))),
}


@pytest.mark.parametrize("graph", SHAPES.values(), ids=SHAPES.keys())
def test_weights_without_a_hash_are_refused_wherever_a_graph_reads_them(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], graph: bytes
) -> None:
    path = bundle / "sam" / "encoder.onnx"
    path.write_bytes(graph)
    (bundle / "sam" / "w.bin").write_bytes(b"never hashed")
    edit(lambda told: told["files"].update({"encoder.onnx": sha256_of(path)}))
    with pytest.raises(BundleError, match=r"encoder\.onnx: uses 'w\.bin' without its sha256 in `files`"):
        open_bundle(bundle).model("sam")
    edit(lambda told: told["files"].update({"w.bin": sha256_of(bundle / "sam" / "w.bin")}))
    open_bundle(bundle).model("sam")


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/hostname", "sub/w.bin", "..", "sub\\w.bin", "w\0bin", "./weights.data", ""]
)
def test_weights_that_leave_the_folder_are_refused(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], location: str
) -> None:
    path = bundle / "sam" / "encoder.onnx"
    path.write_bytes(field(7, field(5, external(location))))
    edit(lambda told: told["files"].update({"encoder.onnx": sha256_of(path)}))
    with pytest.raises(BundleError, match=r"without its sha256"):
        open_bundle(bundle).model("sam")
    edit(lambda told: told["files"].update({location: sha256_of(path)}))
    with pytest.raises(BundleError, match=r"plain file of the same folder|without control characters"):
        open_bundle(bundle).model("sam")


def test_weights_left_out_of_the_files_are_refused(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None]
) -> None:
    edit(lambda told: told["files"].pop("weights.data"))
    with pytest.raises(BundleError, match=r"encoder\.onnx: uses 'weights\.data' without its sha256"):
        open_bundle(bundle).model("sam")


@pytest.mark.parametrize("data", [b"\x3a", b"\x3a\x05abc", b"\x3b", b"\xff" * 12, field(7, field(5, b"\x6a\x09"))], ids=bytes.hex)
def test_what_is_no_graph_is_named(bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], data: bytes) -> None:
    path = bundle / "sam" / "encoder.onnx"
    path.write_bytes(data)
    edit(lambda told: told["files"].update({"encoder.onnx": sha256_of(path)}))
    with pytest.raises(BundleError, match=r"encoder\.onnx: expected an ONNX graph"):
        open_bundle(bundle).model("sam")


def test_a_graph_nested_without_end_is_refused(bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None]) -> None:
    graph, path = b"", bundle / "sam" / "encoder.onnx"
    for _ in range(3000):
        for number in (6, 5, 1):
            length, size = len(graph), b""
            while True:
                size += bytes([length & 127 | (128 if length > 127 else 0)])
                if not (length := length >> 7):
                    break
            graph = bytes([number << 3 | 2]) + size + graph
    path.write_bytes(b"\x3a" + bytes([len(graph) & 127 | 128, len(graph) >> 7 & 127 | 128, len(graph) >> 14]) + graph)
    edit(lambda told: told["files"].update({"encoder.onnx": sha256_of(path)}))
    with pytest.raises(BundleError, match="nested more than 100 messages deep"):
        open_bundle(bundle).model("sam")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ".", "", "a" * 300])
def test_names_that_leave_the_folder_are_refused(
    bundle: Path, edit: Callable[[Callable[[dict[str, Any]], object]], None], name: str
) -> None:
    outside = bundle / "outside"
    outside.write_bytes(b"x")
    edit(lambda told: told["files"].update({name: sha256_of(outside)}))
    with pytest.raises(BundleError, match="plain file of the same folder"):
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected 'box_thresholds'"),
        ({"box_thresholds": {"max": 0.3}}, "box_thresholds: expected that of the rule 'mean', got max"),
        ({"score_rule": "median", "box_thresholds": {"max": 0.3}}, "score_rule: expected max or mean, got 'median'"),
        ({"score_rule": "max", "box_thresholds": {"max": "0.3"}}, "box_thresholds.max: expected a finite number"),
        ({"score_rule": "max", "box_thresholds": {"max": 0.3, "sum": 0.3}}, "expected max or mean, got 'sum'"),
        ({"box_threshold": "0.3"}, "box_threshold: expected a finite number"),
    ],
)
def test_a_detector_without_a_threshold_for_its_rule_is_refused(
    tmp_path: Path, manifest: Manifest, settings: dict[str, Any], message: str
) -> None:
    numbers = dict.fromkeys(("cls", "sep", "dot", "pad", "max_tokens"), 1)
    write_manifest(tmp_path, replace(manifest, family="grounding-dino", settings={**numbers, **settings}))
    with pytest.raises(BundleError, match=re.escape(message)):
        read_manifest(tmp_path)


def test_box_thresholds_of_earlier_versions_belong_to_the_mean() -> None:
    assert box_thresholds({"box_threshold": 0.5}) == ("mean", {"mean": 0.5})
    assert box_thresholds({"score_rule": "max", "box_thresholds": {"max": 0.3}}) == ("max", {"max": 0.3})
