"""Takes tool calls out of an answer's text, piece by piece: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, the
form of Hermes and Qwen.

What does not parse comes back as the text that it was: an answer is never lost.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from engine.output import overlap

MARK, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. `arguments` is JSON text, as OpenAI's API has it."""

    id: str
    name: str
    arguments: str

    def wire(self) -> dict[str, Any]:
        """The call in OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallParser:
    """Sorts an answer's text into text and calls. One an answer; loop thread.

    Args:
        whole: the answer is one call without marks, as a constrained answer is.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole
        self._inside = whole
        self._after_call = False
        self._held = ""

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that is certain now, and the calls that are whole."""
        self._held += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        while not self._whole:
            if self._inside:
                at = self._held.find(_CLOSE)
                if at < 0:
                    break
                body, self._held = self._held[:at], self._held[at + len(_CLOSE) :]
                self._inside = False
                call = self._parse(body)
                if call is None:
                    shown.append(f"{MARK}{body}{_CLOSE}")
                else:
                    calls.append(call)
                    self._after_call = True
            else:
                if self._after_call:
                    # The line breaks that follow a call are nobody's text.
                    self._held = self._held.lstrip("\n")
                    self._after_call = not self._held
                at = self._held.find(MARK)
                if at < 0:
                    keep = overlap(self._held, MARK)
                    safe = self._held[: len(self._held) - keep]
                    # Line breaks before a mark are the mark's: they wait until it is sure that none follows.
                    cut = len(safe.rstrip("\n")) if self._held.endswith("\n") or keep else len(safe)
                    shown.append(self._held[:cut])
                    self._held = self._held[cut:]
                    break
                shown.append(self._held[:at].rstrip("\n"))
                self._held = self._held[at + len(MARK) :]
                self._inside = True
        return "".join(shown), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back; a call whose closing mark never came still counts when it is whole."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        call = self._parse(held)
        if call is not None:
            return "", [call]
        return (held if self._whole else MARK + held), []

    @staticmethod
    def _parse(body: str) -> ToolCall | None:
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            return None
        arguments = told.get("arguments", told.get("parameters", {}))
        if isinstance(arguments, str):
            text = arguments
        elif isinstance(arguments, dict):
            text = json.dumps(arguments, ensure_ascii=False)
        else:
            return None
        return ToolCall(f"call_{secrets.token_hex(8)}", told["name"], text)


def call_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON Schema of a call of one of the tools, for answers that must be one."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
