"""What an engine did since it was loaded. Apart from the engine, so that it can be shown before llama.cpp is
imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineCounters:
    """What the engine did since it was loaded. Written by its thread, read by anyone."""

    n_steps: int = 0
    n_decode_tokens: int = 0
    n_prefill_tokens: int = 0
    n_batch_sequences: int = 0
    max_batch_sequences: int = 0
    n_finished: int = 0
    n_cancelled: int = 0

    @property
    def mean_batch_sequences(self) -> float:
        """Sequences that drew a token in one decode, on average."""
        return self.n_batch_sequences / self.n_steps if self.n_steps else 0.0
