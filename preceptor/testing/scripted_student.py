"""A StudentService with two registered names and no model. Scripted: plumbing only."""

from __future__ import annotations

import grpc

from preceptor.errors import PreceptorError
from preceptor.v1 import student_pb2 as pb
from preceptor.v1 import student_pb2_grpc
from preceptor.v1 import types_pb2 as types


class ScriptedStudents(student_pb2_grpc.StudentServiceServicer):
    """Students ``first`` (active) and ``second``."""

    def __init__(self) -> None:
        self.active = "first"
        self._students = {
            name: pb.Student(
                name=name,
                pinned=types.PinnedStudent(name=name, source=f"/students/{name}", commit=f"commit-of-{name}"),
            )
            for name in ("first", "second")
        }

    def GetStudent(self, request: pb.GetStudentRequest, context: grpc.ServicerContext) -> pb.GetStudentResponse:
        """One student, or the active one."""
        name = request.name or self.active
        if name not in self._students:
            raise PreceptorError("STUDENT_NOT_FOUND", f"there is no student {name!r}")
        return pb.GetStudentResponse(student=self._students[name])

    def ActivateStudent(
        self, request: pb.ActivateStudentRequest, context: grpc.ServicerContext
    ) -> pb.ActivateStudentResponse:
        """The swap."""
        self.active = request.name
        return pb.ActivateStudentResponse(deployment=pb.Deployment(name=request.name, state=pb.DEPLOYMENT_STATE_READY))
