"""Settings: presets, files and flags add up in order, and every mistake is named as it was typed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from wsss.errors import UsageError, WsssError
from wsss.train.args import Config, LossArgs, ModelArgs, config_from, deciding, read_config, typed
from wsss.train.presets import PRESETS, preset
from wsss.train.source import _check_same


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_configuration_with_its_source(name: str) -> None:
    config = config_from(preset(name))
    assert config.preset == name
    assert len(config.source) > 40
    assert json.loads(json.dumps(deciding(config)))["optimizer"]["steps"] == config.optimizer.steps


def test_the_defaults() -> None:
    """A run that is continued, the documentation and the paper's recipe rest on them."""
    config = config_from()
    assert config.model == ModelArgs(
        architecture="deeplabv3plus",
        encoder="resnet101",
        options={},
        init="none",
        new_head=False,
        batch_norm="train",
        batch_norm_momentum=0.0,
    )
    data = config.data
    assert (data.crop, data.largest_share, data.batch, data.accumulate, data.shorter_px) == (512, 1, 16, 1, 0)
    assert (data.scale, data.scales, data.flip, data.jitter) == ((0.5, 2), (), 0.5, (0, 0, 0, 0))
    assert (data.mean, data.std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert (data.balance, data.sampling_threshold, data.validation_share, data.validation_limit) == ("none", 0.05, 0.05, 500)
    assert config.loss == LossArgs(
        kind="cross-entropy", confidence="off", confidence_floor=0.1, bootstrap=0.8, symmetric=(1.0, 1.0)
    )
    optimizer = config.optimizer
    assert (optimizer.kind, optimizer.steps, optimizer.rate, optimizer.head_factor) == ("sgd", 20_000, 1e-3, 10)
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.schedule, optimizer.power) == (0.9, 1e-4, "poly", 0.9)
    assert (optimizer.head_bias_factor, optimizer.no_decay, optimizer.schedule_every) == (1, "auto", 1)
    assert (optimizer.warm_up, optimizer.clip_norm, optimizer.average, optimizer.precision) == (0, 0, 0, "fp32")
    assert (config.seed, config.validation_steps, config.machine.checkpoint_seconds) == (0, 1000, 180)


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


def test_options_belong_to_the_architecture_of_the_preset() -> None:
    """Another architecture starts without them, wherever it is given; given options hold."""
    base = {"model": {"architecture": "unet", "encoder": "resnet18", "options": {"encoder_depth": 4}}}
    other = config_from(base, typed("model.options.decoder_channels=8"), typed("model.architecture=deeplabv3plus"))
    assert (other.model.encoder, other.model.options) == ("resnet18", {"decoder_channels": 8})
    same = config_from(base, typed("model.options.decoder_channels=8"), typed("model.architecture=unet"))
    assert same.model.options == {"encoder_depth": 4, "decoder_channels": 8}
    assert config_from(base).model.options == {"encoder_depth": 4} and base["model"]["options"] == {"encoder_depth": 4}


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
        ("data.scales=0.5", "data.scales: expected numbers as [a, b, c], got 0.5", "--set data.scales=[0.5, 1.0]"),
        ("data.scales=[0.5, 'x']", "data.scales: expected a number, got 'x'", ""),
        ("data.scales=[0.5, 0]", "data.scales: expected factors above 0 and at most 8, got [0.5, 0.0]", ""),
        ("model.batch_norm=eval", "model.batch_norm: expected one of train, frozen, fixed, sync, got 'eval'", ""),
        ("model.batch_norm=fixed", "model.batch_norm = fixed: random weights have no statistics", "batch_norm=train"),
        ("optimizer.no_decay=bias", "optimizer.no_decay: expected one of auto, none, vectors", ""),
        ("data.jitter=[0, 0, 0, 0.6]", "data.jitter: expected four numbers", ""),
        (
            "loss.kind=dice",
            "loss.kind: expected one of cross-entropy, bootstrapped, symmetric, generalized, hard, masks, got",
            "",
        ),
        (
            "loss.kind=masks",
            "loss.kind: expected cross-entropy, bootstrapped, symmetric, generalized or hard for deeplabv3plus",
            "--set loss.kind=cross-entropy",
        ),
        ("model.architecture=mask2former", "loss.kind: expected masks for mask2former", "--set loss.kind=masks"),
        ("model.architecture=eomt", "loss.kind: expected masks for eomt", "--set loss.kind=masks"),
        ("optimizer.encoder_warm_up=20000", "optimizer.encoder_warm_up: expected less than 20000 steps, got 20000", "lower it"),
        ("loss.teacher=0.9", "loss.teacher: needs a running average of the weights", "optimizer.average=0.999"),
        (
            "optimizer.layer_decay=0.8",
            "optimizer.layer_decay: only vit and eomt have layers one after another, got deeplabv3plus",
            "",
        ),
        ("model.options=3", "model.options: expected a table", ""),
        ("optimizer.warm_up=20000", "optimizer.warm_up: expected less than 20000 steps, got 20000", "lower it"),
        ("optimizer.rate=0", "optimizer.rate: expected", ""),
        ("data.crop", "--set data.crop: expected TABLE.KEY=VALUE", "--set data.crop=321"),
        ("data.crop=321\nseed = 3", "data.crop: expected a whole number", "--set data.crop=8"),
        ("data.crop=" + "[" * 20_000, "data.crop: expected a whole number, got '[[[", ""),
        ("a." * 20_000 + "b=1", "expected TABLE.KEY, got 20001 parts", "--set data.crop=321"),
        ("data.crop.a.b=1", "data.crop: expected a whole number, got {'a': {'b': 1}}", ""),
        ("optimizer.rate=1" + "0" * 400, "optimizer.rate: expected a number of at most 64 bits", ""),
        (f"seed={1 << 63}", "seed: expected a whole number of at most 64 bits", ""),
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


@pytest.mark.parametrize(
    ("key", "lowest", "highest"),
    [
        ("seed", 0, None),
        ("validation_steps", 1, None),
        ("data.crop", 16, None),
        ("data.batch", 1, None),
        ("data.accumulate", 1, None),
        ("data.shorter_px", 0, None),
        ("data.validation_limit", 1, None),
        ("data.flip", 0.0, 1.0),
        ("data.largest_share", 0.1, 1.0),
        ("data.sampling_threshold", 0.0, 1.0),
        ("data.validation_share", 0.0, 0.9),
        ("loss.confidence_floor", 0.0, 1.0),
        ("loss.bootstrap", 0.0, 1.0),
        ("loss.generalized", 0.01, 1.0),
        ("loss.hard", 0.01, 1.0),
        ("loss.region_weight", 0.0, 100.0),
        ("loss.teacher_from", 0, None),
        ("optimizer.steps", 1, None),
        ("model.batch_norm_momentum", 0.0, 1.0),
        ("optimizer.warm_up", 0, 19_999),
        ("optimizer.encoder_warm_up", 0, 19_999),
        ("optimizer.schedule_every", 1, None),
        ("optimizer.head_bias_factor", 1e-6, 1e6),
        ("optimizer.rate", 1e-12, 1e3),
        ("optimizer.head_factor", 1e-6, 1e6),
        ("optimizer.momentum", 0.0, 0.9999),
        ("optimizer.weight_decay", 0.0, 10.0),
        ("optimizer.power", 0.0, 10.0),
        ("optimizer.clip_norm", 0.0, 1e6),
        ("optimizer.average", 0.0, 0.999999),
        ("machine.workers", -1, None),
        ("machine.log_steps", 1, None),
        ("machine.checkpoint_seconds", 0.0, 1e9),
    ],
)
def test_limits_belong_to_a_range_and_what_is_beyond_does_not(key: str, lowest: float, highest: float | None) -> None:
    def beyond(value: float, side: int) -> float:
        return value + side if isinstance(value, int) else math.nextafter(value, side * math.inf)

    config_from(typed(f"{key}={lowest}"))
    with pytest.raises(UsageError, match=key):
        config_from(typed(f"{key}={beyond(lowest, -1)}"))
    if highest is not None:
        config_from(typed(f"{key}={highest}"))
        with pytest.raises(UsageError, match=key):
            config_from(typed(f"{key}={beyond(highest, 1)}"))


def test_limits_of_pairs_and_jitter() -> None:
    for allowed in (
        "data.scale=[0.001, 8.0]",
        "data.scale=[8.0, 8.0]",
        "data.scales=[]",
        "data.scales=[8.0]",
        "data.jitter=[0.0, 0.0, 9.0, 0.5]",
        "loss.symmetric=[0.0, 0.1]",
    ):
        config_from(typed(allowed))
    refused = ["data.scale=[0.0, 1.0]", "data.scale=[1.0, 8.1]", "data.scale=[1.1, 1.0]", "loss.symmetric=[0.0, 0.0]"]
    refused += ["loss.symmetric=[1.0, -0.1]", "data.jitter=[0.0, -0.1, 0.0, 0.0]", "data.jitter=[0.0, 0.0, 0.0, 0.51]"]
    refused += ["data.std=[1.0, 0.0, 1.0]", "data.scales=[8.1]", "data.scales=[1.0, -0.5]"]
    for assignment in refused:
        with pytest.raises(UsageError, match=assignment.partition("=")[0]):
            config_from(typed(assignment))


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


def test_settings_that_do_not_go_together() -> None:
    masks = [typed("model.architecture=mask2former"), typed("model.encoder=swin-tiny"), typed("loss.kind=masks")]
    config_from(*masks)
    with pytest.raises(UsageError, match="loss.region = dice: the loss of masks has a dice loss of its own"):
        config_from(*masks, typed("loss.region=dice"))
    config_from(typed("loss.teacher=0.9"), typed("optimizer.average=0.99"))
    config_from(typed("model.architecture=vit"), typed("optimizer.layer_decay=0.8"))


@pytest.mark.parametrize(("given", "now"), [("true", "box"), ("false", "off"), ("pixel", "pixel"), ('"off"', "off")])
def test_confidence_may_be_what_earlier_versions_called_it(given: str, now: str) -> None:
    assert config_from(typed(f"loss.confidence={given}")).loss.confidence == now
    with pytest.raises(UsageError, match=r"loss\.confidence: expected one of off, box, pixel, got 'boxes'"):
        config_from(typed("loss.confidence=boxes"))


def test_a_run_of_an_earlier_version_continues_with_its_confidence(tmp_path: Path) -> None:
    """Its config.json says true for what is box now; anything else is another setting."""
    config = config_from(typed("loss.confidence=box"))
    was = {**deciding(config), "loss": {**deciding(config)["loss"], "confidence": True}}
    _check_same(tmp_path, was, deciding(config))
    with pytest.raises(WsssError, match=r'was started with loss\.confidence = "box", this run has "pixel"'):
        _check_same(tmp_path, was, deciding(config_from(typed("loss.confidence=pixel"))))
