"""Judges a JSON Schema before it is compiled: every keyword is one that is enforced, or is refused by name and path.

The dialect is 2020-12. llguidance enforces what passes here; its own judgement comes after (`engine.constraint`). The
limits keep native code within its stack and within milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from infsvc.errors import SchemaInvalid

MAX_BYTES = 64 * 1024
"""The longest schema, as compact JSON."""

MAX_DEPTH = 60
MAX_COUNT = 2000
"""The largest length, and the largest number of items or properties."""

_MAX_REFERENCES = 300
_MAX_PATTERN = 1000
# llguidance makes a state for each remainder: 10,000 take 0.1 s, a million 14 s.
_MAX_STEP = 10_000

_DIALECTS = ("2020-12", "2019-09", "draft-07", "draft-06")
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"}
)
"""Keywords that constrain nothing, by the standard."""

NOT_ENFORCED = frozenset(
    {
        "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "contains",
        "minContains", "maxContains", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
        "additionalItems", "contentEncoding", "contentMediaType", "contentSchema", "$anchor", "$dynamicRef",
        "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "id", "nullable",
    }
)  # fmt: skip
"""Keywords of JSON Schema and OpenAPI that cannot be kept while a text grows, or only of older drafts."""


def check(schema: dict[str, Any]) -> list[str]:
    """Judges a schema. Pure; tens of milliseconds for the longest.

    Returns:
        The JSON pointers of its subschemas, itself (`#`) first.

    Raises:
        SchemaInvalid: with the path of what is wrong.
    """
    _limits(schema)
    found = _Walk()
    found.schema(schema, "#")
    if len(found.references) > _MAX_REFERENCES:
        raise SchemaInvalid(f"more than {_MAX_REFERENCES} references", path="#")
    for target, path in found.references.items():
        if target not in found.schemas:
            raise SchemaInvalid(f"{target} is no schema in this document", path=f"{path}/$ref")
    endless = _endless(found)
    if endless is not None:
        raise SchemaInvalid("no finite value fits: it needs itself again", path=endless)
    return list(found.schemas)


def _limits(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            break
    else:
        raise SchemaInvalid(f"nested more than {MAX_DEPTH} deep", path="#")
    try:
        n_bytes = len(json.dumps(schema, separators=(",", ":"), ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise SchemaInvalid("a text holds half a character (a lone surrogate)", path="#") from None
    if n_bytes > MAX_BYTES:
        raise SchemaInvalid(f"longer than {MAX_BYTES // 1024} KiB", path="#")


class _Walk:
    """Visits every subschema once, by JSON pointer."""

    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {}
        self.references: dict[str, str] = {}
        self._step = 1
        self._keywords: dict[str, Callable[[Any, str], None]] = {
            "$schema": self._dialect,
            "$id": self._only_root,
            "$ref": self._ref,
            "$defs": self._schema_map,
            "definitions": self._schema_map,
            "type": self._type,
            "enum": self._enum,
            "const": lambda value, path: None,
            "anyOf": self._schema_list,
            "oneOf": self._schema_list,
            "allOf": self._schema_list,
            "properties": self._schema_map,
            "patternProperties": self._pattern_map,
            "additionalProperties": self.schema,
            "required": self._required,
            "minProperties": _count,
            "maxProperties": _count,
            "items": self._items,
            "prefixItems": self._schema_list,
            "minItems": _count,
            "maxItems": _count,
            "uniqueItems": self._unique,
            "minLength": _count,
            "maxLength": _count,
            "pattern": _pattern,
            "format": self._format,
            "minimum": _number,
            "maximum": _number,
            "exclusiveMinimum": _number,
            "exclusiveMaximum": _number,
            "multipleOf": self._multiple,
        }

    def schema(self, value: Any, path: str) -> None:
        self.schemas[path] = value
        if isinstance(value, bool):
            return
        if not isinstance(value, dict):
            raise SchemaInvalid("expected a schema: an object, true or false", path=path)
        for key, inner in value.items():
            where = f"{path}/{escaped(key)}"
            if key in ANNOTATIONS:
                continue
            judge = self._keywords.get(key)
            if judge is not None:
                judge(inner, where)
            elif key in NOT_ENFORCED:
                raise SchemaInvalid(f"the keyword {key} cannot be enforced while an answer grows", path=where)
            else:
                raise SchemaInvalid(f"there is no keyword {key!r} that could be enforced", path=where)

    def _schema_list(self, value: Any, path: str) -> None:
        if not isinstance(value, list) or not value:
            raise SchemaInvalid("expected a list of schemas", path=path)
        for i, each in enumerate(value):
            self.schema(each, f"{path}/{i}")

    def _schema_map(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise SchemaInvalid("expected an object of schemas", path=path)
        for name, each in value.items():
            self.schema(each, f"{path}/{escaped(name)}")

    def _pattern_map(self, value: Any, path: str) -> None:
        self._schema_map(value, path)
        for name in value:
            _pattern(name, f"{path}/{escaped(name)}")

    def _items(self, value: Any, path: str) -> None:
        if isinstance(value, list):
            raise SchemaInvalid("a list here is of an older draft: use prefixItems", path=path)
        self.schema(value, path)

    def _dialect(self, value: Any, path: str) -> None:
        self._only_root(value, path)
        if not any(name in value for name in _DIALECTS):
            raise SchemaInvalid(f"an unknown dialect; there are {', '.join(_DIALECTS)}", path=path)

    @staticmethod
    def _only_root(value: Any, path: str) -> None:
        if not isinstance(value, str):
            raise SchemaInvalid("expected a text", path=path)
        if path.count("/") > 1:
            raise SchemaInvalid("only the whole schema may have one", path=path)

    def _ref(self, value: Any, path: str) -> None:
        if not isinstance(value, str):
            raise SchemaInvalid("expected a text", path=path)
        if value != "#" and not value.startswith("#/"):
            raise SchemaInvalid("only references within this document, #/…, are followed", path=path)
        self.references.setdefault(value, path.removesuffix("/$ref"))

    @staticmethod
    def _type(value: Any, path: str) -> None:
        for each in value if isinstance(value, list) and value else [value]:
            if not isinstance(each, str) or each not in _TYPES:
                raise SchemaInvalid(f"a type is one of {', '.join(_TYPES)}", path=path)

    @staticmethod
    def _enum(value: Any, path: str) -> None:
        if not isinstance(value, list) or not value:
            raise SchemaInvalid("expected a list of values", path=path)

    @staticmethod
    def _required(value: Any, path: str) -> None:
        if not isinstance(value, list) or any(not isinstance(each, str) for each in value):
            raise SchemaInvalid("expected a list of names", path=path)
        if len(value) > MAX_COUNT:
            raise SchemaInvalid(f"more than {MAX_COUNT} names", path=path)

    @staticmethod
    def _unique(value: Any, path: str) -> None:
        if value is not False:
            raise SchemaInvalid("the keyword uniqueItems cannot be enforced while an answer grows", path=path)

    @staticmethod
    def _format(value: Any, path: str) -> None:
        if value not in _FORMATS:
            raise SchemaInvalid(f"the formats that are enforced are {', '.join(_FORMATS)}", path=path)

    def _multiple(self, value: Any, path: str) -> None:
        _number(value, path)
        if value <= 0:
            raise SchemaInvalid("expected a number above 0", path=path)
        digits = int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits)))
        # Two of them may meet in one value, which is then a multiple of both.
        self._step = math.lcm(self._step, digits)
        if self._step > _MAX_STEP:
            raise SchemaInvalid(
                f"too fine or too many steps: the digits of all multipleOf may have a common multiple of {_MAX_STEP}",
                path=path,
            )


def _count(value: Any, path: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0:
        raise SchemaInvalid("expected a whole number from 0", path=path)
    if value > MAX_COUNT:
        raise SchemaInvalid(f"more than {MAX_COUNT} is not served", path=path)


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise SchemaInvalid("expected a number", path=path)


def _pattern(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise SchemaInvalid("expected a regular expression", path=path)
    if len(value) > _MAX_PATTERN:
        raise SchemaInvalid(f"a regular expression of more than {_MAX_PATTERN} characters", path=path)


def escaped(name: str) -> str:
    """A key as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _endless(found: _Walk) -> str | None:
    """The path of a reference target that no finite value fits, or None."""
    ends: set[str] = set()
    targets = list(found.references)
    while True:
        new = {target for target in targets if target not in ends and _can_end(found.schemas[target], ends)}
        if not new:
            break
        ends |= new
    if _can_end(found.schemas["#"], ends):
        return None
    return next((target for target in targets if target not in ends), "#")


def _can_end(schema: Any, ends: set[str]) -> bool:
    """Whether some value without end is not all that fits, given the references that end."""
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema and schema["$ref"] not in ends:
        return False
    if not all(_can_end(each, ends) for each in schema.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if key in schema and not any(_can_end(each, ends) for each in schema[key]):
            return False
    types = schema.get("type", _TYPES)
    if isinstance(types, str):
        types = [types]
    return (
        "enum" in schema
        or "const" in schema
        or any(all(_can_end(each, ends) for each in _needed(schema, kind)) for kind in types)
    )


def _needed(schema: dict[str, Any], kind: str) -> Iterator[Any]:
    """The subschemas that every value of this type must have a value for."""
    if kind == "object":
        for name in schema.get("required", ()):
            yield schema.get("properties", {}).get(name, True)
    elif kind == "array":
        n = schema.get("minItems", 0)
        yield from schema.get("prefixItems", [])[:n]
        if n > len(schema.get("prefixItems", [])):
            yield schema.get("items", True)
