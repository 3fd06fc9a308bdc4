"""The whole command against a scripted server on a real socket: files, output, exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fix_scripted_extractor import EXTRACTION_ID, HOOKPOINT, SECOND, Fault
from fix_train import D_IN
from headrace.extractor.v1 import extraction_pb2 as ex_pb
from headrace_client.errors import AlreadyExists, HeadraceError
from headrace_train import __main__ as command
from headrace_train import exits
from headrace_train.results import folder
from headrace_train.results.folder import new_result

SMALL = ["--d-sae", "48", "--k", "3", "--rows", "6000", "--batch-size", "256", "--lr", "0.01", "--buffer-rows", "1024"]
FILES = ["features.parquet", "metadata.json", "sae", "top_rows.parquet"]


@pytest.fixture
def planted(planted_host):
    return planted_host.servicer


@pytest.fixture
def train(sae_lens, one_thread, planted_registry, tmp_path):
    """Runs the command in this process; returns its exit code."""

    def run(*flags, extraction=EXTRACTION_ID):
        source = ["--extraction", extraction] if extraction else []
        return command.main(
            ["--registry", planted_registry.address, *source, "--out", str(tmp_path / "out"), *SMALL, *flags]
        )

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def metadata(out):
    return json.loads((out / "metadata.json").read_text())


def test_all_files_are_written_and_agree_with_a_direct_computation(train, planted, sae_lens, out):
    assert train("--top-rows", "5", "--context-tokens", "3") == exits.DONE

    assert sorted(path.name for path in out.iterdir()) == FILES
    fit = ~torch.from_numpy(planted.sinks)
    sae = sae_lens.SAE.load_from_disk(out / "sae")
    with torch.no_grad():
        acts = torch.cat([sae.encode(part) for part in torch.split(planted.acts, 4096)])
    acts[~fit] = 0
    features = pq.read_table(out / "features.parquet").to_pydict()
    assert np.allclose(features["firing_frequency"], ((acts > 0).sum(0) / fit.sum()).numpy(), atol=1e-3)
    assert np.allclose(features["max_activation"], acts.max(0).values, atol=1e-4)
    assert features["dead"] == ((acts > 0).sum(0) == 0).tolist()
    for line in pq.read_table(out / "top_rows.parquet").to_pylist():
        row, of_feature = line["row"], acts[:, line["feature"]]
        strongest = of_feature.sort(descending=True).values[line["rank"] - 1].item()
        assert line["activation"] == pytest.approx(of_feature[row].item(), abs=1e-4)
        assert line["activation"] == pytest.approx(strongest, abs=1e-4)
        assert not planted.sinks[row]
        assert [line[name] for name in planted.provenance] == [c[row] for c in planted.provenance.values()]
        assert line["token"] == f"<{line['token_id']}>"
        before = [
            f"<{planted.provenance['token_id'][r]}>"
            for r in range(max(0, row - 3), row)
            if planted.provenance["document"][r] == line["document"]
        ]
        assert line["context_left"] == "".join(before)


def test_metadata_say_what_was_trained_from_what_and_how_it_went(train, planted, out, capsys):
    assert train() == exits.DONE

    facts = metadata(out)
    assert facts["model"]["commit_sha"] == "c0ffee"
    assert (facts["set_id"], facts["extraction_id"], facts["hookpoint"]) == ("set-1", EXTRACTION_ID, HOOKPOINT)
    assert facts["recipe"]["context_size"] == 16
    assert facts["metrics"]["explained_variance"] > 0.5
    rows = facts["rows"]
    assert rows["training"] + rows["held_out"] == rows["total"] == planted.n_rows
    assert rows["first_positions_left_out"] == planted.sinks.sum()
    assert facts["training"]["rows"] == 24 * 256
    assert facts["sae"]["d_sae"] == 48
    assert facts["stream"]["rows"] > 3 * planted.n_rows
    assert facts["stream"]["bytes"] > 2 * planted.n_rows * D_IN * 4
    assert facts["versions"]["sae-lens"]
    assert facts["files"] == ["sae", "features.parquet", "top_rows.parquet", "metadata.json"]
    printed = capsys.readouterr().out
    assert "left out: first positions (BOS)" in printed
    assert "explained variance" in printed.splitlines()[-4]


def test_dropping_first_positions_is_what_makes_it_learn(train, out):
    train("--no-drop-bos", "--max-norm-multiple", "0", "--normalize", "none")

    assert metadata(out)["rows"]["first_positions_left_out"] == 0
    assert metadata(out)["metrics"]["mse"] > 100


def test_outliers_are_left_out_where_first_positions_are_not(train, planted, out):
    train("--no-drop-bos")

    assert metadata(out)["rows"]["outliers_left_out"] == planted.sinks.sum()
    assert metadata(out)["metrics"]["explained_variance"] > 0.5


def test_json_lines_hold_progress_and_the_result(train, capsys):
    assert train("--json") == exits.DONE

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["event"] for event in events} == {"note", "progress", "result"}
    last = {event["phase"]: event for event in events if event["event"] == "progress"}
    assert list(last) == ["training", "analysis", "contexts"]
    assert {phase: event["percent"] >= 100 for phase, event in last.items()} == dict.fromkeys(last, True)
    assert {"loss", "l0", "explained_variance", "rows_per_s", "wait", "eta_s"} <= set(last["training"])
    assert events[-1]["event"] == "result"
    assert events[-1]["metrics"]["explained_variance"] > 0.5


def test_broken_connections_do_not_change_what_is_learned(train, planted, out):
    train()
    whole = (out / "sae" / "sae_weights.safetensors").read_bytes()
    planted.faults.extend([Fault("none"), Fault("cut", after=3), Fault("cut", after=5), Fault("none"), Fault("cut")])

    assert train("--overwrite") == exits.DONE

    assert (out / "sae" / "sae_weights.safetensors").read_bytes() == whole


def test_an_extraction_can_be_started_from_model_and_corpus(train, planted, out):
    assert train("--model", "tiny", "--corpus", "docs", "--hookpoint", HOOKPOINT, extraction="") == exits.DONE

    assert planted.calls["StartExtraction"][0].spec.corpus_id == "docs"


def test_training_waits_until_the_number_of_rows_is_known(train, planted, capsys):
    planted.extraction.state = ex_pb.EXTRACTION_STATE_RUNNING
    planted.extraction.n_rows_exact = False

    assert train() == exits.DONE

    assert planted.calls["WatchExtraction"]


def test_a_running_extraction_with_a_known_number_of_rows_is_trained_from_at_once(train, planted, out):
    planted.extraction.state = ex_pb.EXTRACTION_STATE_RUNNING
    planted.extraction.n_rows = 10

    assert train() == exits.DONE

    assert not planted.calls["WatchExtraction"]
    assert metadata(out)["rows"]["total"] == planted.n_rows


def test_ctrl_c_saves_the_sae_without_tables(train, planted, sae_lens, out, monkeypatch, capsys):
    from headrace_train.training.watching import TrainingWatch  # noqa: PLC0415 - SAELens.

    def interrupt(self, trainer, output):
        if trainer.n_training_steps == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingWatch, "on_step", interrupt)

    assert train() == exits.INTERRUPTED

    assert sorted(path.name for path in out.iterdir()) == ["metadata.json", "sae"]
    assert metadata(out)["training"]["interrupted"]
    assert sae_lens.SAE.load_from_disk(out / "sae").cfg.d_sae == 48
    assert "there are no tables" in capsys.readouterr().out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_result_is_never_removed_for_a_training_that_was_not_told_to_overwrite_it(train, planted, out, capsys):
    train()
    before, n_calls = contents(out), len(planted.calls["StreamActivations"])

    assert train() == exits.FAILED

    assert contents(out) == before
    assert "--overwrite" in capsys.readouterr().err
    assert len(planted.calls["StreamActivations"]) == n_calls


@pytest.mark.parametrize("left", ["sae", "metadata.json"])
def test_part_of_a_result_is_a_result_too(train, out, left):
    train()
    for path in out.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(out)

    assert train() == exits.FAILED

    assert contents(out) == before


def test_a_result_that_is_to_be_overwritten_outlives_a_failing_training(train, planted, out):
    train()
    before = contents(out)
    planted.fail["StreamActivations"].append(
        {"code": grpc.StatusCode.DATA_LOSS, "reason": "DIGEST_MISMATCH", "message": "segment 3 is damaged"}
    )

    assert train("--overwrite") == exits.FAILED

    assert contents(out) == before


def test_a_result_that_is_overwritten_leaves_nothing_behind(train, out, monkeypatch):
    train()
    (out / "notes.txt").write_text("mine")
    before = metadata(out)

    assert train("--overwrite", "--seed", "7") == exits.DONE

    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "notes.txt"])
    assert metadata(out)["training"]["seed"] != before["training"]["seed"]


def result(folder, text):
    (folder / "sae").mkdir(parents=True)
    for name in ("sae/weights", "features.parquet", "metadata.json"):
        (folder / name).write_text(text)


@pytest.mark.parametrize("stuck", ["sae", "metadata.json"])
def test_a_result_that_can_not_be_replaced_is_kept_and_so_is_the_new_one(out, monkeypatch, stuck):
    result(out, "old")
    (out / "top_rows.parquet").write_text("old")
    before, rename = contents(out), Path.rename

    def refuse(self, target):
        # The old SAE as if a colleague owned it, or the last file of the new result.
        if self == (out / "sae" if stuck == "sae" else out / ".unfinished/new/metadata.json"):
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(HeadraceError, match="can't take its place") as raised, new_result(out, overwrite=True) as new:
        result(new, "new")

    unfinished = out / ".unfinished"
    assert str(unfinished / "new") in raised.value.remedy
    assert set(contents(unfinished / "new").values()) == {b"new"}
    shutil.rmtree(unfinished)
    assert contents(out) == before


@pytest.mark.parametrize("n_moved", range(1, 6))
def test_a_result_that_a_killed_training_was_replacing_is_put_back(out, monkeypatch, n_moved):
    result(out, "old")
    before, rename, left = contents(out), Path.rename, [n_moved]

    def die(self, target):
        rename(self, target)
        left[0] -= 1
        if not left[0]:
            monkeypatch.setattr(folder, "_undo", lambda *_: None)  # As a killed process does.
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt), new_result(out, overwrite=True) as new:
            result(new, "new")
    monkeypatch.undo()
    with pytest.raises(RuntimeError), new_result(out, overwrite=True):
        raise RuntimeError

    assert contents(out) == before


def test_a_result_that_came_meanwhile_is_not_replaced(out, monkeypatch):
    monkeypatch.setattr(folder, "FileLock", lambda path: result(out, "theirs"))

    with pytest.raises(AlreadyExists, match="earlier training"), new_result(out, overwrite=False):
        raise AssertionError

    assert (out / "metadata.json").read_text() == "theirs"


def test_two_trainings_into_one_folder_are_one_too_many(train, out, capsys):
    with new_result(out, overwrite=False):
        assert train() == exits.FAILED

    assert "already trains into" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_errors_of_the_server_end_it_with_message_remedy_and_code(train, capsys):
    assert train(extraction="ex-9") == exits.NOT_FOUND

    err = capsys.readouterr().err
    assert "EXTRACTION_NOT_FOUND: no extraction ex-9" in err
    assert "what to do: list the extractions with `headrace extractions list`" in err
    assert "Traceback" not in err


def test_errors_are_json_where_output_is(train, capsys):
    assert train("--json", "--hookpoint", "blocks.9.hook_resid_post") == exits.NOT_FOUND

    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["reason"], error["exit_code"]) == ("HOOKPOINT_NOT_FOUND", exits.NOT_FOUND)
    assert error["metadata"]["nearest"] == HOOKPOINT


def test_one_of_several_hookpoints_must_be_named(train, planted, capsys):
    planted.extraction.spec.hookpoints.append(SECOND)

    assert train() == exits.USAGE
    assert "name one with --hookpoint" in capsys.readouterr().err


def test_a_window_is_refused(train, planted, capsys):
    planted.extraction.spec.retention.kind = ex_pb.RETENTION_KIND_WINDOW
    planted.extraction.spec.retention.window_bytes = 1 << 20

    assert train() == exits.REFUSED
    assert "retained rows" in capsys.readouterr().err


def test_a_registry_that_is_not_there_is_told_before_anything_is_loaded(tmp_path, capsys):
    code = command.main(["--registry", "127.0.0.1:1", "--extraction", "x", "--out", str(tmp_path / "out")])

    assert code == exits.UNAVAILABLE
    assert not (tmp_path / "out").exists()
    assert "headrace" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(train, out, capsys):
    out.write_text("a file")

    assert train() == exits.FAILED
    assert "FILE_ERROR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "--extraction"),
        (["--extraction", "x", "--model", "m"], "either"),
        (["--model", "m", "--corpus", "c"], "--hookpoint"),
        (["--extraction", "x", "--rows", "0"], "at least 1"),
        (["--extraction", "x", "--lr", "nan"], "finite"),
    ],
)
def test_bad_use_is_refused(flags, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(["--out", str(tmp_path), *flags])

    assert raised.value.code == exits.USAGE
    assert complaint in capsys.readouterr().err


HELP = """
import sys
from headrace_train.arguments import parse
try:
    parse(["--help"])
finally:
    assert not {"torch", "grpc", "sae_lens"} & set(sys.modules)
"""


def test_help_needs_neither_torch_nor_saelens():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 0
    assert "--extraction" in done.stdout


def test_a_process_of_its_own_says_only_what_it_should(planted_registry, out):
    flags = ["--registry", planted_registry.address, "--extraction", EXTRACTION_ID, "--out", str(out), "--threads", "1"]

    done = subprocess.run(
        [sys.executable, "-m", "headrace_train", *flags, *SMALL],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("loading SAELens\n")
    assert "training   100%" in done.stdout
