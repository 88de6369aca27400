"""Readers on the nodes of a cluster: the bytes of files, a row of them at a time. See `on_ray`.

A row is a table of one row (``tasks``, ``told``, ``data``), so that Ray neither joins nor divides it. File names may be no
Unicode: all but the bytes is JSON in ASCII.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ..errors import ImageError
from ..photographs import ImageFile, Place, read_file
from .stream import Task

NAMESPACE = "wsss"
"""Of the desks' names on the cluster."""
READERS = 8
"""Files that one reader has open at a time."""
POLL = 0.2
"""Seconds until a reader that was given nothing asks again."""


@dataclass(frozen=True)
class Reading:
    """How the readers of one round read.

    Args:
        desk: name of its actor.
        round: number of the round.
        rows: images in a row of files at most, and ``row_bytes`` bytes, unless one image alone is larger.
        cwd: the driver's working folder; relative paths are meant from there, where a node has it.
    """

    desk: str
    round: int
    folder: Path | Place
    cwd: str
    rows: int
    row_bytes: int


class Slots(Datasource):
    """So many readers, one after another; each asks the desk what to read when it is its turn."""

    def __init__(self, count: int, how: Reading) -> None:
        self._count, self._how = count, how

    def __len__(self) -> int:
        return self._count

    def get_name(self) -> str:
        """What Ray's messages call the stage."""
        return "Photographs"

    def estimate_inmemory_data_size(self) -> None:
        """Unknown: the images are still being listed."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """One a slot."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_read_slot, self._how, number), unknown) for number in range(self._count)]


def _read_slot(reading: Reading, number: int) -> Iterator[pa.Table]:
    """A hand of tasks as rows of files. A file that cannot be read is a row's value, never an exception."""
    move_to(reading.cwd)
    desk = desk_called(reading.desk)
    while (tasks := ray.get(desk.take.remote((reading.round, number)))) is None:
        time.sleep(POLL)
    row: list[tuple[Task, dict[str, Any], bytes]] = []
    for each in _read_ahead(reading.folder, tasks):
        size = sum(len(data) for _, _, data in row)
        if row and (len(row) == reading.rows or size + len(each[2]) > reading.row_bytes):
            yield _row_of_files(row)
            row = []
        row.append(each)
    if row:
        yield _row_of_files(row)


def _read_ahead(folder: Path | Place, tasks: Iterable[Task]) -> Iterator[tuple[Task, dict[str, Any], bytes]]:
    upcoming = iter(tasks)
    with ThreadPoolExecutor(READERS, "read") as threads:
        ahead: deque[Future[tuple[Task, dict[str, Any], bytes]]] = deque()
        while True:
            while len(ahead) < READERS and (task := next(upcoming, None)) is not None:
                ahead.append(threads.submit(_read, folder, task))
            if not ahead:
                return
            yield ahead.popleft().result()


def _read(folder: Path | Place, task: Task) -> tuple[Task, dict[str, Any], bytes]:
    try:
        file = read_file(folder, task.name)
    except ImageError as error:
        return task, {"error": error.message}, b""
    told = {each.name: getattr(file, each.name) for each in dataclasses.fields(file) if each.name != "data"}
    return task, told, file.data


def _row_of_files(row: list[tuple[Task, dict[str, Any], bytes]]) -> pa.Table:
    return pa.table(
        {
            "tasks": [json.dumps([task for task, _, _ in row])],
            "told": [json.dumps([told for _, told, _ in row])],
            "data": pa.array([[data for _, _, data in row]], pa.list_(pa.large_binary())),
        }
    )


def desk_called(name: str) -> Any:
    """The handle of a run's desk."""
    return ray.get_actor(name, namespace=NAMESPACE)


def move_to(cwd: str) -> None:
    """Makes relative paths mean what they mean to the driver."""
    if os.getcwd() != cwd:
        with contextlib.suppress(OSError):  # a node without it: a relative path will not be found, and be named
            os.chdir(cwd)


def files_of(row: pa.Table) -> list[tuple[Task, ImageFile | ImageError]]:
    """What a reader put into a row: each task with its file, or with why there is none."""
    tasks = [Task(*each) for each in json.loads(row["tasks"][0].as_py())]
    told = json.loads(row["told"][0].as_py())
    return [(task, _file_of(each, data)) for task, each, data in zip(tasks, told, row["data"][0].values, strict=True)]


def _file_of(told: Mapping[str, Any], data: pa.Scalar) -> ImageFile | ImageError:
    return ImageError(told["error"]) if "error" in told else ImageFile(**told, data=data.as_py())
