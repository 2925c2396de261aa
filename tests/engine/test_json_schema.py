"""Every keyword of a JSON Schema is enforced or refused by name; a validator that shares no code with the engine says
whether what comes out fits."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from engine import json_schema
from engine.constraint import Constraints
from infsvc.errors import SchemaInvalid

constraints = Constraints(lambda: [*(bytes([byte]) for byte in range(256)), b""], [256])

EMPTY_RANGE = {"type": "integer", "minimum": 5, "maximum": 3}
TREE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"], "additionalProperties": False}


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(n):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "path", "message"),
    [
        *(({name: {}}, f"#/{name}", f"the keyword {name} cannot") for name in sorted(json_schema.NOT_ENFORCED)),
        ({"uniqueItems": True}, "#/uniqueItems", "uniqueItems cannot"),
        ({"surprise": 1}, "#/surprise", "no keyword 'surprise'"),
        ({"x-guidance": {"lenient": True}}, "#/x-guidance", "no keyword"),
        ({"properties": {"a/b": {"items": {"not": {}}}}}, "#/properties/a~1b/items/not", "not cannot"),
        ({"anyOf": [{}, {"allOf": [{"if": {}}]}]}, "#/anyOf/1/allOf/0/if", "if cannot"),
        ({"type": "strin"}, "#/type", "a type is one of"),
        ({"type": ["string", 3]}, "#/type", "a type is one of"),
        ({"type": []}, "#/type", "a type is one of"),
        ({"enum": []}, "#/enum", "list of values"),
        ({"enum": "a"}, "#/enum", "list of values"),
        ({"anyOf": []}, "#/anyOf", "list of schemas"),
        ({"properties": []}, "#/properties", "object of schemas"),
        ({"properties": {"a": 3}}, "#/properties/a", "expected a schema"),
        ({"items": [{}]}, "#/items", "prefixItems"),
        ({"required": "a"}, "#/required", "list of names"),
        ({"minLength": -1}, "#/minLength", "whole number"),
        ({"minLength": True}, "#/minLength", "whole number"),
        ({"maxLength": 1.5}, "#/maxLength", "whole number"),
        ({"maxLength": 20_000}, "#/maxLength", "more than 2000"),
        ({"maxItems": 20_000}, "#/maxItems", "more than 2000"),
        ({"minItems": 20_000}, "#/minItems", "more than 2000"),
        ({"maxProperties": 20_000}, "#/maxProperties", "more than 2000"),
        ({"exclusiveMinimum": True}, "#/exclusiveMinimum", "expected a number"),
        ({"minimum": 10**400}, "#/minimum", "expected a number"),
        ({"multipleOf": 0}, "#/multipleOf", "above 0"),
        ({"multipleOf": 9_999_991}, "#/multipleOf", "too many steps"),
        ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "#/allOf/1/multipleOf", "too many steps"),
        ({"format": "regex"}, "#/format", "the formats that are enforced"),
        ({"pattern": 3}, "#/pattern", "regular expression"),
        ({"pattern": "a" * 1001}, "#/pattern", "more than 1000"),
        ({"pattern": "("}, "#", "unclosed group"),
        ({"properties": {"a": {"pattern": "a(?=b)"}}}, "#/properties/a", "look-ahead"),
        ({"type": "array", "items": EMPTY_RANGE, "minItems": 1}, "#/items", "greater than"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}}, "#/properties/a", "use anyOf"),
        ({"required": ["a"], "additionalProperties": False, "type": "object"}, "#", "'a' is unsatisfiable"),
        ({"$ref": "http://elsewhere/x"}, "#/$ref", "within this document"),
        ({"$ref": "#/$defs/x"}, "#/$ref", "no schema in this document"),
        ({"const": {"a": 1}, "properties": {"b": {"$ref": "#/const"}}}, "#/properties/b/$ref", "no schema"),
        ({"$ref": "#"}, "#", "no finite value"),
        ({"anyOf": [{"$ref": "#"}]}, "#", "no finite value"),
        (TREE, "#", "no finite value"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "#/$schema", "unknown dialect"),
        ({"items": {"$id": "x"}}, "#/items/$id", "only the whole schema"),
        ({"const": "\ud800"}, "#", "half a character"),
        (nested(70), "#", "nested more than 60"),
        ({"enum": ["x" * 70_000]}, "#", "longer than 64 KiB"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2}, "#", "min/maxProperties"),
    ],
)  # fmt: skip
def test_what_is_not_enforced_is_refused_by_path(schema: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(SchemaInvalid) as caught:
        constraints.schema(schema)
    assert (caught.value.path, message in str(caught.value)) == (path, True), str(caught.value)
    assert caught.value.native("r")["path"] == path
    assert (caught.value.status, caught.value.code) == (422, "schema_invalid")
    assert "\n" not in str(caught.value)


FITS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"enum": ["red", 7, None, {"deep": [True]}]},
    {"const": {"a": ["b", 1.5]}},
    {"type": ["integer", "null"], "minimum": -3, "maximum": 40},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2},
    {"type": "integer", "multipleOf": 7, "minimum": 20, "maximum": 60},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[a-c]{2,4}-\\d$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": "x"}], "items": False, "minItems": 2},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "object", "additionalProperties": {"enum": [1, 2]}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "null"}}, "additionalProperties": False},
    {"oneOf": [{"type": "null"}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:tree",
        "title": "a tree",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"enum": [1, 2]},
                    "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "left"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"n": {"type": "integer"}},
     "$ref": "#/definitions/n", "minimum": 5, "maximum": 6},
]  # fmt: skip


@pytest.mark.parametrize("schema", FITS, ids=lambda schema: json.dumps(schema)[:40])
def test_whatever_is_drawn_fits(schema: dict[str, Any]) -> None:
    """Letter by letter at random, as a model that knows nothing."""
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    pick = random.Random(3)
    for _ in range(25):
        matcher, text = constraints.schema(schema), b""
        while not matcher.finished and len(text) < 400:
            token = int(pick.choice(matcher.allowed()))
            assert matcher.take(token)
            if token == 256:
                break
            text += bytes([token])
        else:
            if not matcher.finished:
                continue
        judge.validate(json.loads(text))


@pytest.mark.parametrize("keyword", sorted(json_schema.ANNOTATIONS))
def test_annotations_pass(keyword: str) -> None:
    constraints.schema({"type": "string", keyword: "x"})


def test_text_that_does_not_fit_cannot_be_written() -> None:
    def fits(schema: dict[str, Any], text: str) -> bool:
        matcher = constraints.schema(schema)
        return all(matcher.take(byte) for byte in text.encode()) and (matcher.finished or matcher.take(256))

    person = FITS[12]
    assert fits(person, '{"name": "x", "age": 3}')
    assert fits(person, '{\n  "name":"x",\n  "age":3\n}')
    for bad in (
        '{"name":"x"}',
        '{"name":"x","age":-1}',
        '{"name":"x","age":3,"z":1}',
        '{"name":"x",,',
        '{"name":"123456789"',
    ):
        assert not fits(person, bad)
    assert not fits(person, '{   "name"')
    assert not fits({"type": "string", "pattern": "^\\d$"}, '"٣"')
