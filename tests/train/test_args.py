"""Settings: presets, files and flags add up in order, and every mistake is named as it was typed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from wsss.errors import UsageError
from wsss.train.args import Config, config_from, deciding, read_config, typed
from wsss.train.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_configuration_with_its_source(name: str) -> None:
    config = config_from(preset(name))
    assert config.preset == name
    assert len(config.source) > 40
    assert json.loads(json.dumps(deciding(config)))["optimizer"]["steps"] == config.optimizer.steps


def test_the_published_numbers() -> None:
    """deeplab-pytorch's configs/voc12.yaml and SegFormer's section 4.1, read by hand."""
    deeplab = config_from(preset("deeplabv2-voc"))
    assert (deeplab.data.crop, deeplab.data.batch, deeplab.data.scale) == (321, 10, (0.5, 1.5))
    assert (deeplab.optimizer.steps, deeplab.optimizer.rate, deeplab.optimizer.weight_decay) == (20_000, 2.5e-4, 5e-4)
    assert config_from(preset("deeplabv2-coco")).optimizer.steps == 100_000
    segformer = config_from(preset("segformer")).optimizer
    assert (segformer.rate, segformer.head_factor, segformer.power, segformer.warm_up) == (6e-5, 10, 1.0, 1500)


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        "seed = 5\n[data]\ncrop = 96\nbatch = 6\n[model.options]\nencoder_depth = 3\nactivation = 'none'\n"
    )
    config = config_from(
        preset("mini"), read_config(tmp_path / "mine.toml"), typed("data.batch=2"), typed("model.encoder=resnet34")
    )
    assert (config.seed, config.data.crop, config.data.batch, config.model.encoder) == (5, 96, 2, "resnet34")
    assert config.optimizer == config_from(preset("mini")).optimizer
    assert config.model.options == {"encoder_depth": 3, "activation": "none", "decoder_channels": [64, 48, 32, 16]}


def test_what_decides_the_weights_leaves_the_machine_out() -> None:
    first, second = config_from(typed("machine.workers=1")), config_from(typed("machine.workers=7"))
    assert deciding(first) == deciding(second)
    assert set(deciding(first)) == {field.name for field in dataclasses.fields(Config)} - {"machine"}


@pytest.mark.parametrize(
    ("assignment", "said", "hint"),
    [
        ("data.corp=3", "there is no setting data.corp", "did you mean data.crop?"),
        ("dta.crop=3", "there is no setting dta", "did you mean data?"),
        ("data=3", "data: expected a table", ""),
        ("data.crop=big", "data.crop: expected a whole number, got 'big'", ""),
        ("data.crop=true", "data.crop: expected a whole number, got True", ""),
        ("data.crop=8", "data.crop: expected at least 16, got 8", ""),
        ("data.shorter_px=-1", "data.shorter_px: expected at least 0, got -1", ""),
        ("data.largest_share=1.5", "data.largest_share: expected 0.1 to 1, got 1.5", ""),
        ("data.flip=1.5", "data.flip: expected 0 to 1, got 1.5", ""),
        ("data.flip=nan", "data.flip: expected a number, got nan", ""),
        ("data.scale=2", "data.scale: expected 2 numbers", ""),
        ("data.scale=[2, 1]", "data.scale: expected [smallest, largest]", ""),
        ("data.jitter=[0, 0, 0, 0.6]", "data.jitter: expected four numbers", ""),
        ("loss.kind=dice", "loss.kind: expected one of cross-entropy, bootstrapped, symmetric, masks, got 'dice'", ""),
        (
            "loss.kind=masks",
            "loss.kind: expected cross-entropy, bootstrapped or symmetric for deeplabv3plus",
            "--set loss.kind=cross-entropy",
        ),
        ("model.architecture=mask2former", "loss.kind: expected masks for mask2former", "--set loss.kind=masks"),
        ("model.options=3", "model.options: expected a table", ""),
        ("optimizer.warm_up=20000", "optimizer.warm_up: expected less than 20000 steps, got 20000", "lower it"),
        ("optimizer.rate=0", "optimizer.rate: expected", ""),
        ("data.crop", "--set data.crop: expected TABLE.KEY=VALUE", "--set data.crop=321"),
        ("data.crop=321\nseed = 3", "data.crop: expected a whole number", "--set data.crop=8"),
        ("data.crop=" + "[" * 20_000, "data.crop: expected a whole number, got '[[[", ""),
        ("a." * 20_000 + "b=1", "expected TABLE.KEY, got 20001 parts", "--set data.crop=321"),
        ("data.crop.a.b=1", "data.crop: expected a whole number, got {'a': {'b': 1}}", ""),
        ("optimizer.rate=1" + "0" * 400, "optimizer.rate: expected a number of at most 64 bits", ""),
        ("seed=1" + "0" * 30, "seed: expected a whole number of at most 64 bits", ""),
        ("model.options.depth=1979-05-27", "model.options.depth: expected a string, numbers", ""),
        ("model.options.depth=nan", "model.options.depth: expected a string, numbers", ""),
        ("model.options.depth=[1, 1979-05-27]", "model.options.depth: expected a string, numbers", ""),
        ("model.options.depth=[[[[1]]]]", "model.options.depth: expected a string, numbers", ""),
        ("model.encoder=[1]", "model.encoder: expected a string, got [1]", "--set model.encoder=TEXT"),
        ("loss.kind=[1]", "loss.kind: expected one of", "--set loss.kind=cross-entropy"),
    ],
)
def test_a_wrong_setting_is_named(assignment: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_from(typed(assignment))
    assert said in caught.value.message
    assert len(caught.value.message) < 300
    assert caught.value.hint and hint in caught.value.hint


def test_a_preset_or_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--preset: expected one of deeplabv2-voc, .*, mini, got 'minni'"):
        preset("minni")
    (tmp_path / "bad.toml").write_text("[data")
    with pytest.raises(UsageError, match=r"--config .*bad\.toml: expected TOML"):
        read_config(tmp_path / "bad.toml")
    with pytest.raises(UsageError, match="none.toml: cannot be read: No such file"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "deep.toml").write_text("[data]\ncrop" + ".a" * 20_000 + " = 1")
    with pytest.raises(UsageError, match="data.crop: expected a whole number, got {'a': {'a'"):
        config_from(read_config(tmp_path / "deep.toml"))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[data]\ncrop = 64")
    assert config_from(read_config(tmp_path / "bom.toml")).data.crop == 64
