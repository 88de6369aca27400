"""The stages at once: photographs of one canvas share a batch, nothing waits for ever, memory is bounded by a budget."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from wsss.batch import Boxes, Photograph
from wsss.errors import OutOfMemory, StoreError
from wsss.runtime.chain import Chain
from wsss.runtime.device import FairLock
from wsss.runtime.run import stream
from wsss.runtime.run.prefetch import BoundedQueue, Budget
from wsss.runtime.run.sources import LocalImages
from wsss.runtime.run.stream import Batch, Loading, Receipt, Stream, Task
from wsss.store import local as labelstore
from wsss.store.format import line_of, parse_line
from wsss.store.local import LabelFolder

if TYPE_CHECKING:
    from ..conftest import World


@pytest.fixture
def labels(tmp_path: Path) -> LabelFolder:
    for name in ("labels", ".tmp"):
        (tmp_path / name).mkdir()
    return LabelFolder(tmp_path / "labels", tmp_path / ".tmp")


def start(world: World, folder: Path, labels: LabelFolder, *, batch: int = 2, at_once: int = 1, callers: int = 1) -> Stream:
    labeler = Chain.open(world.bundle, classes=world.classes)
    labeler.device.turn, labeler.device.callers = FairLock(at_once), callers
    return Stream(labeler, LocalImages(folder), labels, batch=batch, stop=threading.Event())


def tasks_of(folder: Path) -> list[Task]:
    return [Task(number, path.name, path.name) for number, path in enumerate(sorted(folder.iterdir()))]


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """Photographs lying and standing in turn."""
    for number in range(12):
        world.save(tmp_path / "in" / f"{number:02}.png", *((30, 40) if number % 2 else (40, 30)), red=(2, 2, 20, 20))
    return tmp_path / "in"


def test_photographs_of_one_canvas_share_the_detector_s_calls(world: World, folder: Path, labels: LabelFolder) -> None:
    receipts = [receipt for group in start(world, folder, labels).run(tasks_of(folder)) for receipt in group]
    assert sorted(receipt.number for receipt in receipts) == list(range(12))
    for canvas in ("32x48", "48x32"):
        assert world.rows("grounding-dino", f"image-{canvas}") == [2, 2, 2], "full calls, though the shapes alternate"


def test_the_detectors_inputs_are_prepared_ahead_of_images_with_a_class(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every photograph but the last has one of the classes; none has all of them."""
    world.save(folder / "11.png", 30, 40)
    prepared, prepare = list[str](), Stream._prepare

    def noted(self: Stream, stage: object, name: str, photos: list[Photograph]) -> None:
        prepared.extend(photo.name for photo in photos if name == "detect")
        prepare(self, stage, name, photos)

    monkeypatch.setattr(Stream, "_prepare", noted)
    assert len(finished(start(world, folder, labels), tasks_of(folder))) == 12
    assert sorted(prepared) == [f"{number:02}.png" for number in range(11)]


def test_the_only_one_of_its_shape_does_not_wait_for_the_end(world: World, tmp_path: Path, labels: LabelFolder) -> None:
    for number in range(60):
        world.save(tmp_path / "in" / f"{number:02}.png", *((40, 30) if number == 0 else (30, 40)), red=(2, 2, 20, 20))
    order = [
        receipt.number for group in start(world, tmp_path / "in", labels).run(tasks_of(tmp_path / "in")) for receipt in group
    ]
    assert 2 < order.index(0) < 20


def test_a_failure_does_not_wait_for_the_end(world: World, tmp_path: Path, labels: LabelFolder) -> None:
    """Lines are written in the order of the images: those of all others would wait for it."""
    for number in range(60):
        world.save(tmp_path / "in" / f"{number:02}.png", 30, 40, red=(2, 2, 20, 20))
    (tmp_path / "in" / "00.png").write_text("no")
    order = [
        receipt.number for group in start(world, tmp_path / "in", labels).run(tasks_of(tmp_path / "in")) for receipt in group
    ]
    assert order.index(0) < 20


def test_what_came_does_not_wait_for_tasks_that_are_late(world: World, folder: Path, labels: LabelFolder) -> None:
    done = threading.Event()

    def late() -> Iterator[Task | None]:
        first, *rest = tasks_of(folder)
        yield first
        while not done.wait(0.01):
            yield None
        yield from rest

    seen: list[Receipt] = []
    for group in start(world, folder, labels, batch=8).run(late()):
        seen += group
        done.set()
    assert [seen[0].number, len(seen)] == [0, 12]


def test_a_full_disk_ends_a_stream_whose_tasks_are_late(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def endless() -> Iterator[Task | None]:
        yield from tasks_of(folder)[:3]
        while True:
            yield None

    monkeypatch.setattr(labelstore, "png_of", no_room)
    before = threading.active_count()
    with pytest.raises(StoreError, match="No space left"):
        list(start(world, folder, labels).run(endless()))
    assert threading.active_count() == before, "no thread is left behind"


def test_a_batch_waits_until_four_others_have_passed_it(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photographs of another canvas pass the first one, two in a batch."""
    running = start(world, folder, labels)
    monkeypatch.setattr(running._labeler, "canvas", lambda photo: photo.name == "first")
    names = ["first", *map(str, range(1, 20))]
    photos = [Photograph(name=name, pixels=np.full((9, 9, 3), 99, np.uint8)) for name in names]
    loaded = (Loading(Task(number, photo.name, photo.name), photo) for number, photo in enumerate(photos))
    passed = [[photo.name for photo in batch.photos] for batch in running._batches(loaded)]
    assert [names[0] for names in passed[:5]] == ["1", "3", "5", "first", "7"]
    assert sorted(map(len, passed)) == [1, 1, *[2] * 9]


def test_photographs_that_wait_take_a_quarter_of_the_free_memory(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, room in ((4000, 1000), (1 << 60, stream.PIXEL_BYTES)):
        monkeypatch.setattr(stream, "free_bytes", lambda free=free: free)
        budget = start(world, folder, labels)._budget
        budget.take(1)
        assert budget.fits(room - 1) and not budget.fits(room)


def test_a_full_disk_ends_a_stream_that_waits_for_room(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget smaller than any two photographs, and nobody gives any of it back."""
    waiting, take = threading.Event(), Budget.take

    def noted(budget: Budget, amount: int) -> None:
        if not budget.fits(amount):
            waiting.set()
        take(budget, amount)

    def no_room(*_: object) -> None:
        assert waiting.wait(60)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream, "PIXEL_BYTES", 1300 * 4)
    monkeypatch.setattr(Budget, "take", noted)
    monkeypatch.setattr(Budget, "give", lambda *_: None)
    monkeypatch.setattr(labelstore, "png_of", no_room)
    errors = list[StoreError]()

    def run() -> None:
        try:
            list(start(world, folder, labels, batch=1).run(tasks_of(folder)))
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert ["No space left" in error.message for error in errors] == [True]


def test_two_batches_wait_before_the_encoder(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it computes, the detector goes on until two batches wait and one is in hand: one late batch costs nothing."""
    begun, ended, fourth = list[BoundedQueue[Any]](), list[bool](), threading.Event()
    counts: list[tuple[int, int]] = []
    put, encoder = BoundedQueue.put, world.engine("sam", "encoder")
    script = encoder.script

    def counted(queue: BoundedQueue[Any], item: object) -> bool:
        if not isinstance(item, Future):  # only the detector's results are futures, of what the encoder makes of them
            return put(queue, item)
        with queue._changed:  # let go only while `put` waits for room
            begun.append(queue)
            if len(begun) == 4:
                fourth.set()
            ended.append(put(queue, item))
            return ended[-1]

    def held(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if not counts:
            assert fourth.wait(60), "the detector waits although there is room"
            with begun[0]._changed:
                counts.append((len(begun), len(ended)))
        return script(feeds)

    monkeypatch.setattr(BoundedQueue, "put", counted)
    encoder.script = held
    receipts = [receipt for group in start(world, folder, labels, at_once=2).run(tasks_of(folder)) for receipt in group]
    assert len(receipts) == 12
    assert counts == [(4, 3)], "of the batches begun, one is encoded, two wait, and one is in the detector's hand"


@pytest.mark.parametrize("callers", [1, 2])
def test_an_encoder_that_holds_its_callers_has_the_next_call_waiting(
    world: World, folder: Path, labels: LabelFolder, callers: int
) -> None:
    encoder, detector = world.engine("sam", "encoder"), world.engine("grounding-dino", "image-32x48")
    inside, most, detected = list[int](), list[int](), threading.Event()
    encode, detect, together = encoder.script, detector.script, threading.Barrier(callers)

    def held(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        inside.append(1)
        assert detected.wait(60)  # there is work for a further caller, if there is one
        together.wait(60)
        most.append(len(inside))
        together.wait(60)
        inside.pop()
        return encode(feeds)

    def noted(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if len(detector.calls) > 1:
            detected.set()
        return detect(feeds)

    encoder.script, detector.script = held, noted
    receipts = [r for group in start(world, folder, labels, at_once=3, callers=callers).run(tasks_of(folder)) for r in group]
    assert sorted(receipt.number for receipt in receipts) == list(range(12))
    assert max(most) == callers


def test_an_image_whose_outputs_no_line_can_hold_fails_alone(world: World, folder: Path, labels: LabelFolder) -> None:
    """JSON has no infinity: readers would refuse the whole store."""
    decoder = world.engine("sam", "decoder")
    script = decoder.script

    def first_is_infinite(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        out = dict(script(feeds))
        out["quality"][0] = np.inf if len(decoder.calls) < 2 else 0.9
        return out

    decoder.script = first_is_infinite
    receipts = [receipt for group in start(world, folder, labels).run(tasks_of(folder)) for receipt in group]
    records = [parse_line(line_of(receipt.record)) for receipt in receipts]
    (failed,) = [record for record in records if "error" in record]
    assert "expected finite numbers, got Infinity" in failed["error"]
    assert failed["bytes"] > 0
    assert len(records) == 12
    assert {path.name for path in labels.folder.iterdir()} == {record["label"] for record in records if record is not failed}


@pytest.mark.parametrize("limit", ["PIXEL_BYTES", "free_bytes"])
@pytest.mark.parametrize("small", [0, 10**9])
def test_large_photographs_come_one_by_one(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch, small: int, limit: str
) -> None:
    """A budget smaller than any two photographs: everything is labeled all the same."""
    if limit == "PIXEL_BYTES":
        monkeypatch.setattr(stream, "PIXEL_BYTES", 1300 * 4)
    else:
        monkeypatch.setattr(stream, "free_bytes", lambda: 4 * 1300 * 4)
    monkeypatch.setattr(stream, "SMALL", small)
    receipts = [receipt for group in start(world, folder, labels).run(tasks_of(folder)) for receipt in group]
    assert len(receipts) == 12
    assert world.rows("grounding-dino", "image-32x48") == [1] * 6


@pytest.mark.parametrize(("large", "together"), [(1201, 2), (1200, 1)])
def test_a_large_photograph_counts_with_what_decoding_it_takes(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch, large: int, together: int
) -> None:
    """A budget of four photographs of 1200 pixels, or of one that takes ten bytes a pixel instead of four."""
    monkeypatch.setattr(stream, "PIXEL_BYTES", 4 * 1200 * 4)
    monkeypatch.setattr(stream, "LARGE", large)
    assert len(finished(start(world, folder, labels), tasks_of(folder))) == 12
    assert world.rows("grounding-dino", "image-32x48")[0] == max(world.rows("grounding-dino", "image-32x48")) == together


@pytest.mark.parametrize("small", [0, 10**9])
def test_a_photograph_that_fails_makes_room_for_the_next(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    """A budget smaller than any two photographs, of which all but two are cut off behind their headers."""
    for path in sorted(folder.iterdir())[1:-1]:
        path.write_bytes(path.read_bytes()[:60])
    monkeypatch.setattr(stream, "PIXEL_BYTES", 1300 * 4)
    monkeypatch.setattr(stream, "SMALL", small)
    receipts = finished(start(world, folder, labels), tasks_of(folder))
    assert sorted(receipt.number for receipt in receipts if "error" in receipt.record) == list(range(1, 11))
    assert len(receipts) == 12


def test_a_photograph_that_the_device_has_no_memory_for_makes_room_for_the_next(
    world: World, folder: Path, labels: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        raise OutOfMemory("no memory")

    monkeypatch.setattr(stream, "PIXEL_BYTES", 1300 * 4)
    world.engine("sam", "encoder").script = no_memory
    receipts = finished(start(world, folder, labels), tasks_of(folder))
    assert [receipt.record.get("error") for receipt in receipts] == [f"{number:02}.png: no memory" for number in range(12)]


def test_the_line_of_an_image_that_could_not_be_read_has_no_file() -> None:
    receipt = stream.failure(Task(3, "a.jpg", "a.png"), "a.jpg: broken")
    line = {"path": "a.jpg", "label": "a.png", "bytes": 0, "mtime_ns": 0, "sha256": "", "error": "a.jpg: broken"}
    assert receipt == Receipt(3, line)


def test_of_two_halves_of_a_batch_one_has_its_failures(world: World) -> None:
    photos = [world.photo(8, 8) for _ in range(3)]
    loaded = [Loading(Task(number, f"{number}.png", f"{number}.png"), photo) for number, photo in enumerate(photos)]
    batch = Batch(loaded, photos, [Receipt(3, {"path": "3.png", "error": "no"})])
    image = np.array([0, 1, 1, 2])
    batch.boxes = Boxes(np.tile(np.array([0, 0, 4, 4], np.float32), (4, 1)), np.ones(4, np.float32), image + 1, image)
    halves = list(batch.halves())
    assert [[each.task.number for each in half.loaded] for half in halves] == [[0], [1, 2]]
    assert [len(half.photos) for half in halves] == [1, 2]
    assert [receipt.number for half in halves for receipt in half.receipts] == [3]
    boxes = [half.boxes for half in halves if half.boxes is not None]
    assert [(each.image.tolist(), each.label.tolist()) for each in boxes] == [([0], [1]), ([0, 0, 1], [2, 2, 3])]


def test_halves_of_a_batch_without_boxes_have_none_and_need_no_detector(world: World) -> None:
    photos = [world.photo(8, 8) for _ in range(2)]
    batch = Batch(
        [Loading(Task(number, f"{number}.png", f"{number}.png"), photo) for number, photo in enumerate(photos)], photos, []
    )
    nothing = np.zeros(0, np.int64)
    batch.boxes = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), nothing, nothing)
    assert [half.boxes is None for half in batch.halves()] == [False, False]
    batch.boxes = None
    assert [half.boxes is None for half in batch.halves()] == [True, True]


def finished(running: Stream, tasks: list[Task]) -> list[Receipt]:
    """All receipts; fails where a stream waits for ever."""
    receipts = list[Receipt]()
    thread = threading.Thread(target=lambda: receipts.extend(each for group in running.run(tasks) for each in group), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "it waits for room that nobody gives back"
    return receipts
