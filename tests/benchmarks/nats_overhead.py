"""What each way to a model costs: the engine alone, HTTP, NATS straight to the engine, NATS through the durable queue.

`python -m tests.benchmarks.nats_overhead`: the demo model, one token, a node and a broker as processes of their own;
medians in milliseconds, interleaved so that a busy machine hits all alike. Then requests/s at 16 callers with the
processor time that each process spends on a request, which is where the time goes on a machine whose cores are all
busy; and publishes/s into the queue with the node gone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, create_subprocess_exec
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import nats
import psutil
from nats.aio.client import Client

from engine.service import InferenceRequest
from infsvc import subjects
from infsvc.types import Params
from tests.nodes import add_worker, build, free_port, node_environ
from transports.nats.broker import Listener, find_binary, probe

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "data/models/demo/model.gguf"
ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "ignore_eos": True}
SUBJECT, QUEUE = "inference.request.demo", "inference.queue.demo"
N_CALLERS = 16
_ids = itertools.count()

Ask = Callable[[], Awaitable[object]]


async def timed(ask: Ask) -> float:
    begun_s = time.perf_counter()
    await ask()
    return (time.perf_counter() - begun_s) * 1000


async def rate(ask: Ask, n: int, processes: dict[str, psutil.Process]) -> tuple[float, dict[str, float]]:
    """Asks `n` times with 16 callers: how many a second, and milliseconds of processor time a request by process."""
    left = iter(range(n))
    before = {name: busy_s(process) for name, process in processes.items()}

    async def caller() -> None:
        for _ in left:
            await ask()

    begun_s = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(N_CALLERS)))
    took_s = time.perf_counter() - begun_s
    return n / took_s, {name: (busy_s(each) - before[name]) * 1000 / n for name, each in processes.items()}


def busy_s(process: psutil.Process) -> float:
    """Processor time of a process so far, in seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


def named() -> bytes:
    return json.dumps({"req_id": f"b{next(_ids)}", "input": "hello", "params": ONE_TOKEN}).encode()


async def publishes_per_s(client: Client, n: int) -> float:
    """Publishes into the queue, each acknowledged, at most 1000 under way."""
    js = client.jetstream(publish_async_max_pending=1000)
    begun_s = time.perf_counter()
    futures = []
    for _ in range(n):
        data = named()
        headers = {subjects.MSG_ID_HEADER: f"demo:{next(_ids)}"}
        futures.append(await js.publish_async(QUEUE, data, headers=headers))
    await asyncio.gather(*futures)
    return n / (time.perf_counter() - begun_s)


async def measure(folder: Path, n: int) -> None:
    port = free_port()
    url = f"nats://127.0.0.1:{port}"
    config = folder / "broker.conf"
    config.write_text(f'host: 127.0.0.1\nport: {port}\nmax_payload: 8388608\njetstream {{store_dir: "{folder}/js"}}\n')
    broker = await create_subprocess_exec(str(find_binary()), "-c", str(config), stdout=DEVNULL, stderr=DEVNULL)
    gateway = f"127.0.0.1:{free_port()}"
    keys = {"WORKER_CONCURRENCY": 8, "QUEUE_MAX_MSGS": 200_000, "CTX_SIZE": 512}
    for name in ("node", "alone"):
        add_worker(folder / name, "demo", MODEL, **keys)
    environ = node_environ(folder / "node", nats_url=url, embedded_nats="off", gateway=gateway)
    while await probe("127.0.0.1", port) is not Listener.NATS:
        await asyncio.sleep(0.05)
    node = await create_subprocess_exec(
        *(sys.executable, "-m", "infsvc", "serve", "demo"),
        env=os.environ | environ | {"PYTHONPATH": str(ROOT)},
        stdout=DEVNULL,
        stderr=DEVNULL,
    )
    client = await nats.connect(url)
    try:
        async with (
            build(folder / "alone", "demo", embedded_nats="off") as alone,
            httpx2.AsyncClient(base_url=f"http://{gateway}", timeout=30, trust_env=False) as http,
        ):
            await alone.fleet.settled("demo")
            await answering(http)

            async def engine() -> object:
                return await alone.service.complete(
                    InferenceRequest(model="demo", input="hello", params=Params.model_validate(ONE_TOKEN))
                )

            async def over_http() -> object:
                answer = await http.post("/v1/completions", json={"input": "hello", "params": ONE_TOKEN})
                return answer.raise_for_status()

            async def straight() -> object:
                data = json.dumps({"input": "hello", "params": ONE_TOKEN}).encode()
                return checked((await client.request(SUBJECT, data, timeout=30)).data)

            async def durable() -> object:
                return checked((await client.request(SUBJECT, named(), timeout=30)).data)

            ways: dict[str, Ask] = {
                "engine alone": engine,
                "HTTP": over_http,
                "NATS, straight": straight,
                "NATS, durable queue": durable,
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(n + 20):
                for name, ask in ways.items():
                    ms = await timed(ask)
                    if number >= 20:
                        times[name].append(ms)
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                p95 = statistics.quantiles(values, n=20)[-1]
                print(f"{name:<22} median {medians[name]:6.2f} ms   p95 {p95:6.2f} ms")
            print(f"the durable queue adds {medians['NATS, durable queue'] - medians['NATS, straight']:.2f} ms")
            pids = {"node": node.pid, "broker": broker.pid, "callers": os.getpid()}
            processes = {name: psutil.Process(pid) for name, pid in pids.items()}
            for name in ("HTTP", "NATS, straight", "NATS, durable queue"):
                per_s, spent_ms = await rate(ways[name], 4 * n, processes)
                told = ", ".join(f"{each} {ms:.2f}" for each, ms in spent_ms.items())
                print(f"{name:<22} {per_s:7.0f} requests/s at {N_CALLERS} callers; processor ms a request: {told}")
        node.send_signal(signal.SIGTERM)
        await node.wait()
        print(f"{await publishes_per_s(client, 20_000):.0f} publishes/s into the queue")
    finally:
        await client.close()
        for process in (node, broker):
            if process.returncode is None:
                process.kill()
                await process.wait()


def checked(data: bytes) -> object:
    answer = json.loads(data)
    assert "text" in answer, answer
    return answer


async def answering(http: httpx2.AsyncClient) -> None:
    """Waits until the node's gateway is healthy."""
    while True:
        try:
            if (await http.get("/healthz")).is_success:
                return
        except httpx2.TransportError:
            pass
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="requests each way")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(measure(Path(name), options.n))
