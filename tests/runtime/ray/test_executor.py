"""A run on a Ray cluster of three nodes, all on this machine: the same store as a run without, whoever dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wsss.errors import StoreError, WsssError
from wsss.extras import install_line
from wsss.runtime.chain import Chain
from wsss.runtime.run.label_folder import Summary, label_folder
from wsss.store.local import read_records

if TYPE_CHECKING:
    from ..conftest import Answer, World

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs ray: pip install 'wsss[ray]'")

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")  # of Ray, about Ray's own defaults

SCRIPTED = """
import errno, importlib.util, os, signal, sys, time
from pathlib import Path
from wsss.store import local as labelstore
from wsss.errors import WsssError
from wsss.runtime import chain as pipeline
from wsss.runtime.run import stream

spec = importlib.util.spec_from_file_location("scripted_world", {conftest!r})
module = sys.modules["scripted_world"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

def open_labeler(bundle, *, dies_once="", dies_of="", margin=0.1, full=False, refuses="", slow=0):
    if refuses:
        raise WsssError(refuses, hint="do something")
    world = module.World(bundle)
    pipeline.open_graph = world.open_graph
    decode = stream.decode
    def decode_or_die(file, **how):
        time.sleep(slow)
        if file.name == dies_of or (file.name == dies_once and Path(bundle, "die").exists()):
            Path(bundle, "die").unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(file, **how)
    stream.decode = decode_or_die
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if full:
        labelstore.png_of = no_room
    return pipeline.Chain.open(bundle, classes=world.classes, rules=pipeline.Rules(margin=margin))
"""
Executor = Callable[..., Any]
NODE: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that labelers on the cluster import from."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "scripted_ray.py").write_text(SCRIPTED.format(conftest=str(Path(__file__).parents[2] / "conftest.py")))
    return folder


@pytest.fixture(scope="module")
def cluster(modules: Path) -> Iterator[Any]:
    """Three nodes, each with a core, and a GPU as far as Ray is told."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{modules}:{Path(__file__).parents[3]}")
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            cluster.others = [cluster.add_node(**NODE) for _ in range(2)]
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def executor(cluster: Any, modules: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """``executor(...)``: labelers with scripted engines, opened with these arguments."""
    from wsss.runtime.ray.executor import RayExecutor

    monkeypatch.syspath_prepend(modules)
    import scripted_ray  # type: ignore[import-not-found]

    def start(workers: int = 3, *, gpu: bool | None = False, **how: object) -> RayExecutor:
        opener = partial(scripted_ray.open_labeler, world.bundle, **how)
        return RayExecutor(opener, workers=workers, gpu=gpu, batch=2)

    return start


@pytest.fixture
def disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process were in no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.fixture
def many(world: World, tmp_path: Path) -> Path:
    for number in range(60):
        world.save(tmp_path / "many" / f"{number:02}.png", 30, 40, red=(number % 9, 2, 20 + number % 5, 20))
    (tmp_path / "many" / "00.png").rename(tmp_path / "many" / os.fsdecode(b"00-\xff no Unicode.png"))
    (tmp_path / "many" / "10-bad.jpg").write_bytes(b"no")
    (tmp_path / "many" / "20-gone.jpg").symlink_to("nowhere")
    return tmp_path / "many"


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "history.jsonl"}


def quiet(_: str) -> None: ...


@pytest.fixture
def more(world: World, many: Path) -> Path:
    """As many as labelers that take a twentieth of a second for each do not have in hand at once."""
    for number in range(400):
        world.save(many / "more" / f"{number:03}.png", 30, 40, blue=(3, 3, 30, 30))
    return many


@pytest.fixture
def whole(world: World, many: Path, tmp_path: Path) -> dict[str, bytes]:
    label_folder(Chain.open(world.bundle, classes=world.classes), many, tmp_path / "whole", warn=quiet)
    return contents(tmp_path / "whole")


def test_three_nodes_make_the_same_store_though_a_labeler_is_killed(
    executor: Executor, many: Path, tmp_path: Path, whole: dict[str, bytes], world: World
) -> None:
    (world.bundle / "die").touch()
    warnings: list[str] = []
    with executor(dies_once="30.png") as labelers:
        summary = label_folder(labelers, many, tmp_path / "out", warn=warnings.append)
    assert not (world.bundle / "die").exists()
    assert (summary.labelled, summary.failed, summary.images) == (60, 2, 62)
    assert summary.engine_seconds > 0
    paths = [record["path"] for record in read_records(tmp_path / "out")]
    assert len(paths) == len(set(paths)) == 62
    assert contents(tmp_path / "out") == whole


def test_an_image_that_kills_labelers_fails_alone(
    executor: Executor, many: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    with executor(2, dies_of="23.png") as labelers:
        summary = label_folder(labelers, many, tmp_path / "out", warn=quiet)
    assert (summary.labelled, summary.failed) == (59, 3)
    failed = {record["path"]: record["error"] for record in read_records(tmp_path / "out") if "error" in record}
    assert failed["23.png"] == "23.png: 2 labelers died while they labeled it"
    labels = {name: data for name, data in contents(tmp_path / "out").items() if name.startswith("labels/")}
    assert labels == {name: data for name, data in whole.items() if name.startswith("labels/") and name != "labels/23.png"}


def test_what_a_labeler_cannot_do_is_said(executor: Executor, many: Path, tmp_path: Path) -> None:
    with pytest.raises(WsssError, match="no such bundle") as caught:
        executor(1, refuses="no such bundle")
    assert caught.value.hint == "do something"
    with executor(1, full=True) as labelers, pytest.raises(StoreError, match="No space left"):
        label_folder(labelers, many, tmp_path / "out", warn=quiet)


def test_a_run_whose_driver_is_killed_goes_on_and_may_be_stopped(
    executor: Executor, cluster: Any, world: World, more: Path, modules: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    script = f"""
        from functools import partial
        from pathlib import Path
        import scripted_ray
        from wsss.runtime.ray.executor import RayExecutor
        from wsss.runtime.run.label_folder import label_folder

        opener = partial(scripted_ray.open_labeler, Path({str(world.bundle)!r}), slow=0.05)
        with RayExecutor(opener, address={cluster.address!r}, workers=2, gpu=False, batch=2) as executor:
            label_folder(executor, Path({str(more)!r}), Path({str(out)!r}), progress=lambda _: print("progress", flush=True))
    """
    env = {**os.environ, "PYTHONPATH": f"{modules}:{Path(__file__).parents[3]}"}
    driver = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=env, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    with driver, driver.stdout:
        assert driver.stdout.readline() == "progress\n"
        driver.send_signal(signal.SIGKILL)
    records = list(read_records(out))
    assert 0 < len(records) < 400
    stop = threading.Event()
    with executor(2, slow=0.05) as labelers:
        summary = label_folder(labelers, more, out, stop=stop, progress=lambda _: stop.set(), warn=quiet)
    assert summary.stopped
    assert summary.skipped == len(records)
    assert summary.labelled > 0
    assert len(list(read_records(out))) == summary.skipped + summary.labelled + summary.failed < 462
    label_folder(Chain.open(world.bundle, classes=world.classes), more, out, warn=quiet)
    assert contents(out) == whole


def test_a_node_that_is_lost_is_not_waited_for(  # the last one: it takes a node away
    executor: Executor, cluster: Any, many: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    lost = threading.Event()

    def lose(_: Summary) -> None:
        if not lost.is_set():
            lost.set()
            cluster.remove_node(cluster.others[-1], allow_graceful=False)

    with executor(slow=0.2) as labelers:
        summary = label_folder(labelers, many, tmp_path / "out", progress=lose, warn=quiet)
    assert (summary.labelled, summary.failed) == (60, 2)
    assert contents(tmp_path / "out") == whole


def test_the_command_asks_for_a_cluster(
    wsss: Callable[..., Answer], photos: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsss.runtime.ray import executor as on_ray

    asked: list[dict[str, object]] = []

    def refuse(opener: partial[Chain], **how: object) -> None:
        asked.append({**opener.keywords, **how})
        raise WsssError("no cluster today")

    monkeypatch.setattr(on_ray, "RayExecutor", refuse)
    words = ["label", photos, "--classes", "red, green, blue", "--bundle", world.bundle, "--out", tmp_path / "out", "--on", "ray"]
    assert wsss(*words).code == 1
    assert wsss(*words, "--ray-address", "head:6379", "--workers", "4", "--device", "cuda", "--batch", "3").code == 1
    passed = [[each[name] for name in ("address", "workers", "gpu", "batch", "device")] for each in asked]
    assert passed == [[None, None, None, None, "auto"], ["head:6379", 4, True, 3, "cuda"]]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--workers", "2"], "--devices 0,1"),
        (["--ray-address", "auto"], "--devices 0,1"),
        (["--on", "ray", "--devices", "0,1"], "--on ray --workers 8"),
        (["--on", "ray", "--device", "cuda:1"], "a GPU of its own"),
        (["--on", "dask"], ""),
        (["--on", "ray", "--ray-address", "ray://head:10001"], "ray job submit"),
    ],
)
def test_flags_that_do_not_go_together(
    wsss: Callable[..., Answer], photos: Path, world: World, tmp_path: Path, words: list[str], hint: str, disconnected: None
) -> None:
    answer = wsss("label", photos, "--classes", "red", "--bundle", world.bundle, "--out", tmp_path / "out", *words)
    assert answer.code == 2
    assert hint in answer.err


def test_an_address_where_nothing_listens_is_said(
    wsss: Callable[..., Answer], photos: Path, world: World, tmp_path: Path, disconnected: None
) -> None:
    words = ["label", photos, "--classes", "red", "--bundle", world.bundle, "--out", tmp_path / "out", "--on", "ray"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answer = wsss(*words, "--ray-address", f"127.0.0.1:{port}")
    assert (answer.code, "no Ray cluster answers" in answer.err) == (1, True)
    assert "expected HOST:PORT" in wsss(*words, "--ray-address", "nowhere").err


def test_a_cluster_that_does_not_start_is_one_message(
    wsss: Callable[..., Answer],
    world: World,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disconnected: None,
) -> None:
    def too_slow(*, address: str, **_: object) -> None:
        raise ConnectionError if address == "auto" else Exception("a trace\nThe current node timed out during startup.")

    monkeypatch.setattr(ray, "init", too_slow)
    flags = ["--classes", "red", "--bundle", world.bundle, "--out", tmp_path / "out", "--on", "ray"]
    answer = wsss("label", photos, *flags)
    assert answer.code == 1
    assert "Ray cannot start on this machine: The current node timed out during startup.\n\nhint: run the same" in answer.err


def test_without_ray_the_command_says_what_to_install(
    wsss: Callable[..., Answer], photos: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wsss.runtime.ray.executor", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    answer = wsss("label", photos, "--classes", "red", "--bundle", world.bundle, "--out", tmp_path / "out", "--on", "ray")
    assert answer.code == 1
    assert install_line("ray") in answer.err
