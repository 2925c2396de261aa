"""A headless Chromium, driven over its debugging pipe; no driver is installed for it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 20.0

_AT_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands at 3 and answers at 4."""


class Page:
    """One tab. `complaints` collects script errors, console errors and what the page's policy refused."""

    def __init__(self, send: asyncio.WriteTransport) -> None:
        self._send = send
        self._n = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.session: str | None = None
        self.complaints: list[str] = []

    def take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers.pop(message["id"]).set_result(message)
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.complaints.append(message["params"]["entry"]["text"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._n += 1
        message: dict[str, Any] = {"id": self._n, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        answer = self._answers[self._n] = asyncio.get_running_loop().create_future()
        self._send.write(json.dumps(message).encode() + b"\0")
        told = await asyncio.wait_for(answer, PATIENCE_S)
        assert "error" not in told, told
        result: dict[str, Any] = told["result"]
        return result

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, script: str) -> None:
        """Waits until an expression is true."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await self.run(script):
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise AssertionError(f"never true: {script}\n{await self.run('document.body.innerText')}") from None

    async def open(self, url: str, *, width: int = 1400, height: int = 900, dark: bool = True) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.call("Page.navigate", url=url)
        # The old page may still be there when this returns.
        await self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9}[key]
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    async def picture(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Page]:
    """A tab of a fresh Chromium. Without Chromium the test fails: a page nobody looked at is not tested."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("the dashboard's test needs a browser: apt-get install chromium")
    loop = asyncio.get_running_loop()
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    command = [
        found, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe",
        f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _AT_3_AND_4, str(their_in), str(their_out), *command,
        pass_fds=(their_in, their_out), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    os.close(their_in)
    os.close(their_out)
    reader = asyncio.StreamReader(limit=2**26)
    incoming, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_in, "rb"))
    outgoing, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(our_out, "wb"))
    page = Page(outgoing)

    async def read() -> None:
        while True:
            page.take(json.loads((await reader.readuntil(b"\0"))[:-1]))

    reading = asyncio.create_task(read())
    try:
        targets = (await page.call("Target.getTargets"))["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        page.session = (await page.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await page.call(f"{domain}.enable")
        yield page
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        outgoing.close()
        incoming.close()
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _told(url: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        async with browser(Path(profile)) as page:
            await page.open(url)
            await page.until("document.querySelector('#cards > li .facts dd') !== null")
            return str(await page.run("document.querySelector('main').innerText"))


if __name__ == "__main__":
    # `python -m tests.browser URL` prints the dashboard's text once its models are there.
    print(asyncio.run(_told(sys.argv[1])))
