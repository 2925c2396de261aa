"""`infsvc sub`: prints what is published on a subject, like `nats sub`."""

from __future__ import annotations

import asyncio
import contextlib

import click
from nats.errors import Error as NatsError

from infsvc.cli.broker import Duration, connection, text_of
from infsvc.cli.outcome import friendly
from infsvc.errors import NoAnswer, Unreachable

_LOOK_S = 1.0


@click.command()
@click.argument("subject")
@click.option("-s", "--server", "--url", "url", metavar="U",
              help="The broker (default: INFSVC_NATS_URL, else nats://127.0.0.1:5700).")  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N messages.")
@click.option("--timeout", "timeout_s", type=Duration(), metavar="S",
              help="End with an error after S seconds without a message.")  # fmt: skip
@click.option("-r", "--raw", is_flag=True, help="Print the bodies alone.")
@friendly
def sub(subject: str, url: str | None, count: int | None, timeout_s: float | None, raw: bool) -> None:
    """Print what comes on SUBJECT until Ctrl+C; * stands for one part of a subject, > for all that follow."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_listen(subject, url, count, timeout_s, raw=raw))


async def _listen(subject: str, url: str | None, count: int | None, timeout_s: float | None, *, raw: bool) -> None:
    async with connection(url) as nc:
        try:
            messages = await nc.subscribe(subject)
            await nc.flush()
        except (NatsError, ValueError) as error:
            raise Unreachable(f"{subject}: {str(error) or type(error).__name__}") from None
        click.echo(f"listening on {subject}", err=True)
        n_got = 0
        while count is None or n_got < count:
            try:
                message = await messages.next_msg(timeout=timeout_s or _LOOK_S)
            except TimeoutError:
                if timeout_s is not None:
                    raise NoAnswer(f"nothing came on {subject} for {timeout_s:g} s") from None
                continue
            except NatsError as error:
                raise Unreachable(f"{subject}: {str(error) or type(error).__name__}") from None
            n_got += 1
            reply = f" → {message.reply}" if message.reply else ""
            click.echo(text_of(message.data) if raw else f"[{message.subject}{reply}] {text_of(message.data)}")
