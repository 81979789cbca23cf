"""How the server logs: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, TextIO

TEXT = "%(asctime)s %(levelname)-7s %(message)s"

# What a record has by itself; anything else was given by whoever logged it.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "client"}


class ClientLog:
    """A logger whose lines begin with the client's name; as JSON it is a field."""

    def __init__(self, logger: logging.Logger, name: str) -> None:
        self._logger = logger
        self._name = name

    def log(
        self,
        level: int,
        message: str,
        *args: object,
        extra: Mapping[str, Any] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """``extra`` are fields for programs; ``error`` is logged with its trace."""
        if self._logger.isEnabledFor(level):
            self._logger.log(
                level,
                "%s: " + message,
                self._name,
                *args,
                extra={"client": self._name, **(extra or {})},
                exc_info=error,
            )

    def debug(self, message: str, *args: object) -> None:
        self.log(logging.DEBUG, message, *args)

    def info(self, message: str, *args: object) -> None:
        self.log(logging.INFO, message, *args)

    def warning(self, message: str, *args: object) -> None:
        self.log(logging.WARNING, message, *args)


class JsonFormatter(logging.Formatter):
    """An object with time (UTC), level, logger, client if there is one, message, further fields."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        client = getattr(record, "client", None)
        if client:
            line["client"] = client
            message = message.removeprefix(f"{client}: ")
        line["message"] = message
        line |= {k: v for k, v in vars(record).items() if k not in _STANDARD}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _ToStderr(logging.StreamHandler[TextIO]):
    """To what stderr is when a line is logged: while a terminal shows progress that is a proxy."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def set_up(level: str, form: Literal["text", "json"]) -> None:
    """Log to stderr from ``level`` on."""
    handler = _ToStderr()
    text = logging.Formatter(TEXT, "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
