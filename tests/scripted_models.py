"""A tiny gpt-oss that says what a test has written for it: a real file, whose tokens a real engine draws one by one.

Attention and experts add nothing, so each token alone decides which comes next: a text as pieces, none of them twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.tiny_families import N_EMBD, TinyFile, write_tiny_gpt_oss
from tests.tiny_models import CHATML, byte_symbols

HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
HARMONY_TEMPLATE = CHATML.replace("<|im_start|>", "<|start|>") + "{# <|channel|> #}"
_SURE = 10.0
"""Times the root of the width: by so much the next token's logit is above all others."""


def write_scripted_model(
    path: Path,
    script: Sequence[str],
    *,
    after: str,
    control: Sequence[str] = HARMONY,
    chat_template: str = HARMONY_TEMPLATE,
    n_ctx: int = 4096,
) -> Path:
    """Writes the model.

    Args:
        script: the pieces in order, control tokens by their names; at most 60, each once.
        after: the token that prompts end with, one of `control` or a single letter.
    """
    chain = [after, *script]
    assert len(set(chain)) == len(chain) <= 61, "each piece once, or the model would go round in circles"
    known = set(control) | {"<|endoftext|>", "<|im_end|>", after}
    words = [_spelled(piece) for piece in script if piece not in known and len(piece) > 1]
    file = _Scripted(path, chain, n_ctx=n_ctx, words=words, control=control, chat_template=chat_template)
    return write_tiny_gpt_oss(path, file=file)


def _spelled(text: str) -> str:
    symbols = byte_symbols()
    return "".join(symbols[byte] for byte in text.encode())


class _Scripted(TinyFile):
    def __init__(
        self,
        path: Path,
        chain: Sequence[str],
        *,
        n_ctx: int,
        words: Sequence[str],
        control: Sequence[str],
        chat_template: str,
    ) -> None:
        super().__init__(
            path, "gpt-oss", n_layer=2, n_ctx=n_ctx, words=words, control=control, chat_template=chat_template
        )
        places = {token: at for at, token in enumerate(self.tokens)}
        self._chain = [places.get(piece, places.get(_spelled(piece), -1)) for piece in chain]
        assert -1 not in self._chain

    def random(self, name: str, *shape: int, scale: float | None = None) -> None:
        """Directions that are all at right angles for the script's tokens, zeros for the rest."""
        values = np.zeros(shape, dtype=np.float32)
        directions, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((N_EMBD, N_EMBD)))
        if name == "token_embd.weight":
            # Another direction for all other tokens: the norm of nothing is nothing.
            values[:] = directions[-1]
            values[self._chain] = directions[: len(self._chain)]
        elif name == "output.weight":
            values[self._chain[1:]] = directions[: len(self._chain) - 1] * _SURE
        self.writer.add_tensor(name, values)
