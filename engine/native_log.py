"""File descriptors 1 and 2, kept from native code: what llama.cpp prints goes to a file that the structured log tails.

A raw write to descriptor 2 would draw over the screen, and a pipe loses the last words before an abort; an O_APPEND
file keeps them. Call `redirect` before the app is made and before llama_cpp is imported.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# What llama.cpp prints hundreds of times a load about its graphs, and for each state that is restored; of use only to
# its own developers.
_NOISE = re.compile(
    r"(llama_graph_n_input_tensors|graph_reserve|create_tensor|set_abort_callback|~llama_context|state_read_meta):?\b"
)
# How llama.cpp words a step that a cancel has ended: GGML_STATUS_ABORTED is 1, and llama_decode answers 2.
_ABORTED = re.compile(
    r"graph_compute_async failed with error 1$|failed to compute graph, compute status: 1$"
    r"|failed to (decode|encode), ret = 2$"
)
_MAX_BYTES = 16 * 2**20
_WARNING = re.compile(r"\b(warn(ing)?|deprecated)\b", re.IGNORECASE)
_ERROR = re.compile(r"\b(error|failed|fatal|abort|assert)\b", re.IGNORECASE)


def redirect(path: Path) -> None:
    """Points descriptors 1 and 2 at the file; Python's own stdout and stderr, and Textual's, keep the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    if path.exists() and path.stat().st_size > _MAX_BYTES:
        path.replace(path.with_suffix(".log.1"))
    out, err = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout = sys.__stdout__ = _terminal(out)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _terminal(err)  # type: ignore[misc]
    target = os.open(path, flags, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


class _Terminal(io.FileIO):
    """A terminal, which may go away: what is written then is dropped, and the process asks itself, once, to end.

    An error would end Textual's thread that writes, and then the loop would wait for it for ever, deaf to signals.
    """

    _gone = False

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            if not self._gone:
                self._gone = True
                os.kill(os.getpid(), signal.SIGTERM)
            return len(memoryview(data))


def _terminal(descriptor: int) -> io.TextIOWrapper:
    """An unbuffered UTF-8 stream on what the descriptor was."""
    raw = _Terminal(descriptor, "wb") if os.isatty(descriptor) else os.fdopen(descriptor, "wb", buffering=0)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


class NativeLog:
    """Reads the file's new lines from where it ended when this was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def read(self, limit_bytes: int = 2**18) -> list[tuple[str, str]]:
        """New whole lines as (level, text), at most `limit_bytes` of them. Never raises for a missing file."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._at)
                data = stream.read(limit_bytes)
        except OSError:
            return []
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        texts = (line.decode("utf-8", errors="replace").rstrip() for line in lines)
        return [(_level(text), text) for text in texts if text.strip(". ")]


def _level(text: str) -> str:
    """How serious a line of llama.cpp sounds; its own level is not in the text."""
    if _ABORTED.search(text):
        return "debug"
    if _ERROR.search(text):
        return "error" if "failed" in text.lower() or "fatal" in text.lower() or "abort" in text.lower() else "warning"
    if _NOISE.match(text):
        return "debug"
    return "warning" if _WARNING.search(text) else "info"
