"""SAM 2.1: what is exported computes what transformers computes, the gate notices when it does not, and the chain takes it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Sam2ImageProcessor, Sam2Model, Sam2Processor

from wsss.batch import Boxes, Photograph
from wsss.engines.eager import EagerEngine
from wsss.engines.ort import OrtEngine
from wsss.errors import ParityError, UsageError, WeightsError
from wsss.export import verify
from wsss.export.exporting import export_model
from wsss.export.family import Graph, Options, family
from wsss.export.reference import open_eager
from wsss.export.sam import hiera, sam2
from wsss.export.sam.decoder import stability
from wsss.export.sam.fuse import VOID
from wsss.mini.scenes import draw_scene, write_scenes
from wsss.photographs import read_photograph
from wsss.runtime.bundles import MINI as MINI_BUNDLE
from wsss.runtime.chain import Chain
from wsss.runtime.segment import MaskPredictor
from wsss.spec import AxisRange, Bundle, Model

if TYPE_CHECKING:
    from ..conftest import Answer

MINI, SEED = "sam2.1_mini", "random:0"
BATCH = AxisRange(1, 2, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small configuration exported, which passes the gate of all three graphs."""
    folder = tmp_path_factory.mktemp("bundle")
    export_model(family("sam"), variant=MINI, weights=SEED, bundle=folder, options=Options(batch=BATCH), log=print)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Bundle(bundle).model("sam")


def official() -> Sam2Model:
    return sam2.load(MINI, SEED)[0]


def graphs() -> dict[str, Graph]:
    made = [make() for make in family("sam").prepare(MINI, SEED, Options(batch=BATCH)).graphs]
    return {graph.name: graph for graph in made}


def test_the_manifest_holds_what_the_runtime_needs(model: Model) -> None:
    manifest = model.manifest
    assert (manifest.family, manifest.variant, list(manifest.graphs)) == ("sam", MINI, ["encoder", "decoder", "fuse"])
    assert (manifest.preprocess.resize, manifest.preprocess.canvases) == ("squash", ((128, 128),))
    assert manifest.settings["logits_side"] == 32
    assert {tensor.name for tensor in manifest.graphs["encoder"].outputs} == set(hiera.TENSORS)
    for graph in manifest.graphs.values():
        assert graph.parity is not None
        assert {(row.batch, row.against) for row in graph.parity.rows} >= {(1, "reference"), (2, "reference")}


def test_graphs_for_tensorrt_resize_photographs_too() -> None:
    prepared = family("sam").prepare(MINI, SEED, Options(precision="fp16"))
    resize = [make() for make in prepared.graphs][-1]
    assert resize.name == "resize-128x128"
    right = EagerEngine(resize.module, resize.spec("x", 18))
    verify.gate(resize, right, engine_name="eager", reference_name="Pillow", where="resize")


def masks_of(model: Model, names: list[Path], boxes: Boxes, multimask: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Upsampled logits and predicted IoU of boxes; all photographs in one batch, their boxes interleaved in decoder calls."""
    engines = (OrtEngine(model.path(graph), model.graph(graph)) for graph in ("encoder", "decoder"))
    masks = MaskPredictor(model, *engines, multimask=multimask)([read_photograph(path, path.name) for path in names], boxes)
    found = []
    for row, image in enumerate(boxes.image):
        frame, logits = masks.frames[image], np.asarray(masks.logits[masks.part[row]])[masks.row[row]]
        assert frame is not None
        found.append(frame.mask_rows(len(logits)) @ logits @ frame.mask_columns(len(logits)).T)
    return found, masks.quality


@pytest.mark.parametrize("multimask", [False, True])
def test_masks_are_those_of_the_official_processor_on_real_photographs(
    model: Model, photographs: list[Path], multimask: bool
) -> None:
    names = photographs[::30][:3]
    pictures = [Image.open(path).convert("RGB") for path in names]
    image = np.array([0, 0, 1, 2, 2, 2])
    corners = np.sort(np.random.default_rng(0).uniform(0, 1, (len(image), 2, 2)), axis=1).reshape(-1, 4)
    extent = np.array([pictures[number].size * 2 for number in image])
    xyxy = (np.round(corners * extent) + np.array([-1, -1, 1, 1])).astype(np.float32)
    count = len(image)
    boxes = Boxes(xyxy, np.ones(count, np.float32), np.ones(count, np.int64), image)
    ours, quality = masks_of(model, names, boxes, multimask)

    side = model.manifest.preprocess.longest_px
    resize = Sam2ImageProcessor(size={"height": side, "width": side})
    processor = Sam2Processor(resize, target_size=side)
    sam = official()
    for number, photograph in enumerate(pictures):
        rows = np.flatnonzero(image == number)
        inputs = processor(images=np.array(photograph), input_boxes=[xyxy[rows].tolist()], return_tensors="pt")
        small = np.array(photograph.resize((side, side), Image.Resampling.BILINEAR))
        pixels = resize(images=small, return_tensors="pt").pixel_values
        assert (pixels - inputs.pixel_values).abs().max() < 1.01 / 255 / 0.224  # one gray level, from torchvision's rounding
        with torch.inference_mode():
            out = sam(pixel_values=pixels, input_boxes=inputs.input_boxes, multimask_output=multimask)
        theirs = processor.post_process_masks(out.pred_masks, inputs["original_sizes"], binarize=False)[0].numpy()
        for row, masks, ious in zip(rows, theirs, out.iou_scores[0].numpy(), strict=True):
            want, iou = masks[ious.argmax()], ious.max()
            assert 0.01 < (want > 0).mean() < 0.99  # or equality would say little
            undecided = np.abs(want) <= 1e-4 * np.abs(want).max()  # at the zero crossing, by rounding
            assert ((ours[row] > 0) == (want > 0))[~undecided].all() and undecided.mean() < 0.01
            assert abs(quality[row] - iou) < 1e-5


# ---- the gate must fail ----


def swapped_rows(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, inputs, outputs: tuple(output.roll(1, 0) for output in outputs))


def wrong_mean(encoder: hiera.Hiera) -> None:
    encoder.normalize.inner.mean += 1


def blue_first(encoder: hiera.Hiera) -> None:
    encoder.patches = copy.deepcopy(encoder.patches)  # the official module has this one too
    encoder.patches.weight.data = encoder.patches.weight.data.flip(1)


def columns_for_rows(encoder: hiera.Hiera) -> None:
    encoder.position = encoder.position.transpose(1, 2)


def no_bias_of_attention(encoder: hiera.Hiera) -> None:
    block = encoder.blocks[-1]
    block.qkv = copy.deepcopy(block.qkv)
    block.qkv.bias.data *= 0


def no_memory_left_out(encoder: hiera.Hiera) -> None:
    encoder.no_memory = 0 * encoder.no_memory


def corner_of_pixel(decoder: sam2.Decoder) -> None:
    decoder.waves.inner.side_px *= 1.01


def no_padding_point(decoder: sam2.Decoder) -> None:
    decoder.padding = 0 * decoder.padding


def finer_features_of_the_first_image(decoder: sam2.Decoder) -> None:
    def first(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *inputs[:2], inputs[2][:1].expand_as(inputs[2]), *inputs[3:]

    decoder.register_forward_pre_hook(first)


def always_the_first_mask(decoder: sam2.Decoder) -> None:
    decoder.first_stability.inner = lambda logits: torch.ones(len(logits))


def never_the_first_mask(decoder: sam2.Decoder) -> None:
    decoder.first_stability.inner = lambda logits: torch.zeros(len(logits))


def never_the_best_of_three(decoder: sam2.Decoder) -> None:
    decoder.register_forward_pre_hook(lambda _, inputs: (*inputs[:5], torch.zeros_like(inputs[5])))


def stability_of_the_first_mask(decoder: sam2.Decoder) -> None:
    decoder.stability.inner = partial(stability, delta=0.05)


def no_dense_prompt(decoder: sam2.Decoder) -> None:
    decoder.no_mask = 0 * decoder.no_mask


FAULTS: list[tuple[str, Callable[..., None]]] = [
    *(("encoder", fault) for fault in (swapped_rows, wrong_mean, blue_first, columns_for_rows, no_bias_of_attention)),
    *(("decoder", fault) for fault in (swapped_rows, corner_of_pixel, no_padding_point, finer_features_of_the_first_image)),
    *(("decoder", fault) for fault in (always_the_first_mask, never_the_first_mask, no_dense_prompt)),
    *(("decoder", fault) for fault in (never_the_best_of_three, stability_of_the_first_mask)),
    ("encoder", no_memory_left_out),
]


def judge(graph: Graph) -> None:
    engine = EagerEngine(graph.module, graph.spec("x", 18))
    verify.gate(graph, engine, engine_name="eager", reference_name="official", where=graph.name)


@pytest.mark.parametrize(("name", "plant"), FAULTS)
def test_the_gate_refuses_a_planted_fault(name: str, plant: Callable[[nn.Module], None]) -> None:
    graph = graphs()[name]
    plant(graph.module)
    with pytest.raises(ParityError, match=rf"{name}: (output '\w+', )?row \d+ of batch"):
        judge(graph)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_gate_lets_the_right_one_pass(name: str) -> None:
    judge(graphs()[name])


def test_the_gate_sees_stable_masks_and_others() -> None:
    decoder = graphs()["decoder"]
    feeds = decoder.sample(sam2.IMAGES + 1, verify.SEED)
    tokens = EagerEngine(decoder.module, decoder.spec("x", 18))(feeds)["token"]
    first, multimask = np.asarray(tokens) == 0, feeds["multimask"]
    without = EagerEngine(decoder.module, decoder.spec("x", 18))({**feeds, "multimask": np.zeros_like(multimask)})["token"]
    assert first.any() and not first[multimask].any() and (np.asarray(without) == 0)[multimask].any()
    assert not first[~multimask].all()


# ---- which of the four masks ----


def four_masks(near: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits (4, 10, 10) whose first mask has 100 pixels, ``near`` of them close to 0, and predicted IoUs (4,)."""
    logits = torch.full((4, 10, 10), 10.0)
    logits[0].flatten()[: round(100 * near)] = 0.0
    return logits, torch.tensor([0.9, 0.2, 0.5, 0.4])


def test_the_first_mask_is_taken_where_it_is_stable() -> None:
    decoder = official().mask_decoder
    assert sam2.right_tokens(decoder, *four_masks(), 1e-6) == [0]
    assert sam2.right_tokens(decoder, *four_masks(near=0.02), 1e-6) == [0]
    assert sam2.right_tokens(decoder, *four_masks(near=0.03), 1e-6) == [2]
    assert sam2.right_tokens(decoder, -four_masks()[0], four_masks()[1], 1e-6) == [0], "an empty mask is stable"


def test_choices_within_rounding_are_ties() -> None:
    decoder = official().mask_decoder
    logits, quality = four_masks(near=0.03)
    logits[0][logits[0] == 0] = 0.05 - 1e-5
    assert sam2.right_tokens(decoder, logits, quality, 1e-5) == [0, 2]
    quality[3] = 0.5 - 1e-5
    assert sam2.right_tokens(decoder, *(four_masks(near=0.03)[0], quality), 1e-5) == [2, 3]


# ---- weights ----


def test_a_file_and_a_folder_of_transformers_load(tmp_path: Path) -> None:
    """With parts for videos, and with one copy of the frequencies, as files of transformers may have."""
    state = {name: value.clone() for name, value in official().state_dict().items()}
    state["prompt_encoder.shared_embedding.positional_embedding"] = state.pop("shared_image_embedding.positional_embedding")
    state |= {"memory_attention.layers.0.linear1.weight": torch.zeros(2), "no_object_pointer": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded, record = sam2.load(MINI, str(source))
        assert record["source"].startswith(str(tmp_path))
        found = loaded.state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items() if name in found)
        assert torch.equal(*(found[name] for name in sam2.FREQUENCIES))


ORIGINAL = {
    "image_encoder.trunk.pos_embed_window": "vision_encoder.backbone.pos_embed_window",
    "image_encoder.trunk.patch_embed.proj.weight": "vision_encoder.backbone.patch_embed.projection.weight",
    "image_encoder.trunk.blocks.1.norm1.weight": "vision_encoder.backbone.blocks.1.layer_norm1.weight",
    "image_encoder.trunk.blocks.1.attn.qkv.bias": "vision_encoder.backbone.blocks.1.attn.qkv.bias",
    "image_encoder.trunk.blocks.1.attn.proj.bias": "vision_encoder.backbone.blocks.1.attn.proj.bias",
    "image_encoder.trunk.blocks.1.mlp.layers.0.weight": "vision_encoder.backbone.blocks.1.mlp.proj_in.weight",
    "image_encoder.trunk.blocks.1.mlp.layers.1.weight": "vision_encoder.backbone.blocks.1.mlp.proj_out.weight",
    "image_encoder.trunk.blocks.1.proj.weight": "vision_encoder.backbone.blocks.1.proj.weight",
    "image_encoder.neck.convs.3.conv.weight": "vision_encoder.neck.convs.3.weight",
    "no_mem_embed": "no_memory_embedding",
    "sam_prompt_encoder.not_a_point_embed.weight": "prompt_encoder.not_a_point_embed.weight",
    "sam_prompt_encoder.mask_downscaling.4.bias": "prompt_encoder.mask_embed.layer_norm2.bias",
    "sam_prompt_encoder.mask_downscaling.6.bias": "prompt_encoder.mask_embed.conv3.bias",
    "sam_mask_decoder.transformer.layers.1.norm4.weight": "mask_decoder.transformer.layers.1.layer_norm4.weight",
    "sam_mask_decoder.transformer.layers.1.mlp.layers.0.bias": "mask_decoder.transformer.layers.1.mlp.proj_in.bias",
    "sam_mask_decoder.transformer.layers.0.self_attn.out_proj.bias": "mask_decoder.transformer.layers.0.self_attn.o_proj.bias",
    "sam_mask_decoder.transformer.norm_final_attn.bias": "mask_decoder.transformer.layer_norm_final_attn.bias",
    "sam_mask_decoder.output_upscaling.1.weight": "mask_decoder.upscale_layer_norm.weight",
    "sam_mask_decoder.output_upscaling.3.weight": "mask_decoder.upscale_conv2.weight",
    "sam_mask_decoder.output_hypernetworks_mlps.2.layers.1.weight": "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight",
    "sam_mask_decoder.iou_prediction_head.layers.2.weight": "mask_decoder.iou_prediction_head.proj_out.weight",
    "sam_mask_decoder.pred_obj_score_head.layers.0.weight": "mask_decoder.pred_obj_score_head.proj_in.weight",
}
"""Names in the original checkpoints, one of each kind, and in transformers."""


def test_names_of_the_original_checkpoints(tmp_path: Path) -> None:
    points = {f"sam_prompt_encoder.point_embeddings.{number}.weight": torch.full((1, 2), number) for number in range(4)}
    frequencies = {"sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.ones(2, 1)}
    video = {
        "memory_encoder.fuser.layers.0.gamma": torch.zeros(1),
        "maskmem_tpos_enc": torch.zeros(1),
        "obj_ptr_proj.layers.0.bias": torch.zeros(1),
    }
    state = {name: torch.tensor([float(number)]) for number, name in enumerate(ORIGINAL)}
    found = sam2.image_part({**state, **points, **frequencies, **video})
    assert found.keys() == {*ORIGINAL.values(), "prompt_encoder.point_embed.weight", *sam2.FREQUENCIES}
    assert all(torch.equal(found[new], state[old]) for old, new in ORIGINAL.items())
    assert found["prompt_encoder.point_embed.weight"].tolist() == [[number, number] for number in range(4)]
    expected = official().state_dict()
    assert {name.replace("blocks.1.proj", "blocks.2.proj") for name in found} <= expected.keys()


@pytest.mark.parametrize(
    ("variant", "width", "heads", "blocks", "attend_globally", "background", "windows"),
    [
        ("sam2.1_tiny", 96, 1, [1, 2, 7, 2], [5, 7, 9], 7, [8, 4, 14, 7]),
        ("sam2.1_small", 96, 1, [1, 2, 11, 2], [7, 10, 13], 7, [8, 4, 14, 7]),
        ("sam2.1_base_plus", 112, 2, [2, 3, 16, 3], [12, 16, 20], 14, [8, 4, 14, 7]),
        ("sam2.1_large", 144, 2, [2, 6, 36, 4], [23, 33, 43], 7, [8, 4, 16, 8]),
    ],
)
def test_variants_are_the_published_ones(
    variant: str, width: int, heads: int, blocks: list[int], attend_globally: list[int], background: int, windows: list[int]
) -> None:
    """Heads, windows and global blocks change no shape, so that no checkpoint would show them: sam2/configs/sam2.1/*.yaml, and
    the defaults of sam2/modeling/backbones/hieradet.py, where widths and heads double at each stage."""
    with torch.device("meta"):
        config = sam2.build(variant).config
    hiera = config.vision_config.backbone_config
    assert (hiera.hidden_size, hiera.embed_dim_per_stage) == (width, [width, 2 * width, 4 * width, 8 * width])
    assert hiera.num_attention_heads_per_stage == [heads, 2 * heads, 4 * heads, 8 * heads]
    assert (hiera.blocks_per_stage, hiera.global_attention_blocks) == (blocks, attend_globally)
    assert (hiera.window_positional_embedding_background_size, hiera.window_size_per_stage) == ([background] * 2, windows)
    assert config.prompt_encoder_config.image_size == 1024


@pytest.mark.parametrize("variant", [name for name in sam2.VARIANTS if name != MINI])
def test_another_variant_is_recognized(variant: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = sam2.build(variant).state_dict()
    assert sam2.variant_of(state) == variant
    few = {name: torch.zeros(value.shape if "pos_embed" in name else 1) for name, value in state.items()}
    save_file(few, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=f"expected SAM {MINI}, the file holds SAM {variant}") as error:
        sam2.load(MINI, str(tmp_path / "other.safetensors"))
    assert error.value.hint == f"--variant {variant}"


def test_a_checkpoint_of_sam_is_none_of_sam_2(tmp_path: Path) -> None:
    save_file({"image_encoder.pos_embed": torch.zeros(1)}, tmp_path / "sam.safetensors")
    with pytest.raises(WeightsError, match=r"not a checkpoint of SAM sam2\.1_mini: \d+ missing"):
        sam2.load(MINI, str(tmp_path / "sam.safetensors"))


def test_seeds_repeat_and_differ() -> None:
    (one, record), (again, record_again), (other, other_record) = (sam2.load(MINI, f"random:{seed}") for seed in (1, 1, 2))
    assert record == record_again and record["sha256"] != other_record["sha256"]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_names_of_weights_are_those_of_variants() -> None:
    assert [name for name in sam2.VARIANTS if name != MINI] == list(sam2.DOWNLOADS)
    assert all(len(what.sha256) == 64 for what in sam2.DOWNLOADS.values())
    with pytest.raises(UsageError, match="--size"):
        family("sam").prepare(MINI, SEED, Options(sizes=((64, 64),)))


# ---- in the chain ----


@pytest.fixture
def whole(bundle: Path, tmp_path: Path) -> Path:
    """A bundle of the small models, with SAM 2.1 in the place of SAM."""
    for name in ("clip", "grounding-dino"):
        shutil.copytree(MINI_BUNDLE / name, tmp_path / "bundle" / name)
    shutil.copytree(bundle / "sam", tmp_path / "bundle" / "sam")
    return tmp_path / "bundle"


def test_a_store_made_with_it_can_be_resumed_converted_and_reported(
    whole: Path, tmp_path: Path, wsss: Callable[..., Answer]
) -> None:
    photos = write_scenes(tmp_path / "scenes", 3)[0].parent
    label = ("label", photos, "--classes", "mini", "--bundle", whole, "--out", "store", "--json")
    for labelled in (3, 0):
        done = wsss(*label)
        assert done.code == 0, done.err
        assert json.loads(done.out.splitlines()[-1])["labelled"] == labelled

    records = [json.loads(line) for line in Path("store/manifest.jsonl").read_text().splitlines()]
    boxes = [box for record in records for box in record["boxes"]]
    assert len(boxes) > 2 and any(box["won_px"] for box in boxes)
    run = json.loads(Path("store/run.json").read_text())
    assert run["bundle"]["variants"]["sam"] == MINI
    assert run["models"]["sam"] == Bundle(whole).model("sam").manifest.identity()
    assert wsss("convert", "store", "--to", "coco", "--images", photos, "--out", "coco").code == 0
    assert json.loads(Path("coco/annotations/instances_train.json").read_text())["annotations"]
    assert wsss("report", "store", "--images", photos).code == 0


def test_labels_are_the_same_in_bands_and_in_pytorch(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(scene for seed in range(9) if len((scene := draw_scene(seed)).labels) > 2)
    want = Chain.open(whole, classes="mini", engine="ort").label(scene.pixels)
    assert len(set(np.unique(want.label_maps[0]).tolist()) - {0, VOID}) > 1
    monkeypatch.setattr("wsss.runtime.fuse.TILE_BYTES", 1 << 16)
    in_bands = Chain.open(whole, classes="mini", engine="ort").label(scene.pixels)
    assert (in_bands.label_maps[0] == want.label_maps[0]).mean() > 0.9999  # ties
    eager = Bundle(whole).model("sam")
    engines = (open_eager(eager, name) for name in ("encoder", "decoder"))
    boxes = want.boxes
    masks = MaskPredictor(eager, *engines)([Photograph(name="x", pixels=scene.pixels)], boxes)
    np.testing.assert_allclose(masks.quality, want.quality, atol=1e-5)
