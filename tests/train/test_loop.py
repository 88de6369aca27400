"""Whole trainings: what they leave behind, that they refuse what cannot work, and that they end the same however they went.

Trainings that are killed or compared run in processes of their own, forked from a server that has imported the trainer once.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import InvalidCxxCompiler

from wsss.classes import class_list
from wsss.errors import StoreError, UsageError, WeightsError, WsssError
from wsss.store.local import read_label, write_label
from wsss.train import curve, loop, source
from wsss.train.args import Config, config_from, typed
from wsss.train.checkpoint import BEST, LAST, Progress, load_run, read_record, read_tensors
from wsss.train.data import Batch
from wsss.train.dataset.masks import ValidationSet
from wsss.train.dataset.survey import survey_store
from wsss.train.distributed import joined
from wsss.train.loop import Recorder, Result, Status, train
from wsss.train.model import Segmenter
from wsss.train.optimizer import rate_at
from wsss.train.run import Pass, Run, kernels_for

from .conftest import TINY, write_store

Scenes = tuple[Path, Path]


def settings(*assignments: str) -> Config:
    return config_from(TINY, *(typed(each) for each in assignments))


def run(scenes: Scenes, out: Path, *assignments: str, log: Callable[[str], None] = lambda line: None) -> Result:
    return train(*scenes, out, settings(*assignments), log=log)


def losses(out: Path) -> dict[int, float]:
    return {int(point["step"]): point["loss"] for point in curve.read_curve(out) if "loss" in point}


def tensors(out: Path, name: str = "last.safetensors") -> dict[str, Tensor]:
    return read_tensors(out / name)[0]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


# ---- it works ----


def test_a_training_leaves_all_that_is_needed(scenes: Scenes, tmp_path: Path) -> None:
    out, said = tmp_path / "run", list[str]()
    result = run(scenes, out, log=said.append)
    assert (result.images, result.steps) == (6, 6) and result.miou is not None
    assert any("6 images to train on, 2 to validate, 12 classes" in line for line in said) and "random weights" in said
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "segmenter.json", "survey.json", "best.safetensors", "last.safetensors"),
        *("curve.jsonl", "curve.png", "report.html"),
    }
    assert json.loads((out / "config.json").read_text())["data"]["crop"] == 32
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6]
    assert [point["step"] for point in curve.read_curve(out) if "miou" in point] == [4, 6]
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 2 and "http" not in page.replace("http-equiv", "")

    segmenter, record = load_run(out)
    assert record.classes == class_list(json.loads((scenes[0] / "run.json").read_text())["classes"]).names
    assert (record.architecture, record.crop, record.multiple_of, record.images, record.init["source"]) == (
        "unet",
        32,
        32,
        6,
        "none",
    )
    assert record.canvases == ((64, 64),), "48 x 56 pixels in multiples of 32"
    assert not segmenter.training and segmenter(torch.zeros(1, 3, 32, 64)).shape == (1, 13, 32, 64)
    assert_equal(segmenter.network.state_dict(), tensors(out, "best.safetensors"))
    averaged, _ = load_run(out, "last")
    last = tensors(out)
    assert_equal(
        averaged.network.state_dict(), {k.removeprefix("average."): v for k, v in last.items() if k.startswith("average.")}
    )


def test_the_time_left_follows_from_the_steps_of_this_sitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps took twenty seconds since the run was taken up again at step 100; of 300, 150 are left."""
    now = [7.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    going_on = SimpleNamespace(
        config=settings("optimizer.steps=300"),
        world=SimpleNamespace(is_first=True),
        progress=Progress(step=100, seconds=1000.0, recent=[0.25, 0.75]),
        settle=lambda: None,
    )
    told: list[Status] = []
    recorder = Recorder(going_on, tmp_path, told.append)  # type: ignore[arg-type]
    now[0] += 20
    going_on.progress.step = 150
    recorder.record_step(is_last=True)
    recorder.close()
    assert [(each.step, each.steps, each.loss, each.seconds_left) for each in told] == [(150, 300, 0.5, 60)]
    assert going_on.progress.seconds == 1020
    args = going_on.config.optimizer
    assert told[0].rate == rate_at(149, args) > rate_at(150, args), "the rate of the step that was done"


def test_it_learns(scenes: Scenes, tmp_path: Path) -> None:
    run(scenes, tmp_path / "run", "optimizer.steps=25", "optimizer.average=0", "validation_steps=100")
    course = list(losses(tmp_path / "run").values())
    assert sum(course[-5:]) < 0.6 * sum(course[:5])


def test_a_finished_run_is_left_as_it_is(scenes: Scenes, tmp_path: Path) -> None:
    said: list[str] = []
    run(scenes, tmp_path / "run")
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    result = run(scenes, tmp_path / "run", log=said.append)
    assert result.steps == 6 and f"{tmp_path / 'run'} is finished" in said
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before


def test_accumulation_changes_the_memory_alone(scenes: Scenes, tmp_path: Path) -> None:
    told = ["model.batch_norm=frozen", "optimizer.steps=4"]
    run(scenes, tmp_path / "whole", *told)
    run(scenes, tmp_path / "parts", *told, "data.accumulate=4")
    assert list(losses(tmp_path / "parts").values()) == pytest.approx(list(losses(tmp_path / "whole").values()), abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_full(scenes: Scenes, tmp_path: Path, precision: str) -> None:
    told = ["optimizer.steps=3", "validation_steps=9"]
    run(scenes, tmp_path / "full", *told)
    run(scenes, tmp_path / precision, *told, f"optimizer.precision={precision}")
    full, mixed = (list(losses(tmp_path / name).values()) for name in ("full", precision))
    assert mixed == pytest.approx(full, rel=0.05) and mixed != full
    assert all(value.dtype != torch.bfloat16 for value in tensors(tmp_path / precision).values())


@pytest.mark.parametrize("supported", [True, False])
def test_a_precision_that_the_processor_emulates_is_said(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    said: list[str] = []
    run(scenes, tmp_path / "run", "optimizer.steps=1", "optimizer.precision=bf16", log=said.append)
    assert any("--precision bf16: this processor has no instructions for it" in line for line in said) is not supported


@pytest.mark.parametrize(("precision", "matmul"), [("tf32", "high"), ("fp32", "highest")])
def test_a_gpus_kernels_are_chosen_for_steps_alone(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, matmul: str
) -> None:
    seen: dict[str, set[tuple[bool, str]]] = {}

    def spied(owner: object, name: str) -> None:
        called = getattr(owner, name)

        def spy(*args: Any) -> Any:
            chosen = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
            seen.setdefault(name, set()).add(chosen)
            return called(*args)

        monkeypatch.setattr(owner, name, spy)

    spied(Run, "advance")
    spied(loop, "_validate")
    monkeypatch.setattr(loop, "kernels_for", lambda config, device: kernels_for(config, torch.device("cuda")))
    run(scenes, tmp_path / "run", "optimizer.steps=2", f"optimizer.precision={precision}")
    assert seen == {"advance": {(True, matmul)}, "_validate": {(False, "highest")}}
    run(scenes, tmp_path / "other", "optimizer.steps=1", "machine.cudnn_benchmark=false")
    assert (False, "highest") in seen["advance"]


def test_an_initial_run_hands_on_its_weights(scenes: Scenes, tmp_path: Path) -> None:
    run(scenes, tmp_path / "first")
    said: list[str] = []
    run(
        scenes,
        tmp_path / "second",
        f"model.init={tmp_path / 'first'}",
        "optimizer.steps=1",
        "optimizer.rate=1e-9",
        log=said.append,
    )
    first, second = tensors(tmp_path / "first", "best.safetensors"), tensors(tmp_path / "second", "best.safetensors")
    parameters = dict(load_run(tmp_path / "first")[0].network.named_parameters())
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in parameters)
    assert any(line.startswith(f"weights of {tmp_path / 'first'}: ") for line in said)


def test_a_frozen_encoder_keeps_its_weights_and_statistics(scenes: Scenes, tmp_path: Path) -> None:
    run(scenes, tmp_path / "start", "optimizer.steps=1")
    told = f"model.init={tmp_path / 'start'}", "model.freeze_encoder=true", "optimizer.average=0", "optimizer.steps=3"
    run(scenes, tmp_path / "run", *told)
    before, after = tensors(tmp_path / "start", "best.safetensors"), load_run(tmp_path / "run", "last")[0].network.state_dict()
    assert_equal(*({n: v for n, v in each.items() if n.startswith("encoder.")} for each in (before, dict(after))))
    assert not torch.equal(before["segmentation_head.0.weight"], after["segmentation_head.0.weight"])


def test_a_teacher_leaves_out_what_it_contradicts(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running average is made to be sure of background: from the given step on, only background is learned from."""
    honest, seen = Run._without_contradicted, list[tuple[int, set[int], set[int]]]()

    def sure_of_background(self: Run, batch: Batch) -> Batch:
        assert self.average is not None
        probability = torch.tensor([0.95] + [0.05 / 12] * 12)
        logits = probability.log()[None, :, None, None].expand(len(batch.label), -1, *batch.label.shape[1:])
        with monkeypatch.context() as patch:
            patch.setattr(self.average, "forward", lambda pixels: logits)
            left = honest(self, batch)
        seen.append((self.progress.step, set(batch.label.unique().tolist()), set(left.label.unique().tolist())))
        assert torch.equal(left.label == 0, batch.label == 0)
        return left

    monkeypatch.setattr(Run, "_without_contradicted", sure_of_background)
    run(scenes, tmp_path / "run", "loss.teacher=0.9", "loss.teacher_from=2", "optimizer.steps=4", "validation_steps=9")
    assert [step for step, _, _ in seen] == [2, 3]
    assert all(len(before) > 2 and after <= {0, 255} for _, before, after in seen)
    seen.clear()
    run(scenes, tmp_path / "other", "loss.teacher=0.96", "loss.teacher_from=0", "optimizer.steps=1")
    assert [before == after for _, before, after in seen] == [True], "it is less sure than that"


# ---- it ends the same ----


def train_up_to(last: int, store: Path, images: Path, out: Path, config: Config) -> None:
    """Train, but never begin step `last`: whoever is slow to kill this process still kills it in the middle of the training."""
    advance = Run.advance

    def held(self: Run, parts: Sequence[Batch]) -> None:
        while self.progress.step >= last:
            time.sleep(1)
        advance(self, parts)

    Run.advance = held  # type: ignore[method-assign]
    train(store, images, out, config)


def process(target: Callable[..., object], *args: object) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wsss.train.loop"])
    child = context.Process(target=target, args=args, daemon=True)
    child.start()
    return child


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "the training does not come on"
        time.sleep(0.005)


def test_killed_at_random_steps_it_ends_with_the_same_weights(scenes: Scenes, tmp_path: Path) -> None:
    """Five times killed, anywhere in a step, a validation or the writing of a checkpoint; dropout and average included."""
    segformer = {  # drop path, dropout and batch statistics
        "architecture": "segformer",
        "encoder": "b0",
        "options": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4]},
    }
    optimizer = {**TINY["optimizer"], "steps": 14, "kind": "adamw", "rate": 0.002}
    machine = {**TINY["machine"], "checkpoint_seconds": 0}
    data = {**TINY["data"], "balance": "sampling"}
    config = config_from({**TINY, "model": segformer, "optimizer": optimizer, "machine": machine, "data": data})
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    straight = process(train, *scenes, unbroken, config)
    chance = random.Random(0)
    reached = []
    for step in (2, 4, 7, 9, 12):
        child = process(train_up_to, 13, *scenes, killed, config)
        wait_for(lambda step=step: max(losses(killed), default=0) >= step)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.2))
        assert child.pid is not None
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        reached.append(max(losses(killed)))
    assert reached[-1] < 14
    last = process(train, *scenes, killed, config)
    for child in (straight, last):
        child.join(120)
        assert child.exitcode == 0
    assert_equal(tensors(killed), tensors(unbroken))
    assert_equal(tensors(killed, "best.safetensors"), tensors(unbroken, "best.safetensors"))
    assert losses(killed) == losses(unbroken)


def test_a_checkpoint_is_more_than_the_weights(scenes: Scenes, tmp_path: Path) -> None:
    """What the test above would miss if nothing depended on it: moments, average and step are in the file."""
    run(scenes, tmp_path / "run", "optimizer.kind=adamw", "optimizer.steps=3")
    names = {name.partition(".")[0] for name in tensors(tmp_path / "run")}
    assert names == {"network", "average", "optimizer"}
    assert {name.split(".")[1] for name in tensors(tmp_path / "run") if name.startswith("optimizer.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


# ---- it refuses ----


def test_other_settings_do_not_continue_a_run(scenes: Scenes, tmp_path: Path) -> None:
    run(scenes, tmp_path / "run", "optimizer.steps=1")
    with pytest.raises(WsssError, match=r"was started with optimizer\.rate = 0\.01, this run has 0\.5") as caught:
        run(scenes, tmp_path / "run", "optimizer.steps=1", "optimizer.rate=0.5")
    assert "new --out" in caught.value.hint
    run(scenes, tmp_path / "run", "optimizer.steps=1", "machine.log_steps=3")


def test_more_steps_where_the_rate_is_constant(scenes: Scenes, tmp_path: Path) -> None:
    """A finished run that is continued to more steps ends as one that had them from the start."""
    constant = ["optimizer.schedule=poly", "optimizer.power=0"]
    run(scenes, tmp_path / "more", "optimizer.steps=3", *constant)
    said: list[str] = []
    result = run(scenes, tmp_path / "more", "optimizer.steps=6", *constant, log=said.append)
    assert "continuing at step 3" in said and result.steps == 6
    run(scenes, tmp_path / "whole", "optimizer.steps=6", *constant)
    assert_equal(tensors(tmp_path / "more"), tensors(tmp_path / "whole"))
    assert losses(tmp_path / "more") == losses(tmp_path / "whole")
    assert read_record(tmp_path / "more").steps == 6
    assert json.loads((tmp_path / "more" / "config.json").read_text())["optimizer"]["steps"] == 6
    with pytest.raises(WsssError, match="with optimizer.steps = 6, this run has 4, which is fewer"):
        run(scenes, tmp_path / "more", "optimizer.steps=4", *constant)
    with pytest.raises(WsssError, match=r"with optimizer.rate = 0.01, this run has 0.5"):
        run(scenes, tmp_path / "more", "optimizer.steps=7", "optimizer.rate=0.5", *constant)


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_more_steps_where_the_rate_ended_at_zero(scenes: Scenes, tmp_path: Path, schedule: str) -> None:
    told = f"optimizer.schedule={schedule}"
    run(scenes, tmp_path / "run", "optimizer.steps=1", told)
    said = rf"optimizer\.steps = 1, this run has 9: its {schedule} schedule lowers the rate to zero at step 1"
    with pytest.raises(WsssError, match=said) as caught:
        run(scenes, tmp_path / "run", "optimizer.steps=9", told)
    assert f"--init {tmp_path / 'run'} with a new --out" in (caught.value.hint or "")
    run(scenes, tmp_path / "other", "optimizer.steps=2", told, f"model.init={tmp_path / 'run'}")


def test_true_labels_to_validate_on(scenes: Scenes, tmp_path: Path) -> None:
    """Nothing is held out, the curve and the best weights are against the true labels, and every class has its scores."""
    true, photographs = write_store(tmp_path / "val", count=3)
    validation = ValidationSet(images=photographs, labels=true / "labels")
    out, said = tmp_path / "run", list[str]()
    result = train(*scenes, out, settings(), validation=validation, log=said.append)
    assert result.images == 8 and result.against == f"the true labels of {true / 'labels'}"
    assert any(line.startswith("8 images to train on, all of them; 3 to validate, against the true labels") for line in said)
    assert any(line.startswith("warning: 3 of the 3 images of --val are trained on too") for line in said), "drawn alike"
    points = [point["miou"] for point in curve.read_curve(out) if "miou" in point]
    assert result.miou == max(points) and (out / BEST).exists()
    assert result.scores is not None and result.scores["miou"] == pytest.approx(result.miou, abs=1e-9)
    assert sum(row["truth_px"] for row in result.scores["classes"]) == 3 * 46 * 56, "two rows of each are void"
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 3 and "against the true labels of" in page and "<td>red disc</td>" in page
    assert "agrees with the truth on" in page and "the store" not in page
    again = train(*scenes, out, settings(), validation=validation)
    assert again == result
    with pytest.raises(WsssError, match="or the images of its validation"):
        run(scenes, out)
    path = true / "labels" / "scene-00.png"
    write_label(path, read_label(path) * 0)
    with pytest.raises(WsssError, match="or the images of its validation"):
        train(*scenes, out, settings(), validation=validation)


def test_validation_labels_that_cannot_score(scenes: Scenes, tmp_path: Path) -> None:
    true, photographs = write_store(tmp_path / "val", count=2)
    for path in (true / "labels").iterdir():
        write_label(path, read_label(path) | 255)
    with pytest.raises(StoreError, match="--val .*: its 2 label maps have only void|its 2 masks have only 0 and 255"):
        train(*scenes, tmp_path / "run", settings(), validation=ValidationSet(images=photographs, labels=true / "labels"))


def test_masks_train_as_the_store_of_them(scenes: Scenes, tmp_path: Path) -> None:
    """Where the store is sure of all labels, its folder of label maps gives the same weights."""
    store, images = scenes
    classes = tuple(json.loads((store / "run.json").read_text())["classes"])
    said: list[str] = []
    result = train(
        store / "labels", images, tmp_path / "masks", settings("loss.confidence=false"), classes=classes, log=said.append
    )
    run(scenes, tmp_path / "labels", "loss.confidence=false")
    assert result.against == "the masks" and any("against the masks" in line for line in said)
    assert_equal(tensors(tmp_path / "masks"), tensors(tmp_path / "labels"))


def test_a_store_that_changed_does_not_continue_a_run(scenes: Scenes, tmp_path: Path) -> None:
    run(scenes, tmp_path / "run", "optimizer.steps=1")
    path = scenes[0] / "labels" / "scene-00.png"
    write_label(path, (read_label(path) == 255).astype("uint8") * 255)
    with pytest.raises(WsssError, match="images or labels have changed since this run started"):
        run(scenes, tmp_path / "run", "optimizer.steps=1")


def test_a_checkpoint_of_other_classes(scenes: Scenes, tmp_path: Path) -> None:
    run(scenes, tmp_path / "run", "optimizer.steps=1")
    told = json.loads((scenes[0] / "run.json").read_text())
    told["classes"][0] = "violet disc"
    (scenes[0] / "run.json").write_text(json.dumps(told))
    manifest = scenes[0] / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"red disc"', '"violet disc"'))
    with pytest.raises(WeightsError, match=r"its checkpoint has 12 classes \(red disc, .* the store has 12 \(violet disc"):
        run(scenes, tmp_path / "run", "optimizer.steps=1")
    init = f"model.init={tmp_path / 'run'}"
    with pytest.raises(WeightsError, match=r"was trained for 12 classes \(red disc.*, the store has 12 \(violet disc") as caught:
        run(scenes, tmp_path / "other", init)
    assert "new_head" in caught.value.hint
    run(scenes, tmp_path / "other", init, "model.new_head=true", "optimizer.steps=1")
    _, record = load_run(tmp_path / "other")
    assert sorted(record.init["random"]) == ["segmentation_head.0.bias", "segmentation_head.0.weight"]


def test_best_weights_are_kept_only_beside_a_checkpoint(tmp_path: Path) -> None:
    """Those of a training that ended before its first checkpoint would stay the best of the next."""
    source.prepare_folder(tmp_path, Config())
    (tmp_path / BEST).touch()
    source.prepare_folder(tmp_path, Config())
    assert not (tmp_path / BEST).exists()
    for name in (BEST, LAST):
        (tmp_path / name).touch()
    source.prepare_folder(tmp_path, Config())
    assert (tmp_path / BEST).exists()


def test_the_rest_of_a_write_that_was_killed_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / ".123-0.tmp").touch()
    source.prepare_folder(tmp_path, Config())
    assert (tmp_path / "config.json").exists()


def test_a_folder_that_is_no_run(scenes: Scenes, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").touch()
    with pytest.raises(WsssError, match="the folder is not empty and has no training run"):
        run(scenes, tmp_path / "thesis")
    with pytest.raises(WsssError, match=r"--out .*main\.tex: cannot be written: "):
        run(scenes, tmp_path / "thesis" / "main.tex")
    with pytest.raises(WeightsError, match=r"expected the folder of a training \(with segmenter\.json\)"):
        load_run(tmp_path / "thesis")


def test_a_damaged_checkpoint_is_named(scenes: Scenes, tmp_path: Path) -> None:
    run(scenes, tmp_path / "run", "optimizer.steps=1")
    path = tmp_path / "run" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"best\.safetensors: damaged"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("assignments", "said", "hint"),
    [
        (["data.crop=40"], "data.crop: unet takes multiples of 32, got 40", "--crop 32"),
        (["data.crop=20"], "data.crop: unet takes multiples of 32, got 20", "--crop 32"),
        (["data.accumulate=3"], "data.batch: 4 images do not divide into 1 processes x 3 forward passes", "--batch 3"),
        (["data.batch=2", "data.accumulate=2"], "one image per forward pass is too few", "--batch 4"),
        (["data.batch=1"], "one image per forward pass is too few for batch statistics", "--batch 2"),
        (["model.batch_norm=sync"], "model.batch_norm = sync needs GPUs", "frozen"),
    ],
)
def test_what_does_not_divide(scenes: Scenes, tmp_path: Path, assignments: list[str], said: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(scenes, tmp_path / "run", *assignments)
    assert said in caught.value.message and re.search(rf"{hint}\b", caught.value.hint)


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[Any], Any]) -> None:
    """Changes what the network gives in one forward pass of the training."""
    honest, calls = Segmenter.outputs, [0]

    def outputs(self: Segmenter, pixels: Tensor) -> Any:
        calls[0] += self.training
        return change(honest(self, pixels)) if self.training and calls[0] == at else honest(self, pixels)

    monkeypatch.setattr(Segmenter, "outputs", outputs)


@pytest.mark.parametrize("kind", ["loss", "gradient", "gradient that is not clipped"])
def test_no_number_stops_with_the_batchs_files(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def change(logits: Tensor) -> Tensor:
        if kind != "loss":
            logits.register_hook(lambda gradient: gradient * float("nan"))
            return logits
        return logits * float("nan")

    clip = "optimizer.clip_norm=1" if kind == "gradient" else "optimizer.clip_norm=0"
    said = {
        "loss": r"step 4: the loss is nan, in the batch of\n  scene-\d\d\.png\n  scene-\d\d\.png",
        "gradient": r"step 4: the loss or its gradient is nan, in the batch of\n  scene-\d\d\.png\n  scene-\d\d\.png",
        "gradient that is not clipped": "step 4: the weights are not finite, after a gradient",
    }
    with monkeypatch.context() as patch:
        spoil(patch, 4, change)
        with pytest.raises(WsssError, match=said[kind]) as caught:
            run(scenes, tmp_path / "run", clip, "machine.checkpoint_seconds=0")
    assert caught.value.message.count("scene-") == (0 if "not" in kind else 4)
    assert all(value.isfinite().all() for value in tensors(tmp_path / "run").values())
    run(scenes, tmp_path / "run", clip)  # the cause is gone: it goes on, and ends as if nothing had been
    run(scenes, tmp_path / "straight", clip)
    assert_equal(tensors(tmp_path / "run"), tensors(tmp_path / "straight"))


def test_losses_are_read_at_the_points_of_the_curve(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a loss that is no number is named even if others followed before the losses were read."""
    read: list[int] = []
    honest = Run.settle

    def settle(self: Run) -> None:
        read.append(len(self._unread))
        honest(self)

    monkeypatch.setattr(Run, "settle", settle)
    told = "machine.log_steps=3", "validation_steps=100", "optimizer.average=0"
    run(scenes, tmp_path / "run", *told, "optimizer.steps=8")
    assert [count for count in read if count] == [3, 3, 2]
    spoil(monkeypatch, 4, lambda logits: logits * float("nan"))
    with pytest.raises(WsssError, match="step 4: the loss is nan, in the batch of"):
        run(scenes, tmp_path / "spoiled", *told, "optimizer.steps=8")


def test_too_little_memory_says_what_needs_less(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, 2, lambda logits: torch.empty(2**58, dtype=torch.uint8))  # the allocator's own refusal
        with pytest.raises(WsssError, match="too little memory for 4 images of 32 x 32 pixels") as caught:
            run(scenes, tmp_path / "cpu")
    assert "data.accumulate=2" in caught.value.hint and "--crop" in caught.value.hint

    def no_gpu_memory(logits: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    spoil(monkeypatch, 1, no_gpu_memory)
    with pytest.raises(WsssError, match="too little memory.*20.00 GiB"):
        run(scenes, tmp_path / "gpu")


def test_a_step_that_cannot_be_compiled_says_so(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(logits: Tensor) -> Tensor:
        raise InvalidCxxCompiler

    monkeypatch.setattr(Pass, "compile", lambda self: None)  # which takes half a minute to fail
    spoil(monkeypatch, 1, no_compiler)
    said: list[str] = []
    with pytest.raises(WsssError, match=r"machine\.compile: torch\.compile failed: No working C\+\+ compiler") as caught:
        run(scenes, tmp_path / "run", "machine.compile=true", "optimizer.steps=1", log=said.append)
    assert "machine.compile=false" in caught.value.hint
    assert "machine.compile: the first step is compiled, which takes minutes" in said


def test_gpus_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(WsssError, match="torchrun started 4 processes on this machine, it has 3 GPUs") as caught,
        joined(settings("machine.device=auto").machine),
    ):
        pass
    assert "--nproc-per-node 3" in caught.value.hint and "(now 0,1,2)" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(WsssError, match="--device cuda: PyTorch finds no GPU"), joined(settings("machine.device=cuda").machine):
        pass
    monkeypatch.setenv("RANK", "first")
    with (
        pytest.raises(UsageError, match="environment variable RANK: expected a number set by torchrun, got 'first'"),
        joined(settings().machine),
    ):
        pass


# ---- nothing to learn from, nothing to validate on ----


def relabel(scenes: Scenes, change: Callable[[int, Any], Any]) -> None:
    """Changes the label maps, numbered by their names."""
    for number, path in enumerate(sorted((scenes[0] / "labels").iterdir())):
        write_label(path, change(number, read_label(path)))


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (255, r"the 6 training images have no labeled pixel: all are void"),
        (0, "have only background, none of the 12 classes"),
    ],
)
def test_images_without_a_class_are_not_trained_on(scenes: Scenes, tmp_path: Path, label: int, said: str) -> None:
    relabel(scenes, lambda number, label_map: label_map * 0 + label)
    with pytest.raises(StoreError, match=said) as caught:
        run(scenes, tmp_path / "run")
    assert "wsss report" in caught.value.hint
    assert not (tmp_path / "run" / "segmenter.json").exists()


def test_a_validation_that_cannot_score_says_so(scenes: Scenes, tmp_path: Path) -> None:
    _, held_out = survey_store(*scenes).split(0.25, 500)
    for item in held_out:
        path = scenes[0] / "labels" / item.label
        write_label(path, read_label(path) * 0 + 255)
    said: list[str] = []
    result = run(scenes, tmp_path / "run", log=said.append)
    assert (result.miou, result.best_step) == (None, None)
    assert any("the 2 held-out images have no labeled pixel" in warning for warning in result.warnings)
    assert said.count("step 4: no mIoU: the 2 held-out images have no labeled pixel") == 1
    assert not any("mIoU -1" in line or "mIoU nan" in line for line in said)
    assert not (tmp_path / "run" / "best.safetensors").exists()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [line for line in lines if "miou" in line] == [{"step": 4, "miou": None}, {"step": 6, "miou": None}]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the store labels no pixel of it" in page and "nan" not in page.lower().partition("data:image")[0]
    load_run(tmp_path / "run")


def test_what_the_images_lack_is_said(scenes: Scenes, tmp_path: Path) -> None:
    relabel(scenes, lambda number, label_map: label_map * 0 + 255 if number == 3 else label_map % 3)
    said: list[str] = []
    result = run(scenes, tmp_path / "run", "optimizer.steps=1", "data.validation_share=0.01", log=said.append)
    first, second, third = result.warnings
    assert first.startswith("10 of 12 classes are in no training image and cannot be learned: ")
    assert second == "1 of 8 training images are entirely void (255) and have no effect"
    assert third.startswith("no image is held out (data.validation_share = 0.01 of 8): there is no validation")
    assert [line for line in said if line.startswith("warning: ")] == [f"warning: {each}" for each in result.warnings]


def test_of_equal_validations_the_first_is_kept(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.25, 0.5, 0.5, None, 0.5])
    monkeypatch.setattr(loop, "validate", lambda *_: next(scores))
    result = run(scenes, tmp_path / "run", "validation_steps=1", "optimizer.steps=5")
    assert (result.miou, result.best_step) == (0.5, 2)
    assert read_tensors(tmp_path / "run" / "best.safetensors")[1] == {"step": 2, "miou": 0.5}


def test_a_validation_of_no_numbers_stops(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch statistics may be broken where the losses are not: argmax would make class 0 of NaN."""
    honest = Segmenter.forward
    monkeypatch.setattr(Segmenter, "forward", lambda self, pixels: honest(self, pixels) * float("nan"))
    with pytest.raises(WsssError, match=r"scene-\d\d\.png: the network's output is not a number"):
        run(scenes, tmp_path / "run")


@pytest.mark.parametrize("broken", [1, 3])
def test_steps_that_overflow_in_half_precision(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    honest, calls = Segmenter.outputs, [0]

    def outputs(self: Segmenter, pixels: Tensor) -> Any:
        logits = honest(self, pixels)
        if self.training:
            calls[0] += 1
            if calls[0] <= broken:
                assert isinstance(logits, Tensor)
                logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits

    monkeypatch.setattr(Segmenter, "outputs", outputs)
    told = "optimizer.steps=3", "optimizer.precision=fp16", "data.validation_share=0"
    if broken == 3:
        with pytest.raises(WsssError, match="no step changed the weights: the gradient of all 3 steps overflowed in fp16"):
            run(scenes, tmp_path / "run", *told)
    else:
        assert any(each.startswith("1 of 3 steps had no effect") for each in run(scenes, tmp_path / "run", *told).warnings)


def test_curves_of_older_runs_are_read(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.5, "rate": 0.1, "seconds": 1}', '{"step": 1, "miou": NaN}', '{"step": 2, "loss": Infinity}']
    (tmp_path / "curve.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    assert curve.read_curve(tmp_path) == [
        {"step": 1, "loss": 2.5, "rate": 0.1, "seconds": 1},
        {"step": 1, "miou": None},
        {"step": 2, "loss": None},
    ]
    writer = curve.Writer(tmp_path, 1, tensorboard=False)
    writer.add(2, loss=float("nan"), rate=0.1, seconds=2.0)
    writer.close()
    text = (tmp_path / "curve.jsonl").read_text()
    assert "NaN" not in text and text.splitlines()[-1] == '{"step": 2, "loss": null, "rate": 0.1, "seconds": 2.0}'
    curve.draw(tmp_path)
    for text in ("[]", "7", '{"loss": 1}', "[" * 100_000):
        (tmp_path / "curve.jsonl").write_text(f'{text}\n{{"step": 1}}\n')
        assert curve.read_curve(tmp_path) == [], "nothing behind an invalid line"


@pytest.mark.parametrize("name", ["loss", "rate", "miou"])
def test_the_picture_has_each_curve(tmp_path: Path, name: str) -> None:
    pictures = set()
    for high in (0.9, 0.1):
        points = [{"step": step, "loss": 0.9, "rate": 0.9, "miou": 0.9, name: value} for step, value in ((1, 0.9), (2, high))]
        (tmp_path / curve.CURVE).write_text("".join(json.dumps(point) + "\n" for point in points))
        pictures.add(curve.draw(tmp_path).read_bytes())
    assert len(pictures) == 2


# ---- records that were damaged ----

RECORD = {
    "architecture": "unet",
    "encoder": "mobilenet_v2",
    "classes": ["dog", "cat"],
    "mean": [1, 2, 3],
    "std": [1, 2.5, 3],
    "options": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    "crop": 32,
    "multiple_of": 32,
    "steps": 5,
    "preset": "",
    "source": "",
    "init": {"source": "none"},
    "store": "",
    "images": 4,
    "tools": {},
    "format": 1,
}


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "segmenter.json").write_text("\ufeff" + json.dumps(RECORD))
    record = read_record(tmp_path)
    assert record.classes == ("dog", "cat") and record.std == (1, 2.5, 3) and record.shorter_px == 0 and record.canvases == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop": -5}, "crop: expected 1 to"),
        ({"crop": "32"}, "crop: expected int, got '32'"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"multiple_of": 0}, "multiple_of: expected 1 to"),
        ({"images": 10**40}, "images: expected 0 to"),
        ({"canvases": [[32, 0]]}, "canvases: expected pairs of 1 to 16,384 pixels, got [32, 0]"),
        ({"canvases": [[32]]}, "canvases: expected pairs"),
        ({"canvases": [[32, 64]] * 65}, "canvases: expected at most 64, got 65"),
        ({"mean": [1, 2]}, "mean: expected three numbers"),
        ({"mean": [1, 2, "x"]}, "mean: expected three numbers"),
        ({"std": [1, 0, 1]}, "std: expected numbers above 0"),
        ({"classes": []}, "classes: expected 1 to 254 names"),
        ({"classes": ["dog", 3]}, "classes: expected 1 to 254 names"),
        ({"classes": ["dog", "dog"]}, "classes: a name occurs twice"),
        ({"classes": "dog"}, "classes: expected list"),
        ({"options": {"decoder_channels": [10**9]}}, "options: expected numbers up to 4096"),
        ({"options": {"decoder_channels": [1] * 100}}, "options: expected at most 64 values"),
        ({"encoder": "tu-hf-hub:someone/model"}, "encoder: expected a name"),
        ({"format": 2}, "expected format 1, got 2"),
        ({"color": 1}, "unknown setting 'color'"),
        ({"store": None}, "store: expected str, got None"),
    ],
)
def test_a_damaged_record_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "segmenter.json").write_text(json.dumps({**RECORD, **change}))
    with pytest.raises(WeightsError, match=r"segmenter\.json: ") as caught:
        read_record(tmp_path)
    assert said in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("most", "more"),
    [
        ({"crop": 1 << 31}, {"crop": (1 << 31) + 1}),
        ({"crop": 1}, {"crop": 0}),
        ({"multiple_of": 1}, {"multiple_of": 0}),
        ({"steps": 0}, {"steps": -1}),
        ({"images": 0}, {"images": -1}),
        ({"shorter_px": 0}, {"shorter_px": -1}),
        ({"canvases": [[1, 1 << 14]]}, {"canvases": [[1, (1 << 14) + 1]]}),
        ({"canvases": [[32, 64]] * 64}, {"canvases": [[32, 64]] * 65}),
        ({"classes": [str(number) for number in range(254)]}, {"classes": [str(number) for number in range(255)]}),
        ({"mean": [-1e6, 0, 1e6]}, {"mean": [0, 0, 1.1e6]}),
        ({"std": [1e-9, 1, 1e6]}, {"std": [1, 1, 1.1e6]}),
        ({"options": {"decoder_channels": [4096, -4096]}}, {"options": {"decoder_channels": [4097]}}),
        ({"options": {"decoder_channels": [1] * 64}}, {"options": {"decoder_channels": [1] * 65}}),
    ],
)
def test_a_record_at_a_limit_is_read_and_beyond_it_refused(most: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "segmenter.json").write_text(json.dumps({**RECORD, **most}))
    read_record(tmp_path)
    (tmp_path / "segmenter.json").write_text(json.dumps({**RECORD, **more}))
    with pytest.raises(WeightsError, match=f"{next(iter(more))}: expected"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"format": NaN}', "[" * 200_000, '{"format": 1}', '{"crop": 1, "crop": 2}']
)
def test_a_record_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "segmenter.json").write_text(text)
    with pytest.raises(WeightsError, match=r"segmenter\.json"):
        read_record(tmp_path)


def test_a_network_that_cannot_be_built(tmp_path: Path) -> None:
    (tmp_path / "segmenter.json").write_text(json.dumps({**RECORD, "architecture": "thing"}))
    with pytest.raises(WeightsError, match=r"segmenter\.json: thing with encoder .* cannot be built"):
        load_run(tmp_path)
