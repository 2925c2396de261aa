"""`infsvc chat`: asks a model over HTTP, or over NATS with a subject; once, from standard input, or question by
question.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import click
import httpx2

from infsvc.cli.broker import broker_client
from infsvc.cli.outcome import friendly
from infsvc.cli.remote import RemoteError, checked, named_node, node_client
from infsvc.errors import InfsvcError

Ask = Callable[[str], None]


@click.command()
@click.option("-m", "--model", metavar="MODEL", help="The model (default: the only one that is loaded).")
@click.option(
    "-s", "--subject", metavar="SUBJECT", help="Ask over NATS on this subject, such as inference.request.demo."
)
@click.option(
    "-i", "--interactive", is_flag=True, help="Ask question by question; each stands alone. Ctrl+C stops an answer."
)
@click.option("--input", "text", metavar="TEXT", help="The question; without it, standard input is read.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), metavar="N", help="The most tokens of an answer (default 512)."
)
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="T", help="0 is greedy (default 0.7).")
@click.option("--grammar", metavar="NAME", help="Constrain the answer to a grammar.")
@click.option("--raw", is_flag=True, help="Send the text as it is, without the chat template.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=120.0, show_default=True, metavar="S",
              help="Seconds to wait for the next piece of an answer.")  # fmt: skip
@click.option(
    "--url",
    metavar="U",
    help="The node, http://… (default: INFSVC_URL, else the one of this home), or with -s the broker, nats://…",
)
@friendly
def chat(
    model: str | None,
    subject: str | None,
    interactive: bool,
    text: str | None,
    max_tokens: int | None,
    temperature: float | None,
    grammar: str | None,
    raw: bool,
    timeout_s: float,
    url: str | None,
) -> None:
    """Ask a model and print its answer as it comes."""
    if model and subject:
        raise click.UsageError("-m and -s exclude each other: a subject names its model")
    if interactive and text is not None:
        raise click.UsageError("-i and --input exclude each other")
    params = {"max_tokens": max_tokens, "temperature": temperature, "grammar": grammar}
    body: dict[str, Any] = {
        "params": {key: value for key, value in params.items() if value is not None},
        "raw": raw,
        "stream": True,
    }
    if model:
        body["model"] = model
    with contextlib.ExitStack() as stack:
        ask: Ask
        if subject:
            ask = _over_nats(subject, url, body, timeout_s)
        else:
            client = stack.enter_context(node_client(named_node(url), timeout_s=timeout_s))
            ask = _over_http(client, body)
        if interactive:
            _converse(ask)
            return
        question = text if text is not None else _read_stdin()
        ask(question)


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("no question: give --input TEXT, pipe one in, or use -i")
    question = sys.stdin.read().strip()
    if not question:
        raise click.UsageError("standard input is empty")
    return question


def _converse(ask: Ask) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if not question:
            continue
        try:
            ask(question)
        except KeyboardInterrupt:
            click.echo(" (stopped)")
        except InfsvcError as error:
            click.echo(f"infsvc: {error}", err=True)


def _over_http(client: httpx2.Client, body: dict[str, Any]) -> Ask:
    def ask(question: str) -> None:
        with client.stream("POST", "/v1/completions", json=body | {"input": question}) as response:
            if response.is_error:
                response.read()
                checked(response)
            printer = _Printer()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    printer.take(json.loads(line.removeprefix("data: ")))
            printer.end()

    return ask


def _over_nats(subject: str, url: str | None, body: dict[str, Any], timeout_s: float) -> Ask:
    async def exchange(question: str) -> None:
        printer = _Printer()
        async with (
            broker_client(url, timeout_s=timeout_s) as client,
            client.stream(question, subject=subject, raw=body["raw"], **body["params"]) as stream,
        ):
            async for chunk in stream:
                printer.take(chunk.model_dump())
        if stream.reply is not None:
            printer.take(stream.reply.wire() | {"done": True})
        printer.end()

    return lambda question: asyncio.run(exchange(question))


class _Printer:
    """Prints chunks as they come; an error or an unusual end is said on standard error."""

    def __init__(self) -> None:
        self.done = False
        self._last = "\n"

    def take(self, event: dict[str, Any]) -> None:
        if "code" in event and "status" in event:
            raise RemoteError(str(event["error"]))
        if not event.get("done"):
            self._last = event["text"] or self._last
            click.echo(event["text"], nl=False)
            return
        self.done = True
        if event["finish_reason"] not in ("stop", "tool_calls"):
            self.end()
            reason = {"length": "the answer reached max_tokens or the context's end"}.get(event["finish_reason"])
            click.echo(f"({reason or event.get('error') or event['finish_reason']})", err=True)

    def end(self) -> None:
        """Ends the line."""
        if not self._last.endswith("\n"):
            click.echo()
            self._last = "\n"
