"""A model hub and its content store on this machine, real HTTP, with the faults that the tests ask for.

The hub speaks as huggingface.co does: `HEAD /<repo>/resolve/main/<file>` answers with the etag, the commit and the
linked size, and a redirect to where large files lie: here the same server under the name `localhost`.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO, FILE = "owner/tiny-GGUF", "tiny.gguf"


@dataclass
class Asked:
    """One request that came."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None


@dataclass
class FakeHub:
    """Serves `content`. Each fault is a field; a fault that is used up leaves a healthy server.

    Attributes:
        truncate_at: bodies end after so many bytes, each time as long as any are left in the list.
        stall_at: the next body stops after so many bytes and waits for `release`.
        statuses: answers of the next requests for content, instead of it.
        hub_status: the answer to every request for metadata, with its X-Error-Code.
        token: what the hub wants to be shown.
        pause_s: between the pieces of a body, 64 KiB each.
        anything: whether any file of any repository is there, all with the same content.
    """

    content: bytes
    truncate_at: list[int] = field(default_factory=list)
    stall_at: int | None = None
    statuses: list[int] = field(default_factory=list)
    hub_status: tuple[int, str] | None = None
    etag: str | None = None
    token: str | None = None
    ignore_range: bool = False
    content_type: str = "application/octet-stream"
    lfs: bool = True
    redirect_to: str | None = None
    lengths: bool = True
    anything: bool = False
    pause_s: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    n_body_bytes: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    on_content: Callable[[], None] = lambda: None

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def file_url(self) -> str:
        """A plain address of the content."""
        return f"{self.endpoint}/content/{FILE}?sig=secret"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def bodies(self) -> list[Asked]:
        return [each for each in self.asked if each.method == "GET" and each.path.startswith("/content")]


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _note(self) -> None:
        self.state.asked.append(
            Asked(
                self.command, self.path.partition("?")[0], self.headers["Host"], self.headers["Range"],
                self.headers["Authorization"],
            )
        )  # fmt: skip

    def _head(self, status: int, **headers: str | int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_HEAD(self) -> None:
        self._note()
        self._hub()

    def do_GET(self) -> None:
        self._note()
        if self.path.startswith("/content"):
            self.state.on_content()
            self._content()
        else:
            self._hub()

    def _hub(self) -> None:
        hub = self.state
        if hub.hub_status is not None:
            status, word = hub.hub_status
            self._head(status, Content_Length=0, **({"X_Error_Code": word} if word else {}))
        elif hub.token is not None and self.headers["Authorization"] != f"Bearer {hub.token}":
            self._head(401, Content_Length=0, X_Error_Code="GatedRepo")
        elif self.path.startswith("/owner/old-name/"):
            self._head(307, Location=self.path.replace("old-name", "tiny-GGUF"), Content_Length=0)
        elif not hub.anything and not self.path.startswith(f"/{REPO}/resolve/main/{FILE}"):
            self._head(404, Content_Length=0, X_Error_Code="EntryNotFound")
        elif hub.lfs or self.command == "GET":
            etag = hub.etag or hub.sha256
            to = hub.redirect_to or f"http://localhost:{hub.port}/content/{FILE}?sig=secret"
            self._head(302, Location=to, X_Repo_Commit="c" * 40, X_Linked_Etag=f'"{etag}"',
                       X_Linked_Size=len(hub.content), ETag='"of-the-pointer"', Content_Length=0)  # fmt: skip
        else:
            self._head(200, X_Repo_Commit="c" * 40, ETag=f'"{"b" * 40}"', Content_Length=len(hub.content))

    def _content(self) -> None:
        hub, content = self.state, self.state.content
        if hub.statuses:
            self._head(hub.statuses.pop(0), Content_Length=0, Retry_After=0)
            return
        start, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        current = self.headers["If-Range"] in (None, f'"{hub.sha256}"')
        if asked and not hub.ignore_range and current:
            start, status = int(asked[1]), 206
            if start >= len(content):
                self._head(416, Content_Range=f"bytes */{len(content)}", Content_Length=0)
                return
        self.send_response(status)
        self.send_header("Content-Type", hub.content_type)
        self.send_header("ETag", f'"{hub.sha256}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if hub.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        end = len(content)
        if hub.truncate_at:
            end = min(end, start + hub.truncate_at.pop(0))
        body = content[start:end]
        stall_at, hub.stall_at = hub.stall_at, None
        if stall_at is not None:
            self._write(body[:stall_at])
            hub.stalled.set()
            hub.release.wait(60)
            body = body[stall_at:]
        self._write(body)
        if end < len(content) or not hub.lengths:
            self.close_connection = True

    def _write(self, data: bytes) -> None:
        for at in range(0, len(data), 65536):
            try:
                self.wfile.write(data[at : at + 65536])
                self.wfile.flush()
            except OSError:
                self.close_connection = True
                return
            self.state.n_body_bytes += len(data[at : at + 65536])
            time.sleep(self.state.pause_s)
