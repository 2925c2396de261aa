"""llama.cpp as this process has loaded it: the library, what its build can do, and how a running step is ended.

Importing this module imports llama_cpp (some 0.3 s) and gives C's own stderr logger back, because the Python callback
that llama_cpp installs takes the GIL for each line; `engine.native_log` keeps file descriptor 2 in a file.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

os.environ.setdefault("GGML_NO_BACKTRACE", "1")

import llama_cpp

lib = llama_cpp

lib.llama_log_set(lib.llama_log_callback(0), ctypes.c_void_p(0))
lib.llama_backend_init()

VERSION: str = lib.__version__

DECODE_OK, DECODE_NO_KV, DECODE_ABORTED = 0, 1, 2
POOLING_NONE = 0
FLASH_ATTN_AUTO, FLASH_ATTN_OFF, FLASH_ATTN_ON = -1, 0, 1

# The abort callback must not take the GIL in the middle of a step. C's atoi over a two-byte buffer is such a function:
# it answers 1 for "1" and 0 for "0", and ggml reads the answer as a bool.
_C = ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt
_ABORT = ctypes.cast(_C.atoi, lib.ggml_abort_callback)

# Each load has threads of its own, and glibc gives each a heap that never shrinks as a whole: after 50 loads 8 MB were
# lost in them. M_ARENA_MAX (−8) of malloc.h; musl and others have no such heaps.
if hasattr(_C, "malloc_trim"):
    _C.mallopt(-8, 2)


class AbortFlag:
    """Ends a context's running step from another thread; holds until it is lowered."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(b"0", 2)

    def watch(self, params: Any) -> None:
        """Has a context that is made with these parameters look at the flag; the flag outlives it."""
        params.abort_callback = _ABORT
        params.abort_callback_data = ctypes.cast(self._buffer, ctypes.c_void_p)

    @property
    def is_raised(self) -> bool:
        return self._buffer[0] == b"1"

    def hoist(self) -> None:
        """Any thread."""
        self._buffer[0] = b"1"

    def lower(self) -> None:
        """Takes an earlier `hoist` back."""
        self._buffer[0] = b"0"


def supports_gpu() -> bool:
    """Whether this build can offload layers."""
    return bool(lib.llama_supports_gpu_offload())


def system_info() -> str:
    """The instruction sets this build uses, as llama.cpp prints them."""
    return str(lib.llama_print_system_info().decode())


def return_memory() -> None:
    """Has glibc give freed pages back to the system, which it otherwise keeps by the 10 MB; elsewhere nothing is
    done."""
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)
