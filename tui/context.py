"""What every screen is given by the app: the node, the clocks, and how far the node's life has gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from tui.node_view import NodeView


@dataclass
class Context:
    """One a running app. `clock` gives the wall time shown, `monotonic` seconds for durations."""

    node: NodeView
    clock: Callable[[], datetime]
    monotonic: Callable[[], float]
    animate: bool
    phase: Literal["starting", "running", "draining"] = "starting"
