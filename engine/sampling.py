"""What one request asks of the sampler, and the penalties, which are ours because they touch few ids.

The order is llama.cpp's (`common_sampler_init`): penalties, top_k, top_p, min_p, temperature, draw. A temperature of 0 is an argmax.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infsvc.types import Params

# Below this a float32 softmax is an argmax, and llama.cpp's division by the temperature would overflow.
_MIN_TEMPERATURE = 1e-6
# llama.cpp reads 0xFFFFFFFF as "draw a seed".
_MAX_SEED = 2**32 - 2


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """The parameters of one sequence's sampler, settled: the seed is drawn where none was asked for."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    repeat_last_n: int

    @classmethod
    def from_params(cls, params: Params, *, n_ctx: int) -> SamplerSpec:
        """Settles what is left open: a random seed, and −1 for `repeat_last_n` as the whole context of `n_ctx` tokens."""
        return cls(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=min(secrets.randbits(32) if params.seed is None else params.seed, _MAX_SEED),
            repeat_penalty=params.repeat_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            repeat_last_n=n_ctx if params.repeat_last_n == -1 else min(params.repeat_last_n, n_ctx),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < _MIN_TEMPERATURE

    @property
    def penalises(self) -> bool:
        return self.repeat_last_n > 0 and (
            self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        )


class Penalties:
    """The last `repeat_last_n` tokens of a sequence and what they cost, as llama.cpp's penalties sampler counts them."""

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
