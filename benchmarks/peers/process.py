"""A contender in a process of its own, so that its memory is its own, and which labels only when it is its turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ...batch import Images
from ...classes import parse_classes
from ...errors import WsssError
from ..studies.harness import peak_memory_bytes
from .contenders import OFFICIAL, open_contender
from .job import STAGES, Contender, Job, boxes_of

Seconds = dict[str, float]
"""CPU seconds of a photograph by stage."""


@dataclass(frozen=True)
class Turn:
    """Photographs to label.

    numbers: of the job's photographs. wanted: whether each has a class; the others stop after CLIP where the chain allows it.
    """

    numbers: tuple[int, ...]
    wanted: tuple[bool, ...]


class Child:
    """A started contender. Use it as a context manager, which ends its process.

    Args:
        name: of the contender. found: folder for what it finds in each photograph.
        cores: CPU cores that it may use; None leaves all.
        limit_s: seconds for one answer.
    """

    def __init__(self, name: str, job: Job, found: Path, *, cores: int | None, limit_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, job, found, cores), daemon=True)
        self._process.start()
        theirs.close()
        self.name, self._limit_s = name, limit_s

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def opened(self) -> dict[str, Any]:
        """Wait until its models are loaded; returns what it says about itself. Raises WsssError as `label`."""
        return dict(self._answer())

    def label(self, turn: Turn) -> Seconds:
        """Let it label photographs, and wait.

        Raises:
            WsssError: it failed, or gave no answer in time.
        """
        self._connection.send(turn)
        return dict(self._answer())

    def peak_bytes(self) -> int:
        """Its peak memory since the models are loaded."""
        self._connection.send("peak")
        return int(self._answer())

    def _answer(self) -> Any:
        if not self._connection.poll(self._limit_s):
            self._process.kill()
            raise WsssError(f"{self.name}: no answer in {self._limit_s:.0f} s")
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise WsssError(f"{self.name}: ended with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, name: str, job: Job, found: Path, cores: int | None) -> None:
    """The child: opens the contender, then answers requests until None comes or the parent is gone."""
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before PyTorch and OpenVINO count them
    # PyTorch's threads wait in a loop by default. Linear layers took 30 % more CPU time for it on busy cores, the mini models
    # up to nine times as much.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        contender = open_contender(name, job)
        connection.send({**contender.about, "opening_peak_bytes": peak_memory_bytes()})
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        while (request := connection.recv()) is not None:
            connection.send(peak_memory_bytes() if request == "peak" else label(contender, name, job, request, found))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        connection.send(WsssError(f"{name}: {type(error).__name__}: {lines[0][:300]}"))


def label(contender: Contender, name: str, job: Job, turn: Turn, found: Path) -> Seconds:
    """Label photographs, and write what was found in those that are wanted; returns CPU seconds of a photograph by stage."""
    photos = job.read(turn.numbers)
    seconds = dict.fromkeys(STAGES, 0.0)
    for start in range(0, len(photos), contender.batch):
        some = slice(start, start + contender.batch)
        wanted = np.array(turn.wanted[some])
        parts = _label_batch(contender, job, photos[some], wanted, seconds)
        if all(turn.wanted):
            _write(found / name, turn.numbers[some], parts)
    if name == OFFICIAL:
        for number, photo in zip(turn.numbers, photos, strict=True):
            path = found / "on-canvas" / f"{number}.npz"
            if not path.is_file():
                _write(path.parent, [number], {"score": list(contender.scores_on_canvas(photo))})  # type: ignore[attr-defined]
    return {stage: taken / len(photos) for stage, taken in seconds.items()}


def _label_batch(
    contender: Contender, job: Job, photos: Images, wanted: np.ndarray, seconds: Seconds
) -> dict[str, Sequence[np.ndarray]]:
    boxes = boxes_of(photos, job.boxes, len(parse_classes(job.classes).names), wanted)
    clock = _Clock(seconds)
    tagged = contender.tag(photos)
    clock.stop("tag")
    detected = contender.detect(photos, wanted)
    clock.stop("detect")
    masks = contender.segment(photos, boxes)
    clock.stop("segment")
    maps = contender.fuse(photos, boxes, masks)
    clock.stop("fuse")
    embeddings = contender.embeddings(tagged)
    scores = contender.scores(detected) if wanted.any() else np.zeros((0, 0), np.float32)
    return {"embedding": list(embeddings), "score": list(scores), "label_map": maps}


class _Clock:
    """CPU time of this process and its threads, added to ``seconds``."""

    def __init__(self, seconds: Seconds) -> None:
        self._seconds, self._start = seconds, time.process_time()

    def stop(self, stage: str) -> None:
        now = time.process_time()
        self._seconds[stage] += now - self._start
        self._start = time.process_time()


def _write(folder: Path, numbers: Sequence[int], parts: Mapping[str, Sequence[np.ndarray]]) -> None:
    """One file for each photograph."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, number in enumerate(numbers):
        np.savez(folder / f"{number}.npz", allow_pickle=False, **{name: rows[row] for name, rows in parts.items()})
