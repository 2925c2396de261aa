"""Draws the demo model's training examples: an endless, seeded stream made from the TOML files beside this one.

Nothing is read from outside this folder, so the same seed gives the same corpus. Run as a module from the folder above,
`python -m corpus.generate`, it prints examples as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from corpus.exercises import LONG_ECHO_LENGTHS, Exercises
from corpus.source import SMALL_TALK, Example, Message, Turn, load, load_topics
from corpus.tools import CALCULATORS, Tools
from corpus.wording import PUNCTUATION, Wording, word_list


class Corpus:
    """The stream of examples; `withhold` questions of each help topic are kept out of it, for measuring.

    The trainer raises two shares for a while: `copying`, of long texts to repeat, from which the attention that most
    exercises build on is learnt much sooner; and `drilling`, of chains of sums, which are many small facts.
    """

    def __init__(self, seed: int, withhold: int = 0) -> None:
        self.rng = random.Random(seed)
        self.copying = 0.0
        self.drilling = 0.0
        self.data = load("words.toml")
        self.wording = Wording(self.rng, self.data)
        self.chance = self.wording.chance
        self.topics: dict[str, dict[str, Any]] = {topic["id"]: topic for topic in load_topics()}
        self.help = [name for name in self.topics if name not in {*SMALL_TALK, "unknown"}]
        self.withheld: list[tuple[str, str]] = []
        for name in self.help:
            questions = list(self.topics[name]["questions"])
            random.Random(f"withheld {name}").shuffle(questions)
            self.withheld += [(name, question) for question in questions[:withhold]]
            self.topics[name]["questions"] = questions[withhold:]
        self.telling = self._telling_words()
        self.exercises = Exercises(self.wording, self.data, {n: self.topics[n]["questions"] for n in self.help})
        self.tools = Tools(self.exercises)
        self.turn_kinds: list[tuple[float, Callable[[], Turn]]] = [
            (0.50, self.help_turn),
            (0.13, self.unknown_turn),
            (0.05, self.smalltalk_turn),
            (0.10, self.exercises.sum_turn),
            (0.12, self.exercises.echo_turn),
            (0.05, self.exercises.capital_turn),
            (0.03, self.exercises.count_turn),
            (0.06, self.exercises.json_turn),
        ]

    def _telling_words(self) -> dict[str, set[str]]:
        """For each help topic the words that mostly occur in its own questions."""
        totals: Counter[str] = Counter()
        own: dict[str, Counter[str]] = {}
        for name, topic in self.topics.items():
            own[name] = Counter(word for question in topic["questions"] for word in set(word_list(question)))
            totals.update(own[name])
        return {
            name: {
                word
                for word, count in own[name].items()
                if count >= 2 and count >= 0.7 * totals[word] and word not in self.wording.stop_words
            }
            for name in self.help
        }

    # Single exchanges

    def keywords(self, name: str) -> str:
        """A short question built around a few words that are telling of a help topic."""
        for _ in range(12):
            words = self.rng.choice(self.topics[name]["questions"]).rstrip(".?!").split()
            places = [i for i, word in enumerate(words) if word.lower().strip(PUNCTUATION) in self.telling[name]]
            if not places:
                continue
            at = self.rng.choice(places)
            start = max(0, at - self.rng.randrange(0, 4))
            span = words[start : at + self.rng.randrange(1, 4)]
            return self.wording.surface(self.rng.choice(self.data["frames"]).format(" ".join(span)))
        return self.wording.reword(self.rng.choice(self.topics[name]["questions"]))

    def help_turn(self) -> Turn:
        """A question about infsvc with its fixed answer."""
        name = self.rng.choice(self.help)
        topic = self.topics[name]
        if self.telling[name] and self.chance(0.15):
            user = self.keywords(name)
        else:
            user = self.wording.reword(self.rng.choice(topic["questions"]))
        return Turn("help", user, topic["answer"], f"The user asks about: {name.replace('_', ' ')}. I know this one.")

    def unknown_turn(self) -> Turn:
        """A question outside the home ground."""
        if self.chance(0.5):
            frame = self.rng.choice(self.data["unknown_frames"])
            user = self.wording.reword(frame.format(*self.rng.sample(self.data["unknown_nouns"], 2)), 0.5)
        else:
            user = self.wording.reword(self.rng.choice(self.topics["unknown"]["questions"]), 0.75)
        thought = "This is not about infsvc. I do not know it."
        return Turn("unknown", user, self.topics["unknown"]["answer"], thought)

    def smalltalk_turn(self) -> Turn:
        """A greeting, thanks, a goodbye or a question after one's health."""
        name = self.rng.choice(SMALL_TALK)
        user = self.rng.choice(self.topics[name]["questions"])
        if self.chance(0.5):
            user = self.wording.surface(user)
        if self.chance(0.08):
            user = self.wording.typo(user)
        return Turn(name, user, self.topics[name]["answer"], f"This is small talk: {name.replace('_', ' ')}.")

    def turn(self) -> Turn:
        """Any exchange that needs no tool."""
        make = self.rng.choices([make for _, make in self.turn_kinds], [share for share, _ in self.turn_kinds])[0]
        return make()

    # Conversations

    def system(self, share: float) -> list[Message]:
        """A system message in `share` of the cases."""
        return [{"role": "system", "content": self.rng.choice(self.data["systems"])}] if self.chance(share) else []

    def single_example(self) -> Example:
        """One exchange."""
        turn = self.turn()
        messages = [*self.system(0.15), *spoken(turn.user, turn.answer)]
        return Example(turn.kind, messages, cut=turn.kind in ("help", "unknown") and self.chance(0.7))

    def think_example(self) -> Example:
        """One exchange whose answer starts with a short thought, because the user asks for it."""
        turn = self.turn()
        user, thinking = turn.user, None
        how = self.rng.random()
        if how < 0.3:
            user += " /think"
        elif how < 0.5:
            thinking = True
        elif how < 0.75:
            user = self.rng.choice(self.data["think_prefixes"]) + user
        else:
            stop = "" if user[-1] in ".?!" else "."
            user = user.rstrip() + stop + self.rng.choice(self.data["think_suffixes"])
        if turn.kind == "echo" and how >= 0.5:
            user, thinking = turn.user, True
        answer = f"<think>\n{turn.thought}\n</think>\n\n{turn.answer}"
        messages = [*self.system(0.1), *spoken(user, answer)]
        cut = turn.kind in ("help", "unknown") and self.chance(0.5)
        return Example("think", messages, thinking=thinking, cut=cut)

    def no_think_example(self) -> Example:
        """One exchange with thinking switched off by the caller: the prompt holds an empty thought."""
        turn = self.turn()
        user = turn.user + (" /think" if self.chance(0.2) else "")
        messages = [*self.system(0.1), *spoken(user, turn.answer)]
        return Example("no_think", messages, thinking=False, cut=turn.kind == "help")

    def tool_example(self) -> Example:
        """A conversation with tools offered, in which one may or may not be called."""
        tools = self.tools.offer(self.rng.choice([1, 1, 2, 2, 3, 4]))
        style = self.rng.randrange(3)
        offered = [self.tools.signature(tool, style) for tool in tools]
        messages = self.system(0.2)
        if self.chance(0.25):
            turn = self.turn()
            while turn.kind == "sum" and any(tool["description"] in CALCULATORS for tool in tools):
                turn = self.turn()
            return Example("tool_plain", messages + spoken(turn.user, turn.answer), offered, cut=turn.kind == "help")
        kind = "tool_result" if self.chance(0.3) else "tool"
        messages += self.tools.exchange(self.rng.choice(tools), kind == "tool_result")
        return Example(kind, messages, offered)

    def dialogue_example(self, n_turns: int) -> Example:
        """Several exchanges, some with tools."""
        messages = self.system(0.15)
        tools = self.tools.offer(self.rng.choice([1, 2, 3])) if self.chance(0.2) else []
        offered = [self.tools.signature(tool, self.rng.randrange(3)) for tool in tools]
        calculators = any(tool["description"] in CALCULATORS for tool in tools)
        for _ in range(n_turns):
            if tools and self.chance(0.45):
                messages += self.tools.exchange(self.rng.choice(tools), True)
                continue
            turn = self.turn()
            if turn.kind != "sum" or not calculators:
                messages += spoken(turn.user, turn.answer)
        if not messages or messages[-1]["role"] != "assistant":
            return self.dialogue_example(2)
        return Example("dialogue", messages, offered)

    def example(self) -> Example:
        """The next example of the stream."""
        if self.copying and self.chance(self.copying):
            turn = self.exercises.echo_turn(LONG_ECHO_LENGTHS)
            return Example("echo", spoken(turn.user, turn.answer))
        if self.drilling and self.chance(self.drilling):
            turns = [self.exercises.sum_turn() for _ in range(self.rng.randint(3, 7))]
            return Example("sum", [message for turn in turns for message in spoken(turn.user, turn.answer)])
        pick = self.rng.random()
        if pick < 0.79:
            return self.single_example()
        if pick < 0.85:
            return self.think_example()
        if pick < 0.87:
            return self.no_think_example()
        if pick < 0.945:
            return self.tool_example()
        if pick < 0.99:
            return self.dialogue_example(self.rng.randint(2, 4))
        return self.dialogue_example(self.rng.randint(5, 14))


def spoken(user: str, answer: str) -> list[Message]:
    """The two messages of an exchange."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def main() -> None:
    """Print examples as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    corpus = Corpus(args.seed)
    for _ in range(args.count):
        example = corpus.example()
        line = {"kind": example.kind, "messages": example.messages, "tools": example.tools}
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
