"""An agent on the bus: hears every model's load, picks the least loaded one that can call tools, and lets it use one.

python examples/agent.py [--nats nats://127.0.0.1:5700] [--url http://127.0.0.1:5780] "What is the weather in Oslo?"

The choice is made over NATS alone (health documents of every node); the conversation with tools goes over HTTP to the
node that was chosen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import httpx2
import nats

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def get_weather(city: str) -> str:
    """What a real agent would look up."""
    return json.dumps({"city": city, "weather": "rain", "celsius": 7})


async def least_loaded(url: str, heard_s: float = 1.0) -> dict[str, Any]:
    """The health document of the model to ask: online, text, with tools if any has them, the fewest waiting."""
    client = await nats.connect(url)
    heard: dict[tuple[str, str], dict[str, Any]] = {}

    async def hear(message: Any) -> None:
        if message.subject.endswith(".health"):
            return  # a question, ours among them
        document = json.loads(message.data)
        heard[document["node"], document["model_name"]] = document

    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=hear)
    await client.subscribe("models.>", cb=hear)
    # Whoever reports its queue is asked for its health; a busy model reports every second, an idle one every ten.
    reports = await client.subscribe("monitoring.inference.>")
    loop = asyncio.get_running_loop()
    end = loop.time() + 12
    while loop.time() < end:
        try:
            report = json.loads((await reports.next_msg(timeout=max(0.01, end - loop.time()))).data)
        except nats.errors.TimeoutError:
            break
        await client.publish(f"models.{report['model_name']}.health", b"{}", reply=inbox)
        await client.flush()
        end = min(end, loop.time() + heard_s)
    await client.close()
    able = [each for each in heard.values() if each["status"] == "online" and "text-generation" in each["capabilities"]]
    if not able:
        raise SystemExit("no model that writes text is online on this bus")
    return min(
        able,
        key=lambda each: (
            "tool-calling" not in each["capabilities"],
            each["queue_metrics"]["pending_messages"] + each["queue_metrics"]["active_processing"],
        ),
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--nats", default="nats://127.0.0.1:5700")
    parser.add_argument("--url", help="where to talk to the model (default: its own endpoint)")
    options = parser.parse_args()
    chosen = await least_loaded(options.nats)
    waiting = chosen["queue_metrics"]["pending_messages"]
    print(f"asking {chosen['model_name']} on {chosen['node']}, {waiting} waiting, {', '.join(chosen['capabilities'])}")
    messages: list[dict[str, Any]] = [{"role": "user", "content": options.question}]
    async with httpx2.AsyncClient(base_url=options.url or chosen["endpoint"], timeout=300, trust_env=False) as client:
        for _ in range(4):
            body = {"model": chosen["model_name"], "messages": messages, "tools": TOOLS, "temperature": 0}
            answer = await client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            message = answer.json()["choices"][0]["message"]
            calls = message.get("tool_calls") or []
            if not calls:
                print(message["content"])
                return
            messages.append({"role": "assistant", "content": message.get("content") or "", "tool_calls": calls})
            for call in calls:
                name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                print(f"it calls {name}({arguments})")
                result = get_weather(**arguments) if name == "get_weather" else f"there is no tool {name}"
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    print("it kept calling tools")


if __name__ == "__main__":
    asyncio.run(main())
