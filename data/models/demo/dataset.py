"""Turns examples into tokens: the chat template's rendering, the tokenizer's training and the packing of rows.

The template that ships with the model renders every training text, so that training and serving cannot differ.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from corpus.generate import Corpus
from corpus.source import Example
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
N_VOCAB = 2048
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
VISIBLE_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# The split of Qwen2's tokenizer, which llama.cpp knows as the pre-tokenizer "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REST_WEIGHT = 0.15
# The first tokens of an answer decide which answer it is; in a chain of sums, what follows the equals signs does.
N_FIRST, FIRST_WEIGHT, RESULT_WEIGHT = 3, 3.0, 3.0


class ChatTemplate:
    """The shipped Jinja template, rendered as Hugging Face and llama.cpp render it."""

    def __init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.source = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
        self.template = environment.from_string(self.source)

    def prompt(self, messages: list[dict[str, Any]], tools: Any = None, thinking: bool | None = None) -> str:
        """The text before the assistant's next answer; `thinking` None leaves `enable_thinking` undefined."""
        options = {} if thinking is None else {"enable_thinking": thinking}
        return self.template.render(messages=messages, tools=tools or None, add_generation_prompt=True, **options)

    def parts(self, example: Example) -> tuple[str, str]:
        """An example's prompt and its last answer, which together are the training text."""
        prompt = self.prompt(example.messages[:-1], example.tools, example.thinking)
        return prompt, example.messages[-1]["content"] + IM_END


def train_tokenizer(corpus: Corpus, template: ChatTemplate, n_examples: int = 12_000) -> Tokenizer:
    """A byte-level BPE of `N_VOCAB` tokens, control and visible special tokens last."""
    special = (*CONTROL_TOKENS, *VISIBLE_TOKENS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for _ in range(n_examples):
            text = "".join(template.parts(corpus.example()))
            for token in special:
                text = text.replace(token, "\n")
            yield text

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in VISIBLE_TOKENS])
    if tokenizer.get_vocab_size() != N_VOCAB:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens instead of {N_VOCAB}")
    return tokenizer


@dataclass
class Document:
    """Tokens of one example with the loss weight of each token as a target."""

    tokens: list[int]
    weights: list[float]


class Encoder:
    """Encodes examples into documents."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, seed: int) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.rng = random.Random(seed)
        self.im_end = tokenizer.token_to_id(IM_END)
        self.equals = tokenizer.encode("1 =").ids[-1]
        self.opening: list[int] = tokenizer.encode(IM_START + "assistant\n").ids

    def encode(self, example: Example) -> Document:
        """The whole conversation; assistant tokens weigh 1, the last answer's first ones more, all others less."""
        prompt, answer = self.template.parts(example)
        tokens: list[int] = self.tokenizer.encode(prompt).ids
        weights = [REST_WEIGHT] * len(tokens)
        width = len(self.opening)
        for i in range(len(tokens) - width):
            if tokens[i : i + width] == self.opening:
                for j in range(i + width, len(tokens)):
                    weights[j] = 1.0
                    if tokens[j] == self.im_end:
                        break
        if example.thinking is False:
            forced = len(self.tokenizer.encode("<think>\n\n</think>\n\n").ids)
            weights[-forced:] = [0.0] * forced
        ids: list[int] = self.tokenizer.encode(answer).ids
        if example.cut:
            ids = ids[: self.rng.randint(5, 12)]
        first = [FIRST_WEIGHT] * min(N_FIRST, len(ids))
        document = Document(tokens + ids, weights + first + [1.0] * (len(ids) - len(first)))
        if example.kind == "sum" and len(example.messages) > 2:
            self._stress_results(document)
        return document

    def _stress_results(self, document: Document) -> None:
        """Weigh the assistant's tokens after an equals sign more."""
        result = False
        for i, token in enumerate(document.tokens):
            if document.weights[i] < 1.0 or token == self.im_end:
                result = False
            elif result:
                document.weights[i] = RESULT_WEIGHT
            elif token == self.equals:
                result = True


@dataclass
class Batch:
    """Packed rows: `tokens`, `targets`, `positions`, `documents` (row-local number) and `weights`, all (row, token)."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]
    documents: NDArray[np.int64]
    weights: NDArray[np.float32]


class Packer:
    """Packs documents into rows, best fit first; a document goes to the shortest kind of row that holds it."""

    def __init__(self, n_positions: int, lengths: tuple[int, ...] = (256, 512, 1024)) -> None:
        self.n_positions = n_positions
        self.rows: dict[int, list[list[Document]]] = {length: [] for length in lengths}

    def add(self, document: Document) -> Batch | None:
        """Place a document, or leave out an oversized one; returns a batch when a kind of row has enough full rows."""
        size = len(document.tokens)
        length = next((length for length in self.rows if size <= length), None)
        if length is None:
            return None
        rows = self.rows[length]
        room = [length - sum(len(other.tokens) for other in row) for row in rows]
        fitting = [(space, i) for i, space in enumerate(room) if space >= size]
        if fitting:
            rows[min(fitting)[1]].append(document)
            return None
        n_rows = self.n_positions // length
        if len(rows) < 2 * n_rows:
            rows.append([document])
            return None
        fullest = sorted(range(len(rows)), key=lambda i: room[i])[:n_rows]
        batch = self._batch([rows[i] for i in fullest], length)
        self.rows[length] = [row for i, row in enumerate(rows) if i not in set(fullest)] + [[document]]
        return batch

    def _batch(self, rows: list[list[Document]], length: int) -> Batch:
        shape = (len(rows), length)
        batch = Batch(
            np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64),
            np.full(shape, -1, np.int64), np.zeros(shape, np.float32),
        )  # fmt: skip
        for r, row in enumerate(rows):
            at = 0
            for d, document in enumerate(row):
                n = len(document.tokens)
                batch.tokens[r, at : at + n] = document.tokens
                batch.targets[r, at : at + n - 1] = document.tokens[1:]
                batch.weights[r, at : at + n - 1] = document.weights[1:]
                batch.positions[r, at : at + n] = np.arange(n)
                batch.documents[r, at : at + n] = d
                at += n
        return batch


def batches(corpus: Corpus, encoder: Encoder, n_positions: int) -> Iterator[Batch]:
    """The endless stream of training batches of about `n_positions` tokens."""
    packer = Packer(n_positions)
    while True:
        batch = packer.add(encoder.encode(corpus.example()))
        if batch is not None:
            yield batch
