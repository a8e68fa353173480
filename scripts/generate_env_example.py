"""Writes .env.example: every variable of the compose files and every setting of every process, with its default.

Run it (PYTHONPATH=. python scripts/generate_env_example.py) after adding one; a test fails until you do.
"""

from __future__ import annotations

import importlib
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from preceptor.settings import HouseSettings, SecuritySettings, ServiceSettings

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / ".env.example"
WIDTH = 110
HEAD = """\
# What the compose files and all processes read, as it is unless set. Copy this file to .env beside compose.yaml and
# take the # away from what you change. Without containers the processes read the same from their environment.
# Made by scripts/generate_env_example.py."""
# What is said of the variables of the compose files, in their order in .env.example.
COMPOSE = {
    "PRECEPTOR_VERSION": "tag of the images",
    "PYTHON_IMAGE": "what the images are built on; with @sha256:... it is pinned for good",
    "TORCH_INDEX_URL": "an index beside pip's own, for other builds of torch; only at build time",
    "WORKERS": "containers that fine-tune; --scale worker=N is for once",
    "OMP_NUM_THREADS": "threads of a process's arithmetic; cores divided by the workers",
    "CONFIG": "what the service almanac runs: a file of the image, or one below /runs",
    "SECRETS": "a folder (./...) with token, redis_password and postgres_password, or the volume they are made in",
    "TLS": "1: TLS between the services, Redis and PostgreSQL, with certificates that are made beside the secrets",
    "STUDENTS": "a folder (./...) or volume of students, /students in the containers",
    "RUNS": "a folder (./..., user 10001 must be able to write it) or volume of results",
    "RESTART": "of our processes; on-failure:10 gives up after ten deaths, counted over a container's whole life",
    "ORCHESTRATOR_PORT": "published on 127.0.0.1, as are all these ports",
    "STUDENT_PORT": "the registry of students",
    "EVALUATOR_PORT": "the evaluator",
    "REPORT_PORT": "the results of the service almanac, over HTTP",
    "PROMETHEUS_PORT": "with the profile observability, as are the next two",
    "GRAFANA_PORT": "dashboards",
    "JAEGER_PORT": "traces",
    "FLOWER_PORT": "with the profile queue-ui",
    "PRECEPTOR_EXTERNAL_TEACHER_SERVER_URL": "endpoint of a second teacher, of the arm external_teacher; the embedded "
    "stack starts it where this and the model are set, compose with the profile external-teacher",
    "PRECEPTOR_EXTERNAL_TEACHER_SERVER_MODEL": "what that endpoint calls its model",
    "PRECEPTOR_EXTERNAL_TEACHER_SERVER_API_KEY": "what it wants to see",
    "PRECEPTOR_EXTERNAL_TEACHER_SERVER_API_KEY_FILE": "the file that holds its key, instead of it",
    "TEACHER": "folder or hub id of the teacher's base model",
    "TEACHER_REVISION": "its revision on the hub; a commit, for the same weights each time",
    "TEACHER_GPU": "number of the GPU that vLLM writes on",
    "TEACHER_CONTEXT": "tokens of prompt and self-edit together",
    "VLLM_VERSION": "tag of vLLM's image",
    "VLLM_MEMORY": "share of the GPU's memory that vLLM takes; less where workers share the GPU",
    "VLLM_ARGUMENTS": "further arguments of the teacher's vLLM",
    "MODEL_START": "time for a model to be fetched and loaded before it counts as unwell",
    "HF_HUB_OFFLINE": "1: nothing is asked of the hub, models come from its cache",
    "WORKER_GPUS": "numbers of the GPUs that workers take, one each",
    "ANSWER_SERVER": "http://student-vllm:8000 with the profile answers: that vLLM answers for the workers",
    "STUDENT": "with the profile answers: the student's name, ...",
    "STUDENT_SOURCE": "... its folder or hub id ...",
    "STUDENT_COMMIT": "... and its commit, as `preceptor students list --json` says",
    "STUDENT_GPU": "number of the GPU that it answers on",
    "STUDENT_CONTEXT": "tokens of question and answer together",
    "STUDENT_VLLM_MEMORY": "share of that GPU's memory",
}
# ${NAME:-default}, ${NAME:+other} or ${NAME}, and not $${NAME}, which is the shell's of a container.
_VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::?(-)([^}]*))?")


def example() -> str:
    """The file's text."""
    lines, told = [HEAD], set(settings_names())
    for path in compose_files():
        variables = {name: default for name, default in compose_variables(path).items() if name not in told}
        told |= set(variables)
        lines.append(_title(path.name))
        lines += [_entry(name, variables[name], COMPOSE[name]) for name in COMPOSE if name in variables]
    fixed = fixed_by_compose()
    groups = [("every process", HouseSettings, ()), ("every service", ServiceSettings, HouseSettings.model_fields)]
    groups += [(_words(one), one, one.__bases__[0].model_fields) for one in process_settings()]
    shown: set[tuple[str, str]] = set()
    for title, settings, inherited in groups:
        entries = []
        for name, field in settings.model_fields.items():
            variable, default = f"PRECEPTOR_{name.upper()}", _value(field)
            if (name in inherited and _value(inherited[name]) == default) or (variable, default) in shown:
                continue
            shown.add((variable, default))
            note = " (compose.yaml sets it)" if variable in fixed else ""
            entries.append(_entry(variable, default, f"{field.description}{note}"))
        if entries:
            lines += [_title(title), *entries]
    return "\n".join(lines) + "\n"


def process_settings() -> list[type[SecuritySettings]]:
    """The settings classes of all packages, beyond the shared ones; what others inherit from comes first."""
    for path in REPOSITORY.glob("*/settings.py"):
        importlib.import_module(f"{path.parent.name}.settings")
    found: list[type[SecuritySettings]] = []

    def look(parent: type[SecuritySettings]) -> None:
        for child in parent.__subclasses__():
            if (REPOSITORY / child.__module__.partition(".")[0] / "settings.py").exists():
                found.append(child)
                look(child)

    look(SecuritySettings)
    ours = [one for one in dict.fromkeys(found) if one not in (HouseSettings, ServiceSettings)]
    return sorted(ours, key=lambda one: (one.__module__, len(one.__mro__), one.__name__))


def settings_names() -> list[str]:
    """Every variable that some process reads as a setting."""
    return [f"PRECEPTOR_{name.upper()}" for one in (HouseSettings, *process_settings()) for name in one.model_fields]


def compose_files() -> list[Path]:
    """The compose files, the one that the others are laid over first."""
    return sorted(REPOSITORY.glob("compose*.yaml"), key=lambda path: (len(path.name), path.name), reverse=False)


def compose_variables(path: Path) -> dict[str, str]:
    """The variables of a compose file with their defaults."""
    found: dict[str, str] = {}
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
    for name, has_default, default in _VARIABLE.findall("\n".join(lines)):
        if has_default or name not in found:
            found[name] = default if has_default else ""
    return found


def fixed_by_compose() -> set[str]:
    """Settings that compose.yaml gives itself: what .env says of them does not count there."""
    services: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    given = [pair for service in services.values() for pair in (service.get("environment") or {}).items()]
    return {name for name, value in given if f"${{{name}" not in str(value)}


def _title(words: str) -> str:
    return "\n" + f"# ---- {words} ".ljust(WIDTH, "-") + "\n"


def _words(settings: type[SecuritySettings]) -> str:
    first = (settings.__doc__ or settings.__name__).split("\n\n")[0].split(". ")[0].rstrip(".")
    return first.removeprefix("Settings of ").replace("`", "")


def _entry(name: str, default: str, words: str) -> str:
    said = textwrap.wrap(words, WIDTH, initial_indent="# ", subsequent_indent="# ")
    return "\n".join([*said, f"#{name}={default}"])


def _value(field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, SecretStr):
        return default.get_secret_value()
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else str(default)


if __name__ == "__main__":
    EXAMPLE.write_text(example(), encoding="utf-8")
