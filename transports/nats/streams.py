"""The streams of a model's durable queue: their names and shapes, and what an operator's own stream would break.

| stream | holds | over |
|---|---|---|
| `STREAM_NAME` | the queue: work-queue retention; a full one refuses | `inference.queue.<m>`, `embedding.queue.<m>` |
| `<STREAM_NAME>_SPOOL` | what is published there, also while every node is down | SUBJECT, `embedding.request.<m>` |
| `KV_<STREAM_NAME>_ONCE` | a key-value bucket: what became of each `req_id` within DEDUPE_WINDOW | `$KV.…` |
| `INFSVC_ADVISORIES` | the broker's own notes on messages that ended badly, until a node has read them | `$JS.EVENT…` |
| `INFSVC_DEAD` | dead letters of all models | `infsvc.dead.*` |

Of a NATS cluster STREAM_REPLICAS servers keep each of them; those of all models go by the largest. Consumers have as
many copies as their stream.
"""

from __future__ import annotations

from typing import Any

from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig

from infsvc import subjects
from infsvc.settings import WorkerSettings
from infsvc.types import MAX_BODY_BYTES
from transports.nats.jetstream import JetStream

DEAD = "INFSVC_DEAD"
ADVISORIES = "INFSVC_ADVISORIES"
UNDERTAKERS = "undertakers"
"""The durable consumer of the advisories, shared by all nodes."""

_ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER"
_MAX_DEAD = 10_000
_DEAD_AGE_S = 30 * 86400.0
_MAX_SPOOLED = 200_000
_MAX_RECORDS = 1_000_000
_SPOOL_ACK_WAIT_S = 10.0
SPOOL_BATCH = 512
"""Messages of a spool that one node holds at a time."""


def spool_name(settings: WorkerSettings) -> str:
    return f"{settings.stream_name}_SPOOL"


def spool_durable(settings: WorkerSettings) -> str:
    return f"{settings.queue_durable}_spool"


def once_bucket(settings: WorkerSettings) -> str:
    return f"{settings.stream_name}_ONCE"


_SPOOL_SLACK_S = 7 * 86400.0
"""How long after QUEUE_MAX_AGE a node may come up and still say what has expired in a spool."""


def _each(*names: str) -> list[str]:
    return list(dict.fromkeys(names))


_QUEUE_WORDS = "infsvc: requests that wait for "


def model_of_queue(config: dict[str, Any]) -> str | None:
    """The model whose queue a stream is, from the stream's own configuration; None for any other stream."""
    words = str(config.get("description", ""))
    return words.removeprefix(_QUEUE_WORDS) if words.startswith(_QUEUE_WORDS) else None


def queue_stream(settings: WorkerSettings) -> StreamConfig:
    """The queue itself. The broker bounds what waits and what is worked on together, and nodes what waits; see `Depth`.
    It has no age: what expires is ended in words; see `Expiry`."""
    return StreamConfig(
        num_replicas=settings.stream_replicas,
        name=settings.stream_name,
        description=f"{_QUEUE_WORDS}{settings.model_name}",
        subjects=_each(settings.queue_subject, subjects.queue(settings.model_name, embedding=True)),
        retention=RetentionPolicy.WORK_QUEUE,
        discard=DiscardPolicy.NEW,
        max_msgs=settings.queue_max_msgs + settings.max_ack_pending,
        max_msg_size=MAX_BODY_BYTES + 2**16,
        max_age=0,
        # The broker takes none shorter than 100 ms.
        duplicate_window=max(0.1, settings.dedupe_window),
        allow_direct=True,
    )


def queue_consumer(settings: WorkerSettings) -> ConsumerConfig:
    """The one consumer that all nodes pull the queue by."""
    return ConsumerConfig(
        durable_name=settings.queue_durable,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=settings.ack_wait,
        max_deliver=settings.max_deliver,
        max_ack_pending=settings.max_ack_pending,
    )


def spool_stream(settings: WorkerSettings) -> StreamConfig:
    """What is published on the public subject. It answers nobody, so that callers get their answer and no receipt. As
    it takes every message, a caller is not told "no responders" at once while no node is up: its time-out tells it."""
    return StreamConfig(
        num_replicas=settings.stream_replicas,
        name=spool_name(settings),
        description=f"infsvc: what was published on {settings.subject} until a node has looked at it",
        subjects=_each(settings.subject, settings.embedding_subject),
        retention=RetentionPolicy.WORK_QUEUE,
        discard=DiscardPolicy.OLD,
        # Not max_bytes: the broker would set that much of its disk aside for each model.
        max_msgs=_MAX_SPOOLED,
        max_age=settings.queue_max_age + _SPOOL_SLACK_S,
        duplicate_window=0.1,
        no_ack=True,
    )


def spool_consumer(settings: WorkerSettings) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=spool_durable(settings),
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=_SPOOL_ACK_WAIT_S,
        max_ack_pending=_MAX_SPOOLED,
    )


def once_stream(settings: WorkerSettings) -> StreamConfig:
    """A key-value bucket that forgets its oldest records rather than refuse new ones."""
    bucket = once_bucket(settings)
    return StreamConfig(
        num_replicas=settings.stream_replicas,
        name=f"KV_{bucket}",
        description=f"infsvc: what became of the requests for {settings.model_name}",
        subjects=[f"$KV.{bucket}.>"],
        discard=DiscardPolicy.OLD,
        max_msgs_per_subject=1,
        max_msgs=_MAX_RECORDS,
        max_age=settings.dedupe_window,
        duplicate_window=0.1,
        allow_rollup_hdrs=True,
        deny_delete=True,
        allow_direct=True,
    )


def dead_stream(n_replicas: int = 1) -> StreamConfig:
    return StreamConfig(
        num_replicas=n_replicas,
        name=DEAD,
        description="infsvc: requests that could not be answered",
        subjects=["infsvc.dead.*"],
        discard=DiscardPolicy.OLD,
        max_msgs=_MAX_DEAD,
        max_age=_DEAD_AGE_S,
        duplicate_window=3600.0,
        allow_direct=True,
    )


def advisory_stream(n_replicas: int = 1) -> StreamConfig:
    return StreamConfig(
        num_replicas=n_replicas,
        name=ADVISORIES,
        description="infsvc: the broker's notes on messages that ended badly",
        subjects=[f"{_ADVISORY}.MAX_DELIVERIES.>", f"{_ADVISORY}.MSG_TERMINATED.>"],
        retention=RetentionPolicy.WORK_QUEUE,
        discard=DiscardPolicy.OLD,
        max_msgs=100_000,
        max_age=7 * 86400.0,
        duplicate_window=0.1,
        no_ack=True,
    )


def advisory_consumer() -> ConsumerConfig:
    return ConsumerConfig(durable_name=UNDERTAKERS, ack_policy=AckPolicy.EXPLICIT, ack_wait=30.0, max_ack_pending=256)


async def foreign_streams(js: JetStream, settings: WorkerSettings) -> list[str]:
    """Streams that are not this project's and cover a public subject of the model: their receipt reaches a caller
    before the answer does."""
    names: list[str] = []
    for subject in _each(settings.subject, settings.embedding_subject):
        names += (await js.call("STREAM.NAMES", {"subject": subject})).get("streams") or []
    foreign = []
    for name in dict.fromkeys(names):
        if name == spool_name(settings):
            continue
        config = (await js.call(f"STREAM.INFO.{name}"))["config"]
        if not config.get("no_ack"):
            foreign.append(str(name))
    return foreign
