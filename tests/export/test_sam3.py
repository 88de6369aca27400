"""SAM 3: what is exported computes what transformers computes, the gate notices when it does not, and the chain takes it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import Sam3ImageProcessor, Sam3Model

from wsss.benchmarks.feeds import feeds_for, load_of
from wsss.classes import class_list
from wsss.engines.eager import EagerEngine
from wsss.engines.ort import OrtEngine
from wsss.errors import ParityError, UsageError, WeightsError, WsssError, WsssWarning
from wsss.export import verify
from wsss.export.exporting import export_model, verify_model
from wsss.export.family import Graph, Options, family
from wsss.export.sam3 import concept, vision
from wsss.export.sam3 import weights as sam3
from wsss.mini.scenes import write_scenes
from wsss.photographs import read_photograph
from wsss.runtime.bundles import MINI as MINI_BUNDLE
from wsss.runtime.chain import ConstantTags
from wsss.runtime.concept import InstanceFinder, Instances, KnownMasks
from wsss.runtime.labeler import Labeler
from wsss.runtime.text import open_tokenizer
from wsss.spec import AxisRange, Bundle, Model

if TYPE_CHECKING:
    from ..conftest import Answer

MINI, SEED = sam3.MINI, "random:0"
BATCH = AxisRange(1, 2, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small configuration exported, which passes the gate of all graphs."""
    folder = tmp_path_factory.mktemp("bundle")
    export_model(family("sam3"), variant=MINI, weights=SEED, bundle=folder, options=Options(batch=BATCH), log=print)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Bundle(bundle).model("sam3")


def official() -> Sam3Model:
    return sam3.load(MINI, SEED)[0]


def graphs(options: Options = Options(batch=BATCH)) -> dict[str, Graph]:  # noqa: B008
    made = [make() for make in family("sam3").prepare(MINI, SEED, options).graphs]
    return {graph.name: graph for graph in made}


def test_the_manifest_holds_what_the_runtime_needs(model: Model) -> None:
    manifest = model.manifest
    assert (manifest.family, manifest.variant) == ("sam3", MINI)
    assert list(manifest.graphs) == ["text", "vision", "detector", "outline", "fuse"]
    assert (manifest.preprocess.resize, manifest.preprocess.canvases) == ("squash", ((112, 112),))
    assert (manifest.settings["logits_side"], manifest.settings["box_threshold"]) == (32, 0.5)
    for graph in manifest.graphs.values():
        assert graph.parity is not None
        assert {(row.batch, row.against) for row in graph.parity.rows} >= {(1, "reference"), (2, "reference")}


def test_graphs_for_tensorrt_resize_photographs_too() -> None:
    resize = list(graphs(Options(precision="fp16")).values())[-1]
    assert resize.name == "resize-112x112"
    right = EagerEngine(resize.module, resize.spec("x", 18))
    verify.gate(resize, right, engine_name="eager", reference_name="Pillow", where="resize")


def test_instances_are_those_of_the_official_model_on_real_photographs(model: Model, photographs: list[Path]) -> None:
    """Three photographs in one batch; the official model gets one photograph and one phrase at a time."""
    classes = class_list(("red disc", "striped box: checkered box", "dog"))
    threshold = 0.02
    engines = (OrtEngine(model.path(name), model.graph(name)) for name in ("text", "vision", "detector", "outline"))
    finder = InstanceFinder(model, *engines, classes, threshold=threshold, nms=1, nms_across=1, decides=True)
    photos = [read_photograph(path, path.name) for path in photographs[::30][:3]]
    labels = ConstantTags(classes, True)(photos)
    found = finder(photos, labels)
    assert isinstance(found, Instances)
    masks = KnownMasks(model)(photos, found)

    side, tokenizer, network = model.manifest.preprocess.longest_px, open_tokenizer(model), official()
    processor = Sam3ImageProcessor(do_resize=False)
    total = 0
    for number, photo in enumerate(photos):
        small = np.array(Image.fromarray(photo.pixels).resize((side, side), Image.Resampling.BILINEAR))
        pixels = processor(small, return_tensors="pt").pixel_values
        resized = Sam3ImageProcessor(size={"height": side, "width": side})(photo.pixels, return_tensors="pt").pixel_values
        assert (pixels - resized).abs().max() < 1.01 / 127.5  # one gray level, from torchvision's rounding
        for label, phrases in enumerate(classes.phrases, 1):
            theirs = []
            for phrase in phrases:
                encoding = tokenizer.encode(phrase)
                with torch.inference_mode():
                    tokens = torch.tensor([encoding.ids]), torch.tensor([encoding.attention_mask])
                    out = network(pixel_values=pixels, input_ids=tokens[0], attention_mask=tokens[1])
                (got,) = processor.post_process_instance_segmentation(out, threshold=threshold, target_sizes=[photo.shape])
                scores = out.pred_logits.sigmoid() * out.presence_logits.sigmoid()
                logits = out.pred_masks[0][scores[0] > threshold]
                upsampled = F.interpolate(logits[None], photo.shape, mode="bilinear")[0] if len(logits) else logits
                theirs += list(zip(got["scores"].tolist(), got["boxes"].numpy(), upsampled.numpy(), strict=True))
            mine = np.flatnonzero((found.image == number) & (found.label == label))
            width, height = photo.shape[1], photo.shape[0]
            inside = [(score, np.clip(box, 0, [width, height] * 2), mask) for score, box, mask in theirs]
            inside = [each for each in inside if (each[1][2:] - each[1][:2] >= 1).all()]
            assert len(inside) == len(mine)
            for row, (score, box, mask) in zip(mine, sorted(inside, key=lambda each: -each[0]), strict=True):
                assert abs(found.score[row] - score) < 1e-5
                np.testing.assert_allclose(found.xyxy_image[row], box, atol=1e-2)
                frame, low = masks.frames[number], np.asarray(masks.logits[masks.part[row]])[masks.row[row]]
                assert frame is not None
                ours = frame.mask_rows(len(low)) @ low @ frame.mask_columns(len(low)).T
                undecided = np.abs(mask) <= 1e-4 * np.abs(mask).max()
                assert ((ours > 0) == (mask > 0))[~undecided].all() and undecided.mean() < 0.01
                total += 1
    assert total > 10
    present = {(number, label - 1) for number, label in zip(found.image.tolist(), found.label.tolist(), strict=True)}
    assert set(zip(*(axis.tolist() for axis in labels.present.nonzero()), strict=True)) == present


# ---- the gate must fail ----


def swapped_rows(module: nn.Module) -> None:
    def swap(_: nn.Module, inputs: object, outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
        return outputs.roll(1, 0) if isinstance(outputs, torch.Tensor) else tuple(output.roll(1, 0) for output in outputs)

    module.register_forward_hook(swap)


def wrong_mean(module: vision.Vision) -> None:
    module.normalize.inner.mean += 1


def blue_first(module: vision.Vision) -> None:
    module.patches = copy.deepcopy(module.patches)  # the official module has this one too
    module.patches.weight.data = module.patches.weight.data.flip(1)


def no_rotation(module: vision.Vision) -> None:
    for block in module.blocks:
        block.sin = 0 * block.sin


def rows_turned_as_columns(module: vision.Vision) -> None:
    block = module.blocks[1]
    grid = block.side
    for name in ("cos", "sin"):
        setattr(block, name, getattr(block, name).unflatten(1, (grid, grid)).transpose(1, 2).flatten(1, 2))


def windows_of_another_size(module: vision.Vision) -> None:
    module.blocks[0].side = module.blocks[0].side  # kept
    module.blocks[1], module.blocks[0] = module.blocks[0], module.blocks[1]


def no_first_attention(module: vision.Vision) -> None:
    module.first.places = 0 * module.first.places


def padding_counts(module: concept.Detector) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (*inputs[:2], torch.ones_like(inputs[2]), inputs[3]))


def the_first_image_for_all(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (*inputs[:3], 0 * inputs[3]))


def no_bias_of_boxes(module: concept.Detector) -> None:
    module.decoder.distances.inner = lambda boxes, coords: 2 * (concept._distances(boxes, 0 * coords)[0],)


def boxes_never_refined(module: concept.Detector) -> None:
    module.decoder.refine.inner = lambda step, boxes: boxes


def presence_of_a_query(module: concept.Detector) -> None:
    module.decoder.presence_norm.register_forward_pre_hook(lambda _, inputs: inputs[0].roll(1, 1))


def no_text_in_the_pixels(module: concept.Detector) -> None:
    module.prompt.out = copy.deepcopy(module.prompt.out)
    module.prompt.out.weight.data *= 0


def features_of_the_first_image(module: concept.Outline) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (*inputs[:5], 0 * inputs[5], *inputs[6:]))


def no_bias_of_the_projection(module: concept.Outline) -> None:
    module.bias = 0 * module.bias


def the_first_query_for_all(module: concept.Outline) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (*inputs[:6], inputs[6][:, :1].expand_as(inputs[6]), inputs[7]))


def later_words_are_read(module: concept.Text) -> None:
    module.later = 0 * module.later


FAULTS: list[tuple[str, Callable[..., None]]] = [
    *(("text", fault) for fault in (swapped_rows, later_words_are_read)),
    *(("vision", fault) for fault in (swapped_rows, wrong_mean, blue_first, no_rotation, rows_turned_as_columns)),
    *(("vision", fault) for fault in (windows_of_another_size, no_first_attention)),
    *(("detector", fault) for fault in (swapped_rows, padding_counts, the_first_image_for_all, no_bias_of_boxes)),
    *(("detector", fault) for fault in (boxes_never_refined, presence_of_a_query, no_text_in_the_pixels)),
    *(("outline", fault) for fault in (swapped_rows, features_of_the_first_image, no_bias_of_the_projection)),
    ("outline", the_first_query_for_all),
]


def judge(graph: Graph) -> None:
    engine = EagerEngine(graph.module, graph.spec("x", 18))
    verify.gate(graph, engine, engine_name="eager", reference_name="official", where=graph.name)


@pytest.mark.parametrize(("name", "plant"), FAULTS)
def test_the_gate_refuses_a_planted_fault(name: str, plant: Callable[[nn.Module], None]) -> None:
    graph = graphs()[name]
    plant(graph.module)
    with pytest.raises(ParityError, match=rf"{name}: output '\w+', row \d+ of batch"):
        judge(graph)


@pytest.mark.parametrize("name", ["text", "vision", "detector", "outline"])
def test_the_gate_lets_the_right_one_pass(name: str) -> None:
    judge(graphs()[name])


# ---- weights ----


def test_a_file_and_a_folder_of_transformers_load(tmp_path: Path) -> None:
    """As ``Sam3Model`` saves it, and as the video model's checkpoint, which has a tracker too."""
    state = {name: value.clone() for name, value in official().state_dict().items()}
    video = {f"detector_model.{name}": value for name, value in state.items()} | {"tracker_model.x": torch.zeros(2)}
    save_file(video, tmp_path / "model.safetensors")
    save_file(state, tmp_path / "other.safetensors")
    pixels = torch.zeros(1, 3, 112, 112)
    want = official().get_vision_features(pixels).fpn_hidden_states
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "other.safetensors"):
        loaded, record = sam3.load(MINI, str(source))
        assert record["source"].startswith(str(tmp_path))
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
        assert not any(value.is_meta for value in loaded.buffers())
        assert all(torch.equal(*pair) for pair in zip(loaded.get_vision_features(pixels).fpn_hidden_states, want, strict=True))
        judge(_text_of(loaded))


def _text_of(network: Sam3Model) -> Graph:
    from wsss.export.sam3.graphs import text_graph

    return text_graph(network)


def test_official_weights_need_an_agreement() -> None:
    with pytest.raises(WeightsError, match="--weights facebook/sam3: the publisher asks for an agreement first") as error:
        family("sam3").prepare("sam3", family("sam3").official("sam3"), Options())
    assert "SAM License" in str(error.value.hint) and "hf download facebook/sam3" in str(error.value.hint)
    with pytest.raises(WeightsError, match="no such file"):
        sam3.load(MINI, "nowhere.safetensors")


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    save_file({"detector.backbone.vision_backbone.trunk.pos_embed": torch.zeros(1)}, tmp_path / "original.safetensors")
    with pytest.raises(WeightsError, match="names of facebookresearch/sam3"):
        sam3.load(MINI, str(tmp_path / "original.safetensors"))
    state = {name: value.clone() for name, value in official().state_dict().items()}
    name = "detr_decoder.query_embed.weight"
    state[name] = state[name][:-1].clone()
    save_file(state, tmp_path / "fewer.safetensors")
    with pytest.raises(WeightsError, match=r"1 of another shape \(detr_decoder\.query_embed\.weight \(23, 64\) instead of"):
        sam3.load(MINI, str(tmp_path / "fewer.safetensors"))
    save_file({"image_encoder.pos_embed": torch.zeros(1)}, tmp_path / "sam.safetensors")
    with pytest.raises(WeightsError, match=r"not a checkpoint of SAM 3 \(sam3_mini\): \d+ missing"):
        sam3.load(MINI, str(tmp_path / "sam.safetensors"))


def test_seeds_repeat_and_differ() -> None:
    (one, record), (again, record_again), (other, other_record) = (sam3.load(MINI, f"random:{seed}") for seed in (1, 1, 2))
    assert record == record_again and record["sha256"] != other_record["sha256"]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_tokens_are_those_of_clip_with_a_shorter_context() -> None:
    tokenizer = sam3.tokenizer_of("sam3", 32)
    ids = tokenizer.encode("Potted plant").ids
    assert ids[:4] == [49406, 4898, 2001, 3912] or len(ids) == 32
    assert ids[0] == 49406 and ids.count(49407) == 1 and set(ids[ids.index(49407) + 1 :]) == {0}


def test_unknown_variants_and_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="--variant: expected one of sam3, sam3_mini"):
        family("sam3").prepare("sam3_huge", SEED, Options())
    with pytest.raises(UsageError, match="--size"):
        family("sam3").prepare(MINI, SEED, Options(sizes=((64, 64),)))


def test_the_full_configuration_is_the_published_one() -> None:
    with torch.device("meta"):
        network = sam3.build("sam3")
    parts = {name: sum(value.numel() for value in part.parameters()) for name, part in network.named_children()}
    assert {name: round(parts[name] / 1e6) for name in ("vision_encoder", "text_encoder")} == {
        "vision_encoder": 454,
        "text_encoder": 353,
    }
    assert vision.grid_of(network) == 72 and network.config.detr_decoder_config.num_queries == 200


# ---- in the chain ----


def store_of(wsss: Callable[..., Answer], photos: Path, bundle: Path, store: str, *flags: object) -> list[dict[str, object]]:
    done = wsss("label", photos, "--classes", "mini", "--bundle", bundle, "--out", store, "--json", *flags)
    assert done.code == 0, done.err
    return [json.loads(line) for line in Path(store, "manifest.jsonl").read_text().splitlines()]


def test_a_store_made_with_it_can_be_resumed_converted_and_reported(
    bundle: Path, tmp_path: Path, wsss: Callable[..., Answer]
) -> None:
    photos = write_scenes(tmp_path / "scenes", 3)[0].parent
    label = ("label", photos, "--classes", "mini", "--bundle", bundle, "--out", "store", "--json", "--box-threshold", "0.05")
    for labelled in (3, 0):
        done = wsss(*label)
        assert done.code == 0, done.err
        assert json.loads(done.out.splitlines()[-1])["labelled"] == labelled
        assert "the bundle has no clip: sam3 looks for all 12 classes" in done.out + done.err

    records = [json.loads(line) for line in Path("store/manifest.jsonl").read_text().splitlines()]
    boxes = [box for record in records for box in record["boxes"]]
    assert len(boxes) > 2 and any(box["won_px"] for box in boxes)
    for record in records:  # presence decides: the classes are those with a box
        assert set(record["classes"]) == {box["label"] for box in record["boxes"]}
        assert all(record["classes"][box["label"]] >= box["score"] - 1e-4 for box in record["boxes"])
    run = json.loads(Path("store/run.json").read_text())
    assert run["bundle"]["variants"] == {"sam3": MINI}
    assert run["models"] == {"sam3": Bundle(bundle).model("sam3").manifest.identity()}
    assert (run["rules"]["gate"], run["rules"]["box_threshold"]) == (False, 0.05)
    assert wsss("convert", "store", "--to", "coco", "--images", photos, "--out", "coco").code == 0
    assert json.loads(Path("coco/annotations/instances_train.json").read_text())["annotations"]
    assert wsss("report", "store", "--images", photos).code == 0


def test_the_batch_does_not_matter(bundle: Path, tmp_path: Path, wsss: Callable[..., Answer]) -> None:
    photos = write_scenes(tmp_path / "scenes", 5)[0].parent
    some = [store_of(wsss, photos, bundle, f"store{size}", "--batch", size, "--box-threshold", "0.05") for size in (1, 5)]
    for one, other in zip(*some, strict=True):
        assert [box["label"] for box in one["boxes"]] == [box["label"] for box in other["boxes"]]  # type: ignore[attr-defined]
        for mine, theirs in zip(one["boxes"], other["boxes"], strict=True):  # type: ignore[call-overload]
            np.testing.assert_allclose(mine["xyxy"], theirs["xyxy"], atol=0.02)
            assert abs(mine["score"] - theirs["score"]) < 2e-4 and abs(mine["won_px"] - theirs["won_px"]) < 5


def test_clip_decides_where_the_bundle_has_it(bundle: Path, tmp_path: Path, wsss: Callable[..., Answer]) -> None:
    photos = write_scenes(tmp_path / "scenes", 2)[0].parent
    both = tmp_path / "both"
    shutil.copytree(MINI_BUNDLE / "clip", both / "clip")
    shutil.copytree(bundle / "sam3", both / "sam3")
    records = store_of(wsss, photos, both, "gated", "--box-threshold", "0.05")
    run = json.loads(Path("gated/run.json").read_text())
    assert run["rules"]["gate"] and set(run["models"]) == {"clip", "sam3"}
    for record in records:
        assert {box["label"] for box in record["boxes"]} <= set(record["classes"])  # type: ignore[attr-defined,call-overload]
    store_of(wsss, photos, both, "ungated", "--no-gate")
    assert set(json.loads(Path("ungated/run.json").read_text())["models"]) == {"sam3"}


def test_a_bundle_with_all_models_keeps_its_chain_unless_sam_3_is_asked_for(
    bundle: Path, tmp_path: Path, wsss: Callable[..., Answer]
) -> None:
    photos = write_scenes(tmp_path / "scenes", 1)[0].parent
    whole = tmp_path / "whole"
    shutil.copytree(MINI_BUNDLE, whole)
    shutil.copytree(bundle / "sam3", whole / "sam3")
    done = wsss("label", photos, "--classes", "mini", "--bundle", whole, "--out", "usual")
    assert done.code == 0 and "sam3 is not used: --model sam3 takes it" in done.err
    assert set(json.loads(Path("usual/run.json").read_text())["models"]) == {"clip", "grounding-dino", "sam"}
    store_of(wsss, photos, whole, "asked", "--model", "sam3")
    assert set(json.loads(Path("asked/run.json").read_text())["models"]) == {"clip", "sam3"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--boxes", "boxes.json"), "--boxes: sam3 outlines what it finds itself"),
        (("--score-rule", "max"), "--score-rule: the score of sam3"),
        (("--quality-exponent", "2"), "--quality-exponent: sam3 predicts no IoU"),
        (("--stability-exponent", "1"), "--stability-exponent: sam3 predicts no stability score"),
        (("--multimask",), "--multimask: sam3 gives one mask"),
        (("--min-region", "9"), "--min-region: sam3 gives masks of whole objects"),
        (("--tiles", "2"), "--tiles: sam3 sees whole photographs"),
        (("--views", "3"), "--views: the bundle has no clip"),
        (("--tag-threshold", "0.4"), "--tag-threshold: the bundle has no clip"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    bundle: Path, tmp_path: Path, wsss: Callable[..., Answer], flags: tuple[str, ...], message: str
) -> None:
    photos = write_scenes(tmp_path / "scenes", 1)[0].parent
    Path("boxes.json").write_text("{}")
    done = wsss("label", photos, "--classes", "mini", "--bundle", bundle, "--out", "store", *flags)
    assert done.code == 2 and message in done.err


def test_boxes_alone_and_masks_of_given_boxes(bundle: Path, tmp_path: Path, wsss: Callable[..., Answer]) -> None:
    photos = write_scenes(tmp_path / "scenes", 2)[0].parent
    flags = ("--classes", "mini", "--bundle", bundle, "--box-threshold", "0.05")
    assert wsss("label", photos, *flags, "--out", "boxes.json", "--stage", "detect").code == 0
    assert any(json.loads(Path("boxes.json").read_text()).values())
    done = wsss("label", photos, *flags, "--out", "tags.json", "--stage", "tag")
    assert done.code == 2 and "--stage tag: CLIP is not asked" in done.err
    with pytest.warns(WsssWarning, match="the bundle has no clip"):
        labeler = Labeler.open(bundle, classes="mini")
    with pytest.raises(WsssError, match="SAM 3 gives the masks of what it finds itself"):
        labeler.segment(np.zeros((30, 40, 3), np.uint8), [[0, 0, 20, 20]])


@pytest.mark.filterwarnings("ignore:the bundle has no clip")
def test_settings_cannot_be_tuned(bundle: Path, tmp_path: Path, wsss: Callable[..., Answer]) -> None:
    write_scenes(tmp_path / "scenes", 2)
    folders = tmp_path / "scenes" / "images", tmp_path / "scenes" / "truth"
    done = wsss("tune", *folders, "--classes", "mini", "--bundle", bundle)
    assert done.code == 2 and "found for grounding-dino and sam; the bundle has sam3" in done.err


def test_verification_and_measurement_know_its_graphs(model: Model) -> None:
    assert verify_model(model, None, print).keys() == model.manifest.graphs.keys()
    for name, graph in model.manifest.graphs.items():
        engine = OrtEngine(model.path(name), graph)
        out = engine(feeds_for(model, name, load_of(graph, graph.axes, 2)))
        assert all(np.isfinite(np.asarray(value, np.float64)).all() for value in out.values())
