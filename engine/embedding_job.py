"""The texts of one request for embeddings on their way through the embedder, the events that tell the loop of them, and
who is read next.

A job is made by the loop, then belongs to the embedder's thread; only `cancelled` may be set from elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_arrivals = itertools.count()


@dataclass(eq=False, slots=True)
class EmbeddingJob:
    """Texts as token ids: at least one, each of 1 to the embedder's `n_ctx` tokens.

    Attributes:
        listener: called on the loop's thread with each event of this job.
        priority: a higher one is read earlier.
        vectors: (n_texts, n_embd), each of norm 1, or the scores of a reranker; whole when the job has ended as "done".
        n_taken: how many texts have been read, or are being read.
        n_done: how many have their vector.
        last_pack: the number of the last pack that held one of its texts.
    """

    texts: list[list[int]]
    listener: Callable[[EmbeddingEvent], None]
    priority: int = 0

    cancelled: bool = False
    vectors: npt.NDArray[np.float32] | None = None
    n_taken: int = 0
    n_done: int = 0
    last_pack: int = -1
    arrival: int = field(default_factory=lambda: next(_arrivals))

    @property
    def order(self) -> tuple[int, int, int]:
        """By priority; among equals whoever has waited longest for a text to be read."""
        return (-self.priority, self.last_pack, self.arrival)


@dataclass(frozen=True, slots=True)
class EmbeddingEvent:
    """What an embedder tells of a job: that its first text is being read, or how it ended, which is the last event.
    `at_s` is `time.perf_counter()`; `error` says why for "error"; `lost` says that the embedder's process is gone."""

    job: EmbeddingJob
    at_s: float
    kind: Literal["started", "done", "cancelled", "error"]
    error: str | None = None
    lost: bool = False


def take_pack(
    jobs: Sequence[EmbeddingJob], *, number: int, n_tokens: int, n_texts: int
) -> list[tuple[EmbeddingJob, int]]:
    """Takes the texts to read together, as pairs of job and index: a text of each job in turn, so that a long list does
    not hold up a short one.

    Args:
        number: of this pack; each is greater than the one before.
        n_tokens: in all texts of a pack; a single longer text is a pack of its own.
    """
    pack: list[tuple[EmbeddingJob, int]] = []
    n_used = 0
    order = sorted(jobs, key=lambda job: job.order)
    taking = True
    while taking:
        taking = False
        for job in order:
            if job.n_taken == len(job.texts) or len(pack) == n_texts:
                continue
            n = len(job.texts[job.n_taken])
            if pack and n_used + n > n_tokens:
                continue
            pack.append((job, job.n_taken))
            job.n_taken += 1
            job.last_pack = number
            n_used += n
            taking = True
    return pack
