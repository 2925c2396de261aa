"""Who decodes, who prefills, who waits: decided without a model."""

from __future__ import annotations

import random

from engine.scheduler import Scheduler, Share
from engine.sequence import Sequence, SequenceState
from tests.engine.parts import sequence


def plain(n: int = 4, priority: int = 0) -> Sequence:
    return sequence(lambda event: None, n=n, priority=priority)


def advance(shares: list[Share]) -> None:
    """What the engine does after a decode."""
    for share in shares:
        share.sequence.n_past += len(share.tokens)
        if share.draws:
            share.sequence.state = SequenceState.DECODE
            share.sequence.last_token = 1
            share.sequence.n_drawn += 1


def test_first_come_first_served() -> None:
    scheduler = Scheduler(n_slots=2, n_batch=64)
    a, b, c = plain(), plain(), plain()
    for each in (a, b, c):
        scheduler.add(each)
    assert scheduler.admit() == [a, b]
    assert {a.slot, b.slot} == {0, 1}
    assert scheduler.admit() == []
    scheduler.remove(a)
    assert scheduler.admit() == [c]
    assert c.slot == 0


def test_a_higher_priority_goes_first_and_equals_keep_their_order() -> None:
    scheduler = Scheduler(n_slots=4, n_batch=64)
    low, mid, also_mid, high = plain(priority=-1), plain(), plain(), plain(priority=5)
    for each in (low, also_mid, mid, high):
        scheduler.add(each)
    assert scheduler.admit() == [high, mid, also_mid, low]


def test_an_arrival_keeps_its_place_whenever_it_is_added() -> None:
    scheduler = Scheduler(n_slots=1, n_batch=64)
    first, second = plain(), plain()
    scheduler.add(second)
    scheduler.add(first)
    assert scheduler.admit() == [first]


def test_prefill_takes_the_whole_batch_when_nobody_decodes() -> None:
    scheduler = Scheduler(n_slots=2, n_batch=64, n_prefill_beside=8)
    a, b = plain(100), plain(20)
    scheduler.add(a)
    scheduler.add(b)
    scheduler.admit()
    shares = scheduler.schedule()
    assert [(share.sequence, len(share.tokens), share.draws) for share in shares] == [(a, 64, False)]
    advance(shares)
    shares = scheduler.schedule()
    assert [(share.sequence, len(share.tokens), share.start, share.draws) for share in shares] == [
        (a, 36, 64, True),
        (b, 20, 0, True),
    ]


def test_prefill_beside_decode_has_a_budget() -> None:
    scheduler = Scheduler(n_slots=3, n_batch=64, n_prefill_beside=8)
    a = plain(4)
    scheduler.add(a)
    scheduler.admit()
    advance(scheduler.schedule())
    b, c = plain(6), plain(50)
    scheduler.add(b)
    scheduler.add(c)
    scheduler.admit()
    shares = scheduler.schedule()
    assert [(share.sequence, len(share.tokens), share.draws) for share in shares] == [
        (a, 1, True),
        (b, 6, True),
        (c, 2, False),
    ]
    assert shares[0].tokens == [a.last_token]


def test_more_decoding_than_a_batch_holds_take_turns() -> None:
    scheduler = Scheduler(n_slots=5, n_batch=2, n_prefill_beside=2)
    all_of_them = [plain(1) for _ in range(5)]
    for each in all_of_them:
        scheduler.add(each)
        scheduler.admit()
        each.state, each.last_token, each.n_past = SequenceState.DECODE, 1, 1
    for _ in range(10):
        shares = scheduler.schedule()
        assert len(shares) == 2
        advance(shares)
    assert [each.n_drawn for each in all_of_them] == [4] * 5


def test_a_requeued_sequence_is_read_anew_and_not_before_another_left() -> None:
    scheduler = Scheduler(n_slots=2, n_batch=64)
    a, b = plain(4), plain(4)
    scheduler.add(a)
    scheduler.add(b)
    scheduler.admit()
    b.n_past = 3
    scheduler.requeue(b)
    assert (b.slot, b.n_past, b.state) == (-1, 0, SequenceState.WAITING)
    # The same two together would find no more room than before.
    assert scheduler.admit() == []
    assert [share.sequence for share in scheduler.schedule()] == [a]
    scheduler.remove(a)
    assert scheduler.admit() == [b]


def test_a_requeued_sequence_that_is_alone_is_admitted_again() -> None:
    scheduler = Scheduler(n_slots=2, n_batch=64)
    a = plain(4)
    scheduler.add(a)
    scheduler.admit()
    scheduler.requeue(a)
    assert scheduler.admit() == [a]


def test_remove_from_the_queue_and_from_a_slot() -> None:
    scheduler = Scheduler(n_slots=1, n_batch=64)
    a, b = plain(), plain()
    scheduler.add(a)
    scheduler.add(b)
    scheduler.admit()
    a.cancelled = b.cancelled = True
    assert scheduler.cancelled() == [a, b]
    scheduler.remove(b)
    scheduler.remove(a)
    assert scheduler.cancelled() == []
    assert scheduler.idle
    assert {a.state, b.state} == {SequenceState.FINISHED}
    scheduler.remove(a)
    c = plain()
    scheduler.add(c)
    assert scheduler.admit() == [c]


def test_whatever_happens_the_invariants_hold() -> None:
    """Random arrivals, ends and requeues: every batch is well formed, every slot has one owner, everyone ends."""
    chance = random.Random(20260101)
    for _ in range(60):
        n_slots, n_batch, beside = chance.randint(1, 8), chance.randint(1, 24), chance.randint(1, 16)
        scheduler = Scheduler(n_slots=n_slots, n_batch=n_batch, n_prefill_beside=beside)
        arrivals = [plain(chance.randint(1, 60), chance.randint(-1, 1)) for _ in range(chance.randint(1, 25))]
        lengths = {id(each): chance.randint(1, 6) for each in arrivals}
        read: dict[int, list[int]] = {id(each): [] for each in arrivals}
        coming = list(arrivals)
        for _turn in range(6000):
            while coming and chance.random() < 0.3:
                scheduler.add(coming.pop())
            before = [each.order for each in scheduler.waiting]
            admitted = scheduler.admit()
            assert [each.order for each in admitted] == before[: len(admitted)]
            slots = [each.slot for each in scheduler.running]
            assert len(set(slots)) == len(slots) <= n_slots
            assert all(0 <= slot < n_slots for slot in slots)
            assert all(each.slot == -1 for each in scheduler.waiting)
            shares = scheduler.schedule()
            if not shares:
                assert not scheduler.running
                if not coming:
                    break
                continue
            assert all(share.tokens for share in shares)
            assert sum(len(share.tokens) for share in shares) <= n_batch
            assert len({id(share.sequence) for share in shares}) == len(shares)
            prefill = [share for share in shares if share.sequence.state is SequenceState.PREFILL]
            if len(prefill) < len(shares):
                assert sum(len(share.tokens) for share in prefill) <= beside
            for share in prefill:
                assert share.start == len(read[id(share.sequence)])
                assert share.draws == (share.start + len(share.tokens) == share.sequence.n_prompt)
                read[id(share.sequence)] += share.tokens
            if chance.random() < 0.05 and len(shares) > 1 and shares[-1].sequence.n_drawn == 0:
                read[id(shares[-1].sequence)] = []
                scheduler.requeue(shares.pop().sequence)
            advance(shares)
            for each in list(scheduler.running):
                if each.n_drawn >= lengths[id(each)] or chance.random() < 0.01:
                    if each.state is SequenceState.DECODE:
                        assert read[id(each)] == each.prompt
                    scheduler.remove(each)
        assert scheduler.idle
        assert all(each.state is SequenceState.FINISHED for each in arrivals)
