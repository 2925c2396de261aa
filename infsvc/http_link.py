"""The client's way over HTTP: a node's gateway, or one model's port."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx2
from pydantic import ValidationError

from infsvc.client import CLIENT_ID, Ask, read_answer
from infsvc.errors import ClientError, ConfigError, NoAnswer, Unreachable, Unsupported
from infsvc.subjects import CLIENT_HEADER
from infsvc.types import HealthDocument, ServiceDocument

CONNECT_S = 5.0


class HttpLink:
    """One pool of connections. Closing a stream's connection is what stops its generation."""

    def __init__(self, url: str, *, api_key: str | None, ca_file: str | None) -> None:
        self._url = url.rstrip("/")
        headers = {CLIENT_HEADER: CLIENT_ID} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._http = httpx2.AsyncClient(
            base_url=self._url, headers=headers, trust_env=False, verify=_trust(self._url, ca_file)
        )

    async def open(self) -> None:
        """Nothing is sent before the first request."""

    async def close(self) -> None:
        await self._http.aclose()

    async def complete(self, ask: Ask) -> dict[str, Any]:
        return await self._call("POST", "/v1/completions", ask.timeout_s, _with_model(ask))

    async def stream(self, ask: Ask) -> AsyncGenerator[dict[str, Any], None]:
        async with (
            self._typed(ask.timeout_s),
            self._http.stream(
                "POST", "/v1/completions", json=_with_model(ask), timeout=_timeout(ask.timeout_s)
            ) as response,
        ):
            if response.is_error:
                read_answer(await response.aread(), source=self._url, status=response.status_code)
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    event = read_answer(line.removeprefix("data: ").encode(), source=self._url)
                    yield event
                    if event.get("done"):
                        return
        raise ClientError(f"{self._url} ended the stream before its last event: ask again")

    async def embed(self, ask: Ask) -> dict[str, Any]:
        return await self._call("POST", "/v1/embeddings", ask.timeout_s, _with_model(ask))

    async def services(self) -> list[ServiceDocument]:
        answer = await self._call("GET", "/api/services", CONNECT_S)
        try:
            return [ServiceDocument.model_validate(each) for each in answer["services"]]
        except (KeyError, TypeError, ValidationError):
            raise ClientError(f"{self._url} does not list services as this version does") from None

    async def health(self, model: str, timeout_s: float) -> HealthDocument:
        return HealthDocument.model_validate(await self._call("GET", f"/api/services/{quote(model)}", timeout_s))

    async def cancel(self, req_id: str, timeout_s: float) -> None:
        await self._call("DELETE", f"/api/requests/{quote(req_id, safe='')}", timeout_s)

    async def submit(self, ask: Ask) -> None:
        raise Unsupported("submit", "the durable queue is NATS's: open the client with nats://…")

    async def result(self, ask: Ask) -> dict[str, Any]:
        raise Unsupported("result", "the durable queue is NATS's: open the client with nats://…")

    async def _call(
        self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        async with self._typed(timeout_s):
            response = await self._http.request(method, path, json=body, timeout=_timeout(timeout_s))
        return read_answer(response.content, source=self._url, status=response.status_code)

    @asynccontextmanager
    async def _typed(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise Unreachable(f"no node answers at {self._url}: start one with `infsvc serve`") from None
        except httpx2.TimeoutException:
            raise NoAnswer(f"{self._url} did not answer within {timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise ClientError(f"{self._url}: {error or type(error).__name__}") from None
        except (TypeError, UnicodeEncodeError, json.JSONDecodeError) as error:
            raise ClientError(f"the request cannot be written as JSON: {error}") from None


def _with_model(ask: Ask) -> dict[str, Any]:
    named = ask.body | {"req_id": ask.req_id}
    return named if ask.model is None else named | {"model": ask.model}


def _timeout(timeout_s: float) -> httpx2.Timeout:
    return httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))


def _trust(url: str, ca_file: str | None) -> ssl.SSLContext:
    if not url.startswith("https://"):
        # The usual context reads all certificates of the machine, which plain HTTP does not need.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{ca_file} is no certificate that can be read: {error}", key="ca_file") from None
