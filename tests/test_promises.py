"""The page of promises is in step with its script, and each command in it is one that exists: nothing is run here."""

from __future__ import annotations

import re
import runpy
import shlex
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from infsvc.cli import infsvc
from storage.audit_log import _MIGRATIONS

ROOT = Path(__file__).resolve().parents[1]
TOOL = runpy.run_path(str(ROOT / "tools/promises.py"))
ROWS: list[tuple[str, Any]] = [
    (f"{title}/{n}", row) for title, rows in TOOL["SECTIONS"].items() for n, row in enumerate(rows)
]
COMMANDS = [pytest.param(row.here, id=key) for key, row in ROWS if row.here]
MAKEFILE = (ROOT / "Makefile").read_text()
ROUTES = [
    re.compile(re.sub(r"\{[^}]*\}", "[^/]+", path))
    for path in re.findall(r'Route\("([^"]+)"', (ROOT / "transports/http/app.py").read_text())
]
SHELL = {
    "echo",
    "printf",
    "grep",
    "head",
    "tail",
    "jq",
    "sleep",
    "timeout",
    "wait",
    "kill",
    "true",
    "python",
    "lint-imports",
    "docker",
    "mkdir",
    "cp",
    "seq",
    "xargs",
    "script",
}


def commands(lines: str) -> Iterator[list[str]]:
    """The simple commands of some shell lines, as words; redirections and what `$(…)` puts in are left as they are."""
    lines = re.sub(r"\bfor \w+ in [^;]*;", "", lines).replace("$(", " ( ")
    lexer = shlex.shlex(lines, posix=True, punctuation_chars="|&;()")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;()"):
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=\S*|do|done|until", word):
            words.append(word)


def resolved(arguments: list[str]) -> None:
    """Parses an `infsvc` command line without calling it; click raises for what it does not know."""
    group: click.Command = infsvc
    context = click.Context(group, info_name="infsvc")
    words = [word for word in arguments if not re.fullmatch(r"\d?>.*", word)]
    while isinstance(group, click.Group):
        name, command, words = group.resolve_command(context, words)
        assert command is not None
        assert name is not None
        group, context = command, click.Context(command, info_name=name, parent=context)
    group.make_context(group.name, words)


@pytest.mark.parametrize("lines", COMMANDS)
def test_a_command_exists(lines: str) -> None:
    subprocess.run(["bash", "-n", "-c", lines], check=True)
    check_all(lines)


def check_all(lines: str) -> None:
    for words in commands(lines):
        check(words)


def check(words: list[str]) -> None:
    head, *rest = words
    if head == "timeout":
        check(rest[1:])
    elif head == "infsvc":
        resolved(rest)
    elif head == "make":
        for target in (word for word in rest if not word.startswith("-") and "=" not in word and ">" not in word):
            worker = ROOT / f"envs/worker.{target}.env"
            assert (
                re.search(rf"^(.* )?{re.escape(target)}( .*)?:", MAKEFILE, re.M)
                or worker.exists()
                or (target.startswith("build-llama-") and target.rpartition("-")[2] in MAKEFILE)
            ), target
        for word in rest:
            assert not word.startswith("WORKER=") or (ROOT / f"envs/worker.{word[7:]}.env").exists()
    elif head == "curl":
        (url,) = [word for word in rest if word.startswith("localhost:")]
        port, _, path = url.removeprefix("localhost:").partition("/")
        assert int(port) in (5780, 8080, *TOOL["PORTS"].values())
        path = "/" + path.partition("?")[0]
        assert path == "/" or any(route.fullmatch(path) for route in ROUTES), path
    elif head == "sqlite3":
        db = sqlite3.connect(":memory:")
        try:
            for migration in _MIGRATIONS:
                db.executescript(migration)
            db.execute(f"EXPLAIN {rest[1]}")
        finally:
            db.close()
    elif head.startswith("examples/"):
        assert (ROOT / head).stat().st_mode & 0o100
    elif head == "python":
        file = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert rest[0] == "-c" or (ROOT / file).is_file()
    elif head == "grep" and rest[-1].endswith(".md"):
        assert (ROOT / rest[-1]).is_file()
    else:
        assert head in SHELL, words


def test_a_wrong_command_is_noticed() -> None:
    for wrong in (
        "infsvc nonsense",
        "infsvc status --nonsense",
        "make nonsense",
        "curl -s localhost:5780/nonsense",
        'sqlite3 x "SELECT nonsense FROM requests"',
        "nonsense",
        "echo '{}' | infsvc req x --nope",
    ):
        with pytest.raises((AssertionError, click.ClickException, sqlite3.Error)):
            check_all(wrong)


def test_the_notes_name_tests_and_pages_that_are_there() -> None:
    for _, row in ROWS:
        for path in re.findall(r"`(tests/\S+?)`", row.note):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"\]\(([^)]+)\)", row.note):
            assert (ROOT / "docs" / path.partition("#")[0]).exists(), path
        assert row.here or row.note, row.promised


def test_the_page_has_every_row_with_its_output() -> None:
    page = (ROOT / "docs/promises.md").read_text()
    outputs: dict[str, str] = {}
    for title, rows in TOOL["SECTIONS"].items():
        lines = [
            line for line in page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("| ")
        ][1:]
        assert len(lines) == len(rows), title
        for n, (line, row) in enumerate(zip(lines, rows, strict=True)):
            begin = f"| {TOOL['cell'](row.promised)} | {TOOL['code'](row.here.strip()) if row.here else '–'} | "
            assert line.startswith(begin), f"{title}/{n}: run tools/promises.py"
            assert line.endswith(f" | {TOOL['cell'](row.note)} |")
            outputs[f"{title}/{n}"] = line.removeprefix(begin).removesuffix(f" | {TOOL['cell'](row.note)} |")
    assert [key for key, row in ROWS if row.run and outputs[key] in ("–", "``")] == []
