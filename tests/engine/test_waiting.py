"""Whose turn it is: the line alone, and the scheduler as a simulation of many clients."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceState
from engine.waiting import PASSED_AT_MOST, KeyedHeap, WaitingLine, share_out
from tests.engine.parts import sequence


def of(client: str, priority: int = 0, *, n: int = 4) -> Sequence:
    return sequence(lambda event: None, n=n, client=client, priority=priority)


def line_of(*waiting: Sequence) -> WaitingLine:
    line = WaitingLine()
    for each in waiting:
        line.add(each)
    return line


def served(line: WaitingLine, n: int) -> list[Sequence]:
    """The next `n`, each of which ends before the next is taken."""
    taken = []
    for _ in range(n):
        taken.append(line.pop())
        line.left(taken[-1])
    return taken


def test_of_one_client_the_urgent_go_first_and_equals_in_order() -> None:
    late, low, urgent = of("a", 3), of("a"), of("a", 9)
    also_low = of("a")
    assert served(line_of(low, also_low, urgent, late), 4) == [urgent, late, low, also_low]


def test_a_flood_leaves_another_client_the_next_slot() -> None:
    line = line_of(*(of("flood") for _ in range(1000)))
    for _ in range(8):
        line.pop()
    one = of("one")
    line.add(one)
    assert line.pop() is one


def test_clients_that_all_have_work_get_as_many_turns() -> None:
    line = line_of(*(of(client) for client in "aaaaaaaaaaaabbbbbbbbbbbbcccccccccccc"))
    turns = Counter(each.client for each in served(line, 30))
    assert max(turns.values()) - min(turns.values()) <= 2


def test_long_answers_hold_no_more_slots_than_short_ones() -> None:
    """Slots are shared out, not admissions: who keeps them long gets them less often."""
    line = line_of(*(of("long") for _ in range(50)), *(of("short") for _ in range(50)))
    running = [line.pop() for _ in range(4)]
    for _ in range(20):
        assert Counter(each.client for each in running) == {"long": 2, "short": 2}
        brief = next(each for each in running if each.client == "short")
        running.remove(brief)
        line.left(brief)
        running.append(line.pop())


def test_who_was_silent_has_saved_nothing_up() -> None:
    line = line_of(*(of("busy") for _ in range(40)))
    served(line, 20)
    for _ in range(20):
        line.add(of("late"))
    turns = Counter(each.client for each in served(line, 10))
    assert abs(turns["late"] - turns["busy"]) <= 1


def test_a_level_of_priority_is_worth_a_turn_and_no_more() -> None:
    line = line_of(*(of("calm") for _ in range(40)), *(of("urgent", 9) for _ in range(40)))
    first = [each.client for each in served(line, 12)]
    assert first[:9] == ["urgent"] * 9
    assert "calm" in first


def test_the_lowest_priority_moves_under_a_flood_of_the_highest() -> None:
    low = [of("a") for _ in range(3)]
    line = line_of(*low)
    for round_ in range(1, 3 * (PASSED_AT_MOST + 1) + 1):
        line.add(of("a", 9))
        line.add(of("a", 9))
        (taken,) = served(line, 1)
        due = round_ % (PASSED_AT_MOST + 1) == 0
        assert (taken in low) == due
    assert not any(each in line for each in low)


def test_who_leaves_unserved_and_who_is_put_back() -> None:
    first, second = of("a"), of("a")
    line = line_of(first, second)
    line.discard(first)
    line.discard(first)
    assert line.pop() is second
    line.put_back(second)
    assert list(line) == [second]
    assert line.pop() is second
    line.left(second)
    assert len(line) == 0


def test_a_heap_keeps_no_more_than_it_holds() -> None:
    heap: KeyedHeap[str] = KeyedHeap()
    heap.put("kept", 0)
    for n in range(10_000):
        heap.put("moved", n + 1)
        heap.put(f"gone {n}", 20_000 + n)
        heap.drop(f"gone {n}")
    assert len(heap) == 2
    assert len(heap._heap) < 200
    heap.drop("kept")
    assert heap.first() == "moved"


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 600))
def test_a_budget_is_shared_out_whole_and_alike(wanted: dict[str, int], budget: int) -> None:
    shares = share_out(wanted, budget)
    assert sum(shares.values()) == min(budget, sum(wanted.values()))
    assert all(0 <= shares[client] <= n for client, n in wanted.items())
    short = [n for client, n in shares.items() if n < wanted[client]]
    if short:
        assert max(shares.values()) <= min(short) + 1


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps before it
        st.sampled_from("abcd"),
        st.integers(0, 9),
        st.integers(1, 70),  # tokens of its prompt
        st.integers(1, 12),  # tokens of its answer
        st.booleans(),  # whether its reading is undone once
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(1, 5), st.integers(1, 48), st.integers(1, 16))
def test_whoever_comes_is_served_in_bounded_turns(
    coming: list[tuple[int, str, int, int, int, bool]], n_slots: int, n_batch: int, beside: int
) -> None:
    """Slots, budgets and order hold at every step; nobody is passed over more often than the bound says."""
    scheduler = Scheduler(n_slots=n_slots, n_batch=n_batch, n_prefill_beside=beside)
    queue = [(of(client, level, n=n), n_answer, undone) for _, client, level, n, n_answer, undone in coming]
    delays = [delay for delay, *_ in coming]
    answers = {each: n_answer for each, n_answer, _ in queue}
    undo = {each for each, _, undone in queue if undone}
    turns_left: dict[Sequence, int] = {}
    n_passed: Counter[str] = Counter()
    step = 0
    while queue or not scheduler.idle:
        while queue and delays[0] <= 0:
            each = queue.pop(0)[0]
            delays.pop(0)
            n_older = sum(other.client == each.client for other in scheduler.waiting)
            scheduler.add(each)
            turns_left[each] = (n_older + 1) * (PASSED_AT_MOST + 1)
        if delays:
            delays[0] -= 1
        waiting = set(scheduler.waiting)
        running = Counter(each.client for each in scheduler.running)
        newcomer = scheduler.admit_one()
        if newcomer is not None:
            own = [each for each in waiting if each.client == newcomer.client]
            # Of its client none was more urgent, unless it had waited longest; no other client had fewer running.
            assert newcomer.priority == max(each.priority for each in own) or newcomer.arrival == min(
                each.arrival for each in own
            )
            fewest = min(running[each.client] for each in waiting)
            assert running[newcomer.client] == fewest
            for each in own:
                turns_left[each] -= 1
                assert turns_left[each] >= 0
            for client in {each.client for each in waiting} - {newcomer.client}:
                n_passed[client] = 0 if running[client] else n_passed[client] + 1
                assert n_passed[client] <= 4 * (PASSED_AT_MOST + 1)
            n_passed[newcomer.client] = 0
        slots = [each.slot for each in scheduler.running]
        assert len(set(slots)) == len(slots) <= n_slots
        if newcomer is None and waiting and not scheduler._held:
            assert len(slots) == n_slots
        shares = scheduler.schedule()
        assert shares or not scheduler.running
        assert sum(len(share.tokens) for share in shares) <= n_batch
        reading = [share for share in shares if share.sequence.state is SequenceState.PREFILL]
        if len(reading) < len(shares):
            assert sum(len(share.tokens) for share in reading) <= beside
        for share in shares:
            each = share.sequence
            assert share.start == each.n_past
            assert share.tokens
            each.n_past += len(share.tokens)
            if share.draws:
                each.state, each.last_token = SequenceState.DECODE, 1
                each.n_drawn += 1
        for each in [share.sequence for share in shares]:
            if each.n_drawn >= answers[each]:
                scheduler.remove(each)
            elif each in undo and each.n_drawn == 0 and len(scheduler.running) > 1:
                undo.discard(each)
                scheduler.requeue(each)
                for other in scheduler.waiting:
                    turns_left[other] += PASSED_AT_MOST + 1
        step += 1
        assert step < 100_000
    assert all(each.state is SequenceState.FINISHED for each in answers)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(20, 200), st.integers(0, 9), st.integers(1, 300), st.integers(0, 60))
def test_a_flood_does_not_hold_up_anothers_first_token(
    n_slots: int, n_flood: int, level: int, n_prompt: int, n_steps_before: int
) -> None:
    """Whatever priority the flood claims and however long its prompts are: another client has the next slot, and its
    prompt then half of every batch's room for reading."""
    scheduler = Scheduler(n_slots=n_slots, n_batch=64, n_prefill_beside=16)

    def play() -> list[Sequence]:
        newcomers = scheduler.admit()
        for share in scheduler.schedule():
            each = share.sequence
            each.n_past += len(share.tokens)
            if share.draws:
                each.state, each.last_token = SequenceState.DECODE, 1
                each.n_drawn += 1
                if each.n_drawn == 4:
                    scheduler.remove(each)
        return newcomers

    for _ in range(n_flood):
        scheduler.add(of("flood", level, n=n_prompt))
    for _ in range(n_steps_before):
        play()
    one = of("one", n=64)
    scheduler.add(one)
    admitted: list[Sequence] = []
    while one not in admitted:
        admitted += play()
    # While nothing of either runs, a level of priority is worth a turn; then the flood has more running.
    assert admitted.index(one) <= (1 if n_slots > 1 else 1 + level)
    n_steps = 0
    while one.n_drawn == 0:
        play()
        n_steps += 1
    assert n_steps <= 64 // 8 + 1
