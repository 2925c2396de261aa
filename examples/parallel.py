"""Many requests at once, on every loaded model at once: what batching gains, and that models do not block each other.

python examples/parallel.py [--url http://127.0.0.1:5780] [--requests 8] [--tokens 64] [MODEL …]
"""

from __future__ import annotations

import argparse
import asyncio
import time

import httpx2


async def ask(client: httpx2.AsyncClient, model: str, n_tokens: int) -> int:
    """One answer of exactly `n_tokens` tokens."""
    params = {"max_tokens": n_tokens, "ignore_eos": True, "temperature": 0}
    answer = await client.post("/v1/completions", json={"model": model, "input": "Say something.", "params": params})
    answer.raise_for_status()
    return int(answer.json()["tokens_out"])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--url", default="http://127.0.0.1:5780")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    async with httpx2.AsyncClient(base_url=options.url, timeout=300, trust_env=False) as client:
        services = (await client.get("/api/services")).json()["services"]
        models = options.models or [
            each["model_name"]
            for each in services
            if each["status"] == "online" and "text-generation" in each["capabilities"]
        ]

        async def timed(*asked: str) -> float:
            begun = time.perf_counter()
            drawn = sum(await asyncio.gather(*(ask(client, model, options.tokens) for model in asked)))
            seconds = time.perf_counter() - begun
            print(f"{len(asked):3} at once  {drawn:6} tokens  {seconds:6.2f} s  {drawn / seconds:8.0f} tok/s")
            return seconds

        for model in models:
            print(model)
            alone = await timed(model)
            together = await timed(*[model] * options.requests)
            print(f"    {options.requests * alone / together:.1f} times as fast as one after another")
        if len(models) > 1:
            print("all models at once")
            await timed(*models * options.requests)


if __name__ == "__main__":
    asyncio.run(main())
