"""The embedded stack: every process of compose.yaml on one machine, without Docker.

    with Stack(HouseSettings(), workers=2) as stack:
        ...  # stack.addresses says where everything listens

It owns its children: they start in sessions of their own (so that Ctrl-C reaches only the owner), a dead one is
started again, one that has stopped answering is killed and started again (``preceptor/pulse.py``), all are ended on the
way out, and what an owner killed with SIGKILL left behind is ended by the next start. One stack per home folder.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from preceptor.channel import is_serving
from preceptor.errors import PreceptorError
from preceptor.processes import Child, find_processes, holder_of, identity, is_alive, memory_of
from preceptor.pulse import PulseWatch
from preceptor.redis_server import EmbeddedRedis
from preceptor.settings import HouseSettings

SERVICES = ("student", "evaluator", "teacher", "orchestrator")
# Importing torch on a busy small machine takes most of it.
START_SECONDS = 120.0
STOP_SECONDS = 15.0
# After the system refused to start a process or to write a file (no memory, no space).
REFUSED_SECONDS = 2.0
# A fresh home gets the student that ships, so that a first run needs no other command.
DEFAULT_STUDENT = "almanac"
# The worlds that ship, each with a tiny teacher, and their students: name -> world and folder of its models.
WORLDS = ("almanac", "mosaic")
SHIPPED_STUDENTS = {
    "almanac": ("almanac", "student"),
    "almanac-qwen2": ("almanac", "student_qwen2"),
    "mosaic": ("mosaic", "student"),
}
# A second teacher, of the arm external_teacher: there where the environment says which endpoint it asks.
EXTERNAL_TEACHER = "external-teacher"
# In the environment of every child: who of the stack it is.
_CHILD = "PRECEPTOR_CHILD"


class Stack:
    """The processes of one home folder, as a context manager."""

    def __init__(
        self,
        settings: HouseSettings,
        workers: int = 0,
        port: int = 0,
        on_event: Callable[[str], None] = lambda _message: None,
        commands: Mapping[str, Sequence[str]] | None = None,
        wire: Callable[[HouseSettings], HouseSettings] = lambda addresses: addresses,
        world: str | None = WORLDS[0],
    ) -> None:
        """``workers``: 0 means one per core, at most 8. ``port``: the orchestrator's; the other services take the
        next ones; 0 means free ones. ``on_event`` hears what happens, a line each. ``world``: whose tiny teacher
        writes where the environment names no other; None: that of the home's last stack.

        For whoever tests a stack: ``commands`` are started instead of a service's own or of ``worker``; ``wire`` is
        given the addresses and returns those that the children are told.
        """
        self._home = settings.home.resolve()
        self._settings = settings
        self._workers = workers or min(os.cpu_count() or 1, 8)
        self._port = port
        self._say = on_event
        self._commands = dict(commands or {})
        self._wire = wire
        self._world = world
        self._lock_file: IO[str] | None = None
        self._children: list[Child] = []
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="stack-supervisor", daemon=True)
        self._peak_memory = 0
        self._state_is_old = False
        self._redis: EmbeddedRedis | None = None
        self._pulse: PulseWatch | None = None
        self._up = False  # everything serves
        self.addresses = settings
        self.failed: PreceptorError | None = None

    def __enter__(self) -> Stack:
        """Starts everything and waits until it serves. Raises PreceptorError and leaves nothing running."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends every child, Redis last."""
        self._stop()

    def processes(self) -> list[Child]:
        """The children as they are now."""
        return list(self._children)

    def peak_memory_bytes(self) -> int:
        """Largest memory of this process and all children together, sampled every second (PSS where the system
        tells it, so that shared pages count once; else RSS)."""
        return self._peak_memory

    def _start(self) -> None:
        self._home.mkdir(parents=True, exist_ok=True)
        self._take_home()
        self._end_leftovers()
        ports = self._choose_ports()
        redis = self._redis = EmbeddedRedis(self._home / "redis", ports["redis"])
        self.addresses = self._settings.model_copy(
            update={
                "home": self._home,
                "broker_url": redis.url,
                **{f"{name}_address": f"127.0.0.1:{ports[name]}" for name in SERVICES},
            }
        )
        self._say("starting redis")
        self._add("redis", redis.command, f"127.0.0.1:{ports['redis']}", {}, redis.prepare)
        self._wait_for_redis(ports["redis"])
        self._say(f"starting {', '.join(SERVICES)} and {self._workers} worker{'s' if self._workers > 1 else ''}")
        for name in SERVICES:
            command = self._commands.get(name, [sys.executable, "-m", name])
            own = {"PRECEPTOR_PORT": str(ports[name])}
            if name == "teacher":
                own["PRECEPTOR_TEACHER_SOURCE"] = self.teacher_source(os.environ)
            if name == "orchestrator" and EXTERNAL_TEACHER in ports:
                own["PRECEPTOR_EXTERNAL_TEACHER_ADDRESS"] = f"127.0.0.1:{ports[EXTERNAL_TEACHER]}"
            if name != "orchestrator":  # the limit is for who calls from elsewhere, not for services among themselves
                own["PRECEPTOR_RATE_LIMIT"] = "0"
            self._add(name, command, f"127.0.0.1:{ports[name]}", own)
        for number in range(1, self._workers + 1):
            self._add(
                f"worker-{number}", self._commands.get("worker", [sys.executable, "-m", "student.worker"]), "", {}
            )
        if EXTERNAL_TEACHER in ports:
            self._add_external_teacher(ports[EXTERNAL_TEACHER])
        services = [child for child in self._children if child.name in (*SERVICES, EXTERNAL_TEACHER)]
        workers = [child for child in self._children if child.name.startswith("worker-")]
        self._pulse = PulseWatch(redis.url, self._children[0], services, workers)
        self._pulse.start()
        self._supervisor.start()
        self._wait_until_serving()
        self._up = True
        self._write_state()

    def teacher_source(self, environment: Mapping[str, str]) -> str:
        """What the teacher is told as PRECEPTOR_TEACHER_SOURCE: what the environment says, else this stack's world,
        which is kept in its home: a run that is resumed there goes on with the same teacher."""
        named = environment.get("PRECEPTOR_TEACHER_SOURCE", "")
        if named or environment.get("PRECEPTOR_TEACHER_BACKEND", "") not in ("", "transformers"):
            return named  # only a teacher in the service's own process can be one that ships
        kept = self._home / "world"
        if self._world is None:
            last = kept.read_text().strip() if kept.exists() else ""
            self._world = last if last in WORLDS else WORLDS[0]
        kept.write_text(f"{self._world}\n")
        return self._world

    def _take_home(self) -> None:
        self._lock_file = (self._home / "stack.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            self._lock_file = None
            raise PreceptorError(
                "STACK_ALREADY_UP", f"another stack is up in {self._home}", file=str(self._home)
            ) from None

    def _choose_ports(self) -> dict[str, int]:
        names = ["orchestrator", "teacher", "student", "evaluator", "redis"]
        if all(_of_external_teacher(name) for name in ("SERVER_URL", "SERVER_MODEL")):
            names.append(EXTERNAL_TEACHER)
        wanted = [self._port + i if self._port else 0 for i in range(len(names))]
        sockets, ports = [], {}
        try:
            for name, port in zip(names, wanted, strict=True):
                probe = socket.socket()
                sockets.append(probe)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    raise PreceptorError(
                        "PORT_IN_USE", f"port {port} (for the {name}) is taken{holder_of(port)}", port=port
                    ) from None
                ports[name] = probe.getsockname()[1]
        finally:
            for probe in sockets:
                probe.close()
        return ports

    def _add(
        self,
        name: str,
        command: Sequence[str],
        address: str,
        extra: dict[str, str],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        environment = dict(os.environ) | self._wire(self.addresses).environment()
        environment.update(
            {
                "PRECEPTOR_PARENT_PID": str(os.getpid()),
                _CHILD: name,
                "PRECEPTOR_DEFAULT_STUDENT": os.environ.get("PRECEPTOR_DEFAULT_STUDENT", DEFAULT_STUDENT),
                # One thread each: on a small machine, processes with several threads each are ten times slower.
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "PYTHONUNBUFFERED": "1",
                **self._metrics_port(),
                **extra,
            }
        )
        child = Child(name, list(command), environment, address, self._home / "logs" / f"{name}.log", prepare)
        child.start()
        self._children.append(child)
        self._write_state()  # whatever happens from here on, the next start finds it

    def _add_external_teacher(self, port: int) -> None:
        """It keeps its own home, and whatever becomes of it, the others go on: it costs the runs one arm."""
        names = ("SERVER_URL", "SERVER_MODEL", "SERVER_API_KEY", "SERVER_API_KEY_FILE")
        own = {f"PRECEPTOR_TEACHER_{name}": _of_external_teacher(name) for name in names}
        not_ours = ("TEACHER_SOURCE", "DATABASE_URL", "DATABASE_PASSWORD_FILE", "ARTIFACTS_URL")
        own |= {f"PRECEPTOR_{name}": "" for name in not_ours}
        own |= {
            "PRECEPTOR_HOME": str(self._home / EXTERNAL_TEACHER),
            "PRECEPTOR_PORT": str(port),
            "PRECEPTOR_RATE_LIMIT": "0",
            "PRECEPTOR_TEACHER_BACKEND": "openai",
        }
        command = self._commands.get(EXTERNAL_TEACHER, [sys.executable, "-m", "teacher"])
        self._add(EXTERNAL_TEACHER, command, f"127.0.0.1:{port}", own)

    def _metrics_port(self) -> dict[str, str]:
        """Of the next child: the one that is set is the first service's, the others have those that follow."""
        port = self._settings.metrics_port
        return {"PRECEPTOR_METRICS_PORT": str(port + len(self._children) - 1)} if port and self._children else {}

    def _wait_for_redis(self, port: int) -> None:
        redis = self._children[0]
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                # "-NOAUTH" is an answer too; "-LOADING" means that it still reads its file.
                if not connection.recv(64).startswith(b"-LOADING"):
                    return
            if redis.ended():
                if not self._set_redis_data_aside(redis):
                    raise self._death(redis)
                redis.start()
                self._write_state()
            time.sleep(0.05)
        raise PreceptorError("PROCESS_DIED", "redis does not answer", file=str(redis.log))

    def _set_redis_data_aside(self, redis: Child) -> bool:
        """Whether Redis has ended because of its data, which then lie elsewhere. The services know what was in them."""
        ended_by_itself = redis.process is not None and (redis.process.returncode or 0) > 0
        if self._redis is None or not ended_by_itself:
            return False
        aside = self._redis.set_data_aside(redis.last_words(lines=20))
        if aside:
            self._say(f"redis cannot read its data any more: they are in {aside} now, and it starts without them")
        return aside is not None

    def _wait_until_serving(self) -> None:
        end = time.monotonic() + START_SECONDS
        waiting = {child.name: child for child in self._children if child.name in SERVICES}
        while waiting:
            for name, child in list(waiting.items()):
                if is_serving(child.address, deadline=0.5, pid=child.pid):
                    self._say(f"{name} serves on {child.address}")
                    del waiting[name]
            if self.failed:
                raise self.failed
            if time.monotonic() > end:
                logs = ", ".join(str(child.log) for child in waiting.values())
                raise PreceptorError(
                    "PROCESS_DIED", f"not up after {START_SECONDS:.0f} s: {', '.join(waiting)}", file=logs
                )
            time.sleep(0.1)

    def _supervise(self) -> None:
        next_sample = 0.0
        while not self._stopping.wait(0.2):
            for child in self._children:
                if self.failed is None:
                    self._look_after(child)
            if self._state_is_old:
                with suppress(OSError):  # a full disk: at the next turn
                    self._write_state()
            if time.monotonic() >= next_sample:
                self._peak_memory = max(self._peak_memory, memory_of([os.getpid(), *(c.pid for c in self._children)]))
                next_sample = time.monotonic() + 1

    def _look_after(self, child: Child) -> None:
        """Starts the child again if it has ended and its pause is over; ends it if it hangs."""
        assert self._pulse
        if child.ended() and child.due is None:
            self._bury(child)
        elif child.due is not None:
            if time.monotonic() >= child.due:
                self._start_again(child)
        elif self._pulse.hangs(child):
            self._say(f"{child.name} has not answered for {self._pulse.silence(child):.0f} s; killing it")
            child.kill_group()  # also where it is stopped: SIGKILL needs no cooperation
            if child.process:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(5)

    def _bury(self, child: Child) -> None:
        """Decides what becomes of a child that has ended."""
        assert self._pulse
        code = child.process.returncode if child.process else None
        child.kill_group()  # what it may have left behind
        answered = self._pulse.answered(child)
        if child.name == "redis" and not answered:
            self._set_redis_data_aside(child)
        now = time.monotonic()
        pause = child.deaths.pause_after(now, answered)
        refused = code == 2 and not child.deaths.served  # it has said what is wrong with its settings
        if (pause is None or refused) and child.name == EXTERNAL_TEACHER:
            child.due = math.inf
            self._say(f"{self._death(child)}; runs go on without its arm")
            return
        if pause is None or refused:
            self.failed = self._death(child)
            self._say(str(self.failed))
            return
        child.due = now + pause
        ended = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with {code}"
        self._say(f"{child.name} {ended}; starting it again" + (f" in {pause:.0f} s" if pause >= 1 else ""))

    def _start_again(self, child: Child) -> None:
        try:
            child.start()
        except OSError as error:  # of the machine, not of the child: the supervisor must live
            child.due = time.monotonic() + REFUSED_SECONDS
            self._say(f"{child.name} cannot be started: {error}; trying again")
            return
        child.due = None
        child.restarts += 1
        self._state_is_old = True

    def _death(self, child: Child) -> PreceptorError:
        code = child.process.returncode if child.process else "?"
        words = " | ".join(child.last_words())
        return PreceptorError(
            "PROCESS_DIED", f"{child.name} does not stay up (exit code {code}): {words}", file=str(child.log)
        )

    def _write_state(self) -> None:
        state = {
            "up": self._up,
            "owner": identity(os.getpid()),
            "addresses": json.loads(self.addresses.model_dump_json()),
            "children": [
                {"name": child.name, "address": child.address, **identity(child.pid)} for child in self._children
            ],
        }
        path = self._home / "stack.json"
        draft = path.with_suffix(".draft")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(state, indent=1))
        draft.replace(path)
        self._state_is_old = False

    def _end_leftovers(self) -> None:
        """Ends children of an owner that was killed before it could. They are known by how they look: an owner may have
        died before it had written down whom it had started."""
        for process in find_processes(self._is_ours):
            with suppress(psutil.Error):  # they end by themselves, too, and may just have done so
                self._say(f"ending {process.name()} of an earlier stack (pid {process.pid})")
                process.kill()
                process.wait(5)

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.name().startswith("redis-server"):  # writes its title over its environment
            return process.cwd().startswith(str(self._home / "redis"))
        environment = process.environ()
        return environment.get("PRECEPTOR_HOME") == str(self._home) and _CHILD in environment

    def _stop(self) -> None:
        self._stopping.set()
        if self._pulse:
            self._pulse.stop()
        if self._supervisor.is_alive():
            self._supervisor.join(timeout=5)
        services = [child for child in self._children if child.name != "redis"]
        for group in (services, [child for child in self._children if child.name == "redis"]):
            for child in group:
                child.terminate()
            end = time.monotonic() + STOP_SECONDS
            for child in group:
                if child.process:
                    with suppress(subprocess.TimeoutExpired):
                        child.process.wait(max(end - time.monotonic(), 0.1))
                child.kill_group()  # and whatever it started
                if child.process:
                    child.process.wait(5)
        if self._lock_file:
            (self._home / "stack.json").unlink(missing_ok=True)
            self._lock_file.close()
            self._lock_file = None


def _of_external_teacher(name: str) -> str:
    return os.environ.get(f"PRECEPTOR_EXTERNAL_TEACHER_{name}", "")


def running_stack(home: Path) -> HouseSettings | None:
    """Where the services of the stack in ``home`` listen, or None where none is up."""
    state = _read_state(home.resolve())
    return HouseSettings(**state["addresses"]) if state.get("up") and is_alive(state["owner"]) else None


def shipped_models(world: str = WORLDS[0]) -> Path:
    """The folder of the tiny models that ship with a world."""
    spec = importlib.util.find_spec(f"worlds.{world}")
    locations = (spec.submodule_search_locations if spec else None) or [f"worlds/{world}"]
    return Path(next(iter(locations))) / "models"


def shipped_student(name: str) -> Path:
    """The folder of a student of ``SHIPPED_STUDENTS``."""
    world, folder = SHIPPED_STUDENTS[name]
    return shipped_models(world) / folder


def _read_state(home: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((home / "stack.json").read_text())
        return state
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
