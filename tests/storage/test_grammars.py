"""Stored grammars: what ships is only read, and no name reaches a file outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from infsvc.errors import BadRequest, GrammarConflict, UnknownGrammar
from storage.grammars import MAX_CONTENT_BYTES, GrammarStore, StoredGrammar

ROOT = Path(__file__).parents[2]
YES = 'root ::= "yes"'


def grammar(name: str, content: str = YES, *, kind: str = "gbnf", description: str = "") -> StoredGrammar:
    return StoredGrammar(name=name, kind=kind, content=content, description=description)


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    folder = tmp_path / "shipped"
    (folder / "default").mkdir(parents=True)
    (folder / "default/json.gbnf").write_text('#: any JSON\nroot ::= "{}"\n')
    return folder


@pytest.fixture
def store(tmp_path: Path, shipped: Path) -> GrammarStore:
    return GrammarStore(tmp_path / "own", shipped)


def test_what_is_kept_comes_back_as_it_was(store: GrammarStore) -> None:
    for content in (YES, "#: not the description\r\n\n é\n", "", "x" * MAX_CONTENT_BYTES):
        kept = grammar("team/colours", content, description="ünï")
        assert store.put(kept) is (content == YES)
        assert store.find("team/colours") == kept
    schema = grammar("team/colours", '{"type": "null"}', kind="json_schema")
    store.put(schema)
    assert store.find("team/colours") == schema
    assert [each.name for each in store.all()] == ["default/json", "team/colours"]


def test_a_bare_name_is_the_roots_or_the_defaults(store: GrammarStore) -> None:
    first = store.get("json")
    assert (first.name, first.description, first.content) == ("default/json", "any JSON", 'root ::= "{}"\n')
    store.create(grammar("json"))
    assert (store.get("json").name, store.get("default/json").shipped) == ("json", True)
    assert store.find("nobody") is None
    with pytest.raises(UnknownGrammar, match="nobody"):
        store.get("nobody")


def test_what_ships_is_hidden_not_changed(store: GrammarStore, shipped: Path) -> None:
    before = (shipped / "default/json.gbnf").read_bytes()
    with pytest.raises(GrammarConflict, match="already"):
        store.create(grammar("default/json"))
    assert store.put(grammar("default/json")) is False
    assert (store.get("json").content, store.get("json").shipped) == (YES, False)
    assert [(each.name, each.shipped) for each in store.all()] == [("default/json", False)]
    assert store.delete("json").content == YES
    assert store.get("json").shipped
    with pytest.raises(GrammarConflict, match="cannot be deleted"):
        store.delete("json")
    assert (shipped / "default/json.gbnf").read_bytes() == before


def test_own_ones_below_what_ships(shipped: Path) -> None:
    """As in a checkout, whose home is itself."""
    store = GrammarStore(shipped / "own", shipped)
    store.put(grammar("default/json"))
    store.create(grammar("mine"))
    assert [(each.name, each.shipped) for each in store.all()] == [("default/json", False), ("mine", False)]
    assert (shipped / "default/json.gbnf").read_text().startswith("#: any JSON")


def test_create_and_delete(store: GrammarStore) -> None:
    store.create(grammar("a"))
    with pytest.raises(GrammarConflict, match="PUT"):
        store.create(grammar("a"))
    store.delete("a")
    with pytest.raises(UnknownGrammar):
        store.delete("a")
    store.create(grammar("a"))


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "x/..", "/etc/passwd", "/x", "x/", "a/b/c", "a//b", "a\\b", "C:x", "a b", "a\n", "\x00",
        "a\x00",
        "é", "a\u202eb", "．．/x", "%2e%2e/x", "~", "-x", ".x", "x.", "con", "NUL", "lpt1.x", "default/aux", "x" * 65,
        "x.gbnf", "x.SCHEMA", "x.part", "a" * 10_000, "\ud800",
    ],
)  # fmt: skip
def test_what_is_no_name_never_becomes_a_path(store: GrammarStore, tmp_path: Path, name: str) -> None:
    for call in (store.find, store.get, store.delete):
        with pytest.raises(BadRequest) as caught:
            call(name)
        assert caught.value.param == "name"
    for write in (store.create, store.put):
        with pytest.raises(BadRequest):
            write(grammar(name))
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("name", ["a", "A-b_c", "qwen3.5", "x" * 64, "team/json", "_1"])
def test_names(store: GrammarStore, name: str) -> None:
    assert store.create(grammar(name)) == store.find(name)


@pytest.mark.parametrize(
    ("kept", "param"),
    [
        (grammar("a", "x" * (MAX_CONTENT_BYTES + 1)), "content"),
        (grammar("a", "\ud800"), "content"),
        (grammar("a", description="a\nb"), "description"),
        (grammar("a", description=" a"), "description"),
        (grammar("a", description="x" * 501), "description"),
    ],
)
def test_what_cannot_be_kept_as_it_is(store: GrammarStore, kept: StoredGrammar, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        store.put(kept)
    assert caught.value.param == param
    assert store.find("a") is None


def test_files_put_there_by_hand(store: GrammarStore, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "team/deeper").mkdir(parents=True)
    (own / "plain.gbnf").write_text(YES)
    (own / "team/deeper/x.gbnf").write_text(YES)
    (own / "no name.gbnf").write_text(YES)
    (own / "notes.txt").write_text("x")
    (own / "team/folder.gbnf").mkdir()
    (own / "long.gbnf").write_text("#" * 100_000)
    assert [each.name for each in store.all()] == ["default/json", "long", "plain"]
    assert len(store.get("long").content) > MAX_CONTENT_BYTES  # and so is refused when it is used


def test_too_many(store: GrammarStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.grammars.MAX_GRAMMARS", 2)
    store.create(grammar("a"))
    store.create(grammar("b/c"))
    store.put(grammar("a"))
    with pytest.raises(GrammarConflict, match="delete some"):
        store.create(grammar("d"))


def test_those_that_ship_compile_and_say_what_they_are() -> None:
    from engine.constraint import check_stored

    found = GrammarStore(ROOT / "nowhere", ROOT / "data/grammars").all()
    assert [each.name for each in found] == ["default/code", "default/json", "default/yes_no"]
    for each in found:
        assert each.shipped
        assert each.description
        check_stored(each.content, schema=each.is_schema)
