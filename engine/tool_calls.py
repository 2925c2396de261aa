"""Takes tool calls out of an answer's text, piece by piece, in the forms that chat templates teach their models.

A form is data: the mark before its calls, the one after them, and how what stands there is read. What does not parse
comes back as the text that it was: an answer is never lost. (Harmony's calls are messages of their own, and
`engine.harmony_output` reads them.)
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from engine.output import overlap

_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call. `arguments` is JSON text, as OpenAI's API has it."""

    id: str
    name: str
    arguments: str

    @classmethod
    def new(cls, name: str, arguments: str) -> ToolCall:
        """A call with an id of its own."""
        return cls(f"call_{secrets.token_hex(8)}", name, arguments)

    def wire(self) -> dict[str, Any]:
        """The call in OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Read = tuple[list[ToolCall], str]
"""The calls that a text begins with, and what is left of it."""


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a family of models writes its calls.

    Attributes:
        name: whose form it is.
        evidence: what a template that teaches the form writes, one of these at least.
        foreign: what it does not write then: signs of another form between the same marks.
        opens: the mark before calls.
        closes: the mark after them; empty where they reach to the answer's end.
        tokens: marks that are shown as text although a vocabulary may hold them as control tokens.
        bare: what an answer may begin with, blanks apart, that is a call without any mark.
        read: reads what stands behind the mark.
    """

    name: str
    evidence: tuple[str, ...]
    opens: str
    read: Callable[[str], Read]
    closes: str = ""
    foreign: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


def form_of(chat_template: str) -> tuple[ToolForm, str] | None:
    """The form that a chat template teaches and the evidence for it, or None where it is none of these."""
    for form in FORMS:
        mark = next((each for each in form.evidence if each in chat_template), None)
        if mark is not None and not any(each in chat_template for each in form.foreign):
            return form, mark
    return None


class ToolCallParser:
    """Sorts an answer's text into text and calls. One an answer; loop thread.

    Args:
        form: how the model writes calls.
        whole: the answer is one call without marks, as a constrained answer is.
        names: the tools that were offered; what has no mark is a call only to one of these.
    """

    def __init__(self, form: ToolForm | None = None, *, whole: bool = False, names: Collection[str] = ()) -> None:
        self._form = form or HERMES
        self._whole, self._names = whole, names
        self._inside = whole
        self._mark = ""
        self._at_start = bool(self._form.bare) and not whole
        self._after_call = False
        self._held = ""

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that is certain now, and the calls that are whole."""
        self._held += text
        form = self._form
        shown: list[str] = []
        calls: list[ToolCall] = []
        while not self._whole:
            if self._inside:
                at = self._held.find(form.closes) if form.closes and self._mark else -1
                if at < 0:
                    break
                body, self._held = self._held[:at], self._held[at + len(form.closes) :]
                self._inside = False
                found, left = form.read(body)
                if found and not left.strip():
                    calls += found
                    self._after_call = True
                else:
                    shown.append(f"{form.opens}{body}{form.closes}")
            elif self._at_start:
                squeezed = "".join(self._held.split())
                if any(squeezed.startswith(each) for each in form.bare):
                    self._inside, self._at_start = True, False
                elif any(each.startswith(squeezed) for each in form.bare):
                    break
                else:
                    self._at_start = False
            else:
                if self._after_call:
                    # The line breaks that follow a call are nobody's text.
                    self._held = self._held.lstrip("\n")
                    self._after_call = not self._held
                at = self._held.find(form.opens)
                if at < 0:
                    keep = overlap(self._held, form.opens)
                    safe = self._held[: len(self._held) - keep]
                    # Line breaks before a mark are the mark's: they wait until it is sure that none follows.
                    cut = len(safe.rstrip("\n")) if self._held.endswith("\n") or keep else len(safe)
                    shown.append(self._held[:cut])
                    self._held = self._held[cut:]
                    break
                shown.append(self._held[:at].rstrip("\n"))
                self._held = self._held[at + len(form.opens) :]
                self._inside, self._mark = True, form.opens
        return "".join(shown), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back; calls whose closing mark never came still count where they are whole."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        if self._whole:
            call = _one(_parsed(held))
            return ("", [call]) if call is not None else (held, [])
        found, left = self._form.read(held)
        unknown = not self._mark and any(call.name not in self._names for call in found)
        if not found or unknown or (left.strip() and (self._form.closes or not self._mark)):
            return self._mark + held, []
        return left if left.strip() else "", found


def arguments_text(told: Any) -> str | None:
    """A call's arguments as JSON text; None where they are no object."""
    if isinstance(told, str):
        return told
    return json.dumps(told, ensure_ascii=False) if isinstance(told, dict) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _one(told: Any) -> ToolCall | None:
    """A call from its JSON: a name, and arguments or parameters; the whole of it may stand under `function`."""
    if isinstance(told, dict) and isinstance(told.get("function"), dict):
        told = told["function"]
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        return None
    arguments = arguments_text(told.get("arguments", told.get("parameters", {})))
    return None if arguments is None else ToolCall.new(told["name"], arguments)


def _value(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a place and its end; `at` itself where there is none."""
    try:
        return _decoder.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def _series(text: str) -> Read:
    """JSON objects one after another, or lists of them."""
    calls: list[ToolCall] = []
    at = 0
    while True:
        begin = len(text) - len(text[at:].lstrip(_BETWEEN))
        value, end = _value(text, begin)
        found = [_one(each) for each in (value if isinstance(value, list) else [value])]
        if end == begin or not found or None in found:
            return calls, text[begin:]
        calls += [call for call in found if call is not None]
        at = end


def _mistral(text: str) -> Read:
    """A list of objects, or names each with its arguments. The templates of this family refuse other ids than of nine
    letters and digits."""
    calls: list[ToolCall] = []
    at = 0
    while (named := _NAMED.match(text, at)) is not None:
        value, end = _value(text, named.end())
        arguments = arguments_text(value) if isinstance(value, dict) else None
        if arguments is None:
            break
        calls.append(ToolCall(named["id"] or "", named["name"], arguments))
        at = end
    if calls:
        left = text[at:]
    else:
        calls, left = _series(text)
    known = [call.id if re.fullmatch("[A-Za-z0-9]{9}", call.id) else secrets.token_hex(5)[:9] for call in calls]
    return [ToolCall(each, call.name, call.arguments) for each, call in zip(known, calls, strict=True)], left


_BETWEEN = " \t\r\n;,"
_NAMED = re.compile(
    r"\s*(?:\[TOOL_CALLS\]\s*)?(?P<name>[A-Za-z0-9_.-]+)(?:\[CALL_ID\](?P<id>[A-Za-z0-9_-]+))?\[ARGS\]\s*"
)

HERMES = ToolForm(
    name="Hermes",
    evidence=("<tool_call>",),
    # XML, keys and values as tags: what Qwen3-Coder, GLM and MiniMax write between the same marks.
    foreign=("<function=", "<arg_key>", "<invoke"),
    opens="<tool_call>",
    closes="</tool_call>",
    read=_series,
)
MISTRAL = ToolForm(
    name="Mistral",
    evidence=("[TOOL_CALLS]",),
    opens="[TOOL_CALLS]",
    tokens=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    read=_mistral,
)
LLAMA = ToolForm(
    name="Llama 3",
    evidence=("<|python_tag|>", '"parameters": dictionary'),
    foreign=("<function=",),
    opens="<|python_tag|>",
    tokens=("<|python_tag|>",),
    bare=('{"name"', '{"type":"function"', '{"function"'),
    read=_series,
)
FORMS = (HERMES, MISTRAL, LLAMA)


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
