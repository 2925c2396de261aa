"""From messages to the text a model reads: the GGUF's own chat template, `prompt_template.json` beside the model as the
override, or harmony.

Templates come with downloaded files, so they run in Jinja's immutable sandbox and may only compute text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2.ext
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.harmony import HarmonyFormat, missing_marks, speaks_harmony
from infsvc.errors import BadRequest, LoadError
from infsvc.settings import WorkerSettings
from infsvc.types import Message, ReasoningEffort

Tool = dict[str, Any]
"""A tool as OpenAI's API describes it: `{"type": "function", "function": {name, description, parameters}}`."""

TEMPLATE_FILE = "prompt_template.json"
_MAX_RENDERED_CHARS = 16 * 2**20
_MAX_RANGE_ITEMS = 100_000


class PromptFormat(Protocol):
    """Renders messages; any thread."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None,
        tools: Sequence[Tool] = (),
        effort: ReasoningEffort | None = None,
    ) -> str:
        """The prompt's text, ending where the model's answer begins."""


class PrefixTemplate(BaseModel):
    """`prompt_template.json`: what stands before and after each turn."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = ""
    system_prefix: str | None = None
    system_suffix: str | None = None
    user_prefix: str
    user_suffix: str
    model_prefix: str
    model_suffix: str = ""

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None,
        tools: Sequence[Tool] = (),
        effort: ReasoningEffort | None = None,
    ) -> str:
        """Turns in order, then the model's prefix; without a system prefix a system message leads the first user's
        text.

        Raises:
            BadRequest: tools are offered, and such a template has no place for them.
        """
        if tools:
            raise BadRequest(f"{TEMPLATE_FILE} has no place for tools", param="tools")
        parts: list[str] = []
        lead = ""
        for message in messages:
            if message.role == "system":
                if self.system_prefix is None:
                    lead += message.content + "\n\n"
                else:
                    parts.append(self.system_prefix + message.content + (self.system_suffix or ""))
            elif message.role == "assistant":
                parts.append(self.model_prefix + message.content + self.model_suffix)
            else:
                parts.append(self.user_prefix + lead + message.content + self.user_suffix)
                lead = ""
        if lead:  # a system message that no user's follows
            parts.append(self.user_prefix + lead.removesuffix("\n\n") + self.user_suffix)
        return "".join(parts) + self.model_prefix


class JinjaTemplate:
    """A model's chat template, with the helpers that template authors expect."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        """Raises `LoadError` when the template does not compile."""
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        self._bos, self._eos = bos, eos
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # besides TemplateError, Python's own compiler refuses some
            raise LoadError(
                f"the model's chat template does not compile: {error}; put a {TEMPLATE_FILE} beside it"
            ) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None,
        tools: Sequence[Tool] = (),
        effort: ReasoningEffort | None = None,
    ) -> str:
        """Raises `BadRequest` when the template refuses the messages."""
        try:
            text = self._template.render(
                **({} if think is None else {"enable_thinking": think}),
                **({} if effort is None else {"reasoning_effort": effort}),
                messages=[_turn(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=list(tools) or None,
                range=_range(),
            )
        except _Refused as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from None
        except Exception as error:  # a template can raise whatever Python can
            said = str(error) or type(error).__name__
            raise BadRequest(f"the model's chat template fails on these messages: {said}", param="messages") from None
        if len(text) > _MAX_RENDERED_CHARS:
            raise BadRequest("the rendered prompt is too long", param="messages")
        return text


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates read it: the arguments of a call as an object where they are one."""
    turn = message.model_dump(exclude_none=True)
    for call in turn.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                arguments = json.loads(function["arguments"])
                function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return turn


class _Refused(Exception):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without the two operators that make gigabytes out of a few letters."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
            raise SecurityError(f"the operator {operator} is for numbers only, and ** for none")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the answer for training and means nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _range() -> Callable[..., range]:
    """A `range` for one rendering, whose items together are bounded: nested loops end."""
    left = _MAX_RANGE_ITEMS

    def bounded(*args: int) -> range:
        nonlocal left
        items = range(*args)
        left -= len(items)
        if left < 0:
            raise SecurityError(f"more than {_MAX_RANGE_ITEMS} turns of a loop")
        return items

    return bounded


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: keys in their order, nothing escaped for HTML; arguments as in
    transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def overridden(model_path: Path, settings: WorkerSettings | None) -> bool:
    """Whether `prompt_template.json` beside the file stands in for what the file says: always where there is one, but
    where MODEL_FORMAT asks for harmony. Blocks for a file's entry."""
    return (settings is None or settings.model_format != "harmony") and (model_path.parent / TEMPLATE_FILE).is_file()


def load_prompt_format(
    model_path: Path,
    chat_template: str | None,
    *,
    bos: str,
    eos: str,
    settings: WorkerSettings | None = None,
    vocabulary: Collection[str] = (),
) -> PromptFormat | None:
    """The format of a model: harmony where MODEL_FORMAT names it; else `prompt_template.json` beside its file, else
    harmony where the file is made for it, else its own chat template, else None (raw only).

    Args:
        vocabulary: the special tokens.

    Raises:
        LoadError: the override or the template is broken, or harmony is asked for and the vocabulary has not its
            tokens.
    """
    asked = settings.model_format if settings is not None else "template"
    if settings is not None and asked == "harmony":
        missing = missing_marks(vocabulary)
        if missing:
            raise LoadError(
                f"MODEL_FORMAT=harmony needs a vocabulary with {' '.join(missing)}, and {model_path} has not: "
                "use MODEL_FORMAT=auto"
            )
        return _harmony(settings)
    override = model_path.parent / TEMPLATE_FILE
    if overridden(model_path, settings):
        try:
            return PrefixTemplate.model_validate_json(override.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise LoadError(f"{override}: {where + ': ' if where else ''}{first['msg']}") from None
        except OSError as error:
            raise LoadError(f"{override} cannot be read: {error.strerror}") from None
    if settings is not None and speaks_harmony(asked, vocabulary=vocabulary, chat_template=chat_template):
        return _harmony(settings)
    if chat_template:
        return JinjaTemplate(chat_template, bos=bos, eos=eos)
    return None


def _harmony(settings: WorkerSettings) -> HarmonyFormat:
    return HarmonyFormat(
        identity=settings.harmony_model_identity,
        knowledge_cutoff=settings.harmony_knowledge_cutoff,
        effort=settings.harmony_reasoning_level,
        extract_final=settings.harmony_extract_final,
    )
