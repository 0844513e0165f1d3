"""Logging of the package: loggers below `fastgpt`, silent until a program calls `setup`.

A program that embeds FastGPT keeps its own handlers; only our commands call `setup`.
"""

import logging
import sys

from fastgpt.errors import ConfigError

__all__ = ["LEVELS", "get_logger", "setup"]

LEVELS = ("debug", "info", "warning", "error")

# Libraries that our commands run, whose warnings go out in the same form.
_GUESTS = ("uvicorn",)

_ROOT = logging.getLogger("fastgpt")
_ROOT.addHandler(logging.NullHandler())


class _LineFormatter(logging.Formatter):
    """One record is one line: control characters of the message are escaped (no forged lines)."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if not message.isprintable():
            message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        clock = self.formatTime(record, "%H:%M:%S")
        place = record.name.removeprefix("fastgpt.")
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {place}: {message}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; pass `__name__`."""
    return logging.getLogger(name)


def setup(level: str = "info") -> None:
    """Send the package's records of at least `level` to standard error, one line each.

    Raises:
        ConfigError: if level is not one of LEVELS.
    """
    if level.lower() not in LEVELS:
        raise ConfigError(f"log level is {level!r}; expected one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    _ROOT.handlers = [handler]
    _ROOT.setLevel(level.upper())
    _ROOT.propagate = False
    for name in _GUESTS:
        guest = logging.getLogger(name)
        guest.handlers = [handler]
        guest.setLevel(max(logging.WARNING, _ROOT.level))
        guest.propagate = False
