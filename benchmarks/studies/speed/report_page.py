"""Response times of the report of 10,000 images: ``python -m wsss.benchmarks.studies.speed.report_page``. Needs Chromium.

Makes a store of small drawn photographs, writes its report twice (the second time with existing thumbnails), opens it in a
headless Chromium and repeats the actions of a reviewer in five rounds. For each action the longest task of the page's main thread
is recorded, since the page does not respond during a task: the worst round in CPU time, and the best round in wall time, which
other programs can only lengthen.
"""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ....classes import named_list, palette
from ....runtime.report.page import write_report
from ....store.local import Record
from ..harness import RESULTS, about, log, study_parser, write_result
from .chromium import Chromium

RESULT = RESULTS / "report-page.json"
FIRST_PAINT_MS, LONG_TASK_MS = 1000, 200
"""Limits that must hold."""
CLASSES = named_list("coco").names


def write_store(
    folder: Path, names: Sequence[str], *, classes: Sequence[str] = CLASSES, failures: Sequence[str] = (), seed: int = 0
) -> None:
    """Write photographs of up to three plain rectangles to ``folder/images``, and their label store to ``folder/store``.

    Image i has i % 4 rectangles of classes i, i + 1, ..., but never of the last class; scores and qualities are random. The
    store's files are written directly, because a run would wait for the disk after each of 10,000 images.

    Args:
        names: of the photographs, PNG or JPEG by their ending. failures: names of images that could not be read.
    """
    draw = np.random.default_rng(seed)
    store = folder / "store"
    (store / "labels").mkdir(parents=True)
    run = {"format": 1, "classes": list(classes), "engine": "fake", "rules": {}, "models": {"clip": "drawn"}}
    (store / "run.json").write_text(json.dumps(run))
    stages = {"tag": 0.1 * len(names), "detect": 0.6 * len(names), "segment": 0.8 * len(names), "fuse": 0.2 * len(names)}
    (store / "history.jsonl").write_text(
        json.dumps({"labelled": len(names), "seconds": len(names), "stage_seconds": stages}) + "\n"
    )
    records: list[Record] = []
    for number, name in enumerate(names):
        pixels, label_map, boxes = _draw(draw, number, classes)
        photo = folder / "images" / name
        photo.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, format="PNG" if name.endswith(".png") else "JPEG")
        photo.write_bytes(data.getvalue())
        label = f"{number}.png"
        picture = Image.fromarray(label_map, mode="P")
        picture.putpalette(palette().tobytes())
        picture.save(store / "labels" / label)
        tags = {box["label"]: round(float(draw.uniform(0.5, 1)), 4) for box in boxes}
        if number % 7 == 0:
            tags[classes[(number + 3) % (len(classes) - 1)]] = 0.6
        image = {"path": name, "label": label, "bytes": len(data.getvalue()), "height": pixels.shape[0], "width": pixels.shape[1]}
        sha256 = hashlib.sha256(data.getvalue()).hexdigest()
        void = int((label_map == 255).sum())
        records.append({**image, "sha256": sha256, "classes": tags, "boxes": boxes, "void_px": void})
    for name in failures:
        error = f"{name}: not a readable image"
        records.append({"path": name, "label": f"{name}.png", "bytes": 0, "sha256": "", "error": error})
    lines = [json.dumps(record) + "\n" for record in sorted(records, key=itemgetter("path"))]
    (store / "manifest.jsonl").write_text("".join(lines))


def _draw(draw: np.random.Generator, number: int, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    height, width = (48, 64) if number % 3 else (64, 48)
    pixels = np.full((height, width, 3), draw.integers(40, 216, 3), np.uint8)
    label_map, boxes = np.zeros((height, width), np.uint8), []
    for rectangle in range(number % 4):
        x0, y0 = int(draw.integers(0, width - 20)), int(draw.integers(0, height - 20))
        x1, y1 = x0 + int(draw.integers(8, 20)), y0 + int(draw.integers(8, 20))
        row = (number + rectangle) % (len(classes) - 1)
        pixels[y0:y1, x0:x1] = draw.integers(0, 256, 3)
        label_map[y0:y1, x0:x1] = row + 1
        label_map[y0 : y0 + number % 3, x0:x1] = 255
        box = {"label": classes[row], "score": round(float(draw.uniform(0.35, 1)), 4), "xyxy": [x0, y0, x1, y1]}
        area = (x1 - x0) * (y1 - y0)
        boxes.append({**box, "quality": round(float(draw.uniform(0.5, 1)), 4), "area_px": area, "won_px": area})
    return pixels, label_map, boxes


def measure(count: int, folder: Path) -> dict[str, Any]:
    """Measure the report of ``count`` images; ``folder`` must be empty and takes the store."""
    names = [f"part-{number // 1000}/photo-{number:06}.jpg" for number in range(count)]
    write_store(folder, names, failures=[f"bad-{number:02}.jpg" for number in range(20)])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        page = write_report(folder / "store", folder / "images", folder / "store" / "report.html")
        seconds.append(round(time.perf_counter() - start, 2))
        log(f"report written in {seconds[-1]} s")
    result = {
        "images": count,
        "write_seconds": {"first": seconds[0], "from its thumbnails": seconds[1]},
        "data_bytes": (page.with_name("report.files") / "data.js").stat().st_size,
    }
    with Chromium(seconds=120) as browser:
        return {**result, **_opening(browser, page), "longest_task_ms": _longest_tasks(browser, page)}


def _opening(browser: Chromium, page: Path, times: int = 5) -> dict[str, Any]:
    paints, ready = [], []
    for _ in range(times):
        browser.show(1440, 900)
        browser.open(page.as_uri())
        browser.until("performance.getEntriesByName('first-contentful-paint').length > 0")
        paints.append(browser.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        ready.append(browser.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"))
    return {"first_paint_ms": _spread(paints), "gallery_ready_ms": _spread(ready)}


def _longest_tasks(browser: Chromium, page: Path, rounds: int = 5) -> dict[str, dict[str, float]]:
    """The longest task of each action of a reviewer."""
    actions: dict[str, Callable[[], object]] = {
        "opening": lambda: browser.open(page.as_uri()),
        "scrolling": lambda: _scroll(browser),
        "turning 10 pages": lambda: _presses(browser, "n", 10),
        "ten classes": lambda: _choose(browser, "#class", 10),
        "all classes": lambda: browser.evaluate("chooseClass(null)"),
        "each reason": lambda: _choose(browser, "#cause", 6),
        "any reason": lambda: _choose(browser, "#cause", -6),
        "each order": lambda: _choose(browser, "#order", 3),
        "searching": lambda: _search(browser),
        "fading the label": lambda: _presses(browser, "[", 10),
        "large view, 20 images": lambda: _walk(browser),
        "a phone, 5 pages": lambda: _phone(browser),
    }
    longest: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        browser.show(1440, 900)
        for name, action in actions.items():
            clock, processor = browser.longest_task_ms(action)
            before = longest.get(name, {"clock": clock, "processor": processor})
            longest[name] = {
                "clock": round(min(clock, before["clock"]), 1),
                "processor": round(max(processor, before["processor"]), 1),
            }
    for name, task in longest.items():
        log(f"{name:24} {task['clock']:6.1f} ms, {task['processor']:6.1f} ms of CPU time")
    return longest


def _scroll(browser: Chromium) -> None:
    for step in range(60):
        browser.wheel(400 if step < 30 else -400)
        browser.next_frame()


def _presses(browser: Chromium, key: str, times: int) -> None:
    for _ in range(times):
        browser.press(key)
        browser.next_frame()


def _choose(browser: Chromium, selector: str, steps: int) -> None:
    browser.evaluate(f"document.querySelector('{selector}').focus()")
    _presses(browser, "ArrowDown" if steps > 0 else "ArrowUp", abs(steps))
    browser.evaluate("document.activeElement.blur()")


def _search(browser: Chromium) -> None:
    browser.press("/")
    for key in (*"photo-00123", *["Backspace"] * 11):
        browser.press(key)
        browser.next_frame()
    browser.press("Escape")


def _walk(browser: Chromium) -> None:
    browser.press("ArrowRight")
    browser.press("Enter")
    _presses(browser, "ArrowRight", 20)
    browser.press("Escape")


def _phone(browser: Chromium) -> None:
    browser.show(375, 812, phone=True)
    _presses(browser, "n", 5)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "worst": round(max(values), 1), "times": len(values)}


def main() -> None:
    parser = study_parser(__spec__, __doc__, out=RESULT)
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.count, Path(folder))
    tasks = result["longest_task_ms"]
    longest = max(value for name, task in tasks.items() if name != "opening" for value in task.values())
    holds = result["first_paint_ms"]["worst"] <= FIRST_PAINT_MS and longest <= LONG_TASK_MS
    write_result(arguments.out, {**about(), **result, "holds": holds})


if __name__ == "__main__":
    main()
