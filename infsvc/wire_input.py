"""What a client sent, as every door reads it: bytes to a JSON object, and pydantic's complaints as one sentence.

It stands apart from the wire types because it knows no shape, and from the doors because HTTP and NATS must refuse the
same mistakes in the same words. Strict: nothing is dropped, mended or guessed at.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, NoReturn

from pydantic import ValidationError

from infsvc.errors import BadRequest, shown

MAX_DEPTH = 128
"""Objects and lists inside one another. More is no request, and would be walked by code that recurses."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_PLAIN_WORDS = {
    "tuple_type": "Input should be a valid list",
    "dict_type": "Input should be an object",
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "extra_forbidden": "there is no such field",
}
"""Where pydantic's own words are Python's."""


def parse_object(data: bytes, *, what: str = "body") -> dict[str, Any]:
    """Bytes to a JSON object. Any thread.

    Args:
        what: how errors name it: the `body` of HTTP, the `message` of NATS.

    Raises:
        BadRequest: empty, not UTF-8, not JSON (with line and column), nested too deeply, a key that comes twice, half a
            surrogate pair, or not an object.
    """
    if not data.strip():
        raise BadRequest(f"the {what} is empty: send a JSON object")
    if data.startswith(codecs.BOM_UTF8):
        raise BadRequest(f"the {what} begins with a byte order mark (BOM): send UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the {what} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None

    def refuse_constant(name: str) -> NoReturn:
        raise BadRequest(f"the {what} is not JSON: {name} is no JSON number")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = shown(_twice(pairs))
            raise BadRequest(f"the {what} has {twice} twice in one object: which is meant?", param=twice)
        return made

    try:
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise BadRequest(f"the {what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep(what) from None
    except ValueError:
        # An integer of thousands of digits, which Python refuses to convert.
        raise BadRequest(f"the {what} holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the {what} is a JSON {_kind(value)}: send an object")
    if text.count("[") + text.count("{") > MAX_DEPTH or _HALF.search(text):
        _walk(value, what)
    return value


def _twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key comes twice")


def _walk(value: Any, what: str) -> None:
    """Looks at all of it for what JSON's grammar allows and nothing further down can carry."""
    open_values: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while open_values:
        path, each = open_values.pop()
        if len(path) > MAX_DEPTH:
            raise _too_deep(what)
        if isinstance(each, str):
            _check_whole(each, path, what)
        elif isinstance(each, list):
            open_values += [((*path, str(index)), item) for index, item in enumerate(each) if _is_open(item)]
        elif isinstance(each, dict):
            for key in each:
                _check_whole(key, path, what)
            open_values += [((*path, key), item) for key, item in each.items() if _is_open(item)]


def _is_open(value: Any) -> bool:
    return isinstance(value, str | list | dict)


def _check_whole(text: str, path: tuple[str, ...], what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        where = shown(".".join(path))
        raise BadRequest(
            f"{where or f'the {what}'}: {half} is half a character (a lone surrogate)", param=where or None
        ) from None


def _too_deep(what: str) -> BadRequest:
    return BadRequest(f"the {what} is nested too deeply: {MAX_DEPTH} objects and lists inside one another are allowed")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "number"


def complaint(error: ValidationError) -> BadRequest:
    """The first complaint of pydantic as one sentence, its dotted path as `param`."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = shown(".".join(str(part) for part in first["loc"] if part != "[key]"))
    message = _PLAIN_WORDS.get(first["type"]) or str(first["msg"]).removeprefix("Value error, ")
    message = message.replace("Tuple should", "List should").replace(" after validation", "")
    return BadRequest(f"{path}: {message}" if path else message, param=path or None)
