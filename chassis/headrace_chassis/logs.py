"""Logs: one JSON object a line; each line written inside an RPC carries the request id."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

import grpc
import orjson

LEVELS = ("debug", "info", "warning", "error")

# Set by the interceptor for the task of an RPC, and copied into the tasks it starts.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; `extra={"fields": {...}}` adds keys."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line without a newline."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id.get():
            line["request_id"] = request_id
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            line |= fields
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def _is_news(record: logging.LogRecord) -> bool:
    """False for two reports of grpc that tell of no fault here.

    One says that an answer could not be sent because the client is gone. The other quotes a header that is no UTF-8,
    and a token with a stray byte is still most of a token.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError | UnicodeDecodeError))


def configure(level: str, stream: TextIO) -> None:
    """Sends all of this process's logs to `stream`, from `level` (one of LEVELS) on."""
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    # Python looks these three up for every record; no line shows them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)
    # At debug level grpc reports every cancelled call and every event loop.
    logging.getLogger("grpc").setLevel(max(root.level, logging.INFO))
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    logging.getLogger("asyncio").setLevel(max(root.level, logging.INFO))
