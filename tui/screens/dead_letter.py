"""One dead letter in a box: what went wrong, and the request's whole body."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from functools import partial
from typing import ClassVar

from rich.cells import chop_cells
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Log, Static
from textual.worker import Worker

from infsvc.errors import InfsvcError
from tui.context import Context
from tui.messages import DeletionRequested, ReplayRequested
from tui.node_view import DeadHeadView
from tui.screens.base import Dialog
from tui.wording import clean, hang, size

_LINES_AT_ONCE = 2_000


class DeadLetterDetail(Dialog[ReplayRequested | DeletionRequested | None]):
    """Answers what is to be done with the letter, or None."""

    HEADING = "Dead letter"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "replay", "replay", id="letter.replay", tooltip="Put it back into its queue"),
        Binding("x", "delete", "delete", id="letter.delete", tooltip="Forget it; asks"),
    ]

    def __init__(self, context: Context, head: DeadHeadView) -> None:
        super().__init__()
        self._shared, self._head = context, head
        self._text: str | None = None
        self._subject = ""
        self._width = 0

    def compose_box(self) -> ComposeResult:
        yield Static("", id="facts")
        yield Log(id="body", auto_scroll=False)
        hint = Content.assemble(("r", "$accent bold"), " replay  ", ("x", "$accent bold"), " delete  ",
                                ("esc", "$accent bold"), " close")  # fmt: skip
        yield Static(hint, classes="hint")

    def on_mount(self) -> None:
        self.query_one(".box").border_title = f"Dead letter {self._head.id}"
        self.query_one(Log).focus()
        _: Worker[None] = self.run_worker(
            self._fetch, name="letter", group="letter", thread=False, exclusive=True, exit_on_error=True
        )

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._fill)

    async def _fetch(self) -> None:
        try:
            letter = await self._shared.node.durable.dead.letter(self._head.id)
        except InfsvcError as error:
            self._text = str(error)
        else:
            body = letter.wire()["body"]
            self._subject = letter.subject
            # The screen's own words must not be mistaken for the body's, so an empty one is said.
            self._text = json.dumps(body, indent=2, ensure_ascii=False) if isinstance(body, dict) else str(body)
            self._text = self._text or "the message is gone: only its reason was kept"
        self._fill()

    def _fill(self) -> None:
        facts, head = self.query_one("#facts", Static), self._head
        died = datetime.fromtimestamp(head.died_ts, self._shared.clock().tzinfo).strftime("%Y-%m-%d %H:%M:%S")
        width = facts.content_size.width or 72
        rows = [("reason", head.reason, "$error"), ("req_id", head.req_id or "–", ""), ("model", head.model, "")]
        rows += [
            ("died", f"{died}, after {head.n_delivered} {'delivery' if head.n_delivered == 1 else 'deliveries'}", "")
        ]
        rows += [("body", f"{size(head.n_bytes)}  {self._subject}" if head.n_bytes >= 2**16
                  else f"{head.n_bytes:,} bytes  {self._subject}", "")]  # fmt: skip
        facts.update(
            Content("\n").join(
                Content.assemble((f"{key:<8}", "$muted"), (hang(clean(told), 8, width), tone))
                for key, told, tone in rows
            )
        )
        view = self.query_one(Log)
        width = view.scrollable_content_region.width
        if self._text is not None and width and width != self._width:
            self._width = width
            _: Worker[None] = self.run_worker(
                partial(self._write, width), name="body", group="body", thread=False, exclusive=True, exit_on_error=True
            )

    async def _write(self, width: int) -> None:
        """Writes the body, wrapped; a large one in pieces, so that the keys go on."""
        view = self.query_one(Log)
        view.clear()
        lines: list[str] = []
        for line in clean(self._text or "").split("\n"):
            # By cells only where that differs: a line may be megabytes long.
            pieces = (
                [line[at : at + width] for at in range(0, len(line), width)] or [""]
                if line.isascii()
                else chop_cells(line, width) or [""]
            )
            for piece in pieces:
                lines.append(piece)
                if len(lines) >= _LINES_AT_ONCE:
                    view.write_lines(lines)
                    lines = []
                    await asyncio.sleep(0)
        view.write_lines(lines)

    def action_replay(self) -> None:
        self.dismiss(ReplayRequested(self._head.id))

    def action_delete(self) -> None:
        self.dismiss(DeletionRequested(self._head.id))
