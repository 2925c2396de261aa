"""What was said in a chat: questions, and answers as they stream in.

A small model yields a thousand tokens a second; an answer gathers what has come and shows it at most fifteen times a
second, so that the screen stays live beside full decoding.
"""

from __future__ import annotations

from collections.abc import Callable

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Collapsible, Markdown, Static
from textual.widgets.markdown import MarkdownStream

from tui.node_view import ChunkView, GenerationView
from tui.wording import clean, duration, gauge, rate

UPDATES_PER_S = 15


def figures(generation: GenerationView, n_ctx: int) -> str:
    """The line under an answer: `41 tok · 1,980 tok/s · first 4 ms · 112 cached · ctx ▓░░░░░░░ 9 %`."""
    parts = [f"{generation.tokens_out:,} tok"]
    if generation.tokens_per_s:
        parts.append(f"{rate(generation.tokens_per_s)} tok/s")
    if generation.ttft_ms is not None:
        parts.append(f"first {duration(generation.ttft_ms)}")
    if generation.reply and generation.reply.tokens_cached:
        parts.append(f"{generation.reply.tokens_cached:,} cached")
    if n_ctx:
        used = min(1.0, (generation.tokens_in + generation.tokens_out) / n_ctx)
        parts.append(f"ctx {gauge(used)} {max(1, round(used * 100))} %")
    return " · ".join(parts)


class QuestionTurn(Vertical):
    """What the user asked, as typed."""

    def __init__(self, text: str) -> None:
        super().__init__(classes="turn")
        self._text = text

    def compose(self) -> ComposeResult:
        yield Static("you", classes="speaker you")
        yield Static(Content(clean(self._text)), classes="said")


class AnswerTurn(Vertical):
    """A model's answer: what it waits for, its reasoning, its text, its figures or its error."""

    def __init__(self, model: str, monotonic: Callable[[], float]) -> None:
        super().__init__(classes="turn")
        self._model, self._monotonic = clean(model), monotonic
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._unshown = ""
        self._thinking_since: float | None = None
        self._thought_s: float | None = None
        self._n_shown_reasoning = 0
        self._stream: MarkdownStream | None = None
        self._timer: Timer | None = None
        self._generation: GenerationView | None = None
        self._n_ctx = 0

    def compose(self) -> ComposeResult:
        yield Static(Content(self._model), classes="speaker")
        yield Static("", classes="waiting")
        with Collapsible(title="thinking…", classes="thoughts"):
            yield Static("", classes="reasoning")
        yield Markdown("", classes="said", open_links=False)
        yield Static("", classes="foot")

    @property
    def text(self) -> str:
        """The answer as far as it has come."""
        return "".join(self._text)

    def wait(self, told: Content) -> None:
        """Says what is waited for, until the first chunk comes."""
        waiting = self.query_one(".waiting", Static)
        waiting.update(told)
        waiting.display = bool(told.plain)

    def follow(self, generation: GenerationView, n_ctx: int) -> None:
        """The request runs: chunks are to come."""
        self._generation, self._n_ctx = generation, n_ctx
        self.wait(Content("waiting for the first token…"))
        self._timer = self.set_interval(1 / UPDATES_PER_S, self._show, name="answer")

    def feed(self, chunk: ChunkView) -> None:
        """Takes a chunk; it is shown with the next update."""
        if chunk.reasoning:
            if self._thinking_since is None:
                self._thinking_since = self._monotonic()
            self._reasoning.append(clean(chunk.reasoning))
        if chunk.text:
            self._end_thought()
            # An answer after reasoning begins with line breaks that would only be empty lines.
            text = clean(chunk.text) if self._text else clean(chunk.text).lstrip("\n")
            if text:
                self._text.append(text)
                self._unshown += text

    def _end_thought(self) -> None:
        if self._thinking_since is not None and self._thought_s is None:
            self._thought_s = self._monotonic() - self._thinking_since

    async def _show(self) -> None:
        if self._reasoning or self._text:
            self.wait(Content(""))
        if self._reasoning:
            thoughts = self.query_one(Collapsible)
            thoughts.add_class("-some")
            thoughts.title = (
                "thinking…" if self._thought_s is None else f"thought for {max(0.1, self._thought_s):.1f} s"
            )
            if len(self._reasoning) != self._n_shown_reasoning:
                self._n_shown_reasoning = len(self._reasoning)
                self.query_one(".reasoning", Static).update(Content("".join(self._reasoning).strip()))
        if self._generation is not None and self._generation.tokens_out:
            self.query_one(".foot", Static).update(Content(figures(self._generation, self._n_ctx)))
        if self._unshown:
            if self._stream is None:
                # Not before there is text: a stream that is stopped before its first step raises.
                self._stream = Markdown.get_stream(self.query_one(Markdown))
            unshown, self._unshown = self._unshown, ""
            await self._stream.write(unshown)

    async def finish(self, mark: str = "", problem: str = "") -> None:
        """Shows the rest. `mark` stands before the figures (`stopped`); `problem` says what to do."""
        if self._timer is not None:
            self._timer.stop()
        self._end_thought()
        await self._show()
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None
        self.wait(Content(""))
        generation = self._generation
        counted = generation is not None and bool(generation.tokens_in or generation.tokens_out)
        told = figures(generation, self._n_ctx) if generation is not None and counted else ""
        parts = [(mark, "$warning bold"), (" · " if mark and told else "", ""), (told, "")]
        if problem:
            parts += [("\n" if mark or told else "", ""), (f"✕ {clean(problem)}", "$error")]
        self.query_one(".foot", Static).update(Content.assemble(*parts))


class Transcript(VerticalScroll):
    """The turns of a conversation. Follows its end while text comes, until the user scrolls up; scrolling down to it
    resumes.
    """

    _at_end = True

    def compose(self) -> ComposeResult:
        yield Static("", id="greeting")

    def greet(self, told: Content) -> None:
        """What stands there before anything was said."""
        self.query_one("#greeting", Static).update(told)

    async def add(self, turn: QuestionTurn | AnswerTurn) -> None:
        """Adds a turn and goes to the end."""
        self.query_one("#greeting").display = False
        self._at_end = True
        await self.mount(turn)
        self.scroll_end(animate=False)

    async def forget(self) -> None:
        await self.remove_children(".turn")
        self.query_one("#greeting").display = True

    def page(self, direction: int) -> None:
        """Scrolls by a page."""
        if direction < 0:
            self.scroll_page_up(animate=False)
        else:
            self.scroll_page_down(animate=False)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self._at_end = new_value >= self.max_scroll_y - 1

    def watch_virtual_size(self) -> None:
        self._follow()

    def on_resize(self) -> None:
        self._follow()

    def _follow(self) -> None:
        # Textual's own anchor would set short conversations at the bottom, below an empty screen.
        if self._at_end:
            self.scroll_end(animate=False, immediate=True)
