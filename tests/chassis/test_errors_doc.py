"""`docs/errors.md` and `error_reason.proto` tell the same."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.common.v1 import error_reason_pb2

TEXT = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| `")]


def test_every_reason_has_exactly_one_row_and_no_row_is_of_another():
    reasons = [name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name]
    reasons.remove("UNSPECIFIED")

    assert sorted(row[0].strip("`") for row in ROWS) == sorted(reasons)


def test_every_row_has_symptom_cause_and_fix():
    for row in ROWS:
        assert len(row) == 5, row
        assert all(len(cell) > 5 and cell.endswith(".") for cell in row[2:]), row


def test_codes_are_those_of_the_contract(canonical_codes):
    documented = {row[0].strip("`"): row[1] for row in ROWS}

    assert documented == {reason: code.name for reason, code in canonical_codes.items()}


def test_metadata_keys_the_contract_promises_are_documented():
    proto = (Path(__file__).parents[2] / "protos/headrace/common/v1/error_reason.proto").read_text(encoding="utf-8")
    promised = re.findall(r"// [A-Z_]+: [^\n]*metadata ([^\n;]*)[^\n]*\n  ERROR_REASON_(\w+) = ", proto)
    rows = {row[0].strip("`"): " ".join(row) for row in ROWS}

    assert len(promised) >= 8
    for keys, reason in promised:
        for key in re.findall(r"`(\w+)`", keys):
            assert f"`{key}`" in rows[reason], (reason, key)
