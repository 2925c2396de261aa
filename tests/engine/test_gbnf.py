"""A grammar's text is read as llama.cpp reads it, what is wrong is told by line and column, and the notation made of it
has the same language."""

from __future__ import annotations

import itertools
import random

import pytest

from engine import gbnf, lexemes
from engine.constraint import Constraints
from engine.gbnf import Chars, Choice, Expr, Ref, Repeat, Sequence
from infsvc.errors import GrammarInvalid

A, B = Chars(((97, 97),)), Chars(((98, 98),))
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""

constraints = Constraints(lambda: [*(bytes([byte]) for byte in range(256)), b""], [256])


def accepts(grammar: str, text: str) -> bool:
    """Whether a text is whole in the grammar's language: an answer could end after it."""
    matcher = constraints.grammar(grammar)
    return all(matcher.take(byte) for byte in text.encode()) and (matcher.finished or matcher.take(256))


def test_what_the_notation_means() -> None:
    rules = gbnf.parse(
        '# a comment\nroot ::= "ab" x* | # another\n  ("b"{2,3} |\n "")\n\nx::=[^a-c]+ . y-1\ny-1 ::= "\\x61"?'
    )
    assert list(rules) == ["root", "x", "y-1"]
    assert rules["root"] == Choice(
        (
            Sequence((Sequence((A, B)), Repeat(Ref("x"), 0, None))),
            Choice((Repeat(B, 2, 3), Sequence(()))),
        )
    )
    assert rules["y-1"] == Repeat(A, 0, 1)
    assert rules["x"] == Sequence(
        (
            Repeat(Chars(((0, 96), (100, 0xD7FF), (0xE000, 0x10FFFF))), 1, None),
            Chars(((0, 0xD7FF), (0xE000, 0x10FFFF))),
            Ref("y-1"),
        )
    )


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", None, "no rule named root"),
        ('x ::= "a"', None, "no rule named root"),
        ('root = "a"', (1, 6), "expected ::="),
        ("root ::= y", (1, 10), "no rule named y"),
        ('root ::= "a"\nroot ::= "b"', (2, 1), "defined twice"),
        ('root ::= object\nobject ::= "{" ws "}" ...', (2, 16), "no rule named ws"),
        ('root ::= "a', (1, 10), "never closed"),
        ("root ::= [a", (1, 10), "never closed"),
        ('root ::= ("a"', (1, 10), "never closed"),
        ('root ::= "a")', (1, 13), "expected the end of the line"),
        ("root ::= [z-a]", (1, 11), "ends before it begins"),
        ("root ::= []", (1, 10), "no character"),
        ("root ::= [^\\x00-\\U0010FFFF]", (1, 10), "no character"),
        ('root ::= "\\q"', (1, 11), "an escape"),
        ('root ::= "\\x4"', (1, 11), "an escape"),
        ('root ::= "a\\', (1, 12), "an escape"),
        ('root ::= "\\uD800"', (1, 11), "no character"),
        ('root ::= "\\UFFFFFFFF"', (1, 11), "no character"),
        ('root ::= "\ud800"', (1, 11), "no character"),
        ("root ::= * ", (1, 10), "nothing stands before"),
        ('root ::= "a"*+', (1, 14), "needs parentheses"),
        ('root ::= "a"{3,2}', (1, 13), "from 3 to 2"),
        ('root ::= "a"{x}', (1, 14), "expected a number"),
        ('root ::= "a"{1', (1, 15), "expected }"),
        ("root ::= <think>", (1, 10), "tokens"),
        ("root ::= !<[3]>", (1, 10), "tokens"),
        ("root ::= root", (1, 1), "never ends"),
        ('root ::= "a" | x\nx ::= "b" x', (2, 1), "never ends"),
        ('root ::= x | "a"\n\nx ::= y "b" \ny ::= (x)+', (3, 1), "never ends"),
        ("é ::= x", (1, 1), "a rule's name"),
    ],
)
def test_each_fault_says_where(text: str, place: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(GrammarInvalid, match=message.replace("+", "\\+")) as caught:
        gbnf.parse(text)
    assert (caught.value.line, caught.value.column) == (place or (None, None))
    if place:
        assert f"line {place[0]}, column {place[1]}" in str(caught.value)
        assert caught.value.native("r") | {"line": place[0], "column": place[1]} == caught.value.native("r")
    assert (caught.value.status, caught.value.code) == (422, "grammar_invalid")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested more than 60 deep"),
        ('root ::= "a"\n' + "\n".join(f'r{i} ::= "a"' for i in range(100_000)), "longer than 64 KiB"),
        ('root ::= "a"\n' + "\n".join(f'r{i} ::= "a"' for i in range(3000)), "more than 1000 rules"),
        ("root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(3000)), "more than 1000 rules"),
        ('root ::= "a"{20000}', "more than 2000 repetitions"),
        ('root ::= "a"{0,99999999999999999999}', "more than 2000 repetitions"),
        ('root ::= "' + "é" * 33_000 + '"', "longer than 64 KiB"),
    ],
    ids=["parentheses", "100k rules", "rules", "chain", "repeat", "huge", "bytes"],
)
def test_what_would_end_the_process_is_refused(text: str, message: str) -> None:
    with pytest.raises(GrammarInvalid, match=message):
        constraints.grammar(text)


def test_the_deepest_that_is_allowed_compiles() -> None:
    chain = "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(998)) + '\nr998 ::= "a" | "(" root ")"'
    assert accepts(chain, "((a))")
    assert accepts("root ::= " + "(" * 60 + '"a"' + ")" * 60 + "{2}", "aa")
    assert accepts('root ::= ((("a" | "b" root){0,200}){0,200}){0,200}', "ababba")
    assert accepts("root ::= ((([ab]){200}){200}){200} | [c]", "c")


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        # What a greedy lexer would lose.
        ('root ::= ("a" | "ab") x\nx ::= "bc" | "(" x ")"', ("abc", "abbc", "a(bc)"), ("b", "ab", "abcc")),
        ('root ::= [a-z]+ root "b" | "x"', ("x", "axb", "zzxb", "abaxbb"), ("ab", "xb")),
        ('root ::= "in" n | "int" n | [a-z]+ "!"\nn ::= "" | "t" n', ("in", "intt", "int!", "inx!"), ("inx",)),
        ('root ::= "yes" | "no"', ("yes", "no"), ("", "ye", "yesno", "Yes")),
        ('root ::= ""', ("",), ("a",)),
        ('root ::= [^\\n]* "\\n"', ("\n", "é€😀\n"), ("x", "\n\n")),
        ("root ::= .", ("\n", "😀"), ("", "ab")),
        ('root ::= ("a"{2,3} ",")* | "(" root ")"', ("", "aa,aaa,", "((aa,))"), ("a,", "aaaa,")),
        (
            JSON,
            ('{"a": [1, -2.5e3, "x\\n\\u00e9 é"], "b": {"c": null}}', "{}"),
            ("[]", '{"a":}', '{"a":tru}', '{"a":"\x01"}'),
        ),
    ],
)
def test_the_language_is_the_grammars(text: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    assert [each for each in good if not accepts(text, each)] == []
    assert [each for each in bad if accepts(text, each)] == []


def test_parts_are_joined_where_that_is_safe() -> None:
    """A JSON string letter by letter would cost milliseconds a mask."""
    lark = lexemes.to_lark(gbnf.parse(JSON))
    strings = [line for line in lark.splitlines() if line.startswith("T") and "\\x{22}]/" in line]
    assert len(strings) == 1
    assert lexemes.to_lark(gbnf.parse('root ::= "a" [b-c]*')).endswith(
        "start: T\nT: /[\\x{61}](?:[\\x{62}-\\x{63}])*/\n"
    )


def test_random_grammars_keep_their_language() -> None:
    """Against all texts that the rules yield by substitution, up to a length."""
    pick = random.Random(5)
    longest = 4
    texts = ["".join(each) for n in range(longest + 1) for each in itertools.product("ab", repeat=n)]
    n_checked = n_joined = 0
    while n_checked < 150:
        text = "\n".join(f"{name} ::= {_some(pick, 3)}" for name in ("root", "x", "y"))
        try:
            rules = gbnf.parse(text)
        except GrammarInvalid:
            continue
        n_checked += 1
        n_joined += "\nT" in lexemes.to_lark(rules)
        language = _language(rules, longest)
        assert {each for each in texts if accepts(text, each)} == language, text
    assert n_joined > 10


def _some(pick: random.Random, depth: int) -> str:
    kind = pick.random()
    if depth == 0 or kind < 0.25:
        return pick.choice(['"a"', '"b"', '"ab"', "[ab]", '"ba"', '""', "x", "y", "root"])
    if kind < 0.6:
        return " ".join(_some(pick, depth - 1) for _ in range(pick.randint(1, 3)))
    if kind < 0.85:
        return "(" + " | ".join(_some(pick, depth - 1) for _ in range(pick.randint(2, 3))) + ")"
    return "(" + _some(pick, depth - 1) + ")" + pick.choice(["*", "+", "?", "{2}", "{1,2}", "{0,3}", "{1,}"])


def _language(rules: dict[str, Expr], longest: int) -> set[str]:
    known: dict[str, set[str]] = {name: set() for name in rules}

    def joined(left: set[str], right: set[str]) -> set[str]:
        return {a + b for a in left for b in right if len(a) + len(b) <= longest}

    def texts(expr: Expr) -> set[str]:
        match expr:
            case Chars(ranges):
                return {chr(code) for low, high in ranges for code in range(low, high + 1)}
            case Ref(name):
                return known[name]
            case Choice(options):
                return set().union(*(texts(option) for option in options))
            case Sequence(items):
                found = {""}
                for item in items:
                    found = joined(found, texts(item))
                return found
            case Repeat(item, least, most):
                once, found, total = texts(item), {""}, set[str]()
                for n in range((longest + least if most is None else most) + 1):
                    total |= found if n >= least else set()
                    found = joined(found, once)
                return total

    while True:
        new = {name: texts(expr) for name, expr in rules.items()}
        if new == known:
            return known["root"]
        known = new
