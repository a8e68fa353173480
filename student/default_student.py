"""The student that an empty registry begins with, so that a first run needs no other command."""

from __future__ import annotations

import logging
import re

from sqlalchemy.orm import Session

from preceptor.errors import PreceptorError
from preceptor.stack import shipped_models
from student.registry import Registry
from student.source import inspect

log = logging.getLogger(__name__)

SHIPPED = "almanac"
# As it would be given to `preceptor students register NAME --source SOURCE --revision REVISION`.
_GIVEN = re.compile(r"([a-z0-9_.-]{1,64})=(\S.*)")
_HUB_AT_REVISION = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")


def parse_default(given: str) -> tuple[str, str, str]:
    """Name, source and revision of ``almanac`` (the one that ships), ``NAME=FOLDER`` or ``NAME=HUB_ID[@REVISION]``.

    Raises PreceptorError(BAD_CONFIG).
    """
    if given == SHIPPED:
        return SHIPPED, str(shipped_models() / "student"), ""
    if not (parts := _GIVEN.fullmatch(given)):
        message = f"PRECEPTOR_DEFAULT_STUDENT={given} is neither {SHIPPED} nor NAME=FOLDER nor NAME=HUB_ID@REVISION"
        raise PreceptorError("BAD_CONFIG", message, field="PRECEPTOR_DEFAULT_STUDENT")
    name, source = parts.groups()
    if pinned := _HUB_AT_REVISION.fullmatch(source):
        return name, pinned[1], pinned[2]
    return name, source, ""


def register_default(registry: Registry, given: str) -> None:
    """Registers and activates it, both or nothing, where no student is registered yet.

    A hub that does not answer is logged, and asked again at the next start. Raises PreceptorError(BAD_CONFIG), and as
    ``student.source.inspect`` does for whatever else is wrong with the source.
    """
    if not given or registry.students("", 1):
        return
    name, source, revision = parse_default(given)
    try:
        facts = inspect(source, revision)
    except PreceptorError as error:
        if error.reason != "MODEL_UNREACHABLE":
            raise
        log.warning("PRECEPTOR_DEFAULT_STUDENT=%s is not registered: %s", given, error)
        return

    def act(session: Session) -> bytes:
        registry.register(session, name, facts)
        registry.activate(session, name)
        return b""

    registry.once(f"default-student-{facts.commit[:64]}", name.encode(), act)
    log.info("the registry was empty; %s is active now (%s, %s)", name, facts.source, facts.commit[:12])
