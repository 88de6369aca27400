"""Several workers, one store: the same bytes as one, also when workers die."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wsss.errors import StoreError, WsssError, WsssWarning
from wsss.runtime.chain import Chain
from wsss.runtime.run.label_folder import Summary, label_folder
from wsss.runtime.run.sources import LocalImages
from wsss.runtime.run.stream import Task
from wsss.runtime.run.workers import Workers, _Dispatcher, _Worker
from wsss.spec import write_manifest
from wsss.store.local import LabelFolder, read_records

if TYPE_CHECKING:
    from ..conftest import World

SCRIPTED = """
import errno, importlib.util, os, signal, sys
from pathlib import Path
from wsss.store import local as labelstore
from wsss.errors import WsssError
from wsss.runtime import chain as pipeline
from wsss.runtime.run import sources

spec = importlib.util.spec_from_file_location("scripted_world", {conftest!r})
module = sys.modules["scripted_world"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

def open_labeler(bundle, *, dies_once="", dies_of="", margin=0.1, full=False, refuses=""):
    if refuses:
        raise WsssError(refuses, hint="do something")
    world = module.World(bundle)
    pipeline.open_graph = world.open_graph
    read = sources.read_file
    def read_file(folder, name):
        if name == dies_of or (name == dies_once and Path(bundle, "die").exists()):
            Path(bundle, "die").unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return read(folder, name)
    sources.read_file = read_file
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if full:
        labelstore.png_of = no_room
    return pipeline.Chain.open(bundle, classes=world.classes, rules=pipeline.Rules(margin=margin))
"""
Executor = Callable[..., Workers]


@pytest.fixture
def executor(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """``executor({...}, {...})``: workers with scripted engines, each opened with these arguments."""
    (tmp_path / "scripted_labeler.py").write_text(SCRIPTED.format(conftest=str(Path(__file__).parents[2] / "conftest.py")))
    monkeypatch.syspath_prepend(tmp_path)
    import scripted_labeler  # type: ignore[import-not-found]

    def start(*each: dict[str, object]) -> Workers:
        return Workers([("cpu", partial(scripted_labeler.open_labeler, world.bundle, **how)) for how in each], batch=2)

    return start


@pytest.fixture
def many(world: World, tmp_path: Path) -> Path:
    for number in range(24):
        world.save(tmp_path / "many" / f"{number:02}.png", 30, 40, red=(number, 2, 20 + number % 5, 20))
    (tmp_path / "many" / "10-bad.jpg").write_bytes(b"no")
    return tmp_path / "many"


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "history.jsonl"}


def quiet(_: str) -> None: ...


@pytest.fixture
def whole(world: World, many: Path, tmp_path: Path) -> dict[str, bytes]:
    label_folder(Chain.open(world.bundle, classes=world.classes), many, tmp_path / "whole", warn=quiet)
    return contents(tmp_path / "whole")


def test_two_workers_make_the_same_store(executor: Executor, many: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    seen: list[Summary] = []
    with executor({}, {}) as workers:
        summary = label_folder(workers, many, tmp_path / "out", warn=quiet, progress=seen.append)
    assert (summary.labelled, summary.failed, summary.images) == (24, 1, 25)
    assert summary.engine_seconds > 0
    assert all(summary.stage_seconds[stage] > 0 for stage in ("tag", "detect", "segment", "fuse"))
    assert contents(tmp_path / "out") == whole
    assert len(seen) > 1


def test_workers_warn_of_strange_classes_once(executor: Executor, world: World, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("clip", "grounding-dino", "sam"):
        write_manifest(world.bundle / name, dataclasses.replace(world.model(name).manifest, variant="mini"))
    with pytest.warns(WsssWarning, match="none of the 3 classes is among them") as caught, executor({}, {}):
        pass
    assert len(caught) == 1
    assert "WsssWarning" not in capfd.readouterr().err, "not in each process"


def test_a_dead_worker_s_images_are_redone_by_the_other(
    executor: Executor, world: World, many: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    (world.bundle / "die").touch()
    warnings: list[str] = []
    with executor({"dies_once": "05.png"}, {"dies_once": "05.png"}) as workers:
        summary = label_folder(workers, many, tmp_path / "out", warn=warnings.append)
    assert (summary.labelled, summary.failed) == (24, 1)
    assert any("the worker on cpu died (SIGKILL)" in line for line in warnings)
    assert contents(tmp_path / "out") == whole


def test_an_image_that_kills_workers_fails_and_the_run_goes_on(executor: Executor, many: Path, tmp_path: Path) -> None:
    with executor(*[{"dies_of": "23.png"}] * 3) as workers:
        summary = label_folder(workers, many, tmp_path / "out", warn=quiet)
    assert summary.labelled + summary.failed == summary.images == 25
    failed = {record["path"]: record["error"] for record in read_records(tmp_path / "out") if "error" in record}
    assert "2 workers died" in failed["23.png"]


def test_when_all_workers_die_the_store_goes_on_later(
    executor: Executor, many: Path, tmp_path: Path, whole: dict[str, bytes], world: World
) -> None:
    with executor({"dies_of": "20.png"}) as workers, pytest.raises(WsssError, match="all workers died") as caught:
        label_folder(workers, many, tmp_path / "out", warn=quiet)
    assert "run the same command again" in caught.value.hint
    label_folder(Chain.open(world.bundle, classes=world.classes), many, tmp_path / "out", warn=quiet)
    assert contents(tmp_path / "out") == whole


def test_what_a_worker_cannot_do_is_said(executor: Executor, many: Path, tmp_path: Path) -> None:
    with pytest.raises(WsssError, match="no such bundle") as caught:
        executor({}, {"refuses": "no such bundle"})
    assert caught.value.hint == "do something"
    assert not multiprocessing.active_children(), "the other worker ends too"
    with pytest.raises(WsssError, match="would label with settings that differ"):
        executor({}, {"margin": 0.3})
    with executor({"full": True}) as workers, pytest.raises(StoreError, match="No space left"):
        label_folder(workers, many, tmp_path / "out", warn=quiet)


def test_stopped_workers_finish_what_they_began(
    executor: Executor, many: Path, tmp_path: Path, whole: dict[str, bytes], world: World
) -> None:
    for number in range(500):
        world.save(many / f"more-{number}.png", 30, 40, blue=(3, 3, 30, 30))
    stop = threading.Event()
    with executor({}, {}) as workers:
        summary = label_folder(workers, many, tmp_path / "out", stop=stop, progress=lambda _: stop.set(), warn=quiet)
    assert summary.stopped
    assert 0 < summary.labelled < 520
    assert len(list((tmp_path / "out" / "labels").rglob("*.png"))) == summary.labelled


def test_a_worker_whose_parent_is_gone_leaves_its_queue(executor: Executor, many: Path, tmp_path: Path) -> None:
    labels = tmp_path / "out" / "labels"
    labels.mkdir(parents=True)
    with executor({}) as workers:
        (worker,) = workers._workers
        worker.pipe.send((LocalImages(many), LabelFolder(labels, labels.parent)))
        worker.pipe.send([Task(number, "00.png", f"{number}.png") for number in range(1000)])
        worker.pipe.recv()
        worker.pipe.close()  # as the system does when a process dies
        worker.process.join()
    assert 0 < len(list(labels.iterdir())) < 1000


def test_seconds_of_workers_are_added_up_and_their_padding_is_averaged() -> None:
    summaries = (
        Summary(engine_seconds=1, stage_seconds={"tag": 1, "fuse": 2}, padding=0.1),
        Summary(engine_seconds=4, stage_seconds={"tag": 5}, padding=0.3),
        Summary(),
    )
    workers, summary = Workers.__new__(Workers), Summary()
    workers._workers = [_Worker("x", None, None, summary=each) for each in summaries]  # type: ignore[arg-type]
    workers.report(summary)
    assert (summary.engine_seconds, summary.padding) == (5, pytest.approx(0.2))
    assert summary.stage_seconds == {"tag": 6, "detect": 0, "segment": 0, "fuse": 2}
    workers._workers = workers._workers[2:]
    workers.report(summary)
    assert summary.padding is None, "none of them has a detector"


def test_no_task_is_sent_far_ahead_of_the_oldest_unfinished_one() -> None:
    def worker() -> _Worker:
        return _Worker("x", None, None)  # type: ignore[arg-type]

    slow, quick = worker(), worker()
    dispatcher = _Dispatcher((Task(number, f"{number}", "") for number in range(10_000)), batch=2)
    assert [task.number for task in dispatcher.assign(slow, [slow, quick])] == list(range(12))
    last = -1
    while tasks := dispatcher.assign(quick, [slow, quick]):
        last = tasks[-1].number
        quick.pending.clear()
    assert last == 4095
    slow.pending.clear()
    assert dispatcher.assign(quick, [slow, quick])
