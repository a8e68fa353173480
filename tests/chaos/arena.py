"""A whole embedded stack to be broken: its owner, its children, the proxies between them, and the runs on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from preceptor.channel import call, is_serving, open_channel
from preceptor.cli.run_request import create_request, read_run
from preceptor.errors import PreceptorError
from preceptor.processes import find_processes, identity, is_alive
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import orchestrator_pb2_grpc
from tests.chaos.proxy import Proxy
from tests.chaos.schedule import LINKS

REPOSITORY = Path(__file__).parents[2]
# Several imports of torch on a busy machine.
UP_SECONDS = 240.0
# Draining, and Redis last.
DOWN_SECONDS = 90.0
FINAL = (pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED)
_DISK_MIB = 512


class Arena:
    """A stack in ``home``, for as long as it is entered. ``small_disk``: the home is a file system of its own."""

    def __init__(self, home: Path, *, workers: int, scripted: bool, small_disk: bool = False) -> None:
        self.home = home
        self.worker_names = [f"worker-{number}" for number in range(1, workers + 1)]
        self._scripted = scripted
        self._small_disk = small_disk
        self._exits = ExitStack()
        self._owner: subprocess.Popen[str] | None = None
        self._up = threading.Event()
        self._seen: dict[tuple[float, float], dict[str, float]] = {}
        self.proxies: dict[str, Proxy] = {}
        self.events: list[str] = []  # what the owners said
        self.ended = threading.Event()  # nothing is to be started any more

    def __enter__(self) -> Arena:
        self.home.mkdir(parents=True)
        if self._small_disk:
            size = f"size={_DISK_MIB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "chaos", str(self.home)], check=True, timeout=10)
            self._exits.callback(subprocess.run, ["umount", "-l", str(self.home)], check=False, timeout=10)
        for name in (*LINKS, "orchestrator"):
            self.proxies[name] = self._exits.enter_context(Proxy(lambda name=name: self._real(name)))  # type: ignore[misc]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for one in self._seen.values():  # nothing is left behind, whatever was proven
            if is_alive(one):
                with suppress(ProcessLookupError):
                    os.killpg(int(one["pid"]), signal.SIGKILL)
        self._exits.close()

    # The stack

    def start(self) -> None:
        """Starts an owner and waits until everything serves."""
        self._up.clear()
        own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
        # A batch that is lost three times is cut, which the last bits of its neighbours can show (ADR 2).
        settings = {"PRECEPTOR_HOME": str(self.home), "PRECEPTOR_TRIAL_ATTEMPTS": "20"}
        command = [sys.executable, "-m", "tests.chaos.owner"]
        ports = json.dumps({name: proxy.port for name, proxy in self.proxies.items()})
        options = ["--workers", str(len(self.worker_names)), *(["--scripted"] if self._scripted else [])]
        self._owner = subprocess.Popen(
            [*command, ports, *options],
            cwd=REPOSITORY,
            env={**own, **settings, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, args=(self._owner,), daemon=True)
        self._listener.start()
        end = time.monotonic() + UP_SECONDS
        while not self._up.wait(0.2):
            self._look()
            if self._owner.poll() is not None or time.monotonic() > end:
                raise AssertionError("the stack does not come up:\n" + "\n".join(self.events[-20:]))

    def stop(self) -> None:
        """Takes the stack down in good order."""
        self.ended.set()
        self._look()
        if self._owner and self._owner.poll() is None:
            self._owner.send_signal(signal.SIGTERM)
            try:
                self._owner.wait(DOWN_SECONDS)
            except subprocess.TimeoutExpired:
                self.events.append("the owner did not end")
                self._owner.kill()
            self._owner.wait(10)
            self._listener.join(10)

    def kill_owner(self) -> None:
        """SIGKILL to the owner alone, and another one takes over."""
        assert self._owner
        self._look()
        self._owner.kill()
        self._owner.wait(10)
        self._listener.join(10)
        self.start()

    @property
    def owner_pid(self) -> int:
        """The owner's process."""
        return self._owner.pid if self._owner else 0

    @property
    def failed(self) -> bool:
        """Whether the owner has ended by itself."""
        return self._owner is None or self._owner.poll() is not None

    def children(self) -> dict[str, dict[str, Any]]:
        """The stack's children by name, as the owner last wrote them."""
        return {child["name"]: child for child in self._state().get("children", [])}

    def broker_url(self) -> str:
        """Redis itself, past its proxy."""
        return str(self._state()["addresses"]["broker_url"])

    def serves(self, name: str) -> bool:
        """Whether the service itself answers, past its proxy."""
        child = self.children().get(name)
        return child is not None and is_serving(child["address"], deadline=1.0)

    def left(self) -> list[str]:
        """Processes of this home that still run, however they were started."""

        def of_this_home(process: psutil.Process) -> bool:
            # Redis writes its title over its environment, and works in its folder.
            home = str(self.home)
            return process.environ().get("PRECEPTOR_HOME") == home or process.cwd().startswith(home)

        found = {int(one["pid"]) for one in self._seen.values() if is_alive(one)}
        return [f"pid {pid}" for pid in sorted(found | {process.pid for process in find_processes(of_this_home)})]

    def _listen(self, owner: subprocess.Popen[str]) -> None:
        assert owner.stdout
        with owner.stdout:
            for line in owner.stdout:
                self.events.append(line.rstrip())
                if line.rstrip() == "up":
                    self._up.set()

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.home / "stack.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return state

    def _look(self) -> None:
        """Remembers who runs: at the end none of them may."""
        for child in self.children().values():
            self._seen.setdefault((child["pid"], child["started"]), identity(int(child["pid"])) | child)

    def _real(self, name: str) -> tuple[str, int]:
        host, _, port = self.children()[name]["address"].rpartition(":")
        return host, int(port)

    # Runs

    def create(self, config: Path, overrides: Sequence[str]) -> str:
        """A run of the config; its id."""
        with self._orchestrator() as stub:
            return call(stub.CreateRun, create_request(*read_run(config, overrides))).run.id

    def follow(
        self, run_id: str, limit: float, on_progress: Callable[[float], None] = lambda _share: None
    ) -> dict[str, Any]:
        """The summary of a run that must succeed within ``limit`` seconds. ``on_progress`` hears the share done."""
        end = time.monotonic() + limit
        while True:
            assert time.monotonic() < end, f"{run_id} has not ended within {limit:.0f} s"
            self._look()
            try:
                with self._orchestrator() as stub:
                    answer = call(stub.GetRun, pb.GetRunRequest(run_id=run_id), deadline=3)
            except (PreceptorError, KeyError):
                time.sleep(0.5)
                continue
            on_progress(answer.progress.done_share)
            if answer.run.state in FINAL:
                state = pb.RunState.Name(answer.run.state)
                assert answer.run.state == pb.RUN_STATE_SUCCEEDED, f"{run_id}: {state}: {answer.run.failure}"
                return self._summary(run_id, end)
            time.sleep(0.5)

    def _summary(self, run_id: str, end: float) -> dict[str, Any]:
        while True:
            try:
                with self._orchestrator() as stub:
                    answer = call(stub.GetRunReport, pb.GetRunReportRequest(run_id=run_id), deadline=60)
                summary: dict[str, Any] = json.loads(answer.summary_json)
                return summary
            except (PreceptorError, KeyError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    @contextmanager
    def _orchestrator(self) -> Iterator[orchestrator_pb2_grpc.OrchestratorServiceStub]:
        """The orchestrator itself, past its proxy. Raises KeyError where there is none just now."""
        with open_channel(self.children()["orchestrator"]["address"]) as channel:
            yield orchestrator_pb2_grpc.OrchestratorServiceStub(channel)


def can_mount(folder: Path) -> bool:
    """Whether a small file system can be had here: root, and a kernel that lets it."""
    if os.geteuid() != 0:
        return False
    place = folder / "mount-probe"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "chaos", str(place)], capture_output=True, timeout=10, check=False
        )
        if done.returncode == 0:
            subprocess.run(["umount", str(place)], check=True, timeout=10)
        return done.returncode == 0
    except OSError:
        return False
    finally:
        place.rmdir()
