"""One command for a machine with an NVIDIA GPU and no network: ``make gpu-check``.

    python -m wsss.benchmarks.gpu_check --out benchmarks/results [--bundle DIR] [--full] [--minutes 7]

Runs in steps (`wsss.benchmarks.steps`) and writes ``OUT/gpu-NAME.json``; the same command continues an interrupted check. It
needs numpy, pillow, pyyaml, tokenizers and torch, and TensorRT-RTX or TensorRT with cuda-bindings; a step whose other packages
are missing is recorded as left out. Where no TensorRT runs on the GPU, ONNX Runtime's CUDA provider is
measured; without it, PyTorch under autocast to FP16.

Besides ``identity`` and ``steps`` the file has ``engine`` (what was measured, and why no better one), ``ended`` and
``not_begun`` (steps for which the time did not suffice). Results by step:

``machine``
    `wsss.engines.machine.Machine`, and ``modules``: which packages can be imported, or why not.
``ceiling``
    By precision `wsss.benchmarks.ceiling.Ceiling`.
``NAME runs here``
    For each installed TensorRT, whether a tiny engine builds, loads and computes on this GPU: ``attempts``, each with
    ``target`` (the portable set of compute capabilities, or that of this GPU), ``builds``, ``runs``, ``difference`` from
    numpy, ``error`` (TensorRT's message).
``mini: graphs``
    Where each small model comes from: exported in FP16 here, a given bundle, or the shipped FP32 graphs with the reason.
``mini: engines``, ``SAM vit_b: engines`` ...
    By graph: ``seconds`` of building, ``megabytes``.
``mini: gate``, ``SAM vit_b: gate`` ...
    By graph: ``passed``, ``errors`` by output, and ``why`` it did not pass. The mini models run the gate of `wsss verify`;
    full-size models are compared at batch 1 and 2, and their manifests do not change.
``gpu tests``
    pytest's last line. Where no TensorRT runs, its place is taken by networks of PyTorch, so that our buffers, contexts, CUDA
    graphs and threads run on every GPU.
``mini: latency``, ``SAM vit_b: latency`` ...
    Rows of `wsss.benchmarks.latency`; graphs that failed are in ``failed``.
``mini: chain``, ``chain with SAM vit_b`` ...
    `wsss.benchmarks.throughput.ChainResult`. Random weights find nothing, so each image gets 10 random boxes.
``SAM vit_b: graphs`` ...
    Seconds of the export in FP16 with weights ``random:0``, and megabytes. No gate: the graphs are never used for labels.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
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
from ..engines.plan import MODULES
from ..errors import WsssError
from .steps import ROOT, Log, Record, Step, commit, log, run_steps

WORK = Path("build") / "gpu-check"
FULL_SIZE = {
    "SAM vit_b": ("sam", "vit_b"),
    "CLIP ViT-B-16": ("clip", "ViT-B-16"),
    "Grounding-DINO swin_t": ("grounding-dino", "swin_t"),
    "MM-Grounding-DINO tiny": ("grounding-dino", "mm_tiny"),
    "SAM 2.1 base_plus": ("sam", "sam2.1_base_plus"),
    "SAM vit_h": ("sam", "vit_h"),
}
"""The largest comes last."""
BY_DEFAULT = ("SAM vit_b", "CLIP ViT-B-16")
"""The others need ``--full``."""
PACKAGES = {"numpy": "numpy", "PIL": "pillow", "tokenizers": "tokenizers", "torch": "torch", "yaml": "pyyaml"}
"""The distributions of the modules that every step needs."""
MINUTES, FULL_MINUTES = 7.0, 30.0
BOXES = 10
"""Random boxes in each image of a chain with random weights."""
GATE_ROWS = 2
"""Largest batch when full-size models are compared; the reference runs on the CPU."""
ENGINES = {
    "trt": "TensorRT",
    "trt-rtx": "TensorRT-RTX",
    "ort": "ONNX Runtime's CUDA provider",
    "eager": "PyTorch, autocast to FP16",
}


def check(
    out: Path, *, bundles: Sequence[Path] = (), full: bool = False, minutes: float | None = None, work: Path = WORK, log: Log
) -> Record:
    """Run the steps that are not done yet.

    Args:
        out: folder of the record.
        bundles: FP16 models exported elsewhere, which are used instead of exporting them here.
        full: also measure the detectors, SAM 2.1 and SAM ViT-H, and chains of full-size models.
        minutes: no step runs after this time; None takes 7, or 30 for ``full``.
        work: folder for graphs and engines.

    Raises:
        WsssError: this machine has no GPU, or packages are missing that every step needs.
    """
    if missing := [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise WsssError(f"gpu-check: needs {', '.join(missing)}", hint=f"pip install {' '.join(missing)}")
    known = machine()
    if not known.gpus:
        raise WsssError(
            "gpu-check: expected an NVIDIA GPU with a working driver, found none",
            hint="wsss doctor says what this machine has; wsss bench measures what runs without a GPU",
        )
    ends = time.monotonic() + 60 * (minutes or (FULL_MINUTES if full else MINUTES))
    slug = re.sub(r"[^a-z0-9]+", "-", known.gpus[0].name.lower()).strip("-")
    record = Record(out / f"gpu-{slug}.json", identity_of(known, bundles))
    record.content |= {"wsss": __version__, "commit": commit(), "begun": _now()}
    late = run_steps(first_steps(known, record.path), record, ends=ends, log=log)
    engine, why = choose_engine(record, known)
    log(f"measured: {ENGINES[engine]}{f' ({why})' if why else ''}")
    record.content["engine"] = {"name": engine, "why_nothing_better": why}
    steps = later_steps(engine, [path.resolve() for path in bundles], full, work.resolve(), record.path)
    late += run_steps(steps, record, ends=ends, log=log)
    record.content |= {"ended": _now(), "not_begun": late}
    record.save()
    return record


def identity_of(known: Machine, bundles: Sequence[Path]) -> dict[str, Any]:
    """The identity of the results: with another GPU, driver, library, source or bundle, all steps run again."""
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


# ---- the steps ----


def first_steps(known: Machine, record: Path) -> list[Step]:
    """The steps on whose results the others depend."""
    step = _StepMaker(record)
    installed = [flavour for flavour in MODULES if flavour in known.tensorrt]
    probes = [step(f"{ENGINES[flavour]} runs here", 120, "probe", flavour) for flavour in installed]
    return [step("machine", 120, "machine"), step("ceiling", 120, "ceiling"), *probes]


def choose_engine(record: Record, known: Machine) -> tuple[str, str]:
    """The best engine that runs on this GPU, and why no better one does.

    Returns:
        ``trt``, ``trt-rtx``, ``ort`` or ``eager``; the reasons, one for each better engine.
    """
    reasons = []
    for flavour in MODULES:
        name = ENGINES[flavour]
        if flavour not in known.tensorrt:
            reasons.append(f"{name} is not installed")
            continue
        step = record.steps.get(f"{name} runs here", {})
        attempts = (step.get("result") or {}).get("attempts", [])
        if attempts and attempts[0]["runs"]:
            return flavour, "; ".join(reasons)
        message = (attempts[0].get("error") if attempts else None) or step.get("error") or "no result"
        reasons.append(f"{name} {known.tensorrt[flavour].version} refuses this GPU ({known.gpus[0].target}): {message}")
    if "CUDAExecutionProvider" in known.providers:
        return "ort", "; ".join(reasons)
    return "eager", "; ".join([*reasons, "onnxruntime has no CUDA provider"])


def later_steps(engine: str, bundles: Sequence[Path], full: bool, work: Path, record: Path) -> list[Step]:
    """All steps that measure with one engine."""
    step, brought, mini = _StepMaker(record), [str(path) for path in bundles], work / "mini"
    steps = [step("mini: graphs", 300, "graphs-of-mini", str(mini), *brought, product=mini / "sam" / "manifest.json")]
    steps += _measured(step, "mini", mini, engine, rows=0, limit_s=150)
    steps.append(step("gpu tests", 150, "tests"))
    steps.append(step("mini: chain", 150, "chain", engine, "0", str(mini), needs=_ready("mini", engine)))
    folders = {title: work / f"{name}-{variant}" for title, (name, variant) in FULL_SIZE.items()}
    for title, (name, variant) in FULL_SIZE.items():
        if title in BY_DEFAULT or full:
            product = folders[title] / name / "manifest.json"
            limit = 500 if variant == "vit_h" else 240
            steps.append(step(f"{title}: graphs", limit, "graphs", str(folders[title]), name, variant, *brought, product=product))
            steps += _measured(step, title, folders[title], engine, rows=GATE_ROWS, limit_s=limit)
    for title in ("SAM vit_b", "SAM 2.1 base_plus", "SAM vit_h") if full else ():
        parts = ("CLIP ViT-B-16", "Grounding-DINO swin_t", title)
        needs = tuple(name for part in parts for name in _ready(part, engine))
        paths = [str(folders[part]) for part in parts]
        steps.append(step(f"chain with {title}", 300, "chain", engine, str(BOXES), *paths, needs=needs))
    return steps


def _measured(step: _StepMaker, title: str, bundle: Path, engine: str, *, rows: int, limit_s: float) -> Iterator[Step]:
    """The steps of one bundle: build, latency and gate."""
    needs: tuple[str, ...] = (f"{title}: graphs",)
    if engine in MODULES:
        yield step(f"{title}: engines", limit_s, "engines", str(bundle), engine, needs=needs, product=mark_of(bundle, engine))
        needs = (f"{title}: engines",)
    yield step(f"{title}: latency", limit_s, "latency", str(bundle), engine, needs=needs)
    if engine != "eager":  # PyTorch is the reference
        yield step(f"{title}: gate", limit_s, "gate", str(bundle), engine, str(rows), needs=needs)


def mark_of(bundle: Path, flavour: str) -> Path:
    """The file that marks a bundle whose engines are all built."""
    return bundle / f".engines-{flavour}"


def _ready(title: str, engine: str) -> tuple[str, ...]:
    return (f"{title}: engines",) if engine in MODULES else (f"{title}: graphs",)


class _StepMaker:
    """Make steps of this check; all of them can read the record."""

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
    """The main results, one a line."""
    for name, step in record.steps.items():
        if name.endswith(": latency") and step.get("result"):
            for row in step["result"]["rows"]:
                share = "" if row["share_of_bound"] is None else f", {100 * row['share_of_bound']:.0f} % of the bound"
                bounds = {"products and tensors": row["bound_ms"], "compiled memory traffic": row.get("traffic_ms")}
                least = ", ".join(f"{bound:g} ms by {what}" for what, bound in bounds.items() if bound is not None)
                yield (
                    f"{row['model']}/{row['graph']} {row['variant']}, {row['batch']} {row['unit']}: "
                    f"{row['p50_ms']:g} ms{least and f' (at least {least})'}, {row['per_second']:g} a second{share}"
                )
        elif name.endswith(": engines") and step.get("result"):
            for graph, engine in step["result"].items():
                if engine.get("fused_attentions") is not None:
                    fused, alone = engine["fused_attentions"], engine["softmaxes_alone"]
                    yield f"{name.removesuffix(': engines')} {graph}: {fused} attentions fused, {alone} softmaxes alone"
        elif "chain" in name and step.get("result"):
            chain = step["result"]
            share = "" if chain["share_of_bound"] is None else f", {100 * chain['share_of_bound']:.0f} % of the matrix bound"
            same = "" if chain["agreement"] is None else f", {100 * chain['agreement']:.3f} % of pixels as in FP32"
            yield f"{name}: {chain['per_second']:g} images a second{share}{same}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module; exits with 1 when a step failed, time ran out, or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m wsss.benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results", help="folder of the record")
    parser.add_argument(
        "--bundle", type=Path, action="append", default=[], help="FP16 models exported elsewhere; may be repeated"
    )
    parser.add_argument("--full", action="store_true", help="also measure the detectors, SAM 2.1, SAM ViT-H and full-size chains")
    parser.add_argument(
        "--minutes", type=float, help=f"no step runs after this time; default {MINUTES:g}, {FULL_MINUTES:g} with --full"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder for graphs and engines")
    given = parser.parse_args(arguments)
    try:
        record = check(given.out, bundles=given.bundle, full=given.full, minutes=given.minutes, work=given.work, log=log)
    except WsssError as error:
        log(f"wsss: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        log("interrupted; the same command continues")
        raise SystemExit(130) from None
    for line in summary(record):
        print(line)
    failed = [name for name, step in record.steps.items() if step["status"] in ("failed", "timed out")]
    print(
        f"{os.path.relpath(record.path)}: {sum(record.is_done(name) for name in record.steps)} steps done, {len(failed)} failed"
    )
    if late := record.content["not_begun"]:
        log(f"not begun, for lack of time: {', '.join(late)}; the same command continues")
    if failed or late:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
