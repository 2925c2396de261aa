"""The home folder: where a node reads what ships, writes what is its own, and holds the lock that makes it the only
one.

Reads look in the home, then in what ships (the checkout, or the wheel's `_app` folder). Writes go to the home only.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infsvc.errors import HomeError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_PACKAGE = Path(__file__).resolve().parent


def app_root() -> Path:
    """The folder that holds `engine`, `tui`, `envs`, …: the wheel's `_app`, or the checkout."""
    packed = _PACKAGE / "_app"
    return packed if packed.is_dir() else _PACKAGE.parent


def _is_checkout(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and (folder / "envs").is_dir()


@dataclass(frozen=True)
class Home:
    """`root` is the node's own folder; `shipped` is read-only."""

    root: Path
    shipped: Path

    @classmethod
    def locate(cls, environ: Mapping[str, str] = os.environ) -> Home:
        """INFSVC_HOME, else the checkout, else the user's data folder."""
        shipped = app_root()
        named = environ.get("INFSVC_HOME")
        if named:
            return cls(Path(named).expanduser().absolute(), shipped)
        if _is_checkout(shipped):
            return cls(shipped, shipped)
        from platformdirs import user_data_path

        return cls(user_data_path("infsvc", appauthor=False), shipped)

    def find(self, relative: str | Path) -> Path:
        """Where to read `relative`: the home's own, else what ships, else where the home's own would be."""
        own = self.root / relative
        if own.exists():
            return own
        shipped = self.shipped / relative
        return shipped if shipped.exists() else own

    def own(self, relative: str | Path) -> Path:
        """Where to write `relative`; its folder is made."""
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def worker_files(self) -> dict[str, Path]:
        """Name → `envs/worker.<name>.env`, the home's own before what ships, sorted by name."""
        found: dict[str, Path] = {}
        for root in (self.shipped, self.root):
            for path in sorted((root / "envs").glob("worker.*.env")):
                found[path.name.removeprefix("worker.").removesuffix(".env")] = path
        return dict(sorted(found.items()))

    def make(self) -> None:
        """Makes the folders a node writes to, or raises `HomeError` with the first that cannot be written. Models and
        worker files may lie where nothing can be written: then none can be added."""
        for folder in ("data/logs", "data/run"):
            path = self.root / folder
            try:
                path.mkdir(parents=True, exist_ok=True)
                # A name of its own: another process may look at the same moment.
                with tempfile.TemporaryFile(dir=path):
                    pass
            except OSError as error:
                raise HomeError(
                    f"{path} cannot be written ({error.strerror or error}): "
                    "make the home folder writable, or name another with INFSVC_HOME"
                ) from error
        for folder in ("data/models", "envs"):
            with suppress(OSError):
                (self.root / folder).mkdir(parents=True, exist_ok=True)

    @property
    def node_file(self) -> Path:
        """Who runs here: `{pid, node, gateway, started}`."""
        return self.root / "data/run/node.json"

    @property
    def logs(self) -> Path:
        return self.root / "data/logs"

    def running_node(self) -> dict[str, Any] | None:
        """What the node that owns this home says of itself, or None when none runs."""
        from filelock import FileLock, Timeout

        lock_path = self.root / "data/run/node.lock"
        if not lock_path.exists():
            return None
        try:
            with FileLock(lock_path, timeout=0):
                return None
        except Timeout:
            with suppress(OSError, ValueError):
                told = json.loads(self.node_file.read_text())
                if isinstance(told, dict):
                    return told
            return {}
        except OSError:
            return None


class HomeLock:
    """Holds the home for one node; released by the operating system if the node dies."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock: BaseFileLock | None = None

    def acquire(self) -> None:
        """Makes the folders and takes the lock, or raises `HomeError`. Blocks for a fifth of a second at most."""
        from filelock import FileLock, Timeout

        self._home.make()
        # Not at the first try: `running_node`, asked from another process, holds the lock for a moment.
        lock = FileLock(self._home.root / "data/run/node.lock", timeout=0.2)
        try:
            lock.acquire(poll_interval=0.02)
        except Timeout:
            other = self._home.running_node() or {}
            told = ", ".join(f"{key} {other[key]}" for key in ("node", "pid", "gateway") if key in other)
            raise HomeError(
                f"a node already runs on {self._home.root} ({told or 'it does not say which'}): "
                "stop it with `make stop`, talk to it with `infsvc status`, or use another INFSVC_HOME"
            ) from None
        except OSError as error:
            raise HomeError(
                f"the home folder {self._home.root} cannot be locked ({error}): use another INFSVC_HOME"
            ) from error
        self._lock = lock

    def tell(self, **facts: Any) -> None:
        """Writes who runs here, for a second node, `infsvc status` and `make stop`."""
        path = self._home.node_file
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"pid": os.getpid(), **facts}))
        part.replace(path)

    def release(self) -> None:
        """Gives the home back. Safe to call twice."""
        if self._lock is not None:
            with suppress(OSError):
                self._home.node_file.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
