from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace_models import folder as model_folder
from headrace_models.errors import JsonInvalid, WeightsAbsent
from headrace_models.folder import INDEX, SINGLE, FileStamp, changed_files, files_read, sha256_of, weight_files
from headrace_models.gguf import parts_of


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name, text in {"config.json": "{}", SINGLE: "weights", "tokenizer.json": "{}", "notes.txt": "mine"}.items():
        (made / name).write_text(text)
    return made


@pytest.fixture
def stamps(folder):
    return [FileStamp.of(path, sha256=sha256_of(path)) for path in files_read(folder)]


def test_weights_are_the_single_file_or_all_that_the_index_names(folder):
    assert weight_files(folder) == [folder / SINGLE]
    (folder / "part.safetensors").write_text("a")
    (folder / "mtp.safetensors").write_text("b")
    (folder / "other.safetensors").write_text("c")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"t": "part.safetensors", "u": "mtp.safetensors"}}))
    assert weight_files(folder) == [folder / SINGLE]
    (folder / SINGLE).unlink()

    assert weight_files(folder) == [folder / "mtp.safetensors", folder / "part.safetensors"]
    assert folder / "notes.txt" not in files_read(folder)
    assert folder / "other.safetensors" not in files_read(folder)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ({"weight_map": {"t": "absent.safetensors"}}, WeightsAbsent),
        ({"weight_map": {"t": "../out.safetensors"}}, WeightsAbsent),
        ({"weight_map": {"t": "/etc/passwd"}}, WeightsAbsent),
        ({"weight_map": {"t": "sub/part.safetensors"}}, WeightsAbsent),
        ({"weight_map": {"t": 7}}, WeightsAbsent),
        ({"weight_map": {"t": ["part.safetensors"]}}, WeightsAbsent),
        ({"weight_map": {"t": {}}}, WeightsAbsent),
        ({"weight_map": {"t": "a\x00.safetensors"}}, WeightsAbsent),
        ({"weight_map": []}, WeightsAbsent),
        ({}, WeightsAbsent),
        (None, JsonInvalid),
    ],
)
def test_an_index_of_other_files_than_those_beside_it_is_refused(folder, index, error):
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text("[" if index is None else json.dumps(index))

    with pytest.raises(error):
        weight_files(folder)


@pytest.mark.parametrize("named", [5, True, ["model.safetensors"], {}, "absent.safetensors"])
def test_a_config_that_names_no_file_beside_it_as_its_weights_is_refused(folder, named):
    (folder / "config.json").write_text(json.dumps({"transformers_weights": named}))

    with pytest.raises(WeightsAbsent, match=r"transformers_weights|absent"):
        weight_files(folder)


def test_nothing_changes_by_being_read(folder, stamps):
    (folder / SINGLE).read_bytes()
    (folder / "notes.txt").write_text("more")
    (folder / "trainer_state.json").write_text("{}")

    assert changed_files(folder, stamps) == []


def test_bytes_overwritten_in_place_are_noticed_though_size_and_name_stay(folder, stamps):
    with (folder / SINGLE).open("r+b") as file:
        file.write(b"W")

    assert changed_files(folder, stamps) == [SINGLE]


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "config.json"])
def test_a_file_that_is_gone_or_grown_is_noticed(folder, stamps, name):
    (folder / name).write_text("another text of another length")
    assert changed_files(folder, stamps) == [name]
    (folder / name).unlink()

    assert changed_files(folder, stamps) == [name]


@pytest.mark.parametrize("name", ["chat_template.jinja", INDEX, "added_tokens.json"])
def test_a_new_file_that_a_load_looks_for_is_noticed(folder, stamps, name):
    (folder / name).write_text("{}")

    assert changed_files(folder, stamps) == [name]
    assert changed_files(folder, stamps, beside=False) == []


def test_all_files_of_a_folder_that_the_system_does_not_follow_count_as_changed(stamps, tmp_path):
    # Stands for a folder that may not be entered, which root may.
    assert changed_files(tmp_path / ("x" * 300), stamps) == sorted(stamp.name for stamp in stamps)


def test_a_copy_or_a_touched_file_is_the_same_file(folder, stamps, tmp_path):
    os.utime(folder / SINGLE, (1, 1))
    copy = shutil.copytree(folder, tmp_path / "copy")

    assert changed_files(folder, stamps) == []
    assert changed_files(copy, stamps) == []


def test_a_file_of_unknown_digest_counts_as_changed_once_it_is_touched(folder):
    stamps = [FileStamp.of(folder / SINGLE)]
    os.utime(folder / SINGLE, (1, 1))

    assert changed_files(folder, stamps, beside=False) == [SINGLE]


def test_bytes_that_changed_under_their_old_date_are_found_by_their_digest_alone(folder, stamps):
    stamp = next(stamp for stamp in stamps if stamp.name == SINGLE)
    with (folder / SINGLE).open("r+b") as file:
        file.write(b"W")
    os.utime(folder / SINGLE, ns=(stamp.mtime_ns, stamp.mtime_ns))

    read = []
    assert changed_files(folder, stamps) == []
    assert changed_files(folder, stamps, digest_all=True, on_bytes=read.append) == [SINGLE]
    assert sum(read) == sum(stamp.size_bytes for stamp in stamps)


def test_a_touched_file_is_read_once(folder, stamps, monkeypatch):
    os.utime(folder / SINGLE, (1, 1))
    read = []
    monkeypatch.setattr(model_folder, "sha256_of", lambda path: (read.append(path), stamps[1].sha256)[1])
    for _ in range(3):
        changed_files(folder, stamps)

    assert len(read) <= 1


def test_parts_of_a_gguf_file_are_found_by_their_names(tmp_path):
    names = [path.name for path in parts_of(tmp_path / "m-00001-of-00003.gguf")]

    assert names == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    assert parts_of(tmp_path / "m.gguf") == (tmp_path / "m.gguf",)
    assert parts_of(tmp_path / "m-00001-of-00001.gguf") == (tmp_path / "m-00001-of-00001.gguf",)
    for name in ("m-00002-of-00003.gguf", "m-00000-of-00000.gguf", "m-00001-of-99999.gguf", "m-00004-of-00003.gguf"):
        with pytest.raises(ValueError, match=name):
            parts_of(tmp_path / name)


def test_a_touched_file_is_read_once_for_many_threads(folder, stamps, monkeypatch):
    os.utime(folder / SINGLE, ns=(5, 5))
    read = []

    def slowly(path):
        read.append(path.name)
        time.sleep(0.2)
        return sha256_of(path)

    monkeypatch.setattr(model_folder, "sha256_of", slowly)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: changed_files(folder, stamps), range(4)))

    assert found == [[]] * 4
    assert read == [SINGLE]
