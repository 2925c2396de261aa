"""Calls in an answer's text, cut at every place: what comes out does not depend on where the pieces end."""

from __future__ import annotations

import json

import pytest

from engine.output import TextAssembler
from engine.tool_calls import HERMES, LLAMA, MISTRAL, ToolCallParser, ToolForm, call_schema, form_of
from tests.engine.test_output import cuts

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "</tool"}}</tool_call>'


def parsed(*pieces: str, whole: bool = False, form: ToolForm = HERMES) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolCallParser(form, whole=whole, names=("get_weather", "add"))
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


WEATHER_JSON = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
ADD_JSON = '{"name": "add", "arguments": {"a": 1, "b": "</tool"}}'
LLAMA_JSON = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("form", "answer", "expected"),
    [
        (MISTRAL, f"[TOOL_CALLS] [{WEATHER_JSON}]", ("", [WEATHER])),
        (MISTRAL, f"[TOOL_CALLS][{WEATHER_JSON}, {ADD_JSON}]", ("", [WEATHER, ADD])),
        (MISTRAL, f"I look.\n[TOOL_CALLS][{WEATHER_JSON}]\n", ("I look.", [WEATHER])),
        (MISTRAL, '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}', ("", [WEATHER])),
        (
            MISTRAL,
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]add[ARGS]{"a": 1, "b": "</tool"}',
            ("", [WEATHER, ADD]),
        ),
        (MISTRAL, '[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{"city": "Oslo"}', ("", [WEATHER])),
        # The first is whole, the second cut off.
        (
            MISTRAL,
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]add[ARGS]{"a',
            ('[TOOL_CALLS]add[ARGS]{"a', [WEATHER]),
        ),
        (MISTRAL, "[TOOL_CALLS]get_weather[ARGS][1]", ("[TOOL_CALLS]get_weather[ARGS][1]", [])),
        (MISTRAL, f"[TOOL_CALLS][{WEATHER_JSON}", (f"[TOOL_CALLS][{WEATHER_JSON}", [])),
        (MISTRAL, "[TOOL_CALLS]", ("[TOOL_CALLS]", [])),
        (MISTRAL, "an array [TOOL and no call", ("an array [TOOL and no call", [])),
        (LLAMA, LLAMA_JSON, ("", [WEATHER])),
        (LLAMA, "\n\n" + LLAMA_JSON.replace('{"n', '{ "n'), ("", [WEATHER])),
        (LLAMA, f"<|python_tag|>{LLAMA_JSON}", ("", [WEATHER])),
        (LLAMA, f"{LLAMA_JSON}; {ADD_JSON}", ("", [WEATHER, ADD])),
        (LLAMA, f'{{"type": "function", {LLAMA_JSON[1:]}', ("", [WEATHER])),
        (LLAMA, f'{{"type": "function", "function": {LLAMA_JSON}}}', ("", [WEATHER])),
        # JSON that is an answer, a tool that nobody offered, text behind, code for a tool that is not here.
        (LLAMA, '{"name": "Ann", "age": 3}', ('{"name": "Ann", "age": 3}', [])),
        (LLAMA, LLAMA_JSON.replace("get_", "guess_"), (LLAMA_JSON.replace("get_", "guess_"), [])),
        (LLAMA, LLAMA_JSON + " is a call", (LLAMA_JSON + " is a call", [])),
        (LLAMA, '<|python_tag|>search.call(q="x")', ('<|python_tag|>search.call(q="x")', [])),
        (LLAMA, LLAMA_JSON[:-3], (LLAMA_JSON[:-3], [])),
        (LLAMA, '{"age": 3}', ('{"age": 3}', [])),
        (LLAMA, "No call.", ("No call.", [])),
        (LLAMA, " ", (" ", [])),
        (
            HERMES,
            f"Så: <tool_call>{WEATHER_JSON.replace('Oslo', 'Ås')}</tool_call>",
            ("Så: ", [("get_weather", {"city": "Ås"})]),
        ),
        (MISTRAL, '日本[TOOL_CALLS]add[ARGS]{"a": "日本"}', ("日本", [("add", {"a": "日本"})])),
        (LLAMA, LLAMA_JSON.replace("Oslo", "👩‍🚀"), ("", [("get_weather", {"city": "👩‍🚀"})])),
        (HERMES, f"<tool_call>[{WEATHER_JSON}, {ADD_JSON}]</tool_call>", ("", [WEATHER, ADD])),
        (
            HERMES,
            f"<tool_call>{WEATHER_JSON} and so</tool_call>",
            (f"<tool_call>{WEATHER_JSON} and so</tool_call>", []),
        ),
    ],
)
def test_each_form_cut_anywhere(form: ToolForm, answer: str, expected: tuple[str, list[tuple[str, object]]]) -> None:
    assert parsed(answer, form=form) == expected
    for pieces in cuts(answer):
        assert parsed(*pieces, form=form) == expected, pieces
    data = answer.encode()
    for at in range(len(data)):
        assembler = TextAssembler()
        texts = [assembler.feed(each)[0] for each in (data[:at], data[at:])]
        assert parsed(*texts, assembler.finish(), form=form) == expected, at


def test_text_before_a_call_is_shown_as_it_comes() -> None:
    for form in (HERMES, MISTRAL, LLAMA):
        parser = ToolCallParser(form)
        assert parser.feed("I look")[0] == "I look"
        assert parser.feed(" at")[0] == " at"


def test_an_id_that_a_mistral_template_takes() -> None:
    for answer in (
        f"[TOOL_CALLS][{WEATHER_JSON}, {WEATHER_JSON}]",
        "[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]a[CALL_ID]x[ARGS]{}",
    ):
        parser = ToolCallParser(MISTRAL)
        parser.feed(answer)
        ids = {call.id for call in parser.finish()[1]}
        assert len(ids) == 2
        assert all(len(each) == 9 and each.isalnum() for each in ids)
    own = ToolCallParser(MISTRAL)
    own.feed("[TOOL_CALLS]a[CALL_ID]abcDEF123[ARGS]{}")
    assert own.finish()[1][0].id == "abcDEF123"


@pytest.mark.parametrize(
    ("template", "form", "evidence"),
    [
        ("tools <tool_call>", HERMES, "<tool_call>"),
        ("tools [TOOL_CALLS]", MISTRAL, "[TOOL_CALLS]"),
        ("tools <|python_tag|>", LLAMA, "<|python_tag|>"),
        (
            'Respond in the format {"name": function name, "parameters": dictionary of',
            LLAMA,
            '"parameters": dictionary',
        ),
    ],
)
def test_the_form_that_a_template_teaches(template: str, form: ToolForm, evidence: str) -> None:
    assert form_of(template) == (form, evidence)


@pytest.mark.parametrize(
    "template", ["tools", "<tool_call>\n<function=f>", "<tool_call>f\n<arg_key>", "<|python_tag|> <function=f>"]
)
def test_forms_that_are_not_read_are_not_claimed(template: str) -> None:
    assert form_of(template) is None
