"""``python -m student.serve``: serves one pinned student, and adapters of it, with vLLM (OpenAI API).

What ``preceptor students serve`` becomes once the registry has said which student is meant. The student's files are
verified against their commit first; the names that are served say which student and which adapters they are
(``NAME@<12 digits of commit or hash>``). The server ends with this process, however that ends.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256
from preceptor.inference import InferenceServer
from preceptor.launch import launch
from preceptor.processes import holder_of
from preceptor.telemetry import Telemetry
from student.settings import ServeSettings
from student.source import fetch
from student.vllm_command import Serving, Vllm, command, environment, find_vllm, last_words, own_environment, quoted

STOP_SECONDS = 30.0
SAY_SECONDS = 5.0
TRY_SECONDS = 300.0  # a GPU may compile its kernels for the first question
_DIGITS = 12
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def run(settings: ServeSettings, asked: argparse.Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C, or prints how it would.

    Raises PreceptorError: VLLM_NOT_FOUND, NOT_SERVABLE, what ``fetch`` and ``read_adapter`` raise, ADAPTER_MISMATCH for
    another student's adapter, PORT_IN_USE, PROCESS_DIED or DEADLINE_EXCEEDED where the server does not come up.
    """
    vllm = find_vllm(settings.vllm_python)
    _say(f"{asked.name}: verifying {asked.source} at {asked.commit[:_DIGITS]}")
    folder = fetch(asked.source, asked.commit, settings.artifact_cache).resolve()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if refusal := vllm.refusal(config):
        raise PreceptorError("NOT_SERVABLE", f"{asked.name} cannot be served: {refusal}", file=str(folder))
    adapters, rank, targets = _adapters(asked.adapter, asked.commit)
    usual = Serving(name="", model=folder)
    serving = Serving(
        name=f"{asked.name}@{asked.commit[:_DIGITS]}",
        model=folder,
        context=int(config.get("max_position_embeddings") or 0),
        host=asked.host,
        port=asked.port,
        dtype=asked.dtype,
        adapters=adapters,
        target_modules=tuple(dict.fromkeys((*usual.target_modules, *targets))),
        for_workers=asked.for_workers,
        max_rank=max(rank, asked.max_rank),
        max_loras=asked.max_loras,
        more=tuple(asked.more),
    )
    if asked.dry_run:
        print(quoted(command(vllm, serving), own_environment(vllm, serving)))
        return
    _serve(vllm, serving, settings)


def _adapters(asked: Sequence[str], commit: str) -> tuple[tuple[tuple[str, Path], ...], int, list[str]]:
    """Names and folders of the adapters, their largest rank, and the names of the layers they adapt."""
    from student.peft_format import CONFIG_FILE, read_adapter  # torch, which takes a while to import

    found, rank, targets = [], 0, set[str]()
    for one in asked:
        name, is_named, place = one.partition("=")
        folder = Path(place if is_named else one).expanduser().resolve()
        adapter = read_adapter(folder)
        revision = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("revision")
        if revision and revision != commit:
            message = f"the adapter was made for {adapter.base_source} at {str(revision)[:_DIGITS]}"
            raise PreceptorError(
                "ADAPTER_MISMATCH", f"{message}, the student is at {commit[:_DIGITS]}", file=str(folder)
            )
        rank = max(rank, adapter.rank)
        targets |= {module.rpartition(".")[2] for module in adapter.factors}
        found.append((f"{name if is_named else folder.name}@{folder_sha256(folder)[:_DIGITS]}", folder))
    return tuple(found), rank, sorted(targets)


def _serve(vllm: Vllm, serving: Serving, settings: ServeSettings) -> None:
    _check_free(serving.host, serving.port)
    log = settings.home / "logs" / f"vllm-{serving.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log = log.resolve()
    with _ended_by_signals(), log.open("wb") as output:
        server = subprocess.Popen(
            command(vllm, serving),
            env=environment(vllm, serving, settings.answer_server_api_key.get_secret_value()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_dies_with_parent(),
        )
        try:
            _wait_until_ready(server, serving, settings.vllm_start_seconds, log)
            _try_out(server, serving, settings, log)
            _say(f"ready; its log: {log}; Ctrl-C ends it")
            print(how_to_ask(serving, keyed=bool(settings.answer_server_api_key.get_secret_value())), flush=True)
            server.wait()
            raise _died(server, log)
        finally:
            _end(server)


def _check_free(host: str, port: int) -> None:
    """Raises PreceptorError(PORT_IN_USE); vLLM would say so after minutes."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        said = f"cannot listen on {host}:{port}"
        if error.errno == errno.EADDRINUSE:
            said = f"port {port} is taken{holder_of(port)}"
        raise PreceptorError("PORT_IN_USE", f"{said}: {error.strerror}", port=port) from None


def _wait_until_ready(server: subprocess.Popen[bytes], serving: Serving, seconds: float, log: Path) -> None:
    begun = time.monotonic()
    said = 0.0
    while not _is_ready(_url(serving)):
        if server.poll() is not None:
            raise _died(server, log)
        passed = time.monotonic() - begun
        if passed > seconds:
            message = f"vLLM was not ready after {seconds:.0f} s (PRECEPTOR_VLLM_START_SECONDS)"
            raise PreceptorError("DEADLINE_EXCEEDED", message, file=str(log))
        if passed > said + SAY_SECONDS:
            said = passed
            _say(f"loading, {passed:.0f} s: {_last_line(log)}")
        time.sleep(0.2)


def _try_out(server: subprocess.Popen[bytes], serving: Serving, settings: ServeSettings, log: Path) -> None:
    """Asks every model for a token: vLLM says that it is healthy before it has computed anything, and may die of the
    first question."""
    key = settings.answer_server_api_key.get_secret_value()
    client = InferenceServer(_url(serving), serving.name, key, timeout_seconds=TRY_SECONDS, patience_seconds=1.0)
    try:
        client.complete([[1]] * (1 + len(serving.adapters)), model=_names(serving), max_tokens=1)
    except PreceptorError as error:
        words = last_words(log.read_text(encoding="utf-8", errors="replace"))
        message = f"vLLM came up and cannot answer ({error.message}): {words}"
        raise PreceptorError("PROCESS_DIED", message, file=str(log)) from None
    finally:
        client.close()


def _is_ready(url: str) -> bool:
    with suppress(OSError), _LOCAL.open(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _died(server: subprocess.Popen[bytes], log: Path) -> PreceptorError:
    words = last_words(log.read_text(encoding="utf-8", errors="replace"))
    return PreceptorError("PROCESS_DIED", f"vLLM ended with {server.returncode}: {words}", file=str(log))


def _last_line(log: Path) -> str:
    told = [line.split("] ", 1)[-1] for line in log.read_text("utf-8", "replace").splitlines() if " INFO " in line]
    return "".join(char for char in told[-1] if char.isprintable())[:100] if told else "nothing said yet"


def how_to_ask(serving: Serving, *, keyed: bool) -> str:
    """What to type to ask the server; ``keyed``: it wants its key."""
    names = _names(serving)
    body = json.dumps(
        {
            "model": names[-1],
            "prompt": "Question: Who keeps the light?\nAnswer:",
            "max_tokens": 16,
            "temperature": 0,
            "stop": ["\n"],
        }
    )
    lines = [f"serves {', '.join(names)} at {_url(serving)}/v1. Ask it:"]
    key = ' -H "Authorization: Bearer $PRECEPTOR_ANSWER_SERVER_API_KEY"' if keyed else ""
    lines.append(f"  curl {_url(serving)}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'")
    if serving.for_workers:
        lines.append(f"Workers ask it with PRECEPTOR_ANSWER_SERVER_URL={_url(serving)}")
    return "\n".join(lines)


def _names(serving: Serving) -> list[str]:
    """The student's and the adapters'."""
    return [serving.name, *(name for name, _ in serving.adapters)]


def _url(serving: Serving) -> str:
    host = "127.0.0.1" if serving.host in ("0.0.0.0", "") else serving.host
    return f"http://{f'[{host}]' if ':' in host else host}:{serving.port}"


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # its engine and workers, should they have outlived it
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(STOP_SECONDS)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C unwind the stack, so that the server is taken down."""

    def leave(number: int, _frame: FrameType | None) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)  # a second one must not end the ending
        _say("ending the server")
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    yield


def _dies_with_parent() -> Callable[[], Any] | None:
    """Has the kernel end the server where this process was killed without a chance to."""
    if sys.platform != "linux":
        return None
    control = ctypes.CDLL(None).prctl  # before the fork
    return lambda: control(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m student.serve", description="see `preceptor students serve`")
    for name in ("--name", "--source", "--commit"):
        parser.add_argument(name, required=True)
    parser.add_argument("--adapter", action="append", default=[])
    usual = Serving(name="", model=Path())
    parser.add_argument("--host", default=usual.host)
    parser.add_argument("--port", type=int, default=usual.port)
    parser.add_argument("--dtype", default=usual.dtype)
    parser.add_argument("--max-rank", type=int, default=usual.max_rank)
    parser.add_argument("--max-loras", type=int, default=usual.max_loras)
    for name in ("--for-workers", "--dry-run"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("more", nargs="*")
    return parser.parse_args()


def main() -> int:
    """The process."""
    asked = _arguments()

    def serve(settings: ServeSettings, _: Telemetry) -> None:
        run(settings, asked)

    return launch("serve", ServeSettings, serve)


if __name__ == "__main__":
    sys.exit(main())
