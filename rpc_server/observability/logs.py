"""How the server logs: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from protocol.text import printable

TEXT = "%(asctime)s %(levelname)-7s %(message)s"

# What a record has by itself; anything else was given by whoever logged it.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "client"}


class LineBudget:
    """A budget of log lines for clients of each address: some at once, then a few.

    Whoever makes the server log a line for each message, or connects again and again, would fill
    the disk and push out what others' lines say.
    """

    AT_ONCE = 2000
    A_SECOND = 10.0
    _ADDRESSES = 4096

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Of each address: lines it may bring now, when that was, and lines that were left out.
        self._left: OrderedDict[str, tuple[float, float, int]] = OrderedDict()

    def take(self, address: str) -> int | None:
        """Count a line: None if it is to be left out, else how many were left out before it."""
        now = self._clock()
        left, since, untold = self._left.pop(address, (float(self.AT_ONCE), now, 0))
        left = min(self.AT_ONCE, left + (now - since) * self.A_SECOND)
        fits = left >= 1
        self._left[address] = (left - 1, now, 0) if fits else (left, now, untold + 1)
        if len(self._left) > self._ADDRESSES:
            self._left.popitem(last=False)
        return untold if fits else None


class ClientLog:
    """A logger whose lines begin with the client's name; as JSON it is a field."""

    def __init__(
        self, logger: logging.Logger, name: str, budget: LineBudget | None = None, address: str = ""
    ) -> None:
        """``budget`` bounds the lines of clients at ``address``; None: there is no bound."""
        self._logger = logger
        self._name = name
        self._budget = budget
        self._address = address

    def log(
        self,
        level: int,
        message: str,
        *args: object,
        extra: Mapping[str, Any] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Log a line; ``extra`` are fields for programs; ``error`` is logged with its trace."""
        if self._logger.isEnabledFor(level):
            # Whoever asks for debug lines wants all of them.
            if self._budget is not None and level > logging.DEBUG:
                left_out = self._budget.take(self._address)
                if left_out is None:
                    return
                if left_out:
                    self._logger.warning(
                        "%d lines about clients at %s were left out", left_out, self._address
                    )
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


class TextFormatter(logging.Formatter):
    """A line for people, which begins with ``part`` if there is one; a trace comes below it."""

    def __init__(self, form: str | None = None, clock: str | None = None, part: str = "") -> None:
        super().__init__(form, clock)
        self._begin = f"{part}: " if part else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = self._begin + printable(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """An object with time (UTC), level, logger, message, further fields.

    It names the client and the ``part`` of a split if there is one.
    """

    def __init__(self, part: str = "") -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if self._part:
            line["part"] = self._part
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


def set_up(level: str, form: Literal["text", "json"], part: str = "") -> None:
    """Log to stderr from ``level`` on; of the server for a coordinator's ``part`` by its name."""
    handler = _ToStderr()
    text = TextFormatter(TEXT, "%H:%M:%S", part)
    handler.setFormatter(JsonFormatter(part) if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
