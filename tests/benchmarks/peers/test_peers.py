"""The chain beside its peers, on the mini models: every contender labels, agrees, and is described in the result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from wsss.benchmarks.peers import __main__ as peers
from wsss.benchmarks.peers import process
from wsss.benchmarks.peers.contenders import OFFICIAL, open_contender
from wsss.benchmarks.peers.figures import best_of_both, quality
from wsss.benchmarks.peers.job import STAGES, Contender, Job, boxes_of, fitting
from wsss.benchmarks.peers.of_transformers import clip_from_open_clip
from wsss.errors import ImageError, WeightsError, WsssError
from wsss.runtime.bundles import MINI
from wsss.spec import Bundle

ENGINES = ("ort", "openvino")
EVERY = ("official", "autocast", "ort", "openvino", "transformers")


class InThisProcess:
    """A `process.Child` without a process of its own: starting five with PyTorch takes half a minute."""

    def __init__(self, name: str, job: Job, found: Path, **_: object) -> None:
        self.name, self._job, self._found = name, job, found
        self._contender: Contender | None = None

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._contender = None

    def opened(self) -> dict[str, Any]:
        self._contender = open_contender(self.name, self._job)
        return self._contender.about

    def label(self, turn: process.Turn) -> process.Seconds:
        assert self._contender is not None
        return process.label(self._contender, self.name, self._job, turn, self._found)

    def peak_bytes(self) -> int:
        return 1 << 30


@pytest.fixture(scope="module")
def result(needs_openvino: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("peers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models: on busy cores, threads mostly wait for each other
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peers, "Child", InThisProcess)
        command = ["--bundle", "fp32=mini", "--classes", "mini", "--rounds", "2", "--contenders", *EVERY[1:]]
        peers.main([*command, "--work", str(work), "--out", str(work / "peers.json")])
        patched.setattr(peers, "Child", None)  # everything was measured, so that a second run starts nobody
        peers.main([*command, "--work", str(work), "--out", str(work / "again.json")])
    torch.set_num_threads(threads)
    first, second = (json.loads((work / name).read_text(encoding="utf-8")) for name in ("peers.json", "again.json"))
    assert first["contenders"] == second["contenders"]
    return dict(first)


def test_all_contenders_are_measured(result: dict[str, Any]) -> None:
    assert set(result["contenders"]) == set(EVERY)
    for name, each in result["contenders"].items():
        assert each["cpu_seconds"].keys() == set(STAGES) and min(each["cpu_seconds"].values()) >= 0, name
        low, median, high = (each["chain_cpu_seconds"][key] for key in ("lowest", "median", "highest"))
        assert 0 < low <= median <= high
        assert each["times_official"]["median"] > 0 and each["peak_gb"] == 1.07
    assert all(result["contenders"][OFFICIAL]["times_official"][key] == 1 for key in ("lowest", "median", "highest"))
    assert result["best"]["ours"] in ENGINES and result["best"]["peer"] in {*EVERY} - {*ENGINES}
    assert result["photographs"] == {
        "kind": "drawn scenes",
        "count": 4,
        "left_out": 0,
        "detector_pixels": {"official": 144 * 192, "ours": 192 * 192},
    }


def test_the_same_work_gives_the_same_results(result: dict[str, Any]) -> None:
    contenders = result["contenders"]
    assert contenders[OFFICIAL]["quality"] == {}
    for name in ENGINES:
        found = contenders[name]["quality"]
        assert found["photographs"] == 2 and found["pixels_equal"] > 0.9999 and found["clip_cosine"] > 1 - 1e-6
        assert found["score_difference_on_canvas"] < 1e-4  # also a test of the caption's tokens
    assert contenders["transformers"]["quality"]["pixels_equal"] > 0.9999
    assert contenders["transformers"]["quality"]["score_difference"] < 1e-4
    assert contenders["transformers"]["about"]["sam against segment_anything"] < 1e-4
    assert contenders["autocast"]["quality"]["pixels_equal"] > 0.98


def test_empty_photographs_cost_only_clip(result: dict[str, Any]) -> None:
    for name in ENGINES:
        each = result["contenders"][name]
        assert each["mostly_empty"]["cpu_seconds"] < 0.8 * each["chain_cpu_seconds"]["highest"]


def test_a_contender_is_a_process(tmp_path: Path) -> None:
    job = _job(tmp_path)
    with process.Child("ort", job, tmp_path / "found", cores=1, limit_s=100) as child:
        about = child.opened()
        assert about["precision"] == "fp32" and about["opening_peak_bytes"] > 1 << 20
        assert child.label(process.Turn((0,), (True,))).keys() == set(STAGES)
        assert child.peak_bytes() > 1 << 20
    with np.load(tmp_path / "found/ort/0.npz") as found:
        assert found["label_map"].shape == peers.SCENE and found["score"].shape == (12,)
    with (
        process.Child(
            "ort", Job(**{**vars(job), "bundles": {"fp32": str(tmp_path)}}), tmp_path, cores=None, limit_s=100
        ) as child,
        pytest.raises(WsssError, match=r"ort: BundleError: .*needs the model 'clip'"),
    ):
        child.opened()
    with process.Child("ort", job, tmp_path, cores=None, limit_s=0.01) as child, pytest.raises(WsssError, match="no answer"):
        child.opened()


def test_another_label_map_is_noticed(tmp_path: Path) -> None:
    same = {"embedding": np.eye(2, 4, dtype=np.float32), "score": np.array([0.5, 0.25], np.float32)}
    for name, label, score in ((OFFICIAL, 0, 0.5), ("ort", 1, 0.375)):
        maps = np.zeros((4, 5), np.uint8)
        maps[0] = label
        process._write(
            tmp_path / name, [7], {"label_map": [maps], "embedding": [same["embedding"]], "score": [same["score"] * score]}
        )
    assert quality(tmp_path, "ort") == {"photographs": 1, "pixels_equal": 0.75, "score_difference": 0.0625, "clip_cosine": 1.0}


def test_best_of_both_leaves_out_what_failed() -> None:
    def measured(seconds: float) -> dict[str, Any]:
        official, own = (dict.fromkeys(STAGES, each) for each in (8.0, seconds))
        return {"rounds": [own, own], "official_rounds": [official, official]}

    some = {OFFICIAL: measured(8.0), "autocast": measured(4.0), "ort": measured(2.0), "openvino": measured(1.0)}
    best = best_of_both({**some, "compiled": {"failed": "did not compile in 300 s"}})
    assert best == {"ours": "openvino", "peer": "autocast", "times": {"median": 4.0, "lowest": 4.0, "highest": 4.0}}
    assert best_of_both({OFFICIAL: measured(8.0)}) == {}


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_clip_has_the_weights_of_open_clip(quick_gelu: bool) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=32, patch_size=8, layers=2, width=64, head_width=32)
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    clip = open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu).eval()
    converted = clip_from_open_clip(clip)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        got, want = converted(pixel_values=pixels).image_embeds, clip.encode_image(pixels)
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_a_faulty_conversion_is_refused() -> None:
    from wsss.benchmarks.peers.of_transformers import _check

    values = torch.ones(8)
    assert _check("SAM", values, values) == 0
    with pytest.raises(WeightsError, match=r"SAM: transformers' class differs .* by 1\.0e-03"):
        _check("SAM", 1.001 * values, values)


def test_photographs_that_would_be_shrunk_are_left_out(tmp_path: Path) -> None:
    from PIL import Image

    for name, size in (("a", (500, 375)), ("b", (900, 100)), ("c", (375, 500)), ("d", (400, 300))):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).save(tmp_path / f"{name}.png")
    dino = Bundle(MINI).model("grounding-dino")
    paths, left_out = fitting(tmp_path, 5, dino)
    assert [Path(path).name for path in paths] == ["a.png", "c.png", "d.png"] and left_out == 1
    with pytest.raises(ImageError, match="no photograph that fits"):
        fitting(tmp_path / "none", 5, dino) if (tmp_path / "none").mkdir() is None else None


def test_boxes_are_the_same_for_every_contender(tmp_path: Path) -> None:
    photos = _job(tmp_path).read([0, 1, 0])
    boxes = boxes_of(photos, 5, 12, np.array([True, False, True]))
    assert boxes.image.tolist() == [0] * 5 + [2] * 5
    assert np.array_equal(boxes.xyxy_image[:5], boxes_of(photos[:1], 5, 12, np.array([True])).xyxy_image)


def _job(folder: Path) -> Job:
    scenes = peers._drawn(folder / "scenes", 2)
    paths, _ = fitting(scenes, 2, Bundle(MINI).model("grounding-dino"))
    return Job(bundles={"fp32": str(MINI)}, photographs=tuple(paths), classes="mini", boxes=5, batch=2)
