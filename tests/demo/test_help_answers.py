"""What the demo model is taught to say of the product is so: its keys, ports, commands, routes and settings exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from textual.binding import Binding

from infsvc.cli import infsvc
from infsvc.home import Home
from infsvc.settings import NodeSettings, WorkerSettings, load_node_settings, load_workers
from infsvc.types import CompletionReply, Params
from tests.test_promises import ROUTES, check_all
from tui.app import InfsvcApp
from tui.widgets.tab_line import SCREENS

DEMO = Path(__file__).resolve().parents[2] / "data/models/demo"
TOPICS: list[dict[str, Any]] = [
    topic
    for path in sorted((DEMO / "corpus").glob("help_*.toml"))
    for topic in tomllib.loads(path.read_text())["topic"]
]
KEYS = {
    key: binding.action
    for binding in InfsvcApp.BINDINGS
    if isinstance(binding, Binding)
    for key in binding.key.split(",")
}
SETTINGS = {name.upper() for name in WorkerSettings.model_fields} | NodeSettings.names
PORTS = re.compile(r"\b5[0-9]{3}\b")


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic["id"])
def test_an_answer_names_what_there_is(topic: dict[str, Any]) -> None:
    answer: str = topic["answer"]
    for key in re.findall(r"\bF\d+\b", answer):
        assert key.lower() in KEYS, key
    for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", answer):
        assert name in SETTINGS, name
    for quoted in re.findall(r"`([^`]+)`", answer):
        words = quoted.replace("<name>", "demo").replace("<model>", "demo")
        if words.startswith("infsvc ") and words.count(" ") == 1:
            assert words.split()[1] in infsvc.list_commands(click.Context(infsvc)), words
        elif words.startswith(("infsvc ", "make ", "curl ", "sqlite3 ")):
            check_all(words)
        elif re.fullmatch(r"(GET|POST|DELETE|PUT) /\S*", words):
            path = words.split()[1].partition("?")[0]
            assert any(route.fullmatch(path) for route in ROUTES), path
        elif words.startswith("params."):
            assert words.removeprefix("params.") in Params.model_fields, words
    for port in PORTS.findall(answer):
        assert port in _ports() or port == "5790", f"{port} is no default, nor the port that examples take"


def _ports() -> set[str]:
    settings = load_node_settings({})
    home = Home(DEMO.parents[2], DEMO.parents[2])
    workers = load_workers(home, settings, {}).values()
    own = {str(worker.address.port) for worker in workers if worker.address}
    return own | {str(settings.gateway_address.port), settings.nats_url.rpartition(":")[2]}


def answer(name: str) -> str:
    return str(next(topic["answer"] for topic in TOPICS if topic["id"] == name))


def test_the_screens_are_those_of_the_app() -> None:
    told = re.findall(r"F(\d+) (\w+)", answer("screens"))
    assert told == [(digit, title) for digit, _, title in SCREENS]
    assert re.findall(r"`(\d)`", answer("screens")) == [digit for digit, _, _ in SCREENS]
    for digit, name, _ in SCREENS:
        assert KEYS[digit] == KEYS[f"f{digit}"] == f"go('{name}')"


def test_the_ports_are_those_of_the_worker_files() -> None:
    assert set(PORTS.findall(answer("ports"))) == _ports()


def test_the_reasons_of_an_end_are_those_of_the_wire() -> None:
    reasons = set(re.findall(r"`(\w+)`", answer("finish_reason"))) - {"finish_reason"}
    assert reasons == set(CompletionReply.model_fields["finish_reason"].annotation.__args__)  # type: ignore[union-attr]


def test_the_card_says_where_the_weights_that_ship_are_behind() -> None:
    card = (DEMO / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \|", card.split("## What it says that is not so")[1], re.M)
    assert set(rows) - {"topic"} == {topic["id"] for topic in TOPICS if "shipped" in topic}
