"""Rules of a grammar → the same language in llguidance's own notation, in which masks are fast.

llguidance cuts a text into lexemes, each as long as can be, and parses those. With each character a lexeme the parse is
exact, and a mask inside a JSON string costs milliseconds, because it takes every word of the vocabulary letter by
letter through the parser. With a string as one lexeme it costs some 30 µs; but a lexeme that could have ended earlier
hides every parse in which it does: `("a" | "ab") "bc"` would lose "abc". So parts are joined into lexemes where that
changes nothing: where no text of a lexeme begins a longer text of any lexeme of the grammar (a prefix code), there is
one way to cut, and greed is harmless. A grammar without recursion is one lexeme as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine import gbnf
from engine.gbnf import Chars, Choice, Expr, Ranges, Ref, Repeat

# What is larger is left to the parser: the checks below stay within milliseconds.
_MAX_PART_SIZE = 4000
_MAX_PART_DEPTH = 80
_MAX_POSITIONS = 400
_MAX_SUBSETS = 3000
_MAX_RUN = 12
_MAX_WORK = 200_000
_MAX_ROUNDS = 12

_OPTIONS = '%llguidance {"no_forcing": true}\n'
# With forcing, llguidance takes the next token from its own tokenisation; the model is to choose among all that fit.


def to_lark(rules: dict[str, Expr], *, whole: bool = True) -> str:
    """The grammar in llguidance's variant of Lark's notation. Pure.

    Args:
        rules: from `gbnf.parse`.
        whole: whether a grammar without recursion may become one lexeme.
    """
    plain = _plain(rules)
    if whole and "root" in plain:
        return f"{_OPTIONS}start: T\nT: /{_regex(plain['root'].expr)}/\n"
    return _OPTIONS + (_joined(rules, plain) or _Lowering(rules, plain, None, {}, _Budget()).text())


def _joined(rules: dict[str, Expr], plain: dict[str, _Plain]) -> str | None:
    """The rules with parts joined into lexemes, or None when finding out which takes too long."""
    banned: set[str] = set()
    judged: dict[str, bool] = {}
    budget = _Budget()
    try:
        for _ in range(_MAX_ROUNDS):
            lowering = _Lowering(rules, plain, banned, judged, budget)
            text = lowering.text()
            guilty = _clash(list(lowering.lexemes.values()), lowering.characters, budget)
            if not guilty:
                return text
            banned |= guilty
    except _OverBudgetError:
        pass
    return None


class _OverBudgetError(Exception):
    pass


class _Budget:
    """What the search for lexemes may cost one grammar, in steps of about a microsecond."""

    def __init__(self) -> None:
        self._left = _MAX_WORK

    def spend(self, n: int) -> None:
        self._left -= n
        if self._left < 0:
            raise _OverBudgetError


def for_schema(schema_json: str) -> str:
    """A JSON Schema, as JSON text, in the same notation."""
    return f"{_OPTIONS}start: %json {schema_json}\n"


@dataclass(frozen=True, slots=True)
class _Plain:
    """A rule without recursion, references put in place."""

    expr: Expr
    size: int
    depth: int


def _plain(rules: dict[str, Expr]) -> dict[str, _Plain]:
    """The rules that lead to no recursion and are not too large to be written out."""
    uses = {name: {e.name for e in gbnf.walk(top) if isinstance(e, Ref)} for name, top in rules.items()}
    plain: dict[str, _Plain] = {}
    for name in _acyclic(uses):
        if uses[name] <= plain.keys():
            found = _inlined(rules[name], plain)
            if found is not None:
                plain[name] = found
    return plain


def _acyclic(uses: dict[str, set[str]]) -> list[str]:
    """The rules that reach no cycle, those they need first."""
    missing = {name: len(needs) for name, needs in uses.items()}
    users: dict[str, list[str]] = {name: [] for name in uses}
    for name, needs in uses.items():
        for need in needs:
            users[need].append(name)
    ready = deque(name for name, n in missing.items() if not n)
    order = []
    while ready:
        name = ready.popleft()
        order.append(name)
        for user in users[name]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return order


def _inlined(expr: Expr, plain: dict[str, _Plain]) -> _Plain | None:
    """`expr` with its references replaced, or None when that is too large."""
    match expr:
        case Chars():
            return _Plain(expr, 1, 1)
        case Ref(name):
            return plain[name]
    parts = [_inlined(child, plain) for child in gbnf.children(expr)]
    found = [part for part in parts if part is not None]
    size = 1 + sum(part.size for part in found)
    depth = 1 + max((part.depth for part in found), default=0)
    if len(found) < len(parts) or size > _MAX_PART_SIZE or depth > _MAX_PART_DEPTH:
        return None
    return _Plain(_rebuilt(expr, [part.expr for part in found]), size, depth)


def _rebuilt(expr: Expr, parts: list[Expr]) -> Expr:
    match expr:
        case gbnf.Sequence():
            return gbnf.Sequence(tuple(parts))
        case Choice():
            return Choice(tuple(parts))
        case Repeat(_, least, most):
            return Repeat(parts[0], least, most)
        case _:
            return expr


def _regex(expr: Expr) -> str:
    """A plain expression as a regular expression. Only hexadecimal escapes: nothing in it needs quoting again."""
    match expr:
        case Chars(ranges):
            return "[" + "".join(_hex(low) + ("" if low == high else f"-{_hex(high)}") for low, high in ranges) + "]"
        case gbnf.Sequence(items):
            return "".join(_regex(item) for item in items) or "(?:)"
        case Choice(options):
            return "(?:" + "|".join(_regex(option) for option in options) + ")"
        case Repeat(item, least, most):
            return f"(?:{_regex(item)}){_times(least, most)}"
        case Ref(name):
            raise AssertionError(f"the rule {name} is not plain")


def _hex(code: int) -> str:
    return f"\\x{{{code:X}}}"


def _times(least: int, most: int | None) -> str:
    known = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    return known.get((least, most)) or f"{{{least},{'' if most is None else most}}}"


class _Lowering:
    """One attempt to write the rules down, with every part that is not banned as a lexeme; None bans all."""

    def __init__(
        self,
        rules: dict[str, Expr],
        plain: dict[str, _Plain],
        banned: set[str] | None,
        judged: dict[str, bool],
        budget: _Budget,
    ) -> None:
        self._rules, self._plain, self._banned = rules, plain, banned
        self._names = {name: f"r{i}" for i, name in enumerate(rules)}
        self._budget = budget
        self._judged = judged
        self.lexemes: dict[str, _Lexeme] = {}
        self.characters: set[Ranges] = set()

    def text(self) -> str:
        bodies: dict[str, str] = {}
        left = ["root"]
        while left:
            name = left.pop()
            if name in bodies:
                continue
            self._used: list[str] = []
            bodies[name] = self._lower(self._rules[name])
            left.extend(self._used)
        lines = ["start: " + self._names["root"]]
        lines += [f"{self._names[name]}: {body}" for name, body in bodies.items()]
        lines += [f"{lexeme.name}: /{regex}/" for regex, lexeme in self.lexemes.items()]
        return "\n".join(lines) + "\n"

    def _lower(self, expr: Expr) -> str:
        lexeme = self._joined([expr])
        if lexeme is not None:
            return lexeme
        match expr:
            case Chars(ranges):
                self.characters.add(ranges)
                return f"/{_regex(expr)}/"
            case Ref(name):
                self._used.append(name)
                return self._names[name]
            case Choice(options):
                return "(" + " | ".join(self._lower(option) for option in options) + ")"
            case Repeat(item, least, most):
                return '""' if most == 0 else f"({self._lower(item)}){_times(least, most)}"
            case gbnf.Sequence(items):
                return " ".join(self._runs(items)) or '""'

    def _runs(self, items: Sequence[Expr]) -> list[str]:
        """A sequence in the fewest pieces: from each place the longest run that may be one lexeme."""
        pieces: list[str] = []
        at = 0
        while at < len(items):
            for end in range(min(len(items), at + _MAX_RUN), at + 1, -1):
                lexeme = self._joined(items[at:end])
                if lexeme is not None:
                    pieces.append(lexeme)
                    at = end
                    break
            else:
                pieces.append(self._lower(items[at]))
                at += 1
        return pieces

    def _joined(self, items: Sequence[Expr]) -> str | None:
        """The lexeme's name that these items are together, if they may be one."""
        if self._banned is None or (len(items) == 1 and isinstance(items[0], Chars)):
            return None
        for item in items:
            for each in gbnf.walk(item):
                self._budget.spend(1)
                if isinstance(each, Ref) and each.name not in self._plain:
                    return None
        plain = _inlined(gbnf.Sequence(tuple(items)), self._plain)
        self._budget.spend(20 if plain is None else plain.size)
        if plain is None:
            return None
        regex = _regex(plain.expr)
        if regex in self._banned:
            return None
        if regex not in self.lexemes:
            if regex not in self._judged:
                self._judged[regex] = _is_prefix_code(plain.expr, self._budget)
            if not self._judged[regex]:
                return None
            lexeme = _Lexeme(f"T{len(self.lexemes)}", regex)
            lexeme.add(plain.expr)
            self.lexemes[regex] = lexeme
        return self.lexemes[regex].name


@dataclass
class _Lexeme:
    """A lexeme as an automaton over its character positions (Glushkov's construction)."""

    name: str
    regex: str
    chars: list[Ranges] = field(default_factory=list)
    follow: list[set[int]] = field(default_factory=list)
    first: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)
    nullable: bool = False
    _n_built: int = 0

    def add(self, expr: Expr) -> bool:
        """Builds it; False when it has too many positions."""
        try:
            self.nullable, self.first, self.last = self._build(expr)
        except _TooLargeError:
            return False
        return True

    def _build(self, expr: Expr) -> tuple[bool, set[int], set[int]]:
        self._n_built += 1
        if self._n_built > _MAX_PART_SIZE or len(self.chars) >= _MAX_POSITIONS:
            raise _TooLargeError
        match expr:
            case Chars(ranges):
                self.chars.append(ranges)
                self.follow.append(set())
                at = {len(self.chars) - 1}
                return False, at, set(at)
            case Choice(options):
                built = [self._build(option) for option in options]
                return any(each[0] for each in built), _union(e[1] for e in built), _union(e[2] for e in built)
            case Repeat(item, least, most):
                n = max(least, 1) if most is None else most
                copies = [self._build(item) for _ in range(n)]
                # The copies from `least` on may be left out.
                chained = self._chain([(each[0] or i >= least, each[1], each[2]) for i, each in enumerate(copies)])
                if most is None and copies:
                    for end in copies[-1][2]:
                        self.follow[end] |= copies[-1][1]
                return chained
            case gbnf.Sequence(items):
                return self._chain([self._build(item) for item in items])
            case Ref(name):
                raise AssertionError(f"the rule {name} is not plain")

    def _chain(self, parts: list[tuple[bool, set[int], set[int]]]) -> tuple[bool, set[int], set[int]]:
        nullable, first, last = True, set[int](), set[int]()
        for part_nullable, part_first, part_last in parts:
            for end in last:
                self.follow[end] |= part_first
            first = first | part_first if nullable else first
            last = last | part_last if part_nullable else part_last
            nullable = nullable and part_nullable
        return nullable, first, last


class _TooLargeError(Exception):
    pass


def _union(sets: Iterable[set[int]]) -> set[int]:
    return set().union(*sets)


def _is_prefix_code(expr: Expr, budget: _Budget) -> bool:
    """Whether it may be a lexeme by itself: never empty, and none of its texts begins another."""
    lexeme = _Lexeme("", "")
    built = lexeme.add(expr)
    # Building joins sets of positions with sets of positions.
    budget.spend(len(lexeme.chars) + sum(map(len, lexeme.follow)))
    return built and not lexeme.nullable and bool(lexeme.chars) and not _clash([lexeme], set(), budget)


def _clash(lexemes: list[_Lexeme], characters: set[Ranges], budget: _Budget) -> set[str]:
    """The lexemes (by regex) that stand in the way of a prefix code of all lexemes and single characters together.

    All automata are run side by side over every text, as sets of (lexeme, position): where one of them has ended while
    another, or itself, goes on, there is a clash.
    """
    automata = [*lexemes]
    for ranges in characters:
        single = _Lexeme("", "")
        single.add(Chars(ranges))
        automata.append(single)
    start = frozenset((i, p) for i, each in enumerate(automata) for p in each.first)
    seen: set[frozenset[tuple[int, int]]] = set()
    left = [start]
    while left:
        waiting = left.pop()
        budget.spend(len(waiting))
        for reached in _steps(automata, waiting):
            ended = {i for i, p in reached if p in automata[i].last}
            budget.spend(len(reached) + sum(len(automata[i].follow[p]) for i, p in reached))
            onward = frozenset((i, q) for i, p in reached for q in automata[i].follow[p])
            if ended and onward:
                # What goes on is longer than a character, so it can give way.
                return {automata[i].regex for i, _ in onward}
            if onward and onward not in seen:
                seen.add(onward)
                if len(seen) > _MAX_SUBSETS:
                    return {each.regex for each in lexemes}
                left.append(onward)
    return set()


def _steps(automata: list[_Lexeme], waiting: frozenset[tuple[int, int]]) -> list[frozenset[tuple[int, int]]]:
    """The sets of positions that one character can reach: a sweep over the borders of their ranges."""
    borders: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
    for each in waiting:
        for low, high in automata[each[0]].chars[each[1]]:
            borders.setdefault(low, ([], []))[0].append(each)
            borders.setdefault(high + 1, ([], []))[1].append(each)
    inside: set[tuple[int, int]] = set()
    reached: dict[frozenset[tuple[int, int]], None] = {}
    for code in sorted(borders):
        opened, closed = borders[code]
        inside.difference_update(closed)
        inside.update(opened)
        if inside:
            reached[frozenset(inside)] = None
    return list(reached)
