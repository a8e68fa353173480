"""Makes an authority and certificates of it, with the command ``openssl`` (3.0 or newer) as docs/security.md shows it.

Keys are readable by their owner only. A certificate serves both sides: services show it, and so do clients.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from preceptor.errors import PreceptorError
from preceptor.settings import CA_FILE, CERTIFICATE_FILE, KEY_FILE, SecuritySettings

AUTHORITY_KEY = "ca-key.pem"
OPENSSL_SECONDS = 60.0
_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
_HOST = re.compile(r"[A-Za-z0-9*]([A-Za-z0-9.*_-]{0,251}[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")


def make_certificate(folder: Path, name: str, hosts: Sequence[str], days: int, authority_days: int) -> Path:
    """The folder for ``PRECEPTOR_TLS``, made or made anew; proven by a handshake.

    Raises PreceptorError: TLS_FAILED (OpenSSL's words), INVALID_REQUEST, OUTPUT_NOT_WRITABLE.
    """
    if not _NAME.fullmatch(name) or name == "authority":
        raise PreceptorError("INVALID_REQUEST", f"{name!r} cannot be the name of a folder", field="--name")
    names = ",".join(map(_alternative_name, hosts))
    authority, made = folder / "authority", folder / name
    try:
        for one in (authority, made):
            one.mkdir(parents=True, exist_ok=True)
        if not (authority / AUTHORITY_KEY).exists():
            _openssl(
                authority,
                ["req", "-x509", *_KEY, "-days", str(authority_days), "-subj", "/CN=Preceptor authority"],
                {"-keyout": AUTHORITY_KEY, "-out": CA_FILE},
            )
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            request = ["req", *_KEY, "-subj", f"/CN={name}", "-addext", f"subjectAltName={names}"]
            _openssl(Path(draft), request, {"-keyout": KEY_FILE, "-out": "request.pem"})
            by = [str((authority / one).resolve()) for one in (CA_FILE, AUTHORITY_KEY)]
            sign = ["x509", "-req", "-in", "request.pem", "-CA", by[0], "-CAkey", by[1], "-copy_extensions", "copy"]
            sign += ["-days", str(days)]
            _openssl(Path(draft), sign, {"-out": CERTIFICATE_FILE})
            shutil.copy(authority / CA_FILE, draft)
            for file in (CA_FILE, CERTIFICATE_FILE, KEY_FILE):
                (Path(draft) / file).replace(made / file)
    except OSError as error:
        raise PreceptorError("OUTPUT_NOT_WRITABLE", f"{error.strerror}", file=str(folder)) from None
    from preceptor.security import load_security

    load_security(SecuritySettings(tls=made))
    return made


def _alternative_name(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host.strip('[]'))}"
    except ValueError:
        if not _HOST.fullmatch(host):
            raise PreceptorError("INVALID_REQUEST", f"{host!r} is no host name", field="--host") from None
        return f"DNS:{host}"


def _openssl(folder: Path, arguments: list[str], files: dict[str, str]) -> None:
    """Runs openssl in a folder. What it writes is its owner's."""
    tool = shutil.which("openssl")
    if tool is None:
        raise PreceptorError("TLS_FAILED", "the command openssl is needed (3.0 or newer), and there is none on PATH")
    command = [tool, *arguments, *(part for pair in files.items() for part in pair)]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=OPENSSL_SECONDS,
            umask=0o077,
        )
    except subprocess.TimeoutExpired:
        raise PreceptorError("TLS_FAILED", f"openssl {arguments[0]} does not end") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise PreceptorError("TLS_FAILED", f"openssl {arguments[0]} fails: {said}")
