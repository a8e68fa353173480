"""How often one client may call a service: a bucket of calls each, which fills again at a fixed rate.

For the door that is open to many (the published orchestrator's): one client's loop is not to starve the others. Who has
called too often is told for how long to wait, and ``preceptor.channel`` waits. Services call each other far more often
than people do, so theirs have no limit unless one is set for them.

A client is an address, and a certificate where there is one; an IPv6 address counts as its network of 64 bits, of which
a machine has as many as it likes.
"""

from __future__ import annotations

import hashlib
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from urllib.parse import unquote

from preceptor.errors import PreceptorError

# Where the error says how long to wait.
RETRY_SECONDS = "retry_seconds"
# A command that starts makes a handful of calls at once.
BURST_SECONDS = 5.0
# Beyond so many clients the one that has called longest ago is forgotten, and begins with a full bucket again.
MOST_CLIENTS = 10_000


class RateLimit:
    """Safe to use from several threads. ``rate``: calls a second; 0: no limit."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._most = max(1.0, rate * BURST_SECONDS)
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # calls left, and when that was

    @property
    def is_on(self) -> bool:
        """Whether there is a limit."""
        return self._rate > 0

    def refusal(self, client: str) -> PreceptorError | None:
        """The error (RATE_LIMITED) for one more call of this client, or None where it may pass."""
        if not self.is_on:
            return None
        now = self._clock()
        with self._lock:
            left, then = self._buckets.pop(client, (self._most, now))
            left = min(self._most, left + (now - then) * self._rate)
            passes = left >= 1
            self._buckets[client] = (left - 1 if passes else left, now)
            if len(self._buckets) > MOST_CLIENTS:
                self._buckets.popitem(last=False)
        if passes:
            return None
        seconds = (1 - left) / self._rate
        return PreceptorError(
            "RATE_LIMITED",
            f"more than {self._rate:g} calls a second from one client; the next one in {seconds:.2f} s",
            **{RETRY_SECONDS: f"{seconds:.3f}"},
        )


def client_name(peer: str, certificate: Mapping[str, list[bytes]]) -> str:
    """Who calls, by gRPC's peer and its authentication context."""
    kind, _, address = unquote(peer).partition(":")
    host = address.rpartition(":")[0].strip("[]").partition("%")[0] if kind in ("ipv4", "ipv6") else address
    try:
        known = ipaddress.ip_address(host)
        if isinstance(known, ipaddress.IPv6Address):
            host = str(known.ipv4_mapped or ipaddress.ip_network((known, 64), strict=False))
    except ValueError:  # a socket in the file system
        pass
    shown = b"".join(certificate.get("x509_pem_cert", ()))
    return f"{host} {hashlib.sha256(shown).hexdigest()}" if shown else host
