"""MM-Grounding-DINO and LLMDet at toy size: the gate, the class heads, and the checkpoints of mmdetection and of the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'wsss[export]'")

import safetensors.torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from wsss.engines.eager import EagerEngine  # noqa: E402
from wsss.engines.ort import OrtEngine  # noqa: E402
from wsss.errors import ParityError, WeightsError  # noqa: E402
from wsss.export import weights as checkpoints  # noqa: E402
from wsss.export.family import Graph, Options  # noqa: E402
from wsss.export.grounding_dino import family as grounding_dino  # noqa: E402
from wsss.export.grounding_dino import weights as grounding_dino_weights  # noqa: E402
from wsss.export.grounding_dino.graphs import ImageGraph, level_shapes  # noqa: E402
from wsss.export.to_onnx import OPSET, WeightFile, export_onnx  # noqa: E402
from wsss.export.verify import gate  # noqa: E402
from wsss.mini.scenes import write_scenes  # noqa: E402
from wsss.runtime.bundles import MINI  # noqa: E402
from wsss.spec import AxisRange  # noqa: E402

from .toy import mm_toy, toy  # noqa: E402

CANVAS, BATCH = (96, 128), AxisRange(1, 2, 3)
MARGIN = grounding_dino.MM.margin


@pytest.fixture(scope="module")
def model() -> transformers.MMGroundingDinoForObjectDetection:
    return grounding_dino_weights.seeded(mm_toy, 0)


def judged(graph: Graph, engine: object) -> None:
    gate(graph, engine, engine_name="engine", reference_name="transformers", where=graph.name)  # type: ignore[arg-type]


# ---- the gate ----


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exported_graphs_pass_the_gate(tmp_path: Path, precision: str) -> None:
    half = precision == "fp16"
    model = grounding_dino_weights.seeded(lambda: mm_toy(depths=(1, 2)), 0)
    image = grounding_dino.image_graph(model, CANVAS, BATCH, MARGIN, "gather" if half else "plugin", half)
    for graph in (grounding_dino.text_graph(model), image):
        graph, path = graph.at(precision), tmp_path / f"{graph.name}.onnx"  # type: ignore[arg-type]
        export_onnx(graph, path, WeightFile(tmp_path / f"{graph.name}.data"), precision=precision)  # type: ignore[arg-type]
        judged(graph, OrtEngine(path, graph.spec(path.name, OPSET), threads=1))


def test_features_from_the_first_stage_on_pass_the_gate() -> None:
    """As in ``mm_large``, which has a level more."""
    model = grounding_dino_weights.seeded(lambda: mm_toy(all_stages=True), 0)
    graph = grounding_dino.image_graph(model, CANVAS, BATCH, MARGIN)
    assert level_shapes(model.config, CANVAS) == [(24, 32), (12, 16), (6, 8), (3, 4)]
    judged(graph, EagerEngine(graph.module, graph.spec("", OPSET)))


@pytest.mark.parametrize("spoil", ["bias of the first layer", "no bias and no scale", "boxes of the first layer's head"])
def test_the_gate_sees_heads_that_are_mixed_up(model: transformers.MMGroundingDinoForObjectDetection, spoil: str) -> None:
    graph = grounding_dino.image_graph(model, CANVAS, BATCH, MARGIN)
    module = graph.module
    assert isinstance(module, ImageGraph)
    if spoil == "bias of the first layer":
        module.class_head = model.class_embed[0]
    elif spoil == "no bias and no scale":
        module.class_head = nn.Identity()
    else:
        module.box_heads = nn.ModuleList([model.bbox_embed[0]])
    with pytest.raises(ParityError, match="boxes" if "boxes" in spoil else "logits"):
        judged(graph, EagerEngine(module, graph.spec("", OPSET)))


def test_the_margins_are_those_between_layers_and_at_the_end() -> None:
    """Boxes beyond both margins, which the heads then move back from the edges by as much as they were clamped."""
    model = grounding_dino_weights.seeded(lambda: mm_toy(depths=(1, 1)), 0)
    with torch.no_grad():
        model.model.encoder_output_bbox_embed.layers[-1].bias.add_(20)
        for head, move in zip(model.bbox_embed, (4, -8), strict=True):
            head.layers[-1].weight.mul_(0.1)
            head.layers[-1].bias.fill_(move)
    graph = grounding_dino.image_graph(model, CANVAS, BATCH, MARGIN)
    feeds = graph.take(graph.sample(1, 3), [0])
    boxes = {}
    for margin in (MARGIN, (1e-5, 1e-5), (1e-3, 1e-3)):
        module = ImageGraph(model, CANVAS, margin).eval()
        found = EagerEngine(module, graph.spec("", OPSET))(feeds)
        found = {name: np.array(value) for name, value in found.items()}
        boxes[margin] = found["boxes"]
        expected = grounding_dino.official_detections(model, margin, feeds, found)["boxes"]
        np.testing.assert_allclose(found["boxes"], expected, atol=1e-5)
    for other in ((1e-5, 1e-5), (1e-3, 1e-3)):
        assert np.abs(boxes[other] - boxes[MARGIN]).max() > 0.01


# ---- variants ----


@pytest.mark.parametrize(
    ("variant", "width", "depths", "window"),
    [
        ("swin_t", 96, [2, 2, 6, 2], 7),
        ("swin_b", 128, [2, 2, 18, 2], 12),
        ("mm_tiny", 96, [2, 2, 6, 2], 7),
        ("mm_base", 128, [2, 2, 18, 2], 12),
        ("mm_large", 192, [2, 2, 18, 2], 12),
    ],
)
def test_backbones_are_the_published_ones(variant: str, width: int, depths: list[int], window: int) -> None:
    """The number of heads changes no shape, so that no checkpoint would show it: a head has 32 channels (Swin, table 7)."""
    with torch.device("meta"):
        backbone = grounding_dino.build_official(variant).config.backbone_config
    assert (backbone.embed_dim, backbone.depths, backbone.window_size) == (width, depths, window)
    assert backbone.num_heads == [width * 2**stage // 32 for stage in range(4)]


@pytest.mark.parametrize(("size", "millions", "levels"), [("tiny", 173, 4), ("base", 233, 4), ("large", 343, 5)])
def test_the_official_configurations(size: str, millions: int, levels: int) -> None:
    with torch.device("meta"):
        one, other = (grounding_dino.build_official(f"{family}_{size}") for family in ("mm", "llmdet"))
    assert round(sum(value.numel() for value in one.parameters()) / 1e6) == millions
    assert one.config.to_dict() == other.config.to_dict()
    assert len(level_shapes(one.config, (800, 1088))) == one.config.num_feature_levels == levels
    assert (one.config.num_queries, one.config.max_text_len) == (900, 256)
    assert len({id(head) for head in one.bbox_embed}) == 6 and one.bbox_embed[0] is not one.bbox_embed[1]


def test_settings_are_those_of_mmdetection() -> None:
    prepared = grounding_dino.prepare("mm_mini", "random:0", Options())
    assert (prepared.settings["score_rule"], prepared.settings["box_thresholds"]) == ("mean", {"mean": 0.3})
    assert grounding_dino.MM.margin == (1e-3, 1e-5)
    assert (grounding_dino.MM.short_px, grounding_dino.MM.longest_px) == (800, 1333)


def test_every_variant_has_known_weights_whose_files_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise OSError("no network")

    official, known = grounding_dino.FAMILY.official, grounding_dino_weights.KNOWN
    names = [official(variant) for variant in grounding_dino.FAMILY.variants if "mini" not in variant]
    assert len(names) == len(set(names)) == 8 and known.keys() >= set(names)
    assert len({each.file for each in known.values()}) == len(known)
    for name, each in known.items():
        if name.startswith("mm_"):
            assert each.file.endswith(f"-{each.sha256}.pth") and len(each.sha256) == 8
    monkeypatch.setattr(checkpoints, "_fetch", offline)
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"llmdet_tiny\.safetensors: cannot be downloaded") as caught:
        grounding_dino.prepare("llmdet_tiny", "llmdet_tiny", Options())
    assert caught.value.hint.endswith("--model grounding-dino --variant llmdet_tiny --weights llmdet_tiny.safetensors")
    with pytest.raises(WeightsError, match="no known grounding-dino weights"):
        grounding_dino.prepare("mm_mini", official("mm_mini"), Options())


# ---- the chain ----


@pytest.mark.slow
def test_the_chain_with_the_small_model_labels_resumes_converts_and_reports(wsss: Callable[..., Any], tmp_path: Path) -> None:
    """A minute, for tracing."""
    write_scenes(tmp_path, 4, seed=5)
    shutil.copytree(MINI, "bundle")
    mini = ("export", "--model", "grounding-dino", "--variant", "mm_mini", "--weights", "random:0", "--bundle", "bundle")
    assert wsss(*mini, "--engine", "onnx", "--size", "192x192").code == 0
    label = ("label", "images", "--classes", "mini", "--bundle", "bundle", "--out", "store", "--device", "cpu")
    loose = ("--box-threshold", "0.01")  # of random weights, scores are low
    assert wsss(*label, *loose, "--limit", "2").code == 0
    assert "2 already done" in wsss(*label, *loose).stdout
    assert json.loads(Path("store/run.json").read_text())["bundle"]["variants"]["grounding-dino"] == "mm_mini"
    lines = [json.loads(line) for line in Path("store/manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and any(line["boxes"] for line in lines)
    assert wsss("convert", "store", "--to", "coco", "--out", "coco").code == 0
    assert wsss("report", "store", "--out", "page.html").code == 0 and Path("page.html").is_file()


# ---- checkpoints ----


def assert_loads(path: Path, model: nn.Module, build: Callable[[], nn.Module]) -> None:
    loaded = grounding_dino_weights.load(build, "toy", str(path))[0]  # type: ignore[arg-type]
    for (name, mine), its in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        if "swin.layernorm" not in name:  # in no checkpoint and in no output
            assert torch.equal(mine, its), name


def test_a_folder_saved_by_transformers_loads(model: transformers.MMGroundingDinoForObjectDetection, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert_loads(tmp_path, model, mm_toy)


@pytest.mark.parametrize("kept", [r"^(bbox|class)_embed", r"^model\.decoder\.(bbox|class)_embed", r"_embed\.0\b"])
def test_heads_load_by_either_of_their_names(
    model: transformers.MMGroundingDinoForObjectDetection, tmp_path: Path, kept: str
) -> None:
    """transformers 4 wrote the first head as ``bbox_embed.0``, and the others as ``model.decoder.bbox_embed.1``."""
    is_head = re.compile(r"(?:model\.decoder\.)?(?:bbox|class)_embed\.")
    state = dict(model.state_dict())
    if kept == r"_embed\.0\b":
        left = {name for name in state if name.startswith(("bbox_embed.1", "class_embed.1"))}
        left |= {name for name in state if re.match(r"model\.decoder\.(bbox|class)_embed\.0", name)}
    else:
        left = {name for name in state if is_head.match(name) and not re.match(kept, name)}
    assert left
    safetensors.torch.save_file(
        {name: value.clone() for name, value in state.items() if name not in left}, tmp_path / "a.safetensors"
    )
    assert_loads(tmp_path / "a.safetensors", model, mm_toy)
    without = {name: value.clone() for name, value in state.items() if not re.search(r"bbox_embed\.1\.layers\.0\.bias", name)}
    safetensors.torch.save_file(without, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"2 missing \(.*bbox_embed\.1\.layers\.0\.bias"):
        assert_loads(tmp_path / "b.safetensors", model, mm_toy)


def test_a_checkpoint_of_the_other_class_is_refused(
    model: transformers.MMGroundingDinoForObjectDetection, tmp_path: Path
) -> None:
    safetensors.torch.save_file({name: value.clone() for name, value in toy().state_dict().items()}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"missing \(.*class_embed\.\d\.bias"):
        assert_loads(tmp_path / "a.safetensors", model, mm_toy)
    model.save_pretrained(tmp_path / "mm")
    with pytest.raises(WeightsError, match="surplus"):
        assert_loads(tmp_path / "mm", toy(), toy)


_OF_MMDET = [
    (r"^model\.backbone\.conv_encoder\.model\.hidden_states_norms\.stage(\d)\.", lambda m: f"backbone.norm{int(m[1]) - 1}."),
    (r"^model\.backbone\.conv_encoder\.model\.swin\.embeddings\.patch_embeddings\.", "backbone.patch_embed."),
    (r"^model\.backbone\.conv_encoder\.model\.swin\.embeddings\.norm\.", "backbone.patch_embed.norm."),
    (r"^model\.backbone\.conv_encoder\.model\.swin\.encoder\.layers\.", "backbone.stages."),
    (r"\.attention\.relative_position_bias\.", ".attn.w_msa."),
    (r"\.attention\.o_proj\.", ".attn.w_msa.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"^model\.input_proj_vision\.([01])\.0\.", r"neck.convs.\1.conv."),
    (r"^model\.input_proj_vision\.([01])\.1\.", r"neck.convs.\1.gn."),
    (r"^model\.input_proj_vision\.(\d)\.0\.", lambda m: f"neck.extra_convs.{int(m[1]) - 2}.conv."),
    (r"^model\.input_proj_vision\.(\d)\.1\.", lambda m: f"neck.extra_convs.{int(m[1]) - 2}.gn."),
    (r"^model\.text_backbone\.", "language_model.language_backbone.body.model."),
    (r"^model\.text_projection\.", "text_feat_map."),
    (r"^model\.query_position_embeddings\.", "query_embedding."),
    (r"^model\.enc_output\.", "memory_trans_fc."),
    (r"^model\.enc_output_norm\.", "memory_trans_norm."),
    (r"^model\.level_embed", "level_embed"),
    (r"^model\.encoder_output_class_embed\.", "bbox_head.cls_branches.2."),
    (r"^model\.encoder_output_bbox_embed\.layers\.(\d)\.", lambda m: f"bbox_head.reg_branches.2.{2 * int(m[1])}."),
    (r"^class_embed\.", "bbox_head.cls_branches."),
    (r"^bbox_embed\.(\d)\.layers\.(\d)\.", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}."),
    (r"^model\.encoder\.layers\.(\d+)\.fusion_layer\.", r"encoder.fusion_layers.\1."),
    (r"\.vision_param$", ".gamma_v"),
    (r"\.text_param$", ".gamma_l"),
    (r"\.layer_norm_vision\.", ".layer_norm_v."),
    (r"\.layer_norm_text\.", ".layer_norm_l."),
    (r"(fusion_layers.*\.(?:values_|out_|))vision_proj\.", r"\1v_proj."),
    (r"(fusion_layers.*\.(?:values_|out_|))text_proj\.", r"\1l_proj."),
    (r"^model\.encoder\.layers\.(\d+)\.text_enhancer_layer\.", r"encoder.text_layers.\1."),
    (r"(text_layers\.\d+\.)self_attn\.", r"\1self_attn.attn."),
    (r"\.layer_norm_before\.", ".norms.0."),
    (r"\.layer_norm_after\.", ".norms.1."),
    (r"^model\.encoder\.layers\.(\d+)\.deformable_layer\.", r"encoder.layers.\1."),
    (r"^(encoder.*)\.self_attn_layer_norm\.", r"\1.norms.0."),
    (r"^(encoder.*)\.final_layer_norm\.", r"\1.norms.1."),
    (r"^model\.decoder\.reference_points_head\.", "decoder.ref_point_head."),
    (r"^model\.decoder\.layer_norm\.", "decoder.norm."),
    (r"^model\.decoder\.layers\.", "decoder.layers."),
    (r"^(decoder.*)\.self_attn_layer_norm\.", r"\1.norms.0."),
    (r"^(decoder.*)\.encoder_attn_text_layer_norm\.", r"\1.norms.1."),
    (r"^(decoder.*)\.encoder_attn_layer_norm\.", r"\1.norms.2."),
    (r"^(decoder.*)\.final_layer_norm\.", r"\1.norms.3."),
    (r"^(decoder.*)\.self_attn\.", r"\1.self_attn.attn."),
    (r"^(decoder.*)\.encoder_attn_text\.", r"\1.cross_attn_text.attn."),
    (r"^(decoder.*)\.encoder_attn\.", r"\1.cross_attn."),
    (r"^((?:encoder|decoder)\..*)\.fc1\.", r"\1.ffn.layers.0.0."),
    (r"^((?:encoder|decoder)\..*)\.fc2\.", r"\1.ffn.layers.1."),
]


def mmdet_checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as mmdetection 3.3 names it, with leftovers of training and of LLMDet's language model."""
    state: dict[str, Tensor] = {}
    joined: dict[str, list[Tensor]] = {}
    for name, value in model.state_dict().items():
        if "swin.layernorm" in name or name.startswith(("model.decoder.bbox_embed", "model.decoder.class_embed")):
            continue
        if name.endswith("class_embed.bias") or name.startswith("class_embed."):
            value = value.reshape(1)
        if ".downsample." in name:  # mmdetection: channels, rows, columns; Swin: columns, rows, channels
            value = value.reshape(*value.shape[:-1], 2, 2, -1).movedim(-1, -3).transpose(-1, -2).flatten(-3)
        for pattern, replacement in _OF_MMDET:
            name = re.sub(pattern, replacement, name)
        if part := re.match(r"(backbone\..*)\.attention\.([qkv])_proj\.(\w+)$", name):
            joined.setdefault(f"{part[1]}.attn.w_msa.qkv.{part[3]}", []).append(value)
        elif part := re.match(r"((?:encoder\.text_layers|decoder)\..*\.attn)\.(?:query|key|value)\.(\w+)$", name):
            joined.setdefault(f"{part[1]}.in_proj_{part[2]}", []).append(value)
        else:
            state[name] = value
    assert all(len(parts) == 3 for parts in joined.values())
    state |= {name: torch.cat(parts) for name, parts in joined.items()}
    state |= {f"ref_point_head.{name[23:]}": value for name, value in state.items() if name.startswith("decoder.ref_point_head")}
    return state | {"dn_query_generator.label_embedding.weight": torch.zeros(7, 64), "lmm.lm_head.weight": torch.zeros(3)}


def test_a_checkpoint_of_mmdetection_loads(model: transformers.MMGroundingDinoForObjectDetection, tmp_path: Path) -> None:
    torch.save({"meta": {"epoch": 12}, "state_dict": mmdet_checkpoint(model)}, tmp_path / "toy.pth")
    assert_loads(tmp_path / "toy.pth", model, mm_toy)


def test_patches_are_merged_as_in_mmdetection() -> None:
    """mmdetection's ``PatchMerging`` (torch.nn.Unfold) beside the sum over Swin's four quarters."""
    from wsss.export.grounding_dino.mmdet import _quarters_first

    cells = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(1))
    theirs = nn.functional.unfold(cells, 2, stride=2).transpose(1, 2) @ weight.T  # (1, cells, 7)
    rows = cells.permute(0, 2, 3, 1)
    quarters = [rows[:, row::2, column::2] for column in range(2) for row in range(2)]
    ours = torch.cat(quarters, -1).flatten(1, 2) @ _quarters_first(weight).T
    torch.testing.assert_close(ours, theirs)
