"""Every malformed message becomes an error that names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infsvc.errors import BadRequest, TooLarge
from infsvc.types import MAX_BODY_BYTES
from transports.nats.messages import encode, encode_final, is_answerable, named, read_object, validate


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the message is empty: send a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8: byte 0 is 0xff"),
        (b"[1]", "a JSON array: send an object"),
        (b'"text"', "a JSON string: send an object"),
        (b'{"input": NaN}', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"input": "\\ud800"}', "input: .* half a character"),
    ],
    ids=range(8),
)
def test_what_is_no_object(data: bytes, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        read_object(data)


def test_too_large() -> None:
    with pytest.raises(TooLarge):
        read_object(b" " * (MAX_BODY_BYTES + 1))


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "Field required"),
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": 5}, "input", "valid string"),
        ({"input": "x", "params": {"temperature": 3}}, "params.temperature", "less than or equal to 2"),
        ({"input": "x", "params": {"max_tokens": "many"}}, "params.max_tokens", "valid integer"),
        ({"input": "x", "params": {"stop": ["a"] * 17}}, "params.stop", "at most 16 stop strings"),
        ({"input": "x", "best_of": 2}, "best_of", "no such field"),
        ({"input": "x", "model": "other"}, "model", "belongs to demo"),
        ({"input": "x", "reply_to": "a.b"}, "req_id", "needs a req_id"),
        ({"input": "x", "req_id": "1", "reply_to": "a.*"}, "reply_to", "wildcards"),
        ({"input": "x", "req_id": "1", "reply_to": "$SYS.x"}, "reply_to", "leading \\$"),
    ],
)
def test_what_is_no_request(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        validate(body, model="demo", has_reply=True)
    assert caught.value.param == param


def test_inert_fields_pass() -> None:
    body = {"input": "x", "user": "me", "metadata": {}, "store": False, "model": "demo"}
    assert validate(body, model="demo", has_reply=True).input == "x"


def test_reply_to_alone_is_enough_without_a_reply_subject() -> None:
    assert validate({"input": "x", "reply_to": "a.b"}, model="demo", has_reply=False).reply_to == "a.b"


@pytest.mark.parametrize("subject", ["a", "a.b", "inference.reply.42", "_INBOX.x"])
def test_answerable(subject: str) -> None:
    assert is_answerable(subject)


@pytest.mark.parametrize("subject", ["", "a b", "a.", ".a", "a..b", "a.>", "*", "a.*.b", "$JS.x", "a\r\nb", "x" * 256])
def test_not_answerable(subject: str) -> None:
    assert not is_answerable(subject)


@pytest.mark.parametrize("value", [None, 5, "", ["x"]])
def test_a_req_id_that_is_no_text_is_none(value: Any) -> None:
    assert named({"req_id": value}, "req_id") is None


def test_an_answer_that_is_too_long_says_so() -> None:
    answer = {"req_id": "r", "text": "x" * 100}
    assert json.loads(encode_final(answer, limit_bytes=1000)) == answer
    error = json.loads(encode_final(answer, limit_bytes=50))
    assert (error["req_id"], error["code"], error["status"]) == ("r", "answer_too_large", 500)
    assert "at most 50" in error["error"]


def test_text_stays_as_it_is() -> None:
    assert encode({"text": "Grüße 🙂"}) == '{"text":"Grüße 🙂"}'.encode()
