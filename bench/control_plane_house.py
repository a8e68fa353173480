"""The processes that ``bench.control_plane`` measures: real Redis, evaluator, orchestrator; scripted neighbours.

    python -m bench.control_plane_house FOLDER

serves a scripted teacher and scripted students (``preceptor.testing``) until its parent is gone, and prints where.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType

import psutil
import redis

from preceptor.channel import is_serving, open_channel
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.redis_server import EmbeddedRedis
from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub
from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

START_SECONDS = 60.0
NO_PORTS: Mapping[str, int] = MappingProxyType({})


class House:
    """Redis and an evaluator in a folder of their own; more where asked. Settings are the defaults, but for those
    given. Ends everything on the way out."""

    def __init__(self, folder: Path, *, metrics_ports: Mapping[str, int] = NO_PORTS, **settings: object) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = {f"PRECEPTOR_{name.upper()}": str(value) for name, value in settings.items()}
        self._metrics_ports = metrics_ports
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._server = EmbeddedRedis(folder / "redis", free_port())
        self.broker_url = self._server.url
        self.redis = redis.Redis.from_url(self.broker_url, socket_timeout=5)
        self._ports = {name: free_port() for name in ("evaluator", "orchestrator")}
        self._scripted: dict[str, str] = {}

    def __enter__(self) -> House:
        try:
            self.start("redis")
            self.start("evaluator")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in [name for name in self._processes if name != "redis"] + ["redis"]:
            if (process := self._processes.get(name)) is not None:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
        self.redis.close()

    def start(self, name: str) -> None:
        """Starts ``redis``, ``evaluator`` or ``orchestrator`` (again) and waits until it serves."""
        if name == "redis":
            self._server.prepare()
            self._spawn(name, self._server.command, {})
            self._wait(name, self._redis_answers)
            return
        ports = {"PRECEPTOR_PORT": self._ports[name], "PRECEPTOR_METRICS_PORT": self._metrics_ports.get(name, 0)}
        self._spawn(name, [sys.executable, "-m", name], {key: str(port) for key, port in ports.items()})
        self._wait(name, lambda: is_serving(self.address(name)))

    def start_orchestrator(self) -> None:
        """The scripted neighbours and an orchestrator."""
        command = [sys.executable, "-m", "bench.control_plane_house", str(self.folder / "scripted")]
        self._spawn("teacher and student (scripted)", command, {})
        said = self.folder / "scripted" / "addresses.json"
        self._wait("teacher and student (scripted)", said.exists)
        self._scripted = json.loads(said.read_text())
        self.start("orchestrator")

    def workers(self, number: int, seconds: float, *, plain: bool = False) -> int:
        """Starts so many simulated workers and waits until they are there; their number."""
        options = ["--workers", str(number), "--seconds", str(seconds), *(["--plain"] if plain else [])]
        name = f"workers {len(self._processes)}"
        before = set(self.workers_alive())
        self._spawn(name, [sys.executable, "-m", "bench.simulated_workers", self.broker_url, *options], {})
        if not plain:
            self._wait(name, lambda: len(set(self.workers_alive()) - before) == number)
        return number

    def workers_alive(self) -> dict[int, WorkerStatus]:
        """What the simulated workers say of themselves, by process id."""
        return {int(one.name.rpartition(":")[2]): one for one in LeaseBoard(self.broker_url).workers()}

    def address(self, name: str) -> str:
        """``host:port`` of the evaluator or the orchestrator."""
        return f"127.0.0.1:{self._ports[name]}"

    @property
    def evaluator(self) -> EvaluatorServiceStub:
        """A client on a channel of its own."""
        return EvaluatorServiceStub(open_channel(self.address("evaluator")))

    @property
    def orchestrator(self) -> OrchestratorServiceStub:
        """A client on a channel of its own."""
        return OrchestratorServiceStub(open_channel(self.address("orchestrator")))

    def pid(self, name: str) -> int:
        """The process id of a service."""
        return self._processes[name].pid

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._processes[name].kill()
        self._processes[name].wait(10)

    def cpu(self) -> dict[str, float]:
        """CPU seconds (user and system) of every process so far, by name; all simulated workers are ``workers``."""
        seconds: dict[str, float] = {}
        for name, process in self._processes.items():
            root = psutil.Process(process.pid)
            family = [root, *root.children(recursive=True)]
            label = "workers" if name.startswith("workers") else name
            for one in family:
                times = one.cpu_times()
                seconds[label] = seconds.get(label, 0.0) + times.user + times.system
        return seconds

    def memory(self) -> dict[str, float]:
        """MiB in use: resident size of every service, and what Redis says of its data."""
        sizes = {
            name: psutil.Process(process.pid).memory_info().rss / 2**20
            for name, process in self._processes.items()
            if not name.startswith("workers")
        }
        return sizes | {"redis used_memory": int(self.redis.info("memory")["used_memory"]) / 2**20}

    def database_mib(self) -> float:
        """Size of the evaluator's database with its log."""
        return sum(file.stat().st_size for file in self.folder.glob("evaluator.db*")) / 2**20

    def _redis_answers(self) -> bool:
        try:
            return bool(self.redis.ping())
        except redis.RedisError:
            return False

    def _spawn(self, name: str, command: list[str], extra: dict[str, str]) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PRECEPTOR_HOME": str(self.folder),
            "PRECEPTOR_BROKER_URL": self.broker_url,
            "PRECEPTOR_EVALUATOR_ADDRESS": self.address("evaluator"),
            "PRECEPTOR_TEACHER_ADDRESS": self._scripted.get("teacher", "127.0.0.1:1"),
            "PRECEPTOR_STUDENT_ADDRESS": self._scripted.get("student", "127.0.0.1:1"),
            "PRECEPTOR_PARENT_PID": str(os.getpid()),
            **self._settings,
            **extra,
        }
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _log(self, name: str) -> Path:
        return self.folder / f"{name.split()[0]}.log"

    def _wait(self, name: str, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while not holds():
            if self._processes[name].poll() is not None or time.monotonic() > end:
                words = self._log(name).read_text(errors="replace")[-500:]
                raise RuntimeError(f"{name} does not come up: {words}")
            time.sleep(0.02)


@contextmanager
def stopwatch(house: House) -> Iterator[dict[str, float]]:
    """CPU seconds of every process in the body; complete when the body has ended."""
    used: dict[str, float] = {}
    before = house.cpu()
    yield used
    used.update({name: seconds - before.get(name, 0.0) for name, seconds in house.cpu().items()})


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_scripted(folder: Path) -> None:
    """Serves the scripted neighbours until the parent is gone or says SIGTERM."""
    from preceptor.server import stop_signal
    from preceptor.testing.scripted_house import ScriptedHouse
    from preceptor.testing.scripted_teacher import ScriptedTeacher

    stopping = stop_signal(os.getppid())
    # Eight facts, each good or poor, and four directives: self-edits that are seldom the same.
    teacher = ScriptedTeacher(documents=8, malformed_share=0.0)  # type: ignore[abstract]
    with ScriptedHouse(folder, teacher) as house:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / "addresses.draft"
        draft.write_text(json.dumps({name: house.address(name) for name in ("teacher", "student")}))
        draft.rename(folder / "addresses.json")
        stopping.wait()


if __name__ == "__main__":
    serve_scripted(Path(sys.argv[1]))
