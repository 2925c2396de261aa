"""The commands that talk to a node, as a user types them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Served

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def node(serve: Callable[..., Served]) -> Served:
    served = serve("tiny")
    served.wait_for("model.loaded")
    served.wait_for("broker.connected")
    return served


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("serve",),
        ("chat",),
        ("embed",),
        ("status",),
        ("queue",),
        ("start",),
        ("stop",),
        ("models",),
        ("models", "pull"),
        ("logs",),
        ("doctor",),
    ],
)
def test_every_command_has_help(infsvc: Run, command: tuple[str, ...]) -> None:
    told = infsvc(*command, "--help")
    assert told.returncode == 0
    assert "Usage: infsvc" in told.stdout


@pytest.mark.usefixtures("node")
def test_chat_over_http_nats_and_standard_input_gives_one_answer(infsvc: Run) -> None:
    options = ("--temperature", "0", "--max-tokens", "8")
    told = infsvc("chat", "-m", "tiny", "--input", "hello", *options)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip()
    assert "max_tokens" in told.stderr
    assert infsvc("chat", *options, stdin="hello").stdout == told.stdout
    assert infsvc("chat", "-s", "inference.request.tiny", "--input", "hello", *options).stdout == told.stdout
    assert infsvc("chat", "-i", *options, stdin="hello\nhello\n").stdout.startswith(told.stdout * 2)


@pytest.mark.usefixtures("node")
def test_chat_with_a_grammar_over_http_and_nats(infsvc: Run) -> None:
    for door in (("-m", "tiny"), ("-s", "inference.request.tiny")):
        told = infsvc("chat", *door, "--input", "x", "--grammar", "yes_no")
        assert (told.returncode, told.stdout in ("yes\n", "no\n")) == (0, True), told.stderr
        broken = infsvc("chat", *door, "--input", "x", "--grammar", "root ::= x")
        assert (broken.returncode, "line 1, column 10" in broken.stderr) == (1, True)


@pytest.mark.usefixtures("node")
def test_chat_says_what_is_wrong(infsvc: Run) -> None:
    unknown = infsvc("chat", "-m", "nobody", "--input", "x")
    assert (unknown.returncode, "no model 'nobody'" in unknown.stderr) == (1, True)
    silent = infsvc("chat", "-s", "inference.request.nobody", "--input", "x")
    assert (silent.returncode, "nobody answers on" in silent.stderr) == (1, True)
    grammar = infsvc("chat", "--input", "x", "--grammar", "nobody")
    assert (grammar.returncode, "no grammar 'nobody' is stored" in grammar.stderr) == (1, True)
    assert infsvc("chat", "-m", "a", "-s", "b", "--input", "x").returncode == 2
    assert infsvc("chat", stdin="").returncode == 2


@pytest.mark.usefixtures("node")
def test_embed_over_http_and_what_is_wrong(infsvc: Run) -> None:
    told = infsvc("embed", "-m", "tiny", "--input", "hello", "--input", "world", "--dimensions", "8")
    assert told.returncode == 0, told.stderr
    first, second = told.stdout.splitlines()
    assert first.startswith("8 dimensions  [")
    assert first.endswith("…]  hello")
    assert second.endswith("world")
    assert "tokens, tiny" in told.stderr
    answer = json.loads(infsvc("embed", "-m", "tiny", "--input", "hello", "--json").stdout)
    assert len(answer["data"][0]["embedding"]) == 64
    unloaded = infsvc("embed", "--input", "x")
    assert (unloaded.returncode, "nomic-embed-v1.5 is absent" in unloaded.stderr) == (1, True)
    generates = infsvc("embed", "-s", "inference.request.tiny", "--input", "x")
    assert (generates.returncode, "input" in generates.stderr) == (1, True)
    silent = infsvc("embed", "-s", "embedding.request.nobody", "--input", "x")
    assert (silent.returncode, "nobody answers on" in silent.stderr) == (1, True)
    assert infsvc("embed").returncode == 2


def test_without_a_node_the_commands_say_how_to_start_one(infsvc: Run) -> None:
    for command in (("status",), ("chat", "--input", "x")):
        told = infsvc(*command)
        assert told.returncode == 1
        assert "no node answers at" in told.stderr
        assert "Traceback" not in told.stderr
    assert infsvc("stop").stdout == "no node runs on this home\n"


def test_commands_ask_the_node_that_the_environment_names(infsvc: Run, node: Served, tmp_path: Path) -> None:
    elsewhere = {"INFSVC_HOME": str(tmp_path / "elsewhere"), "INFSVC_URL": node.gateway}
    for command in (("status",), ("queue", "list"), ("chat", "--input", "x", "--max-tokens", "1")):
        told = infsvc(*command, **elsewhere)
        assert told.returncode == 0, told.stderr
        wrong = infsvc(*command, **elsewhere | {"INFSVC_URL": "http://127.0.0.1:1"})
        assert (wrong.returncode, "no node answers at http://127.0.0.1:1" in wrong.stderr) == (1, True)
    assert infsvc("status", "--url", node.gateway, INFSVC_URL="http://127.0.0.1:1").returncode == 0
    # A subject goes over the broker, which has a setting of its own.
    assert infsvc("chat", "-s", "inference.request.tiny", "--input", "x", **elsewhere).returncode == 0
    # This home's node is meant, whatever is named.
    assert infsvc("stop", **elsewhere).stdout == "no node runs on this home\n"


@pytest.mark.usefixtures("node")
def test_status_as_a_table_and_as_json(infsvc: Run) -> None:
    table = infsvc("status").stdout.splitlines()
    assert table[0].split()[:4] == ["MODEL", "NODE", "STATUS", "ARCH"]
    assert any(line.split()[:4] == ["tiny", "alpha", "online", "llama"] for line in table)
    services = {service["model_name"]: service for service in json.loads(infsvc("status", "--json").stdout)}
    assert services["tiny"]["status"] == "online"
    assert services["tiny"]["capabilities"] == ["text-generation", "embeddings", "grammar-constrained"]


def test_start_and_stop_make_use_of_one_node(infsvc: Run, tmp_path: Path) -> None:
    started = infsvc("start", "tiny")
    assert started.stdout == "tiny is ready\n", started.stderr
    try:
        failed = infsvc("start", "gemma3-270m")
        assert failed.returncode == 1
        assert "HF_HUB_OFFLINE is set" in failed.stderr
        assert infsvc("stop", "tiny").stdout == "tiny is unloaded\n"
        assert infsvc("start", "tiny").stdout == "tiny is ready\n"
    finally:
        assert infsvc("stop").stdout == "the node has ended\n"
    output = tmp_path / "data/logs/serve.out"
    assert output.read_text() == "", "the log is in node.jsonl, which is rotated"
    assert "model.loaded" in (tmp_path / "data/logs/node.jsonl").read_text()


def test_what_a_background_node_said_is_moved_away_when_it_is_much(infsvc: Run, tmp_path: Path) -> None:
    (tmp_path / "data/logs").mkdir(parents=True)
    output = tmp_path / "data/logs/serve.out"
    output.write_text("x\n" * 2**20)
    told = infsvc("start", "tiny", INFSVC_BIND="0.0.0.0")
    assert told.returncode == 1
    assert "INFSVC_API_KEYS is empty" in told.stderr
    assert output.with_name("serve.out.1").stat().st_size == 2**21
    assert output.stat().st_size < 1000
