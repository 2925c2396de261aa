"""The client's way over NATS: requests on the models' subjects, durable ones through JetStream, nodes found by their
heartbeats.

Each request is called something, in its body where the caller named it and else in a header, so that leaving it, by a
time-out, a cancel or an early end of a stream, can stop it wherever it runs; and has a deadline, so that nothing is
computed for nobody. A `req_id` in the body is for the durable queue, so that what the caller has not named goes
straight to a node: to the one with the most room where the roster is kept, else to the one that the broker picks.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from nats.aio.client import Client as Connection
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError, NoRespondersError
from nats.errors import TimeoutError as NatsTimeout
from pydantic import ValidationError

from infsvc import subjects
from infsvc.client import Ask
from infsvc.errors import (
    ClientError,
    ModelNotLoaded,
    NoAnswer,
    RequestError,
    TooLarge,
    UnknownModel,
    UnknownRequest,
    Unreachable,
)
from infsvc.nats_jobs import NatsJobs
from infsvc.nats_login import NatsLogin
from infsvc.nats_messages import answer_of, encode, headers_of, unsubscribed
from infsvc.roster import Roster, roomiest
from infsvc.types import Capability, HealthDocument, ServiceDocument
from infsvc.watch import Watch

CONNECT_S = 5.0
_LEADERLESS_S = 0.25
_MOVE_S = 5.0
"""How long a node may take from a server of a cluster that died to another one."""
_ELECTED_S = 10.0
"""How long a cluster may take to choose new leaders; what was asked meanwhile may be lost."""
_CLOSE_S = 1.0
_TURNS = 5
"""How many turns the loop is given at the end: it is the loop that closes a stream left by `break`."""


class NatsLink:
    """One connection, which comes back by itself when it is lost."""

    def __init__(self, login: NatsLogin, *, roster: Roster | None = None) -> None:
        self._login, self._shown = login, login.shown
        self._nc = login.client()
        self._reconnected = asyncio.Event()
        self._roster = Roster() if roster is None else roster
        self._watch: Watch | None = None
        self._routes: set[_Route] = set()
        self._watching = asyncio.Lock()
        self._jobs = NatsJobs(self._nc, farewell=self._farewell)
        self._farewells: set[asyncio.Task[None]] = set()
        self._last_error: Exception | None = None

    @property
    def connection(self) -> Connection:
        """The nats-py client, for what this project has no method for."""
        return self._nc

    async def open(self) -> None:
        """Connects. Raises `Unreachable` when no broker answers within `CONNECT_S`, `ConfigError` for a file of the
        login that is of no use."""
        options = self._login.options()
        failed = asyncio.Event()
        n_left = len(self._login.servers)

        async def note(error: Exception) -> None:
            nonlocal n_left
            self._last_error = error
            n_left -= 1
            if n_left <= 0:
                failed.set()

        connecting = asyncio.ensure_future(
            self._nc.connect(
                list(self._login.servers),
                name="infsvc client",
                error_cb=note,
                reconnected_cb=self._came_back,
                connect_timeout=2,
                reconnect_time_wait=1,
                max_reconnect_attempts=-1,
                **options,
            )
        )
        # nats-py tries for ever; here one failure of each server is the answer.
        failing = asyncio.ensure_future(failed.wait())
        try:
            await asyncio.wait({connecting, failing}, timeout=CONNECT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failing.cancel()
            if not connecting.done():
                connecting.cancel()
                await asyncio.wait({connecting}, timeout=_CLOSE_S)
        error = None if connecting.cancelled() or not connecting.done() else connecting.exception()
        if self._nc.is_connected and error is None:
            return
        await self._leave()
        if error is not None and not isinstance(error, OSError | NatsError | TimeoutError):
            raise error
        told = self._last_error or error or TimeoutError("no answer")
        raise Unreachable(
            f"no broker answers at {self._shown}: {self._login.sentence(told)}; "
            "a running node starts one, or name yours"
        )

    async def close(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=_CLOSE_S)
        if self._watch is not None:
            await self._watch.close()
        self._jobs.close()
        await self._leave()

    async def _leave(self) -> None:
        closing = asyncio.ensure_future(self._nc.close())
        await asyncio.wait({closing}, timeout=_CLOSE_S)
        if not closing.done():
            closing.cancel()
        elif not closing.cancelled():
            closing.exception()

    async def complete(self, ask: Ask) -> dict[str, Any]:
        return await self._request(ask)

    async def embed(self, ask: Ask) -> dict[str, Any]:
        return await self._request(ask, embedding=True)

    async def _request(self, ask: Ask, *, embedding: bool = False) -> dict[str, Any]:
        async with self._route(ask, embedding=embedding) as route:
            subject = await route.next()
            while True:
                try:
                    message = await self._reply(ask, subject)
                except NoRespondersError:
                    subject = await route.next()
                    continue
                except NatsTimeout:
                    self._farewell(self._stop(ask.req_id))
                    raise await self._late(ask, subject) from None
                except asyncio.CancelledError:
                    self._farewell(self._stop(ask.req_id))
                    raise
                except (NatsError, OSError) as error:
                    raise self._broken(error) from None
                return answer_of(message, subject)

    async def _reply(self, ask: Ask, subject: str) -> Msg:
        """The reply to a request. One that is named is asked again after a connection that was lost, as the answer may
        have been lost with it: whoever has answered a `req_id` gives the same answer. And once more a while later, as
        a cluster that is choosing leaders may drop what comes meanwhile."""
        until_s = time.monotonic() + ask.timeout_s
        if not ask.is_named:
            return await self._reply_within(ask, subject, ask.timeout_s)
        tries: set[asyncio.Task[Msg]] = set()
        again_s = math.inf
        try:
            while True:
                back = self._reconnected
                tries.add(asyncio.create_task(self._reply_within(ask, subject, until_s - time.monotonic())))
                ended = await _first_reply(tries, back, again_s)
                if ended is not None:
                    return ended.result()
                again_s = time.monotonic() + _ELECTED_S if back.is_set() else math.inf
        finally:
            for each in tries:
                each.cancel()

    async def _reply_within(self, ask: Ask, subject: str, timeout_s: float) -> Msg:
        data, headers = encode(ask.body), headers_of(ask)
        return await self._nc.request(subject, data, timeout=max(0.001, timeout_s), headers=headers)

    async def _came_back(self) -> None:
        self._reconnected.set()
        self._reconnected = asyncio.Event()

    async def stream(self, ask: Ask) -> AsyncGenerator[dict[str, Any], None]:
        inbox = self._nc.new_inbox()
        expected, ended = 0, False
        try:
            answers = await self._nc.subscribe(inbox)
        except (NatsError, OSError) as error:
            raise self._broken(error) from None
        try:
            async with self._route(ask) as route:
                subject = await route.next()
                await self._publish(subject, ask, inbox)
                while True:
                    try:
                        message = await answers.next_msg(timeout=ask.timeout_s)
                        if message.headers and message.headers.get("Status") == "503":
                            raise NoRespondersError
                    except NoRespondersError:
                        subject = await route.next()
                        await self._publish(subject, ask, inbox)
                        continue
                    except NatsTimeout:
                        raise await self._late(ask, subject) from None
                    except (NatsError, OSError) as error:
                        raise self._broken(error) from None
                    try:
                        event = answer_of(message, subject)
                    except RequestError:
                        ended = True
                        raise
                    # A reply without its marker is that of a node that does not stream.
                    ended = bool(event.get("done")) or "finish_reason" in event
                    if ended:
                        yield event | {"done": True}
                        return
                    if event.get("index") != expected:
                        raise ClientError(
                            f"chunk {expected} of {ask.req_id} is missing: messages were lost, or another node took "
                            "the request over and began anew; ask again"
                        )
                    expected += 1
                    yield event
        finally:
            if not ended:
                self._farewell(self._stop(ask.req_id))
            self._farewell(unsubscribed(answers))

    async def _publish(self, subject: str, ask: Ask, inbox: str) -> None:
        try:
            await self._nc.publish(subject, encode(ask.body), reply=inbox, headers=headers_of(ask))
        except (NatsError, OSError) as error:
            raise self._broken(error) from None

    async def services(self) -> list[ServiceDocument]:
        return (await self.watched()).services()

    async def health(self, model: str, timeout_s: float) -> HealthDocument:
        _checked(model)
        try:
            message = await self._nc.request(subjects.health(model), timeout=timeout_s)
        except NoRespondersError:
            raise await self._nobody(model) from None
        except NatsTimeout:
            raise NoAnswer(f"{model} did not tell its health within {timeout_s:g} s") from None
        except (NatsError, OSError) as error:
            raise self._broken(error) from None
        try:
            return HealthDocument.model_validate_json(message.data)
        except ValidationError:
            raise ClientError(f"what answers on {subjects.health(model)} is no infsvc node") from None

    async def cancel(self, req_id: str, timeout_s: float) -> None:
        try:
            message = await self._nc.request(subjects.CANCEL, encode({"req_id": req_id}), timeout=timeout_s)
        except (NatsTimeout, NoRespondersError):
            # Only the owner answers.
            raise UnknownRequest(f"no node says that {req_id} runs or waits there: it may have ended") from None
        except (NatsError, OSError) as error:
            raise self._broken(error) from None
        answer_of(message, subjects.CANCEL)

    async def submit(self, ask: Ask) -> None:
        model = _checked(ask.model)
        try:
            await self._jobs.submit(ask, model, await self._queue(model))
        except NoRespondersError:
            found = await self._find(model)
            if found is None or found.status == "offline":
                raise await self._nobody(model) from None
            raise Unreachable(
                f"{model} has no durable queue at {self._shown}: does its broker run without JetStream?"
            ) from None
        except NatsTimeout:
            raise NoAnswer(
                f"the broker did not confirm {ask.req_id}; it may have it all the same: "
                "submit again with that req_id, and it is executed once"
            ) from None
        except (NatsError, OSError) as error:
            raise self._broken(error) from None

    async def result(self, ask: Ask) -> dict[str, Any]:
        try:
            return await self._jobs.result(ask, self._subject)
        except (NatsError, OSError) as error:
            raise self._broken(error) from None

    @asynccontextmanager
    async def _route(self, ask: Ask, *, embedding: bool = False) -> AsyncIterator[_Route]:
        """Where to ask, one place after another while nobody is there."""
        route = _Route(self, ask, embedding=embedding)
        self._routes.add(route)
        try:
            yield route
        finally:
            self._routes.discard(route)

    def _nodes(self, model: str) -> list[ServiceDocument]:
        """The nodes that have the model online, the one with the most room first. What this client has sent to one
        since it last told of itself counts."""
        seen_s = {sighting.key: sighting.last_seen_s for sighting in self._roster.sightings()}

        def n_more(service: ServiceDocument) -> int:
            key = (service.model_name, service.node, service.start_time)
            return sum(route.target == key and route.sent_s > seen_s.get(key, 0.0) for route in self._routes)

        return roomiest((each for each in self._roster.services() if each.model_name == model), n_more=n_more)

    async def _subject(self, ask: Ask, *, embedding: bool = False) -> str:
        if ask.subject is not None:
            return ask.subject
        model = _checked(ask.model)
        found = None if self._watch is None else await self._find(model)
        if found is not None and (not embedding or Capability.TEXT_GENERATION not in found.capabilities):
            return found.nats_topic
        return subjects.request(model, embedding=embedding)

    async def _queue(self, model: str) -> str:
        found = await self._find(model)
        embedding = found is not None and found.nats_topic.startswith("embedding.")
        return subjects.queue(model, embedding=embedding)

    async def _elsewhere(self, ask: Ask, subject: str, since_s: float, *, embedding: bool) -> str:
        """Another subject where the model is found when nobody listens on the usual one; raises when it is nowhere.

        A node that lost its server of a cluster is back at another one soon: the subject is the same then.
        """
        if ask.model is None:
            raise Unreachable(f"nobody answers on {subject}: is its model loaded?")
        found = await self._find(ask.model)
        # On a generating model's subject a text to embed would be answered with more text.
        fits = found is not None and not (embedding and Capability.TEXT_GENERATION in found.capabilities)
        if fits and found is not None and found.status != "offline" and found.nats_topic not in ("", subject):
            return found.nats_topic
        moves = len(self._nc.servers) > 1 and time.monotonic() - since_s < min(_MOVE_S, ask.timeout_s)
        if moves and found is not None and found.status == "online":
            await asyncio.sleep(_LEADERLESS_S)
            return subject
        raise await self._nobody(ask.model)

    async def _nobody(self, model: str) -> RequestError:
        found = await self._find(model)
        if found is None:
            return UnknownModel(model, (await self.watched()).models())
        return ModelNotLoaded(model, found.status, found.reason)

    async def _find(self, model: str) -> ServiceDocument | None:
        found = [each for each in (await self.watched()).services() if each.model_name == model]
        return min(found, key=lambda each: each.status != "online", default=None)

    async def watched(self) -> Roster:
        """The roster, kept from the first question on."""
        async with self._watching:
            if self._watch is None:
                watch = Watch(self._nc, self._roster)
                try:
                    await watch.start()
                except (NatsError, OSError) as error:
                    raise self._broken(error) from None
                self._watch = watch
                await watch.found()
        return self._watch.roster

    async def _stop(self, req_id: str) -> None:
        with suppress(NatsError, OSError):
            await self._nc.publish(subjects.CANCEL, encode({"req_id": req_id}))

    def _farewell(self, work: Coroutine[Any, Any, None]) -> None:
        """Sends a last word in a task of its own, because its sender is being cancelled or closed."""
        task = asyncio.create_task(work, name="infsvc-client-farewell")
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _late(self, ask: Ask, subject: str) -> RequestError | NoAnswer:
        """Why no answer came: where a stream keeps a subject, its silence does not say that nobody serves it."""
        found = await self._find(ask.model) if ask.model else None
        if found is not None and found.status != "online":
            return ModelNotLoaded(found.model_name, found.status, found.reason)
        return NoAnswer(f"no answer on {subject} within {ask.timeout_s:g} s; {ask.req_id} was told to stop")

    def _broken(self, error: Exception) -> ClientError | RequestError:
        if isinstance(error, MaxPayloadError):
            return TooLarge(self._nc.max_payload)
        return Unreachable(f"the broker at {self._shown} failed: {self._login.sentence(error)}")


class _Route:
    """The subjects that one request may be asked on, in turn: of the node with the most room, of the model on any node,
    and of wherever else the model is found.

    Attributes:
        target: model, node and start of the node that was chosen, while it is that one that is asked.
        sent_s: when, in seconds since the epoch.
    """

    def __init__(self, link: NatsLink, ask: Ask, *, embedding: bool) -> None:
        self._link, self._ask, self._embedding = link, ask, embedding
        self._tried = 0
        self._since_s = time.monotonic()
        self._last = ""
        self.target: tuple[str, str, str] | None = None
        self.sent_s = 0.0

    async def next(self) -> str:
        """The next place to ask; raises `UnknownModel`, `ModelNotLoaded` or `Unreachable` when there is none left."""
        link, ask, self.target = self._link, self._ask, None
        self._tried += 1
        if self._tried == 1:
            # What is named is any node's to answer, out of the queue.
            chooses = ask.subject is None and ask.model is not None and not ask.is_named and link._watch is not None
            nodes = link._nodes(_checked(ask.model)) if chooses else []
            if len(nodes) > 1:
                first = nodes[0]
                self.target, self.sent_s = (first.model_name, first.node, first.start_time), time.time()
                return subjects.direct(first.model_name, first.node, first.start_time, embedding=self._embedding)
            self._tried += 1
        if self._tried == 2:
            self._last = await link._subject(ask, embedding=self._embedding)
        else:
            self._last = await link._elsewhere(ask, self._last, self._since_s, embedding=self._embedding)
        return self._last


async def _first_reply(tries: set[asyncio.Task[Msg]], back: asyncio.Event, until_s: float) -> asyncio.Task[Msg] | None:
    """The try that was answered, or the only one when it failed; None when the connection is back after a loss, or at
    `until_s`. A failed one beside others says nothing, and leaves `tries`."""
    returning = asyncio.create_task(back.wait())
    try:
        while not returning.done() and (left_s := until_s - time.monotonic()) > 0:
            patience_s = None if left_s == math.inf else left_s
            await asyncio.wait({*tries, returning}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            for each in [each for each in tries if each.done()]:
                if each.exception() is None or len(tries) == 1:
                    return each
                tries.discard(each)
        return None
    finally:
        returning.cancel()


def _checked(model: str | None) -> str:
    """A model's name that may stand in a subject."""
    if not model or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", model) or ".." in model or model[-1] == ".":
        raise UnknownModel(str(model), [])
    return model
