"""Whose KV a prompt can go on from: the tokens that each slot holds, and a store of states that no slot holds any more.

Pure: it knows neither llama.cpp nor a clock, so that the choice is tested alone; `engine.engine` carries a plan out.
Matching is done at admission only, never in a step.

What can be taken over depends on the model's memory. Full attention: any common beginning, cut where the prompts part.
A sliding window: only where the cells before the cut still cover the window. A recurrent state: only a whole end,
since it cannot be cut. In every case at least one token of the prompt is left to evaluate, for its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.sequence import Sequence, SequenceState

if TYPE_CHECKING:
    from engine.state_file import FiledState

TokenIds = npt.NDArray[np.int32]

MIN_SHARED = 16
"""Tokens below which nothing is shared: a template's first words are common to all prompts and cost nothing to read."""

MIN_SAVED = 64
"""Tokens that a state must hold, and would lose, to be worth a place in the store."""

MAX_STATES = 256
"""States in the store at most: each is compared at every admission."""


class ReuseRule(Enum):
    """Where a sequence's KV can be cut."""

    OFF = "off"
    ANYWHERE = "any common beginning"
    WINDOW = "common beginnings whose sliding window is still held"
    ENDS = "whole ends only, because a recurrent state cannot be cut"


@dataclass(frozen=True)
class Reuse:
    """A model's rule; `n_window` tokens of sliding window where it has one."""

    rule: ReuseRule
    n_window: int = 0

    def usable(self, common: int, held: int, first: int, n_prompt: int) -> int:
        """How many tokens of a prompt can be taken over; 0 for none.

        Args:
            common: how many first tokens the prompt and the state have in common.
            held: tokens that the state holds.
            first: the first position whose cells are still there.
            n_prompt: tokens of the prompt.
        """
        n = min(common, n_prompt - 1)
        if n < MIN_SHARED or self.rule is ReuseRule.OFF:
            return 0
        if self.rule is ReuseRule.ENDS:
            return n if n == held else 0
        # The token at n attends to positions after n − n_window (llama_hparams::is_masked_swa).
        if self.rule is ReuseRule.WINDOW and first > max(0, n - self.n_window + 1):
            return 0
        return n

    def first_saved(self, held: int, first: int) -> int:
        """The first position of a saved state: llama.cpp leaves out what the last token does not attend to."""
        return max(first, held - self.n_window) if self.rule is ReuseRule.WINDOW else first


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """How many first tokens are the same."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    at = int(differs.argmax()) if n else 0
    return at if n and differs[at] else n


class Source(Enum):
    """Where a sequence's beginning comes from."""

    NOWHERE = "nowhere"
    HELD = "its own slot"
    COPIED = "another slot"
    STORED = "the store"
    FILED = "a file"
    AWAITED = "a prompt that is being read"


@dataclass(eq=False)
class StoredState:
    """A state that left its slot: `blob` is llama.cpp's, for `tokens` from position `first` on."""

    tokens: TokenIds
    first: int
    blob: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """What a sequence does about its first `n` tokens.

    Attributes:
        slot: where the sequence runs.
        from_slot: whose KV is copied, for `Source.COPIED`.
        state: what is restored, for `Source.STORED`.
        filed: what must be fetched first, for `Source.FILED`; another plan is made when it is there.
        leader: whose reading is awaited, for `Source.AWAITED`.
        n_refused: tokens beyond `n` that are known, and that the model's rule does not let be taken over.
    """

    slot: int
    n: int = 0
    source: Source = Source.NOWHERE
    from_slot: int = -1
    state: StoredState | None = None
    filed: FiledState | None = None
    leader: Sequence | None = None
    n_refused: int = 0


class Costs:
    """What reading and moving a token costs on this machine: the best seen, because a busy neighbour only adds."""

    def __init__(self) -> None:
        self._read_s: float | None = None
        self._move_s: float | None = None
        self._fetch_s: float | None = None

    def read(self, n_tokens: int, seconds: float) -> None:
        """Notes a batch of prompt tokens alone."""
        if n_tokens >= 2 * MIN_SHARED:
            each = seconds / n_tokens
            self._read_s = each if self._read_s is None else min(each, self._read_s)

    def moved(self, n_tokens: int, seconds: float) -> None:
        """Notes a state of `n_tokens` written or read."""
        if n_tokens:
            each = seconds / n_tokens
            self._move_s = each if self._move_s is None else min(each, self._move_s)

    def fetched(self, n_tokens: int, seconds: float) -> None:
        """Notes a file of `n_tokens` that was read. Not the best seen but what it is like lately, because files that
        the system still has in memory tell nothing of the others."""
        if n_tokens:
            each = seconds / n_tokens
            self._fetch_s = each if self._fetch_s is None else (self._fetch_s + each) / 2

    def fetching_pays(self, n_gained: int, n_moved: int) -> bool:
        """Whether a file of `n_moved` tokens is there sooner than `n_gained` are read."""
        if n_gained < MIN_SHARED:
            return False
        if self._read_s is None or self._fetch_s is None:
            return True
        if n_gained * self._read_s > n_moved * (self._fetch_s + (self._move_s or 0.0)):
            return True
        self._fetch_s *= 0.9  # as in `pays`
        return False

    def pays(self, n_gained: int, n_moved: int) -> bool:
        """Whether moving a state of `n_moved` tokens is quicker than reading `n_gained`."""
        if n_gained < MIN_SHARED:
            return False
        if self._read_s is None or self._move_s is None or n_gained * self._read_s > n_moved * self._move_s:
            return True
        # One bad measurement must not last: what is never done is never measured again.
        self._move_s *= 0.9
        return False


class StateStore:
    """States by least recent use, within a budget of bytes.

    Attributes:
        on_evicted: called with what left for lack of room.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.on_evicted: Callable[[StoredState], None] | None = None
        self.n_bytes = 0
        self.states: list[StoredState] = []  # the most recently used last

    def put(self, state: StoredState, *, cuttable: bool) -> None:
        """Takes a state, for which the least recently used make room; one over the whole budget is not kept.

        Args:
            cuttable: whether a longer state serves for a shorter one, so that its own beginnings need no place.
        """
        if state.blob.nbytes > self.budget_bytes:
            return
        for other in tuple(self.states):
            n = len(other.tokens)
            if (cuttable or n == len(state.tokens)) and common_prefix(other.tokens, state.tokens) == n:
                self.drop(other)
        while self.states and (self.n_bytes + state.blob.nbytes > self.budget_bytes or len(self.states) >= MAX_STATES):
            evicted = self.states[0]
            self.drop(evicted)
            if self.on_evicted is not None:
                self.on_evicted(evicted)
        self.states.append(state)
        self.n_bytes += state.blob.nbytes

    def touch(self, state: StoredState) -> None:
        """Notes a use."""
        if state in self.states:
            self.states.remove(state)
            self.states.append(state)

    def clear(self) -> None:
        """Gives the memory back."""
        self.states.clear()
        self.n_bytes = 0

    def drop(self, state: StoredState) -> None:
        """Gives a state up."""
        if state in self.states:
            self.states.remove(state)
            self.n_bytes -= state.blob.nbytes


class PrefixCache:
    """The tokens in each slot's KV, and the store. Engine thread only.

    Args:
        n_ctx: tokens that a slot can hold.
        budget_bytes: of the store.
        first_position: the first position of a slot whose cells are still there.

    Attributes:
        files: what lies on disk that may begin like a prompt.
    """

    def __init__(
        self,
        *,
        n_slots: int,
        n_ctx: int,
        reuse: Reuse,
        budget_bytes: int = 0,
        first_position: Callable[[int], int] = lambda slot: 0,
    ) -> None:
        self.reuse = reuse
        self.store = StateStore(budget_bytes)
        self.costs = Costs()
        self.files: Callable[[TokenIds], Iterable[FiledState]] = lambda prompt: ()
        self._first_position = first_position
        self._tokens = np.zeros((n_slots, n_ctx), dtype=np.int32)
        self._n = [0] * n_slots
        self._used = [0] * n_slots
        self._tick = 0

    def n_held(self, slot: int) -> int:
        return self._n[slot]

    def held(self, slot: int) -> TokenIds:
        """The tokens in a slot's KV, as a view."""
        return self._tokens[slot, : self._n[slot]]

    def note(self, slot: int, start: int, tokens: list[int]) -> None:
        """Tokens were evaluated at positions from `start`; nothing stands behind them."""
        end = start + len(tokens)
        if end == start + 1:
            self._tokens[slot, start] = tokens[0]
        else:
            self._tokens[slot, start:end] = tokens
        self._n[slot] = end

    def cut(self, slot: int, n: int) -> None:
        """Only the first `n` tokens are left."""
        self._n[slot] = n

    def copied(self, slot: int, tokens: TokenIds) -> None:
        """The slot's KV was replaced by a state of these tokens."""
        self._tokens[slot, : len(tokens)] = tokens
        self._n[slot] = len(tokens)

    def left(self, slot: int) -> None:
        """The slot's sequence has ended; what it held stays until the slot is needed."""
        self._tick += 1
        self._used[slot] = self._tick

    def plan(self, prompt: TokenIds, *, free: Iterable[int], earlier: Iterable[Sequence], fetches: bool = True) -> Plan:
        """The quickest way to a prompt's beginning.

        Args:
            free: slots that the sequence may take.
            earlier: the sequences that run and were admitted before it.
            fetches: whether it may wait for a file.
        """
        free = list(free)
        n_prompt = len(prompt)
        # The empty ones first, then the one that was left longest ago.
        spare = min(free, key=lambda slot: (self._n[slot] > 0, self._used[slot] if self._n[slot] else 0, slot))
        if self.reuse.rule is ReuseRule.OFF or n_prompt <= MIN_SHARED:
            return Plan(spare)
        n_known = 0
        best = Plan(spare)
        in_place: dict[int, int] = {}
        by_copy: dict[int, int] = {}
        for slot, n_held in enumerate(self._n):
            if n_held < MIN_SHARED:
                continue
            common = common_prefix(self.held(slot), prompt)
            n_known = max(n_known, common)
            first = self._first_position(slot)
            by_copy[slot] = self.reuse.usable(common, n_held, self.reuse.first_saved(n_held, first), n_prompt)
            if slot in free:
                in_place[slot] = self.reuse.usable(common, n_held, first, n_prompt)
        if in_place:
            slot = max(in_place, key=lambda slot: (in_place[slot], -self._n[slot]))
            n = in_place[slot]
            if self._n[slot] - n >= MIN_SAVED and not self._n[spare] and by_copy[slot] == n:
                # An empty slot is at hand: both the old end and the new one stay.
                in_place[slot] = 0
            if in_place[slot]:
                best = Plan(slot, n, Source.HELD)
        for slot, n in by_copy.items():
            if n > best.n and slot != spare and self.costs.pays(n - best.n, self._n[slot]):
                best = Plan(spare, n, Source.COPIED, from_slot=slot)
        for state in self.store.states:
            common = common_prefix(state.tokens, prompt)
            n_known = max(n_known, common)
            n = self.reuse.usable(common, len(state.tokens), state.first, n_prompt)
            if n > best.n and self.costs.pays(n - best.n, len(state.tokens)):
                best = Plan(spare, n, Source.STORED, state=state)
        for filed in self.files(prompt) if fetches else ():
            common = common_prefix(filed.tokens, prompt)
            n_known = max(n_known, common)
            n = self.reuse.usable(common, len(filed.tokens), filed.first, n_prompt)
            # It passes through the store.
            fits = filed.n_bytes <= self.store.budget_bytes
            if fits and n > best.n and self.costs.fetching_pays(n - best.n, len(filed.tokens)):
                best = Plan(spare, n, Source.FILED, filed=filed)
        for leader in earlier:
            if leader.state is not SequenceState.PREFILL:
                continue
            n = min(common_prefix(leader.ids, prompt), n_prompt - 1)
            if n > leader.n_past and n > best.n and self.costs.pays(n - best.n, n):
                best = Plan(spare, n, Source.AWAITED, leader=leader)
        n_refused = max(0, min(n_known, n_prompt - 1) - best.n)
        waits = best.source in (Source.AWAITED, Source.FILED)
        if not waits and n_refused >= MIN_SHARED and self.reuse.rule is not ReuseRule.ANYWHERE:
            return replace(best, n_refused=n_refused)
        return best

    def worth_saving(self, slot: int, n_kept: int) -> bool:
        """Whether a slot's state should go to the store before all but its first `n_kept` tokens are lost."""
        n = self._n[slot]
        if not self.store.budget_bytes or n < MIN_SAVED or n - n_kept < MIN_SAVED:
            return False
        tokens = self.held(slot)
        others = [self.held(other) for other in range(len(self._n)) if other != slot]
        others += [state.tokens for state in self.store.states]
        common = ((common_prefix(tokens, other), len(other)) for other in others)
        whole_only = self.reuse.rule is not ReuseRule.ANYWHERE
        n_elsewhere = max((n for n, n_other in common if n == n_other or not whole_only), default=0)
        n_lost = n - max(n_kept, n_elsewhere)
        return n_lost >= MIN_SAVED and self.costs.pays(n_lost, 2 * n)

    def is_stored(self, slot: int) -> bool:
        """Whether the store holds exactly this slot's state."""
        tokens = self.held(slot)
        return any(np.array_equal(tokens, state.tokens) for state in self.store.states)

    def save(self, slot: int, blob: npt.NDArray[np.uint8]) -> None:
        """Puts a slot's state into the store."""
        first = self.reuse.first_saved(self._n[slot], self._first_position(slot))
        state = StoredState(self.held(slot).copy(), first, blob)
        self.store.put(state, cuttable=self.reuse.rule is ReuseRule.ANYWHERE)
