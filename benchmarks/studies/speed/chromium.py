"""A headless Chromium driven over its DevTools pipe: enough to open a page, press keys, click, look. Standard library only.

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
    "--no-sandbox",  # containers run as root, where the sandbox refuses to start
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-backgrounding-occluded-windows",  # or the page may get no frames: nobody sees its window
    "--disable-renderer-backgrounding",
    "--disable-background-timer-throttling",
    "--disable-hang-monitor",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Puts the pipe's ends at 3 and 4; copies them out of the way first, since they may be 3 and 4 already.
_LAUNCH = """import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "Home": 36, "End": 35, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_KEYS |= {"ArrowDown": 40, "Backspace": 8}


def find_chromium() -> str | None:
    """The browser's path, or None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page.

    Args:
        seconds: how long any answer may take before it counts as lost.

    Raises:
        WsssError: no Chromium on this machine, it does not answer, or the page threw an error (from any method).
    """

    def __init__(self, *, seconds: float = 60) -> None:
        program = find_chromium()
        if program is None:
            raise WsssError(f"none of {', '.join(_NAMES)} is installed", hint="apt install chromium")
        self.events: list[dict[str, Any]] = []
        """What the page reported since it was opened: requests, exceptions, console messages."""
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
            target = next(each["targetId"] for each in targets if each["type"] == "page")
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
        """Ends the browser and removes its profile."""
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
        """Sets the window's size in CSS pixels, the color scheme, and whether it is a touch screen."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        self._call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Goes to an address and waits until it has loaded."""
        self.events.clear()
        self._call("Page.navigate", url=address)
        self._wait(lambda event: event.get("method") == "Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in answer:
            told = answer["exceptionDetails"]
            raise WsssError(f"{script}: {told.get('exception', {}).get('description', told.get('text'))}")
        return answer["result"].get("value")

    def next_frame(self) -> None:
        """Waits until the page was drawn, or for half a second where there is nothing to draw."""
        self.evaluate("new Promise((done) => { requestAnimationFrame(done); setTimeout(done, 500); })")

    def until(self, script: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + self._seconds
        while not self.evaluate(script):
            if time.monotonic() > end:
                raise WsssError(f"waited {self._seconds:.0f} s for {script}")
            time.sleep(0.02)

    def click(self, selector: str, *, across: float = 0.5) -> None:
        """Clicks an element with the mouse, after scrolling it into view; ``across`` is the share of its width."""
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
        """Presses and releases a key, by its name (``Enter``, ``ArrowLeft``) or as a single character."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = _KEYS.get(key, ord(key.upper()) if len(key) == 1 and key.isalnum() else 0)
        kind = "keyDown" if text else "rawKeyDown"
        self._call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Types a text into what has the focus, key by key."""
        for character in text:
            self.press(character)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the ``whole`` page."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def longest_task_ms(self, do: Callable[[], object]) -> tuple[float, float]:
        """The longest task of the page's main thread while ``do`` runs and until it is drawn: by the clock, in processor time.

        The second is what the first would be on a machine that does nothing else.
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
        pages = {each["id"] for each in process if each["type"] == "renderer"}
        threads = {
            (each["pid"], each["tid"])
            for each in traced
            if each["name"] == "thread_name" and each["args"]["name"] == "CrRendererMain" and each["pid"] in pages
        }
        tasks = [each for each in traced if each["name"].endswith("RunTask") and (each["pid"], each["tid"]) in threads]
        wall = max((each.get("dur", 0) for each in tasks), default=0)
        processor = max((each.get("tdur", 0) for each in tasks), default=0)
        return wall / 1000, processor / 1000

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Uncaught errors, refused scripts and styles, and what the page logged as an error."""
        told = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                told.append(json.dumps(params["exceptionDetails"].get("exception", params["exceptionDetails"]))[:500])
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                told.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return told

    def _call(self, method: str, *, session: bool = True, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": self._session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda told: told.get("id") == number)
        if "error" in answer:
            raise WsssError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _wait(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + self._seconds
        while True:
            message = self._read(end)
            if "method" in message:
                self.events.append(message)
            if fits(message):
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
