"""Durable requests as the one who asks sees them: put into a model's queue with a receipt, their answers awaited, and
asked for again from time to time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from nats.aio.client import Client as Connection
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout

from infsvc import subjects
from infsvc.client import CLIENT_ID, Ask
from infsvc.errors import ClientError, NoAnswer, RequestError, Unreachable, rebuilt
from infsvc.nats_messages import answer_of, encode, unsubscribed

ACK_S = 15.0
"""How long the broker may take to confirm a durable request; a cluster that lost a server needs up to 10 s."""

ASK_AGAIN_S = 15.0
"""How long a durable answer is waited for before it is asked for again."""

_TRY_S = 3.0
_LEADERLESS_S = 0.25
_QUEUE_FULL = 10077
_NOT_YET = frozenset({"queue_full", "draining", "model_not_loaded"})
"""Refusals of a repeated question, which say nothing about the durable request itself."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")


class NatsJobs:
    """The durable requests of one connection. What fails of the connection itself comes as nats-py's own error.

    Args:
        farewell: runs a last word beside whoever sends it.
    """

    def __init__(self, nc: Connection, *, farewell: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._nc, self._farewell = nc, farewell
        self._jobs: dict[str, tuple[asyncio.Future[dict[str, Any]], list[Subscription]]] = {}
        self._repeated: set[str] = set()

    def close(self) -> None:
        """Waits for nothing any more; the requests themselves go on."""
        for future, _ in self._jobs.values():
            future.cancel()
        self._jobs.clear()

    async def submit(self, ask: Ask, model: str, subject: str) -> None:
        """Puts a request into the model's queue, and listens for its answer from then on.

        Raises:
            NoRespondersError: there is no such queue.
            NatsTimeout: the broker did not confirm it, and may have it all the same.
        """
        await self._await_job(ask)
        headers = {subjects.MSG_ID_HEADER: subjects.msg_id(model, ask.req_id), subjects.CLIENT_HEADER: CLIENT_ID}
        try:
            message, again = await self._receipt(subject, ask, headers)
            if _acknowledged(message, model, subject) and not again:
                self._repeated.add(ask.req_id)
        except BaseException:
            self._forget_job(ask.req_id)
            raise

    async def _receipt(self, subject: str, ask: Ask, headers: dict[str, str]) -> tuple[Msg, bool]:
        """The broker's receipt for a durable request, and whether it took more than one try: of a cluster, a server may
        have gone with it, or the queue be without a leader. The id makes a second try harmless."""
        until_s = time.monotonic() + min(ACK_S, ask.timeout_s)
        again = False
        while True:
            left_s = until_s - time.monotonic()
            try:
                data = encode(_durable(ask.body))
                timeout_s = max(0.001, min(left_s, _TRY_S))
                return await self._nc.request(subject, data, timeout=timeout_s, headers=dict(headers)), again
            except NatsTimeout:
                if time.monotonic() >= until_s:
                    raise
            except NoRespondersError:
                if left_s <= 0 or not await self._has_jetstream():
                    raise
                await asyncio.sleep(_LEADERLESS_S)
            again = True

    async def _has_jetstream(self) -> bool:
        try:
            await self._nc.request("$JS.API.INFO", timeout=_TRY_S)
        except NoRespondersError:
            return False
        except NatsTimeout:
            pass
        return True

    async def result(self, ask: Ask, subject_of: Callable[[Ask], Awaitable[str]]) -> dict[str, Any]:
        """Waits on where the answer goes, and asks for it again from time to time: a node gives a known answer again,
        which finds one that came before, or while the connection was away.

        Args:
            subject_of: where to ask again.
        """
        deadline_s = time.monotonic() + ask.timeout_s
        # What was asked before may have been answered before.
        known = ask.req_id in self._jobs and ask.req_id not in self._repeated
        future = await self._await_job(ask)
        wait_s = ASK_AGAIN_S if known else 0.0
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                done, _ = await asyncio.wait({future}, timeout=min(wait_s, left_s))
                if done:
                    return future.result()
                with suppress(NatsError, OSError):
                    subject = await subject_of(ask)
                    await self._nc.publish(subject, encode(_durable(ask.body)), reply=self._inbox(ask.req_id))
                wait_s = ASK_AGAIN_S
            raise NoAnswer(f"{ask.req_id} was not answered within {ask.timeout_s:g} s; it goes on all the same")
        finally:
            if future.done():
                self._forget_job(ask.req_id)

    async def _await_job(self, ask: Ask) -> asyncio.Future[dict[str, Any]]:
        """Listens where the answer goes, before it can come."""
        if ask.req_id in self._jobs:
            return self._jobs[ask.req_id][0]
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def settle(message: Msg, *, final: bool) -> None:
            if future.done() or (message.headers and message.headers.get("Status") == "503"):
                return
            try:
                answer = answer_of(message, message.subject)
            except RequestError as error:
                if final or error.code not in _NOT_YET:
                    future.set_exception(error)
                    future.exception()  # read here, so that one whom nobody asks about is no complaint
            except ClientError:
                return
            else:
                future.set_result(answer)

        async def copied(message: Msg) -> None:
            settle(message, final=True)

        async def repeated(message: Msg) -> None:
            settle(message, final=False)

        subscriptions = [
            await self._nc.subscribe(_reply_to(ask.body), cb=copied),
            await self._nc.subscribe(self._inbox(ask.req_id), cb=repeated),
        ]
        self._jobs[ask.req_id] = (future, subscriptions)
        return future

    def _forget_job(self, req_id: str) -> None:
        self._repeated.discard(req_id)
        for subscription in self._jobs.pop(req_id, (None, []))[1]:
            self._farewell(unsubscribed(subscription))

    def _inbox(self, req_id: str) -> str:
        return f"_INBOX.infsvc.{_digest(f'{id(self)} {req_id}')}"


def _durable(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"reply_to": _reply_to(body)}


def _reply_to(body: dict[str, Any]) -> str:
    req_id = str(body["req_id"])
    return f"{subjects.REPLY_PREFIX}.{req_id if _TOKEN.fullmatch(req_id) else _digest(req_id)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _acknowledged(message: Msg, model: str, subject: str) -> bool:
    """Checks a PubAck; whether the broker had the request before."""
    try:
        body = json.loads(message.data)
        error = body.get("error")
    except (ValueError, AttributeError):
        raise ClientError(f"{subject} answered no receipt: is it JetStream's?") from None
    if error:
        if isinstance(error, dict) and error.get("err_code") == _QUEUE_FULL:
            raise rebuilt({"code": "queue_full", "error": f"the durable queue of {model} is full: try again later"})
        told = error.get("description") if isinstance(error, dict) else error
        raise Unreachable(f"the broker did not take the request for {model}: {told}")
    return bool(body.get("duplicate"))
