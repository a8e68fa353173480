"""Logs: short lines for a terminal, JSON for machines. Never a secret, never a whole prompt at INFO."""

from __future__ import annotations

import json
import logging
import sys
import time

from preceptor.settings import HouseSettings


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, service, logger, message, and the traceback where there is one."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as a JSON line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(service: str, settings: HouseSettings) -> None:
    """Sends this process's log to stderr in the form that the settings ask for."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter(service))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {service} %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # Third parties that narrate every connection at INFO, or log every result whole.
    for noisy in ("httpx", "urllib3", "filelock", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
