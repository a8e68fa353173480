"""Serving a student with vLLM: the command, what is refused before it, and what a server that ends has said.

The interpreter here is a script that answers as vLLM's environment does; the real one is asked by tests/e2e.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256
from student.base import load_base
from student.lora_bank import LoraBank
from student.peft_format import export_adapter
from student.serve import how_to_ask
from student.vllm_command import Serving, Vllm, command, environment, find_vllm, last_words, own_environment, quoted
from tests.unit.tiny_students import save_student

REPOSITORY = Path(__file__).parents[2]
CPU = Vllm(Path("/v/bin/python"), "0.32.0", cpu=True, head_sizes=(32, 64, 128))
GPU = Vllm(Path("/v/bin/python"), "0.32.0", cpu=False)


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_a_student_is_served_as_workers_compute_and_as_nothing_but_itself() -> None:
    serving = Serving(name="tiny@0123456789ab", model=Path("/m"), context=256, more=("--max-num-seqs", "8"))
    on_cpu, on_gpu = command(CPU, serving), command(GPU, serving)
    assert (after(on_cpu, "--dtype"), after(on_gpu, "--dtype")) == ("float32", "bfloat16")
    for words in (on_cpu, on_gpu):
        assert words[:3] == ["/v/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
        assert after(words, "--served-model-name") == "tiny@0123456789ab"
        assert after(words, "--generation-config") == "vllm"
        assert after(words, "--max-model-len") == "256"
        assert "--enable-lora" not in words
        assert words[-2:] == ["--max-num-seqs", "8"]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in own_environment(CPU, serving)


def test_adapters_find_room_for_the_largest_rank_and_the_head_is_left_alone() -> None:
    serving = Serving(name="tiny@0", model=Path("/m"), adapters=(("a@1", Path("/a")),), for_workers=True, max_rank=40)
    words = command(GPU, serving)
    assert after(words, "--max-lora-rank") == "64"
    assert after(words, "--lora-modules") == "a@1=/a"
    targets = words[words.index("--lora-target-modules") + 1 : words.index("--lora-modules")]
    assert "q_proj" in targets
    assert "lm_head" not in targets
    assert own_environment(GPU, serving)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_our_secrets_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    serving = Serving(name="tiny@0", model=Path("/m"))
    given = environment(GPU, serving, api_key="its own")
    assert given["VLLM_API_KEY"] == "its own"
    assert "secret" not in given.values()
    assert "PYTHONPATH" not in given
    assert "its own" not in quoted(command(GPU, serving), own_environment(GPU, serving))


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 96, "num_attention_heads": 4}, 24),
        ({"hidden_size": 96, "num_attention_heads": 4, "head_dim": 28}, 28),
        ({"hidden_size": 128, "num_attention_heads": 4}, None),
        ({"hidden_size": 128, "num_attention_heads": 0}, None),
        ({}, None),
    ],
)
def test_heads_without_a_kernel_are_refused_on_the_cpu(config: dict[str, Any], width: int | None) -> None:
    assert CPU.refusal(config) == (
        f"its attention heads are {width} wide; vLLM 0.32.0 on the CPU serves widths of 32, 64, 128" if width else ""
    )
    assert GPU.refusal(config) == ""


LOG = """(APIServer pid=8) WARNING 11-21 21:36:37 [u.py:255] This can cause errors like `OSError: too many open files`
(Worker pid=7) ERROR 11-21 21:40:00 [e.py:63] Traceback (most recent call last):
(Worker pid=7) ERROR 11-21 21:40:00 [e.py:63] RuntimeError: Unsupported CPU attention configuration: head_dim=24
(EngineCore pid=9) ERROR 11-21 21:40:00 [core.py:5] RuntimeError: Worker failed with error 'Unsupported CPU attention'
(APIServer pid=8) ERROR 11-21 21:40:00 [async_llm.py:906] vllm.v1.EngineDeadError: EngineCore encountered an issue. See
(APIServer pid=8) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
INFO: bye
"""
INVALID = """(APIServer pid=8) pydantic_core._pydantic_core.ValidationError: 1 validation error for LoRAConfig
(APIServer pid=8) max_lora_rank
(APIServer pid=8)   Input should be 1, 8 or 16
"""


def test_the_last_words_are_the_error_behind_the_others() -> None:
    assert last_words(LOG) == "RuntimeError: Unsupported CPU attention configuration: head_dim=24"
    assert last_words(INVALID).endswith("for LoRAConfig max_lora_rank Input should be 1, 8 or 16")
    assert last_words("usage: vllm\nerror: unknown argument --nonsense\n") == "error: unknown argument --nonsense"
    assert last_words("") == "it said nothing"


# -- the process -------------------------------------------------------------------------------------------------------


def interpreter(folder: Path, *, said: dict[str, Any] | None = None, server: str = "exit 0") -> Path:
    """What takes the place of vLLM's Python: says ``said`` of its environment, and is a server by a line of shell."""
    said = {"version": "0.32.0", "cpu": True, "sizes": [8, 32]} if said is None else said
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {shlex.quote(json.dumps(said))}; exit 0; fi\n{server}\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_student(tmp_path / "student")


def serve(student: Path, python: Path, *arguments: str) -> tuple[int, str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    own |= {"PRECEPTOR_VLLM_PYTHON": str(python), "PRECEPTOR_HOME": str(python.parent / "home")}
    words = [sys.executable, "-m", "student.serve", "--name", "tiny", "--source", str(student)]
    if "--commit" not in arguments:
        words += ["--commit", folder_sha256(student)]
    done = subprocess.run([*words, *arguments], env=own, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def adapter_of(student: Path, folder: Path, commit: str) -> Path:
    base = load_base(student, source=str(student), commit=commit)
    export_adapter(base, LoraBank(base.model, ["q_proj"], [4], [8.0], [1]), 0, folder)
    return folder


def test_a_dry_run_prints_the_command_with_each_adapter_under_its_hash(student: Path, tmp_path: Path) -> None:
    adapter = adapter_of(student, tmp_path / "night", folder_sha256(student))
    both = ("--adapter", str(adapter), "--adapter", f"day={adapter}")
    code, out, _ = serve(student, interpreter(tmp_path), *both, "--dry-run", "--max-rank", "2")
    sha = folder_sha256(adapter)[:12]
    words = shlex.split(out)
    assert code == 0
    assert after(words, "--served-model-name") == f"tiny@{folder_sha256(student)[:12]}"
    start = words.index("--lora-modules")
    assert words[start + 1 : start + 3] == [f"night@{sha}={adapter}", f"day@{sha}={adapter}"]
    assert after(words, "--max-lora-rank") == "8"


def test_what_cannot_be_served_is_one_message(student: Path, tmp_path: Path) -> None:
    stranger = adapter_of(student, tmp_path / "stranger", "0123456789abcdef")
    wide = interpreter(tmp_path, said={"version": "0.32.0", "cpu": True, "sizes": [32]})
    assert "its attention heads are 8 wide" in serve(student, wide)[2]
    nothing = interpreter(tmp_path, said={"version": "", "cpu": False, "sizes": []})
    assert "(VLLM_NOT_FOUND)" in serve(student, nothing)[2]
    python = interpreter(tmp_path)
    said = serve(student, python, "--adapter", str(stranger))[2]
    assert "was made for" in said
    assert "(ADAPTER_MISMATCH)" in said
    assert "(STUDENT_CHANGED)" in serve(student, python, "--commit", "0" * 64)[2]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "(PORT_IN_USE)" in serve(student, python, "--port", str(taken.getsockname()[1]))[2]


def test_a_server_that_ends_is_quoted(student: Path, tmp_path: Path) -> None:
    words = "ValueError: the model is too large for this GPU"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    dying = interpreter(tmp_path, server=f"echo {shlex.quote(words)}; exit 3")
    code, out, said = serve(student, dying, "--port", port)
    assert (code, out) == (2, "")
    assert f"vLLM ended with 3: {words}" in said
    assert "(PROCESS_DIED)" in said
    assert "home/logs/vllm-tiny@" in said


def test_no_vllm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for python in (None, tmp_path / "nowhere/python"):
        with pytest.raises(PreceptorError) as caught:
            find_vllm(python)
        assert caught.value.reason == "VLLM_NOT_FOUND"
    script = tmp_path / "vllm"
    script.write_text("")
    script.chmod(0o755)
    interpreter(tmp_path)
    assert find_vllm(None) == Vllm(tmp_path / "python", "0.32.0", True, (8, 32))


def test_vllm_is_found_behind_a_link_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pipx and uv install it."""
    (tmp_path / "tool").mkdir()
    (tmp_path / "bin").mkdir()
    script = tmp_path / "tool" / "vllm"
    script.write_text("")
    script.chmod(0o755)
    (tmp_path / "bin" / "vllm").symlink_to(script)
    interpreter(tmp_path / "tool")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_vllm(None).python == tmp_path / "tool" / "python"


def test_a_free_port_is_free_on_any_interface_and_another_machines_address_is_not_taken(
    student: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    dying = interpreter(tmp_path, server="echo ValueError: it is me; exit 3")
    if socket.has_ipv6:
        assert "vLLM ended with 3" in serve(student, dying, "--host", "::1", "--port", port)[2]
    for host in ("192.0.2.1", "nowhere.invalid"):
        said = serve(student, dying, "--host", host, "--port", port)[2]
        assert f"cannot listen on {host}:{port}" in said
        assert "is taken" not in said


def test_whoever_needs_the_key_is_told_where_it_goes() -> None:
    serving = Serving(name="tiny@0", model=Path("/m"))
    assert "Authorization: Bearer $PRECEPTOR_ANSWER_SERVER_API_KEY" in how_to_ask(serving, keyed=True)
    assert "Authorization" not in how_to_ask(serving, keyed=False)
