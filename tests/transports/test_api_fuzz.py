"""Schemathesis over `/openapi.json`: what the description allows and what it forbids, sent to a node with the demo
model. No answer is a 5xx, and each conforms to the description: status, content type, headers, body.

Not called: `GET /api/events`, which never ends. Loading, unloading and removing a file are asked of a model beside the
demo model, which the other calls need.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx2
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from jsonschema import Draft202012Validator, ValidationError
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from infsvc.events import BrokerStateChanged
from tests.nodes import add_worker, build
from transports.node import Node

DEMO = Path(__file__).resolve().parents[2] / "data/models/demo/model.gguf"
CALLED = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
]
NOT_CALLED = {("GET", "/api/events")}


class NodeThread:
    """A node in a thread of its own: schemathesis blocks."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="node")
        self._problem: BaseException | None = None

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            seen = self._node.events.subscribe()
            async with self._node:
                worker = await self._node.fleet.settled("demo")
                assert worker.state == "ready", worker.reason
                async for event in seen:
                    if isinstance(event, BrokerStateChanged) and event.state == "connected":
                        break
                while await self._node.durable.reason(worker) is not None:
                    await asyncio.sleep(0.05)
                self._ready.set()
                await self._stop.wait()
        except BaseException as problem:
            self._problem = problem
            raise
        finally:
            self._ready.set()

    def __enter__(self) -> str:
        self._thread.start()
        assert self._ready.wait(30)
        if self._problem is not None:
            raise self._problem
        return self._node.gateway_url

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(15)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    hypothesis.configuration.set_hypothesis_home_dir(home)
    add_worker(home, "demo", DEMO, CTX_SIZE=128, PREFIX_CACHE_MB=0)
    add_worker(home, "spare", tiny_model, CTX_SIZE=64)
    with NodeThread(build(home, "demo")) as url:
        yield url


def fuzz(gateway: str, n_examples: int) -> int:
    """Calls each operation with so many cases of each kind; how many calls were made."""
    document: dict[str, Any] = httpx2.get(f"{gateway}/openapi.json", trust_env=False).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=gateway)
    checks = [CHECKS.get_one(name) for name in CALLED]
    n_calls = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if (operation.method.upper(), operation.path) in NOT_CALLED:
            continue
        names = {"model": "spare" if operation.path.startswith("/api/models/") else "demo"}
        known = {key: value for key, value in names.items() if f"{{{key}}}" in operation.path}
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = operation.as_strategy(mode, path_parameters=known or None)

            @settings(
                max_examples=n_examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(case=cases, real=st.booleans())
            def called(case: Case, real: bool) -> None:
                nonlocal n_calls
                n_calls += 1
                if real and isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = "demo"
                case.call_and_validate(checks=checks, timeout=30)

            # What takes nothing cannot be asked wrongly.
            with suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else nullcontext():
                called()
    return n_calls


def test_a_short_run(gateway: str) -> None:
    assert fuzz(gateway, 4) > 120


HELLO = [{"role": "user", "content": "hello"}]
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"enum": [1]}}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"input": "hello"}),
        ("/v1/completions", {"prompt": "hello", "n": 2, "logprobs": 2, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [LOOK], "tool_choice": "required"}),
    ],
)
def test_the_events_of_a_stream_are_as_described(gateway: str, path: str, body: dict[str, Any]) -> None:
    """Schemathesis looks at an event's form and not into its data."""
    document: dict[str, Any] = httpx2.get(f"{gateway}/openapi.json", trust_env=False).json()
    answer = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    schema = answer["properties"]["data"]["anyOf"][0]["contentSchema"] | {"components": document["components"]}
    looks = Draft202012Validator(schema)
    asked = {"model": "demo", "stream": True, "max_tokens": 20} | body
    if "input" in body:
        asked["params"] = {"max_tokens": asked.pop("max_tokens")}
    told = httpx2.post(f"{gateway}{path}", json=asked, timeout=30, trust_env=False)
    assert told.status_code == 200, told.text
    events = [line.removeprefix("data: ") for line in told.text.splitlines() if line.startswith("data: ")]
    assert len(events) > 2
    for event in events:
        if event != "[DONE]":
            looks.validate(json.loads(event))
    with pytest.raises(ValidationError):
        looks.validate({"unheard": "of"})


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_long_run(gateway: str) -> None:
    assert fuzz(gateway, 100) > 2500
