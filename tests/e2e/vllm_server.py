"""A real vLLM server on the CPU, in the environment that ``make test-vllm`` sets up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
# 25 s on two idle cores; shared machines are slow.
START_SECONDS, STOP_SECONDS, REQUEST_SECONDS = 240.0, 30.0, 120.0
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def vllm_python() -> Path | None:
    """The interpreter of vLLM's environment, where there is one."""
    python = Path(os.environ.get("PRECEPTOR_VLLM_PYTHON", REPOSITORY / ".venv-vllm/bin/python"))
    return python if python.exists() else None


@dataclass(frozen=True)
class VllmServer:
    """A server that is up. ``base`` is the name under which it serves the model without an adapter."""

    url: str
    base: str

    def load_adapter(self, name: str, folder: Path) -> None:
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def complete(self, model: str, prompt: str | list[int], **settings: Any) -> dict[str, Any]:
        """The one choice of a greedy completion, token ids included."""
        asked = {"model": model, "prompt": prompt, "temperature": 0, "return_token_ids": True, **settings}
        choice: dict[str, Any] = json.loads(self._post("/v1/completions", asked))["choices"][0]
        return choice

    def logprob(self, model: str, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> float:
        """Log-probability of ``continuation`` after ``prompt``, summed over its tokens."""
        choice = self.complete(model, [*prompt, *continuation], max_tokens=1, prompt_logprobs=0)
        scored = choice["prompt_logprobs"][len(prompt) :]
        return sum(float(place[str(token)]["logprob"]) for place, token in zip(scored, continuation, strict=True))

    def is_up(self) -> bool:
        with suppress(OSError), _LOCAL.open(f"{self.url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with _LOCAL.open(request, timeout=REQUEST_SECONDS) as answer:
                content: bytes = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} answered {error.code}: {error.read().decode()[:2000]}") from error
        return content


class VllmProcess:
    """A server that can be killed and started again under the same address; it serves ``model`` as ``base``."""

    def __init__(
        self, python: Path, model: Path, scratch: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = VllmServer(f"http://127.0.0.1:{port}", "base")
        self._log = scratch / "vllm.log"
        self._scratch = scratch
        self._command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--dtype", "float32", "--served-model-name", "base", "--enforce-eager"]
        self._command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
        own = {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two servers would be bound to one core
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of the machine
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # without it there is no route that loads adapters
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(scratch / "cache"),
            "XDG_CONFIG_HOME": str(scratch / "config"),
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "PYTHON"))}
        self._environment = {**inherited, **own, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begins to start; ``wait_until_up`` waits for it."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._scratch,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_up(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_SECONDS
        while not self.server.is_up():
            told = self._log.read_text(errors="replace")[-3000:]
            assert self._process.poll() is None, f"vLLM ended with {self._process.returncode}:\n{told}"
            assert time.monotonic() < end, f"vLLM was not up within {START_SECONDS:.0f} s:\n{told}"
            time.sleep(0.5)

    def kill(self) -> None:
        """At once, with all that it has started."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            self.kill()  # its engine and workers, should they have outlived it


@contextmanager
def vllm_server(python: Path, model: Path, scratch: Path, *arguments: str) -> Iterator[VllmServer]:
    """Serves ``model`` in float32 while it lasts; whatever the server started is gone afterwards."""
    process = VllmProcess(python, model, scratch, *arguments)
    try:
        process.start()
        process.wait_until_up()
        yield process.server
    finally:
        process.stop()
