"""Where files lie, and that a home has one node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from infsvc.errors import HomeError
from infsvc.home import Home, HomeLock, app_root

ROOT = Path(__file__).parents[2]


def put(root: Path, relative: str, text: str = "") -> Path:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", tmp_path / "shipped")


def test_a_named_home_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Home.locate({"INFSVC_HOME": str(tmp_path)}) == Home(tmp_path, ROOT)
    assert Home.locate({"INFSVC_HOME": "relative"}).root == tmp_path / "relative"
    assert Home.locate({"INFSVC_HOME": "~/x"}).root == Path.home() / "x"


def test_then_the_checkout() -> None:
    assert app_root() == ROOT
    assert Home.locate({}) == Home(ROOT, ROOT)
    assert Home.locate({"INFSVC_HOME": ""}).root == ROOT


def test_then_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infsvc.home._is_checkout", lambda folder: False)
    found = Home.locate({})
    assert found.root.name == "infsvc"
    assert found.shipped == ROOT


def test_reads_look_in_the_home_then_in_what_ships(home: Home) -> None:
    shipped = put(home.shipped, "data/a")
    assert home.find("data/a") == shipped
    own = put(home.root, "data/a")
    assert home.find("data/a") == own
    assert home.find("data/nowhere") == home.root / "data/nowhere"
    assert home.find(shipped) == shipped


def test_writes_go_to_the_home_whose_folders_are_made(home: Home) -> None:
    put(home.shipped, "data/deep/a")
    path = home.own("data/deep/a")
    assert path == home.root / "data/deep/a"
    assert path.parent.is_dir()


def test_a_worker_file_of_ones_own_stands_before_the_shipped(home: Home) -> None:
    for name in ("worker.b.env", "worker.a.v1.env", "other.env", "worker.env"):
        put(home.shipped, f"envs/{name}")
    own = put(home.root, "envs/worker.b.env")
    put(home.root, "envs/worker.c.env")
    found = home.worker_files()
    assert list(found) == ["a.v1", "b", "c"]
    assert found["b"] == own
    assert Home(home.root / "x", home.root / "y").worker_files() == {}


# -- the lock ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from infsvc.home import Home, HomeLock
lock = HomeLock(Home(Path(sys.argv[1]), Path(sys.argv[1])))
lock.acquire()
lock.tell(node="rack-1", gateway="127.0.0.1:5780")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(home: Home) -> Iterator[int]:
    """Another process holds the home meanwhile."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(home.root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "held\n"
        yield child.pid
        child.kill()


@pytest.mark.parametrize("folder", ["data/logs", "data/run"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / folder).write_text("no folder")
    with pytest.raises(HomeError, match=rf"{tmp_path / folder} cannot be written .*INFSVC_HOME"):
        Home(tmp_path, tmp_path).make()


@pytest.mark.parametrize("folder", ["data/models", "envs"])
def test_models_and_worker_files_may_lie_where_nothing_can_be_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / folder).write_text("no folder")
    Home(tmp_path, tmp_path).make()
    assert (tmp_path / "data/run").is_dir()


def test_a_second_node_is_told_which_one_runs(home: Home) -> None:
    with held_by_another(home) as pid:
        told = home.running_node()
        assert told == {"pid": pid, "node": "rack-1", "gateway": "127.0.0.1:5780"}
        with pytest.raises(HomeError, match=f"node rack-1, pid {pid}, gateway 127.0.0.1:5780") as caught:
            HomeLock(home).acquire()
        assert "make stop" in str(caught.value)
    # It was killed: nothing has to be cleared away.
    assert home.running_node() is None
    lock = HomeLock(home)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("damage", ["", "[]", "{"])
def test_a_node_that_does_not_say_who_it_is(home: Home, damage: str) -> None:
    with held_by_another(home):
        home.node_file.write_text(damage)
        assert home.running_node() == {}
        with pytest.raises(HomeError, match="it does not say which"):
            HomeLock(home).acquire()


def test_the_lock_tells_and_is_given_back(home: Home) -> None:
    assert home.running_node() is None
    lock = HomeLock(home)
    lock.acquire()
    lock.tell(node="here")
    assert json.loads(home.node_file.read_text()) == {"pid": os.getpid(), "node": "here"}
    assert home.running_node() == {"pid": os.getpid(), "node": "here"}
    lock.release()
    lock.release()
    assert home.running_node() is None
    assert not home.node_file.exists()
    lock.acquire()
    lock.release()


def test_the_folders_of_a_home_are_made(home: Home) -> None:
    lock = HomeLock(home)
    lock.acquire()
    for folder in ("data/logs", "data/run", "data/models", "envs"):
        assert (home.root / folder).is_dir()
    assert [path.name for path in (home.root / "data/run").iterdir()] == ["node.lock"]
    lock.release()


def test_a_home_is_made_by_several_at_once(home: Home) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(home.make) for _ in range(200)]
    for each in made:
        each.result()


@pytest.mark.parametrize("blocked", ["", "data", "data/run", "data/run/node.lock"])
def test_a_home_that_cannot_be_written_says_so(home: Home, blocked: str) -> None:
    """A file where a folder should be, or the other way round: it stops root too, which permissions do not."""
    if blocked.startswith("data/run/"):
        (home.root / blocked).mkdir(parents=True)
    else:
        put(home.root.parent, f"home/{blocked}" if blocked else "home")
    with pytest.raises(HomeError, match="INFSVC_HOME") as caught:
        HomeLock(home).acquire()
    assert str(home.root) in str(caught.value)
