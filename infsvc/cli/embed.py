"""`infsvc embed`: texts to vectors, over HTTP, or over NATS with a subject."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from infsvc.cli.broker import connection
from infsvc.cli.outcome import friendly
from infsvc.cli.remote import RemoteError, checked, named_node, node_client

DEFAULT_MODEL = "nomic-embed-v1.5"
_N_SHOWN = 5


@click.command()
@click.option("-m", "--model", metavar="MODEL", help=f"The model (default: {DEFAULT_MODEL}).")
@click.option(
    "-s",
    "--subject",
    metavar="SUBJECT",
    help=f"Ask over NATS on this subject, such as embedding.request.{DEFAULT_MODEL}.",
)
@click.option("--input", "texts", metavar="TEXT", multiple=True, required=True, help="A text; give it once for each.")
@click.option(
    "--dimensions", type=click.IntRange(min=1), metavar="N", help="Only the first N values, scaled to norm 1."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as JSON.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=120.0, show_default=True, metavar="S",
              help="Seconds to wait for the answer.")  # fmt: skip
@click.option(
    "--url",
    metavar="U",
    help="The node, http://… (default: INFSVC_URL, else the one of this home), or with -s the broker, nats://…",
)
@friendly
def embed(
    model: str | None,
    subject: str | None,
    texts: tuple[str, ...],
    dimensions: int | None,
    as_json: bool,
    timeout_s: float,
    url: str | None,
) -> None:
    """Turn texts into vectors; prints how many values each has, and the first of them."""
    body: dict[str, Any] = {"input": list(texts)}
    if dimensions is not None:
        body["dimensions"] = dimensions
    if subject:
        if model:
            body["model"] = model  # its subject must agree
        answer = asyncio.run(_over_nats(subject, url, body, timeout_s))
    else:
        with node_client(named_node(url), timeout_s=timeout_s) as client:
            answer = checked(client.post("/v1/embeddings", json=body | {"model": model or DEFAULT_MODEL}))
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False))
        return
    for text, item in zip(texts, answer["data"], strict=True):
        vector = item["embedding"]
        first = ", ".join(f"{value:.6f}" for value in vector[:_N_SHOWN])
        more = ", …" if len(vector) > _N_SHOWN else ""
        click.echo(f"{len(vector)} dimensions  [{first}{more}]  {text}")
    click.echo(f"{answer['usage']['prompt_tokens']} tokens, {answer['model']}", err=True)


async def _over_nats(subject: str, url: str | None, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    from nats.errors import NoRespondersError

    try:
        async with connection(url) as client:
            message = await client.request(subject, json.dumps(body).encode(), timeout=timeout_s)
    except NoRespondersError:
        raise RemoteError(f"nobody answers on {subject}: is its model loaded?") from None
    except TimeoutError:
        raise RemoteError(f"no answer on {subject} within {timeout_s:g} s") from None
    answer = json.loads(message.data)
    if not isinstance(answer, dict) or "data" not in answer:
        said = answer.get("error") if isinstance(answer, dict) else None
        raise RemoteError(str(said or f"what answers on {subject} is no embedding model"))
    return answer
