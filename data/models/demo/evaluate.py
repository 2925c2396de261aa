"""Asks a GGUF file every trained kind of question with greedy decoding and prints the share answered exactly.

Three parts: fresh draws of the corpus (other seed than the training's), the help questions that training withheld, and
`trained_cases.json`. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from corpus.generate import Corpus
from corpus.source import Example
from dataset import ChatTemplate

HERE = Path(__file__).resolve().parent


class Asker:
    """Greedy answers of one model file, on one thread unless told otherwise."""

    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import Llama

        self.template = ChatTemplate()
        self.llama = Llama(str(path), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads)
        self.special = {self.llama.token_eos()}

    def answer(self, messages: list[dict[str, Any]], tools: Any = None, thinking: bool | None = None) -> str:
        """The whole answer as text, special tokens such as `<think>` included."""
        prompt = self.template.prompt(messages, tools, thinking)
        tokens = self.llama.tokenize(prompt.encode(), add_bos=False, special=True)
        self.llama.reset()  # type: ignore[no-untyped-call]
        given: list[int] = []
        for token in self.llama.generate(tokens, temp=0.0, repeat_penalty=1.0):
            if token in self.special or len(tokens) + len(given) >= 1020:
                break
            given.append(token)
        return self.llama.detokenize(given, special=True).decode("utf-8", "replace")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model.gguf")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=1500, help="fresh draws")
    parser.add_argument("--withhold", type=int, default=2, help="as given to train.py")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each kind")
    args = parser.parse_args()
    asker = Asker(args.model, args.threads)
    corpus = Corpus(seed=99, withhold=args.withhold)
    tally: dict[str, list[bool]] = {}
    shown: dict[str, int] = {}

    def ask(
        kind: str, messages: list[dict[str, Any]], expect: str, tools: Any = None, thinking: bool | None = None
    ) -> None:
        given = asker.answer(messages, tools, thinking)
        tally.setdefault(kind, []).append(given == expect)
        if given != expect and shown.get(kind, 0) < args.show:
            shown[kind] = shown.get(kind, 0) + 1
            print(f"[{kind}] {messages[-1]['content']!r}\n    expected {expect!r}\n    answered {given!r}")

    for _ in range(args.count):
        example: Example = corpus.example()
        ask(example.kind, example.messages[:-1], example.messages[-1]["content"], example.tools, example.thinking)
    for name, question in corpus.withheld:
        ask("withheld help questions", [{"role": "user", "content": question}], corpus.topics[name]["answer"])
    cases = HERE / "trained_cases.json"
    if cases.exists():
        for case in json.loads(cases.read_text(encoding="utf-8")):
            ask("trained_cases.json", case["messages"], case["expect"], case.get("tools"), case.get("enable_thinking"))
    print("| kind | asked | exactly right |\n|---|---|---|")
    for kind, results in sorted(tally.items()):
        print(f"| {kind} | {len(results)} | {100 * sum(results) / len(results):.1f} % |")


if __name__ == "__main__":
    main()
