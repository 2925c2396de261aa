"""Does this build of llama.cpp decode on this CPU, and does flash attention suit it? Found out once in a child
process, because the wrong build ends the whole process.

On CPUs with AMX a stock build crashes with quantised weights (llama.cpp issue 20824); `use_extra_bufts=False` is the
way around. Flash attention halves the decode speed of some CPUs and quickens both prefill and decode on most, so it is
measured: a prompt and some tokens with and without, in turn, and left off where it is clearly slower. A neighbour's
noise is no reason to leave it off. The answers are kept in the home by CPU and llama-cpp-python version. Run as
`python -m engine.probe MODEL [--plain]`, this file is the child.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infsvc.errors import LoadError
from infsvc.home import app_root

if TYPE_CHECKING:
    from engine.llama import LlamaContext

_TIMEOUT_S = 60.0
_FLASH = b"flash attention"
_N_PROMPT, _N_DECODE, _N_ROUNDS = 512, 16, 3
_CLEARLY = 1.25
"""How many times as long prefill times decode takes where flash attention does not suit the CPU."""
_METHOD = 2
"""Changes with the way of measuring, so that older answers are found out anew."""
# Two would wait for each other on a busy machine, and the comparison is the same.
_N_THREADS = 1


def _fingerprint() -> str:
    """This CPU's flags and this build, as one short word."""
    flags = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    build = version("llama-cpp-python")
    return hashlib.sha256(f"{platform.machine()} {flags} {build} {sys.prefix} {_METHOD}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ProbeResult:
    """How to run models here: may weights be repacked for this CPU, and does flash attention suit it."""

    use_extra_bufts: bool = True
    flash_attention: bool = False


async def probe(model: Path, cache: Path) -> ProbeResult:
    """How this build runs on this CPU.

    Args:
        model: a small quantised file to decode with.
        cache: where the answer is kept.

    Raises:
        LoadError: not even the plain way works.
    """
    key = _fingerprint()
    known = _read(cache)
    kept = [known.get(name) for name in ProbeResult.__dataclass_fields__]
    if known.get("key") == key and all(isinstance(answer, bool) for answer in kept):
        return ProbeResult(*map(bool, kept))
    for plain in (False, True):
        flash_attention = await _decodes(model, plain=plain)
        if flash_attention is not None:
            result = ProbeResult(use_extra_bufts=not plain, flash_attention=flash_attention)
            _write(cache, {"key": key} | asdict(result))
            return result
    raise LoadError(
        "llama.cpp, as it is installed, cannot decode on this CPU: rebuild it for this machine with `make build-llama`"
    )


def _read(cache: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
        if isinstance(known, dict):
            return known
    return {}


def _write(cache: Path, known: dict[str, Any]) -> None:
    with suppress(OSError):
        cache.write_text(json.dumps(known))


async def _decodes(model: Path, *, plain: bool) -> bool | None:
    """Whether flash attention suits a child that decodes; None when it did not."""
    command = [sys.executable, "-m", "engine.probe", str(model), *(["--plain"] if plain else [])]
    child = await asyncio.create_subprocess_exec(
        *command,
        cwd=app_root(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            said, _ = await child.communicate()
    except TimeoutError:
        return None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return said.strip().endswith(_FLASH) if child.returncode == 0 else None


def _child(path: str, *, plain: bool) -> int:
    from engine.llama import LlamaContext, LlamaModel

    model = LlamaModel(Path(path), use_extra_bufts=not plain)
    contexts = {
        flash: LlamaContext(
            model,
            n_ctx=_N_PROMPT + _N_DECODE,
            n_slots=1,
            n_batch=_N_PROMPT,
            n_threads=_N_THREADS,
            flash_attention=flash,
        )
        for flash in (False, True)
    }
    best = {flash: [float("inf"), float("inf")] for flash in contexts}
    for _ in range(_N_ROUNDS):
        for flash, context in contexts.items():
            for kind, seconds in enumerate(_timed(context)):
                best[flash][kind] = min(best[flash][kind], seconds)
    (prefill, decode), (flash_prefill, flash_decode) = best[False], best[True]
    if flash_prefill * flash_decode < _CLEARLY * prefill * decode:
        sys.stdout.buffer.write(_FLASH)
    return 0


def _timed(context: LlamaContext) -> tuple[float, float]:
    """Seconds to read a prompt and to decode some tokens after it; the context is empty again afterwards."""
    from engine.llama import DECODE_OK, Batch

    batch = Batch(_N_PROMPT, 1)

    def step(start: int, n: int) -> None:
        batch.clear()
        position = batch.add([1 + token % 200 for token in range(n)], start=start, slot=0, draws=True)
        if context.decode(batch) != DECODE_OK or not bool((context.logits(position) < float("inf")).all()):
            sys.exit(1)

    begun_s = time.perf_counter()
    step(0, _N_PROMPT)
    read_s = time.perf_counter()
    for past in range(_N_DECODE - 1):
        step(_N_PROMPT + past, 1)
    context.forget(0)
    return read_s - begun_s, time.perf_counter() - read_s


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], plain="--plain" in sys.argv[2:]))
