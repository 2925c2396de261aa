"""How many guessed tokens a step should check: as many as pay on this machine, for this many sequences; often none.

A step that checks k guesses a sequence costs more than one that checks none, by how much depends on the machine, on the
weights' format and on how many sequences are in the batch. So both are timed as they come, and guesses are made where
the tokens expected of a step, over its seconds, are clearly more with them. What came of it is kept in a ledger: once
guesses have lost more than a small part of the time, only those that are all but sure are checked. Pure: it knows
neither llama.cpp nor a clock.

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

SURE_STREAK = 16
"""After so many tokens as guessed in a row a sequence is checked in debt too, and kinds of steps are tried for it."""

_MARGIN = 1.08
"""How much faster a step with guesses must be expected to be."""

_UNTRIED = 0.25
"""What a further token is taken to cost, in steps without guesses, before it was tried."""

_N_TRIES = 3
"""First steps of a kind, of which the quickest counts: one has memory to get, and any may have been disturbed."""

_PATIENCE, _MAX_PATIENCE = 32, 1024
"""Steps for which guesses that are likely to hold are refused before they are tried all the same: one bad measurement
must not last, and what is never done is never measured again. Doubled by each try that did not pay."""

_NEWEST = 0.2
"""What the newest step counts for in what is known of its kind."""

_ALLOWED = 0.005
"""Of the time of steps without guesses that guesses may lose."""

_MAX_CREDIT = 3.0
"""What an earlier gain, or nothing at all yet, lets guesses lose, in steps without guesses."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a sequence may gain.

    Attributes:
        hold: how likely a guess holds; 0 where there is none.
        n_useful: tokens that it can still draw, after the one that it draws in any case.
        streak: tokens in a row that came as guessed.
    """

    hold: float
    n_useful: int
    streak: int = SURE_STREAK

    def gain(self, n: int) -> float:
        """Tokens drawn beyond the first where `n` are guessed: each holds only where all before it did."""
        n = min(n, self.n_useful)
        if self.hold <= 0 or n <= 0:
            return 0.0
        return n if self.hold >= 1 else self.hold * (1 - self.hold**n) / (1 - self.hold)


class Speculation:
    """What steps cost here, which is worth it, and what guesses have won or lost. Engine thread only.

    Attributes:
        balance_s: seconds that guesses have won (over 0, at most `_MAX_CREDIT` steps) or lost.
    """

    def __init__(self) -> None:
        self.balance_s = 0.0
        self._plain_s: dict[int, float] = {}
        # In plain steps of that moment: what slows the machine down slows both, and a longer context likewise.
        self._prices: dict[tuple[int, int], float] = {}
        self._n_tries: dict[tuple[int, int], int] = {}
        self._change_s = 0.0
        self._last = (0, 0)
        self._n_refused, self._patience = 0, _PATIENCE
        self._hurdles: dict[tuple[int, bool], float] = {}

    @property
    def least_streak(self) -> int:
        """What a streak must be at least for a sequence to be checked at all: in debt only those that are sure."""
        return 0 if self.balance_s >= 0 else SURE_STREAK

    def may_pay(self, n_sequences: int, holds: float, *, sure: bool) -> bool:
        """Whether `choose` may find something: a bound, and much cheaper.

        Args:
            holds: the sum of what is likely, over all sequences that may be checked.
            sure: whether all of these sequences are.
        """
        hurdle = self._hurdles.get((n_sequences, sure))
        if hurdle is None:
            # Nobody gains more than `hold` for each guess.
            hurdle = self._hurdles[n_sequences, sure] = min(
                n_sequences * (_MARGIN * self.price(n_sequences, n, sure=sure) - 1) / n
                for n in N_GUESSES
                if n_sequences * (n + 1) <= MAX_ROWS
            )
        return holds >= hurdle or (2 * holds > n_sequences and self._tires())

    def _tires(self) -> bool:
        """Notes that what is likely to hold was refused; says whether it is to be tried all the same."""
        self._n_refused += 1
        return self._n_refused >= self._patience

    def took(self, n_sequences: int, n_guesses: int, n_drawn: int, seconds: float) -> None:
        """Notes a step of nothing but decoding sequences, which drew `n_drawn` tokens."""
        key = n_sequences, n_guesses
        before, self._last = self._last, key
        changed = key != before
        n_tries = self._n_tries[key] = self._n_tries.get(key, 0) + 1
        plain = self._plain_s.get(n_sequences)
        if not n_guesses:
            if plain is None:
                plain = seconds
                self.balance_s = max(self.balance_s, _MAX_CREDIT * seconds)
            elif changed:
                # llama.cpp builds its graph anew, which is the change's price and not the step's.
                self._change_s += _NEWEST * (min(max(0.0, seconds - plain), plain) - self._change_s)
            else:
                plain = min(plain, seconds) if n_tries <= _N_TRIES else settled(plain, seconds)
            if changed:
                self._hurdles.clear()
            self._plain_s[n_sequences] = plain
            won = _ALLOWED * plain
        elif plain is None:
            return
        else:
            self._hurdles.clear()
            price = (max(seconds - self._change_s, seconds / 2) if changed else seconds) / plain
            known = self._prices.get(key, price)
            price = self._prices[key] = min(known, price) if n_tries <= _N_TRIES else settled(known, price)
            # At known prices: those of this moment may be a neighbour's doing.
            won = (n_drawn / n_sequences - price) * plain
            if won > 0:
                self._patience = _PATIENCE
        if changed and (n_guesses or before[1]):
            won -= self._change_s
        self.balance_s = min(self.balance_s + won, _MAX_CREDIT * plain)

    def price(self, n_sequences: int, n_guesses: int, *, sure: bool = False) -> float:
        """What a step with guesses costs in steps without, as seen or, where it was not tried, supposed.

        Args:
            sure: whether all guesses hold in all likelihood: then a kind that was not tried costs little to try.
        """
        key = n_sequences, n_guesses
        known = self._prices.get(key)
        if known is not None and self._n_tries[key] >= _N_TRIES:
            return known
        supposed = 1 + _UNTRIED * n_guesses
        # In a line with the nearest that was tried, unless a try is cheap: kernels work in tiles, and 16 rows may cost
        # what 8 do.
        tried = [n for n in N_GUESSES if n != n_guesses and (n_sequences, n) in self._prices]
        if tried and not sure:
            nearest = min(tried, key=lambda n: abs(n - n_guesses))
            supposed = 1 + max(0.0, self._prices[n_sequences, nearest] - 1) * n_guesses / nearest
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
        plain = self._plain_s.get(n_sequences)
        if plain is None:
            return 0
        sure = all(each.streak >= SURE_STREAK for each in outlooks)
        hopeful = [each for each in outlooks if each.streak >= self.least_streak]
        # There and back: whoever begins to guess will end.
        change = self._change_s / plain * (1 if self._last[1] else 2)
        best, best_rate = 0, n_sequences * _MARGIN
        refused, refused_gain = 0, 0.0
        for n in N_GUESSES:
            if n > n_max or n_sequences * (n + 1) > MAX_ROWS:
                break
            gain = sum(each.gain(n) for each in hopeful)
            price = self.price(n_sequences, n, sure=sure)
            if (n_sequences, n) != self._last:
                price += change
            if (n_sequences + gain) / price > best_rate:
                best, best_rate = n, (n_sequences + gain) / price
            elif gain > refused_gain:
                refused, refused_gain = n, gain
        if not best and refused_gain > refused * n_sequences / 2 and self._tires():
            self._n_refused, self._patience = 0, min(_MAX_PATIENCE, 2 * self._patience)
            return refused
        return best


def settled(known: float, seen: float) -> float:
    """A price after one more was seen. A neighbour that takes the machine for a moment must not count for much."""
    return known + _NEWEST * (min(max(seen, known / 2), 2 * known) - known)
