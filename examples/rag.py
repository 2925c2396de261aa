"""Retrieval-augmented answers: embed the paragraphs of some pages, find those nearest to the question, ask
with them.

python examples/rag.py [--url http://127.0.0.1:5780] [--embedder nomic-embed-v1.5] [--model demo] "question" FILE …
"""

from __future__ import annotations

import argparse
import operator
from pathlib import Path

import httpx2

N_BEST = 3
MAX_CHARACTERS = 500


def paragraphs(paths: list[Path]) -> list[str]:
    """The pages' paragraphs, long ones cut into pieces."""
    found: list[str] = []
    for path in paths:
        for part in path.read_text().split("\n\n"):
            text = " ".join(part.split())
            found += [text[at : at + MAX_CHARACTERS] for at in range(0, len(text), MAX_CHARACTERS)]
    return found


def embed(client: httpx2.Client, model: str, texts: list[str]) -> list[list[float]]:
    answer = client.post("/v1/embeddings", json={"model": model, "input": texts})
    answer.raise_for_status()
    return [entry["embedding"] for entry in answer.json()["data"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--url", default="http://127.0.0.1:5780")
    parser.add_argument("--embedder", default="nomic-embed-v1.5")
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with httpx2.Client(base_url=options.url, timeout=300, trust_env=False) as client:
        texts = paragraphs(options.files)
        vectors = embed(client, options.embedder, texts)
        (asked,) = embed(client, options.embedder, [options.question])
        # The vectors are of length 1, so the cosine is the product.
        ranked = sorted(zip(texts, vectors, strict=True), key=lambda each: -sum(map(operator.mul, each[1], asked)))
        best = [text for text, _ in ranked[:N_BEST]]
        for text in best:
            print(f"* {text[:100]}")
        prompt = "Use this:\n" + "\n".join(best) + f"\n\n{options.question}"
        body = {"model": options.model, "input": prompt, "params": {"temperature": 0, "max_tokens": 200}}
        answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        print(f"\n{answer.json()['text']}")


if __name__ == "__main__":
    main()
