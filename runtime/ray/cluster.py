"""Connects to a Ray cluster, and sets Ray Data's options. See `executor`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import DataContext

from ...errors import UsageError, WsssError


def connect(address: str | None, log: Callable[[str], None]) -> None:
    """Connect to a cluster: at ``address``, at RAY_ADDRESS, on this machine, or a new one started here.

    Raises:
        WsssError: there is no cluster at the given address.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray-address {address}: wsss must run on a node of the cluster, not as a client of it",
            hint="ray job submit --address http://HEAD:8265 -- wsss label ... --on ray",
        )
    # Ray's C++ side prints harmless errors to this process's stderr when Ray Data restarts actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        _check_listens(address)
        with _silent():
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        if address != "auto":
            raise WsssError(
                f"--ray-address {address}: no Ray cluster answers: {last_line(error)}", hint="`ray status` on its head node"
            ) from None
        log("Ray: no cluster found; one is started on this machine")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # would send usage reports over the network
        try:
            with _silent():
                ray.init(address="local", include_dashboard=False, **quiet)
        except Exception as error:  # Ray raises plain ones
            raise WsssError(
                f"--on ray: Ray cannot start on this machine: {last_line(error)}",
                hint="run the same command again, or start Ray by hand: ray start --head",
            ) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard stderr, that of C++ code too. Failures come as exceptions."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def _check_listens(address: str) -> None:
    """Raise OSError or ValueError where nothing listens; Ray itself would retry forever."""
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not port.isdecimal():
            raise ValueError("expected HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextlib.contextmanager
def pipeline_settings() -> Iterator[None]:
    """Set the options of Ray Data for one pipeline."""
    context = DataContext.get_current()
    options = {
        "enable_progress_bars": False,
        "max_errored_blocks": -1,  # images of a lost call are labeled one by one
        "max_consecutive_actor_init_deaths": 10,
        "execution_no_progress_timeout_s": -1,  # the cluster may grow late; the user gets a warning instead
    }
    before = {name: getattr(context, name) for name in options if hasattr(context, name)}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data")  # warns that a short run does not fill the pool
    for name in before:
        setattr(context, name, options[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def free() -> str:
    """Describe the cluster's unused resources."""
    resources = ray.available_resources()
    return f"{resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} cores"


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where Ray puts the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
