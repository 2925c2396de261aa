"""What the pages say is what the code does."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_configuration_page_is_made_from_the_settings() -> None:
    tool = runpy.run_path(str(ROOT / "tools/configuration_doc.py"))
    assert (ROOT / "docs/configuration.md").read_text() == tool["page"]()
