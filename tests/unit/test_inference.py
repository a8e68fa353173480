"""The client of inference servers, over real HTTP: what it does of a server that is away, slow, busy, full of nonsense.
The real server is in tests/e2e/test_vllm_teacher.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from preceptor import patient_http
from preceptor.errors import PreceptorError
from preceptor.inference import InferenceServer, Probe
from tests.inference_server import BASE, KEY, PlayedServer, Reply, played_server


@pytest.fixture
def played() -> Iterator[PlayedServer]:
    with played_server() as server:
        yield server


@pytest.fixture
def client(played: PlayedServer) -> Iterator[InferenceServer]:
    made = InferenceServer(played.url, BASE, KEY, concurrency=8, timeout_seconds=5, patience_seconds=20)
    yield made
    made.close()


def refusal(action: Callable[[], Any]) -> PreceptorError:
    with pytest.raises(PreceptorError) as caught:
        action()
    return caught.value


def test_rows_come_back_in_their_order_and_not_more_are_under_way_than_allowed(
    played: PlayedServer, client: InferenceServer
) -> None:
    played.delay = 0.02
    done: list[int] = []
    caller = threading.get_ident()
    prompts = [[5] * (1 + row % 7) for row in range(60)]
    completed = client.complete(
        prompts, max_tokens=4, seeds=range(1, 61), on_done=lambda: done.append(threading.get_ident())
    )
    assert [one.token_ids for one in completed] == [(row + 1, 1 + row % 7) for row in range(60)]
    assert all(one.finished for one in completed)
    assert done == [caller] * 60
    assert 4 <= played.most_under_way <= 8


def test_callers_in_several_threads_share_one_concurrency(played: PlayedServer, client: InferenceServer) -> None:
    played.delay = 0.02
    threads = [threading.Thread(target=client.score, args=([([1], [2])] * 12,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert played.number("/v1/completions") == 72
    assert played.most_under_way <= 8


def test_what_the_servers_files_say_of_sampling_is_overruled(played: PlayedServer, client: InferenceServer) -> None:
    client.complete([[5]], max_tokens=4, temperature=0.7, top_p=0.9, stop_token_ids=[1, 2], stop=["\n"])
    [(_, body)] = played.asked
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
    }
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1.0, 0.0, 0.0)
    assert (body["stop_token_ids"], body["stop"], "seed" in body) == ([1, 2], ["\n"], False)


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.1"}),
        Reply(503, b"no healthy upstream"),
        Reply(500, {"error": {"message": "EngineCore encountered an issue"}}),
        Reply(200, b'{"choices": [', cut=True),
        # what vLLM gives up when it is told to end, or to sleep
        Reply(body={"choices": [{"text": "", "finish_reason": "abort", "stop_reason": None, "token_ids": [9]}]}),
    ],
)
def test_what_passes_is_tried_again(played: PlayedServer, client: InferenceServer, trouble: Reply) -> None:
    played.trouble = lambda number, path, body: trouble if number < 3 else None
    completed = client.complete([[5]] * 4, max_tokens=4, seeds=[1, 2, 3, 4])
    assert [one.token_ids[0] for one in completed] == [1, 2, 3, 4]
    before = played.number("/v1/completions")
    played.trouble = lambda number, path, body: trouble if number < before + 2 else None
    assert client.score([([1], [2])]) == [-2.0]
    played.trouble = lambda number, path, body: trouble if number < 2 else None
    assert client.chat([[("user", "Hello")]], max_tokens=4)[0].finished


def test_a_server_that_goes_away_and_comes_back_in_the_middle_is_waited_for(
    played: PlayedServer, client: InferenceServer
) -> None:
    played.delay = 0.05
    client.load_adapter("policy-1", "/adapters/1")
    restarted = threading.Thread(target=lambda: (time.sleep(0.15), played.stop(), time.sleep(1), played.start()))
    restarted.start()
    completed = client.complete([[5]] * 60, max_tokens=4, model="policy-1", seeds=range(1, 61))
    restarted.join()
    assert [one.token_ids[0] for one in completed] == list(range(1, 61))
    assert played.adapters == {"policy-1": "/adapters/1"}  # loaded again into the new one


def test_patience_ends_and_says_what_was_last(played: PlayedServer) -> None:
    played.trouble = lambda number, path, body: Reply(503, {"error": {"message": f"overloaded, {KEY}"}})
    client = InferenceServer(played.url, BASE, KEY, patience_seconds=1)
    began = time.monotonic()
    error = refusal(lambda: client.complete([[5]] * 3, max_tokens=4))
    assert 1 <= time.monotonic() - began < 8
    assert error.reason == "SERVER_UNREACHABLE"
    assert "HTTP 503: overloaded, ***" in str(error)
    client.close()


def test_a_server_that_accepts_and_never_answers_is_as_good_as_away(played: PlayedServer) -> None:
    played.delay = 3
    client = InferenceServer(played.url, BASE, KEY, timeout_seconds=0.3, patience_seconds=1)
    assert "no answer within 0.3 s" in str(refusal(client.check))
    client.close()


def test_an_address_that_is_none_is_said_at_once() -> None:
    began = time.monotonic()
    client = InferenceServer("vllm:8000", BASE, patience_seconds=60)
    assert refusal(client.check).reason == "SERVER_UNREACHABLE"
    assert time.monotonic() - began < 5
    client.close()


def test_who_is_gone_leaves_nothing_under_way(played: PlayedServer, client: InferenceServer) -> None:
    played.delay = 0.1
    calls = 0

    def stopped() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    assert refusal(lambda: client.complete([[5]] * 500, max_tokens=4, stopped=stopped)).reason == "CANCELLED"
    time.sleep(0.5)
    assert played.number("/v1/completions") < 100

    class Gone(Exception):
        pass

    def gone() -> None:
        raise Gone

    with pytest.raises(Gone):
        client.complete([[5]] * 500, max_tokens=4, on_done=gone)
    time.sleep(0.5)
    assert played.number("/v1/completions") < 200


def test_closing_ends_whoever_waits(played: PlayedServer) -> None:
    played.trouble = lambda number, path, body: Reply(503)
    client = InferenceServer(played.url, BASE, KEY, patience_seconds=60)
    threading.Timer(0.5, client.close).start()
    began = time.monotonic()
    assert refusal(client.check).reason == "CANCELLED"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"api_key": "wrong"}, "SERVER_REFUSED", "the key is not taken"),
        ({"api_key": ""}, "SERVER_REFUSED", "it wants a key"),
        ({"model": "other"}, "MODEL_NOT_SERVED", "does not serve 'other'; it serves base"),
    ],
)
def test_what_is_wrong_with_the_settings_is_said_at_once_without_the_key(
    played: PlayedServer, changes: dict[str, str], reason: str, words: str
) -> None:
    client = InferenceServer(played.url, **{"model": BASE, "api_key": KEY, **changes})
    error = refusal(client.check)
    assert error.reason == reason
    assert words in str(error)
    assert "Bearer" not in str(error)
    assert len(played.asked) <= 2
    client.close()


def test_a_server_that_is_too_old_is_named_with_the_version_that_is_needed(
    played: PlayedServer, client: InferenceServer
) -> None:
    played.version = "0.10.2"
    error = refusal(client.check)
    assert (error.reason, "0.10.2" in str(error), "0.11" in str(error)) == ("SERVER_TOO_OLD", True, True)
    played.trouble = lambda *_: Reply(body={"choices": [{"text": "x", "finish_reason": "stop"}]})
    assert refusal(lambda: client.complete([[5]], max_tokens=4)).reason == "SERVER_TOO_OLD"


@pytest.mark.parametrize(
    "nonsense", [b"<html>a hotel's network</html>", b"[]", b'{"data": 3}', b'{"choices": []}', b"1"]
)
def test_what_is_no_such_server_is_said_at_once(played: PlayedServer, client: InferenceServer, nonsense: bytes) -> None:
    played.trouble = lambda *_: Reply(body=nonsense)
    assert refusal(client.check).reason == "SERVER_UNREADABLE"
    assert refusal(lambda: client.complete([[5]], max_tokens=4)).reason == "SERVER_UNREADABLE"
    assert refusal(lambda: client.score([([5], [6])])).reason == "SERVER_UNREADABLE"
    assert refusal(lambda: client.chat([[("user", "x")]], max_tokens=4)).reason == "SERVER_UNREADABLE"


def test_an_answer_without_end_is_not_read_to_its_end(
    played: PlayedServer, client: InferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient_http, "_MOST_BYTES", 1000)
    played.trouble = lambda *_: Reply(body=b"x" * 5000)
    assert refusal(client.check).reason == "SERVER_UNREADABLE"


def test_a_name_stands_for_one_content_and_is_never_loaded_again(played: PlayedServer, client: InferenceServer) -> None:
    client.load_adapter("policy-1", "/adapters/1")
    client.load_adapter("policy-1", "/adapters/other")
    assert played.number("/v1/load_lora_adapter") == 1
    assert client.adapters() == ["policy-1"]
    client.unload_adapter("policy-1")
    client.unload_adapter("policy-1")
    assert client.adapters() == []


def test_an_adapter_that_is_taken_and_never_there_is_not_loaded_for_ever(played: PlayedServer) -> None:
    client = InferenceServer(played.url, BASE, KEY, patience_seconds=1)
    forgetful = Reply(body={"data": [{"id": BASE, "owned_by": "vllm"}]})  # as two servers behind one address are
    played.trouble = lambda number, path, body: forgetful if path == "/v1/models" else None
    error = refusal(lambda: client.load_adapter("policy-1", "/adapters/1"))
    assert (error.reason, "policy-1" in str(error)) == ("SERVER_UNREADABLE", True)
    assert played.number("/v1/load_lora_adapter") < 10
    client.close()


def test_an_adapter_that_is_not_what_its_probe_says_is_refused_and_given_up(
    played: PlayedServer, client: InferenceServer
) -> None:
    right = Probe((1, 2), (3, 4, 5), -3.0, -6.0)  # the played server gives -1 a token with adapters, -2 without
    client.load_adapter("right", "/adapters/1", right)
    for name, probe in (
        ("wrong", Probe((1, 2), (3, 4, 5), -2.0, -6.0)),
        ("idle", Probe((1, 2), (3, 4, 5), -3.12, -3.0)),  # near enough, and nearer to the base
    ):
        error = refusal(lambda name=name, probe=probe: client.load_adapter(name, "/adapters/2", probe))  # type: ignore[misc]
        assert error.reason == "ADAPTER_MISMATCH"
    assert client.adapters() == ["right"]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(404, {"detail": "Not Found"}), "SERVER_CANNOT_ADAPT"),
        (Reply(500, {"error": {"message": "LoRA is not enabled. Use --enable-lora"}}), "SERVER_CANNOT_ADAPT"),
        (Reply(404, {"error": {"message": "No adapter found for <path>"}}), "ADAPTER_NOT_SEEN"),
        (Reply(500, {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16"}}), "ADAPTER_MISMATCH"),
    ],
)
def test_each_reason_for_not_taking_an_adapter_is_told_from_the_others(
    played: PlayedServer, client: InferenceServer, reply: Reply, reason: str
) -> None:
    played.trouble = lambda number, path, body: reply if "load_lora" in path else None
    assert refusal(lambda: client.load_adapter("policy-1", "/adapters/1")).reason == reason


def test_sleeping_and_waking(played: PlayedServer, client: InferenceServer) -> None:
    client.sleep()
    assert client.sleeping()
    client.wake()
    assert not client.sleeping()
    played.trouble = lambda number, path, body: Reply(404, {"detail": "Not Found"})
    assert refusal(client.sleep).reason == "SERVER_CANNOT_SLEEP"
    played.trouble = lambda number, path, body: Reply(500, {"error": {"message": "Sleep mode is not enabled"}})
    assert refusal(client.sleep).reason == "SERVER_CANNOT_SLEEP"


def test_a_vendors_words_are_learnt_and_its_refusals_said() -> None:
    with played_server(vllm=False) as played:
        client = InferenceServer(f"{played.url}/v1", BASE, KEY, patience_seconds=5)

        def vendor(number: int, path: str, body: dict[str, Any]) -> Reply | None:
            if "seed" in body:
                return Reply(400, {"error": {"message": "Unknown parameter: 'seed'.", "param": "seed"}})
            if "max_tokens" in body:
                words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
                return Reply(400, {"error": {"message": words, "param": "max_tokens"}})
            return None

        played.trouble = vendor
        assert client.check().kind == "other"
        for _ in range(2):
            [said] = client.chat([[("system", "s"), ("user", "write")]], max_tokens=9, seeds=[3])
            assert (said.text, said.finished, said.tokens) == ("None: write", True, 5)
        assert played.number("/v1/chat") == 4  # the second time nothing had to be learnt
        assert played.asked[-1][1]["max_completion_tokens"] == 9
        words = "Unsupported value: 'temperature' does not support 0.7 with this model."
        played.trouble = lambda *_: Reply(400, {"error": {"message": words, "param": "temperature"}})
        error = refusal(lambda: client.chat([[("user", "write")]], max_tokens=9, temperature=0.7))
        assert (error.reason, "'temperature'" in str(error)) == ("SERVER_REFUSED", True)
        played.trouble = lambda *_: Reply(400, {"error": {"code": "context_length_exceeded", "message": "too long"}})
        assert refusal(lambda: client.chat([[("user", "write")]], max_tokens=9)).reason == "PROMPT_TOO_LONG"
        played.trouble = lambda *_: Reply(404)  # keeps no list of models
        assert client.check().models == ()
        client.close()


@pytest.mark.parametrize(
    ("url", "path"),
    [("/", "/v1/models"), ("/v1", "/v1/models"), ("/v1/", "/v1/models"), ("/proxy/v1", "/proxy/v1/models")],
)
def test_the_address_may_have_the_version_or_not(played: PlayedServer, url: str, path: str) -> None:
    client = InferenceServer(played.url + url, BASE, KEY, patience_seconds=1)
    played.trouble = lambda *_: Reply(404)
    client.check()
    assert played.asked[-1][0] == path
    client.close()
