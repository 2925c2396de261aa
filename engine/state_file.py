"""One sequence's state as a file: what it holds, whose it is, and that nothing of it was lost.

llama.cpp believes a state that it is given, and ends the process on some that are not its own. So a file names the
model, the context and the build that it is of (`origin_of`), and carries two checksums: one over its head and tokens,
which are read at a start, and one over the state, which is read when it is wanted. What is cut off, damaged or foreign
is never handed on. The files are no longer of use than until something of that changes, and are never converted.

Layout, little-endian: 8 bytes of magic, the origin (16 bytes), the first position, the number of tokens, the bytes of
the state, the state's checksum (16), the checksum of all that and the tokens (16); then the tokens as int32; then the
state.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.prefix_cache import StoredState, TokenIds
from infsvc.errors import StateFileError

SUFFIX = ".state"
PART_SUFFIX = ".part"

_MAGIC = b"infstat1"
_HEAD = struct.Struct("<8s16siIQ16s")
_DIGEST_BYTES = 16
_HEAD_BYTES = _HEAD.size + _DIGEST_BYTES
_CHUNK_BYTES = 4 * 2**20
"""Between two of them a writer looks whether it should stop."""

_SAMPLES, _SAMPLE_BYTES = 64, 2**16
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True, eq=False)
class FiledState:
    """What a file holds, without the state itself.

    Attributes:
        tokens, first: as in `StoredState`.
        n_bytes: of the state.
        file_bytes: of the whole file.
    """

    path: Path
    tokens: TokenIds
    first: int
    n_bytes: int
    file_bytes: int


def _digest(*parts: bytes | memoryview) -> bytes:
    """Some gigabyte a second, without the GIL."""
    found = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        found.update(part)
    return found.digest()


def model_stamp(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Name, size, time and inode of a model's file, of all parts where it is in several. Raises `OSError`."""
    paths = [path]
    if _SPLIT.search(path.name):
        paths = sorted(path.parent.glob(f"{_SPLIT.sub('', path.name)}-*-of-*.gguf"))
    stats = [(each.name, each.stat()) for each in paths]
    return tuple((name, each.st_size, each.st_mtime_ns, each.st_ino) for name, each in stats)


def origin_of(model: Path, *facts: object) -> bytes:
    """16 bytes that stand for a model's file and for all else that a state depends on.

    Of the file count its size, the time it was written at and what stands at 64 places of it, so that a large one need
    not be read through. Blocks for some milliseconds, on a slow disk for a second.

    Args:
        facts: context, cache and build; their text counts.

    Raises:
        OSError: the file cannot be read.
    """
    found = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, size, mtime_ns, _ in model_stamp(model):
        found.update(f"{size} {mtime_ns} ".encode())
        with (model.parent / name).open("rb") as stream:
            last = max(0, size - _SAMPLE_BYTES)
            for place in sorted({last * n // (_SAMPLES - 1) for n in range(_SAMPLES)}):
                stream.seek(place)
                found.update(stream.read(_SAMPLE_BYTES))
    found.update(repr(facts).encode())
    return found.digest()


def name_of(origin: bytes, tokens: TokenIds) -> str:
    """The file's name: the same for the same state, and told apart by origin at a glance."""
    return f"{origin.hex()}-{_digest(tokens.data).hex()}{SUFFIX}"


def is_of(name: str, origin: bytes) -> bool:
    """Whether a file of that name claims to be of `origin`."""
    return name.startswith(origin.hex() + "-")


def file_bytes(state: StoredState) -> int:
    """How large the file of a state is."""
    return int(_HEAD_BYTES + state.tokens.nbytes + state.blob.nbytes)


def write_state(folder: Path, origin: bytes, state: StoredState, stopped: Callable[[], bool]) -> FiledState | None:
    """Writes a state under a name of its own and then gives it its real one, so that what is half written is never
    found; None when `stopped` said so.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    tokens = np.ascontiguousarray(state.tokens, dtype="<i4")
    head = _HEAD.pack(_MAGIC, origin, state.first, len(tokens), state.blob.nbytes, _digest(state.blob.data))
    path = folder / name_of(origin, tokens)
    part = path.with_suffix(PART_SUFFIX)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # it holds what people wrote
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            for piece in (head + _digest(head, tokens.data), tokens.data, state.blob.data):
                left = memoryview(piece).cast("B")
                while left:
                    if stopped():
                        return None
                    left = left[stream.write(left[:_CHUNK_BYTES]) or 0 :]
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return FiledState(path, state.tokens, state.first, state.blob.nbytes, file_bytes(state))


def read_head(path: Path, origin: bytes) -> FiledState:
    """What a file holds.

    Raises:
        StateFileError: it is cut off, damaged, or of another model, context or build.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return _read_head(path, origin, stream.read, os.fstat(stream.fileno()).st_size)[0]


def read_state(filed: FiledState, origin: bytes) -> StoredState:
    """The state, every byte of it checked. Raises as `read_head`."""
    with filed.path.open("rb") as stream:
        found, checksum = _read_head(filed.path, origin, stream.read, os.fstat(stream.fileno()).st_size)
        blob = np.empty(found.n_bytes, dtype=np.uint8)
        view = blob.data
        while view:
            n = stream.readinto(view)
            if not n:
                raise StateFileError(f"{filed.path} is cut off")
            view = view[n:]
    if _digest(blob.data) != checksum:
        raise StateFileError(f"{filed.path} is damaged: its state does not match its checksum")
    return StoredState(found.tokens, found.first, blob)


def _read_head(path: Path, origin: bytes, read: Callable[[int], bytes], size: int) -> tuple[FiledState, bytes]:
    head = read(_HEAD.size)
    if len(head) < _HEAD.size or head[: len(_MAGIC)] != _MAGIC:
        raise StateFileError(f"{path} is no state, or cut off")
    _, whose, first, n_tokens, n_bytes, checksum = _HEAD.unpack(head)
    if size != _HEAD_BYTES + 4 * n_tokens + n_bytes:
        raise StateFileError(f"{path} is cut off or damaged: {size} bytes")
    whole = read(_DIGEST_BYTES)
    tokens = np.frombuffer(read(4 * n_tokens), dtype="<i4").astype(np.int32)
    if len(tokens) != n_tokens or _digest(head, tokens.data) != whole:
        raise StateFileError(f"{path} is damaged: its head does not match its checksum")
    if whose != origin:
        raise StateFileError(f"{path} is of another model, context or build")
    return FiledState(path, tokens, first, n_bytes, size), checksum
