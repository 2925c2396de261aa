"""The penalties on tokens that were used already; ours because they touch few ids and llama.cpp's walk over the whole
vocabulary."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import numpy.typing as npt

from engine.sampling import SamplerSpec


class Penalties:
    """The last `repeat_last_n` tokens of a sequence and what they cost, as llama.cpp's penalties sampler counts
    them."""

    def __init__(self, spec: SamplerSpec) -> None:
        self._spec = spec
        self._window: deque[int] = deque()
        self._counts: Counter[int] = Counter()

    def accept(self, token: int) -> None:
        """Notes a token, of the prompt or drawn."""
        self._window.append(token)
        self._counts[token] += 1
        if len(self._window) > self._spec.repeat_last_n:
            old = self._window.popleft()
            if self._counts[old] == 1:
                del self._counts[old]
            else:
                self._counts[old] -= 1

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Changes `logits` (n_vocab,) in place: at most `repeat_last_n` distinct ids are touched."""
        if not self._counts:
            return
        ids = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
        spec = self._spec
        values: npt.NDArray[np.float32] = logits[ids]
        values = np.where(values <= 0, values * spec.repeat_penalty, values / spec.repeat_penalty)
        logits[ids] = values - (counts * spec.frequency_penalty + spec.presence_penalty)
