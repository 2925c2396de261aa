"""Every NATS example of the README that this service was first described by, in the form it has now: `nats-chat` is
`infsvc chat`, `nats-embed` is `infsvc embed`, `nats req|sub` is `infsvc req|sub`. Models of its names, tiny files."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from infsvc.cli import infsvc
from tests.bert_files import random_bert, write_bert
from tests.nodes import add_worker, build
from transports.node import Node

from .conftest import broker_is

ROOT = Path(__file__).parents[3]
SHORT = {"max_tokens": 4, "temperature": 0.7, "ignore_eos": True}


class Shell:
    """Types commands beside a node."""

    def __init__(self, node: Node) -> None:
        self._environ = {
            "INFSVC_HOME": str(node.home.root),
            "INFSVC_NATS_URL": node.settings.nats_url,
            "INFSVC_GATEWAY": node.gateway_url.removeprefix("http://"),
        }
        self.url = node.settings.nats_url

    async def __call__(self, *words: str, stdin: str = "") -> Result:
        result = await asyncio.to_thread(CliRunner().invoke, infsvc, words, input=stdin, env=self._environ)
        assert result.exit_code == 0, (words, result.output, result.exception)
        return result

    @asynccontextmanager
    async def listening(self, subject: str, *words: str) -> AsyncIterator[asyncio.Task[list[dict[str, Any]]]]:
        """`infsvc sub` in a process of its own, which listens within the block; what it prints."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "infsvc", "sub", subject, "--timeout=20s", "--raw", *words),
            env=os.environ | self._environ,
            cwd=ROOT,
            stdout=PIPE,
            stderr=PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        said = await process.stderr.readline()
        assert said.decode() == f"listening on {subject}\n"

        async def read() -> list[dict[str, Any]]:
            out, err = await process.communicate()
            assert process.returncode == 0, err
            return [json.loads(line) for line in out.decode().splitlines()]

        task = asyncio.create_task(read())
        try:
            yield task
        finally:
            if process.returncode is None:
                process.kill()
            await asyncio.gather(task, return_exceptions=True)

    async def json(self, *words: str, stdin: Any = None) -> dict[str, Any]:
        told = await self(*words, stdin="" if stdin is None else json.dumps(stdin))
        body: dict[str, Any] = json.loads(told.stdout)
        return body


@asynccontextmanager
async def serving(folder: Path, *models: str, file: Path, **keys: Any) -> AsyncIterator[tuple[Node, Shell]]:
    for name in models:
        add_worker(folder, name, file, CTX_SIZE=512, **keys)
    async with build(folder, *models) as node:
        await broker_is(node.events, "connected")
        for name in models:
            worker = await node.fleet.settled(name)
            assert worker.state == "ready", worker.reason
        yield node, Shell(node)


async def test_requests(tmp_path: Path, tiny_model: Path) -> None:
    async with serving(tmp_path, "gemma3-270m", "qwen3-4b", "gpt-oss-20b", file=tiny_model) as (node, shell):
        ask = ("chat", "-s", "inference.request.qwen3-4b", "--input", "What is quantum computing?")
        assert (await shell(*ask, "--max-tokens", "4")).stdout.endswith("\n")
        turns = "hello\nagain\n"
        talked = await shell("chat", "-s", "inference.request.gemma3-270m", "-i", "--max-tokens", "4", stdin=turns)
        assert talked.stdout.count("\n") >= 2
        words = ("--input", "Explain neural networks", "--max-tokens", "10", "--temperature", "0.1")
        await shell("chat", "-s", "inference.request.gpt-oss-20b", *words)

        for subject, req_id, raw in (
            ("gemma3-270m", "manual-req-123", False),
            ("qwen3-4b", "manual-raw-456", True),
            ("gemma3-270m", "test-raw-123", True),
            ("qwen3-4b", "test-123", False),
        ):
            body = {"req_id": req_id, "input": "Hello, world!", "params": SHORT, "raw": raw}
            reply = await shell.json("req", f"inference.request.{subject}", "--timeout=30s", stdin=body)
            assert reply["req_id"] == req_id
            assert (reply["tokens_out"], reply["finish_reason"]) == (4, "length")
            assert reply["tokens_in"] > 0
            assert reply["duration_ms"] > 0
            assert isinstance(reply["text"], str)
        raw = {"req_id": "reasoning-456", "input": "<|start|>system<|message|>You are an expert...", "raw": True}
        reply = await shell.json("req", "inference.request.gpt-oss-20b", stdin=raw | {"params": SHORT})
        assert reply["req_id"] == "reasoning-456"
        await asyncio.gather(*(audit.flush() for audit in node._audits.values()))
        rows = await node.logs.rows("gpt-oss-20b", limit=10)
        assert [row["raw_input"] for row in rows if row["req_id"] == "reasoning-456"] == [raw["input"]]


async def test_embeddings(tmp_path: Path) -> None:
    file = tmp_path / "bert.gguf"
    write_bert(file, random_bert())
    names = ("nomic-embed-v1.5", "nomic-embed-v2-moe")
    async with serving(tmp_path, *names, file=file, MODEL_FORMAT="embedding") as (_, shell):
        told = await shell("embed", "--input", "search_query: machine learning")
        assert "dimensions" in told.stdout
        subject = "embedding.request.nomic-embed-v2-moe"
        told = await shell("embed", "-s", subject, "--input", "Bonjour le monde", "-m", "nomic-embed-v2-moe")
        assert "nomic-embed-v2-moe" in told.stderr
        body = {"req_id": "embed-123", "input": "Hello world", "model": names[0], "reply_to": "embed.reply.test"}
        server = f"--server={shell.url}"
        async with shell.listening("embed.reply.test", "--count=1") as copies:
            reply = await shell.json("req", "embedding.request.nomic-embed-v1.5", server, "--timeout=10s", stdin=body)
            assert (reply["object"], reply["model"], reply["req_id"]) == ("list", names[0], "embed-123")
            assert len(reply["data"][0]["embedding"]) > 1
            assert reply["usage"]["prompt_tokens"] > 0
            assert await copies == [reply]
        for name in names:
            health = await shell.json("req", f"models.{name}.health", server, "--timeout=5s", stdin={})
            assert (health["status"], health["capabilities"]) == ("online", ["embeddings"])


async def test_health_heartbeats_and_load(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transports.nats.heartbeat.IDLE_S", 0.5)
    async with serving(tmp_path, "gemma3-270m", "qwen3-4b", file=tiny_model) as (node, shell):
        for name in ("gemma3-270m", "qwen3-4b"):
            health = await shell.json("req", f"models.{name}.health", f"--server={shell.url}", "--timeout=5s", stdin={})
            assert (health["model_name"], health["status"]) == (name, "online")
            assert health["nats_topic"] == f"inference.request.{name}"
            assert "text-generation" in health["capabilities"]
            assert health["endpoint"].startswith("http://")
            assert {"architecture", "modalities", "parameter_count", "context_size", "embedding_size", "quantization",
                    "model_family"} <= health["model_info"].keys()  # fmt: skip
        async with (
            shell.listening("monitoring.inference.*", "--count=2") as reports,
            shell.listening("monitoring.inference.qwen3-4b", "--count=1") as one,
            shell.listening("models.*.heartbeat", "--count=1") as beats,
            shell.listening("models.gemma3-270m.heartbeat", "--count=1") as own,
        ):
            await node.unload("gemma3-270m")  # a change of state is told at once
            for beat in (*await beats, *await own):
                assert (beat["model_name"], beat["status"]) == ("gemma3-270m", "draining")
            for report in (*await reports, *await one):
                assert report["status"] == "healthy"
                assert {"model_name", "pending_messages", "active_processing", "timestamp", "worker_count",
                        "queue_capacity"} <= report.keys()  # fmt: skip
            assert (await one)[0]["model_name"] == "qwen3-4b"
