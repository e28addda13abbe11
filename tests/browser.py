"""Headless Chromium through its DevTools protocol: as much as the tests of the site need, over one websocket."""
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import websocket

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-default-apps", "--disable-sync", "--disable-extensions", "--mute-audio",
         "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*",
         "--allow-file-access-from-files"]


def binary() -> str:
    """Path of an installed Chromium, or ""."""
    return os.environ.get("CHROMIUM") or next((p for p in map(shutil.which, NAMES) if p), "")


class Browser:
    """`with Browser() as b: page = b.page(); page.open(url)`."""

    def __enter__(self):
        self.home = tempfile.mkdtemp(prefix="ftbook-chromium-")
        self.process = subprocess.Popen(
            [binary(), *FLAGS, f"--user-data-dir={self.home}", "about:blank"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for line in self.process.stderr:
            match = re.search(r"DevTools listening on (ws://\S+)", line)
            if match:
                break
        else:
            raise RuntimeError("Chromium did not start")
        self.socket = websocket.create_connection(match[1], timeout=60)
        self.numbers = itertools.count(1)
        return self

    def __exit__(self, *error):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.process.stderr.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params) -> dict:
        """Send one command and wait for its answer; events that come before it go to the pages."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        self.socket.send(json.dumps({**message, "sessionId": session} if session else message))
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def receive(self) -> dict:
        message = json.loads(self.socket.recv())
        if "method" in message and message.get("sessionId") in getattr(self, "pages", {}):
            self.pages[message["sessionId"]].events.append(message)
        return message

    def page(self) -> "Page":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.pages = {**getattr(self, "pages", {}), session: Page(self, session)}
        return self.pages[session]


class Page:
    """One tab: what it asked for, what it complained about, and scripts run in it."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session, self.events = browser, session, []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        return self.browser.call(method, self.session, **params)

    def size(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def open(self, url: str) -> None:
        """Go to an address and wait for its load event."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        end = time.monotonic() + 60
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            if time.monotonic() > end:
                raise TimeoutError(url)
            self.browser.receive()

    def run(self, script: str):
        """Value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> bool:
        """Until the expression is true; False when time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.run(script):
                return True
            time.sleep(0.05)
        return False

    def complaints(self) -> list:
        """Uncaught exceptions, console errors and log errors since `open`."""
        found = []
        for event in self.events:
            p = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = p["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and p["type"] == "error":
                found.append(" ".join(str(a.get("value", a.get("description"))) for a in p["args"]))
            elif event["method"] == "Log.entryAdded" and p["entry"]["level"] == "error":
                found.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
        return found

    def requests(self) -> list:
        """Addresses asked for since `open`."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, file: str, full: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        Path(file).write_bytes(base64.b64decode(data))
