"""The scripted services behind real gRPC servers on loopback, which can go away and come back. Plumbing only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import grpc

from preceptor.server import Server
from preceptor.settings import ServiceSettings
from preceptor.testing.scripted_evaluator import ScriptedEvaluator
from preceptor.testing.scripted_student import ScriptedStudents
from preceptor.testing.scripted_teacher import ScriptedTeacher
from preceptor.v1 import evaluator_pb2_grpc, student_pb2_grpc, teacher_pb2_grpc


class ScriptedHouse:
    """Teacher, students and evaluator, each on a port of its own for as long as the house stands."""

    def __init__(
        self, home: Path, teacher: ScriptedTeacher | None = None, evaluator: ScriptedEvaluator | None = None
    ) -> None:
        self._home = home
        # What the scripted services leave out answers UNIMPLEMENTED.
        self.teacher = teacher or ScriptedTeacher()  # type: ignore[abstract]
        self.students = ScriptedStudents()  # type: ignore[abstract]
        self.evaluator = evaluator or ScriptedEvaluator()  # type: ignore[abstract]
        self._adders: dict[str, Callable[[grpc.Server], None]] = {
            "teacher": lambda server: teacher_pb2_grpc.add_TeacherServiceServicer_to_server(self.teacher, server),
            "student": lambda server: student_pb2_grpc.add_StudentServiceServicer_to_server(self.students, server),
            "evaluator": lambda server: evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(
                self.evaluator, server
            ),
        }
        self._servers: dict[str, Server] = {}
        self._ports: dict[str, int] = {}

    def start(self, name: str) -> None:
        """Serves ``teacher``, ``student`` or ``evaluator``, on the port it had before if it had one."""
        settings = ServiceSettings(
            home=self._home, host="127.0.0.1", port=self._ports.get(name, 0), grace_seconds=0, max_threads=64
        )
        service = f"preceptor.v1.{name.capitalize()}Service"
        server = Server([service], self._adders[name], settings)
        self._servers[name], self._ports[name] = server, server.port

    def stop(self, name: str) -> None:
        """Cuts every call and closes the port, as a death would."""
        if (server := self._servers.pop(name, None)) is not None:
            server.stop()

    def address(self, name: str) -> str:
        """``host:port`` of a service."""
        return f"127.0.0.1:{self._ports[name]}"

    def __enter__(self) -> ScriptedHouse:
        for name in self._adders:
            self.start(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._adders:
            self.stop(name)
