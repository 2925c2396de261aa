"""How likely the model held what it said: log-probabilities of the drawn token and of the likeliest ones.

They are the model's own, over its raw logits: before a bias, a penalty, a temperature or a constraint. An end token
that the request forbids counts as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_TOP = 20
"""The likeliest tokens that may be asked for, OpenAI's limit."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the bytes it stands for (control tokens spelled out), and its natural log-probability."""

    token: int
    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """One drawn token; `top` are the likeliest at its place, likeliest first, whether it is among them or not."""

    drawn: TokenLogprob
    top: tuple[TokenLogprob, ...]


def step_logprobs(
    logits: npt.NDArray[np.float32], token: int, *, n_top: int, piece: Callable[[int], bytes]
) -> StepLogprobs:
    """The log-softmax of `logits` (n_vocab,) at `token` and at the `n_top` likeliest; equals by lower id."""
    values = logits.astype(np.float64)
    peak = values.max()
    total = peak + np.log(np.exp(values - peak).sum())

    def at(each: int) -> TokenLogprob:
        return TokenLogprob(each, piece(each), float(values[each] - total))

    n_top = min(n_top, len(values))
    likeliest: list[int] = []
    if n_top:
        # The border value with all its equals, so that which of them are shown does not depend on the partition.
        border = np.partition(values, len(values) - n_top)[len(values) - n_top]
        candidates = np.flatnonzero(values >= border)
        likeliest = candidates[np.argsort(-values[candidates], kind="stable")][:n_top].tolist()
    return StepLogprobs(at(token), tuple(at(each) for each in likeliest))
