"""Runs for tests of the orchestrator: small requests, and the orchestrator itself in this process or in another."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.execution import Services
from orchestrator.executor import RunExecutor
from orchestrator.servicer import SERVICE, OrchestratorServicer
from orchestrator.settings import OrchestratorSettings
from preceptor.channel import call, connect, health_of, is_serving, new_request_id, stream
from preceptor.config import RunConfig
from preceptor.convert import task_to_proto
from preceptor.database import open_database
from preceptor.server import Server
from preceptor.tasks import Augmentations, Bank, Directive, FewShotTask, GridPair, Passage, Question, SelfEdit
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.v1 import evaluator_pb2_grpc, orchestrator_pb2_grpc, student_pb2_grpc, teacher_pb2_grpc
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types

FINAL = (pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED)
GENRES = ("register", "narrative", "correction")
STRATEGIES = (
    {"prompt_format": "copy", "learning_rate": 1e-3, "epochs": 4},
    {"prompt_format": "self_qa", "learning_rate": 3e-3, "epochs": 8, "replay_share": 0.25},
)


def passage(name: str, *, questions: int = 4, references: bool = True, sealed: bool = True) -> types.Task:
    """A task with questions in the banks."""
    banks = (Bank.REWARD, Bank.SEALED) if sealed else (Bank.REWARD,)
    asked = tuple(
        Question(f"{bank}: what is fact {i} of {name}?", f"answer {i}", bank)
        for bank in banks
        for i in range(questions)
    )
    edits = {
        "oracle": SelfEdit(tuple(f"right fact {i} of {name}." for i in range(questions))),
        "shuffled_facts": SelfEdit(tuple(f"wrong fact {i} of {name}." for i in range(questions))),
    }
    number = sum(map(ord, name))
    task = Passage(
        title=name,
        text=f"All about {name}.\nMore about {name}.",
        questions=asked,
        labels={"genre": GENRES[number % 3]},
        reference_edits=edits if references else {},
    )
    return task_to_proto(task)


def few_shot(name: str, *, queries: int = 2) -> types.Task:
    """A few-shot task with reference edits."""
    number, dice = sum(map(ord, name)), random.Random(name)

    def pair() -> GridPair:
        row = tuple(dice.randrange(10) for _ in range(6))
        return GridPair((row, row[::-1]), (row[::-1], row))

    right, wrong = (SelfEdit((), Directive(augmentations=Augmentations(basic=basic))) for basic in (True, False))
    task = FewShotTask(
        name=name,
        demonstrations=tuple(pair() for _ in range(3)),
        queries=tuple(pair() for _ in range(queries)),
        labels={"genre": GENRES[number % 3]},
        reference_edits={"oracle": right, "shuffled_facts": wrong},
    )
    return task_to_proto(task)


def run_config(**changes: Any) -> RunConfig:
    """Two rounds of three tasks and four self-edits, four held-out tasks; ``rounds={"count": 1}`` changes a section."""
    values: dict[str, Any] = {
        "name": "test",
        "tasks": {"world": "almanac"},
        "rounds": {"count": 2, "tasks": 3, "self_edits": 4},
        "heldout": {"fixed_strategies": STRATEGIES, "selection_tasks": 2, "bootstrap_resamples": 200},
    }
    for section, value in changes.items():
        values[section] = {**values.get(section, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


def few_shot_config(**changes: Any) -> RunConfig:
    """``run_config`` for few-shot tasks: the fixed strategies are directives."""
    base: dict[str, Any] = {"learning_rate": 1e-3, "epochs": 4}
    strategies = (base, base | {"rank": 4, "loss_mask": "outputs_only", "augmentations": {"basic": True}})
    return run_config(**changes | {"heldout": {"fixed_strategies": strategies} | changes.get("heldout", {})})


def few_shot_request(config: RunConfig | None = None) -> pb.CreateRunRequest:
    """A request for a run on few-shot tasks."""
    request = create_request(config or few_shot_config(), train=0, heldout=0)
    request.tasks.extend(few_shot(f"rule {i}") for i in range(5))
    request.heldout_tasks.extend(few_shot(f"other rule {i}") for i in range(4))
    return request


def create_request(config: RunConfig | None = None, *, train: int = 5, heldout: int = 4) -> pb.CreateRunRequest:
    """A request for a run of ``config``."""
    return pb.CreateRunRequest(
        request_id=new_request_id(),
        config_json=(config or run_config()).to_json(),
        tasks=[passage(f"town {i}") for i in range(train)],
        heldout_tasks=[passage(f"river {i}") for i in range(heldout)],
        probes=[types.Question(text=f"old {i}?", answer=str(i)) for i in range(40)],
        replay_documents=["Old knowledge."],
    )


@dataclass(frozen=True)
class Orchestrator:
    """A client of an orchestrator."""

    stub: orchestrator_pb2_grpc.OrchestratorServiceStub
    address: str = ""

    def create(self, request: pb.CreateRunRequest) -> str:
        """Creates a run, returns its id."""
        return call(self.stub.CreateRun, request).run.id

    def run(self, run_id: str) -> pb.Run:
        """The run now."""
        return call(self.stub.GetRun, pb.GetRunRequest(run_id=run_id)).run

    def progress(self, run_id: str) -> pb.RunProgress:
        """The progress now."""
        return call(self.stub.GetRun, pb.GetRunRequest(run_id=run_id)).progress

    def finish(self, run_id: str, seconds: float = 60) -> pb.Run:
        """The run once it is in a final state."""
        *_, last = stream(self.stub.WatchRun, pb.WatchRunRequest(run_id=run_id), deadline=seconds)
        assert last.run.state in FINAL
        return last.run

    def cancel(self, run_id: str) -> pb.Run:
        """Cancels it."""
        return call(self.stub.CancelRun, pb.CancelRunRequest(request_id=new_request_id(), run_id=run_id)).run

    def resume(self, run_id: str) -> pb.Run:
        """Resumes it."""
        return call(self.stub.ResumeRun, pb.ResumeRunRequest(request_id=new_request_id(), run_id=run_id)).run

    def self_edits(self, run_id: str) -> list[pb.LedgerSelfEdit]:
        """The whole ledger, page by page."""
        found: list[pb.LedgerSelfEdit] = []
        token = ""
        while True:
            request = pb.ListSelfEditsRequest(run_id=run_id, page_size=7, page_token=token)
            answer = call(self.stub.ListSelfEdits, request)
            found.extend(answer.self_edits)
            if not (token := answer.next_page_token):
                return found

    def summary(self, run_id: str) -> dict[str, Any]:
        """summary.json."""
        report = call(self.stub.GetRunReport, pb.GetRunReportRequest(run_id=run_id))
        summary: dict[str, Any] = json.loads(report.summary_json)
        return summary


@contextmanager
def orchestrator_here(
    house: ScriptedHouse, home: Path, evaluator_ahead: float = 0.0, external: str = "", **settings: Any
) -> Iterator[Orchestrator]:
    """An orchestrator in this process, behind a real server. ``evaluator_ahead``: seconds by which the evaluator's
    clock is wrong, as the orchestrator finds it; ``external``: address of the external teacher."""
    where = OrchestratorSettings(home=home, grace_seconds=0, **{"patience_seconds": 20.0, **settings})
    engine = open_database(where.database("orchestrator"), "orchestrator.migrations")
    services = Services(
        teacher=connect(house.address("teacher"), teacher_pb2_grpc.TeacherServiceStub),
        student=connect(house.address("student"), student_pb2_grpc.StudentServiceStub),
        evaluator=connect(house.address("evaluator"), evaluator_pb2_grpc.EvaluatorServiceStub),
        evaluator_ahead=lambda: health_of(house.address("evaluator")).seconds_ahead + evaluator_ahead,
        external_teacher=connect(external, teacher_pb2_grpc.TeacherServiceStub) if external else None,
    )
    executor = RunExecutor(engine, services, where)
    servicer = OrchestratorServicer(engine, services, executor)
    executor.start()
    server = Server(
        [SERVICE],
        lambda grpc_server: orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, grpc_server),
        where,
    )
    try:
        address = f"127.0.0.1:{server.port}"
        yield Orchestrator(connect(address, orchestrator_pb2_grpc.OrchestratorServiceStub), address)
    finally:
        executor.drain()
        server.stop()
        executor.join(20)
        engine.dispose()


class OrchestratorProcess:
    """``python -m orchestrator`` as a process that can be killed and started again on the same home and port."""

    def __init__(self, house: ScriptedHouse, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._log = home / "orchestrator.log"
        self._environment = os.environ | {
            "PRECEPTOR_HOME": str(home),
            "PRECEPTOR_PORT": str(port),
            "PRECEPTOR_TEACHER_ADDRESS": house.address("teacher"),
            "PRECEPTOR_STUDENT_ADDRESS": house.address("student"),
            "PRECEPTOR_EVALUATOR_ADDRESS": house.address("evaluator"),
            "PRECEPTOR_PATIENCE_SECONDS": "20",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.client = Orchestrator(connect(self.address, orchestrator_pb2_grpc.OrchestratorServiceStub))

    def start(self) -> None:
        """Starts it and waits until it serves."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator"], env=self._environment, stdout=log, stderr=log
            )
        end = time.monotonic() + 60
        while not is_serving(self.address):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self.send(signal.SIGTERM)
        return self._process.wait(30)
