"""What a node does, in Prometheus' form: gauges and counters read at the scrape, histograms fed by the node's events.

Names begin with `infsvc_` and mean what llama-server's and vLLM's metrics of that name mean. Loop thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.fleet import Fleet
from engine.worker import Worker
from infsvc.events import Event, EventBus, RequestFinished
from infsvc.types import ModelState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a fast small model's first token to a long answer of a slow one.
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LATENCY_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """One node's metrics."""

    def __init__(self, fleet: Fleet, events: EventBus) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Models(fleet))
        self._finished = Counter(
            "infsvc_request_success",
            "Requests that ended, by how",
            ["model", "finished_reason"],
            registry=self._registry,
        )
        self._ttft = Histogram(
            "infsvc_time_to_first_token_seconds", "From admission to the first token", ["model"],
            buckets=_TTFT_S, registry=self._registry,
        )  # fmt: skip
        self._latency = Histogram(
            "infsvc_e2e_request_latency_seconds", "From admission to the end", ["model"],
            buckets=_LATENCY_S, registry=self._registry,
        )  # fmt: skip
        self._prompt = Counter("infsvc_prompt_tokens", "Tokens of prompts", ["model"], registry=self._registry)
        self._drawn = Counter("infsvc_generation_tokens", "Tokens drawn", ["model"], registry=self._registry)
        events.listen(self._hear)

    def page(self) -> bytes:
        """The scrape."""
        return bytes(generate_latest(self._registry))

    def _hear(self, event: Event) -> None:
        if not isinstance(event, RequestFinished) or event.model is None:
            return
        self._finished.labels(event.model, event.finish_reason).inc()
        self._prompt.labels(event.model).inc(event.tokens_in)
        self._drawn.labels(event.model).inc(event.tokens_out)
        self._latency.labels(event.model).observe(event.duration_ms / 1000)
        if event.ttft_ms is not None:
            self._ttft.labels(event.model).observe(event.ttft_ms / 1000)


class _Models(Collector):
    """What is read when somebody asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        workers = list(self._fleet.workers.values())
        loaded = [each for each in workers if each.state is ModelState.READY]
        state = GaugeMetricFamily("infsvc_model_state", "1 for the state a model is in", labels=["model", "state"])
        for worker in workers:
            state.add_metric([worker.name, worker.state.value], 1)
        yield state
        yield _gauge(
            "infsvc_num_requests_running", "Requests that have a slot", {each: each.n_active for each in loaded}
        )
        yield _gauge("infsvc_num_requests_waiting", "Requests that wait", {each: each.n_waiting for each in loaded})
        yield _gauge("infsvc_slots", "Sequences decoded in one batch at most", {each: each.n_slots for each in loaded})
        yield _gauge("infsvc_queue_capacity", "Requests that may wait", {
            each: each.settings.queue_max_msgs for each in loaded
        })  # fmt: skip
        yield _gauge("infsvc_tokens_per_second", "Tokens drawn a second, over two seconds", {
            each: each.stats.tokens_per_s() for each in loaded
        })  # fmt: skip
        yield _gauge("infsvc_batch_size", "Sequences that drew a token in one decode, on average since the load", {
            each: each.counters.mean_batch_sequences for each in loaded
        })  # fmt: skip
        yield _gauge("infsvc_prefix_disk_bytes", "States of prompts on disk", {
            each: each.counters.disk_bytes for each in loaded
        })  # fmt: skip
        speculation = GaugeMetricFamily(
            "infsvc_speculation", "1 for whether tokens are guessed ahead, and why not", labels=["model", "state"]
        )
        for worker in loaded:
            if worker.engine is not None:
                speculation.add_metric([worker.name, worker.counters.speculation], 1)
        yield speculation
        lost = CounterMetricFamily("infsvc_engine_lost", "Times that a model's own process died", labels=["model"])
        for worker in workers:
            lost.add_metric([worker.name], worker.restarts.n_ever)
        yield lost
        for name, told, figure in (
            ("infsvc_n_decode", "Batches decoded since the load", "n_steps"),
            ("infsvc_prefill_tokens", "Prompt tokens read since the load", "n_prefill_tokens"),
            ("infsvc_prefix_cached_tokens", "Prompt tokens that were not read again since the load", "n_cached_tokens"),
            ("infsvc_prefix_states_read", "States of prompts that were read from disk since the load", "n_states_read"),
            ("infsvc_prefix_states_written", "States of prompts written to disk since the load", "n_states_written"),
            ("infsvc_draft_tokens", "Tokens guessed ahead and checked since the load", "n_drafted"),
            ("infsvc_draft_accepted_tokens", "Guessed tokens that held since the load", "n_accepted"),
        ):
            counter = CounterMetricFamily(name, told, labels=["model"])
            for worker in loaded:
                counter.add_metric([worker.name], getattr(worker.counters, figure))
            yield counter


def _gauge(name: str, told: str, values: dict[Worker, float]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, told, labels=["model"])
    for worker, value in values.items():
        gauge.add_metric([worker.name], value)
    return gauge
