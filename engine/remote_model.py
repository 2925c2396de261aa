"""The vocabulary of a model that is loaded in another process, and what answers can be held to in it: each question is
put to the child, where a text that makes llama.cpp or llguidance fall over ends that model alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

from engine.constraint import Matcher
from engine.model_process import ModelProcess

FACTS = ("n_vocab", "n_ctx_train", "adds_bos", "adds_eos", "adds_sep", "bos", "eos", "sep")
"""What is known from the load on."""


class Vocabulary(Protocol):
    """What prompts need of a model, wherever it is loaded. Any thread, while it is."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def adds_eos(self) -> bool: ...

    @property
    def adds_sep(self) -> bool: ...

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    @property
    def sep(self) -> int: ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def token_text(self, token: int) -> str: ...


class RemoteModel:
    """A model as `engine.llama.LlamaModel` describes it, by way of its process. Each method waits for an answer, some
    tenths of a millisecond: not on the loop's thread. All raise `EngineLost` when the process is gone."""

    def __init__(self, process: ModelProcess, facts: dict[str, Any]) -> None:
        self._process = process
        self.n_vocab: int = facts["n_vocab"]
        self.n_ctx_train: int = facts["n_ctx_train"]
        self.adds_bos: bool = facts["adds_bos"]
        self.adds_eos: bool = facts["adds_eos"]
        self.adds_sep: bool = facts["adds_sep"]
        self.bos: int = facts["bos"]
        self.eos: int = facts["eos"]
        self.sep: int = facts["sep"]
        self._texts: dict[int, str] = {}

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Text → token ids."""
        return cast(list[int], self._process.call("tokenize", text, add_special, parse_special))

    def token_text(self, token: int) -> str:
        """The vocabulary's own spelling of a token; empty for none (−1)."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = cast(str, self._process.call("token_text", token))
        return found

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes a token stands for; control tokens are empty unless `special`."""
        return cast(bytes, self._process.call("piece", token, special))


@dataclass(frozen=True, slots=True)
class RemoteMatcher:
    """A constraint that the child has compiled: it makes a matcher of it again, from its cache, for the sequence."""

    kind: str
    content: Any


class RemoteConstraints:
    """Compiles in the child, and so keeps the compiled ones there. Not on the loop's thread."""

    def __init__(self, process: ModelProcess) -> None:
        self._process = process

    def grammar(self, text: str) -> Matcher:
        """What stands for a matcher of a GBNF grammar. Raises `GrammarInvalid`, `EngineLost`."""
        return self._compiled("grammar", text)

    def schema(self, schema: dict[str, Any]) -> Matcher:
        """What stands for a matcher of a JSON Schema. Raises `SchemaInvalid`, `EngineLost`."""
        return self._compiled("schema", schema)

    def _compiled(self, kind: str, content: Any) -> Matcher:
        matcher = RemoteMatcher(kind, content)
        self._process.call("compile", matcher)
        # A sequence carries its matcher from the service to its engine, and nobody between looks into it.
        return cast(Matcher, matcher)
