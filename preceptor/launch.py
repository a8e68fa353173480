"""How every process begins: read the settings, the token and the certificates, then import what is heavy, then run.

A wrong setting is one message.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from preceptor.errors import PreceptorError
from preceptor.security import load_security
from preceptor.settings import HouseSettings
from preceptor.telemetry import Telemetry, set_up_logging, telemetry

Settings = TypeVar("Settings", bound=HouseSettings)


def launch(process: str, settings_type: type[Settings], run: Callable[[Settings, Telemetry], None]) -> int:
    """Runs ``run(settings, telemetry)`` until it returns; ``run`` imports what is heavy.

    Returns the exit code: 0 after a drain, 2 where the process cannot start (said on stderr, without a traceback).
    """
    try:
        settings = settings_type()
    except ValidationError as error:
        for problem in error.errors():
            message = problem["msg"].removeprefix("Value error, ")
            variable = "_".join(("PRECEPTOR", *map(str, problem["loc"]))).upper()
            print(f"{process}: {variable}: {message}" if problem["loc"] else f"{process}: {message}", file=sys.stderr)
        return 2
    set_up_logging(process, settings)
    try:
        load_security(settings)
        with telemetry(process, settings) as seen:
            run(settings, seen)
    except PreceptorError as error:
        print(f"{process}: {error}\n  next: {error.next_step} ({error.reason})", file=sys.stderr)
        return 2
    return 0
