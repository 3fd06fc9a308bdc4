"""The table from errors to `google.rpc.Status`."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2
from grpc_status import rpc_status

from fix_chassis import STATUSES, ProbeError, StateWrong, ThingMissing, Unlisted, failure
from headrace_chassis.errors import ServiceError
from headrace_chassis.status import CHASSIS_ROWS, DOMAIN, StatusTable, reason_of, shorten


def detail(status: status_pb2.Status, kind: type) -> object:
    found = kind()
    assert sum(each.Unpack(found) for each in status.details) == 1
    return found


def kinds(status: status_pb2.Status) -> list[str]:
    return [each.type_url.rpartition(".")[2] for each in status.details]


def test_error_info_names_reason_domain_and_metadata():
    status = STATUSES.rich_status(failure("busy"))

    info = detail(status, details.ErrorInfo)
    assert (info.reason, info.domain, dict(info.metadata)) == ("CAPACITY_BUSY", DOMAIN, {"holders": "x,y"})
    assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "All is leased; try later.")


def test_retry_info_carries_the_delay():
    status = STATUSES.rich_status(failure("busy"))

    delay = detail(status, details.RetryInfo).retry_delay
    assert delay.ToNanoseconds() == 2_500_000_000


def test_bad_request_names_the_field():
    status = STATUSES.rich_status(failure("field"))

    (violation,) = detail(status, details.BadRequest).field_violations
    assert (violation.field, violation.description) == ("limit", "`limit` is -1; give 0 or more.")


def test_resource_info_names_the_resource():
    status = STATUSES.rich_status(failure("missing"))

    info = detail(status, details.ResourceInfo)
    assert (info.resource_type, info.resource_name) == ("model", "a")


def test_failed_precondition_says_what_is_not_met():
    status = STATUSES.rich_status(failure("state"))

    (violation,) = detail(status, details.PreconditionFailure).violations
    assert (violation.type, violation.subject) == ("STATE_CONFLICT", "a")
    assert violation.description == "Not ready; prepare it first."


def test_every_detail_type_appears_at_most_once_and_error_info_always():
    assert kinds(STATUSES.rich_status(failure("all"))) == [
        "ErrorInfo",
        "RetryInfo",
        "BadRequest",
        "PreconditionFailure",
        "ResourceInfo",
    ]
    assert kinds(STATUSES.rich_status(ThingMissing("x"))) == ["ErrorInfo"]


def test_class_without_a_row_inherits_its_parents():
    assert STATUSES.row(failure("state")) == (grpc.StatusCode.FAILED_PRECONDITION, "STATE_CONFLICT")


@pytest.mark.parametrize("bug", ["bug", "unlisted", "mixed-group", "not-implemented-bug"])
def test_what_is_not_in_the_table_is_internal_and_says_only_the_request_id(bug):
    status = STATUSES.rich_status(failure(bug), request_id="r-1")

    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "password" not in str(status)
    assert "r-1" in status.message
    assert dict(detail(status, details.ErrorInfo).metadata) == {"request_id": "r-1"}
    assert reason_of(status) == "INTERNAL"


def test_expected_error_in_a_task_group_is_found():
    assert reason_of(STATUSES.rich_status(failure("group"))) == "MODEL_NOT_FOUND"


def test_the_worst_status_stays_well_below_8_kib_of_metadata():
    status = STATUSES.rich_status(failure("long"))

    trailing = rpc_status.to_status(status).trailing_metadata
    in_base64 = sum(len(value) * 4 / 3 for _, value in trailing)
    percent_encoded = sum(3 if byte > 0x7E else 1 for byte in status.message.encode())
    assert in_base64 + percent_encoded < 6500


def test_long_texts_keep_their_start_and_their_remedy():
    text = shorten("The path " + "é" * 5000 + " is taken; choose another.", 200)

    assert len(text.encode()) <= 200
    assert text.startswith("The path é")
    assert text.endswith("choose another.")


def test_short_metadata_survives_beside_long():
    error = ThingMissing("x", metadata={"nearest": "a" * 9000, "line": "17"})

    info = detail(STATUSES.rich_status(error), details.ErrorInfo)
    assert info.metadata["line"] == "17"
    assert 1000 < len(info.metadata["nearest"]) < 1280


def test_surrogates_in_a_message_do_not_break_the_status():
    status = STATUSES.rich_status(ThingMissing("file \udcff", metadata={"path": "\udcff"}))

    assert status.message == "file ?"


def test_rows_with_an_unknown_reason_or_ok_are_refused():
    with pytest.raises(ValueError, match="StateWrong"):
        StatusTable({StateWrong: (grpc.StatusCode.ABORTED, "NO_SUCH_REASON")})
    with pytest.raises(ValueError, match="StateWrong"):
        StatusTable({StateWrong: (grpc.StatusCode.OK, "STATE_CONFLICT")})


def test_missing_lists_the_leaves_without_a_row():
    assert STATUSES.missing(ProbeError) == []
    assert Unlisted in STATUSES.missing(ServiceError)


def test_chassis_rows_use_each_reasons_canonical_code(canonical_codes):
    for code, reason in CHASSIS_ROWS.values():
        assert canonical_codes[reason] is code
