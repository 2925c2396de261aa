"""Who decodes, who prefills, who waits. Pure: it knows neither llama.cpp nor a clock.

Each step every decoding sequence gets one token; prefill takes what is left, at most `n_prefill_beside` tokens while
anyone decodes (so that a long prompt does not stall the others), the whole batch when nobody does. Clients share it
alike; each one's prompts are read in order of admission. Where more decode than a batch holds, they take turns.

A sequence whose beginning is being read by an earlier one (its leader) has a slot and waits in it: the leader's batch
ends where the two prompts part, and the follower goes on from a copy. N prompts with one beginning read it once. One
whose beginning lies in a file waits in its slot likewise, until the file has come.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.prefix_cache import Plan, PrefixCache, Source
from engine.sequence import Sequence, SequenceState
from engine.waiting import WaitingLine, share_out

N_BATCH = 512
"""Tokens in one batch at most; measured best on CPUs, where a prompt is read in steps of this size."""


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of one batch: `tokens` at positions from `start`; `draws` when its last token yields logits.

    The last `n_ahead` tokens are guessed and yield logits too; `n_checked` of them are compared with what is drawn, the
    others fill up.
    """

    sequence: Sequence
    tokens: list[int]
    start: int
    draws: bool
    n_ahead: int = 0
    n_checked: int = 0


class Scheduler:
    """Slots and queues of one engine. Engine thread only.

    Args:
        prefixes: says which slot suits a prompt; without it nothing is shared.
    """

    def __init__(
        self, *, n_slots: int, n_batch: int, n_prefill_beside: int = 128, prefixes: PrefixCache | None = None
    ) -> None:
        self._prefixes = prefixes
        self._n_batch = n_batch
        self._n_prefill_beside = n_prefill_beside
        self._free = list(range(n_slots - 1, -1, -1))
        self._held = False
        self._turn = 0
        self.waiting = WaitingLine()
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; `engine.waiting` says when its turn comes."""
        self.waiting.add(sequence)

    def admit(self) -> list[Sequence]:
        """Gives free slots to those who wait; returns who got one."""
        admitted: list[Sequence] = []
        while (sequence := self.admit_one()) is not None:
            admitted.append(sequence)
        return admitted

    def admit_one(self) -> Sequence | None:
        """Gives a free slot to the one whose turn it is, with a plan for its beginning; None when nobody can have one.

        The plan is to be carried out before the next is made, which counts on it.
        """
        if (self._held and self.running) or not self._free or not self.waiting:
            return None
        self._held = False
        sequence = self.waiting.pop()
        plan = Plan(self._free[-1])
        if self._prefixes is not None:
            plan = self._prefixes.plan(sequence.ids, free=self._free, earlier=self.running)
        self._free.remove(plan.slot)
        sequence.slot = plan.slot
        sequence.state = SequenceState.PREFILL
        self._follow(sequence, plan)
        self.running.append(sequence)
        return sequence

    def rejoin(self) -> Sequence | None:
        """A follower whose leader has read what they share, or has left, or one whose file has come, with a new plan;
        None when all must wait.

        The plan is to be carried out before the next is made. The first that runs has no leader, so somebody always
        reads, or waits for a file.
        """
        for at, sequence in enumerate(self.running):
            if not _goes_on(sequence):
                continue
            assert self._prefixes is not None
            plan = self._prefixes.plan(
                sequence.ids, free=[sequence.slot], earlier=self.running[:at], fetches=not sequence.n_fetches
            )
            self._follow(sequence, plan)
            return sequence
        return None

    @staticmethod
    def _follow(sequence: Sequence, plan: Plan) -> None:
        sequence.plan = plan
        sequence.leader = plan.leader
        sequence.fork = plan.n if plan.source is Source.AWAITED else 0
        sequence.filed = plan.filed
        sequence.n_fetches += plan.filed is not None

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its slot."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._free.append(sequence.slot)
            sequence.slot = -1
            sequence.leader = sequence.plan = sequence.filed = None
            self._held = False
            self.waiting.left(sequence)
        else:
            self.waiting.discard(sequence)
        sequence.state = SequenceState.FINISHED

    def requeue(self, sequence: Sequence) -> None:
        """Sends a running sequence that has drawn nothing yet back to the queue, to be read anew.

        Nobody is admitted until another leaves: with the same sequences there would be no more room than before.
        """
        self._held = True
        self.running.remove(sequence)
        self._free.append(sequence.slot)
        sequence.slot, sequence.n_past, sequence.state = -1, 0, SequenceState.WAITING
        sequence.leader = sequence.plan = None
        self.waiting.put_back(sequence)

    def cancelled(self) -> list[Sequence]:
        """Those that were cancelled and are still here."""
        return [sequence for sequence in (*self.running, *self.waiting) if sequence.cancelled]

    def schedule(self) -> list[Share]:
        """The next batch; at most `n_batch` tokens, one share a sequence."""
        decoding = [sequence for sequence in self.running if sequence.state is SequenceState.DECODE]
        if len(decoding) > self._n_batch:
            at = self._turn % len(decoding)
            decoding = (decoding[at:] + decoding[:at])[: self._n_batch]
            self._turn += self._n_batch
        shares = [Share(sequence, [sequence.last_token], sequence.n_past, True) for sequence in decoding]
        budget = self._n_batch - len(shares)
        if shares:
            budget = min(budget, self._n_prefill_beside)
        forks = [(sequence.leader, sequence.fork) for sequence in self.running if sequence.leader is not None]
        ends: list[tuple[Sequence, int]] = []
        wanted: dict[str, int] = {}
        for sequence in self.running:
            waits = sequence.leader is not None or sequence.filed is not None
            if sequence.state is not SequenceState.PREFILL or waits:
                continue
            stops = [fork for leader, fork in forks if leader is sequence] + sequence.marks
            end = min([sequence.n_prompt, *(stop for stop in stops if stop > sequence.n_past)])
            ends.append((sequence, end))
            wanted[sequence.client] = wanted.get(sequence.client, 0) + end - sequence.n_past
        allowed = share_out(wanted, budget)
        for sequence, stop in ends:
            end = min(sequence.n_past + allowed[sequence.client], stop)
            if end > sequence.n_past:
                tokens = sequence.prompt[sequence.n_past : end]
                shares.append(Share(sequence, tokens, sequence.n_past, end == sequence.n_prompt))
                allowed[sequence.client] -= len(tokens)
        return shares


def _goes_on(sequence: Sequence) -> bool:
    """Whether what a sequence has waited for is there, or will not come."""
    leader = sequence.leader
    if sequence.filed is not None:
        return False
    if leader is None:
        return sequence.plan is not None and sequence.plan.source is Source.FILED
    return leader.slot < 0 or leader.state is not SequenceState.PREFILL or leader.n_past >= sequence.fork
