"""Log lines."""

from __future__ import annotations

import io
import json
import logging
import warnings

import grpc
import pytest

from headrace_chassis import logs


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line_of_json(log_stream):
    logging.getLogger("a.b").warning("two\nlines of %s", "é", extra={"fields": {"n_rows": 3}})

    (line,) = lines(log_stream)
    assert log_stream.getvalue().count("\n") == 1
    assert (line["level"], line["logger"], line["message"], line["n_rows"]) == ("warning", "a.b", "two\nlines of é", 3)
    assert str(line["time"]).endswith("+00:00")


def test_values_json_does_not_know_become_text(log_stream):
    logging.getLogger("a").info("x", extra={"fields": {"what": {1}}})

    assert lines(log_stream)[0]["what"] == "{1}"


def test_an_exception_comes_with_its_stack(log_stream):
    logging.getLogger("a").error("failed", exc_info=LookupError("gone"))

    assert "LookupError: gone" in str(lines(log_stream)[0]["stack"])


def test_warnings_are_logged(log_stream):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.configure("info", log_stream)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    assert any("old" in str(line["message"]) for line in lines(log_stream))


def test_grpcs_report_about_a_client_that_has_gone_is_left_out(log_stream):
    log = logging.getLogger("grpc._cython.cygrpc")

    for error in (grpc.aio.InternalError("send failed"), RuntimeError("other")):
        log.error("raised in core", exc_info=error)

    (line,) = lines(log_stream)
    assert "other" in str(line["stack"])


def test_unknown_level_is_refused(log_stream):
    with pytest.raises(ValueError, match="debug, info"):
        logs.configure("loud", log_stream)
