"""The chart of one model's last fifteen minutes: tokens a second on the left axis, waiting requests on the right."""

from __future__ import annotations

from typing import Any

from textual_plotext import PlotextPlot

from tui.node_view import WorkerView
from tui.themes import Palette

MINUTES = 15


class LoadChart(PlotextPlot):
    """`draw(worker)` plots what the history holds now."""

    ALLOW_SELECT = False

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._drawn: tuple[Any, ...] = ()

    def draw(self, worker: WorkerView | None) -> None:
        """Plots again when there is a new sample, another model or another size."""
        history = list(worker.stats.history) if worker else []
        drawn = (
            worker.name if worker else None,
            history[-1].ts if history else None,
            len(history),
            self.size,
            self.app.theme,
        )
        if drawn == self._drawn:
            return
        self._drawn = drawn
        plot = self.plt
        plot.clear_figure()
        colours = Palette.of(self.app.theme_variables)
        accent, muted = _rgb(colours.accent), _rgb(colours.muted)
        now = history[-1].ts if history else 0.0
        recent = [sample for sample in history if sample.ts >= now - MINUTES * 60]
        # A point for each braille column is all that can be seen.
        step = max(1, len(recent) // max(40, self.size.width * 2))
        recent = recent[::-1][::step][::-1]
        minutes = [(sample.ts - now) / 60 for sample in recent]
        tokens = [sample.tokens_per_s for sample in recent]
        waiting = [float(sample.n_waiting) for sample in recent]
        if recent:
            plot.plot(minutes, waiting, color=muted, marker="braille", yside="right")
            plot.plot(minutes, tokens, color=accent, marker="braille", yside="left")
        for side, values, least in (("left", tokens, 10.0), ("right", waiting, 4.0)):
            top = max(least, *values, 0.0)
            ticks = [0.0, top / 2, top]
            labels = [f"{tick:>5,.0f}" if side == "left" else f"{tick:<4,.0f}" for tick in ticks]
            plot.ylim(0, top * 1.1, yside=side)  # type: ignore[arg-type] # plotext declares a number and takes the side's name
            plot.yticks(ticks, labels, yside=side)  # type: ignore[arg-type]
        plot.xlim(-MINUTES, 0)
        plot.xticks([-15, -10, -5, 0], ["-15m", "-10m", "-5m", "now"])
        plot.xaxes(True, False)
        self.refresh()


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
