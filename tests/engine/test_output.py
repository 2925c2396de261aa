"""Text that a client sees must not depend on where tokens happened to be cut."""

from __future__ import annotations

import itertools

import pytest

from engine.output import ReasoningParser, TextAssembler


def cuts(text: str) -> list[list[str]]:
    """The text whole, in single characters, and cut in two and three at every place."""
    n = len(text)
    twos = [[text[:i], text[i:]] for i in range(n + 1)]
    threes = [[text[:i], text[i:j], text[j:]] for i, j in itertools.combinations(range(n + 1), 2)]
    return [[text], list(text), *twos, *threes]


def assemble(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    assembler, text, stopped = TextAssembler(stop), "", False
    for piece in pieces:
        part, stopped = assembler.feed(piece)
        text += part
        if stopped:
            break
    return text + assembler.finish(), stopped


@pytest.mark.parametrize("text", ["naïve", "日本語", "👩‍🚀🇩🇪", "a\u0301e\u0301"])
def test_utf8_cut_at_every_byte_comes_out_whole(text: str) -> None:
    data = text.encode()
    for i, j in itertools.combinations_with_replacement(range(len(data) + 1), 2):
        assembler = TextAssembler()
        shown = [assembler.feed(piece)[0] for piece in (data[:i], data[i:j], data[j:])]
        assert "\ufffd" not in "".join(shown)
        assert "".join(shown) + assembler.finish() == text


def test_an_unfinished_character_becomes_a_replacement_at_the_end_only() -> None:
    assembler = TextAssembler()
    assert assembler.feed(b"ok\xe6\x97") == ("ok", False)
    assert assembler.finish() == "\ufffd"


def test_invalid_bytes_are_replaced_and_the_rest_is_kept() -> None:
    assert assemble([b"a\xff", b"b"]) == ("a\ufffdb", False)


@pytest.mark.parametrize(
    ("stop", "text", "shown", "stopped"),
    [
        (("STOP",), "before STOP after", "before ", True),
        (("STOP",), "before STO after", "before STO after", False),
        (("STOP",), "before STO", "before STO", False),
        (("aab",), "aaaab", "aa", True),
        (("abab",), "abaabab!", "aba", True),
        (("\n\n",), "one\ntwo\n\nthree", "one\ntwo", True),
        (("。",), "日本語。東京", "日本語", True),
        (("x", "xyz"), "abxyz", "ab", True),
        (("xyz", "x"), "abxyz", "ab", True),
        # "c" is whole before "bcd" is.
        (("bcd", "c"), "abcd", "ab", True),
        # Both end at one place: the one that began first.
        (("cd", "bcd"), "abcd", "a", True),
        (("<|end|>", "<|eot|>"), "a<|e<|eot|>b", "a<|e", True),
    ],
)
def test_stop_strings_cut_at_every_place(stop: tuple[str, ...], text: str, shown: str, stopped: bool) -> None:
    for pieces in cuts(text):
        assert assemble([piece.encode() for piece in pieces], stop) == (shown, stopped), pieces
    data = text.encode()
    assert assemble([data[i : i + 1] for i in range(len(data))], stop) == (shown, stopped)


def test_nothing_of_a_stop_string_is_ever_shown_early() -> None:
    assembler = TextAssembler(("STOP",))
    assert [assembler.feed(piece)[0] for piece in (b"a", b"S", b"TO", b"x", b"ST")] == ["a", "", "", "STOx", ""]
    assert assembler.finish() == "ST"


def test_half_a_character_after_a_stop_string_is_dropped_with_it() -> None:
    assembler = TextAssembler(("END",))
    assert assembler.feed(b"textEND\xe6") == ("text", True)
    assert assembler.finish() == ""


def parse(pieces: list[str], *, enabled: bool = True, inside: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(enabled=enabled, inside=inside)
    parts = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    return "".join(part.text for part in parts), "".join(part.reasoning for part in parts)


@pytest.mark.parametrize(
    ("answer", "inside", "text", "reasoning"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", False, "because", "why"),
        ("\n <think>why</think>because", False, "because", "why"),
        ("<think>a\nb < c </thin d\n</think>x", False, "x", "a\nb < c </thin d"),
        ("<think></think>x", False, "x", ""),
        ("<think>\n\n</think>\n\nx", False, "x", ""),
        ("<think>never closed", False, "", "never closed"),
        ("<think>never closed\n</thi", False, "", "never closed\n</thi"),
        ("<think>", False, "", ""),
        ("<thi", False, "<thi", ""),
        ("  plain", False, "  plain", ""),
        ("a <think>b</think> c", False, "a <think>b</think> c", ""),
        ("", False, "", ""),
        ("why</think>x", True, "x", "why"),
        ("\nwhy\n</think>\n\nx</think>", True, "x</think>", "why"),
        ("why", True, "", "why"),
    ],
)
def test_reasoning_cut_at_every_place(answer: str, inside: bool, text: str, reasoning: str) -> None:
    for pieces in cuts(answer):
        assert parse(pieces, inside=inside) == (text, reasoning), pieces


def test_reasoning_is_shown_as_it_comes() -> None:
    parser = ReasoningParser(enabled=True)
    assert parser.feed("<think>one ").reasoning == "one "
    assert parser.feed("two").reasoning == "two"


def test_a_parser_that_is_not_enabled_changes_nothing() -> None:
    answer = "\n<think>why</think>\n\nx"
    for pieces in cuts(answer):
        assert parse(pieces, enabled=False, inside=True) == (answer, "")
