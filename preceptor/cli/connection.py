"""Where the stack is that a command talks to.

An address set in the environment counts first (another machine, compose), then the embedded stack of the home folder,
then the default address if something serves there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from preceptor.channel import connect, is_serving
from preceptor.errors import PreceptorError
from preceptor.settings import HouseSettings

if TYPE_CHECKING:
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub
    from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
    from preceptor.v1.student_pb2_grpc import StudentServiceStub
    from preceptor.v1.teacher_pb2_grpc import TeacherServiceStub

# Long enough for a service on another continent, short enough to say at once that there is none.
PROBE_SECONDS = 3.0


def house_settings() -> HouseSettings:
    """The settings in the environment. Raises PreceptorError(BAD_CONFIG) naming the variable."""
    try:
        return HouseSettings()
    except ValidationError as error:
        raise PreceptorError("BAD_CONFIG", f"environment variable {setting_problem(error)}") from None


def setting_problem(error: ValidationError) -> str:
    """The first wrong setting, in one line that begins with its variable."""
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    variable = "_".join(("PRECEPTOR", *map(str, first["loc"]))).upper()
    return f"{variable}: {message}" if first["loc"] else message


def stack_in_use(service: str = "orchestrator") -> HouseSettings:
    """The addresses of the stack that is up. Raises PreceptorError(STACK_NOT_UP)."""
    settings = house_settings()
    if found := find_stack(settings, service):
        return found
    address = getattr(settings, f"{service}_address")
    where = "" if _is_set(settings, service) else f"no stack is up for {settings.home.resolve()}, and "
    raise PreceptorError("STACK_NOT_UP", f"{where}no {service} answers at {address}")


def find_stack(settings: HouseSettings, service: str = "orchestrator") -> HouseSettings | None:
    """The stack to talk to, or None where none is up."""
    from preceptor.stack import running_stack

    # An embedded stack that has an owner is there, even while a service of it is just being started again.
    if not _is_set(settings, service) and (embedded := running_stack(settings.home)):
        return embedded
    return settings if is_serving(getattr(settings, f"{service}_address"), deadline=PROBE_SECONDS) else None


def _is_set(settings: HouseSettings, service: str) -> bool:
    return f"{service}_address" in settings.model_fields_set


def orchestrator_of(settings: HouseSettings) -> OrchestratorServiceStub:
    """The orchestrator of a stack."""
    from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

    return connect(settings.orchestrator_address, OrchestratorServiceStub)


def orchestrator_in_use() -> OrchestratorServiceStub:
    """The orchestrator of the stack that is up. Raises PreceptorError(STACK_NOT_UP)."""
    return orchestrator_of(stack_in_use())


def evaluator_in_use() -> EvaluatorServiceStub:
    """The evaluator of the stack that is up. Raises PreceptorError(STACK_NOT_UP)."""
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub

    return connect(stack_in_use("evaluator").evaluator_address, EvaluatorServiceStub)


def students_in_use() -> StudentServiceStub:
    """The student service of the stack that is up. Raises PreceptorError(STACK_NOT_UP)."""
    from preceptor.v1.student_pb2_grpc import StudentServiceStub

    return connect(stack_in_use("student").student_address, StudentServiceStub)


def teacher_in_use() -> TeacherServiceStub:
    """The teacher of the stack that is up. Raises PreceptorError(STACK_NOT_UP)."""
    from preceptor.v1.teacher_pb2_grpc import TeacherServiceStub

    return connect(stack_in_use("teacher").teacher_address, TeacherServiceStub)
