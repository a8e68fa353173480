"""Malformed inputs for every door, and what must be true of the answers.

A door is whatever lets somebody else's bytes in: an RPC, a file, a payload of the queue. Its inputs are good ones that
were damaged: fields emptied or filled with what nobody sends in good faith, items repeated thousands of times,
serialised messages cut and overwritten, noise. Hypothesis draws the damage, so a failure is shrunk to the little of it
that matters.

CI knocks some hundreds of times at each door, always with the same inputs; ``PRECEPTOR_DOORS=10000`` knocks so often
with other ones each time, and prints how each door answered.
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from preceptor.channel import from_rpc_error
from preceptor.errors import CATALOGUE, DOMAIN, PreceptorError
from preceptor.server import MAX_MESSAGE_BYTES

INPUTS = int(os.environ.get("PRECEPTOR_DOORS", "0"))
# No input takes a service so long, however loaded the machine; only what hangs does.
HANGS_SECONDS = 60.0
# What a client is shown stays readable, whatever it sent.
LONGEST_MESSAGE = 4000
# Never a stranger's fault.
OUR_FAULT = frozenset({"INTERNAL", "DEADLINE_EXCEEDED", "PROCESS_DIED", "SERVICE_UNREACHABLE", "SHUTTING_DOWN"})
# Of the services under test; seen in an answer it would be a leak.
SECRET = "sk-never-to-be-seen"

Input = TypeVar("Input")

_answers: defaultdict[str, Counter[str]] = defaultdict(Counter)


def knock(door: str, inputs: st.SearchStrategy[Input], answer: Callable[[Input], str], often: int = 150) -> None:
    """Gives the door its inputs; ``answer`` returns a reason or "OK" and raises where a promise is broken."""

    @settings(
        max_examples=INPUTS or often,
        deadline=None,  # HANGS_SECONDS is checked where it means something
        derandomize=not INPUTS,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Among thousands of inputs there are huge ones: shrinking those takes longer than all others.
        phases=[Phase.generate] if INPUTS else [Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(inputs)
    def once(one: Input) -> None:
        began = time.monotonic()
        reason = answer(one)
        seconds = time.monotonic() - began
        assert seconds < HANGS_SECONDS, f"took {seconds:.0f} s"
        _answers[door][reason] += 1

    once()


def reason_of(act: Callable[[], object]) -> str:
    """How something that is not a service answers: "OK", or the reason of its PreceptorError. Anything else passes."""
    try:
        act()
    except PreceptorError as error:
        refused = error
    else:
        return "OK"
    assert refused.reason not in OUR_FAULT, str(refused)[:500]
    assert "Traceback" not in str(refused)
    return refused.reason


def _report() -> None:
    print(f"\n{'door':44} {'inputs':>7} {'accepted':>8}  refused")
    for door, answers in sorted(_answers.items()):
        refused = ", ".join(f"{reason} {count}" for reason, count in answers.most_common() if reason != "OK")
        print(f"{door:44} {answers.total():7} {answers['OK']:8}  {refused}")


if INPUTS:
    atexit.register(_report)


# Values

TEXTS = (
    "", " ", "\0", "a\0b", "\n", "\t\r\n", "\x1b[2J\x1b[31m", "\x7f", "\u202egnitirw", "\ufeff", "\u2028", "\u200b",
    "é", "e\u0301", "\ufffd", "\U0010ffff", "😀" * 3000, "a" * 65, "a" * 129, "a" * 257, "x" * 5000, "x y " * 30_000,
    "w" * 1_000_001, "../../etc/passwd", "/", "/dev/zero", "/proc/self/mem", "~", "~nobody-at-all/x", "C:\\nul",
    "file:///etc/passwd", "-1", "0", "1e9", "٣", "²", "9" * 19, "9" * 40, "9" * 5000, "0x" + "f" * 40, "NaN", "null",
    "{}", "[]", "[" * 3000, '{"a":' * 3000, "{question}", "{0.__class__}", "%s%n%d", "'; DROP TABLE runs; --",
    "<script>alert(1)</script>", "directive: lr=nan", "directive: epochs=99999999999999999999", "a\nb\nc", "round-1",
    "base-", "exact", "judge", "grid",
)  # fmt: skip
INTEGERS = (0, 1, 2, 3, 63, 64, 65, 256, 1000, 1001, 1024, 1025, 4096, 4097, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1,
            2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**31), -(2**63))  # fmt: skip
FLOATS = (0.0, -0.0, 5e-324, 1e-308, 1e-30, 1e-9, 0.5, 0.9, 1.0, 1.0000001, -1.0, 2.0, 100.0, 101.0, 1e6, 1e6 + 1, 1e12,
          1e30, 1e154, 1e308, -1e308, math.inf, -math.inf, math.nan)  # fmt: skip

texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)

_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def _scalar(field: FieldDescriptor, number: int, text: str) -> Any:
    """A value of the field's type that nobody would send."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return text if field.type == FieldDescriptor.TYPE_STRING else text.encode()
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return FLOATS[number % len(FLOATS)]
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return number % 2 == 1
    low, high = _BOUNDS[field.cpp_type]
    fitting = [value for value in INTEGERS if low <= value <= high]
    return fitting[number % len(fitting)]


# Messages


@dataclass(frozen=True)
class _Place:
    """A field of some message inside a message; ``index`` of an item of it."""

    message: Message
    field: FieldDescriptor
    index: int | None = None


def _places(message: Message) -> Iterator[_Place]:
    """Every field that is or could be set, outermost first."""
    inside: list[Message] = []
    for field in message.DESCRIPTOR.fields:
        yield _Place(message, field)
        value = getattr(message, field.name)
        if _is_map(field):
            if field.message_type.fields_by_name["value"].message_type:
                inside.extend(value.values())
        elif field.is_repeated:
            if field.message_type:
                inside.extend(value)
            else:
                yield from (_Place(message, field, index) for index in range(len(value)))
        elif field.message_type and message.HasField(field.name):
            inside.append(value)
    for one in inside:
        yield from _places(one)


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


# Where in the message, what to do, a number and a text to do it with.
Damage = tuple[int, int, int, str]
damages = st.tuples(st.integers(0, 4000), st.integers(0, 5), st.integers(0, 999), texts)


def damaged(message: Message, done: Iterable[Damage]) -> Message:
    """A copy with every damage done to it, one after the other."""
    made = type(message)()
    made.CopyFrom(message)
    for where, what, number, text in done:
        if places := list(_places(made)):
            _damage_one(places[where % len(places)], what, number, text)
    return made


def _damage_one(place: _Place, what: int, number: int, text: str) -> None:
    message, field = place.message, place.field
    value = getattr(message, field.name)
    if _is_map(field):
        _damage_map(message, field, what, number, text)
    elif place.index is not None:
        value[place.index] = _scalar(field, number, text)
    elif field.is_repeated:
        if what == 0:
            message.ClearField(field.name)
        elif what == 1 and field.message_type:
            value.add()
        elif what == 1 or not value:
            value.append(_scalar(field, number, text)) if not field.message_type else value.add()
        elif what == 2:
            value.reverse()
        else:  # again, a few times or thousands of times
            times = (1, 2, 70, 1100)[number % 4] if len(value) < 100 else 1
            value.extend([value[number % len(value)]] * times)
    elif field.message_type:
        if what < 3:
            message.ClearField(field.name)
        else:
            value.SetInParent()
    elif what == 0:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, number, text))


def _damage_map(message: Message, field: FieldDescriptor, what: int, number: int, text: str) -> None:
    value = getattr(message, field.name)
    of = field.message_type.fields_by_name["value"]
    names = [f"{text[:50]}{i}" for i in range((1, 1100)[number % 2])] if what > 2 else [text]
    for name in names:
        if what == 0:
            value.clear()
        elif of.message_type:
            value[name].SetInParent()
        else:
            value[name] = _scalar(of, number, text)


def messages(good: Message) -> st.SearchStrategy[Message]:
    """Good messages, damaged."""
    return st.lists(damages, min_size=1, max_size=4).map(lambda done: damaged(good, done))


_numbers = itertools.count()


def requests(good: Message, heal: Callable[[Any], None] = lambda _message: None) -> st.SearchStrategy[bytes]:
    """Requests as bytes: damaged ones, damaged bytes, noise.

    A request id that nothing was done to is new each time; ``heal`` mends what else would hide the damage.
    """

    def prepared(message: Message) -> Message:
        heal(message)
        return with_new_id(message)

    whole = messages(good).map(prepared)
    return st.one_of(
        whole.map(_bytes), whole.map(_bytes), whole.map(_bytes),
        damaged_bytes(whole.map(_bytes)),
        st.binary(max_size=60),
    )  # fmt: skip


GOOD_ID = "as it was"


def with_new_id(message: Any) -> Any:
    """The message, if nothing was done to its request id with a new one."""
    if getattr(message, "request_id", "") == GOOD_ID:
        message.request_id = f"{GOOD_ID} {next(_numbers)}"
    return message


def _bytes(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def damaged_bytes(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Good bytes, with noise somewhere or cut somewhere."""
    return st.builds(_spliced, whole, st.integers(0, 2**20), st.binary(max_size=6), st.integers(0, 6))


def _spliced(data: bytes, at: int, noise: bytes, gone: int) -> bytes:
    """``gone`` bytes replaced by noise somewhere; cut there where there is no noise."""
    at %= len(data) + 1
    return data[:at] + noise + data[at + gone :] if noise else data[:at]


# Services


@dataclass
class Caller:
    """Calls methods with bytes, as any client in any language could."""

    address: str

    def __post_init__(self) -> None:
        self._channel = grpc.insecure_channel(self.address, options=[("grpc.max_send_message_length", -1)])

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def answer(self, method: str, data: bytes, *, streams: bool = False, patience: float = HANGS_SECONDS) -> str:
        """ "OK", or the reason that the answer names. Of a stream only the first message is waited for, and what takes
        longer than ``patience`` seconds is cancelled and counts as accepted."""
        began = time.monotonic()
        try:
            if streams:
                call = self._channel.unary_stream(method)(data, timeout=patience)
                try:
                    next(iter(call), None)
                finally:
                    call.cancel()
            else:
                self._channel.unary_unary(method)(data, timeout=patience)
        except grpc.RpcError as error:
            if patience < HANGS_SECONDS and time.monotonic() - began >= patience:
                return "OK"
            if len(data) > MAX_MESSAGE_BYTES:  # gRPC itself refuses it unread; what the client makes of it counts
                return from_rpc_error(error).reason
            return _refusal(error)
        return "OK"


def _refusal(error: Any) -> str:
    """The reason of a refusal that keeps all promises."""
    code, details = error.code(), error.details() or ""
    shown = f"{code}: {details[:500]}"
    status = rpc_status.from_call(error)
    assert status is not None, f"no reason is named: {shown}"
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details), f"no reason is named: {shown}"
    assert info.domain == DOMAIN
    assert info.reason in CATALOGUE, shown
    assert info.reason not in OUR_FAULT, shown
    assert CATALOGUE[info.reason].code is code
    assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    said = [details, *info.metadata.values()]
    assert max(map(len, said)) <= LONGEST_MESSAGE, f"{max(map(len, said))} characters are said: {shown}"
    for text in said:
        assert "Traceback" not in text
        assert ".py" not in text
        assert SECRET not in text
    return info.reason


def rows(database: Path, tables: Iterable[str]) -> dict[str, int]:
    """How many rows each table has: what a refused request must not change."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        counts = {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
    connection.close()
    return counts
