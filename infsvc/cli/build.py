"""Builds the node that `infsvc serve` and `infsvc-tui` run, from the environment and the worker files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infsvc.home import Home
from infsvc.settings import load_node_settings, load_workers

if TYPE_CHECKING:
    from transports.node import Node


def build_node(models: Sequence[str], *, log_to_stdout: bool) -> Node:
    """The node of this home, not yet started. Points native output at the log file first, before llama_cpp is imported.

    Raises:
        ConfigError: a setting or a worker file is wrong.
        HomeError: the home cannot be written.
        UnknownModel: a named model has no worker file.
    """
    home = Home.locate()
    settings = load_node_settings()
    workers = load_workers(home, settings)
    home.make()

    from engine.native_log import redirect

    redirect(home.logs / "native.log")

    from transports.node import Node, chosen_models

    return Node(home, settings, workers, chosen_models(home, models, workers), log_to_stdout=log_to_stdout)
