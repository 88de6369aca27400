"""Grounding-DINO's exporter at toy size: gate, captions by concatenation, official checkpoints, bad input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'wsss[export]'")

import onnx  # noqa: E402
import safetensors.torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from wsss.engines.eager import EagerEngine  # noqa: E402
from wsss.engines.ort import OrtEngine  # noqa: E402
from wsss.errors import ParityError, UsageError, WeightsError  # noqa: E402
from wsss.export.family import Feeds, Graph, Options, Prepared, Sampling, family  # noqa: E402
from wsss.export.grounding_dino import family as grounding_dino  # noqa: E402
from wsss.export.grounding_dino import layers  # noqa: E402
from wsss.export.grounding_dino import weights as grounding_dino_weights  # noqa: E402
from wsss.export.grounding_dino.graphs import ImageGraph, TextGraph, level_shapes  # noqa: E402
from wsss.export.mini import grounding_dino_mini_tokenizer  # noqa: E402
from wsss.export.to_onnx import OPSET, WeightFile, export_onnx  # noqa: E402
from wsss.export.verify import gate  # noqa: E402
from wsss.runtime.bundles import MINI  # noqa: E402
from wsss.spec import AxisRange, read_manifest  # noqa: E402

from .toy import toy  # noqa: E402

CANVAS = (96, 128)
VOCABULARY = Path(os.environ.get("WSSS_TEST_DATA", Path(__file__).parents[4] / "shared" / "data")) / "vocab"


@pytest.fixture(scope="module")
def model() -> transformers.GroundingDinoForObjectDetection:
    return grounding_dino_weights.seeded(toy, 0)


@pytest.fixture(scope="module")
def prepared(model: transformers.GroundingDinoForObjectDetection) -> Prepared:
    return grounding_dino.assemble(
        model,
        "toy",
        grounding_dino.MINI,
        Options(sizes=(CANVAS,), batch=AxisRange(1, 2, 3)),
        tokenizer=grounding_dino_mini_tokenizer(),
        record={"source": "random:0", "sha256": ""},
    )


@pytest.fixture(scope="module")
def exported(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Graph, OrtEngine]]:
    folder = tmp_path_factory.mktemp("grounding-dino")
    store, done = WeightFile(folder / "weights.data"), {}
    for graph in (make() for make in prepared.graphs):
        export_onnx(graph, folder / f"{graph.name}.onnx", store)
        done[graph.name] = (graph, OrtEngine(folder / f"{graph.name}.onnx", graph.spec(f"{graph.name}.onnx", OPSET), threads=1))
    return done


def judged(graph: Graph, engine: object) -> None:
    gate(graph, engine, engine_name="ort", reference_name="transformers", where=graph.name)  # type: ignore[arg-type]


class Spoiled:
    """An engine whose feeds are changed on the way."""

    def __init__(self, engine: OrtEngine, spoil: Callable[[Feeds], Feeds]) -> None:
        self._engine, self._spoil = engine, spoil

    def __call__(self, feeds: Feeds) -> Feeds:
        return self._engine(self._spoil(dict(feeds)))  # type: ignore[return-value]


# ---- the gate ----


@pytest.mark.parametrize("name", ["text", "image-96x128"])
def test_exported_graph_passes_the_gate(exported: dict[str, tuple[Graph, OrtEngine]], name: str) -> None:
    judged(*exported[name])


def test_the_form_for_half_precision_passes_the_same_gate(tmp_path: Path) -> None:
    """Sampling by gathers, and a product more in each fusion layer. `test_mm.py` has the form for the plugin."""
    model = grounding_dino_weights.seeded(lambda: toy(depths=(1, 2), encoder_layers=1), 0)
    half, full = (
        grounding_dino.image_graph(model, CANVAS, AxisRange(1, 2, 3), grounding_dino.MINI.margin, "gather", two_products)
        for two_products in (True, False)
    )
    feeds = half.sample(2, 0)
    work = []
    for graph in (half, full):
        with FlopCounterMode(display=False) as counter:
            graph.module.eval()(*(torch.from_numpy(feeds[spec.name]) for spec in graph.inputs))
        work.append(counter.get_total_flops())
    cells, tokens = sum(h * w for h, w in level_shapes(model.config, CANVAS)), feeds["text"].shape[1]
    assert work[0] - work[1] == 2 * 2 * cells * tokens * model.config.encoder_ffn_dim // 2
    path = tmp_path / "half.onnx"
    export_onnx(half, path, WeightFile(tmp_path / "weights.data"))
    assert "GridSample" not in {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    judged(half, OrtEngine(path, half.spec(path.name, OPSET), threads=1))


@pytest.mark.parametrize("sampling", ["gather", "plugin"])
def test_the_form_of_sampling_is_among_the_settings(sampling: Sampling) -> None:
    options = Options(sizes=(CANVAS,), batch=AxisRange(1, 2, 3), sampling=sampling)
    record = {"source": "random:0", "sha256": ""}
    prepared = grounding_dino.assemble(
        toy(), "toy", grounding_dino.MINI, options, tokenizer=grounding_dino_mini_tokenizer(), record=record
    )
    assert prepared.settings["sampling"] == sampling
    module = prepared.graphs[1]().module
    assert isinstance(module, ImageGraph)
    forms = {"gather": layers.GatherSampler, "plugin": layers._sampled_by_plugin}
    assert getattr(module.sample, "inner", type(module.sample)) is forms[sampling]


def test_seeded_weights_give_logits_as_large_as_trained_ones_do(exported: dict[str, tuple[Graph, OrtEngine]]) -> None:
    graph, engine = exported["image-96x128"]
    logits = np.asarray(engine(graph.sample(3, 3))["logits"])
    assert 0.5 < logits[np.isfinite(logits)].std() < 4  # untrained, a product of two normed vectors: 8


def _swap_captions(feeds: Feeds) -> Feeds:
    order = np.roll(np.arange(len(feeds["phrase"])), 1)
    return {**feeds, **{name: np.asarray(feeds[name])[order] for name in ("text", "phrase", "position")}}


def _join_phrases(feeds: Feeds) -> Feeds:
    phrase = np.asarray(feeds["phrase"])
    return {**feeds, "phrase": np.where(phrase == 2, 1, phrase)}


def _ignore_size(feeds: Feeds) -> Feeds:
    return {**feeds, "size": np.broadcast_to(np.array(CANVAS, np.int64), feeds["size"].shape)}


def _blue_first(feeds: Feeds) -> Feeds:
    return {**feeds, "pixels": np.ascontiguousarray(np.asarray(feeds["pixels"])[..., ::-1])}


@pytest.mark.parametrize("spoil", [_swap_captions, _join_phrases, _ignore_size, _blue_first])
def test_the_gate_sees(exported: dict[str, tuple[Graph, OrtEngine]], spoil: Callable[[Feeds], Feeds]) -> None:
    graph, engine = exported["image-96x128"]
    with pytest.raises(ParityError, match="row"):
        judged(graph, Spoiled(engine, spoil))


def test_what_lies_outside_the_photo_and_beyond_the_caption_does_not_matter(
    exported: dict[str, tuple[Graph, OrtEngine]],
) -> None:
    graph, engine = exported["image-96x128"]
    feeds = graph.take(graph.sample(3, 5), [2])
    height, width = feeds["size"][0]
    other = {name: value.copy() for name, value in feeds.items()}
    other["pixels"][0, height:], other["pixels"][0, :, width:] = 7, 9
    for name, fill in (("text", 0), ("phrase", -1), ("position", 0)):
        tail = np.full_like(other[name][:, :5], fill)
        other[name] = np.concatenate([other[name], tail], 1)
    tokens = feeds["phrase"].shape[1]
    found = {name: np.array(value) for name, value in engine(other).items()}
    assert np.isneginf(found["logits"][..., tokens:]).all()
    found["logits"] = found["logits"][..., :tokens]
    want = graph.reference(feeds, found)  # from the same queries, after a check that they are the best or tie with these
    np.testing.assert_allclose(found["logits"], want["logits"], atol=1e-4)
    np.testing.assert_allclose(found["boxes"], want["boxes"], atol=1e-5)


def test_the_reference_refuses_queries_that_are_not_the_best(model: transformers.GroundingDinoForObjectDetection) -> None:
    graph = grounding_dino.image_graph(model, CANVAS, AxisRange(1, 2, 3))
    feeds = graph.take(graph.sample(3, 5), [2])
    found = {name: np.array(value) for name, value in EagerEngine(graph.module, graph.spec("", OPSET))(feeds).items()}
    graph.reference(feeds, found)
    others = np.setdiff1d(np.arange(100), found["query"])[None, : found["query"].shape[1]]
    with pytest.raises(ParityError, match="output 'query': scores of the chosen cells differ"):
        graph.reference(feeds, {**found, "query": others})


def test_in_half_precision_the_boxes_of_the_hundred_best_queries_count() -> None:
    """Boxes of 0.2 x 0.2 that are moved by 0.05 have an IoU of 0.6."""
    rng = np.random.default_rng(0)
    logits = np.stack([rng.permutation(150) for _ in range(2)])[..., None] - np.array([0.0, 9.0])  # (2, 150, 2)
    want = {"logits": logits, "boxes": np.tile(np.array([0.5, 0.5, 0.2, 0.2]), (2, 150, 1))}
    for row in range(2):
        order = np.argsort(-logits[row, :, 0])
        for moved, worst in ((order[100:], (0.0, 0.0)), (order[99:100], (0.4, 0.05)), (order[:1], (0.4, 0.05))):
            boxes = want["boxes"].copy()
            boxes[row, moved, 0] += 0.05
            found = grounding_dino.best_boxes_apart({"boxes": boxes}, want, "boxes")
            assert found == pytest.approx(worst, abs=1e-9)


def test_queries_that_are_no_near_tie_are_refused() -> None:
    scores = torch.tensor([5.0, 4.0, 3.99999, 1.0])
    grounding_dino.check_near_tie(scores, torch.tensor([0, 2]))
    grounding_dino.check_near_tie(scores, torch.tensor([0, 2, 1]))
    for wrong in ([0, 3], [1, 0], [0, 0]):
        with pytest.raises(ParityError, match="query"):
            grounding_dino.check_near_tie(scores, torch.tensor(wrong))


@pytest.mark.slow
def test_canvases_share_their_weights(tmp_path: Path) -> None:
    small = grounding_dino_weights.seeded(lambda: toy(depths=(1, 1), encoder_layers=1), 0)
    sizes, store = [], WeightFile(tmp_path / "weights.data")
    for canvas in ((64, 64), (64, 96)):
        graph = grounding_dino.image_graph(small, canvas, AxisRange(1, 2, 3))
        export_onnx(graph, tmp_path / f"{graph.name}.onnx", store)
        sizes.append((tmp_path / "weights.data").stat().st_size)
    assert sizes[1] - sizes[0] < 0.05 * sizes[0]  # what differs: which pixels a cell's mask reads


def test_level_shapes_are_those_of_the_official_feature_maps(model: transformers.GroundingDinoForObjectDetection) -> None:
    for canvas in ((96, 128), (70, 101)):
        with torch.no_grad():
            maps = model.model.backbone.conv_encoder.model(torch.zeros(1, 3, *canvas)).feature_maps
        shapes = level_shapes(model.config, canvas)
        assert shapes[:2] == [tuple(each.shape[2:]) for each in maps]
        assert shapes[2:] == [tuple(-(-side // by) for side in shapes[1]) for by in (2, 4)]


# ---- captions ----


def test_a_caption_is_the_concatenation_of_its_phrases(model: transformers.GroundingDinoForObjectDetection) -> None:
    graph = TextGraph(model).eval()
    phrases = [[101], [120, 130, 1012], [140, 1012], [150, 160, 170, 1012], [102]]
    tokens, mask = np.zeros((5, 6), np.int64), np.zeros((5, 6), np.bool_)
    for row, phrase in enumerate(phrases):
        tokens[row, : len(phrase)], mask[row, : len(phrase)] = phrase, True
    with torch.no_grad():
        features = graph(torch.from_numpy(tokens), torch.from_numpy(mask))
        assert not features[~torch.from_numpy(mask)].any()
        for order in ([1, 2, 3], [3, 1], [2]):
            chosen = [0, *order, 4]
            caption = torch.tensor([[token for row in chosen for token in phrases[row]]])
            official = grounding_dino.official_text_features(model, caption)[0]
            ours = torch.cat([features[row, : len(phrases[row])] for row in chosen])
            torch.testing.assert_close(ours, official, atol=1e-5, rtol=1e-5)


def test_samples_of_phrases_have_both_marks_and_padding() -> None:
    feeds = grounding_dino._sample_phrases(1100, 6, seed=0)
    tokens, mask = feeds["tokens"], feeds["mask"]
    lengths = mask.sum(axis=1)
    assert tokens[1:3, 0].tolist() == [101, 102] and lengths[1:3].tolist() == [1, 1]
    assert len(set(lengths.tolist())) > 2 and lengths.min() == 1
    assert np.array_equal(mask, np.arange(6) < lengths[:, None]) and not tokens[~mask].any()
    assert [tokens[row, lengths[row] - 1] for row in (0, 3, 4, 5)] == [1012] * 4, "a dot ends a phrase"
    for rows in (1, 2):  # as many as the processor has cores, where a graph is timed
        assert grounding_dino._sample_phrases(1100, rows, seed=0)["tokens"].shape == (rows, 6)


def test_the_rebuilt_caption_has_the_structure_of_the_fed_one() -> None:
    from transformers.models.grounding_dino.modeling_grounding_dino import generate_masks_with_special_tokens_and_transfer_map

    phrase = np.array([[0, 1, 1, 1, 2, 2, 3, -1, -1]])
    tokens = grounding_dino.caption_tokens(phrase)
    assert tokens.tolist() == [[101, 104, 104, 1012, 104, 1012, 102, 0, 0]]
    mask, position = generate_masks_with_special_tokens_and_transfer_map(tokens, torch.tensor([101, 102, 1012, 1029]))
    assert position[0, :7].tolist() == [0, 0, 1, 2, 0, 1, 0]
    same = phrase[0, :7, None] == phrase[0, None, :7]
    np.testing.assert_array_equal(mask[0, :7, :7].numpy(), same)


# ---- preparing ----


def test_settings_are_complete_and_documented() -> None:
    prepared = grounding_dino.prepare("mini", "random:0", Options())
    settings = prepared.settings
    assert (settings["cls"], settings["sep"], settings["dot"], settings["pad"]) == (101, 102, 1012, 0)
    assert (settings["max_tokens"], settings["queries"], settings["score_rule"]) == (256, 30, "max")
    for name in settings:
        assert f"``{name}``" in (grounding_dino.__doc__ or "")
    frame = grounding_dino.MINI
    assert sorted(prepared.preprocess.canvases) == sorted(frame.canvases)
    assert (prepared.preprocess.short_px, prepared.preprocess.longest_px) == (frame.short_px, frame.longest_px)
    assert family("grounding-dino") is grounding_dino.FAMILY


def test_the_bundle_that_comes_with_wsss_has_the_small_frame() -> None:
    kept, frame = read_manifest(MINI / "grounding-dino").preprocess, grounding_dino.MINI
    assert (kept.short_px, kept.longest_px) == (frame.short_px, frame.longest_px) == (144, 256)
    assert sorted(kept.canvases) == sorted(frame.canvases)


def test_a_smaller_canvas_resizes_photos_smaller() -> None:
    prepared = grounding_dino.prepare("mini", "random:0", Options(sizes=((128, 160),)))
    assert (prepared.preprocess.short_px, prepared.preprocess.longest_px) == (128, 160)


def test_seeds_repeat_and_differ() -> None:
    prepared = [grounding_dino.prepare("mini", f"random:{seed}", Options()) for seed in (1, 1, 2)]
    one, again, other = (each.graphs[0]().module.state_dict() for each in prepared)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    hashes = [each.weights["sha256"] for each in prepared]
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_unknown_variant_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="swin_t, swin_b, mm_tiny, .* mini, mm_mini, got 'swin_l'"):
        grounding_dino.prepare("swin_l", "random:0", Options())


# ---- checkpoints ----


def hub_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the toy as transformers 4 wrote it to the hub: other names in Swin, tied heads left out."""
    hub = {}
    for name, value in state.items():
        if "swin.layernorm" in name or "decoder.bbox_embed" in name or (name.startswith("bbox_embed.") and name[11] != "0"):
            continue
        if ".swin." in name:
            name = name.replace(".swin.", ".")
            for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
                name = name.replace(f".attention.{letter}_proj.", f".attention.self.{word}.")
            name = name.replace(".attention.o_proj.", ".attention.output.dense.")
            name = name.replace(".relative_position_bias.relative", ".self.relative")
            name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        hub[name] = value
    return hub


def load_toy(path: Path, window: int = 4) -> transformers.GroundingDinoForObjectDetection:
    return grounding_dino_weights.load(lambda: toy(window), "toy", str(path))[0]


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, mine), its in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if "swin.layernorm" not in name:  # in no checkpoint and in no output
            assert torch.equal(mine, its), name


def test_a_hub_folder_loads_and_must_agree_with_the_variant(
    model: transformers.GroundingDinoForObjectDetection, tmp_path: Path
) -> None:
    safetensors.torch.save_file(hub_names(dict(model.state_dict())), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert_same(load_toy(tmp_path), model)
    with pytest.raises(WeightsError, match=r"window_size 4 instead of 5"):
        load_toy(tmp_path, window=5)
    config = model.config.to_dict()
    for damaged in ({**config, "decoder_layers": None}, {**config, "text_config": 3}, [config], None):
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(WeightsError, match=r"config\.json: expected the configuration of a Grounding-DINO") as caught:
            load_toy(tmp_path)
        assert caught.value.hint


def test_a_folder_saved_by_transformers_now_loads(model: transformers.GroundingDinoForObjectDetection, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert_same(load_toy(tmp_path), model)


def test_wrong_and_damaged_checkpoints_are_named(model: transformers.GroundingDinoForObjectDetection, tmp_path: Path) -> None:
    state = hub_names(dict(model.state_dict()))
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({name: value for name, value in state.items() if "level_embed" not in name}, path)
    with pytest.raises(WeightsError, match=r"1 missing \(model.level_embed\)"):
        load_toy(path)
    safetensors.torch.save_file({**state, "visual.proj": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match=r"1 surplus \(visual.proj\)"):
        load_toy(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a readable file of weights"):
        load_toy(path)
    with pytest.raises(WeightsError, match="swint_ogc, swinb_cogcoor"):
        grounding_dino.prepare("swin_t", str(tmp_path / "none.pth"), Options())


# ---- vocabulary ----


def test_the_tokenizer_is_bert_base_uncased(tmp_path: Path) -> None:
    if not (VOCABULARY / "bert_base_uncased_vocab.txt").is_file():
        pytest.skip(f"needs {VOCABULARY}/bert_base_uncased_vocab.txt (or $WSSS_TEST_DATA)")
    (tmp_path / "vocab.txt").write_bytes((VOCABULARY / "bert_base_uncased_vocab.txt").read_bytes())
    ours = grounding_dino_weights.bert_tokenizer(tmp_path / "groundingdino_swint_ogc.pth")
    official = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    for caption in ("potted plant . TV monitor . café . dog's .", "a . 3.5 x . 猫 ."):
        assert ours.encode(caption).ids == official(caption)["input_ids"]
    assert ours.encode("potted plant .").ids == [101, 8962, 3064, 3269, 1012, 102]


def test_a_missing_vocabulary_says_what_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> Path:
        raise WeightsError("vocab.txt: cannot be downloaded")

    monkeypatch.delenv("WSSS_BERT_VOCAB", raising=False)
    monkeypatch.setattr(grounding_dino_weights, "download", offline)
    with pytest.raises(WeightsError) as caught:
        grounding_dino_weights.bert_tokenizer(tmp_path / "groundingdino_swint_ogc.pth")
    assert "beside the weights" in caught.value.hint
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(WeightsError, match="30,522"):
        grounding_dino_weights.bert_tokenizer(tmp_path)
