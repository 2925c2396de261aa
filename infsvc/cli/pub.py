"""`infsvc pub`: publishes one message over NATS, like `nats pub`."""

from __future__ import annotations

import asyncio
import json

import click
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from infsvc.cli.broker import body_of, connection, headers_of
from infsvc.cli.outcome import friendly
from infsvc.errors import NoAnswer, Unreachable

_ACK_S = 5.0


@click.command()
@click.argument("subject")
@click.argument("body", required=False)
@click.option("-s", "--server", "--url", "url", metavar="U",
              help="The broker (default: INFSVC_NATS_URL, else nats://127.0.0.1:5700).")  # fmt: skip
@click.option("--reply", metavar="SUBJECT", help="Where answers should go.")
@click.option("-J", "--jetstream", is_flag=True, help="Wait until a stream confirms that it has the message.")
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME:VALUE", help="A header; may be repeated.")
@friendly
def pub(
    subject: str, body: str | None, url: str | None, reply: str | None, jetstream: bool, headers: tuple[str, ...]
) -> None:
    """Publish BODY on SUBJECT. Without BODY, or with -, standard input is sent."""
    if reply and jetstream:
        raise click.UsageError("--reply and --jetstream exclude each other: the receipt comes as the reply")
    data = body_of(body)
    seq = asyncio.run(_publish(subject, data, url, reply or "", jetstream, headers_of(headers)))
    click.echo(f"published {len(data)} bytes on {subject}{seq}")


async def _publish(
    subject: str, data: bytes, url: str | None, reply: str, jetstream: bool, headers: dict[str, str] | None
) -> str:
    async with connection(url) as nc:
        try:
            if not jetstream:
                await nc.publish(subject, data, reply=reply, headers=headers)
                await nc.flush()
                return ""
            receipt = json.loads((await nc.request(subject, data, timeout=_ACK_S, headers=headers)).data)
        except NoRespondersError:
            raise Unreachable(f"no stream takes {subject}") from None
        except TimeoutError:
            raise NoAnswer(f"no stream confirmed {subject} within {_ACK_S:g} s") from None
        except (NatsError, ValueError) as error:
            raise Unreachable(f"{subject}: {str(error) or type(error).__name__}") from None
    if not isinstance(receipt, dict) or "stream" not in receipt:
        told = receipt.get("error", {}) if isinstance(receipt, dict) else receipt
        raise Unreachable(f"{subject} was refused: {told.get('description', told) if isinstance(told, dict) else told}")
    return f": {receipt['stream']} has it as {receipt['seq']}{' (a duplicate)' if receipt.get('duplicate') else ''}"
