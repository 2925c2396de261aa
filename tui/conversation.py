"""A conversation with one model: what was said, and which of it goes with the next question. Knows no widget.

An exchange that ended in an error is shown but not repeated to the model; an answer that was stopped is kept as far as
it came.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from infsvc.types import Message, Params


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How the chat asks. Temperature and max_tokens default to the wire's defaults."""

    temperature: float = 0.7
    max_tokens: int = 512
    seed: int | None = None
    system: str = ""
    think: bool = False

    def params(self) -> Params:
        return Params(temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed)


@dataclass
class Exchange:
    """One question and its answer; `answer` is None until it has ended well or was stopped."""

    question: str
    answer: str | None = None


@dataclass
class Conversation:
    exchanges: list[Exchange] = field(default_factory=list)

    def ask(self, question: str) -> Exchange:
        """Adds a question that is to be answered."""
        exchange = Exchange(question)
        self.exchanges.append(exchange)
        return exchange

    def messages(self, settings: ChatSettings) -> tuple[Message, ...]:
        """What the model is given for the last question."""
        messages = [Message(role="system", content=settings.system)] if settings.system.strip() else []
        *earlier, last = self.exchanges
        for exchange in earlier:
            if exchange.answer is not None:
                messages.append(Message(role="user", content=exchange.question))
                messages.append(Message(role="assistant", content=exchange.answer))
        messages.append(Message(role="user", content=last.question))
        return tuple(messages)

    def forget(self) -> None:
        """Begins anew."""
        self.exchanges.clear()
