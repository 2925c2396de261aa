"""Every message that crosses from one widget or screen to another.

A later one replaces an earlier one that was not read yet, where only the last counts.
"""

from __future__ import annotations

from textual.message import Message


class ModelHighlighted(Message):
    """The matrix' cursor stands on another model, or on none."""

    def __init__(self, model: str | None) -> None:
        super().__init__()
        self.model = model

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, ModelHighlighted)


class DetailRequested(Message):
    """Show everything known of one model."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


class LoadRequested(Message):
    """Make a model ready."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


class UnloadRequested(Message):
    """Drain a model and free it; asks first when it is at work."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


class PullRequested(Message):
    """Fetch a model's file."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


class RemoveRequested(Message):
    """Remove a model's file; asks first."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model


class NewWorkerRequested(Message):
    """Fill in the form of a new worker file."""


class ChatRequested(Message):
    """Go to the chat with this model, of this node or of `host`."""

    def __init__(self, model: str, host: str | None = None) -> None:
        super().__init__()
        self.model, self.host = model, host


class RowHighlighted(Message):
    """A list's cursor stands on another row, or on none."""

    def __init__(self, list_id: str) -> None:
        super().__init__()
        self.list_id = list_id


class RowOpened(Message):
    """A second click on a list's row."""

    def __init__(self, list_id: str) -> None:
        super().__init__()
        self.list_id = list_id


class ReplayRequested(Message):
    """Put a dead letter back into its queue."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class DeletionRequested(Message):
    """Forget a dead letter; asks first."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class PromptSubmitted(Message):
    """The user sent what stands in the chat's input."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class TranscriptScrolled(Message):
    """The chat's input passes a page key on to the transcript: `direction` is -1 or 1."""

    def __init__(self, direction: int) -> None:
        super().__init__()
        self.direction = direction
