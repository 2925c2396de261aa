"""Builds the node that `infsvc serve` and `infsvc-tui` run, from the environment and the worker files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infsvc.home import Home

if TYPE_CHECKING:
    from transports.node import Node


def prepare_home() -> Home:
    """Finds and makes the home, and points native output at its log file.

    Comes before llama_cpp is imported and before a screen is made. Raises `HomeError` when the home cannot be written.
    """
    from engine.native_log import redirect

    home = Home.locate()
    home.make()
    redirect(home.logs / "native.log")
    return home


def build_node(home: Home, models: Sequence[str], *, log_to_stdout: bool) -> Node:
    """The node of this home, not yet started. Any thread; takes about half a second of imports.

    Raises:
        ConfigError: a setting or a worker file is wrong.
        UnknownModel: a named model has no worker file.
    """
    from infsvc.settings import load_node_settings, load_workers
    from transports.node import Node, chosen_models

    settings = load_node_settings()
    workers = load_workers(home, settings)
    return Node(home, settings, workers, chosen_models(home, models, workers), log_to_stdout=log_to_stdout)
