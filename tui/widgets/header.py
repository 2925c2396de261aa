"""The first line of every screen: the node, its doors, its load and the time, in fixed widths so that nothing jumps.

Three lengths: full from 110 columns, short from 60 (with the name from 72), and the least that still tells whether
things work below that.
"""

from __future__ import annotations

import math
from urllib.parse import urlsplit

from rich.cells import cell_len
from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from infsvc.types import ModelState
from tui.context import Context
from tui.wording import clean

Part = tuple[str, str]
FULL, BRAND, SHORT = 110, 72, 60


def cells(parts: list[Part]) -> int:
    """The width of the parts on the screen."""
    return sum(cell_len(text) for text, _ in parts)


class StatusHeader(Widget):
    """One line; reads the node every half second and repaints when the line has changed."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    StatusHeader { height: 1; background: $panel; color: $foreground; }
    """

    def __init__(self, context: Context) -> None:
        super().__init__(id="header")
        self.context = context
        self._shown = Content()

    def on_mount(self) -> None:
        self.refresh_facts()
        self.set_interval(0.5, self.refresh_facts, name="header")

    def on_resize(self) -> None:
        self.refresh_facts()

    def refresh_facts(self) -> None:
        """Reads the node again."""
        line = self._line(self.size.width)
        if line.plain != self._shown.plain or line != self._shown:
            self._shown = line
            self.refresh()

    def render(self) -> RenderResult:
        return self._shown

    def _line(self, width: int) -> Content:
        full, short = width >= FULL, width >= SHORT
        node = self.context.node
        workers = list(node.fleet.workers.values())
        n_up = sum(worker.state is ModelState.READY for worker in workers)
        n_asked = sum(worker.asked or worker.state is ModelState.READY for worker in workers)
        tokens = f"{sum(worker.stats.tokens_per_s() for worker in workers):,.0f}"
        queue = f"{sum(worker.n_waiting for worker in workers):,}"
        parts: list[Part] = [(" ", "")]
        if width >= BRAND:
            parts += [("infsvc", "$accent bold"), ("  " if full else " ", "")]
        if full:
            parts += [("node ", "$muted"), (f"{clean(node.name)[:14]:<8}", ""), (" ", "")]
        parts += self._phase(full, short) + self._broker(full, short) + self._gateway(full)
        parts += [(f"{f'{n_up}/{n_asked}':>5}", "bold"), (" models up " if full else " up ", "$muted")]
        if short:
            parts += [(f"{tokens:>7}", "bold"), (" tok/s ", "$muted")]
        parts += [(" queue" if full else " q", "$muted"), (f" {queue:>4}", "bold")]
        used = node.system()
        ram = f"{used.ram_used_bytes / 2**30:.1f}/{used.ram_total_bytes / 2**30:.1f}G"
        memory: list[Part] = [("  ram ", "$muted"), (f"{ram:>12}", "")]
        if cells(parts) + cells(memory) + len("  00:00:00 ") <= width:
            parts += memory
        clock = self.context.clock().strftime("%H:%M:%S" if width >= 72 else "%H:%M")
        room = width - cells(parts) - len(clock)
        if room > 0:  # else the time gives way to the figures
            parts += [(" " * max(1, room - 1), ""), (clock, "$muted")]
        return Content.assemble(*parts)

    def _phase(self, full: bool, short: bool) -> list[Part]:
        if self.context.phase != "draining":
            return []
        return [("◌ draining… " if full or short else "◌ ", "$warning bold")]

    def _broker(self, full: bool, short: bool) -> list[Part]:
        state = self.context.node.bus.state
        port = f" {urlsplit(state.url).port or ''}".rstrip() if full else ""
        # What is told beside the name; each length of header has room for the longest of its words.
        if state.status == "connected":
            glyph, tone = ("▲", "$warning") if state.reason else ("●", "$success")
            told = "embedded" if state.embedded else "external"
            told = told if full else ""
        elif state.status == "starting":
            glyph, tone, told = "◐", "$warning", "starting" if full else ""
        elif state.status == "off":
            glyph, tone, told = "○", "$muted", "off"
        else:
            wait = state.retry_in_s
            retry = "down" if wait is None else f"retry in {math.ceil(wait)} s" if full else f"retry {math.ceil(wait)}s"
            glyph, tone, told = "✕", "$error", retry if short else "down"
        name = f"nats{port}"
        room = 24 if full else 16 if short else 11
        text = f"{name} {told}".rstrip()
        down = "$error bold" if tone == "$error" else ""
        return [(glyph, tone), (f" {text:<{room - 2}}", down)]

    def _gateway(self, full: bool) -> list[Part]:
        port = f" {urlsplit(self.context.node.gateway_url).port or ''}" if full else ""
        glyph, tone = ("●", "$success") if self.context.phase == "running" else ("○", "$muted")
        return [(glyph, tone), (f" http{port} ", "")]
