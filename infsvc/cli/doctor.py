"""`infsvc doctor`: what a node needs, looked at one by one: each ok, warn or fail, with the mend."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import click

from infsvc.cli.outcome import friendly
from infsvc.errors import InfsvcError, human_bytes
from infsvc.home import Home, app_root
from infsvc.nats_login import PORT, NatsLogin, shown
from infsvc.settings import NodeSettings, WorkerSettings, load_node_settings, load_worker

_LOW_DISK_BYTES, _NO_DISK_BYTES = 5 * 2**30, 200 * 2**20
_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "sve")
_BACKENDS = {"cuda": "CUDA", "hip": "ROCm", "vulkan": "Vulkan", "metal": "Metal", "sycl": "SYCL"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, what was seen, and what to do about it."""

    level: Literal["ok", "warn", "fail"]
    what: str
    seen: str
    mend: str = ""


@click.command()
@friendly
def doctor() -> None:
    """Look at everything a node needs: each ok, warn or fail, with what to do. Exits with 1 when something fails."""
    n_failed = 0
    for look in _LOOKS:
        try:
            found = list(look())
        except InfsvcError as error:
            found = [Finding("fail", look.__name__.removeprefix("_").replace("_", " "), str(error))]
        for finding in found:
            mark = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}[finding.level]
            click.echo(
                f"{mark}  {finding.what:<14} {finding.seen}" + (f"\n{'':<20} → {finding.mend}" if finding.mend else "")
            )
            n_failed += finding.level == "fail"
    if n_failed:
        click.echo(f"\n{n_failed} of these keep a node from working", err=True)
        sys.exit(1)


def _python() -> Iterator[Finding]:
    seen = f"{platform.python_version()} in {sys.prefix}"
    good = sys.version_info >= (3, 11)
    yield Finding("ok" if good else "fail", "Python", seen, "" if good else "use Python 3.11 or newer")


def _compiler() -> Iterator[Finding]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        yield Finding("ok", "compiler", found)
    else:
        yield Finding(
            "warn", "compiler", "none", "llama.cpp cannot be built anew: install g++ (Debian: build-essential)"
        )


def _cpu() -> Iterator[Finding]:
    words: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                words |= set(line.partition(":")[2].split())
    has = [flag for flag in _FLAGS if flag in words]
    seen = f"{platform.machine()}, {os.cpu_count()} cores" + (f": {' '.join(has)}" if has else "")
    if platform.machine() in ("x86_64", "AMD64") and words and "avx2" not in words:
        yield Finding("warn", "CPU", seen, "without AVX2 decoding is slow; nothing can be done about it on this CPU")
    else:
        yield Finding("ok", "CPU", seen)


def _gpu() -> Iterator[Finding]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        yield Finding(
            "fail", "llama.cpp", "llama-cpp-python is not installed", "`make build-llama`, or install infsvc[node]"
        )
        return
    with suppress(PackageNotFoundError):
        yield Finding("ok", "llama.cpp", f"llama-cpp-python {version('llama-cpp-python')}")
    built = [told for word, told in _BACKENDS.items() if any((Path(spec.origin).parent / "lib").glob(f"*ggml-{word}*"))]
    cards = [
        told for tool, told in (("nvidia-smi", "CUDA"), ("rocm-smi", "ROCm")) if shutil.which(tool) and _answers([tool])
    ]
    seen = f"llama.cpp was built for {', '.join(built) or 'the CPU alone'}"
    missing = [card for card in cards if card not in built and "Vulkan" not in built]
    if missing:
        target = {"CUDA": "cuda", "ROCm": "rocm"}[missing[0]]
        yield Finding("warn", "GPU", f"{seen}; there is one for {missing[0]}", f"`make build-llama-{target}`")
    else:
        yield Finding("ok", "GPU", seen + (f"; {', '.join(cards)} answers" if cards else ""))


def _answers(command: list[str]) -> bool:
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    return False


def _probe() -> Iterator[Finding]:
    from engine.model_file import DEMO
    from engine.probe import probe

    demo = app_root() / DEMO
    if not demo.is_file():
        yield Finding(
            "warn", "decode", f"not tried: {demo} is missing", "install infsvc anew, or check out the demo model"
        )
        return
    try:
        result = asyncio.run(probe(demo, Home.locate().own("data/run/probe.json")))
    except InfsvcError as error:
        yield Finding("fail", "decode", str(error))
        return
    if result.use_extra_bufts:
        flash = ", faster with flash attention" if result.flash_attention else ""
        yield Finding("ok", "decode", f"this build decodes on this CPU{flash}")
    else:
        yield Finding(
            "warn",
            "decode",
            "works, but not with weights repacked for this CPU",
            "`make build-llama` builds one that can",
        )


def _home() -> Iterator[Finding]:
    home = Home.locate()
    home.make()
    running = home.running_node()
    who = "no node runs on it" if running is None else f"node {running.get('node', '?')} runs on it"
    yield Finding("ok", "home", f"{home.root} can be written; {who}")
    free = shutil.disk_usage(home.root).free
    seen = f"{human_bytes(free)} free in {home.root}"
    if free < _NO_DISK_BYTES:
        yield Finding("fail", "disk", seen, "make room: the audit log and the broker cannot be written for long")
    elif free < _LOW_DISK_BYTES:
        yield Finding("warn", "disk", seen, "make room, or keep models elsewhere with MODEL_PATH")
    else:
        yield Finding("ok", "disk", seen)


def _settings() -> Iterator[Finding]:
    settings = load_node_settings()
    yield Finding(
        "ok", "settings", f"node {settings.node}, gateway {settings.gateway_address}, bus {settings.nats_login.shown}"
    )


def _broker() -> Iterator[Finding]:
    from transports.nats.broker import find_binary

    settings = load_node_settings()
    login = settings.nats_login
    silent = []
    for server in login.servers:
        parts = urlsplit(server)
        place = shown(server)
        try:
            with socket.create_connection((parts.hostname or "", parts.port or PORT), 2) as link:
                link.settimeout(2)
                is_nats = link.recv(5).startswith(b"INFO")
        except OSError:
            silent.append(place)
            continue
        if not is_nats:
            yield Finding(
                "fail", "broker", f"what listens at {place} is no NATS server",
                "end it, or name another address with INFSVC_NATS_URL",
            )  # fmt: skip
            return
    if len(silent) < len(login.servers):
        yield _logged_in(login)
        for place in silent:
            yield Finding("warn", "broker", f"none at {place}", "the other servers serve as long as they are up")
        return
    if settings.embedded_nats == "off" or login.embedded_url is None:
        why = "INFSVC_EMBEDDED_NATS is off" if settings.embedded_nats == "off" else "the node starts none of that kind"
        yield Finding(
            "warn", "broker", f"none at {login.shown}, and {why}", "start one there; HTTP goes on without"
        )  # fmt: skip
        return
    try:
        yield Finding("ok", "broker", f"none at {login.shown}: the node starts {find_binary()}")
    except InfsvcError as error:
        yield Finding("warn", "broker", str(error), "HTTP goes on without")


def _logged_in(login: NatsLogin) -> Finding:
    """Whether the broker lets this node in."""
    from infsvc.nats_link import NatsLink

    async def look() -> str:
        link = NatsLink(login)
        await link.open()
        try:
            at = link.connection.connected_url
            return f"{at.hostname}:{at.port}" if at is not None else login.shown
        finally:
            await link.close()

    try:
        return Finding("ok", "broker", f"one answers at {asyncio.run(look())}")
    except InfsvcError as error:
        return Finding("fail", "broker", str(error), "HTTP goes on without, and nothing over NATS does")


def _workers() -> Iterator[Finding]:
    home, settings = Home.locate(), load_node_settings()
    good: dict[str, WorkerSettings] = {}
    for name, path in home.worker_files().items():
        try:
            worker = load_worker(name, path, settings)
        except InfsvcError as error:
            yield Finding("fail", "worker file", str(error), "mend or remove that line: no node starts before")
            continue
        if worker.model_name in good:
            told = f"{worker.model_name} is named by two files, one of them {path}"
            yield Finding("fail", "worker file", told, "give one of them another MODEL_NAME")
        good[worker.model_name] = worker
    yield Finding("ok" if good else "fail", "worker files", f"{len(good)}: {', '.join(good) or 'none'}")
    yield from _ports(home, settings, good)
    for worker in good.values():
        yield from _model_file(home, worker)


def _ports(home: Home, settings: NodeSettings, workers: dict[str, WorkerSettings]) -> Iterator[Finding]:
    if home.running_node() is not None:
        yield Finding("ok", "ports", "not tried: the running node holds them")
        return
    wanted = {"the gateway": settings.gateway_address}
    wanted |= {name: worker.address.bound(settings.bind) for name, worker in workers.items() if worker.address}
    seen: dict[int, str] = {}
    taken = 0
    for name, address in wanted.items():
        if address.port in seen and address.port:
            told = f"{name} and {seen[address.port]} both want {address.port}"
            yield Finding("warn", "ports", told, "they cannot run at once: change one HTTP_ADDR")
        seen[address.port] = name
        problem = _bind(address.host, address.port)
        if problem:
            taken += 1
            key = "INFSVC_GATEWAY" if name == "the gateway" else "HTTP_ADDR"
            level: Literal["warn", "fail"] = "fail" if name == "the gateway" else "warn"
            yield Finding(level, "ports", f"{address} ({name}): {problem}", f"end what holds it, or change {key}")
    if not taken:
        yield Finding("ok", "ports", ", ".join(str(address.port) for address in wanted.values()) + " are free")


def _bind(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _model_file(home: Home, worker: WorkerSettings) -> Iterator[Finding]:
    from engine.model_info import read_model_info
    from engine.model_source import describe
    from infsvc.types import human_count

    path = home.find(worker.model_path)
    if path.exists():
        try:
            info = read_model_info(path)
        except InfsvcError as error:
            yield Finding(
                "warn", "model file", f"{worker.model_name}: {error}", f"`infsvc models rm {worker.model_name}`"
            )
            return
        told = f"{info.architecture} {human_count(info.n_params)} {info.quantization}, {human_bytes(info.file_bytes)}"
        yield Finding("ok", "model file", f"{worker.model_name}: {told}")
    elif source := describe(worker):
        yield Finding("ok", "model file", f"{worker.model_name}: absent, fetched on first use from {source}")
    else:
        yield Finding(
            "warn", "model file", f"{worker.model_name}: {path} is missing and nothing says where it comes from",
            "put it there, or set MODEL_REPO and MODEL_FILE, or MODEL_URL",
        )  # fmt: skip


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python, _compiler, _cpu, _gpu, _probe, _home, _settings, _broker, _workers,
)  # fmt: skip
