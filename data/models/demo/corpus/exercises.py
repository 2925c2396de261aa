"""Exercises whose answers are computed: sums, texts to repeat, capitals, counting and JSON objects."""

from __future__ import annotations

import json
import string
from typing import Any

from corpus.source import Turn, load
from corpus.wording import Wording

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
# Words in a text to repeat.
ECHO_LENGTHS = (1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 10, 14)
LONG_ECHO_LENGTHS = (6, 8, 10, 12, 16, 20, 24, 30)
# The kind of value each JSON key takes.
JSON_KEYS = {
    "name": "name", "age": "int", "city": "city", "colour": "colour", "country": "country", "price": "int",
    "id": "int", "title": "word", "count": "int", "active": "bool", "size": "int", "user": "name", "animal": "word",
    "year": "int", "language": "language", "key": "word", "value": "int", "ok": "bool", "color": "colour",
    "status": "word", "score": "int", "first_name": "name", "item": "word", "port": "int",
}  # fmt: skip


class Exercises:
    """Draws exercises; `help_questions` are texts that may have to be repeated instead of answered."""

    def __init__(self, wording: Wording, data: dict[str, Any], help_questions: dict[str, list[str]]) -> None:
        self.wording = wording
        self.rng = wording.rng
        self.chance = wording.chance
        self.data = data
        self.capitals: dict[str, str] = data["capitals"]
        self.frames: dict[str, dict[str, list[str]]] = load("wordings.toml")
        self.help_questions = help_questions

    def sum_turn(self) -> Turn:
        """An addition, subtraction or multiplication."""
        rng, frames = self.rng, self.frames["sum"]
        kind = rng.choice("++--*")
        if kind == "*":
            a, b = rng.randint(0, 9), rng.randint(0, 9)
        else:
            a, b = rng.randint(0, 20), rng.randint(0, 20)
            if kind == "-" and a < b and self.chance(0.8):
                a, b = b, a
        in_words = self.chance(0.15)
        x, y = (NUMBER_WORDS[a], NUMBER_WORDS[b]) if in_words else (str(a), str(b))
        if kind == "+":
            name, line, thought = "plus", f"{a} + {b} = {a + b}.", f"I add {b} to {a} and get {a + b}."
        elif kind == "-":
            name, line, thought = "minus", f"{a} - {b} = {a - b}.", f"I take {b} from {a} and get {a - b}."
        else:
            name, line, thought = "times", f"{a} x {b} = {a * b}.", f"I multiply {a} by {b} and get {a * b}."
        expression = rng.choice(frames[name])
        if self.chance(0.35):
            text = rng.choice(frames[f"{name}_orders"])
        else:
            text = rng.choice(frames["frames"]).format(expression)
        text = text.format(x=x, y=y)
        return Turn("sum", self.wording.surface(text) if self.chance(0.4) else text, line, thought)

    def random_text(self, lengths: tuple[int, ...]) -> str:
        """A text to repeat: words, made-up words, numbers or letters, of varied length and case."""
        rng, data = self.rng, self.data
        n_words = rng.choice(lengths)
        style = rng.random()
        parts: list[str] = []
        for _ in range(n_words):
            pick = rng.random()
            if style < 0.45 or (style < 0.85 and pick < 0.5):
                parts.append(rng.choice(data["words"] if pick < 0.8 else data["names"] + data["cities"]))
            elif pick < 0.75:
                letters = string.ascii_lowercase if self.chance(0.75) else string.ascii_letters + string.digits + "-_"
                parts.append("".join(rng.choice(letters) for _ in range(rng.randint(2, 9))))
            elif pick < 0.9:
                parts.append(str(rng.randrange(10 ** rng.randint(1, 6))))
            else:
                parts.append("".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(1, 5))))
        text = " ".join(parts)
        if self.chance(0.08):
            topics = rng.sample(list(self.help_questions), 2)
            text = rng.choice([question for topic in topics for question in self.help_questions[topic]])
        if self.chance(0.3):
            text = text[0].upper() + text[1:]
        if self.chance(0.2):
            text += rng.choice(".!?")
        if self.chance(0.06) and " " in text:
            text = text.replace(" ", ", ", 1)
        return text

    def echo_turn(self, lengths: tuple[int, ...] = ECHO_LENGTHS) -> Turn:
        """A text to repeat exactly, as many words long as one of `lengths` says."""
        text = self.random_text(lengths)
        user = self.rng.choice(self.frames["echo"]["frames"]).format(text)
        return Turn("echo", user, text, "I must repeat the text exactly.")

    def capital_turn(self) -> Turn:
        """The capital of a country."""
        country, capital = self.rng.choice(sorted(self.capitals.items()))
        frame = self.rng.choice(self.frames["capital"]["frames"])
        user = frame.format(country if self.chance(0.8) else country.removeprefix("the "))
        if self.chance(0.5):
            user = self.wording.surface(user)
        if self.chance(0.08):
            user = self.wording.typo(user)
        thought = f"The question is about {country}. I know its capital."
        return Turn("capital", user, f"The capital of {country} is {capital}.", thought)

    def count_turn(self) -> Turn:
        """Numbers in order."""
        rng, frames = self.rng, self.frames["count"]
        if self.chance(0.15):
            first, last = rng.randint(3, 12), rng.randint(0, 2)
            choices = frames["down"]
            numbers = range(first, last - 1, -1)
        else:
            first = rng.choice([1, 1, 1, *range(21)])
            last = first + rng.randint(2, 20) if self.chance(0.9) else rng.randint(first + 10, 100)
            choices = frames["up"] + (frames["up_from_one"] if first == 1 else [])
            numbers = range(first, last + 1)
        user = rng.choice(choices).format(a=first, b=last)
        return Turn("count", user, ", ".join(map(str, numbers)) + ".", f"I start at {first} and stop at {last}.")

    def json_turn(self) -> Turn:
        """A JSON object with given keys and values."""
        rng, frames = self.rng, self.frames["json"]
        keys = rng.sample(sorted(JSON_KEYS), rng.choice([1, 2, 2, 2, 3, 3, 4]))
        data: dict[str, Any] = {key: self.value(JSON_KEYS[key]) for key in keys}
        if self.chance(0.2):
            data[self.made_up()] = self.value(rng.choice(["int", "word", "name"]))

        def shown(value: Any) -> str:
            return json.dumps(value) if isinstance(value, bool) else str(value)

        link = rng.choice(frames["links"])
        pairs = [key + link.format(v=shown(value)) for key, value in data.items()]
        text = pairs[0]
        if len(pairs) > 1:
            text = ", ".join(pairs[:-1]) + rng.choice([" and ", ", ", ", and "]) + pairs[-1]
        user = rng.choice(frames["frames"]).format(text)
        return Turn("json", user, json.dumps(data), "I must write one JSON object with these keys.")

    def value(self, kind: str) -> Any:
        """Draw a value of a kind that tools.toml or `JSON_KEYS` names."""
        rng, data = self.rng, self.data
        if kind == "int":
            return rng.choice([rng.randint(0, 20), rng.randint(0, 100), rng.randint(0, 9999)])
        if kind == "name":
            return rng.choice(data["names"]) if self.chance(0.7) else self.made_up().capitalize()
        if kind == "city":
            return rng.choice(data["cities"]) if self.chance(0.75) else self.made_up().capitalize()
        if kind == "word":
            return rng.choice(data["words"]) if self.chance(0.75) else self.made_up()
        if kind == "phrase":
            return " ".join(self.value("word") for _ in range(rng.randint(1, 4)))
        if kind == "symbol":
            return "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(2, 4)))
        if kind == "path":
            return self.value("word") + rng.choice([".txt", ".md", ".json", ".py", ".csv"])
        if kind == "bool":
            return self.chance(0.5)
        choices = {
            "currency": ["euros", "dollars", "pounds", "yen", "francs", "pesos", "EUR", "USD", "GBP"],
            "room": ["kitchen", "bedroom", "bathroom", "office", "garage", "hall", "garden", "cellar", "living room"],
            "language": ["French", "German", "Spanish", "Italian", "Dutch", "Polish", "Greek", "Latin", "Danish"],
            "colour": data["colours"],
            "country": [name.removeprefix("the ") for name in sorted(self.capitals)],
        }
        return rng.choice(choices[kind])

    def made_up(self) -> str:
        """A word that probably does not exist."""
        rng = self.rng
        parts = (rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
        return "".join(parts) + rng.choice(["", "", "n", "r", "s", "x", "l"])
