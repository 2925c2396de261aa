"""One request of a client as NATS messages: its bytes, its headers, and its answer back."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from infsvc import subjects
from infsvc.client import CLIENT_ID, Ask, read_answer
from infsvc.errors import ClientError


def encode(body: dict[str, Any]) -> bytes:
    """Raises `ClientError` for what JSON cannot hold."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ClientError(f"the request cannot be written as JSON: {error}") from None


def headers_of(ask: Ask) -> dict[str, str]:
    """When the asker goes, whose it is, and what the request is called where its body does not say."""
    headers = {subjects.DEADLINE_HEADER: f"{time.time() + ask.timeout_s:.3f}", subjects.CLIENT_HEADER: CLIENT_ID}
    return headers if ask.is_named else headers | {subjects.REQ_ID_HEADER: ask.req_id}


def answer_of(message: Msg, subject: str) -> dict[str, Any]:
    """The answer in a message; raises `RequestError` for a node's refusal, `ClientError` for what is no answer."""
    body = read_answer(message.data, source=subject)
    if "stream" in body and "seq" in body and "req_id" not in body:
        raise ClientError(
            f"the stream {body['stream']} stores {subject} and answered in the model's place: "
            "take that subject out of the stream"
        )
    return body


async def unsubscribed(subscription: Subscription) -> None:
    """Leaves a subject; a connection that is gone has left it already."""
    with suppress(NatsError, OSError):
        await subscription.unsubscribe()
