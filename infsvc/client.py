"""The client: asks models over NATS or HTTP, whichever the URL names, with one set of methods.

    async with Client("nats://127.0.0.1:5700") as client:
        reply = await client.infer("What is backpressure?", model="demo", max_tokens=64)
        async for chunk in client.stream("Tell me more.", model="demo"):
            print(chunk.text, end="")

It stands on the wire types alone. How bytes travel is a link's business, `nats_link` or `http_link`, imported when a
client is opened: importing this loads no network library.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from pydantic import ValidationError

from infsvc.errors import BadRequest, ClientError, ConfigError, RequestError, Unreachable, rebuilt
from infsvc.nats_login import PARAMETERS, NatsLogin
from infsvc.roster import least_loaded
from infsvc.types import Capability, CompletionChunk, CompletionReply, HealthDocument, ServiceDocument, new_req_id

TIMEOUT_S = 120.0
CLIENT_ID = f"{socket.gethostname().encode('ascii', 'replace').decode()}-{os.getpid()}"
"""What tells this program's requests from another's: a node shares its slots out by it."""

_SCHEMES = {"nats": "nats", "tls": "nats", "http": "http", "https": "http"}


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Vectors in the order of the inputs, each of length 1.

    Attributes:
        tokens_in: tokens of all inputs together.
    """

    model: str
    vectors: list[list[float]]
    tokens_in: int


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request as a link sends it.

    Attributes:
        body: the native request; with a `req_id` only where the caller gave one or the durable queue needs it.
        req_id: what the request is called, also where the body does not say.
        model: None over HTTP lets the node choose; over NATS a model or a subject is there.
        subject: a NATS subject other than the model's own.
    """

    body: dict[str, Any]
    req_id: str
    model: str | None
    subject: str | None
    timeout_s: float

    @property
    def is_named(self) -> bool:
        """Whether the caller gave the `req_id`: it is then executed once over NATS, by way of the durable queue."""
        return "req_id" in self.body


class Link(Protocol):
    """What a way to the nodes can do. Bodies are the wire's; errors are `RequestError` and `ClientError`."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def complete(self, ask: Ask) -> dict[str, Any]: ...
    def stream(self, ask: Ask) -> AsyncGenerator[dict[str, Any], None]: ...
    async def embed(self, ask: Ask) -> dict[str, Any]: ...
    async def services(self) -> list[ServiceDocument]: ...
    async def health(self, model: str, timeout_s: float) -> HealthDocument: ...
    async def cancel(self, req_id: str, timeout_s: float) -> None: ...
    async def submit(self, ask: Ask) -> None: ...
    async def result(self, ask: Ask) -> dict[str, Any]: ...


class Client:
    """A connection to nodes; use it with `async with`. One event loop, any number of tasks.

    Every method raises `RequestError` (its `status` and `code` are the node's) when a node refuses, `NoAnswer` when
    nothing came in time, and `Unreachable` when there is nobody to ask.

    Args:
        url: `nats://…` or `tls://…` for a broker, several separated by commas; `http://…` or `https://…` for a node's
            gateway or a model's own port. User and password, or a token, may stand in a NATS URL.
        timeout_s: how long a method waits for its answer, a stream for its next piece.
        api_key: for HTTP nodes that ask for one.
        ca_file: a file of certificates to trust for https and tls.
        credentials: a NATS `.creds` file.
        nkey_file: a file with the nkey seed of a NATS user.
        user, password, token: a NATS login outside the URL.
        cert_file, key_file: what a NATS broker is shown that asks for a certificate.

    Raises:
        ConfigError: the URL has no scheme that is known, or the login makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        api_key: str | None = None,
        ca_file: str | None = None,
        credentials: str | None = None,
        nkey_file: str | None = None,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> None:
        kind = _SCHEMES.get(url.partition("://")[0])
        if kind is None:
            raise ConfigError("not nats://host:port or http://host:port", key="url")
        login = {
            "creds": credentials,
            "nkey": nkey_file,
            "user": user,
            "password": password,
            "token": token,
            "cert": cert_file,
            "key": key_file,
        }
        fields = {name: value for name, value in login.items() if value}
        self.url = url
        self.timeout_s = timeout_s
        self._kind = kind
        self._api_key, self._ca_file = api_key, ca_file
        self._login: NatsLogin | None = None
        if kind == "nats":
            self._login = NatsLogin.of(url, names=PARAMETERS, **fields, ca=ca_file or "")
        elif fields:
            raise ConfigError("is for a NATS broker, and the URL is a node's", key=PARAMETERS[next(iter(fields))])
        self._opened: Link | None = None

    @classmethod
    def over(cls, login: NatsLogin, *, timeout_s: float = TIMEOUT_S) -> Self:
        """A client of a broker whose login was built elsewhere."""
        client = cls(login.shown, timeout_s=timeout_s)
        client._login = login
        return client

    async def __aenter__(self) -> Self:
        link: Link
        if self._login is not None:
            from infsvc.nats_link import NatsLink

            link = NatsLink(self._login)
        else:
            from infsvc.http_link import HttpLink

            link = HttpLink(self.url, api_key=self._api_key, ca_file=self._ca_file)
        await link.open()
        self._opened = link
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        link, self._opened = self._opened, None
        if link is not None:
            await link.close()

    async def infer(
        self,
        text: str,
        *,
        model: str | None = None,
        req_id: str | None = None,
        trace_id: str | None = None,
        priority: int = 0,
        subject: str | None = None,
        timeout_s: float | None = None,
        **params: Any,
    ) -> CompletionReply:
        """The answer to a text, put through the model's chat template.

        Args:
            model: None takes the one with the most room.
            req_id: over NATS, a request with the same id and body is executed once and answered again, by way of the
                durable queue; without one it goes straight to a node.
            subject: a NATS subject to ask on, in place of the model's.
            params: `max_tokens`, `temperature`, `grammar`, … as in the wire's `params`.
        """
        body = _body(text=text, req_id=req_id, trace_id=trace_id, priority=priority, params=params)
        return _reply(await self._link.complete(await self._ask(body, model, subject, timeout_s)))

    async def infer_raw(
        self, text: str, *, model: str | None = None, req_id: str | None = None, timeout_s: float | None = None,
        **params: Any,
    ) -> CompletionReply:  # fmt: skip
        """The same without a template: special tokens in the text are parsed, and the output comes back as it is."""
        body = _body(text=text, req_id=req_id, params=params) | {"raw": True}
        return _reply(await self._link.complete(await self._ask(body, model, None, timeout_s)))

    async def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        model: str | None = None,
        req_id: str | None = None,
        timeout_s: float | None = None,
        **params: Any,
    ) -> CompletionReply:
        """The next message of a conversation: `[{"role": "user", "content": "…"}, …]`."""
        body = _body(messages=messages, req_id=req_id, params=params)
        return _reply(await self._link.complete(await self._ask(body, model, None, timeout_s)))

    def stream(
        self,
        text: str | None = None,
        *,
        messages: Iterable[Mapping[str, Any]] | None = None,
        model: str | None = None,
        req_id: str | None = None,
        raw: bool = False,
        subject: str | None = None,
        timeout_s: float | None = None,
        **params: Any,
    ) -> Stream:
        """An answer in pieces. Leaving the loop early, or the `async with` around it, stops the generation."""
        body = _body(text=text, messages=messages, req_id=req_id, params=params) | {"raw": raw, "stream": True}
        return Stream(self, body, model, subject, timeout_s, req_id or new_req_id())

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        dimensions: int | None = None,
        subject: str | None = None,
        timeout_s: float | None = None,
    ) -> Embeddings:
        """The vectors of one or many texts."""
        body: dict[str, Any] = {"input": texts if isinstance(texts, str) else list(texts)}
        if dimensions is not None:
            body["dimensions"] = dimensions
        ask = await self._ask(body, model, subject, timeout_s, capability=Capability.EMBEDDINGS)
        answer = await self._link.embed(ask)
        try:
            rows = sorted(answer["data"], key=lambda row: int(row["index"]))
            return Embeddings(
                model=str(answer["model"]),
                vectors=[[float(number) for number in row["embedding"]] for row in rows],
                tokens_in=int(answer["usage"]["prompt_tokens"]),
            )
        except (KeyError, TypeError, ValueError):
            raise ClientError("the answer is no list of embeddings: is the other side an infsvc node?") from None

    async def health(self, model: str, *, timeout_s: float | None = None) -> HealthDocument:
        """A model's health document."""
        return await self._link.health(model, self._patience(timeout_s))

    async def list_models(self) -> list[ServiceDocument]:
        """Every model of every node on the bus; over HTTP those that the node knows of."""
        return await self._link.services()

    async def least_loaded(
        self, capability: str = Capability.TEXT_GENERATION, *, among: Iterable[str] | None = None
    ) -> str:
        """The model with the most room of those that can do it; `among` narrows the choice to some names."""
        services = await self._link.services()
        names = None if among is None else frozenset(among)
        chosen = least_loaded(
            [service for service in services if names is None or service.model_name in names], capability=capability
        )
        if chosen is None:
            known = ", ".join(f"{each.model_name} ({each.status})" for each in services) or "none"
            raise Unreachable(f"no model that can do {capability} is online at {self.shown}; there are: {known}")
        return chosen.model_name

    async def cancel(self, req_id: str, *, timeout_s: float = 2.0) -> None:
        """Ends a request soon, as `cancelled`. Raises `UnknownRequest` when none of that id runs or waits."""
        await self._link.cancel(req_id, timeout_s)

    async def submit(
        self, text: str, *, model: str | None = None, req_id: str | None = None, timeout_s: float | None = None,
        **params: Any,
    ) -> Job:  # fmt: skip
        """Puts a request into the model's durable queue; when this returns, the broker has it, whatever dies then.

        Raises:
            QueueFull: the broker refuses it.
            NoAnswer: the broker did not confirm; submitting again with the same `req_id` executes it once.
        """
        body = _body(text=text, req_id=req_id or new_req_id(), params=params)
        ask = await self._ask(body, model, None, timeout_s)
        if ask.model is None:
            raise BadRequest("model is needed: a queue is one model's", param="model")
        await self._link.submit(ask)
        return Job(self, ask.model, ask.body)

    def job(self, ticket: str) -> Job:
        """The handle of a request that was submitted elsewhere, from its `ticket`."""
        try:
            held = json.loads(ticket)
            model, body = held["model"], held["body"]
            if not (isinstance(model, str) and isinstance(body, dict) and isinstance(body["req_id"], str)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ConfigError("not a ticket as Job.ticket gives it", key="ticket") from None
        return Job(self, model, body)

    @property
    def shown(self) -> str:
        """The URL without user and password."""
        return ",".join(f"{scheme}://{rest.rpartition('@')[2]}" for scheme, rest in _parts(self.url))

    @property
    def _link(self) -> Link:
        if self._opened is None:
            raise ClientError("the client is not open: use it with `async with`")
        return self._opened

    def _patience(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s

    async def _ask(
        self,
        body: dict[str, Any],
        model: str | None,
        subject: str | None,
        timeout_s: float | None,
        *,
        req_id: str | None = None,
        capability: str = Capability.TEXT_GENERATION,
    ) -> Ask:
        if subject is not None and self._kind != "nats":
            raise ConfigError("a subject is NATS's: name a nats:// URL, or a model", key="subject")
        if model is None and subject is None:
            model = await self.least_loaded(capability)
        called = str(body.get("req_id") or req_id or new_req_id())
        return Ask(body=body, req_id=called, model=model, subject=subject, timeout_s=self._patience(timeout_s))


class Stream:
    """An answer in pieces: `async for chunk in stream`, once. Leaving early stops the generation.

    Attributes:
        req_id: what the request is called.
        reply: the whole reply once the last chunk has come.
    """

    def __init__(
        self,
        client: Client,
        body: dict[str, Any],
        model: str | None,
        subject: str | None,
        timeout_s: float | None,
        req_id: str,
    ) -> None:
        self._client, self._body = client, body
        self.req_id = req_id
        self._model, self._subject, self._timeout_s = model, subject, timeout_s
        self._chunks: AsyncGenerator[CompletionChunk, None] | None = None
        self._entered = self._begun = False
        self.reply: CompletionReply | None = None

    def __aiter__(self) -> AsyncIterator[CompletionChunk]:
        if self._begun:
            raise ClientError("a stream is read once: ask again for another")
        self._begun = True
        # Without `async with`, nothing but the loop holds the generator when it is left by `break`: asyncio then closes
        # it, which stops the generation.
        chunks = self._read()
        if self._entered:
            self._chunks = chunks
        return chunks

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._chunks is not None:
            await self._chunks.aclose()

    async def _read(self) -> AsyncGenerator[CompletionChunk, None]:
        client = self._client
        ask = await client._ask(self._body, self._model, self._subject, self._timeout_s, req_id=self.req_id)
        async with aclosing(client._link.stream(ask)) as events:
            async for event in events:
                if event.get("done"):
                    self.reply = _reply(event)
                    return
                yield _chunk(event)


class Job:
    """A durable request. `ticket` is what another process needs to await it, with `Client.job`."""

    def __init__(self, client: Client, model: str, body: dict[str, Any]) -> None:
        self._client, self._body = client, body
        self.model = model

    @property
    def id(self) -> str:
        """The request's `req_id`."""
        return str(self._body["req_id"])

    @property
    def ticket(self) -> str:
        """The handle as JSON; it holds the request itself."""
        return json.dumps({"model": self.model, "body": self._body}, ensure_ascii=False)

    async def result(self, *, timeout_s: float | None = None) -> CompletionReply:
        """Waits for the answer, also for one that came before; within the node's DEDUPE_WINDOW it is not computed
        again."""
        client = self._client
        ask = Ask(
            body=self._body, req_id=self.id, model=self.model, subject=None, timeout_s=client._patience(timeout_s)
        )
        return _reply(await client._link.result(ask))

    async def cancel(self) -> None:
        """Ends it soon if it runs; see `Client.cancel`."""
        await self._client.cancel(self.id)


def read_answer(data: bytes, *, source: str, status: int = 200) -> dict[str, Any]:
    """The JSON object of an answer, for the links.

    Args:
        source: who answered, for the sentence.
        status: HTTP's, for error bodies that name none.

    Raises:
        RequestError: it tells of one, in the native shape or in OpenAI's.
        ClientError: it is no answer of a node.
    """
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ClientError(f"{source} answered {status} and no JSON object: is it an infsvc node?")
    error = body.get("error")
    if isinstance(error, dict):
        raise rebuilt({"status": status} | error | {"error": error.get("message")})
    if error is not None and "code" in body:
        raise rebuilt({"status": status} | body)
    if status >= 400:
        raise rebuilt({"status": status, "error": str(body)[:500]})
    return body


def _parts(url: str) -> list[tuple[str, str]]:
    parts = [one.strip().partition("://") for one in url.split(",") if one.strip()]
    return [(scheme, rest) if mark else ("nats", scheme) for scheme, mark, rest in parts]


def _body(
    *,
    text: str | None = None,
    messages: Iterable[Mapping[str, Any]] | None = None,
    req_id: str | None = None,
    trace_id: str | None = None,
    priority: int = 0,
    params: Mapping[str, Any],
) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if req_id is not None:
        body["req_id"] = req_id
    if text is not None:
        body["input"] = text
    if messages is not None:
        body["messages"] = [dict(message) for message in messages]
    if trace_id is not None:
        body["trace_id"] = trace_id
    if priority:
        body["priority"] = priority
    if given := {key: value for key, value in params.items() if value is not None}:
        body["params"] = given
    return body


def _reply(answer: dict[str, Any]) -> CompletionReply:
    # A later version may say more.
    known = {key: value for key, value in answer.items() if key in CompletionReply.model_fields}
    try:
        return CompletionReply.model_validate(known)
    except ValidationError:
        raise ClientError(f"the answer is no reply of a model: {str(answer)[:200]}") from None


def _chunk(event: dict[str, Any]) -> CompletionChunk:
    try:
        return CompletionChunk(req_id=event["req_id"], index=event["index"], text=event["text"])
    except (KeyError, ValidationError):
        raise ClientError(f"the answer holds something that is no chunk: {str(event)[:200]}") from None


__all__ = ["TIMEOUT_S", "Ask", "Client", "Embeddings", "Job", "Link", "RequestError", "Stream", "read_answer"]
