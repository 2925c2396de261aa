"""The broker that the bus commands talk to, and a connection to it that fails in words."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import click

from infsvc.client import Client
from infsvc.settings import load_node_settings

if TYPE_CHECKING:
    from nats.aio.client import Client as Connection


def broker_url(url: str | None) -> str:
    """The one named, else INFSVC_NATS_URL's."""
    server = url or load_node_settings().nats_url
    return server if "://" in server else f"nats://{server}"


def shown(url: str) -> str:
    """The URL without user and password."""
    return Client(url).shown


@asynccontextmanager
async def connection(url: str | None) -> AsyncIterator[Connection]:
    """A nats-py connection. Raises `Unreachable` when no broker answers."""
    from infsvc.nats_link import NatsLink

    link = NatsLink(broker_url(url), credentials=None)
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
