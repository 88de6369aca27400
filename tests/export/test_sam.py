"""SAM: what is exported computes what segment_anything computes, and the gate notices when it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention
from segment_anything.utils.amg import calculate_stability_score
from torch import Tensor, nn

from wsss.engines.eager import EagerEngine
from wsss.engines.ort import OrtEngine
from wsss.errors import ParityError, UsageError, WeightsError
from wsss.export import exporting, verify
from wsss.export.exporting import export_model, verify_model
from wsss.export.family import Family, Graph, Options, Prepared
from wsss.export.precision.lowering import Fp32
from wsss.export.reference import open_eager
from wsss.export.rewrites import ChannelNorm, SamBlock
from wsss.export.sam import family as sam
from wsss.export.sam.decoder import stability
from wsss.export.sam.two_way import OfCells, ToCells, TwoWay
from wsss.export.weights import spread
from wsss.frame import Frame, frame_for
from wsss.spec import AxisRange, Model

SIDE, PATCH, CHANNELS = 64, 8, 32
BATCH, BOXES = AxisRange(1, 2, 3), AxisRange(1, 4, 7)


def toy_sam() -> Sam:
    """Two blocks, one with windows that do not divide the grid and one global; realistic spread."""
    grid = SIDE // PATCH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = Sam(
            ImageEncoderViT(
                img_size=SIDE,
                patch_size=PATCH,
                embed_dim=32,
                depth=2,
                num_heads=2,
                out_chans=CHANNELS,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=3,
                global_attn_indexes=(1,),
            ),
            PromptEncoder(CHANNELS, (grid, grid), (SIDE, SIDE), mask_in_chans=8),
            MaskDecoder(
                transformer_dim=CHANNELS,
                transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, num_heads=4, mlp_dim=64),
                iou_head_hidden_dim=32,
            ),
        )
    spread(toy, 1)
    for head in toy.mask_decoder.output_hypernetworks_mlps:  # logits beyond +-1, where stability scores are counted
        for parameter in head.layers[-1].parameters():
            parameter.data *= 100
    return toy.eval().requires_grad_(False)


def prepare_toy(variant: str, weights: str, options: Options) -> Prepared:
    record = {"source": weights, "sha256": "0" * 64}
    return sam.prepared_from(toy_sam(), variant=variant, weights=record, batch=BATCH, boxes=BOXES)


TOY = Family(name="sam", variants=("toy",), default="toy", prepare=prepare_toy, official=lambda variant: variant)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The toy exported, which passes the gate of all three graphs."""
    bundle = tmp_path_factory.mktemp("bundle")
    manifest = export_model(TOY, variant="toy", weights="random:0", bundle=bundle, options=Options(), log=print)
    return Model(bundle / "sam", manifest)


def engine(model: Model, graph: str) -> OrtEngine:
    return OrtEngine(model.path(graph), model.graph(graph))


def graphs() -> dict[str, Graph]:
    made = [make() for make in prepare_toy("toy", "random:0", Options()).graphs]
    return {graph.name: graph for graph in made}


def test_the_manifest_holds_what_the_runtime_needs(model: Model) -> None:
    manifest = model.manifest
    assert list(manifest.graphs) == ["encoder", "decoder", "fuse"]
    assert manifest.preprocess.longest_px == SIDE and manifest.preprocess.mean == sam.MEAN
    assert manifest.settings["logits_side"] == 4 * SIDE // PATCH
    assert set(manifest.files) == {"encoder.onnx", "decoder.onnx", "fuse.onnx", "weights.data"}
    for graph in manifest.graphs.values():
        assert graph.parity is not None
        assert {(row.batch, row.against) for row in graph.parity.rows} >= {(1, "reference"), (2, "reference")}


def test_verify_runs_the_gate_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "family", lambda name: TOY)
    assert list(verify_model(model, None, print)) == ["encoder", "decoder", "fuse"]


def test_verify_holds_a_model_against_graphs_of_its_precision(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: dict[str, str] = {}

    def gate(graph: Graph, *_: object, **__: object) -> None:
        dtypes[graph.name] = graph.outputs[0].dtype

    monkeypatch.setattr(exporting, "family", lambda name: TOY)
    monkeypatch.setattr(exporting, "_gate", gate)
    verify_model(Model(model.folder, replace(model.manifest, precision="fp16")), None, print)
    assert dtypes == {"encoder": "float16", "decoder": "float16", "fuse": "uint8"}


def test_the_eager_engine_is_rebuilt_from_the_weights(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "family", lambda name: TOY)
    feeds = sam.sample_photographs(SIDE, 2, 5)
    eager, ort = (each(feeds)["embedding"] for each in (open_eager(model, "encoder"), engine(model, "encoder")))
    np.testing.assert_allclose(np.asarray(ort), np.asarray(eager), atol=1e-4)


def on_canvas(photograph: Image.Image, frame: Frame) -> np.ndarray:
    canvas = np.full((*frame.canvas, 3), 77, np.uint8)  # what lies in the padding must not matter
    resized = photograph.resize((frame.valid[1], frame.valid[0]), Image.Resampling.BILINEAR)
    canvas[: frame.valid[0], : frame.valid[1]] = np.asarray(resized)
    return canvas


def test_chain_equals_sam_predictor_on_real_photographs(model: Model, photographs: list[Path]) -> None:
    """Photographs of one batch, their boxes interleaved in one decoder call, masks at original size."""
    images = [Image.open(path).convert("RGB") for path in photographs[::30][:3]]
    frames = [frame_for(model.manifest.preprocess, image.height, image.width) for image in images]
    rng = np.random.default_rng(0)
    owner = np.array([0, 1, 2, 2, 0, 1, 0])
    extent = np.array([images[i].size * 2 for i in owner])
    corners = np.sort(rng.uniform(0, 1, (len(owner), 2, 2)), axis=1).reshape(-1, 4)
    xyxy_image = np.round(corners * extent + [-1, -1, 1, 1])

    pixels = np.stack([on_canvas(image, frame) for image, frame in zip(images, frames, strict=True)])
    size = np.array([frame.valid for frame in frames])
    embedding = engine(model, "encoder")({"pixels": pixels, "size": size})["embedding"]
    boxes = np.concatenate([frames[i].xyxy_model_from_image(xyxy_image[[row]]) for row, i in enumerate(owner)])
    multimask = np.array([False, False, True, False, True, True, True])
    found = engine(model, "decoder")({"embedding": embedding, "boxes": boxes, "image": owner, "multimask": multimask})
    logits, quality, stable = (np.asarray(found[name]) for name in ("logits", "quality", "stability"))

    predictor, scores = SamPredictor(toy_sam()), []
    for i, image in enumerate(images):
        predictor.set_image(np.asarray(image))
        for row in np.flatnonzero(owner == i):
            many, iou, low = predictor.predict(box=xyxy_image[row], multimask_output=bool(multimask[row]), return_logits=True)
            best = iou.argmax()
            want, iou = many[[best]], iou[[best]]
            official = float(calculate_stability_score(torch.from_numpy(low[[best]]), 0.0, 1.0))
            assert abs(stable[row] - official) < 2e-3
            scores.append(official)
            side = logits.shape[1]
            ours = frames[i].mask_rows(side) @ logits[row] @ frames[i].mask_columns(side).T
            assert 0.01 < (want > 0).mean() < 0.99  # or equality would say little
            undecided = np.abs(want[0]) <= 1e-4 * np.abs(want).max()  # at the zero crossing, by rounding
            assert ((ours > 0) == (want[0] > 0))[~undecided].all() and undecided.mean() < 0.01
            assert abs(quality[row] - iou[0]) < 1e-5
    assert len({score for score in scores if 0 < score < 1}) > 3, scores


# ---- the gate must fail ----


class Swapped(nn.Module):
    """The right answers in the wrong rows."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.module(*inputs)
        return tuple(output.roll(1, 0) for output in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def wrong_mean(encoder: sam.Encoder) -> nn.Module:
    encoder.normalize.inner.mean += 1
    return encoder


def bgr(encoder: sam.Encoder) -> nn.Module:
    encoder.patch_embed.proj.weight.data = encoder.patch_embed.proj.weight.data.flip(1)
    return encoder


def padding_kept(encoder: sam.Encoder) -> nn.Module:
    encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1].clamp(min=SIDE)))  # all pixels count as valid
    return encoder


def rows_for_columns(encoder: sam.Encoder) -> nn.Module:
    block = encoder.blocks[1]
    block.rows, block.columns = block.columns, block.rows
    return encoder


def corner_of_pixel(decoder: sam.Decoder) -> nn.Module:
    decoder.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1] - 0.5, *inputs[2:]))
    return decoder


def first_image_for_all(decoder: sam.Decoder) -> nn.Module:
    decoder.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1], inputs[2] * 0, *inputs[3:]))
    return decoder


def another_mask(decoder: sam.Decoder) -> nn.Module:
    decoder.tokens = decoder.tokens[[0, 2, 1, 3, 4]]
    return decoder


def never_the_best_of_three(decoder: sam.Decoder) -> nn.Module:
    decoder.register_forward_pre_hook(lambda _, inputs: (*inputs[:3], torch.zeros_like(inputs[3])))
    return decoder


def best_of_all_four(decoder: sam.Decoder) -> nn.Module:
    decoder.quality_head.register_forward_hook(lambda _, __, quality: quality[:, [1, 2, 3, 0]])
    return decoder


def stability_at_a_smaller_offset(decoder: sam.Decoder) -> nn.Module:
    decoder.stability = Fp32(partial(stability, delta=2.0), why="a fault")
    return decoder


def no_dense_prompt(decoder: sam.Decoder) -> nn.Module:
    decoder.no_mask = torch.zeros_like(decoder.no_mask)
    return decoder


@pytest.mark.parametrize(
    ("graph", "plant"),
    [
        ("encoder", Swapped),
        ("encoder", wrong_mean),
        ("encoder", bgr),
        ("encoder", padding_kept),
        ("encoder", rows_for_columns),
        ("decoder", Swapped),
        ("decoder", corner_of_pixel),
        ("decoder", first_image_for_all),
        ("decoder", another_mask),
        ("decoder", never_the_best_of_three),
        ("decoder", best_of_all_four),
        ("decoder", stability_at_a_smaller_offset),
        ("decoder", no_dense_prompt),
    ],
)
def test_the_gate_refuses_a_planted_fault(graph: str, plant: Callable[[nn.Module], nn.Module]) -> None:
    right = graphs()[graph]
    faulty = EagerEngine(plant(graphs()[graph].module), right.spec("x", 18))
    with pytest.raises(ParityError, match=rf"{graph}: (output '\w+', )?row \d+ of batch"):
        verify.gate(right, faulty, engine_name="eager", reference_name="official", where=graph)


@torch.inference_mode()
def test_a_channel_norm_is_the_official_one_with_its_epsilon() -> None:
    """Over values so small that the epsilon decides."""
    official = LayerNorm2d(8, eps=1e-6)
    x = 1e-3 * torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ChannelNorm(official)(x), official(x))


def test_queries_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    block = SamBlock(toy_sam().image_encoder.blocks[1], SIDE // PATCH)
    tokens = torch.randn(2, SIDE // PATCH, SIDE // PATCH, 32)
    whole = block(tokens)
    monkeypatch.setattr(SamBlock, "QUERIES", 24)  # does not divide 64
    torch.testing.assert_close(block(tokens), whole)


@torch.inference_mode()
@pytest.mark.parametrize("number", [0, 1])
def test_keys_and_values_of_one_width_change_nothing(number: int) -> None:
    """With windows and without."""
    block = toy_sam().image_encoder.blocks[number]
    padded, tokens = SamBlock(block, SIDE // PATCH, one_width=True), torch.randn(2, SIDE // PATCH, SIDE // PATCH, 32)
    assert padded.width % 8 == 0
    torch.testing.assert_close(padded(tokens), SamBlock(block, SIDE // PATCH)(tokens))


def seeded_attention(seed: int = 0) -> tuple[Attention, torch.Generator]:
    """An official attention with 4 heads of 4 of 32 channels, and biases of the size of its results."""
    generator = torch.Generator().manual_seed(seed)
    attention = Attention(32, 4, downsample_rate=2)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.25
    return attention, generator


@torch.inference_mode()
def test_projections_of_cells_may_be_those_of_tokens() -> None:
    attention, generator = seeded_attention()
    tokens, others, cells, placed = (torch.randn(2, count, 32, generator=generator) for count in (5, 5, 40, 40))
    seen = attention(q=tokens, k=placed, v=cells)
    torch.testing.assert_close(ToCells(attention)(tokens, placed, cells), seen)
    projected = attention.k_proj(placed), attention.v_proj(cells)
    torch.testing.assert_close(ToCells(attention, projected=True)(tokens, *projected), seen)
    seen = attention(q=placed, k=others, v=tokens)
    torch.testing.assert_close(OfCells(attention)(placed, others, tokens), seen)
    torch.testing.assert_close(OfCells(attention, projected=True)(attention.q_proj(placed), others, tokens), seen)


@torch.inference_mode()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_two_way_transformer_of_boxes_of_several_images(depth: int) -> None:
    official = TwoWayTransformer(depth=depth, embedding_dim=32, num_heads=4, mlp_dim=64)
    spread(official, 2)
    generator = torch.Generator().manual_seed(0)
    embeddings, places = torch.randn(3, 32, 4, 5, generator=generator), torch.randn(1, 32, 4, 5, generator=generator)
    tokens, image = torch.randn(4, 7, 32, generator=generator), torch.tensor([2, 0, 0, 1])
    want = official(embeddings[image], places.expand(4, -1, -1, -1), tokens)
    got = TwoWay(official)(embeddings.flatten(2).mT, places.flatten(2).mT, tokens, image)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_upscaling_with_channels_last_is_the_official_one() -> None:
    layers = toy_sam().mask_decoder.output_upscaling
    generator = torch.Generator().manual_seed(0)
    cells, weights = torch.randn(2, 36, CHANNELS, generator=generator), torch.randn(2, CHANNELS // 8, generator=generator)
    upscaled = layers(cells.mT.reshape(2, CHANNELS, 6, 6))
    torch.testing.assert_close(sam.Upscale(layers)(cells, weights), torch.einsum("bchw,bc->bhw", upscaled, weights))


# ---- weights ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini SAM in the official format."""
    path = tmp_path_factory.mktemp("weights") / "sam_mini.pth"
    torch.save(sam.load("mini", "random:3")[0].state_dict(), path)
    return path


def test_an_official_file_loads_to_the_same_numbers(checkpoint: Path) -> None:
    ours, record = sam.load("mini", str(checkpoint))
    seeded = sam.load("mini", "random:3")[0]
    assert record["source"] == str(checkpoint)
    photograph = torch.rand(3, 240, 200) * 255
    with torch.inference_mode():
        images = [each.image_encoder(each.preprocess(photograph)[None]) for each in (ours, seeded)]
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("mask_decoder.iou_token.weight"), "1 missing (mask_decoder.iou_token.weight)"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 surplus (extra)"),
        (lambda state: state.update({"image_encoder.neck.0.weight": torch.zeros(1)}), "of another shape"),
    ],
)
def test_another_architecture_is_named(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="SAM mini") as error:
        sam.load("mini", str(tmp_path / "other.pth"))
    assert says in str(error.value)


def test_a_truncated_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r"cut\.pth: not a readable file of weights"):
        sam.load("mini", str(tmp_path / "cut.pth"))


def test_another_variant_is_recognized(tmp_path: Path) -> None:
    large = {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 1024)}
    large |= {f"image_encoder.blocks.{i}.norm1.weight": torch.zeros(1) for i in range(24)}
    torch.save(large, tmp_path / "large.pth")
    with pytest.raises(WeightsError, match="expected SAM vit_b, the file holds SAM vit_l") as error:
        sam.load("vit_b", str(tmp_path / "large.pth"))
    assert error.value.hint == "--variant vit_l"


@pytest.mark.parametrize(("variant", "found"), [("vit_b", "vit_b"), ("vit_l", "vit_l"), ("vit_h", "vit_h"), ("mini", None)])
def test_the_variant_of_a_checkpoint_is_read_from_its_shapes(variant: str, found: str | None) -> None:
    with torch.device("meta"):
        state = sam.BUILDERS[variant]().state_dict()
    assert sam.variant_of(state) == found


@pytest.mark.parametrize("shape", [None, (), (64, 64, 768)])
def test_other_weights_have_no_variant_of_sam(shape: tuple[int, ...] | None) -> None:
    state = {} if shape is None else {"image_encoder.pos_embed": torch.zeros(shape, device="meta")}
    assert sam.variant_of(state) is None


@pytest.mark.parametrize("variant", ["vit_b", "mini"])
def test_prompts_are_in_the_frame_of_the_encoder(variant: str) -> None:
    with torch.device("meta"):
        built = sam.BUILDERS[variant]()
    side = built.image_encoder.img_size
    assert built.prompt_encoder.input_image_size == (side, side)


def test_a_checkpoint_has_the_official_mean_and_deviation(checkpoint: Path) -> None:
    """They stand in none."""
    loaded = sam.load("mini", str(checkpoint))[0]
    assert loaded.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert loaded.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    preprocess = sam.prepare("mini", str(checkpoint), Options()).preprocess
    assert (preprocess.mean, preprocess.std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def test_seeds_repeat_and_differ() -> None:
    (one, record), (again, record_again), (other, other_record) = (sam.load("mini", f"random:{seed}") for seed in (1, 1, 2))
    assert record == record_again and record["sha256"] != other_record["sha256"]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        plain = sam.BUILDERS["mini"]().state_dict()
    spread_out = sam.load("mini", "random:1")[0].state_dict()
    assert any(not torch.equal(plain[name], spread_out[name]) for name in plain), "random weights have the spread of trained ones"


@pytest.mark.parametrize(
    ("batch", "encoder", "images"),
    [
        (None, AxisRange(1, 8, 16), AxisRange(1, 8, 16)),
        (AxisRange(1, 2, 3), AxisRange(1, 2, 3), AxisRange(1, 8, 16)),
        (AxisRange(2, 20, 40), AxisRange(2, 20, 40), AxisRange(1, 20, 40)),
    ],
)
def test_a_decoder_takes_the_embeddings_of_an_encoder_call(
    batch: AxisRange | None, encoder: AxisRange, images: AxisRange
) -> None:
    made = {graph.name: graph for graph in (make() for make in sam.prepare("mini", "random:0", Options(batch=batch)).graphs)}
    assert made["encoder"].axes == {"batch": encoder}
    assert made["decoder"].axes == {"images": images, "boxes": AxisRange(1, 16, 64)}
    assert made["fuse"].axes["masks"] == AxisRange(1, 16, 256)


def test_samples_have_margins_of_noise_below_and_at_the_right() -> None:
    feeds = graphs()["encoder"].sample(3, 0)
    (below, wide), (tall, right), whole = feeds["size"].tolist()
    assert below < SIDE == wide and tall == SIDE > right and whole == [SIDE, SIDE]
    assert feeds["pixels"][0, below:].std() > 50 and feeds["pixels"][1, :, right:].std() > 50


def test_a_box_is_taken_with_the_one_embedding_it_needs() -> None:
    graph = graphs()["decoder"]
    feeds = graph.sample(7, 0)
    taken = graph.take(feeds, [5])
    assert taken["embedding"].shape == (1, *feeds["embedding"].shape[1:]) and taken["image"].tolist() == [0]
    assert np.array_equal(taken["embedding"][0], feeds["embedding"][feeds["image"][5]])


def test_what_sam_does_not_take_is_said() -> None:
    with pytest.raises(UsageError, match="vit_b, vit_l, vit_h, mini"):
        sam.prepare("vit_x", "random:0", Options())
    with pytest.raises(UsageError, match="one fixed input size"):
        sam.prepare("mini", "random:0", Options(sizes=((512, 512),)))


# ---- full size ----


@pytest.mark.slow
def test_full_size_vit_b_on_real_photographs(tmp_path: Path, photographs: list[Path]) -> None:
    """Export with the gate, then the whole chain against SamPredictor; minutes. More photographs: the benchmark itself."""
    from wsss.benchmarks.studies.parity import sam_official

    full = sam_official.find_model(tmp_path, "vit_b", "random:0")
    voc = photographs[0].parents[1]
    names = [path.stem for path in photographs if (voc / "Annotations" / f"{path.stem}.xml").is_file()][:2]
    predictor = SamPredictor(sam.load("vit_b", "random:0")[0])
    for name, row in sam_official.measure(full, predictor, voc, names):
        assert row["worst_iou"] >= 0.999, (name, row)
        assert 0.001 < row["mean_mask_share"] < 0.999, (name, row)


def test_a_model_of_an_earlier_version_passes_the_gate(model: Model) -> None:
    """Its decoder has no choice of masks and no stability scores; also in PyTorch, without bundles of that version."""
    before = graphs()["decoder"]
    spec = before.spec("x", 18)
    added = {"multimask", "token", "stability"}
    inputs, outputs = (tuple(each for each in specs if each.name not in added) for specs in (spec.inputs, spec.outputs))
    spec = replace(spec, inputs=inputs, outputs=outputs)
    engine_before = EagerEngine(before.module, spec)
    exported = before.as_exported(spec)
    assert [each.name for each in exported.outputs] == ["logits", "quality"] and exported.ties is None
    report = verify.gate(exported, engine_before, engine_name="eager", reference_name="official", where="decoder")
    assert {row.output for row in report.rows} == {"logits", "quality"}
    feeds = exported.sample(5, 1)
    now = engine(model, "decoder")({**feeds, "multimask": np.zeros(5, bool)})
    np.testing.assert_allclose(np.asarray(now["logits"]), engine_before(feeds)["logits"], atol=1e-3)
