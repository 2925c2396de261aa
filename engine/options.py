"""How to run a model: what an engine and an embedder are made with. Apart from both, so that a process that only hands
it on need not import llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to run a model.

    Attributes:
        n_ctx: tokens of one sequence; 0 for what the model was trained on.
        n_slots: sequences in one batch.
        n_threads: of llama.cpp; 0 for one a core.
        n_gpu_layers: −1 for all that a GPU build can take.
        use_extra_bufts: whether weights may be repacked for this CPU (see `engine.probe`).
        flash_attention: whether it suits this CPU (likewise); on a GPU it always does.
        share_prefixes: whether a prompt may go on from what was read before.
        prefix_cache_bytes: of the store of states that no slot holds any more; 0 for what the slots hold alone.
        state_folder: where states go that leave the store, and all of them at the end; None for nowhere.
        state_folder_bytes: what they may take there.
        swa_full: whether layers with a sliding window keep every cell: more memory (`memory_fit` counts it), and any
            place to branch off at.
        draft_max: tokens of each sequence that may be guessed ahead in a step, where it pays; 0 for none.
    """

    path: Path
    n_ctx: int
    n_slots: int
    n_threads: int = 0
    n_gpu_layers: int = -1
    use_extra_bufts: bool = True
    flash_attention: bool = False
    share_prefixes: bool = True
    prefix_cache_bytes: int = 2**28
    state_folder: Path | None = None
    state_folder_bytes: int = 0
    swa_full: bool = True
    draft_max: int = 0


@dataclass(frozen=True, kw_only=True)
class EmbedderOptions:
    """How to embed with a model.

    Attributes:
        n_ctx: tokens of the longest text; 0 for what the model was trained on, which is also the most.
        pooling: mean, cls or last; rank for a reranker, whose texts have scores in place of vectors.
        causal: what the header says of the attention.
        n_threads: of llama.cpp; 0 for one a core.
        n_gpu_layers: −1 for all that a GPU build can take.
        use_extra_bufts: whether weights may be repacked for this CPU (see `engine.probe`).
    """

    path: Path
    n_ctx: int
    pooling: str
    causal: bool
    n_threads: int = 0
    n_gpu_layers: int = -1
    use_extra_bufts: bool = True
