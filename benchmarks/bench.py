"""``wsss bench``: speed of a bundle on this machine, graph by graph and as a chain, beside the machine's measured maximum.

The report (`run_bench`, ``wsss bench --json``) is one object:

``wsss``, ``commit``, ``date``, ``machine``
    Version, time and machine (`wsss.engines.machine.Machine`). ``commit`` is None outside of a git checkout.
``bundle``, ``engine``, ``device``
    The bundle, engine and device used, with ``auto`` resolved.
``ceilings``
    By precision: matrix product and copy measured before (`wsss.benchmarks.ceiling`).
``graphs``
    A row for each graph and batch size (`wsss.benchmarks.latency`).
``chain``
    The chain end to end (`wsss.benchmarks.throughput`), or None.
``published``
    Published speeds of the same models (`wsss.benchmarks.published`).
``left_out``
    What was not measured, each with the reason.

A CSV file gets one row for each graph and batch size and one for the chain (``COLUMNS``); rows are added to an existing file.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__
from ..engines.machine import machine
from ..engines.opening import choose
from ..errors import UsageError, WsssError
from ..extras import install_line
from ..runtime.bundles import MINI
from ..spec import open_bundle
from .ceiling import Ceiling, measure_ceiling
from .latency import measure_graph
from .published import published_for
from .steps import commit
from .throughput import CHAIN_MODELS, measure_chain, reference_for

COLUMNS = (
    *("date", "commit", "wsss", "processor", "cores", "gpu", "power_limit_w", "driver", "cuda"),
    *("onnxruntime", "tensorrt", "torch"),
    *("engine", "device", "model", "variant", "graph", "precision", "batch", "unit", "calls", "p50_ms", "p90_ms", "p99_ms"),
    *("per_second", "gmacs", "share_of_bound", "teraflops", "gigabytes_per_second", "parity", "agreement"),
)
"""Columns of the CSV file. Quality stands beside speed: ``parity`` is the gate's largest error, ``agreement`` the share of pixels
labeled as in FP32."""
Report = dict[str, Any]
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    bundle: Path = MINI
    engine: str = "auto"
    device: str = "auto"
    models: tuple[str, ...] = ()
    """Models of the bundle to measure; empty measures all, and the chain."""
    batches: tuple[int, ...] = ()
    """Batch sizes; empty takes 1 and the usual batch of each graph. The chain takes the largest, or 8."""
    images: Path | None = None
    """Photographs for the chain; None draws scenes."""
    classes: str | None = None
    """Classes of the chain; None takes those of the drawn scenes, or VOC's for photographs."""
    count: int = 24
    """Images that the chain labels."""
    boxes: int | None = None
    """Number of random boxes in each image that replace the detector's; None keeps the detector's."""
    seconds: float = 0.3
    """Time for each graph and batch size."""
    unverified: bool = False
    """TensorRT: accept engines whose gate has not run."""
    reference: Path | None = None
    """FP32 graphs of the same weights; None takes the shipped ones where they have these weights."""


def run_bench(options: BenchOptions, log: Log) -> Report:
    """Measure a bundle; the module docstring describes the report.

    Raises:
        WsssError: no such bundle or model, or none of its graphs can be run here.
    """
    bundle = open_bundle(options.bundle)
    if unknown := set(options.models) - set(bundle.models()):
        raise UsageError(f"--model {', '.join(sorted(unknown))}: {options.bundle} has {', '.join(bundle.models())}")
    models = [bundle.model(name) for name in bundle.models() if not options.models or name in options.models]
    engine, device = choose(options.engine, options.device, models)
    log(f"engine {engine} on {device}")
    ceilings: dict[str, Ceiling] = {}
    rows, left_out = [], []
    for model in models:
        for name, spec in model.manifest.graphs.items():
            if spec.precision not in ceilings:
                ceilings[spec.precision] = measure_ceiling(engine, device, spec.precision)
            log(f"{model.manifest.family}/{name}")
            try:
                for row in measure_graph(
                    model,
                    name,
                    options.batches,
                    engine=engine,
                    device=device,
                    ceiling=ceilings[spec.precision],
                    seconds=options.seconds,
                    unverified=options.unverified,
                ):
                    rows.append(row)
            except WsssError as error:
                left_out.append(f"{model.manifest.family}/{name}: {error.message}")
    if not rows:
        raise WsssError(f"{options.bundle}: no graph could be run: {left_out[0]}", hint="wsss doctor says what runs here")
    chain = None
    if not options.models and all(name in bundle.models() for name in CHAIN_MODELS):
        log("the chain")
        precision = "fp16" if "fp16" in ceilings else next(iter(ceilings))
        with tempfile.TemporaryDirectory() as work:
            chain = measure_chain(
                options.bundle,
                Path(work),
                engine=engine,
                device=device,
                batch=max(options.batches, default=8),
                images=options.images,
                classes=options.classes or ("mini" if options.images is None else "voc"),
                count=options.count,
                boxes=options.boxes,
                ceiling=ceilings[precision],
                reference=options.reference or reference_for(options.bundle, engine, device),
                unverified=options.unverified,
            )
    else:
        missing = [name for name in CHAIN_MODELS if name not in bundle.models()]
        reason = f"the bundle has no {', '.join(missing)}" if missing else "--model selects graphs alone"
        left_out.append(f"the chain: {reason}")
    if find_spec("onnx") is None:
        left_out.append(f"Gmac, of bound, work: counted with onnx, which is not installed: {install_line('export')}")
    if unproven := sorted({f"{row.model}/{row.graph}" for row in rows if row.parity is None}):
        left_out.append(f"parity: {', '.join(unproven)}: not compared with the official implementation: wsss verify")
    return {
        "wsss": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dataclasses.asdict(machine()),
        "bundle": "mini" if options.bundle == MINI else str(options.bundle),
        "engine": engine,
        "device": device,
        "ceilings": {precision: dataclasses.asdict(ceiling) for precision, ceiling in ceilings.items()},
        "graphs": [dataclasses.asdict(row) for row in rows],
        "chain": None if chain is None else dataclasses.asdict(chain),
        "published": [dataclasses.asdict(figure) for figure in published_for(model.manifest for model in models)],
        "left_out": left_out,
    }


# ---- for a terminal ----


def table(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    host = report["machine"]
    gpu = next((gpu["name"] for gpu in host["gpus"]), "")
    where = gpu if report["device"] != "cpu" and gpu else f"{host['processor']}, {host['cores']} cores"
    yield f"{report['bundle']} in {report['engine']} on {report['device']}: {where}"
    for precision, best in report["ceilings"].items():
        yield (
            f"maximum here in {precision}: {_shown(best['teraflops'])} TFLOP/s, {_shown(best['gigabytes_per_second'])} GB/s "
            f"({best['how']})"
        )
    yield ""
    yield (
        f"{'graph':30} {'precision':9} {'batch':>13} {'p50 ms':>9} {'p90 ms':>9} {'p99 ms':>9} {'a second':>9} {'Gmac':>8} "
        f"{'of bound':>8} {'parity':>8}"
    )
    for row in report["graphs"]:
        yield (
            f"{row['model'] + '/' + row['graph']:30} {row['precision']:9} {row['batch']:>5} {row['unit']:7} "
            f"{_shown(row['p50_ms']):>9} {_shown(row['p90_ms']):>9} {_shown(row['p99_ms']):>9} {_shown(row['per_second']):>9} "
            f"{_shown(row['gmacs']):>8} {_share(row['share_of_bound']):>8} {_parity(row['parity']):>8}"
        )
    if report["chain"]:
        yield ""
        yield from _chain_lines(report["chain"])
    for figure in report["published"]:
        yield (
            f"published  {figure['family']} {figure['variant']}: {figure['per_second']:g} images/s, {figure['what']}, "
            f"{figure['machine']} ({figure['source']})"
        )
    for reason in report["left_out"]:
        yield f"left out   {reason}"


def _chain_lines(chain: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"chain      {_shown(chain['per_second'])} images/s, {chain['images']} images in batches of {chain['batch']}, "
        f"{chain['boxes_an_image']} boxes an image, {chain['seconds']:.1f} s, {chain['failed']} failed"
    )
    for stage, times in chain["stages"].items():
        waiting = f", its thread waited {times['waiting']:.2f} s" if "waiting" in times else ""
        yield f"  {stage:8} {times['seconds']:8.2f} s{waiting}"
    yield f"  engines  {chain['engine_seconds']:8.2f} s, {_share(chain['engine_share'])} of the time"
    if chain["gmacs_an_image"] is not None:
        yield f"  work     {_shown(chain['gmacs_an_image'])} Gmac an image, {_share(chain['share_of_bound'])} of the matrix bound"
    if chain["agreement"] is not None:
        yield (
            f"  quality  {100 * chain['agreement']:.3f} % of pixels as in {chain['reference']}, "
            f"mIoU {chain['agreement_miou']:.4f} against them"
        )
    if chain["truth_miou"] is not None:
        yield f"  quality  mIoU {chain['truth_miou']:.4f} against the truth of the drawn scenes"


def _shown(value: float | None) -> str:
    """A number with at most four digits and without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 0.001 or value == 0 else f"{value:.6f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _parity(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


# ---- for files ----


def append_csv(path: Path, report: Report) -> int:
    """Add the report's rows to a CSV file, new or existing; returns their number.

    Raises:
        WsssError: the file has other columns, or cannot be written.
    """
    rows = list(csv_rows(report))
    try:
        existing = path.read_text(encoding="utf-8") if path.is_file() else ""
        head = next(csv.reader([existing.partition("\n")[0]]), [])
        if existing and head != list(COLUMNS):
            raise WsssError(f"{path}: expected the columns {', '.join(COLUMNS[:4])}, ..., got {', '.join(head[:4])}, ...")
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not existing:
            writer.writeheader()
        writer.writerows(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())
    except (OSError, UnicodeDecodeError) as error:
        raise WsssError(f"{path}: cannot be written: {error}", hint="give another --csv file") from None
    return len(rows)


def csv_rows(report: Report) -> Iterator[dict[str, Any]]:
    """A row for each graph and batch size, and one for the chain."""
    host = report["machine"]
    gpu: dict[str, Any] = next(iter(host["gpus"]), {})
    library = host["tensorrt"].get(report["engine"], {})
    packages = host["packages"]
    common = {
        **{name: report[name] for name in ("date", "commit", "wsss", "engine", "device")},
        **{name: host[name] for name in ("processor", "cores", "driver", "cuda")},
        "gpu": gpu.get("name"),
        "power_limit_w": gpu.get("power_limit_w"),
        "onnxruntime": packages.get("onnxruntime-gpu") or packages.get("onnxruntime"),
        "tensorrt": library.get("version"),
        "torch": packages.get("torch"),
    }
    for row in report["graphs"]:
        best = report["ceilings"][row["precision"]]
        values = {**common, **best, **row}
        yield {name: values.get(name) for name in COLUMNS}
    if chain := report["chain"]:
        precisions = {models.split()[-1] for models in chain["models"].values()}
        values = {
            **common,
            **{name: chain[name] for name in ("batch", "per_second", "share_of_bound", "agreement")},
            "model": "chain",
            "variant": " ".join(models.split()[0] for models in chain["models"].values()),
            "precision": "+".join(sorted(precisions)),
            "unit": "images",
            "calls": chain["images"],
            "gmacs": chain["gmacs_an_image"],
        }
        yield {name: values.get(name) for name in COLUMNS}
