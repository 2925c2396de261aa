"""A model's file on this disk: where it lies, and its removal, which never touches what cannot be fetched again."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from engine.model_source import describe
from infsvc.errors import LoadError
from infsvc.home import Home
from infsvc.settings import WorkerSettings

DEMO = Path("data/models/demo/model.gguf")
"""The file that ships, below `Home.shipped`."""


def origin(settings: WorkerSettings, path: Path) -> str:
    """Where the file at `path` comes from as people read it: the worker file's source, `ships`, or "" for a file that
    is put there by hand."""
    return describe(settings) or ("ships" if path.as_posix().endswith(DEMO.as_posix()) else "")


def part_of(target: Path) -> Path:
    """Where an unfinished download of `target` lies."""
    return target.with_name(target.name + ".part")


def facts_of(target: Path) -> Path:
    """Where it stands of which remote file the unfinished download is."""
    return target.with_name(target.name + ".part.json")


def lock_of(target: Path) -> FileLock:
    """What whoever writes or removes the file holds, in any process; not yet taken, and taken without waiting."""
    return FileLock(target.with_name(f".{target.name}.lock"), timeout=0, thread_local=False)


def forget_part(target: Path) -> None:
    """Removes an unfinished download of `target`."""
    for path in (part_of(target), facts_of(target)):
        path.unlink(missing_ok=True)


def remove_file(home: Home, settings: WorkerSettings) -> int:
    """Removes a model's file, which nobody may be using, with what has come of an unfinished download.

    Returns:
        The bytes that were freed.

    Raises:
        LoadError: it is not there, ships with infsvc, is a user's own, or cannot be removed.
    """
    path = home.find(settings.model_path)
    parts = [each for each in (path, part_of(path)) if each.is_file()]
    if not parts:
        raise LoadError(f"{path} is not there")
    ships = path.resolve() == (home.shipped / DEMO).resolve()
    ours = bool(describe(settings)) or path.resolve().is_relative_to(home.root.resolve())
    if path.is_file() and (ships or not ours):
        raise LoadError(f"{path} was not fetched by infsvc and could not be fetched again: remove it yourself")
    try:
        with lock_of(path) as lock:
            n_bytes = sum(each.stat().st_size for each in parts)
            path.unlink(missing_ok=True)
            forget_part(path)
            Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise LoadError(f"{path} is being fetched by another model or process: stop that first") from None
    except OSError as error:
        raise LoadError(f"{path} cannot be removed ({error.strerror or error})") from error
    return n_bytes
