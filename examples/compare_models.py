"""One question to several models at once, their answers and figures side by side.

python examples/compare_models.py [--url http://127.0.0.1:5780] "What is backpressure?" [MODEL …]
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import httpx2


async def ask(client: httpx2.AsyncClient, model: str, question: str) -> dict[str, Any]:
    body = {"model": model, "input": question, "params": {"max_tokens": 200, "temperature": 0}}
    answer = await client.post("/v1/completions", json=body)
    return {"model": model} | answer.json()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--url", default="http://127.0.0.1:5780")
    options = parser.parse_args()
    async with httpx2.AsyncClient(base_url=options.url, timeout=300, trust_env=False) as client:
        services = (await client.get("/api/services")).json()["services"]
        online = [
            each["model_name"]
            for each in services
            if each["status"] == "online" and "text-generation" in each["capabilities"]
        ]
        replies = await asyncio.gather(*(ask(client, model, options.question) for model in options.models or online))
    for reply in replies:
        if "error" in reply and "text" not in reply:
            print(f"\n{reply['model']}: {reply['error']}")
            continue
        speed = reply["tokens_out"] / max(reply["duration_ms"], 1) * 1000
        print(f"\n{reply['model']}  ({reply['tokens_out']} tokens, {reply['duration_ms']} ms, {speed:.0f} tok/s)")
        print(reply["text"])


if __name__ == "__main__":
    asyncio.run(main())
