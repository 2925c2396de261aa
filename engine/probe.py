"""Does this build of llama.cpp decode on this CPU? Proven once in a child process, because the wrong build ends the
whole process.

On CPUs with AMX a stock build crashes with quantised weights (llama.cpp issue 20824); `use_extra_bufts=False` is the
way around. The answer is kept in the home by CPU and llama-cpp-python version. Run as `python -m engine.probe MODEL
[--plain]`, this file is the child.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infsvc.errors import LoadError
from infsvc.home import app_root

_TIMEOUT_S = 60.0


def _fingerprint() -> str:
    """This CPU's flags and this build, as one short word."""
    flags = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    build = version("llama-cpp-python")
    return hashlib.sha256(f"{platform.machine()} {flags} {build} {sys.prefix}".encode()).hexdigest()[:16]


async def probe(model: Path, cache: Path) -> bool:
    """Whether weights may be repacked for this CPU (`use_extra_bufts`).

    Args:
        model: a small quantised file to decode with.
        cache: where the answer is kept.

    Raises:
        LoadError: not even the plain way works.
    """
    key = _fingerprint()
    known = _read(cache)
    if known.get("key") == key and isinstance(known.get("use_extra_bufts"), bool):
        return bool(known["use_extra_bufts"])
    if await _decodes(model, plain=False):
        answer = True
    elif await _decodes(model, plain=True):
        answer = False
    else:
        raise LoadError(
            "llama.cpp, as it is installed, cannot decode on this CPU: "
            "rebuild it for this machine with `make build-llama`"
        )
    _write(cache, {"key": key, "use_extra_bufts": answer})
    return answer


def _read(cache: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
        if isinstance(known, dict):
            return known
    return {}


def _write(cache: Path, known: dict[str, Any]) -> None:
    with suppress(OSError):
        cache.write_text(json.dumps(known))


async def _decodes(model: Path, *, plain: bool) -> bool:
    command = [sys.executable, "-m", "engine.probe", str(model), *(["--plain"] if plain else [])]
    child = await asyncio.create_subprocess_exec(
        *command,
        cwd=app_root(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        return await asyncio.wait_for(child.wait(), _TIMEOUT_S) == 0
    except TimeoutError:
        return False
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def _child(path: str, *, plain: bool) -> int:
    from engine.llama import DECODE_OK, Batch, LlamaContext, LlamaModel

    model = LlamaModel(Path(path), use_extra_bufts=not plain)
    context = LlamaContext(model, n_ctx=128, n_slots=1, n_batch=128, n_threads=2, on_gpu=False)
    batch = Batch(128, 1)
    for start, n in ((0, 64), (64, 1)):
        batch.clear()
        position = batch.add(list(range(1, n + 1)), start=start, slot=0, draws=True)
        if context.decode(batch) != DECODE_OK or not bool((context.logits(position) < float("inf")).all()):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], plain="--plain" in sys.argv[2:]))
