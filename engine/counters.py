"""What an engine did since it was loaded. Apart from the engine, so that it can be shown before llama.cpp is
imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineCounters:
    """What the engine did since it was loaded. Written by its thread, what is on disk by that of its folder of states;
    read by anyone.

    Attributes:
        n_cached_tokens: prompt tokens that did not have to be read, because an earlier reading was still there.
        n_prefix_hits: prompts that began with such tokens.
        n_prefix_refused: prompts whose beginning was known, and could not all be taken over for `prefix_reuse`'s sake.
        n_states_saved, n_states_restored: of the store of states.
        store_bytes: what the store holds now.
        n_states_written, n_states_read, n_states_damaged: files of states, those damaged were removed.
        disk_bytes: what the folder of states holds now.
        n_drafted, n_accepted: tokens that were guessed ahead and checked, and those of them that held.
        speculation: whether tokens are guessed ahead, and why not.
        prefix_reuse: what of an earlier reading this model can go on from.
    """

    n_steps: int = 0
    n_decode_tokens: int = 0
    n_prefill_tokens: int = 0
    n_batch_sequences: int = 0
    max_batch_sequences: int = 0
    n_finished: int = 0
    n_cancelled: int = 0
    n_cached_tokens: int = 0
    n_prefix_hits: int = 0
    n_prefix_refused: int = 0
    n_states_saved: int = 0
    n_states_restored: int = 0
    store_bytes: int = 0
    n_states_written: int = 0
    n_states_read: int = 0
    n_states_damaged: int = 0
    disk_bytes: int = 0
    prefix_reuse: str = "off"
    n_drafted: int = 0
    n_accepted: int = 0
    speculation: str = "off"

    @property
    def mean_batch_sequences(self) -> float:
        """Sequences that drew a token in one decode, on average."""
        return self.n_batch_sequences / self.n_steps if self.n_steps else 0.0
