"""What the panel beside the chart and the detail dialog say of one model, as styled text."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from engine.model_source import describe
from infsvc.types import ModelState
from tui.node_view import WorkerView
from tui.wording import (
    clean,
    duration,
    gauge,
    hang,
    level_mark,
    params_of,
    plural,
    rate,
    size,
    span,
    state_of,
    time_left,
)

# Settings that name where things go; the others are in the worker file.
_SETTINGS = (
    "worker_concurrency", "ctx_size", "model_threads", "gpu_layers", "model_format", "queue_max_msgs",
    "backpressure_threshold", "model_path", "db_path", "response_prefix", "monitoring_topic",
)  # fmt: skip

Part = tuple[str, str]


class ModelPanel(Static):
    """The few lines that are worth seeing all the time."""

    def show(self, worker: WorkerView | None, *, n_lines: int) -> None:
        """Updates the panel; with few lines the percentiles go first, never the reason of a failure."""
        self.update(Content("\n").join(panel_lines(worker)[:n_lines]) if worker else "", layout=False)


def panel_lines(worker: WorkerView) -> list[Content]:
    state, mark = state_of(worker), level_mark(worker.level)
    lines = [Content.assemble((f"{state}", f"${state.tone} bold"), (f"   {clean(worker.name)}", "bold"))]
    if worker.reason:
        lines.append(
            Content.styled(clean(worker.reason), "$error" if worker.state is ModelState.FAILED else "$warning")
        )
    elif worker.pull is not None:
        lines.append(Content.styled(pull_line(worker), "$warning"))
    elif worker.state is ModelState.ABSENT:
        if source := describe(worker.settings):
            lines.append(Content.styled(f"p fetches it, l also loads it: {clean(source)}", "$muted"))
        else:
            lines.append(Content.styled(f"no file at {worker.settings.model_path}", "$muted"))
    elif worker.state is ModelState.ON_DISK:
        lines.append(Content.styled("l loads it", "$muted"))
    running = worker.state in (ModelState.READY, ModelState.DRAINING)
    if running:
        lines.append(
            Content.assemble(
                (f"{mark.glyph} {mark.word}".strip(), f"${mark.tone}" if worker.level != "healthy" else "$success"),
                (f"  {worker.n_waiting:,} waiting, threshold {worker.settings.backpressure_threshold}", ""),
                (f", room {worker.settings.queue_max_msgs:,}", "$muted"),
            )
        )
        ttft, latency = worker.stats.ttft_ms(), worker.stats.latency_ms()
        if ttft or latency:
            pairs = [("ttft ", span(ttft) if ttft else "–"), ("   latency ", span(latency) if latency else "–")]
            lines.append(_pairs(*pairs, ("   p50/p95", "")))
        counters = worker.counters
        lines.append(
            _pairs(
                ("running ", f"{worker.n_active}/{worker.n_slots}"),
                ("   batch ", f"{counters.mean_batch_sequences:.1f}/{counters.max_batch_sequences}"),
                ("   done ", f"{worker.stats.n_finished:,}"),
            )
        )
    lines.append(_pairs(("http ", worker.endpoint.removeprefix("http://") or "gateway only")))
    lines.append(_pairs(("nats ", clean(worker.settings.subject))))
    return lines


def pull_line(worker: WorkerView) -> str:
    """How far a download is, in one line."""
    pull = worker.pull
    if pull is None:
        return ""
    parts = [f"{size(pull.done_bytes)} of {size(pull.total_bytes)}" if pull.total_bytes else size(pull.done_bytes)]
    if pull.bytes_per_s is not None:
        parts.append(f"{size(pull.bytes_per_s)}/s")
    if pull.eta_s is not None:
        parts.append(f"{time_left(pull.eta_s)} left")
    bar = f"{gauge(worker.progress)} " if worker.progress is not None else ""
    return bar + ", ".join(parts)


def detail(worker: WorkerView, width: int) -> Content:
    """Everything known of the model, for a dialog of `width` cells."""
    state = state_of(worker)
    sections: list[Content] = [Content.assemble((str(state), f"${state.tone} bold"))]
    if worker.reason:
        sections.append(Content.styled(clean(worker.reason), "$error"))
    info, stats, counters = worker.info, worker.stats, worker.counters
    if info is not None:
        facts = [
            ("architecture", clean(info.architecture)),
            ("family", clean(info.family)),
            ("parameters", f"{params_of(worker)}  ({info.n_params:,})"),
            ("quantisation", info.quantization),
            (
                "context",
                f"{f'{worker.n_ctx:,}' if worker.n_ctx else '–'} tokens a sequence, "
                f"the model was trained on {info.n_ctx_train:,}",
            ),
            ("layers · width", f"{info.n_layer} · {info.n_embd}"),
            ("vocabulary", f"{info.n_vocab:,}"),
            ("licence", clean(info.license or "not stated")),
        ]
        sections.append(_section("Model file", facts, width))
    if worker.claims:
        rows = [
            Content.assemble(
                ("✓ " if claim.present else "· ", "$success" if claim.present else "$muted"),
                (f"{claim.capability.value:<22}", ""),
                (hang(clean(claim.evidence), 24, width), "$muted"),
            )
            for claim in worker.claims
        ]
        sections.append(Content("\n").join([Content.styled("Capabilities", "$accent bold"), *rows]))
    ttft, latency = stats.ttft_ms(), stats.latency_ms()
    work = [
        ("running · waiting", f"{worker.n_active}/{worker.n_slots} · {worker.n_waiting:,}  {worker.level}"),
        ("finished", f"{plural(stats.n_finished, 'request')}, {plural(stats.n_tokens_out, 'token')}"),
        ("now", f"{rate(stats.tokens_per_s())} tok/s"),
        ("first token", f"p50 {duration(ttft[0])}, p95 {duration(ttft[1])}" if ttft else "–"),
        ("whole answer", f"p50 {duration(latency[0])}, p95 {duration(latency[1])}" if latency else "–"),
        ("engine steps", f"{counters.n_steps:,}"),
        ("engine tokens", f"{counters.n_prefill_tokens:,} of prompts, {counters.n_decode_tokens:,} decoded"),
        (
            "sequences in a batch",
            f"{counters.mean_batch_sequences:.2f} on average, {counters.max_batch_sequences} at most",
        ),
        ("ended", f"{counters.n_finished:,} finished, {counters.n_cancelled:,} cancelled"),
    ]
    sections.append(_section("Work", work, width))
    source = clean(describe(worker.settings)) or "the file is put there by hand"
    kept = size(worker.info.file_bytes) if worker.info else "absent" if worker.state is ModelState.ABSENT else ""
    sections.append(_section("On disk", [("file", f"{clean(str(worker.path))}  {kept}"), ("source", source)], width))
    doors = [("http", worker.endpoint or "through the gateway only"), ("nats", clean(worker.settings.subject))]
    sections.append(_section("Doors", doors, width))
    settings = [(key.upper(), clean(str(getattr(worker.settings, key)))) for key in _SETTINGS]
    sections.append(_section("Settings", settings, width))
    return Content("\n\n").join(sections)


def _section(title: str, facts: list[Part], width: int) -> Content:
    rows = [Content.assemble((f"{key:<24}", "$muted"), (hang(value, 24, width), "")) for key, value in facts]
    return Content("\n").join([Content.styled(title, "$accent bold"), *rows])


def _pairs(*pairs: Part) -> Content:
    parts: list[Part] = []
    for label, value in pairs:
        parts += [(label, "$muted"), (value, "")]
    return Content.assemble(*parts)
