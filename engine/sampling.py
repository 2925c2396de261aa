"""What one request asks of the sampler.

The order is llama.cpp's (`common_sampler_init`): logit bias, penalties, top_k, top_p, min_p, temperature, draw. A
temperature of 0 is an argmax.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

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
    logit_bias: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_params(cls, params: Params, *, n_ctx: int) -> SamplerSpec:
        """Settles what is left open: a random seed, and −1 for `repeat_last_n` as the whole context of `n_ctx`
        tokens."""
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
            logit_bias=tuple(params.logit_bias.items()),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < _MIN_TEMPERATURE

    @property
    def penalises(self) -> bool:
        return self.repeat_last_n > 0 and (
            self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        )
