"""A whole node whose model has a process of its own: what every door says when that dies, and what comes after."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import httpx2
import nats
import pytest

from engine import model_process
from infsvc.events import ModelStateChanged
from infsvc.types import ModelState
from tests.engine.faulty_child import ABORTS
from tests.nodes import ENDLESS, add_worker, build, connected

LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}


async def test_a_lost_process_is_a_503_for_who_waits_and_queued_work_is_done_again(
    tmp_path: Path, long_model: Path
) -> None:
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=16384, WORKER_CONCURRENCY=8, ENGINE_ISOLATION="process")
    async with build(tmp_path, "tiny") as node:
        worker = await node.fleet.settled("tiny")
        await connected(node.events)
        client = await nats.connect(node.settings.nats_url)
        events = node.events.subscribe()
        answered = await client.subscribe("inference.reply.q")
        queued = {"req_id": "q", "input": "x", "params": LONG}
        await client.jetstream().publish("inference.queue.tiny", json.dumps(queued).encode())
        async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=30, trust_env=False) as http:
            native = {"req_id": "n", "input": "x", "params": ENDLESS}
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
            waiting = [
                asyncio.create_task(http.post("/v1/completions", json=native)),
                asyncio.create_task(http.post("/v1/chat/completions", json=chat | {"max_tokens": 16000})),
            ]
            async with http.stream("POST", "/v1/completions", json=native | {"stream": True}) as stream:
                told = stream.aiter_lines()
                async for line in told:
                    if line and sum(each.running for each in node.service.live()) == 4:
                        break
                os.kill(worker.engine.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
                last = [json.loads(line.removeprefix("data: ")) async for line in told if line][-1]
            assert (last["code"], last["status"], last["done"]) == ("engine_lost", 503, True)
            for response in [await each for each in waiting]:
                assert response.status_code == 503
                assert response.headers["Retry-After"] == "2"
            assert waiting[0].result().json()["code"] == "engine_lost"
            assert "SIGKILL" in waiting[0].result().json()["error"]
            error = waiting[1].result().json()["error"]
            assert (error["code"], error["type"]) == ("engine_lost", "server_error")

            health = await http.get(f"{worker.endpoint}/healthz")
            assert (health.status_code, health.json()["status"]) == (503, "loading")
            assert "SIGKILL" in health.json()["reason"]
            states = []
            async for event in events:
                if isinstance(event, ModelStateChanged):
                    states.append(str(event.state))
                    if event.state == "ready":
                        break
            assert states == ["loading", "ready"]
            answer = json.loads((await answered.next_msg(timeout=30)).data)
            assert (answer["req_id"], answer["finish_reason"], answer["tokens_out"]) == ("q", "length", 1500)
            assert 'infsvc_engine_lost_total{model="tiny"} 1.0' in (await http.get("/metrics")).text
            assert node.system().node_rss_bytes > worker.n_process_bytes > 0
        events.close()
        await client.close()
        rows = [row for row in await node.logs.rows("tiny", limit=10) if row["req_id"] in ("n", "q")]
        assert sorted((row["req_id"], row["status"]) for row in rows) == [
            ("n", "error"), ("n", "error"), ("q", "error"), ("q", "ok"),
        ]  # fmt: skip


async def test_a_queued_request_that_kills_its_engine_each_time_is_buried_and_the_model_lives(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_process, "COMMAND", (sys.executable, "-m", "tests.engine.faulty_child"))
    add_worker(tmp_path, "tiny", tiny_model, ENGINE_ISOLATION="process", MAX_DELIVER=2)
    async with build(tmp_path, "tiny") as node:
        worker = await node.fleet.settled("tiny")
        await connected(node.events)
        client = await nats.connect(node.settings.nats_url)
        answered = await client.subscribe("inference.reply.*")
        for req_id, text in (("poison", f"x{chr(ABORTS)}"), ("good", "x")):
            body = {"req_id": req_id, "input": text, "raw": True, "params": LONG | {"max_tokens": 500}}
            await client.jetstream().publish("inference.queue.tiny", json.dumps(body).encode())
        answers = [json.loads((await answered.next_msg(timeout=60)).data) for _ in range(2)]
        told = {answer["req_id"]: answer for answer in answers}
        assert (told["poison"]["code"], told["poison"]["status"]) == ("dead_letter", 500)
        assert "SIGABRT" in told["poison"]["error"]
        # It was beside the poison at least once.
        assert told["good"].get("tokens_out") == 500 or told["good"]["code"] == "dead_letter"
        while (await node.fleet.settled("tiny")).state is not ModelState.READY:
            await asyncio.sleep(0)
        assert worker.restarts.n == 2
        await client.close()
