"""First weights: all of a network or all of its encoder, never half of it, and never of other classes unasked."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from wsss.errors import UsageError, WeightsError
from wsss.spec import sha256_of
from wsss.train.args import Config, config_from
from wsss.train.checkpoint import BEST, RunRecord, write_record, write_tensors
from wsss.train.model import Segmenter, build_segmenter
from wsss.train.weights import _from_run, load_initial, read_weights

CLASSES = ("dog", "cat")
OPTIONS = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}


def config(init: str, **model: Any) -> Config:
    told = {"architecture": "unet", "encoder": "mobilenet_v2", "options": OPTIONS, "init": init, **model}
    loss = {"kind": "masks"} if told["architecture"] == "eomt" else {}
    return config_from({"model": told, "loss": loss, "machine": {"device": "cpu"}})


def unet(classes: int = 3, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return build_segmenter("unet", "mobilenet_v2", OPTIONS, classes)


def given(segmenter: Segmenter, part: str = "") -> dict[str, Tensor]:
    """The network's tensors below a prefix, the prefix off."""
    return {name.removeprefix(part): value for name, value in segmenter.network.state_dict().items() if name.startswith(part)}


def equal(first: Segmenter, second: Segmenter, part: str = "") -> bool:
    return all(torch.equal(value, given(second, part)[name]) for name, value in given(first, part).items())


def test_none_leaves_the_seeds_weights() -> None:
    segmenter = unet()
    report = load_initial(segmenter, config("none"), CLASSES)
    assert equal(segmenter, unet())
    assert (report.source, report.loaded, str(report)) == ("none", 0, "random weights")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "network."])
def test_a_file_of_the_whole_network(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    source, segmenter = unet(seed=1), unet()
    tensors = {prefix + name: value for name, value in given(source).items()}
    torch.save({"state_dict": tensors, "epoch": 3} if wrapped else tensors, tmp_path / "all.pth")
    report = load_initial(segmenter, config(str(tmp_path / "all.pth")), CLASSES)
    assert equal(segmenter, source)
    assert (report.loaded, report.random, report.unused) == (len(tensors), (), ())
    assert report.sha256 == sha256_of(tmp_path / "all.pth")


def test_a_file_of_the_encoder_leaves_the_rest_random(tmp_path: Path) -> None:
    """As torchvision names a MobileNetV2's tensors, and with a classifier that has no place."""
    source, segmenter = unet(seed=1), unet()
    save_file({**given(source, "encoder."), "classifier.1.weight": torch.zeros(10, 5)}, tmp_path / "encoder.safetensors")
    report = load_initial(segmenter, config(str(tmp_path / "encoder.safetensors")), CLASSES)
    assert equal(segmenter, source, "encoder.")
    assert equal(segmenter, unet(), "decoder.")
    assert all(name.startswith(("decoder.", "segmentation_head.")) for name in report.random) and report.random
    assert len(report.unused) == 1 and "classifier.1.weight" in report.unused[0]
    assert "stay random (from decoder" in str(report)


@pytest.mark.parametrize("lost", ["encoder.features.0.0.weight", "decoder.blocks.0.conv1.0.weight"])
def test_half_of_a_network_is_refused(tmp_path: Path, lost: str) -> None:
    tensors = given(unet())
    del tensors[lost]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(WeightsError, match="neither all of it nor its encoder; missing " + lost.replace(".", r"\.")):
        load_initial(unet(), config(str(tmp_path / "half.safetensors")), CLASSES)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"fills 0 of the network's \d+ tensors(.|\n)*it has .*layer\.weight"):
        load_initial(unet(), config(str(tmp_path / "other.safetensors")), CLASSES)


def test_other_classes_only_when_asked_for(tmp_path: Path) -> None:
    source = unet(classes=9, seed=1)
    save_file(given(source), tmp_path / "nine.safetensors")
    with pytest.raises(WeightsError, match=r"segmentation_head\.0\.(weight|bias) is \(9.*\), 3 labels need") as caught:
        load_initial(unet(), config(str(tmp_path / "nine.safetensors")), CLASSES)
    assert "model.new_head=true" in caught.value.hint
    segmenter = unet()
    report = load_initial(segmenter, config(str(tmp_path / "nine.safetensors"), new_head=True), CLASSES)
    assert sorted(report.random) == ["segmentation_head.0.bias", "segmentation_head.0.weight"]
    assert equal(segmenter, source, "decoder.") and equal(segmenter, unet(), "segmentation_head.")


def test_another_width_is_not_another_class_list(tmp_path: Path) -> None:
    wide = build_segmenter("unet", "mobilenet_v2", {**OPTIONS, "decoder_channels": [32, 8, 8]}, 3)
    save_file(given(wide), tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match="is .* need") as caught:
        load_initial(unet(), config(str(tmp_path / "wide.safetensors"), new_head=True), CLASSES)
    assert "another architecture" in caught.value.hint


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pickled_code_ran",)


def test_pickled_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    torch.save({"state_dict": Evil()}, "zip.pth")
    for name in ("evil.pth", "zip.pth"):
        with pytest.raises(WeightsError, match=rf"--init {name}: holds more than tensors: \w+\.system\n") as caught:
            read_weights(Path(name))
        assert "safetensors" in caught.value.hint and "weights_only" not in str(caught.value)
    assert not Path("pickled_code_ran").exists()


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no\.pth: no such file"):
        read_weights(tmp_path / "no.pth")
    for name in ("text.safetensors", "text.pth", "empty.pth"):
        (tmp_path / name).write_text("" if "empty" in name else "hello")
        with pytest.raises(WeightsError, match="not a readable file of weights: |damaged: its header"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "state.pth")
    with pytest.raises(WeightsError, match="no tensors in it"):
        read_weights(tmp_path / "state.pth")


# ---- published weights, without the web ----


def test_a_folder_in_the_hubs_format(tmp_path: Path) -> None:
    """An image classifier of the same encoder, as nvidia/mit-b2 is one."""
    from transformers import SegformerConfig, SegformerForImageClassification

    options = {
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 16,
        "hidden_sizes": [8, 16, 16, 32],
        "num_attention_heads": [1, 2, 2, 4],
    }
    torch.manual_seed(1)
    classifier = SegformerForImageClassification(SegformerConfig(**options, num_labels=7))
    classifier.save_pretrained(tmp_path / "mit")
    segmenter = build_segmenter("segformer", "b0", options, 3)
    told = config(str(tmp_path / "mit"), architecture="segformer", encoder="b0", options=options)
    report = load_initial(segmenter, told, CLASSES)
    assert equal(segmenter, Segmenter(classifier, classes=3, multiple_of=1, outputs_of=None, logits_of=None), "segformer.")  # type: ignore[arg-type]
    assert report.random and all(name.startswith("decode_head.") for name in report.random)
    assert report.unused == ("classifier.bias", "classifier.weight")


def test_a_mask2former_of_other_classes(tmp_path: Path) -> None:
    from .test_model import SHAPES

    encoder, options = SHAPES["mask2former"]
    torch.manual_seed(1)
    source = build_segmenter("mask2former", encoder, options, 9)
    source.network.save_pretrained(tmp_path / "panoptic")
    told = {"architecture": "mask2former", "encoder": encoder, "options": options, "init": str(tmp_path / "panoptic")}
    refusing = config_from({"model": told, "loss": {"kind": "masks"}})
    taking = config_from({"model": {**told, "new_head": True}, "loss": {"kind": "masks"}})
    segmenter = build_segmenter("mask2former", encoder, options, 3)
    with pytest.raises(WeightsError, match=r"class_predictor\.weight is \(10, 32\), 3 labels need \(4, 32\)"):
        load_initial(segmenter, refusing, CLASSES)
    report = load_initial(segmenter, taking, CLASSES)
    assert {name.rpartition(".")[0] for name in report.random} == {"class_predictor", "criterion"}
    assert equal(segmenter, source, "model.")


def test_a_run_of_as_many_other_classes_gives_all_but_their_layers(tmp_path: Path) -> None:
    """A network that predicts masks has one label more, for no object."""
    about: dict[str, Any] = {"options": {}, "mean": (1, 1, 1), "std": (1, 1, 1), "crop": 32, "multiple_of": 32, "steps": 1}
    about |= {"preset": "", "source": "a test", "init": {}, "store": "", "images": 1, "tools": {}}
    write_record(tmp_path, RunRecord(architecture="mask2former", encoder="swin-tiny", classes=("bird", "cow"), **about))
    rows = {"body.weight": 7, "class_predictor.weight": 4, "head.weight": 3}
    tensors = {name: torch.zeros(count, 5) for name, count in rows.items()} | {"steps": torch.tensor(1)}
    write_tensors(tmp_path / BEST, tensors, {"step": 1, "miou": 0.5})
    model = {"architecture": "mask2former", "encoder": "swin-tiny", "new_head": True}
    taking = config_from({"model": model, "loss": {"kind": "masks"}})
    assert sorted(_from_run(tmp_path, taking, CLASSES)[0]) == ["body.weight", "steps"]
    assert sorted(_from_run(tmp_path, taking, ("bird", "cow"))[0]) == sorted(tensors)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both libraries say it in their own ways; the user is told what works offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    told = config("hub:nvidia/mit-b0", architecture="segformer", encoder="b0", options={"depths": [1, 1, 1, 1]})
    with pytest.raises(WeightsError, match="hub:nvidia/mit-b0: cannot be loaded") as caught:
        load_initial(build_segmenter("segformer", "b0", {"depths": [1, 1, 1, 1]}, 3), told, CLASSES)
    assert "offline" in caught.value.hint
    with pytest.raises(WeightsError, match="hub:imagenet: the weights of resnet18 cannot be downloaded") as caught:
        load_initial(unet(), config("hub:imagenet", encoder="resnet18"), CLASSES)
    assert "offline" in caught.value.hint
    with pytest.raises(WeightsError, match="hub:imaginet: the weights of resnet18 cannot be downloaded"):
        load_initial(unet(), config("hub:imaginet", encoder="resnet18"), CLASSES)


@pytest.mark.parametrize("architecture", ["vit", "eomt"])
def test_timm_resamples_to_the_patches_and_image_of_the_network(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2's patches have 14 pixels; EoMT's have 16, and their positions are those of its crop."""
    options = {"depth": 4, "embed_dim": 48, "num_heads": 3, "patch_size": 16, "img_size": 64}
    encoder = "vit_small_patch14_dinov2"
    segmenter = build_segmenter(architecture, encoder, options, 3)
    create, asked = timm.create_model, {}

    def published(name: str, **arguments: Any) -> Any:
        asked.update(arguments, name=name)
        assert arguments.pop("pretrained")
        return create(encoder, pretrained=False, **{**options, **arguments})

    monkeypatch.setattr("timm.create_model", published)
    report = load_initial(segmenter, config("hub:lvd142m", **_masks(architecture, encoder, options)), CLASSES)
    assert (asked["name"], asked["patch_size"], asked["img_size"]) == (f"{encoder}.lvd142m", (16, 16), (64, 64))
    assert all(not name.startswith("encoder.") for name in report.random) and not report.unused


def test_the_official_files_of_eomt(tmp_path: Path) -> None:
    """Those with DINOv2: a state dict of the training, with buffers that the network does not have."""
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 64, "queries": 5, "blocks": 2}
    encoder = "vit_small_patch14_reg4_dinov2"
    source, segmenter = (build_segmenter("eomt", encoder, options, classes) for classes in (150, 3))
    tensors = {f"network.{name.replace('encoder.', 'encoder.backbone.')}": value for name, value in given(source).items()}
    rest = {"network.attn_mask_probs": torch.zeros(2), "criterion.empty_weight": torch.ones(151)}
    torch.save({**tensors, **rest}, tmp_path / "pytorch_model.bin")
    told = config(str(tmp_path / "pytorch_model.bin"), new_head=True, **_masks("eomt", encoder, options))
    report = load_initial(segmenter, told, CLASSES)
    assert report.random == ("class_head.weight", "class_head.bias") and len(report.unused) == 2
    assert equal(segmenter, source, "encoder.") and equal(segmenter, source, "mask_head.") and equal(segmenter, source, "q.")


def _masks(architecture: str, encoder: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"architecture": architecture, "encoder": encoder, "options": options}


def test_published_weights_want_their_normalization(monkeypatch: pytest.MonkeyPatch) -> None:
    from segmentation_models_pytorch import encoders

    source = unet(seed=1)
    published = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    monkeypatch.setattr(encoders, "get_preprocessing_params", lambda name, weights: published)
    monkeypatch.setattr(encoders, "get_encoder", lambda name, weights: source.network.encoder)
    load_initial(unet(), config("hub:imagenet"), CLASSES)
    wrong = config_from({"model": {**vars(config("hub:imagenet").model)}, "data": {"mean": [127.5, 127.5, 127.5]}})
    with pytest.raises(UsageError, match=r"data\.mean: mobilenet_v2 with imagenet needs \[123\.67"):
        load_initial(unet(), wrong, CLASSES)
