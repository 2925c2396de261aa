"""Which beginning a prompt goes on from, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from engine.prefix_cache import (
    MAX_STATES,
    Costs,
    PrefixCache,
    Reuse,
    ReuseRule,
    Source,
    StateStore,
    StoredState,
    common_prefix,
)
from engine.sequence import SequenceState
from tests.engine.parts import sequence


def ids(*parts: range) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array([token for part in parts for token in part], dtype=np.int32)


SYSTEM = range(1000, 1100)


def cache(rule: ReuseRule = ReuseRule.ANYWHERE, *, n_slots: int = 3, window: int = 0, **arguments: int) -> PrefixCache:
    return PrefixCache(
        n_slots=n_slots, n_ctx=1000, reuse=Reuse(rule, window), budget_bytes=arguments.get("budget_bytes", 10**6)
    )


def hold(prefixes: PrefixCache, slot: int, *parts: range) -> None:
    prefixes.note(slot, 0, [token for part in parts for token in part])
    prefixes.left(slot)


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [
        ([], [1], 0),
        ([1], [2], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 2, 4, 3], 2),
        ([1, 2, 3], [0, 2, 3], 0),
    ],
)
def test_the_common_prefix(a: list[int], b: list[int], n: int) -> None:
    first, second = np.array(a, dtype=np.int32), np.array(b, dtype=np.int32)
    assert common_prefix(first, second) == common_prefix(second, first) == n


def test_one_token_is_always_left_to_evaluate() -> None:
    for rule in (ReuseRule.ANYWHERE, ReuseRule.WINDOW):
        assert Reuse(rule, 8).usable(100, 100, 0, 100) == 99
    assert Reuse(ReuseRule.ENDS).usable(100, 100, 0, 100) == 0
    assert Reuse(ReuseRule.ENDS).usable(100, 100, 0, 101) == 100


def test_a_window_must_be_whole_before_the_cut() -> None:
    rule = Reuse(ReuseRule.WINDOW, 8)
    # The token at 50 attends to 43..50.
    assert rule.usable(50, 60, 43, 100) == 50
    assert rule.usable(50, 60, 44, 100) == 0
    assert rule.usable(50, 60, 0, 100) == 50
    # Of a saved state what the token at 59 does not attend to is gone.
    assert rule.first_saved(60, 0) == 52
    assert rule.usable(60, 60, rule.first_saved(60, 0), 100) == 60
    assert rule.usable(59, 60, rule.first_saved(60, 0), 100) == 59
    assert rule.usable(58, 60, rule.first_saved(60, 0), 100) == 0


def test_a_recurrent_state_serves_at_its_end_only() -> None:
    rule = Reuse(ReuseRule.ENDS)
    assert rule.usable(50, 50, 0, 100) == 50
    assert rule.usable(50, 51, 0, 100) == 0


def test_nothing_is_shared_that_is_short_or_forbidden() -> None:
    assert Reuse(ReuseRule.ANYWHERE).usable(15, 100, 0, 100) == 0
    assert Reuse(ReuseRule.ANYWHERE).usable(16, 100, 0, 100) == 16
    assert Reuse(ReuseRule.OFF).usable(100, 100, 0, 1000) == 0


def test_a_first_prompt_gets_the_first_slot() -> None:
    plan = cache().plan(ids(SYSTEM), free=[2, 1, 0], earlier=[])
    assert (plan.slot, plan.n, plan.source) == (0, 0, Source.NOWHERE)


def test_a_conversation_goes_on_in_its_own_slot() -> None:
    prefixes = cache()
    hold(prefixes, 1, SYSTEM, range(20))
    hold(prefixes, 2, SYSTEM, range(50, 60))
    plan = prefixes.plan(ids(SYSTEM, range(20), range(300, 310)), free=[0, 1, 2], earlier=[])
    assert (plan.slot, plan.n, plan.source) == (1, 120, Source.HELD)


def test_a_busy_slot_is_copied() -> None:
    prefixes = cache()
    hold(prefixes, 1, SYSTEM, range(20))
    plan = prefixes.plan(ids(SYSTEM, range(300, 310)), free=[0, 2], earlier=[])
    assert (plan.slot, plan.n, plan.source, plan.from_slot) == (0, 100, Source.COPIED, 1)


def test_an_old_end_is_left_alone_while_a_slot_is_empty() -> None:
    prefixes = cache()
    hold(prefixes, 1, SYSTEM, range(200))
    plan = prefixes.plan(ids(SYSTEM, range(300, 310)), free=[0, 1, 2], earlier=[])
    assert (plan.slot, plan.source, plan.from_slot) == (0, Source.COPIED, 1)
    hold(prefixes, 0, range(5, 30))
    hold(prefixes, 2, range(6, 30))
    plan = prefixes.plan(ids(SYSTEM, range(300, 310)), free=[0, 1, 2], earlier=[])
    assert (plan.slot, plan.n, plan.source) == (1, 100, Source.HELD)


def test_the_slot_left_longest_ago_is_given_up_first() -> None:
    prefixes = cache()
    for slot in (2, 0, 1):
        hold(prefixes, slot, range(10 * slot, 10 * slot + 50))
    assert prefixes.plan(ids(SYSTEM), free=[0, 1, 2], earlier=[]).slot == 2
    prefixes.left(2)
    assert prefixes.plan(ids(SYSTEM), free=[0, 1, 2], earlier=[]).slot == 0


def test_the_store_serves_what_no_slot_holds() -> None:
    prefixes = cache()
    hold(prefixes, 0, SYSTEM, range(90))
    prefixes.save(0, np.zeros(1000, dtype=np.uint8))
    hold(prefixes, 0, range(60))
    plan = prefixes.plan(ids(SYSTEM, range(90), range(7)), free=[1], earlier=[])
    assert (plan.slot, plan.n, plan.source) == (1, 190, Source.STORED)
    assert plan.state is not None
    assert plan.state.tokens.tolist() == [*SYSTEM, *range(90)]


def test_a_prompt_that_is_being_read_is_awaited() -> None:
    prefixes = cache()
    leader = sequence(prompt=[*SYSTEM, *range(10)])
    leader.state, leader.slot, leader.n_past = SequenceState.PREFILL, 0, 40
    plan = prefixes.plan(ids(SYSTEM, range(50, 60)), free=[1, 2], earlier=[leader])
    assert (plan.source, plan.n, plan.leader) == (Source.AWAITED, 100, leader)
    leader.n_past = 105
    assert prefixes.plan(ids(SYSTEM, range(50, 60)), free=[1, 2], earlier=[leader]).source is Source.NOWHERE
    leader.n_past, leader.state = 40, SequenceState.DECODE
    assert prefixes.plan(ids(SYSTEM, range(50, 60)), free=[1, 2], earlier=[leader]).source is Source.NOWHERE


def test_what_the_rule_forbids_is_told() -> None:
    prefixes = cache(ReuseRule.ENDS)
    hold(prefixes, 0, SYSTEM, range(20))
    plan = prefixes.plan(ids(SYSTEM, range(300, 310)), free=[0, 1], earlier=[])
    assert (plan.n, plan.n_refused) == (0, 100)
    assert prefixes.plan(ids(SYSTEM, range(20), range(3)), free=[0, 1], earlier=[]).n == 120
    off = cache(ReuseRule.OFF)
    hold(off, 0, SYSTEM, range(20))
    assert off.plan(ids(SYSTEM, range(20), range(3)), free=[0, 1], earlier=[]).n == 0


def test_a_copy_that_costs_more_than_reading_is_not_made() -> None:
    prefixes = cache()
    hold(prefixes, 1, SYSTEM, range(400))
    prompt = ids(SYSTEM, range(500, 510))
    prefixes.costs.read(100, 1.0)
    prefixes.costs.moved(100, 0.1)
    assert prefixes.plan(prompt, free=[0, 2], earlier=[]).source is Source.COPIED
    prefixes.costs = Costs()
    prefixes.costs.read(100, 0.1)
    prefixes.costs.moved(100, 1.0)
    assert prefixes.plan(prompt, free=[0, 2], earlier=[]).source is Source.NOWHERE
    assert prefixes.plan(prompt, free=[1], earlier=[]).source is Source.HELD


def test_costs_are_the_best_seen() -> None:
    costs = Costs()
    assert costs.pays(16, 10**6)
    assert not costs.pays(15, 0)
    costs.read(1, 0.0)  # a single token tells nothing of a batch
    assert costs.pays(16, 10**6)
    costs.read(100, 5.0)
    costs.moved(100, 5.0)
    costs.moved(100, 1.0)
    costs.read(100, 10.0)
    assert costs.pays(20, 99)
    assert not costs.pays(20, 100)
    assert costs.pays(20, 100)  # it is tried again after a while


def test_only_what_would_be_lost_is_saved() -> None:
    prefixes = cache()
    hold(prefixes, 0, SYSTEM, range(30))
    hold(prefixes, 1, SYSTEM, range(500, 540))
    assert not prefixes.worth_saving(0, 0)  # all but 30 tokens are in the other slot
    hold(prefixes, 1, range(20))
    assert prefixes.worth_saving(0, 0)
    assert not prefixes.worth_saving(0, 100)
    prefixes.save(0, np.zeros(10, dtype=np.uint8))
    assert prefixes.is_stored(0)
    assert not prefixes.worth_saving(0, 0)
    assert not cache(budget_bytes=0).worth_saving(0, 0)


def state(*parts: range, n_bytes: int = 100) -> StoredState:
    return StoredState(ids(*parts), 0, np.zeros(n_bytes, dtype=np.uint8))


def test_the_store_keeps_its_budget_and_drops_the_least_recently_used() -> None:
    store = StateStore(300)
    states = [state(range(n, n + 70)) for n in (0, 100, 200)]
    for each in states:
        store.put(each, cuttable=True)
    store.touch(states[0])
    store.put(state(range(300, 370)), cuttable=True)
    assert states[0] in store.states
    assert states[1] not in store.states
    assert store.n_bytes == 300
    store.put(state(range(400, 470), n_bytes=250), cuttable=True)
    assert (len(store.states), store.n_bytes) == (1, 250)
    store.put(state(range(500, 570), n_bytes=301), cuttable=True)
    assert (len(store.states), store.n_bytes) == (1, 250)
    store.touch(states[1])  # it is gone
    assert (len(store.states), store.n_bytes) == (1, 250)


def test_a_longer_state_takes_the_place_of_its_beginnings_where_it_can_be_cut() -> None:
    for cuttable, n in ((True, 1), (False, 2)):
        store = StateStore(10**6)
        store.put(state(range(70)), cuttable=cuttable)
        store.put(state(range(90)), cuttable=cuttable)
        store.put(state(range(90)), cuttable=cuttable)
        assert len(store.states) == n
        assert store.n_bytes == 100 * n


def test_the_store_holds_a_bounded_number_of_states() -> None:
    store = StateStore(10**9)
    for n in range(MAX_STATES + 10):
        store.put(state(range(1000 * n, 1000 * n + 70)), cuttable=True)
    assert len(store.states) == MAX_STATES
    assert store.states[0].tokens[0] == 10_000
