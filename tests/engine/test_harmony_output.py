"""Channels told apart while tokens come: what comes out does not depend on where the pieces end."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from engine.harmony_output import HarmonyParser
from engine.output import TextAssembler
from tests.engine.test_output import cuts

Sorted = tuple[str, str, list[tuple[str, str]]]

THOUGHT = "<|channel|>analysis<|message|>Need the weather.<|end|>"
CALL_HEAD = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
CALL = CALL_HEAD + '{"city": "Oslo"}'
AGAIN = "<|start|>assistant"
WEATHER = ("get_weather", '{"city": "Oslo"}')


def parsed(
    pieces: Iterable[str], *, final: bool = False, calls: bool = True, verbatim: bool = False
) -> tuple[Sorted, bool]:
    parser = HarmonyParser(final=final, calls=calls, verbatim=verbatim)
    parts = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    found = [(call.name, call.arguments) for part in parts for call in part.calls]
    return ("".join(part.text for part in parts), "".join(part.reasoning for part in parts), found), parser.ended


SAMPLES: list[tuple[str, Sorted]] = [
    (
        '<|channel|>analysis<|message|>User asks: "2 + 2?".<|end|><|start|>assistant<|channel|>final<|message|>4.',
        ("4.", 'User asks: "2 + 2?".', []),
    ),
    (THOUGHT + AGAIN + CALL, ("", "Need the weather.", [WEATHER])),
    (THOUGHT + AGAIN + CALL + "<|call|>", ("", "Need the weather.", [WEATHER])),
    # The recipient with the role, the type without its mark.
    (
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        ("", "", [WEATHER]),
    ),
    ('<|channel|>analysis to=functions.get_weather<|message|>{"city": "Oslo"}', ("", "", [WEATHER])),
    ('<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{"city": "Oslo"}', ("", "", [WEATHER])),
    (CALL + "<|end|>" + AGAIN + CALL, ("", "", [WEATHER, WEATHER])),
    # What is said to everybody before a call.
    ("<|channel|>commentary<|message|>I look.<|end|>" + AGAIN + CALL, ("I look.", "", [WEATHER])),
    (
        "<|channel|>commentary<|message|>First.<|end|>" + AGAIN + "<|channel|>final<|message|>Then.",
        ("First.\n\nThen.", "", []),
    ),
    (THOUGHT + AGAIN + "<|channel|>analysis<|message|>More.", ("", "Need the weather.\n\nMore.", [])),
    ("<|channel|>final <|constrain|>json<|message|>{}", ("{}", "", [])),
    # A stray beginning, a header without a channel, a message that another one ends.
    (
        "<|channel|>commentary to=assistant<|channel|>analysis<|message|>Hm.<|end|>" + AGAIN + "<|message|>Yes.",
        ("Yes.", "Hm.", []),
    ),
    ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Yes.", ("Yes.", "Hm.", [])),
    ("<|channel|>analysis<|message|>Hm." + AGAIN + "<|channel|>final<|message|>Yes.", ("Yes.", "Hm.", [])),
    # Nobody here answers these: they come back as they were written.
    (
        "<|channel|>analysis to=python code<|message|>1 + 1",
        ("<|channel|>analysis to=python code<|message|>1 + 1", "", []),
    ),
    (CALL_HEAD + '{"city": "Os', (CALL_HEAD + '{"city": "Os', "", [])),
    (CALL_HEAD + "Oslo<|end|>", (CALL_HEAD + "Oslo", "", [])),
    (CALL_HEAD + "[1]", (CALL_HEAD + "[1]", "", [])),
    # The final message is the last.
    ("<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>And?", ("Yes.", "", [])),
    ("<|channel|>final<|message|>Yes.<|return|>No.", ("Yes.", "", [])),
    # No harmony at all, and less than a header.
    ("Yes, a < b <| c and to=x.", ("Yes, a < b <| c and to=x.", "", [])),
    ("  plain\n<|end|>more", ("  plain\n", "", [])),
    (THOUGHT + "Plainly.", ("Plainly.", "Need the weather.", [])),
    (THOUGHT + AGAIN, ("", "Need the weather.", [])),
    (THOUGHT + AGAIN + "<|channel|>fin", ("", "Need the weather.", [])),
    ("t", ("t", "", [])),
    ("<|channel|>" + "x" * 600 + "<|message|>y", ("<|channel|>" + "x" * 600 + "<|message|>y", "", [])),
    ("to=" + "x" * 600 + "<|message|>y", ("to=" + "x" * 600 + "<|message|>y", "", [])),
    ("<|channel|>final<|message|>naïve 日本 👩‍🚀", ("naïve 日本 👩‍🚀", "", [])),
    ("", ("", "", [])),
]


@pytest.mark.parametrize(("answer", "expected"), SAMPLES)
def test_an_answer_cut_at_every_place(answer: str, expected: Sorted) -> None:
    whole = parsed([answer])
    assert whole[0] == expected
    few = len(answer) < 90
    for pieces in cuts(answer) if few else ([answer[:i], answer[i:]] for i in range(len(answer))):
        assert parsed(pieces) == whole, pieces
    assert parsed(answer) == whole
    data = answer.encode()
    for at in range(len(data)):
        assembler = TextAssembler()
        texts = [assembler.feed(each)[0] for each in (data[:at], data[at:])]
        assert parsed([*texts, assembler.finish()]) == whole, at


def test_answers_of_any_messages_cut_at_random() -> None:
    chance = random.Random(7)
    parts = [
        THOUGHT,
        AGAIN,
        CALL,
        CALL_HEAD,
        "<|end|>",
        "<|call|>",
        "<|message|>",
        "<|channel|>final<|message|>",
        "<",
        "x",
        " to=",
        "<|start|>" + "h" * 505,
        " " * 520,
    ]
    for _ in range(200):
        answer = "".join(chance.choice(parts) for _ in range(chance.randint(1, 7)))
        places = sorted(chance.choices(range(len(answer) + 1), k=5))
        pieces = [answer[i:j] for i, j in zip([0, *places], [*places, len(answer)], strict=True)]
        assert parsed(pieces) == parsed([answer]) == parsed(answer), answer
        assert parsed(pieces, verbatim=True) == parsed(answer, verbatim=True), answer


def test_it_streams() -> None:
    parser = HarmonyParser(calls=True)
    assert parser.feed("<|channel|>analysis<|message|>").reasoning == ""
    assert parser.feed("Hm").reasoning == "Hm"
    assert parser.feed(", yes<|en").reasoning == ", yes"
    assert parser.feed("d|><|start|>assistant<|channel|>final<|message|>4").text == "4"
    assert not parser.ended
    assert parser.feed(".<|end|>").text == "."
    assert parser.ended


def test_without_tools_a_call_is_text() -> None:
    assert parsed([CALL], calls=False)[0] == (CALL, "", [])


def test_a_final_channel_that_the_prompt_opened() -> None:
    assert parsed(["{}"], final=True)[0] == ("{}", "", [])
    assert parsed("to=5<|end|>x", final=True) == (("to=5", "", []), True)


def test_verbatim_is_the_whole_answer_and_its_calls() -> None:
    answer = THOUGHT + AGAIN + CALL
    for pieces in ([answer], list(answer)):
        assert parsed(pieces, verbatim=True)[0] == (answer, "", [WEATHER])


def test_every_call_has_an_id_of_its_own() -> None:
    calls = HarmonyParser(calls=True).feed(f"{CALL}<|end|>{AGAIN}{CALL}<|end|>").calls
    assert len({call.id for call in calls}) == 2
