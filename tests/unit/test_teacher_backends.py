"""The teacher on inference servers that are played: what holds without a model. With one: tests/e2e."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from preceptor.artifacts import FolderStore
from preceptor.completions import Limits
from preceptor.errors import PreceptorError
from preceptor.inference import InferenceServer
from teacher.backend import SamplingSettings, TrainedPolicy
from teacher.language import Language
from teacher.policies import Policies
from teacher.policy_store import Policy, PolicyState, PolicyStore
from teacher.recipe import Rewarded, Update, UpdateSettings
from teacher.served import Turns, _Adapters, _alone, _ServedAuthor, _Sleeper
from teacher.service import Teacher, make_backend
from teacher.settings import TeacherSettings
from teacher.training import PROBE_FILE
from teacher.writing import TaskText, WritingRequest
from tests.inference_server import BASE, KEY, PlayedServer, Reply, played_server

REPOSITORY = Path(__file__).parents[2]
TASKS = (TaskText("a", "Ada", "Ada bakes."), TaskText("b", "Bo", "Bo sings."))
REQUEST = WritingRequest("", TASKS, 3, "open", SamplingSettings(0.8, 1.0, 24), 3, Limits(), max_resamples=2)


def settings(home: Path, url: str, **changes: Any) -> TeacherSettings:
    values = {
        "home": home,
        "port": 0,
        "teacher_backend": "openai",
        "teacher_server_url": url,
        "teacher_server_model": BASE,
        "teacher_server_api_key": KEY,
        "teacher_server_patience_seconds": 5,
    }
    return TeacherSettings(**values | changes)


@pytest.fixture
def vendor() -> Iterator[PlayedServer]:
    with played_server(vllm=False) as played:
        yield played


@pytest.fixture
def played() -> Iterator[PlayedServer]:
    with played_server() as server:
        yield server


@pytest.fixture
def client(played: PlayedServer) -> Iterator[InferenceServer]:
    made = InferenceServer(played.url, BASE, KEY, patience_seconds=5)
    yield made
    made.close()


def test_a_vendors_model_writes_groups_which_are_kept(vendor: PlayedServer, tmp_path: Path) -> None:
    backend = make_backend(settings(tmp_path, vendor.url))
    teacher = Teacher(backend, settings(tmp_path, vendor.url))
    groups = list(teacher.writer.write(REQUEST, lambda: False))
    assert [group.task_id for group in groups] == ["a", "b"]
    bodies = [body for path, body in vendor.asked if path == "/v1/chat/completions"]
    assert len(bodies) == 6
    assert len({body["seed"] for body in bodies}) == 6
    for body in bodies:
        assert (body["temperature"], body["max_tokens"]) == (0.8, 24)
        system, user = body["messages"]
        assert "one self-contained document per line" in system["content"]
        assert user["content"].startswith(("# Ada\nAda bakes.\n", "# Bo\nBo sings.\n"))
    assert [one.tokens for group in groups for one in group.written] == [5] * 6
    vendor.stop()  # what was written once needs nobody
    again = list(teacher.writer.write(REQUEST, lambda: False))
    assert [group.written for group in again] == [group.written for group in groups]
    teacher.stop()
    teacher.store.close()
    backend.close()
    vendor.start()


def test_a_fixed_teacher_does_not_learn_and_says_so(vendor: PlayedServer, tmp_path: Path) -> None:
    backend = make_backend(settings(tmp_path, vendor.url))
    teacher = Teacher(backend, settings(tmp_path, vendor.url))
    assert teacher.policies.fixed
    example = Rewarded("g", "Ada", "Ada bakes.", "Ada bakes.", "open", 1.0, 0.0)
    with pytest.raises(PreceptorError) as caught:
        teacher.policies.update(Update("", (example,), UpdateSettings(), 1, False), "r1", b"r1")
    assert caught.value.reason == "TEACHER_IS_FIXED"
    assert BASE in str(caught.value)
    teacher.stop()
    teacher.store.close()
    backend.close()


def test_an_update_that_fails_of_the_service_s_own_end_begins_again_at_the_next_start(tmp_path: Path) -> None:
    began, closed = threading.Event(), threading.Event()

    class WaitsForServer:
        def train(self, *_asked: object) -> TrainedPolicy:
            began.set()
            closed.wait(10)
            raise PreceptorError("CANCELLED", "the connection to http://vllm:8000 was closed")

    url = f"sqlite:///{tmp_path}/teacher.db"
    store = PolicyStore(url)
    policies = Policies("base", "0" * 64, WaitsForServer(), store, FolderStore(tmp_path / "policies"))
    policies.start()
    example = Rewarded("g", "Ada", "Ada bakes.", "Ada bakes.", "open", 1.0, 0.0)
    made = policies.update(Update("", (example,), UpdateSettings(), 1, False), "r1", b"")
    assert began.wait(10)
    threading.Timer(0.2, closed.set).start()
    policies.stop()
    assert store.get(made.id).state is PolicyState.TRAINING
    store.close()


def test_another_model_or_address_is_another_teacher(vendor: PlayedServer, tmp_path: Path) -> None:
    with played_server(vllm=False) as other:
        commits = []
        for url, model in ((vendor.url, BASE), (vendor.url + "/v1", BASE), (vendor.url, "gpt"), (other.url, BASE)):
            backend = make_backend(settings(tmp_path, url, teacher_server_model=model))
            commits.append(backend.commit)
            backend.close()
    assert commits[0] == commits[1]
    assert len(set(commits)) == 3


def test_a_vendors_teacher_needs_no_torch(vendor: PlayedServer, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'numpy', 'safetensors'): sys.modules[name] = None\n"
        "from teacher.service import Teacher, make_backend\n"
        "from teacher.settings import TeacherSettings\n"
        "settings = TeacherSettings()\n"
        "teacher = Teacher(make_backend(settings), settings)\n"
        "print(teacher.policies.get().id)\n"
    )
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "PRECEPTOR_HOME": str(tmp_path),
        "PRECEPTOR_TEACHER_BACKEND": "openai",
        "PRECEPTOR_TEACHER_SERVER_URL": vendor.url,
        "PRECEPTOR_TEACHER_SERVER_MODEL": BASE,
        "PRECEPTOR_TEACHER_SERVER_API_KEY": KEY,
    }
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("base-")


def test_a_vllm_teacher_needs_a_vllm_server(vendor: PlayedServer, tmp_path: Path) -> None:
    with pytest.raises(PreceptorError) as caught:
        make_backend(settings(tmp_path, vendor.url, teacher_backend="vllm"))
    assert caught.value.reason == "SERVER_TOO_OLD"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_backend": "vllm"}, "needs PRECEPTOR_TEACHER_SERVER_URL"),
        ({"teacher_backend": "openai", "teacher_server_url": "http://v"}, "needs PRECEPTOR_TEACHER_SERVER_MODEL"),
        ({"teacher_server_url": "vllm:8000"}, "is no http"),
        ({"teacher_server_url": "https://user:secret@host"}, "PRECEPTOR_TEACHER_SERVER_API_KEY"),
        ({"teacher_server_mount": "/data"}, "HERE:THERE"),
        ({"teacher_server_api_key": "a", "teacher_server_api_key_file": "/x"}, "give one"),
        ({"teacher_server_api_key_file": "/no/such/file"}, "cannot be read"),
        ({"teacher_server_api_key": "line\nbreak"}, "characters that no key has"),
    ],
)
def test_wrong_settings_are_named_and_keys_are_not_shown(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TeacherSettings(**values)
    assert words in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert "break" not in str(caught.value)


def test_a_key_may_lie_in_a_file_and_is_in_no_dump(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    made = TeacherSettings(teacher_server_api_key_file=tmp_path / "key")
    assert made.teacher_server_api_key.get_secret_value() == "sesame"
    assert "sesame" not in made.model_dump_json()
    assert "sesame" not in repr(made)


def test_the_server_may_see_a_folder_elsewhere(tmp_path: Path) -> None:
    made = TeacherSettings(teacher_server_mount=f"{tmp_path}:/data")
    assert made.seen_by_server(tmp_path / "artifacts/policies/p") == "/data/artifacts/policies/p"
    assert made.seen_by_server(Path("/elsewhere/p")) == "/elsewhere/p"
    assert TeacherSettings().seen_by_server(tmp_path / "p") == str((tmp_path / "p").resolve())


def test_batches_of_one_policy_go_together_and_others_wait_in_their_order() -> None:
    turns = Turns()
    began: list[str] = []
    lock = threading.Lock()
    together: list[set[str]] = []
    under_way: list[str] = []

    def take(of: str, alone: bool) -> None:
        with turns.turn(of, alone=alone):
            with lock:
                began.append(of)
                under_way.append(of)
                together.append(set(under_way))
            time.sleep(0.1)
            with lock:
                under_way.remove(of)

    threads = []
    for of in ("a", "a", "b", "update", "b", "a"):
        threads.append(threading.Thread(target=take, args=(of, of == "update")))
        threads[-1].start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(10)
    assert began == ["a", "a", "b", "update", "b", "a"]  # the last a does not overtake those who wait
    assert all(len(names) == 1 for names in together)
    with turns.turn("a"), pytest.raises(PreceptorError) as caught, turns.turn("b", lambda: True):
        pass
    assert caught.value.reason == "CANCELLED"
    with turns.turn("b"):  # who went away is in nobody's way
        pass


def test_the_least_recently_used_policies_make_room(
    played: PlayedServer, client: InferenceServer, tmp_path: Path
) -> None:
    client.load_adapter("policy-of-the-teacher-before", "/old")
    client.load_adapter("somebody-elses", "/theirs")
    adapters = _Adapters(client, 2, str)
    names = {sha: f"policy-{sha * 40}" for sha in "abc"}
    for sha in "abab":
        assert adapters.ready(sha * 64, tmp_path / sha) == names[sha]
    assert list(played.adapters) == ["somebody-elses", names["a"], names["b"]]
    assert played.number("/v1/load_lora_adapter") == 4
    adapters.ready("c" * 64, tmp_path / "c")
    assert list(played.adapters) == ["somebody-elses", names["b"], names["c"]]
    assert played.adapters[names["c"]] == str(tmp_path / "c")


def test_policies_that_a_server_lost_in_its_sleep_are_loaded_again(
    played: PlayedServer, client: InferenceServer, tmp_path: Path
) -> None:
    values = {"prompt": [1, 2], "continuation": [3, 4, 5], "logprob": -3.0, "base_logprob": -6.0}
    (tmp_path / PROBE_FILE).write_text(json.dumps(values))
    adapters = _Adapters(client, 1, str)
    name = adapters.ready("a" * 64, tmp_path)
    adapters.doubt()
    adapters.ready("a" * 64, tmp_path)
    assert played.number("/v1/load_lora_adapter") == 1  # it was looked at, and was whole
    broken = Reply(
        body={"choices": [{"prompt_logprobs": [None, *({str(token): {"logprob": -9.0}} for token in range(2, 6))]}]}
    )
    at = played.number("/v1/completions")
    played.trouble = lambda number, path, body: broken if path == "/v1/completions" and number == at else None
    adapters.doubt()
    assert adapters.ready("a" * 64, tmp_path) == name
    assert played.number("/v1/load_lora_adapter") == 2


def test_a_policys_files_are_looked_for_when_its_turn_has_come(
    played: PlayedServer, client: InferenceServer, tmp_path: Path
) -> None:
    """Copies of what lies in a bucket are kept for minutes; the update that is waited for may take hours."""
    turns, looked = Turns(), threading.Event()
    language = Language(None, "base", "0" * 64, 1, frozenset({1}), 64)  # type: ignore[arg-type]
    author = _ServedAuthor(client, language, 64, _Adapters(client, 1, str), turns, None)
    policy = Policy("p", "", "base", "0" * 64, PolicyState.READY, datetime.now(UTC), "file:///p", "a" * 64)

    def folder() -> Path:
        looked.set()
        return tmp_path

    def write() -> None:
        with author.writing(policy, folder, lambda: False):
            pass

    thread = threading.Thread(target=write)
    with turns.turn("an update", alone=True):
        thread.start()
        assert not looked.wait(0.3)
    thread.join(10)
    assert looked.is_set()
    assert list(played.adapters.values()) == [str(tmp_path)]


def test_a_server_sleeps_while_the_device_is_held_and_is_woken_whatever_happens(
    played: PlayedServer, client: InferenceServer
) -> None:
    client.sleep()  # by a teacher that died
    sleeper, turns = _Sleeper(client), Turns()
    assert not played.asleep
    with _alone(turns, sleeper):
        assert played.asleep
        with pytest.raises(PreceptorError), turns.turn("a", lambda: True):
            pass  # nobody writes meanwhile
    assert not played.asleep
    with pytest.raises(ZeroDivisionError), _alone(turns, sleeper):
        raise ZeroDivisionError
    assert not played.asleep
    played.trouble = lambda number, path, body: Reply(401) if path == "/wake_up" else None
    with _alone(turns, sleeper):  # the update is not lost because the server cannot be woken
        pass
    assert played.asleep
    played.trouble = lambda number, path, body: None
    sleeper.wake()  # as whoever writes next does
    assert not played.asleep
