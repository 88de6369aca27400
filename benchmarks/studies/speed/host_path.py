"""The host's work for an image, without engines: ``python -m wsss.benchmarks.studies.speed.host_path``.

Values of `results/host-path.json`:

``cpu_ms``
    CPU time for an image in a whole run, all threads, with engines that return at once: reading, hash, decoding, eight resizes
    (five CLIP views, detector, SAM; every tensor copied into its batch), the host's part of fusion, PNG, fsync, manifest.
``bare_ms``
    The same for decoding, the same resizes and encoding the label map alone.
``resized_on_device_ms``
    As ``cpu_ms`` where the engines make their inputs, from one copy of each photograph; for VOC photographs and for ones of 12
    million pixels. What a GPU does in the meantime is left out, and so are the calls that start it.
``pieces_ms``
    The same for each piece alone, for a photograph of PASCAL VOC's size and for one of 12 million pixels: reading and its hash,
    decoding, CLIP's five views, the detector's and SAM's canvas, and the label's PNG without the disk.
``images_per_second``
    On one core and on two, and their ratio.
``engine_bound``
    A small chain whose SAM encoder takes 20 ms for a batch of 8: wall time of the whole run over the encoder's time; the time
    before its first call and after its last; and the run's CPU time over the wall time of both cores. Encoder calls are queued,
    as with TensorRT on a GPU.
``engine_bound_blocking``
    The same with calls that block until they are computed, as with ONNX Runtime.
``memory_mib``
    Peak of a run over 500 and over 5,000 images; and over 100,000 listed images, stopped after the first.
``decoders_ms``
    JPEG decoders beside Pillow, and whether their pixels are equal; those that are not installed are left out.

Each value is measured in a separate process. Other work on the machine hardly affects CPU time, but it affects rates; ``load`` is
the load average at the start.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from .... import __version__
from ....photographs import decode as decoded
from ....photographs import read_file, read_photograph
from ....runtime.canvas import Prepares
from ....runtime.run.label_folder import Summary, label_folder
from ....store.label_png import png_of
from ....store.local import write_label
from ..harness import RESULTS, peak_memory_bytes, run_part, study_parser, write_result
from .fake_chain import FULL, SMALL, bare_inputs, joined_for_free, open_fake

RESULT = RESULTS / "host-path.json"
VOC_SIZE, SMALL_SIZE, LARGE_SIZE = (375, 500), (72, 96), (3000, 4000)
ENGINE_SECONDS = 0.02


def write_photographs(folder: Path, count: int, size: tuple[int, int], *, different: int = 16) -> None:
    """Write ``count`` JPEGs of a size (height, width), smooth and noisy like photographs; all but ``different`` are links."""
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
    """CPU milliseconds for an image: of a run, and of decoding, resizing and encoding alone."""
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


def on_device(folder: Path) -> dict[str, float]:
    """CPU milliseconds for an image of a run whose engines make their inputs."""
    labeler = open_fake(FULL, resizing=True)
    with tempfile.TemporaryDirectory() as out, joined_for_free():
        label_folder(labeler, folder / "000", Path(out) / "warm")
        begun = time.process_time()
        summary = label_folder(labeler, folder, Path(out) / "store")
        return {"cpu_ms": 1000 * (time.process_time() - begun) / summary.labelled}


def pieces(folder: Path) -> dict[str, float]:
    """CPU milliseconds of each piece of the work for an image, and their sum."""
    labeler = open_fake(FULL)
    stages: dict[str, object] = {"views": labeler.tag.stage, "detector": labeler.detect.stage, "sam": labeler.segment.stage}
    path = sorted((folder / "000").glob("*.jpg"))[0]
    file = read_file(path.parent, path.name)
    photo = decoded(file)
    label_map = labeler.pseudo_label([photo]).label_maps[0]
    work: dict[str, Callable[[], object]] = {
        "read": lambda: read_file(path.parent, path.name),
        "decode": lambda: decoded(file),
        **{
            name: partial(stage.prepare, photo, np.zeros(stage.room(photo), np.uint8))
            for name, stage in stages.items()
            if isinstance(stage, Prepares)
        },
        "png": lambda: png_of(label_map),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(3 if photo.pixels.size > 1e7 else 40):
        for name, piece in work.items():  # in turn, so that all of them meet the same load of the machine
            begun = time.thread_time()
            piece()
            taken[name].append(time.thread_time() - begun)
    found = {name: 1000 * float(np.median(times)) for name, times in taken.items()}
    return {**found, "sum": sum(found.values())}


def rate(folder: Path) -> dict[str, float]:
    """Images a second on the cores of this process."""
    labeler = open_fake(FULL)
    with tempfile.TemporaryDirectory() as out:
        label_folder(labeler, folder / "000", Path(out) / "warm")
        summary = label_folder(labeler, folder, Path(out) / "store")
    return {"images_per_second": summary.labelled / summary.seconds}


def engine_bound(folder: Path, *, queued: bool = True) -> dict[str, float]:
    """Wall time of a run, including its start and end, over the time of its engines."""
    ends: list[float] = []
    labeler = open_fake(SMALL, encoder_seconds=ENGINE_SECONDS, queued=queued, ends=ends)
    with tempfile.TemporaryDirectory() as out:
        label_folder(labeler, folder / "000", Path(out) / "warm")
        ends.clear()
        begun, used = time.perf_counter(), time.process_time()
        label_folder(labeler, folder, Path(out) / "store")
        ended, used = time.perf_counter(), time.process_time() - used
    engine_s = ENGINE_SECONDS * len(ends)
    return {
        "wall_s": ended - begun,
        "engine_s": engine_s,
        "ratio": (ended - begun) / engine_s,
        "start_s": ends[0] - ENGINE_SECONDS - begun,
        "end_s": ended - ends[-1],
        "host_load": used / (len(os.sched_getaffinity(0)) * (ended - begun)),
    }


def engine_bound_blocking(folder: Path) -> dict[str, float]:
    """The same with an engine whose calls block."""
    return engine_bound(folder, queued=False)


def memory(folder: Path) -> dict[str, float]:
    """Peak resident size in MiB."""
    stop = threading.Event()

    def first(summary: Summary) -> None:
        if summary.images > 10_000:
            stop.set()

    with tempfile.TemporaryDirectory() as out:
        summary = label_folder(open_fake(SMALL), folder, Path(out) / "store", stop=stop, progress=first)
    return {"images": summary.images, "mib": peak_memory_bytes() / 1024**2}


def decoders(folder: Path) -> dict[str, Any]:
    """CPU milliseconds to decode to RGB by decoder, and whether its pixels equal Pillow's."""
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
    result: dict[str, Any] = {}
    functions: tuple[Callable[[], np.ndarray], ...] = (pillow, opencv, simplejpeg, pyturbojpeg)
    for decode in functions:
        try:
            same = bool(np.array_equal(decode(), pillow()))
        except ModuleNotFoundError:
            continue
        times = []
        for _ in range(30):
            begun = time.thread_time()
            decode()
            times.append(time.thread_time() - begun)
        result[decode.__name__] = {"ms": 1000 * float(np.median(times)), "same_pixels": same}
    return result


PARTS = {part.__name__: part for part in (cpu, on_device, pieces, rate, engine_bound, engine_bound_blocking, memory, decoders)}


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Measure all values, each in a separate process; photographs are written below ``folder``."""
    for name, images, size in (
        ("voc", count, VOC_SIZE),
        ("large", 16, LARGE_SIZE),
        ("small", 20 * count, SMALL_SIZE),
        ("500", 500, SMALL_SIZE),
        ("5000", 5_000, SMALL_SIZE),
        ("100000", 100_000, SMALL_SIZE),
    ):
        write_photographs(folder / name, images, size)

    def part(name: str, photographs: str, cores: int) -> dict[str, float]:
        arguments = ("--part", name, "--images", folder / photographs, "--cores", cores)
        return run_part(__spec__, *arguments, env={"OMP_NUM_THREADS": "1"})

    one, two = (part("rate", "voc", cores)["images_per_second"] for cores in (1, 2))
    peaks = {name: round(part("memory", name, 2)["mib"], 1) for name in ("500", "5000", "100000")}
    return {
        "cpu": {name: round(value, 2) for name, value in part("cpu", "voc", 1).items()},
        "resized_on_device_ms": {
            size: round(part("on_device", photographs, 1)["cpu_ms"], 2)
            for size, photographs in (("voc", "voc"), ("12_mpx", "large"))
        },
        "pieces_ms": {
            size: {name: round(value, 2) for name, value in part("pieces", photographs, 1).items()}
            for size, photographs in (("voc", "voc"), ("12_mpx", "large"))
        },
        "images_per_second": {"one_core": round(one, 1), "two_cores": round(two, 1), "scaling": round(two / one, 2)},
        **{
            bound: {name: round(value, 3) for name, value in part(bound, "small", 2).items()}
            for bound in ("engine_bound", "engine_bound_blocking")
        },
        "memory_mib": peaks,
        "decoders_ms": part("decoders", "voc", 1),
    }


def main() -> None:
    """Run the command line of the module."""
    parser = study_parser(__spec__, __doc__)
    parser.add_argument("--count", type=int, default=320, help="number of VOC-size photographs")
    parser.add_argument("--part", choices=PARTS, help="measure one value only, and print it as JSON")
    parser.add_argument("--images", type=Path, help="with --part: folder of the photographs")
    parser.add_argument("--cores", type=int, default=1, help="with --part: number of cores to use")
    given = parser.parse_args()
    if given.part:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
        print(json.dumps(PARTS[given.part](given.images)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "version": __version__,
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "photographs": {"height": VOC_SIZE[0], "width": VOC_SIZE[1], "count": given.count},
            **measure(Path(folder), given.count),
        }
    write_result(RESULT, result)


if __name__ == "__main__":
    main()
