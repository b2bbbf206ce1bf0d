"""Chromium without a window, driven through its DevTools protocol over a pair of pipes. It has no network, or only this
machine's own."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS = 60
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"]
OPTIONS += ["--use-fake-ui-for-media-stream", "--remote-debugging-pipe"]
NO_GPU = "--disable-gpu"
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")  # an adapter that computes on the CPU


class Browser:
    """One tab, without a GPU unless WEBGPU is among its options; `requests` are the addresses that it asked for, and
    `errors` what it wrote to its console. With `local` it may connect to 127.0.0.1."""

    def __init__(self, profile: Path, *options: str, local: bool = False):
        inward, outward = os.pipe(), os.pipe()
        assert CHROMIUM is not None
        gpu = [] if {*WEBGPU} <= {*options} else [NO_GPU]
        rules = f"--host-resolver-rules=MAP * ~NOTFOUND{', EXCLUDE 127.0.0.1' * local}"
        command = [CHROMIUM, *OPTIONS, *gpu, rules, *options, f"--user-data-dir={profile}", "about:blank"]
        # Chromium reads from 3 and writes to 4, which may be in use here.
        ends = [fcntl.fcntl(each, fcntl.F_DUPFD, 20) for each in (inward[0], outward[1])]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", *command],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (inward[0], outward[1], *ends):
            os.close(each)
        self.sink, self.source = os.fdopen(inward[1], "wb"), os.fdopen(outward[0], "rb")
        self.waiting, self.number = b"", 0
        self.requests, self.errors = list[str](), list[str]()
        self.session: str | None = None
        target = self.send("Target.getTargets")["targetInfos"]
        page = next(each for each in target if each["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM", "Log"):
            self.send(f"{domain}.enable")
        offline = {"offline": not local, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.send("Network.emulateNetworkConditions", **offline)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.sink.close()
        self.source.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.sink.write(json.dumps(message).encode() + b"\0")
        self.sink.flush()
        while True:
            found = self.receive()
            if found.get("id") == self.number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.waiting:
            part = os.read(self.source.fileno(), 1 << 20)
            assert part, "Chromium ended"
            self.waiting += part
        line, _, self.waiting = self.waiting.partition(b"\0")
        found = json.loads(line)
        given = found.get("params", {})
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(given["exceptionDetails"]))
        elif found.get("method") == "Log.entryAdded":
            self.errors.append(str(given["entry"]["text"]))
        elif found.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(str(given["args"]))
        return found

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path: Path) -> None:
        """Opens a file, and keeps the details of its answers in `answers`."""
        self.send("Page.addScriptToEvaluateOnNewDocument", source=KEEP)
        self.send("Page.navigate", url=path.as_uri())
        self.wait("document.readyState == 'complete' && location.protocol == 'file:'")

    def visit(self, address: str) -> None:
        """Opens a page of a server on this machine."""
        self.send("Page.navigate", url=address)
        self.wait(f"document.readyState == 'complete' && location.href.startsWith({address!r})")

    def wait(self, condition: str) -> None:
        """Until an expression holds."""
        limit = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < limit, (condition, self.run("document.body.innerText"), self.errors)
            time.sleep(0.02)

    def give(self, path: Path) -> dict[str, Any]:
        """Gives the page a file; its answer."""
        before = self.run("answers.length")
        self.choose(path)
        self.wait(f"answers.length > {before}")
        return self.run("answers.at(-1)")

    def choose(self, path: Path, selector: str = "#file") -> None:
        """Gives the page a file as a person would choose it."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def keep_screenshot(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


KEEP = 'window.answers = []; document.addEventListener("answer", ({ detail }) => answers.push(detail));'
