"""Which contract this side speaks, told with every call, so that two versions that do not fit say so by name.

A client that tells nothing (grpcurl, another language) is served: it may know what it does.
"""

from __future__ import annotations

from preceptor import __version__
from preceptor.errors import PreceptorError

# Raise it with a change of proto/ or of its meaning that an older peer would misunderstand; added fields are none.
CONTRACT_VERSION = 1

CONTRACT_KEY, VERSION_KEY = "preceptor-contract", "preceptor-version"
# In answers about health only: the service's clock, in seconds since 1970, and its process id.
TIME_KEY, PID_KEY = "preceptor-time", "preceptor-pid"
METADATA = ((CONTRACT_KEY, str(CONTRACT_VERSION)), (VERSION_KEY, __version__))


def skew(contract: str, version: str) -> PreceptorError | None:
    """The error for a client that speaks ``contract`` (as its metadata say), or None where the two sides fit."""
    if contract == METADATA[0][1]:
        return None
    try:
        spoken = int(contract)
    except ValueError:
        return PreceptorError("INVALID_REQUEST", "the metadata are not a number", field=CONTRACT_KEY)
    older = "the client" if spoken < CONTRACT_VERSION else "this service"
    return PreceptorError(
        "VERSION_SKEW",
        f"the client is version {version[:40] or 'unknown'} (contract {spoken}) and this service version {__version__} "
        f"(contract {CONTRACT_VERSION}): update {older}",
        client_contract=spoken,
        service_contract=CONTRACT_VERSION,
    )
