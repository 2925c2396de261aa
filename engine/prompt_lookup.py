"""What a sequence's own text says comes next: where its last tokens stood before, what followed them there.

Extracts, rewrites, code and JSON repeat their prompt; then a guess costs nothing but its check. Pure, and some half a
microsecond a token: it keeps guessing whether anybody checks or not, and so knows at any time how often its guesses
would have held, and for how many tokens in a row they have.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

_MAX_PLACES = 2**17
"""Places in the table at most. Where two spans meet in one, the later is kept."""

# Odd, below 2**40: with ids below 2**20 the sums stay within 64 bits, so that numpy's and Python's agree.
_FIRST, _SECOND, _THIRD = 0x9E3779B97F, 0xC2B2AE3D27, 0x165667B19F
_SHIFT = 12
_SPAN = 3

_DECAY = 0.95
_PRIOR_HELD, _PRIOR = 0.3, 0.9

_LONG = 16

_FIRST_NEED, _LEAST_NEED, _MOST_NEED = 4, 3, 64


class PromptLookup:
    """One sequence's tokens and where its spans of three stood last. One thread.

    Memory is bounded: the tokens, and a table of at most 2¹⁷ places of 4 bytes.

    Attributes:
        streak: tokens in a row that came as they stand before the place that is guessed from, those by which it was
            found counted in; 0 where there is no guess.
        need: the streak from which guesses should be checked. One token beyond the span at first, and twice as long
            after each check that failed, because texts repeat themselves by chance in some way of their own.
    """

    def __init__(self, prompt: npt.NDArray[np.int32], *, n_max: int) -> None:
        """Reads the prompt; some 2 ms for 100,000 tokens.

        Args:
            n_max: how many tokens the sequence can have, which sizes the table.
        """
        self.need = _FIRST_NEED
        self._tokens: list[int] = prompt.tolist()
        n_places = min(_MAX_PLACES, 1 << max(8, (2 * n_max - 1).bit_length()))
        self._mask = n_places - 1
        # An array, because numpy takes thrice as long for one value; all places of a prompt are written by numpy.
        self._table = array("i", [-1]) * n_places
        n = len(prompt) - _SPAN
        if n > 0:
            wide = prompt.astype(np.int64)
            sums = wide[:n] * _FIRST + wide[1 : n + 1] * _SECOND + wide[2 : n + 2] * _THIRD
            # Of equal places the last one stays.
            np.frombuffer(self._table, dtype=np.int32)[(sums >> _SHIFT) & self._mask] = np.arange(
                _SPAN, _SPAN + n, dtype=np.int32
            )
        tokens = self._tokens
        self._first = tokens[-2] if len(tokens) > 1 else -1
        self._second = tokens[-1] if tokens else -1
        self._place = -1
        self._held, self._n = 0.0, 0.0
        self._at, self.streak = -1, 0
        if n >= 0:
            total = tokens[-3] * _FIRST + tokens[-2] * _SECOND + tokens[-1] * _THIRD
            self._place = (total >> _SHIFT) & self._mask
            self._find()

    @property
    def hold(self) -> float:
        """How likely the next guess holds, from those of the last tokens: about the last twenty, the newest most, or
        all of a long streak; 0 where there is none."""
        if self._at < 0:
            return 0.0
        lately = (self._held + _PRIOR_HELD) / (self._n + _PRIOR)
        return lately if self.streak < _LONG else max(lately, 1 - 1 / self.streak)

    def append(self, token: int) -> None:
        """Takes the next token, and whether it was the one guessed. A guess that held is gone on from where it came
        from: of all places that is the one with the longest match."""
        tokens = self._tokens
        if self._place >= 0:
            self._table[self._place] = len(tokens)
        tokens.append(token)
        # Before the third token there is no span; −1 stands for what is not there.
        first, self._first, self._second = self._first, self._second, token
        if first < 0:
            return
        self._place = ((first * _FIRST + self._first * _SECOND + token * _THIRD) >> _SHIFT) & self._mask
        at = self._at
        if at >= 0:
            if tokens[at] == token:
                self._held = self._held * _DECAY + 1
                self._n = self._n * _DECAY + 1
                self._at = at + 1
                self.streak += 1
                return
            self._held *= _DECAY
            self._n = self._n * _DECAY + 1
            self._at, self.streak = -1, 0
        at = self._table[self._place]
        if at >= 0 and tokens[at - 1] == token:
            self._find()

    def guess(self, n: int) -> list[int]:
        """The next `n` tokens; none where there is no guess. Where the earlier text ends, the guess repeats itself."""
        if self._at < 0:
            return []
        found = self._tokens[self._at : self._at + n]
        period = len(found)
        while len(found) < n:
            found += found[: min(period, n - len(found))]
        return found

    def checked(self, n: int, n_held: int) -> None:
        """Notes that of `n` guesses that were checked `n_held` held."""
        if n_held == n:
            self.need = max(_LEAST_NEED, self.need // 2)
        elif 2 * n_held < n:
            self.need = min(_MOST_NEED, 2 * self.need)

    def _find(self) -> None:
        """The place behind the last tokens' latest earlier stand. The table only says where to look."""
        tokens = self._tokens
        at = self._table[self._place]
        if at >= _SPAN and tokens[at - _SPAN : at] == tokens[-_SPAN:]:
            self._at, self.streak = at, _SPAN
