"""Throws mutated grammars and schemas at the compiler and draws from those that pass, in a process of its own.

`python -m tests.engine.fuzz_constraints SEED N` prints a JSON summary at the end, so that a process that died has
printed none. Each case is named in a file first: the last line of it is what killed.
"""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

from engine.constraint import ConstraintFailedError, Constraints, Matcher
from infsvc.errors import ConstraintError
from tests.engine.test_gbnf import JSON
from tests.engine.test_json_schema import FITS

GRAMMARS = [
    JSON,
    'root ::= "yes" | "no"',
    'root ::= ("- " item)+\nitem ::= [^\\n]+ "\\n"',
    'root ::= expr\nexpr ::= term (("+" | "-") term)*\nterm ::= [0-9]{1,3} | "(" expr ")"',
    'root ::= "\\x41\\u00e9\\U0001F600" [^a-z\\]]* .{2,7} (x | "" | y)?\nx ::= "x" x | "z"\ny ::= (x y?){0,3} "!"',
]
PIECES = [
    "(", ")", "[", "]", "{", "}", '"', "\\", "|", "*", "+", "?", "::=", "\n", " ", "#", "^", "-", ".", ",", "x", "root",
    "{0,2000}", "{2000}", "{999,}", "\\x", "\\u12", "\\UFFFFFFFF", "é", "\ud800", "\x00", "😀", "<", "[^", "((", "|||",
    '""', "[\\x00-\\U0010FFFF]", "a::=a", "0", "root root", "(root)*", "(root|)*", "[a-z]{300}", "(.*.*)*",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 1e308, 2000, 2001, 10**30, "", "x", "\ud800", "^(a|b)*a(a|b){40}$", "date", "#",
    "((((.*)*)*)*)*", "(a{1000}){1000}", "[", "\\p{Greek}+", "(?=a)", "#/$defs/node", "#/properties", [], {}, [[]],
    [{}], {"$ref": "#"}, {"type": "string"}, {"not": {}}, {"allOf": [{}, {}]}, ["a", "a"], {"pattern": "^.{900}$"},
    {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, {"multipleOf": 0.0007}, {"pattern": "^(..)*$", "maxLength": 9},
]  # fmt: skip
KEYS = [
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "properties", "required", "items",
    "prefixItems",
    "additionalProperties", "patternProperties", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minProperties", "maxProperties", "x",
]  # fmt: skip
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|[\w-]+|::=|\{[^}]*\}|\s+|.')


def mutated_grammar(pick: random.Random) -> str:
    text = pick.choice(GRAMMARS)
    if pick.random() < 0.6:
        # Parts in other places: often still a grammar.
        parts = TOKENS.findall(text)
        for _ in range(pick.choice([1, 2, 4])):
            parts[pick.randrange(len(parts))] = pick.choice([*parts, "*", "{0,40}", '"x"', "[^a]", "root", "(x)", "|"])
        return "".join(parts)
    for _ in range(pick.choice([1, 1, 2, 8])):
        at, to = sorted((pick.randrange(len(text) + 1), pick.randrange(len(text) + 1)))
        match pick.randrange(5):
            case 0:
                text = text[:at] + pick.choice(PIECES) + text[at:]
            case 1:
                text = text[:at] + text[at + 1 :]
            case 2:
                text = text[:at] + text[at : at + 30] * pick.choice([2, 5, 60]) + text[at + 30 :]
            case 3:
                text = text[:at] + pick.choice(GRAMMARS)[:to] + text[to:]
            case 4:
                text = text[:at] + pick.choice(PIECES) * pick.choice([1, 3, 70, 3000]) + text[at:]
    return text


def mutated_schema(pick: random.Random) -> dict[str, Any]:
    schema = copy.deepcopy(pick.choice(FITS))
    for _ in range(pick.choice([1, 1, 1, 2, 5])):
        places: list[Any] = [schema]
        for place in places:
            inner = place.values() if isinstance(place, dict) else place
            places.extend(each for each in inner if isinstance(each, dict | list))
        place = pick.choice(places)
        value = copy.deepcopy(pick.choice([*VALUES, *FITS]))
        if isinstance(place, list):
            place.insert(pick.randrange(len(place) + 1), value)
        elif place and pick.random() < 0.4:
            place[pick.choice(list(place))] = value
        else:
            place[pick.choice(KEYS)] = value
    return schema


def draw(matcher: Matcher, pick: random.Random) -> bool:
    """Some tokens at random; False when a limit was met."""
    try:
        for _ in range(40):
            token = int(pick.choice(matcher.allowed()))
            assert matcher.take(token), "a token that is allowed is taken"
            if matcher.finished or token == 256:
                break
    except ConstraintFailedError:
        return False
    return True


def main(seed: int, n: int, last_words: Path) -> None:
    known = Constraints(lambda: [*(bytes([byte]) for byte in range(256)), b""], [256])
    pick = random.Random(seed)
    told = {"cases": 0, "compiled": 0, "refused": 0, "at_limits": 0, "slowest_s": 0.0}
    for i in range(n):
        case = mutated_grammar(pick) if i % 2 else mutated_schema(pick)
        last_words.write_text(json.dumps(case))
        begun = time.perf_counter()
        try:
            matcher = known.grammar(case) if isinstance(case, str) else known.schema(case)
        except ConstraintError:
            told["refused"] += 1
        else:
            told["compiled"] += 1
            told["at_limits"] += not draw(matcher, pick)
        told["cases"] += 1
        told["slowest_s"] = round(max(told["slowest_s"], time.perf_counter() - begun), 3)
    told["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
