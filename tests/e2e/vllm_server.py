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
from collections.abc import Iterator
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


@contextmanager
def vllm_server(python: Path, model: Path, scratch: Path, *arguments: str) -> Iterator[VllmServer]:
    """Serves ``model`` in float32 while it lasts; whatever the server started is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = scratch / "vllm.log"
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
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
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=scratch,
            env={**inherited, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            server = VllmServer(f"http://127.0.0.1:{port}", "base")
            end = time.monotonic() + START_SECONDS
            while not server.is_up():
                told = log.read_text(errors="replace")[-3000:]
                assert process.poll() is None, f"vLLM ended with {process.returncode}:\n{told}"
                assert time.monotonic() < end, f"vLLM was not up within {START_SECONDS:.0f} s:\n{told}"
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):  # its engine and workers, should they have outlived it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_SECONDS)
