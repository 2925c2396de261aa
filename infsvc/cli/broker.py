"""The broker that the bus commands talk to, and a connection to it that fails in words."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from infsvc.client import TIMEOUT_S, Client
from infsvc.nats_login import NatsLogin
from infsvc.settings import load_node_settings, seconds_of

if TYPE_CHECKING:
    from nats.aio.client import Client as Connection


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in click's stubs only
    """Seconds, or with a unit as the `nats` tool takes them: 30, 30s, 500ms, 2m."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(seconds_of(value))
        except ValueError:
            seconds = math.nan
        if not 0.01 <= seconds < 1e9:
            self.fail(f"{value!r} is no time: write 30, 30s, 500ms or 2m", param, ctx)
        return seconds


def broker_login(url: str | None) -> NatsLogin:
    """The broker named, else INFSVC_NATS_URL's, with the login of the `INFSVC_NATS_…` settings; a user or token in the
    URL goes before theirs."""
    login = load_node_settings().nats_login
    return login.at(url) if url else login


def broker_client(url: str | None, *, timeout_s: float = TIMEOUT_S) -> Client:
    """A client of that broker, to be entered."""
    return Client.over(broker_login(url), timeout_s=timeout_s)


@asynccontextmanager
async def connection(url: str | None) -> AsyncIterator[Connection]:
    """A nats-py connection. Raises `Unreachable` when no broker answers."""
    from infsvc.nats_link import NatsLink

    link = NatsLink(broker_login(url))
    await link.open()
    try:
        yield link.connection
    finally:
        await link.close()


def headers_of(given: Sequence[str]) -> dict[str, str] | None:
    """`name:value` options as headers."""
    headers: dict[str, str] = {}
    for text in given:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise click.UsageError(f"{text!r} is no header: write name:value")
        headers[name.strip()] = value.strip()
    return headers or None


def body_of(given: str | None) -> bytes:
    """The body named on the command line, else standard input; nothing from a terminal."""
    if given is not None and given != "-":
        return given.encode(errors="surrogateescape")
    return b"" if given is None and sys.stdin.isatty() else sys.stdin.buffer.read()


def text_of(data: bytes) -> str:
    """A message's body for the terminal; what is no UTF-8 is shown with replacement characters."""
    return data.decode(errors="replace")
