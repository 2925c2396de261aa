"""The structured log: every line a JSON object in `data/logs/node.jsonl`, on stdout when there is no screen, and on
the event bus.

Code below logs with the standard library and `extra={"code": …, "model": …, "meta": {…}}`; this module gives those
fields their form.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from engine.native_log import NativeLog
from infsvc.events import Event, EventBus, LogLine

_TAIL_S = 0.2
_FILE_BYTES = 16 * 2**20


class _Formatter(JsonFormatter):
    """`{ts, level, logger, code, msg, model?, meta?}`, and `exc_info` for a traceback."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["ts"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data["level"] = record.levelname.lower()
        log_data["code"] = getattr(record, "code", record.name)
        log_data["msg"] = record.getMessage()
        for name in ("model", "meta"):
            value = getattr(record, name, None)
            if value is not None:
                log_data[name] = value
        if record.exc_info:
            log_data["exc_info"] = self.formatException(record.exc_info)


class _BusHandler(logging.Handler):
    """Puts log records on the event bus, from any thread."""

    def __init__(self, events: EventBus) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "on_bus", False):
            return
        self._events.publish_threadsafe(
            LogLine(
                ts=record.created,
                model=getattr(record, "model", None),
                level=record.levelname.lower(),
                code=getattr(record, "code", record.name),
                msg=record.getMessage(),
                meta=getattr(record, "meta", None),
            )
        )


class NodeLog:
    """Owns the handlers of the `infsvc` logger and the task that tails native output.

    Args:
        stdout: whether each line also goes to standard output.
    """

    def __init__(self, folder: Path, events: EventBus, *, level: str, stdout: bool) -> None:
        self._events = events
        self._native = NativeLog(folder / "native.log")
        self._logger = logging.getLogger("infsvc")
        # The logger outlives the node, and so do its settings unless they are given back.
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(level.upper())
        self._logger.propagate = False
        formatter = _Formatter()
        handlers: list[logging.Handler] = [
            logging.handlers.RotatingFileHandler(
                folder / "node.jsonl", maxBytes=_FILE_BYTES, backupCount=2, encoding="utf-8", delay=True
            ),
            _BusHandler(events),
        ]
        if stdout:
            handlers.append(logging.StreamHandler(sys.stdout))
        for handler in handlers:
            if not isinstance(handler, _BusHandler):
                handler.setFormatter(formatter)
            self._logger.addHandler(handler)
        self._handlers = handlers
        self._task: asyncio.Task[None] | None = None
        events.listen(self._from_bus)

    def start(self) -> None:
        """Begins to tail native output."""
        self._task = asyncio.create_task(self._tail(), name="native-log")

    async def close(self) -> None:
        """Writes the last native lines, takes the handlers off and leaves the logger as it was found."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._read()
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)

    def _from_bus(self, event: Event) -> None:
        """Lines that were born as events (a model's notes) go to the files too; those from the logger came from
        there.
        """
        if isinstance(event, LogLine) and event.code.startswith("model."):
            self._logger.log(
                logging.getLevelNamesMapping().get(event.level.upper(), logging.INFO),
                event.msg,
                extra={"code": event.code, "model": event.model, "meta": event.meta, "on_bus": True},
            )

    async def _tail(self) -> None:
        while True:
            self._read()
            await asyncio.sleep(_TAIL_S)

    def _read(self) -> None:
        for level, text in self._native.read():
            self._logger.log(logging.getLevelNamesMapping()[level.upper()], text, extra={"code": "llama"})
