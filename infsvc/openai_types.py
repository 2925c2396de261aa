"""OpenAI's request bodies: chat and text completions. Native parameters are accepted beside OpenAI's.

A field that changes the meaning of a request and is not supported is refused by its name; inert ones pass.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from infsvc.errors import BadRequest, Unsupported, shown
from infsvc.types import Message, Params, Priority, ReasoningEffort, Wire

INERT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Fields that change nothing and pass."""

_REFUSED = {
    "functions": "offer tools instead",
    "function_call": "use tool_choice instead",
    "audio": "only text is served",
    "modalities": "only text is served",
    "prediction": "there is no speculation by prediction",
    "web_search_options": "there is no search",
    "suffix": "there is no fill-in-the-middle",
    "echo": "send it as native raw input",
    "verbosity": "say so in a message",
}
MAX_CHOICES = 8
UNBOUNDED = 2**31 - 1
"""`max_tokens` where none is asked for: the answer may go on to the end of the context."""


class StreamOptions(Wire):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Function(Wire):
    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextPart(Wire):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class SentMessage(Wire):
    """A message as clients send it, for the API's description: what `Message` is made from.

    Attributes:
        content: null only beside an assistant's tool calls.
        reasoning: the same as `reasoning_content`.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Tool(Wire):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class JsonSchemaFormat(Wire):
    model_config = ConfigDict(strict=True, protected_namespaces=())

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Wire):
    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @property
    def schema(self) -> dict[str, Any] | None:  # type: ignore[override]
        """What the answer must match, or None for anything."""
        if self.type == "json_object":
            return {"type": "object"}
        if self.type == "json_schema":
            if self.json_schema is None:
                raise BadRequest("response_format.json_schema is missing", param="response_format")
            return self.json_schema.schema_
        return None


class _Request(Wire):
    """What both shapes have."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    req_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    priority: Priority = 0

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=2048)]
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None

    @field_validator(
        "messages", mode="before",
        json_schema_input_type=Annotated[list[SentMessage], Field(min_length=1, max_length=2048)],
    )  # fmt: skip
    @classmethod
    def _messages(cls, value: Any) -> Any:
        return tuple(_message(each) for each in value) if isinstance(value, list) else value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        if not isinstance(value, dict) and value not in ("none", "auto", "required"):
            raise ValueError('none, auto, required, or {"type": "function", "function": {"name": one of the tools}}')
        return value

    @property
    def think(self) -> bool | None:
        """Whether the model is asked to think first; None leaves it to its template."""
        asked = self.chat_template_kwargs.get("enable_thinking")
        for key in self.chat_template_kwargs.keys() - {"enable_thinking"}:
            raise Unsupported(f"chat_template_kwargs.{key}", "only enable_thinking is")
        if asked is not None and not isinstance(asked, bool):
            raise BadRequest("enable_thinking: true or false", param="chat_template_kwargs.enable_thinking")
        if asked is None and self.reasoning_effort is not None:
            return self.reasoning_effort != "none"
        return asked

    @property
    def effort(self) -> ReasoningEffort | None:
        """How long to think, for models that know degrees; None leaves it to the worker file."""
        asked = self.reasoning_effort
        return "low" if asked == "minimal" else None if asked == "none" else asked

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """The tools of which one must be called; empty when the model may choose."""
        offered = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if isinstance(self.tool_choice, str):
            if self.tool_choice == "required" and not offered:
                raise BadRequest("tool_choice is required and there are no tools", param="tool_choice")
            return offered if self.tool_choice == "required" else []
        named = self.tool_choice.get("function")
        name = named.get("name") if isinstance(named, dict) else None
        found = [tool for tool in offered if tool["function"]["name"] == name]
        if self.tool_choice.get("type") != "function" or not found:
            raise BadRequest("tool_choice names none of the tools", param="tool_choice")
        return found


_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_MANY = Field(min_length=1, max_length=64)


class TextRequest(_Request):
    """`POST /v1/completions` with a `prompt`: a text, token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @field_validator(
        "prompt", mode="before",
        json_schema_input_type=_Text | Annotated[list[_Text], _MANY] | _Ids | Annotated[list[_Ids], _MANY],
    )  # fmt: skip
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        lists = value if isinstance(value, list) else [value]
        texts = all(isinstance(each, str) for each in lists)
        ids = isinstance(value, list) and (_are_ids(value) or all(_are_ids(each) for each in value))
        if not texts and not ids:
            raise ValueError("a text, token ids (whole numbers from 0), or a list of either")
        return value

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """One or more prompts, none of them empty."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]  # type: ignore[assignment]
        asked = [each if isinstance(each, str) else tuple(each) for each in given]  # type: ignore[arg-type]
        if not asked or not all(asked):
            raise BadRequest("the prompt is empty", param="prompt")
        if len(asked) * self.n > 64:
            raise BadRequest(f"{len(asked)} prompts with n {self.n}: at most 64 answers a request", param="prompt")
        return asked


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**31 for each in value)


def _message(value: Any) -> Any:
    """A message in this project's shape: text parts joined, nulls left out, the developer's as the system's."""
    if not isinstance(value, dict):
        return value
    message = {key: each for key, each in value.items() if each is not None}
    if message.get("role") == "developer":
        message["role"] = "system"
    for key in ("audio", "function_call", "refusal", "annotations"):
        if message.pop(key, None):
            raise Unsupported(f"messages.{key}", "only text and tool calls are")
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else None
                if isinstance(kind, str) and kind != "text":
                    raise Unsupported(f"messages.content.{shown(kind)}", "only text parts are")
                raise BadRequest(
                    'messages.content: a text, or a list of {"type": "text", "text": …}', param="messages.content"
                )
            texts.append(part["text"])
        message["content"] = "".join(texts)
    if message.get("role") == "assistant" and "content" not in message:
        message["content"] = ""
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = tuple(message["tool_calls"])
    reasoning = message.pop("reasoning", None)
    if isinstance(reasoning, str):
        message.setdefault("reasoning_content", reasoning)
    return message


def split(body: dict[str, Any], *, max_tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A body's own fields and its sampling parameters. Nulls stand for the default; inert fields are dropped.

    Args:
        max_tokens: what holds where the body names none.
    """
    own: dict[str, Any] = {}
    params: dict[str, Any] = {"max_tokens": max_tokens}
    for key, value in body.items():
        if value is None or key in INERT:
            continue
        if key in _REFUSED:
            raise Unsupported(key, _REFUSED[key])
        if key == "max_completion_tokens":
            params["max_tokens"] = value
        elif key in Params.model_fields:
            params[key] = value
        else:
            own[key] = value
    return own, params
