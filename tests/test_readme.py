"""The shell and Python blocks of the README and of the pages on operations, NATS and the client do what they say: each
is marked, and what can run does, on a node with the demo model.

After a block, a JSON block shows what its last line answers: the answer must have every field that is shown.
"""

from __future__ import annotations

import ast
import asyncio
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from infsvc import Client
from tests.commands import ROOT, Place

PAGE = (ROOT / "README.md").read_text()
TAGS = ("run", "soak", "manual")
DEMO_PORT = 5769

_PYTHON = """
import ast, asyncio, sys
code = compile(sys.argv[1], "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
left = eval(code, {})
if left is not None:
    asyncio.run(left)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: the line it begins on, its language, what stands behind that, and the JSON block after it."""

    line: int
    language: str
    tag: str
    text: str
    page: str = "README.md"
    answer: Any = None


def blocks(page: str, name: str = "README.md") -> list[Block]:
    """Every fenced block of a page."""
    found: list[Block] = []
    for match in re.finditer(r"^```([^\s`]*) ?([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        block = Block(page.count("\n", 0, match.start()) + 1, match[1], match[2].strip(), match[3], name)
        if block.language == "json" and found and found[-1].tag == "run":
            found[-1] = replace(found[-1], answer=json.loads(match[3]))
        else:
            found.append(block)
    return found


BLOCKS = blocks(PAGE)
PAGES = {name: blocks((ROOT / "docs" / name).read_text(), name) for name in ("operations.md", "nats.md", "client.md")}
ALL = [*BLOCKS, *(block for each in PAGES.values() for block in each)]
SHELL = [block for block in ALL if block.language in ("sh", "bash", "shell", "console")]
PYTHON = [block for block in ALL if block.language == "python"]


def _param(block: Block) -> Any:
    marks = (pytest.mark.soak, pytest.mark.timeout(1800)) if block.tag == "soak" else ()
    return pytest.param(block, id=f"{block.page}-{block.line}", marks=marks)


def _goes_on(block: Block) -> bool:
    """Whether a block goes on with a client that the page's first block has opened."""
    return block.page == "client.md" and "asyncio.run(" not in block.text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("readme"), models={"demo": DEMO_PORT})
    with place.node("demo"):
        yield place


def assert_shown(shown: Any, real: Any, where: str = "the answer") -> None:
    """Every field of `shown` is in `real`, down to the last one, with a value of the same kind."""
    if isinstance(shown, dict):
        assert isinstance(real, dict), where
        for key, value in shown.items():
            assert key in real, f"{where} has no {key}: {real}"
            assert_shown(value, real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        assert isinstance(real, list), where
        if shown:
            assert real, where
            assert_shown(shown[0], real[0], f"{where}[0]")
    else:
        kinds = (int, float) if isinstance(shown, int | float) and not isinstance(shown, bool) else type(shown)
        assert isinstance(real, kinds), f"{where} is {real!r}"


@pytest.mark.parametrize("block", [_param(block) for block in SHELL if block.tag != "manual"])
def test_a_shell_block_runs(place: Place, block: Block) -> None:
    done = place.run(block.text, timeout_s=1500 if block.tag == "soak" else 60)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.strip() or block.text.startswith("sqlite3")
    if block.answer is not None:
        assert_shown(block.answer, json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("block", [_param(block) for block in PYTHON if not _goes_on(block)])
def test_a_python_block_runs(place: Place, block: Block) -> None:
    ast.parse(block.text)
    (place.home / "block.py").write_text(_PYTHON)
    (place.home / "block.txt").write_text(place.here(block.text))
    done = place.run('python block.py "$(cat block.txt)"')
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What the blocks of the client's page have named so far: a job's ticket is for a later block."""
    return {"asyncio": asyncio, "Client": Client, "text": "What is backpressure?"}


@pytest.mark.parametrize("block", [_param(block) for block in PYTHON if _goes_on(block)])
@pytest.mark.parametrize("scheme", ["nats", "http"])
async def test_a_python_block_goes_on_with_a_client(
    place: Place, said: dict[str, Any], block: Block, scheme: str
) -> None:
    if scheme == "http" and "submit" in block.text + said.get("scheme", "") + block.text.replace(
        "client.job", "submit"
    ):
        pytest.skip("the durable queue is NATS's alone, as the page says")
    url = place.here({"nats": "nats://127.0.0.1:5700", "http": "http://127.0.0.1:5780"}[scheme])
    async with Client(url, timeout_s=30) as client:
        code = compile(block.text, f"{block.page}:{block.line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waiting = eval(code, said | {"client": client}, said)
        if waiting is not None:
            await waiting


def test_every_block_is_marked() -> None:
    assert len(SHELL) > 10
    marked = [*SHELL, *(block for block in PYTHON if block.page != "README.md")]
    assert [(block.page, block.line, block.tag) for block in marked if block.tag not in TAGS] == []
    assert {block.tag for block in SHELL} == set(TAGS)
    assert {block.page for block in SHELL} == {"README.md", "operations.md", "nats.md"}
    assert sum(_goes_on(block) for block in PYTHON) >= 5


def test_a_block_without_a_mark_would_be_noticed() -> None:
    (block,) = blocks("text\n\n```sh\nls\n```\n")
    assert (block.line, block.language, block.tag) == (3, "sh", "")
    # A fence without a language would hide commands from the tests.
    assert [
        each.line for each in BLOCKS if not each.language and re.search(r"^(\$ |make |curl |infsvc )", each.text, re.M)
    ] == []


def test_every_link_leads_somewhere() -> None:
    from urllib.parse import unquote

    targets = [unquote(target) for target in re.findall(r"\]\(([^)#\s]+)\)", PAGE) if "://" not in target]
    assert len(targets) > 8
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_each_dependency_says_what_it_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    rows = PAGE.split("| package | for |")[1].split("\n\n")[0]
    told = {name.strip() for row in rows.splitlines()[2:] for name in row.split("|")[1].split(",")}
    assert {re.split(r"[<>=~!\[ ]", name)[0] for name in named} - told == set()
