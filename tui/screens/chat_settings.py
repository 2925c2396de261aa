"""How the chat asks: temperature, length, seed, system prompt, thinking; checked by the wire's own types."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ValidationError
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Input, Label, Static, Switch, TextArea

from tui.conversation import ChatSettings
from tui.screens.base import Dialog


class ChatSettingsDialog(Dialog[ChatSettings | None]):
    """Answers the new settings, or None."""

    HEADING = "How to ask"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "ctrl+s", "save", "take", id="settings.take", tooltip="Use these from the next question on", priority=True
        ),
    ]

    def __init__(self, settings: ChatSettings, *, blink: bool) -> None:
        super().__init__()
        self._settings, self._blink = settings, blink

    def compose_box(self) -> ComposeResult:
        settings = self._settings
        fields = (
            ("temperature", f"{settings.temperature:g}", "0 to 2"),
            ("max_tokens", str(settings.max_tokens), "1 or more"),
            ("seed", "" if settings.seed is None else str(settings.seed), "empty: another each time"),
        )
        for name, value, hint in fields:
            with Horizontal(classes="row"):
                yield Label(name.replace("_", " "))
                yield Input(value, placeholder=hint, id=name, compact=True)
        with Horizontal(classes="row"):
            yield Label("think first")
            yield Switch(settings.think, id="think", animate=False)
        with Horizontal(classes="row"):
            yield Label("system prompt")
            yield TextArea(settings.system, id="system", compact=True)
        yield Static("", classes="problem")
        yield Static(Content("enter or ^s takes it · tab moves on · space switches · esc closes"), classes="hint")

    def on_mount(self) -> None:
        for field in self.query(Input):
            field.cursor_blink = self._blink
        self.query_one(TextArea).cursor_blink = self._blink
        self.query_one("#temperature").focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_save()

    def action_save(self) -> None:
        """Closes with the settings, or says what is wrong with the first bad field."""
        values: dict[str, Any] = {}
        for name, kind, empty in (("temperature", float, 0.7), ("max_tokens", int, 512), ("seed", int, None)):
            text = self.query_one(f"#{name}", Input).value.strip()
            try:
                values[name] = kind(text) if text else empty
            except ValueError:
                self._refuse(name, f"{name}: {text!r} is no number")
                return
        settings = ChatSettings(
            **values, think=self.query_one("#think", Switch).value, system=self.query_one("#system", TextArea).text
        )
        try:
            settings.params()
        except ValidationError as error:
            first = error.errors()[0]
            self._refuse(str(first["loc"][0]), f"{first['loc'][0]}: {first['msg'][:1].lower()}{first['msg'][1:]}")
            return
        self.dismiss(settings)

    def _refuse(self, name: str, problem: str) -> None:
        self.query_one(".problem", Static).update(Content(problem))
        self.query_one(f"#{name}").focus()
