"""Between messages and attempts of the test profile."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace.registry.v1 import node_service_pb2 as node_pb
from headrace_registry.errors import FieldInvalid
from headrace_registry.inputs import checked_id, checked_text, clean_text
from headrace_registry.models import validations as v
from headrace_registry.models.validations import ValidationReport
from headrace_registry.residency.desired import Validation
from headrace_registry.rpc.convert.models import model_to_pb, quantization_to_pb
from headrace_registry.rpc.convert.residencies import failure_from_pb, failure_to_pb, finite, time_to_pb

MAX_LOG_TAIL = 8192
_KINDS = {kind: model_pb2.AttemptKind.Value(f"ATTEMPT_KIND_{kind}") for kind in v.AttemptKind}
_STATES = {state: model_pb2.ValidationStepState.Value(f"VALIDATION_STEP_STATE_{state}") for state in v.StepState}
_STATE_FROM: dict[int, v.StepState] = {number: state for state, number in _STATES.items()}
_MAX_STEPS = 32
_MAX_FIGURES = 64
_MAX_VERSIONS = 64


def step_to_pb(step: v.Step) -> model_pb2.ValidationStep:
    """Total."""
    return model_pb2.ValidationStep(
        name=step.name, state=_STATES[step.state], message=step.message, seconds=step.seconds, figures=step.figures
    )


def validation_to_pb(validation: Validation) -> node_pb.Validation:
    """Total."""
    message = node_pb.Validation(
        attempt_id=validation.attempt_id, model=model_to_pb(validation.model), device_id=validation.device_id
    )
    message.load_options.update(validation.load_options)
    return message


def attempt_to_pb(attempt: v.Attempt) -> model_pb2.ValidationAttempt:
    """Total."""
    message = model_pb2.ValidationAttempt(
        id=attempt.id,
        model_id=attempt.model_id,
        node_id=attempt.node_id,
        device_id=attempt.device_id,
        quantization=quantization_to_pb(attempt.quantization),
        steps=[step_to_pb(step) for step in attempt.steps],
        done=attempt.done,
        passed=attempt.passed,
        failure=failure_to_pb(attempt.failure) if attempt.failure else None,
        versions=attempt.versions,
        create_time=time_to_pb(attempt.create_time),
        update_time=time_to_pb(attempt.update_time),
        kind=_KINDS[attempt.kind],
        log_tail=attempt.log_tail,
        notes=attempt.notes,
        residency_id=attempt.residency_id,
    )
    message.load_options.update(attempt.load_options)
    return message


async def step_messages(attempts: AsyncGenerator[v.Attempt, None]) -> AsyncGenerator[pb.ValidateModelResponse, None]:
    """Yields a message for each changed step, and a last message with the finished attempt."""
    seen: tuple[v.Step, ...] = ()
    async with aclosing(attempts):
        async for attempt in attempts:
            for step in v.news(seen, attempt.steps):
                yield pb.ValidateModelResponse(
                    step=step.name,
                    passed=step.state is v.StepState.PASSED,
                    message=step.message,
                    detail=step_to_pb(step),
                )
            seen = attempt.steps
            if attempt.done:
                yield pb.ValidateModelResponse(passed=attempt.passed, attempt=attempt_to_pb(attempt))


def validation_report_from_pb(message: node_pb.ReportValidationRequest) -> ValidationReport:
    """Checks a node's report; long texts are cut."""
    if len(message.steps) > _MAX_STEPS or len(message.versions) > _MAX_VERSIONS:
        raise FieldInvalid("steps", f"at most {_MAX_STEPS} steps and {_MAX_VERSIONS} versions are kept")
    return ValidationReport(
        node_id=checked_id(message.node_id, field="node_id"),
        epoch=message.epoch,
        attempt_id=checked_text(message.attempt_id, field="attempt_id", max_length=63),
        steps=tuple(_step_from_pb(step) for step in message.steps),
        done=message.done,
        failure=failure_from_pb(message.failure) if message.HasField("failure") else None,
        versions=versions_from_pb(message.versions),
    )


def versions_from_pb(versions: Mapping[str, str]) -> dict[str, str]:
    """Cuts names and versions to a length worth keeping; of many, the first are kept."""
    kept = list(versions.items())[:_MAX_VERSIONS]
    return {clean_text(name, 63): clean_text(value, 255) for name, value in kept}


def attempt_kind_from_pb(number: int) -> v.AttemptKind | None:
    """Returns the kind that a list is asked for; None for all. Raises FieldInvalid for one of another version."""
    if number == model_pb2.ATTEMPT_KIND_UNSPECIFIED:
        return None
    for kind, known in _KINDS.items():
        if known == number:
            return kind
    raise FieldInvalid("kind", f"{number} is no kind of this version")


def _step_from_pb(message: model_pb2.ValidationStep) -> v.Step:
    state = _STATE_FROM.get(message.state)
    if state is None:
        raise FieldInvalid("steps.state", f"{message.state} is no state of this version")
    if len(message.figures) > _MAX_FIGURES:
        raise FieldInvalid("steps.figures", f"at most {_MAX_FIGURES} figures are kept")
    return v.Step(
        name=checked_text(message.name, field="steps.name", max_length=63),
        state=state,
        message=clean_text(message.message, 2000),
        seconds=max(0.0, finite(message.seconds)),
        figures={clean_text(name, 63): finite(value) for name, value in message.figures.items()},
    )
