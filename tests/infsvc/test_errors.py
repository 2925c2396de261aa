"""One table: what each error answers at each door."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infsvc import errors
from infsvc.errors import ConfigError, InfsvcError, LoadError, MemoryFitError, ModelFileError, RequestError

EVERY = [
    (errors.BadRequest("x", param="input"), 400, "bad_request"),
    (errors.ContextLengthExceeded(n_prompt_tokens=9, n_ctx=8), 400, "context_length_exceeded"),
    (errors.Unsupported("params.grammar", "why"), 400, "unsupported"),
    (errors.TextTooLong(index=0, n_prompt_tokens=9, n_ctx=8, n_ctx_train=8), 400, "context_length_exceeded"),
    (errors.Cancelled("x"), 499, "cancelled"),
    (errors.CannotEmbed("x"), 503, errors.CannotEmbed.code),
    (errors.UnknownModel("m", ["a", "b"]), 404, "model_not_found"),
    (errors.UnknownRequest("x"), 404, "request_not_found"),
    (errors.UnknownGrammar("x"), 404, "grammar_not_found"),
    (errors.NotFound("x"), 404, "not_found"),
    (errors.MethodNotAllowed("x"), 405, "method_not_allowed"),
    (errors.GrammarConflict("x", param="name"), 409, "grammar_conflict"),
    (errors.ConstraintError("x"), 422, "constraint_invalid"),
    (errors.GrammarInvalid("x", line=2, column=3), 422, "grammar_invalid"),
    (errors.SchemaInvalid("x", path="#/a"), 422, "schema_invalid"),
    (errors.TooLarge(8 * 2**20), 413, "too_large"),
    (errors.Conflict("r"), 409, "req_id_conflict"),
    (errors.Removed("why"), 410, "removed"),
    (errors.GivenUp("why"), 500, "dead_letter"),
    (errors.NodeLost("beta", "is silent"), 502, "node_lost"),
    (errors.QueueUnavailable("why"), 503, "queue_unavailable"),
    (errors.DeadlineExceeded("why"), 504, "deadline_exceeded"),
    (errors.QueueFull(model="m", n_waiting=7, capacity=7, retry_after_s=3), 429, "queue_full"),
    (errors.ClientGone("x"), 499, "client_gone"),
    (errors.EngineFailed("x"), 500, "engine_failed"),
    (errors.EngineLost("m", "it ended with SIGABRT"), 503, "engine_lost"),
    (errors.ModelNotLoaded("m", "loading"), 503, "model_not_loaded"),
    (errors.Draining("x"), 503, "draining"),
    (errors.AuditUnavailable("x"), 503, "audit_unavailable"),
]


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


@pytest.mark.parametrize(("error", "status", "code"), EVERY, ids=[type(error).__name__ for error, *_ in EVERY])
def test_what_each_door_answers(error: RequestError, status: int, code: str) -> None:
    assert (error.status, error.code) == (status, code)
    native = error.native("r1")
    assert native["req_id"] == "r1"
    assert native["error"] == str(error) != ""
    assert (native["code"], native["status"]) == (code, status)
    assert native.get("param") == error.param
    openai = error.openai()
    assert list(openai) == ["error"]
    assert openai["error"] == {
        "message": str(error),
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": error.param,
        "code": code,
    }


def test_every_error_of_a_request_is_in_this_table_and_in_the_tree() -> None:
    own = {kind for kind in subclasses(RequestError) if kind.__module__ == errors.__name__}
    assert {type(error) for error, *_ in EVERY} == own
    for kind in (*own, *(each for each in subclasses(InfsvcError) if each.__module__ == errors.__name__)):
        assert kind.__name__ in (errors.__doc__ or "")


def test_the_sentences_name_the_figures() -> None:
    sentences = {type(error): str(error) for error, *_ in EVERY}
    assert "9 tokens" in sentences[errors.ContextLengthExceeded]
    assert "8 tokens" in sentences[errors.ContextLengthExceeded]
    assert sentences[errors.QueueFull] == "m has 7 requests waiting and room for 7: try again in 3 s"
    assert sentences[errors.UnknownModel] == "no model 'm'; there are: a, b"
    assert "8 MiB" in sentences[errors.TooLarge]
    assert "/api/models/m/load" in sentences[errors.ModelNotLoaded]
    assert sentences[errors.Unsupported] == "params.grammar is not supported: why"
    assert str(errors.UnknownModel("m", [])).endswith("there are: none")


def test_when_to_come_back() -> None:
    full = errors.QueueFull(model="m", n_waiting=7, capacity=7, retry_after_s=3)
    assert full.headers == {"Retry-After": "3", "X-Queue-Depth": "7"}
    assert full.native(None) | {"queue_depth": 7, "retry_after_s": 3} == full.native(None)
    assert errors.ModelNotLoaded("m", "loading").headers == {"Retry-After": "2"}
    assert errors.ModelNotLoaded("m", "failed", "no memory").headers == {}
    assert "m is failed (no memory)" in str(errors.ModelNotLoaded("m", "failed", "no memory"))
    assert errors.Draining("x").headers == {"Retry-After": "5"}
    assert errors.BadRequest("x").headers == {}


def test_a_config_error_names_what_it_knows() -> None:
    assert str(ConfigError("wrong", file="f.env", line=3, key="K")) == "f.env:3: K: wrong"
    assert str(ConfigError("wrong", file="f.env")) == "f.env: wrong"
    assert str(ConfigError("wrong", key="K")) == "K: wrong"
    assert str(ConfigError("wrong")) == "wrong"


def test_a_memory_error_names_both_figures() -> None:
    error = MemoryFitError(needed_bytes=3 * 2**30, free_bytes=2**30, parts="weights 3.0")
    assert str(error).startswith("needs 3.0 GiB (weights 3.0) and 1.0 GiB are free")
    assert isinstance(error, LoadError)
    assert issubclass(ModelFileError, LoadError)


@pytest.mark.parametrize(("error", "status", "code"), EVERY, ids=[type(error).__name__ for error, *_ in EVERY])
def test_an_answer_gives_the_error_back(error: RequestError, status: int, code: str) -> None:
    again = errors.rebuilt(error.native("r1"))
    # One that shares its code with its parent comes back as that.
    assert isinstance(error, type(again))
    assert again.code == error.code
    assert (str(again), again.param, again.status, again.code) == (str(error), error.param, status, code)
    if code == "queue_full":
        assert again.headers == error.headers


def test_an_unknown_code_is_still_a_request_error() -> None:
    again = errors.rebuilt({"error": "no", "code": "of_tomorrow", "status": 418})
    assert isinstance(again, RequestError)
    assert (str(again), again.status, again.code) == ("no", 418, "of_tomorrow")
    for body in ({}, {"error": None}, {"status": "x", "code": 3}):
        assert errors.rebuilt(body).status == 500
