"""How many guessed tokens a step should check: as many as pay on this machine, for this many sequences; often none.

A step that checks k guesses a sequence costs more than one that checks none, by how much depends on the machine, on the
weights' format and on how many sequences are in the batch. So both are timed as they come, and guesses are made where
the tokens expected of a step, over its seconds, are clearly more with them. Pure: it knows neither llama.cpp nor a
clock.

Every sequence of a step is given equally many tokens: llama.cpp evaluates sequences of unequal length in parts, each at
the price of a whole step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

N_GUESSES = (1, 3, 7, 15)
"""What is tried: with the token that is known, steps of 2, 4, 8 and 16, which kernels like. Few kinds, because each has
llama.cpp build its graph anew."""

MAX_GUESSES = N_GUESSES[-1]

MAX_ROWS = 32
"""Tokens that a step with guesses evaluates at most. Each has a row of `n_vocab` logits, which llama.cpp keeps for
good: 19 MB for 152k."""

MIN_HOLD = 0.4
"""Where every sequence's guesses are less likely to hold, nothing is weighed: one has to have held first."""

_MARGIN = 1.08
"""How much faster a step with guesses must be expected to be."""

_UNTRIED = 0.25
"""What a further token is taken to cost, in steps without guesses, before it was tried."""

_REFUSED = 0.998
"""One bad measurement must not last: what is never done is never measured again."""

_NEWEST = 0.25


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a sequence may gain.

    Attributes:
        hold: how likely a guess holds; 0 where there is none.
        n_useful: tokens that it can still draw, after the one that it draws in any case.
    """

    hold: float
    n_useful: int

    def gain(self, n: int) -> float:
        """Tokens drawn beyond the first where `n` are guessed: each holds only where all before it did."""
        n = min(n, self.n_useful)
        if self.hold <= 0 or n <= 0:
            return 0.0
        return n if self.hold >= 1 else self.hold * (1 - self.hold**n) / (1 - self.hold)


class Speculation:
    """What steps cost here, and which is worth it. Engine thread only."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._fresh: set[tuple[int, int]] = set()

    def took(self, n_sequences: int, n_guesses: int, seconds: float) -> None:
        """Notes a step of nothing but decoding sequences."""
        key = n_sequences, n_guesses
        known = self._seconds.get(key)
        if known is None:
            self._seconds[key] = seconds
            self._fresh.add(key)
        elif key in self._fresh:
            # The first of a kind has memory to get and a graph to build.
            self._fresh.discard(key)
            self._seconds[key] = min(known, seconds)
        else:
            # A neighbour that takes the machine for a moment must not count for much.
            self._seconds[key] = known + _NEWEST * (min(seconds, 2 * known) - known)

    def cost(self, n_sequences: int, n_guesses: int) -> float | None:
        """A step's seconds as seen or, where it was not tried, supposed; None while nothing is known."""
        key = n_sequences, n_guesses
        known = self._seconds.get(key)
        plain = self._seconds.get((n_sequences, 0))
        if plain is None or not n_guesses or (known is not None and key not in self._fresh):
            return known
        # In a line with the nearest that was tried.
        tried = [n for n in N_GUESSES if n != n_guesses and (n_sequences, n) in self._seconds]
        if tried:
            nearest = min(tried, key=lambda n: abs(n - n_guesses))
            supposed = plain + max(0.0, self._seconds[n_sequences, nearest] - plain) * n_guesses / nearest
        else:
            supposed = plain * (1 + _UNTRIED * n_guesses)
        # Once is not enough to give up: the first of a kind is the slowest.
        return supposed if known is None else min(known, supposed)

    def choose(self, outlooks: Iterable[Outlook], *, n_max: int) -> int:
        """How many tokens each sequence of the next step guesses; 0 for none.

        Args:
            outlooks: one for each sequence that decodes.
            n_max: what all of them have room for, and have asked for.
        """
        outlooks = list(outlooks)
        n_sequences = len(outlooks)
        plain = self.cost(n_sequences, 0)
        if plain is None:
            return 0
        best, best_rate = 0, n_sequences / plain * _MARGIN
        refused, refused_gain = 0, 0.0
        for n in N_GUESSES:
            if n > n_max or n_sequences * (n + 1) > MAX_ROWS:
                break
            gain = sum(each.gain(n) for each in outlooks)
            seconds = self.cost(n_sequences, n)
            assert seconds is not None
            if (n_sequences + gain) / seconds > best_rate:
                best, best_rate = n, (n_sequences + gain) / seconds
            elif gain > refused_gain:
                refused, refused_gain = n, gain
        if not best and refused_gain > refused * n_sequences / 2 and (n_sequences, refused) in self._seconds:
            self._seconds[n_sequences, refused] *= _REFUSED
        return best
