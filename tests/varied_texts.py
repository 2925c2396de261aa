"""Texts of many kinds and lengths, the same in each run: for tokenisers and embeddings."""

from __future__ import annotations

import random

_QUESTIONS = ["How do I reset my password?", "What is the capital of France?", "Why is the sky blue?"]
_ANSWERS = [
    "Open the settings, choose account security and set a new password.",
    "Paris has been the French capital for centuries.",
    "Air scatters short blue waves of sunlight more than red ones.",
]
_KINDS = [
    "Ünïcödé ñandú façade – naïve coöperation",
    "日本語のテキストと漢字",
    "Привет, как дела? Всё хорошо!",
    "Γειά σου Κόσμε",
    "emoji 😀 🎉👩‍💻 and symbols € £ ¥ © ™ → ∑ √",
    "def f(x): return x ** 2  # code; {'a': [1, 2, 3]}",
    "https://example.org/path?query=1&b=%20#frag",
    "MiXeD CaSe AND    many\t\tspaces\n\nand lines",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "3.14159, 1e-5, 2026-11-24, 12:30 p.m., $1,234.56",
    "\"quoted\" 'single' “curly” ‘marks’ … — –",
    "don't can't won't it's",
    "العربية نص قصير",
    "한국어 문장입니다",
    "x",
    "!?!?!?",
    "a\u0301 combining e\u0301, i\u0302",
    "[SEP] marks in a text [MASK]",
]
_WORDS = [
    *("river", "mountain", "engine", "queue", "letter", "of", "the", "and", "broker", "vector", "language", "model"),
    *("winter", "bread", "quickly", "between", "seven", "painting", "under", "government", "music", "electron"),
]


def varied_texts(n: int) -> list[str]:
    """`n` texts, at least 24; the first three are questions and the next three their answers. One has 510 words of one
    token each."""
    random_ = random.Random(7)
    texts = [*_QUESTIONS, *_ANSWERS, " ".join(["river"] * 510), *_KINDS]
    while len(texts) < n:
        words = random_.choices(_WORDS, k=random_.choice((2, 5, 9, 15, 24)))
        text = " ".join(words)
        texts.append(random_.choice((text, text.capitalize() + ".", text.upper(), f"{text}: {random_.choice(_KINDS)}")))
    return texts[:n]
