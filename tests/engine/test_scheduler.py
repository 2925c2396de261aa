"""Who decodes, who prefills, who waits: decided without a model."""

from __future__ import annotations

import random

from engine.prefix_cache import PrefixCache, Reuse, ReuseRule, Source
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
    low, mid, also_mid, high = plain(), plain(priority=3), plain(priority=3), plain(priority=9)
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
        arrivals = [plain(chance.randint(1, 60), chance.randint(0, 2)) for _ in range(chance.randint(1, 25))]
        lengths = {id(each): chance.randint(1, 6) for each in arrivals}
        read: dict[int, list[int]] = {id(each): [] for each in arrivals}
        coming = list(arrivals)
        for _turn in range(6000):
            while coming and chance.random() < 0.3:
                scheduler.add(coming.pop())
            before = sorted(each.order for each in scheduler.waiting)
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


# -- prompts with one beginning ----------------------------------------------------------------------------------------


SYSTEM = list(range(1000, 1300))


def sharing(*, n_slots: int = 4, n_batch: int = 128) -> tuple[Scheduler, PrefixCache]:
    prefixes = PrefixCache(n_slots=n_slots, n_ctx=1000, reuse=Reuse(ReuseRule.ANYWHERE))
    return Scheduler(n_slots=n_slots, n_batch=n_batch, prefixes=prefixes), prefixes


def play(scheduler: Scheduler, prefixes: PrefixCache) -> list[tuple[int, int]]:
    """One step as an engine makes it, the model left out; returns what was read, as (slot, tokens)."""

    def take_over(each: Sequence) -> None:
        plan = each.plan
        assert plan is not None
        if plan.source in (Source.HELD, Source.COPIED):
            prefixes.copied(each.slot, prefixes.held(plan.from_slot if plan.source is Source.COPIED else each.slot))
        if plan.source is not Source.AWAITED:
            prefixes.cut(each.slot, plan.n)
            each.n_past = plan.n

    while (follower := scheduler.rejoin()) is not None:
        take_over(follower)
    while (newcomer := scheduler.admit_one()) is not None:
        take_over(newcomer)
    read = []
    for share in scheduler.schedule():
        each = share.sequence
        assert share.start == each.n_past == prefixes.n_held(each.slot)
        prefixes.note(each.slot, share.start, share.tokens)
        each.n_past += len(share.tokens)
        read.append((each.slot, len(share.tokens)))
        if share.draws:
            each.state = SequenceState.DECODE
    return read


def test_prompts_that_arrive_together_read_their_beginning_once() -> None:
    scheduler, prefixes = sharing()
    together = [sequence(prompt=[*SYSTEM, *range(20 * n, 20 * n + 20)]) for n in range(4)]
    for each in together:
        scheduler.add(each)
    steps = [play(scheduler, prefixes) for _ in range(4)]
    # The leader's third batch ends where the prompts part; the fourth is all that they do not share.
    assert steps == [[(0, 128)], [(0, 128)], [(0, 44)], [(0, 20), (1, 20), (2, 20), (3, 20)]]
    assert all(each.state is SequenceState.DECODE for each in together)
    assert [prefixes.held(each.slot).tolist() for each in together] == [each.prompt for each in together]


def test_a_follower_takes_over_where_its_leader_left() -> None:
    scheduler, prefixes = sharing()
    leader, first, second = (sequence(prompt=[*SYSTEM, n]) for n in range(3))
    for each in (leader, first, second):
        scheduler.add(each)
    assert play(scheduler, prefixes) == [(0, 128)]
    assert first.leader is leader
    prefixes.left(leader.slot)
    scheduler.remove(leader)
    # The first copies what there is and reads on; the second now waits for it.
    assert play(scheduler, prefixes) == [(1, 128)]
    assert first.n_past == 256
    assert (first.leader, second.leader) == (None, first)
    while second.state is not SequenceState.DECODE:
        assert play(scheduler, prefixes)
    assert prefixes.held(second.slot).tolist() == second.prompt


def test_a_leader_whose_reading_was_undone_leaves_nobody_behind() -> None:
    scheduler, prefixes = sharing()
    leader, follower = (sequence(prompt=[*SYSTEM, n]) for n in range(2))
    for each in (leader, follower):
        scheduler.add(each)
    play(scheduler, prefixes)
    prefixes.cut(leader.slot, 0)
    scheduler.requeue(leader)
    assert play(scheduler, prefixes) == [(1, 128)]
    assert follower.leader is None


def test_a_later_arrival_shares_with_the_nearest() -> None:
    scheduler, prefixes = sharing()
    scheduler.add(sequence(prompt=[*SYSTEM, *range(100)]))
    play(scheduler, prefixes)
    near = sequence(prompt=[*SYSTEM, *range(50), *range(500, 550)])
    far = sequence(prompt=[*SYSTEM[:200], *range(700, 800)])
    scheduler.add(near)
    scheduler.add(far)
    play(scheduler, prefixes)
    assert (near.fork, far.fork) == (350, 200)
    for _ in range(5):
        play(scheduler, prefixes)
    for each in (near, far):
        assert prefixes.held(each.slot).tolist()[: each.n_prompt] == each.prompt


def test_a_prompt_is_read_up_to_its_marks() -> None:
    scheduler, prefixes = sharing()
    marked = sequence(prompt=[*SYSTEM, *range(100)], marks=[150, 399])
    scheduler.add(marked)
    read = [play(scheduler, prefixes)[0][1] for _ in range(5)]
    assert read == [128, 22, 128, 121, 1]


def test_random_mixes_end_and_hold_what_was_asked() -> None:
    """Whatever leaves in whatever order: nobody waits for ever, and each slot holds its own prompt."""
    for seed in range(200):
        draw = random.Random(seed)
        scheduler, prefixes = sharing(n_slots=draw.randint(1, 5), n_batch=draw.choice((16, 64, 256)))
        left = 20
        for _ in range(2000):
            if left and draw.random() < 0.3:
                left -= 1
                cut = draw.choice((0, 40, 100, 300))
                tail = [draw.randrange(50) for _ in range(draw.randint(1, 60))]
                scheduler.add(sequence(prompt=[*SYSTEM[:cut], *tail]))
            read = play(scheduler, prefixes)
            assert read or not scheduler.running
            for each in tuple(scheduler.running):
                if each.state is SequenceState.DECODE:
                    assert prefixes.held(each.slot).tolist()[: each.n_prompt] == each.prompt
                if draw.random() < 0.1 or each.n_past > each.n_prompt + 3:
                    prefixes.left(each.slot)
                    scheduler.remove(each)
                elif draw.random() < 0.02 and each.state is SequenceState.PREFILL:
                    prefixes.cut(each.slot, 0)
                    scheduler.requeue(each)
                else:
                    each.last_token = draw.randrange(50)
            if not left and scheduler.idle:
                break
        else:
            raise AssertionError(f"seed {seed} never ends")
