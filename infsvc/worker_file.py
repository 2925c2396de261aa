"""Worker files while a node runs: a new one is written into the home, checked by the same types that read it, so that
what is written can be started; one that was put there or changed by hand is read when its model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from infsvc.errors import ConfigError
from infsvc.home import Home
from infsvc.settings import NodeSettings, WorkerSettings, load_worker

_PLAIN = re.compile(r"[A-Za-z0-9._:/@%+,=?&-]*$")


def write_worker(
    home: Home, node: NodeSettings, values: Mapping[str, str], others: Iterable[WorkerSettings]
) -> WorkerSettings:
    """Writes `envs/worker.<name>.env`.

    Args:
        values: the file's keys in capitals, MODEL_NAME among them; empty ones are left out.
        others: the worker files that there are, whose names and ports are taken.

    Raises:
        ConfigError: a value is wrong, the name or the port is taken, or the file cannot be written.
    """
    name = values.get("MODEL_NAME", "")
    text = "".join(f"{key}={_quoted(key, value)}\n" for key, value in values.items() if value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            "letters, digits, dots, dashes and underscores, at most 64, the first a letter or digit", key="MODEL_NAME"
        )
    path = home.root / f"envs/worker.{name}.env"
    fresh = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        settings = load_worker(name, fresh, node)
        _check_free(settings, node, others)
        if path.exists() or name in home.worker_files():
            raise ConfigError(f"there is a worker file of that name: {path}", key="MODEL_NAME")
        fresh.rename(path)
        return load_worker(name, path, node)
    except ConfigError as error:
        # The file that it names is gone by now.
        raise ConfigError(
            str(error)
            .removeprefix(f"{error.file}:{error.line}: ")
            .removeprefix(f"{error.file}: ")
            .removeprefix(f"{error.key}: "),
            key=error.key,
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        fresh.unlink(missing_ok=True)


def read_new(home: Home, node: NodeSettings, name: str) -> WorkerSettings | None:
    """The worker file of a model that was not there when the node started; None when there is none of that name.

    Raises:
        ConfigError: the file is wrong, or gives the model another name.
    """
    path = home.worker_files().get(name)
    if path is None:
        return None
    settings = load_worker(name, path, node)
    if settings.model_name != name:
        raise settings.wrong("MODEL_NAME", f"it is {settings.model_name}, and {name} is asked for")
    return settings


def read_again(home: Home, node: NodeSettings, settings: WorkerSettings) -> WorkerSettings:
    """What a model's worker file says now; the same settings where the file has gone.

    Raises:
        ConfigError: the file is wrong, or changes what is fixed for as long as the node runs.
    """
    name = "" if settings.file is None else Path(settings.file).name.removeprefix("worker.").removesuffix(".env")
    path = home.worker_files().get(name)
    if path is None:
        return settings
    fresh = load_worker(name, path, node)
    for key in ("model_name", "db_path"):
        before = getattr(settings, key)
        if getattr(fresh, key) != before:
            raise fresh.wrong(key.upper(), f"it was {before} when the node started: start the node again")
    return fresh


def _check_free(settings: WorkerSettings, node: NodeSettings, others: Iterable[WorkerSettings]) -> None:
    port = settings.address.port if settings.address else 0
    if port and port == node.gateway_address.port:
        raise ConfigError(f"port {port} is the gateway's", key="HTTP_ADDR")
    for other in others:
        if other.model_name == settings.model_name:
            raise ConfigError(f"there is a model {other.model_name} already", key="MODEL_NAME")
        if other.db_path == settings.db_path:
            raise ConfigError(f"{other.model_name} has that file", key="DB_PATH")
        if port and other.address is not None and other.address.port == port:
            raise ConfigError(f"port {port} is {other.model_name}'s", key="HTTP_ADDR")


def _quoted(key: str, value: str) -> str:
    if any(ord(character) < 32 for character in value):
        raise ConfigError("one line without control characters", key=key)
    if _PLAIN.match(value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
