"""A grammar or a JSON Schema → which tokens may come next.

Constraints are compiled off the loop and kept, for each vocabulary; every sequence gets a matcher of its own, which
belongs to the engine's thread. Nothing of llama.cpp's own grammar code is used: it aborts the process on what it does
not like. llguidance answers with errors, and its work in one step is limited.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import llguidance
import numpy as np
import numpy.typing as npt

from engine import gbnf, json_schema, lexemes
from infsvc.errors import BadRequest, ConstraintError, GrammarInvalid, SchemaInvalid, UnknownGrammar
from infsvc.types import Params

_CACHE_ITEMS = 64
_MAX_PROBES = 64
_NO_TOKEN = "no token of this model's vocabulary fits here"
_UNSATISFIABLE = "Unsatisfiable"

# Bounds of one compilation and of one mask. At these a mask of 152k tokens takes some 10 ms at worst; the memory of
# the lexer's states stays below 100 MB.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)

# Between the parts of a JSON value: nothing, a space, or a line break with an indent; as llama.cpp's `space`. With any
# blanks allowed a model may go on with them for ever.
_BLANKS = r" |\n[ \t]{0,20}"


class Grammars(Protocol):
    """Stored grammars by name; `transports.node` fills it."""

    def find(self, name: str) -> StoredText | None:
        """Reads one; None when there is none. Blocks for a file. Raises `BadRequest` for what is no name."""


class StoredText(Protocol):
    """What the engine wants of a stored grammar."""

    @property
    def content(self) -> str: ...

    @property
    def is_schema(self) -> bool: ...


class Compiler(Protocol):
    """What makes matchers for one vocabulary: `Constraints`, or what stands for one in another process."""

    def grammar(self, text: str) -> Matcher: ...

    def schema(self, schema: dict[str, Any]) -> Matcher: ...


class ConstraintFailedError(Exception):
    """A constraint that compiled met its limits, or a vocabulary without a fitting token, in the middle of a text."""


class Matcher:
    """Where one sequence stands in its constraint. One thread at a time.

    Attributes:
        finished: whether nothing more may follow.
    """

    def __init__(self, native: llguidance.LLMatcher, n_vocab: int, on_failed: Callable[[], None]) -> None:
        self._native, self._n_vocab, self._on_failed = native, n_vocab, on_failed
        self._mask = np.zeros((n_vocab + 31) // 32, dtype=np.int32)
        self.finished = False

    def choose(self, logits: npt.NDArray[np.float32], token: int, redraw: Callable[[], int]) -> int:
        """Takes the drawn token where the constraint allows it; else masks all others and draws again.

        Args:
            logits: (n_vocab,), those the draw reads; the mask is written into them.
            redraw: draws from the masked logits.

        Returns:
            The token that was taken.

        Raises:
            ConstraintFailedError: no token can follow, or finding out is beyond the limits.
        """
        if not self.take(token):
            np.putmask(logits, ~self._allowed(), -np.inf)
            best = int(logits.argmax())
            if not np.isfinite(logits[best]):
                self._fail(_NO_TOKEN)
            token = redraw()
            # A draw may land on a masked one by a rounding.
            token = token if np.isfinite(logits[token]) else best
            if not self.take(token):
                self._fail("the constraint contradicts itself")
        return token

    def take(self, token: int) -> bool:
        """Goes one token on, if it is allowed. Raises `ConstraintFailedError` beyond the limits."""
        taken = bool(self._native.try_consume_tokens([token]) == 1)
        if self._native.is_error():
            self._fail(self._native.get_error())
        self.finished = self._native.is_stopped()
        return taken

    def allowed(self) -> npt.NDArray[np.int64]:
        """The tokens that may come next. Raises `ConstraintFailedError` beyond the limits."""
        return np.flatnonzero(self._allowed())

    def _allowed(self) -> npt.NDArray[np.bool_]:
        self._native.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._native.is_error():
            self._fail(self._native.get_error())
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
        return bits[: self._n_vocab].view(np.bool_)

    def _fail(self, why: str) -> None:
        self._on_failed()
        raise ConstraintFailedError(_said(why))


class _Compiled:
    """A constraint as the cache keeps it. Matchers share its lexer's memory, so one at its limits is thrown away."""

    def __init__(self, native: llguidance.LLMatcher) -> None:
        self.native = native
        self.spoiled = False

    def spoil(self) -> None:
        self.spoiled = True


class Constraints:
    """Compiles for one vocabulary and keeps the last 64. Any thread; a compilation takes milliseconds, rarely a second.

    Args:
        pieces: gives each token's bytes, in order; empty for those that are no text. Called once, at the first use.
        ends: the tokens that end an answer.
    """

    def __init__(self, pieces: Callable[[], Sequence[bytes]], ends: Sequence[int]) -> None:
        self._pieces, self._ends = pieces, list(ends)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._n_vocab = 0
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()

    def grammar(self, text: str) -> Matcher:
        """A matcher at the beginning of a GBNF grammar. Raises `GrammarInvalid` with line and column."""
        return self._matcher("gbnf", text, lambda: self._compiled_grammar(text))

    def schema(self, schema: dict[str, Any]) -> Matcher:
        """A matcher at the beginning of a JSON Schema. Raises `SchemaInvalid` with the path."""
        pointers = json_schema.check(schema)
        return self._matcher("schema", json.dumps(schema), lambda: self._compiled_schema(schema, pointers))

    def _matcher(self, kind: str, text: str, compile_it: Callable[[], llguidance.LLMatcher]) -> Matcher:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._vocabulary()
            found = self._cache.get((kind, text))
            if found is not None and not found.spoiled:
                self._cache.move_to_end((kind, text))
        if found is None or found.spoiled:
            found = _Compiled(compile_it())
            # What cannot even begin is found out here, and not by the engine.
            Matcher(found.native.deep_copy(), self._n_vocab, found.spoil).allowed()
            with self._lock:
                self._cache[kind, text] = found
                while len(self._cache) > _CACHE_ITEMS:
                    self._cache.popitem(last=False)
        return Matcher(found.native.deep_copy(), self._n_vocab, found.spoil)

    def _vocabulary(self) -> llguidance.LLTokenizer:
        if not self._ends:
            raise ConstraintError("this model's vocabulary has no token that ends an answer: it cannot be constrained")
        # 0xFF, which no UTF-8 holds, marks what is no text for llguidance.
        tokens = [piece or b"\xff<[%d]>" % token for token, piece in enumerate(self._pieces())]
        self._n_vocab = len(tokens)
        return llguidance.LLTokenizer(_Tokens(tokens, self._ends[0]), eos_token=self._ends)  # type: ignore[arg-type]

    def _compiled_grammar(self, text: str) -> llguidance.LLMatcher:
        rules = gbnf.parse(text)
        larks = dict.fromkeys(lexemes.to_lark(rules, whole=whole) for whole in (True, False))
        for lark in larks:
            native = self._compiled(lark)
            if not (why := self._fault(native)):
                return native
        raise GrammarInvalid(f"the grammar cannot be used: {why}")

    def _compiled_schema(self, schema: dict[str, Any], pointers: list[str]) -> llguidance.LLMatcher:
        native = self._compiled(_schema_lark(schema))
        why = self._fault(native)
        if not why:
            return native
        # The deepest subschema that fails alone is where it lies.
        where = "#"
        inner = _under_definition(schema, pointers)
        for pointer in sorted(pointers, key=lambda each: -each.count("/"))[:_MAX_PROBES]:
            probe = {"$ref": "#/$defs/whole" + pointer.removeprefix("#"), "$defs": {"whole": inner}}
            fault = "" if pointer == "#" else self._fault(self._compiled(_schema_lark(probe)))
            # One that nothing fits is a fault only where it is the whole's.
            if fault and (_UNSATISFIABLE in why or _UNSATISFIABLE not in fault) and "schema is false" not in fault:
                where, why = pointer, fault
                break
        raise SchemaInvalid(why, path=where)

    def _compiled(self, lark: str) -> llguidance.LLMatcher:
        assert self._tokenizer is not None
        return llguidance.LLMatcher(
            self._tokenizer, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0, limits=_LIMITS
        )

    def _fault(self, native: llguidance.LLMatcher) -> str:
        """Why a compilation is of no use; empty when it is."""
        if native.is_error():
            return _said(native.get_error())
        try:
            fits = Matcher(native.deep_copy(), self._n_vocab, lambda: None).allowed()
        except ConstraintFailedError as error:
            return str(error)
        return "" if fits.size else _NO_TOKEN


class _Tokens:
    """A vocabulary in the form llguidance reads. It never tokenises: forced text is left to the model."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], eos: int) -> None:
        self.tokens, self.eos_token_id = tokens, eos

    def __call__(self, text: bytes) -> list[int]:
        return []


def _schema_lark(schema: dict[str, Any]) -> str:
    # Both say how a schema is read; llguidance would take older drafts' meaning from the first.
    read = {key: value for key, value in schema.items() if key not in ("$schema", "$id")}
    return lexemes.for_schema(json.dumps({"x-guidance": {"whitespace_pattern": _BLANKS}} | read))


def _under_definition(schema: dict[str, Any], pointers: list[str]) -> Any:
    """A copy to be placed at `#/$defs/whole`, its references moved along."""
    copy = json.loads(json.dumps({key: value for key, value in schema.items() if key not in ("$schema", "$id")}))
    for pointer in pointers:
        at = copy
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            at = at[int(key)] if isinstance(at, list) else at[key]
        if isinstance(at, dict) and "$ref" in at:
            at["$ref"] = "#/$defs/whole" + at["$ref"].removeprefix("#")
    return copy


def _said(message: str) -> str:
    """llguidance's message in one line, without its place in the text that was made for it."""
    if "oneOf constraints" in message:
        return "oneOf is enforced only where its alternatives cannot overlap: use anyOf, or make their types differ"
    if message.startswith("NoExtension"):
        return _NO_TOKEN
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["unknown fault"]
    said = re.sub(r"^(at )?\d+\(\d+\): ", "", lines[0]).removeprefix("failed to compile JSON schema: ")
    # A regular expression's fault stands in its last line.
    fault = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return f"{said} {fault}".strip()[:300]


# -- what a request asks for ------------------------------------------------------------------------------------------


def matcher_for(params: Params, constraints: Compiler, grammars: Grammars | None) -> Matcher:
    """The matcher that a request's parameters ask for. Blocks: files and compilation.

    `params.grammar` is a grammar's text when it holds `::=`, else the name of a stored one.

    Raises:
        UnknownGrammar, GrammarInvalid, SchemaInvalid: with the parameter's name.
    """
    param = "params.json_schema" if params.grammar is None else "params.grammar"
    try:
        if params.json_schema is not None:
            return constraints.schema(params.json_schema)
        text = params.grammar or ""
        if "::=" in text:
            return constraints.grammar(text)
        stored = None if grammars is None else grammars.find(text)
        if stored is None:
            raise UnknownGrammar(text)
        if stored.is_schema:
            return constraints.schema(_parsed(stored.content))
        return constraints.grammar(stored.content)
    except (ConstraintError, UnknownGrammar, BadRequest) as error:
        error.param = param
        raise


_BYTES = Constraints(lambda: [*(bytes([byte]) for byte in range(256)), b""], [256])


def check_stored(content: str, *, schema: bool) -> None:
    """Compiles for a vocabulary of bytes, so that what is stored can be used. Raises what compiling does. Blocks."""
    if schema:
        _BYTES.schema(_parsed(content))
    else:
        _BYTES.grammar(content)


def _parsed(content: str) -> dict[str, Any]:
    """A schema's text as an object."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SchemaInvalid(f"not JSON: {str(error) or 'nested too deeply'}", path="#") from None
    if not isinstance(parsed, dict):
        raise SchemaInvalid("expected an object", path="#")
    return parsed
