"""One command for a machine with an NVIDIA GPU and no network: ``make gpu-check``.

    python -m wsss.benchmarks.gpu_check --out benchmarks/results [--bundle DIR] [--full] [--minutes 7]

Step by step (`wsss.benchmarks.steps`), into ``OUT/gpu-NAME.json``; run again, it goes on where it was cut. Needed are torch
and numpy, and TensorRT-RTX or TensorRT with cuda-bindings; what else is missing is recorded with what it kept from running.
Where no TensorRT runs on the GPU, ONNX Runtime's CUDA provider is measured, and without that PyTorch under autocast to FP16.

Beside ``identity`` and ``steps`` the file has ``engine`` (what was measured, and why nothing better), ``ended`` and
``not_begun`` (steps that the time did not suffice for). Results by step:

``machine``
    `wsss.engines.machine.Machine`, ``modules``: what can be imported, or why not.
``ceiling``
    By precision `wsss.benchmarks.ceiling.Ceiling`.
``NAME runs here``
    For each TensorRT that is installed: does a tiny engine build, load and compute on this GPU? ``attempts``, each with
    ``target`` (the portable set of compute capabilities, or this GPU's own), ``builds``, ``runs``, ``difference`` from
    numpy, ``error`` (TensorRT's words).
``mini: graphs``
    How each small model came: exported in FP16 here, brought along, or the shipped FP32 graphs with the reason.
``mini: engines``, ``SAM vit_b: engines`` ...
    By graph: ``seconds`` of building, ``megabytes``.
``mini: gate``, ``SAM vit_b: gate`` ...
    By graph: ``passed``, ``errors`` by output and ``why`` it did not pass. The mini models pass the gate of `wsss verify`;
    those of full size are compared at 1 and 2 rows, and nothing is entered in their manifests.
``gpu tests``
    pytest's last line.
``mini: latency``, ``SAM vit_b: latency`` ...
    Rows of `wsss.benchmarks.latency`, as far as they came: graphs that failed are in ``failed``.
``mini: chain``, ``chain with SAM vit_b`` ...
    `wsss.benchmarks.throughput.ChainResult`. Random weights find nothing: 10 drawn boxes stand in each image.
``SAM vit_b: graphs`` ...
    Seconds of tracing in FP16, weights ``random:0``, and megabytes. Not gated: they are never used for labels.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..engines.machine import Machine, machine
from ..engines.opening import FLAVOURS
from ..errors import WsssError
from .bench import commit
from .gpu_steps import ROOT, mark_of
from .steps import Log, Record, Step, run_steps

WORK = Path("build") / "gpu-check"
FULL_SIZE = {
    "SAM vit_b": ("sam", "vit_b"),
    "CLIP ViT-B-16": ("clip", "ViT-B-16"),
    "Grounding-DINO swin_t": ("grounding-dino", "swin_t"),
    "SAM vit_h": ("sam", "vit_h"),
}
"""The largest comes last."""
BY_DEFAULT = ("SAM vit_b", "CLIP ViT-B-16")
"""The others with ``--full``."""
MINUTES, FULL_MINUTES = 7.0, 30.0
BOXES = 10
"""In each image of a chain of random weights."""
GATE_ROWS = 2
"""Rows of a call when full-size models are compared; the reference computes on the CPU."""
ENGINES = {
    "trt": "TensorRT",
    "trt-rtx": "TensorRT-RTX",
    "ort": "ONNX Runtime's CUDA provider",
    "eager": "PyTorch, autocast to FP16",
}


def check(
    out: Path, *, bundles: Sequence[Path] = (), full: bool = False, minutes: float | None = None, work: Path = WORK, log: Log
) -> Record:
    """Runs what is not done yet.

    Args:
        out: folder of the record.
        bundles: FP16 models exported elsewhere, taken in the place of exporting them here.
        full: Grounding-DINO and SAM ViT-H too, and chains of full size.
        minutes: no step runs after that; None takes 7, or 30 for ``full``.
        work: folder for graphs and engines.

    Raises:
        WsssError: this machine has no GPU.
    """
    known = machine()
    if not known.gpus:
        raise WsssError(
            "gpu-check: expected an NVIDIA GPU with a working driver, found none",
            hint="wsss doctor says what this machine has; wsss bench measures what runs without a GPU",
        )
    ends = time.monotonic() + 60 * (minutes or (FULL_MINUTES if full else MINUTES))
    slug = re.sub(r"[^a-z0-9]+", "-", known.gpus[0].name.lower()).strip("-")
    record = Record(out / f"gpu-{slug}.json", identity_of(known, bundles))
    record.told |= {"wsss": __version__, "commit": commit(), "begun": _now()}
    late = run_steps(first_steps(known, record.path), record, ends=ends, log=log)
    engine, why = choose_engine(record, known)
    log(f"measured: {ENGINES[engine]}{f' ({why})' if why else ''}")
    record.told["engine"] = {"name": engine, "why_nothing_better": why}
    steps = later_steps(engine, [path.resolve() for path in bundles], full, work.resolve(), record.path)
    late += run_steps(steps, record, ends=ends, log=log)
    record.told |= {"ended": _now(), "not_begun": late}
    record.save()
    return record


def identity_of(known: Machine, bundles: Sequence[Path]) -> dict[str, Any]:
    """What results belong to: another GPU, driver, library, source or bundle asks for all of them anew."""
    digest = hashlib.sha256()
    for folder in ("wsss", "engines", "export", "runtime", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return {
        "gpu": known.gpus[0].name,
        "driver": known.driver,
        "packages": dict(known.packages),
        "tensorrt": {flavour: library.version for flavour, library in known.tensorrt.items()},
        "sources": digest.hexdigest(),
        "bundles": [path.name for path in bundles],
    }


# ---- which steps there are ----


def first_steps(known: Machine, record: Path) -> list[Step]:
    """What decides the others."""
    step = _Maker(record)
    probes = [step(f"{ENGINES[each]} runs here", 120, "probe", each) for each in FLAVOURS if each in known.tensorrt]
    return [step("machine", 120, "machine"), step("ceiling", 120, "ceiling"), *probes]


def choose_engine(record: Record, known: Machine) -> tuple[str, str]:
    """The best engine that runs on this GPU, and why nothing better.

    Returns:
        ``trt``, ``trt-rtx``, ``ort`` or ``eager``; one sentence for each better one.
    """
    reasons = []
    for flavour in FLAVOURS:
        name = ENGINES[flavour]
        if flavour not in known.tensorrt:
            reasons.append(f"{name} is not installed")
            continue
        step = record.steps.get(f"{name} runs here", {})
        attempts = (step.get("result") or {}).get("attempts", [])
        if attempts and attempts[0]["runs"]:
            return flavour, "; ".join(reasons)
        said = (attempts[0].get("error") if attempts else None) or step.get("error") or "no result"
        reasons.append(f"{name} {known.tensorrt[flavour].version} refuses this GPU ({known.gpus[0].target}): {said}")
    if "CUDAExecutionProvider" in known.providers:
        return "ort", "; ".join(reasons)
    return "eager", "; ".join([*reasons, "onnxruntime has no CUDA provider"])


def later_steps(engine: str, bundles: Sequence[Path], full: bool, work: Path, record: Path) -> list[Step]:
    """Everything that is measured with one engine."""
    step, brought, mini = _Maker(record), [str(path) for path in bundles], work / "mini"
    steps = [step("mini: graphs", 300, "graphs-of-mini", str(mini), *brought, product=mini / "sam" / "manifest.json")]
    steps += _measured(step, "mini", mini, engine, rows=0, limit_s=150)
    steps.append(step("gpu tests", 150, "tests"))
    steps.append(step("mini: chain", 150, "chain", engine, "0", str(mini), needs=_ready("mini", engine)))
    folders = {title: work / f"{name}-{variant}" for title, (name, variant) in FULL_SIZE.items()}
    for title, (name, variant) in FULL_SIZE.items():
        if title in BY_DEFAULT or full:
            made = folders[title] / name / "manifest.json"
            limit = 500 if variant == "vit_h" else 240
            steps.append(step(f"{title}: graphs", limit, "graphs", str(folders[title]), name, variant, *brought, product=made))
            steps += _measured(step, title, folders[title], engine, rows=GATE_ROWS, limit_s=limit)
    for title in ("SAM vit_b", "SAM vit_h") if full else ():
        parts = ("CLIP ViT-B-16", "Grounding-DINO swin_t", title)
        needs = tuple(name for part in parts for name in _ready(part, engine))
        paths = [str(folders[part]) for part in parts]
        steps.append(step(f"chain with {title}", 300, "chain", engine, str(BOXES), *paths, needs=needs))
    return steps


def _measured(step: _Maker, title: str, bundle: Path, engine: str, *, rows: int, limit_s: float) -> Iterator[Step]:
    """Building, latency and gate of one bundle."""
    needs: tuple[str, ...] = (f"{title}: graphs",)
    if engine in FLAVOURS:
        yield step(f"{title}: engines", limit_s, "engines", str(bundle), engine, needs=needs, product=mark_of(bundle, engine))
        needs = (f"{title}: engines",)
    yield step(f"{title}: latency", limit_s, "latency", str(bundle), engine, needs=needs)
    if engine != "eager":  # it is the reference
        yield step(f"{title}: gate", limit_s, "gate", str(bundle), engine, str(rows), needs=needs)


def _ready(title: str, engine: str) -> tuple[str, ...]:
    return (f"{title}: engines",) if engine in FLAVOURS else (f"{title}: graphs",)


class _Maker:
    """Makes steps of this check; all of them read the record."""

    def __init__(self, record: Path) -> None:
        self._record = record

    def __call__(
        self, name: str, limit_s: float, kind: str, *arguments: str, needs: tuple[str, ...] = (), product: Path | None = None
    ) -> Step:
        command = [sys.executable, "-m", "wsss.benchmarks.gpu_steps", kind, *arguments, "--record", str(self._record)]
        return Step(name=name, command=command, limit_s=limit_s, needs=needs, product=product)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- the command line ----


def summary(record: Record) -> Iterator[str]:
    """What was measured, in a few lines."""
    for name, step in record.steps.items():
        if name.endswith(": latency") and step.get("result"):
            for row in step["result"]["rows"]:
                share = "" if row["share_of_bound"] is None else f", {100 * row['share_of_bound']:.0f} % of the bound"
                yield (
                    f"{row['model']}/{row['graph']} {row['variant']}, {row['batch']} {row['unit']}: "
                    f"{row['p50_ms']:g} ms, {row['per_second']:g} a second{share}"
                )
        elif "chain" in name and step.get("result"):
            told = step["result"]
            share = "" if told["share_of_bound"] is None else f", {100 * told['share_of_bound']:.0f} % of the matrix bound"
            same = "" if told["agreement"] is None else f", {100 * told['agreement']:.3f} % of pixels as in FP32"
            yield f"{name}: {told['per_second']:g} images a second{share}{same}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the module; exits with 1 when something failed or time ran out, or without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m wsss.benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results", help="folder of the record")
    parser.add_argument(
        "--bundle", type=Path, action="append", default=[], help="FP16 models exported elsewhere; may be repeated"
    )
    parser.add_argument("--full", action="store_true", help="Grounding-DINO, SAM ViT-H and chains of full size too")
    parser.add_argument(
        "--minutes", type=float, help=f"no step runs after that; default {MINUTES:g}, {FULL_MINUTES:g} for --full"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder for graphs and engines")
    told = parser.parse_args(arguments)
    try:
        record = check(told.out, bundles=told.bundle, full=told.full, minutes=told.minutes, work=told.work, log=_say)
    except WsssError as error:
        _say(f"wsss: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on")
        raise SystemExit(130) from None
    for line in summary(record):
        print(line)
    failed = [name for name, step in record.steps.items() if step["status"] in ("failed", "timed out")]
    print(
        f"{os.path.relpath(record.path)}: {sum(record.is_done(name) for name in record.steps)} steps done, {len(failed)} failed"
    )
    if late := record.told["not_begun"]:
        _say(f"not begun, for lack of time: {', '.join(late)}; the same command goes on")
    if failed or late:
        raise SystemExit(1)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
