"""A stack for as long as a command needs it: the one that is up, or an embedded one of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from grpc import StatusCode

from preceptor.channel import call, new_request_id
from preceptor.cli.connection import find_stack, house_settings, orchestrator_of, stack_in_use
from preceptor.cli.follow import FINAL_STATES, Results, all_runs, fetch_results, follow, raise_if_unsuccessful
from preceptor.errors import PreceptorError
from preceptor.v1.orchestrator_pb2 import CancelRunRequest

if TYPE_CHECKING:
    from preceptor.cli.live import View
    from preceptor.settings import HouseSettings
    from preceptor.stack import Stack
    from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

# A person waits for Ctrl-C to work.
CANCEL_SECONDS = 3.0


@dataclass(frozen=True)
class Session:
    """The orchestrator, and the embedded stack if this command started it."""

    orchestrator: OrchestratorServiceStub
    stack: Stack | None

    def check(self) -> None:
        """Raises the PreceptorError that the embedded stack has failed with, if it has."""
        if self.stack and self.stack.failed:
            raise self.stack.failed

    def follow_to_results(self, run_id: str, out: Path, view: View, created_after: float | None) -> Results:
        """Shows the run until its end and writes its results.

        ``created_after``: seconds from the command's start to the run's; with it, the summary's times count from the
        command's start. None: the run is older than this command, so its own times stand. Raises PreceptorError
        where the run did not succeed.
        """
        try:
            run = follow(self.orchestrator, run_id, view, self.check)
        except (KeyboardInterrupt, SystemExit):
            self._lay_down(run_id)
            raise
        raise_if_unsuccessful(run)

        def measure(summary: dict[str, Any]) -> dict[str, Any]:
            measured: dict[str, Any] = {}
            if self.stack:
                measured["peak_memory_bytes"] = self.stack.peak_memory_bytes()
            if self.stack and created_after is not None:
                measured["wall_seconds"] = round(seconds_since_start(), 3)
                first = summary.get("time_to_first_reward_seconds")
                if first is not None and first >= 0:
                    measured["time_to_first_reward_seconds"] = round(created_after + first, 3)
            return measured

        return fetch_results(self.orchestrator, run_id, out, measure)

    def other_runs(self, run_id: str) -> list[str]:
        """Runs that go on beside this one, e.g. because their command was killed."""
        return [run.id for run in all_runs(self.orchestrator) if run.state not in FINAL_STATES and run.id != run_id]

    def _lay_down(self, run_id: str) -> None:
        """Cancels the run of a stack that is about to go down: else the next stack would go on with it unasked."""
        if self.stack:
            request = CancelRunRequest(request_id=new_request_id(), run_id=run_id)
            with suppress(PreceptorError):  # then it does go on by itself, which is no harm
                call(self.orchestrator.CancelRun, request, deadline=CANCEL_SECONDS)


@contextmanager
def embedded_session(workers: int, view: View, world: str | None) -> Iterator[Session]:
    """A stack of its own with the teacher of ``world`` (None: as the home's last), taken down on the way out.

    Raises what Stack raises.
    """
    from preceptor.stack import Stack

    with Stack(house_settings(), workers=workers, on_event=view.say, world=world) as stack:
        yield Session(orchestrator_of(stack.addresses), stack)


@contextmanager
def connected_session(world: str | None = None) -> Iterator[Session]:
    """The stack that is up, for a run on the tasks of ``world``.

    Raises PreceptorError(STACK_NOT_UP), and WRONG_TEACHER where another world's tiny teacher writes there.
    """
    addresses = stack_in_use()
    if world:
        check_teacher(addresses, world)
    yield Session(orchestrator_of(addresses), None)


def check_teacher(addresses: HouseSettings, world: str) -> None:
    """Raises PreceptorError(WRONG_TEACHER) where the teacher is the tiny one of another world than ``world``: it reads
    nothing but its own world's texts. Any other teacher may write about any task."""
    from preceptor.channel import connect
    from preceptor.hashes import folder_sha256
    from preceptor.stack import WORLDS, shipped_models
    from preceptor.v1.teacher_pb2 import GetPolicyRequest
    from preceptor.v1.teacher_pb2_grpc import TeacherServiceStub

    base = call(connect(addresses.teacher_address, TeacherServiceStub).GetPolicy, GetPolicyRequest()).policy.base_commit
    for other in WORLDS:
        folder = shipped_models(other) / "teacher"
        if other != world and folder.is_dir() and folder_sha256(folder) == base:
            message = f"the teacher of this stack is the world {other}'s; these tasks are the world {world}'s"
            raise PreceptorError("WRONG_TEACHER", message, world=world)


@contextmanager
def any_stack(
    service: str, workers: int, connect: bool, say: Callable[[str], None]
) -> Iterator[tuple[HouseSettings, Stack | None]]:
    """The addresses of the stack of which ``service`` is up, else of an embedded one for the time of the command.

    ``connect``: only of one that is up, else PreceptorError(STACK_NOT_UP).
    """
    if found := stack_in_use(service) if connect else find_stack(house_settings(), service):
        yield found, None
        return
    from preceptor.stack import Stack

    with Stack(house_settings(), workers=workers, on_event=say) as stack:
        yield stack.addresses, stack


@contextmanager
def any_session(workers: int, view: View) -> Iterator[Session]:
    """The stack that is up, else an embedded one."""
    if found := find_stack(house_settings()):
        yield Session(orchestrator_of(found), None)
    else:
        with embedded_session(workers, view, None) as session:
            yield session


@contextmanager
def resumable(out: Path) -> Iterator[list[tuple[str, Session]]]:
    """Says how to go on with a run when a command ends without its results. The command appends run and session."""
    begun: list[tuple[str, Session]] = []
    try:
        yield begun
    except BaseException as error:  # Ctrl-C and SIGTERM too; it goes on its way
        if begun and not (isinstance(error, PreceptorError) and error.code is StatusCode.INVALID_ARGUMENT):
            run_id, session = begun[-1]
            if session.stack:
                hint = f"the stack is down; go on with: preceptor runs resume {run_id} --out {out}"
            else:
                hint = f"follow the run with: preceptor runs watch {run_id}"
            print(hint, file=sys.stderr)
        raise


def seconds_since_start() -> float:
    """Seconds since this process began, its imports included."""
    return time.time() - float(psutil.Process().create_time())
