"""The queue's two sides against a real Redis, without a worker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import redis
from celery import Celery

from preceptor import __version__, queue
from preceptor.errors import PreceptorError
from preceptor.queue import batch_from_payload, celery_url, check_broker, fetch_results, make_app, submit, to_payload
from preceptor.v1 import trial_pb2 as wire
from student import worker
from tests.integration.worker_house import RedisServer, redis_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def app(server: RedisServer) -> Iterator[Celery]:
    app = make_app(server.url)
    yield app
    app.close()


def batch(name: str = "batch") -> wire.TrialBatch:
    return wire.TrialBatch(id=name, trials=[wire.Trial(id="one", documents=["a document"])], protocol_version=1)


def test_a_batch_that_is_submitted_lies_on_the_queue_once_with_nobody_listening(
    server: RedisServer, app: Celery
) -> None:
    with server.client() as client:
        for number in range(50):
            assert submit(app, batch(f"batch{number}"), 2) == f"batch{number}.2"
        assert client.llen("trials") == 50
        message = json.loads(client.rpop("trials"))
        # No subscription to a result that nobody waits for there, and no document outside of the payload.
        assert client.pubsub_channels() == []
        assert "a document" not in json.dumps(message["headers"])
        assert message["headers"]["id"] == "batch0.2"
        client.delete("trials")
    assert not app.backend.result_consumer.subscribed_to


def test_submitting_where_redis_is_away_fails_within_seconds() -> None:
    begun = time.monotonic()
    with pytest.raises(Exception, match="Connection refused"):
        submit(make_app("redis://127.0.0.1:1/0"), batch(), 1)
    assert time.monotonic() - begun < 2


def test_a_payload_comes_back_as_it_was_and_another_version_s_is_refused_by_name() -> None:
    payload = to_payload(batch())
    assert batch_from_payload(payload) == batch()
    assert batch_from_payload({}) == wire.TrialBatch()  # the contract: no version is version 1
    for change, words in (
        ({"protocol_version": 2}, "is of version 2"),
        ({"protocol_version": 99, "qubits": 3}, "is of version 99, but has fields unknown here: "),
        ({"qubits": 3}, "is of version 1, but has fields unknown here: "),
        ({"trials": [{"id": "one", "qubits": 3}]}, '"qubits"'),
    ):
        with pytest.raises(PreceptorError) as refused:
            batch_from_payload({**payload, **change})
        assert refused.value.reason == "VERSION_SKEW"
        assert words in refused.value.message
        assert f"Preceptor {__version__} and speaks version 1 " in refused.value.message
    for junk in (
        None,
        3,
        "batch",
        [payload],
        {"trials": "three"},
        {"id": 5},
        {"protocol_version": "x"},
        {"id": "\ud800"},
    ):
        with pytest.raises(PreceptorError) as refused:
            batch_from_payload(junk)
        assert refused.value.reason == "INVALID_REQUEST"


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's
def test_a_result_that_cannot_be_read_is_a_failure_of_its_task_alone(server: RedisServer, app: Celery) -> None:
    good = wire.TrialBatchResult(batch_id="good")
    app.backend.store_result("good.1", to_payload(good), "SUCCESS")
    app.backend.store_result("raised.1", RuntimeError("oh"), "FAILURE")
    app.backend.store_result("begun.1", None, "STARTED")
    junk = ["", "x", "[]", "3", "null", "{}", '{"status": "SUCCESS"}', '{"status": "SUCCESS", "result": 3}', "\x00\xff"]
    with server.client() as client:
        for number, value in enumerate(junk):
            client.set(f"celery-task-meta-junk{number}.1", value)
    tasks = ["good.1", "raised.1", "begun.1", "never.1", *(f"junk{number}.1" for number in range(len(junk)))]
    found = fetch_results(app, tasks)
    assert found.pop("good.1") == good
    assert found.pop("raised.1").failure.message == "oh"
    assert set(found) == {f"junk{number}.1" for number in range(1, len(junk))}  # what is empty is not there
    for task_id, result in found.items():
        assert (result.failure.reason, f"{result.batch_id}.1") == ("TRIAL_FAILED", task_id)
        assert "cannot be read" in result.failure.message


def test_the_broker_is_checked_and_its_clock_compared(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert abs(check_broker(server.url)) < 5
    worker._wait_for_broker(server.url)
    assert not caplog.records
    for ahead, words in ((3600, "3600 s ahead of that of Redis"), (-90, "90 s behind that of Redis")):
        monkeypatch.setattr(queue, "time", SimpleNamespace(time=lambda ahead=ahead: time.time() + ahead))
        assert check_broker(server.url) == pytest.approx(ahead, abs=5)
        worker._wait_for_broker(server.url)
        assert words in caplog.text.replace("3599", "3600").replace("3601", "3600")


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (lambda url: url.replace("/0", "/99"), "BROKER_REFUSED", "DB index is out of range"),
        (lambda url: url.replace("/0", "/zero"), "BROKER_REFUSED", "the database is a number, not 'zero'"),
        (lambda url: "redis://:secret@" + url.rpartition("@")[2], "BROKER_REFUSED", "invalid username-password pair"),
        (lambda url: "redis://nobody:secret@" + url.rpartition("@")[2], "BROKER_REFUSED", "redis://nobody:***@127"),
        (lambda url: "redis://" + url.rpartition("@")[2], "BROKER_REFUSED", "it wants a password"),
        (lambda url: "redis://:secret@127.0.0.1:99999/0", "BROKER_REFUSED", "Port out of range"),
        (lambda url: "redis://:secret@127.0.0.1:1/0", "BROKER_UNREACHABLE", "Connection refused"),
        (lambda url: "redis://:secret@no.such.host.invalid/0", "BROKER_UNREACHABLE", "redis://:***@no.such.host"),
        (lambda url: "unix:///no/such/socket?db=0", "BROKER_UNREACHABLE", "/no/such/socket"),
        (lambda url: url.replace("redis://", "rediss://"), "TLS_FAILED", "it does not speak TLS"),
    ],
)
def test_a_wrong_broker_is_named_without_its_password(
    server: RedisServer, change: object, reason: str, words: str
) -> None:
    url = change(server.url)  # type: ignore[operator]
    with pytest.raises(PreceptorError) as refused:
        check_broker(url)
    assert refused.value.reason == reason
    assert words in refused.value.message
    assert "secret" not in refused.value.message
    assert url.rpartition("@")[0].rpartition(":")[2] not in refused.value.message or "@" not in url


def test_a_url_is_put_as_celery_wants_it() -> None:
    assert celery_url("redis://:x@h:1/3") == "redis://:x@h:1/3"
    assert celery_url("unix:///run/redis.sock?db=3") == "redis+socket:///run/redis.sock?virtual_host=3"
    secure = make_app("rediss://:x@h:1/3")
    assert secure.backend.connparams["ssl_cert_reqs"].name == "CERT_REQUIRED"
    assert secure.connection().ssl["ssl_cert_reqs"].name == "CERT_REQUIRED"
    chosen = "rediss://:x@h:1/3?ssl_cert_reqs=none"
    assert celery_url(chosen) == chosen


def test_what_celery_is_told_reaches_the_sockets(server: RedisServer, app: Celery) -> None:
    """Several of its settings have two names, of which one does nothing."""
    with app.connection() as connection:
        broker = connection.default_channel.client.connection_pool.connection_kwargs
    result = app.backend.client.connection_pool.connection_kwargs
    for options in (broker, result):
        assert options["socket_timeout"] == queue.ANSWER_SECONDS
        assert options["socket_connect_timeout"] == queue.CONNECT_SECONDS
        assert options["socket_keepalive"] is True
    assert app.backend.exception_safe_to_retry(redis.ResponseError("MISCONF Errors writing to the AOF file"))
    assert app.backend.retry_policy["max_retries"] == 0
