"""What became of each request: one record per `(model, req_id)` in a bucket that all nodes share, for DEDUPE_WINDOW.

The broker's own window (`Nats-Msg-Id`) stops a message that is sent twice; this book is what makes a request that is
*asked* twice be executed once: whoever executes it writes so first, and only who saw the record's last revision may
write the next one.

    (no record) → running → done
                     ↓↑
                  released

`running` names the process at work. A process that died leaves it behind; who finds it asks the owner, and takes the
request over when nobody answers. `void` is what somebody else wrote there, or deleted: it counts as nothing.

Beside the records lie marks: that a front door has seen to what was published under a name, and when.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from infsvc.errors import EngineFailed
from infsvc.types import Wire
from transports.nats.jetstream import WRONG_REVISION, JetStream, JetStreamFault
from transports.nats.messages import encode

_MARK = "seen:"

State = Literal["running", "done", "released", "void"]


class Overtaken(Exception):
    """Somebody else has written the record in between."""


class _Page(Wire):
    """A record as it is stored."""

    state: State
    body: str
    owner: str = ""
    seq: int = 0
    answer: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a request.

    Attributes:
        body: `body_hash` of the request that the id belongs to.
        owner: the process that runs it, or ran it last.
        seq: the message of the queue that it runs for.
        answer: what was answered; None while it is not, and when it was too large to be kept.
        revision: the record's number; a later one must name it.
        stored_s: when it was written, by the broker's clock.
    """

    state: State
    body: str
    owner: str
    seq: int
    answer: dict[str, Any] | None
    revision: int
    stored_s: float


def body_hash(body: dict[str, Any]) -> str:
    """A request's identity beside its id: everything in it but where a copy of the answer goes."""
    essence = {key: value for key, value in body.items() if key != "reply_to"}
    text = json.dumps(essence, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def answer_of(record: Record, req_id: str) -> dict[str, Any]:
    """What a repeat of a request that is done is told."""
    if record.answer is not None:
        return record.answer
    return EngineFailed("the request was answered before, and the answer was too large to be kept").native(req_id)


class OnceBook:
    """The records of one model. Loop thread; each call may raise `JetStreamFault`."""

    def __init__(self, js: JetStream, bucket: str) -> None:
        self._js, self._bucket = js, bucket

    def _subject(self, req_id: str) -> str:
        # An id may hold what no key may.
        return f"$KV.{self._bucket}.{hashlib.sha256(req_id.encode(errors='surrogatepass')).hexdigest()[:32]}"

    async def read(self, req_id: str) -> Record | None:
        """The record of an id, or None when there is none (any more)."""
        kept = await self._js.last(f"KV_{self._bucket}", self._subject(req_id))
        if kept is None:
            return None
        try:
            page = _Page.model_validate_json(kept.data)
        except ValueError:
            page = _Page(state="void", body="")
        return Record(**page.model_dump(), revision=kept.seq, stored_s=kept.stored_s)

    async def mark(self, name: str) -> None:
        """Notes that what was published under a name has been seen to."""
        await self._js.publish(self._subject(f"{_MARK}{name}"), b"{}")

    async def marked_s(self, name: str) -> float:
        """When that was noted last, by the broker's clock; 0 when it was not."""
        kept = await self._js.last(f"KV_{self._bucket}", self._subject(f"{_MARK}{name}"))
        return 0.0 if kept is None else kept.stored_s

    async def write(
        self,
        req_id: str,
        state: State,
        *,
        body: str,
        owner: str = "",
        seq: int = 0,
        answer: dict[str, Any] | None = None,
        over: int | None,
        limit_bytes: int,
    ) -> int:
        """Writes the next record.

        Args:
            over: the revision that this one follows, 0 for none; None writes whatever is there.
            limit_bytes: the broker's largest message; an answer beyond it is left out.

        Returns:
            The new revision.

        Raises:
            Overtaken: `over` is no longer the newest.
        """
        page: dict[str, Any] = {"state": state, "body": body, "owner": owner, "seq": seq}
        data = encode(page | {"answer": answer})
        if len(data) > limit_bytes - 1024:
            data = encode(page)
        headers = {} if over is None else {"Nats-Expected-Last-Subject-Sequence": str(over)}
        try:
            return (await self._js.publish(self._subject(req_id), data, headers)).seq
        except JetStreamFault as fault:
            if fault.err_code == WRONG_REVISION:
                raise Overtaken from None
            raise
