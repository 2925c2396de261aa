"""What a node remembers from one run to the next: the models that ran last. A small JSON file in the home."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path


class NodeState:
    """Reads and writes the file; a damaged one counts as none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def models(self) -> list[str] | None:
        """The models that ran last, or None on a first run."""
        with suppress(OSError, ValueError, RecursionError):
            kept = json.loads(self._path.read_text())
            told = kept.get("models") if isinstance(kept, dict) else None
            if isinstance(told, list) and all(isinstance(name, str) for name in told):
                return told
        return None

    def remember(self, models: list[str]) -> None:
        """Keeps the names of the models that run now. Raises OSError when the home cannot be written."""
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"models": models}))
        part.replace(self._path)
