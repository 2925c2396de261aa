"""Constrained sequences in a real engine on a model that knows nothing: whatever it draws, the answer fits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.constraint import ConstraintFailedError, Constraints, Matcher
from engine.engine import Engine
from engine.service import InferenceRequest
from infsvc.errors import BadRequest, ConstraintError, GrammarInvalid, SchemaInvalid, UnknownGrammar
from infsvc.types import Params
from tests.engine.parts import Node, run, running_engine, running_node, sequence, spec, worker_settings
from tests.engine.test_engine import prompt
from tests.engine.test_fleet import put
from tests.tiny_models import CHATML, write_tiny_model

YES_NO = 'root ::= "yes" | "no"'
LIST = 'root ::= "[" (item ("," item)*)? "]"\nitem ::= [0-9]{1,3} | root'
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["glad", "sad"]},
        "pet": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pet"}]},
    },
    "required": ["name", "age", "mood", "pet"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "type": "object",
            "properties": {"legs": {"type": "integer", "minimum": 2, "maximum": 8}, "tame": {"type": "boolean"}},
            "required": ["legs", "tame"],
            "additionalProperties": False,
        }
    },
}
WILD = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def constraints_of(engine: Engine) -> Constraints:
    return Constraints(engine.model.texts, engine.model.eog.tolist())


def constrained(matcher: Matcher, *, seed: int | None = None, **fields: Any) -> Any:
    """A sequence that a matcher constrains; greedy without a seed."""
    sampler = spec() if seed is None else spec(**WILD, seed=seed)
    given = {"sampler": sampler, "max_tokens": 600, "n_ctx": 1024, "ignore_eos": False, "constraint": matcher} | fields
    return sequence(**given)


def is_person(text: str) -> bool:
    found = json.loads(text)
    pet = found["pet"]
    return (
        list(found) == ["name", "age", "mood", "pet"]
        and len(found["name"]) <= 6
        and 0 <= found["age"] <= 150
        and found["mood"] in ("glad", "sad")
        and (pet is None or (2 <= pet["legs"] <= 8 and isinstance(pet["tame"], bool)))
    )


async def test_greedy_and_drawn_answers_fit(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_ctx=1024) as engine:
        known = constraints_of(engine)
        for seed in (None, *range(12)):
            words = await run(engine, constrained(known.grammar(YES_NO), seed=seed, prompt=prompt(seed or 0)))
            assert words.text in ("yes", "no")
            assert (await words.finished()).reason == "stop"
            person = await run(engine, constrained(known.schema(PERSON), seed=seed, prompt=prompt(seed or 0)))
            end = await person.finished()
            assert (end.reason, is_person(person.text)) == ("stop", True), person.text


async def test_the_end_of_the_grammar_is_the_end_of_the_answer(tiny_model: Path) -> None:
    """At once where nothing can follow; else by the end token, which is drawn only where the grammar may end."""
    async with running_engine(tiny_model, n_ctx=1024) as engine:
        known = constraints_of(engine)
        heard = await run(engine, constrained(known.grammar('root ::= "abc"')))
        assert (heard.text, heard.n_tokens) == ("abc", 3)
        empty = await run(engine, constrained(known.grammar('root ::= ""')))
        assert (empty.text, empty.n_tokens, (await empty.finished()).reason) == ("", 1, "stop")
        ends = [await run(engine, constrained(known.grammar("root ::= [a-b]{2,4}"), seed=seed)) for seed in range(40)]
        assert {(await each.finished()).reason for each in ends} == {"stop"}
        assert {len(each.text) for each in ends} <= {2, 3, 4}


async def test_max_tokens_and_stop_strings_cut_as_ever(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_ctx=1024) as engine:
        known = constraints_of(engine)
        cut = await run(engine, constrained(known.grammar('root ::= "abcdef"'), max_tokens=3))
        assert (cut.text, (await cut.finished()).reason) == ("abc", "length")
        whole = await run(engine, constrained(known.grammar('root ::= "abcdef"'), max_tokens=6))
        assert (whole.text, (await whole.finished()).reason) == ("abcdef", "stop")
        stopped = await run(engine, constrained(known.grammar('root ::= "abcdef"'), stop=("cd",)))
        assert (stopped.text, (await stopped.finished()).reason) == ("ab", "stop")


async def test_penalties_and_seeds_keep_their_meaning(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_ctx=1024) as engine:
        known = constraints_of(engine)

        def letters(seed: int, **params: Any) -> Any:
            sampler = spec(**WILD | {"seed": seed} | params)
            return constrained(known.grammar("root ::= [a-h]{30}"), sampler=sampler)

        first = (await run(engine, letters(1))).text
        assert (await run(engine, letters(1))).text == first != (await run(engine, letters(2))).text
        # Of eight letters, none comes again before all have.
        spread = (await run(engine, letters(1, repeat_penalty=10.0, presence_penalty=2.0, repeat_last_n=7))).text
        assert len(set(spread)) == 8
        assert len(first) == len(spread) == 30


async def test_a_candidate_that_fits_is_kept(tiny_model: Path) -> None:
    """A constraint that allows everything changes nothing, greedy or drawn."""
    async with running_engine(tiny_model, n_ctx=1024) as engine:
        known = constraints_of(engine)
        anything = "root ::= [\\x00-\\x7F]*"
        for seed in (None, 4, 5):
            n_same = 0
            sampler = spec() if seed is None else spec(**WILD, seed=seed)
            free = (await run(engine, sequence(sampler=sampler, max_tokens=12))).text
            bound = (await run(engine, constrained(known.grammar(anything), seed=seed, max_tokens=12))).text
            for a, b in zip(free, bound, strict=False):
                if a != b:
                    break
                n_same += 1
            # Up to the first character that is no ASCII they are the same.
            assert n_same == len(free) or not free[n_same].isascii()


async def test_eight_at_once_with_and_without_constraints(tiny_model: Path) -> None:
    def free(i: int) -> Any:
        return sequence(prompt=prompt(i), max_tokens=24)

    async with running_engine(tiny_model, n_slots=1) as engine:
        alone = [(await run(engine, free(i))).text for i in range(4)]
    async with running_engine(tiny_model, n_slots=8, n_ctx=1024) as engine:
        known = constraints_of(engine)
        for _ in range(3):
            mixed: list[Any] = []
            for i in range(4):
                mixed.append(free(i))
                matcher = known.schema(PERSON) if i % 2 else known.grammar(LIST)
                mixed.append(constrained(matcher, seed=i, prompt=prompt(i)))
            for each in mixed:
                engine.submit(each)
            ends = [await each.listener.finished() for each in mixed]
            assert [each.listener.text for each in mixed[::2]] == alone
            for each, end in zip(mixed[1::2], ends[1::2], strict=True):
                assert end.reason in ("stop", "length")
                if end.reason == "stop":
                    json.loads(each.listener.text)
            assert all(is_person(each.listener.text) for each in mixed[3::4])
        assert engine.counters.max_batch_sequences == 8


async def test_a_cancel_and_what_comes_after(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_slots=1) as engine:
        known = constraints_of(engine)
        endless = constrained(known.grammar("root ::= [a-z]{2000}"), max_tokens=10**6, n_ctx=10**6, seed=1)
        engine.submit(endless)
        await endless.listener.tokens.wait()
        engine.cancel(endless)
        assert (await endless.listener.finished()).reason in ("cancelled", "length")
        assert (await run(engine, constrained(known.grammar(YES_NO)))).text in ("yes", "no")


async def test_a_constraint_at_its_limits_ends_its_own_sequence_only(tiny_model: Path) -> None:
    class ForcedLimit(Matcher):
        def take(self, token: int) -> bool:
            self._fail("lexer too complex")
            return False

    async with running_engine(tiny_model, n_ctx=1024) as engine:
        known = constraints_of(engine)
        broken = constrained(known.grammar(YES_NO))
        broken.constraint.__class__ = ForcedLimit
        other = sequence(max_tokens=20)
        engine.submit(other)
        end = await (await run(engine, broken)).finished()
        assert (end.reason, end.error) == ("error", "the constraint cannot go on: lexer too complex")
        assert (await other.listener.finished()).reason == "length"  # type: ignore[attr-defined]
        # What was compiled and hit its limits is compiled anew.
        assert (await run(engine, constrained(known.grammar(YES_NO)))).text in ("yes", "no")


def test_a_masked_token_is_never_taken() -> None:
    matcher = Constraints(lambda: [b"a", b"b", b"c", b""], [3]).grammar('root ::= "b" | "c"')
    logits = np.array([3.0, 1.0, 2.0, 5.0], dtype=np.float32)
    # A draw that lands on a masked one all the same.
    assert matcher.choose(logits, 0, lambda: 3) == 2
    assert logits.tolist() == [-np.inf, 1.0, 2.0, -np.inf]
    assert matcher.finished


def test_no_token_that_can_follow_is_an_error() -> None:
    known = Constraints(lambda: [b"a", b"b", b""], [2])
    with pytest.raises(GrammarInvalid, match="no token of this model's vocabulary fits"):
        known.grammar('root ::= "z"')
    matcher = known.grammar('root ::= "az"')
    assert matcher.take(0)
    with pytest.raises(ConstraintFailedError, match="no token"):
        matcher.choose(np.zeros(3, dtype=np.float32), 1, lambda: 1)


def test_a_vocabulary_without_an_end_cannot_be_constrained() -> None:
    with pytest.raises(ConstraintError, match="no token that ends"):
        Constraints(lambda: [b"a"], []).grammar(YES_NO)


def test_marks_and_control_tokens_are_never_drawn(tmp_path: Path) -> None:
    from engine.llama import LlamaModel

    model = LlamaModel(write_tiny_model(tmp_path / "m.gguf", special=("<think>",)))
    texts = model.texts()
    assert [texts[97], texts[256:]] == [b"a", [b"", b"", b"", b""]]
    matcher = Constraints(model.texts, model.eog.tolist()).grammar('root ::= .* "<think>"')
    assert set(matcher.allowed().tolist()).isdisjoint(range(256, 260))
    model.close()


# -- through the service ----------------------------------------------------------------------------------------------


@dataclass
class Text:
    content: str
    is_schema: bool = False


class Shelf:
    """Stored grammars in memory."""

    texts = {"yes_no": Text(YES_NO), "person": Text(json.dumps(PERSON), True), "broken": Text("{", True)}

    def find(self, name: str) -> Text | None:
        return self.texts.get(name)


@pytest.fixture
async def node(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Node]:
    put(tmp_path, "a", tiny_model.read_bytes())
    async with running_node(tmp_path, worker_settings("a", ctx_size=1024), grammars=Shelf()) as node:
        await node.loaded("a")
        yield node


def ask(**params: Any) -> InferenceRequest:
    return InferenceRequest(model="a", input="hello", params=Params(**{"max_tokens": 600, "seed": 3} | params))


async def test_by_name_by_text_and_by_schema(node: Node) -> None:
    for params, used in (
        ({"grammar": "yes_no"}, "yes_no"),
        ({"grammar": YES_NO}, YES_NO),
        ({"grammar": "person"}, "person"),
        ({"json_schema": PERSON}, json.dumps(PERSON)),
    ):
        reply = await node.service.complete(ask(**params))
        assert reply.finish_reason == "stop"
        assert reply.text in ("yes", "no") or is_person(reply.text)
        assert node.sinks["a"].rows[-1].grammar_used == used
    await node.service.complete(ask(max_tokens=1))
    assert node.sinks["a"].rows[-1].grammar_used is None


@pytest.mark.parametrize(
    ("params", "kind", "param"),
    [
        ({"grammar": "nobody"}, UnknownGrammar, "params.grammar"),
        ({"grammar": ""}, UnknownGrammar, "params.grammar"),
        ({"grammar": "root ::= x"}, GrammarInvalid, "params.grammar"),
        ({"grammar": "broken"}, SchemaInvalid, "params.grammar"),
        ({"json_schema": {"not": {}}}, SchemaInvalid, "params.json_schema"),
        ({"grammar": YES_NO, "json_schema": {}}, BadRequest, "params.json_schema"),
        ({"grammar": YES_NO, "ignore_eos": True}, BadRequest, "params.ignore_eos"),
    ],
)
async def test_what_cannot_be_is_refused_with_its_row(
    node: Node, params: dict[str, Any], kind: type[Exception], param: str
) -> None:
    with pytest.raises(kind) as caught:
        await node.service.submit(ask(**params))
    assert caught.value.param == param  # type: ignore[attr-defined]
    assert node.sinks["a"].rows[-1].status == "rejected"
    assert (await node.service.complete(ask(grammar="yes_no"))).text in ("yes", "no")


@pytest.mark.parametrize("opened", [True, False], ids=["the template opens it", "the model would"])
async def test_a_reasoning_model_answers_at_once(tmp_path: Path, opened: bool) -> None:
    open_it = "<think>\n" if opened else "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    template = CHATML + "{% if add_generation_prompt %}" + open_it + "{% endif %}"
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=template, special=("<think>", "</think>"))
    put(tmp_path, "a", path.read_bytes())
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")
        reply = await node.service.complete(ask(grammar=YES_NO))
        assert (reply.text in ("yes", "no"), reply.reasoning) == (True, None)
        assert (node.sinks["a"].rows[-1].formatted_input or "").endswith("<think>\n\n</think>\n\n")
        with pytest.raises(BadRequest, match="without reasoning"):
            await node.service.submit(InferenceRequest(model="a", input="x", think=True, params=Params(grammar=YES_NO)))


async def test_many_at_once_compile_while_others_run(node: Node) -> None:
    asks = [ask(grammar=f'root ::= "{i}" ("a" | "b"){{{i % 5 + 1}}}', seed=i) for i in range(12)]
    replies = await asyncio.gather(*(node.service.complete(each) for each in asks))
    for i, reply in enumerate(replies):
        assert (reply.text.rstrip("ab"), len(reply.text)) == (str(i), len(str(i)) + i % 5 + 1)


def test_the_cache_is_bounded_and_gives_each_a_fresh_matcher() -> None:
    known = Constraints(lambda: [*(bytes([byte]) for byte in range(256)), b""], [256])
    first = known.grammar('root ::= "ab"')
    assert first.take(97)
    assert known.grammar('root ::= "ab"').allowed().tolist() == [97]
    for i in range(200):
        known.grammar(f'root ::= "x{i}"')
    assert len(known._cache) == 64
    assert first.allowed().tolist() == [98]


async def test_a_model_that_is_loaded_again_is_constrained_again(node: Node) -> None:
    for _ in range(2):
        assert (await node.service.complete(ask(grammar="yes_no"))).text in ("yes", "no")
        assert node.fleet.get("a").constraints is not None
        await node.fleet.unload("a")
        assert node.fleet.get("a").constraints is None
        await node.loaded("a")
