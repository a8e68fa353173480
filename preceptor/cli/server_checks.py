"""The checks behind ``preceptor doctor`` that ask servers which others run: PostgreSQL, buckets, inference servers.

Only what the settings of this process name is asked; and which worker holds which GPU.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from preceptor.cli.connection import setting_problem
from preceptor.errors import PreceptorError
from preceptor.settings import HouseSettings, SecuritySettings, ServiceSettings

if TYPE_CHECKING:
    from preceptor.leases import WorkerStatus

ASK_SECONDS = 5.0
# Variables that begin so name an inference server: _URL, _MODEL, _API_KEY, _API_KEY_FILE.
ANSWER_SERVER = "answer server"
INFERENCE_SERVERS = {"teacher server": "PRECEPTOR_TEACHER_SERVER", ANSWER_SERVER: "PRECEPTOR_ANSWER_SERVER"}
EXPIRY_DAYS = 14
ELSEWHERE = "ask where the service runs: docker compose exec SERVICE preceptor doctor"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. ``next_step`` is empty where there is nothing to do."""

    what: str
    state: Literal["ok", "note", "problem"]
    found: str
    next_step: str = ""


def problem(what: str, error: PreceptorError) -> Finding:
    """What an error found."""
    return Finding(what, "problem", f"{error} ({error.reason})", error.next_step)


def security_findings(settings: SecuritySettings) -> Iterator[Finding]:
    """The token and the certificates that this process would show."""
    from preceptor.security import load_security

    try:
        security = load_security(settings)
    except PreceptorError as error:
        yield problem("certificates" if error.reason == "TLS_FAILED" else "token", error)
        return
    if security.token:
        yield Finding("token", "ok", "set")
    if security.tls:
        left = (security.tls.until - time.time()) / 86400
        found = f"{security.tls.folder}, valid for {left:.0f} days"
        renew = "make a new one (`preceptor certificates`) and restart the process"
        yield Finding(
            "certificates", "note" if left < EXPIRY_DAYS else "ok", found, renew if left < EXPIRY_DAYS else ""
        )


def database_findings() -> Iterator[Finding]:
    """PostgreSQL, where it is named."""
    try:
        settings = ServiceSettings()
    except ValidationError as error:
        yield Finding("settings of the services", "problem", setting_problem(error), "correct or unset the variable")
        return
    if not settings.database_url.startswith("postgresql"):
        return
    try:
        from sqlalchemy import make_url

        from preceptor.postgres import server_version
    except ImportError:
        yield Finding("database", "note", "cannot be asked: its packages are missing here", ELSEWHERE)
        return
    url = make_url(settings.database("public"))
    try:
        version, encrypted = server_version(url)
    except PreceptorError as error:
        yield problem("database", error)
        return
    tls = "with TLS" if encrypted else "without TLS"
    yield Finding("database", "ok", f"PostgreSQL {version} answers at {url.host}:{url.port or 5432}, {tls}")


def artifact_findings(settings: HouseSettings) -> Iterator[Finding]:
    """The artifact store, where one is named."""
    url = settings.artifacts_url
    if not url:
        return
    if not url.startswith("s3://"):
        from preceptor.artifacts import local_folder

        folder = local_folder(url)
        if os.access(folder if folder.exists() else folder.parent, os.W_OK):
            yield Finding("artifacts", "ok", f"{folder}{'' if folder.exists() else ' (will be made)'}")
        else:
            step = "correct PRECEPTOR_ARTIFACTS_URL, or the folder's owner"
            yield Finding("artifacts", "problem", f"{folder} cannot be written", step)
        return
    try:
        from preceptor.artifacts_s3 import S3Folder

        S3Folder(url).below("doctor").files()
    except PreceptorError as error:
        if error.reason == "EXTRA_MISSING":  # the orchestrator's image, which has no use for it
            yield Finding("artifacts", "note", f"cannot be asked: {error.message}", ELSEWHERE)
        else:
            yield problem("artifacts", error)
    else:
        yield Finding("artifacts", "ok", f"{url} answers")


def inference_findings(commit: str = "") -> Iterator[Finding]:
    """vLLM and its like, where they are named. ``commit``: the active student's, for the server that answers for it."""
    for what, prefix in INFERENCE_SERVERS.items():
        if url := os.environ.get(f"{prefix}_URL", ""):
            yield _inference_server(what, prefix, url, commit if what == ANSWER_SERVER else "")


def _inference_server(what: str, prefix: str, url: str, commit: str) -> Finding:
    try:
        from preceptor.inference import InferenceServer
    except ImportError:
        return Finding(what, "note", f"{url} cannot be asked: httpx2 is missing here", ELSEWHERE)
    key, file = os.environ.get(f"{prefix}_API_KEY", ""), os.environ.get(f"{prefix}_API_KEY_FILE", "")
    if file:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            return Finding(what, "problem", f"{prefix}_API_KEY_FILE={file} cannot be read: {why}", "correct the path")
    model = os.environ.get(f"{prefix}_MODEL", "")
    server = InferenceServer(url, model, key, timeout_seconds=ASK_SECONDS, patience_seconds=0)
    try:
        facts = server.check()
    except PreceptorError as error:
        return problem(what, error)
    finally:
        server.close()
    if commit and not any(one.id.endswith(f"@{commit[:12]}") for one in facts.models):
        found = f"{url} does not serve the active student (...@{commit[:12]}): workers answer by themselves"
        return Finding(what, "note", found, "serve it: `preceptor students serve NAME`")
    kind = f"vLLM {facts.version}" if facts.kind == "vllm" else "OpenAI-compatible"
    served = model or ", ".join(one.id for one in facts.models if not one.parent)
    return Finding(what, "ok", f"{url} answers ({kind}), serves {served}")


def gpu_findings(workers: Sequence[WorkerStatus]) -> Iterator[Finding]:
    """Which GPUs workers hold, by their own word, and here by the locks."""
    held = Counter(worker.gpu for worker in workers if worker.gpu)
    if held:
        said = "; ".join(f"{one.gpu} by {one.name}" for one in workers if one.gpu)
        yield Finding("gpu leases", "ok", said)
    folder = os.environ.get("PRECEPTOR_GPU_LOCKS", "")
    if not folder:
        return
    try:
        taken = [f"{path.stem} by {said}" for path in sorted(Path(folder).glob("*.lock")) if (said := _holder(path))]
    except OSError as error:
        yield Finding(
            "gpu locks", "problem", f"PRECEPTOR_GPU_LOCKS={folder} cannot be read: {error.strerror}", "correct the path"
        )
        return
    yield Finding("gpu locks", "ok", f"{folder}: {'; '.join(taken) or 'none is taken'}")


def _holder(path: Path) -> str:
    """Who holds a lock, by its own word; empty where nobody does. The lock is the system's (student.gpu_lease)."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            said = file.read(200).decode(errors="replace").strip()
            return said if said and said.isprintable() else "somebody"
    return ""
