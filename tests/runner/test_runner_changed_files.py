"""A runner computes with the files that were prepared, or says that they changed."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import tokenizers

from fix_runner import documents, load, read_rows, run_command
from headrace_extractor.errors import ModelChanged
from headrace_extractor.node.runner_protocol import Committed, Extract, Failed, Load, Loaded
from headrace_log.manifest import Manifest
from headrace_models.folder import FileStamp, files_read, sha256_of

WEIGHTS = "model.safetensors"
HOOKPOINT = "blocks.1.hook_resid_post"


@pytest.fixture
def copied(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(folder / "tokenizer.json")
    )
    return folder


def stamps(folder):
    return tuple(FileStamp.of(path, sha256=sha256_of(path)) for path in files_read(folder))


def overwrite(folder, name=WEIGHTS):
    """Changes the last byte in place."""
    with (folder / name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def test_other_weights_than_those_prepared_are_not_loaded(copied):
    prepared = stamps(copied)
    overwrite(copied)

    with pytest.raises(ModelChanged, match=rf"\({WEIGHTS}\).*Prepare the model again") as caught:
        load(copied, files=prepared)
    assert caught.value.metadata == {"files": WEIGHTS}


def test_a_touched_folder_and_a_copy_are_loaded(copied, tmp_path):
    prepared = stamps(copied)
    os.utime(copied / WEIGHTS, (1, 1))

    for folder in (copied, shutil.copytree(copied, tmp_path / "copy")):
        assert load(folder, files=prepared).files == stamps(folder)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_no_pass_begins_on_files_that_changed_since_the_load(copied, make_set, make_corpus, name, known):
    loaded = load(copied, files=stamps(copied) if known else ())
    corpus = make_corpus(documents(8))
    first = make_set([HOOKPOINT])
    run_command(Extract(set_id="x", set_path=str(first), corpus_path=str(corpus)), loaded)
    overwrite(copied, name)
    second = make_set([HOOKPOINT])

    with pytest.raises(ModelChanged, match=name):
        run_command(Extract(set_id="x", set_path=str(second), corpus_path=str(corpus)), loaded)
    assert not list(second.rglob("*.safetensors"))


def test_no_row_of_weights_that_change_during_a_pass_is_kept(copied, make_set, make_corpus):
    """On a CPU weights are mapped: a pass computes with the bytes that the file holds now."""
    corpus = make_corpus(documents(80))
    whole, folder = make_set([HOOKPOINT], segment_rows=32), make_set([HOOKPOINT], segment_rows=32)
    expected = run_command(Extract(set_id="x", set_path=str(whole), corpus_path=str(corpus)), load(copied))[-1].n_rows
    loaded = load(copied)
    told = []

    def change(event):
        told.append(event)
        if isinstance(event, Committed) and event.n_rows and len(told) == 1:
            overwrite(copied)

    with pytest.raises(ModelChanged):
        run_command(Extract(set_id="x", set_path=str(folder), corpus_path=str(corpus)), loaded, on_event=change)
    n_rows = max(event.n_rows for event in told)
    rows, same = read_rows(folder, n_rows), read_rows(whole, expected)

    assert 0 < n_rows < expected
    assert np.array_equal(rows[HOOKPOINT], same[HOOKPOINT][:n_rows])


@pytest.mark.parametrize("changed", ["tokenizer", "chat_template"])
def test_another_tokenizer_or_template_than_the_set_s_is_refused(copied, make_set, make_corpus, changed):
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}")
    folder = make_set([HOOKPOINT])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["recipe"]["chat_template"] = True
    manifest["identity"] |= {f"{changed}_digest": "0" * 64}
    del manifest["crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Manifest.load(folder).identity[f"{changed}_digest"] == "0" * 64

    with pytest.raises(ModelChanged, match=f"The {changed} of the model"):
        run_command(Extract(set_id="x", set_path=str(folder), corpus_path=str(make_corpus(documents(2)))), load(copied))


def test_a_runner_answers_with_the_reason_and_goes_on(copied, start_runner):
    prepared = stamps(copied)
    whole = (copied / WEIGHTS).read_bytes()
    overwrite(copied)
    runner = start_runner()
    command = Load(files_path=str(copied), device="cpu", dtype="float32", files=prepared)
    runner.send(command)
    while not isinstance(event := runner.next(), Failed):
        pass
    (copied / WEIGHTS).write_bytes(whole)
    runner.send(command)

    assert event.reason == "MODEL_CHANGED"
    assert runner.until(Loaded).measured_bytes > 0
