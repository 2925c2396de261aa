"""The names of NATS subjects, in one place.

A model's name may hold dots (`nomic-embed-v1.5`), which NATS reads as a token border. The documented subject keeps the
name as it is; whatever is published for wildcards goes out a second time under `dotless()`, so that `*` finds it.
"""

from __future__ import annotations

import hashlib

CANCEL = "inference.cancel"
AGGREGATE = "monitoring.aggregate"
ALERTS = "monitoring.alerts"
HEARTBEATS = "models.*.heartbeat"
"""Every model's heartbeat, those with dots in the name by their alias."""

REPORTS = "monitoring.>"
"""Reports, totals and alerts. A model whose MONITORING_TOPIC lies elsewhere names it in its health document."""

REPLY_PREFIX = "inference.reply"
"""Where durable answers go, followed by the `req_id`."""

MSG_ID_HEADER = "Nats-Msg-Id"
"""JetStream's own: a second message with the same value within the stream's window is acknowledged and not kept."""

REPLY_HEADER = "Infsvc-Reply"
"""On a queue's message: where a waiting caller listens, for chunks too. JetStream keeps no reply subject, so the front
door writes it here."""

DEADLINE_HEADER = "Infsvc-Deadline"
"""On any request: seconds since the epoch, after which nobody waits for the answer. It is then not computed."""

REQ_ID_HEADER = "Infsvc-Req-Id"
"""On a request with a reply subject whose body names no `req_id`, and on a queue's message: what it is called, so that
it can be cancelled. Unlike a `req_id` in the body it does not ask for the durable queue and its promises."""

PART_HEADER = "Infsvc-Part"
"""On each message of a request that one node forwards to another; see `transports.forward_parts`."""

CAME_HEADER = "Infsvc-Came"
"""On a queue's message that lay in the spool first: when it came there, in seconds since the epoch."""

TRACE_HEADER = "X-Trace-ID"

CLIENT_HEADER = "X-Client-ID"
"""On any request, over HTTP too: whose it is. Clients share a model's slots alike; where HTTP asks for API keys, the
key counts instead."""

CLIENT_CHARACTERS = 200

CARRIED_HEADERS = (TRACE_HEADER, DEADLINE_HEADER, CLIENT_HEADER)
"""Those that a request keeps on its way through the durable queue."""


def dotless(name: str) -> str:
    """The model's name as one NATS token."""
    return name.replace(".", "_")


def covers(pattern: str, subject: str) -> bool:
    """Whether a pattern that ends in `>` takes in a literal subject."""
    return subject.startswith(pattern.removesuffix(">"))


def queue(model: str, *, embedding: bool = False) -> str:
    """Where JetStream publishers put durable requests; the broker acknowledges each, or says that the queue is full."""
    return f"{'embedding' if embedding else 'inference'}.queue.{model}"


def msg_id(model: str, req_id: str) -> str:
    """The value of `MSG_ID_HEADER` for a request, so that one that is sent twice is queued once."""
    return f"{model}:{req_id}"


def owner(instance: str) -> str:
    """Request/reply, between nodes: whether that process is still at work on a request."""
    return f"infsvc.owner.{instance}"


def instance(node: str, start_time: str) -> str:
    """One start of one node as a NATS token, from what its health documents say."""
    return hashlib.sha256(f"{node} {start_time}".encode()).hexdigest()[:24]


def forward(node: str, start_time: str) -> str:
    """Where a node takes the HTTP requests that other nodes' gateways forward to it."""
    return f"infsvc.forward.{instance(node, start_time)}"


def direct(model: str, node: str, start_time: str, *, embedding: bool = False) -> str:
    """Where one node alone takes what `request` has for whichever node is given it."""
    return f"infsvc.request.{instance(node, start_time)}.{'embedding' if embedding else 'inference'}.{model}"


def dead(model: str) -> str:
    """Where a model's dead letters are kept."""
    return f"infsvc.dead.{dotless(model)}"


DEAD_GONE = "infsvc.gone"
"""Published, between nodes: dead letters were replayed or deleted."""


def health(model: str) -> str:
    """Request/reply: the health document."""
    return f"models.{model}.health"


def heartbeat(model: str) -> str:
    """Published: the health document, every 30 s and on each change of state."""
    return f"models.{model}.heartbeat"


def report(topic: str, model: str) -> str:
    """Published: the backpressure report. `topic` is the worker file's MONITORING_TOPIC."""
    return f"{topic}.{model}"


def service(verb: str, *, name: str = "", instance: str = "") -> str:
    """NATS micro: PING, INFO or STATS, of all services, of those with a name, or of one instance."""
    return ".".join(part for part in ("$SRV", verb, name, instance) if part)


def request(model: str, *, embedding: bool = False) -> str:
    """Where a model takes requests, unless its worker file names another SUBJECT."""
    return f"{'embedding' if embedding else 'inference'}.request.{model}"
