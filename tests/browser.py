"""Drives headless Chromium over the DevTools protocol, on a pair of pipes: no port, no package, no network.

def test_page(chromium):                      # the fixture of tests/conftest.py; skips where there is none
    page = chromium.page(width=390, dark=True)
    page.goto("file:///tmp/report.html")
    page.wait("document.querySelectorAll('img').length")
    page.click("#search"); page.type("a dog"); page.press("Enter")
    assert page.errors == []
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests run as root in containers, where it cannot start; pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
# Keys that are no letters: (code, virtual key number, text).
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "Backspace": ("Backspace", 8, ""),
    "PageDown": ("PageDown", 34, ""),
    "End": ("End", 35, ""),
    "Home": ("Home", 36, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}
TIMEOUT_S = 60.0  # a crowded machine loads torch in half a minute


def find_chromium() -> str | None:
    """The browser's path: of the variable CHROMIUM, else the first of its usual names; None where there is none."""
    return os.environ.get("CHROMIUM") or next((p for n in NAMES if (p := shutil.which(n))), None)


class BrowserError(Exception):
    """The browser refused a command, threw in a script or did not answer in time."""


class Browser:
    """One Chromium process; a context manager. Its profile is a folder of its own, gone at the end."""

    def __init__(self, path: str) -> None:
        self.profile = tempfile.mkdtemp(prefix="pairmill-chromium-")
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        plumbing = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", plumbing, path, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._pending = b""
        self._number = 0
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process that was started here."""
        with contextlib.suppress(BrowserError, OSError):
            self.call("Browser.close", timeout=5)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self.profile, ignore_errors=True)

    def page(
        self, width: int = 1280, height: int = 900, *, dark: bool = False, mobile: bool = False, scale: float = 1
    ) -> Page:
        """A new page with its own cookies and cache. Sizes in CSS px; `mobile`: a phone with touch."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, context)
        self._pages[session] = page
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        if mobile:
            page.call("Emulation.setTouchEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        return page

    def forget(self, page: Page) -> None:
        """Closes a page and its context."""
        self._pages.pop(page.session, None)
        self.call("Target.disposeBrowserContext", browserContextId=page.context)

    def call(self, method: str, session: str | None = None, timeout: float = TIMEOUT_S, **params: Any) -> dict:
        """One command's result; events that come meanwhile go to their pages. Raises BrowserError."""
        self._number += 1
        mine = self._number
        message = {"id": mine, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        until = time.monotonic() + timeout
        while True:
            answer = self._next(until - time.monotonic(), method)
            if answer.get("id") == mine:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            page = self._pages.get(answer.get("sessionId", ""))
            if page is not None and "method" in answer:
                page.hear(answer["method"], answer["params"])

    def _next(self, seconds: float, waiting_for: str) -> dict:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], max(0, seconds))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                why = "ended" if ready else "did not answer in time"
                raise BrowserError(f"{waiting_for}: Chromium {why}")
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)


class Page:
    """One page. `requests` are the URLs it asked for; `errors` what went wrong in it."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context
        self.requests: list[str] = []
        self._errors: list[str] = []

    def call(self, method: str, timeout: float = TIMEOUT_S, **params: Any) -> dict:
        """A command of the DevTools protocol on this page."""
        return self.browser.call(method, self.session, timeout, **params)

    def close(self) -> None:
        self.browser.forget(self)

    def hear(self, method: str, params: dict) -> None:
        """Notes an event."""
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self._errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert", "warning"):
            self._errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self._errors.append(f"{entry['text']} {entry.get('url', '')}".strip())
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    @property
    def errors(self) -> list[str]:
        """Console errors and warnings, uncaught exceptions, refused and failed loads, up to now."""
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        return self._errors

    def goto(self, url: str) -> None:
        """Opens `url` and waits until all of it is loaded. Raises BrowserError where it cannot be reached."""
        answer = self.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise BrowserError(f"{url}: {answer['errorText']}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str, timeout: float = TIMEOUT_S) -> Any:
        """The expression's value as JSON; a promise is awaited. Raises BrowserError where it throws."""
        settings = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self.call("Runtime.evaluate", timeout, expression=expression, **settings)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise BrowserError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return found["result"].get("value")

    def wait(self, expression: str, timeout: float = TIMEOUT_S) -> Any:
        """The expression's value as soon as it is true. Raises BrowserError that tells the page's errors."""
        until = time.monotonic() + timeout
        while not (value := self._settled(expression)):
            if time.monotonic() > until:
                raise BrowserError(f"still false after {timeout:g} s: {expression}. Errors: {self._errors}")
            time.sleep(0.02)
        return value

    def _settled(self, expression: str) -> Any:
        try:
            return self.js(expression)
        except BrowserError as error:
            if "context" in str(error):  # the page was just exchanged for another
                return None
            raise

    def text(self, selector: str) -> str:
        """The visible text of the first element."""
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """Presses and releases the mouse on the first element's middle. Raises BrowserError where it is covered."""
        found = json.dumps(selector)
        self.wait(f"document.querySelector({found}) !== null")
        spot = self.js(
            f"""(() => {{
              const e = document.querySelector({found}); e.scrollIntoView({{block: "center", behavior: "instant"}});
              const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;
              const top = document.elementFromPoint(x, y);
              const hit = top !== null && (e.contains(top) || top.contains(e));
              return {{x, y, hit, top: top && top.outerHTML.slice(0, 120)}};
            }})()"""
        )
        if not spot["hit"]:
            raise BrowserError(f"{selector} cannot be clicked: {spot['top']} lies over it")
        at = {"x": spot["x"], "y": spot["y"], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=spot["x"], y=spot["y"])
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def type(self, text: str) -> None:
        """Enters text where the focus is, as a keyboard would."""
        for letter in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def press(self, key: str, times: int = 1) -> None:
        """Presses a key of KEYS, or a single letter."""
        code, number, text = KEYS.get(key) or (f"Key{key.upper()}", ord(key.upper()), key)
        about = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def screenshot(self, path: str | Path, whole: bool = False) -> None:
        """A PNG of what is in view, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
