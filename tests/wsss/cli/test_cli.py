"""The command line: short forms work, `wsss.toml` answers for flags, every mistake is one message with a way out."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

import pytest

from wsss import __version__
from wsss.cli.common import Engine
from wsss.cli.convert import Format
from wsss.cli.train import Preset
from wsss.engines.opening import ENGINES
from wsss.extras import install_line
from wsss.runtime.convert.dataset import FORMATS
from wsss.spec import AxisRange, ParityRow, write_manifest
from wsss.store.local import read_records, read_run
from wsss.train.presets import PRESETS

if TYPE_CHECKING:
    from .conftest import Answer, World

    Run = Callable[..., Answer]


@pytest.fixture
def label(wsss: Run, world: World, photos: Path) -> Run:
    """``wsss label photos`` on the scripted world, with further flags; a later flag replaces an earlier one."""

    def run(*flags: str | Path, images: str | Path = "photos", classes: str = "red, green, blue") -> Answer:
        return wsss("label", images, "--classes", classes, "--bundle", world.bundle, "--out", "store", *flags)

    return run


def refused(answer: Answer, code: int, *messages: str) -> None:
    """One message at the end, no traceback, nothing on stdout."""
    assert answer.code == code, answer
    assert answer.out == ""
    assert re.match(r"(engine .*\n)?wsss: ", answer.err), answer.err
    assert "Traceback" not in answer.err
    for message in messages:
        assert message in answer.err


# ---- it works ----


def test_label_a_folder_and_again(label: Run, tmp_path: Path) -> None:
    first = label("--log-level", "info")
    assert first.code == 0
    counts = r"store: 5 labeled \(7 boxes\), 0 already done, 0 failed, 0:\d\d, [\d.]+ images/s"
    notes = "; 1 of 5 images hold none of the classes; 1 with next to no range\n"
    assert re.fullmatch(counts + notes, first.out)
    assert "engine ort, 3 classes" in first.err
    assert "store: 0 labeled (0 boxes), 5 already done" in label().out
    assert sorted(path.name for path in (tmp_path / "store" / "labels").rglob("*.png")) == [
        *("black.png", "green.png", "red.png", "three.png", "two.png")
    ]


def test_json_goes_to_stdout_and_nothing_else(label: Run) -> None:
    lines = label("--json").out.splitlines()
    assert [json.loads(line)["event"] for line in (lines[0], lines[-1])] == ["started", "finished"]
    summary = json.loads(lines[-1])
    assert summary["store"] == "store"
    assert (summary["images"], summary["labelled"], summary["boxes"]) == (5, 5, 7)
    assert set(summary["stage_seconds"]) == {"tag", "detect", "segment", "fuse"}


def test_what_is_left_out_or_never_found_is_in_the_summary(label: Run, photos: Path) -> None:
    for name in ("a.heic", "b.heic", "c.gif", "notes.txt"):
        (photos / name).touch()
    for name in ("two.png", "sub/three.png"):
        (photos / name).unlink()
    summary = json.loads(label("--json", classes="green, blue").out.splitlines()[-1])
    assert summary["left_out"] == {".gif": 1, ".heic": 2, ".txt": 1}
    assert (summary["never_found"], summary["empty"], summary["warned"], summary["folders_failed"]) == (["blue"], 2, 1, 0)
    again = label(classes="green, blue")
    assert again.out.endswith(
        "; 2 of 3 images hold none of the classes; never found: blue; 1 with next to no range; "
        "left out: 2 .heic, 1 .gif, 1 of .txt\n"
    )
    assert "left out: 2 .heic, 1 .gif, 1 of .txt\n2 of 3 images hold none of the classes; never found: blue\n" in again.err


def test_classes_that_the_small_models_do_not_know_are_warned_of_once(label: Run, world: World) -> None:
    for name in ("clip", "grounding-dino", "sam"):
        write_manifest(world.bundle / name, dataclasses.replace(world.model(name).manifest, variant="mini"))
    answer = label("--json")
    events = [json.loads(line) for line in answer.out.splitlines()]
    assert [event["event"] for event in events if "none of the 3 classes" in event.get("message", "")] == ["warning"]
    assert answer.err.count("none of the 3 classes is among them") == 1
    assert "WsssWarning" not in answer.err


def test_a_sub_folder_that_cannot_be_read_fails_and_the_run_goes_on(
    label: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if getattr(path, "name", "") == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("wsss.runtime.run.listing.os.scandir", refuse)
    answer = label("--json")
    assert answer.code == 1
    events = [json.loads(line) for line in answer.out.splitlines()]
    assert {"event": "failed", "image": "sub/", "error": "sub/: cannot be read: Permission denied"} in events
    assert (events[-1]["labelled"], events[-1]["folders_failed"]) == (4, 1)
    assert "failed: sub/: cannot be read: Permission denied" in answer.err
    assert "0 failed and 1 sub-folders" in label().out


def closed_or_full(*command: str, stdout: str = "", stderr: str = "") -> subprocess.CompletedProcess[str]:
    """``wsss COMMAND`` with its streams as a shell's redirections say."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {stdout} {stderr}', "sh", sys.executable, "-m", "wsss", *command],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, unbuffered: str) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    answer = closed_or_full("--version", stdout=">/dev/full")
    assert answer.returncode == 1
    assert answer.stderr.startswith("wsss: standard output: cannot be written: No space left on device\n\nhint: ")
    assert "Traceback" not in answer.stderr
    silent = closed_or_full("label", "nowhere", "--out", "store", stdout=">/dev/full", stderr="2>/dev/full")
    assert silent.returncode == 2, "the error is another one, and is kept where nobody can read it"


def test_streams_that_are_closed(tmp_path: Path) -> None:
    for stdout, stderr in (("", "2>&-"), (">&-", ""), ("<&- >&-", "2>&-")):
        answer = closed_or_full("--version", stdout=stdout, stderr=stderr)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout == ("" if ">&-" in stdout else f"wsss {__version__}\n")
    # A file that took the place of a closed stream would get its lines.
    program = (
        "import sys; from wsss.cli import main as cli; cli._open_streams(); file = open('new.txt', 'w'); "
        "print('line', file=sys.stderr, flush=True); print(file.fileno(), file=file)"
    )
    with contextlib.chdir(tmp_path):
        subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program], check=True)
    assert int((tmp_path / "new.txt").read_text()) > 2


def test_flags_reach_the_rules(label: Run, tmp_path: Path) -> None:
    flags = [
        "--no-gate",
        "--tag-threshold",
        "0.2",
        "--box-threshold",
        "0.4",
        "--nms",
        "0.6",
        "--nms-across",
        "0.7",
        "--margin",
        "0",
        "--quality-exponent",
        "0.5",
        "--score-rule",
        "max",
        "--no-enclosing",
        "--tiles",
        "2",
    ]
    assert label(*flags, "--engine", "auto").code == 0
    assert read_run(tmp_path / "store")["rules"] == {
        "gate": False,
        "tag_threshold": 0.2,
        "tag_thresholds": None,
        "views": None,
        "score_rule": "max",
        "box_threshold": 0.4,
        "nms": 0.6,
        "nms_across": 0.7,
        "enclosing": False,
        "tiles": 2,
        "margin": 0.0,
        "quality_exponent": 0.5,
        "multimask": False,
        "min_region": 0,
        "stability_exponent": 0.0,
    }


def test_given_labels_and_boxes(label: Run, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"red.png": ["red"], "green.png": []}))
    answer = label("--labels", "labels.json")
    assert answer.code == 1, "three photographs have no entry"
    assert "2 labeled (1 boxes), 0 already done, 3 failed" in answer.out
    boxes = label("--boxes", "store/manifest.jsonl", "--out", "second")
    assert "2 labeled (1 boxes), 0 already done, 3 failed" in boxes.out


def test_a_bad_image_is_named_and_the_exit_code_tells(label: Run, tmp_path: Path) -> None:
    (tmp_path / "photos" / "bad.jpg").write_text("no")
    answer = label()
    assert answer.code == 1
    assert "failed: bad.jpg: not a readable image" in answer.err
    assert "5 labeled (7 boxes), 0 already done, 1 failed" in answer.out
    assert label("--retry-failed").code == 1
    again = label()
    assert again.code == 1, "the failure is still there"
    assert "failed in an earlier run and have no label: 1\n\nhint: --retry-failed" in again.err
    (tmp_path / "photos" / "bad.jpg").unlink()
    assert label().code == 0


def test_an_interrupt_says_how_to_go_on(label: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wsss.runtime.run.label_folder.label_folder", stop)
    answer = label()
    assert answer.code == 130
    assert "store is intact. Run the same command to continue." in answer.err


def test_report_writes_a_page(label: Run, wsss: Run, tmp_path: Path) -> None:
    label()
    assert wsss("report", "store", "--images", "photos").out == "store/report.html\n"
    assert "showReport" in (tmp_path / "store" / "report.html").read_text()
    assert len(list((tmp_path / "store" / "report.files").glob("*/*.jpg"))) == 5
    refused(wsss("report", "photos", "--images", "photos"), 1, "expected a label store", "hint: wsss label makes one")


def test_a_store_knows_where_its_images_are(label: Run, wsss: Run, tmp_path: Path) -> None:
    label()
    answer = wsss("report", "store")
    assert (answer.code, answer.out) == (0, "store/report.html\n")
    assert "images: photos, as store records" in answer.err
    for place in ("moved/store", "moved/photos"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / Path(place).name).rename(tmp_path / place)
    assert wsss("report", "moved/store").code == 0, "both were moved together"
    (tmp_path / "moved" / "photos").rename(tmp_path / "elsewhere")
    refused(wsss("report", "moved/store"), 1, "was made from moved/photos, which does not exist", "hint: give", "--images")
    (tmp_path / "moved" / "store" / "history.jsonl").unlink()
    refused(wsss("report", "moved/store"), 1, "its history does not name the folder", "--images")
    assert wsss("report", "moved/store", "--images", "elsewhere").code == 0


def test_label_takes_several_images_a_limit_and_rejections(label: Run, wsss: Run, world: World, tmp_path: Path) -> None:
    def labels() -> list[str]:
        return sorted(path.stem for path in (tmp_path / "store" / "labels").rglob("*.png"))

    flags = ("--classes", "red, green, blue", "--bundle", world.bundle, "--out", "store")
    assert wsss("label", "photos/red.png", "photos/two.png", *flags).code == 0
    assert labels() == ["red", "two"]
    assert label("--limit", "2").code == 0
    assert labels() == ["black", "green", "red", "two"]
    (tmp_path / "bad.txt").write_text("sub/three.png\nnone.png\n")
    answer = label("--exclude", "bad.txt")
    assert answer.code == 0 and "--exclude bad.txt: 1 of its 2 images are not there, for example none.png" in answer.err
    assert labels() == ["black", "green", "red", "two"]
    assert label("--redo", "bad.txt").code == 0
    assert labels() == ["black", "green", "red", "three", "two"]
    (tmp_path / "bad.txt").write_text("none.png\n")
    refused(label("--exclude", "bad.txt"), 2, "--exclude bad.txt: photos has none of its images, for example none.png")


def test_verify_without_torch_compares_rows_and_says_what_it_leaves_out(wsss: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsss.benchmarks import rows_alone

    monkeypatch.setattr(rows_alone, "check_rows", lambda model, graph: rows_alone.RowsAlone(rows=3, worst=1e-7))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = wsss("verify", "mini")
    assert answer.code == 0
    assert "sam/encoder                  3 rows equal those alone within 1.0e-07" in answer.out
    assert "hashes, inputs and outputs of 9 graphs are right" in answer.out
    assert f"not compared with PyTorch, which needs: {install_line('export')}" in answer.err
    assert json.loads(wsss("verify", "mini", "--json").out)[0] == {"graph": "clip/image", "rows": 3, "skipped": 0, "worst": 1e-7}


def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    def run(*arguments: str, **more: str) -> str:
        start = "import sys; sys.argv[0] = 'wsss'; from wsss.cli.main import main; main()"
        environment = {**os.environ, "HOME": str(tmp_path), **more}
        command = [sys.executable, "-c", start, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout

    for words, found in (
        ("wsss lab", ["label"]),
        ("wsss label --eng", ["--engine"]),
        ("wsss export --model s", ["sam", "sam3", "segmenter"]),
    ):
        place = str(words.count(" "))
        assert run(_WSSS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place).split() == found
    assert "_wsss_completion" in run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")


def test_no_summary_of_a_command_is_cut_off(wsss: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    commands = wsss("--help").out.partition("Commands:\n")[2].splitlines()
    assert len(commands) == 16
    assert all(line.endswith(".") and not line.endswith("...") for line in commands), commands


def test_the_choices_of_flags_are_those_of_the_program() -> None:
    assert get_args(Engine) == ENGINES
    assert get_args(Format) == FORMATS
    assert get_args(Preset) == tuple(PRESETS)


def test_version_and_help(wsss: Run) -> None:
    assert wsss("--version").out == f"wsss {__version__}\n"
    assert "label" in wsss("--help").out
    assert "--retry-failed" in wsss("label", "-h").out


# ---- wsss.toml ----


def toml(folder: Path, text: str) -> None:
    (folder / "wsss.toml").write_text(text)


def configured(world: World, more: str = "") -> str:
    return f'[label]\nimages = "photos"\nclasses = "red, green, blue"\nbundle = "{world.bundle}"\nout = "store"\n{more}'


def test_a_configured_folder_needs_no_flags(wsss: Run, world: World, photos: Path, tmp_path: Path) -> None:
    toml(tmp_path, configured(world, "gate = false\nbox-threshold = 0.4\nbatch = 2\njson = true\n"))
    assert json.loads(wsss("label").out.splitlines()[-1])["labelled"] == 5
    rules = read_run(tmp_path / "store")["rules"]
    assert (rules["gate"], rules["box_threshold"], rules["nms"]) == (False, 0.4, 0.5)


def test_what_is_typed_wins(wsss: Run, world: World, photos: Path, tmp_path: Path) -> None:
    toml(tmp_path, configured(world, "gate = false\nmargin = 0.3\n"))
    assert wsss("label", "photos/sub", "--out", "second", "--margin", "0.2", "--gate").code == 0
    assert not (tmp_path / "store").exists()
    assert [record["path"] for record in read_records(tmp_path / "second")] == ["three.png"]
    rules = read_run(tmp_path / "second")["rules"]
    assert (rules["margin"], rules["gate"]) == (0.2, True)


def test_arguments_that_must_be_given_may_stand_there_too(label: Run, wsss: Run, tmp_path: Path) -> None:
    label()
    toml(tmp_path, '[report]\nstore = "store"\nimages = "photos"\n')
    assert wsss("report").out == "store/report.html\n"


def test_one_value_of_a_repeatable_flag_needs_no_list(wsss: Run, tmp_path: Path) -> None:
    toml(tmp_path, '[export]\nmodel = "all"\nweights = "sam.pth"\n')
    refused(wsss("export"), 2, "--weights sam.pth: expected MODEL=... with one of clip, grounding-dino, sam")
    toml(tmp_path, '[export]\nmodel = "all"\nweights = ["clip=c.pt", "sam.pth"]\n')
    refused(wsss("export"), 2, "--weights sam.pth: expected MODEL=...")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[label]\nclases = 'voc'", "did you mean 'classes'?"),
        ("[lable]\n", "expected tables named after commands"),
        ("[label", "expected TOML"),
    ],
)
def test_a_typo_in_wsss_toml(wsss: Run, tmp_path: Path, text: str, message: str) -> None:
    toml(tmp_path, text)
    refused(wsss("label"), 2, "wsss.toml", message)


def test_a_value_of_the_wrong_type_in_wsss_toml(wsss: Run, world: World, photos: Path, tmp_path: Path) -> None:
    toml(tmp_path, configured(world, 'batch = "many"\n'))
    answer = wsss("label")
    refused(answer, 2, "wsss.toml: [label] batch: expected a whole number, got 'many'", "hint: batch = 8")


def test_classes_may_be_an_array(wsss: Run, world: World, photos: Path, tmp_path: Path) -> None:
    toml(tmp_path, configured(world).replace('"red, green, blue"', '["red", "green", "blue"]'))
    assert wsss("label").code == 0
    assert read_run(tmp_path / "store")["classes"] == ["red", "green", "blue"]


# ---- bad input ----


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["label"], "Missing argument 'IMAGES'"),
        (["label", "photos", "--classes", "voc"], "Missing option '--out'"),
        (["label", "photos", "--out", "store"], "wsss: --classes is missing\n\nhint: for example: --classes voc"),
        (["export"], "Missing option '--model'. Choose from:\n\tclip,\n\tgrounding-dino,"),
        (["report"], "Missing argument 'STORE'"),
    ],
)
def test_a_missing_flag_is_named(wsss: Run, argv: list[str], missing: str) -> None:
    answer = wsss(*argv)
    assert (answer.code, answer.out) == (2, "")
    assert missing in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--nms", "1.5"], "--nms: expected a number in 0..1, got 1.5"),
        (["--tag-threshold", "-1"], "--tag-threshold: expected a number in 0..1"),
    ],
)
def test_a_flag_that_means_nothing(label: Run, flags: list[str], message: str) -> None:
    refused(label(*flags), 2, message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["label", "--bach", "4"], "--bach"),
        (["label", "--batch", "0"], "'--batch'"),
        (["label", "--batch", "x"], "'--batch'"),
        (["lable"], "'lable'"),
        (["label", "--engine", "tpu"], "'tpu' is not one of 'auto', 'ort', 'openvino', 'trt', 'trt-rtx', 'eager'"),
        (["export", "--model", "dino"], "'dino' is not one of 'clip', 'grounding-dino', 'sam', 'sam3', 'all', 'segmenter'"),
    ],
)
def test_what_click_refuses_exits_with_2(wsss: Run, argv: list[str], message: str) -> None:
    answer = wsss(*argv)
    assert answer.code == 2
    assert "Usage: " in answer.err
    assert message in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "sam", "--sampling", "gather"], "--sampling: for grounding-dino only, got --model sam"),
        (["--model", "sam", "--size", "800"], "--size: expected HxW in pixels, got '800'"),
        (["--model", "sam", "--size", "0x5"], "--size: expected HxW"),
        (["--model", "sam", "--engine", "onnx", "--fp32-accumulation"], "--fp32-accumulation: for fp16 only, got fp32"),
        (["--model", "sam", "--precision", "bf16", "--fp32-accumulation"], "--fp32-accumulation: for fp16 only, got bf16"),
    ],
)
def test_export_flags_that_mean_nothing(wsss: Run, argv: list[str], message: str) -> None:
    pytest.importorskip("torch")
    refused(wsss("export", *argv), 2, message)


def test_export_flags_reach_the_exporter_and_the_builder_of_engines(wsss: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from wsss.export.family import Family, Options
    from wsss.export.to_engine import BuildOptions

    asked: list[object] = []

    def export_model(family: Family, *, log: object, **how: object) -> SimpleNamespace:
        asked.append({"family": family.name, **how})
        rows = [ParityRow(output="y", batch=1, row=0, against="reference", error=error, worst=1) for error in (1e-6, 2e-3, 1e-5)]
        return SimpleNamespace(graphs={"encoder": SimpleNamespace(parity=SimpleNamespace(rows=rows), openvino={})})

    def build_plans(model: object, options: BuildOptions, log: object) -> SimpleNamespace:
        asked.append((model, options))
        return SimpleNamespace(manifest=SimpleNamespace(graphs={"encoder": SimpleNamespace(plan_for=lambda *_: plan)}))

    plan = SimpleNamespace(seconds=4.0)
    toy = Family(name="toy", variants=(), default="usual", prepare=None, official=lambda kind: f"official {kind}")  # type: ignore[arg-type]
    monkeypatch.setattr("wsss.export.family.family", lambda name: dataclasses.replace(toy, name=name))
    monkeypatch.setattr("wsss.export.exporting.export_model", export_model)
    monkeypatch.setattr("wsss.export.exporting.standing_model", lambda *_, **how: asked.append(how))
    monkeypatch.setattr("wsss.export.to_engine.build_plans", build_plans)
    monkeypatch.setattr("wsss.spec.open_bundle", lambda folder: SimpleNamespace(model=lambda name: (folder, name)))
    monkeypatch.setattr("wsss.engines.plan.find_gpus", tuple)
    answer = wsss(
        *("export", "--model", "sam", "--variant", "vit_l", "--weights", "random:3", "--bundle", "here", "--batch", 1, 2, 3),
        *("--precision", "bf16", "--engine", "trt-rtx", "--workspace", 64),
        *("--compute-capability", "sm89", "--compute-capability", "sm120", "--device", 1, "--optimization-level", 4),
    )
    options, here = Options(batch=AxisRange(1, 2, 3), precision="bf16"), {"bundle": Path("here"), "openvino": False}
    assert asked == [
        {"variant": "vit_l", "weights": "random:3", "options": options},
        {"family": "sam", "variant": "vit_l", "weights": "random:3", **here, "options": options},
        (
            (Path("here"), "sam"),
            BuildOptions(flavour="trt-rtx", workspace_mib=64, capabilities=("sm89", "sm120"), device=1, optimization_level=4),
        ),
    ]
    assert "worst error against the official module 2.0e-03" in answer.out
    assert "here/sam: 1 trt-rtx engines, built in 4 s" in answer.out

    asked.clear()
    answer = wsss("export", "--model", "sam", "--engine", "trt-rtx", "--hardware-compatible")
    refused(answer, 2, "--hardware-compatible is for the full TensorRT")
    assert not asked
    wsss("export", "--model", "sam", "--engine", "trt", "--bundle", "here", "--hardware-compatible")
    assert asked[-1][1] == BuildOptions(flavour="trt", hardware_compatible=True)  # type: ignore[index]
    asked.clear()
    wsss("export", "--model", "grounding-dino", "--size", "32x48", "--size", "48x32", "--sampling", "gather", "--engine", "onnx")
    options = Options(sizes=((32, 48), (48, 32)), sampling="gather", precision="fp32")
    told = {
        "variant": "usual",
        "weights": "official usual",
        "bundle": Path("bundle"),
        "options": options,
        "openvino": False,
    }
    assert asked == [{"family": "grounding-dino", **told}]
    asked.clear()
    wsss("export", "--model", "grounding-dino", "--precision", "auto", "--engine", "onnx")
    assert asked == [{"family": "grounding-dino", **told, "options": Options(precision="fp16", measured=True)}]


@pytest.mark.parametrize("in_bf16", [True, False])
def test_openvino_takes_bf16_where_the_processor_computes_in_it(
    wsss: Run, monkeypatch: pytest.MonkeyPatch, in_bf16: bool
) -> None:
    pytest.importorskip("torch", reason="needs torch: pip install 'wsss[export]'")
    from wsss.export.family import Options

    asked: list[dict[str, object]] = []

    def export_model(family: object, **how: object) -> SimpleNamespace:
        asked.append(how)
        return SimpleNamespace(graphs={})

    monkeypatch.setattr("wsss.export.exporting.export_model", export_model)
    monkeypatch.setattr("wsss.engines.openvino.computes_in_bf16", lambda: in_bf16)
    answer = wsss("export", "--model", "sam", "--engine", "openvino")
    wsss("export", "--model", "sam", "--engine", "openvino", "--precision", "fp32")
    assert [(how["options"], how["openvino"]) for how in asked] == [
        (Options(precision="bf16" if in_bf16 else "fp32", for_cpu=True), True),
        (Options(precision="fp32", for_cpu=True), True),
    ]
    assert ("in bf16, in which this processor computes" if in_bf16 else "in fp32: this processor") in answer.err


def test_no_images(label: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    refused(label(images="none"), 1, "none: expected a folder of images, found nothing", "hint: ")
    refused(label(images="empty"), 1, "empty: no images in it", "hint: files ending in .jpg")
    refused(label(images="text"), 1, "text: no images in it")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("vocc", "--classes vocc: no such class list; did you mean voc?"),
        ("list.txt", "--classes list.txt: no such file"),
        ("red, red", "the class 'red' occurs twice"),
        ("red, Red", "occurs twice"),
        ("red, st. bernard", "the class name 'st. bernard' contains ."),
        ("what?,red", "the class name 'what?' contains ?"),
        ("", "the class list is empty"),
        (" , ", "the class list is empty"),
        ("red, background", "'background' is not a class to look for: labels 0 (background) and 255 (void) are in every list"),
    ],
)
def test_a_class_list_that_does_not_work(label: Run, classes: str, message: str, tmp_path: Path) -> None:
    refused(label(classes=classes), 1, message, "\nhint: ")
    assert not (tmp_path / "store").exists()


def test_a_bundle_that_is_none_lacks_a_model_or_is_damaged(label: Run, world: World, tmp_path: Path) -> None:
    refused(
        label("--bundle", "nowhere"), 1, "nowhere: expected a bundle folder", "hint: wsss export --model all --bundle nowhere"
    )
    refused(label("--bundle", "photos"), 1, "found no model in it", "hint: wsss export")
    (world.bundle / "clip" / "tokenizer.json").write_text("{}")
    refused(label(), 1, "tokenizer.json: its sha256 is", "hint: export the model again")
    (world.bundle / "clip").rename(tmp_path / "away")
    refused(label(), 1, "needs the model 'clip', the bundle has grounding-dino, sam", "hint: wsss export --model clip")
    assert label("--no-gate").code == 0, "which does not need it"


def test_an_output_that_cannot_be_written(label: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").touch()
    refused(label("--out", "file"), 1, "--out file: cannot be written: File exists", "hint: give a folder you may write to")
    refused(label("--out", "file/store"), 1, "--out file/store: cannot be written", "hint: ")
    refused(label("--out", "thesis"), 1, "--out thesis: the folder is not empty", "hint: give a new or empty folder")


def test_a_store_of_other_settings(label: Run) -> None:
    label()
    refused(label("--margin", "0.2"), 1, "--out store: was made with rules", "hint: give a new --out")


def test_bad_labels_and_boxes(label: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"red.png": ["purple"]}')
    refused(label("--labels", "none.json"), 1, "--labels none.json: cannot be read: No such file", "hint: ")
    refused(
        label("--labels", "bad.json"),
        1,
        "--labels bad.json: red.png: the class 'purple' is not in this run's list",
        "check --classes; --ignore-unknown",
    )
    refused(label("--boxes", "none"), 1, "--boxes none: no such file or folder", "hint: ")


def test_a_missing_extra_says_what_to_install(wsss: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("wsss.export")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(wsss("export", "--model", "sam"), 1, "needs torch, which is not installed", f"hint: {install_line('export')}")


# ---- a fresh process ----


def test_help_starts_without_the_heavy_libraries() -> None:
    """The promise is 0.5 s; what costs the time is checked instead of the clock."""
    heavy = {"torch", "numpy", "onnxruntime", "onnx", "PIL", "tokenizers", "transformers", "rich"}
    code = (
        "import sys; sys.argv = ['wsss', '--help']\n"
        "from wsss.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({heavy} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Photographs and a class list in" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_and_an_error_is_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "wsss", "label"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: ") and "Missing argument 'IMAGES'." in done.stderr
