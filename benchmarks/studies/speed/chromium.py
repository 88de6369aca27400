"""Control a headless Chromium over its DevTools pipe: open a page, press keys, click, inspect. Standard library only.

Protocol: https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each ended by a zero byte, on the browser's
file descriptors 3 and 4 (``--remote-debugging-pipe``). No port is opened.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ....errors import WsssError

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # the sandbox does not start as root, the usual user of containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-backgrounding-occluded-windows",  # otherwise the page may get no frames, since its window is not visible
    "--disable-renderer-backgrounding",
    "--disable-background-timer-throttling",
    "--disable-hang-monitor",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Moves the pipe's ends to descriptors 3 and 4. They are duplicated first, because one may already be 3 or 4.
_LAUNCH = """import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "Home": 36, "End": 35, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_KEYS |= {"ArrowDown": 40, "Backspace": 8}


def find_chromium() -> str | None:
    """The path of an installed browser, None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page.

    Args:
        seconds: time limit for each answer of the browser.

    Raises:
        WsssError: no Chromium is installed, it does not answer, or the page threw an error (from any method).
    """

    def __init__(self, *, seconds: float = 60) -> None:
        program = find_chromium()
        if program is None:
            raise WsssError(f"none of {', '.join(_NAMES)} is installed", hint="apt install chromium")
        self.events: list[dict[str, Any]] = []
        """Events since the page was opened: requests, exceptions, console messages."""
        self._seconds, self._number, self._rest = seconds, 0, b""
        self._profile = tempfile.mkdtemp(prefix="wsss-chromium-")
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        launch = [sys.executable, "-c", _LAUNCH, str(their_in), str(their_out), program, *_FLAGS]
        self._process = subprocess.Popen(
            [*launch, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            targets = self._call("Target.getTargets", session=False)["targetInfos"]
            target = next(target["targetId"] for target in targets if target["type"] == "page")
            attached = self._call("Target.attachToTarget", session=False, targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and remove its profile."""
        with contextlib.suppress(WsssError, OSError):
            self._call("Browser.close", session=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()
        for end in (self._in, self._out):
            os.close(end)
        shutil.rmtree(self._profile, ignore_errors=True)

    def show(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Set the window's size in CSS pixels, the color scheme, and touch input."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        self._call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Open an address and wait until it has loaded."""
        self.events.clear()
        self._call("Page.navigate", url=address)
        self._wait(lambda event: event.get("method") == "Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise WsssError(f"{script}: {details.get('exception', {}).get('description', details.get('text'))}")
        return answer["result"].get("value")

    def next_frame(self) -> None:
        """Wait until the page is drawn, or for half a second where there is nothing to draw."""
        self.evaluate("new Promise((done) => { requestAnimationFrame(done); setTimeout(done, 500); })")

    def until(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + self._seconds
        while not self.evaluate(script):
            if time.monotonic() > end:
                raise WsssError(f"waited {self._seconds:.0f} s for {script}")
            time.sleep(0.02)

    def click(self, selector: str, *, across: float = 0.5) -> None:
        """Click an element after scrolling it into view, at the share ``across`` of its width."""
        place = self.evaluate(
            f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
            if (!node) return null;
            node.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = node.getBoundingClientRect();
            return [box.left + {across} * box.width, box.top + box.height / 2]; }})()"""
        )
        if place is None:
            raise WsssError(f"{selector}: not in the page")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self._call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button=button, clickCount=1)

    def wheel(self, down_px: float) -> None:
        """Turn the mouse wheel in the middle of the window."""
        middle = self.evaluate("[innerWidth / 2, innerHeight / 2]")
        self._call("Input.dispatchMouseEvent", type="mouseWheel", x=middle[0], y=middle[1], deltaX=0, deltaY=down_px)

    def press(self, key: str) -> None:
        """Press and release a key, given by its name (``Enter``, ``ArrowLeft``) or as a single character."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = _KEYS.get(key, ord(key.upper()) if len(key) == 1 and key.isalnum() else 0)
        kind = "keyDown" if text else "rawKeyDown"
        self._call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Type a text into the focused element, key by key."""
        for character in text:
            self.press(character)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of the window, or of the ``whole`` page."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def longest_task_ms(self, do: Callable[[], object]) -> tuple[float, float]:
        """The longest task of the page's main thread while ``do`` runs and until the page is drawn: wall time, CPU time.

        On a machine without other work both are equal.
        """
        self._call("Tracing.start", session=False, categories="toplevel,__metadata", transferMode="ReportEvents")
        do()
        self.evaluate("new Promise((done) => setTimeout(done, 100))")
        self._call("Tracing.end", session=False)
        self._wait(lambda event: event.get("method") == "Tracing.tracingComplete")
        parts = [event["params"]["value"] for event in self.events if event["method"] == "Tracing.dataCollected"]
        traced = list(itertools.chain.from_iterable(parts))
        self.events = [event for event in self.events if not event["method"].startswith("Tracing.")]
        process = self._call("SystemInfo.getProcessInfo", session=False)["processInfo"]
        pages = {info["id"] for info in process if info["type"] == "renderer"}
        threads = {
            (event["pid"], event["tid"])
            for event in traced
            if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain" and event["pid"] in pages
        }
        tasks = [event for event in traced if event["name"].endswith("RunTask") and (event["pid"], event["tid"]) in threads]
        wall = max((task.get("dur", 0) for task in tasks), default=0)
        processor = max((task.get("tdur", 0) for task in tasks), default=0)
        return wall / 1000, processor / 1000

    def requests(self) -> list[str]:
        """Addresses that the page requested since it was opened."""
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Uncaught errors, refused scripts and styles, and logged errors of the page."""
        messages = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                messages.append(json.dumps(params["exceptionDetails"].get("exception", params["exceptionDetails"]))[:500])
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                messages.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return messages

    def _call(self, method: str, *, session: bool = True, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": self._session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda event: event.get("id") == number)
        if "error" in answer:
            raise WsssError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _wait(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read messages until one matches, and return it; events are kept."""
        end = time.monotonic() + self._seconds
        while True:
            message = self._read(end)
            if "method" in message:
                self.events.append(message)
            if matches(message):
                return message

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise WsssError(f"the browser did not answer within {self._seconds:.0f} s")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise WsssError(f"the browser ended with exit code {self._process.poll()}")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message
