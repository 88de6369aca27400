"""CLIP's exporter at toy size: the whole way from official weights to gated graphs, and every way it can go wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install 'wsss[export]'")

import safetensors.torch  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402

from wsss.batch import Tensor  # noqa: E402
from wsss.benchmarks.studies.parity.clip_official import measure  # noqa: E402
from wsss.engines.eager import EagerEngine  # noqa: E402
from wsss.errors import ParityError, UsageError, WeightsError  # noqa: E402
from wsss.export import exporting  # noqa: E402
from wsss.export.clip import family as clip  # noqa: E402
from wsss.export.clip import weights as clip_weights  # noqa: E402
from wsss.export.family import Feeds, Graph, Options, Prepared  # noqa: E402
from wsss.export.mini import build_clip_mini  # noqa: E402
from wsss.export.verify import gate  # noqa: E402
from wsss.spec import AxisRange, TensorSpec  # noqa: E402

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TOYS = {
    "toy-vit": {"embed_dim": 24, "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}},
    "toy-resnet": {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}},
    "toy-custom": {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    },
}
SIGLIP = {
    **TOYS["toy-custom"],
    "text_cfg": {**TEXT, "vocab_size": 40, "context_length": 12, "hf_tokenizer_name": "nobody/nothing", "no_causal_mask": True},
}
SIGLIP["text_cfg"] |= {"pool_type": "last", "tokenizer_kwargs": {"clean": "canonicalize"}}  # type: ignore[operator]
MOBILE = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None, "image_size": 64},
    "text_cfg": TEXT,
    "custom_text": True,
}
THREE = Options(batch=AxisRange(1, 2, 3))


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Toy architectures under names of their own in open_clip's table."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in TOYS.items():
        (folder / f"{name}.json").write_text(json.dumps({**config, "text_cfg": TEXT}))
    for name, config in {"toy-siglip": SIGLIP, "toy-mobile": MOBILE}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def graphs(prepared: Prepared) -> dict[str, Graph]:
    return {graph.name: graph for graph in (make() for make in prepared.graphs)}


def judged(graph: Graph, spoil: Callable[[np.ndarray], np.ndarray] = lambda rows: rows) -> None:
    """The gate on the graph's own module, its embeddings spoiled on the way."""
    engine = EagerEngine(graph.module, graph.spec("", 18))

    class Spoiled:
        inputs, outputs, axes = engine.inputs, engine.outputs, engine.axes

        def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"embedding": spoil(np.asarray(engine(feeds)["embedding"]))}

    gate(graph, Spoiled(), engine_name="eager", reference_name="open_clip", where=graph.name)


@pytest.mark.parametrize("variant", ["toy-vit", "toy-resnet"])
def test_toys_export_and_pass_the_gate(variant: str, tmp_path: Path) -> None:
    log: list[str] = []
    manifest = exporting.export_model(
        clip.FAMILY, variant=variant, weights="random:3", bundle=tmp_path, options=THREE, log=log.append
    )
    assert manifest.variant == variant
    assert set(manifest.graphs) == {"image", "text"}
    side = manifest.preprocess.canvases[0][0]
    assert manifest.graphs["image"].inputs == (TensorSpec("pixels", ("batch", side, side, 3), "uint8"),)
    assert manifest.graphs["text"].inputs == (TensorSpec("tokens", ("batch", 77), "int64"),)
    for graph in manifest.graphs.values():
        assert graph.outputs == (TensorSpec("embedding", ("batch", 24), "float32"),)
        assert graph.parity is not None
        assert {row.batch for row in graph.parity.rows} == {1, 2, 3}
        assert graph.parity.worst("embedding").error < 1e-5
    assert (tmp_path / "clip" / "tokenizer.json").is_file()
    weights = (tmp_path / "clip" / "weights.data").stat().st_size
    model = clip_weights.load(variant, "random:3").model
    assert weights < 4.2 * sum(parameter.numel() for parameter in model.parameters())  # each tower's weights stored once


def test_a_model_with_a_bias_keeps_it() -> None:
    prepared = clip.prepare("toy-custom", "random:0", THREE)
    assert prepared.settings["logit_bias"] == -10.0
    assert prepared.settings["logit_scale"] == pytest.approx(1 / 0.07)
    judged(graphs(prepared)["text"])
    assert clip.prepare("toy-vit", "random:0", THREE).settings["logit_bias"] == 0


def test_branches_of_a_block_become_one_convolution() -> None:
    """MobileCLIP's image tower; the gate compares it with the official module, whose branches are apart."""
    graph = graphs(clip.prepare("toy-mobile", "random:0", THREE))["image"]
    judged(graph)
    official = clip_weights.load("toy-mobile", "random:0").model.visual
    counts = [sum(isinstance(each, torch.nn.BatchNorm2d) for each in module.modules()) for module in (official, graph.module)]
    assert counts[0] > 40 and counts[1] < counts[0] / 3


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    """A folder as the hub has it, of a model with a sigmoid loss and a tokenizer of its own."""
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words.train_from_iterator(["this is a photo of dog"], trainers.WordPieceTrainer(vocab_size=40, special_tokens=special))
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    folder = tmp_path / "siglip"
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(str(folder))
    safetensors.torch.save_file(
        clip_weights.seeded(partial(clip_weights.build, "toy-siglip"), 7).state_dict(), folder / "open_clip_model.safetensors"
    )
    recipe = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIGLIP, "preprocess_cfg": recipe}))
    return folder


@pytest.mark.parametrize("file", ["", "open_clip_model.safetensors"])
def test_a_model_of_sigmoids_brings_its_rule_and_its_tokenizer(siglip: Path, file: str) -> None:
    prepared = clip.prepare("toy-siglip", str(siglip / file), THREE)
    settings = prepared.settings
    assert (settings["rule"], settings["threshold"], settings["logit_bias"]) == ("sigmoid", 0.1, -10.0)
    assert (settings["templates"], settings["backgrounds"]) == (["This is a photo of {}."], [])
    assert (settings["context_length"], settings["pad"], settings["end"]) == (12, 0, 1)
    official = open_clip.get_tokenizer(f"local-dir:{siglip}")
    assert prepared.tokenizer is not None
    assert prepared.tokenizer.encode("This is a Photo of dog!").ids == official(["This is a Photo of dog!"])[0].tolist()
    for graph in graphs(prepared).values():
        judged(graph)


def test_a_tokenizer_that_is_not_there_is_refused_with_the_way_out(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which reads the environment once
    (siglip / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer\.json: its tokenizer cannot be loaded"):
        clip.prepare("toy-siglip", str(siglip), THREE)
    (siglip / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="--variant toy-siglip: its tokenizer cannot be loaded") as caught:
        clip.prepare("toy-siglip", str(siglip), THREE)
    assert "put tokenizer.json and open_clip_config.json beside the weights" in caught.value.hint


@pytest.mark.parametrize("name", ["image", "text"])
def test_the_gate_sees_swapped_rows(name: str) -> None:
    graph = graphs(clip.prepare("toy-vit", "random:0", THREE))[name]
    judged(graph)
    with pytest.raises(ParityError, match="row 0 of batch 2"):
        judged(graph, lambda rows: rows[::-1])


def test_the_gate_sees_another_mean_order_of_colors_and_activation() -> None:
    prepared = clip.prepare("toy-vit", "random:0", THREE)
    graph = graphs(prepared)["image"]
    model = graph.module.model
    mean, std = prepared.preprocess.mean, prepared.preprocess.std
    gelu = clip_weights.build("toy-vit", quick_gelu=True)
    gelu.load_state_dict(model.state_dict())
    for wrong in (
        clip.ImageTower(model, (124.0, 117.0, 104.0), std),  # a mean rounded to whole numbers
        clip.ImageTower(model, mean[::-1], std),
        clip.ImageTower(gelu, mean, std),
    ):
        with pytest.raises(ParityError, match="against reference"):
            judged(replace(graph, module=wrong))


def test_settings_are_complete_and_documented() -> None:
    settings = clip.prepare("toy-vit", "random:0", THREE).settings
    assert settings["logit_scale"] == pytest.approx(100)
    assert (settings["pad"], settings["start"], settings["end"], settings["context_length"]) == (0, 49406, 49407, 77)
    assert len(set(settings["backgrounds"])) == 25
    assert clip.__doc__ is not None
    for name in (*settings, *clip.prepare("mini", "random:0", THREE).settings):
        assert f"``{name}``" in clip.__doc__


def test_mini_is_the_same_family(tmp_path: Path) -> None:
    prepared = clip.prepare("mini", "random:0", THREE)
    assert (prepared.variant, prepared.preprocess.canvases) == ("mini", ((96, 96),))
    assert prepared.settings["context_length"] == 16
    judged(graphs(prepared)["image"])
    path = tmp_path / "clip.safetensors"
    state = {name: value.half() for name, value in graphs(prepared)["image"].module.model.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata={"results": '{"softmax_threshold": 0.42}'})
    assert clip.prepare("mini", str(path), THREE).settings["threshold"] == 0.42
    with pytest.raises(WeightsError, match="no such file"):
        clip.prepare("mini", str(tmp_path / "none"), THREE)


@pytest.mark.parametrize(
    ("results", "rule", "threshold"),
    [
        ({}, "softmax", 0.3),
        ({"softmax_threshold": 0.42}, "softmax", 0.42),
        ({"softmax_macro_f1": 0.8, "softmax_threshold": 0.4, "pair_macro_f1": 0.9, "pair_threshold": 0.6}, "background", 0.6),
        ({"softmax_macro_f1": 0.9, "softmax_threshold": 0.4, "pair_macro_f1": 0.8, "pair_threshold": 0.6}, "softmax", 0.4),
    ],
)
def test_mini_weights_bring_the_better_rule_and_its_threshold(
    tmp_path: Path, results: dict[str, float], rule: str, threshold: float
) -> None:
    path = tmp_path / "clip.safetensors"
    state = graphs(clip.prepare("mini", "random:0", THREE))["image"].module.model.state_dict()
    safetensors.torch.save_file(state, path, metadata={"results": json.dumps(results)})
    settings = clip.prepare("mini", str(path), THREE).settings
    assert (settings["rule"], settings["threshold"]) == (rule, threshold)


def test_the_settings_of_mini_are_what_its_training_measured_with() -> None:
    settings = clip.prepare("mini", "random:0", THREE).settings
    tokenizer = clip.prepare("mini", "random:0", THREE).tokenizer
    ids = [tokenizer.token_to_id(name) for name in ("<|startoftext|>", "<|endoftext|>")]
    assert [settings["pad"], settings["start"], settings["end"]] == [0, *ids] and len({0, *ids}) == 3
    assert (settings["views"], settings["rule"], settings["threshold"]) == ([1, 2, 3], "softmax", 0.3)
    assert settings["templates"] == ["a clean origami {}.", "a photo of a {}.", "{}"]


def test_defaults_are_those_of_clip_es() -> None:
    """arXiv:2212.09506: one prompt, for classes and backgrounds alike. Views and threshold are ours."""
    settings = clip.prepare("toy-vit", "random:0", THREE).settings
    assert settings["templates"] == ["a clean origami {}."]
    assert (settings["views"], settings["rule"], settings["threshold"]) == ([1, 2], "softmax", 0.3)
    assert [clip.FAMILY.official(variant) for variant in ("mini", "ViT-B-16")] == ["mini", "openai"]


@pytest.mark.parametrize(("name", "change"), [("image", 1e-4), ("text", 1e-4)])
def test_the_gate_sees_an_embedding_that_is_not_of_unit_length(name: str, change: float) -> None:
    graph = graphs(clip.prepare("toy-vit", "random:0", THREE))[name]
    with pytest.raises(ParityError):
        judged(graph, lambda rows: rows * (1 + change))
    with pytest.raises(ParityError):
        judged(graph.at("fp16"), lambda rows: rows * 1.04)


def test_prompts_of_the_text_sample_reach_from_one_word_to_beyond_the_context() -> None:
    prepared = clip.prepare("toy-vit", "random:0", THREE)
    tokens = graphs(prepared)["text"].sample(3, 0)["tokens"]
    used = (tokens != 0).sum(axis=1)
    assert used[0] < 12 and used[1] == tokens.shape[1] and 0 < used[2] < 16


@pytest.mark.parametrize("variant", ["toy-vit", "mini"])
def test_seeds_repeat_and_differ(variant: str) -> None:
    prepared = [clip.prepare(variant, f"random:{seed}", THREE) for seed in (1, 1, 2)]
    one, again, other = (graphs(each)["image"].module.model.state_dict() for each in prepared)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    hashes = [each.weights["sha256"] for each in prepared]
    assert hashes[0] == hashes[1] != hashes[2]


def test_random_mini_weights_have_the_spread_of_trained_ones() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain = build_clip_mini().state_dict()
    spread_out = graphs(clip.prepare("mini", "random:1", THREE))["image"].module.model.state_dict()
    assert any(not torch.equal(plain[name], spread_out[name]) for name in plain)


def test_batches_shrink_with_the_cost_of_the_tower() -> None:
    made = graphs(clip.prepare("toy-vit", "random:0", Options()))
    assert made["image"].axes["batch"] == AxisRange(1, 16, 64) and made["text"].axes["batch"] == AxisRange(1, 32, 64)
    made = graphs(clip.prepare("toy-vit", "random:0", THREE))
    assert made["image"].axes == made["text"].axes == {"batch": THREE.batch}


@pytest.mark.parametrize(("variant", "most"), [("ViT-B-16", 64), ("ViT-L-14", 16), ("ViT-L-14-336", 8)])
def test_official_towers_take_fewer_images_the_costlier_they_are(variant: str, most: int) -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(variant))
    assert clip.image_batch(model).max == most


def test_the_image_size_cannot_be_changed() -> None:
    with pytest.raises(UsageError, match="48x48"):
        clip.prepare("toy-vit", "random:0", Options(sizes=((224, 224),)))
    assert clip.prepare("toy-vit", "random:0", Options(sizes=((48, 48),))).preprocess.canvases == ((48, 48),)


# ---- names and what goes with weights ----


@pytest.mark.parametrize(
    ("typed", "known"), [("ViT-B-16", "ViT-B-16"), ("ViT-B/16", "ViT-B-16"), ("vit-l/14@336", "ViT-L-14-336"), ("rn50", "RN50")]
)
def test_variants_are_open_clips_names(typed: str, known: str) -> None:
    assert clip_weights.known_variant(typed) == known


def test_an_unknown_variant_lists_the_closest() -> None:
    with pytest.raises(UsageError) as caught:
        clip.prepare("ViT-B-17", "random:0", THREE)
    assert "ViT-B-16" in caught.value.hint


@pytest.mark.parametrize(
    ("variant", "tag", "quick_gelu", "red"),
    [
        ("ViT-B-16", "", False, 0.48145466),
        ("ViT-B-16", "openai", True, 0.48145466),
        ("ViT-B-16-quickgelu", "", True, 0.48145466),
        ("ViT-B-16", "laion2b_s34b_b88k", False, 0.48145466),
        ("ViT-L-14-CLIPA", "", False, 0.485),
        ("ViT-B-16-SigLIP", "", False, 0.5),
    ],
)
def test_the_table_of_tags_says_what_shapes_do_not(variant: str, tag: str, quick_gelu: bool, red: float) -> None:
    recipe = clip_weights.recipe_of(variant, clip_weights.get_pretrained_cfg(variant, tag))
    assert (recipe.quick_gelu, recipe.mean[0]) == (quick_gelu, red)


# ---- checkpoints ----


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A folder as the hub has it, of a model with QuickGELU and a mean of its own."""
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.manual_seed(5)
    model = open_clip.create_model("toy-vit", force_quick_gelu=True, load_weights=False)
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": {**TOYS["toy-vit"], "text_cfg": TEXT, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.1], "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("file", ["", "open_clip_model.safetensors"])
def test_an_official_folder_computes_what_open_clip_makes_of_it(official: Path, file: str) -> None:
    prepared = clip.prepare("toy-vit", str(official / file), THREE)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{official}")
    theirs.eval()
    assert prepared.preprocess.mean == pytest.approx((102.0, 127.5, 153.0))
    image = graphs(prepared)["image"]
    pixels = image.sample(1, 0)["pixels"]
    from PIL import Image

    with torch.no_grad():
        want = theirs.encode_image(preprocess(Image.fromarray(pixels[0]))[None], normalize=True)
        got = image.module(torch.from_numpy(pixels))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    judged(image)


def test_a_tag_of_openai_forces_quickgelu(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = {"hf_hub": "timm/toy.openai/", "quick_gelu": True, "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)}
    monkeypatch.setattr(clip_weights, "get_pretrained_cfg", lambda variant, name: tag if name == "openai" else {})
    monkeypatch.setattr(clip_weights, "_download", lambda *_: (official / "open_clip_model.safetensors", "no"))
    loaded = clip_weights.load("toy-vit", "openai")
    assert loaded.recipe.quick_gelu
    assert type(loaded.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"  # type: ignore[union-attr, index]
    assert loaded.record["source"] == "openai"
    assert loaded.record["pinned"] == "no"


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state}])
def test_training_checkpoints_are_read(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    model = clip_weights.seeded(partial(clip_weights.build, "toy-vit"), 4)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.logit_scale"] = state["module.logit_scale"].reshape(1)
    torch.save(wrap(state), tmp_path / "epoch_3.pt")
    loaded = clip_weights.load("toy-vit", str(tmp_path / "epoch_3.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: without(state, "visual.proj"), "1 missing (visual.proj)"),
        (lambda state: {**state, "extra.weight": torch.zeros(1)}, "1 surplus (extra.weight)"),
        (lambda state: {**without(state, "visual.proj"), "module.visual.proj": state["visual.proj"]}, "1 missing (visual.proj)"),
        (lambda state: {**state, "visual.proj": torch.zeros(64, 25)}, "visual.proj (64, 25) instead of (64, 24)"),
        (lambda state: {"vision_model.embeddings.class_embedding": torch.zeros(8)}, "format of transformers' CLIPModel"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(tmp_path: Path, spoil: Callable[[Any], Any], message: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(spoil(clip_weights.build("toy-vit").state_dict()), path)
    with pytest.raises(WeightsError) as caught:
        clip.prepare("toy-vit", str(path), THREE)
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_weights_of_another_architecture_are_refused(official: Path) -> None:
    with pytest.raises(WeightsError, match=r"not a toy-resnet: vision_cfg.image_size 48 instead of 64"):
        clip.prepare("toy-resnet", str(official), THREE)
    (official / "open_clip_config.json").unlink()
    with pytest.raises(WeightsError, match="not a checkpoint of CLIP toy-resnet"):
        clip.prepare("toy-resnet", str(official), THREE)


def test_damaged_files_are_refused(official: Path, tmp_path: Path) -> None:
    whole = (official / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:300])
    (tmp_path / "text.pt").write_text("not weights")
    for name in ("cut.safetensors", "cut.pt", "text.pt"):
        with pytest.raises(WeightsError, match=name):
            clip.prepare("toy-vit", str(tmp_path / name), THREE)
    (official / "open_clip_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"open_clip_config\.json"):
        clip.prepare("toy-vit", str(official), THREE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="found nothing"):
        clip.prepare("toy-vit", str(tmp_path / "empty"), THREE)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("model_cfg", None, "_cfg"),
        ("model_cfg", {"vision_cfg": 0.5}, "_cfg"),
        ("model_cfg", {"quick_gelu": "no"}, "quick_gelu: expected true or false"),
        ("preprocess_cfg", [], "_cfg"),
        ("preprocess_cfg", {"mean": 0.5}, "mean"),
        ("preprocess_cfg", {"mean": [0.5, 0.5]}, "mean"),
        ("preprocess_cfg", {"mean": [123.7, 116.3, 103.5]}, "mean: expected three numbers in 0..1"),
        ("preprocess_cfg", {"std": [0.2, 0.2, 0]}, "std: expected three numbers in 0.001..1"),
        ("preprocess_cfg", {"std": [0.2, 0.2, "0.2"]}, "std"),
        ("preprocess_cfg", {"interpolation": "nearest"}, "interpolation: expected bicubic, bilinear or random"),
    ],
)
def test_a_config_that_says_nonsense_is_refused(official: Path, part: str, value: object, message: str) -> None:
    """Its mean, as Inf or on another scale, would be exported; its words were read as true."""
    path = official / "open_clip_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, part: value}))
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        clip.prepare("toy-vit", str(official), THREE)
    assert "open_clip_config.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(WeightsError, match="would run the code") as caught:
        clip_weights.load_checkpoint(clip_weights.build("toy-vit"), tmp_path / "ViT-B-16.pt", variant="ViT-B-16")
    assert "timm/vit_base_patch16_clip_224.openai" in caught.value.hint


def test_an_unknown_name_lists_the_tags() -> None:
    with pytest.raises(WeightsError) as caught:
        clip.prepare("ViT-B-16", "nowhere", THREE)
    assert "openai, " in caught.value.hint
    assert "laion2b_s34b_b88k" in caught.value.hint


def test_offline_names_the_file_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(address: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(clip_weights, "_check_network", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(
        WeightsError, match=r"open_clip_model\.safetensors of timm/vit_base_patch16_clip_224\.openai.*no network"
    ) as caught:
        clip.prepare("ViT-B-16", "openai", THREE)
    assert "--variant ViT-B-16 --weights FOLDER" in caught.value.hint


# ---- full size ----


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ViT-B-16", "ViT-L-14-336"])
def test_full_size_passes_the_gate(variant: str, tmp_path: Path) -> None:
    manifest = exporting.export_model(
        clip.FAMILY, variant=variant, weights="random:0", bundle=tmp_path, options=Options(), log=print
    )
    assert all(graph.parity is not None for graph in manifest.graphs.values())


@pytest.mark.slow
def test_real_photographs_in_mixed_batches(tmp_path: Path, photographs: list[Path]) -> None:
    measured = measure("ViT-B-16", "random:0", photographs[:20], tmp_path, batch=8)
    assert measured["photographs"] == 20
    assert measured["worst_cosine"]["image"] >= 0.99999
    assert measured["worst_cosine"]["text"] >= 0.99999


def test_feeds_differ_in_every_row() -> None:
    for graph in graphs(clip.prepare("toy-vit", "random:0", THREE)).values():
        feeds: Feeds = graph.sample(3, 1)
        rows = next(iter(feeds.values()))
        assert len({row.tobytes() for row in rows}) == 3
        assert graph.take(feeds, [2, 0])[graph.inputs[0].name].tobytes() == rows[[2, 0]].tobytes()
