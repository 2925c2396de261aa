"""How much text one pack of embeddings holds, and what its context costs: figures that both the native room and the
estimate of memory need, and that know neither.

llama.cpp keeps `n_vocab + n_embd` floats for every token of a step of embeddings, whether anybody reads the logits or
not, and clears them, so that they are resident.
"""

from __future__ import annotations

PACK_TOKENS = 512
"""Tokens of many short texts in one batch; measured best on CPUs. A longer text is a pack of its own."""

_STEP_BYTES = 64 * 2**20


def causal_step_tokens(n_vocab: int) -> int:
    """Tokens of one step where a text may be read in steps: as many as keep the logits, in the graph and in the output
    buffer, under 64 MiB; 16 at least."""
    return min(PACK_TOKENS, max(16, _STEP_BYTES // (2 * 4 * max(1, n_vocab))))


def n_pack_texts(*, causal: bool) -> int:
    """Texts in one pack. Each costs state where the model has a memory of what it read."""
    return 16 if causal else 64
