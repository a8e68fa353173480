"""Who may talk to whom: one token for all calls, one authority for all certificates. Both are off unless set.

    security = house_security()  # PRECEPTOR_TOKEN or PRECEPTOR_TOKEN_FILE, PRECEPTOR_TLS

The files of ``PRECEPTOR_TLS`` are proven when they are read: a handshake in memory, with this process on both sides,
fails for whatever would fail later with somebody else: an expired certificate, one of another authority, a key that
does not fit. gRPC tells little of why a connection came to nothing, so ``Tls.cause`` and ``plaintext_cause`` ask the
other side again with Python's own TLS and say it in words.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import math
import socket
import ssl
import stat
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
from pydantic import ValidationError

from preceptor.errors import PreceptorError
from preceptor.settings import CA_FILE, CERTIFICATE_FILE, KEY_FILE, SecuritySettings

log = logging.getLogger(__name__)

TOKEN, TOKEN_FILE, TLS = "PRECEPTOR_TOKEN", "PRECEPTOR_TOKEN_FILE", "PRECEPTOR_TLS"
# Asking why a connection failed must not take longer than the caller would have waited for the next try.
CAUSE_SECONDS = 1.0
HANG_UP_SECONDS = 0.3
EXPIRY_WARNING_DAYS = 14


@dataclass(frozen=True)
class Tls:
    """The files of one ``PRECEPTOR_TLS`` folder, read and proven."""

    folder: Path
    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    until: float = math.inf  # unix seconds: the certificate's end

    def server_credentials(self) -> grpc.ServerCredentials:
        """Shows the certificate and demands one of the same authority from every client."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.ca, require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Trusts the authority, and no other, and shows the certificate."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)

    def cause(self, address: str) -> str:
        """Why no TLS connection to ``address`` comes about; empty where that is not because of TLS."""
        cause = self._cause(address)
        if cause == _HUNG_UP:
            time.sleep(HANG_UP_SECONDS)  # a service that is just ending does not do it twice: its port is closed
            cause = self._cause(address)
        return cause.format(address=address, host=_host(address))

    def _cause(self, address: str) -> str:
        context = _context(self.folder, server=False)
        context.check_hostname = True
        shaken = False
        try:
            with _connected(address) as plain, context.wrap_socket(plain, server_hostname=_host(address)) as connection:
                shaken = True
                # In TLS 1.3 a server judges the client's certificate after the client believes to be connected; gRPC's
                # says nothing then and closes. Where it accepts, it speaks first.
                return "" if connection.recv(1) else _HUNG_UP
        except ssl.SSLCertVerificationError as error:
            if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
                return "the certificate of the service at {address} does not name {host} (subjectAltName)"
            return f"the certificate of the service at {{address}} is refused: {error.verify_message}"
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError):
            return _HUNG_UP if shaken else ""
        except ssl.SSLError as error:
            if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
                return f"the service at {{address}} does not speak TLS; set {TLS} for it"
            return f"the service at {{address}} refuses this side's certificate: {_words(error)}"
        except (OSError, ValueError):
            return ""


_HUNG_UP = "the service at {address} refuses this side's certificate (expired, or of an authority it does not know)"


@dataclass(frozen=True)
class Security:
    """What a server demands and a client shows. ``token`` empty: none; ``tls`` None: plaintext."""

    token: str = field(default="", repr=False)
    tls: Tls | None = None

    @property
    def authorization(self) -> str:
        """The value of the header that carries the token."""
        return f"Bearer {self.token}"

    def refusal(self, authorization: str | None) -> PreceptorError | None:
        """The error for a call that carries this header (None: no header), or None where it may pass."""
        if not self.token:
            return None
        if authorization is None:
            return PreceptorError("UNAUTHENTICATED", f"no token: this service wants the one of its {TOKEN}")
        if not hmac.compare_digest(authorization.encode(), self.authorization.encode()):
            return PreceptorError("UNAUTHENTICATED", f"wrong token: it differs from {TOKEN} of this service")
        return None

    def warn_if_open(self, address: str, host: str) -> None:
        """Logs what a service that listens on ``host`` (and shows itself as ``address``) leaves open.

        A warning and not a refusal: in a container every service listens on 0.0.0.0 and its network is the fence,
        which it cannot see from inside; a refusal would only teach everybody to switch it off.
        """
        if _is_loopback(host) or self.tls:
            return
        if self.token:
            log.warning("%s: the token travels in clear on this interface; set %s", address, TLS)
        else:
            log.warning(
                "%s: whoever reaches this port can use this service; set %s and %s, or listen on 127.0.0.1 "
                "(PRECEPTOR_HOST)",
                address,
                TOKEN,
                TLS,
            )

    def cause(self, address: str) -> str:
        """Why no connection to ``address`` comes about, in words; empty where that has nothing to do with TLS."""
        return self.tls.cause(address) if self.tls else plaintext_cause(address)


def plaintext_cause(address: str) -> str:
    """Says it where the service at ``address`` speaks TLS; empty otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _connected(address) as plain, context.wrap_socket(plain):
            pass
    except (OSError, ValueError):
        return ""
    return f"the service at {address} speaks TLS and this side does not; set {TLS}"


def house_security() -> Security:
    """What the environment of this process says. The files are read once. Raises as ``load_security`` does."""
    try:
        settings = SecuritySettings()
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        variable = f"PRECEPTOR_{problem['loc'][0]}".upper()
        raise PreceptorError("UNAUTHENTICATED", problem["msg"].removeprefix("Value error, "), field=variable) from None
    return load_security(settings)


def load_security(settings: SecuritySettings) -> Security:
    """Reads what the settings name; the same settings are read once.

    Raises PreceptorError (UNAUTHENTICATED for the token, TLS_FAILED for certificates) with ``file`` and ``field``.
    """
    return _load(settings.token.get_secret_value(), settings.token_file, settings.tls)


@lru_cache(maxsize=8)
def _load(token: str, token_file: Path | None, tls: Path | None) -> Security:
    place: dict[str, str] = {"field": TOKEN}
    if token_file:
        place = {"file": str(token_file), "field": TOKEN_FILE}
        try:
            token = token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise PreceptorError("UNAUTHENTICATED", f"the token cannot be read: {_why(error)}", **place) from None
        if not token:
            raise PreceptorError("UNAUTHENTICATED", "the file is empty and should hold the token", **place)
        _warn_if_readable(token_file)
    # A header holds printable ASCII, and its ends are trimmed on the way.
    if not all("!" <= character <= "~" for character in token):
        raise PreceptorError("UNAUTHENTICATED", "the token has characters other than printable ASCII", **place)
    return Security(token, _load_tls(tls) if tls else None)


def _load_tls(folder: Path) -> Tls:
    contents = {}
    for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE):
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _bad(folder, name, f"cannot be read: {_why(error)}") from None
    _warn_if_readable(folder / KEY_FILE)
    server, client = _context(folder, server=True), _context(folder, server=False)
    now = time.time()
    for authority in client.get_ca_certs():
        if ssl.cert_time_to_seconds(str(authority["notAfter"])) < now:
            raise _bad(folder, CA_FILE, f"has expired ({authority['notAfter']})")
    try:
        certificate = _shake_hands(server, client)
    except ssl.SSLCertVerificationError as error:
        said = f"is refused: {error.verify_message}"
        if "issuer" in said or "self-signed" in said or "self signed" in said:
            said = f"is not a certificate of the authority in {CA_FILE} ({error.verify_message})"
        raise _bad(folder, CERTIFICATE_FILE, said) from None
    except ssl.SSLError as error:
        raise _bad(folder, CERTIFICATE_FILE, f"cannot be used: {_words(error)}") from None
    until = ssl.cert_time_to_seconds(certificate["notAfter"])
    left = (until - now) / 86400
    if left < EXPIRY_WARNING_DAYS:
        log.warning("%s expires in %.0f days (%s)", folder / CERTIFICATE_FILE, left, certificate["notAfter"])
    if not certificate.get("subjectAltName"):
        log.warning("%s names no host (subjectAltName); no client accepts it from a service", folder / CERTIFICATE_FILE)
    return Tls(folder, contents[CA_FILE], contents[CERTIFICATE_FILE], contents[KEY_FILE], until)


def _context(folder: Path, server: bool) -> ssl.SSLContext:
    """A side of a mutual TLS connection, without a look at host names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(folder / CA_FILE)
    except (ssl.SSLError, OSError) as error:
        raise _bad(folder, CA_FILE, f"is no certificate in PEM form: {_why(error)}") from None
    try:
        # The empty password keeps OpenSSL from asking for one at the terminal.
        context.load_cert_chain(folder / CERTIFICATE_FILE, folder / KEY_FILE, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _bad(folder, KEY_FILE, f"does not fit {CERTIFICATE_FILE}: they are not of one pair") from None
        wrong = KEY_FILE if _has_certificate(folder / CERTIFICATE_FILE) else CERTIFICATE_FILE
        raise _bad(folder, wrong, "is not in PEM form, or it is encrypted (it must not be)") from None
    except OSError as error:
        raise _bad(folder, CERTIFICATE_FILE, f"cannot be read: {_why(error)}") from None
    return context


def _has_certificate(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (ssl.SSLError, OSError):
        return False
    return True


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """Both sides of one connection in memory; returns the certificate that both have shown.

    Raises ssl.SSLError as the side does that refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(10):  # TLS 1.3 takes two rounds
        waiting = []
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                waiting.append(side)
        if not waiting:
            break
    return sides[1].getpeercert() or {}


def _connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host.strip("[]"), int(port)), timeout=CAUSE_SECONDS)
    connection.settimeout(CAUSE_SECONDS)
    return connection


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _warn_if_readable(path: Path) -> None:
    if path.stat().st_mode & stat.S_IROTH:
        log.warning("%s is a secret that every user of this machine can read; `chmod o-r` it", path)


def _bad(folder: Path, name: str, what: str) -> PreceptorError:
    return PreceptorError("TLS_FAILED", f"{name} {what}", file=str(folder / name), field=TLS)


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return _words(error)
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _words(error: ssl.SSLError) -> str:
    """OpenSSL's reason in words: TLSV13_ALERT_CERTIFICATE_REQUIRED is "certificate required"."""
    return (error.reason or type(error).__name__).rpartition("ALERT_")[2].replace("_", " ").lower()
