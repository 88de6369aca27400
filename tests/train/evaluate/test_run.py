"""Counting in processes: the same sums as in one, errors by name, and no process outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss.errors import StoreError, WsssError
from wsss.train.evaluate import run as evaluate_run
from wsss.train.evaluate.boundary import boundary_counts
from wsss.train.evaluate.files import Pairs, find_label_maps, pair_up
from wsss.train.evaluate.metrics import confusion_matrix
from wsss.train.evaluate.run import count_pairs

CLASSES = ("dog", "cat", "cow")


def write(path: Path, label_map: np.ndarray) -> np.ndarray:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(label_map).save(path)
    return label_map


def random_map(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.kron(rng.choice([0, 1, 2, 3, 255], (height // 8, width // 8)), np.ones((8, 8))).astype(np.uint8)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """150 pairs of various sizes, of which every 40th has no prediction."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for number in range(150):
        size = 8 * rng.integers(1, 6, 2)
        write(folder / "truth" / f"{number:03}.png", random_map(rng, *size))
        if number % 40:
            write(folder / "predicted" / f"{number:03}.png", random_map(rng, *size))
    return folder / "predicted", folder / "truth"


def paired(folders: tuple[Path, Path]) -> Pairs:
    return pair_up(find_label_maps(folders[0]), find_label_maps(folders[1]))


@pytest.mark.parametrize("workers", [1, 2])
def test_sums_over_all_pairs(many: tuple[Path, Path], workers: int) -> None:
    pairs = paired(many)
    assert pairs.missing == ("000", "040", "080", "120")
    told: list[int] = []
    counts = count_pairs(pairs, CLASSES, workers=workers, progress=told.append)
    assert told == [*range(8, 150, 8), 150]
    matrix, bands = np.zeros((4, 5), np.int64), np.zeros((2, 4), np.int64)
    for row, (true_path, path) in enumerate(zip(pairs.truth, pairs.predicted, strict=True)):
        truth = np.array(Image.open(true_path))
        predicted = np.full_like(truth, 255) if path is None else np.array(Image.open(path))
        matrix += confusion_matrix(truth, predicted, 4)
        bands += boundary_counts(truth, predicted, 4)
        assert counts.present[row].tolist() == [(truth == label).any() for label in (1, 2, 3)]
    assert np.array_equal(counts.matrix, matrix)
    assert np.array_equal(counts.boundary, bands)
    truths = [np.array(Image.open(path)) for path in pairs.truth]
    assert counts.pixels.tolist() == [sum(map(np.size, truths)), sum(int((truth == 255).sum()) for truth in truths)]
    assert counts.facts[:, 0].tolist() == [150, 146]


def pair(tmp_path: Path, predicted: np.ndarray, truth: np.ndarray) -> Pairs:
    write(tmp_path / "predicted" / "a.png", predicted)
    write(tmp_path / "truth" / "a.png", truth)
    return paired((tmp_path / "predicted", tmp_path / "truth"))


def test_a_missing_prediction_is_all_missed(tmp_path: Path) -> None:
    write(tmp_path / "truth" / "b.png", np.array([[1, 2, 255]], np.uint8))
    pairs = pair(tmp_path, np.array([[1]], np.uint8), np.array([[1]], np.uint8))
    matrix = count_pairs(pairs, CLASSES).matrix
    assert matrix[1].tolist() == [0, 1, 0, 0, 1]
    assert matrix[2].tolist() == [0, 0, 0, 0, 1]


def test_sizes_that_differ_are_no_resize(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"predicted/a\.png: is 4 x 3 pixels, its truth .*truth/a\.png is 3 x 4"):
        count_pairs(pair(tmp_path, np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.uint8)), CLASSES)


@pytest.mark.parametrize(
    ("where", "label", "classes", "hint"),
    [
        ("predicted", 4, 3, "check --classes"),
        ("truth", 254, 3, "check"),
        ("truth", 90, 80, "COCO's category ids"),
        ("truth", 91, 80, "check"),
    ],
)
def test_a_label_that_is_no_class(tmp_path: Path, where: str, label: int, classes: int, hint: str) -> None:
    maps = {"predicted": np.zeros((1, 2), np.uint8), "truth": np.zeros((1, 2), np.uint8)}
    maps[where][0, 1] = label
    with pytest.raises(StoreError, match=rf"{where}/a\.png: label {label}, the class list ends at {classes}") as caught:
        count_pairs(pair(tmp_path, **maps), [str(each) for each in range(classes)])
    assert hint in caught.value.hint


def test_the_first_bad_file_is_named_from_a_worker_too(many: tuple[Path, Path], tmp_path: Path) -> None:
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    for path in many[0].iterdir():
        (predicted / path.name).write_bytes(path.read_bytes()[:60] if path.stem in ("077", "149") else path.read_bytes())
    with pytest.raises(StoreError, match=r"077\.png: not a readable PNG") as caught:
        count_pairs(paired((predicted, many[1])), CLASSES, workers=2)
    assert caught.value.hint == "write the file again"


def kill_itself(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_an_error_and_no_wait(many: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_run, "_count", kill_itself)  # workers find it by name in this module
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "test_evaluate_run", sys.modules[__name__])
    monkeypatch.setattr(kill_itself, "__module__", "test_evaluate_run")
    with pytest.raises(WsssError, match="a worker process was killed") as caught:
        count_pairs(paired(many), CLASSES, workers=2)
    assert caught.value.hint == "try --workers 1"


def test_the_caller_keeps_its_interrupts(many: tuple[Path, Path]) -> None:
    before = signal.getsignal(signal.SIGINT)
    count_pairs(paired(many), CLASSES, workers=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_while_workers_start_is_not_lost(many: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started = ProcessPoolExecutor.submit

    def interrupted(pool: ProcessPoolExecutor, *arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # not here
        return started(pool, *arguments)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run of the tests in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            count_pairs(paired(many), CLASSES, workers=2)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def endless(tmp_path: Path) -> Callable[[], subprocess.Popen[str]]:
    """``wsss eval`` on 4,000 names of one large pair: a job of many seconds, in a process group of its own."""
    rng = np.random.default_rng(0)
    for folder in ("truth", "predicted"):
        write(tmp_path / folder / "0.png", np.kron(rng.integers(0, 4, (40, 40)), np.ones((8, 8))).astype(np.uint8))
        for number in range(1, 4000):
            os.link(tmp_path / folder / "0.png", tmp_path / folder / f"{number}.png")
    command = [sys.executable, "-m", "wsss", "eval", "predicted", "truth", "--classes", "a,b,c", "--workers", "2"]
    return lambda: subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it runs in the background with interrupts ignored, and tests hand that on.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def children(pid: int) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(each) for each in told.split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(what: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.05)
    return False


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@linux
@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_an_interrupt_ends_it_with_one_line(endless: Callable[[], subprocess.Popen[str]], delay: float) -> None:
    job = endless()
    assert wait_for(lambda: len(children(job.pid)) >= 3)  # two workers and multiprocessing's resource tracker
    time.sleep(delay)  # while they import, and while they count
    workers = children(job.pid)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = job.communicate(timeout=60)
    assert (job.returncode, out, err) == (130, "", "interrupted; nothing was written\n")
    assert wait_for(lambda: not any(map(alive, workers)))


@linux
def test_workers_end_when_their_parent_is_killed(endless: Callable[[], subprocess.Popen[str]]) -> None:
    job = endless()
    assert wait_for(lambda: len(children(job.pid)) >= 3)
    time.sleep(1)
    workers = children(job.pid)
    job.kill()
    job.communicate(timeout=60)
    assert wait_for(lambda: not any(map(alive, workers)))
