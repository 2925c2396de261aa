"""Reads the corpus's TOML files and names the shapes they are turned into."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, Any]
HERE = Path(__file__).resolve().parent
SMALL_TALK = ("greeting", "thanks", "bye", "how_are_you")


@dataclass
class Turn:
    """One exchange: what the user says, what the assistant answers, and the thought that would come first."""

    kind: str
    user: str
    answer: str
    thought: str


@dataclass
class Example:
    """A conversation to learn from; the last message is the assistant's.

    `cut` asks the trainer to keep only the first tokens of the last answer: enough to learn which answer it is.
    `thinking` is the template's `enable_thinking`, or None where the caller leaves it out.
    """

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool | None = None
    cut: bool = False


def load(name: str) -> dict[str, Any]:
    """Read one TOML file of this folder."""
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def load_topics() -> list[dict[str, Any]]:
    """Every fixed-answer topic: small talk and all help files, in a stable order.

    A topic's `shipped` is what the weights that ship were trained to say, where its `answer` has been corrected since.
    """
    names = ["smalltalk.toml", *sorted(path.name for path in HERE.glob("help_*.toml"))]
    return [topic for name in names for topic in load(name)["topic"]]
