"""One request's tokens and where it stands in the engine, and the events that tell the loop of it.

A sequence is made by the loop, then belongs to the engine thread; only `cancelled` may be set from elsewhere.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.output import TextAssembler
from engine.sampling import SamplerSpec

if TYPE_CHECKING:
    from engine.constraint import Matcher
    from engine.logprobs import StepLogprobs
    from engine.prefix_cache import Plan
    from engine.prompt_lookup import PromptLookup
    from engine.state_file import FiledState

_arrivals = itertools.count()


class SequenceState(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens of one request. `n_past` tokens are in the KV cache; the rest of `prompt` is still to be read.

    Attributes:
        prompt: token ids to read before the first token is drawn; at least one.
        max_tokens: how many tokens may be drawn, those that end the answer counted in.
        n_ctx: tokens of context, prompt and answer together.
        special: whether control tokens are shown as text (raw mode).
        shown: those that are shown all the same, because a parser reads them.
        listener: called on the loop's thread with each event of this sequence.
        priority: 0 to 9; a higher one is admitted earlier.
        client: whose it is; clients share the slots alike.
        n_logprobs: how many of the likeliest tokens are told with each drawn one (0-20); None tells no log-probability.
        constraint: what the answer must match; it then ends where that ends.
        draft_max: tokens that may be guessed ahead in a step; None for what the engine's options say.
        ids: the prompt as an array, for comparing.
        n_cached: tokens of the prompt that were taken over from an earlier reading.
        leader: a sequence that is reading what this one begins with; it is waited for until it has read `fork` tokens.
        filed: a file that is being fetched for it, and waited for.
        n_fetches: how often it waited for one.
        marks: positions at which a batch of this prompt must end, because the state there is kept.
        lookup: guesses what comes next, where that was asked for.
        n_drafted, n_accepted: tokens that were guessed and checked, and those of them that held.
    """

    prompt: list[int]
    sampler: SamplerSpec
    max_tokens: int
    n_ctx: int
    listener: Callable[[SequenceEvent], None]
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    special: bool = False
    shown: frozenset[int] = frozenset()
    priority: int = 0
    client: str = ""
    n_logprobs: int | None = None
    constraint: Matcher | None = None
    draft_max: int | None = None

    cancelled: bool = False
    state: SequenceState = SequenceState.WAITING
    slot: int = -1
    n_past: int = 0
    n_drawn: int = 0
    n_cached: int = 0
    last_token: int = -1
    leader: Sequence | None = None
    fork: int = 0
    plan: Plan | None = None
    filed: FiledState | None = None
    n_fetches: int = 0
    marks: list[int] = field(default_factory=list)
    lookup: PromptLookup | None = None
    n_drafted: int = 0
    n_accepted: int = 0
    arrival: int = field(default_factory=lambda: next(_arrivals))
    submitted_s: float = field(default_factory=time.perf_counter)
    assembler: TextAssembler = field(init=False)
    ids: npt.NDArray[np.int32] = field(init=False)
    chain: Any = None
    penalties: Any = None
    bias: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None

    def __post_init__(self) -> None:
        self.assembler = TextAssembler(self.stop)
        self.ids = np.array(self.prompt, dtype=np.int32)

    @property
    def n_prompt(self) -> int:
        return len(self.prompt)

    @property
    def counts(self) -> tuple[int, int, int]:
        """What its last event tells: `n_cached`, `n_drafted`, `n_accepted`."""
        return self.n_cached, self.n_drafted, self.n_accepted

    @property
    def order(self) -> tuple[int, int]:
        """Admission order: by priority, then by arrival."""
        return (-self.priority, self.arrival)


@dataclass(frozen=True, slots=True)
class SequenceEvent:
    """The root of what an engine tells about a sequence. `at_s` is `time.perf_counter()`."""

    sequence: Sequence
    at_s: float


@dataclass(frozen=True, slots=True)
class SequenceStarted(SequenceEvent):
    """The sequence left the queue and got `slot`; by the time the loop hears of it, it may have given it back."""

    slot: int


@dataclass(frozen=True, slots=True)
class TokenEmitted(SequenceEvent):
    """A token was drawn. `text` may be empty: half a character, or what may become a stop string. `logprobs` where they
    were asked for, save for a token that ends the answer."""

    text: str
    logprobs: StepLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SequenceFinished(SequenceEvent):
    """The last event. `text` is what was still held back; `error` says why for `reason` "error"; `n_cached` tokens of
    the prompt had been read before; of `n_drafted` tokens that were guessed `n_accepted` held; `lost` says that the
    process of the engine is gone."""

    text: str
    reason: str
    error: str | None = None
    n_cached: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    lost: bool = False
