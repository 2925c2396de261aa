"""Held against what OpenAI's own package makes of the same conversations and answers, as `tools/harmony_reference.py`
wrote it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.harmony_output import HarmonyParser
from infsvc.types import Message
from tests.engine.test_harmony import form

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "harmony_reference.json").read_text())


@pytest.mark.parametrize("case", REFERENCE["conversations"])
def test_a_conversation_is_rendered_alike(case: dict[str, Any]) -> None:
    messages = [Message.model_validate(each) for each in case["messages"]]
    tools = [{"type": "function", "function": each} for each in case["tools"]]
    assert form().render(messages, think=None, tools=tools, effort=case["effort"]) == case["rendered"]


@pytest.mark.parametrize("case", REFERENCE["answers"])
def test_an_answer_is_read_alike(case: dict[str, Any]) -> None:
    parser = HarmonyParser(calls=True)
    parts = [*(parser.feed(each) for each in case["text"]), parser.finish()]
    told: dict[str, list[str]] = {"text": [], "reasoning": [], "calls": []}
    for each in case["messages"]:
        to_function = (each["recipient"] or "").startswith("functions.")
        kind = "calls" if to_function else "reasoning" if each["channel"] == "analysis" else "text"
        told[kind].append(each["text"])
    assert "".join(part.text for part in parts) == "\n\n".join(told["text"])
    assert "".join(part.reasoning for part in parts) == "\n\n".join(told["reasoning"])
    assert [call.arguments for part in parts for call in part.calls] == told["calls"]
