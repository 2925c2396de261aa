"""`infsvc req`: sends a request over NATS and prints the reply, like `nats req`."""

from __future__ import annotations

import asyncio

import click
from nats.errors import Error as NatsError

from infsvc.cli.broker import Duration, body_of, connection, headers_of, text_of
from infsvc.cli.outcome import friendly
from infsvc.errors import NoAnswer, Unreachable


@click.command()
@click.argument("subject")
@click.argument("body", required=False)
@click.option("-s", "--server", "--url", "url", metavar="U",
              help="The broker (default: INFSVC_NATS_URL, else nats://127.0.0.1:5700).")  # fmt: skip
@click.option("--timeout", "timeout_s", type=Duration(), default=60.0, show_default=True, metavar="S",
              help="Seconds to wait for the next reply.")  # fmt: skip
@click.option("--replies", type=click.IntRange(min=0), default=1, show_default=True, metavar="N",
              help="How many replies to wait for; 0 for all that come within --timeout.")  # fmt: skip
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME:VALUE", help="A header; may be repeated.")
@friendly
def req(
    subject: str, body: str | None, url: str | None, timeout_s: float, replies: int, headers: tuple[str, ...]
) -> None:
    """Send BODY to SUBJECT and print the reply. Without BODY, or with -, standard input is sent.

    A stream's chunks come as replies of their own: use --replies 0 with a short --timeout.
    """
    asyncio.run(_ask(subject, body_of(body), url, timeout_s, replies, headers_of(headers)))


async def _ask(
    subject: str, data: bytes, url: str | None, timeout_s: float, replies: int, headers: dict[str, str] | None
) -> None:
    async with connection(url) as nc:
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)
        n_got = 0
        try:
            await nc.publish(subject, data, reply=inbox, headers=headers)
            while not replies or n_got < replies:
                message = await answers.next_msg(timeout=timeout_s)
                if message.headers and message.headers.get("Status") == "503":
                    raise Unreachable(f"nobody listens on {subject}")
                click.echo(text_of(message.data))
                n_got += 1
        except TimeoutError:
            if replies or not n_got:
                raise NoAnswer(f"no reply on {subject} within {timeout_s:g} s") from None
        except (NatsError, ValueError) as error:
            raise Unreachable(f"{subject}: {str(error) or type(error).__name__}") from None
