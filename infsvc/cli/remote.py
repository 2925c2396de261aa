"""Talks to a running node over HTTP, for the commands that ask one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from infsvc.errors import InfsvcError
from infsvc.home import Home
from infsvc.settings import load_node_settings

_CONNECT_S = 5.0


class RemoteError(InfsvcError):
    """The node refused, or none answers."""


class NoNode(RemoteError):
    """None answers at the address."""


def named_node(url: str | None) -> str | None:
    """The node that the user names: with --url, else with INFSVC_URL. `start`, `stop` and `models` are about this home
    and do not ask here."""
    return url or os.environ.get("INFSVC_URL") or None


def node_url(url: str | None) -> str:
    """The node to ask: the one named, else the one that runs on this home, else where its gateway would be."""
    if url:
        return url.rstrip("/")
    running = Home.locate().running_node()
    if running and running.get("gateway"):
        return str(running["gateway"])
    settings = load_node_settings()
    return f"{'https' if settings.tls_cert else 'http'}://{settings.gateway_address}"


@contextmanager
def node_client(url: str | None, *, timeout_s: float = 30.0) -> Iterator[httpx2.Client]:
    """An HTTP client of the node; its failures become `RemoteError` with what to do."""
    base = node_url(url)
    keys = [key for key in os.environ.get("INFSVC_API_KEYS", "").split(",") if key.strip()]
    headers = {"Authorization": f"Bearer {keys[0].strip()}"} if keys else {}
    # A node of this machine with an own certificate is trusted by that certificate.
    verify: Any = os.environ.get("INFSVC_TLS_CERT") or True
    timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_S)
    try:
        with httpx2.Client(base_url=base, headers=headers, timeout=timeout, verify=verify, trust_env=False) as client:
            yield client
    except httpx2.ConnectError:
        raise NoNode(
            f"no node answers at {base}: start one with `infsvc serve` or `make run`, "
            "or name it with --url or INFSVC_URL"
        ) from None
    except httpx2.TimeoutException:
        raise RemoteError(
            f"{base} did not answer within {timeout_s:g} s: raise --timeout, or look at its log"
        ) from None
    except httpx2.HTTPError as error:
        raise RemoteError(f"{base}: {error or type(error).__name__}") from None


def checked(response: httpx2.Response) -> Any:
    """The answer's JSON; an error answer becomes `RemoteError` with the node's own sentence."""
    try:
        body = response.json()
    except json.JSONDecodeError:
        raise RemoteError(
            f"{response.url} answered {response.status_code} and no JSON: is it an infsvc node?"
        ) from None
    if response.is_error:
        said = body.get("error", body) if isinstance(body, dict) else body
        # OpenAI's shape has the sentence one level down.
        raise RemoteError(str(said.get("message", said) if isinstance(said, dict) else said))
    return body
