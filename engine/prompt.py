"""From messages to the text a model reads: the GGUF's own chat template, or `prompt_template.json` beside the model as the override.

Templates come with downloaded files, so they run in Jinja's immutable sandbox and may only compute text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError

from infsvc.errors import BadRequest, LoadError
from infsvc.types import Message

TEMPLATE_FILE = "prompt_template.json"
_MAX_RENDERED_CHARS = 16 * 2**20


class PromptFormat(Protocol):
    """Renders messages; any thread."""

    def render(self, messages: Sequence[Message], *, think: bool) -> str:
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

    def render(self, messages: Sequence[Message], *, think: bool) -> str:
        """Turns in order, then the model's prefix; without a system prefix a system message leads the first user's text."""
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
        return "".join(parts) + self.model_prefix


class JinjaTemplate:
    """A model's chat template, with the helpers that template authors expect."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        """Raises `LoadError` when the template does not compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        self._bos, self._eos = bos, eos
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise LoadError(
                f"the model's chat template does not compile: {error}; put a {TEMPLATE_FILE} beside it"
            ) from None

    def render(self, messages: Sequence[Message], *, think: bool) -> str:
        """Raises `BadRequest` when the template refuses the messages."""
        try:
            text = self._template.render(
                messages=[message.model_dump(exclude_none=True) for message in messages],
                add_generation_prompt=True,
                enable_thinking=think,
                bos_token=self._bos,
                eos_token=self._eos,
                tools=None,
            )
        except _Refused as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from None
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BadRequest(f"the model's chat template fails on these messages: {error}", param="messages") from None
        if len(text) > _MAX_RENDERED_CHARS:
            raise BadRequest("the rendered prompt is too long", param="messages")
        return text


class _Refused(Exception):
    pass


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    """JSON as models were trained on it: keys in their order, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load_prompt_format(model_path: Path, chat_template: str | None, *, bos: str, eos: str) -> PromptFormat | None:
    """The format of a model: `prompt_template.json` beside its file, else its own chat template, else None (raw only).

    Raises:
        LoadError: the override or the template is broken.
    """
    override = model_path.parent / TEMPLATE_FILE
    if override.is_file():
        try:
            return PrefixTemplate.model_validate_json(override.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise LoadError(f"{override}: {where + ': ' if where else ''}{first['msg']}") from None
        except OSError as error:
            raise LoadError(f"{override} cannot be read: {error.strerror}") from None
    if chat_template:
        return JinjaTemplate(chat_template, bos=bos, eos=eos)
    return None
