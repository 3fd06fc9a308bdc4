"""`headrace pull` in another order, of a shard, and by another transport."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fix_scripted import unavailable
from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, Fault
from headrace_cli.app import app
from headrace_cli.pulling.pull import Pull
from headrace_cli.settings import Defaults
from headrace_client.values import Reading, StreamTuning

SHUFFLED = ["--order", "shuffled", "--seed", "7", "--epoch", "2", "--block-rows", "50"]


@pytest.fixture
def pull(registry_host, tmp_path):
    def run(*arguments, out="rows"):
        return CliRunner().invoke(
            app,
            ["--json", "pull", EXTRACTION_ID, "--out", str(tmp_path / out), *arguments],
            obj=Defaults(registry=registry_host.address),
        )

    return run


def rows_of(path):
    return load_file(path / "token_id.safetensors")["token_id"].tolist()


def test_rows_are_pulled_in_a_shuffled_order(pull, scripted_extractor, tmp_path):
    result = pull(*SHUFFLED)

    assert json.loads(result.stdout)["n_rows"] == scripted_extractor.n_rows
    rows = rows_of(tmp_path / "rows")
    assert rows != sorted(rows)
    assert sorted(rows) == list(range(scripted_extractor.n_rows))
    got = load_file(tmp_path / "rows" / f"{HOOKPOINT}.safetensors")[HOOKPOINT]
    np.testing.assert_array_equal(got, scripted_extractor.column(HOOKPOINT)[rows])


def test_an_interrupted_shuffled_pull_goes_on(pull, scripted_extractor, tmp_path):
    pull(*SHUFFLED, out="whole")
    refused = {"code": unavailable()["code"].INTERNAL, "reason": "INTERNAL", "message": "bug"}
    scripted_extractor.faults.append(Fault("cut", after=3, status=refused))
    assert pull(*SHUFFLED).exit_code == 1

    assert pull(*SHUFFLED).exit_code == 0

    assert rows_of(tmp_path / "rows") == rows_of(tmp_path / "whole")


def test_another_order_is_not_mixed_in(pull):
    pull(*SHUFFLED)

    again = pull("--order", "shuffled", "--seed", "8")

    assert again.exit_code != 0
    assert "something else" in again.stderr


def test_what_was_pulled_fits_a_header_however_many_columns_there_are():
    columns = tuple(f"blocks.{layer}.attn.hook_result" for layer in range(4096))
    extraction = SimpleNamespace(set_id="s" * 32, max_rows=0, model_id="m", corpus_id="c")
    pull = Pull(
        None, extraction, Path("out"), columns, start_row=0, end_row=0, reading=Reading(), tuning=StreamTuning()
    )

    assert len(json.dumps(dict(pull._metadata(1000)))) < 1000


def test_rows_of_a_shorter_extraction_are_not_taken_for_those_of_a_longer_one():
    def pull(max_rows, end_row=0, **order):
        extraction = SimpleNamespace(set_id="s", max_rows=max_rows)
        options = {"start_row": 0, "end_row": end_row, "reading": Reading(**order), "tuning": StreamTuning()}
        return Pull(None, extraction, Path("out"), ("token_id",), **options)

    shuffled = {"order": "shuffled", "seed": 1}
    assert pull(1000)._fingerprint() != pull(0)._fingerprint()
    assert pull(1000)._fingerprint() == pull(0, end_row=1000)._fingerprint()
    assert pull(1000, 500, **shuffled)._fingerprint() != pull(0, 500, **shuffled)._fingerprint()


def test_a_shard_is_every_other_block(pull, tmp_path):
    pull("--shard", "1/2", "--block-rows", "50")

    rows = rows_of(tmp_path / "rows")
    assert len(rows) == 500
    assert rows[:50] == list(range(50, 100))


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "1/"])
def test_a_shard_that_is_none_is_bad_use(pull, shard):
    assert pull("--shard", shard).exit_code == 2


def test_unknown_words_are_refused(pull):
    for words in (["--order", "random"], ["--transport", "pigeon"]):
        result = pull(*words)
        assert result.exit_code != 0
        assert "is one of" in result.stderr
