"""Tools for the tool-call exercises: signatures as a client offers them, questions, calls, results, final sentences."""

from __future__ import annotations

import json
import re
from typing import Any

from corpus.exercises import Exercises
from corpus.source import Message, load

Tool = dict[str, Any]
CALCULATORS = ("Add two numbers", "Multiply two numbers")


class Tools:
    """Draws tools, from tools.toml or made up, so that names and arguments must be copied and not remembered."""

    def __init__(self, exercises: Exercises) -> None:
        data = load("tools.toml")
        self.tools: list[Tool] = data["tool"]
        self.patterns: dict[str, list[str]] = data["patterns"]
        self.exercises = exercises
        self.rng = exercises.rng
        self.chance = exercises.chance

    def made_up_tool(self) -> Tool:
        """A tool of the pattern get_<thing>(<entity>)."""
        rng = self.rng
        verb, thing, entity = (rng.choice(self.patterns[part]) for part in ("verbs", "things", "entities"))
        argument = rng.choice([entity, "name", "id", f"{entity}_id", f"{entity}_name"])
        name = rng.choice(
            [f"{verb}_{entity}_{thing}", f"{verb}_{thing}", f"{entity}_{thing}", f"{verb}_{thing}_of_{entity}"]
        )
        mark = "{" + argument + "}"
        return {
            "name": name,
            "aliases": [],
            "description": rng.choice([f"{verb.capitalize()} the {thing} of a {entity}", f"The {thing} of a {entity}"]),
            "kinds": {argument: "int" if argument.endswith("id") else "name"},
            "questions": [
                f"What is the {thing} of the {entity} {mark}?",
                f"What is the {thing} of {mark}?",
                f"{verb} the {thing} of {mark}",
                f"Tell me the {thing} of the {entity} {mark}",
                f"{thing} of {entity} {mark}",
                f"I need the {thing} of {entity} {mark}",
                f"Use {name} for {mark}",
                f"Call {name} with {mark}",
                f"{entity} {mark}: {thing}?",
            ],
            "result": '{"' + thing + '": {r}}',
            "sentence": f"The {thing} of {mark} is " + "{r}.",
        }

    def draw(self) -> Tool:
        """A tool, from the list or made up, sometimes under another name."""
        if self.chance(0.45):
            return self.made_up_tool()
        tool = dict(self.rng.choice(self.tools))
        if self.chance(0.5):
            tool["name"] = self.rng.choice(tool["aliases"])
        if self.chance(0.1):
            tool["name"] = f"{self.exercises.made_up()}_{self.exercises.made_up()}"
        return tool

    def offer(self, n_tools: int) -> list[Tool]:
        """`n_tools` different tools."""
        tools: list[Tool] = []
        while len(tools) < n_tools:
            tool = self.draw()
            same = (other["name"] == tool["name"] or other["description"] == tool["description"] for other in tools)
            if not any(same):
                tools.append(tool)
        return tools

    def signature(self, tool: Tool, style: int) -> dict[str, Any]:
        """The tool as a client offers it: an OpenAI function, described more (`style` 1) or less (2) fully."""
        properties: dict[str, Any] = {}
        for name, kind in tool["kinds"].items():
            properties[name] = {"type": "integer" if kind == "int" else "string"}
            if style == 1:
                properties[name]["description"] = f"The {name.replace('_', ' ')}"
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        if style != 2:
            parameters["required"] = list(tool["kinds"])
        description = tool["description"] + ("." if style == 1 else "")
        function = {"name": tool["name"], "description": description, "parameters": parameters}
        return {"type": "function", "function": function}

    def exchange(self, tool: Tool, with_result: bool) -> list[Message]:
        """A question for `tool`, its call, and perhaps its result and the sentence made of it."""
        rng, value = self.rng, self.exercises.value
        values = {name: value(kind) for name, kind in tool["kinds"].items()}
        question = rng.choice(tool["questions"]).format(**values)
        if self.chance(0.3):
            question = rng.choice(self.exercises.wording.prefixes) + question
        elif self.chance(0.3):
            question = question[0].lower() + question[1:] if self.chance(0.6) else question.rstrip(".?!")
        call = {"name": tool["name"], "arguments": values}
        answer = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if with_result:
            number = rng.choice([rng.randint(0, 30), rng.randint(0, 1000)])
            weather = "condition" in tool["result"]
            phrase = rng.choice(["sunny", "cloudy", "rainy", "windy", "foggy"]) if weather else value("phrase")
            filled = {"r": number, "s": phrase, **values}

            def fill(text: str) -> str:
                return re.sub(r"\{(\w+)\}", lambda match: str(filled[match.group(1)]), text)

            messages.append({"role": "tool", "content": fill(tool["result"])})
            messages.append({"role": "assistant", "content": fill(tool["sentence"])})
        return messages
