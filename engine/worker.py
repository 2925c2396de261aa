"""One worker file's model: its state, its engine while it has one, the requests in it, and the documents that describe
it.

Loop thread. `engine.fleet` moves it through its states; `engine.service` puts requests in.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.capabilities import CapabilityClaim, detect
from engine.counters import EngineCounters
from engine.generation import Generation
from engine.harmony import MARKS, HarmonyFormat, Mark, speaks_harmony, unmarked
from engine.harmony_output import HarmonyParser
from engine.model_info import ModelInfo
from engine.output import OutputParser, ReasoningParser
from engine.prompt import TEMPLATE_FILE, PromptFormat, Tool, overridden
from engine.restarts import Restarts
from engine.stats import ModelStats
from engine.tool_calls import ToolCallParser, form_of
from infsvc import __version__
from infsvc.audit import AuditSink, EventRow
from infsvc.errors import BadRequest, ModelNotLoaded
from infsvc.events import EventBus, LogLine, ModelProgress, ModelStateChanged
from infsvc.settings import WorkerSettings
from infsvc.types import (
    BackpressureReport,
    BackpressureStatus,
    Capability,
    HealthDocument,
    Message,
    ModelInfoDocument,
    ModelState,
    Params,
    QueueMetrics,
    ReasoningEffort,
    backpressure_level,
    human_count,
)

if TYPE_CHECKING:
    from engine.constraint import Compiler, Grammars, Matcher
    from engine.download import Progress
    from engine.embedder import Embedder
    from engine.embedding import Embedding
    from engine.engine import Engine
    from engine.isolated import IsolatedEmbedder, IsolatedEngine
    from engine.remote_model import Vocabulary

    LiveRequest = Generation | Embedding
    AnyEngine = Engine | IsolatedEngine
    AnyEmbedder = Embedder | IsolatedEmbedder


def timestamp(ts: float | None) -> str | None:
    """Seconds since the epoch as RFC 3339 in UTC."""
    return (
        None
        if ts is None
        else datetime.fromtimestamp(ts, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the model reads it, and what reads its answer.

    Attributes:
        calls: takes tool calls out of the text that the parser leaves; None where there are none, or where the parser
            does.
        shown: control tokens that the engine shows as text, because a parser reads them.
    """

    text: str
    tokens: list[int]
    parser: OutputParser
    calls: ToolCallParser | None = None
    shown: frozenset[int] = frozenset()


class Worker:
    """A model of this node.

    Attributes:
        asked: whether someone wants it to run.
        reason: why it failed.
        progress: 0..1 while it loads, is fetched or verified.
        pull: the figures of a download while one runs.
        constraints: what compiles for the engine's vocabulary, and that engine.
        restarts: when its process, if it has one of its own, is started again.
        requests: live requests by req_id, in order of arrival.
        n_preparing: requests admitted whose prompt is still being rendered; they hold a place in the queue.
        n_queued_durable: requests that wait in the broker's queue, over all nodes; `transports.nats` keeps it true.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        path: Path,
        events: EventBus,
        audit: AuditSink,
        node: str,
        start_time: str,
        endpoint: str,
    ) -> None:
        self.settings = settings
        self.name = settings.model_name
        self.path = path
        self.audit = audit
        self.endpoint = endpoint
        self.stats = ModelStats()
        self.asked = False
        self.state = ModelState.ON_DISK if path.is_file() else ModelState.ABSENT
        self.reason: str | None = None
        self.progress: float | None = None
        self.pull: Progress | None = None
        self.info: ModelInfo | None = None
        self.claims: tuple[CapabilityClaim, ...] = ()
        self.engine: AnyEngine | None = None
        self.embedder: AnyEmbedder | None = None
        self.restarts = Restarts()
        self.format: PromptFormat | None = None
        self.requests: dict[str, LiveRequest] = {}
        self.n_preparing = 0
        self.n_queued_durable = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.constraints: tuple[AnyEngine, Compiler] | None = None
        self._events = events
        self._node, self._start_time = node, start_time

    @property
    def isolated(self) -> bool:
        """Whether it runs in a process of its own."""
        return self.settings.engine_isolation == "process"

    @property
    def n_process_bytes(self) -> int:
        """What that process holds of memory; 0 without one."""
        running = self.engine or self.embedder
        process = getattr(running, "process", None)
        return 0 if process is None else int(process.n_bytes)

    @property
    def n_slots(self) -> int:
        return self.settings.worker_concurrency

    @property
    def n_in_flight(self) -> int:
        return len(self.requests) + self.n_preparing

    @property
    def n_active(self) -> int:
        return min(self.n_in_flight, self.n_slots)

    @property
    def n_in_line(self) -> int:
        """Requests of this process that wait for a slot."""
        return max(0, self.n_in_flight - self.n_slots)

    @property
    def n_waiting(self) -> int:
        """All that waits: in this process, and in the broker's queue."""
        return self.n_in_line + self.n_queued_durable

    @property
    def n_ctx(self) -> int:
        """Tokens of one sequence: the engine's while loaded, else what is asked for."""
        running = self.engine or self.embedder
        if running is not None:
            return running.n_ctx
        return self.settings.ctx_size or (self.info.n_ctx_train if self.info else 0)

    @property
    def counters(self) -> EngineCounters:
        running = self.engine or self.embedder
        return running.counters if running is not None else EngineCounters()

    @property
    def embeds_only(self) -> bool:
        """Whether it is, or will be, loaded for embeddings alone."""
        if self.claims:
            return not self.has(Capability.TEXT_GENERATION)
        return self.settings.model_format == "embedding"

    def has(self, capability: Capability) -> bool:
        return any(claim.capability is capability and claim.present for claim in self.claims)

    def evidence(self, capability: Capability) -> str:
        """Why it has the capability, or has not; empty before its file was read."""
        return next((claim.evidence for claim in self.claims if claim.capability is capability), "")

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Holds a place in the queue while a prompt is rendered; the engine is not freed meanwhile."""
        self.n_preparing += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self.n_preparing -= 1
            if not self.n_preparing:
                self._quiet.set()

    async def quiet(self) -> None:
        """Waits until no prompt is being rendered."""
        await self._quiet.wait()

    def learn(self, info: ModelInfo) -> None:
        """Takes the header's facts over, as the worker file reads them."""
        asked = self.settings
        self.info = info
        override = overridden(self.path, asked)
        harmony = not override and speaks_harmony(
            asked.model_format, vocabulary=info.special_tokens, chat_template=info.chat_template
        )
        embeds_only = asked.model_format == "embedding"
        self.claims = detect(
            info,
            pooling=asked.pooling,
            embeds_only=embeds_only,
            harmony=harmony,
            extract_final=asked.harmony_extract_final,
            override=TEMPLATE_FILE if override else None,
        )

    def move(self, state: ModelState, reason: str | None = None) -> None:
        """Goes to another state and says so."""
        self.state, self.reason, self.progress, self.pull = state, reason, None, None
        self._events.publish(ModelStateChanged(model=self.name, state=state, reason=reason))
        level = "error" if state is ModelState.FAILED else "info"
        code = "model.loaded" if state is ModelState.READY else f"model.{state}"
        self.note(level, code, f"{self.name} is {state.replace('_', ' ')}" + (f": {reason}" if reason else ""))

    def note(self, level: str, code: str, msg: str, **meta: Any) -> None:
        """An operational event of this model: to the bus and to its audit file."""
        self._events.publish(LogLine(model=self.name, level=level, code=code, msg=msg, meta=meta or None))
        self.audit.event(EventRow(level=level, code=code, msg=msg, meta=json.dumps(meta) if meta else None))

    def loading(self, fraction: float) -> None:
        """Notes how far a load is."""
        if self.state is ModelState.LOADING:
            self.progress = fraction
            total = self.info.file_bytes if self.info else 0
            self._events.publish(ModelProgress(model=self.name, done_bytes=round(fraction * total), total_bytes=total))

    def pulling(self, progress: Progress) -> None:
        """Notes how far a download is; its last part, the verification, is a state of its own."""
        if progress.verifying and self.state is ModelState.DOWNLOADING:
            self.move(ModelState.VERIFYING)
        if self.state in (ModelState.DOWNLOADING, ModelState.VERIFYING):
            self.pull = progress
            self.progress = progress.done_bytes / progress.total_bytes if progress.total_bytes else None
            self._events.publish(
                ModelProgress(
                    model=self.name,
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    bytes_per_s=progress.bytes_per_s,
                    eta_s=progress.eta_s,
                )
            )

    def constraint(self, params: Params, grammars: Grammars | None) -> Matcher | None:
        """What the parameters constrain the answer to, compiled; None for nothing. Any thread, while the engine is
        open; blocks for milliseconds, at a model's first one for up to a second.

        Raises:
            UnknownGrammar, GrammarInvalid, SchemaInvalid: with the parameter's name.
        """
        if not params.constrained:
            return None
        # Here, on a pool's thread: it takes numpy and llguidance along, for which the first frame need not wait.
        from engine.constraint import matcher_for

        engine, known = self.engine, self.constraints
        if engine is None:
            raise ModelNotLoaded(self.name, self.state.replace("_", " "), self.reason)
        if known is None or known[0] is not engine:
            known = self.constraints = (engine, engine.constraints())
        return matcher_for(params, known[1], grammars)

    def prompt(
        self,
        *,
        text: str | None,
        messages: tuple[Message, ...],
        raw: bool,
        think: bool | None,
        effort: ReasoningEffort | None = None,
        tools: tuple[Tool, ...] = (),
        one_call: bool = False,
        answer_only: bool = False,
        plain: bool = False,
        tokens: tuple[int, ...] | None = None,
    ) -> Prompt:
        """Renders and tokenises. Any thread, while the engine is open.

        Args:
            one_call: the answer is one call, as a constraint has it.
            answer_only: the model is to answer at once: no reasoning is asked for, and one that the template has
                opened is closed, so that the first token is the answer's.
            plain: the text is completed without a template.
            tokens: the prompt as ids.

        Raises:
            BadRequest: there is nothing to read, or the template refuses it.
        """
        # The engine may die, or leave, while this runs.
        engine, form = self.engine, self.format
        if engine is None:
            raise ModelNotLoaded(self.name, self.state.replace("_", " "), self.reason)
        model = engine.model
        if tokens is not None:
            wrong = next((token for token in tokens if not 0 <= token < model.n_vocab), None)
            if wrong is not None:
                raise BadRequest(f"{wrong} is no token: the vocabulary has {model.n_vocab}", param="prompt")
            return Prompt("", list(tokens), ReasoningParser(enabled=False))
        if plain:
            completed = model.tokenize(text or "", add_special=True, parse_special=True)
            return Prompt(text or "", completed, ReasoningParser(enabled=False))
        if tools and not self.has(Capability.TOOL_CALLING):
            why = next(claim.evidence for claim in self.claims if claim.capability is Capability.TOOL_CALLING)
            raise BadRequest(f"{self.name} calls no tools: {why}", param="tools")
        if raw:
            if text is None:
                raise BadRequest("raw needs an input text", param="raw")
            ids = model.tokenize(text, add_special=False, parse_special=True)
            return Prompt(text, ids, ReasoningParser(enabled=False))
        turns = messages or (Message(role="user", content=text or ""),)
        if form is None:
            raise BadRequest(
                f"{self.name} has no chat template: send the request with raw, "
                "or put a prompt_template.json beside its file",
                param="raw",
            )
        if isinstance(form, HarmonyFormat):
            if think is False and tools and not answer_only:
                raise BadRequest(
                    f"{self.name} cannot leave thinking out where it may call tools: reasoning_effort low is the least",
                    param="reasoning_effort",
                )
            return _in_harmony(
                form, model, turns, think=False if answer_only else think, effort=effort, tools=tools, one_call=one_call
            )
        rendered = form.render(turns, think=False if answer_only else think, tools=tools, effort=effort)
        if answer_only and rendered.rstrip().endswith("<think>"):
            rendered = rendered.rstrip() + "\n\n</think>\n\n"
        bos = model.token_text(model.bos)
        # A template that writes the BOS itself must not get a second one from the vocabulary.
        bare = rendered.removeprefix(bos) if bos and model.adds_bos else rendered
        ids = model.tokenize(bare, add_special=True, parse_special=True)
        inside = rendered.rstrip().endswith("<think>")
        reasons = self.has(Capability.REASONING) and not answer_only
        parser = ReasoningParser(enabled=reasons, inside=inside)
        if not tools:
            return Prompt(rendered, ids, parser)
        found = form_of(self.info.chat_template or "") if self.info is not None else None
        writes = found[0] if found is not None else None
        names = {str(tool["function"]["name"]) for tool in tools}
        calls = ToolCallParser(writes, whole=one_call, names=names)
        shown = _token_ids(model, writes.tokens) if writes is not None and not one_call else frozenset()
        return Prompt(rendered, ids, parser, calls, shown)

    @property
    def level(self) -> Literal["healthy", "warning", "critical"]:
        return backpressure_level(
            self.n_waiting, threshold=self.settings.backpressure_threshold, capacity=self.settings.queue_max_msgs
        )

    def health(self) -> HealthDocument:
        """The health document."""
        info = self.info
        present = [claim.capability.value for claim in self.claims if claim.present]
        return HealthDocument(
            model_name=self.name,
            status=self.state.health_status,
            reason=self.reason,
            progress=self.progress,
            last_activity=timestamp(self.stats.last_activity_ts),
            capabilities=present,
            endpoint=self.endpoint,
            nats_topic=self.settings.subject,
            monitoring_topic=self.settings.monitoring_topic,
            version=__version__,
            model_info=None
            if info is None
            else ModelInfoDocument(
                architecture=info.architecture,
                modalities=[word for word in ("text", "embeddings") if word in " ".join(present)],
                parameter_count=human_count(info.n_params),
                context_size=self.n_ctx,
                embedding_size=info.n_embd,
                quantization=info.quantization,
                model_family=info.family,
            ),
            queue_metrics=QueueMetrics(
                pending_messages=self.n_waiting,
                active_processing=self.n_active,
                total_processed=self.stats.n_finished,
                queue_capacity=self.settings.queue_max_msgs,
                last_processed_time=timestamp(self.stats.last_finished_ts),
            ),
            backpressure_status=BackpressureStatus(
                level=self.level,
                utilization=round(self.n_waiting / self.settings.queue_max_msgs, 4),
                threshold=self.settings.backpressure_threshold,
            ),
            worker_count=self.n_slots,
            node=self._node,
            start_time=self._start_time,
        )

    def report(self) -> BackpressureReport:
        """The backpressure report of this moment."""
        return BackpressureReport(
            model_name=self.name,
            pending_messages=self.n_waiting,
            active_processing=self.n_active,
            timestamp=timestamp(datetime.now(UTC).timestamp()) or "",
            worker_count=self.n_slots,
            queue_capacity=self.settings.queue_max_msgs,
            status=self.level,
            node=self._node,
            tokens_per_s=round(self.stats.tokens_per_s(), 1),
        )


def _in_harmony(
    form: HarmonyFormat,
    model: Vocabulary,
    turns: tuple[Message, ...],
    *,
    think: bool | None,
    effort: ReasoningEffort | None,
    tools: tuple[Tool, ...],
    one_call: bool,
) -> Prompt:
    """Tokenises marks as marks and texts as texts, so that nobody's text can pass for a mark."""
    pieces = form.pieces(turns, think=think, effort=effort, tools=tools)
    ids = [model.bos] if model.adds_bos and model.bos >= 0 else []
    for piece in pieces:
        marked = isinstance(piece, Mark)
        for part in (piece,) if marked else unmarked(piece):
            ids += model.tokenize(part, add_special=False, parse_special=marked)
    parser = HarmonyParser(final=think is False, calls=bool(tools) and not one_call, verbatim=not form.extract_final)
    return Prompt(
        "".join(pieces), ids, parser, ToolCallParser(whole=True) if one_call else None, _token_ids(model, MARKS)
    )


def _token_ids(model: Vocabulary, marks: Iterable[str]) -> frozenset[int]:
    """The tokens that these marks are; one that the vocabulary has not as a token is text anyway."""
    spelled = [model.tokenize(mark, add_special=False, parse_special=True) for mark in marks]
    return frozenset(ids[0] for ids in spelled if len(ids) == 1)
