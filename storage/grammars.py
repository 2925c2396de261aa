"""Stored grammars: one file each, `<name>.gbnf` or `<name>.schema`, its description in a first line `#: …`.

The node's own lie below `data/grammars/own` in the home, what ships below `data/grammars`; own ones are found first,
and only those are ever written. A name comes from a request, so it must match a strict form before it becomes a path.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infsvc.errors import BadRequest, GrammarConflict, UnknownGrammar

MAX_CONTENT_BYTES = 64 * 1024
MAX_DESCRIPTION = 500
MAX_GRAMMARS = 1000

DEFAULT_FOLDER = "default"
"""Where a bare name is looked for when the root has none."""

_SUFFIXES = {"gbnf": ".gbnf", "json_schema": ".schema"}
_HEADER = "#: "
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}(?:\.[A-Za-z0-9_-]{1,16}){0,3}")
# Windows takes these for devices, with any suffix.
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class StoredGrammar:
    """A grammar as it is kept.

    Attributes:
        name: `<name>`, or `<folder>/<name>`.
        kind: gbnf or json_schema.
        shipped: whether it comes with the program, and cannot be deleted.
    """

    name: str
    kind: str
    content: str
    description: str = ""
    shipped: bool = False

    @property
    def is_schema(self) -> bool:
        return self.kind == "json_schema"


class GrammarStore:
    """Reads and writes grammars. Any thread but the loop's: it blocks for files.

    Args:
        own: the folder that is written to; made when needed.
        shipped: the folder that is only read.
    """

    def __init__(self, own: Path, shipped: Path) -> None:
        self._own, self._shipped = own, shipped
        self._lock = threading.Lock()

    def find(self, name: str) -> StoredGrammar | None:
        """A grammar by name; a bare name also in the folder `default`.

        Raises:
            BadRequest: it is no name.
        """
        parts = checked(name)
        places = [parts] if len(parts) == 2 else [parts, (DEFAULT_FOLDER, *parts)]
        for place in places:
            for root in (self._own, self._shipped):
                found = self._read(root, place)
                if found is not None:
                    return found
        return None

    def get(self, name: str) -> StoredGrammar:
        """As `find`; raises `UnknownGrammar` when there is none."""
        found = self.find(name)
        if found is None:
            raise UnknownGrammar(name)
        return found

    def all(self) -> list[StoredGrammar]:
        """Every grammar by name; an own one hides the shipped one of its name."""
        found: dict[str, StoredGrammar] = {}
        for root in (self._shipped, self._own):
            for place in self._places(root):
                grammar = self._read(root, place)
                if grammar is not None:
                    found[grammar.name] = grammar
        return [found[name] for name in sorted(found)]

    def create(self, grammar: StoredGrammar) -> StoredGrammar:
        """Keeps a new one.

        Raises:
            GrammarConflict: the name is taken, or there are too many.
        """
        parts = checked(grammar.name)
        with self._lock:
            if any(self._read(root, parts) is not None for root in (self._own, self._shipped)):
                raise GrammarConflict(
                    f"there is a grammar {grammar.name} already: PUT /grammars/{grammar.name} replaces it", param="name"
                )
            return self._write(parts, grammar)

    def put(self, grammar: StoredGrammar) -> bool:
        """Keeps one, over an own one of its name; a shipped one is hidden, not changed. Returns whether it is new.

        Raises:
            GrammarConflict: there are too many.
        """
        parts = checked(grammar.name)
        with self._lock:
            is_new = all(self._read(root, parts) is None for root in (self._own, self._shipped))
            self._write(parts, grammar)
            return is_new

    def delete(self, name: str) -> StoredGrammar:
        """Deletes an own one, and returns what it was; a shipped one that it hid is found again.

        Raises:
            UnknownGrammar: there is none.
            GrammarConflict: it ships with the program.
        """
        checked(name)
        with self._lock:
            found = self.get(name)
            if found.shipped:
                raise GrammarConflict(
                    f"{found.name} ships with infsvc and cannot be deleted: a grammar of your own with its name is "
                    "found first",
                    param="name",
                )
            for suffix in _SUFFIXES.values():
                self._path(self._own, checked(found.name), suffix).unlink(missing_ok=True)
        return found

    @staticmethod
    def _path(root: Path, parts: tuple[str, ...], suffix: str) -> Path:
        return root.joinpath(*parts[:-1], parts[-1] + suffix)

    def _places(self, root: Path) -> Iterator[tuple[str, ...]]:
        """The names below a folder whose form is a name's."""
        folders: list[tuple[str, ...]] = [()]
        with suppress(OSError):
            # The own ones may lie below what ships.
            folders += [(each.name,) for each in root.iterdir() if each.is_dir() and each != self._own]
        for folder in folders:
            with suppress(OSError):
                for path in root.joinpath(*folder).iterdir():
                    for suffix in _SUFFIXES.values():
                        parts = (*folder, path.name.removesuffix(suffix))
                        if path.name.endswith(suffix) and all(_is_part(part) for part in parts):
                            yield parts

    def _read(self, root: Path, parts: tuple[str, ...]) -> StoredGrammar | None:
        for kind, suffix in _SUFFIXES.items():
            path = self._path(root, parts, suffix)
            try:
                if not path.is_file():
                    continue
                # More than content and description may have: what is longer than that is refused when it is used.
                with path.open("rb") as stream:
                    text = stream.read(MAX_CONTENT_BYTES + 4 * MAX_DESCRIPTION + 64).decode(errors="replace")
            except OSError:
                continue
            description = ""
            if text.startswith(_HEADER):
                head, _, text = text.partition("\n")
                description = head.removeprefix(_HEADER).strip()
            return StoredGrammar(
                name="/".join(parts),
                kind=kind,
                content=text,
                description=description,
                shipped=root == self._shipped,
            )
        return None

    def _write(self, parts: tuple[str, ...], grammar: StoredGrammar) -> StoredGrammar:
        check_text(grammar)
        if self._read(self._own, parts) is None and sum(1 for _ in self._places(self._own)) >= MAX_GRAMMARS:
            raise GrammarConflict(f"{MAX_GRAMMARS} grammars are stored: delete some first", param="name")
        path = self._path(self._own, parts, _SUFFIXES[grammar.kind])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        # The description's line is always there, so that a content that begins like one comes back whole.
        part.write_bytes(f"{_HEADER}{grammar.description}\n{grammar.content}".encode())
        part.replace(path)
        for kind, suffix in _SUFFIXES.items():
            if kind != grammar.kind:
                self._path(self._own, parts, suffix).unlink(missing_ok=True)
        return grammar


def checked(name: str) -> tuple[str, ...]:
    """A name's one or two parts, safe as file names. Raises `BadRequest` for any other text."""
    parts = tuple(name.split("/"))
    if not 1 <= len(parts) <= 2 or not all(_is_part(part) for part in parts):
        raise BadRequest(
            "a grammar's name is letters, digits, _, - and . inside, at most 64 of them, with at most one folder "
            "before it: <name> or <folder>/<name>",
            param="name",
        )
    return parts


def check_text(grammar: StoredGrammar) -> None:
    """Raises `BadRequest` for a description or content that cannot be kept as it is."""
    if len(grammar.description) > MAX_DESCRIPTION or not grammar.description.isprintable():
        raise BadRequest(
            f"a description is one line of at most {MAX_DESCRIPTION} printable characters", param="description"
        )
    if grammar.description != grammar.description.strip():
        raise BadRequest("a description neither begins nor ends with blanks", param="description")
    try:
        n_bytes = len(grammar.content.encode())
    except UnicodeEncodeError:
        raise BadRequest("the content holds half a character (a lone surrogate)", param="content") from None
    if n_bytes > MAX_CONTENT_BYTES:
        raise BadRequest(f"the content is longer than {MAX_CONTENT_BYTES // 1024} KiB", param="content")


def _is_part(part: str) -> bool:
    return (
        len(part) <= 64
        and _PART.fullmatch(part) is not None
        and _DEVICES.fullmatch(part) is None
        and not part.lower().endswith((*_SUFFIXES.values(), ".part"))
    )
