"""From messages to harmony, the text that gpt-oss was trained on: each message a header and its content between control
tokens, tools as a namespace of TypeScript types.

Written after OpenAI's description of the format and tested against its `openai-harmony`; that package itself wants its
vocabulary from the network, while a GGUF brings its own. `engine.harmony_output` reads what the model answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from datetime import date
from typing import Any, Literal

from infsvc.errors import BadRequest
from infsvc.types import Message, ReasoningEffort


class Mark(str):
    """A control token's spelling, which becomes that token. Text that merely looks like one stays text."""

    __slots__ = ()


START, END, MESSAGE, CHANNEL = Mark("<|start|>"), Mark("<|end|>"), Mark("<|message|>"), Mark("<|channel|>")
CONSTRAIN, RETURN, CALL = Mark("<|constrain|>"), Mark("<|return|>"), Mark("<|call|>")
MARKS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL)

FUNCTIONS = "functions."
"""What stands before a function's name where it is a recipient or an author."""

Piece = str
Tool = dict[str, Any]

_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
_TO_COMMENTARY = "Calls to these tools must go to the commentary channel: 'functions'."
_INSIDE_MARK = re.compile(f"(?<=<)(?={'|'.join(re.escape(mark[1:]) for mark in MARKS)})")
_SCALARS = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}
_MAX_DEPTH = 32


def missing_marks(vocabulary: Collection[str]) -> list[str]:
    """The control tokens of harmony that a vocabulary has not."""
    return [str(mark) for mark in MARKS if mark not in vocabulary]


def unmarked(text: str) -> list[str]:
    """A text in parts that hold no mark, to be tokenised one by one: llama.cpp takes some marks for tokens in any text,
    also where no special ones are to be parsed."""
    return _INSIDE_MARK.split(text)


def speaks_harmony(
    asked: Literal["auto", "template", "harmony", "embedding"],
    *,
    vocabulary: Collection[str],
    chat_template: str | None,
) -> bool:
    """Whether a model is asked in harmony: where MODEL_FORMAT says so, or leaves it to the file and both vocabulary and
    template have its marks."""
    if asked not in ("auto", "harmony") or missing_marks(vocabulary):
        return False
    return asked == "harmony" or chat_template is None or CHANNEL in chat_template


class HarmonyFormat:
    """Renders messages. Any thread.

    Args:
        identity: who the model is, as in "You are …."; a whole sentence that begins with "You are" is taken as it is.
        knowledge_cutoff: a month such as 2024-06; empty leaves the line out.
        effort: how long the model thinks where a request does not say.
        extract_final: whether an answer is told apart by its channels.
        today: gives the date that the system message names.
    """

    def __init__(
        self,
        *,
        identity: str,
        knowledge_cutoff: str,
        effort: ReasoningEffort,
        extract_final: bool,
        today: Callable[[], date] = date.today,
    ) -> None:
        sentence = identity.strip()
        if not sentence.startswith("You are"):
            sentence = f"You are {sentence}"
        self._identity = sentence if sentence[-1:] in ".!?" else f"{sentence}."
        self._knowledge_cutoff, self._effort, self._today = knowledge_cutoff, effort, today
        self.extract_final = extract_final

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None,
        tools: Sequence[Tool] = (),
        effort: ReasoningEffort | None = None,
    ) -> str:
        """The prompt's text; see `pieces`."""
        return "".join(self.pieces(messages, think=think, tools=tools, effort=effort))

    def pieces(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None,
        tools: Sequence[Tool] = (),
        effort: ReasoningEffort | None = None,
    ) -> list[Piece]:
        """The prompt as marks and texts, ending where the answer begins; with `think=False` that is the final channel,
        so that no analysis comes before it.

        Raises:
            BadRequest: a tool's result answers no call that stands before it.
        """
        pieces = [START, "system", MESSAGE, self._system(effort or self._effort, bool(tools)), END]
        rest = list(messages)
        lead: list[str] = []
        while rest and rest[0].role == "system":
            lead.append(rest.pop(0).content)
        developer = _developer("\n\n".join(text for text in lead if text), tools)
        if developer:
            pieces += [START, "developer", MESSAGE, developer, END]
        # What led to a final answer is not read again; what led to calls that are still being answered is.
        last_final = max((at for at, each in enumerate(rest) if _is_final(each)), default=-1)
        called: dict[str, str] = {}
        newest = ""
        for at, message in enumerate(rest):
            match message.role:
                case "system":
                    pieces += [START, "developer", MESSAGE, _developer(message.content, ()), END]
                case "user":
                    author = f"user:{message.name}" if message.name else "user"
                    pieces += [START, author, MESSAGE, message.content, END]
                case "assistant":
                    pieces += _assistant(message, keep_analysis=at > last_final)
                    for call_id, name in _calls(message):
                        called[call_id] = newest = name
                case "tool":
                    name = called.get(message.tool_call_id or "") or message.name or newest
                    if not name:
                        raise BadRequest("a tool's result must follow the call that it answers", param="messages")
                    pieces += [START, f"{FUNCTIONS}{name}", " to=assistant", CHANNEL, "commentary"]
                    pieces += [MESSAGE, message.content, END]
        pieces += [START, "assistant"]
        if think is False:
            pieces += [CHANNEL, "final", MESSAGE]
        return [piece for piece in pieces if piece]

    def _system(self, effort: ReasoningEffort, has_tools: bool) -> str:
        lines = [self._identity]
        if self._knowledge_cutoff:
            lines.append(f"Knowledge cutoff: {self._knowledge_cutoff}")
        lines.append(f"Current date: {self._today().isoformat()}")
        channels = f"{_CHANNELS}\n{_TO_COMMENTARY}" if has_tools else _CHANNELS
        return "\n\n".join(("\n".join(lines), f"Reasoning: {effort}", channels))


def _is_final(message: Message) -> bool:
    return message.role == "assistant" and not message.tool_calls


def _calls(message: Message) -> list[tuple[str, str]]:
    """The id and the function's name of each call."""
    found = []
    for call in message.tool_calls or ():
        function = call.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRequest("a tool call needs a function with a name", param="messages.tool_calls")
        found.append((str(call.get("id", "")), name))
    return found


def _assistant(message: Message, *, keep_analysis: bool) -> list[Piece]:
    def said(channel: str, text: str) -> list[Piece]:
        return [START, "assistant", CHANNEL, channel, MESSAGE, text, END]

    pieces: list[Piece] = []
    if message.reasoning_content and keep_analysis:
        pieces += said("analysis", message.reasoning_content)
    if not message.tool_calls:
        return pieces + said("final", message.content)
    if message.content:
        pieces += said("commentary", message.content)
    for (_, name), call in zip(_calls(message), message.tool_calls, strict=True):
        arguments = call["function"].get("arguments", "{}")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        pieces += [START, "assistant", f" to={FUNCTIONS}{name}", CHANNEL, "commentary", " ", CONSTRAIN, "json"]
        pieces += [MESSAGE, text, CALL]
    return pieces


def _developer(instructions: str, tools: Sequence[Tool]) -> str:
    sections = ["# Instructions", instructions] if instructions else []
    if tools:
        declared = [_declaration(tool["function"]) for tool in tools]
        body = "\n\n".join(("namespace functions {", *declared, "} // namespace functions"))
        sections += ["# Tools", "## functions", body]
    return "\n\n".join(sections)


def _declaration(function: dict[str, Any]) -> str:
    """A function as a type."""
    parameters = function.get("parameters") or {}
    takes = f"_: {_type(parameters, '', 0)}" if parameters.get("properties") else ""
    return _comment(function.get("description"), "") + f"type {function['name']} = ({takes}) => any;"


def _comment(text: Any, indent: str) -> str:
    return "".join(f"{indent}// {line}\n" for line in text.splitlines()) if isinstance(text, str) else ""


def _type(schema: Any, indent: str, depth: int) -> str:
    """A JSON Schema as a TypeScript type; what has no short one is `any`."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return "any"
    for key in ("oneOf", "anyOf"):
        options = schema.get(key)
        if isinstance(options, list) and options:
            return " | ".join(dict.fromkeys(_type(option, indent, depth + 1) for option in options))
    kind = schema.get("type")
    if isinstance(kind, list):
        named = [_SCALARS.get(each, each) for each in kind if isinstance(each, str)]
        return " | ".join(dict.fromkeys(named)) or "any"
    choices = [each for each in schema.get("enum") or () if isinstance(each, str)]
    if kind == "string" and choices:
        found = " | ".join(f'"{each}"' for each in choices)
    elif kind == "object":
        found = _object(schema, indent, depth)
    elif kind == "array":
        items = schema.get("items")
        found = "Array<any>" if items is None else f"{_grouped(_type(items, indent, depth + 1), items)}[]"
    else:
        found = _SCALARS.get(str(kind), "any")
    return f"{found} | null" if schema.get("nullable") is True else found


def _grouped(text: str, schema: Any) -> str:
    """Alternatives in brackets, where they are an array's items: `a | b[]` would be another type."""
    alternatives = isinstance(schema, dict) and schema.get("type") != "object" and " | " in text
    return f"({text})" if alternatives else text


def _object(schema: dict[str, Any], indent: str, depth: int) -> str:
    properties = schema.get("properties")
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    lines = ["{\n"]
    for name, each in (properties if isinstance(properties, dict) else {}).items():
        facts = each if isinstance(each, dict) else {}
        if facts.get("title"):
            lines.append(_comment(facts["title"], indent) + f"{indent}//\n")
        lines.append(_comment(facts.get("description"), indent))
        examples = [each for each in facts.get("examples") or () if isinstance(each, str)]
        if examples:
            lines.append(f"{indent}// Examples:\n" + "".join(f'{indent}// - "{each}"\n' for each in examples))
        optional = "" if name in required else "?"
        default = f" // default: {_default(facts)}" if "default" in facts else ""
        lines.append(f"{indent}{name}{optional}: {_type(each, indent + '    ', depth + 1)},{default}\n")
    return "".join(lines) + f"{indent}}}"


def _default(schema: dict[str, Any]) -> str:
    default = schema["default"]
    if isinstance(default, str) and schema.get("enum"):
        return default
    return json.dumps(default, ensure_ascii=False)
