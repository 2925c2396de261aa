"""Calls in an answer's text, cut at every place: what comes out does not depend on where the pieces end."""

from __future__ import annotations

import json

import pytest

from engine.tool_calls import ToolCallParser, call_schema

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "</tool"}}</tool_call>'


def parsed(*pieces: str, whole: bool = False) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolCallParser(whole=whole)
    text, calls = "", []
    for piece in pieces:
        shown, found = parser.feed(piece)
        text, calls = text + shown, calls + found
    shown, found = parser.finish()
    return text + shown, [(call.name, json.loads(call.arguments)) for call in calls + found]


WEATHER, ADD = ("get_weather", {"city": "Oslo"}), ("add", {"a": 1, "b": "</tool"})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("no call at all\n", ("no call at all\n", [])),
        (CALL, ("", [WEATHER])),
        (f"{CALL}\n{OTHER}\n", ("", [WEATHER, ADD])),
        (f"I look.\n\n{CALL}", ("I look.", [WEATHER])),
        (f"{CALL}\nThat is it.", ("That is it.", [WEATHER])),
        (CALL.removesuffix("</tool_call>"), ("", [WEATHER])),
        ("a < b and <tool is no mark", ("a < b and <tool is no mark", [])),
        ("<tool_call>{broken</tool_call> rest", ("<tool_call>{broken</tool_call> rest", [])),
        ('<tool_call>{"name": 7}</tool_call>', ('<tool_call>{"name": 7}</tool_call>', [])),
        ("<tool_call>cut off", ("<tool_call>cut off", [])),
        ("", ("", [])),
    ],
)
def test_an_answer_cut_anywhere(answer: str, expected: tuple[str, list[tuple[str, object]]]) -> None:
    assert parsed(answer) == expected
    assert parsed(*answer) == expected
    for at in range(len(answer)):
        assert parsed(answer[:at], answer[at:]) == expected, at


def test_an_answer_that_is_one_call() -> None:
    assert parsed('{"name": "add", ', '"arguments": {"a": 1, "b": "</tool"}}', whole=True) == ("", [ADD])
    assert parsed('{"name": "ad', whole=True) == ('{"name": "ad', [])


def test_every_call_has_an_id_of_its_own() -> None:
    _, calls = ToolCallParser().feed(CALL + CALL)
    assert len({call.id for call in calls}) == 2


def test_the_schema_of_a_forced_call() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    assert [each["properties"]["name"] for each in call_schema(tools)["anyOf"]] == [{"const": "a"}, {"const": "b"}]
    assert call_schema(tools[:1])["additionalProperties"] is False
