"""What the host does for an image, engines aside: ``python -m wsss.benchmarks.studies.speed.host_path``.

Figures of `results/host-path.json`:

``cpu_ms``
    Processor time an image of a whole run, all threads, with engines that answer at once: reading, hash, decoding, eight
    resizes (five CLIP views, detector, SAM; every tensor copied into its batch), fusion's host part, PNG, fsync, manifest.
``bare_ms``
    The same photographs decoded, the same resizes, the label encoded: nothing else.
``images_per_second``
    On one core and on two, and how that scales.
``engine_bound``
    A small chain whose SAM encoder takes 20 ms a batch of 8: wall time of the whole run over the encoder's own; how much of
    it passed before its first call and after its last; and the processor time of the run over both cores' wall time. Its
    calls are queued, as TensorRT's are on a GPU.
``engine_bound_blocking``
    The same with an engine that holds its caller until it has computed, as ONNX Runtime's do.
``memory_mib``
    Peak of a run over 500 and over 5,000 images; and over 100,000 listed ones, stopped after the first.
``decoders_ms``
    Decoders of JPEG beside Pillow, and whether their pixels are the same; those that are not installed are left out.

Each figure comes from a process of its own. On a machine that does other work, processor time is nearly undisturbed, the
rates are not: ``load`` says how many processes wanted to run besides.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from .... import __version__
from ....photographs import read_photograph
from ....runtime.run.label_folder import Summary, label_folder
from ....store.local import write_label
from ..harness import RESULTS, study_parser, write_result
from .fake_chain import FULL, SMALL, bare_inputs, open_fake

RESULT = RESULTS / "host-path.json"
VOC_SIZE, SMALL_SIZE = (375, 500), (72, 96)
ENGINE_SECONDS = 0.02


def write_photographs(folder: Path, count: int, size: tuple[int, int], *, different: int = 16) -> None:
    """``count`` JPEGs of this size (height, width), quality 90, of photographs' smoothness and noise; copies are links."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    height, width = size
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        if number >= different:
            os.link(folder / "000" / f"{number % different:06}.jpg", path)
            continue
        coarse = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
        noisy = smooth + random.integers(-12, 13, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def cpu(folder: Path) -> dict[str, float]:
    """Milliseconds of processor time an image: of a run, and of its bare decoding, resizing and encoding."""
    labeler = open_fake(FULL)
    with tempfile.TemporaryDirectory() as out:
        label_folder(labeler, folder / "000", Path(out) / "warm")
        begun = time.process_time()
        summary = label_folder(labeler, folder, Path(out) / "store")
        run = (time.process_time() - begun) / summary.labelled
        names = sorted((folder / "000").glob("*.jpg"))
        label_map = labeler.pseudo_label([read_photograph(names[0].parent, names[0].name)]).label_maps[0]
        begun = time.process_time()
        for path in names:
            bare_inputs(labeler, read_photograph(path.parent, path.name))
            write_label(Path(out) / "label.png", label_map)
        bare = (time.process_time() - begun) / len(names)
    return {"cpu_ms": 1000 * run, "bare_ms": 1000 * bare, "ratio": run / bare}


def rate(folder: Path) -> dict[str, float]:
    """Images a second on the cores that this process may use."""
    labeler = open_fake(FULL)
    with tempfile.TemporaryDirectory() as out:
        label_folder(labeler, folder / "000", Path(out) / "warm")
        summary = label_folder(labeler, folder, Path(out) / "store")
    return {"images_per_second": summary.labelled / summary.seconds}


def engine_bound(folder: Path, *, queued: bool = True) -> dict[str, float]:
    """Wall time of a run over what its engines took, start and end of the run included."""
    ends: list[float] = []
    labeler = open_fake(SMALL, encoder_seconds=ENGINE_SECONDS, queued=queued, ends=ends)
    with tempfile.TemporaryDirectory() as out:
        label_folder(labeler, folder / "000", Path(out) / "warm")
        ends.clear()
        begun, used = time.perf_counter(), time.process_time()
        label_folder(labeler, folder, Path(out) / "store")
        ended, used = time.perf_counter(), time.process_time() - used
    pure = ENGINE_SECONDS * len(ends)
    return {
        "wall_s": ended - begun,
        "engine_s": pure,
        "ratio": (ended - begun) / pure,
        "start_s": ends[0] - ENGINE_SECONDS - begun,
        "end_s": ended - ends[-1],
        "host_load": used / (len(os.sched_getaffinity(0)) * (ended - begun)),
    }


def engine_bound_blocking(folder: Path) -> dict[str, float]:
    """The same with an engine that holds its caller."""
    return engine_bound(folder, queued=False)


def memory(folder: Path) -> dict[str, float]:
    """Peak resident size in MiB."""
    stop = threading.Event()

    def first(summary: Summary) -> None:
        if summary.images > 10_000:
            stop.set()

    with tempfile.TemporaryDirectory() as out:
        summary = label_folder(open_fake(SMALL), folder, Path(out) / "store", stop=stop, progress=first)
    # Not getrusage: its peak survives exec, and would be that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert peak
    return {"images": summary.images, "mib": int(peak[1]) / 1024}


def decoders(folder: Path) -> dict[str, Any]:
    """Milliseconds of processor time to RGB, by decoder, and whether each gives Pillow's pixels."""
    path = folder / "000" / "000000.jpg"
    data = path.read_bytes()

    def pillow() -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))

    def opencv() -> np.ndarray:
        cv2 = import_module("cv2")
        cv2.setNumThreads(1)
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    def simplejpeg() -> np.ndarray:
        return import_module("simplejpeg").decode_jpeg(data, "RGB")

    def pyturbojpeg() -> np.ndarray:
        library = import_module("turbojpeg")
        return turbo(library).decode(data, pixel_format=library.TJPF_RGB)

    turbo = lru_cache(maxsize=1)(lambda library: library.TurboJPEG())
    told: dict[str, Any] = {}
    every: tuple[Callable[[], np.ndarray], ...] = (pillow, opencv, simplejpeg, pyturbojpeg)
    for decode in every:
        try:
            same = bool(np.array_equal(decode(), pillow()))
        except ModuleNotFoundError:
            continue
        times = []
        for _ in range(30):
            begun = time.thread_time()
            decode()
            times.append(time.thread_time() - begun)
        told[decode.__name__] = {"ms": 1000 * float(np.median(times)), "same_pixels": same}
    return told


PARTS = {part.__name__: part for part in (cpu, rate, engine_bound, engine_bound_blocking, memory, decoders)}


def measure(folder: Path, count: int) -> dict[str, Any]:
    """All figures, each from a process of its own; photographs are written below ``folder``."""
    for name, images, size in (
        ("voc", count, VOC_SIZE),
        ("small", 20 * count, SMALL_SIZE),
        ("500", 500, SMALL_SIZE),
        ("5000", 5_000, SMALL_SIZE),
        ("100000", 100_000, SMALL_SIZE),
    ):
        write_photographs(folder / name, images, size)

    def part(name: str, photographs: str, cores: int) -> dict[str, float]:
        command = [
            sys.executable,
            "-m",
            "wsss.benchmarks.studies.speed.host_path",
            "--part",
            name,
            "--images",
            str(folder / photographs),
        ]
        command += ["--cores", str(cores)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(done.stdout)

    one, two = (part("rate", "voc", cores)["images_per_second"] for cores in (1, 2))
    peaks = {name: round(part("memory", name, 2)["mib"], 1) for name in ("500", "5000", "100000")}
    return {
        "cpu": {name: round(value, 2) for name, value in part("cpu", "voc", 1).items()},
        "images_per_second": {"one_core": round(one, 1), "two_cores": round(two, 1), "scaling": round(two / one, 2)},
        **{
            bound: {name: round(value, 3) for name, value in part(bound, "small", 2).items()}
            for bound in ("engine_bound", "engine_bound_blocking")
        },
        "memory_mib": peaks,
        "decoders_ms": part("decoders", "voc", 1),
    }


def main() -> None:
    """Measures, prints and writes the result."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--count", type=int, default=320, help="VOC-size photographs")
    parser.add_argument("--part", choices=PARTS, help="one figure only, as JSON")
    parser.add_argument("--images", type=Path, help="with --part: the photographs")
    parser.add_argument("--cores", type=int, default=1, help="with --part: how many it may use")
    given = parser.parse_args()
    if given.part:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
        print(json.dumps(PARTS[given.part](given.images)))
        return
    with tempfile.TemporaryDirectory() as folder:
        told = {
            "version": __version__,
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "photographs": {"height": VOC_SIZE[0], "width": VOC_SIZE[1], "count": given.count},
            **measure(Path(folder), given.count),
        }
    write_result(RESULT, told)


if __name__ == "__main__":
    main()
