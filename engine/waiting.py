"""Who gets the next free slot: the order of those who wait. Pure: no clock, no slots; `engine.scheduler` asks it.

First a client is chosen:

1. The client with the fewest sequences running. One client's flood leaves another the next slot, and long answers hold
   no more slots than short ones.
2. The client with the fewest turns so far, each level of priority of its next one counting as one turn fewer. Who comes
   back, or is new, begins where the least served of those who wait stands, so that silence saves nothing up.
3. The earliest arrival.

Then one of its sequences: the highest priority, among equals the earliest arrival.

Both choices age, so that nothing starves: a client with nothing running, and a client's oldest sequence, go first once
they were passed over `PASSED_AT_MOST` times. A client that waits behind n others with nothing running gets a slot
within (n + 1) * (PASSED_AT_MOST + 1) admissions, and a sequence with n older ones of its client within as many of that
client's turns, whatever else arrives. All is O(log n) of those who wait.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from engine.sequence import Sequence

PASSED_AT_MOST = 16
"""How often the one that has waited longest is passed over. Large enough that priorities decide nearly always, small
enough that work of the lowest priority moves under a steady flood of the highest."""

_SLACK = 64
Item = TypeVar("Item", bound=Hashable)
Key = tuple[int, ...]


class KeyedHeap(Generic[Item]):
    """The item with the least key; keys change and items leave in O(log n), amortised. No two items may have the same
    key."""

    def __init__(self) -> None:
        self._keys: dict[Item, Key] = {}
        self._heap: list[tuple[Key, Item]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, item: Item) -> bool:
        return item in self._keys

    def __iter__(self) -> Iterator[Item]:
        return iter(self._keys)

    def put(self, item: Item, *key: int) -> None:
        """Adds an item, or moves it."""
        if self._keys.get(item) != key:
            self._keys[item] = key
            heapq.heappush(self._heap, (key, item))
            self._tidy()

    def drop(self, item: Item) -> None:
        """Removes an item, if it is here."""
        self._keys.pop(item, None)
        self._tidy()

    def first(self) -> Item:
        """The item with the least key; the heap is not empty."""
        while self._keys.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def _tidy(self) -> None:
        """What was moved or removed stays in the heap until it surfaces; it must not outgrow what is really here."""
        if len(self._heap) > 2 * len(self._keys) + _SLACK:
            self._heap = [(key, item) for item, key in self._keys.items()]
            heapq.heapify(self._heap)


class _Client:
    """Those of one client that wait, how many of its sequences run, and how many turns it had."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.n_running = self.n_turns = 0
        self.by_priority: KeyedHeap[Sequence] = KeyedHeap()
        self._by_age: KeyedHeap[Sequence] = KeyedHeap()
        self._n_passed = 0

    def add(self, sequence: Sequence) -> None:
        self.by_priority.put(sequence, -sequence.priority, sequence.arrival)
        self._by_age.put(sequence, sequence.arrival)

    def discard(self, sequence: Sequence) -> None:
        if sequence is self._by_age.first():
            self._n_passed = 0
        self.by_priority.drop(sequence)
        self._by_age.drop(sequence)

    def pop(self) -> Sequence:
        oldest, urgent = self._by_age.first(), self.by_priority.first()
        self._n_passed += oldest is not urgent
        taken = oldest if self._n_passed > PASSED_AT_MOST else urgent
        self.discard(taken)
        return taken


class WaitingLine:
    """The sequences that wait for a slot. Engine thread only.

    Each sequence that is taken is given back once: by `left` when it ends, or by `put_back`.
    """

    def __init__(self) -> None:
        self._all: dict[Sequence, None] = {}
        self._clients: dict[str, _Client] = {}
        self._by_rank: KeyedHeap[_Client] = KeyedHeap()
        self._by_turns: KeyedHeap[_Client] = KeyedHeap()
        self._without: KeyedHeap[_Client] = KeyedHeap()
        """Clients that wait with nothing running, since when."""
        self._n_passed = 0
        self._n_turns = 0
        self._tick = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Sequence]:
        """In no order that means anything."""
        return iter(self._all)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._all

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in."""
        client = self._clients.setdefault(sequence.client, _Client(sequence.client))
        if not client.by_priority:
            least = self._by_turns.first().n_turns if self._by_turns else self._n_turns
            client.n_turns = max(client.n_turns, least)
        self._all[sequence] = None
        client.add(sequence)
        self._rank(client)

    def pop(self) -> Sequence:
        """Takes out whose turn it is; the line is not empty."""
        client = self._by_rank.first()
        if self._without:
            longest = self._without.first()
            self._n_passed += longest is not client
            if self._n_passed > PASSED_AT_MOST:
                client = longest
        sequence = client.pop()
        del self._all[sequence]
        self._n_turns = client.n_turns
        client.n_running += 1
        client.n_turns += 1
        self._rank(client)
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Takes out one that waits no longer, if it is here."""
        if sequence in self._all:
            del self._all[sequence]
            client = self._clients[sequence.client]
            client.discard(sequence)
            self._rank(client)

    def left(self, sequence: Sequence) -> None:
        """A sequence that had its turn runs no more."""
        client = self._clients[sequence.client]
        client.n_running -= 1
        self._rank(client)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that had its turn waits again; the turn does not count."""
        client = self._clients[sequence.client]
        client.n_running -= 1
        client.n_turns -= 1
        self.add(sequence)

    def _rank(self, client: _Client) -> None:
        """Puts a client where it now stands; one that neither waits nor runs is forgotten."""
        if not client.by_priority or client.n_running:
            if client in self._without and client is self._without.first():
                self._n_passed = 0
            self._without.drop(client)
        elif client not in self._without:
            self._tick += 1
            self._without.put(client, self._tick)
        if client.by_priority:
            head = client.by_priority.first()
            self._by_rank.put(client, client.n_running, client.n_turns - head.priority, head.arrival)
            self._by_turns.put(client, client.n_turns, head.arrival)
            return
        self._by_rank.drop(client)
        self._by_turns.drop(client)
        if not client.n_running:
            del self._clients[client.name]


def share_out(wanted: dict[str, int], budget: int) -> dict[str, int]:
    """How many of `budget` tokens each client gets that wants some: the same for all, save for who wants less.

    Args:
        wanted: tokens by client, all above 0.
    """
    shares: dict[str, int] = {}
    for n_before, (client, n) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        # Rounded up, so that even of a small budget the smallest wish gets on.
        shares[client] = min(n, -(-budget // (len(wanted) - n_before)))
        budget -= shares[client]
    return shares
