"""Rules of the wire that no linter knows."""

import pytest
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor, MethodDescriptor

from preceptor.v1 import evaluator_pb2, orchestrator_pb2, student_pb2, teacher_pb2, trial_pb2, types_pb2

SERVICE_FILES: list[FileDescriptor] = [
    module.DESCRIPTOR for module in (teacher_pb2, student_pb2, evaluator_pb2, orchestrator_pb2)
]
METHODS: list[MethodDescriptor] = [
    method for file in SERVICE_FILES for service in file.services_by_name.values() for method in service.methods
]
MUTATING = ("Create", "Update", "Activate", "Register", "Delete", "Cancel", "Retry", "Resume", "Promote", "Rollback")
# Lists that are short by nature: prompt formats, one student's lineage, and how often one evaluation was tried.
UNPAGED = {"ListPromptFormats", "ListVersions", "ListAttempts"}


def _id(method: MethodDescriptor) -> str:
    return str(method.name)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name.startswith(MUTATING)], ids=_id)
def test_every_mutating_request_has_a_request_id(method: MethodDescriptor) -> None:
    assert "request_id" in method.input_type.fields_by_name


@pytest.mark.parametrize("method", [m for m in METHODS if m.name.startswith("List")], ids=_id)
def test_every_list_is_paged(method: MethodDescriptor) -> None:
    if method.name not in UNPAGED:
        assert {"page_size", "page_token"} <= set(method.input_type.fields_by_name)
        assert "next_page_token" in method.output_type.fields_by_name


@pytest.mark.parametrize("method", METHODS, ids=_id)
def test_only_watches_and_generation_stream_and_nothing_streams_up(method: MethodDescriptor) -> None:
    assert not method.client_streaming
    assert method.server_streaming == (method.name.startswith("Watch") or method.name == "GenerateSelfEdits")


def test_no_message_carries_bytes_because_weights_travel_as_artifacts() -> None:
    for file in [*SERVICE_FILES, types_pb2.DESCRIPTOR, trial_pb2.DESCRIPTOR]:
        for message in file.message_types_by_name.values():
            for field in message.fields:
                assert field.type != FieldDescriptor.TYPE_BYTES, field.full_name


def test_a_failed_evaluation_can_carry_no_reward_by_accident() -> None:
    assert evaluator_pb2.Evaluation.DESCRIPTOR.fields_by_name["reward"].has_presence
    assert evaluator_pb2.Evaluation.DESCRIPTOR.fields_by_name["failure"].has_presence
