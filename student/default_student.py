"""The student that an empty registry begins with, so that a first run needs no other command; and where that is one
that ships, the others that ship, registered under fixed names, so that any run can name them."""

from __future__ import annotations

import logging
import re

from sqlalchemy.orm import Session

from preceptor.errors import PreceptorError
from preceptor.stack import SHIPPED_STUDENTS, shipped_student
from student.registry import Registry
from student.source import inspect

log = logging.getLogger(__name__)

# As it would be given to `preceptor students register NAME --source SOURCE --revision REVISION`.
_GIVEN = re.compile(r"([a-z0-9_.-]{1,64})=(\S.*)")
_HUB_AT_REVISION = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")


def parse_default(given: str) -> tuple[str, str, str]:
    """Name, source and revision of one that ships (by its name), ``NAME=FOLDER`` or ``NAME=HUB_ID[@REVISION]``.

    Raises PreceptorError(BAD_CONFIG).
    """
    if given in SHIPPED_STUDENTS:
        return given, str(shipped_student(given)), ""
    if not (parts := _GIVEN.fullmatch(given)):
        shipped = ", ".join(SHIPPED_STUDENTS)
        message = f"PRECEPTOR_DEFAULT_STUDENT={given} is neither of {shipped} nor NAME=FOLDER nor NAME=HUB_ID@REVISION"
        raise PreceptorError("BAD_CONFIG", message, field="PRECEPTOR_DEFAULT_STUDENT")
    name, source = parts.groups()
    if pinned := _HUB_AT_REVISION.fullmatch(source):
        return name, pinned[1], pinned[2]
    return name, source, ""


def register_default(registry: Registry, given: str) -> None:
    """Registers and activates it, both or nothing, where no student is registered yet. Where it is one that ships, the
    others that ship are registered too, each once (whoever deletes one has it deleted), and never over a student that
    has the name already.

    A hub that does not answer is logged, and asked again at the next start. Raises PreceptorError(BAD_CONFIG), and as
    ``student.source.inspect`` does for whatever else is wrong with the source.
    """
    if not given:
        return
    if not registry.students("", 1):
        _begin_with(registry, given)
    if given in SHIPPED_STUDENTS:
        for name in SHIPPED_STUDENTS:
            _add_shipped(registry, name)


def _begin_with(registry: Registry, given: str) -> None:
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


def _add_shipped(registry: Registry, name: str) -> None:
    facts = inspect(str(shipped_student(name)))

    def act(session: Session) -> bytes:
        registry.register(session, name, facts)
        return b""

    try:
        registry.once(f"shipped-student-{facts.commit[:64]}", name.encode(), act)
    except PreceptorError as error:
        if error.reason != "STUDENT_NAME_TAKEN":  # people's own, or an older one that ships: theirs stays
            raise
        log.info("the student %s that ships is not registered: %s", name, error)
