"""CPU seconds, memory and results of the chain beside those of the official modules and of transformers' classes.

    python -m wsss.benchmarks.peers                                     # drawn scenes, random weights
    python -m wsss.benchmarks.peers --photos VOC/JPEGImages --bundle fp32=bundle --bundle bf16=bundle-bf16

All contenders have the same weights, photographs, views, classes and boxes. Each is a process of its own. They label in turns,
the official chain in every group of them, so that a ratio compares neighbors in time. Peers take one photograph at a time, as
their users do; ours take ``--batch`` in a call, as a run does. Peers resize a photograph to 800 pixels, ours also pad it.

Seconds are those of the CPU, of all threads, divided by the photographs of the call. Threads that wait sleep, in PyTorch
(``OMP_WAIT_POLICY=PASSIVE``) as in our engines, so that seconds are work. Not timed: loading, compiling, the embeddings of the
prompts, the first call, reading and decoding.

``mostly_empty``: of ten photographs, seven have no wanted class. Our chain stops after CLIP there; the official chain has no such
step. It is not measured again: it takes as long for every photograph.

What is needed: ``pip install 'wsss[cpu,export,openvino]'``, and 12 GB of memory (``--together 2``: 8 GB). A second run
continues in ``--work``, and does not repeat what was measured there with the same settings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ...cores import cores
from ...engines.machine import machine, version_of
from ...errors import UsageError, WsssError
from ...files import write_atomically
from ...mini.scenes import JPEG_QUALITY, draw_scene
from ...runtime.bundles import find_bundle
from ...spec import Bundle
from ..studies.harness import RESULTS, about, log, read_result, study_parser, write_result
from .contenders import CONTENDERS, OFFICIAL
from .figures import best_of_both, figures
from .job import STAGES, Job, fitting, official_resize
from .process import Child, Turn

RESULT = RESULTS / "peers.json"
MODELS = {"clip": "ViT-B-16", "grounding-dino": "swin_t", "sam": "vit_b"}
CANVAS = (800, 1088)
SCENE = (375, 500)
"""Height and width of a drawn scene: those of a photograph of PASCAL VOC."""
SEED = 5_000_000
"""First of the drawn scenes."""
MIXED, WANTED = 10, (0, 3, 6)
"""Photographs of the case in which most have no class, and those that have one."""
LIMIT_S, COMPILE_S = 3600.0, 300.0
"""Seconds for an answer, and for the first one of a contender that compiles."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__, out=RESULT, work="build/peers")
    parser.add_argument("--photos", type=Path, help="folder of photographs; default: drawn scenes")
    parser.add_argument("--bundle", action="append", default=[], metavar="PRECISION=FOLDER", help="default: exported into WORK")
    parser.add_argument("--weights", default="random:0", help="of a bundle that is exported")
    parser.add_argument("--classes", default="voc")
    parser.add_argument("--boxes", type=int, default=5, help="boxes of each photograph")
    parser.add_argument("--batch", type=int, default=2, help="photographs in a call of our engines")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, help="CPU cores of each contender; default: all")
    parser.add_argument("--together", type=int, default=3, help="contenders in memory at a time, the official chain among them")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="run only these now, beside the official chain")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, where it compiles in 300 s")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except WsssError as error:
        raise SystemExit(f"peers: {error}") from None


def run(options: argparse.Namespace) -> None:
    """Measure what is not yet measured, and write the result file."""
    wanted = options.contenders or [name for name in CONTENDERS if options.compile or not name.startswith("compiled")]
    given = dict(_pair(text) for text in options.bundle)
    bundles = {"fp32": given.get("fp32") or _exported(options, "fp32")}
    if any(CONTENDERS[name].precision == "bf16" for name in wanted):
        if not machine().cpu_bf16 and "bf16" not in given:
            wanted = [name for name in wanted if CONTENDERS[name].precision != "bf16"]
            log("this processor does not compute in bf16: left out")
        else:
            bundles["bf16"] = given.get("bf16") or _exported(options, "bf16")
    job, photographs = _job(options, bundles)
    work = options.work / f"measured-{_identity(job, options)}"
    names = [name for name in wanted if name != OFFICIAL]
    left = [name for name in names if not (work / f"{name}.json").is_file()]
    for group in _groups(left, options.together - 1):
        for name, measured in measure(group, job, work, options):
            write_atomically(work / f"{name}.json", json.dumps(measured).encode())
    write_result(options.out, summary(job, photographs, work, options))


def measure(names: Sequence[str], job: Job, work: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Let contenders and the official chain label in turns; yields what was measured by contender."""
    found = work / "found"
    measured: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        children: list[Child] = []
        for name in (OFFICIAL, *names):
            log(f"{name}: opening")
            limit = COMPILE_S if name.startswith("compiled") else LIMIT_S
            child = stack.enter_context(Child(name, job, found, cores=options.cores, limit_s=limit))
            measured[name] = {"name": name, "rounds": []}
            try:
                measured[name]["about"] = child.opened()
                child.label(_turn(name, 0, job))  # compiles, allocates
                children.append(child)
            except WsssError as error:
                if name == OFFICIAL:
                    raise
                measured[name]["failed"] = _reason(name, error)
                log(measured[name]["failed"])
        for number in range(options.rounds):
            turns = children[number % len(children) :] + children[: number % len(children)]
            for child in turns:
                seconds = child.label(_turn(child.name, number, job))
                measured[child.name]["rounds"].append(seconds)
                log(f"round {number + 1}, {child.name}: " + ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in STAGES))
        for child in children:
            measured[child.name]["peak_bytes"] = child.peak_bytes()
            if CONTENDERS[child.name].engine:
                numbers = tuple(range(MIXED))
                measured[child.name]["mixed"] = child.label(Turn(numbers, tuple(each in WANTED for each in numbers)))
    for name, each in measured.items():
        each["official_rounds"] = measured[OFFICIAL]["rounds"]
        yield name, each


def summary(job: Job, photographs: Mapping[str, Any], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The result file, from everything that was measured so far with these settings."""
    stored = {name: read_result(work / f"{name}.json") for name in CONTENDERS}
    measured = {name: each for name, each in stored.items() if each}
    dino = job.model("grounding-dino").manifest
    return {
        **about(),
        "processor": machine().processor,
        "cores": options.cores or cores(),
        "models": {name: job.model(name).manifest.variant for name in MODELS},
        "weights": dino.weights["source"],
        "classes": job.classes,
        "boxes": job.boxes,
        "batch": job.batch,
        "rounds": options.rounds,
        "photographs": dict(photographs),
        "mostly_empty": {"photographs": MIXED, "with_a_class": len(WANTED)},
        "best": best_of_both(measured),
        "contenders": {name: figures(each, work / "found") for name, each in measured.items()},
    }


def _turn(name: str, number: int, job: Job) -> Turn:
    """Ours take the photographs of a round in one call, peers the first of them."""
    start = number * job.batch
    numbers = tuple(range(start, start + (job.batch if CONTENDERS[name].engine else 1)))
    return Turn(numbers, tuple(True for _ in numbers))


def _job(options: argparse.Namespace, bundles: Mapping[str, str]) -> tuple[Job, dict[str, Any]]:
    """The job, and what the result file says about its photographs."""
    dino = Bundle(Path(bundles["fp32"])).model("grounding-dino")
    count = options.batch * options.rounds
    folder = options.photos or _drawn(options.work / "scenes", count)
    paths, left_out = fitting(folder, count, dino)
    job = Job(
        bundles=dict(bundles),
        photographs=tuple(paths),
        classes=options.classes,
        boxes=options.boxes,
        batch=options.batch,
    )
    from ...frame import frame_for, resized

    shapes = [photo.shape for photo in job.read(range(len(paths)))]
    official = [resized(official_resize(dino), *shape) for shape in shapes]
    canvas = frame_for(dino.manifest.preprocess, *shapes[0]).canvas
    return job, {
        "kind": "photographs" if options.photos else "drawn scenes",
        "count": len(paths),
        "left_out": left_out,
        "detector_pixels": {
            "official": round(sum(height * width for height, width in official) / len(official)),
            "ours": canvas[0] * canvas[1],
        },
    }


def _drawn(folder: Path, count: int) -> Path:
    """A folder with drawn scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"scene-{number:02}.jpg"
        if not path.is_file():
            Image.fromarray(draw_scene(SEED + number, split="held-out", size=SCENE).pixels).save(path, quality=JPEG_QUALITY)
    return folder


def _exported(options: argparse.Namespace, precision: str) -> str:
    """A bundle in the working folder. The parity gate is left out, because no labels are made with it."""
    from ...export.exporting import export_model, standing_model
    from ...export.family import Options, family

    bundle = options.work / f"bundle-{precision}"
    for name, variant in MODELS.items():
        sizes = (CANVAS,) if name == "grounding-dino" else ()
        settings = Options(precision="bf16" if precision == "bf16" else "fp32", sizes=sizes, for_cpu=precision == "bf16")
        if standing_model(bundle, name, variant=variant, weights=options.weights, options=settings) is None:
            export_model(
                family(name), variant=variant, weights=options.weights, bundle=bundle, options=settings, log=log, gate=False
            )
    return str(bundle)


def _pair(text: str) -> tuple[str, str]:
    precision, equals, folder = text.partition("=")
    if precision not in ("fp32", "bf16") or not equals:
        raise UsageError(f"--bundle: expected fp32=FOLDER or bf16=FOLDER, got {text!r}")
    return precision, str(find_bundle(folder).folder)


def _groups(names: Sequence[str], size: int) -> list[Sequence[str]]:
    size = max(size, 1)
    return [names[start : start + size] for start in range(0, len(names), size)]


def _reason(name: str, error: WsssError) -> str:
    if name.startswith("compiled") and "no answer" in error.message:
        return f"did not compile in {COMPILE_S:.0f} s"
    return error.message


def _identity(job: Job, options: argparse.Namespace) -> str:
    """Names the results that may stand side by side."""
    models = [Bundle(Path(folder)).model(name).manifest.identity() for folder in job.bundles.values() for name in MODELS]
    versions = [version_of(name) for name in ("torch", "transformers", "onnxruntime", "openvino")]
    settings = [asdict(job) | {"bundles": None}, models[: len(MODELS)], versions, options.rounds, options.cores]
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main(sys.argv[1:])
