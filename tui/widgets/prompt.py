"""The chat's input: Enter sends, a paste keeps its lines, up and down bring back what was sent before."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.widgets import TextArea

from tui.messages import PromptSubmitted, TranscriptScrolled

N_HISTORY = 200


class Prompt(TextArea):
    """Posts `PromptSubmitted`; keeps its text until told to `clear_sent`, so that a refused question is not lost."""

    # `on_key` takes it first; this tells the line of keys and the help.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "send", id="chat.send", tooltip="Send; Shift+Enter or Alt+Enter begins a new line"),
    ]
    DEFAULT_CSS = """
    Prompt {
        height: auto;
        min-height: 1;
        max-height: 6;
        border: none;
        padding: 0;
        background: $background;
        scrollbar-size-vertical: 1;
        &:focus { border: none; background-tint: $background 0%; }
        & > .text-area--placeholder { color: $muted; }
    }
    """

    def __init__(self, *, blink: bool) -> None:
        super().__init__(id="prompt", compact=True, highlight_cursor_line=False)
        self.cursor_blink = blink
        self._sent: list[str] = []
        self._at: int | None = None
        self._draft = ""

    def on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self.action_send()
        elif event.key in ("shift+enter", "alt+enter"):
            event.stop()
            event.prevent_default()
            self.insert("\n")

    def action_send(self) -> None:
        if self.text.strip():
            self.post_message(PromptSubmitted(self.text.strip("\n")))

    @property
    def _on_first_line(self) -> bool:
        return self.cursor_location[0] == 0 and self.navigator.is_first_wrapped_line(self.cursor_location)

    @property
    def _on_last_line(self) -> bool:
        at_end = self.cursor_location[0] == self.document.line_count - 1
        return at_end and self.navigator.is_last_wrapped_line(self.cursor_location)

    def clear_sent(self) -> None:
        """The text was taken: it goes into the history, and the input is empty."""
        self._sent = [*self._sent, self.text.strip("\n")][-N_HISTORY:]
        self._at, self._draft = None, ""
        self.text = ""

    def action_cursor_up(self, select: bool = False) -> None:
        if select or not self._on_first_line or not self._sent:
            super().action_cursor_up(select)
        elif self._at is None:
            self._draft = self.text
            self._recall(len(self._sent) - 1)
        else:
            self._recall(max(0, self._at - 1))

    def action_cursor_down(self, select: bool = False) -> None:
        if select or not self._on_last_line or self._at is None:
            super().action_cursor_down(select)
        elif self._at + 1 < len(self._sent):
            self._recall(self._at + 1)
        else:
            self._at, self.text = None, self._draft
            self.move_cursor(self.document.end)

    def _recall(self, index: int) -> None:
        self._at = index
        self.text = self._sent[index]
        self.move_cursor(self.document.end)

    def action_cursor_page_up(self) -> None:
        self.post_message(TranscriptScrolled(-1))

    def action_cursor_page_down(self) -> None:
        self.post_message(TranscriptScrolled(1))
