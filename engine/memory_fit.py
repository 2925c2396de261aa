"""Does a model fit into memory? An estimate from its header, before anything is read.

What is counted is what becomes resident once every slot was full, which is what a machine must have. llama.cpp reserves
more address space than that, above all logits for each token of a batch, of which only those drawn from are touched.

weights: the file's tensors, as a mapped page counts once it was read, the copy of those that are repacked for this CPU,
and the vocabulary's tables. KV cache: `2 bytes
× (key_length + value_length)` for each KV head of each layer that has any (f16), for every token of every slot; layers
with a sliding window keep every cell (`swa_full`). Compute: the mask of each kind of attention, a batch's activations,
logits of one token a slot, what any context takes; without flash attention also the scores of a batch against a whole
context, and half as much again for their product with the values. Constants and errors: `docs/performance.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from engine.embedding_limits import PACK_TOKENS, causal_step_tokens
from engine.model_info import ModelInfo
from infsvc.errors import MemoryFitError

_CONTEXT_PADDING = 256
_FIXED_BYTES = 8 * 2**20
_VOCABULARY_BYTES = 150
"""A token's text and its places in the vocabulary's tables."""


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


def estimate(
    info: ModelInfo, *, n_ctx: int, n_slots: int, n_batch: int, flash_attention: bool = True, repacks: bool = True
) -> MemoryEstimate:
    """What `info` with `n_slots` sequences of `n_ctx` tokens takes once all were full; the last two are the probe's
    answer (`engine.probe`), and what most CPUs give where it was not asked yet."""
    # The engine gives no sequence more than the model was trained on.
    wanted = min(n_ctx or info.n_ctx_train, info.n_ctx_train or n_ctx)
    per_sequence = -(-wanted // _CONTEXT_PADDING) * _CONTEXT_PADDING
    n_cells = n_batch * per_sequence
    masks = n_cells * (2 if flash_attention else 4) * (2 if info.has_window else 1)
    scores = 0 if flash_attention else n_cells * info.n_head * 6
    activations = n_batch * (3 * info.n_ff + 4 * info.n_embd) * 4
    logits = 2 * n_slots * info.n_vocab * 4
    return MemoryEstimate(
        weight_bytes=info.weight_bytes + info.repacked_bytes * repacks + _VOCABULARY_BYTES * info.n_vocab,
        kv_bytes=_kv_token_bytes(info) * per_sequence * n_slots,
        compute_bytes=masks + scores + activations + logits + _FIXED_BYTES,
    )


def _kv_token_bytes(info: ModelInfo) -> int:
    """Bytes of one token in all layers."""
    return 2 * (info.key_length + info.value_length) * info.n_head_kv_all


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
    return MemoryEstimate(
        weight_bytes=info.weight_bytes if weights else 0,
        kv_bytes=_kv_token_bytes(info) * -(-n_pack // _CONTEXT_PADDING) * _CONTEXT_PADDING if info.causal else 0,
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
