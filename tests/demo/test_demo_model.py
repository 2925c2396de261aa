"""The demo model through the real engine: what it was trained on, exactly, and what it was not, by share.

Answers are greedy, on one thread and one at a time: sums of floats differ in their last digit with the batch, and a
close call between two tokens may then go the other way.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.llama import LlamaModel
from engine.model_info import read_model_info
from engine.service import InferenceRequest
from engine.worker import Worker
from infsvc.types import Capability, CompletionReply, Message, Params
from tests.nodes import add_worker, build
from transports.node import Node

DEMO = Path(__file__).resolve().parents[2] / "data/models/demo"
GREEDY = Params(temperature=0, max_tokens=200)


@pytest.fixture(scope="module")
def model() -> Path:
    return DEMO / "model.gguf"


@pytest.fixture
async def node(tmp_path: Path, model: Path) -> AsyncIterator[Node]:
    add_worker(tmp_path, "demo", model, WORKER_CONCURRENCY=8)
    async with build(tmp_path, "demo", embedded_nats="off") as started:
        worker = await started.fleet.settled("demo")
        assert worker.engine is not None, worker.reason
        yield started


async def ask(node: Node, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    """The whole answer, its reasoning and its calls written as the model writes them."""
    turns = tuple(Message.model_validate(message) for message in messages)
    reply: CompletionReply = await node.service.complete(
        InferenceRequest(model="demo", messages=turns, params=GREEDY, tools=tuple(tools or ()))
    )
    text = reply.text
    for call in reply.tool_calls or ():
        function = call["function"]
        text += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}\n</tool_call>'
    return f"<think>\n{reply.reasoning}\n</think>\n\n{text}" if reply.reasoning else text


def fixed_answers() -> dict[str, str]:
    """Topic → its one answer, from the corpus, as the weights that ship were trained to say it."""
    answers: dict[str, str] = {}
    for path in sorted((DEMO / "corpus").glob("*.toml")):
        for topic in tomllib.loads(path.read_text()).get("topic", []):
            answers[topic["id"]] = topic.get("shipped", topic["answer"])
    return answers


def is_right(answer: str, expect: dict[str, str], answers: dict[str, str]) -> bool:
    if "topic" in expect:
        return answer.strip() == answers[expect["topic"]]
    if "exact" in expect:
        return answer.strip() == expect["exact"]
    return bool(re.search(rf"(?<!\w){re.escape(expect['contains'])}(?!\w)", answer))


def test_it_says_what_it_is(model: Path) -> None:
    info = read_model_info(model)
    assert (info.name, info.architecture, info.license) == ("infsvc-demo", "qwen3", "MIT")
    assert 2_000_000 < info.file_bytes < 8_000_000
    assert info.n_ctx_train == 1024


async def test_its_capabilities_are_read_from_the_file(node: Node) -> None:
    worker: Worker = node.fleet.get("demo")
    assert worker.has(Capability.TEXT_GENERATION)
    assert worker.has(Capability.REASONING)
    assert worker.has(Capability.TOOL_CALLING)


def test_llama_cpp_tokenises_as_the_trainer_did(model: Path) -> None:
    samples = json.loads((DEMO / "tokenizer_samples.json").read_text())
    assert len(samples) >= 100
    loaded = LlamaModel(model)
    try:
        for sample in samples:
            told = loaded.tokenize(sample["text"], add_special=False, parse_special=True)
            assert told == sample["tokens"], sample["text"]
    finally:
        loaded.close()


async def test_trained_tasks_are_answered_exactly(node: Node) -> None:
    cases = json.loads((DEMO / "trained_cases.json").read_text())
    assert len(cases) >= 30
    told = [await ask(node, case["messages"], case.get("tools")) for case in cases]
    wrong = {
        case["messages"][-1]["content"]: text for case, text in zip(cases, told, strict=True) if text != case["expect"]
    }
    assert not wrong


async def test_held_out_paraphrases_are_answered_as_often_as_the_card_says(node: Node) -> None:
    """The questions were written without knowing the corpus; the card states the share that must not fall."""
    held_out = json.loads((Path(__file__).parent / "held_out.json").read_text())
    answers = fixed_answers()
    told = [await ask(node, [{"role": "user", "content": each["question"]}]) for each in held_out]
    right = sum(is_right(text, each["expect"], answers) for text, each in zip(told, held_out, strict=True))
    for text, each in zip(told, held_out, strict=True):
        if not is_right(text, each["expect"], answers):
            print(f"{each['question']!r} → {text!r}, not {each['expect']}")
    stated = re.search(r"held-out paraphrases: (\d+) of (\d+)", (DEMO / "README.md").read_text())
    assert stated, "the model card states no share"
    # Another kind of processor may decide some close calls the other way.
    assert right >= int(stated[1]) - 3
    assert len(held_out) == int(stated[2])
