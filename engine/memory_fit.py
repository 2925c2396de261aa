"""Does a model fit into memory? An estimate from its header, before anything is read.

weights: the file's own bytes. KV cache: `2 bytes × (key_length + value_length) × n_head_kv × n_layer` a token (f16),
for every token of every slot. Compute: llama.cpp's graph for a batch, dominated by the logits (`n_batch × n_vocab × 4`)
and a few activations a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from engine.embedding_limits import PACK_TOKENS, causal_step_tokens
from engine.model_info import ModelInfo
from infsvc.errors import MemoryFitError

_CONTEXT_PADDING = 256


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    weight_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.compute_bytes

    def __str__(self) -> str:
        weights, kv, compute = (n / 2**30 for n in (self.weight_bytes, self.kv_bytes, self.compute_bytes))
        return f"weights {weights:.1f} + KV {kv:.1f} + compute {compute:.1f}"


def estimate(info: ModelInfo, *, n_ctx: int, n_slots: int, n_batch: int) -> MemoryEstimate:
    """What loading `info` with `n_slots` sequences of `n_ctx` tokens will take."""
    # The engine gives no sequence more than the model was trained on.
    wanted = min(n_ctx or info.n_ctx_train, info.n_ctx_train or n_ctx)
    per_sequence = -(-wanted // _CONTEXT_PADDING) * _CONTEXT_PADDING
    per_token = 2 * (info.key_length + info.value_length) * info.n_head_kv * info.n_layer
    return MemoryEstimate(
        weight_bytes=info.weight_bytes,
        kv_bytes=per_token * per_sequence * n_slots,
        compute_bytes=n_batch * (info.n_vocab + 16 * info.n_embd) * 4 + 16 * 2**20,
    )


def estimate_embedding(info: ModelInfo, *, n_ctx: int, weights: bool) -> MemoryEstimate:
    """What embedding texts of up to `n_ctx` tokens will take, after the longest one was seen.

    Compute holds the output buffer and the graph of one step: where attention looks both ways, a step is a whole text,
    or a pack of them, and the output buffer has `n_vocab + n_embd` floats for each of its tokens, although nobody reads
    the logits. Where it looks back only, steps are small, there is a KV cache for one pack, and the graph computes
    logits too.

    Args:
        weights: whether the weights are counted in; a model that also generates has them already.
    """
    longest = min(n_ctx or info.n_ctx_train, info.n_ctx_train or n_ctx)
    n_pack = max(PACK_TOKENS, longest)
    n_step = min(n_pack, causal_step_tokens(info.n_vocab)) if info.causal else n_pack
    outputs = n_step * (info.n_vocab + info.n_embd) * 4
    graph = n_step * 20 * info.n_embd * 4 + (n_step * info.n_vocab * 4 if info.causal else 0)
    per_token = 2 * (info.key_length + info.value_length) * info.n_head_kv * info.n_layer
    return MemoryEstimate(
        weight_bytes=info.weight_bytes if weights else 0,
        kv_bytes=per_token * -(-n_pack // _CONTEXT_PADDING) * _CONTEXT_PADDING if info.causal else 0,
        compute_bytes=outputs + graph + 4 * 2**20,
    )


def check(need: MemoryEstimate, *, limit_bytes: int | None, used_bytes: int, pending_bytes: int = 0) -> int:
    """Raises `MemoryFitError` when `need` is more than what is free; returns the bytes that are left over.

    Args:
        limit_bytes: INFSVC_MEMORY_LIMIT for all models of the node, or None.
        used_bytes: what the node's loaded models were estimated at.
        pending_bytes: the part of it that is still being loaded, and so not yet missing from what the system has free.
    """
    free = int(psutil.virtual_memory().available) - pending_bytes
    if limit_bytes is not None:
        free = min(free, limit_bytes - used_bytes)
    if need.total_bytes > free:
        raise MemoryFitError(needed_bytes=need.total_bytes, free_bytes=max(0, free), parts=str(need))
    return free - need.total_bytes


def prefix_cache_bytes(wanted_mb: int, left_bytes: int) -> int:
    """The budget of a model's store of states: what is asked for, at most a quarter of what its load leaves free."""
    return min(wanted_mb * 2**20, left_bytes // 4)
