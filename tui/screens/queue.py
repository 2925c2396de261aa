"""Screen 6, Queue: each model's durable queue as the broker has it, and the dead letters; replay, delete, purge.

The broker is asked when an event says that something has changed, and only while the screen is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static
from textual.worker import Worker

from infsvc.errors import InfsvcError, QueueUnavailable
from infsvc.events import BrokerStateChanged, DeadLettersChanged, Event, ModelStateChanged, QueueReported
from tui.context import Context
from tui.dead_list import SORTS, DeadList
from tui.messages import DeletionRequested, ReplayRequested, RowHighlighted, RowOpened
from tui.node_view import DeadHeadView
from tui.screens.dead_letter import DeadLetterDetail
from tui.screens.dialogs import Question
from tui.screens.list_screen import ListScreen
from tui.widgets.row_list import Cell, Column, RowList
from tui.wording import clean, plural, time_left

Queue = dict[str, Any]
"""A model's queue as `/api/queue` shows it."""

_PAUSE_S = 0.3
"""The broker is asked at most this often, however much happens."""
_AT_ONCE = 32
_NARROW, _WIDE = 60, 110


def queue_columns(width: int) -> list[Column]:
    """The columns of the queues' list that fit."""
    model = Column("model", "model", 10 if width < _NARROW else 18, grows=True)
    figures = [Column("waiting", "wait", 6, right=True), Column("taken", "work", 5, right=True)]
    dead = Column("dead", "dead", 6, right=True)
    if width < _NARROW:
        return [model, *figures, dead]
    shown = [model, Column("state", "state", 8), *figures, Column("oldest", "oldest", 7, right=True)]
    shown += [Column("again", "again", 6, right=True), Column("cap", "cap", 7, right=True)]
    if width >= _WIDE:
        shown += [Column("in work", "at work", 8, right=True), Column("age", "max age", 8, right=True)]
        shown += [Column("deliver", "deliveries", 10, right=True), Column("spooled", "spool", 8, right=True)]
    return [*shown, dead]


def letter_columns(width: int) -> list[Column]:
    """The columns of the dead letters' list that fit."""
    died = Column("died", "died", 11 if width >= _NARROW else 5)
    if width < _NARROW:
        return [died, Column("model", "model", 10), Column("reason", "reason", 8, grows=True)]
    wide = width >= _WIDE
    shown = [died, Column("model", "model", 18 if wide else 14), Column("req_id", "req_id", 26 if wide else 14)]
    return [*shown, Column("tries", "tries", 5, right=True), Column("reason", "reason", 12, grows=True)]


class QueueScreen(ListScreen):
    NAME = "queue"
    CSS_PATH = "queue.tcss"
    SORTS = SORTS
    FILTER_HINT = "model, req_id or reason of a dead letter"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "detail", id="queue.detail", tooltip="The whole dead letter: its body and the reason"),
        Binding("r", "replay", "replay", id="queue.replay", tooltip="Put the dead letter back into its queue"),
        Binding("x", "delete", "delete", id="queue.delete", tooltip="Forget the dead letter; asks"),
        Binding("slash", "filter", "filter", key_display="/", id="queue.filter", tooltip="Filter the dead letters"),
        Binding("tab", "other", "queues", id="queue.other", tooltip="Between the queues and the dead letters"),
        Binding("p", "purge", "purge", id="queue.purge",
                tooltip="Remove what waits in the queue under the cursor; each caller is told; asks"),
        Binding("R", "replay_all", "replay all", key_display="R", id="queue.replay_all",
                tooltip="Replay every letter that the filter shows, oldest first; asks"),
        Binding("X", "delete_all", "delete all", key_display="X", id="queue.delete_all",
                tooltip="Forget every letter that the filter shows; asks"),
        Binding("s", "sort", "sort", id="queue.sort", tooltip="Newest, oldest, model, reason, tries in turn"),
        Binding("escape", "back", "back", show=False, id="queue.back",
                tooltip="Stop a replay or deletion of many, else close the filter"),
    ]  # fmt: skip

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._dead = DeadList(self.node.durable.dead)
        self._queues: list[Queue] = []
        self._queues_stale = self._letters_stale = True
        self._news = asyncio.Event()
        self._changed = True
        self._was_asked = False
        self._doing = ""
        self._stopped = False
        self.node.events.listen(self._hear)

    def compose_body(self) -> ComposeResult:
        queues: RowList[Queue] = RowList(
            queue_columns, key=lambda queue: queue["model"], cells=self._queue_cells, id="queues"
        )
        letters: RowList[DeadHeadView] = RowList(
            letter_columns, key=lambda head: head.id, cells=self._letter_cells, id="letters"
        )
        with Vertical(id="queue-box") as box:
            box.border_title = "Queues"
            yield queues
            yield Static("", id="caps")
        with Vertical(id="dead-box", classes="list") as box:
            box.border_title = "Dead letters"
            yield letters
            yield from self.empty_line()
        yield from self.filter_line()

    def on_mount(self) -> None:
        _: Worker[None] = self.run_worker(
            self._follow, name="queue-follow", group="queue-follow", thread=False, exclusive=True, exit_on_error=True
        )

    def on_screen_resume(self) -> None:
        # What happened while nobody looked is read now.
        self._queues_stale = self._letters_stale = True
        self._news.set()

    @property
    def queues(self) -> RowList[Queue]:
        return self.query_one("#queues", RowList)

    @property
    def letters(self) -> RowList[DeadHeadView]:
        return self.query_one("#letters", RowList)

    @property
    def listing(self) -> DeadList:
        return self._dead

    def focus_list(self) -> None:
        self.letters.focus()

    # What the broker says.

    def _hear(self, event: Event) -> None:
        """Called inline by the bus."""
        if isinstance(event, DeadLettersChanged | BrokerStateChanged):
            self._letters_stale = True
        if isinstance(event, DeadLettersChanged | BrokerStateChanged | QueueReported | ModelStateChanged):
            self._queues_stale = True
            self._news.set()

    async def _follow(self) -> None:
        """Asks the broker after news, for as long as the app lives."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self.app.current_mode != self.NAME:
                continue
            if self._queues_stale:
                self._queues_stale = False
                self._queues = await self.node.queue_desk.overview()
                self._was_asked = self._changed = True
                self.look()
            if self._letters_stale:
                self._letters_stale = False
                await self._read_letters()
            self._changed = True
            self.look()
            await asyncio.sleep(_PAUSE_S)

    async def _read_letters(self) -> None:
        try:
            await self._dead.read()
        except QueueUnavailable as error:
            self._dead.problem = str(error)
        else:
            self._dead.problem = None

    @property
    def _is_down(self) -> bool:
        return self.node.bus.state.status != "connected"

    def look(self) -> None:
        if self._changed:
            self._changed = False
            self.queues.show(self._queues)
            self.letters.show(self._dead.shown)
            # A row a queue and the heading; never more than a quarter of the screen.
            self.queues.styles.height = max(2, min(len(self._queues) + 1, self.size.height // 4))
        self._show_caps()
        self.say_when_empty()
        self.tell_totals()

    def _show_caps(self) -> None:
        self.query_one("#caps", Static).update(self._caps(), layout=False)

    def _caps(self) -> Content:
        """What bounds the queue under the cursor, or why it takes nothing."""
        if self._is_down:
            state = self.node.bus.state
            told = f"The broker is {state.status}" + (f": {state.reason}" if state.reason else "")
            return Content.styled(f"✕ {clean(told)}. What waits is kept.", "$error")
        queue = self.queues.chosen
        if queue is None:
            told = (
                "no model is loaded: a queue is served while its model is" if self._was_asked else "asking the broker…"
            )
            return Content.styled(told, "$muted")
        if not queue["durable"]:
            return Content.styled(f"✕ {queue['model']}: {clean(str(queue.get('reason', '')))}", "$error")
        if queue.get("foreign_streams"):
            names = ", ".join(queue["foreign_streams"])
            return Content.styled(f"▲ the stream {clean(names)} answers callers with a receipt", "$warning")
        parts = [f"{clean(queue['model'])}: at most {queue['capacity']:,} wait", f"{queue['max_ack_pending']} at work"]
        parts += [f"{queue['max_deliver']} deliveries", time_left(queue["max_age_s"])]
        return Content.styled(", ".join(parts), "$muted")

    def empty_words(self) -> str:
        dead = self._dead
        if dead.shown:
            return ""
        if self._is_down and not dead.was_read:
            return "The broker cannot be asked now.\n\nDead letters are kept there and will be listed when it is back."
        if dead.problem:
            return f"The dead letters cannot be read: {clean(dead.problem)}"
        off = next((queue for queue in self._queues if not queue["durable"]), None)
        if off is not None and not dead.was_read:
            return f"There is no durable queue: {clean(str(off.get('reason', '')))}"
        if not dead.was_read:
            return "The dead letters are being read…"
        if dead.filter_text:
            return f"Nothing matches “{dead.filter_text}”.\n\nEsc shows all dead letters again."
        return "There is no dead letter.\n\nA request that could not be answered is kept here, with the reason."

    def tell_totals(self) -> None:
        dead = self._dead
        parts = [self._doing] if self._doing else []
        if dead.filter_text:
            parts.append(f"{len(dead.shown):,}/{len(dead):,} match “{dead.filter_text}”")
        elif dead.was_read:
            parts.append(f"{len(dead):,} dead")
        if dead.sort_by != SORTS[0]:
            parts.append(f"by {dead.sort_by}")
        if dead.was_read and (self._is_down or dead.problem):
            parts.append("as last seen")
        self.tell(" · ".join(parts))

    # How a row reads.

    def _queue_cells(self, queue: Queue) -> dict[str, Cell]:
        n_dead = self._dead.per_model().get(queue["model"], 0)
        works = queue["durable"] and not self._is_down
        state = ("● on", "success") if works else ("✕ down", "error") if self._is_down else ("✕ off", "error")

        def figure(key: str) -> Cell:
            n = queue.get(key)
            return ("–", "muted") if n is None else (f"{n:,}", "foreground" if n else "muted")

        return {
            "model": (clean(queue["model"]), "foreground"),
            "state": state,
            "waiting": figure("waiting"),
            "taken": figure("taken"),
            "oldest": ("–", "muted") if queue.get("oldest_s") is None else (time_left(queue["oldest_s"]), "foreground"),
            "again": figure("redelivered"),
            "cap": (f"{queue['capacity']:,}", "muted"),
            "in work": (f"≤ {queue['max_ack_pending']:,}", "muted"),
            "age": (time_left(queue["max_age_s"]), "muted"),
            "deliver": (f"≤ {queue['max_deliver']:,}", "muted"),
            "spooled": figure("spooled"),
            "dead": (f"{n_dead:,}", "error" if n_dead else "muted"),
        }

    def _letter_cells(self, head: DeadHeadView) -> dict[str, Cell]:
        died = datetime.fromtimestamp(head.died_ts, self.context.clock().tzinfo)
        today = died.date() == self.context.clock().date()
        if self.size.width < _NARROW:
            at = died.strftime("%H:%M" if today else "%m-%d")
        else:
            at = died.strftime("%H:%M:%S" if today else "%m-%d %H:%M")
        return {
            "died": (at, "muted"),
            "model": (clean(head.model), "foreground"),
            "req_id": (clean(head.req_id) if head.req_id else "–", "foreground" if head.req_id else "muted"),
            "tries": (f"{head.n_delivered}", "foreground"),
            "reason": (" ".join(clean(head.reason).split()), "error"),
        }

    # Keys.

    def on_row_highlighted(self, message: RowHighlighted) -> None:
        message.stop()
        self._show_caps()

    def on_row_opened(self, message: RowOpened) -> None:
        message.stop()
        self.action_open()

    def on_input_changed(self, event: Any) -> None:
        # After the common handler has narrowed the list.
        self.call_later(self._reshow)

    def _reshow(self) -> None:
        self._changed = True
        self.look()

    def _show_letters_of_chosen(self) -> None:
        """Enter on a queue narrows the letters to that model's."""
        queue = self.queues.chosen
        if queue is not None:
            self.action_filter()
            self.query_one("#filter").value = queue["model"]  # type: ignore[attr-defined]

    def action_other(self) -> None:
        (self.letters if self.queues.has_focus else self.queues).focus()

    def action_sort(self) -> None:
        super().action_sort()
        self._reshow()

    def action_back(self) -> None:
        if self._doing:
            self._stopped = True
        else:
            super().action_back()

    def action_open(self) -> None:
        head = self.letters.chosen
        if self.queues.has_focus:
            self._show_letters_of_chosen()
        elif head is not None:
            self.app.push_screen(DeadLetterDetail(self.context, head), self._after_detail)

    def _after_detail(self, asked: ReplayRequested | DeletionRequested | None) -> None:
        if isinstance(asked, ReplayRequested):
            self._replay([asked.number])
        elif isinstance(asked, DeletionRequested):
            self._ask_to_delete([asked.number])

    def action_replay(self) -> None:
        if head := self.letters.chosen:
            self._replay([head.id])

    def action_delete(self) -> None:
        if head := self.letters.chosen:
            self._ask_to_delete([head.id])

    def action_replay_all(self) -> None:
        numbers = sorted(head.id for head in self._dead.shown)
        if numbers:
            told = f"Put {self._which(len(numbers))} back into {'its queue' if len(numbers) == 1 else 'their queues'}?"
            self._sure(told, "replay", lambda: self._replay(numbers))

    def action_delete_all(self) -> None:
        numbers = [head.id for head in self._dead.shown]
        if numbers:
            self._ask_to_delete(numbers)

    def _ask_to_delete(self, numbers: Sequence[int]) -> None:
        told = f"Forget {self._which(len(numbers))}? Nobody can replay what is forgotten."
        self._sure(told, "delete", lambda: self._delete(numbers))

    def _which(self, n: int) -> str:
        matching = f" that match “{self._dead.filter_text}”" if self._dead.filter_text and n > 1 else ""
        return f"{'this' if n == 1 else 'all'} {plural(n, 'dead letter')}".replace("this 1 ", "this ") + matching

    def action_purge(self) -> None:
        queue = self.queues.chosen
        if queue is None:
            self.notify("No model is loaded, so no queue is served here.", severity="warning")
            return
        model, n = queue["model"], queue.get("waiting")
        told = f"{plural(n, 'request')} that wait" if n is not None else "what waits"
        question = f"Remove {told} in the queue of {clean(model)}? Each caller is told; what is at work goes on."
        self._sure(question, "purge", lambda: self._begin(self._purge(model), "purging"))

    def _sure(self, question: str, yes: str, then: Callable[[], None]) -> None:
        def decide(answer: bool | None) -> None:
            if answer:
                then()

        self.app.push_screen(Question(question, yes), decide)

    # What is done.

    def _begin(self, work: Awaitable[None], doing: str) -> None:
        self._doing, self._stopped = doing, False

        async def run() -> None:
            try:
                await work
            except InfsvcError as error:
                self.notify(clean(str(error)), title="Not done", severity="error", timeout=8, markup=False)
            finally:
                self._doing = ""
                self._queues_stale = self._letters_stale = True
                self._dead.rebuild()
                self._news.set()

        _: Worker[None] = self.run_worker(
            run, name="queue-work", group="queue-work", thread=False, exclusive=False, exit_on_error=True
        )

    def _may_begin(self) -> bool:
        if self._doing:
            self.notify(f"{self._doing}: Esc stops that first.", severity="warning", markup=False)
        return not self._doing

    def _replay(self, numbers: Sequence[int]) -> None:
        if self._may_begin():
            self._begin(self._replay_each(numbers), "replaying")

    def _delete(self, numbers: Sequence[int]) -> None:
        if self._may_begin():
            self._begin(self._delete_each(numbers), "deleting")

    async def _replay_each(self, numbers: Sequence[int]) -> None:
        """One after another, so that their order stays; a full queue ends it."""
        dead, n_done = self.node.durable.dead, 0
        try:
            for number in numbers:
                if self._stopped:
                    break
                await dead.replay(number)
                self._dead.forget(number)
                n_done += 1
                self._progress("replaying", n_done, len(numbers))
        finally:
            self._say_done(n_done, len(numbers), "back in the queue")

    async def _delete_each(self, numbers: Sequence[int]) -> None:
        dead, n_done = self.node.durable.dead, 0

        async def delete(number: int) -> None:
            nonlocal n_done
            await dead.delete(number)
            self._dead.forget(number)
            n_done += 1

        try:
            for start in range(0, len(numbers), _AT_ONCE):
                if self._stopped:
                    break
                await asyncio.gather(*(delete(number) for number in numbers[start : start + _AT_ONCE]))
                self._progress("deleting", n_done, len(numbers))
        finally:
            self._say_done(n_done, len(numbers), "forgotten")

    def _progress(self, doing: str, n_done: int, n: int) -> None:
        if n > 1:
            self._doing = f"{doing} {n_done:,}/{n:,}"

    def _say_done(self, n_done: int, n: int, what: str) -> None:
        of = f" of {n:,}" if n_done < n else ""
        self.notify(f"{n_done:,}{of} {what}", markup=False, severity="warning" if of else "information")

    async def _purge(self, model: str) -> None:
        n = await self.node.queue_desk.purge(model)
        self.notify(f"{plural(n, 'request')} removed from the queue of {clean(model)}", markup=False)
