"""A page in headless Chromium, driven through its debugging pipe (Chrome DevTools Protocol); needs no driver or library."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One page; a context manager.

    Args:
        url: what it opens.
        profile: an empty folder for the browser's files.
        width, height: of the window, in pixels.
    """

    def __init__(self, url: str, profile: Path, width: int = 1280, height: int = 1000):
        self.size, self.answers, self.events, self.number = (width, height), {}, [], 0
        reads, self.commands = os.pipe()
        self.messages, writes = os.pipe()
        # The browser reads descriptor 3 and writes descriptor 4; `sh` puts the pipes there.
        command = [
            PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
            f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", *command],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self.buffer, self.session = b"", None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.resize(height)
        self.send("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && document.body !== null")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *error) -> None:
        self.session = None
        self.send("Browser.close")
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.messages)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Runs a command of the protocol and returns its result; what happened meanwhile joins `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.messages, 1 << 20)
                if not part:
                    raise RuntimeError(f"Chromium ended during {method}.")
                self.buffer += part
            raw, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", expression))
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Waits until a JavaScript expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"Not true after {seconds:g} s: {expression}")
            time.sleep(0.1)
        return value

    def click(self, label: str) -> None:
        """Clicks the tab or the visible button with this text, as soon as there is one."""
        # Gradio keeps invisible copies of its tabs to measure them; only the real ones have the role.
        buttons = "[...document.querySelectorAll('[role=tab]'), ...document.querySelectorAll('button')]"
        found = f"{buttons}.find(one => one.checkVisibility() && one.innerText.trim() == {json.dumps(label)})"
        self.wait(f"(button => button && (button.click(), true))({found})")

    def resize(self, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=self.size[0], height=height, deviceScaleFactor=1, mobile=False
        )

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        for _ in range(2):  # without its scroll bar the page is wider, and has another height
            self.resize(max(self.size[1], int(self.run("document.documentElement.scrollHeight"))))
            time.sleep(0.5)  # Gradio's panels fade in
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
        self.resize(self.size[1])

    def requested(self) -> set[str]:
        """Addresses of everything that the page has asked for."""
        return {
            event["params"]["request"]["url"] for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        }  # fmt: skip
