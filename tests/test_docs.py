"""What the pages say is what the code does."""

from __future__ import annotations

import ast
import html
import re
import runpy
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SYMPTOMS = (ROOT / "docs/troubleshooting.md").read_text()


def test_the_configuration_page_is_made_from_the_settings() -> None:
    tool = runpy.run_path(str(ROOT / "tools/configuration_doc.py"))
    assert (ROOT / "docs/configuration.md").read_text() == tool["page"]()


@cache
def sentences() -> list[str]:
    """Every text in the code, what is filled in left out, and everything that stands on a pictured screen."""
    found: list[str] = []
    for folder in ("infsvc", "engine", "storage", "transports", "tui"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    for path in (ROOT / "snapshots").rglob("*.svg"):
        found.append(html.unescape(re.sub("<[^>]+>", "", path.read_text())).replace("\xa0", " "))
    return found


def is_said(quote: str) -> bool:
    """Whether the product can say this, with … for anything."""
    parts = [re.escape(part) for part in quote.split("…") if part.strip()]
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    return bool(parts) and any(pattern.search(each) for each in sentences())


QUOTES = [
    quote
    for line in SYMPTOMS.splitlines()
    if line.startswith("| ") and line.split(" | ")[0] not in ("| you see", "| answer")
    for quote in re.findall(r"`([^`]+)`", line.split(" | ")[0])
]


@pytest.mark.parametrize("quote", QUOTES)
def test_a_symptom_is_in_the_product_s_words(quote: str) -> None:
    assert is_said(quote)


def test_words_that_nothing_says_are_noticed() -> None:
    assert not is_said("… is taken over by …")
    assert not is_said("…")


def test_what_goes_wrong_most_has_an_entry() -> None:
    """Port, home, missing or corrupt model, no colour, no broker, full queue, full disk, slow, no key."""
    for words in (
        "is taken by", "already runs on", "is missing", "is truncated", "no colours", "retry in", "`queue_full`",
        "are free in", "`audit_unavailable`", "## Slow", "an API key is needed", "INFSVC_API_KEYS is empty",
    ):  # fmt: skip
        assert words in SYMPTOMS, words


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]*))?\)", page.read_text()):
            path = (page.parent / target) if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
                assert anchor in slugs, f"{page.name}: {target}#{anchor}"
