"""The names of NATS subjects, in one place.

A model's name may hold dots (`nomic-embed-v1.5`), which NATS reads as a token border. The documented subject keeps the
name as it is; whatever is published for wildcards goes out a second time under `dotless()`, so that `*` finds it.
"""

from __future__ import annotations

CANCEL = "inference.cancel"
AGGREGATE = "monitoring.aggregate"
ALERTS = "monitoring.alerts"
HEARTBEATS = "models.>"


def dotless(name: str) -> str:
    """The model's name as one NATS token."""
    return name.replace(".", "_")


def health(model: str) -> str:
    """Request/reply: the health document."""
    return f"models.{model}.health"


def heartbeat(model: str) -> str:
    """Published: the health document, every 30 s and on each change of state."""
    return f"models.{model}.heartbeat"


def report(topic: str, model: str) -> str:
    """Published: the backpressure report. `topic` is the worker file's MONITORING_TOPIC."""
    return f"{topic}.{model}"
