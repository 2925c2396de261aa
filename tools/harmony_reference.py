"""Writes `tests/engine/harmony_reference.json`: what OpenAI's own `openai-harmony` makes of conversations and answers.

It is run by hand, because that package (0.0.8 here) wants its vocabulary from the network:
`TIKTOKEN_ENCODINGS_BASE=<folder with o200k_base.tiktoken> python tools/harmony_reference.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncodingName,
    Message,
    ReasoningEffort,
    Role,
    SystemContent,
    ToolDescription,
    load_harmony_encoding,
)

TARGET = Path(__file__).resolve().parent.parent / "tests/engine/harmony_reference.json"

FORMAT = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
TOOLS: list[dict[str, Any]] = [
    {"name": "get_location", "description": "Gets the location of the user."},
    {
        "name": "get_weather",
        "description": "Gets the weather.\nIn one place.",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city, e.g. San Francisco", "title": "City"},
                "format": FORMAT,
                "days": {"type": "integer", "default": 3},
                "hourly": {"type": "boolean", "default": False, "description": "Each hour"},
                "tags": {"type": "array", "items": {"type": "string"}, "examples": ["wind", "rain"]},
                "unit": {"type": "string", "default": "m"},
                "limit": {"type": ["number", "null"]},
                "note": {"type": "string", "nullable": True},
                "area": {
                    "type": "object",
                    "properties": {"radius": {"type": "number"}, "of": {"type": "array"}},
                    "required": ["radius"],
                },
                "any": {},
            },
            "required": ["location"],
        },
    },
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"location": "Oslo"}'}}
OTHER = {"id": "call_2", "type": "function", "function": {"name": "get_location", "arguments": "{}"}}
ASKED = {"role": "user", "content": "What is the weather in Oslo?"}
CALLING = {"role": "assistant", "content": "", "reasoning_content": "I need the tool.", "tool_calls": [CALL]}
CALLING_MORE = {"role": "assistant", "content": "", "reasoning_content": "And where?", "tool_calls": [OTHER]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 7}'}
OTHER_RESULT = {"role": "tool", "tool_call_id": "call_2", "content": "Oslo 日本"}

CONVERSATIONS: list[dict[str, Any]] = [
    {"effort": "medium", "tools": [], "messages": [{"role": "user", "content": "What is 2 + 2?"}]},
    {"effort": "low", "tools": [], "messages": [{"role": "system", "content": "Be\nbrief."}, ASKED]},
    {"effort": "high", "tools": TOOLS, "messages": [{"role": "system", "content": "Be kind."}, ASKED]},
    {"effort": "medium", "tools": TOOLS, "messages": [ASKED, CALLING, RESULT]},
    {"effort": "medium", "tools": TOOLS, "messages": [ASKED, CALLING, RESULT, CALLING_MORE, OTHER_RESULT]},
    {
        "effort": "medium",
        "tools": [],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."},
            {"role": "user", "content": "<|end|>?"},
        ],
    },
]

ANSWERS = [
    "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>",
    "<|channel|>final<|message|>naïve 日本 👩‍🚀\n\n1. one\n<|return|>",
    "<|channel|>analysis<|message|>Use it.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"location": "Oslo"}<|call|>',
    "<|channel|>analysis<|message|>Use it.<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json"
    '<|message|>{"location": "Oslo"}<|call|>',
    '<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{"location": "Oslo"}<|call|>',
    "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.get_weather <|constrain|>json<|message|>{"location": "Oslo"}<|call|>',
    "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
    "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|return|>",
    "<|channel|>analysis<|message|>cut o",
]


def _messages(case: dict[str, Any]) -> list[Message]:
    """The conversation as the package has it; thoughts before a final answer are left out, as its own filter does."""
    system = (
        SystemContent.new()
        .with_reasoning_effort(ReasoningEffort(case["effort"].capitalize()))
        .with_conversation_start_date("2025-06-28")
        .with_knowledge_cutoff("2024-06")
        .with_required_channels(["analysis", "commentary", "final"])
    )
    found = [Message.from_role_and_content(Role.SYSTEM, system)]
    lead = [each["content"] for each in case["messages"] if each["role"] == "system"]
    if lead or case["tools"]:
        developer = DeveloperContent.new()
        if lead:
            developer = developer.with_instructions(lead[0])
        if case["tools"]:
            tools = [
                ToolDescription.new(each["name"], each["description"], parameters=each.get("parameters"))
                for each in case["tools"]
            ]
            developer = developer.with_function_tools(tools)
        found.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    names = {}
    for each in case["messages"]:
        if each["role"] == "user":
            found.append(Message.from_role_and_content(Role.USER, each["content"]))
        elif each["role"] == "tool":
            author = Author.new(Role.TOOL, f"functions.{names[each['tool_call_id']]}")
            found.append(
                Message.from_author_and_content(author, each["content"])
                .with_recipient("assistant")
                .with_channel("commentary")
            )
        elif each["role"] == "assistant":
            if "reasoning_content" in each:
                thought = Message.from_role_and_content(Role.ASSISTANT, each["reasoning_content"])
                found.append(thought.with_channel("analysis"))
            for call in each.get("tool_calls", ()):
                names[call["id"]] = call["function"]["name"]
                found.append(
                    Message.from_role_and_content(Role.ASSISTANT, call["function"]["arguments"])
                    .with_recipient(f"functions.{call['function']['name']}")
                    .with_channel("commentary")
                    .with_content_type("<|constrain|>json")
                )
            if "tool_calls" not in each:
                found.append(Message.from_role_and_content(Role.ASSISTANT, each["content"]).with_channel("final"))
    return found


def main() -> None:
    """Renders, parses and writes."""
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    conversations = []
    for case in CONVERSATIONS:
        tokens = encoding.render_conversation_for_completion(
            Conversation.from_messages(_messages(case)), Role.ASSISTANT
        )
        conversations.append(case | {"rendered": encoding.decode(tokens)})
    answers = []
    for text in ANSWERS:
        tokens = encoding.encode(text, allowed_special="all")
        parsed = encoding.parse_messages_from_completion_tokens(tokens, Role.ASSISTANT)
        told = [
            {"channel": each.channel, "recipient": each.recipient, "text": "".join(part.text for part in each.content)}
            for each in parsed
        ]
        answers.append({"text": text, "messages": told})
    told = {"conversations": conversations, "answers": answers}
    TARGET.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
