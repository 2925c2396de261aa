"""A node of the shape that the screens read, driven by a test: nothing in it runs by itself.

Times are fixed, ids are counted, and an answer is what the test says.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from engine.capabilities import CapabilityClaim
from engine.model_info import ModelInfo
from infsvc.errors import NotFound, UnknownModel
from infsvc.events import Event, EventBus, LogLine, ModelStateChanged, RequestFinished
from infsvc.roster import Roster
from infsvc.settings import WorkerSettings
from infsvc.types import Capability, CompletionReply, FinishReason, ModelState, ServiceDocument, backpressure_level
from tui.app import InfsvcApp

NOW = datetime(2026, 3, 14, 14, 7, 31, tzinfo=UTC)


@dataclass
class Sample:
    ts: float
    n_waiting: int
    n_active: int
    tokens_per_s: float


@dataclass
class SampleStats:
    n_finished: int = 0
    n_tokens_out: int = 0
    pace: float = 0.0
    ttft: tuple[float, float] | None = None
    latency: tuple[float, float] | None = None
    history: deque[Sample] = field(default_factory=lambda: deque(maxlen=900))

    def tokens_per_s(self) -> float:
        return self.pace

    def ttft_ms(self) -> tuple[float, float] | None:
        return self.ttft

    def latency_ms(self) -> tuple[float, float] | None:
        return self.latency


@dataclass
class SamplePull:
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: float | None = None
    eta_s: float | None = None


@dataclass
class SampleCounters:
    n_steps: int = 0
    n_decode_tokens: int = 0
    n_prefill_tokens: int = 0
    max_batch_sequences: int = 0
    mean_batch_sequences: float = 0.0
    n_finished: int = 0
    n_cancelled: int = 0


def sample_info(
    architecture: str, n_params: int, quantization: str, *, tools: bool = False, think: bool = False
) -> ModelInfo:
    """Header facts; `tools` and `think` put what `detect` looks for into the chat template."""
    template = "{{ messages }}" + (" {{ tools }}" if tools else "") + (" <think>" if think else "")
    return ModelInfo(
        path=Path(f"data/models/{architecture}/model.gguf"), file_bytes=n_params, architecture=architecture, name=None,
        license="apache-2.0", n_params=n_params, weight_bytes=n_params, n_ctx_train=32768, n_embd=1024, n_layer=28,
        n_vocab=151_936, n_head_kv=8, key_length=128, value_length=128, quantization=quantization,
        chat_template=None if architecture == "nomic-bert" else template,
        pooling="mean" if architecture == "nomic-bert" else None, causal=architecture != "nomic-bert",
        special_tokens=frozenset(), n_head=16, n_head_kv_all=28 * 8, n_ff=3072,
    )  # fmt: skip


class SampleWorker:
    """A model whose every fact the test sets."""

    def __init__(self, name: str, state: ModelState = ModelState.ON_DISK, **settings: Any) -> None:
        self.settings = WorkerSettings(model_name=name, **settings)
        self.name = name
        self.state = state
        self.reason: str | None = None
        self.progress: float | None = None
        self.pull: SamplePull | None = None
        self.path = Path(self.settings.model_path)
        self.asked = state not in (ModelState.ON_DISK, ModelState.ABSENT)
        self.info: ModelInfo | None = None
        self.claims: tuple[CapabilityClaim, ...] = ()
        self.stats = SampleStats()
        self.counters = SampleCounters()
        self.n_active = 0
        self.n_waiting = 0
        self.endpoint = f"http://127.0.0.1:{self.settings.address.port}" if self.settings.address else ""

    @property
    def n_slots(self) -> int:
        return self.settings.worker_concurrency

    @property
    def n_ctx(self) -> int:
        return self.settings.ctx_size

    @property
    def level(self) -> str:
        threshold, capacity = self.settings.backpressure_threshold, self.settings.queue_max_msgs
        return backpressure_level(self.n_waiting, threshold=threshold, capacity=capacity)

    def learn(self, info: ModelInfo) -> Self:
        self.info = info
        template = info.chat_template or ""
        told = {
            Capability.TEXT_GENERATION: (info.causal, f"causal attention ({info.architecture}), no pooling type"),
            Capability.EMBEDDINGS: (True, "no pooling type: mean of hidden states"),
            Capability.REASONING: ("think" in template, "the chat template writes <think>, or would if it could think"),
            Capability.TOOL_CALLING: (
                "tools" in template,
                "the chat template lists tools, where it has a place for them",
            ),
            Capability.GRAMMAR_CONSTRAINED: (info.causal, "any model that generates text"),
            Capability.RERANKING: (False, "no pooling type; a reranker's is rank"),
        }
        self.claims = tuple(CapabilityClaim(capability, *told[capability]) for capability in Capability)
        return self


@dataclass
class SampleChunk:
    text: str = ""
    reasoning: str = ""


class SampleGeneration:
    """An answer that comes as the test says it; before chunk number `hold_after` it waits for `release` or `cancel`."""

    def __init__(
        self,
        chunks: Sequence[SampleChunk],
        *,
        hold_after: int | None,
        finish: FinishReason,
        error: str | None,
        fault: Exception | None = None,
    ) -> None:
        self._chunks, self._hold_after, self._finish, self._error = chunks, hold_after, finish, error
        self._fault = fault
        self._released = asyncio.Event()
        self.tokens_in, self.tokens_out = 52, 0
        self.ttft_ms: float | None = None
        self.tokens_per_s = 0.0
        self.reply: CompletionReply | None = None
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self._released.set()

    def release(self) -> None:
        """Lets a held answer go on."""
        self._released.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def __aiter__(self) -> AsyncIterator[SampleChunk]:
        for index, chunk in enumerate(self._chunks):
            if index == self._hold_after:
                await self._released.wait()
            if self.cancelled:
                break
            self.ttft_ms, self.tokens_per_s = 4.0, 1980.4
            self.tokens_out += 1
            yield chunk
        if self._fault is not None:
            raise self._fault
        reason: FinishReason = "cancelled" if self.cancelled else self._finish
        self.reply = CompletionReply(
            req_id="0001", text="".join(chunk.text for chunk in self._chunks), tokens_in=self.tokens_in,
            tokens_out=self.tokens_out, tokens_cached=12, finish_reason=reason, duration_ms=25, ms=25,
            error=self._error, )  # fmt: skip


class SampleService:
    """Answers each request with the next of `answers`: chunks, or an error to raise."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.chunks: Sequence[SampleChunk] = ()
        self.hold_after: int | None = None
        self.finish: FinishReason = "stop"
        self.error: str | None = None
        self.refusal: Exception | None = None
        self.fault: Exception | None = None
        self.generations: list[SampleGeneration] = []

    async def submit(self, request: Any) -> SampleGeneration:
        return self.answer(request)

    def answer(self, request: Any) -> SampleGeneration:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        generation = SampleGeneration(
            self.chunks, hold_after=self.hold_after, finish=self.finish, error=self.error, fault=self.fault
        )
        self.generations.append(generation)
        return generation


@dataclass
class SampleFleet:
    workers: dict[str, SampleWorker] = field(default_factory=dict)


@dataclass
class SampleBusState:
    status: str = "connected"
    url: str = "nats://127.0.0.1:5700"
    embedded: bool = True
    reason: str | None = None
    retry_in_s: float | None = None


@dataclass
class SampleBus:
    state: SampleBusState = field(default_factory=SampleBusState)


@dataclass
class SampleSystem:
    ram_used_bytes: int = int(3.1 * 2**30)
    ram_total_bytes: int = int(23.4 * 2**30)


class SampleFarChat:
    """Other nodes' models as the roster knows them; they answer as `service` says."""

    def __init__(self, registry: SampleRegistry) -> None:
        self._registry = registry
        self.service = SampleService()
        self.asked: list[tuple[str, str]] = []

    def models(self) -> list[ServiceDocument]:
        return self._registry.roster.services()

    def find(self, model: str, node: str) -> ServiceDocument | None:
        return next((each for each in self.models() if (each.model_name, each.node) == (model, node)), None)

    def submit(self, request: Any, node: str) -> SampleGeneration:
        self.asked.append((request.model, node))
        return self.service.answer(request)


@dataclass
class SampleRegistry:
    roster: Roster = field(default_factory=Roster)


@dataclass(kw_only=True)
class SampleLetter:
    """A dead letter; its body is what the test says."""

    id: int
    model: str = "demo"
    req_id: str | None = "r-1"
    reason: str = "the engine failed: it died in the middle of a step"
    n_delivered: int = 5
    died_ts: float = NOW.timestamp() - 60
    subject: str = "inference.queue.demo"
    body: Any = field(default_factory=lambda: {"req_id": "r-1", "input": "What is backpressure?"})

    @property
    def n_bytes(self) -> int:
        return len(json.dumps(self.body))

    def wire(self) -> dict[str, Any]:
        return {"id": self.id, "body": self.body}


class SampleDead:
    """Letters in memory; with `error` every call raises it. `replay_error` makes a replay fail."""

    def __init__(self, calls: list[str]) -> None:
        self.letters: dict[int, SampleLetter] = {}
        self.n_kept: int | None = None
        self.error: Exception | None = None
        self.replay_error: Exception | None = None
        self.n_read = 0
        self.hold: asyncio.Event | None = None
        self._calls = calls

    def put(self, *letters: SampleLetter) -> None:
        self.letters |= {letter.id: letter for letter in letters}
        self.n_kept = len(self.letters)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    async def heads(self, *, after: int = 0) -> AsyncIterator[list[SampleLetter]]:
        self._check()
        self.n_read += 1
        wanted = [letter for number, letter in self.letters.items() if number > after]
        for start in range(0, len(wanted), 500):
            yield wanted[start : start + 500]
            await asyncio.sleep(0)

    async def count(self) -> int:
        self._check()
        return len(self.letters)

    async def letter(self, number: int) -> SampleLetter:
        self._check()
        if number not in self.letters:
            raise NotFound(f"there is no dead letter {number}")
        return self.letters[number]

    async def replay(self, number: int) -> None:
        self._check()
        if self.hold is not None:
            await self.hold.wait()
        if self.replay_error is not None:
            raise self.replay_error
        self._calls.append(f"replay {number}")
        self._remove(number)

    async def delete(self, number: int) -> None:
        self._check()
        self._calls.append(f"delete {number}")
        self._remove(number)

    def _remove(self, number: int) -> None:
        del self.letters[number]
        self.n_kept = len(self.letters)


@dataclass
class SampleDurable:
    dead: SampleDead


class SampleDesk:
    """Queues as the broker would have them."""

    def __init__(self, calls: list[str]) -> None:
        self.queues: list[dict[str, Any]] = []
        self.n_asked = 0
        self._calls = calls

    async def overview(self) -> list[dict[str, Any]]:
        self.n_asked += 1
        return [dict(queue) for queue in self.queues]

    async def purge(self, model: str) -> int:
        self._calls.append(f"purge {model}")
        return 12


def sample_queue(model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "capacity": 2000,
        "max_age_s": 86400.0,
        "max_deliver": 5,
        "max_ack_pending": 64,
        "durable": True,
        "waiting": 0,
        "taken": 0,
        "redelivered": 0,
        "spooled": 0,
    } | more


def queue_node(n_letters: int = 0) -> SampleNode:
    """A node with two queues at work, and dead letters of three kinds."""
    node = busy_node()
    node.queue_desk.queues = [
        sample_queue("demo", waiting=12, taken=4, redelivered=2, oldest_s=3.2),
        sample_queue("gemma3-270m", waiting=1_204, taken=2, oldest_s=7_412.0, spooled=3),
    ]
    kinds = (
        ("demo", "the engine failed: it died in the middle of a step", 5),
        ("gemma3-270m", "expired in the queue: it waited longer than QUEUE_MAX_AGE, 86400 s", 0),
        ("demo", "bad_request: it names neither reply_to nor req_id, so nobody can be told", 1),
    )
    letters = []
    for number in range(1, n_letters + 1):
        model, reason, tries = kinds[number % 3]
        req_id = None if number % 3 == 2 else f"order-{number:05}"
        letters.append(
            SampleLetter(
                id=number, model=model, req_id=req_id, reason=reason, n_delivered=tries,
                died_ts=NOW.timestamp() - 3600 + number, subject=f"inference.queue.{model}",
                body={"req_id": req_id, "input": f"Please sort parcel {number}", "params": {"max_tokens": 64}},
            )
        )  # fmt: skip
    node.durable.dead.put(*letters)
    return node


class SampleNode:
    """Records what is asked of it in `calls`; `start_error` makes its start fail."""

    def __init__(self, *workers: SampleWorker) -> None:
        self.name = "alpha"
        self.events = EventBus("alpha")
        self.fleet = SampleFleet({worker.name: worker for worker in workers})
        self.service = SampleService()
        self.bus = SampleBus()
        self.registry = SampleRegistry()
        self.far_chat = SampleFarChat(self.registry)
        self.gateway_url = "http://127.0.0.1:5780"
        self.calls: list[str] = []
        self.durable = SampleDurable(SampleDead(self.calls))
        self.queue_desk = SampleDesk(self.calls)
        self.start_error: Exception | None = None
        self.load_error: Exception | None = None
        self.entered = False
        self.start: Callable[[], Awaitable[object]] | None = None
        self._may_close = asyncio.Event()
        self._may_close.set()

    def hold_close(self) -> None:
        """Makes the close wait for `release_close`."""
        self._may_close.clear()

    def release_close(self) -> None:
        self._may_close.set()

    async def load(self, name: str) -> SampleWorker:
        self.calls.append(f"load {name}")
        if name not in self.fleet.workers:
            raise UnknownModel(name, list(self.fleet.workers))
        if self.load_error is not None:
            raise self.load_error
        worker = self.fleet.workers[name]
        worker.state, worker.asked = ModelState.LOADING, True
        return worker

    async def unload(self, name: str) -> None:
        self.calls.append(f"unload {name}")

    async def pull(self, name: str) -> SampleWorker:
        self.calls.append(f"pull {name}")
        if self.load_error is not None:
            raise self.load_error
        return self.fleet.workers[name]

    async def remove_file(self, name: str) -> int:
        self.calls.append(f"remove {name}")
        if self.load_error is not None:
            raise self.load_error
        return 250 * 2**20

    async def add_worker(self, values: Mapping[str, str]) -> SampleWorker:
        """Checks like the real one and writes nothing."""
        if self.load_error is not None:
            raise self.load_error
        self.calls.append(f"add {dict(values)}")
        keys = {key.lower(): value for key, value in values.items() if value}
        worker = SampleWorker(keys.pop("model_name"), ModelState.ABSENT, **keys)
        self.fleet.workers[worker.name] = worker
        return worker

    def system(self) -> SampleSystem:
        return SampleSystem()

    async def __aenter__(self) -> Self:
        if self.start_error is not None:
            raise self.start_error
        if self.start is not None:
            await self.start()
        self.entered = True
        self.calls.append("start")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._may_close.wait()
        self.calls.append("close")

    def happen(self, *events: Event) -> None:
        for event in events:
            self.events.publish(event)


class ShownApp(InfsvcApp):
    """The app with its node shown before the first frame: pictures and keys need not wait for the curtain."""

    CSS_PATH = Path(inspect.getfile(InfsvcApp)).with_name("app.tcss")

    def __init__(self, node: SampleNode, **arguments: Any) -> None:
        async def open_node() -> SampleNode:
            return node

        super().__init__(open_node, **arguments)
        self._sample = node

    async def on_mount(self) -> None:
        await self.show_node(self._sample)
        super().on_mount()


def sample_app(node: SampleNode, *, animate: bool = False) -> InfsvcApp:
    """The app with fixed clocks and nothing that moves by itself; each thought takes 0.2 s."""
    ticks = iter(range(1_000_000))

    return ShownApp(node, clock=lambda: NOW, monotonic=lambda: next(ticks) * 0.2, animate=animate)


def demo_worker(state: ModelState = ModelState.READY) -> SampleWorker:
    worker = SampleWorker("demo", state, http_addr=":5769", worker_concurrency=8, ctx_size=1024)
    return worker.learn(sample_info("qwen3", 3_100_000, "Q8_0", tools=True, think=True))


def _wave(n: int, top: float) -> deque[Sample]:
    """Up to fifteen minutes of work that comes and goes, the same each time; the queue grows where the pace stays
    flat.
    """
    samples: deque[Sample] = deque(maxlen=900)
    for index in range(n):
        swing = math.sin((index + 900 - n) / 900 * 5.2 + 3.4) * 0.5 + 0.5
        pace = top * min(1.0, 1.5 * swing) * (0.92 + 0.08 * math.sin(index / 7))
        samples.append(Sample(NOW.timestamp() - n + index, round(max(0.0, swing - 0.55) * 14), round(2 * swing), pace))
    return samples


def busy_node() -> SampleNode:
    """What a node looks like in the middle of its work: ready, busy, loading, failed, absent and idle models."""
    demo = demo_worker()
    demo.stats = SampleStats(
        n_finished=128, n_tokens_out=9_000, ttft=(3.0, 4.0), latency=(40, 90), history=_wave(40, 80)
    )
    gemma = SampleWorker("gemma3-270m", ModelState.READY, http_addr=":5770", worker_concurrency=2, ctx_size=8192)
    gemma.learn(sample_info("gemma3", 268_000_000, "Q4_K_M"))
    gemma.n_active, gemma.n_waiting = 2, 6
    gemma.stats = SampleStats(
        n_finished=1_204,
        n_tokens_out=98_000,
        pace=142.4,
        ttft=(120, 210),
        latency=(1200, 2900),
        history=_wave(900, 160),
    )
    gemma.counters = SampleCounters(48_210, 98_000, 31_000, 2, 1.94, 1_204, 3)
    nomic = SampleWorker(
        "nomic-embed-v1.5", ModelState.ON_DISK, http_addr=":5778", model_format="embedding", ctx_size=2048
    )
    nomic.learn(sample_info("nomic-bert", 137_000_000, "F16"))
    qwen = SampleWorker("qwen3-4b", ModelState.LOADING, http_addr=":5771")
    qwen.learn(sample_info("qwen3", 4_020_000_000, "Q4_K_M", tools=True, think=True))
    qwen.progress = 0.61
    oss = SampleWorker("gpt-oss-20b", ModelState.ABSENT, http_addr=":5772", model_format="harmony", ctx_size=8192)
    moe = SampleWorker("llama3-8b", ModelState.FAILED, ctx_size=8192, backpressure_threshold=3)
    moe.learn(sample_info("llama", 8_030_000_000, "Q4_K_M", tools=True))
    moe.reason = (
        "needs 6.9 GiB (weights 4.6, KV 2.0, compute 0.3) and 3.2 GiB are free: lower CTX_SIZE or WORKER_CONCURRENCY, "
        "unload another model, or load with force"
    )
    node = SampleNode(demo, gemma, oss, moe, nomic, qwen)
    at = NOW.timestamp()
    node.happen(
        ModelStateChanged(ts=at - 31, model="demo", state=ModelState.READY),
        LogLine(ts=at - 31, model="demo", level="info", code="model.loaded", msg="demo is ready"),
        LogLine(ts=at - 12, model="llama3-8b", level="error", code="model.failed", msg=f"failed: {moe.reason}"),
        LogLine(ts=at - 3, model="gemma3-270m", level="warning", code="backpressure", msg="6 waiting, threshold 5"),
        RequestFinished(
            ts=at - 1, model="gemma3-270m", req_id="9f2c41aa07d3b6e8", tokens_in=52, tokens_out=128, ttft_ms=118,
            duration_ms=1420, finish_reason="stop", source="nats",
        ),
    )  # fmt: skip
    return node
