"""Rewords questions: synonyms, dropped words, politeness, misspellings, case and punctuation."""

from __future__ import annotations

import random
import re
import string
from typing import Any

PUNCTUATION = ".,;:!?()\"'`"


def word_list(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation at their ends."""
    return [word for raw in text.lower().split() if (word := raw.strip(PUNCTUATION))]


class Wording:
    """Random rewording; all draws come from the generator it is given."""

    def __init__(self, rng: random.Random, data: dict[str, Any]) -> None:
        self.rng = rng
        self.prefixes: list[str] = data["prefixes"]
        self.suffixes: list[str] = data["suffixes"]
        self.stop_words = set(data["stop_words"])
        self.synonyms: dict[str, list[list[str]]] = {}
        for group in data["synonyms"]:
            for phrase in group:
                self.synonyms.setdefault(phrase.lower(), []).append(group)
        phrases = sorted(map(re.escape, self.synonyms), key=len, reverse=True)
        self.pattern = re.compile(r"\b(" + "|".join(phrases) + r")\b", re.IGNORECASE)

    def chance(self, share: float) -> bool:
        """True in `share` of the calls."""
        return self.rng.random() < share

    def replace_synonyms(self, text: str, share: float) -> str:
        """Replace words and phrases by members of their synonym groups."""

        def swap(match: re.Match[str]) -> str:
            if not self.chance(share):
                return match.group(0)
            new = self.rng.choice(self.rng.choice(self.synonyms[match.group(0).lower()]))
            return new[0].upper() + new[1:] if match.group(0)[0].isupper() else new

        return self.pattern.sub(swap, text)

    def drop_words(self, text: str, stop_share: float, content_share: float) -> str:
        """Leave words out, stop words more often than others; at least one word stays."""

        def share(word: str) -> float:
            return stop_share if word.lower().strip(".,?!") in self.stop_words else content_share

        kept = [word for word in text.split() if not self.chance(share(word))]
        return " ".join(kept) if kept else text

    def typo(self, text: str) -> str:
        """Misspell one longer word: swap, lose, double or replace a letter inside it."""
        words = text.split(" ")
        places = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
        if not places:
            return text
        i = self.rng.choice(places)
        word = words[i]
        at = self.rng.randrange(1, len(word) - 1)
        kind = self.rng.randrange(4)
        if kind == 0:
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif kind == 1:
            word = word[:at] + word[at + 1 :]
        elif kind == 2:
            word = word[:at] + word[at] + word[at:]
        else:
            word = word[:at] + self.rng.choice(string.ascii_lowercase) + word[at + 1 :]
        words[i] = word
        return " ".join(words)

    def surface(self, text: str) -> str:
        """Vary case and the punctuation at the end."""
        if self.chance(0.35):
            text = text.lower()
        elif self.chance(0.3):
            text = text[0].upper() + text[1:]
        elif self.chance(0.03):
            text = text.upper()
        if self.chance(0.35):
            text = text.rstrip(".?!")
        elif text[-1] not in ".?!" and self.chance(0.25):
            text += self.rng.choice("??.")
        return text

    def reword(self, text: str, share: float = 0.85) -> str:
        """A different wording of a question that should get the same answer; unchanged in 1 - `share` of the calls."""
        if not self.chance(share):
            return text
        if self.chance(0.5):
            text = self.replace_synonyms(text, 0.35)
        if self.chance(0.4):
            text = self.drop_words(text, 0.35, 0.08)
        if self.chance(0.25):
            prefix = self.rng.choice(self.prefixes)
            text = prefix + (text[0].lower() + text[1:] if not text[:2].isupper() and self.chance(0.8) else text)
        if self.chance(0.2):
            tail = text[-1] if text[-1] in ".?!" else ""
            text = text.rstrip(".?!") + self.rng.choice(self.suffixes)
            text += tail if text[-1].isalpha() and self.chance(0.5) else ""
        if self.chance(0.12):
            text = self.typo(text)
        return self.surface(text)
