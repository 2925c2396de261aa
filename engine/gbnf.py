"""GBNF text → rules: the syntax of llama.cpp's grammars (grammars/README.md there), read strictly.

Whatever is wrong is a `GrammarInvalid` with line and column. A grammar that passes here ends: each rule can be
completed, and nothing in it is deeper or longer than the limits below, on which native code would overflow its stack.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from infsvc.errors import GrammarInvalid

MAX_BYTES = 64 * 1024
"""The longest grammar text, in UTF-8."""

MAX_RULES = 1000
MAX_DEPTH = 60
"""How deep parentheses may nest."""

MAX_REPEAT = 2000
"""The largest number in `{m,n}`; llama.cpp's own limit."""

_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}

Ranges = tuple[tuple[int, int], ...]
"""Code points as sorted ranges that do not touch, both ends included."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Sequence:
    """One after the other; none is the empty text."""

    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several."""

    options: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`item` from `least` to `most` times; None for any number."""

    item: Expr
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Ref:
    """Another rule, by name."""

    name: str


Expr = Chars | Sequence | Choice | Repeat | Ref

EMPTY = Sequence(())


def parse(text: str) -> dict[str, Expr]:
    """Reads a grammar. Pure; milliseconds for the longest.

    Returns:
        The rules by name, `root` among them, in the order of the text.

    Raises:
        GrammarInvalid: with line and column.
    """
    if len(text) > MAX_BYTES or len(text.encode(errors="replace")) > MAX_BYTES:
        raise GrammarInvalid(f"the grammar is longer than {MAX_BYTES // 1024} KiB")
    parser = _Parser(text)
    rules = parser.rules()
    if "root" not in rules:
        raise GrammarInvalid("the grammar has no rule named root, where it would begin: add root ::= …")
    for name, at in parser.references.items():
        if name not in rules:
            parser.fail(f"there is no rule named {name}", at)
    endless = _endless(rules)
    if endless:
        name = min(endless, key=lambda each: parser.defined[each])
        parser.fail(f"the rule {name} never ends: each of its alternatives needs itself again", parser.defined[name])
    return rules


def children(expr: Expr) -> tuple[Expr, ...]:
    """What an expression is directly made of."""
    match expr:
        case Sequence(items):
            return items
        case Choice(options):
            return options
        case Repeat(item):
            return (item,)
        case _:
            return ()


def walk(expr: Expr) -> Iterator[Expr]:
    """An expression and all below it, references not followed."""
    left = [expr]
    while left:
        each = left.pop()
        yield each
        left.extend(children(each))


def merged(ranges: list[tuple[int, int]], *, negated: bool = False) -> Ranges:
    """Sorted, joined, without surrogates (which no UTF-8 holds); `negated` for all the others."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    if negated:
        edges = [-1, *(edge for pair in joined for edge in pair), _LAST_CODE_POINT + 1]
        joined = [(edges[i] + 1, edges[i + 1] - 1) for i in range(0, len(edges), 2) if edges[i] + 1 < edges[i + 1]]
    whole: list[tuple[int, int]] = []
    for low, high in joined:
        for part in ((low, min(high, _SURROGATES[0] - 1)), (max(low, _SURROGATES[1] + 1), high)):
            if part[0] <= part[1] and part not in whole:
                whole.append(part)
    return tuple(whole)


class _Parser:
    """Recursive descent, as deep as the parentheses."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0
        self.references: dict[str, int] = {}
        self.defined: dict[str, int] = {}

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        """Raises with the place of `at`, or where the parser stands."""
        at = self._at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        raise GrammarInvalid(f"{message} (line {line}, column {column})", line=line, column=column)

    def rules(self) -> dict[str, Expr]:
        rules: dict[str, Expr] = {}
        self._space(newlines=True)
        while self._at < len(self._text):
            at = self._at
            name = self._name("a rule's name")
            self._space()
            if not self._text.startswith("::=", self._at):
                self.fail(f"expected ::= after the rule's name {name}")
            self._at += 3
            self._space(newlines=True)
            if name in rules:
                self.fail(f"the rule {name} is defined twice", at)
            if len(rules) == MAX_RULES:
                self.fail(f"more than {MAX_RULES} rules", at)
            self.defined[name] = at
            rules[name] = self._choice(nested=False)
            if self._peek() not in ("", "\n", "\r"):
                self.fail(f"expected the end of the line, found {self._peek()!r}")
            self._space(newlines=True)
        return rules

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _space(self, *, newlines: bool = False) -> None:
        """Passes over blanks and comments."""
        while True:
            match self._peek():
                case " " | "\t":
                    self._at += 1
                case "\n" | "\r" if newlines:
                    self._at += 1
                case "#":
                    end = self._text.find("\n", self._at)
                    self._at = len(self._text) if end < 0 else end
                case _:
                    return

    def _name(self, what: str) -> str:
        start = self._at
        while (c := self._peek()) and c.isascii() and (c.isalnum() or c in "-_"):
            self._at += 1
        if self._at == start:
            self.fail(f"expected {what}, found {self._peek()!r}" if self._peek() else f"expected {what}")
        return self._text[start : self._at]

    def _choice(self, *, nested: bool) -> Expr:
        options = [self._sequence(nested=nested)]
        while self._peek() == "|":
            self._at += 1
            self._space(newlines=True)
            options.append(self._sequence(nested=nested))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self, *, nested: bool) -> Expr:
        items: list[Expr] = []
        repeated = False
        while True:
            match self._peek():
                case '"':
                    items.append(self._literal())
                case "[":
                    items.append(self._class())
                case "(":
                    items.append(self._group())
                case ".":
                    self._at += 1
                    items.append(Chars(merged([], negated=True)))
                case "*" | "+" | "?" | "{":
                    if not items:
                        self.fail(f"nothing stands before {self._peek()} to repeat")
                    if repeated:
                        # Such nesting would have no bound of its own.
                        self.fail("a repetition of a repetition needs parentheses")
                    items[-1] = self._repeat(items[-1])
                    repeated = True
                    self._space(newlines=nested)
                    continue
                case "<" | "!":
                    self.fail("tokens such as <think> are not supported in a grammar: write text")
                case c if c and c.isascii() and (c.isalnum() or c in "-_"):
                    at = self._at
                    name = self._name("a name")
                    self.references.setdefault(name, at)
                    items.append(Ref(name))
                case _:
                    break
            repeated = False
            self._space(newlines=nested)
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _group(self) -> Expr:
        opened = self._at
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.fail(f"parentheses are nested more than {MAX_DEPTH} deep")
        self._at += 1
        self._space(newlines=True)
        inner = self._choice(nested=True)
        if self._peek() != ")":
            if not self._peek():
                self.fail("this parenthesis is never closed", opened)
            self.fail(f"expected ), found {self._peek()!r}")
        self._at += 1
        self._depth -= 1
        return inner

    def _repeat(self, item: Expr) -> Expr:
        at, mark = self._at, self._peek()
        self._at += 1
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1), "{": (0, 0)}[mark]
        if mark == "{":
            least, most = self._bounds(at)
        return Repeat(item, least, most)

    def _bounds(self, at: int) -> tuple[int, int | None]:
        self._space(newlines=True)
        least = self._number()
        most: int | None = least
        self._space(newlines=True)
        if self._peek() == ",":
            self._at += 1
            self._space(newlines=True)
            most = None if self._peek() == "}" else self._number()
            self._space(newlines=True)
        if self._peek() != "}":
            self.fail("expected } after the numbers of a repetition")
        self._at += 1
        if most is not None and most < least:
            self.fail(f"a repetition from {least} to {most}", at)
        return least, most

    def _number(self) -> int:
        start = self._at
        while (c := self._peek()) and c in "0123456789":
            self._at += 1
        digits = self._text[start : self._at]
        if not digits:
            self.fail("expected a number")
        if len(digits) > 6 or int(digits) > MAX_REPEAT:
            self.fail(f"more than {MAX_REPEAT} repetitions", start)
        return int(digits)

    def _literal(self) -> Expr:
        opened = self._at
        self._at += 1
        characters: list[Expr] = []
        while self._peek() != '"':
            if not self._peek():
                self.fail("this text is never closed with a quotation mark", opened)
            code = self._character()
            characters.append(Chars(((code, code),)))
        self._at += 1
        return characters[0] if len(characters) == 1 else Sequence(tuple(characters))

    def _class(self) -> Expr:
        opened = self._at
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            if not self._peek():
                self.fail("this character class is never closed with ]", opened)
            at = self._at
            low = high = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._character()
                if high < low:
                    self.fail("a range of characters that ends before it begins", at)
            ranges.append((low, high))
        self._at += 1
        if not ranges or not (found := merged(ranges, negated=negated)):
            self.fail("a character class that no character is in", opened)
        return Chars(found)

    def _character(self) -> int:
        """One character, escaped or not."""
        at, c = self._at, self._peek()
        self._at += 1
        if c != "\\":
            code = ord(c)
        else:
            kind = self._peek()
            self._at += 1
            if kind in _ESCAPES and kind:
                return ord(_ESCAPES[kind])
            n_digits = _HEX_DIGITS.get(kind, 0)
            digits = self._text[self._at : self._at + n_digits]
            if not n_digits or len(digits) < n_digits or any(d not in "0123456789abcdefABCDEF" for d in digits):
                self.fail(
                    'an escape that is not known: there are \\t \\r \\n \\\\ \\" \\[ \\] \\xXX \\uXXXX \\UXXXXXXXX', at
                )
            self._at += n_digits
            code = int(digits, 16)
        if code > _LAST_CODE_POINT or _SURROGATES[0] <= code <= _SURROGATES[1]:
            self.fail("a code point that is no character", at)
        return code


def _endless(rules: dict[str, Expr]) -> set[str]:
    """The rules that no finite text completes. Linear in the grammar: "can end" travels from the leaves upwards."""
    # Per expression: who is waiting for it, and how many of its parts it still waits for.
    parents: dict[int, list[Expr | str]] = {}
    waits: dict[int, int] = {}
    users: dict[str, list[Ref]] = {name: [] for name in rules}
    ready: deque[Expr | str] = deque()
    every: list[Expr] = []
    for name, top in rules.items():
        parents.setdefault(id(top), []).append(name)
        for expr in walk(top):
            every.append(expr)
            for child in children(expr):
                parents.setdefault(id(child), []).append(expr)
            match expr:
                case Ref(target):
                    waits[id(expr)] = 1
                    users[target].append(expr)
                case Sequence(items) if items:
                    waits[id(expr)] = len(items)
                case Choice():
                    waits[id(expr)] = 1
                case Repeat(least=least) if least:
                    waits[id(expr)] = 1
                case _:
                    ready.append(expr)
    ends: set[str] = set()
    seen: set[int] = set()
    while ready:
        done = ready.popleft()
        if isinstance(done, str):
            if done not in ends:
                ends.add(done)
                for ref in users[done]:
                    waits[id(ref)] -= 1
                    ready.append(ref)
            continue
        if id(done) in seen:
            continue
        seen.add(id(done))
        for parent in parents.get(id(done), ()):
            if isinstance(parent, str):
                ready.append(parent)
            elif id(parent) not in seen:
                waits[id(parent)] = waits.get(id(parent), 0) - 1
                if waits[id(parent)] <= 0:
                    ready.append(parent)
    return rules.keys() - ends
