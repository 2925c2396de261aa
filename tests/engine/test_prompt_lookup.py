"""The guesses, alone."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from engine import prompt_lookup
from engine.prompt_lookup import PromptLookup


def lookup(prompt: list[int], *then: int, n_max: int = 512) -> PromptLookup:
    made = PromptLookup(np.array(prompt, dtype=np.int32), n_max=n_max)
    for token in then:
        made.append(token)
    return made


def by_hand(tokens: list[int]) -> int:
    """The place behind the last tokens' latest earlier stand, found the slow way."""
    for at in range(len(tokens) - 1, 2, -1):
        if tokens[at - 3 : at] == tokens[-3:]:
            return at
    return -1


def test_what_followed_the_last_tokens_is_guessed() -> None:
    assert lookup([1, 2, 3, 4, 5, 6, 9, 2, 3, 4]).guess(3) == [5, 6, 9]
    assert lookup([1, 2, 3, 4, 5, 6], 9, 2, 3, 4).guess(2) == [5, 6]
    assert lookup([1, 2, 3, 4, 5, 6]).guess(3) == []
    assert not lookup([1, 2, 3, 4, 5, 6]).streak


def test_of_equal_matches_the_later_goes_first_and_two_tokens_are_none() -> None:
    assert lookup([1, 2, 3, 50, 8, 1, 2, 3, 60, 9, 1, 2, 3]).guess(1) == [60]
    assert lookup([1, 2, 3, 50, 8, 4, 2, 3]).guess(1) == []


def test_a_guess_that_held_is_gone_on_from_its_own_place() -> None:
    """The later stand of 3 4 5 would say 99: what is being copied is the first."""
    text = [1, 2, 3, 4, 5, 6, 7, 8, 30, 3, 4, 5, 99, 1, 2]
    copying = lookup(text, 3, 4, 5)
    assert copying.guess(3) == [6, 7, 8]


def test_a_text_that_goes_round_is_guessed_beyond_its_end() -> None:
    assert lookup([5, 5, 5, 5]).guess(6) == [5] * 6
    assert lookup([9, 1, 2, 3, 1, 2, 3]).guess(8) == [1, 2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("prompt", [[], [1], [1, 2], [1, 2, 3]])
def test_short_texts_guess_nothing(prompt: list[int]) -> None:
    made = lookup(prompt)
    assert made.guess(4) == []
    for token in (1, 2, 3, 1, 2, 3):
        made.append(token)
    assert made.guess(2) == [1, 2]
    assert made.streak >= 3


@pytest.mark.parametrize("n_prompt", [0, 1, 40, 300])
def test_random_texts_are_looked_up_as_by_hand(n_prompt: int) -> None:
    """Ids up to a real vocabulary's, read at once or one by one: the same places."""
    random = Random(n_prompt)
    ids = [random.randrange(260_000) for _ in range(8)]
    text = [random.choice(ids) for _ in range(400)]
    made = lookup(text[:n_prompt], n_max=50_000)
    n_other = 0
    for at, token in enumerate(text[n_prompt:], n_prompt):
        expected = by_hand(text[:at])
        # One that goes on from where it was needs not be the latest, but is a place with the same last tokens.
        assert (made.streak > 0) == (expected >= 0)
        if made.streak:
            assert made._tokens[made._at - made.streak : made._at] == text[at - made.streak : at]
            assert made.guess(1) == [made._tokens[made._at]]
        # Two spans may meet in one place of the table.
        n_other += lookup(text[:at], n_max=50_000)._at != expected
        made.append(token)
    assert n_other <= 8


def test_hold_follows_what_comes() -> None:
    copying = lookup([*range(100), 200, 0, 1, 2])
    assert 0.2 < copying.hold < 0.4
    for token in range(3, 13):
        copying.append(token)
    assert 0.9 < copying.hold < 0.97
    for token in range(13, 90):
        copying.append(token)
    assert copying.hold > 0.98
    for start in range(10, 90, 5):
        for token in (300 + start, start, start + 1, start + 2):
            copying.append(token)
    assert copying.hold < 0.7
    copying.append(999)
    assert copying.hold == 0


def test_a_streak_is_how_far_the_text_has_come_as_guessed() -> None:
    copying = lookup([*range(100), 200, 0, 1, 2])
    assert copying.streak == 3
    for token in range(3, 13):
        copying.append(token)
    assert copying.streak == 13
    copying.append(999)
    assert copying.streak == 0
    for token in (40, 41):
        copying.append(token)
    assert copying.streak == 0
    copying.append(42)
    assert copying.streak == 3


def test_each_failure_asks_for_a_longer_streak_and_each_success_for_a_shorter_one() -> None:
    made = lookup([1, 2, 3])
    needs = [made.need]
    for _ in range(6):
        made.checked(7, 1)
        needs.append(made.need)
    assert needs == [4, 8, 16, 32, 64, 64, 64]
    made.checked(15, 10)
    assert made.need == 64
    needs = []
    for _ in range(6):
        made.checked(15, 15)
        needs.append(made.need)
    assert needs == [32, 16, 8, 4, 3, 3]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "_MAX_PLACES", 256)
    random = Random(1)
    text = [random.randrange(30) for _ in range(5000)]
    made = lookup(text, n_max=10**6)
    assert len(made._table) == 256
    for token in text[:2000]:
        if made.streak:
            assert made._tokens[made._at - 3 : made._at] == made._tokens[-3:]
        made.append(token)
