"""The form of a new worker file: a name, where the model comes from, a port and a context; checked by the settings'
own types."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Label, Static

from infsvc.errors import ConfigError
from tui.node_view import NodeView
from tui.screens.base import Dialog
from tui.wording import clean

_FIRST_PORT = 5781
# Field → key of the worker file, label, hint.
_FIELDS = (
    ("name", "MODEL_NAME", "name", "letters, digits, dots, dashes"),
    ("repo", "MODEL_REPO", "repository", "owner/name, with the file below"),
    ("file", "MODEL_FILE", "file in it", "model-Q4_K_M.gguf"),
    ("url", "MODEL_URL", "or an address", "https://…"),
    ("path", "MODEL_PATH", "or a path", "of a file on this machine"),
    ("port", "HTTP_ADDR", "port", "empty: the gateway only"),
    ("ctx", "CTX_SIZE", "context", "tokens of a sequence; 0: the model's own"),
)


class NewWorkerDialog(Dialog[str | None]):
    """Writes the file and answers the new model's name, or None."""

    HEADING = "New worker"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "write", id="new.write", tooltip="Write the worker file", priority=True),
    ]

    def __init__(self, node: NodeView, *, blink: bool) -> None:
        super().__init__()
        self._node, self._blink = node, blink

    def compose_box(self) -> ComposeResult:
        given = {"port": str(self._free_port()), "ctx": "4096"}
        with VerticalScroll():
            for field, _, label, hint in _FIELDS:
                with Horizontal(classes="row"):
                    yield Label(label)
                    yield Input(given.get(field, ""), placeholder=hint, id=field, compact=True)
        yield Static("", classes="problem")
        yield Static(Content("enter or ctrl+s writes it · tab moves on · esc closes"), classes="hint")

    def on_mount(self) -> None:
        for field in self.query(Input):
            field.cursor_blink = self._blink
        self.query_one("#name").focus()

    def _free_port(self) -> int:
        """A port that no worker file names."""
        taken = {
            worker.settings.address.port for worker in self._node.fleet.workers.values() if worker.settings.address
        }
        return next(port for port in range(_FIRST_PORT, 2**16) if port not in taken)

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        await self.action_save()

    async def action_save(self) -> None:
        """Closes with the new model's name, or says what is wrong with the first bad field."""
        values = self._values()
        if not values["MODEL_NAME"]:
            self._refuse("MODEL_NAME", "it needs a name")
            return
        sources = [key for key in ("MODEL_REPO", "MODEL_URL", "MODEL_PATH") if values[key]]
        if len(sources) != 1 and not (values["MODEL_FILE"] and not sources):
            told = "name one source: a repository and its file, an address, or a path"
            self._refuse(sources[-1] if sources else "MODEL_REPO", told)
            return
        try:
            worker = await self._node.add_worker(values)
        except ConfigError as error:
            self._refuse(error.key or "", str(error))
            return
        self.dismiss(worker.name)

    def _values(self) -> dict[str, str]:
        """What stands in the form, in the worker file's own words."""
        values = {key: self.query_one(f"#{field}", Input).value.strip() for field, key, *_ in _FIELDS}
        if values["MODEL_PATH"]:
            values["MODEL_PATH"] = str(Path(values["MODEL_PATH"]).expanduser())
        if values["HTTP_ADDR"].isdigit():
            values["HTTP_ADDR"] = f":{values['HTTP_ADDR']}"
        return values

    def _refuse(self, key: str, problem: str) -> None:
        self.query_one(".problem", Static).update(Content(clean(problem)))
        for field, name, *_ in _FIELDS:
            if name == key.upper():
                self.query_one(f"#{field}").focus()
