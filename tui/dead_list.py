"""The dead letters as the Queue screen lists them: read in batches, narrowed by a text, in one of some orders.

Only heads are held, some hundred bytes each; a body is fetched when it is looked at. No widget knows of the broker, and
this knows of no widget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tui.node_view import DeadHeadView, DeadLettersView

SORTS = ("newest", "oldest", "model", "reason", "tries")
_ORDERS: dict[str, tuple[Callable[[DeadHeadView], Any], bool]] = {
    "newest": (lambda head: head.id, True),
    "oldest": (lambda head: head.id, False),
    "model": (lambda head: (head.model, -head.id), False),
    "reason": (lambda head: (head.reason, -head.id), False),
    "tries": (lambda head: (head.n_delivered, head.id), True),
}


class DeadList:
    """Loop thread only.

    Attributes:
        filter_text: what a letter's model, id or reason must contain.
        sort_by: one of `SORTS`.
        shown: what the filter lets through, in order; `rebuild()` makes it anew.
        problem: why the letters could not be read the last time, or None.
        was_read: whether they were read at all.
    """

    def __init__(self, dead: DeadLettersView) -> None:
        self._dead = dead
        self._heads: dict[int, DeadHeadView] = {}
        self.filter_text, self.sort_by = "", SORTS[0]
        self.shown: Sequence[DeadHeadView] = ()
        self.problem: str | None = None
        self.was_read = False

    def __len__(self) -> int:
        return len(self._heads)

    async def read(self) -> None:
        """Reads what has come; all anew when something has gone.

        Raises:
            QueueUnavailable: the broker cannot be asked; what is known stays.
        """
        heads = dict(self._heads)
        await self._read_behind(max(heads, default=0), heads)
        if await self._dead.count() < len(heads):
            heads = {}
            await self._read_behind(0, heads)
        self._heads, self.was_read = heads, True
        self.rebuild()

    async def _read_behind(self, number: int, heads: dict[int, DeadHeadView]) -> None:
        async for batch in self._dead.heads(after=number):
            heads.update((head.id, head) for head in batch)

    def forget(self, number: int) -> None:
        """A letter is gone; `rebuild()` takes it from what is shown."""
        self._heads.pop(number, None)

    def per_model(self) -> dict[str, int]:
        """How many letters each model has."""
        n: dict[str, int] = {}
        for head in self._heads.values():
            n[head.model] = n.get(head.model, 0) + 1
        return n

    def rebuild(self) -> None:
        wanted = self.filter_text.lower()
        shown = (
            [head for head in self._heads.values() if wanted in searched(head)] if wanted else [*self._heads.values()]
        )
        order, backwards = _ORDERS[self.sort_by]
        shown.sort(key=order, reverse=backwards)
        self.shown = shown


def searched(head: DeadHeadView) -> str:
    """What a filter looks into, in lower case."""
    return f"{head.model} {head.req_id or ''} {head.reason} #{head.id}".lower()
