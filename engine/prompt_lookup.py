"""What a sequence's own text says comes next: where its last tokens stood before, what followed them there.

Extracts, rewrites, code and JSON repeat their prompt; then a guess costs nothing but its check. Pure, and some two
microseconds a token: it keeps guessing whether anybody checks or not, and so knows at any time how often its guesses
would have held.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

_MAX_PLACES = 2**17
"""Places in a table at most. Where two spans meet in one, the later is kept."""

# Odd, below 2**40: with ids below 2**20 the sums stay within 64 bits, so that numpy's and Python's agree.
_FACTORS = (0x9E3779B97F, 0xC2B2AE3D27, 0x165667B19F)
_SHIFT = 12

_DECAY = 0.95
_PRIOR_HELD, _PRIOR = 0.3, 0.9


class PromptLookup:
    """One sequence's tokens and where its spans stood last. One thread.

    The last three tokens are looked for, then the last two; pairs that repeat by chance are common, and `hold` tells.
    Memory is bounded: the tokens, and two tables of at most 2¹⁷ places of 4 bytes.

    Attributes:
        hold: how likely the next guess holds, from those of the last tokens: about the last twenty, the newest most; 0
            where there is none.
    """

    def __init__(self, prompt: npt.NDArray[np.int32], *, n_max: int) -> None:
        """Reads the prompt; some 2 ms for 100,000 tokens.

        Args:
            n_max: how many tokens the sequence can have, which sizes the tables.
        """
        self._tokens: list[int] = prompt.tolist()
        n_places = min(_MAX_PLACES, 1 << max(8, (2 * n_max - 1).bit_length()))
        self._mask = n_places - 1
        # Arrays, because numpy takes thrice as long for one value; all places of a prompt are written by numpy.
        self._triples = array("i", [-1]) * n_places
        self._pairs = array("i", [-1]) * n_places
        wide = prompt.astype(np.int64)
        for span, table in ((3, self._triples), (2, self._pairs)):
            n = len(wide) - span
            if n > 0:
                sums = sum(wide[at : at + n] * _FACTORS[at - span] for at in range(span))
                # Of equal places the last one stays.
                np.frombuffer(table, dtype=np.int32)[(sums >> _SHIFT) & self._mask] = np.arange(
                    span, span + n, dtype=np.int32
                )
        self._triple = self._pair = -1
        self._turn()
        self._held, self._n = 0.0, 0.0
        self._at = self._find()

    @property
    def hold(self) -> float:
        return (self._held + _PRIOR_HELD) / (self._n + _PRIOR) if self._at >= 0 else 0.0

    @property
    def guesses(self) -> bool:
        """Whether the last tokens stood somewhere before."""
        return self._at >= 0

    def append(self, token: int) -> None:
        """Takes the next token, and whether it was the one guessed. A guess that held is gone on from where it came
        from: of all places that is the one with the longest match."""
        tokens = self._tokens
        here = len(tokens)
        if self._pair >= 0:
            self._pairs[self._pair] = here
        if self._triple >= 0:
            self._triples[self._triple] = here
        tokens.append(token)
        self._turn()
        if self._at >= 0:
            held = tokens[self._at] == token
            self._held = self._held * _DECAY + held
            self._n = self._n * _DECAY + 1
            if held:
                self._at += 1
                return
        self._at = self._find()

    def guess(self, n: int) -> list[int]:
        """The next `n` tokens; none where there is no guess. Where the earlier text ends, the guess repeats itself."""
        if self._at < 0:
            return []
        found = self._tokens[self._at : self._at + n]
        period = len(found)
        while len(found) < n:
            found += found[: min(period, n - len(found))]
        return found

    def _turn(self) -> None:
        """Notes the places of the last tokens' spans; −1 while there are too few tokens."""
        tokens = self._tokens
        if len(tokens) > 2:
            total = tokens[-2] * _FACTORS[-2] + tokens[-1] * _FACTORS[-1]
            self._pair = (total >> _SHIFT) & self._mask
            self._triple = ((total + tokens[-3] * _FACTORS[-3]) >> _SHIFT) & self._mask
        elif len(tokens) == 2:
            self._pair = ((tokens[-2] * _FACTORS[-2] + tokens[-1] * _FACTORS[-1]) >> _SHIFT) & self._mask

    def _find(self) -> int:
        """The place behind the last tokens' latest earlier stand; −1 for none."""
        tokens = self._tokens
        # The tables only say where to look.
        if self._triple >= 0:
            at = self._triples[self._triple]
            if at >= 3 and tokens[at - 3 : at] == tokens[-3:]:
                return at
        if self._pair >= 0:
            at = self._pairs[self._pair]
            if at >= 2 and tokens[at - 1] == tokens[-1] and tokens[at - 2] == tokens[-2]:
                return at
        return -1
