"""Everything that people write into files: configs, tasks, probes, replay, self-edits, and what a teacher completes.

Promised: what is not read is a PreceptorError that names the file (and the line and the field where there are such); no
other exception, whatever stands there; and no file takes long.
"""

from __future__ import annotations

import json
import os
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from evaluator.graders.chat import _content as content_of
from evaluator.graders.judge import read_verdict
from preceptor.completions import Limits, MalformedSelfEdit, parse
from preceptor.config import RunConfig, load_config, parse_config_json
from preceptor.errors import PreceptorError
from preceptor.limits import MAX_CONFIG_CHARACTERS
from preceptor.self_edit_files import read_self_edits
from preceptor.task_files import read_probes, read_replay, read_task_file
from preceptor.task_sources import gather_tasks
from student.source import inspect
from tests.doors import FLOATS, INTEGERS, damaged_bytes, knock, reason_of, texts
from tests.unit.tiny_students import save_student

# Where a strategy is shown, the texts it draws from are long.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")

# A value of JSON or TOML that stands where another was meant. Deep ones are deep enough to be near Python's limit.
numbers = st.sampled_from(INTEGERS) | st.sampled_from([x for x in FLOATS if abs(x) < 1e300]) | st.integers()
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


strange = values | st.integers(0, 990).map(nested)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value, not deeper than people look."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner if len(at) < 9 for place in places(one, (*at, key)))]


MOST_CHARACTERS = 5_000_000


def replaced(good: Any, changes: list[tuple[int, int, Any]]) -> Any:
    """A JSON value of which parts are replaced, left out, repeated or renamed."""
    value = deepcopy(good)
    for where, what, new in changes:
        found = places(value)
        *path, last = found[where % len(found)] or (None,)
        if last is None:
            value = new if what == 0 else value
            continue
        parent = value
        for step in path:
            parent = parent[step]
        if what == 1:
            del parent[last]
        elif what == 2 and isinstance(parent, list):
            times = (1, 5, 300)[where % 3]
            # Long texts, repeated and repeated again, would fill the memory before anybody had read them.
            parent.extend([parent[last]] * (times if len(repr(parent[last])) * times < MOST_CHARACTERS else 1))
        elif what == 2:
            parent[str(new)[:99]] = parent.pop(last)
        else:
            parent[last] = new
    return value


def damaged_json(good: Any) -> st.SearchStrategy[Any]:
    """Values like ``good``, with one to four parts of it replaced."""
    return st.lists(st.tuples(st.integers(0, 999), st.integers(0, 4), strange), min_size=1, max_size=4).map(
        lambda changes: replaced(good, changes)
    )


def as_text(good: Any) -> st.SearchStrategy[bytes]:
    """Files of such values, and such files damaged byte by byte; lone surrogates are escaped, as JSON can."""
    whole = damaged_json(good).map(lambda value: json.dumps(value, indent=1).encode())
    return st.one_of(whole, whole, whole, damaged_bytes(whole), st.binary(max_size=80))


PASSAGES = [
    {
        "id": "p1",
        "title": "Ada",
        "context": "Ada lives in Lisbon. She is a baker.",
        "labels": {"genre": "prose"},
        "questions": [
            {"question": "Where is Ada's home?", "answer": "Lisbon", "aliases": ["Lisboa"], "bank": "reward"},
            {"question": "What does she bake for?", "answer": "a living", "bank": "sealed"},
        ],
    },
    {"context": "Tom is a smith in Porto.", "questions": [{"question": "Tom's trade?", "answer": "smith"}]},
]
SELF_EDITS = [
    {
        "name": "a",
        "documents": ["Ada lives in Lisbon.", "Ada bakes."],
        "directive": {"learning_rate": 1e-3, "epochs": 4},
    },
    {"completion": "directive: lr=3e-3 epochs=8 replay=0.25 rank=8 loss=all\nAda Brook lives in Lisbon."},
    {"documents": ["x"], "directive": {"replay_share": 0.1, "rank": 8, "loss_mask": "after_marker"}},
]
CONFIG = json.loads(
    RunConfig.model_validate(
        {
            "tasks": {"path": "tasks.json", "heldout_path": "heldout.json"},
            "heldout": {"fixed_strategies": [{"prompt_format": "open", "learning_rate": 1e-3, "epochs": 4}]},
            "reward": {"race": {"look_steps": 2}},
        }
    ).to_json()
)


def toml(value: Any) -> str:
    """TOML of a JSON object; null is left out, as TOML has none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items() if v is not None) + "}"
    depth = 0
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value, depth = value[0], depth + 1
    if depth:
        return "[" * depth + toml(value) + "]" * depth
    if isinstance(value, list):
        return "[" + ", ".join(toml(one) for one in value if one is not None) + "]"
    return (
        {True: "true", False: "false"}.get(value, json.dumps(value)) if isinstance(value, bool) else json.dumps(value)
    )


def as_toml(value: Any) -> bytes:
    tables = value if isinstance(value, dict) else {"v": value}
    lines = [f"{json.dumps(key)} = {toml(one)}" for key, one in tables.items() if one is not None]
    return "\n".join(lines).encode(errors="replace")


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    whole = damaged_json(CONFIG).map(as_toml)

    def answer(data: bytes) -> str:
        path.write_bytes(data)
        return reason_of(lambda: load_config(path))

    knock("config file", st.one_of(whole, whole, whole, damaged_bytes(whole), st.binary(max_size=80)), answer)


def test_config_overrides(tmp_path: Path) -> None:
    keys = ["name", "seed", "tasks.world", "tasks.path", "rounds.count", "reward.race.z", "training.target_modules"]
    key = st.sampled_from(keys) | texts | st.lists(texts, max_size=4).map(".".join)
    raw = texts | strange.map(toml) | st.text(max_size=9)  # surrogates, too: bytes that are not UTF-8
    override = st.builds(lambda k, e, v: f"{k}{e}{v}", key, st.sampled_from(["=", "=", "=", "", "=="]), raw)
    knock(
        "config --set",
        st.lists(override, min_size=1, max_size=3),
        lambda overrides: reason_of(lambda: load_config(None, ["tasks.world=almanac", *overrides])),
    )


def test_config_json() -> None:
    def answer(data: bytes) -> str:
        text = data.decode("utf-8", "replace")  # as in a request: protobuf's strings are UTF-8
        return reason_of(lambda: parse_config_json(text).to_json().encode())

    knock("config in a request", as_text(CONFIG), answer)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_task_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tasks{suffix}"
    config = RunConfig.model_validate({"tasks": {"path": str(path), "train": 1, "heldout": 1}})

    def lines(value: Any) -> bytes:
        return "\n".join(map(json.dumps, value if isinstance(value, list) else [value])).encode()

    def answer(data: bytes) -> str:
        path.write_bytes(data)
        read = reason_of(lambda: read_task_file(path).raise_problems())
        gathered = reason_of(lambda: gather_tasks(config))
        assert read == "OK" or gathered == read
        return gathered

    whole = damaged_json(PASSAGES).map(lines)
    inputs = as_text(PASSAGES) if suffix == ".json" else st.one_of(whole, whole, damaged_bytes(whole))
    knock(f"task file {suffix}", inputs, answer)


def test_task_folder(tmp_path: Path) -> None:
    (tmp_path / "ada.md").write_text("# Ada\nAda lives in Lisbon.")
    listed = tmp_path / "questions.jsonl"
    whole = damaged_json([{"file": "ada.md", "question": "Ada's home?", "answer": "Lisbon"}] * 2).map(
        lambda value: "\n".join(map(json.dumps, value if isinstance(value, list) else [value])).encode()
    )

    def answer(data: tuple[bytes, bytes]) -> str:
        (tmp_path / "tom.txt").write_bytes(data[0])
        listed.write_bytes(data[1])
        return reason_of(lambda: read_task_file(tmp_path).raise_problems())

    text = texts.map(str.encode) | st.binary(max_size=40)
    knock("task folder", st.tuples(text, whole | damaged_bytes(whole)), answer)


def test_probes_and_replay(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    whole = damaged_json([{"question": "Old fact?", "answer": "known", "aliases": ["so"]}] * 2).map(
        lambda value: "\n".join(map(json.dumps, value if isinstance(value, list) else [value])).encode()
    )

    def answer(data: bytes) -> str:
        path.write_bytes(data)
        reason_of(lambda: read_replay(path))
        return reason_of(lambda: read_probes(path))

    knock("probes and replay", st.one_of(whole, damaged_bytes(whole), st.binary(max_size=80)), answer)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_self_edit_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"edits{suffix}"

    def answer(data: bytes) -> str:
        path.write_bytes(data)
        return reason_of(lambda: read_self_edits([str(path)]))

    completion = completions().map(str.encode)
    knock(f"self-edit file {suffix}", as_text(SELF_EDITS) if suffix != ".txt" else completion, answer)


def completions() -> st.SearchStrategy[str]:
    """What a teacher might write: directives with strange values, and lines."""
    item = st.builds(
        lambda key, equals, value: f"{key}{equals}{value}",
        st.sampled_from(["lr", "epochs", "replay", "rank", "loss", "LR", "x", ""]),
        st.sampled_from(["=", "=", "", "=="]),
        texts | numbers.map(str),
    )
    directive = st.builds(
        lambda head, items: f"{head}{' '.join(items)}",
        st.sampled_from(["directive: ", "Directive:", "directive", "directive : ", " \t directive:\t"]),
        st.lists(item, max_size=4),
    )
    return st.lists(directive | texts, max_size=5).map("\n".join)


def test_completion() -> None:
    def answer(text: str) -> str:
        try:
            parse(text, Limits())
        except MalformedSelfEdit as error:
            malformed = str(error)
        else:
            return "OK"
        assert len(malformed) < 400
        return "malformed"

    knock("completion of a teacher", completions() | st.text(), answer)


def test_reply_of_a_judge() -> None:
    good = {"choices": [{"message": {"content": "CORRECT"}}], "model": "m", "usage": {"total_tokens": 9}}

    def answer(data: bytes) -> str:
        return {True: "OK", False: "OK", None: "no verdict"}[read_verdict(content_of(data))]

    knock("reply of a judge", as_text(good), answer)


def test_paths() -> None:
    """A path is somebody's text, too."""

    def answer(text: str) -> str:
        reasons = {
            reason_of(lambda: read_task_file(Path(text))),
            reason_of(lambda: read_probes(Path(text))),
            reason_of(lambda: read_self_edits([text, text])),
            reason_of(lambda: load_config(Path(text))),
            reason_of(lambda: load_config(None, [f"tasks.path={json.dumps(text)}"])),
        }
        assert "OK" not in reasons - {"OK"}
        return next(iter(sorted(reasons - {"OK"})))

    # "-" is standard input, "/" and its like are folders that would be walked through.
    safe = texts.filter(lambda text: not (text.strip() == "-" or os.path.isdir(text)))  # noqa: PTH112 - says no where Path raises
    knock("paths", safe, answer)


def test_student_folder(tmp_path: Path) -> None:
    folder = save_student(tmp_path / "student")
    names = ["config.json", "tokenizer_config.json", "tokenizer.json"]
    good = {name: json.loads((folder / name).read_text()) for name in names}
    good["tokenizer.json"] = {"version": "1.0"}  # nothing of it is read here
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
    weights = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    few = {name: header[name] for name in list(header)[:3]}

    def answer(data: tuple[bytes, bytes, bytes, bytes]) -> str:
        for name, content in zip(
            ("config.json", "tokenizer_config.json", "model.safetensors.index.json"), data, strict=False
        ):
            (folder / name).write_bytes(content)
        (folder / "model.safetensors").write_bytes(data[3])
        return reason_of(lambda: inspect(str(folder)))

    def safetensors(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value + weights[8 + length :]

    def mostly(good: Any) -> st.SearchStrategy[bytes]:
        same = st.just(json.dumps(good).encode())
        return st.one_of(same, same, as_text(good))

    files = (mostly(good["config.json"]), mostly(good["tokenizer_config.json"]), mostly(index))
    shards = st.one_of(st.just(weights), mostly(few).map(safetensors), damaged_bytes(st.just(weights)))
    knock("student folder", st.tuples(*files, shards), answer)


# Large files that are slow to read if anything in the reading is.

MEGABYTES = 5 * 2**20


def jsonl(line: str) -> str:
    return (line + "\n") * (MEGABYTES // (len(line) + 1))


SLOW_TASKS = {
    "many.json": lambda: json.dumps([{"context": "x", "questions": [{"question": 1}] * (MEGABYTES // 20)}]),
    "passages.json": lambda: json.dumps([{"context": f"x{i}", "questions": []} for i in range(MEGABYTES // 40)]),
    "numbers.jsonl": lambda: jsonl("1"),
    "brackets.json": lambda: "[" * MEGABYTES,
    "spaces.json": lambda: " " * MEGABYTES + "[]",
    "newlines.json": lambda: "\n" * MEGABYTES + "[1]",
    "strings.json": lambda: '"' + "\\u00e9" * (MEGABYTES // 6) + '"',
    "passage.json": lambda: json.dumps([{"context": "a " * (MEGABYTES // 2), "questions": []}]),
    "asked.json": lambda: json.dumps(
        [
            {
                "context": "who is it then " * 60_000,
                "questions": [
                    {"question": f"who is it then who is it {i}?", "answer": "a " * 40 + str(i), "aliases": ["b"] * 60}
                    for i in range(2000)
                ],
            }
        ]
    ),
    "repeated.jsonl": lambda: jsonl(json.dumps(PASSAGES[0])),
    "keys.json": lambda: json.dumps([{f"k{i}": 0 for i in range(MEGABYTES // 16)}]),
    "surrogates.jsonl": lambda: jsonl('{"context": "\\ud800", "questions": []}'),
}


@pytest.mark.parametrize("name", SLOW_TASKS)
def test_five_megabytes_of_tasks_are_read_in_seconds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(SLOW_TASKS[name]())
    began = time.monotonic()
    assert reason_of(lambda: read_task_file(path).raise_problems()) == (
        "OK" if name == "asked.json" else "BAD_TASK_FILE"
    )
    assert time.monotonic() - began < 20


SLOW_EDITS = {
    "numbers.jsonl": lambda: jsonl("1"),
    "list.json": lambda: json.dumps([1] * (MEGABYTES // 3)),
    "lines.txt": lambda: "x\n" * (MEGABYTES // 2),
    "directive.txt": lambda: "directive: " + "lr=1 " * (MEGABYTES // 5),
    "spaces.txt": lambda: "directive" + " " * MEGABYTES,
    "newlines.jsonl": lambda: "\n" * MEGABYTES + "1",
    "documents.json": lambda: json.dumps({"documents": [""] * (MEGABYTES // 4)}),
}


@pytest.mark.parametrize("name", SLOW_EDITS)
def test_five_megabytes_of_self_edits_are_read_in_seconds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(SLOW_EDITS[name]())
    began = time.monotonic()
    assert reason_of(lambda: read_self_edits([str(path)])) == ("OK" if name == "spaces.txt" else "BAD_SELF_EDIT")
    assert time.monotonic() - began < 20


LARGE = MAX_CONFIG_CHARACTERS - 100
SLOW_CONFIGS = {
    "brackets in a string": 'name = """\n' + "[" * LARGE + '"""',
    "blanks behind an empty key": '"" = 1\nname = """\n' + " " * LARGE + '"""',
    "a key of many parts": "a." * (LARGE // 2) + "a = 1",
    "a known key of many parts": "name." + "a." * (LARGE // 2 - 3) + "a = 1",
    "nested lists": "name = " + "[" * (LARGE // 2) + "]" * (LARGE // 2),
    "many keys": "\n".join(f"k{i} = 1" for i in range(LARGE // 12)),
    "many tables": "\n".join(f"[t{i}.a]" for i in range(LARGE // 12)),
    "many tables of a list": "[[a.b]]\n" * (LARGE // 8),
    "digits": "seed = " + "9" * LARGE,
    "hexadecimal digits": "seed = 0x" + "f" * LARGE,
    "quotes": 'name = "' + '\\"' * (LARGE // 2) + '"',
    "open quotes": "name = '''" + "''\n" * (LARGE // 3),
    "comments": "#" * LARGE + "\n= 1",
    "dates": "name = [" + "1979-05-27T07:32:00Z, " * (LARGE // 22) + "]",
    "beyond the limit": "#" * (MAX_CONFIG_CHARACTERS + 1),
    "far beyond the limit": "#" * MEGABYTES,
}


@pytest.mark.parametrize("name", SLOW_CONFIGS)
def test_a_large_config_is_refused_in_seconds(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(SLOW_CONFIGS[name])
    began = time.monotonic()
    with pytest.raises(PreceptorError) as caught:
        load_config(path)
    assert caught.value.reason == "BAD_CONFIG"
    assert caught.value.metadata["file"] == str(path)
    assert len(str(caught.value)) < 10_000
    assert time.monotonic() - began < 20
