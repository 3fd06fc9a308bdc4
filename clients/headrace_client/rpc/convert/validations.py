"""Messages about validations, as values."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict

from headrace.registry.v1 import model_pb2 as model_pb
from headrace_client.rpc.convert.common import failure_from_pb, time_from_pb
from headrace_client.rpc.convert.enums import choice_of, state_of
from headrace_client.rpc.convert.models import quantization_from_pb
from headrace_client.values import AttemptKind, StepState, ValidationAttempt, ValidationStep


def attempt_from_pb(pb: model_pb.ValidationAttempt) -> ValidationAttempt:
    """Reads an attempt."""
    return ValidationAttempt(
        id=pb.id,
        model_id=pb.model_id,
        node_id=pb.node_id,
        device_id=pb.device_id,
        quantization=quantization_from_pb(pb.quantization),
        load_options=MessageToDict(pb.load_options),
        steps=tuple(step_from_pb(step) for step in pb.steps),
        done=pb.done,
        passed=pb.passed,
        failure=failure_from_pb(pb),
        versions=dict(pb.versions),
        create_time=time_from_pb(pb, "create_time"),
        update_time=time_from_pb(pb, "update_time"),
        kind=choice_of(model_pb.AttemptKind, "ATTEMPT_KIND_", pb.kind, AttemptKind, AttemptKind.VALIDATION),
        log_tail=pb.log_tail,
        notes=pb.notes,
        residency_id=pb.residency_id,
    )


def step_from_pb(pb: model_pb.ValidationStep) -> ValidationStep:
    """Reads a step."""
    return ValidationStep(
        name=pb.name,
        state=state_of(model_pb.ValidationStepState, "VALIDATION_STEP_STATE_", pb.state, StepState),
        message=pb.message,
        seconds=pb.seconds,
        figures=dict(pb.figures),
    )
