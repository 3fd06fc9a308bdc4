"""`headrace extractions`, `cancel` and `pull` of a set, against scripted servers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, SECOND
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace_cli.app import app
from headrace_cli.settings import Defaults


@pytest.fixture
def headrace(registry_host):
    def run(*arguments):
        return CliRunner().invoke(app, [str(one) for one in arguments], obj=Defaults(registry=registry_host.address))

    return run


def answer(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_extractions_are_listed_with_their_node_and_progress(headrace, scripted_extractor):
    extraction = scripted_extractor.extraction
    extraction.state, extraction.n_rows = ex_pb.EXTRACTION_STATE_RUNNING, 250
    extraction.spec.hookpoints.append(SECOND)

    header, row = headrace("extractions", "list").stdout.splitlines()
    found = answer(headrace("extractions", "list", "--json"))

    assert header.split() == "extraction state model corpus rows size hookpoints set node started".split()
    assert row.split()[:7] == [EXTRACTION_ID, "RUNNING", "tiny", "docs", "250", "of", "1,000"]
    assert f"{HOOKPOINT}, 1 more" in row
    assert [(one["id"], one["node_id"]) for one in found] == [(EXTRACTION_ID, "n1")]


def test_a_list_may_be_of_one_model_or_of_what_still_runs(headrace, scripted_extractor):
    ended = headrace("extractions", "list", "--active")
    scripted_extractor.extraction.state = ex_pb.EXTRACTION_STATE_RUNNING

    assert "no extractions" in ended.stderr
    assert len(answer(headrace("extractions", "list", "--active", "--json"))) == 1
    assert answer(headrace("extractions", "list", "--model", "other", "--json")) == []


def test_show_prints_what_is_known_of_an_extraction(headrace):
    assert answer(headrace("extractions", "show", EXTRACTION_ID, "--json"))["node_id"] == "n1"
    assert "set-1" in headrace("extractions", "show", EXTRACTION_ID).stdout


def test_cancel_says_what_it_did(headrace, scripted_extractor):
    scripted_extractor.extraction.state = ex_pb.EXTRACTION_STATE_RUNNING

    result = headrace("cancel", EXTRACTION_ID)

    assert result.exit_code == 0
    assert result.stderr == f"cancelled {EXTRACTION_ID}; its 1,000 rows stay in the set set-1\n"


def test_cancel_of_a_window_does_not_promise_its_rows(headrace, scripted_extractor):
    scripted_extractor.extraction.state = ex_pb.EXTRACTION_STATE_RUNNING
    scripted_extractor.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW

    result = headrace("cancel", EXTRACTION_ID)

    assert result.stderr == f"cancelled {EXTRACTION_ID} at row 1,000; rows of a window are not kept\n"


def test_cancel_of_an_extraction_that_has_ended_says_so(headrace):
    assert headrace("extractions", "cancel", EXTRACTION_ID).stderr == f"nothing to cancel: {EXTRACTION_ID} is done\n"


def test_cancel_waits_for_the_end_of_an_extraction_that_answers_with_its_state_before(headrace, scripted_extractor):
    scripted_extractor.extraction.state = ex_pb.EXTRACTION_STATE_RUNNING
    scripted_extractor.answers_before = True

    assert answer(headrace("cancel", EXTRACTION_ID, "--json"))["state"] == "CANCELLED"


def test_a_set_is_pulled_through_an_extraction_of_it(headrace, scripted_registry, scripted_extractor, tmp_path):
    out = tmp_path / "rows.safetensors"

    result = answer(headrace("--json", "pull", "set", "--out", out, "--columns", HOOKPOINT))

    np.testing.assert_array_equal(load_file(out)[HOOKPOINT], scripted_extractor.column(HOOKPOINT))
    assert result["extraction_id"] == EXTRACTION_ID
    assert not scripted_extractor.calls["StartExtraction"]


@pytest.mark.parametrize("started", ["ex-2", EXTRACTION_ID])
def test_a_set_that_can_not_be_made_again_is_not_pulled_from_another(headrace, scripted_extractor, tmp_path, started):
    scripted_extractor.extraction.state = ex_pb.EXTRACTION_STATE_CANCELLED
    scripted_extractor.starts_set, scripted_extractor.starts_id = "set-2", started

    result = headrace("--json", "pull", "set", "--out", tmp_path / "rows.safetensors")

    assert json.loads(result.stderr)["error"]["reason"] == "MODEL_CHANGED"
    # An extraction that was known before is somebody's.
    assert len(scripted_extractor.calls["CancelExtraction"]) == (started == "ex-2")
    assert not list(tmp_path.glob("rows*"))


def test_rows_that_are_not_finite_are_pulled_from_a_set_that_has_them(headrace, scripted_extractor, tmp_path):
    scripted_extractor.extraction.state = ex_pb.EXTRACTION_STATE_CANCELLED
    scripted_extractor.extraction.n_non_finite = 3
    scripted_extractor.starts_set = "set-1"

    answer(headrace("--json", "pull", "set", "--out", tmp_path / "rows.safetensors"))

    assert scripted_extractor.calls["StartExtraction"][0].spec.allow_non_finite


def test_an_id_of_neither_an_extraction_nor_a_set_is_not_found(headrace, tmp_path):
    result = headrace("pull", "nope", "--out", tmp_path / "rows")

    assert result.exit_code == 3
    assert "EXTRACTION_NOT_FOUND" in result.stderr
