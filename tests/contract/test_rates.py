"""What a client that calls too often is told, and what it does then. Real sockets."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from preceptor.channel import call, from_rpc_error, health_of, stream
from preceptor.errors import PreceptorError
from preceptor.rates import MOST_CLIENTS, RateLimit, client_name
from preceptor.security import Security
from preceptor.v1 import student_pb2
from tests.contract.test_security import TOKEN, Service, Servicer, served

__all__ = ["served"]  # a fixture

REQUEST = student_pb2.GetStudentRequest(name="x")
# A second; five calls at once.
RATE = 1.0
BURST = 5


def test_a_bucket_empties_and_fills_again_for_each_client() -> None:
    now = 0.0
    limit = RateLimit(2.0, lambda: now)
    assert [limit.refusal("a") is None for _ in range(12)] == [True] * 10 + [False] * 2
    refused = limit.refusal("a")
    assert refused is not None
    assert (refused.reason, refused.metadata) == ("RATE_LIMITED", {"retry_seconds": "0.500"})
    assert limit.refusal("b") is None
    now = 0.5
    assert [limit.refusal("a") is None for _ in range(2)] == [True, False]
    now = 1000.0
    assert [limit.refusal("a") is None for _ in range(11)] == [True] * 10 + [False]  # no more than a bucket is saved up
    slow = RateLimit(0.1, lambda: now)
    assert slow.refusal("a") is None
    assert slow.refusal("a") is not None
    assert all(RateLimit(0.0).refusal("a") is None for _ in range(1000))


def test_so_many_clients_are_remembered_and_no_more() -> None:
    limit = RateLimit(0.2, lambda: 0.0)
    assert limit.refusal("first") is None
    assert limit.refusal("first") is not None
    for number in range(MOST_CLIENTS):
        limit.refusal(f"{number}")
    assert limit.refusal("first") is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ipv4:10.0.0.1:1000", "ipv4:10.0.0.1:2000", True),
        ("ipv4:10.0.0.1:1000", "ipv4:10.0.0.2:1000", False),
        ("ipv6:%5B2001:db8::1%5D:1000", "ipv6:[2001:db8::ffff:1]:7", True),
        ("ipv6:%5B2001:db8::1%5D:1000", "ipv6:%5B2001:db8:1::1%5D:1000", False),
        ("ipv6:%5B::ffff:10.0.0.1%5D:1000", "ipv4:10.0.0.1:1", True),
        ("ipv6:%5B::ffff:10.0.0.1%5D:1000", "ipv4:10.0.0.2:1", False),
        ("unix:/run/a", "unix:/run/b", False),
    ],
)
def test_a_client_is_an_address(one: str, other: str, same: bool) -> None:
    assert (client_name(one, {}) == client_name(other, {})) is same


def test_certificates_behind_one_address_are_clients_of_their_own() -> None:
    first, second = ({"x509_pem_cert": [text]} for text in (b"one", b"two"))
    assert client_name("ipv4:10.0.0.1:1", first) != client_name("ipv4:10.0.0.1:1", second)
    assert client_name("ipv4:10.0.0.1:1", first) == client_name("ipv4:10.0.0.1:2", first)


def test_whoever_calls_too_often_is_told_how_long_to_wait(served: Callable[..., Service]) -> None:
    service = served(rate_limit=RATE)
    stub = service.client(Security())
    for _ in range(BURST):
        stub.GetStudent(REQUEST, timeout=5)
    for method in (lambda: stub.GetStudent(REQUEST, timeout=5), lambda: next(stub.WatchDeployment(REQUEST, timeout=5))):
        with pytest.raises(grpc.RpcError) as raised:
            method()
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = from_rpc_error(raised.value)
        assert error.reason == "RATE_LIMITED"
        assert "more than 1 calls a second from one client" in error.message
        assert 0 < float(error.metadata["retry_seconds"]) <= 1
        status = rpc_status.from_call(raised.value)
        retry = error_details_pb2.RetryInfo()
        assert status.details[1].Unpack(retry)
        assert 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 1
    assert service.servicer.calls == BURST


def test_our_client_waits_as_it_is_told(served: Callable[..., Service]) -> None:
    service = served(rate_limit=RATE)
    stub = service.client(Security())
    for _ in range(BURST):
        stub.GetStudent(REQUEST, timeout=5)
    begin = time.monotonic()
    assert call(stub.GetStudent, REQUEST, deadline=10).student.name == "x"
    assert 0.5 < time.monotonic() - begin < 3
    watch = stream(stub.WatchDeployment, student_pb2.WatchDeploymentRequest(name="x"), deadline=10)
    assert [one.deployment.name for one in watch] == ["x"]
    assert 1.5 < time.monotonic() - begin < 5
    with pytest.raises(PreceptorError) as raised:  # no time to wait
        call(stub.GetStudent, REQUEST, deadline=0.3)
    assert raised.value.reason == "RATE_LIMITED"
    with pytest.raises(PreceptorError) as raised:
        list(stream(stub.WatchDeployment, student_pb2.WatchDeploymentRequest(name="x"), deadline=0.3))
    assert raised.value.reason == "RATE_LIMITED"


def test_health_is_never_limited_and_a_wrong_token_costs_nothing(served: Callable[..., Service]) -> None:
    service = served(rate_limit=RATE, token=TOKEN)
    for _ in range(3 * BURST):
        assert health_of(service.address, security=Security()).serving
    for _ in range(BURST):  # who may not call at all takes nothing from those who may
        with pytest.raises(PreceptorError, match="wrong token"):
            service.ask(Security("wrong"))
    assert [service.ask(Security(TOKEN)) for _ in range(BURST)] == ["x"] * BURST


def test_without_a_limit_nobody_waits(served: Callable[..., Service]) -> None:
    service = served()
    stub = service.client(Security())
    for _ in range(300):
        stub.GetStudent(REQUEST, timeout=5)
    assert service.servicer.calls == 300


def test_a_watch_that_is_not_told_how_long_to_wait_waits_all_the_same(
    served: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PreceptorError("RATE_LIMITED", "later")

    monkeypatch.setattr(Servicer, "WatchDeployment", refuse)
    stub, tries = served().client(Security()), 0

    def opened(_: object) -> None:
        nonlocal tries
        tries += 1

    watch = student_pb2.WatchDeploymentRequest(name="x")
    with pytest.raises(PreceptorError) as raised:
        list(stream(stub.WatchDeployment, watch, deadline=1.5, opened=opened))
    assert raised.value.reason == "RATE_LIMITED"
    assert 2 <= tries <= 8
