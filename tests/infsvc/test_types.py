"""What is let in over the wire, field by field, and what is refused with the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from infsvc.types import (
    CompletionReply,
    CompletionRequest,
    Message,
    ModelState,
    Params,
    backpressure_level,
    human_count,
    new_req_id,
)

NAN, INF = float("nan"), float("inf")


def test_the_defaults_are_the_contracts() -> None:
    request = CompletionRequest(input="hi")
    assert (request.raw, request.stream, request.priority, request.req_id) == (False, False, 0, None)
    params = request.params
    assert (params.max_tokens, params.temperature, params.stop, params.seed) == (512, 0.7, (), None)
    assert (params.ignore_eos, params.grammar, params.json_schema) == (False, None, None)


@pytest.mark.parametrize(
    ("field", "good"),
    [
        ("max_tokens", 1),
        ("max_tokens", 10**30),
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 0.0),
        ("top_p", 1),
        ("top_k", 0),
        ("min_p", 1.0),
        ("repeat_penalty", 0.5),
        ("repeat_last_n", -1),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("seed", None),
        ("stop", []),
        ("stop", ["x"] * 16),
        ("stop", None),
        ("ignore_eos", True),
        ("logit_bias", {"5": -100, "07": 2.5}),
        ("logit_bias", {}),
        ("logit_bias", None),
    ],
)
def test_what_is_let_in(field: str, good: Any) -> None:
    Params.model_validate({field: good})
    Params.model_validate_json(json.dumps({field: good}))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "many"),
        ("max_tokens", None),
        ("temperature", NAN),
        ("temperature", INF),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_p", NAN),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_k", -1),
        ("top_k", 2**31),
        ("min_p", NAN),
        ("min_p", 2),
        ("repeat_penalty", 0),
        ("repeat_penalty", 1e-30),
        ("repeat_penalty", INF),
        ("repeat_last_n", -2),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5": 1, "05": 2}),
        ("logit_bias", [[5, 1]]),
        ("logit_bias", {str(n): 1 for n in range(1025)}),
        ("presence_penalty", 3),
        ("frequency_penalty", NAN),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", [""]),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 1025]),
        ("stop", [5]),
        ("stop", 5),
        ("ignore_eos", "perhaps"),
        ("json_schema", "text"),
        ("tempreature", 1),
    ],
)
def test_what_is_refused_names_its_field(field: str, bad: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"input": "hi", "params": {field: bad}})
    (error, *_) = caught.value.errors()
    assert error["loc"][:2] == ("params", field)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("input", ""),
        ("input", None),
        ("input", 5),
        ("input", "lone \ud800"),
        ("req_id", ""),
        ("req_id", "x" * 201),
        ("trace_id", "x" * 201),
        ("priority", 10),
        ("priority", -1),
        ("priority", 1.5),
        ("priority", "9"),
        ("priority", True),
        ("priority", None),
        ("reply_to", ""),
        ("reply_to", "x" * 256),
        ("raw", "perhaps"),
        ("params", None),
        ("params", []),
        ("promt", "x"),
    ],
)
def test_a_request_refuses_what_it_does_not_know(field: str, bad: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"input": "hi"} | {field: bad})
    (error, *_) = caught.value.errors()
    assert error["loc"][0] == field


def test_a_request_without_an_input_is_refused() -> None:
    with pytest.raises(ValidationError, match="input"):
        CompletionRequest.model_validate({})


def test_one_stop_string_or_many() -> None:
    assert Params.model_validate({"stop": "x"}).stop == ("x",)
    assert Params.model_validate({"stop": ["x", "y"]}).stop == ("x", "y")


def test_a_role_that_no_template_knows_is_refused() -> None:
    with pytest.raises(ValidationError, match="role"):
        Message.model_validate({"role": "developer", "content": "x"})


def test_a_reply_leaves_out_what_is_not_there() -> None:
    reply = CompletionReply(req_id="r", text="", tokens_in=1, tokens_out=2, finish_reason="stop", duration_ms=5, ms=5)
    assert reply.wire() == {
        "req_id": "r",
        "text": "",
        "tokens_in": 1,
        "tokens_out": 2,
        "tokens_cached": 0,
        "finish_reason": "stop",
        "duration_ms": 5,
        "ms": 5,
    }


def test_req_ids_are_distinct() -> None:
    ids = {new_req_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(each) == 16 for each in ids)


@pytest.mark.parametrize(
    ("n_waiting", "level"),
    [(0, "healthy"), (4, "healthy"), (5, "warning"), (9, "warning"), (10, "critical"), (99, "critical")],
)
def test_levels_by_the_threshold(n_waiting: int, level: str) -> None:
    assert backpressure_level(n_waiting, threshold=5, capacity=1000) == level


def test_a_full_queue_is_critical_below_the_threshold_too() -> None:
    assert backpressure_level(2, threshold=5, capacity=2) == "critical"


def test_every_state_has_a_health_status() -> None:
    assert {state.value: state.health_status for state in ModelState} == {
        "absent": "offline",
        "downloading": "loading",
        "verifying": "loading",
        "on_disk": "offline",
        "loading": "loading",
        "ready": "online",
        "draining": "draining",
        "failed": "failed",
    }


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (-1, "0"),
        (0, "0"),
        (1, "1"),
        (999, "999"),
        (1000, "1K"),
        (999_999, "1.0M"),
        (1_500_000, "1.5M"),
        (268_000_000, "268M"),
        (999_999_999, "1.0B"),
        (4_022_468_096, "4.0B"),
        (20_914_757_184, "20.9B"),
        (1_500_000_000_000, "1.5T"),
        (10**18, "1000000.0T"),
    ],
)
def test_counts_as_people_write_them(n: int, text: str) -> None:
    assert human_count(n) == text


def test_a_request_has_an_input_or_messages() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    request = CompletionRequest.model_validate({"messages": messages})
    assert request.input is None
    assert [message.role for message in request.messages] == ["system", "user"]
    for body, param in (
        ({}, "input"),
        ({"messages": []}, "input"),
        ({"input": "x", "messages": messages}, "input"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": "hi"}, "messages"),
    ):
        with pytest.raises(ValidationError) as error:
            CompletionRequest.model_validate(body)
        assert error.value.errors()[0]["loc"][0] == param
