"""Who a chat talks to: a model of this node, or one of another node on the broker. Knows no widget.

Both look alike to the chat: a name, a state, a place to send a question; what differs is who can be waited for and what
helps when something goes wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from infsvc.errors import (
    ContextLengthExceeded,
    Draining,
    EngineFailed,
    InfsvcError,
    ModelNotLoaded,
    NodeLost,
    QueueFull,
)
from infsvc.types import ModelState, ServiceDocument
from tui.node_view import GenerationView, NodeView, WorkerView, ready_first
from tui.wording import Shown, clean, far_state, state_of

OTHER_MODEL = "Ctrl+O chooses another model."


class Partner(ABC):
    """One of them, as it is now.

    Attributes:
        model, node: which; `node` is None for this node's own.
    """

    def __init__(self, model: str, node: str | None) -> None:
        self.model, self.node = model, node

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called on the screen, and `clean`."""

    @property
    @abstractmethod
    def shown(self) -> Shown:
        """Its state in a glyph and a word."""

    @property
    @abstractmethod
    def state(self) -> ModelState:
        """`FAILED` where waiting does not help."""

    @property
    @abstractmethod
    def n_ctx(self) -> int:
        """The tokens of one conversation, 0 while unknown."""

    @property
    @abstractmethod
    def asked(self) -> bool:
        """Whether somebody has asked for it, so that a state of rest passes by itself."""

    @abstractmethod
    def greeting(self) -> str:
        """What stands in a conversation before anything was said."""

    @abstractmethod
    def unready(self) -> InfsvcError:
        """Why it cannot be waited for."""

    @abstractmethod
    async def load(self) -> None:
        """Makes it ready; raises `InfsvcError`."""

    @abstractmethod
    async def submit(self, request: Any) -> GenerationView:
        """Asks it; raises `InfsvcError`, as reading the answer does."""

    @abstractmethod
    def advice(self, error: InfsvcError) -> str:
        """The error as a sentence for somebody who chats: what happened and which key helps."""


def partners(node: NodeView) -> list[tuple[Partner, Shown]]:
    """All that can be talked to, and their states: this node's, those that answer soonest first, then those of other
    nodes."""
    own = [OwnModel(node, worker) for worker in ready_first(node.fleet.workers.values())]
    return [
        *((each, each.shown) for each in own),
        # The state as it stands in this list: asking each for its own would read the whole book for each.
        *(
            (FarModel(node, each.model_name, each.node), far_state(each))
            for each in node.far_chat.models()
            if each.status in ("online", "loading", "draining")
        ),
    ]


class OwnModel(Partner):
    """A model of this node."""

    def __init__(self, node: NodeView, worker: WorkerView) -> None:
        super().__init__(worker.name, None)
        self._node, self._worker = node, worker

    @property
    def name(self) -> str:
        return clean(self.model)

    @property
    def shown(self) -> Shown:
        return state_of(self._worker)

    @property
    def state(self) -> ModelState:
        return self._worker.state

    @property
    def n_ctx(self) -> int:
        return self._worker.n_ctx

    @property
    def asked(self) -> bool:
        return self._worker.asked

    def greeting(self) -> str:
        worker, name = self._worker, self.name
        if worker.state is ModelState.READY:
            return f"{name} is ready. Enter sends, Esc stops an answer, Ctrl+O chooses another model."
        if worker.state is ModelState.FAILED:
            return f"{name} failed: {clean(worker.reason or '')}\n{OTHER_MODEL}"
        if worker.state is ModelState.ABSENT:
            return f"{name} has no file on this machine. {OTHER_MODEL}"
        if worker.state is ModelState.ON_DISK and not worker.asked:
            return f"{name} is on disk: the first question loads it."
        return f"{name} is being made ready. Write already: what you send waits for it."

    def unready(self) -> InfsvcError:
        return ModelNotLoaded(self.model, self._worker.state.value, self._worker.reason)

    async def load(self) -> None:
        await self._node.load(self.model)

    async def submit(self, request: Any) -> GenerationView:
        return await self._node.service.submit(request)

    def advice(self, error: InfsvcError) -> str:
        name = self.model
        match error:
            case ContextLengthExceeded():
                return (
                    f"This conversation has {error.n_prompt_tokens:,} tokens and {name} holds {error.n_ctx:,}. "
                    "Nothing was cut: Ctrl+L begins a new conversation, ↑ brings the question back."
                )
            case QueueFull():
                full = f"{name} has {error.n_waiting:,} requests waiting and takes no more"
                return f"{full}: Ctrl+R tries again, best in {error.retry_after_s} s."
            case ModelNotLoaded():
                told = self._worker.reason or f"it is {error.state.replace('_', ' ')}"
                return f"{name} cannot answer: {told}. {OTHER_MODEL[:-1]}; on Fleet, l loads this one."
            case Draining():
                return f"The node is shutting down: {error}."
            case EngineFailed():
                return f"{name}'s engine failed: {error}. Ctrl+R tries again; the log (F5) has its last words."
            case _:
                return f"{error}. Ctrl+R tries again."


class FarModel(Partner):
    """A model of another node. That node owns it: it cannot be loaded from here, but waited for while it loads."""

    def __init__(self, node: NodeView, model: str, host: str) -> None:
        super().__init__(model, host)
        self._node, self._host = node, host

    @property
    def _service(self) -> ServiceDocument | None:
        return self._node.far_chat.find(self.model, self._host)

    @property
    def asked(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return clean(f"{self.model} @{self._host}")

    @property
    def shown(self) -> Shown:
        service = self._service
        return far_state(service) if service is not None else Shown("○", "gone", "muted")

    @property
    def state(self) -> ModelState:
        service = self._service
        told = service.status if service is not None else ""
        known = {"online": ModelState.READY, "loading": ModelState.LOADING, "draining": ModelState.DRAINING}
        return known.get(told, ModelState.FAILED)

    @property
    def n_ctx(self) -> int:
        info = service.model_info if (service := self._service) is not None else None
        return info.context_size if info is not None else 0

    def greeting(self) -> str:
        name, state = self.name, self.state
        if state is ModelState.READY:
            return f"{name} runs on another node, which answers. Enter sends, Esc stops an answer, {OTHER_MODEL}"
        if state is ModelState.LOADING:
            return f"{name} is being made ready by its node. Write already: what you send waits for it."
        return f"{name} cannot be reached: {clean(self._why())}. {OTHER_MODEL}"

    def _why(self) -> str:
        service = self._service
        if service is None:
            return f"{self._host} is not heard of any more"
        return service.reason or f"it is {service.status} there"

    def unready(self) -> InfsvcError:
        if self._service is None:
            return NodeLost(self._host, "is not there any more")
        return ModelNotLoaded(self.model, self._service.status, self._why())

    async def load(self) -> None:
        raise self.unready()

    async def submit(self, request: Any) -> GenerationView:
        return self._node.far_chat.submit(request, self._host)

    def advice(self, error: InfsvcError) -> str:
        told = str(error).removesuffix(": ask again")
        match error:
            case NodeLost():
                return f"{told}. Ctrl+R asks again; {OTHER_MODEL}"
            case ContextLengthExceeded():
                return f"{told}. Nothing was cut: Ctrl+L begins a new conversation, ↑ brings the question back."
            case QueueFull():
                full = f"{self.name} has {error.n_waiting:,} requests waiting and takes no more"
                return f"{full}: Ctrl+R tries again, best in {error.retry_after_s} s."
            case ModelNotLoaded():
                return f"{self.name} cannot answer: {self._why()}. {OTHER_MODEL}"
            case Draining():
                return f"{self._host} is shutting down. {OTHER_MODEL}"
            case EngineFailed():
                return (
                    f"{self.name}'s engine failed: {told}. Ctrl+R tries again; {self._host}'s log has its last words."
                )
            case _:
                return f"{told}. Ctrl+R tries again."
